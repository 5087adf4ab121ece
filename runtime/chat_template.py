"""Chat templates: what makes a prompt of the messages of a talk, as transformers renders them.

A template comes from a stranger and is a program. Jinja's sandbox keeps it from files and from Python's internals;
numbers and texts that it makes are bounded. It can still take long, as a model can.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from mythos_edge.model.bounded_files import read_bounded
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import UsageError, one_line, unavailable
from mythos_edge.runtime.text import Tokenizer

Message = Mapping[str, Any]
PLAIN, CHATML = "plain", "chatml"
_TEXTS = {
    PLAIN: "{% for message in messages %}{{ message.content }}{% endfor %}",
    CHATML: (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
_MOST_BYTES = 1_000_000
# Of a text that a template multiplies, and of a power.
_LARGEST = 1_000_000


class ChatTemplate:
    """A template with its ``name``: bundle, chatml, plain, or a file. ``stops`` are texts that end an answer.

    A ``plain`` one, which is the texts of all messages one after the other, suits models that continue text.
    """

    def __init__(self, text: str, name: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self.name = name
        self.stops = ("<|im_end|>",) if name == CHATML else ()
        self._text, self._tokens = text, {"bos_token": bos_token, "eos_token": eos_token}

    @classmethod
    def of(cls, bundle: Bundle, choice: str | None = None) -> "ChatTemplate":
        """The template of ``choice`` (chatml, plain or a file), by default the bundle's own, else plain.

        Raises UsageError for a file that cannot be read, and BundleError.
        """
        own = bundle.manifest.chat_template
        tokens = {} if own is None else {"bos_token": own.bos_token, "eos_token": own.eos_token}
        if choice in _TEXTS:
            return cls(_TEXTS[choice], choice, **tokens)
        if choice is not None:
            return cls(_file_text(Path(choice)), choice, **tokens)
        if own is None:
            return cls(_TEXTS[PLAIN], PLAIN)
        with bundle.unchanged():
            return cls(_file_text(bundle.file(own.file)), "bundle", **tokens)

    @property
    def is_plain(self) -> bool:
        return self.name == PLAIN

    def render(self, messages: Sequence[Message], /, *, add_generation_prompt: bool = True, **more: Any) -> str:
        """The prompt for ``messages`` (each with ``role`` and ``content``); ``more`` are values the template may read.

        Raises UsageError where the template refuses them or is damaged, BackendUnavailable without Jinja.
        """
        from jinja2 import TemplateError

        values = {**self._tokens, **more, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return str(self._compiled.render(values))
        # A template can go wrong in every way that Python can.
        except (
            *(TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
            RecursionError,
        ) as error:
            raise UsageError(
                f"the chat template ({self.name}) cannot make a prompt of this talk: {one_line(error)}"
            ) from error

    def ids(self, tokenizer: Tokenizer, messages: Sequence[Message], /, **more: Any) -> list[int]:
        """The token ids of the prompt. A template writes the tokens around a prompt itself; plain text gets them."""
        return tokenizer.encode(self.render(messages, **more), first=self.is_plain)

    @cached_property
    def _compiled(self) -> Any:
        try:
            from jinja2 import TemplateError
        except ImportError as error:
            raise unavailable(error, "a chat template", "pip install 'mythos-edge[chat]'") from error
        try:
            return _environment().from_string(self._text)
        except (TemplateError, RecursionError) as error:
            raise UsageError(f"the chat template ({self.name}) cannot be read: {error}") from error


def _file_text(path: Path) -> str:
    try:
        return read_bounded(path, _MOST_BYTES, "a chat template").decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read the chat template: {error.strerror or error}; expected a file, {CHATML} or {PLAIN}"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: the chat template is not UTF-8 text: {error}") from error


def _environment() -> Any:
    """The functions that transformers offers to templates, in a sandbox.

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

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment
