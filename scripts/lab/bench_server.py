"""Speed of the server: eight mixed requests at once beside one after another, and a prompt that is known.

    python -m mythos_edge.scripts.lab.bench_server --shape d1024 -r 5

Exports random weights of a shape of ``bench_peers`` and starts ``mythos-edge serve`` on it, first without a prompt
cache. Requests are HTTP, greedy, with the threshold at which a token takes a quarter of the loop steps. Every answer at
once must be the one it is alone. Then a prompt of ``-p`` tokens and a few of its own is sent often: the time to the
first token when it is new and when another request began alike. Prints a table, then one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mythos_edge.model.machine import cores
from mythos_edge.runtime.session import Session
from mythos_edge.scripts.bench import threshold_of_mean_depth
from mythos_edge.scripts.doctor import processor
from mythos_edge.scripts.lab.bench_peers import SHAPES
from mythos_edge.scripts.lab.bench_versions import random_checkpoint, run_command

_CLIENTS = 8
# Prompts and answers of the mixed requests, in tokens.
_PROMPTS = (8, 32, 16, 64, 8, 24, 48, 12)
_ANSWERS = (48, 24, 64, 32, 56, 40, 48, 36)
# What a request has of its own after the shared prompt.
_OWN_TOKENS = 12


class _Server:
    """``mythos-edge serve`` in a process of its own."""

    def __init__(self, bundle: Path, threshold: float, *options: str) -> None:
        command = [sys.executable, "-m", "mythos_edge", "serve", str(bundle), "--port", "0", *options]
        self._threshold = threshold
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._address = self._process.stdout.readline().rpartition(" at ")[2].strip()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def answer(self, ids: list[int], tokens: int) -> list[int]:
        """The token ids of a completion."""
        with self._ask(ids, tokens) as answer:
            return json.load(answer)["choices"][0]["token_ids"]  # type: ignore[no-any-return]

    def first_token_s(self, ids: list[int]) -> float:
        """Seconds until the first token of a streamed completion is here."""
        started = time.perf_counter()
        with self._ask(ids, 2, stream=True) as answer:
            answer.readline()
            seconds = time.perf_counter() - started
            answer.read()
        return seconds

    def _ask(self, ids: list[int], tokens: int, **more: Any) -> Any:
        body = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "threshold": self._threshold, **more}
        headers = {"Content-Type": "application/json"}
        return urllib.request.urlopen(
            urllib.request.Request(f"{self._address}/v1/completions", json.dumps(body).encode(), headers)
        )


def main(argv: list[str] | None = None) -> int:
    """Measures the server; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure the server's batching and its prompt cache.")
    parser.add_argument("--shape", choices=SHAPES, default="d1024")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=500)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = folder / "bundle"
        run_command(_program(), "export", str(random_checkpoint(args.shape, folder)), "-o", str(bundle))
        with Session.open(bundle) as session:
            vocab, depth = session.model.vocab_size, session.model.max_depth
            threshold = threshold_of_mean_depth(session, _ids(random, vocab, 32), 16, depth / 4)
        prompts = [_ids(random, vocab, count) for count in _PROMPTS]
        with closing(_Server(bundle, threshold, "--cache-memory", "0")) as server:
            batched = _batched(server, prompts, args.rounds)
        with closing(_Server(bundle, threshold)) as server:
            beginnings = [_ids(random, vocab, args.prompt_tokens) for _ in range(args.rounds)]
            first = _first_tokens(server, beginnings, random, vocab)
    medians = {name: statistics.median(seconds) for name, seconds in {**batched, **first}.items()}
    tokens = sum(_ANSWERS)
    print(f"| {args.shape} fp32, mean depth about {depth / 4:g} | | |\n|---|---:|---:|")
    print(f"| {_CLIENTS} requests one after another | {tokens / medians['in_turn']:.1f} tokens/s | 1.00x |")
    gain = medians["in_turn"] / medians["together"]
    print(f"| {_CLIENTS} requests at once | {tokens / medians['together']:.1f} tokens/s | {gain:.2f}x |")
    print(f"| first token, {args.prompt_tokens} tokens new | {medians['new'] * 1e3:.0f} ms | 1.0x |")
    shorter = medians["new"] / medians["known"]
    print(f"| first token, {args.prompt_tokens} tokens known | {medians['known'] * 1e3:.0f} ms | {shorter:.1f}x |")
    print(json.dumps({"machine": f"{processor()}, {cores()} cores", "medians": medians, "rounds": batched | first}))
    return 0


def _program() -> Path:
    return Path(sys.executable).with_name("mythos-edge")


def _ids(random: np.random.Generator, vocab: int, count: int) -> list[int]:
    return [int(token) for token in random.integers(0, vocab, count)]


def _batched(server: _Server, prompts: list[list[int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of all requests at once, and of one after another, taking turns."""
    made: dict[str, list[float]] = {"together": [], "in_turn": []}
    answers: list[list[list[int]]] = []
    for number in range(rounds + 1):
        for name, clients in (("together", _CLIENTS), ("in_turn", 1)):
            started = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                answers.append(list(pool.map(server.answer, prompts, _ANSWERS)))
            if number:  # the first round warms up
                made[name].append(time.perf_counter() - started)
    if any(one != answers[0] for one in answers):
        raise SystemExit("an answer at once is not the one it is alone")
    return made


def _first_tokens(
    server: _Server, beginnings: list[list[int]], random: np.random.Generator, vocab: int
) -> dict[str, list[float]]:
    """Seconds to the first token after every beginning: when it is new, and when a request before began with it."""
    made: dict[str, list[float]] = {"new": [], "known": []}
    for beginning in beginnings:
        for name in made:
            made[name].append(server.first_token_s([*beginning, *_ids(random, vocab, _OWN_TOKENS)]))
    return made


if __name__ == "__main__":
    sys.exit(main())
