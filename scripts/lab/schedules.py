"""Random schedules of what a session can be asked to do, and whether its caches are then what they would be anew.

A schedule begins, goes on with, rolls back, flushes, saves, restores and leaves sequences, alone and several together,
with every policy, depth, lag, chunk, draft and way of drawing tokens. A check takes the tokens that a session has,
gives them to a session that was just opened, and compares every cached row, the next logits and every depth.

Sums in another order may fall on the other side of a step of a narrow cache. So with one, more may be off, and a
position whose halting that tips is counted and not held against the rest; few may be.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.looped import LoopedModel
from mythos_edge.runtime.decoding import Generation
from mythos_edge.runtime.options import DepthOptions, RequestOptions
from mythos_edge.runtime.parity import SELF_TEST_SHARE
from mythos_edge.runtime.session import Session

# Tokens of an answer, and of a prompt, at most; now and then a prompt is long, so that windows give up rows.
ANSWER = 40
_PROMPT, _LONG_PROMPT, _LONG_SHARE = 48, 360, 0.08
_MOST_TOGETHER = 5
# Of restored sequences, those that go on in another session.
_REOPENED_SHARE = 0.1
# What the row of a cache, or a logit, may differ by: a share of the largest. For narrow caches some steps of theirs,
# of which a difference of one in an early row makes more later.
ALLOWED = {"fp32": SELF_TEST_SHARE, "fp16": 8 / 2048, "int8": 8 / 127}
# Of the positions whose depth is compared, those that a step of a narrow cache may make halt elsewhere.
ALLOWED_TIPPED = 0.01


@dataclass
class Found:
    """The outcome of a schedule so far; ``wrong`` says what was not as it would be anew, and by what actions before."""

    tokens: int = 0
    checks: int = 0
    actions: dict[str, int] = field(default_factory=dict)
    depths: dict[int, int] = field(default_factory=dict)
    compared_depths: int = 0
    tipped: int = 0
    worst_logit: float = 0.0
    worst_row: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Schedule:
    """A session of a bundle that lives long, and what is asked of it; ``opened`` makes another of the same kind.

    Answers have ``answer`` tokens at most: with few there are more actions a token.
    """

    def __init__(
        self, opened: Callable[[], Session], folder: Path, random: np.random.Generator, answer: int = ANSWER
    ) -> None:
        self._opened, self._random, self._answer = opened, random, answer
        self._file, self._other_file = folder / "session.npz", folder / "anew.npz"
        self.session = opened()
        self.found = Found()
        # The options of the present sequence, and the depth of each of its positions that is known; None without one.
        self._depth: dict[str, Any] | None = None
        self._depths: dict[int, int] = {}
        self._trail: list[str] = []

    def close(self) -> None:
        """Closes the session."""
        self.session.close()

    def reopen(self) -> None:
        """Closes the session and opens another, whose ``rest`` or restored sequence must follow."""
        self.session.close()
        self.session = self._opened()

    def rest(self) -> None:
        """Goes on from one short sequence, so that memory is comparable."""
        self._together()
        self.session.generate([1], max_new_tokens=1)
        self._depth = None

    def act(self) -> None:
        """One random action."""
        actions = [self._begin, self._together, self._score]
        if self._depth is not None:
            actions += [self._go_on] * 4 + [self._leave, self._roll_back, self._flush, self._restore] * 2
        action = actions[self._random.integers(len(actions))]
        name = action.__name__.strip("_")
        self.found.actions[name] = self.found.actions.get(name, 0) + 1
        self._trail = [*self._trail[-7:], name]
        action()

    def check(self) -> None:
        """Compares the session, where it has one sequence, with one that is opened for the same tokens."""
        if self._depth is None:
            return
        self.found.checks += 1
        with self._opened() as anew:
            tipped = self.found.tipped
            self._compare_scores(anew, self.session.ids, dict(self._depths))
            if self._random.random() < 0.5:
                self.session.flush()
            if self.found.tipped == tipped:
                self._compare_next(anew)

    # --- actions ------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        depth = self._depth_options()
        long = min(_LONG_PROMPT, self.session.max_context // 2)
        prompt = self._ids(long if self._random.random() < _LONG_SHARE else _PROMPT, least=1)
        made = self.session.generate(prompt, **depth, **self._options(depth))
        self._depth, self._depths = depth, {}
        self._note(made)

    def _go_on(self) -> None:
        assert self._depth is not None
        # An empty prompt goes on from the last token.
        prompt = self._ids(8, least=0)
        if len(self.session.ids) + len(prompt) + self._answer > self.session.max_context:
            self._begin()
            return
        self._note(self.session.generate(prompt, resume=True, **self._depth, **self._options(self._depth)))

    def _leave(self) -> None:
        """Reads a stream half, and goes on without the rest."""
        assert self._depth is not None
        if len(self.session.ids) + self._answer > self.session.max_context:
            return
        stream = self.session.stream([], resume=True, **self._depth, **self._options(self._depth))
        for _, _ in zip(range(self._random.integers(1, 6)), stream, strict=False):
            pass
        self._note(self.session.last_generation)

    def _roll_back(self) -> None:
        least = max(self.session.rollback_floor, 1)
        length = int(self._random.integers(least, len(self.session.ids) + 1))
        self.session.rollback(length)
        self._depths = {at: depth for at, depth in self._depths.items() if at < length}

    def _flush(self) -> None:
        steps = int(self._random.integers(0, 4))
        self.session.flush(iter([False] * steps + [True] * 1000).__next__)

    def _restore(self) -> None:
        """Saves the sequence and takes it up again, in this session or in one that is opened for it."""
        self.session.save(self._file)
        # Seldom, so that what piles up in a session has the time to.
        if self._random.random() < _REOPENED_SHARE:
            self.reopen()
        elif self._random.random() < 0.5:
            self.session.generate(self._ids(4, least=1), max_new_tokens=2)
        self.session.restore(self._file)

    def _together(self) -> None:
        each: list[RequestOptions] = []
        for _ in range(self._random.integers(2, _MOST_TOGETHER + 1)):
            depth = self._depth_options()
            each.append(cast(RequestOptions, depth | self._options(depth, alone=False)))
        prompts = [self._ids(_PROMPT, least=1) for _ in each]
        results = self.session.generate(prompts, each=each)
        self._depth = None
        which = int(self._random.integers(len(each)))
        with self._opened() as anew:
            for result in results:
                self._count(result)
            result, asked, prompt = results[which], each[which], prompts[which]
            depths = {len(prompt) - 1 + at: depth for at, depth in enumerate(result.depths)}
            depth = {name: value for name, value in asked.items() if name in DepthOptions.__annotations__}
            self._compare_scores(anew, [*prompt, *result.ids], depths, depth)

    def _score(self) -> None:
        depth = self._depth_options()
        depth.pop("chunk", None)
        self.session.score([self._ids(_PROMPT, least=8)], **depth)
        self._depth = None

    # --- options ------------------------------------------------------------------------------------------------------

    def _depth_options(self) -> dict[str, Any]:
        random, model = self._random, self.session.model
        max_depth = int(random.integers(1, model.deepest + 1))
        options: dict[str, Any] = {
            "policy": str(random.choice(["exact", "exact", "exact", "full", "last"])),
            "max_depth": max_depth,
            "min_depth": int(random.integers(1, min(max_depth, 2) + 1)),
        }
        if model.halts:
            # Beyond the model's own, so that deep positions are among shallow ones whatever its weights.
            options["threshold"] = float(random.uniform(*random.choice([(0.2, 1.0), (1.0, 3.0)])) * model.threshold)
        return options

    def _options(self, depth: dict[str, Any], alone: bool = True) -> dict[str, Any]:
        random = self._random
        options: dict[str, Any] = {"max_new_tokens": int(random.integers(1, self._answer + 1)), "stop_ids": []}
        if random.random() < 0.5:
            options |= {"temperature": float(random.uniform(0.3, 1.5)), "seed": int(random.integers(1000))}
            options |= {"top_k": int(random.integers(0, 20)), "top_p": float(random.uniform(0.5, 1))}
        if depth["policy"] == "last":
            # Its output depends on the chunks, so that only one at a time is the same whatever came before.
            return options | {"chunk": 1}
        options["chunk"] = int(random.choice([1, 3, 16, 512]))
        if random.random() < 0.4:
            options["max_lag"] = int(random.integers(1, 20))
        if depth["max_depth"] > depth["min_depth"] and random.random() < 0.4:
            tokens: Any = int(random.integers(2, 6))
            shallow: Any = int(random.integers(depth["min_depth"], depth["max_depth"]))
            if alone and random.random() < 0.3:
                shallow = tokens = "auto"
            options |= {"draft_depth": shallow, "draft_tokens": tokens}
        return options

    def _ids(self, most: int, least: int) -> list[int]:
        count = self._random.integers(least, most + 1)
        return [int(token) for token in self._random.integers(0, self.session.model.vocab_size, count)]

    # --- what came of it ----------------------------------------------------------------------------------------------

    def _note(self, made: Generation) -> None:
        self._count(made)
        first = len(self.session.ids) - len(made.ids) - 1
        self._depths |= {first + at: depth for at, depth in enumerate(made.depths)}

    def _count(self, made: Generation) -> None:
        self.found.tokens += len(made.ids)
        for depth in made.depths:
            self.found.depths[depth] = self.found.depths.get(depth, 0) + 1

    def _compare_scores(
        self, anew: Session, ids: list[int], depths: dict[int, int], depth: dict[str, Any] | None = None
    ) -> None:
        """The depth of positions, as they were told, against those of the same tokens scored at once."""
        options = depth or self._depth
        assert options is not None
        score = anew.score([ids], prefill=0 if options["policy"] == "last" else None, **options)
        for at, told in depths.items():
            self._compare_depth(at, told, int(score.depth[0, at]), options)

    def _compare_depth(self, at: int, told: int, anew: int, options: dict[str, Any]) -> None:
        self.found.compared_depths += 1
        if told != anew and self.session.cache != "fp32":
            self.found.tipped += 1
        elif told != anew:
            self._wrong(f"position {at} took {told} loop steps, anew {anew}, with {options}")

    def _compare_next(self, anew: Session) -> None:
        """One more token, whose logits hang on every cached row, and then the rows themselves."""
        assert self._depth is not None
        ids, vocab = self.session.ids, self.session.model.vocab_size
        if len(ids) + 2 > self.session.max_context:
            return
        chunk = 1 if self._depth["policy"] == "last" else 512
        more: dict[str, Any] = {"max_new_tokens": 1, "top_logprobs": vocab, "chunk": chunk, "stop_ids": []}
        mine = self.session.generate([], resume=True, **self._depth, **more)
        theirs = anew.generate(ids, **self._depth, **more)
        self._note(mine)
        tipped = self.found.tipped
        self._compare_depth(len(ids) - 1, mine.depths[0], theirs.depths[0], self._depth)
        if self.found.tipped > tipped:
            return
        far, allowed = _apart(_logits(mine), _logits(theirs)), ALLOWED[self.session.cache]
        self.found.worst_logit = max(self.found.worst_logit, far)
        if far > allowed:
            self._wrong(f"the next token's logits are {far:.2g} off, with {self._depth}")
        for session, file in ((self.session, self._file), (anew, self._other_file)):
            if self._depth["policy"] != "last":
                session.flush()
            session.save(file)
        far, where = _farthest_rows(self._file, self._other_file, self.session.model)
        self.found.worst_row = max(self.found.worst_row, far)
        if far > allowed:
            self._wrong(f"the cache {where} is {far:.2g} off, with {self._depth}")

    def _wrong(self, what: str) -> None:
        self.found.wrong.append(f"{what}, after {', '.join(self._trail)}")


def _logits(made: Generation) -> NDArray[np.float64]:
    (likely,) = made.top_logprobs
    found = np.array([one.logprob for one in sorted(likely, key=lambda one: one.id)])
    found -= found.mean()  # what is left are the logits, but for what is the same for all
    return found


def _apart(mine: NDArray[Any], theirs: NDArray[Any]) -> float:
    """How far two arrays are apart, as a share of the largest value."""
    if not theirs.size:
        return 0.0
    return float(np.abs(mine.astype(np.float64) - theirs).max() / max(float(np.abs(theirs).max()), 1e-30))


def _values(rows: NDArray[Any], model: LoopedModel) -> NDArray[Any]:
    """The values of saved rows (1, columns, ...): those in int8 are codes, then a mantissa and an exponent a part."""
    if rows.dtype != np.int8:
        return rows.reshape(*rows.shape[:2], math.prod(rows.shape[2:]))
    # Keys and values have their scales with them, where they are apart.
    halves = math.prod(rows.shape[2:-1])
    parts = model.parts[: len(model.parts) // halves]
    codes, mantissas, exponents = np.split(rows.astype(np.int64), np.cumsum([sum(parts), len(parts)]), axis=-1)
    scales = np.repeat(np.ldexp(mantissas.astype(np.float64), exponents), parts, axis=-1)
    values: NDArray[np.float64] = codes * scales
    return values.reshape(*rows.shape[:2], sum(parts) * halves)


def _farthest_rows(mine: Path, theirs: Path, model: LoopedModel) -> tuple[float, str]:
    """The largest difference of the rows that two saved sessions have both, and the buffer it is in."""
    worst = 0.0, ""
    with np.load(mine) as left, np.load(theirs) as right:
        for name in (name for name in right.files if name.endswith(".data")):
            columns = name.replace(".data", ".columns")
            (start, end), (first, last) = left[columns], right[columns]
            if end != last:
                return float("inf"), f"{name} of {end} columns in place of {last}"
            begin = max(start, first)
            rows = left[name][:, begin - start :], right[name][:, begin - first :]
            worst = max(worst, (_apart(*(_values(each, model) for each in rows)), name))
    return worst
