"""Trains a small language model of word pieces whose halting means something, in some twenty minutes on a core.

    python -m mythos_edge.scripts.lab.train_words -o FOLDER

Like ``train_text`` it learns from the docstrings of the Python that runs it, but it takes word pieces for bytes, and
its halting head is taught by which loop step the prediction of a token has settled. It is there for pictures: its text
looks like documentation and says nothing. Writes ``words.pt`` and ``tokenizer.json``. Needs what ``train_text`` needs.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from mythos_edge.model.output_files import check_output_folder, writing
from mythos_edge.scripts.lab.reference import open_mythos
from mythos_edge.scripts.lab.train_demo import LOOPS, demo_config, logits_of, states_by_depth
from mythos_edge.scripts.lab.train_text import END, docstrings

VOCAB = 1536
STEPS, HALTING_STEPS = 1300, 200
_ROWS, _LENGTH = 6, 128
# Share of the probability that may still move once a prediction is settled.
_SETTLED = 0.02
Ids = NDArray[np.int64]


def word_tokenizer(texts: list[str]) -> Tokenizer:
    """A tokenizer of word pieces and single bytes, made for ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def new_model(main: Any) -> Any:
    """About a million parameters, MLA and 4 experts as the demo has them, that start at scales fit for this width."""
    dim = 128
    config = dataclasses.replace(
        demo_config(main),
        vocab_size=VOCAB,
        dim=dim,
        max_seq_len=512,
        rope_theta=10000.0,
        kv_lora_rank=dim // 2,
        q_lora_rank=dim,
        expert_dim=dim,
    )
    model = main.OpenMythos(config)
    with torch.no_grad():
        for layer in (*model.prelude, model.recurrent.block, *model.coda):
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight.mul_(3)
        model.embed.weight.mul_(5)
        model.recurrent.act.halt.weight.zero_()
        model.recurrent.act.halt.bias.fill_(-math.log(LOOPS - 1))
    return model


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def settled(main: Any, model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the prediction of each token has settled by each loop step, and the halting logits, (loops, B, S)."""
    with torch.no_grad():
        states, _ = states_by_depth(main, model, ids)
        shares = torch.stack([logits_of(model, state).softmax(-1) for state in states])
        near = (shares - shares[-1]).abs().sum(-1) / 2 < _SETTLED
    return near.flip(0).long().cumprod(0).flip(0).float(), model.recurrent.act.halt(states).squeeze(-1)


def train(train_ids: Ids, steps: int, halting_steps: int, seed: int) -> Any:
    """A trained reference model: first its language, then its halting."""
    main = open_mythos()
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    model = new_model(main)
    started = time.monotonic()

    def batch() -> tuple[Tensor, Tensor]:
        starts = random.integers(0, len(train_ids) - _LENGTH - 1, _ROWS)
        windows = torch.from_numpy(train_ids[starts[:, None] + np.arange(_LENGTH + 1)])
        return windows[:, :-1], windows[:, 1:]

    for part, taught, count, rate in (
        ("language", list(model.parameters()), steps, 4e-3),
        ("halting", list(model.recurrent.act.halt.parameters()), halting_steps, 2e-2),
    ):
        optimizer = torch.optim.AdamW(taught, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=count, pct_start=0.1)
        for step in range(1, count + 1):
            ids, targets = batch()
            if part == "language":
                states, _ = states_by_depth(main, model, ids)
                # A state on the way must be fit for the coda too, the last most of all.
                early = states[int(random.integers(LOOPS - 1))]
                loss = _loss(logits_of(model, states[-1]), targets) + 0.3 * _loss(logits_of(model, early), targets)
            else:
                known, halting = settled(main, model, ids)
                loss = nn.functional.binary_cross_entropy_with_logits(halting, known)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(taught, 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0 or step == count:
                print(f"{time.monotonic() - started:6.0f} s  {part}, step {step}  loss {loss.item():.3f}", flush=True)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a small model of word pieces whose halting means something.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write into")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--halting-steps", type=int, default=HALTING_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    check_output_folder(args.output, "the checkpoint")  # before the minutes
    texts = list(docstrings())
    tokenizer = word_tokenizer(texts)
    end = tokenizer.token_to_id(END)
    ids = np.array([number for text in texts for number in (*tokenizer.encode(text).ids, end)], np.int64)
    torch.set_num_threads(1)  # the tensors are too small for more to help
    model = train(ids, args.steps, args.halting_steps, args.seed)
    saved = {
        "step": args.steps,
        "model": model.state_dict(),
        "optimizer": {},
        "cfg": model.cfg,
        "vocab_size": model.cfg.vocab_size,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with writing(args.output / "words.pt", "the checkpoint") as file:
        torch.save(saved, file)
        with writing(args.output / "tokenizer.json", "the tokenizer") as text:
            text.write(tokenizer.to_str(pretty=True).encode())
    print(f"{args.output / 'words.pt'}: {(args.output / 'words.pt').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
