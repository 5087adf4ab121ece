"""A server under many requests, beside clients that leave in the middle of theirs.

Every request is greedy and one of a few, so that its answer is known from the first time it was given. Memory is that
of the server's process.
"""

import http
import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CLIENTS, _LEAVERS, _KINDS = 8, 2, 40
_WARM_SHARE = 0.3
_TRIES = 60
_RSS_FACTOR, _RSS_BYTES = 1.2, 20_000_000


@dataclass(frozen=True)
class ServerRun:
    """The figures of a server: requests answered, those left in the middle, answers unlike the first, bytes, seconds.

    ``pace_s`` are the seconds of a request in the first and the last tenth.
    """

    requests: int
    left: int
    differing: int
    rss_bytes: tuple[int, int]
    pace_s: tuple[float, float]

    @property
    def held(self) -> bool:
        """Whether every answer was right and memory did not grow."""
        before, after = self.rss_bytes
        return not self.differing and after <= before * _RSS_FACTOR + _RSS_BYTES

    def line(self) -> str:
        """The figures in words."""
        (before, after), (first, last) = self.rss_bytes, self.pace_s
        return (
            f"server: {self.requests:,} requests, {self.left:,} more left in the middle, {self.differing} answers "
            f"unlike the first; RSS {before / 1e6:.0f} to {after / 1e6:.0f} MB; "
            f"a request took {last / first:.2f} times as long in the last tenth as in the first"
        )


def run_server(bundle: Path, requests: int, seed: int) -> ServerRun:
    """Answers ``requests`` of 8 clients, while two others keep leaving."""
    chance = random.Random(seed)
    bodies = [_body(chance) for _ in range(_KINDS)]
    answers: list[object] = [None] * _KINDS
    differing, left = [0], [0]
    with _served(bundle) as (port, pid):
        warm = max(_KINDS, int(requests * _WARM_SHARE))

        def ask(number: int) -> float:
            kind, started = number % _KINDS, time.perf_counter()
            choice = _choice_of(port, bodies[kind])
            got = choice["token_ids"], choice["depths"]
            if answers[kind] is None:
                answers[kind] = got
            differing[0] += got != answers[kind]
            return time.perf_counter() - started

        done = threading.Event()

        def leave(number: int) -> None:
            own = random.Random(f"{seed} {number}")
            while not done.is_set():
                body = _body(own) | {"max_tokens": 200, "stream": own.random() < 0.5}
                with closing(_asked(port, body)):
                    time.sleep(own.random() * 0.05)
                left[0] += 1

        with ThreadPoolExecutor(_CLIENTS + _LEAVERS) as pool:
            leavers = [pool.submit(leave, number) for number in range(_LEAVERS)]
            try:
                seconds = list(pool.map(ask, range(warm)))
                before = _resident_bytes(pid)
                seconds += pool.map(ask, range(warm, max(requests, warm + 1)))
                after = _resident_bytes(pid)
            finally:
                done.set()
            for one in leavers:
                one.result()
    tenth = max(1, len(seconds) // 10)
    pace = sum(seconds[:tenth]) / tenth, sum(seconds[-tenth:]) / tenth
    return ServerRun(len(seconds), left[0], differing[0], (before, after), pace)


def _body(chance: random.Random) -> dict[str, object]:
    body: dict[str, object] = {
        "prompt": [chance.randrange(97) for _ in range(chance.randrange(2, 60))],
        "max_tokens": chance.randrange(1, 16),
        "temperature": 0,
    }
    return body | chance.choice([{}, {"max_depth": 2}, {"policy": "full"}])


@contextmanager
def _served(bundle: Path) -> Iterator[tuple[int, int]]:
    """``mythos-edge serve`` on a free port: the port and the pid."""
    command = [sys.executable, "-m", "mythos_edge", "serve", str(bundle), "--port", "0", "--cache-memory", "20MB"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            raise SystemExit(f"the server did not start: {process.communicate()[1].strip()[-300:]}")
        yield int(line.rpartition(":")[2]), process.pid
    finally:
        process.terminate()
        process.communicate()


def _asked(port: int, body: dict[str, object]) -> http.client.HTTPConnection:
    """A connection on which a completion was asked for, and its answer is still to come."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def _choice_of(port: int, body: dict[str, object]) -> dict[str, Any]:
    """The answer to a completion, asked for again while those that leavers have not yet been seen to leave fill it."""
    for _ in range(_TRIES):
        with closing(_asked(port, body)) as connection:
            answer = connection.getresponse()
            content = answer.read()
        if answer.status == 200:
            return json.loads(content)["choices"][0]  # type: ignore[no-any-return]
        if answer.status != http.HTTPStatus.SERVICE_UNAVAILABLE:
            break
        time.sleep(1)
    raise SystemExit(f"a request was answered with {answer.status}: {content[:300]!r}")


def _resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024
