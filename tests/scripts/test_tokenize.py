"""``tokenize``: what a tokenizer makes of a text, and back."""

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import PROGRAM, Ran, refused
from text_oracle import byte_level
from tokenizers import Tokenizer, processors

TEXT = "Naïve\t— 合計\r\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json that begins every prompt with a special token."""
    library = byte_level(["<|begin|>"])
    begin = library.token_to_id("<|begin|>")
    library.post_processor = processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A $B", [("<|begin|>", begin)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library.save(str(path))
    return path


def test_ids_and_pieces_are_the_librarys(
    tokenizer: Path, text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    wanted = Tokenizer.from_file(str(tokenizer)).encode(TEXT)
    for source in (tokenizer, tokenizer.parent):
        for words in (("-p", TEXT), ("--text", tmp_path / "text.txt")):
            found = run("tokenize", source, *words, "--json").json
            assert (found["ids"], found["pieces"]) == (wanted.ids, wanted.tokens)
            assert (found["characters"], found["bytes"]) == (len(TEXT), len(TEXT.encode()))
    assert run("tokenize", text_bundle, "-p", TEXT, "--json").json["ids"] == list(TEXT.encode())
    ran = run("tokenize", tokenizer, "-p", TEXT)
    lines = [line.split(maxsplit=1) for line in ran.out.splitlines()]
    assert [int(number) for number, _ in lines] == wanted.ids
    assert [json.loads(piece) for _, piece in lines] == wanted.tokens
    assert f"{len(wanted.ids)} tokens, {len(TEXT)} characters, {len(TEXT.encode())} bytes" in ran.err


def test_ids_go_to_a_file_and_back(tokenizer: Path, text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    ids = tmp_path / "ids.npy"
    found = run("tokenize", text_bundle, "-p", TEXT, "-o", ids, "--json").json
    assert found["output"] == str(ids)
    np.testing.assert_array_equal(np.load(ids), [found["ids"]])
    assert run("score", text_bundle, "--ids", ids).code == 0
    numbers = ",".join(map(str, found["ids"]))
    assert run("tokenize", text_bundle, "--decode", numbers, "--json").json == {"ids": found["ids"], "text": TEXT}
    assert run("tokenize", text_bundle, "--decode", numbers).out == f"{TEXT}\n"
    ids = run("tokenize", tokenizer, "-p", "x", "--json").json["ids"]
    numbers = ",".join(map(str, ids))
    assert run("tokenize", tokenizer, "--decode", numbers).out == "x\n"
    assert run("tokenize", tokenizer, "--decode", numbers, "--special-tokens").out == "<|begin|>x\n"


def test_stdin(text_bundle: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]) -> None:
    for words in ((), ("-p", "-")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
        assert run("tokenize", text_bundle, *words, "--json").json["ids"] == list(TEXT.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    refused(run("tokenize", text_bundle), "stdin: is not UTF-8, from byte 3 on")
    monkeypatch.setattr("sys.stdin", None)
    refused(run("tokenize", text_bundle), "give -p TEXT or --text FILE")
    command = [*PROGRAM, "tokenize", str(text_bundle), "--json"]
    piped = subprocess.run(command, input=TEXT.encode(), capture_output=True, check=True)
    assert json.loads(piped.stdout)["ids"] == list(TEXT.encode())


def test_what_is_refused(tokenizer: Path, mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    refused(run("tokenize", mla_bundle, "-p", "x"), "has no tokenizer")
    refused(run("tokenize", tmp_path, "-p", "x"), "not a tokenizer: ", "No such file")
    refused(run("tokenize", tokenizer, "--decode", "1,x"), "--decode is '1,x', expected numbers like 1,2,3")
    for number in (-1, 99999, 1 << 40):
        refused(run("tokenize", tokenizer, f"--decode={number}"), f"--decode has {number}, which is no token")
    refused(run("tokenize", tokenizer, "--decode", "1", "-o", tmp_path / "x"), "leave one out")
    refused(run("tokenize", tokenizer, "-p", "x", "--special-tokens"), "--special-tokens is about the text of --decode")
    refused(run("tokenize", tokenizer, "-p", "x", "-o", tmp_path), "cannot write the ids")
    assert run("tokenize", tokenizer, "-p", "x", "--decode", "1").code == 2
    assert list(tmp_path.iterdir()) == []
