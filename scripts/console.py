"""Where the CLI speaks: results on stdout, everything else on stderr, JSON when asked.

What is shown may come from a file or from the command line: characters that steer a terminal are written as escapes,
and so is what the stream's encoding lacks. A stderr that takes nothing is no reason to end; a stdout is. Only a
terminal gets lines that are wrapped to its width, and what is under way with its clock; ``NO_COLOR`` and ``TERM=dumb``
are honoured.
"""

import json
import math
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from mythos_edge.model.errors import UsageError
from mythos_edge.model.output_files import is_standard_output

CLOSED = "stdout is closed, and results go there: leave it open, or send them away with > /dev/null"
# How often a terminal that cannot move its cursor is told of the same phase.
_EVERY_S = 5.0
# What was seen of a phase before it is said how long the rest takes.
_SEEN_S = 1.0
# How often the clock of a live line moves, and how soon news may follow others there.
_TICK_S = 1.0
_LIVE_PAUSE_S = 0.1
# C0 but tab and newline, DEL and C1: they move the cursor, change colours and titles, or answer as if typed.
_CONTROLS = [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)]
# They begin lines for some readers, or turn the order in which the rest of a line is shown.
_LAYOUT = [0x2028, 0x2029, 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPED = {code: f"\\x{code:02x}" for code in _CONTROLS}
_ESCAPED_MESSAGE = _ESCAPED | {code: f"\\u{code:04x}" for code in _LAYOUT}
_ESCAPED_LINE = _ESCAPED_MESSAGE | {0x09: "\\t", 0x0A: "\\n"}


def printable(text: str) -> str:
    """``text`` without what could steer a terminal: such characters are written as escapes, as in ``\\x1b``."""
    return text.translate(_ESCAPED_MESSAGE)


def printable_line(text: str) -> str:
    """``text`` as ``printable`` makes it, in one line."""
    return text.translate(_ESCAPED_LINE)


@dataclass
class _Phase:
    """A phase of work, and which share of it was done when: at first, and as it was last told."""

    name: str
    began_at: float
    began: float
    told_at: float
    done: float

    def left_s(self, now: float) -> float | None:
        """Seconds until its end, as fast as it went so far; None where that cannot be said."""
        took, grown = self.told_at - self.began_at, self.done - self.began
        if took < _SEEN_S or grown <= 0:
            return None
        left = took / grown * (1 - self.done) - (now - self.told_at)
        return left if left > 0 else None


class Console:
    """One verb's output. With ``as_json`` stdout carries one JSON object and nothing else."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._started = time.monotonic()
        self._phase: _Phase | None = None
        self._shown_at = -math.inf
        # Set when the live line has ended; None where there is none.
        self._clock: threading.Event | None = None
        self._writing = threading.Lock()
        self._result_given, self._lacking_told, self._people_on_stderr = False, False, False

    @property
    def colour(self) -> bool:
        return not self.as_json and _moves_the_cursor(sys.stdout) and not os.environ.get("NO_COLOR")

    @property
    def width(self) -> int | None:
        """The columns of the terminal that results go to; None where they go elsewhere, and no line is too long."""
        return shutil.get_terminal_size().columns if _is_terminal(sys.stdout) else None

    def say(self, text: str = "", end: str = "\n", coloured: bool = False) -> None:
        """Part of the result for people; not shown with --json. ``coloured`` text has escape codes of our own."""
        if self._people_on_stderr:
            self.note(text)
        elif not self.as_json:
            self.end_progress()
            self._print((text if coloured else printable(text)) + end)

    def field(self, name: str, text: str, indent: int) -> None:
        """A named fact, whose text begins at the column ``indent`` and goes on there when a terminal is too narrow."""
        text = printable(text)
        if self.width is not None:
            room = max(20, self.width - indent)
            lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
            text = f"\n{' ' * indent}".join(lines)
        self.say(f"{name:{indent - 1}} {text}".rstrip())

    def text(self, text: str) -> None:
        """Text that a model made, as it comes: exact in a file or pipe, without control characters on a terminal."""
        if not self.as_json:
            self.end_progress()
            self._print(text.translate(_ESCAPED) if _is_terminal(sys.stdout) else text)

    def shaded(self, text: str, colour: int) -> None:
        """Text that a model made, in one of a terminal's 256 colours, where it has them."""
        if not self.colour:
            self.text(text)
            return
        self.end_progress()
        self._print(f"\x1b[38;5;{colour}m{text.translate(_ESCAPED)}\x1b[0m")

    def note(self, text: str) -> None:
        """Something worth knowing that is not the result, in one line."""
        self.end_progress()
        tell(printable_line(text) + "\n")

    def fail(self, message: str, trace: str = "") -> None:
        """An error, as one line and as the JSON object; before it the traceback where there is one to show."""
        self.end_progress()
        tell(printable(trace))
        self.note(f"error: {message}")
        try:
            self.result({"error": message})
        except (BrokenPipeError, UsageError):
            drop(sys.stdout)  # what went wrong first is told already

    def result(self, values: Mapping[str, Any]) -> None:
        """The JSON object of --json; only the first of a verb's is given."""
        if self.as_json and not self._result_given:
            self.end_progress()
            self._result_given = True
            self._print(json.dumps(without_nan(values), allow_nan=False) + "\n")

    def leave_stdout_to(self, output: Path) -> None:
        """Says on stderr what is for people, where ``output`` is stdout. Raises UsageError with --json."""
        if is_standard_output(output):
            if self.as_json:
                raise UsageError(f"{output}: is where --json writes, too: choose another output")
            self._people_on_stderr = True

    def progress(self, phase: str, fraction: float) -> None:
        """Shows people at a terminal the phase that is under way and the share of it that is done.

        It is one line with elapsed and remaining time, whose clock moves. Elsewhere, and with --json, nothing is told.
        """
        if self.as_json or not _is_terminal(sys.stderr):
            return
        now, live, last = time.monotonic(), _moves_the_cursor(sys.stderr), self._phase
        name = printable_line(phase)
        if last is None or name != last.name or fraction < last.done:
            self._phase, self._shown_at = _Phase(name, now, fraction, now, fraction), -math.inf
        elif fraction > last.done:
            # Replaced whole, as the clock may read it meanwhile.
            self._phase = replace(last, told_at=now, done=fraction)
        if now - self._shown_at < (_LIVE_PAUSE_S if live else _EVERY_S):
            return
        self._shown_at = now
        if not live:
            tell(f"{self._progress_line()}\n")
            return
        if self._clock is None:
            self._clock = threading.Event()
            threading.Thread(target=self._tick, args=(self._clock,), daemon=True).start()
        self._show_live(self._clock)

    def end_progress(self) -> None:
        clock, self._clock = self._clock, None
        if clock is not None:
            with self._writing:
                clock.set()
                tell("\n")

    def _tick(self, clock: threading.Event) -> None:
        while not clock.wait(_TICK_S):
            self._show_live(clock)

    def _show_live(self, clock: threading.Event) -> None:
        with self._writing:
            if not clock.is_set():
                room = shutil.get_terminal_size().columns - 1
                tell(f"\r{self._progress_line():<{room}}"[: room + 1])

    def _progress_line(self) -> str:
        phase, now = self._phase, time.monotonic()
        assert phase is not None
        left = phase.left_s(now)
        share = f" {phase.done:.0%}" if phase.done else ""
        rest = "" if left is None else f", about {_duration(math.ceil(left))} left"
        return f"{_duration(now - self._started):>9}  {phase.name}{share}{rest}"

    def _print(self, text: str) -> None:
        """Writes to stdout; the first character that its encoding lacks is told.

        Raises UsageError where it takes nothing, and BrokenPipeError where its reader went away.
        """
        if sys.stdout is None:
            raise UsageError(CLOSED)
        shown = _encodable(text, sys.stdout)
        if shown != text and not self._lacking_told:
            self._lacking_told = True
            self.note(
                f"note: stdout is {sys.stdout.encoding}, which lacks some characters: they are written as escapes; "
                "PYTHONIOENCODING=utf-8 writes all"
            )
        try:
            sys.stdout.write(shown)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            drop(sys.stdout)
            raise UsageError(f"stdout: cannot write the result: {error.strerror}") from error


def _duration(seconds: float) -> str:
    """A time for people: 9 s, 9.5 s, 2:05 min or 1:02 h."""
    if seconds < 60:
        return f"{seconds} s" if isinstance(seconds, int) else f"{seconds:.1f} s"
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02} h" if hours else f"{minutes}:{rest:02} min"


def drop(stream: TextIO | None) -> None:
    """Lets whatever else is written to a stream that takes nothing any more go to nowhere, at Python's exit, too."""
    if stream is not None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def tell(text: str) -> None:
    """Writes to stderr as it is, or nowhere where it takes nothing: there is no other place to say it."""
    if sys.stderr is None or not text:
        return
    try:
        sys.stderr.write(_encodable(text, sys.stderr))
        sys.stderr.flush()
    except OSError:
        drop(sys.stderr)


def _encodable(text: str, stream: TextIO) -> str:
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _moves_the_cursor(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that understands more than text."""
    return _is_terminal(stream) and os.environ.get("TERM") != "dumb"


def without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity; null says that a figure could not be had."""
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
