"""``diff``: planted differences are found, measured as numpy does, and nothing else is; mistakes are one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from built import build_cpu
from command_line import Ran
from conftest import FIXTURES
from safetensors.torch import load_file, save_file

from mythos_edge.model import tensor_difference
from mythos_edge.model.bundle import Bundle, open_bundle, read_manifest
from mythos_edge.model.bundle_writer import record_of, update_manifest
from mythos_edge.model.entry_reader import EntryReader
from mythos_edge.model.tensor_files import read_tensor_file

WEIGHTS = "weights.safetensors"
MATRIX = "step.lora.down"
Diff = Callable[..., dict[str, Any]]


@pytest.fixture
def diff(run: Callable[..., Ran]) -> Diff:
    """The JSON of a comparison, whose exit code agrees with it."""

    def call(*argv: object) -> dict[str, Any]:
        ran = run("diff", *argv, "--json")
        assert ran.code == (0 if ran.json["same"] else 1), ran.err
        found: dict[str, Any] = ran.json
        return found

    return call


@pytest.fixture
def other(mla_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be changed at will."""
    return Path(shutil.copytree(mla_bundle, tmp_path / "other.bundle"))


def listed_again(bundle: Path, name: str) -> None:
    """Lists a file that was changed as it is now."""
    opened = Bundle(bundle, read_manifest(bundle))
    update_manifest(opened, files=lambda files: {**files, name: record_of(bundle / name)})


def flip(path: Path, tensor: str, value: int, bit: int) -> tuple[np.ndarray, np.ndarray]:
    """Flips one bit of a value of a tensor in a file; the tensor before and after."""
    entry = read_tensor_file(path).entries[tensor]
    before = load_file(path)[tensor].float().numpy().copy()  # the file stays mapped
    data = bytearray(path.read_bytes())
    data[entry.offset + value * entry.dtype.itemsize + bit // 8] ^= 1 << bit % 8
    path.unlink()
    path.write_bytes(data)
    return before, load_file(path)[tensor].float().numpy()


def only(found: dict[str, Any], *parts: str) -> None:
    """No other part than ``parts`` differs."""
    for name in ("settings", "config", "tensors", "graphs", "targets", "text"):
        part = found.get(name, {})
        whole = [part[key] for key in ("only_in_a", "only_in_b", "changed")] if "changed" in part else [part]
        assert any(whole) == (name in parts), (name, part)


def test_a_copy_and_another_export_are_the_same(
    mla_bundle: Path, other: Path, diff: Diff, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    found = diff(mla_bundle, other)
    only(found)
    assert (found["a"], found["b"]) == (str(mla_bundle), str(other))
    assert found["tensors"]["compared"] == len(read_tensor_file(mla_bundle / WEIGHTS).entries)
    assert found["graphs"]["compared"] == len(open_bundle(mla_bundle).manifest.graphs)
    assert run("export", FIXTURES / "mla-small", "-o", tmp_path / "again.bundle").code == 0
    only(diff(mla_bundle, tmp_path / "again.bundle"))
    said = run("diff", mla_bundle, other).out
    assert said.splitlines()[-1] == "the same"


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_one_flipped_bit_of_a_weight(mla_bundle: Path, other: Path, diff: Diff, bit: int) -> None:
    before, after = flip(other / WEIGHTS, MATRIX, 17, bit)
    found = diff(mla_bundle, other)
    only(found, "tensors")
    (changed,) = found["tensors"]["changed"]
    assert changed["name"] == MATRIX
    assert (changed["changed"], changed["values"], changed["not_finite"]) == (1, before.size, 0)
    assert changed["share"] == 1 / before.size
    wide = after.astype(np.float64) - before
    assert changed["max_abs"] == np.abs(wide).max() > 0
    assert changed["relative_l2"] == pytest.approx(np.linalg.norm(wide) / np.linalg.norm(before.astype(np.float64)))


def test_the_sign_of_a_zero_and_numbers_that_are_none() -> None:
    a = torch.tensor([0.0, 1.0, torch.nan, torch.inf, 2.0])
    b = torch.tensor([-0.0, torch.nan, torch.nan, torch.inf, 2.5])
    found = tensor_difference.tensor_difference([(a, b)])
    assert (found.values, found.changed, found.not_finite, found.max_abs) == (5, 3, 1, 0.5)
    assert found.relative_l2 == pytest.approx(0.5 / 5**0.5)
    # Of two dtypes bits say nothing.
    found = tensor_difference.tensor_difference([(torch.tensor([-0.0, 1.0, torch.nan]), b[:3].double())])
    assert (found.changed, found.not_finite) == (1, 1)
    assert tensor_difference.tensor_difference([(torch.zeros(3), torch.ones(3))]).relative_l2 == float("inf")


def test_a_tensor_of_every_dtype_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_difference, "_PIECE_ELEMENTS", 7)
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int64, torch.int8)
    kinds += (torch.float8_e4m3fn,)
    for name, last in (("a", 3), ("b", 5)):
        numbers = torch.arange(40)
        numbers[-1] = last
        tensors = {f"{kind}": numbers.view(5, 8).to(kind) for kind in kinds} | {"scalar": torch.tensor(float(last))}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    a, b = (read_tensor_file(tmp_path / f"{name}.safetensors").entries for name in "ab")
    lengths = []
    read = EntryReader.read

    def spy(self: EntryReader, entry: Any, start: int = 0, stop: int | None = None) -> torch.Tensor:
        values = read(self, entry, start, stop)
        lengths.append(values.numel())
        return values

    monkeypatch.setattr(EntryReader, "read", spy)
    reader = EntryReader()
    for name in tensors:
        found = tensor_difference.tensor_difference(tensor_difference.pairs_of(reader, a[name], b[name]))
        assert (found.changed, found.max_abs, found.values) == (1, 2.0, tensors[name].numel()), name
    reader.close()
    assert max(lengths) == 7


