"""Chat templates: what makes a prompt of the messages of a talk, as transformers renders them.

A template comes from a stranger and is a program: it is run in a process of its own (``template_process``), which
bounds its time and memory. The two that are written here are rendered in place.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mythos_edge.model.bounded_files import read_bounded
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import UsageError, unavailable
from mythos_edge.runtime.template_process import TemplateFault, TemplateProcess, compiled, rendered
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

        Raises UsageError where the template refuses them, is damaged or takes too long, BackendUnavailable without
        Jinja.
        """
        values = {**self._tokens, **more, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._rendering(values)
        except TemplateFault as fault:
            what = "be read" if fault.unread else "make a prompt of this talk"
            raise UsageError(f"the chat template ({self.name}) cannot {what}: {fault}") from fault

    def ids(self, tokenizer: Tokenizer, messages: Sequence[Message], /, **more: Any) -> list[int]:
        """The token ids of the prompt. A template writes the tokens around a prompt itself; plain text gets them."""
        return tokenizer.encode(self.render(messages, **more), first=self.is_plain)

    @cached_property
    def _rendering(self) -> Callable[[Mapping[str, Any]], str]:
        """Returns what makes a prompt of values."""
        try:
            import jinja2
        except ImportError as error:
            raise unavailable(error, "a chat template", "pip install 'mythos-edge[chat]'") from error
        assert jinja2
        if self.name in _TEXTS and self._text == _TEXTS[self.name]:
            return partial(rendered, compiled(self._text))
        return TemplateProcess(self._text).render


def _file_text(path: Path) -> str:
    try:
        return read_bounded(path, _MOST_BYTES, "a chat template").decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read the chat template: {error.strerror or error}; expected a file, {CHATML} or {PLAIN}"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: the chat template is not UTF-8 text: {error}") from error
