"""What a manifest must look like, and the one line that anything else ends in."""

import json
from dataclasses import replace
from typing import Any

import pytest
from sample_bundle import RECORDS, sample_manifest

from mythos_edge.model.errors import BundleError
from mythos_edge.model.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    GoldenSample,
    Manifest,
    Source,
    manifest_from_dict,
    manifest_to_dict,
)


def _as_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as a reader finds it: plain JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(manifest_to_dict(manifest)))
    return values


def _changed(*path: str | int, value: Any) -> dict[str, Any]:
    values = _as_json(sample_manifest())
    place: Any = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


def _read(values: dict[str, Any]) -> Manifest:
    return manifest_from_dict(values, origin="here.json")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokenizer": None},
        {"source": Source("m", "safetensors", "0" * 64, 1200)},
        {"graphs": {}},
        {"versions": {}},
        {"sample": GoldenSample((5,), 1, 0.99, (1,), (0,), (-1.0,), "router")},
    ],
)
def test_a_manifest_survives_the_way_through_json(changes: dict[str, Any]) -> None:
    manifest = sample_manifest(**changes)
    values = _as_json(manifest)
    assert values["schema_version"] == SCHEMA_VERSION
    assert _read(values) == manifest


def test_windows_are_part_of_the_model_where_there_are_any() -> None:
    """Bundles of models without windows are as they were before there were any, and so is what identifies them."""
    plain = sample_manifest()
    assert "slot_windows" not in _as_json(plain)["model"]
    count = sum(plain.model.slots.values())
    sliding = sample_manifest(model=replace(plain.model, slot_windows=(8, *[0] * (count - 1))))
    values = _as_json(sliding)
    assert values["model"]["slot_windows"][:2] == [8, 0]
    assert _read(values) == sliding
    assert sliding.identity != plain.identity
    for wrong in ([8], [-1] * count, [8] * 40):
        with pytest.raises(BundleError, match=rf"model\.slot_windows is .*, expected {count} numbers of positions"):
            _read(_changed("model", "slot_windows", value=wrong))


def test_parts_of_grouped_attention_are_keys_and_as_many_values() -> None:
    model = replace(sample_manifest().model, attention="grouped", cache_width=24, cache_parts=())
    assert (model.parts, model.halves) == ((12, 12), ((12,), (12,)))
    parted = replace(model, cache_parts=(4, 8, 6, 6))
    assert (parted.parts, parted.halves) == ((4, 8, 6, 6), ((4, 8), (6, 6)))
    for wrong in ((24,), (16, 8), (12, 6, 6)):
        with pytest.raises(BundleError, match=r"model\.cache_parts is .*, expected of grouped attention .* half of 24"):
            replace(model, cache_parts=wrong)
    latent = replace(model, attention="latent")
    assert latent.parts == (24,)
    assert replace(latent, cache_parts=(16, 8)).parts == (16, 8)


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ((), "manifest"),
        (("source",), "manifest.source"),
        (("sample",), "manifest.sample"),
        (("graphs", "step"), "manifest.graphs.step"),
        (("graphs", "step", "inputs", 1), "manifest.graphs.step.inputs"),
        (("targets", "ort-cpu"), "manifest.targets.ort-cpu"),
        (("files", "weights.safetensors"), "manifest.files.weights.safetensors"),
    ],
)
def test_unknown_and_missing_fields_are_refused_at_every_level(path: tuple[str | int, ...], where: str) -> None:
    values = _as_json(sample_manifest())
    place: Any = values
    for key in path:
        place = place[key]
    names = [name for name in place if name != "schema_version"]
    for name in names:
        kept = place.pop(name)
        with pytest.raises(BundleError, match="missing field") as caught:
            _read(values)
        assert f"{where} has missing field {name!r}" in str(caught.value)
        place[name] = kept
    assert _read(values) == sample_manifest()
    place["surprise"] = 1
    with pytest.raises(BundleError, match="unknown field 'surprise'") as caught:
        _read(values)
    assert str(caught.value).startswith(f"here.json: {where} ")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dtype",), 16),
        (("dtype",), None),
        (("max_context",), "512"),
        (("max_context",), 512.0),
        (("max_context",), True),
        (("graphs",), []),
        (("graphs", "step"), "step.onnx"),
        (("graphs", "step", "inputs"), {}),
        (("graphs", "step", "inputs", 0), "h"),
        (("graphs", "step", "inputs", 0, "shape"), "BSD"),
        (("graphs", "step", "inputs", 0, "shape", 0), 1.5),
        (("graphs", "step", "inputs", 0, "shape", 0), None),
        (("graphs", "step", "inputs", 0, "shape", 0), True),
        (("graphs", "step", "file"), None),
        (("targets", "ort-cpu", "graphs", "step"), 3),
        (("files", "weights.safetensors", "bytes"), "256"),
        (("files", "weights.safetensors", "bytes"), 256.0),
        (("files", "weights.safetensors"), None),
        (("versions", "torch"), 2.13),
        (("source", "step"), 1.5),
        (("source", "step"), False),
        (("sample", "ids"), 1),
        (("sample", "ids", 0), "1"),
        (("sample", "threshold"), "0.99"),
        (("sample", "threshold"), True),
        (("sample", "top_logits", 0), None),
        (("tokenizer",), 0),
        (("end_tokens",), None),
        (("end_tokens", 0, "id"), "2"),
        (("end_tokens", 0, "text"), 2),
        (("rope_table",), None),
        (("rope_table",), "guessed"),
        (("created",), 20250101),
        (("config",), []),
        (("model", "dim"), "2048"),
        (("model", "experts_per_token"), -1),
        (("model", "surprise"), 1),
    ],
)
def test_a_wrong_type_is_named_with_its_place(path: tuple[str | int, ...], value: Any) -> None:
    with pytest.raises(BundleError) as caught:
        _read(_changed(*path, value=value))
    message = str(caught.value)
    assert message.startswith("here.json: ")
    assert "\n" not in message
    last_name = [part for part in path if isinstance(part, str)][-1]
    assert last_name in message


