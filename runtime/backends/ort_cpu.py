"""The stages on ONNX Runtime's CPU provider."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BackendUnavailable
from mythos_edge.model.linked_weights import weights_apart
from mythos_edge.model.stages import half_of
from mythos_edge.model.target_options import OrtOptions, options_of
from mythos_edge.plugins.processor import has_integer_dot_products
from mythos_edge.runtime.backends.memory import HostMemory
from mythos_edge.runtime.backends.ort_session import BoundGraph, ort_session
from mythos_edge.runtime.backends.ort_stages import OrtStages
from mythos_edge.runtime.backends.packing import Arrays, Call


class OrtCpuBackend:
    """One of the bundle's ONNX Runtime CPU targets, with ``threads`` threads, by default one per core.

    ``cache`` is the form of cached rows, one of the target's ``caches``.
    Raises BackendUnavailable without onnxruntime, BundleError when a graph cannot be loaded.
    """

    max_context: int | None = None

    def __init__(self, bundle: Bundle, target: str, threads: int = 0, cache: str = "fp32") -> None:
        options = options_of(bundle.target(target), OrtOptions)
        if options.integer_rows and not has_integer_dot_products():
            raise BackendUnavailable(
                f"target {target!r} multiplies 8-bit integers, which this processor is not known to do "
                "exactly (no VNNI, no Arm dot products)",
                f"mythos-edge build {bundle.path} --weights {options.asked}",
            )

        def open_graph(path: Path, of_several: bool) -> BoundGraph:
            apart = weights_apart(bundle, path, target)
            # Several sequences are several rows, for which mapped weights would be packed anew in every run.
            session = ort_session(path, threads, options.prepacked or of_several, apart)
            # Graphs of earlier versions take whole rows; one of a stage without layers takes none.
            self.memory.halved |= any(half_of(given.name)[1] for given in session.get_inputs())
            return BoundGraph(path, session)

        self.memory = HostMemory(cache)
        self._stages = OrtStages(bundle, target, self.memory, open_graph)

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None:
        self._stages.run(stage, feeds, outputs)

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        self._stages.run_together(stage, calls)

    def graph_seconds(self, stage: str | None = None) -> float:
        """Time spent inside the graphs so far, or those of one stage; the rest of a run's time is the host's."""
        return self._stages.graph_seconds(stage)

    def close(self) -> None:
        """Lets go of the graphs; again is nothing."""
        self._stages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
