"""Trains the demo model: column addition on the unmodified reference network, in minutes on two cores.

    python -m mythos_edge.scripts.lab.train_demo -o carry_adder.pt

Every loop step is taught the digit as far as the carry is known after that many columns, and the halting head is
taught whether that settles it; so halting depth comes to be the length of the carry chain. Needs the dev extra.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mythos_edge.model.output_files import check_output, writing
from mythos_edge.scripts import addition
from mythos_edge.scripts.lab import training
from mythos_edge.scripts.lab.reference import open_mythos

LOOPS = 8
_BATCH, _TESTED, _LENGTH = 48, 200, 24
_SUPERVISED_DEPTHS = 3
_MIN_ACCURACY = 0.999


def demo_config(main: Any) -> Any:
    """About 160 thousand parameters: MLA, 4 experts, 8 loops."""
    return main.MythosConfig(
        vocab_size=addition.VOCAB_SIZE,
        dim=64,
        n_heads=4,
        n_kv_heads=4,
        max_seq_len=256,
        max_loop_iters=LOOPS,
        prelude_layers=1,
        coda_layers=1,
        attn_type="mla",
        kv_lora_rank=32,
        q_lora_rank=48,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_experts=4,
        n_shared_experts=1,
        n_experts_per_tok=2,
        expert_dim=48,
        act_threshold=0.99,
        rope_theta=100.0,
        lora_rank=4,
    )


def states_by_depth(main: Any, model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``h (loops, B, S, D)`` after every loop step, and the halting logits ``(loops, B, S)``.

    The loop of ``RecurrentBlock.forward``, without the halting.
    """
    recurrent = model.recurrent
    angles = model.freqs_cis_mla[: ids.shape[1]]
    mask = model._causal_mask(ids.shape[1], ids.device)
    e = model.embed(ids)
    for layer in model.prelude:
        e = layer(e, angles, mask)
    h, states, logits = e, [], []
    for index in range(LOOPS):
        x = recurrent.norm(main.loop_index_embedding(h, index, recurrent.loop_dim) + e)
        y = recurrent.block(x, angles, mask)
        h = recurrent.injection(h, e, y + recurrent.lora(y, index))
        states.append(h)
        logits.append(recurrent.act.halt(h).squeeze(-1))
    return torch.stack(states), torch.stack(logits)


def logits_of(model: Any, x: Tensor) -> Tensor:
    """The logits that the coda makes of the state of every position ``(B, S, D)``."""
    mask = model._causal_mask(x.shape[1], x.device)
    for layer in model.coda:
        x = layer(x, model.freqs_cis_mla[: x.shape[1]], mask)
    return model.head(model.norm(x))  # type: ignore[no-any-return]


def _loss(main: Any, model: Any, columns: np.ndarray, random: np.random.Generator) -> Tensor:
    lengths = torch.from_numpy(addition.chain_lengths(columns))
    states, halting = states_by_depth(main, model, torch.from_numpy(columns))
    depths = torch.arange(1, LOOPS + 1)[:, None, None]
    settled = (depths >= lengths).float()
    loss = nn.functional.binary_cross_entropy_with_logits(halting, settled)
    for depth in random.choice(LOOPS, _SUPERVISED_DEPTHS, replace=False) + 1:
        # What halting would hand to the coda: the state at which the digit was settled, or the latest.
        taken = torch.minimum(lengths, torch.tensor(depth)) - 1
        out = states.gather(0, taken[None, :, :, None].expand(1, -1, -1, states.shape[-1]))[0]
        target = torch.from_numpy(addition.digits(columns, int(depth))) + addition.DIGIT_BASE
        loss = loss + nn.functional.cross_entropy(logits_of(model, out).flatten(0, 1), target.flatten())
    return loss


@torch.no_grad()
def evaluate(main: Any, model: Any, seed: int) -> tuple[float, dict[int, float]]:
    """Digit accuracy of the unmodified reference forward, and mean depth by chain length."""
    columns = addition.random_columns(np.random.default_rng(seed), _TESTED, _LENGTH)
    lengths = addition.chain_lengths(columns)
    solvable = lengths <= LOOPS
    predicted = model(torch.from_numpy(columns)).argmax(-1).numpy() - addition.DIGIT_BASE
    _, halting = states_by_depth(main, model, torch.from_numpy(columns))
    mass = halting.sigmoid().cumsum(0)
    reached = mass >= model.cfg.act_threshold
    depth = torch.where(reached.any(0), reached.float().argmax(0) + 1, LOOPS).numpy()
    accuracy = float((predicted == addition.digits(columns))[solvable].mean())
    return accuracy, {n: float(depth[lengths == n].mean()) for n in range(1, LOOPS + 1) if (lengths == n).any()}


def train(steps: int, seed: int) -> Any:
    """A trained reference model."""
    main = open_mythos()
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    model = main.OpenMythos(demo_config(main))
    with torch.no_grad():
        model.embed.weight.mul_(10)
        model.recurrent.act.halt.bias.fill_(-3.0)

    def loss_of(step: int) -> Tensor:
        return _loss(main, model, addition.random_columns(random, _BATCH, _LENGTH), random)

    started = time.monotonic()
    for step, loss in training.descend(model, loss_of, steps, rate=3e-3):
        if step % 50 == 0 or step == steps:
            accuracy, depths = evaluate(main, model, seed + step)
            table = " ".join(f"{n}:{depth:.2f}" for n, depth in depths.items())
            print(
                f"{time.monotonic() - started:6.0f} s  step {step}  loss {loss.item():.3f}  digits {accuracy:.2%}  "
                f"mean depth by chain length {table}",
                flush=True,
            )
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the column addition model of the demo.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint to write (.pt)")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    check_output(args.output, "the checkpoint")  # before the minutes
    model = train(args.steps, args.seed)
    accuracy, _ = evaluate(open_mythos(), model, seed=10**6)
    if accuracy < _MIN_ACCURACY:
        raise SystemExit(f"digits are {accuracy:.2%} right, expected {_MIN_ACCURACY:.1%}: train longer with --steps")
    with writing(args.output, "the checkpoint") as file:
        training.save(model, args.steps, file)
    print(f"{args.output}: {args.output.stat().st_size / 1e3:.0f} kB, digits {accuracy:.2%}")


if __name__ == "__main__":
    main()
