"""The command line, run in this process."""

from collections.abc import Callable

import pytest
from command_line import Ran

from mythos_edge.scripts import cli


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def call(*argv: object) -> Ran:
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call
