"""Things this package gets from others: versions that are pinned for CI, and nothing over a network at run time."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from mythos_edge.runtime.backends.ort_session import import_onnxruntime

ROOT = Path(__file__).parent.parent
# Runs verbs of the command line in a process in which the kernel lets nobody, native code neither, open a socket of
# the internet: that kills the process. Python's own are told by name before.
GUARD = """
import ctypes, os, struct, sys

def hear(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.gethostby", "urllib.", "http.")):
        os.write(2, f"network: {event} {arguments}\\n".encode())
        os._exit(99)

def confine():
    call = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}[os.uname().machine]
    # Loads the architecture, the number of the call and the domain in turn; AF_INET and AF_INET6 are killed.
    steps = [(0x20, 0, 0, 4), (0x15, 0, 6, call[0]), (0x20, 0, 0, 0), (0x15, 0, 4, call[1]), (0x20, 0, 0, 16),
             (0x15, 1, 0, 2), (0x15, 0, 1, 10), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
    program = Program(len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, ctypes.get_errno()

confine()
sys.addaudithook(hear)
"""
VERBS = """
import json
from mythos_edge.scripts import cli
for argv in json.loads({!r}):
    code = cli.main(argv)
    print(f"{{argv[0]}}: {{code}}", file=sys.stderr, flush=True)
    if code:
        sys.exit(code)
"""


def _ran(program: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", GUARD + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=folder)


def test_the_guard_of_the_next_test_sees_both_ways(tmp_path: Path) -> None:
    # As native code would, without Python's knowing.
    assert _ran("ctypes.CDLL(None).socket(2, 1, 0)", tmp_path).returncode == -signal.SIGSYS
    assert _ran("import socket; socket.getaddrinfo('localhost', 80)", tmp_path).returncode == 99
    assert _ran("sys.exit(ctypes.CDLL(None).socket(1, 1, 0) < 0)", tmp_path).returncode == 0


def test_no_verb_opens_a_socket(text_model: tuple[Path, Path], tmp_path: Path) -> None:
    """Of export, build, and everything that reads a bundle; telemetry of a dependency would be seen, too."""
    checkpoint, tokenizer = text_model
    np.save(tmp_path / "ids.npy", np.arange(12).reshape(2, 6))
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    bundle = "text.bundle"
    verbs = [
        ["export", str(checkpoint), "-o", bundle, "--tokenizer", str(tokenizer), "--force"],
        ["build", bundle, "--weights", "int8"],
        ["inspect", bundle],
        ["validate", bundle],
        ["validate", bundle, "--against", str(checkpoint)],
        ["generate", bundle, "-p", "Return the ", "--max-new-tokens", "4", "--save-session", "saved.npz"],
        ["generate", bundle, "--target", "ort-cpu-int8", "-p", "x", "--max-new-tokens", "2"],
        ["score", bundle, "--ids", "ids.npy", "-o", "scores.npz"],
        ["tokenize", bundle, "-p", "Return"],
        ["pack", bundle, "-o", "packed.bundle", "--target", "ort-cpu-int8"],
        ["doctor"],
    ]
    ran = _ran(VERBS.format(json.dumps(verbs)), tmp_path)
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-2000:])
    assert ran.stderr.count(": 0\n") == len(verbs)


def test_the_model_of_transformers_opens_no_socket(text_bundle: Path, tmp_path: Path) -> None:
    """Nor does what it imports: Hugging Face's client could count its uses."""
    program = (
        "import torch\n"
        "from mythos_edge.runtime.integrations.transformers import MythosForCausalLM\n"
        f"model = MythosForCausalLM.from_pretrained({str(text_bundle)!r})\n"
        "print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2).shape)\n"
    )
    ran = _ran(program, tmp_path)
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-2000:])


def test_onnx_runtime_is_told_to_send_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its builds for Windows have telemetry."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    import_onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def _pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(mark for _, mark, _ in pins), "every line is name==version"
    return {_name(name): version for name, _, version in pins}


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_that_ci_installs_is_pinned() -> None:
    pinned = _pinned()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for name in extras if name != "tensorrt" for one in extras[name])]
    names = {_name(re.split(r"[\[<>=!~ ]", one)[0]) for one in wanted} - {"mythos-edge"}
    assert names - set(pinned) == set()
    # What is installed here, and what it needs in turn, is what is written there.
    installed = {_name(one.metadata["Name"]): one.version.partition("+")[0] for one in metadata.distributions()}
    own = {"mythos-edge", "open-mythos", "pip", "setuptools", "wheel"}
    assert {name: version for name, version in installed.items() if name not in own} == {
        name: version for name, version in pinned.items() if name in installed
    }


def test_everything_that_is_installed_is_installed_with_the_pins() -> None:
    """Of the scripts that people and CI run; what a message tells people to install is theirs."""
    scripts = [ROOT / ".ci" / "run", *(path for path in (ROOT / "scripts").iterdir() if path.is_file())]
    installs = [
        line.strip()
        for path in scripts
        if path.suffix != ".py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if "pip install" in line and "-m pip" in line
    ]
    assert len(installs) >= 3
    assert [line for line in installs if "-c constraints.txt" not in line and "--no-deps" not in line] == []