@pytest.mark.parametrize("dtype", ["fp64", "float16", ""])
def test_a_dtype_that_is_none_is_refused(dtype: str) -> None:
    with pytest.raises(BundleError, match=f"here.json: dtype is '{dtype}', expected one of fp32, fp16, bf16"):
        _read(_changed("dtype", value=dtype))


def test_a_newer_schema_asks_for_an_upgrade() -> None:
    with pytest.raises(BundleError, match=r"newer mythos-edge .* upgrade"):
        # Its fields may be others: the version comes first.
        _read({"schema_version": SCHEMA_VERSION + 1, "other": 1})


@pytest.mark.parametrize("version", [None, "1", 1.0, True])
def test_a_schema_version_that_is_no_number_is_refused(version: Any) -> None:
    with pytest.raises(BundleError, match="schema_version"):
        _read(_changed("schema_version", value=version))
    without = _as_json(sample_manifest())
    del without["schema_version"]
    with pytest.raises(BundleError, match="schema_version is None"):
        _read(without)


@pytest.mark.parametrize("sha", ["", "ab" * 31, "ab" * 33, "AB" * 32, "g" * 64, "ab" * 31 + " a", "０" * 64])
def test_a_hash_must_be_64_small_hexadecimal_digits(sha: str) -> None:
    with pytest.raises(BundleError, match=r"files\.weights\.safetensors\.sha256 .* 64 hexadecimal digits"):
        _read(_changed("files", "weights.safetensors", "sha256", value=sha))


@pytest.mark.parametrize("name", ["step.onnx", "step.ort.onnx", "tok.json", "weights.safetensors"])
def test_every_file_in_use_must_be_listed(name: str) -> None:
    values = _as_json(sample_manifest())
    del values["files"][name]
    with pytest.raises(BundleError, match="files does not list") as caught:
        _read(values)
    assert repr(name) in str(caught.value)


UNSAFE = ["../x", "/etc/x", "a/../../x", "a/../x", "..", ".", "", "C:\\x", "C:x", "a\\..\\x", "x\0y", MANIFEST_FILE]


@pytest.mark.parametrize("name", UNSAFE)
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    listed = {**RECORDS, name: RECORDS["step.onnx"]}
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        sample_manifest(listed)
    values = _as_json(sample_manifest())
    values["files"][name] = values["files"]["step.onnx"]
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        _read(values)
    for place in (("graphs", "step", "file"), ("targets", "ort-cpu", "graphs", "step"), ("tokenizer",)):
        with pytest.raises(BundleError, match="leaves the bundle's folder"):
            _read(_changed(*place, value=name))


@pytest.mark.parametrize("name", ["../../x", *UNSAFE])
def test_names_of_targets_that_would_lead_their_files_out_of_the_folder_are_refused(name: str) -> None:
    values = _as_json(sample_manifest())
    values["targets"][name] = values["targets"]["ort-cpu"]
    with pytest.raises(BundleError, match=r"target name .* leaves the bundle's folder"):
        _read(values)


