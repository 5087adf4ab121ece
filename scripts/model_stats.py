"""``score --stats``: what a model does with tokens: how deep each goes, and which experts every loop step chooses.

A position counts in a loop step if it takes that itself. That its cache row is computed once more, for a later position
to look back at, is not counted.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.json_files import few
from mythos_edge.model.output_files import writing
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import html_page, model_page
from mythos_edge.scripts.console import Console, without_nan
from mythos_edge.scripts.loop_watch import StepRun, Watched, router_probe
from mythos_edge.scripts.routing import Routing, StepRouting

STATS, PAGE = "the stats", "the page"


@dataclass(frozen=True)
class _StepValues:
    """One run of a loop step: the halting mass of its last rows, and choices of the router for all of them."""

    step_index: int
    positions: NDArray[np.int64]
    mass: NDArray[np.float32]
    chosen: NDArray[np.int64] | None
    entropy: NDArray[np.float64] | None


class ModelStats:
    """Takes in what ``session`` computes, one sequence at a time: score one, then ``add`` it.

    Raises BundleError and BackendUnavailable where a router cannot be looked at.
    """

    def __init__(self, session: Session) -> None:
        cache, purpose = session.cache, "--stats on a model with experts"
        self._router = router_probe(session.bundle, session.target, purpose, cache)
        self._memory, self._tokenizer = session.backend.memory, session.tokenizer
        session.backend = Watched(session.backend, self._look, self._router)
        self._halts, self._each = session.model.halts, session.model.experts_per_token
        self._texts: dict[int, str] = {}
        self._runs: list[_StepValues] = []
        self._positions: list[dict[str, Any]] = []
        self._taken: Counter[int] = Counter()
        self._mass_left: Counter[int] = Counter()
        self.routing = None if self._router is None else Routing(len(self._router.router.weight), self._each)

    def _look(self, run: StepRun) -> None:
        chosen, entropy, x = None, None, run.router_input
        if self._router is not None and x is not None:
            chosen, entropy = self._router.router.chosen(x), self._router.router.entropy(x)
        mass = self._memory.to_host(run.outputs["halt_mass_next"])[0].copy()
        self._runs.append(_StepValues(int(run.step_index[0]), run.positions, mass, chosen, entropy))

    def add(self, row: int, ids: NDArray[np.int64], seen: int, depth: NDArray[np.int32]) -> None:
        """The sequence ``ids (S,)`` that was scored last, and its ``depth (S,)``; its first ``seen`` positions are
        counted already."""
        mass, chosen, entropy = self._by_step(len(ids))
        counted = np.arange(len(ids)) >= seen
        taken = (np.arange(len(mass))[:, None] < depth) & counted
        left = np.maximum(0.0, 1.0 - mass)  # keeps NaN
        for index, at in enumerate(taken):
            self._taken[index] += int(at.sum())
            self._mass_left[index] += left[index, at].sum()
        if self.routing is not None:
            self.routing.add(chosen, entropy, taken)
        for position in np.flatnonzero(counted).tolist():
            went = int(depth[position])
            self._positions.append(
                {
                    "row": row,
                    "position": position,
                    "id": int(ids[position]),
                    "text": self._text(int(ids[position])),
                    "depth": went,
                    "mass_left": float(left[went - 1, position]) if self._halts else None,
                }
            )

    def _by_step(self, positions: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        """Mass (M, S), chosen experts (M, S, K) and entropy (M, S) of the runs since the last sequence."""
        runs, self._runs = self._runs, []
        steps = 1 + max(run.step_index for run in runs)
        mass, entropy = np.full((2, steps, positions), np.nan)
        chosen = np.full((steps, positions, self._each), -1)
        for run in runs:
            # Only the last rows of a chunk still run; the others are there for these to look at.
            mass[run.step_index, run.positions[len(run.positions) - len(run.mass) :]] = run.mass
            if run.chosen is not None:
                chosen[run.step_index, run.positions] = run.chosen
                entropy[run.step_index, run.positions] = run.entropy
        return mass, chosen, entropy

    def _text(self, token_id: int) -> str | None:
        """The text of a token; None without a tokenizer."""
        if self._tokenizer is not None and token_id not in self._texts:
            self._texts[token_id] = self._tokenizer.text_alone(token_id)
        return self._texts.get(token_id)

    @property
    def texts(self) -> list[str | None]:
        """The text of every position; None without a tokenizer."""
        return [one["text"] for one in self._positions]

    @property
    def mean_mass_left(self) -> float:
        """The part of 1 that halting mass lacks where a position's loop ends, on average; NaN where nothing halts."""
        if not self._halts:
            return float("nan")
        return float(np.mean([one["mass_left"] for one in self._positions]))

    def summary(self) -> dict[str, Any]:
        """The figures without those of every position."""
        routing = [None] * len(self._taken) if self.routing is None else self.routing.steps()
        return {
            "tokens": len(self._positions),
            "mean_depth": sum(one["depth"] for one in self._positions) / len(self._positions),
            "depth_histogram": self._histogram(),
            "mean_mass_left": self.mean_mass_left,
            "loop_steps": [self._step(index, one) for index, one in enumerate(routing)],
            "experts": None if self.routing is None else self.routing.to_dict(),
        }

    def _histogram(self) -> dict[str, int]:
        depths = Counter(one["depth"] for one in self._positions)
        return {str(depth): depths[depth] for depth in sorted(depths)}

    def _step(self, index: int, routing: StepRouting | None) -> dict[str, Any]:
        count = self._taken[index]
        left = self._mass_left[index] / count if count and self._halts else float("nan")
        of_router = {} if routing is None else routing.to_dict()
        return {"step_index": index, "positions": count, "mean_mass_left": left, **of_router}

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Writes all figures to ``path`` as one JSON object, with what they are ``about``. Raises UsageError."""
        values = without_nan({**about, **self.summary(), "positions": self._positions})
        with writing(path, STATS) as file:
            file.write((json.dumps(values, allow_nan=False) + "\n").encode())

    def write_page(self, path: Path, title: str) -> None:
        """Writes the figures to ``path`` as an HTML page that needs no other file. Raises UsageError."""
        about = f"{len(self._positions)} tokens, each counted in the loop steps that it takes itself."
        if self._halts:
            about += f" Where a position's loop ends, {self.mean_mass_left:.3g} of its halting mass is left on average."
        tokens = [(one["text"], one["id"], one["depth"]) for one in self._positions]
        parts = [*model_page.depth_parts(self._histogram()), *model_page.token_parts(tokens)]
        parts += [] if self.routing is None else model_page.routing_parts(self.routing)
        with writing(path, PAGE) as file:
            file.write(html_page.page(title, about, *parts).encode())

    def tell(self, console: Console) -> None:
        """The figures for people, in lines of at most 80 columns."""
        if self._halts:
            console.say(f"mass left   mean {self.mean_mass_left:.3g} of the halting mass where a position's loop ends")
        if self.routing is None:
            return
        console.say(
            f"experts     {self._each} of {self.routing.experts} in each loop step; "
            f"two choices by chance have {self.routing.by_chance:.1%} in common"
        )
        dead = self.routing.dead
        console.say(
            f"dead        never chosen: {few(map(str, dead))}" if dead else "dead        none: every expert was chosen"
        )
        console.say("| loop step | positions | entropy | busiest | dead | as step before | as first |")
        console.say(f"|{'-' * 10}:|{'-' * 10}:|{'-' * 8}:|{'-' * 8}:|{'-' * 5}:|{'-' * 15}:|{'-' * 9}:|")
        for index, step in enumerate(self.routing.steps()):
            busiest, before, first = map(_percent, (step.largest_share, step.as_before, step.as_first))
            console.say(
                f"| {index:9} | {step.positions:9} | {step.entropy:7.3f} | {busiest:>7} | {len(step.dead):4} "
                f"| {before:>14} | {first:>8} |"
            )


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{share:.1%}"
