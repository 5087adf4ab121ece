"""Chat templates in a process of their own: a template comes from a stranger and is a program.

Jinja's sandbox keeps it from files and from Python's internals. It is killed when a prompt takes too long, in Python or
in C, and ends with its parent. Where the system has such bounds, all but Windows, it has little memory and can open no
file and no socket.
"""

import codecs
import importlib
import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, BinaryIO

MOST_SECONDS = 4.0
MOST_BYTES = 512 << 20
"""Memory beyond what the process has before it reads the template."""
_MOST_CHARACTERS = 8_000_000
# Of a text that a template multiplies, and of a power: refused in no time.
_LARGEST = 1_000_000


class TemplateFault(Exception):
    """A template cannot be read (``unread``), or cannot make a prompt. The message says why, on one line."""

    def __init__(self, why: str, unread: bool = False) -> None:
        super().__init__(" ".join(why.split()))
        self.unread = unread


class TemplateProcess:
    """Renders the template ``text``. The process starts at the first prompt, and again after one that ended it.

    Threads may share one; they wait for each other. A prompt may take ``seconds``.
    """

    def __init__(self, text: str, seconds: float = MOST_SECONDS) -> None:
        self._text, self._seconds = text, seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    def render(self, values: Mapping[str, Any]) -> str:
        """The text that the template makes of ``values``, which are those of JSON.

        Raises TemplateFault, also for one that takes too long or too much memory.
        """
        try:
            request = json.dumps(values).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateFault(f"its values are not those of JSON: {error}") from error
        with self._lock:
            answer = self._ask(request)
        if "prompt" in answer:
            return str(answer["prompt"])
        raise TemplateFault(answer["error"], answer["unread"])

    def _ask(self, request: bytes) -> dict[str, Any]:
        process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        finished, late = False, threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        clock = threading.Timer(self._seconds, end)
        clock.daemon = True
        try:
            process.stdin.write(request)
            process.stdin.flush()
            clock.start()
            line = process.stdout.readline()
            answer: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
            finished = bool(answer)
        except BrokenPipeError:
            answer = {}
        finally:
            clock.cancel()
            if not finished or late.is_set():
                # It was ended, or is left alone in the middle of an answer, as by Ctrl-C.
                self._process = None
                assert self._end is not None
                self._end()
        if answer:
            return answer
        code = process.returncode
        why = f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        return {"error": f"it takes longer than {self._seconds:g} s" if late.is_set() else why, "unread": False}

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._process, self._end = process, weakref.finalize(self, _end, process)
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # the first request says so
            process.stdin.write(json.dumps(self._text).encode() + b"\n")
            process.stdin.flush()
        # A line says that it is ready: a slow start is not the template's fault.
        process.stdout.readline()
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(BrokenPipeError):  # of what was not sent yet
            stream.close()


def environment() -> Any:
    """The functions that transformers offers to templates, in Jinja's sandbox.

    Source: transformers 5.24, ``utils/chat_template_utils``.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(one) if isinstance(one, Sequence) else abs(one) for one in (left, right)]
            many = operator == "**" or any(isinstance(one, Sequence) for one in (left, right))
            if many and max(sizes) > 1 and sizes[0] * sizes[1] > _LARGEST:
                raise TemplateError(f"{operator} makes something too large")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """The marks around an answer that training reads; here they are nothing."""

        tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **how: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **how})

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return made


def rendered(template: Any, values: Mapping[str, Any]) -> str:
    """The text that a compiled template makes of ``values``. Raises TemplateFault."""
    from jinja2 import TemplateError

    try:
        return str(template.render(values))
    # A template can go wrong in every way that Python can.
    except (
        *(TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, OSError),
        *(RecursionError, AssertionError, RuntimeError),
    ) as error:
        raise TemplateFault(str(error) or type(error).__name__) from error


def compiled(text: str) -> Any:
    """The template of a text. Raises TemplateFault."""
    from jinja2 import TemplateError

    try:
        return environment().from_string(text)
    # Parts that do not change are computed here already, and Python has bounds of its own for nested code.
    except (TemplateError, RecursionError, SyntaxError, ValueError, TypeError, ArithmeticError) as error:
        raise TemplateFault(str(error) or type(error).__name__, unread=True) from error


def _answer(text: str, values: Mapping[str, Any], kept: list[Any]) -> dict[str, Any]:
    """The answer to one request; ``kept`` is the compiled template, once there is one."""
    try:
        kept[:] = kept or [compiled(text)]
        prompt = rendered(kept[0], values)
        if len(prompt) > _MOST_CHARACTERS:
            raise TemplateFault(f"it makes {len(prompt)} characters, expected at most {_MOST_CHARACTERS}")
        return {"prompt": prompt}
    except TemplateFault as fault:
        return {"error": str(fault), "unread": fault.unread}
    except MemoryError:
        return {"error": f"it takes more than {MOST_BYTES >> 20} MB of memory", "unread": False}


def _confine() -> None:
    """Takes from this process what no template needs: much memory, files, sockets, children."""
    if importlib.util.find_spec("resource") is None:  # Windows
        return
    import resource

    # What Jinja imports when it needs it, and the time zone.
    for module in ("jinja2.constants", "jinja2.debug", "encodings.unicode_escape"):
        importlib.import_module(module)
    codecs.lookup("unicode_escape")
    time.localtime()
    with suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        own = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + MOST_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    environment()  # imports what it needs
    _confine()
    text = json.loads(requests.readline())
    kept: list[Any] = []
    answers.write(b"\n")
    answers.flush()
    for line in requests:
        answers.write(json.dumps(_answer(text, json.loads(line), kept)).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    _serve(sys.stdin.buffer, sys.stdout.buffer)
