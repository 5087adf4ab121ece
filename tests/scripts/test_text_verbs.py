"""A tokenizer's way through the command line: export tells, inspect shows, generate obeys."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import CHECKPOINT, Ran, refused
from text_oracle import byte_level, following
from tokenizers import Tokenizer, processors

from mythos_edge.runtime.session import Session
from mythos_edge.scripts import cli

SPECIAL = [f"<|{number}|>" for number in range(75)]  # to the last id that the model knows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a tokenizer and its configs, in which the bundles come to lie."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(CHECKPOINT, folder / "model")
    library = byte_level([*SPECIAL, "<|beyond|>"])
    library.post_processor = processors.TemplateProcessing("<|0|> $A", "<|0|> $A $B", [("<|0|>", 256)])
    library.enable_truncation(4)
    library.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 331]}))
    return folder


@pytest.fixture(scope="module")
def export(made: Path) -> Callable[..., Ran]:
    """``export(name, *argv)``: exports the checkpoint to a bundle in the folder."""

    def call(name: str, *argv: object) -> Ran:
        out, err = io.StringIO(), io.StringIO()
        words = ("export", made / "model", "-o", made / name, *argv)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([str(word) for word in words])
        return Ran(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="module")
def with_text(export: Callable[..., Ran], made: Path) -> Ran:
    return export("text.bundle")


@pytest.fixture(scope="module")
def with_ids(export: Callable[..., Ran]) -> Ran:
    return export("ids.bundle", "--no-tokenizer", "--end-token", "7", "--end-token", "2", "--json")


def test_export_tells_of_the_tokenizer(with_text: Ran, made: Path) -> None:
    assert with_text.code == 0
    beside = made / "model" / "tokenizer.json"
    assert f"note: {beside} is taken along: --no-tokenizer leaves it out" in with_text.err
    assert with_text.out.splitlines()[-1] == "end tokens: <|1|> (257), <|beyond|> (331)"
    for words in (
        "cuts prompts to 4 tokens of its own: switched off",
        "an added token is unknown to the model, '<|beyond|>' (id 331)",
        "<|beyond|> (331) ends a text by generation_config.json, but this model cannot produce it",
    ):
        assert sum(words in line for line in with_text.err.splitlines()) == 1, words
    copied = (made / "text.bundle" / "tokenizer.json").read_bytes()
    assert copied == (made / "model" / "tokenizer.json").read_bytes()


def test_export_of_ids_leaves_the_tokenizer_out(
    with_ids: Ran, made: Path, run: Callable[..., Ran], tmp_path: Path
) -> None:
    assert with_ids.json["end_tokens"] == ["7", "2"]
    (file,) = (made / "model").glob("*.safetensors")
    beside = made / "model" / "tokenizer.json"
    ran = run("export", file, "-o", tmp_path / "of-a-file")
    assert f"note: {beside} is not taken along: --tokenizer {beside} does" in ran.err
    both = run("export", file, "-o", tmp_path / "x", "--tokenizer", beside, "--no-tokenizer")
    assert (both.code, "not allowed with" in both.err) == (2, True)
    shown = run("inspect", made / "ids.bundle", "--json").json
    assert (shown["end_tokens"], shown["end_ids"]) == (["7", "2"], [7, 2])
    assert "prompt_begins_with" not in shown
    assert "text ends  7, 2" in run("inspect", made / "ids.bundle").out


def test_inspect_shows_what_ends_a_text_and_stands_around_a_prompt(
    with_text: Ran, made: Path, run: Callable[..., Ran]
) -> None:
    shown = run("inspect", made / "text.bundle", "--json").json
    assert (shown["end_tokens"], shown["end_ids"]) == (["<|1|>", "<|beyond|>"], [257, 331])
    assert (shown["prompt_begins_with"], shown["prompt_ends_with"]) == (["<|0|>"], [])
    assert [end["id"] for end in shown["manifest"]["end_tokens"]] == [257, 331]
    out = run("inspect", made / "text.bundle").out
    assert "tokenizer  tokenizer.json; a prompt begins with <|0|>" in out
    assert "text ends  <|1|> (257), <|beyond|> (331)" in out


def test_a_bundle_without_end_tokens_says_so(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    shown = run("inspect", mla_bundle, "--json").json
    assert (shown["end_tokens"], shown["end_ids"]) == ([], [])
    assert "text ends  at --max-new-tokens" in run("inspect", mla_bundle).out


def test_generate_shows_special_tokens(with_text: Ran, made: Path, run: Callable[..., Ran]) -> None:
    bundle = made / "text.bundle"
    argv = ("generate", bundle, "-p", "a longer prompt", "--max-new-tokens", 30, "--temperature", 3, "--seed", 1)
    library = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    library.no_truncation()
    prompt = library.encode("a longer prompt").ids
    plain, special = (run(*argv, *more, "--json").json for more in ((), ("--special-tokens",)))
    assert plain["ids"] == special["ids"]
    assert any(number > 255 for number in plain["ids"])
    assert plain["text"] == following(library, prompt, plain["ids"])
    assert special["text"] == following(library, prompt, plain["ids"], special_tokens=True) != plain["text"]
    streamed = run(*argv, "--special-tokens").out
    assert streamed == special["text"] + "\n"
    at = next(place for place, number in enumerate(plain["ids"]) if number > 255)
    stopped = run(*argv, "--stop", library.id_to_token(plain["ids"][at]), "--json").json
    assert (stopped["ids"], stopped["finish_reason"]) == (plain["ids"][: at + 1], "stop_id")


def test_refusals(with_text: Ran, made: Path, mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    unknown = run("generate", made / "text.bundle", "-p", "a <|beyond|>")
    refused(unknown, "'<|beyond|>' (id 331), which this model does not know: its ids are 0 .. 330")
    refused(run("generate", mla_bundle, "--ids", "1", "--special-tokens"), "special tokens need a tokenizer")
    export = ("export", made / "model", "-o", tmp_path / "out", "--tokenizer", made / "model", "--end-token", "<|x|>")
    refused(run(*export), "--end-token is '<|x|>', which is no token of")
    refused(run(*export[:4], "--no-tokenizer", "--end-token", "</s>"), "there is no tokenizer")
    assert list(tmp_path.iterdir()) == []


def test_a_session_ends_where_the_manifest_says(with_ids: Ran, made: Path) -> None:
    with Session.open(made / "ids.bundle") as session:
        for seed in range(50):
            found = session.generate([1, 2], max_new_tokens=40, temperature=5.0, seed=seed)
            assert (found.finish_reason == "stop_id") == bool({2, 7}.intersection(found.ids))
            if found.finish_reason == "stop_id":
                return
    pytest.fail("no text ended at an end token")
