"""PTX with its kernel's parameters in another order: text in, text out; the code itself is not touched.

A kernel reads its parameters by name, so their order is that of the declarations alone.
"""

import re
from collections.abc import Sequence

from mythos_edge.model.errors import BuildError


def rearranged(ptx: str, entry: str, order: Sequence[int | None]) -> str:
    """``ptx`` whose ``entry`` takes its parameters in ``order``, by their old number; None adds a pointer it ignores.

    Parameters left out must not be read. Raises BuildError for text that is not as Triton writes it.
    """
    found = re.search(rf"\.visible \.entry {re.escape(entry)}\(\n(.*?)\n\)", ptx, re.DOTALL)
    if found is None:
        raise BuildError(f"the PTX has no kernel {entry} as Triton writes it: reinstall mythos-edge")
    declared = found[1].split(",\n")
    body = ptx[found.end() :]
    for number in range(len(declared)):
        if number not in order and re.search(rf"\b{re.escape(entry)}_param_{number}\b", body):
            raise BuildError(f"kernel {entry} reads parameter {number}, which TensorRT cannot give it")
    lines = [
        f"\t.param .u64 {entry}_ignored_{place}" if number is None else declared[number]
        for place, number in enumerate(order)
    ]
    return ptx[: found.start(1)] + ",\n".join(lines) + ptx[found.end(1) :]
