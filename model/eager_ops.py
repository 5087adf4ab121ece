"""The operations of ``network.Ops`` in plain torch.

Source: OpenMythos 8c68c1f, ``open_mythos/main.py``.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mythos_edge.model.network import Window
from mythos_edge.model.observed import observed


class EagerOps:
    """The operations in plain torch, for any floating dtype."""

    def latent_attention(
        self,
        q: Float[Tensor, "B S H W"],
        rows: Float[Tensor, "B S W"],
        past: Float[Tensor, "B C W"],
        window: Window,
        value_dim: int,
        scale: float,
    ) -> Float[Tensor, "B S H R"]:
        """Attention of every head over the same rows, which serve as keys and (their head) as values."""
        context = torch.cat([past, rows], dim=1)
        visible = visible_columns(window, past.shape[1], rows.shape[1])
        scores = torch.einsum("bshw,bcw->bshc", q, context) * scale
        scores = scores.masked_fill(~visible[:, :, None], float("-inf"))
        return torch.einsum("bshc,bcr->bshr", scores.softmax(-1), context[..., :value_dim])

    def grouped_query_attention(
        self,
        q: Float[Tensor, "B S H F"],
        rows: Float[Tensor, "B S W"],
        past: Float[Tensor, "B C W"],
        window: Window,
        kv_heads: int,
        scale: float,
        window_size: int = 0,
    ) -> Float[Tensor, "B S H F"]:
        """Attention in which each of ``kv_heads`` cached heads serves a group of query heads.

        A row sees ``window_size`` positions, its own included; all if that is 0.
        """
        context = torch.cat([past, rows], dim=1).unflatten(-1, (2, kv_heads, -1))
        keys, values = context.unbind(2)
        visible = visible_columns(window, past.shape[1], rows.shape[1], window_size)
        grouped = q.unflatten(2, (kv_heads, -1))
        scores = torch.einsum("bsghf,bcgf->bsghc", grouped, keys) * scale
        scores = scores.masked_fill(~visible[:, :, None, None], float("-inf"))
        return torch.einsum("bsghc,bcgf->bsghf", scores.softmax(-1), values).flatten(2, 3)

    def sparse_moe(
        self,
        x: Float[Tensor, "N D"],
        router: Float[Tensor, "E D"],
        router_bias: Float[Tensor, "E"],
        fc1: Float[Tensor, "E F2 D"],
        fc2: Float[Tensor, "E D F"],
        shared: "tuple[Tensor, Tensor] | None",
        top_k: int,
    ) -> Float[Tensor, "N D"]:
        """Weighted sum of the chosen experts, plus the shared experts.

        Source: ``MoEFFN.forward``; chosen on biased logits, weighted by unbiased scores renormalised.
        """
        logits = nn.functional.linear(x, router).to(torch.promote_types(x.dtype, torch.float32))
        chosen, _ = chosen_experts(observed("router", logits + router_bias), top_k)
        weights = logits.gather(-1, chosen).softmax(-1).to(x.dtype)
        y = swiglu(x, *shared) if shared else torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            row, rank = torch.where(chosen == expert)
            gate, up = nn.functional.linear(x[row], fc1[expert]).unflatten(-1, (-1, 2)).unbind(-1)
            hidden = nn.functional.silu(gate) * up
            y = y.index_add(0, row, nn.functional.linear(hidden, fc2[expert]) * weights[row, rank, None])
        return y

    def rotate(
        self,
        x: Float[Tensor, "B S H P"],
        cos: Float[Tensor, "M F"],
        sin: Float[Tensor, "M F"],
        positions: Int[Tensor, "B S"],
    ) -> Float[Tensor, "B S H P"]:
        """Each adjacent pair of ``x`` turned by its position's angle."""
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[positions].unsqueeze(2), sin[positions].unsqueeze(2)
        return torch.stack([cos * real - sin * imaginary, sin * real + cos * imaginary], dim=-1).flatten(-2)


def chosen_experts(biased: Float[Tensor, "N E"], top_k: int) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N"]]:
    """The experts of each row, best first, and by how much the last of them beats the best of the others.

    Source: ``MoEFFN.forward``. Differs: of equally good experts those with the lowest indices, as every kernel here
    does; the reference leaves it to ``torch.topk``, which promises no order.
    """
    best, experts = biased.sort(dim=-1, descending=True, stable=True)
    if top_k == biased.shape[-1]:
        return experts, torch.full_like(best[:, 0], torch.inf)
    return experts[:, :top_k], best[:, top_k - 1] - best[:, top_k]


def visible_columns(
    window: Window, past_columns: int, new_columns: int, window_size: int = 0
) -> Bool[Tensor, "B S CS"]:
    """True where a new row may look; a padding row sees itself, so that no softmax is empty.

    A row sees ``window_size`` positions, its own included; all if that is 0.
    """
    first = window.first[:, None, None]
    columns = torch.arange(past_columns)
    past = (columns >= first) & (columns < window.length)
    steps = torch.arange(new_columns)
    new = (steps[None, :] <= steps[:, None]) & (
        (window.length + steps >= first) | torch.eye(new_columns, dtype=torch.bool)
    )
    visible = torch.cat([past.expand(-1, new_columns, -1), new], dim=-1)
    if not window_size:
        return visible
    behind = (window.length + steps)[:, None] - torch.cat([columns, window.length + steps])
    return visible & (behind < window_size)


def swiglu(x: Float[Tensor, "N D"], gate_up: Float[Tensor, "F2 D"], down: Float[Tensor, "D F"]) -> Float[Tensor, "N D"]:
    """Dense SwiGLU; ``gate_up`` holds all gate rows, then all up rows."""
    gate, up = nn.functional.linear(x, gate_up).chunk(2, dim=-1)
    return nn.functional.linear(gate * torch.sigmoid(gate) * up, down)
