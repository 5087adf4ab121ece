"""The graphs of a target that ONNX Runtime runs, whatever its provider: one a stage, and one for several sequences."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BundleError
from mythos_edge.model.manifest import graph_key
from mythos_edge.model.stages import MAX_TOGETHER, STAGES
from mythos_edge.runtime.backends.memory import Memory, host_array
from mythos_edge.runtime.backends.packing import ROWS, WINDOW, Arrays, Call, packed, unpack


class Graph(Protocol):
    """A graph that is loaded, with arrays bound to it; see ``ort_session.BoundGraph``."""

    @property
    def seconds(self) -> float:
        """Time spent inside it so far."""
        ...

    def run(self, feeds: Arrays, outputs: Arrays) -> None: ...

    def forget(self) -> None:
        """Lets go of every array that is bound."""
        ...

    def close(self) -> None: ...


# Loads the graph in a file; the flag says whether it is one for several sequences.
OpenGraph: TypeAlias = Callable[[Path, bool], Graph]


class OrtStages:
    """The stages of a target on graphs that ``open_graph`` loads, those for the form of cached rows in ``memory``.

    Raises BundleError when one cannot be loaded.
    """

    def __init__(self, bundle: Bundle, target: str, memory: Memory, open_graph: OpenGraph) -> None:
        self._bundle, self._target, self._spec = bundle, target, bundle.target(target)
        self._memory, self._open = memory, open_graph
        self._stages: dict[str, Graph] = {}
        # Loaded when several sequences run together for the first time.
        self._many: dict[str, Graph] = {}
        self._positions = np.zeros((1, 1), np.int64)
        if not set(STAGES) <= set(self._spec.graphs):
            raise BundleError(f"{bundle.path}: target {target!r} has not all stages: export the bundle again")
        try:
            with bundle.unchanged(target):
                for stage in STAGES:
                    self._stages[stage] = open_graph(self._file(stage, many=False), False)
        except BaseException:
            self.close()
            raise

    def _file(self, stage: str, *, many: bool) -> Path:
        return self._bundle.file(self._spec.graphs[graph_key(stage, self._memory.cache, many=many)])

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None:
        """Runs a stage for one sequence; see ``Backend.run``."""
        start, count = int(host_array(feeds["length"])), feeds[ROWS[stage]].shape[1]
        if self._positions.shape[1] != count:
            self._positions = np.empty((1, count), np.int64)
        self._positions[0] = range(start, start + count)
        given = {name: array for name, array in feeds.items() if name not in WINDOW}
        self._stages[stage].run(given | {"positions": self._positions}, outputs)

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        """Runs a stage for several sequences at once; see ``Backend.run_together``."""
        if stage not in self._many:
            with self._bundle.unchanged(self._target):
                self._many[stage] = self._open(self._file(stage, many=True), True)
        whole = packed(stage, calls, MAX_TOGETHER, self._memory)
        self._many[stage].run(*whole)
        # Not one of these arrays comes again, and bound they would stay in memory.
        self._many[stage].forget()
        unpack(stage, whole.outputs, calls)

    def graph_seconds(self, stage: str | None = None) -> float:
        """Time spent inside the graphs so far, or those of one stage."""
        stages = STAGES if stage is None else (stage,)
        graphs = [opened[name] for opened in (self._stages, self._many) for name in stages if name in opened]
        return sum(graph.seconds for graph in graphs)

    def close(self) -> None:
        """Lets go of the graphs; again is nothing."""
        for graph in (*self._stages.values(), *self._many.values()):
            graph.close()
        self._stages, self._many = {}, {}
