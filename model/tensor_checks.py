"""Holding the tensors of a checkpoint against those that its config implies. Reads no weight."""

from collections.abc import Mapping
from pathlib import Path

import torch

from mythos_edge.model.errors import CheckpointError
from mythos_edge.model.json_files import few
from mythos_edge.model.tensor_files import TensorEntry

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(
    entries: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]], path: Path, whose: str
) -> None:
    """Raises CheckpointError unless the tensors are the ``expected`` ones, by name and shape; ``whose`` says of what.

    A tensor is called what its file calls it.
    """
    unknown = [entry.name for name, entry in entries.items() if name not in expected]
    if unknown:
        raise CheckpointError(f"{path}: unknown tensors {few(unknown)}; expected {whose} only")
    missing = [name for name in expected if name not in entries]
    if missing:
        raise CheckpointError(f"{path}: missing tensors {few(missing)}; save the whole state dict")
    for name, shape in expected.items():
        check_tensor(entries[name], shape, path)


def check_tensor(entry: TensorEntry, shape: tuple[int, ...], path: Path) -> None:
    """Raises CheckpointError for another shape, and for a dtype that is none of weights."""
    if entry.shape != shape:
        raise CheckpointError(f"{path}: {entry.name} has shape {entry.shape}, expected {shape} by the config")
    if entry.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise CheckpointError(f"{path}: {entry.name} has dtype {entry.dtype}, expected one of {known}")
