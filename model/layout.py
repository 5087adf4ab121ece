"""How a bundle's weights are made from a checkpoint's tensors: one recipe per parameter of a network.

A recipe yields its tensor piece by piece, in storage order, so that no tensor is ever whole in memory.
The exporter streams the pieces to disk; ``load_network`` fills an eager network with them.
"""

import torch

from mythos_edge.model.families.family import Config
from mythos_edge.model.families.table import family_named
from mythos_edge.model.network import LoopedNetwork, Ops, in_dtype
from mythos_edge.model.recipes import Experts, Recipe, TensorReader


def recipes(config: Config, max_context: int) -> list[Recipe]:
    """Every stored tensor of a model, in no particular order."""
    found: list[Recipe] = family_named(config.family).recipes(config, max_context)
    return found


def experts_of(config: Config) -> Experts | None:
    """The names of the tensors of the routed experts; None of a model without any."""
    roles = {recipe.role: recipe.name for recipe in recipes(config, 1) if recipe.role}
    return Experts(**roles) if roles else None


def network_of(config: Config, max_context: int, ops: Ops | None = None) -> LoopedNetwork:
    """The network of a model with ``max_context`` positions, its parameters uninitialised; ``ops`` traces it."""
    network: LoopedNetwork = family_named(config.family).network(config, max_context, ops)
    return network


def load_network(
    reader: TensorReader,
    max_context: int | None = None,
    *,
    stored: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> LoopedNetwork:
    """An eager network of ``dtype`` with the checkpoint's weights as a bundle of dtype ``stored`` has them.

    Memory: the whole model.
    """
    config = reader.config
    positions = max_context or config.max_seq_len
    network = in_dtype(network_of(config, positions), dtype).requires_grad_(False).eval()
    parameters = dict(network.named_parameters())
    for recipe in recipes(config, positions):
        flat, filled = parameters.pop(recipe.name).data.view(-1), 0
        for piece in recipe.pieces(reader):
            kept = piece.to(stored if recipe.narrow else torch.float32)
            flat[filled : filled + piece.numel()] = kept.reshape(-1)
            filled += piece.numel()
        assert filled == flat.numel(), recipe.name
    assert not parameters, sorted(parameters)
    return network
