"""``mythos-edge chat``: a talk with a model in the terminal. Its caches are kept from turn to turn.

In a terminal lines are edited and remembered (prompt_toolkit); from a file or pipe every line is a message.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mythos_edge.model.errors import MythosEdgeError, UsageError, unavailable
from mythos_edge.model.user_cache import cache_folder
from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.runtime.conversation import Conversation
from mythos_edge.runtime.decoding import Token
from mythos_edge.runtime.halting import Policy
from mythos_edge.runtime.options import Options
from mythos_edge.scripts import arguments, interrupts, options
from mythos_edge.scripts.console import Console

HELP = "talk with a model in the terminal"
EXAMPLE = 'mythos-edge chat model.bundle --system "Be brief." --temperature 0.7'

_NO_TEMPLATE = "this bundle has no chat template: the model goes on with the text (--chat-template chatml or a file)"
# 256 colours, from few loop steps (blue) to all of them (red).
_SHADES = (33, 39, 43, 41, 112, 184, 214, 208, 203, 196)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--chat-template",
        metavar="T",
        help="chatml, plain (the texts alone) or a file (default: the bundle's, or plain)",
    )
    parser.add_argument("--load", type=arguments.path, metavar="FILE", help="a talk that /save wrote")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of one answer (default: 512)")
    parser.add_argument("--colour", action="store_true", help="colour every token by its depth, as /colour does")
    options.add_depth(parser)
    options.add_sampling(parser)
    options.add_drafts(parser)
    options.add_target(parser)
    options.add_selftest(parser)
    options.add_threads(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    request = {
        "max_new_tokens": args.max_new_tokens,
        **options.depth_of(args),
        **options.sampling_of(args),
        **options.drafts_of(args),
    }
    Options(**request)  # refused now, not at the first message
    system = None if args.system is None else arguments.text_of(args.system, "--system")
    with options.session_of(args) as session:
        template = ChatTemplate.of(session.bundle, args.chat_template)
        talk = Conversation(session, template)
        if args.load is not None:
            talk.load(args.load)
        if system is not None:
            talk.system = system
        template.render(talk.messages)
        chat = _Chat(talk, request, console, args.colour)
        if template.is_plain and args.chat_template is None:
            console.note(_NO_TEMPLATE)
        chat.run(_typed(console) if sys.stdin.isatty() else _piped())
    console.result({"template": template.name, "messages": talk.messages})
    return 0


class _End(Exception):
    """The wish to leave."""


class _Chat:
    """The loop of messages and commands, with the options that commands change."""

    def __init__(self, talk: Conversation, request: dict[str, Any], console: Console, colour: bool) -> None:
        self.talk, self.request, self.console, self.colour = talk, request, console, colour
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "help": ("show the commands", self._help),
            "depth": ("N: at most N loop steps; nothing: as trained", self._depth),
            "threshold": ("X: halting mass that ends a position's loop; nothing: as trained", self._threshold),
            "policy": (f"one of {', '.join(Policy)}", self._policy),
            "system": ("TEXT: the system message; nothing: none", self._system),
            "reset": ("forget what was said, but not the system message", lambda rest: self.talk.reset()),
            "undo": ("take back the last message and its answer", self._undo),
            "retry": ("answer the last message again", self._retry),
            "save": ("FILE: write the talk as JSON", lambda rest: self.talk.save(_place(rest))),
            "load": ("FILE: go on with a talk that /save wrote", lambda rest: self.talk.load(_place(rest))),
            "stats": ("figures of the last answer and of the caches", self._stats),
            "colour": ("colour every token by its depth, or no more", self._colour),
            "exit": ("leave, as Ctrl-D does", self._exit),
        }

    def run(self, lines: Iterator[str]) -> None:
        """Answers every line until there are no more. An error of one turn is told, and the talk goes on."""
        try:
            for line in lines:
                try:
                    self.turn(line)
                except MythosEdgeError as error:
                    self.console.note(f"error: {error}")
        except _End:
            pass
        finally:
            self.talk.busy()

    def turn(self, line: str) -> None:
        """Does what a line says: a command where it begins with a slash (two of them are one), else a message."""
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self._tell(self.talk.answer(line.removeprefix("/"), **self.request))
            return
        name, _, rest = line[1:].partition(" ")
        if name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, 1)
            raise UsageError(f"/{name} is no command{f', did you mean /{near[0]}' if near else ''}: /help shows all")
        self.talk.busy()
        self.commands[name][1](rest.strip())

    def _tell(self, answer: Iterator[Token]) -> None:
        """Shows an answer as it comes; Ctrl-C ends it where it is."""
        with interrupts.wished() as wished:
            for token in answer:
                self._show(token)
                if wished():
                    break
        answer.close()  # type: ignore[attr-defined]
        self.console.say()
        reason = self.talk.session.last_generation.finish_reason
        if reason in ("length", "context") and not wished():
            limit = "--max-new-tokens" if reason == "length" else "the context; /reset or /undo makes room"
            self.console.note(f"note: ended by {limit}")
        self.talk.idle()

    def _show(self, token: Token) -> None:
        if not self.colour or not token.text:
            self.console.text(token.text)
            return
        most = self.talk.session.model.max_depth
        shade = _SHADES[min(len(_SHADES) - 1, (token.depth - 1) * len(_SHADES) // max(1, most))]
        self.console.shaded(token.text, shade)

    def _set(self, **values: Any) -> None:
        """Changes options of the requests to come. Raises UsageError for values that no request takes."""
        changed = {**self.request, **values}
        Options(**changed).depth.resolve(self.talk.session.model)
        self.request = changed

    def _help(self, rest: str) -> None:
        del rest
        for name, (text, _) in self.commands.items():
            self.console.say(f"/{name:10} {text}")
        self.console.say("// at the beginning of a line is one slash of a message; Ctrl-C ends an answer")

    def _depth(self, rest: str) -> None:
        self._set(max_depth=_number(rest, int, "/depth"))

    def _threshold(self, rest: str) -> None:
        self._set(threshold=_number(rest, float, "/threshold"))

    def _policy(self, rest: str) -> None:
        self._set(policy=rest)

    def _system(self, rest: str) -> None:
        self.talk.system = rest or None

    def _undo(self, rest: str) -> None:
        del rest
        self.console.note(f"taken back: {self.talk.undo()}")

    def _retry(self, rest: str) -> None:
        del rest
        if not self.request["temperature"]:
            self.console.note("note: at temperature 0 the answer is the same again")
        self._tell(self.talk.retry(**self.request))

    def _colour(self, rest: str) -> None:
        del rest
        self.colour = not self.colour

    def _exit(self, rest: str) -> None:
        del rest
        raise _End

    def _stats(self, rest: str) -> None:
        del rest
        session, last = self.talk.session, self.talk.session.last_generation
        if not last.ids:
            raise UsageError("nothing was answered yet")
        speed = f", {last.decode_tokens_per_s:.1f} tokens/s" if last.decode_tokens_per_s else ""
        self.console.say(
            f"answer     {len(last.ids)} tokens, mean depth {sum(last.depths) / len(last.depths):.2f} of "
            f"{session.model.max_depth}, {last.block_calls} block calls, first token after {last.ttft_ms:.0f} ms{speed}"
        )
        self.console.say(
            f"context    {len(session.ids)} of {session.max_context} tokens; of the last prompt "
            f"{self.talk.cached_tokens} were in the caches"
        )


def _place(rest: str) -> Path:
    return arguments.path(rest)


def _number(text: str, kind: type[int] | type[float], command: str) -> float | None:
    """The number in ``text``; None where there is none. Raises UsageError."""
    try:
        return kind(text) if text else None
    except ValueError:
        raise UsageError(f"{command} is {text!r}, expected a number, or nothing for what was trained") from None


def _piped() -> Iterator[str]:
    """The lines of stdin. Raises UsageError where it is no UTF-8."""
    for line in sys.stdin:
        yield arguments.text_of(line.rstrip("\r\n"), "stdin")


def _typed(console: Console) -> Iterator[str]:
    """Lines as they are typed: edited, completed and remembered. Ctrl-C clears a line, Ctrl-D ends."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
    except ImportError as error:
        raise unavailable(error, "a talk in the terminal", "pip install 'mythos-edge[chat]'") from error
    history: Any = InMemoryHistory()
    with suppress(OSError, UsageError):  # without a home nothing is remembered
        cache_folder().mkdir(parents=True, exist_ok=True)
        history = FileHistory(str(cache_folder() / "chat-history"))
    console.note("Ctrl-C ends an answer, Ctrl-D the talk; /help shows the commands")
    session: Any = PromptSession(history=history)
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
