"""Error paths that no other test takes, and an inventory: every message that the package can give is in some test.

Each refusal of a verb is one line with exit code 1, and leaves every file and folder as it was.
"""

import ast
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import CHECKPOINT, Ran, refused
from conftest import FIXTURES, ROOT
from sample_bundle import tree, write_bundle

from mythos_edge.exporter.targets.ort_cpu import OrtCpuTarget
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import BuildError, BundleError, CheckpointError, ConfigError, MythosEdgeError, UsageError
from mythos_edge.runtime.sampling import Sampler, SamplingParams
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import given_tokens

# Arguments of a verb, and words of its refusal. B is a bundle, F a folder with the files of ``folder`` below.
VERBS = (
    ("score B --text= -o F/out.npz", "the name of a file or folder is empty: name one, or leave its option out"),
    ("bench B --depth 0.5", "--depth 0.5 looks for a threshold: expected 1 or more, and no --threshold"),
    ("bench B --depth 2 --threshold 0.5", "--depth 2 looks for a threshold: expected 1 or more, and no --threshold"),
    ("build B --target ort-cpu-int8", "is the name of a built target: ask for it with --target ort-cpu --weights int8"),
    ("tokenize F/tok.json --decode 1 -o F/x.npy", "--decode gives the text of ids: leave one out"),
    ("validate B --rope-table config", "--rope-table is about a checkpoint: add --against CHECKPOINT"),
    ("validate B --key model", "--key is about a checkpoint: add --against CHECKPOINT"),
    ("validate B --against fp32 --key model", "--key is about a checkpoint, but fp32 is a target of the bundle: leave"),
    ("validate B --against ort-cpu --level deep --config F/c.json", "but ort-cpu is a target of the bundle: leave it"),
    ("validate B --against F/m.onnx --rope-table stored", "m.onnx is a graph: leave it out"),
    ("validate B --positions 4", "--positions says what to compare on: add --against CHECKPOINT, or leave it out"),
    ("validate B --ids F/x.npy", "--ids says what to compare on: add --against CHECKPOINT, or leave it out"),
    ("validate B --against F/m.onnx --level smoke --text F/x", "--text says what to compare on, and --level smoke"),
    ("validate B --against C --positions 4 --ids F/x.npy", "--positions is the length of random tokens, and --ids"),
    ("serve B --api-key-file F/latin", "the API keys are no UTF-8 text"),
    ("serve B --api-key-file F/blank", "has no API key, expected one a line"),
    ("generate B --ids 1\0", "an argument has a zero byte in it, which no file name and no text can have"),
    ("export C -o F/new.bundle --tokenizer F/tokens", "is no file; expected a Hugging Face tokenizer.json"),
    ("export F/nan.pt -o F/new.bundle", "holds NaN: this checkpoint cannot be exported; use an earlier one"),
    ("export F/inf.pt -o F/new.bundle", "holds infinity: this checkpoint cannot be exported"),
    ("build B --weights int4 --dense int8 --block 32 --keep experts", "--block is 32, and no matrix left is int4"),
    ("export F/bins.index.json -o F/new.bundle", "bins.index.json: the model is one of several .bin files"),
    ("export F/missing.index.json -o F/new.bundle", "shard b.safetensors is missing: copy it beside the index"),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("given")
    (made / "latin").write_bytes(b"key\xff\n")
    (made / "blank").write_bytes(b" \n\n")
    (made / "tokens" / "tokenizer.json").mkdir(parents=True)
    (made / "missing.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    (made / "bins.index.json").write_text('{"weight_map": {"a": "b.bin"}}')
    from safetensors.torch import load_file

    (made / "config.json").write_bytes((CHECKPOINT / "config.json").read_bytes())
    for name, value in (("nan", torch.nan), ("inf", torch.inf)):
        weights = load_file(CHECKPOINT / "model.safetensors")
        (embed,) = (one for one in weights if one.endswith("embed.weight"))
        weights[embed][3, 2] = value
        torch.save(weights, made / f"{name}.pt")
    return made


@pytest.mark.parametrize(("line", "words"), VERBS)
def test_a_verb_refuses_in_one_line_and_leaves_everything_as_it_was(
    line: str, words: str, demo_bundle: Path, folder: Path, run: Callable[..., Ran]
) -> None:
    argv = [word.replace("F/", f"{folder}/") for word in line.split(" ")]
    argv = [{"B": str(demo_bundle), "C": str(CHECKPOINT)}.get(word, word) for word in argv]
    before = tree(demo_bundle), tree(folder), sorted(folder.rglob("*"))
    refused(run(*argv), words)
    assert (tree(demo_bundle), tree(folder), sorted(folder.rglob("*"))) == before


def test_a_text_from_a_stdin_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="stdin is no pipe that a text could come from: give -p"):
        given_tokens.text_from_stdin("-p")
    monkeypatch.setattr(given_tokens, "_MOST_TEXT_BYTES", 3)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1234")))
    with pytest.raises(UsageError, match="stdin: has more than 3 bytes, which is more than a text has"):
        given_tokens.text_from_stdin("-p")


def test_a_session_without_one_sequence_cannot_be_saved(demo_bundle: Path, tmp_path: Path) -> None:
    with Session.open(demo_bundle) as session:
        with pytest.raises(UsageError, match="but it has no sequence yet: generate from one prompt"):
            session.save(tmp_path / "x.npz")
        session.generate([[1], [2]], max_new_tokens=1)
        with pytest.raises(UsageError, match="but it has 2 sequences: generate from one prompt"):
            session.save(tmp_path / "x.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_no_token(value: float) -> None:
    with pytest.raises(MythosEdgeError, match="logits that are not finite: validate the bundle"):
        Sampler(SamplingParams()).sample(np.array([0.0, value], np.float32), [])


def test_calibration_is_a_method_itself() -> None:
    with pytest.raises(BuildError, match="calibration is a method of its own for int8 and int4: leave method out"):
        OrtCpuTarget(weights="int4", method="rtn", calibrate=Path("ids.npy"))


def test_a_listed_file_that_is_a_link_to_itself(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    (tmp_path / "b" / "tok.json").unlink()
    (tmp_path / "b" / "tok.json").symlink_to("tok.json")
    with pytest.raises(BundleError, match=r"file name 'tok.json' cannot be used|tok.json: (is missing|cannot be read)"):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    ("fixture", "change", "words"),
    [
        ("dory-small", {"swa_head_dim": 7}, "swa_head_dim is 7, but head_dim is .*: one size is known"),
        ("nanbeige-small", {"kv_channels": 3, "head_dim": 5}, "head_dim is 5, but kv_channels says 3: expected one"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_itself(fixture: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    values = json.loads((FIXTURES / fixture / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    (tmp_path / "model.safetensors").symlink_to(FIXTURES / fixture / "model.safetensors")
    with pytest.raises(ConfigError, match=words):
        open_checkpoint(tmp_path)


def test_a_tensor_beyond_its_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses such a file itself; should one get by, the tensor would be another's bytes."""
    from mythos_edge.model import tensor_files

    torch.save({"a": torch.ones(4)}, tmp_path / "a.pt")
    monkeypatch.setattr(tensor_files.TensorEntry, "n_bytes", property(lambda entry: 17))
    with pytest.raises(CheckpointError, match="a reaches beyond its storage: the file is damaged"):
        tensor_files.read_tensor_file(tmp_path / "a.pt")


# --- the inventory ------------------------------------------------------------------------------------------------

_ERRORS = {
    "MythosEdgeError", "UsageError", "ConfigError", "CheckpointError", "ExportError", "BuildError", "BundleError",
    "CapacityError", "QueueFull", "TimedOut",
}  # fmt: skip
# Letters in a row that a test has in common with a message to be a test of it.
_LETTERS = 9
# Messages that no machine of ours can give: a GPU's, TensorRT's; a fake of it stands in for what can be faked.
_NEEDS_A_GPU = {"plugins/trt_plugins.py", "plugins/cuda_driver.py", "runtime/backends/trt_engine.py",
                "runtime/backends/tensorrt.py", "exporter/engine.py", "exporter/targets/tensorrt.py"}  # fmt: skip


def _letters(text: str) -> str:
    """A text without what patterns and line breaks of a test change."""
    return re.sub(r"[^A-Za-z0-9]+", "", text)


def _raised(folder: str) -> Iterator[tuple[str, list[str]]]:
    """The place of every error that is made, and the constant parts of its message."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if "/lab/" in name or name in _NEEDS_A_GPU:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in _ERRORS:
                constants = [one.value for argument in node.args for one in ast.walk(argument)
                             if isinstance(one, ast.Constant) and isinstance(one.value, str)]  # fmt: skip
                yield f"{name}:{node.lineno}", [_letters(one) for one in constants]


@pytest.mark.parametrize("folder", ["model", "plugins", "exporter", "runtime", "scripts"])
def test_every_message_is_in_a_test(folder: str) -> None:
    """A new error comes with its test: this finds one whose words no test has."""
    tests = _letters("".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py"))))
    untold = []
    for place, parts in _raised(folder):
        # What passes another's message on has no words of its own.
        long = [part for part in parts if len(part) >= _LETTERS]
        windows = (part[at : at + _LETTERS] for part in long for at in range(len(part) - _LETTERS + 1))
        if long and not any(window in tests for window in windows):
            untold.append(f"{place}: {max(long, key=len)}")
    assert untold == []
