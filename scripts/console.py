"""Where the CLI speaks: results on stdout, everything else on stderr, JSON when asked."""

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

_EVERY_S = 5.0


class Console:
    """One verb's output. With ``as_json`` stdout carries one JSON object and nothing else."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._started = time.monotonic()
        self._phase, self._told_at, self._open_line = "", 0.0, False

    @property
    def colour(self) -> bool:
        return sys.stdout.isatty() and not self.as_json

    def say(self, text: str = "", end: str = "\n") -> None:
        """Part of the result for people; not shown with --json."""
        if not self.as_json:
            self.end_progress()
            print(text, end=end, flush=True)

    def note(self, text: str) -> None:
        """Something worth knowing that is not the result."""
        self.end_progress()
        print(text, file=sys.stderr, flush=True)

    def result(self, values: Mapping[str, Any]) -> None:
        """The JSON object of --json."""
        if self.as_json:
            self.end_progress()
            print(json.dumps(_without_nan(values), allow_nan=False), flush=True)

    def progress(self, phase: str, fraction: float) -> None:
        """Phase, share and elapsed time on stderr: a live line on a terminal, else a line now and then."""
        now, live = time.monotonic(), sys.stderr.isatty()
        pause = 0.1 if live else _EVERY_S
        if phase == self._phase and now - self._told_at < pause:
            return
        self._phase, self._told_at = phase, now
        line = f"{now - self._started:7.1f} s  {phase}" + (f" {fraction:.0%}" if fraction else "")
        print(f"\r{line:<60}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)
        self._open_line = live

    def end_progress(self) -> None:
        if self._open_line:
            print(file=sys.stderr, flush=True)
            self._open_line = False


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity; null says that a figure could not be had."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
