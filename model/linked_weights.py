"""Weights that links put elsewhere than the graph that reads them, as where a target is built in a cache of downloads.

ONNX Runtime follows links, of the graph too, and then takes no weights from outside the graph's folder. So a session is
lent them, from the files that ``Bundle.file`` has found to be those listed. Standard library only.
"""

import mmap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.manifest import WEIGHTS_FILE

Apart = Mapping[str, Path]
NONE_APART: Apart = MappingProxyType({})


def weights_apart(bundle: Bundle, graph: Path | None, target: str | None) -> Apart:
    """The weights that a graph of ``target`` may name and does not find in its own folder: where each is.

    Without a target it is one of the portable graphs. A graph that is made in memory, None, is taken to be in the
    bundle's folder.
    """
    folder = bundle.path.resolve() if graph is None else graph.resolve().parent
    names = [] if target is None else list(bundle.own_weights(target))
    # One that was packed for engines has no weights to share.
    shared = [WEIGHTS_FILE] if WEIGHTS_FILE in bundle.manifest.files else []
    files = {name: bundle.file(name) for name in (*shared, *names)}
    return {name: file for name, file in files.items() if not file.resolve().is_relative_to(folder)}


@contextmanager
def lent_weights(options: Any, apart: Apart) -> Iterator[None]:
    """Within it, a session of ONNX Runtime that is made with ``options`` takes those weights, and copies them.

    They have to be there as long as it is being made; it does not hold them itself. Raises OSError.
    """
    with ExitStack() as stack:
        held = []
        for path in apart.values():
            file = stack.enter_context(path.open("rb"))
            mapped = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            held.append(stack.enter_context(memoryview(mapped)))
        if held:
            options.add_external_initializers_from_files_in_memory(list(apart), held, [len(one) for one in held])
        yield
