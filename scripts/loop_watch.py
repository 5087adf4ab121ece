"""A backend whose loop steps somebody watches: which rows ran, what came out, and what the router saw.

Not here: what is made of it (``quality_gate``, ``model_stats``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import unavailable
from mythos_edge.model.linked_weights import weights_apart
from mythos_edge.model.manifest import graph_key
from mythos_edge.model.stages import OWN
from mythos_edge.model.target_options import OrtOptions, options_of
from mythos_edge.runtime.backends.memory import Rows, host_array
from mythos_edge.runtime.backends.packing import Array, Arrays, Call, declared
from mythos_edge.runtime.backends.protocol import Backend

if TYPE_CHECKING:
    from mythos_edge.exporter.probes import Probe, Router


@dataclass(frozen=True)
class StepRun:
    """One run of the loop step: the ``step_index (S,)`` and ``positions (S,)`` of its rows, and its outputs by name.

    ``router_input (S, D)`` is what the router chose experts for; None of a model without experts.
    """

    step_index: NDArray[np.int64]
    positions: NDArray[np.int64]
    outputs: Arrays
    router_input: Array | None


@dataclass(frozen=True)
class RouterProbe:
    """The router of a bundle, and the graph of a target that tells what it sees; it takes cached rows as they are kept,
    or else in float32."""

    router: "Router"
    probe: "Probe"
    takes_kept_rows: bool


def router_probe(bundle: Bundle, target: str, purpose: str, cache: str) -> RouterProbe | None:
    """The router as a target of the bundle runs it with cached rows in ``cache``; None of a model without experts.

    Raises BackendUnavailable, which names the ``purpose``, and BundleError.
    """
    if not bundle.manifest.model.experts_per_token:
        return None
    try:
        from mythos_edge.exporter.probes import Probe, router_of
    except ImportError as error:
        raise unavailable(error, purpose, "pip install 'mythos-edge[export]'") from error
    bundle.require_whole("look at its router")

    spec = bundle.target(target)
    kept_form = None if spec.is_native else cache
    if spec.is_native:
        # An engine shows its states alone; what the router makes of them is asked in float32.
        spec = bundle.target(bundle.manifest.default_target)
    with bundle.unchanged(target):
        apart = weights_apart(bundle, None, target)
        router = router_of(bundle)
        assert router is not None
        step, prepack = spec.graphs[graph_key("step", kept_form)], options_of(spec, OrtOptions).prepacked
        probe = Probe(bundle, step, [router.name], prepack=prepack, apart=apart)
        return RouterProbe(router, probe, takes_kept_rows=kept_form is not None)


class Watched:
    """A backend that tells ``look`` of every run of the loop step, once for each sequence in it."""

    def __init__(self, backend: Backend, look: Callable[[StepRun], None], router: RouterProbe | None) -> None:
        self._backend, self._look, self._router = backend, look, router
        self.memory, self.max_context = backend.memory, backend.max_context

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None:
        if stage != "step":
            self._backend.run(stage, feeds, outputs)
            return
        index = host_array(feeds["step_index"])[0].copy()
        positions = int(host_array(feeds["length"])) + np.arange(len(index))
        # Before the run, which may write over what both read.
        router_input = None if self._router is None else self._seen_by_router(self._router, feeds, positions)
        self._backend.run(stage, feeds, outputs)
        self._look(StepRun(index, positions, outputs, router_input))

    def _seen_by_router(self, router: RouterProbe, feeds: Arrays, positions: Array) -> Array:
        given = {name: self._on_host(name, rows, router.takes_kept_rows) for name, rows in feeds.items()}
        # Portable graphs know positions by length and first, lowered ones by themselves.
        return router.probe.run({**given, "positions": positions[None]})[router.router.name]

    def _on_host(self, name: str, rows: Rows, kept_rows: bool) -> Array:
        """The values of an input of the loop step, states as float32, and so cached rows unless ``kept_rows``."""
        tensor = declared("step", name)
        if tensor.on_host:
            return host_array(rows)
        if tensor.slot and kept_rows:
            return self.memory.to_host(rows)
        return self.memory.to_floats(rows) if tensor.dtype == OWN else self.memory.to_host(rows)

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        for call in calls:
            self.run(stage, *call)

    def close(self) -> None:
        self._backend.close()
