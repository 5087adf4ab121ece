"""Every command and every Python example of the README, run in order as written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_commands_and_examples_work_as_written(text_model: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, tokenizer = text_model
    shutil.copy(checkpoint, tmp_path / "checkpoint.pt")
    shutil.copy(tokenizer, tmp_path / "tokenizer.json")
    np.save(tmp_path / "ids.npy", np.arange(32).reshape(2, 16))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = []
    for language, text in BLOCKS:
        commands = [[sys.executable, "-c", text]] if language == "python" else []
        if language == "sh":
            lines = [line for line in text.splitlines() if line.startswith("mythos-edge ")]
            commands = [shlex.split(line, comments=True) for line in lines]
        for command in commands:
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (command, done.stderr)
            assert done.stdout
            ran.append(command[1])
    assert {"export", "validate", "generate", "score", "inspect", "bench", "doctor", "-c"} <= set(ran)
    assert (tmp_path / "scores.npz").is_file()


def test_the_two_scripts_are_there() -> None:
    for name in ("demo", "test"):
        assert any(f"./scripts/{name}" in text for _, text in BLOCKS)
        assert os.access(ROOT / "scripts" / name, os.X_OK)