def test_bundles_of_two_dtypes(exported: Callable[..., Path], diff: Diff, mla_bundle: Path) -> None:
    found = diff(mla_bundle, exported(FIXTURES / "mla-small", dtype="bf16"))
    assert found["settings"]["dtype"] == {"a": "fp32", "b": "bf16"}
    assert not found["config"]
    by_name = {one["name"]: one for one in found["tensors"]["changed"]}
    one = next(value for name, value in by_name.items() if "dtype" in value)
    assert one["dtype"] == {"a": "float32", "b": "bfloat16"}
    assert 0 < one["relative_l2"] < 2**-8
    assert MATRIX not in by_name  # stays float32


def test_two_models(mla_bundle: Path, exported: Callable[..., Path], diff: Diff, run: Callable[..., Ran]) -> None:
    gqa = exported(FIXTURES / "gqa-small")
    found = diff(mla_bundle, gqa)
    assert found["config"]["attn_type"] == {"a": "mla", "b": "gqa"}
    names = [set(read_tensor_file(bundle / WEIGHTS).entries) for bundle in (mla_bundle, gqa)]
    assert set(found["tensors"]["only_in_a"]) == names[0] - names[1]
    assert set(found["tensors"]["only_in_b"]) == names[1] - names[0] != set()
    ran = run("diff", mla_bundle, gqa)
    assert ran.code == 1
    assert '  attn_type "mla" -> "gqa"' in ran.out
    assert ran.out.splitlines()[-1] == "DIFFERENT"


