"""Every verb with every argument that a user can get wrong or mean ill: one line, one object, no control character."""

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import CHECKPOINT, Ran

from mythos_edge.scripts.lab.train_text import byte_tokenizer

# Each verb's arguments: X is the hostile one, B a bundle, C a checkpoint, I ids, L prompts, T a tokenizer, O an output.
FORMS = {
    "inspect": ("X", "C --config X"),
    "export": ("X -o O", "C -o O --config X", "C -o O --tokenizer X"),
    "build": (
        "X --weights int8",
        "B --target X",
        *(f"B --weights int8 {option} X" for option in ("--keep", "--calibrate")),
    ),
    "tokenize": ("X -p x", "T -p X", "T --text X", "T --decode X", "T --decode 1 -o X"),
    "generate": (
        "X --ids 1",
        "B -p X",
        "B --ids X",
        "B -f X",
        "B --file X -o O",
        "B --file L -o X --max-depth 0",
        "B --ids 1 --save-session X --max-depth 0",
        *(
            f"B --ids 1 --max-new-tokens 1 {option} X"
            for option in ("--stop", "--target", "--preset", "--threads", "--policy", "--session", "--logprobs", "")
        ),
    ),
    "score": ("X --ids I -o O", "B --ids X -o O", "B --ids I -o O --target X", "B --ids I -o X --max-depth 0"),
    "validate": ("X", *(f"B --against {more}" for more in ("X", "C --config X", "C --ids X", "fp32 --target X"))),
    "tune": (
        "X --data I",
        "B --data X",
        *(
            f"B --data I {option} X"
            for option in ("--targets", "--thresholds", "--max-depths", "--max-depths 0 -o", "--max-depths 0 --html")
        ),
    ),
    "bench": ("X", "B --target X", "B --weights X", "B --format X", "B --target X --html O"),
    "demo": ("X", "add X 1", "add 1 2 --bundle X"),
    "doctor": ("X",),
    "completion": ("X",),
    "X": ("",),
}
HOSTILE = {
    "empty": "",
    "a space": " ",
    "a dash": "-",
    "two dashes": "--",
    "an unknown option": "--nonsense",
    "a zero byte": "a\0b",
    "a long name": "n" * 300,
    "a long path": "/".join(["n" * 200] * 30),
    "no UTF-8": os.fsdecode(b"\xff\xfe"),
    "escape codes": "\x1b[2J\x9b31m\r\b",
    "two lines": "a\nb",
    "a turned line": "\u202egnp",
    "a home": "~nobody/x",
    "a loop": "{}/loop",
    "below a loop": "{}/loop/x",
    "a folder": "{}/folder",
    "absent": "{}/absent/x",
    "below a file": "{}/text/x",
    "text": "{}/text",
    "an empty file": "{}/nothing",
    "bytes": "{}/bytes",
    "deep JSON": "{}/deep.json",
    "JSON in Latin-1": "{}/latin.json",
    "JSON with escape codes": "{}/escape.json",
    "a device": "/dev/null",
    "memory": "/proc/self/mem",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    np.save(folder / "ids.npy", np.arange(16)[None] % 9)
    (folder / "prompts.jsonl").write_text('{"ids": [1]}\n')
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "text").write_text("hello")
    (folder / "nothing").write_bytes(b"")
    (folder / "bytes").write_bytes(bytes(range(256)) * 10)
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "latin.json").write_bytes(b'{"\xe9": 1}')
    (folder / "escape.json").write_bytes(b'{"\x1b[2J": 1, "dim\\u001b[2J": 2}')
    return folder


def _is_clean(text: str) -> bool:
    """Whether a terminal shows all of a text and does nothing else."""
    return all(unicodedata.category(one) not in ("Cc", "Cf", "Cs") for one in text.replace("\n", ""))


def _check(ran: Ran, name: str) -> None:
    assert ran.code in (0, 1, 2), name
    assert "internal error" not in ran.err, (name, ran.err)
    assert "Traceback" not in ran.err, (name, ran.err)
    assert _is_clean(ran.out + ran.err), (name, ran)
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (ran.code != 0), (name, ran.err)
    if ran.code:
        # What else there is: the usage, what was under way and notes.
        assert ran.err.splitlines()[-1] == errors[0], (name, ran.err)
        assert ran.out == "" or json.loads(ran.out)["error"], (name, ran.out)


@pytest.mark.parametrize("verb", FORMS)
def test_every_argument_of_every_verb(
    verb: str, demo_bundle: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"B": demo_bundle, "C": CHECKPOINT, "I": work / "ids.npy", "O": tmp_path / "out"}
    places["L"] = work / "prompts.jsonl"
    places["T"] = work / "tokenizer.json"
    before = sorted(file.name for file in demo_bundle.iterdir())
    for form in FORMS[verb]:
        for name, value in HOSTILE.items():
            hostile = value.format(work)
            words = [hostile if word == "X" else str(places.get(word, word)) for word in [verb, *form.split()]]
            ran = run(*words)
            _check(ran, f"{name}: {words}")
            if name in ("two dashes", "a zero byte"):
                continue
            ran = run(*words, "--json")
            _check(ran, f"{name}: {words} --json")
            # Where nothing of the command line is understood the help is for people.
            assert isinstance(ran.json, dict)
    assert sorted(file.name for file in demo_bundle.iterdir()) == before
    assert [file.name for file in tmp_path.iterdir() if file.name != "out"] == []


def test_texts_that_begin_with_a_dash(text_bundle: Path, run: Callable[..., Ran]) -> None:
    """As after any other program's option, but for what is an option itself."""
    for words in (("-p", "-x"), ("-p=-x",), ("--prompt", "-x"), ("--prompt=-x",), ("-p-x",)):
        shown = run("generate", text_bundle, *words, "--max-new-tokens", 2, "--json")
        assert shown.code == 0, shown.err
        assert (
            shown.json["ids"] == run("generate", text_bundle, "-p", "-x", "--max-new-tokens", 2, "--json").json["ids"]
        )
    for prompt in ("-prompt", "--what is this", "-1", "-5e3", "-x=y"):
        ran = run("generate", text_bundle, "--max-new-tokens", 1, "--json", "-p", prompt)
        assert ran.code == 0, (prompt, ran.err)
    ran = run("generate", text_bundle, "-p", "x", "--stop", "-x", "--max-new-tokens", 1)
    assert ran.code == 0, ran.err
    ran = run("generate", text_bundle, "-p", "--json", "--max-new-tokens", 1)
    assert ran.code == 2
    assert "argument -p/--prompt: expected one argument" in ran.json["error"]
    for words in (("-p", "--"), ("-p=--",), ("--prompt=--",)):
        assert "argument -" in run("generate", text_bundle, "--json", *words).json["error"]
    for ids in ("-1", "-1,2"):
        ran = run("generate", text_bundle, "--ids", ids)
        assert "token id -1 is out of range" in ran.err
