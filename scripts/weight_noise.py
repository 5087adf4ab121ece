"""Runs of a float32 reference that differ as much as rounding its weights otherwise would make them."""

from typing import Any

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
