"""Text in, text out, with a model and tokenizer that were trained for it."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.layout import load_network
from mythos_edge.runtime.session import Session
from mythos_edge.scripts.lab import train_text

PROMPT = "Return the "


@pytest.fixture(scope="module")
def session(text_bundle: Path) -> Any:
    with Session.open(text_bundle) as opened:
        yield opened


def test_the_tokenizer_travels_with_the_bundle(text_bundle: Path, text_model: tuple[Path, Path]) -> None:
    manifest = Session.open(text_bundle).bundle.manifest
    assert manifest.tokenizer is not None
    assert (text_bundle / manifest.tokenizer).read_bytes() == text_model[1].read_bytes()


def test_greedy_text_is_the_eager_models(session: Session, text_model: tuple[Path, Path]) -> None:
    import torch

    found = session.generate(PROMPT, max_new_tokens=20)
    with open_checkpoint(text_model[0]) as checkpoint, torch.no_grad():
        network = load_network(checkpoint, 512)
        ids = list(PROMPT.encode())
        for _ in found.ids:
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found.ids == ids[len(PROMPT) :]
    assert found.text == train_text.byte_tokenizer().decode(found.ids)


def test_streamed_pieces_are_the_text(session: Session) -> None:
    pieces = [token.text for token in session.stream(PROMPT, max_new_tokens=40, temperature=1.0, seed=3)]
    assert "".join(pieces) == session.last_generation.text
    assert session.last_generation.text


def test_a_stop_string_ends_the_text_before_it(session: Session) -> None:
    whole = session.generate(PROMPT, max_new_tokens=60, temperature=0.7, seed=1)
    assert whole.text is not None
    stop = whole.text[10:13]
    cut = session.generate(PROMPT, max_new_tokens=60, temperature=0.7, seed=1, stop_strings=(stop,))
    assert cut.finish_reason == "stop_string"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.ids) < len(whole.ids)


def test_the_end_token_ends_the_text(session: Session) -> None:
    """Sampled until a text ends by itself; the end token's text is not shown."""
    ended = next(
        found
        for seed in range(200)
        if (found := session.generate("x", max_new_tokens=200, temperature=1.2, seed=seed)).finish_reason == "stop_id"
    )
    assert ended.ids[-1] == train_text.END_ID
    assert ended.text == train_text.byte_tokenizer().decode(ended.ids[:-1])


def test_a_batch_of_texts_is_each_text_alone(session: Session) -> None:
    prompts = ["Return", "The class ", "a"]
    batch = session.generate(prompts, max_new_tokens=12)
    assert [one.text for one in batch] == [session.generate(prompt, max_new_tokens=12).text for prompt in prompts]


@pytest.mark.parametrize("draft", [{"draft_depth": 2, "draft_tokens": 4}, {"draft_depth": "auto"}])
def test_drafts_change_no_text(session: Session, draft: dict[str, Any]) -> None:
    plain = session.generate(PROMPT, max_new_tokens=60)
    assert plain.text is not None
    stop = plain.text[20:24]
    for stop_strings in ((), (stop,)):
        wanted = session.generate(PROMPT, max_new_tokens=60, stop_strings=stop_strings)
        found = session.generate(PROMPT, max_new_tokens=60, stop_strings=stop_strings, **draft)
        assert (found.ids, found.text, found.finish_reason) == (wanted.ids, wanted.text, wanted.finish_reason)
        pieces = [token.text for token in session.stream(PROMPT, max_new_tokens=60, stop_strings=stop_strings, **draft)]
        assert "".join(pieces) == wanted.text


def test_the_command_line_drafts(text_bundle: Path, session: Session) -> None:
    program = [sys.executable, "-m", "mythos_edge.scripts.cli", "generate", str(text_bundle), "-p", PROMPT]
    run = partial(subprocess.run, capture_output=True, text=True)
    drafted = run([*program, "--max-new-tokens", "20", "--draft-depth", "2", "--draft-tokens", "4", "--json"])
    found = json.loads(drafted.stdout)
    assert found["text"] == session.generate(PROMPT, max_new_tokens=20).text
    assert 0 < found["accepted"] <= found["drafted"]
    for bad, code in ((["--draft-depth", "few"], 2), (["--draft-depth", "4"], 1), (["--draft-tokens", "3"], 1)):
        refused = run([*program, *bad])
        assert refused.returncode == code
        assert refused.stderr.splitlines()[-1].count("draft") >= 1
        assert "Traceback" not in refused.stderr


def test_every_token_takes_all_loop_steps(session: Session) -> None:
    assert set(session.generate(PROMPT, max_new_tokens=8).depths) == {train_text.LOOPS}


def test_the_command_line_prints_the_text(text_bundle: Path, session: Session) -> None:
    argv = ["generate", str(text_bundle), "-p", PROMPT, "--max-new-tokens", "20"]
    program = [sys.executable, "-m", "mythos_edge.scripts.cli"]
    shown = subprocess.run([*program, *argv], capture_output=True, text=True, check=True)
    wanted = session.generate(PROMPT, max_new_tokens=20)
    assert shown.stdout == f"{wanted.text}\n"
    as_json = subprocess.run([*program, *argv, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(as_json.stdout)
    assert (found["ids"], found["text"]) == (wanted.ids, wanted.text)
