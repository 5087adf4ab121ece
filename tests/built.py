"""Targets built for tests, in one call each."""

from pathlib import Path
from typing import Any

from mythos_edge.exporter.targets.build import Built, build
from mythos_edge.exporter.targets.ort_cpu import OrtCpuTarget
from mythos_edge.exporter.targets.ort_cuda import OrtCudaTarget
from mythos_edge.exporter.targets.table import target_from
from mythos_edge.model.bundle import Bundle


def build_cpu(bundle: Path | Bundle, weights: str, **options: Any) -> Bundle:
    """The bundle with a target for the CPU added."""
    return build(bundle, OrtCpuTarget(weights, **options)).bundle


def build_cuda(bundle: Path | Bundle, **options: Any) -> Bundle:
    """The bundle with a target for the CUDA provider added."""
    return build(bundle, OrtCudaTarget(**options)).bundle


def build_engines(bundle: Path | Bundle, wish: str, **options: Any) -> Built:
    """The bundle with TensorRT engines added."""
    return build(bundle, target_from(wish, options))