def changed_graph(bundle: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(bundle / "step.onnx", load_external_data=False)
    change(model.graph)
    onnx.save(model, bundle / "step.onnx")
    listed_again(bundle, "step.onnx")


def test_nodes_of_a_graph(mla_bundle: Path, other: Path, diff: Diff) -> None:
    def renamed(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.output[0] not in {value.name for value in graph.output})
        old = node.output[0]
        node.name, node.output[0] = "another", "also_another"
        for user in graph.node:
            user.input[:] = ["also_another" if name == old else name for name in user.input]

    def one_more(graph: onnx.GraphProto) -> None:
        node = graph.node[-1]
        graph.node.append(onnx.helper.make_node("Neg", [node.input[0]], ["nothing"]))

    changed_graph(other, renamed)
    only(diff(mla_bundle, other))
    changed_graph(other, one_more)
    found = diff(mla_bundle, other)
    only(found, "graphs")
    nothing = {"inputs": {}, "outputs": {}, "added": {}, "removed": {}, "changed": {}, "rewired": False}
    assert found["graphs"]["changed"] == {"step": {**nothing, "added": {"Neg": 1}}}
    assert diff(other, mla_bundle)["graphs"]["changed"] == {"step": {**nothing, "removed": {"Neg": 1}}}


def test_a_graph_that_is_wired_in_another_way(mla_bundle: Path, other: Path, diff: Diff) -> None:
    def swapped(graph: onnx.GraphProto) -> None:
        made = {name for node in graph.node for name in node.output}
        node = next(node for node in graph.node if node.op_type == "Add" and made.issuperset(node.input))
        node.op_type = "Sub"

    changed_graph(other, swapped)
    found = diff(mla_bundle, other)["graphs"]["changed"]["step"]
    assert (found["added"], found["removed"]) == ({"Sub": 1}, {"Add": 1})
    reference = other.with_name("reference.bundle")
    shutil.copytree(other, reference)

    def turned(graph: onnx.GraphProto) -> None:
        made = {name for node in graph.node for name in node.output}
        node = next(node for node in graph.node if node.op_type == "Sub" and made.issuperset(node.input))
        node.input[:] = [*reversed(node.input)]

    changed_graph(other, turned)
    found = diff(reference, other)
    only(found, "graphs")
    assert found["graphs"]["changed"]["step"]["rewired"] is True


def test_targets_and_their_weights(rounded_bundle: Path, demo_bundle: Path, tmp_path: Path, diff: Diff) -> None:
    found = diff(demo_bundle, rounded_bundle)
    only(found, "targets")
    assert found["targets"]["only_in_b"] == ["ort-cpu-int4"]
    again = Path(shutil.copytree(demo_bundle, tmp_path / "again.bundle"))
    build_cpu(again, "int4")
    only(diff(rounded_bundle, again))
    (own,) = open_bundle(again).own_weights("ort-cpu-int4")
    tensor = next(iter(read_tensor_file(again / own).entries))
    flip(again / own, tensor, 5, 1)
    found = diff(rounded_bundle, again)
    only(found, "targets")
    changed = found["targets"]["changed"]["ort-cpu-int4"]
    assert changed.keys() == {"tensors"}
    assert [(one["name"], one["changed"]) for one in changed["tensors"]["changed"]] == [(tensor, 1)]


def test_tokenizer_and_tokens_that_end_a_text(
    text_bundle: Path, text_model: tuple[Path, Path], exported: Callable[..., Path], tmp_path: Path, diff: Diff
) -> None:
    found = diff(text_bundle, exported(text_model[0]))
    assert found["text"]["tokenizer"]["b"] is None
    assert len(found["text"]["tokenizer"]["a"]) == 64
    copied = Path(shutil.copytree(text_bundle, tmp_path / "copied.bundle"))
    values = json.loads((copied / "manifest.json").read_text())
    ends = values["end_tokens"]
    values["end_tokens"] = [*ends, {"id": 7, "text": ""}]
    (copied / "manifest.json").write_text(json.dumps(values))
    found = diff(text_bundle, copied)
    only(found, "text")
    assert found["text"] == {"end_tokens": {"a": ends, "b": values["end_tokens"]}}


@pytest.mark.parametrize("name", ["mla-small", "gqa-small", "ouro-small", "dory-small", "nanbeige-small"])
def test_a_bundle_and_its_checkpoint(name: str, exported: Callable[..., Path], tmp_path: Path, diff: Diff) -> None:
    bundle = exported(FIXTURES / name)
    found = diff(bundle, FIXTURES / name)
    only(found)
    assert found["tensors"]["compared"] == len(read_tensor_file(bundle / WEIGHTS).entries)
    other = Path(shutil.copytree(bundle, tmp_path / "other.bundle"))
    tensor = max(read_tensor_file(other / WEIGHTS).entries.values(), key=lambda entry: entry.n_elements).name
    before, after = flip(other / WEIGHTS, tensor, 3, 30)
    for sides, (old, new) in (((FIXTURES / name, other), (before, after)), ((other, FIXTURES / name), (after, before))):
        (changed,) = diff(*sides)["tensors"]["changed"]
        assert (changed["name"], changed["changed"]) == (tensor, 1)
        apart = np.linalg.norm(new.astype(np.float64) - old) / np.linalg.norm(old.astype(np.float64))
        assert changed["relative_l2"] == pytest.approx(apart)


def test_a_narrow_bundle_is_its_checkpoint_rounded(exported: Callable[..., Path], diff: Diff) -> None:
    only(diff(exported(FIXTURES / "mla-small", dtype="fp16"), FIXTURES / "mla-small"))


def test_two_checkpoints(tmp_path: Path, diff: Diff, run: Callable[..., Ran]) -> None:
    folder = Path(shutil.copytree(FIXTURES / "ouro-small", tmp_path / "ouro"))
    only(diff(FIXTURES / "ouro-small", folder))
    (folder / "tokenizer.json").write_text("{}")
    weights = load_file(folder / "model.safetensors")
    name = max(weights, key=lambda one: weights[one].numel())
    weights[name].view(-1)[5] += 1
    save_file(weights, folder / "model.safetensors")
    found = diff(FIXTURES / "ouro-small", folder)
    only(found, "tensors", "text")
    assert [(one["name"], one["changed"]) for one in found["tensors"]["changed"]] == [(name, 1)]
    assert found["text"]["tokenizer.json"]["a"] is None
    ran = run("diff", FIXTURES / "ouro-small", folder)
    assert f"  {name}: 1 of {weights[name].numel()} values" in ran.out
    found = diff(FIXTURES / "ouro-small", FIXTURES / "dory-small")
    assert found["settings"]["family"] == {"a": "ouro", "b": "dory"}


def test_mistakes_are_one_line_and_exit_code_2(
    mla_bundle: Path, other: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "empty").mkdir()
    truncated = other / WEIGHTS
    truncated.write_bytes(truncated.read_bytes()[:-4])
    for a, b, words in (
        (mla_bundle, tmp_path / "nowhere", "nowhere: no such file or folder"),
        (tmp_path / "notes.txt", mla_bundle, "notes.txt"),
        (mla_bundle, tmp_path / "empty", "no model in this folder"),
        (mla_bundle, FIXTURES / "ouro-small", "compared within one family"),
        (mla_bundle, other, "the manifest says"),
    ):
        ran = run("diff", a, b)
        assert (ran.code, ran.out) == (2, ""), ran
        (line,) = ran.err.splitlines()
        assert line.startswith("error: ")
        assert words in line
        assert "internal error" not in line
        ran = run("diff", a, b, "--json")
        assert (ran.code, ran.json.keys()) == (2, {"error"})


def test_a_damaged_graph_is_an_error(mla_bundle: Path, other: Path, run: Callable[..., Ran]) -> None:
    (other / "step.onnx").write_bytes(b"\xff" * 100)
    listed_again(other, "step.onnx")
    ran = run("diff", mla_bundle, other)
    assert ran.code == 2
    assert "step.onnx: not an ONNX file, or damaged" in ran.err
