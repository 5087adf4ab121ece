"""Runs of a float32 reference that differ as much as rounding its weights otherwise would make them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mythos_edge.model.network import LoopedNetwork, Scored

# One float32 run may be near float64 by luck; runs with every weight moved by a rounding error show what is usual.
FLOAT32_RUNS = 4
# Rounding moves a weight by 0.29 units in the last place (root mean square), as moving one in twelve by a whole unit
# does. Each run moves some more, the last is where it should be.
_MOVED = 1 / 12 / (FLOAT32_RUNS - 1)


def jitter(network: Any, seed: int) -> None:
    """Moves a few weights to the next float32 up or down, in pieces so that memory does not double."""
    import torch

    random = torch.Generator().manual_seed(seed)
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    for parameter in network.parameters():
        for piece in parameter.data.split(max(1, -(-len(parameter) // 64))):
            # No rounding moves a zero, and those of a fresh router are exact ties that must stay ones.
            choice = torch.where(piece == 0, 0.5, torch.rand(piece.shape, generator=random))
            piece.copy_(torch.where(choice < _MOVED / 2, torch.nextafter(piece, up), piece))
            piece.copy_(torch.where(choice > 1 - _MOVED / 2, torch.nextafter(piece, down), piece))


def references_of(
    network: "LoopedNetwork",
    ids: NDArray[np.int64],
    thresholds: Sequence[float],
    seed: int,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> tuple[dict[float, "Scored"], float]:
    """Runs a network in float64 at each threshold, and then in float32: the largest error of its logits.

    The network is float32 afterwards, and its weights are no longer what they were.
    """
    import torch

    with torch.no_grad():
        progress("reference in float64", 0.0)
        given = torch.from_numpy(ids)
        references = {threshold: network(given, threshold=threshold) for threshold in thresholds}
        exact = references[thresholds[0]]
        network.float()
        errors = []
        for index in range(FLOAT32_RUNS):
            progress("reference in float32", index / FLOAT32_RUNS)
            errors.append(_own_error(exact, network(given)))
            jitter(network, seed + index)
    return references, max(errors)


def _own_error(exact: "Scored", run: "Scored") -> float:
    """The largest difference of a run's logits, up to where its router first chose other experts."""
    other = (exact.experts.sort().values != run.experts.sort().values).flatten(2).any(-1)
    same = other.cumsum(1) == 0
    errors = (run.logits - exact.logits).abs().amax(-1)[same]
    return float(errors.max()) if len(errors) else 0.0
