"""The command line, run in this process, and a GPU's copies made small."""

from collections.abc import Callable

import pytest
from command_line import Ran

from mythos_edge.scripts import cli
from mythos_edge.scripts.lab import gpu_bench


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


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(gpu_bench.copy_bandwidth, "__defaults__", (1 << 16,))
