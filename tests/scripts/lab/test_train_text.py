"""The text model's corpus and tokenizer, and one short training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.scripts.lab import train_text
from mythos_edge.scripts.lab.reference import open_mythos

SAMPLES = [
    "",
    "a",
    " two  spaces ",
    "\ttab\r\nline\n",
    "Grüße, 你好, مرحبا",
    "👩‍👩‍👧 🇨🇭 🙂",
    "\x00\x7f\u2028\ufeff",
    "<|end",
]
TOKENIZER = train_text.byte_tokenizer()


def loaded(path: Path) -> Any:
    """The unmodified reference with the weights of a trainer file."""
    main = open_mythos()
    with torch.serialization.safe_globals([main.MythosConfig]):
        saved = torch.load(path, weights_only=True)
    model = main.OpenMythos(saved["cfg"])
    model.load_state_dict(saved["model"])
    return model.eval()


# --- tokenizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SAMPLES)
def test_tokens_are_the_bytes(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    # The end token is a special one, which is text only when asked for.
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_vocabulary() -> None:
    assert TOKENIZER.get_vocab_size() == 257
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(257))
    assert TOKENIZER.encode(f"a{train_text.END}b").ids == [97, train_text.END_ID, 98]
    assert TOKENIZER.decode([97, train_text.END_ID, 98]) == "ab"


# --- corpus --------------------------------------------------------------------------------------------------


def test_corpus_is_text_with_ends() -> None:
    train_ids, held_out = train_text.corpus()
    assert len(train_ids) > 5 * len(held_out) > 0
    for ids in (train_ids, held_out):
        assert ids.dtype == np.int64
        assert ids[-1] == train_text.END_ID
        assert 0 <= ids.min() <= ids.max() == train_text.END_ID
    first = bytes(train_ids[: int(np.argmax(train_ids == train_text.END_ID))].tolist()).decode()
    assert first in list(train_text.docstrings())


def test_unigram_entropy() -> None:
    assert train_text.unigram_entropy(np.array([3, 3, 3])) == 0
    assert train_text.unigram_entropy(np.arange(8)) == pytest.approx(np.log(8))
    assert train_text.unigram_entropy(np.array([0, 0, 1, 2])) == pytest.approx(1.5 * np.log(2))


def test_python_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train_text, "MODULES", "sys no_such_module no_such_package.module cmd")
    with pytest.raises(SystemExit, match="use a Python that is installed with its sources"):
        train_text.train_text_model(tmp_path / "made", steps=1)
    assert not (tmp_path / "made").exists()


# --- training ------------------------------------------------------------------------------------------------


def test_a_model_that_learned_nothing_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"held-out loss is \d\.\d+ .* train longer with --steps"):
        train_text.main(["-o", str(tmp_path / "made"), "--steps", "2"])
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_short_training_beats_unigrams(text_model: tuple[Path, Path]) -> None:
    _, held_out = train_text.corpus()
    assert train_text.evaluate(loaded(text_model[0]), held_out) < train_text.unigram_entropy(held_out) - 0.2


@pytest.mark.slow
def test_checkpoint_opens(text_model: tuple[Path, Path]) -> None:
    checkpoint, tokenizer = text_model
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["ids.npy", "text.pt", "tokenizer.json"]
    ids = np.load(checkpoint.parent / "ids.npy")
    assert ids.tolist() == train_text.corpus()[1][: ids.size].reshape(4, 64).tolist()
    assert Tokenizer.from_file(str(tokenizer)).get_vocab_size() == 257
    with open_checkpoint(checkpoint) as opened:
        assert opened.step == 80
        assert opened.config.vocab_size == 257
        assert opened.config.max_loop_iters == train_text.LOOPS
        assert opened.config.max_seq_len == 512


@pytest.mark.parametrize("loops", [2, 16, 99])
def test_an_untrained_model_takes_as_many_loop_steps_as_asked_for(loops: int) -> None:
    model = train_text._new_model(train_text.open_mythos(), loops)
    masses: list[torch.Tensor] = []
    model.recurrent.act.register_forward_hook(lambda module, inputs, output: masses.append(output))
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    mass = torch.stack(masses).cumsum(0)
    assert len(mass) == loops
    assert mass[-2].max() < model.cfg.act_threshold <= mass[-1].min()


@pytest.mark.parametrize("loops", ["1", "100"])
def test_other_numbers_of_loops_are_refused(loops: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_text.main(["-o", str(tmp_path), "--loops", loops])
    assert f"--loops is {loops}, expected 2 .. 99" in capsys.readouterr().err


@pytest.mark.slow
def test_every_token_takes_all_loop_steps(text_model: tuple[Path, Path]) -> None:
    model = loaded(text_model[0])
    masses: list[torch.Tensor] = []
    model.recurrent.act.register_forward_hook(lambda module, inputs, output: masses.append(output))
    with torch.no_grad():
        model(torch.arange(257)[None])
        at_four = model(torch.arange(257)[None], n_loops=train_text.LOOPS)
        beyond = model(torch.arange(257)[None], n_loops=2 * train_text.LOOPS)
    mass = torch.stack(masses[: train_text.LOOPS]).cumsum(0)
    assert (mass[-2] < model.cfg.act_threshold).all()
    assert (mass[-1] >= model.cfg.act_threshold).all()
    torch.testing.assert_close(at_four, beyond, rtol=0, atol=0)
