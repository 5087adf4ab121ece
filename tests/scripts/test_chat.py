"""``chat``: line by line from a pipe, and driven in a real terminal."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from command_line import PROGRAM, Ran, refused
from sample_bundle import tree

from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.runtime.session import Session

# A prompt as a terminal gets it, with the cursor shown again.
PROMPT = r">.{0,30}\x1b\[\?25h"
TOKENS = 400
Chat = Callable[..., Ran]


@pytest.fixture
def chat(run: Callable[..., Ran], text_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """``chat(lines, *options)``: a talk whose lines come from a pipe."""

    def call(lines: list[str], *options: object) -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", text_bundle, "--max-new-tokens", 8, *options)

    return call


def _answer(bundle: Path, messages: list[dict[str, str]], template: str, **options: Any) -> str:
    with Session.open(bundle) as session:
        made = ChatTemplate.of(session.bundle, template)
        ids = made.ids(session.tokenizer, messages)
        return str(session.generate(ids, max_new_tokens=8, stop_strings=made.stops, **options).text)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_talk_of_lines(chat: Chat, text_bundle: Path) -> None:
    ran = chat(["Return ", "", "//def "], "--chat-template", "chatml", "--system", "Be a test.", "--json")
    assert ran.code == 0, ran.err
    messages = ran.json["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "/def "
    for at in (2, 4):
        assert messages[at]["content"] == _answer(text_bundle, messages[:at], "chatml")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/stat", "/stat is no command, did you mean /stats: /help shows all"),
        ("/qqqq", "/qqqq is no command: /help shows all"),
        ("/stats", "nothing was answered yet"),
        ("/load {}/talk", "talk: is no talk that /save wrote: "),
        ("/load {}/role", "role: has a message of 'robot', expected texts of "),
        ("/load {}/absent", "absent: cannot read the talk: No such file"),
    ],
)
def test_a_command_that_cannot_be_done_is_one_line(chat: Chat, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "talk").write_text('{"messages": [{"role": "user"}]}')
    (tmp_path / "role").write_text('{"messages": [{"role": "robot", "content": "x"}]}')
    before = tree(tmp_path)
    ran = chat([line.format(tmp_path)])
    assert words in ran.err
    assert "Traceback" not in ran.err
    assert tree(tmp_path) == before


def test_without_a_template_text_goes_on(chat: Chat, text_bundle: Path) -> None:
    ran = chat(["Return the "])
    assert "has no chat template" in ran.err
    assert ran.out == _answer(text_bundle, [_user("Return the ")], "plain") + "\n"
    assert "has no chat template" not in chat(["Return the "], "--chat-template", "plain").err


def test_commands(chat: Chat, text_bundle: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = [
        "Return ",
        "/undo",
        "/depth 2",
        "class ",
        f"/save {saved}",
        "/stats",
        "/reset",
        "/stats x",
        "/depth",
        "/retry",
    ]
    ran = chat(lines)
    assert "taken back: Return " in ran.err
    assert "mean depth 2.00 of 4" in ran.out or "of 4, " in ran.out
    assert json.loads(saved.read_text())["messages"][0] == _user("class ")
    assert json.loads(saved.read_text())["messages"][1]["content"] == _answer(
        text_bundle, [_user("class ")], "plain", max_depth=2
    )
    assert "error: nothing was asked yet" in ran.err
    again = chat(["/retry"], "--load", saved, "--json")
    assert again.json["messages"][1]["content"] == _answer(text_bundle, [_user("class ")], "plain")
    helped = chat(["/help"]).out
    assert all(f"/{name}" in helped for name in ("depth", "threshold", "policy", "system", "undo", "retry", "save"))


def test_mistakes_are_one_line_and_the_talk_goes_on(chat: Chat, run: Callable[..., Ran], demo_bundle: Path) -> None:
    lines = [
        "/dept 3",
        "/depth x",
        "/depth 0",
        "/policy never",
        "/threshold nan",
        "/undo",
        "/load absent.json",
        "/save",
    ]
    ran = chat([*lines, "x" * 100_000, "def "])
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(lines) + 1
    for error, word in zip(
        errors, ("did you mean /depth", "'x'", "max_depth is 0", "policy is 'never'", "threshold"), strict=False
    ):
        assert word in error
    assert ran.code == 0
    assert len(ran.out) > 1
    refused(chat(["x"], "--temperature", -1), "temperature is -1")
    refused(chat(["x"], "--chat-template", "absent"), "absent: cannot read the chat template")
    refused(run("chat", demo_bundle), "has no tokenizer")


def test_tokens_are_coloured_by_depth_on_a_terminal_alone(chat: Chat) -> None:
    plain = chat(["Return the "]).out
    assert chat(["/colour", "Return the "]).out == plain == chat(["Return the "], "--colour").out


@pytest.fixture
def terminal(text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")  # nobody answers where the cursor is
    argv = [
        *PROGRAM[1:],
        "chat",
        str(text_bundle),
        "--chat-template",
        "chatml",
        "--max-new-tokens",
        str(TOKENS),
        "--colour",
    ]
    child = pexpect.spawn(PROGRAM[0], argv, encoding="utf-8", timeout=30, dimensions=(40, 100))
    child.expect("/help shows the commands")
    child.expect(PROMPT)
    yield child
    child.close(force=True)


def test_in_a_terminal(terminal: Any, tmp_path: Path) -> None:
    terminal.send("Return the \r")
    terminal.expect("\x1b\\[38;5;\\d+m")  # the first token, in the colour of its depth
    terminal.sendintr()  # ends the answer, not the program
    terminal.expect(PROMPT)
    terminal.send("/stats\r")
    terminal.expect(r"answer     (\d+) tokens, mean depth")
    assert int(terminal.match[1]) < TOKENS
    terminal.expect(r"of the last prompt 0 were in the caches")
    terminal.send("/depth 1\r")
    terminal.expect(PROMPT)
    terminal.send("def \r")
    terminal.expect("\x1b\\[38;5;33m")  # one loop step is the first colour
    terminal.sendintr()
    terminal.expect(PROMPT)
    terminal.send("/undo\r")
    terminal.expect("taken back: def ")
    terminal.send("/save " + str(tmp_path / "talk.json") + "\r")
    terminal.expect(PROMPT)
    terminal.sendcontrol("d")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert "/depth 1" in (tmp_path / "mythos-edge" / "chat-history").read_text()
