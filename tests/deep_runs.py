"""Deep comparisons of small models of every family, at one call each."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mythos_edge.exporter.target_weights import TargetWeights
from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.runtime.backends.opening import open_backend
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.scripts.deep_check import Deep, taps_of
from mythos_edge.scripts.deep_pair import Pair
from mythos_edge.scripts.deep_report import DeepReport
from mythos_edge.scripts.deep_run import target_run
from mythos_edge.scripts.other_model import OtherModel, opened_model

MODELS = ("mla-small", "gqa-small", "ouro-small", "nanbeige-small", "dory-small")


def deep(
    path: Path | Bundle,
    checkpoint: Path,
    target: str | None = None,
    changed: Callable[[Backend], Any] = lambda backend: backend,
    positions: int = 12,
    threshold: float | None = None,
) -> DeepReport:
    """The report of a bundle's target, whose backend was ``changed``, on a few random tokens."""
    bundle = path if isinstance(path, Bundle) else open_bundle(path)
    target = target or bundle.manifest.default_target
    ids = np.random.default_rng(1).integers(0, bundle.manifest.model.vocab_size, positions)
    backend = open_backend(bundle, target)
    try:
        with open_checkpoint(checkpoint) as opened:
            return Deep(bundle, target, changed(backend), opened).report(ids, threshold)
    finally:
        backend.close()


def pair(path: Path, against: str, target: str, positions: int = 10) -> DeepReport:
    """The report of a bundle's target against another one."""
    bundle = open_bundle(path)
    ids = np.random.default_rng(1).integers(0, bundle.manifest.model.vocab_size, positions)
    with closing(open_backend(bundle, against)) as beside, closing(open_backend(bundle, target)) as backend:
        given = target_run(bundle, backend, taps_of(bundle, target), ids, bundle.manifest.model.threshold)
        return Pair(bundle, against, beside, target).report(given, TargetWeights(bundle, target))


def beside_file(path: Path, file: Path, target: str | None = None, positions: int = 8) -> DeepReport:
    """The report of a whole model in a file beside a bundle's target."""
    bundle = open_bundle(path)
    target = target or bundle.manifest.default_target
    ids = np.random.default_rng(1).integers(0, bundle.manifest.model.vocab_size, positions)
    with closing(open_backend(bundle, target)) as backend:
        return OtherModel(opened_model(file, bundle), bundle, target, backend).report(ids)