def test_a_file_in_a_subfolder_is_fine() -> None:
    listed = {**RECORDS, "parts/a..b.bin": RECORDS["step.onnx"]}
    assert "parts/a..b.bin" in _read(_as_json(sample_manifest(listed))).files


# --- what no export can have written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("sample", "ids"), [1, 32000], "sample has ids that are not in 0 .. 31999"),
        (("sample", "ids"), [1, -1], "sample has ids that are not in 0 .. 31999"),
        (("sample", "ids"), [], "sample has 0 ids, expected 1 to 64"),
        (("sample", "ids"), [1] * 65, "sample has 65 ids, expected 1 to 64"),
        (("sample", "ids"), [1, 2, 3], "sample has 2 depths for 3 ids"),
        (("sample", "depth"), [3, 0], "sample has depths that are not in 1 .. 4"),
        (("sample", "depth"), [3, 5], "sample has depths that are not in 1 .. 4"),
        (("sample", "max_depth"), 0, "sample has max_depth 0, expected 1 to 16"),
        (("sample", "max_depth"), 10**7, "sample has max_depth 10000000, expected 1 to 16"),
        (("sample", "threshold"), 1e30, "sample has threshold 1e+30, expected 0.99"),
        (("sample", "threshold"), float("nan"), "sample.threshold is nan, expected a finite number"),
        (("sample", "top_logits"), [float("inf"), 1.0], "sample.top_logits is inf, expected a finite number"),
        (("sample", "top_logits"), [1.0], "sample has 1 top_logits for 2 top_ids"),
        (("sample", "top_ids"), [7, 32000], "sample has top_ids that are not in 0 .. 31999"),
        (("sample", "top_ids"), [-1, 7], "sample has top_ids that are not in 0 .. 31999"),
        (("sample", "tie"), "draw", "sample has tie 'draw', expected one of '', 'router', 'halting'"),
        (("max_context",), 0, "max_context is 0, expected 1 to 16777216"),
        (("max_context",), 10**12, "max_context is 1000000000000, expected 1 to 16777216"),
        (("model", "max_depth"), 10**7, "model.max_depth is 10000000, expected 1 to 4096"),
        (("presets", "knee", "max_depth"), 10**7, "presets.knee.max_depth is 10000000, expected 1 to 4096"),
        (("presets", "knee", "kl"), float("nan"), "presets.knee.kl is nan, expected a finite number"),
        (("created",), list(range(10**5)), "manifest.created is [0, 1, 2, 3, 4, 5, ...], expected str"),
    ],
)
def test_edited_values_are_one_short_line(path: tuple[str, ...], value: Any, words: str) -> None:
    with pytest.raises(BundleError) as caught:
        _read(json.loads(json.dumps(_changed(*path, value=value))))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("inputs", 0, "name"), "state", "state (float32, ['batch', 'chunk', 2048]) where the input h"),
        (("inputs", 3, "dtype"), "int32", "depth (int32"),
        (("inputs",), None, "nothing where the input past"),
        (("outputs", 4, "shape"), ["batch", "chunk", 576], "rows_0 (float32, ['batch', 'chunk', 576])"),
        (("outputs", 1, "shape", 1), "chunk", "where the output out_next"),
        (("outputs", 4, "dtype"), "float16", "where the output rows_0 (float32"),
        (("inputs", 10, "dtype"), "float8", "graphs compute in 'float8'"),
    ],
)
def test_a_graph_of_a_stage_has_what_the_stage_declares(path: tuple[Any, ...], value: Any, told: str) -> None:
    """The table of stages is what runtime and targets are written against."""
    if value is None:
        inputs = _as_json(sample_manifest())["graphs"]["step"]["inputs"][:-1]
        values = _changed("graphs", "step", "inputs", value=inputs)
    else:
        values = _changed("graphs", "step", *path, value=value)
    with pytest.raises(BundleError) as caught:
        _read(values)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [("max_depth", 12), ("threshold", 0.5), ("head_dim", 7), ("attention", "grouped")]
)
def test_another_model_is_another_bundle(field: str, value: Any) -> None:
    """The runtime goes by ``model``, so targets and saved sessions of another are not this bundle's."""
    values = _changed("model", field, value=value) | ({"sample": _of(value)} if field == "threshold" else {})
    # Those of latent attention are none of grouped.
    del values["model"]["cache_parts"]
    other = _read(values)
    assert other.identity != sample_manifest().identity


def _of(threshold: float) -> dict[str, Any]:
    sample: dict[str, Any] = _as_json(sample_manifest())["sample"]
    return {**sample, "threshold": threshold}
