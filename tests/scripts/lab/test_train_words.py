"""The word-piece model is what it says: whole texts in its tokenizer, and a checkpoint that can be exported."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from mythos_edge.runtime.session import Session
from mythos_edge.scripts.lab import train_words
from mythos_edge.scripts.lab.reference import open_mythos


def test_a_short_training_can_be_exported_and_run(exported: Callable[..., Path], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        train_words.main(["-o", str(tmp_path / "words"), "--steps", "2", "--halting-steps", "1"])
    finally:
        torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(str(tmp_path / "words" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == train_words.VOCAB
    text = "Return the ärger 😀 of\n    a function."
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text)
    bundle = exported(tmp_path / "words" / "words.pt", tokenizer=tmp_path / "words" / "tokenizer.json")
    with Session.open(bundle) as session:
        made = session.generate("Return the", max_new_tokens=4)
    assert len(made.depths) == len(made.ids) > 0


def test_settled_is_for_good_and_holds_at_the_end() -> None:
    torch.manual_seed(0)
    main = open_mythos()
    model = train_words.new_model(main)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, train_words.VOCAB, (2, 12)))
    known, halting = train_words.settled(main, model, ids)
    assert known.shape == halting.shape == (train_words.LOOPS, 2, 12)
    assert bool((known[-1] == 1).all())
    assert bool((known.diff(dim=0) >= 0).all())
    assert halting.detach().numpy() == pytest.approx(-np.log(train_words.LOOPS - 1), abs=1e-4)
