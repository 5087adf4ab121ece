"""The large matrices of a bundle in float16, in a file of their own, streamed from the bundle's weights.

A bundle that is stored in float16 needs no such file: its graphs already refer to the matrices in float16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from mythos_edge.exporter.weights import ALIGNMENT, laid_out
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.checkpoint import Checkpoint
from mythos_edge.model.errors import BuildError
from mythos_edge.model.layout import PIECE_BYTES, Recipe, recipes
from mythos_edge.model.manifest import WEIGHTS_FILE
from mythos_edge.model.tensor_files import read_tensor_file

_BYTES = 2


@dataclass(frozen=True)
class NarrowFile:
    """A file of float16 matrices before a byte of it is written; ``offsets`` are from its start."""

    header: bytes
    recipes: tuple[Recipe, ...]
    offsets: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return len(self.header) + sum(_count(recipe) * _BYTES for recipe in self.recipes)

    def tensors(self, name: str, folder: Path) -> dict[str, ir.TensorProtocol]:
        """The matrices, in the file ``name`` of ``folder``."""
        return {
            recipe.name: ir.ExternalTensor(
                name,
                self.offsets[recipe.name],
                _count(recipe) * _BYTES,
                ir.DataType.FLOAT16,
                shape=ir.Shape(recipe.shape),
                name="",
                base_dir=str(folder),
            )
            for recipe in self.recipes
        }


def plan_narrow(bundle: Bundle, without: Sequence[str] = ()) -> NarrowFile:
    """The layout of the file of all large matrices but those named in ``without``; aligned ones stand first."""
    manifest = bundle.manifest
    wanted = [
        recipe
        for recipe in recipes(manifest.config, manifest.max_context)
        if recipe.narrow and recipe.name not in without
    ]
    wanted.sort(key=lambda recipe: _count(recipe) * _BYTES % ALIGNMENT != 0)
    header, offsets = laid_out([(recipe.name, "F16", recipe.shape, _count(recipe) * _BYTES) for recipe in wanted])
    return NarrowFile(header, tuple(wanted), offsets)


def write_narrow(
    plan: NarrowFile, bundle: Bundle, path: Path, progress: Callable[[float], None] = lambda fraction: None
) -> None:
    """Writes the file, a piece in memory at a time. Raises BuildError for a weight beyond float16, or a full disk."""
    stored = read_tensor_file(bundle.file(WEIGHTS_FILE))
    done = 0
    try:
        with (
            Checkpoint(bundle.path, stored.kind, bundle.manifest.config, stored.entries) as reader,
            path.open("wb") as file,
        ):
            file.write(plan.header)
            for recipe in plan.recipes:
                rows = recipe.shape[0]
                height = max(1, PIECE_BYTES * rows // (4 * _count(recipe)))
                for start in range(0, rows, height):
                    piece = reader.read(recipe.name, start, min(rows, start + height))
                    data = _narrowed(piece, recipe.name)
                    file.write(data)
                    done += len(data)
                    progress(done / plan.total_bytes)
    except OSError as error:
        raise BuildError(f"{path.parent}: cannot write the float16 weights: {error.strerror or error}") from error


def _narrowed(piece: torch.Tensor, name: str) -> bytes:
    narrow = piece.to(torch.float16)
    if not torch.isfinite(narrow).all():
        raise BuildError(
            f"{name}: a weight of {piece.abs().max().item():g} does not fit fp16 (largest 65504): "
            "build with --dtype fp32"
        )
    data: bytes = narrow.contiguous().numpy().tobytes()
    return data


def _count(recipe: Recipe) -> int:
    count = 1
    for size in recipe.shape:
        count *= size
    return count
