"""The large matrices of a bundle in float16, in a file of their own, streamed from the bundle's weights.

A bundle that is stored in float16 needs no such file: its graphs already refer to the matrices in float16.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from mythos_edge.exporter.weight_file import StoredTensor, WeightFile, plan_file
from mythos_edge.exporter.weights import copied_pieces, weights_of
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BuildError
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import recipes


def plan_narrow(bundle: Bundle, without: Sequence[str] = ()) -> WeightFile:
    """The layout of the file of all large matrices but those named in ``without``."""
    manifest = bundle.manifest
    return plan_file(
        StoredTensor(recipe.name, ir.DataType.FLOAT16, recipe.shape)
        for recipe in recipes(config_of(manifest), manifest.max_context)
        if recipe.narrow and recipe.name not in without
    )


def write_narrow(
    plan: WeightFile, bundle: Bundle, path: Path, progress: Callable[[float], None] = lambda fraction: None
) -> None:
    """Writes the file, a piece in memory at a time. Raises BuildError for a weight beyond float16, or a full disk."""
    with weights_of(bundle) as reader:
        pieces = copied_pieces(plan, reader, BuildError, {"fp16": "build with --dtype fp32"})
        plan.write(path, pieces, BuildError, progress)
