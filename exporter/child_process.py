"""Runs a module of this package in a process of its own that ends when its parent does, however that ended.

The child watches a pipe whose other end only the parent holds: even a parent that was killed closes it. Standard
library only, so that the child watches before it imports what takes long.
"""

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import IO

_ENDED_WITH_PARENT = 1


def start(
    module: str,
    job: str,
    *,
    stdout: IO[bytes] | int,
    stderr: IO[bytes] | int,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """``python -m module job`` at work. ``end`` it in any case, as it goes on while its ``stdin`` is open."""
    command = [sys.executable, "-m", __name__, module, job]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, env=environment)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that still runs, as native code does not hear Ctrl-C, and waits for its end."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _watch_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(_ENDED_WITH_PARENT)


if __name__ == "__main__":
    threading.Thread(target=_watch_parent, daemon=True).start()
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
