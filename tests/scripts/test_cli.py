"""The command line as a program: its help and exit codes, and what it leaves when it is interrupted."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import CHECKPOINT, PROGRAM, Ran, refused
from conftest import ROOT

from mythos_edge.exporter.kept_graphs import VARIABLE
from mythos_edge.scripts import cli

VERBS = tuple(cli.VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, run: Callable[..., Ran]) -> None:
    ran = run(verb, "--help")
    assert ran.code == 0
    assert f"example: mythos-edge {verb}" in " ".join(ran.out.split())
    assert "--json" in ran.out
    assert "--debug" in ran.out


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("no-such-verb",),
        ("generate",),
        ("generate", "b", "--ids", "1", "-p", "text"),
        ("generate", "b", "--ids", "1", "--policy", "sometimes"),
        ("generate", "b", "--ids", "1", "--max-depth", "two"),
        ("export", "a.pt"),
        ("doctor", "--no-such-option"),
        ("score", "b", "-o", "x.npz"),
        ("demo",),
    ],
)
def test_wrong_usage_is_exit_code_2(argv: tuple[str, ...], run: Callable[..., Ran]) -> None:
    ran = run(*argv)
    assert ran.code == 2
    assert ran.out == ""
    usage, error = ran.err.splitlines()
    assert usage.startswith("usage: mythos-edge")
    assert usage.endswith("--help tells")
    assert error.startswith("error: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("genrate", "b"), "unknown verb 'genrate': did you mean generate?"),
        (("Tune",), "unknown verb 'Tune': did you mean tune?"),
        (("frobnicate",), "unknown verb 'frobnicate': expected one of doctor, inspect, export,"),
        (("",), "unknown verb '': expected one of doctor,"),
        (("generate", "b", "--max-tokens", "5"), ": --max-tokens 5: did you mean --max-new-tokens?"),
        (("generate", "b", "--max_new_tokens=5"), ": --max_new_tokens=5: did you mean --max-new-tokens?"),
        (("generate", "b", "--temp", "5"), ": --temp 5: did you mean --temperature?"),
        (("bench", "b", "--new-token", "5"), ": --new-token 5: did you mean --new-tokens?"),
        (("generate", "b", "other"), "unrecognized arguments: other"),
        (("doctor", "--qqqq"), "unrecognized arguments: --qqqq"),
        (("--versoin", "doctor"), "unrecognized arguments: --versoin: did you mean --version?"),
        (("generate", "b", "--policy", "exat"), "): did you mean exact?"),
    ],
)
def test_a_name_that_is_near_is_asked_for(argv: tuple[str, ...], message: str, run: Callable[..., Ran]) -> None:
    ran = run(*argv)
    usage, error = ran.err.splitlines()
    assert (ran.code, ran.out) == (2, "")
    assert message in error
    assert error.endswith((message, "".join(cli.VERBS)[-4:]))
    # Of the verb where there is one.
    verb = f" {argv[0]}" if argv[0] in cli.VERBS else ""
    assert usage.startswith(f"usage: mythos-edge{verb} ...,")


@pytest.mark.parametrize("verb", VERBS)
def test_an_example_stands_on_a_line_of_a_terminal(verb: str, run: Callable[..., Ran], monkeypatch: Any) -> None:
    """However narrow it is, to be copied; and no option of the help is broken."""
    monkeypatch.setenv("COLUMNS", "80")
    wide = run(verb, "--help").out.splitlines()
    assert max(map(len, wide)) <= 80
    monkeypatch.setenv("COLUMNS", "40")
    narrow = run(verb, "--help").out.splitlines()
    assert narrow[-1] == wide[-1]
    assert wide[-1].startswith(f"  mythos-edge {verb}")
    assert not [line for line in narrow if line.endswith("-")]


def test_a_name_at_the_root_runs_what_is_installed_beside_it(tmp_path: Path) -> None:
    wrapper = shutil.copy(ROOT / "mythos-edge", tmp_path)
    link = tmp_path / "elsewhere"
    link.mkdir()

    def ran() -> Ran:
        done = subprocess.run([wrapper, "a b", "*"], cwd=link, capture_output=True, text=True, check=False)
        return Ran(done.returncode, done.stdout, done.stderr)

    refused(ran(), "has no environment with mythos-edge: run ./scripts/demo")
    for environment in (".venv-demo", ".venv"):
        command = tmp_path / environment / "bin" / "mythos-edge"
        command.parent.mkdir(parents=True)
        command.write_text(f"#!/bin/sh\nprintf '%s,' {environment} \"$@\"\nexit 7\n")
        command.chmod(0o755)
        assert ran() == Ran(7, f"{environment},a b,*,", "")


# --- processes ----------------------------------------------------------------------------------------------------


INSTALLED = Path(sys.executable).with_name("mythos-edge")
_DEADLINE_S = 120.0


@dataclass
class _Exporting:
    """The installed command at work, at a terminal that takes its stderr."""

    process: subprocess.Popen[str]
    terminal: int

    @property
    def pid(self) -> int:
        return self.process.pid

    def ended(self) -> Ran:
        out, _ = self.process.communicate(timeout=_DEADLINE_S)
        return Ran(self.process.returncode, out, self.told())

    def told(self, word: str = "") -> str:
        """Reads the terminal to the end of a line after ``word``, or until every writer has closed it."""
        told = b""
        with suppress(OSError):
            while not word or not (word.encode() in told and told.endswith(b"\n")):
                told += os.read(self.terminal, 1 << 16)
        return told.decode()


@contextmanager
def _exporting(output: Path, before: Callable[[], object] = lambda: None) -> Iterator[_Exporting]:
    """An export whose weights are written, and that traces, as no graphs are kept."""

    def prepare() -> None:
        # A shell starts what runs in its background deaf to it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        before()

    # Of one that moves no cursor, so that every phase is a line.
    terminal, its_side = os.openpty()
    with subprocess.Popen(
        [INSTALLED, "export", str(CHECKPOINT), "-o", str(output)],
        stdout=subprocess.PIPE, stderr=its_side, text=True, start_new_session=True, preexec_fn=prepare,
        env={**os.environ, VARIABLE: "off", "TERM": "dumb"},
    ) as process:  # fmt: skip
        os.close(its_side)
        exporting = _Exporting(process, terminal)
        try:
            assert "graphs" in exporting.told("graphs"), "ended before it traced"
            yield exporting
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            os.close(terminal)


def _group_is_gone(group: int) -> None:
    """Waits for the end of every process of a group."""
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        if not _members(group):
            return
        time.sleep(0.05)
    pytest.fail("children went on")


def _members(group: int) -> list[Path]:
    """The processes of a group that have not ended."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, of, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            if int(of) == group and state != "Z":
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("sent", "send"),
    [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill), (signal.SIGTERM, os.killpg), (signal.SIGHUP, os.kill)],
)
def test_an_interrupt_leaves_nothing_half_written(
    tmp_path: Path, sent: signal.Signals, send: Callable[[int, int], None]
) -> None:
    """As a terminal sends it, to the whole process group, or to the process alone."""
    with _exporting(tmp_path / "out.bundle") as process:
        send(process.pid, sent)
        ran = process.ended()
        _group_is_gone(process.pid)
    refused(ran, "interrupted")
    assert list(tmp_path.iterdir()) == []


