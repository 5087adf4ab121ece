"""``optimum-cli export mythos``, with the real optimum."""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest
from command_line import Ran, refused
from conftest import FIXTURES
from optimum.commands.register import register_mythos

from mythos_edge.model.bundle import open_bundle
from mythos_edge.scripts import cli, export_verb, interrupts

PROGRAM = str(Path(sys.executable).with_name("optimum-cli"))


def _run(*argv: object) -> Ran:
    done = subprocess.run([PROGRAM, *map(str, argv)], capture_output=True, text=True, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_it_is_listed_and_has_the_options_of_our_own_verb() -> None:
    assert "Export OpenMythos checkpoints" in _run("export", "--help").out
    ours, theirs = argparse.ArgumentParser(), argparse.ArgumentParser()
    export_verb.add_options(ours)
    cli.add_common(ours)
    register_mythos.MythosExportCommand.parse_args(theirs)
    own = {action.dest: action for action in ours._actions}
    found = {action.dest: action for action in theirs._actions}
    assert set(found) == {*own, "checkpoint", "output"}
    for name, action in own.items():
        assert (found[name].option_strings, found[name].default) == (action.option_strings, action.default)


def test_listing_commands_imports_nothing_that_takes_time() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "numpy", "tokenizers")
    script = f"import sys; sys.modules.update(dict.fromkeys({heavy!r}))\n"
    script += "import optimum.commands.register.register_mythos"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_namespace_stays_one() -> None:
    """A file __init__.py would hide the commands of every other package."""
    folder = resources.files("optimum.commands.register")
    assert [file.name for file in folder.iterdir() if file.name != "__pycache__"] == ["register_mythos.py"]


def test_it_makes_the_same_bundle(exported: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, output = FIXTURES / "gqa-small", tmp_path / "made.bundle"
    ran = _run("export", "mythos", "--model", checkpoint, output, "--dtype", "bf16", "--portable", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["bundle"] == str(output)
    expected = exported(checkpoint, dtype="bf16", portable=True)
    ours, theirs = ({file.name: file.read_bytes() for file in path.iterdir()} for path in (expected, output))
    assert ours.pop("manifest.json").splitlines()[:-3] == theirs.pop("manifest.json").splitlines()[:-3]
    assert ours == theirs
    assert open_bundle(output, hashes=True).manifest.identity == open_bundle(expected).manifest.identity


def test_errors_are_one_line(tmp_path: Path) -> None:
    output = tmp_path / "made.bundle"
    refused(_run("export", "mythos", "--model", tmp_path / "none.pt", output), "none.pt: no such file")
    assert not output.exists()
    output.mkdir()
    refused(_run("export", "mythos", "--model", FIXTURES / "gqa-small", output), "exists: choose another folder")
    assert not any(output.iterdir())
    ran = _run("export", "mythos", output)
    assert ran.code == 2
    assert "--model" in ran.err


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_it_ends_with_the_exit_code_of_our_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run", lambda parse, console, debug: parse().code)
    subparsers = argparse.ArgumentParser().add_subparsers()
    command = register_mythos.MythosExportCommand(subparsers, args=argparse.Namespace(json=False, debug=False, code=3))
    with pytest.raises(SystemExit) as ended:
        command.run()
    assert ended.value.code == 3
    monkeypatch.setattr(interrupts, "_last_asked", [])
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
