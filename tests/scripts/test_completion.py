"""``completion``: its script, sourced by a shell that somebody types into."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from command_line import Ran, refused

from mythos_edge.scripts.completion import SHELLS


@pytest.fixture
def shell(tmp_path: Path, run: Callable[..., Ran]) -> Iterator["pexpect.spawn[str]"]:
    """A bash with the script, in a folder with one file, that shows what Tab makes of a line."""
    script = tmp_path / "script"
    script.write_text(run("completion", "bash").out, encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    (folder / "tiny.bundle").mkdir()
    # A terminal that can only write, so that nothing but the line is shown.
    environment = {**os.environ, "TERM": "dumb", "PS1": "READY ", "INPUTRC": "/dev/null", "HISTFILE": ""}
    arguments = ["--norc", "--noprofile", "-i"]
    with pexpect.spawn("bash", arguments, cwd=folder, env=environment, encoding="utf-8", timeout=20) as bash:
        bash.setwinsize(40, 500)
        bash.expect_exact("READY ")
        bash.sendline(f"source {script}; PS1='TYPE '; bind 'set enable-bracketed-paste off'")
        bash.expect_exact("\nTYPE ")
        yield bash


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("mythos-edge tok", "mythos-edge tokenize "),
        ("mythos-edge generate tiny", "mythos-edge generate tiny.bundle"),
        ("mythos-edge generate b --max-n", "mythos-edge generate b --max-new-tokens "),
        ("mythos-edge generate b --policy f", "mythos-edge generate b --policy full "),
        ("mythos-edge score b --text no", "mythos-edge score b --text notes.txt "),
        ("mythos-edge demo a", "mythos-edge demo add "),
        ("mythos-edge completion z", "mythos-edge completion zsh "),
    ],
)
def test_bash_completes(shell: "pexpect.spawn[str]", typed: str, completed: str) -> None:
    shell.send(f"{typed}\t")
    shell.expect_exact(completed)


def test_every_shell_gets_a_script_with_all_verbs(run: Callable[..., Ran]) -> None:
    for shell in SHELLS:
        script = run("completion", shell, "--json").json["script"]
        assert script.rstrip("\n") + "\n" == run("completion", shell).out
        for name in ("mythos-edge", "generate", "tune", "max-new-tokens", "exact"):
            assert name in script


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    refused(run("completion", "bash"), "shell completion needs shtab", "pip install 'mythos-edge[completion]'")