def test_asking_twice_does_not_break_off_the_cleaning_up(tmp_path: Path) -> None:
    with _exporting(tmp_path / "out.bundle") as process:
        for sent in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.killpg(process.pid, sent)
            time.sleep(0.01)
        ran = process.ended()
    refused(ran, "interrupted")
    assert list(tmp_path.iterdir()) == []


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As nohup has it; then the interrupt that counts still does."""
    with _exporting(tmp_path / "out.bundle", lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        os.kill(process.pid, signal.SIGHUP)
        status = Path(f"/proc/{process.pid}/status").read_text()
        ignored = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn")), 16)
        assert ignored >> (signal.SIGHUP - 1) & 1
        os.kill(process.pid, signal.SIGTERM)
        ran = process.ended()
    refused(ran, "interrupted")


def test_children_end_with_a_parent_that_is_killed() -> None:
    program = """
import subprocess, time
from mythos_edge.exporter import child_process
child_process.start("http.server", "0", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("started", flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(_members(process.pid)) == 2
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _group_is_gone(process.pid)


@pytest.mark.parametrize(
    ("library", "verb", "argv", "met"),
    [
        ("numpy", "doctor", "", "raise KeyboardInterrupt"),
        ("torch", "inspect", str(CHECKPOINT), "raise KeyboardInterrupt"),
        # As C code does it that asks whether an import went well, and forgets why not.
        ("torch", "inspect", str(CHECKPOINT), "raise ImportError('initialization failed') from KeyboardInterrupt()"),
        ("torch", "inspect", str(CHECKPOINT), "forget()"),
        ("matplotlib", "tune", "b --data d", "forget()"),
    ],
)
def test_ctrl_c_while_libraries_are_imported_is_one_line(library: str, verb: str, argv: str, met: str) -> None:
    program = f"""
import os, signal, sys
def forget():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        while True: pass
    except KeyboardInterrupt:
        pass
    raise ImportError("initialization failed")
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "{library}":
            {met}
sys.meta_path.insert(0, Interrupt())
from mythos_edge.scripts.cli import entry
sys.argv = ["mythos-edge", *{f"{verb} {argv}".split()!r}]
entry()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    refused(Ran(ran.returncode, ran.stdout, ran.stderr), "interrupted")


def test_a_disk_that_fills_up_is_one_line(tmp_path: Path) -> None:
    ran = subprocess.run(
        [*PROGRAM, "export", str(CHECKPOINT), "-o", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )  # fmt: skip
    refused(Ran(ran.returncode, ran.stdout, ran.stderr), "File too large")
    assert list(tmp_path.iterdir()) == []


def test_depth_beyond_training_warns_once(mla_bundle: Path) -> None:
    ran = subprocess.run(
        [*PROGRAM, "generate", str(mla_bundle), "--ids", "1,2", "--max-new-tokens", "3", "--max-depth", "40", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line for line in ran.stderr.splitlines() if "beyond" in line] == [
        "warning: max_depth 40 is beyond the 6 loop steps this model was trained with"
    ]
    assert len(json.loads(ran.stdout)["ids"]) == 3


def test_a_reader_that_goes_away_is_no_traceback(mla_bundle: Path) -> None:
    ran = subprocess.run(
        f"{' '.join(PROGRAM)} inspect {mla_bundle} --json | head -c 5",
        shell=True, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Traceback" not in ran.stderr


# --- streams ------------------------------------------------------------------------------------------------------


def _shell(line: str, **environment: str) -> Ran:
    """A line for a shell, in which ``mythos-edge`` is the installed command."""
    command = ["bash", "-c", line.replace("mythos-edge", str(INSTALLED))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_DEADLINE_S, env={**os.environ, **environment}
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    "verb", ["doctor", "inspect {}", "generate {} --ids 1 --max-new-tokens 2", "--help", "doctor -h"]
)
@pytest.mark.parametrize("json", ["", " --json"])
def test_a_stdout_that_takes_nothing_is_one_line(verb: str, json: str, mla_bundle: Path) -> None:
    command = "mythos-edge " + verb.format(mla_bundle) + json
    refused(_shell(f"{command} > /dev/full"), "stdout: cannot write the result: No space left on device")
    refused(_shell(f"{command} >&-"), "stdout is closed")
    assert _shell(f"{command} > /dev/full 2>&-").code == 1


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2> >(true)"])
def test_a_stderr_that_takes_nothing_is_no_reason_to_end(stderr: str, mla_bundle: Path) -> None:
    ran = _shell(f"mythos-edge generate {mla_bundle} --ids 1 --max-new-tokens 2 --json {stderr}")
    assert ran.code == 0
    assert len(ran.json["ids"]) == 2
    ran = _shell(f"mythos-edge generate {mla_bundle} --ids 9999 --json {stderr}")
    assert ran.code == 1
    assert "token id 9999" in ran.json["error"]
    ran = _shell(f"mythos-edge generate --json {stderr}")
    assert ran.code == 2
    assert "required" in ran.json["error"]


def test_closed_streams_do_not_become_files(mla_bundle: Path, tmp_path: Path) -> None:
    """Words of a library for a closed stream must not land in the file that is opened next."""
    np.save(tmp_path / "ids.npy", np.array([[1, 2]]))
    ran = _shell(f"mythos-edge score {mla_bundle} --ids {tmp_path}/ids.npy -o {tmp_path}/out.npz <&- 2>&-")
    assert ran.code == 0, ran
    with np.load(tmp_path / "out.npz") as scores:
        assert scores["depth"].shape == (1, 2)


def test_scores_may_go_to_stdout(mla_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([[1, 2]]))
    command = f"mythos-edge score {mla_bundle} --ids {tmp_path}/ids.npy -o /dev/stdout"
    for to in (f"> {tmp_path}/file", f">> {tmp_path}/appended", f"| cat > {tmp_path}/piped"):
        ran = _shell(f"{command} {to}")
        assert (ran.code, ran.out) == (0, "")
        assert "1 x 2 positions" in ran.err
        with np.load(to.split()[-1]) as scores:
            assert scores["depth"].shape == (1, 2)
    refused(
        _shell(f"{command} --json 2>&1 >{tmp_path}/json | cat >&2; exit ${{PIPESTATUS[0]}}"), "is where --json writes"
    )


def test_an_encoding_that_lacks_characters(text_bundle: Path) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}
    ran = _shell("mythos-edge inspect gr\u00fcn.pt --json", **ascii_only)
    assert ran.code == 1
    assert ran.json["error"].startswith("gr\u00fcn.pt: no such file")
    assert ran.err == "error: gr\\xfcn.pt: no such file or folder\n"
    shown = _shell("mythos-edge doctor; echo", **ascii_only)
    assert shown.code == 0


def test_bytes_that_are_no_utf_8(text_bundle: Path, tmp_path: Path) -> None:
    refused(_shell(f"mythos-edge inspect {tmp_path}/$'a\\xff'"), "a\\udcff: no such file or folder")
    for option in ("-p", "-p ok --stop", "--ids"):
        refused(_shell(f"mythos-edge generate {text_bundle} {option} $'a\\xff'"), "")
    refused(_shell(f"mythos-edge generate {text_bundle} -p $'a\\xff'"), "--prompt is not UTF-8, from character 2 on")
    odd = tmp_path / os.fsdecode(b"odd \xff\x1b[31m.bundle")
    odd.symlink_to(text_bundle)
    ran = _shell(f"mythos-edge inspect {tmp_path}/odd*; mythos-edge inspect {tmp_path}/odd* --json | tail -c 3")
    assert ran.code == 0, ran
    assert "odd \\udcff\\x1b[31m.bundle" in ran.out
    assert "\x1b" not in ran.out
