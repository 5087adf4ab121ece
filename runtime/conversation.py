"""A talk with a model: messages in, answers out, and the caches of what was said are kept.

    talk = Conversation(session, ChatTemplate.of(session.bundle))
    for token in talk.answer("How deep is the sea?", max_new_tokens=100):
        print(token.text, end="")

Every prompt is the whole talk. What the sequence of the session has in common with it is not computed again, whatever
happened before: an answer was taken back, or broken off, or the first message changed.
"""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

from mythos_edge.model.bounded_files import read_json
from mythos_edge.model.errors import UsageError
from mythos_edge.model.output_files import writing
from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.runtime.decoding import Token
from mythos_edge.runtime.options import DepthOptions, RequestOptions
from mythos_edge.runtime.prompts import common_length
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.streams import TokenStream

_MOST_BYTES = 64 << 20
_ROLES = ("system", "user", "assistant")


class Conversation:
    """The ``messages`` of a talk, and the session that has them in its caches; nobody else may use it meanwhile.

    Raises UsageError for a bundle without a tokenizer.
    """

    def __init__(self, session: Session, template: ChatTemplate) -> None:
        if session.tokenizer is None:
            raise UsageError("this bundle has no tokenizer, which a talk needs: export it with --tokenizer")
        self.session, self.template = session, template
        self.messages: list[dict[str, str]] = []
        self.cached_tokens = 0
        """Tokens of the last prompt that were not computed again."""
        self._tokenizer = session.tokenizer
        self._depth: dict[str, Any] | None = None
        self._idle: threading.Thread | None = None
        self._wanted = threading.Event()

    @property
    def system(self) -> str | None:
        """The text of the system message; None without one."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first is not None and first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages if self.system is None else self.messages[1:]
        self.messages = ([] if text is None else [{"role": "system", "content": text}]) + rest

    def answer(self, text: str, **options: Unpack[RequestOptions]) -> Iterator[Token]:
        """The tokens of the answer to a new message. Closing the iterator ends the answer where it is.

        The message and as much of the answer as was given out are then part of the talk; where nothing was, neither is.
        Raises UsageError, CapacityError.
        """
        self.messages.append({"role": "user", "content": text})
        return self._answering(options)

    def retry(self, **options: Unpack[RequestOptions]) -> Iterator[Token]:
        """The tokens of another answer to the last message, in place of the one there is. Raises UsageError."""
        if not any(message["role"] == "user" for message in self.messages):
            raise UsageError("nothing was asked yet that could be answered again")
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return self._answering(options)

    def undo(self) -> str:
        """Takes back the last message with its answer; its text. Raises UsageError where there is none."""
        while self.messages and self.messages[-1]["role"] != "system":
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        raise UsageError("nothing was said yet that could be taken back")

    def reset(self) -> None:
        """Forgets everything that was said but the system message."""
        self.messages = self.messages[: int(self.system is not None)]

    def save(self, path: Path) -> None:
        """Writes the messages as JSON; the file appears whole or not. Raises UsageError."""
        with writing(path, "the talk") as file:
            file.write(json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1).encode() + b"\n")

    def load(self, path: Path) -> None:
        """Takes up a talk that ``save`` wrote. Raises UsageError for any other file; the talk is then as it was."""
        try:
            values = read_json(path, _MOST_BYTES, "a talk")
            messages = [{"role": one["role"], "content": one["content"]} for one in values["messages"]]
        except OSError as error:
            raise UsageError(f"{path}: cannot read the talk: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{path}: is no talk that /save wrote: {error!r}") from error
        for message in messages:
            if message["role"] not in _ROLES or not isinstance(message["content"], str):
                raise UsageError(f"{path}: has a message of {message['role']!r}, expected texts of {', '.join(_ROLES)}")
        self.messages = messages

    def idle(self) -> None:
        """Catches up skipped loop steps in the background until the next answer is wanted."""
        self._wanted.clear()
        self._idle = threading.Thread(target=self.session.flush, args=(self._wanted.is_set,), daemon=True)
        self._idle.start()

    def busy(self) -> None:
        """Ends ``idle``: waits for the one loop step that may be under way."""
        if self._idle is not None:
            self._wanted.set()
            self._idle.join()
            self._idle = None

    def _answering(self, options: RequestOptions) -> Iterator[Token]:
        asked = len(self.messages) - 1
        try:
            self.busy()
            stream = self._stream(self.template.ids(self._tokenizer, self.messages), options)
        except BaseException:
            del self.messages[asked:]
            raise
        return self._told(stream, asked)

    def _told(self, stream: TokenStream, asked: int) -> Iterator[Token]:
        said: list[str] = []
        try:
            for token in stream:
                said.append(token.text)
                yield token
        finally:
            stream.close()
            if said:
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                del self.messages[asked:]

    def _stream(self, ids: list[int], options: RequestOptions) -> TokenStream:
        """A stream over the prompt ``ids``, after what the session has of them already."""
        depth = {name: value for name, value in options.items() if name in DepthOptions.__annotations__}
        stops = options.get("stop_strings", ())
        given: RequestOptions = {
            **options,
            "stop_strings": (*self.template.stops, *([stops] if isinstance(stops, str) else stops)),
        }
        # The last token must run again, as its logits were not kept.
        kept = 0 if self._depth != depth else max(0, min(common_length(self.session.ids, ids), len(ids) - 1))
        if kept and kept < self.session.rollback_floor:
            kept = 0  # slots with a window do not go back so far: the talk is computed anew
        if kept:
            self.session.rollback(kept)
        stream = self.session.stream(ids[kept:], resume=kept > 0, **given)
        self._depth, self.cached_tokens = depth, kept
        return stream
