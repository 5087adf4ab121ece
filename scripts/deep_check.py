"""``validate --level deep``: finds where a bundle's target first differs from its checkpoint, and says what to try."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mythos_edge.exporter.taps import Taps
from mythos_edge.exporter.target_weights import TargetWeights
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import experts_of, load_network
from mythos_edge.model.linked_weights import weights_apart
from mythos_edge.model.recipes import TensorReader
from mythos_edge.model.stages import STAGES
from mythos_edge.model.target_options import OrtOptions, options_of
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.parity import NOISE_FLOOR
from mythos_edge.scripts.deep_compare import Growth, LocalComparison, LocalFindings, growth_of
from mythos_edge.scripts.deep_reference import Networks, free_run, local_reference
from mythos_edge.scripts.deep_report import Contraction, DeepReport, Divergence
from mythos_edge.scripts.deep_run import DRAFT, TargetRun, target_run
from mythos_edge.scripts.deep_weights import OtherWeights, contraction_of, other_weights

_STORED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Progress = Callable[[str, float], None]


def taps_of(bundle: Bundle, target: str, outputs: bool = False) -> dict[str, Taps]:
    """The taps of the graphs of a target, with ``outputs`` its outputs, too; none of an engine, which shows nothing of
    its inside. Raises BundleError."""
    spec = bundle.target(target)
    if spec.is_native:
        return {}
    experts = experts_of(config_of(bundle.manifest))
    prepack = options_of(spec, OrtOptions).prepacked
    with bundle.unchanged(target):
        return {
            stage: Taps(
                bundle,
                spec.graphs[stage],
                experts.router if experts is not None and stage == "step" else None,
                prepack,
                weights_apart(bundle, None, target),
                outputs,
            )
            for stage in STAGES
        }


@dataclass(frozen=True)
class Deep:
    """A target of ``bundle`` on its ``backend``, to be held against the tensors of ``reader``."""

    bundle: Bundle
    target: str
    backend: Backend
    reader: TensorReader
    seed: int = 0
    progress: Progress = lambda what, share: None

    @cached_property
    def weights(self) -> TargetWeights | None:
        """The weights that the target's graphs read; None of an engine, which does not show them."""
        native = self.bundle.target(self.target).is_native
        return None if native else TargetWeights(self.bundle, self.target)

    def report(self, ids: NDArray[np.int64], threshold: float | None = None) -> DeepReport:
        """The comparison on the tokens ``ids (S,)``."""
        self.progress("running the target", 0.0)
        threshold = self.bundle.manifest.model.threshold if threshold is None else threshold
        target = target_run(self.bundle, self.backend, taps_of(self.bundle, self.target), ids, threshold)
        self.progress("loading the reference", 0.0)
        networks = self._networks(len(ids))
        self.progress("comparing calls", 0.0)
        local = local_reference(networks, target.runs)
        found = LocalComparison(target, local, self.bundle.manifest.model).findings()
        self.progress("running the reference", 0.0)
        growth = self._growth(networks, target)
        self.progress("comparing weights", 0.0)
        others = self._weights()
        contraction = contraction_of(self.weights or TargetWeights(self.bundle, None))
        first = first_of(found, growth, others)
        return report_of(target, found, growth, first, contraction, others)

    def _networks(self, positions: int) -> Networks:
        stored = _STORED[self.bundle.manifest.dtype]
        # The draft that is rolled back reaches a little further than the tokens.
        positions = min(positions + DRAFT, self.bundle.manifest.max_context)
        both = [
            load_network(self.reader, positions, stored=stored, dtype=dtype) for dtype in (torch.float64, torch.float32)
        ]
        if self.weights is not None:
            for network in both:
                for name in sorted(self.weights.rounded):
                    fill(dict(network.named_parameters())[name].data, self.weights, name)
        return Networks(both[0], both[1], self.seed, () if self.weights is None else self.weights.rounded)

    def _growth(self, networks: Networks, target: TargetRun) -> Growth:
        exact = free_run(networks.exact, target.ids, target.threshold)
        noisy = [free_run(network, target.ids, target.threshold) for network in networks.noisy()]
        return growth_of(target, exact, noisy, networks.top_k, NOISE_FLOOR)

    def _weights(self) -> list[OtherWeights]:
        read = self.weights or TargetWeights(self.bundle, None)
        return other_weights(self.reader, read, self.bundle.manifest.max_context, _STORED[self.bundle.manifest.dtype])


def fill(values: torch.Tensor, weights: TargetWeights, name: str) -> None:
    """Gives a parameter the values that a target reads, which its codes stand for."""
    flat, stage = values.view(-1), weights.stages_of(name)[0]
    size = flat.numel() // (len(values) if values.ndim == 3 else 1)
    for start in range(0, flat.numel(), size):
        made, _ = weights.read(stage, name, start, start + size)
        flat[start : start + size] = torch.from_numpy(made)


def first_of(found: LocalFindings, growth: Growth, others: list[OtherWeights]) -> Divergence | None:
    """The first divergence of calls, whose cause may be weights; else weights that no token showed; else growth."""
    first = found.divergence
    if first is not None:
        cause = next((one for one in others if one.part == first.part), None)
        if cause is not None and first.kind != "cache":
            kind = "rotary" if cause.name.startswith("rope") else "weights"
            return replace(first, kind=kind, detail=str(cause))
        return first
    if others:
        one = others[0]
        return Divergence(0, one.step_index, one.part, "weights", one.name, one.largest, 0.0, str(one))
    return growth.divergence


def report_of(
    target: TargetRun,
    found: LocalFindings,
    growth: Growth,
    first: Divergence | None,
    contraction: Contraction | None,
    others: list[OtherWeights],
) -> DeepReport:
    agreed = None if not found.choices else 1 - len(found.disagreements) / found.choices
    return DeepReport(
        ids=target.ids,
        first_divergence=first,
        error=found.error,
        ties=found.ties,
        router_agreement=agreed,
        disagreements=found.disagreements,
        growth=growth.target,
        reference_growth=growth.reference,
        bound=None if contraction is None else carried_on(growth.target, contraction.largest),
        contraction=contraction,
        depth=target.depth,
        reference_depth=growth.depth,
        max_abs=growth.max_abs,
        allowed_max_abs=growth.allowed,
        missing=tuple(found.missing),
        other_weights=tuple(str(one) for one in others),
    )


def carried_on(growth: NDArray[Any], largest: float) -> NDArray[Any]:
    """The first loop step's error as a factor of ``largest`` alone would carry it on."""
    bound: NDArray[Any] = growth[:1] * largest ** np.arange(len(growth))
    return bound
