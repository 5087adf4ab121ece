"""A headless Chromium that is driven by calls, for tests of the page and for its picture. Works in a checkout.

Needs node with the packages of tests/web (``npm ci`` there), and a chromium on the path.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

WEB = Path(__file__).resolve().parents[2] / "tests" / "web"


def missing() -> str | None:
    """The thing that this machine lacks to run the browser; None where it lacks nothing."""
    for program in ("node", "chromium"):
        if shutil.which(program) is None:
            return f"{program} is not on the path: install it to open pages"
    if not (WEB / "node_modules" / "playwright-core").is_dir():
        return f"{WEB} has no packages: run npm ci there"
    return None


class Browser:
    """One page at a time. A method of playwright's Page is called by its name in JavaScript."""

    def __init__(self, sent: IO[str], received: IO[str]) -> None:
        self._sent, self._received = sent, received

    def call(self, method: str, *args: Any) -> Any:
        """The value that a method gives, where it is one of JSON. Raises RuntimeError with what playwright says."""
        print(json.dumps({"call": method, "args": args}), file=self._sent, flush=True)
        answer = json.loads(self._received.readline() or '{"error": "the browser has ended"}')
        if "error" in answer:
            raise RuntimeError(f"{method}{args}: {answer['error']}")
        return answer["value"]

    def open(self, url: str, **context: Any) -> None:
        """Loads a page in a context of its own, with options of playwright's newContext."""
        self.call("open", url, context)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self.call("evaluate", expression)

    def wait(self, expression: str, patience_s: float = 30.0) -> None:
        """Waits until an expression in the page is true. Raises TimeoutError where it does not become so."""
        # Playwright's own way compiles text in the page, which the page's policy forbids.
        until = time.monotonic() + patience_s
        while not self.js(expression):
            if time.monotonic() > until:
                raise TimeoutError(f"not true after {patience_s:g} s: {expression}")
            time.sleep(0.02)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that runs until the end of the block. Raises RuntimeError where something is ``missing``."""
    lack = missing()
    if lack is not None:
        raise RuntimeError(lack)
    command = ["node", str(WEB / "browser.mjs"), str(shutil.which("chromium"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Browser(process.stdin, process.stdout)
