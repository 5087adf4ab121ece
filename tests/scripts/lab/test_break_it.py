"""``break_it`` at a few seeded points of each fault; and that it sees what it is there to see."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mythos_edge.exporter.kept_graphs import VARIABLE


def _break(*argv: object, program: str = "") -> tuple[int, str]:
    """The exit code and output of ``break_it`` in a process of its own, which forks, after ``program``."""
    begin = f"import sys\nfrom mythos_edge.scripts.lab import break_it\n{program}\nsys.exit(break_it.main())"
    ran = subprocess.run(
        [sys.executable, "-c", begin, *map(str, argv)],
        capture_output=True, text=True, check=False, timeout=300, env=os.environ,
    )  # fmt: skip
    assert not ran.stderr, ran.stderr
    return ran.returncode, ran.stdout


def test_the_old_or_the_new_is_left_whatever_breaks(demo_bundle: Path) -> None:
    assert (Path(os.environ[VARIABLE])).is_dir()  # with the graphs of the demo
    del demo_bundle
    jobs, faults = ("export", "build", "pack", "save"), ("kill", "limit", "error", "read")
    code, output = _break("--points", 1, "--jobs", ",".join(jobs), "--seed", 3, "--faults", ",".join(faults))
    assert code == 0, output
    rows = json.loads(output.splitlines()[-1])["rows"]
    assert [(row["job"], row["fault"]) for row in rows] == [(job, fault) for job in jobs for fault in faults]
    assert sum(row["said"] for row in rows) > 0
    assert {row["old"] + row["new"] for row in rows} == {1}


def test_a_writer_that_writes_in_place_is_seen(demo_bundle: Path) -> None:
    del demo_bundle
    program = """
from contextlib import contextmanager
from mythos_edge.runtime import saved_state
@contextmanager
def in_place(path, what):
    with path.open("wb") as file:
        yield file
saved_state.writing = in_place
"""
    code, output = _break("--points", 12, "--jobs", "save", "--faults", "limit", "--seed", 1, program=program)
    assert code == 1
    assert "left neither the old nor the new" in output
