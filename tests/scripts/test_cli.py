"""The command line as a program: its help and exit codes, and what it leaves when it is interrupted."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import CHECKPOINT, PROGRAM, Ran, refused

VERBS = ("doctor", "inspect", "export", "build", "inline", "generate", "score", "validate", "tune", "bench", "demo")


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
        ("score", "b", "--ids", "x.npy"),
        ("demo",),
    ],
)
def test_wrong_usage_is_exit_code_2(argv: tuple[str, ...], run: Callable[..., Ran]) -> None:
    ran = run(*argv)
    assert ran.code == 2
    assert ran.out == ""
    assert "usage: mythos-edge" in ran.err


# --- processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_an_interrupt_leaves_nothing_half_written(
    tmp_path: Path, sent: signal.Signals, send: Callable[[int, int], None]
) -> None:
    """Ctrl-C as a terminal sends it, to the whole process group, tracing children too; SIGTERM to the process alone."""
    output = tmp_path / "out.bundle"
    process = subprocess.Popen(
        [*PROGRAM, "export", str(CHECKPOINT), "-o", str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell starts what runs in its background deaf to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    partial = tmp_path / f".{output.name}.partial-{process.pid}"
    for _ in range(600):
        if partial.is_dir() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert partial.is_dir()
    time.sleep(1.0)
    send(process.pid, sent)
    out, err = process.communicate(timeout=60)
    refused(Ran(process.returncode, out, err), "interrupted")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_ctrl_c_while_libraries_are_imported_is_one_line() -> None:
    program = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from mythos_edge.scripts.cli import entry
sys.argv = ["mythos-edge", "doctor"]
entry()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
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
