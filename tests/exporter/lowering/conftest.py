"""Bundles lowered for TensorRT, each made once for all tests of this folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import copy_links
from lowered_models import CHECKPOINTS, CONTEXT, ROWS, Lower

from mythos_edge.exporter.lowering.tensorrt import EngineOptions, LoweredForTensorRT, lower_for_tensorrt
from mythos_edge.model.bundle import open_bundle


@pytest.fixture(scope="session")
def lower(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Lower:
    """``lower(name, dtype, layout, weights)``: each lowering made once."""
    made: dict[Any, LoweredForTensorRT] = {}

    def lowered(name: str, dtype: str, layout: str = "step", weights: str = "none") -> LoweredForTensorRT:
        key = (name, dtype, layout, weights)
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(key))
            options = EngineOptions(dtype, layout, weights, CONTEXT, ROWS)
            made[key] = lower_for_tensorrt(open_bundle(exported(CHECKPOINTS[name])), folder, options)
            copy_links(folder)
        return made[key]

    return lowered
