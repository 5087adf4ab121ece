"""Trains a tiny byte-level language model on the docstrings of the Python that runs it, in a minute on one core.

    python -m mythos_edge.scripts.lab.train_text -o FOLDER

Writes ``text.pt``, a trainer checkpoint of the unmodified reference network, ``tokenizer.json``, and ``ids.npy``,
tokens to score, tune and calibrate with. It gives text to tests and examples without a download; it knows the look
of English, not its meaning, and every token takes all loop steps: the demo model's halting means something.
Needs the extra ``export`` and ``pip install --no-deps open-mythos==0.5.0``; ``./scripts/text_model`` has both.
"""

import argparse
import ast
import dataclasses
import importlib.util
import math
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from mythos_edge.model.output_files import check_output_folder, writing
from mythos_edge.scripts.lab import training
from mythos_edge.scripts.lab.reference import open_mythos
from mythos_edge.scripts.lab.train_demo import demo_config

LOOPS = 4
END = "<|endoftext|>"
END_ID = 256
STEPS = 800
# Long-lived and rich in prose. One that a Python lacks is passed over; the frozen ones (os, abc) show no source.
MODULES = """
    asyncio.events asyncio.streams bdb cmd code collections concurrent.futures._base configparser copy csv difflib
    doctest email.message email.policy fileinput fractions ftplib functools heapq http.client http.cookiejar
    http.server inspect ipaddress json json.decoder json.encoder logging logging.config logging.handlers lzma
    mimetypes numbers optparse pathlib pdb pickletools queue random sched selectors shelve shutil smtplib socket
    ssl statistics subprocess tempfile textwrap threading timeit tokenize traceback typing unittest.case
    unittest.mock urllib.parse uuid warnings weakref wsgiref.handlers xml.etree.ElementTree xmlrpc.client zipfile
"""

_TOKENS = 512  # a step, in one row or more: short rows teach soon, and only long ones the late positions
_LENGTHS = (64, 128, 64, 512)
_HELD_OUT_EVERY = 16
_MOST_WINDOWS = 24
_MIN_BYTES = 100_000
_SAVED_ROWS, _SAVED_POSITIONS = 4, 64
# With more equal shares than this, the last but one would reach the halting threshold.
_MOST_LOOPS = 99
_MARGIN = 0.2  # nats per token below the unigram entropy
Ids = NDArray[np.int64]


