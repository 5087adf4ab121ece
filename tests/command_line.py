"""What a test of the command line sees of one, and how a refusal must look."""

import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import FIXTURES

CHECKPOINT = FIXTURES / "mla-small"
PROGRAM = [sys.executable, "-m", "mythos_edge.scripts.cli"]


@dataclass
class Ran:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object that must be all of stdout."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def refused(ran: Ran, *words: str) -> None:
    """Exit code 1, nothing on stdout, and one line on stderr that holds ``words``."""
    assert ran.code == 1, ran
    assert ran.out == ""
    lines = [line for line in ran.err.splitlines() if not line.lstrip()[:1].isdigit()]  # progress begins with a time
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    assert "internal error" not in lines[0]
    for word in words:
        assert word in lines[0]
