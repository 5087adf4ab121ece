"""Programs that are killed, or interrupted, just before the nth change they make to a folder."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# What Python reports before it does it: every way to make, move, fill and remove a file.
_STEPS = """
import os, signal, sys
count = 0
def step(event, args):
    global count
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (
        event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    ):
        count += 1
        if count == NUMBER:
            HOW
sys.addaudithook(step)
"""
_HOW = {"kill": "os.kill(os.getpid(), signal.SIGKILL)", "interrupt": "raise KeyboardInterrupt"}


def at_each_step(program: str, folder: Path, how: str) -> Iterator[int]:
    """Runs ``program`` in ``folder`` over and over, each time ended one step later, until it comes to its own end.

    Yields the number of the step after each run that was ended; the caller looks, and puts everything back.
    """
    for number in range(1, 200):
        steps = _STEPS.replace("NUMBER", str(number)).replace("HOW", _HOW[how])
        ran = subprocess.run(
            [sys.executable, "-c", f"{steps}\n{program}"],
            capture_output=True, text=True, check=False, timeout=60, cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        if ran.returncode == 0:
            assert number > 1
            return
        assert ran.returncode == -signal.SIGKILL or "KeyboardInterrupt" in ran.stderr, ran.stderr
        yield number
    raise AssertionError("it never came to its end")
