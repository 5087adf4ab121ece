"""Runs launch programs on the CPU in Triton's interpreter, in a process of its own: the switch must come before the
first import of Triton, and must not stay on for anybody else.

``python interpreter.py`` reads pickled ``(Program, {pointer: array}, {pointer: dtype})`` from its input and answers
with the arrays after the launches. bf16 travels as its upper 16 bits (uint16). The workspace begins as NaN.
"""

import os
import pickle
import subprocess
import sys
from importlib import import_module
from typing import Any

import numpy as np

from mythos_edge.plugins.kernels.variants import VARIANTS
from mythos_edge.plugins.launches import Float, Integer, Launch, Pointer, Program, Workspace

Arrays = dict[str, np.ndarray]
_GUARD_BYTES = 4096


class Interpreter:
    """A running worker; ``run`` is one program."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )

    def run(self, program: Program, arrays: Arrays) -> Arrays:
        """``arrays`` as the launches of ``program`` leave them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((program, arrays), self._process.stdin)
        self._process.stdin.flush()
        answer = pickle.load(self._process.stdout)
        if isinstance(answer, str):
            raise AssertionError(answer)
        result: Arrays = answer
        return result

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def narrowed(array: np.ndarray, dtype: str) -> np.ndarray:
    """``array`` as memory of ``dtype`` holds it."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return array.astype({"fp16": np.float16, "fp32": np.float32}[dtype])


def widened(array: np.ndarray, dtype: str) -> np.ndarray:
    """The float64 values of memory of ``dtype``."""
    if dtype == "bf16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def _serve() -> None:
    while True:
        try:
            program, arrays = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Any = _ran(program, arrays)
        except Exception as error:
            import traceback

            answer = f"{error}\n{traceback.format_exc()}"
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _ran(program: Program, arrays: Arrays) -> Arrays:
    import torch

    # Outside of every array lies NaN, where a kernel that reads or writes too far is seen.
    guarded, tensors = {}, {}
    for name, array in arrays.items():
        guarded[name] = torch.full((array.nbytes + 2 * _GUARD_BYTES,), 0xFF, dtype=torch.uint8)
        flat = torch.from_numpy(array.reshape(-1).copy())
        tensors[name] = guarded[name][_GUARD_BYTES : _GUARD_BYTES + array.nbytes].view(flat.dtype)
        tensors[name].copy_(flat)
    workspace = torch.full((program.workspace_bytes + 256,), 0xFF, dtype=torch.uint8)
    for launch in program.launches:
        _launched(launch, tensors, workspace)
    for name, tensor in guarded.items():
        outside = torch.cat((tensor[:_GUARD_BYTES], tensor[_GUARD_BYTES + arrays[name].nbytes :]))
        assert (outside == 0xFF).all(), f"something was written before or after {name}"
    return {name: tensor.numpy().reshape(arrays[name].shape) for name, tensor in tensors.items()}


def _launched(launch: Launch, tensors: dict[str, Any], workspace: Any) -> None:
    import torch

    kinds = {
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
        "i8": torch.int8,
        "i32": torch.int32,
        "i64": torch.int64,
    }
    variant = VARIANTS[launch.kernel]
    values: list[Any] = []
    for (_, kind), argument in zip(variant.arguments, launch.arguments, strict=True):
        match argument:
            case Pointer(pointer):
                values.append(tensors[pointer].view(kinds[kind[1:]]))
            case Workspace(offset):
                values.append(workspace[offset : workspace.numel() // 8 * 8].view(kinds[kind[1:]]))
            case Integer(value) | Float(value):
                values.append(value)
    module, function = variant.source.split(":")
    kernel = getattr(import_module(f"mythos_edge.plugins.kernels.{module}"), function)
    kernel[launch.grid](*values, **variant.constants)


if __name__ == "__main__":
    _serve()