def byte_tokenizer() -> Tokenizer:
    """The tokenizer whose ids are the UTF-8 bytes themselves, and 256 for the end of a text."""
    vocab = {symbol: number for number, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    assert tokenizer.token_to_id(END) == END_ID
    return tokenizer


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte. Source: ``bytes_to_unicode`` of GPT-2's encoder.py."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def docstrings() -> Iterator[str]:
    """Docstrings of the standard library's modules, classes and functions, as far as their sources are installed."""
    for name in MODULES.split():
        try:
            spec = importlib.util.find_spec(name)
            source = spec.loader.get_source(name) if spec and isinstance(spec.loader, SourceFileLoader) else None
        except ImportError:  # a parent package that is not there, or sources that are left out
            continue
        for node in ast.walk(ast.parse(source or "")):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text


def corpus() -> tuple[Ids, Ids]:
    """Ids to train on and ids held out, each text followed by the end token."""
    pieces: tuple[list[Ids], list[Ids]] = ([], [])
    for number, text in enumerate(docstrings()):
        ids = [*text.encode("utf-8", "replace"), END_ID]
        pieces[number % _HELD_OUT_EVERY == 0].append(np.array(ids, np.int64))
    size = sum(len(piece) for part in pieces for piece in part)
    if size < _MIN_BYTES:
        raise SystemExit(
            f"found {size} bytes of standard library docstrings, expected {_MIN_BYTES}: "
            "use a Python that is installed with its sources"
        )
    return np.concatenate(pieces[False]), np.concatenate(pieces[True])


def unigram_entropy(ids: Ids) -> float:
    """Entropy of the token frequencies, nats per token: the least loss that looking at no context can have."""
    share = np.bincount(ids) / len(ids)
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


def text_config(main: Any, loops: int = LOOPS) -> Any:
    """The demo's for other tokens, at more positions: about 170 thousand parameters."""
    return dataclasses.replace(
        demo_config(main), vocab_size=END_ID + 1, max_seq_len=512, max_loop_iters=loops, rope_theta=10000.0
    )


def _new_model(main: Any, loops: int) -> Any:
    model = main.OpenMythos(text_config(main, loops))
    halt = model.recurrent.act.halt
    with torch.no_grad():
        # The reference starts all weights at 0.02, too small for this width to leave the unigrams soon.
        for layer in (*model.prelude, model.recurrent.block, *model.coda):
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight.mul_(4)
        model.embed.weight.mul_(5)
        halt.weight.zero_()
        # Equal shares: of four, the mass is 0.75 after three steps, so halting comes exactly at full depth.
        halt.bias.fill_(-math.log(loops - 1))
    halt.requires_grad_(False)
    return model


def _loss(model: Any, ids: Tensor) -> Tensor:
    """Mean loss of every next token of ``ids (B, S)``, nats, from the reference's own forward."""
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Any, ids: Ids) -> float:
    """Mean loss over some windows of ``ids``, nats per token; over all positions the model has."""
    length = model.cfg.max_seq_len
    rows = min(_MOST_WINDOWS, len(ids) // length)
    return float(_loss(model, torch.from_numpy(ids[: rows * length].reshape(rows, length))))


def train(train_ids: Ids, held_out: Ids, steps: int, seed: int, loops: int = LOOPS) -> Any:
    """A trained reference model."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    model = _new_model(open_mythos(), loops)

    def loss_of(step: int) -> Tensor:
        length = _LENGTHS[step % len(_LENGTHS)]
        starts = random.integers(0, len(train_ids) - length, _TOKENS // length)
        return _loss(model, torch.from_numpy(train_ids[starts[:, None] + np.arange(length)]))

    started = time.monotonic()
    for step, _ in training.descend(model, loss_of, steps, rate=5e-3, betas=(0.9, 0.98)):
        if step % 100 == 0 or step == steps:
            seconds = time.monotonic() - started
            print(f"{seconds:6.0f} s  step {step}  held-out loss {evaluate(model, held_out):.3f}", flush=True)
    return model


def train_text_model(folder: Path, *, steps: int = STEPS, seed: int = 0, loops: int = LOOPS) -> tuple[Path, Path]:
    """Checkpoint and tokenizer, written with some held-out ids into ``folder``, which is made when it is not there.

    Raises SystemExit when the model did not learn to use context, or without sources to learn from; then nothing
    is written.
    """
    check_output_folder(folder, "the checkpoint")  # before the minutes
    train_ids, held_out = corpus()
    entropy = unigram_entropy(held_out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small for more to help
    try:
        model = train(train_ids, held_out, steps, seed, loops)
        loss = evaluate(model, held_out)
    finally:
        torch.set_num_threads(threads)
    if not loss < entropy - _MARGIN:
        raise SystemExit(
            f"held-out loss is {loss:.3f} nats per byte, expected under {entropy - _MARGIN:.3f} "
            f"(unigram entropy {entropy:.3f}): train longer with --steps"
        )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, tokenizer = folder / "text.pt", folder / "tokenizer.json"
    with writing(checkpoint, "the checkpoint") as file:
        training.save(model, steps, file)
        with writing(tokenizer, "the tokenizer") as text:
            text.write(byte_tokenizer().to_str(pretty=True).encode())
        with writing(folder / "ids.npy", "the tokens") as ids:
            np.save(ids, held_out[: _SAVED_ROWS * _SAVED_POSITIONS].reshape(_SAVED_ROWS, _SAVED_POSITIONS))
    print(f"{checkpoint}: {checkpoint.stat().st_size / 1e3:.0f} kB, loss {loss:.3f}, unigram entropy {entropy:.3f}")
    return checkpoint, tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a tiny byte-level text model on docstrings.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write into")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loops", type=int, default=LOOPS, metavar="N", help="loop steps of the model")
    args = parser.parse_args(argv)
    if not 2 <= args.loops <= _MOST_LOOPS:
        parser.error(f"--loops is {args.loops}, expected 2 .. {_MOST_LOOPS}")
    train_text_model(args.output, steps=args.steps, seed=args.seed, loops=args.loops)


if __name__ == "__main__":
    main()
