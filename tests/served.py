"""A server in a process of its own, as a user starts it."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
from command_line import PROGRAM


class Served:
    """``mythos-edge serve`` on a free port; a context manager that ends it."""

    def __init__(self, bundle: Path, *options: object) -> None:
        argv = [*PROGRAM, "serve", bundle, "--port", 0, *options]
        self.process = subprocess.Popen(
            [str(word) for word in argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", self.line)
        if found is None:
            raise AssertionError(self.process.communicate())
        self.address = found[0]

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.end()

    def end(self, sent: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Asks it to end; its exit code and what it said on stderr."""
        self.process.send_signal(sent)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.address}{path}", json=body, timeout=60, **options)

    def figures(self, **options: Any) -> dict[str, float]:
        """The figures of /metrics by name, with their labels."""
        text = httpx.get(f"{self.address}/metrics", **options).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("mythos_edge_"): float(value) for name, value in lines}

    def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The events of a stream, which must end with [DONE]."""
        with httpx.stream("POST", f"{self.address}{path}", json={**body, "stream": True}, timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            data = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert data[-1] == "[DONE]"
        return [json.loads(line) for line in data[:-1]]
