"""Words of verbs on stdout and stderr: without control characters, in any encoding, or refused."""

import io
import json
import sys
import time
from pathlib import Path

import pytest

from mythos_edge.model.errors import UsageError, raise_interrupt, unavailable
from mythos_edge.scripts import console as console_module
from mythos_edge.scripts import interrupts
from mythos_edge.scripts.console import Console, printable, printable_line

# Clears the screen, sets a title, asks the terminal to answer, in the forms of 7 and of 8 bits; then the usual text.
NASTY = "a\x1b[2J\x1b]0;t\x07\x9b6n\x7f\r\b\0b"
SHOWN = r"a\x1b[2J\x1b]0;t\x07\x9b6n\x7f\x0d\x08\x00b"
GOOD = "Grün 中文 हिन्दी 😀👩‍👩‍👧\tx\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="")


def _bytes(stream: io.TextIOWrapper) -> bytes:
    made = stream.buffer
    assert isinstance(made, io.BytesIO)
    return made.getvalue()


def _terminal(monkeypatch: pytest.MonkeyPatch) -> _Terminal:
    """Makes stdout and stderr those of a terminal of 40 columns."""
    made = _Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return made


def test_what_steers_a_terminal_is_written_as_escapes() -> None:
    assert printable(NASTY) == SHOWN
    assert printable(GOOD) == GOOD
    assert printable("\u202eevil\u2066") == r"\u202eevil\u2066"
    assert printable_line("two\nlines\x85\u2028") == r"two\nlines\x85\u2028"
    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert len(printable_line(every).splitlines()) == 1
    left = set(printable(every))
    assert [code for code in range(0xA0) if chr(code) in left] == [9, 10, *range(32, 127)]


def test_messages_results_and_progress_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=False)
    console.say(NASTY)
    console.note(f"{NASTY}\nsecond")
    console.progress(NASTY, 0.5)
    console.fail(NASTY, f"Traceback\n{NASTY}\n")
    out, err = capsys.readouterr()
    assert out == f"{SHOWN}\n"
    assert err.splitlines()[0] == rf"{SHOWN}\nsecond"
    assert not {*err} & {chr(code) for code in range(32) if code != 10}
    assert "%" not in err, "progress is for terminals"
    assert err.splitlines()[-1] == f"error: {SHOWN}"


def test_generated_text_is_exact_but_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Console(as_json=False).text(NASTY + GOOD)
    assert capsys.readouterr().out == NASTY + GOOD
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    Console(as_json=False).text(NASTY + GOOD)
    assert terminal.getvalue() == SHOWN + GOOD


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16", "cp1252"])
def test_what_an_encoding_lacks_is_told_once(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = _stream(encoding), _stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    console = Console(as_json=False)
    console.text("中")
    console.text("文\ud800")
    console.note("中")
    shown, told = (_bytes(stream).decode(encoding) for stream in (out, err))
    if encoding == "utf-16":
        assert shown == "中文\\ud800"
        assert told.count("\n") == 2
    else:
        assert shown == "\\u4e2d\\u6587\\ud800"
        assert told.startswith(f"note: stdout is {encoding}, which lacks some characters")
        assert told.endswith("\n\\u4e2d\n")
        assert told.count("\n") == 2


def test_only_one_object_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=True)
    console.result({"a": float("nan"), "b": "\ud800\x1b"})
    console.result({"a": 2})
    console.fail("too late")
    console.say("for people")
    console.text("for people")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": None, "b": "\ud800\x1b"}
    assert "\x1b" not in out
    assert err == "error: too late\n"


def test_without_streams_nothing_is_said_and_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    console = Console(as_json=False)
    console.note("x")
    console.progress("x", 0.5)
    assert not console.colour
    with pytest.raises(UsageError, match="stdout is closed"):
        console.say("x")


def test_an_output_that_is_stdout_moves_what_is_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mythos_edge.scripts import console as module

    monkeypatch.setattr(module, "is_standard_output", lambda path: True)
    console = Console(as_json=False)
    console.leave_stdout_to(Path("/dev/stdout"))
    console.say("done")
    assert capsys.readouterr() == ("", "done\n")
    with pytest.raises(UsageError, match="is where --json writes, too"):
        Console(as_json=True).leave_stdout_to(Path("/dev/stdout"))


# --- terminals ----------------------------------------------------------------------------------------------------


