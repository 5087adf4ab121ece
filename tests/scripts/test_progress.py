"""Progress of long work, as somebody sees it who sits at a terminal."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pexpect
import pytest
from command_line import CHECKPOINT, PROGRAM

from mythos_edge.exporter.kept_graphs import VARIABLE


def _at_terminal(*argv: object) -> Any:
    """A command line that runs at a terminal of 70 columns."""
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", VARIABLE: "off"}
    environment.pop("COLUMNS", None)  # of whoever runs the tests
    words = [*PROGRAM[1:], *map(str, argv)]
    return pexpect.spawn(sys.executable, words, env=environment, encoding="utf-8", timeout=60, dimensions=(30, 70))


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """Rows whose scoring one position at a time takes seconds."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 300, (8, 250)))
    return tmp_path / "ids.npy"


def test_a_terminal_shows_share_elapsed_and_remaining_time(mla_bundle: Path, ids: Path) -> None:
    with _at_terminal("score", mla_bundle, "--ids", ids, "--prefill", 1) as terminal:
        terminal.expect(r"\r +\d+\.\d s  scoring \d+%, about \d+ s left +")
        first = terminal.after
        terminal.expect(pexpect.EOF)
        shown = first + terminal.before
    assert terminal.wait() == 0
    lines = [part for part in shown.split("\r") if " scoring " in part]
    shares = [int(share) for line in lines for share in re.findall(r"(\d+)%", line)]
    assert shares == sorted(shares)
    assert len(set(shares)) > 3
    # One line that is written over, and then the result below it.
    assert {len(line) for line in lines if "\n" not in line} == {69}
    assert "perplexity" in shown[shown.rindex("scoring") :]


def test_the_phases_of_an_export(tmp_path: Path) -> None:
    with _at_terminal("export", CHECKPOINT, "-o", tmp_path / "out.bundle") as terminal:
        for phase in ("reading the checkpoint", "graphs", "self-test sample", "out.bundle: "):
            terminal.expect(phase)
        terminal.expect(pexpect.EOF)
    assert terminal.wait() == 0


def test_with_json_a_terminal_sees_the_object_alone(mla_bundle: Path, ids: Path) -> None:
    with _at_terminal("score", mla_bundle, "--ids", ids, "--json") as terminal:
        terminal.expect(pexpect.EOF)
        shown = terminal.before
    assert terminal.wait() == 0
    assert json.loads(shown)["tokens"] == 8 * 250
