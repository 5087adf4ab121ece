"""Every command and every Python example of README and guides, run in order as written, in one folder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import FIXTURES, ROOT
from served import Served
from text_oracle import byte_level

# Later pages use the files that earlier ones made.
PAGES = ("README", "guides/export", "guides/run", "guides/chat", "guides/quantise", "guides/parity", "guides/deploy")
PAGES += ("guides/serve", "guides/other-engines", "guides/gpu")
GUIDE_ADDRESS = "http://127.0.0.1:8080"
# What ``tune`` says on a machine whose times cannot be trusted, as one that runs tests is.
BUSY = "measure again when the machine has nothing else to do"


def blocks_of(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page, each with its language."""
    path = ROOT / "README.md" if page == "README" else ROOT / "docs" / f"{page}.md"
    return re.findall(r"```(\w+)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands_of(page: str) -> list[list[str]]:
    """The command lines of ``sh`` blocks and the programs of ``python`` blocks; ``console`` blocks are for reading."""
    commands = []
    for language, text in blocks_of(page):
        if language == "python":
            commands.append([sys.executable, "-c", text])
        elif language == "sh":
            lines = [line for line in text.splitlines() if line.startswith("mythos-edge ")]
            commands += [shlex.split(line, comments=True) for line in lines]
    return commands


@pytest.mark.slow
def test_commands_and_examples_work_as_written(text_model: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, tokenizer = text_model
    shutil.copy(checkpoint, tmp_path / "checkpoint.pt")
    shutil.copy(tokenizer, tmp_path / "tokenizer.json")
    # A small one stands for the released model.
    shutil.copytree(FIXTURES / "ouro-small", tmp_path / "Ouro-1.4B")
    chatml = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    byte_level(list(chatml), chatml).save(str(tmp_path / "Ouro-1.4B" / "tokenizer.json"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = set()
    busy = False
    with ExitStack() as servers:
        address = GUIDE_ADDRESS
        for page, command in [(name, one) for name in PAGES for one in commands_of(name)]:
            ran.add(command[1])
            if busy and "--preset" in command:
                continue
            if command[1] == "serve":
                address = servers.enter_context(Served(tmp_path / command[2], *command[3:])).address
                continue
            done = subprocess.run(
                # The port that a guide names may be taken here.
                [word.replace(GUIDE_ADDRESS, address) for word in command],
                cwd=tmp_path,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            if command[1] == "tune" and BUSY in done.stderr:
                busy = True  # by design it then saves no preset
                continue
            assert done.returncode == 0, (page, command, done.stderr)
    assert {
        "export",
        "validate",
        "diff",
        "generate",
        "score",
        "inspect",
        "build",
        "pack",
        "tune",
        "bench",
        "inline",
        "serve",
        "-c",
    } <= ran
    assert (tmp_path / "scores.npz").is_file()


def test_every_guide_is_run() -> None:
    guides = {f"guides/{path.stem}" for path in (ROOT / "docs" / "guides").glob("*.md")}
    # These show pieces of modules, which tests/ has whole.
    assert guides - set(PAGES) == {"guides/add-a-family", "guides/add-a-target"}


def test_the_two_scripts_are_there() -> None:
    for name in ("demo", "test"):
        assert any(f"./scripts/{name}" in text for _, text in blocks_of("README"))
        assert os.access(ROOT / "scripts" / name, os.X_OK)
