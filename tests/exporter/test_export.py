"""Exporting: what a bundle holds, and that a failure leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file

from mythos_edge.exporter import export as export_module
from mythos_edge.exporter.export import export_bundle
from mythos_edge.exporter.weights import plan_weights, write_weights
from mythos_edge.model import bundle_writer
from mythos_edge.model.bundle import open_bundle, verify_hashes
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import CheckpointError, ConfigError, ExportError
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import load_network

CHECKPOINT = FIXTURES / "mla-small"


def test_a_bundle_is_whole_and_hashes_hold(mla_bundle: Path) -> None:
    bundle = open_bundle(mla_bundle, hashes=True)
    verify_hashes(bundle)
    listed = {*bundle.manifest.files, "manifest.json"}
    assert {path.name for path in mla_bundle.iterdir()} == listed
    assert {"prelude.onnx", "step.onnx", "coda.onnx", "model.onnx", "model_with_past.onnx"} <= listed
    assert bundle.manifest.versions["torch"] == torch.__version__
    assert len(bundle.manifest.source.sha256) == 64


@pytest.mark.parametrize("name", ["prelude", "step", "coda", "model", "model_with_past", "step.ort-cpu"])
def test_graphs_pass_the_full_checker_and_hold_no_weights(name: str, golden_bundle: Path) -> None:
    path = golden_bundle / f"{name}.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    assert path.stat().st_size < 200_000
    model = onnx.load(str(path), load_external_data=False)
    locations = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert locations == {"weights.safetensors"}


@pytest.mark.parametrize("name", ["prelude", "step", "coda", "model", "model_with_past"])
def test_the_manifest_describes_every_graph(name: str, golden_bundle: Path) -> None:
    spec = open_bundle(golden_bundle).manifest.graphs[name]
    model = onnx.load(str(golden_bundle / spec.file), load_external_data=False)
    for values, specs in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        assert [value.name for value in values] == [one.name for one in specs]
        for value, one in zip(values, specs, strict=True):
            kind = value.type.tensor_type
            assert [dim.dim_param or dim.dim_value for dim in kind.shape.dim] == list(one.shape)
            assert onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name == one.dtype


def _loops(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "Loop"]


@pytest.mark.parametrize("name", ["model", "model_with_past"])
def test_the_recurrence_is_a_loop_that_tensorrt_can_take(name: str, golden_bundle: Path) -> None:
    model = onnx.load(str(golden_bundle / f"{name}.onnx"), load_external_data=False)
    (loop,) = _loops(model.graph)
    body = loop.attribute[0].g
    assert all(loop.input[:2])
    condition = body.input[1].name
    assert not any(condition in node.input for node in body.node), "cond_in must not be read"
    assert not body.initializer
    carried = len(loop.input) - 2
    scanned = len(body.output) - 1 - carried
    assert scanned == (name == "model_with_past")
    ops = [node for node in [*model.graph.node, *body.node] if node.domain == "mythos"]
    assert ops
    for node in ops:
        assert [a.s for a in node.attribute if a.name == "plugin_namespace"] == [b"mythos"]


def test_names_of_model_onnx(golden_bundle: Path) -> None:
    spec = open_bundle(golden_bundle).manifest.graphs["model"]
    assert [(one.name, one.dtype, len(one.shape)) for one in spec.inputs] == [
        ("input_ids", "int64", 2),
        ("max_depth", "int64", 0),
        ("threshold", "float32", 0),
    ]
    assert [(one.name, one.shape[:2]) for one in spec.outputs] == [
        ("logits", ("batch", "chunk")),
        ("depth", ("batch", "chunk")),
    ]


def test_the_weights_are_one_safetensors_file_in_network_layout(golden_bundle: Path, golden_name: str) -> None:
    stored = load_file(golden_bundle / "weights.safetensors")
    with open_checkpoint(FIXTURES / golden_name) as checkpoint:
        parameters = dict(load_network(checkpoint).named_parameters())
    assert stored.keys() == parameters.keys()
    for name, value in parameters.items():
        assert torch.equal(stored[name], value), name


def test_max_context_sizes_the_rope_tables(exported: Callable[..., Path]) -> None:
    bundle = open_bundle(exported(CHECKPOINT, dtype="bf16"))
    assert bundle.manifest.max_context == config_of(bundle.manifest).max_seq_len
    with open_checkpoint(CHECKPOINT) as checkpoint:
        plan = plan_weights(checkpoint.config, 19, "fp32")
    assert {entry.shape[0] for name, entry in plan.file.entries.items() if name.startswith("rope")} == {19}


class _Poisoned:
    """A checkpoint with one weight replaced."""

    def __init__(self, checkpoint: Any, name: str, value: float) -> None:
        self._checkpoint, self._name, self._value = checkpoint, name, value
        self.config = checkpoint.config

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        tensor: torch.Tensor = self._checkpoint.read(name, start, stop)
        if name == self._name:
            tensor.view(-1)[0] = self._value
        return tensor


@pytest.mark.parametrize(
    ("value", "dtype", "kind", "message"),
    [
        (float("nan"), "fp32", CheckpointError, r"coda\.0\.ffn\.down\.weight: holds NaN"),
        (float("inf"), "fp32", CheckpointError, r"coda\.0\.ffn\.down\.weight: holds infinity"),
        (1e6, "fp16", ExportError, r"a weight of 1e\+06 does not fit fp16 .*--dtype bf16"),
    ],
)
def test_weights_that_cannot_be_stored_are_named(
    value: float, dtype: str, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with open_checkpoint(CHECKPOINT) as checkpoint:
        reader = _Poisoned(checkpoint, "coda.0.ffn.down.weight", value)
        plan = plan_weights(checkpoint.config, 8, dtype)
        with pytest.raises(kind, match=message):
            write_weights(plan, reader, tmp_path / "weights.safetensors", lambda done: None)


def _export(output: Path, **options: Any) -> None:
    with open_checkpoint(CHECKPOINT) as checkpoint:
        export_bundle(checkpoint, output, **options)


def test_an_existing_output_is_not_touched(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(ExportError, match="exists"):
            _export(output, force=force)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious.txt"]


@pytest.mark.parametrize("phase", ["weights", "graphs"])
def test_ctrl_c_leaves_nothing(phase: str, tmp_path: Path) -> None:
    def interrupt(now: str, fraction: float) -> None:
        if now == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _export(tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_and_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(bundle_writer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ExportError, match=r"the bundle needs \d+ MB, 0 MB are free"):
            _export(tmp_path / "out")

    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(ExportError, match="No space left on device"):
        _export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_tracer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ExportError("tracing the model failed: on purpose")

    monkeypatch.setattr(export_module, "kept", fail)
    with pytest.raises(ExportError, match="on purpose"):
        _export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such tokenizer"), ("{}", "not a Hugging Face tokenizer.json")]
)
def test_a_bad_tokenizer_is_refused_first(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ExportError, match=message):
        _export(tmp_path / "out", tokenizer=path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(400)}, unk_token="w0")).save(str(path))
    with pytest.raises(ConfigError, match=r"own vocabulary reaches id 399 .*, but the model knows ids 0 .. 330"):
        _export(tmp_path / "out", tokenizer=path)


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="max_context is 0"):
        _export(tmp_path / "out", max_context=0)
    with pytest.raises(ExportError, match="dtype is 'int3'"):
        _export(tmp_path / "out", dtype="int3")


def test_force_replaces_a_bundle(mla_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    shutil.copytree(mla_bundle, output)
    with pytest.raises(ExportError, match="exists: choose another folder or pass --force"):
        _export(output)

    def fail(*_: object) -> None:
        raise ExportError("failed on purpose")

    monkeypatch.setattr(export_module, "write_weights", fail)
    with pytest.raises(ExportError, match="on purpose"):
        _export(output, force=True)
    open_bundle(output, hashes=True)
    monkeypatch.undo()
    _export(output, force=True, max_context=32)
    assert open_bundle(output, hashes=True).manifest.max_context == 32


def test_the_golden_sample_is_what_the_network_says(mla_bundle: Path) -> None:
    sample = open_bundle(mla_bundle).manifest.sample
    with open_checkpoint(CHECKPOINT) as checkpoint, torch.no_grad():
        network = load_network(checkpoint)
    scored = network(torch.tensor([sample.ids]), sample.max_depth)
    assert tuple(scored.depth[0].tolist()) == sample.depth
    np.testing.assert_allclose(scored.logits[0, -1, list(sample.top_ids)].numpy(), sample.top_logits, atol=1e-3)


def test_sharded_and_narrow_checkpoints_give_the_same_bundle(tmp_path: Path, mla_bundle: Path) -> None:
    tensors = load_file(CHECKPOINT / "model.safetensors")
    names, folder = sorted(tensors), tmp_path / "sharded"
    folder.mkdir()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = {name: files[index % 2] for index, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if parts[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    shutil.copy(CHECKPOINT / "config.json", folder)
    with open_checkpoint(folder) as checkpoint:
        plan = plan_weights(checkpoint.config, checkpoint.config.max_seq_len, "fp32")
        hashes = write_weights(plan, checkpoint, tmp_path / "weights.safetensors", lambda done: None)
    manifest = open_bundle(mla_bundle).manifest
    assert hashes.file == manifest.files["weights.safetensors"].sha256
    assert hashes.source == manifest.source.sha256


@pytest.mark.parametrize("context", [0, (1 << 24) + 1, 10**12])
def test_contexts_that_no_table_can_hold_are_refused_before_the_work(context: int, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"max_context is {context}, expected at least 1 and at most 16777216"):
        _export(tmp_path / "out", max_context=context)
    assert list(tmp_path.iterdir()) == []


def test_a_context_that_the_disk_cannot_hold_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=300 << 20))
    monkeypatch.setattr(export_module, "kept", lambda *_: pytest.fail("traced before the disk was looked at"))
    with pytest.raises(ExportError, match=r"the bundle needs .* MB, 315 MB are free"):
        _export(tmp_path / "out", max_context=1 << 24)
    assert list(tmp_path.iterdir()) == []


def _changed_checkpoint(folder: Path, name: str, value: float, dtype: torch.dtype) -> Path:
    folder.mkdir()
    tensors = load_file(CHECKPOINT / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    tensors[name][...] = value
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(CHECKPOINT / "config.json", folder)
    return folder


def test_a_model_that_overflows_is_not_exported(tmp_path: Path) -> None:
    source = _changed_checkpoint(tmp_path / "source", "coda.0.ffn_norm.weight", 3e38, torch.float32)
    with open_checkpoint(source) as checkpoint, pytest.raises(ExportError, match=r"logits are not finite: .*overflow"):
        export_bundle(checkpoint, tmp_path / "made" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("dtype", "stored", "value", "words"),
    [
        (
            "fp16",
            torch.float32,
            7e4,
            "a weight of 70000 does not fit fp16 .largest 65504.: export with --dtype bf16 or",
        ),
        ("bf16", torch.float32, 3.4e38, "a weight of 3.4e.38 does not fit bf16 .*: export with --dtype fp32"),
        ("fp32", torch.float64, 1e300, "a weight of 1e.300 does not fit fp32 .*: use an earlier checkpoint"),
    ],
)
def test_a_weight_that_overflows_what_it_is_stored_in_is_refused(
    dtype: str, stored: torch.dtype, value: float, words: str, tmp_path: Path
) -> None:
    source = _changed_checkpoint(tmp_path / "source", "embed.weight", value, stored)
    with open_checkpoint(source) as checkpoint:
        plan = plan_weights(checkpoint.config, 8, dtype)
        with pytest.raises(ExportError, match=f"embed: {words}"):
            write_weights(plan, checkpoint, tmp_path / "weights.safetensors", lambda done: None)
