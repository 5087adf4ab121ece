"""Gradient descent on the reference network, and the checkpoint that its own trainer would save."""

from collections.abc import Callable, Iterator
from typing import IO, Any

import torch
from torch import Tensor, nn


def descend(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    steps: int,
    rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Iterator[tuple[int, Tensor]]:
    """Takes steps 1 to ``steps`` of AdamW, and gives each with its loss; the rate rises to ``rate`` and falls to 0."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01, betas=betas)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        yield step, loss


def save(model: Any, steps: int, file: IO[bytes]) -> None:
    """Writes a checkpoint in the reference trainer's format."""
    saved = {
        "step": steps,
        "model": model.state_dict(),
        "optimizer": {},
        "cfg": model.cfg,
        "vocab_size": model.cfg.vocab_size,
    }
    torch.save(saved, file)
