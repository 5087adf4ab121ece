"""Tokens from a text, wherever a verb takes ids."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Ran, refused
from hypothesis import given
from hypothesis import strategies as st

from mythos_edge.runtime.session import Session
from mythos_edge.scripts import given_tokens

TEXT = "Return the sum, naïve — 合計.\r\n" * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@given(st.integers(2, 60), st.integers(2, 20))
def test_rows_hold_every_token_once_after_what_they_share(count: int, length: int) -> None:
    ids = np.arange(100, 100 + count)
    rows, seen = given_tokens.rows_of(ids, length)
    assert rows.shape[1] == min(length, count)
    predicted = [row[before:].tolist() for row, before in zip(rows, seen, strict=True)]
    assert list(itertools.chain(*predicted)) == ids.tolist()
    assert seen[0] == 0
    assert (seen[1:] >= 1).all()  # so that each of them is predicted
    assert all(np.array_equal(np.diff(row), np.ones(len(row) - 1)) for row in rows)


def test_a_text_is_cut_into_rows_of_the_bundles_tokens(
    text_bundle: Path, text: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    output = tmp_path / "out.npz"
    assert run("score", text_bundle, "--text", text, "--row-tokens", 40, "-o", output).code == 0
    with Session.open(text_bundle) as session, np.load(output) as scores:
        ids = session.tokenizer.encode(TEXT)
        assert ids == list(TEXT.encode())  # the tokenizer of this model
        np.testing.assert_array_equal(scores["ids"], given_tokens.rows_of(np.array(ids), 40)[0])
        np.testing.assert_array_equal(scores["logits"], session.score(scores["ids"]).logits)
    assert run("score", text_bundle, "--text", text, "-o", output).code == 0
    with np.load(output) as scores:
        assert scores["ids"].shape == (1, len(ids))


def test_every_verb_works_on_the_text(
    text_bundle: Path,
    text_model: tuple[Path, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Ran],
) -> None:
    bundle = Path(shutil.copytree(text_bundle, tmp_path / "copy.bundle"))
    seen = []
    tokens_of = given_tokens.tokens_of

    def noted(*arguments: object) -> given_tokens.Tokens:
        seen.append(tokens_of(*arguments))
        return seen[-1]

    monkeypatch.setattr(given_tokens, "tokens_of", noted)
    rows = ("--text", text, "--row-tokens", 50)
    assert run("build", bundle, "--weights", "int8", *rows).code == 0
    calibrated = run("inspect", bundle, "--json").json["manifest"]["targets"]["ort-cpu-int8"]
    assert "calibrated" in str(calibrated)
    against = ("validate", bundle, "--against")
    ran = run(*against, "fp32", "--target", "ort-cpu-int8", "--max-kl", 100, "--min-top1", 0, *rows)
    shape = given_tokens.rows_of(np.arange(len(TEXT.encode())), 50)[0].shape
    assert f"{shape[0]} x 50 positions" in ran.out
    assert run(*against, text_model[0], *rows).code == 0
    run("tune", bundle, *rows, "-r", 1, "--thresholds", 0.9, "--max-depths", 2)  # whether it finds a knee is not asked
    assert f"{bundle}, {text}" in (tmp_path / "copy.bundle-tune" / "curve.html").read_text()
    assert [one.ids.shape for one in seen] == [shape] * 4
    assert all(one.text_bytes == len(TEXT.encode()) for one in seen)


def test_texts_that_are_refused(
    text_bundle: Path, mla_bundle: Path, text: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    output = tmp_path / "out.npz"
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "one.txt").write_bytes(b"x")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    np.savez(tmp_path / "archive.npz", a=np.zeros(1))
    for name, message in {
        "absent.txt": "absent.txt: cannot read the text: No such file",
        "empty.txt": "empty.txt: is empty, expected a text",
        "one.txt": "one.txt: has 1 tokens, expected at least 2: give a longer text",
        "latin.txt": "latin.txt: is not UTF-8, from byte 3 on: give a text in UTF-8",
        "archive.npz": "is not UTF-8, from byte",
        ".": "cannot read the text: Is a directory",
    }.items():
        refused(run("score", text_bundle, "--text", tmp_path / name, "-o", output), message)
    for length in (1, 100_000):
        words = ("score", text_bundle, "--text", text, "-o", output, "--row-tokens", length)
        refused(run(*words), f"--row-tokens is {length}, expected 2 .. ")
    refused(run("score", mla_bundle, "--text", text, "-o", output), "has no tokenizer: give token ids, or export with")
    refused(run("score", mla_bundle, "--ids", text, "-o", output, "--row-tokens", 9), "--row-tokens is about a text")
    assert not output.exists()


def test_a_text_and_ids_together_are_refused(text_bundle: Path, text: Path, run: Callable[..., Ran]) -> None:
    for words in (("score", "--ids", text, "-o", "x"), ("tune", "--data", text)):
        ran = run(words[0], text_bundle, *words[1:], "--text", text)
        assert (ran.code, ran.out) == (2, "")
        assert "not allowed with argument" in ran.err.splitlines()[-1]
    both = "both say which tokens to work on: give one of them"
    refused(run("validate", text_bundle, "--ids", text, "--text", text), f"--text and --ids {both}")
    words = ("build", text_bundle, "--weights", "int8", "--calibrate", text, "--text", text)
    refused(run(*words), f"--text and --calibrate {both}")
    words = ("validate", text_bundle, "--against", "fp32", "--target", "x", "--text", text, "--demo-streams")
    refused(run(*words), "--text and --demo-streams both say")
