"""From logits to a token: penalty, temperature, top-k, top-p, min-p, in this order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import MythosEdgeError, UsageError

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the defaults are greedy. Raises UsageError for values out of range.

    ``temperature`` 0 is greedy; ``top_k`` 0 keeps all; ``top_p`` keeps the smallest set of likeliest tokens with
    that much probability; ``min_p`` drops tokens less likely than that share of the likeliest;
    ``repetition_penalty`` divides positive logits of tokens seen before and multiplies negative ones.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        # Written so that NaN fails.
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < math.inf, "more than 0")
        _check("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more")


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise UsageError(f"{name} is {value}, expected {expected}")


class Guess(NamedTuple):
    """A drafted token and the distribution it was drawn from; None when greedy."""

    token: int
    distribution: Float64 | None


class Sampler:
    """Chooses tokens by ``params`` with a random state of its own."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = np.random.Generator(np.random.PCG64(params.seed))

    def sample(self, logits: NDArray[np.float32], history: Sequence[int]) -> tuple[int, float]:
        """A token id and its natural-log probability under the unfiltered ``logits (V,)``.

        ``history`` holds the ids so far. Raises MythosEdgeError when a logit is not finite.
        """
        token = self.draft(logits, history).token
        return token, _logprob(logits, token)

    def draft(self, logits: NDArray[np.float32], history: Sequence[int]) -> Guess:
        """A token for ``verify`` to judge; parameters and errors as in ``sample``."""
        _check_finite(logits)
        if self.params.temperature == 0:
            return Guess(int(self._penalised(logits, history).argmax()), None)
        distribution = self.distribution(logits, history)
        return Guess(self._drawn(distribution), distribution)

    def verify(self, guess: Guess, logits: NDArray[np.float32], history: Sequence[int]) -> tuple[int, float]:
        """The guessed token or another in its place, so that it is as if ``sample`` had drawn it from ``logits``."""
        if guess.distribution is None:
            return self.sample(logits, history)
        _check_finite(logits)
        target, token = self.distribution(logits, history), guess.token
        if self._random.random() * guess.distribution[token] >= target[token]:
            missing = np.maximum(target - guess.distribution, 0)
            # Two equal distributions may differ by a rounding error, and then nothing may be missing.
            token = self._drawn(missing) if missing.any() else token
        return token, _logprob(logits, token)

    def distribution(self, logits: NDArray[np.float32], history: Sequence[int]) -> Float64:
        """The probabilities (V,) that are sampled from; a point mass when greedy."""
        scores = self._penalised(logits, history).astype(np.float64)
        if self.params.temperature == 0:
            greedy = np.zeros(len(scores))
            greedy[scores.argmax()] = 1.0
            return greedy
        with np.errstate(over="ignore"):  # -inf is right for a temperature near 0
            scores = (scores - scores.max()) / self.params.temperature
        if 0 < self.params.top_k < len(scores):
            kept = np.argpartition(-scores, self.params.top_k - 1)[: self.params.top_k]
            scores = _only(scores, kept)
        probabilities: Float64 = np.exp(scores)
        probabilities /= probabilities.sum()
        if self.params.top_p < 1:
            probabilities = self._nucleus(probabilities)
        if self.params.min_p > 0:
            probabilities[probabilities < self.params.min_p * probabilities.max()] = 0.0
        return probabilities / float(probabilities.sum())

    def state(self) -> dict[str, Any]:
        """The random state, fit for JSON."""
        return dict(self._random.bit_generator.state)

    def restore(self, state: dict[str, Any]) -> None:
        self._random.bit_generator.state = state

    def _drawn(self, weights: Float64) -> int:
        cumulative = weights.cumsum()
        return int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))

    def _penalised(self, logits: NDArray[np.float32], history: Sequence[int]) -> NDArray[np.float32]:
        penalty = self.params.repetition_penalty
        if penalty == 1 or not history:
            return logits
        scores = logits.copy()
        seen = np.unique(np.asarray(history))
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        return scores

    def _nucleus(self, probabilities: Float64) -> Float64:
        order = np.argsort(-probabilities, kind="stable")
        # The token that crosses the bound is kept.
        count = int(np.searchsorted(probabilities[order].cumsum(), self.params.top_p)) + 1
        kept = np.zeros_like(probabilities)
        kept[order[:count]] = probabilities[order[:count]]
        return kept


def _check_finite(logits: NDArray[np.float32]) -> None:
    if not np.isfinite(logits).all():
        raise MythosEdgeError("the model gave logits that are not finite: validate the bundle")


def _logprob(logits: NDArray[np.float32], token: int) -> float:
    largest = logits.max()
    # float32 is a quarter of the time; only the sum wants more.
    total = np.exp(logits - largest).sum(dtype=np.float64)
    return float(logits[token] - largest) - math.log(total)


def _only(scores: Float64, kept: NDArray[np.int64]) -> Float64:
    filtered = np.full_like(scores, -np.inf)
    filtered[kept] = scores[kept]
    return filtered