def test_the_clock_of_a_terminal_moves_while_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    monkeypatch.setattr(console_module, "_TICK_S", 0.02)
    console = Console(as_json=False)
    console.progress("a phase without any news whose name is long", 0.0)
    deadline = time.monotonic() + 30
    while terminal.getvalue().count("\r") < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    console.say("done")
    shown = terminal.getvalue()
    *lines, end = shown.split("\r")[1:]
    assert len({line.partition(" s  ")[0] for line in lines}) > 1, "the clock moved"
    assert max(map(len, lines)) < 40
    assert end.endswith("\ndone\n")
    time.sleep(0.1)
    assert terminal.getvalue() == shown, "it goes on after its end"


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ([(0, 0.0)], "10.0 s  work"),
        ([(0, 0.0), (0.5, 0.1)], "10.5 s  work 10%"),  # too soon to say
        ([(0, 0.0), (5, 0.25)], "15.0 s  work 25%, about 15 s left"),
        ([(0, 0.0), (50, 0.25), (51, 0.25)], "1:01 min  work 25%, about 2:29 min left"),
        ([(0, 0.0), (2000, 0.2)], "33:30 min  work 20%, about 2:13 h left"),
        ([(0, 0.5), (10, 0.75)], "20.0 s  work 75%, about 10 s left"),  # what was there before took no time
        ([(0, 0.0), (10, 0.9), (12, 0.9)], "22.0 s  work 90%"),  # it takes longer than it should
        ([(0, 0.0), (10, 0.9), (12, 0.1)], "22.0 s  work 10%"),  # begun again
    ],
)
def test_the_remaining_time_is_that_of_the_pace_so_far(
    told: list[tuple[float, float]], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, now = _terminal(monkeypatch), 0.0
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(console_module, "_TICK_S", 1e6)
    monkeypatch.setenv("COLUMNS", "80")
    console = Console(as_json=False)
    for at, share in told:
        now = 10.0 + at
        console.progress("work", share)
    assert terminal.getvalue().split("\r")[-1].strip() == shown
    console.end_progress()


def test_escapes_of_a_phase_are_shown_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")
    console = Console(as_json=False)
    console.progress(NASTY, 0.5)
    console.end_progress()
    assert SHOWN in terminal.getvalue()


def test_json_and_pipes_hear_of_no_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Console(as_json=False).progress("work", 0.5)
    assert capsys.readouterr() == ("", "")
    terminal = _terminal(monkeypatch)
    Console(as_json=True).progress("work", 0.5)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("name", "value", "colour", "live"), [("NO_COLOR", "1", False, True), ("NO_COLOR", "", True, True),
                                          ("TERM", "dumb", False, False), ("TERM", "xterm", True, True)]
)  # fmt: skip
def test_what_the_environment_says_of_a_terminal(
    name: str, value: str, colour: bool, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = _terminal(monkeypatch)
    monkeypatch.setenv(name, value)
    console = Console(as_json=False)
    assert console.colour is colour
    console.progress("graphs", 0.0)
    console.end_progress()
    assert ("\r" in terminal.getvalue()) is live


def test_facts_are_wrapped_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    text = "a few words that take more than one line, and pip install 'mythos-edge[tensorrt-rtx,a-long-name]'"
    Console(as_json=False).field("name", text, 10)
    lines = terminal.getvalue().splitlines()
    assert lines[0].startswith("name      a few words")
    assert all(line.startswith(" " * 10) for line in lines[1:])
    assert [line.split() for line in lines if len(line) > 40] == [["'mythos-edge[tensorrt-rtx,a-long-name]'"]]
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    Console(as_json=False).field("name", text, 10)
    assert file.getvalue() == f"name      {text}\n"


# --- imports ------------------------------------------------------------------------------------------------------


def _import_error(behind: BaseException | None, *, explicit: bool) -> ImportError:
    """An ImportError as a library raises it that met ``behind`` while it was made."""
    try:
        try:
            raise behind or ValueError("something else")
        except BaseException as error:
            if explicit:
                raise ImportError("initialization failed") from error
            raise ImportError("numpy is not well")  # noqa: B904
    except ImportError as error:
        return error


@pytest.mark.parametrize("explicit", [True, False])
def test_an_interrupted_import_is_no_missing_library(explicit: bool) -> None:
    error = _import_error(KeyboardInterrupt(), explicit=explicit)
    assert interrupts.caused(error)
    with pytest.raises(KeyboardInterrupt):
        unavailable(error, "exporting", "pip install x")
    with pytest.raises(KeyboardInterrupt):
        raise_interrupt(error)
    other = _import_error(None, explicit=explicit)
    assert not interrupts.caused(other)
    raise_interrupt(other)


def test_a_library_that_is_there_and_broken_is_not_called_missing() -> None:
    missing = unavailable(ModuleNotFoundError("No module", name="onnx"), "exporting", "pip install onnx")
    assert str(missing) == "exporting needs onnx, which is not installed: run `pip install onnx`"
    broken = unavailable(ImportError("libcudart.so.12:\ncannot open"), "exporting", "pip install onnx")
    assert "installed and cannot be imported: libcudart.so.12: cannot open: run `pip" in str(broken)
