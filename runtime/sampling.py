"""From logits to a token: penalty, temperature, top-k, top-p, min-p, in this order."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.runtime.request_values import Within, check_fields

Float64 = NDArray[np.float64]
# Less than half a unit in the last place of the largest float32, so that subtracting it from any cannot overflow.
_FAR_FROM_OVERFLOW = 1e30
# Any float32 logit times or divided by one of these is a finite number above 0 in float64, so that the order of the
# scores, and a distribution of them, is always there.
PENALTY = Within(least=1e-200, most=1e200)
# More bits than a random state keeps, and few enough to be written down.
SEED = Within(least=0, most=2**256 - 1)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the defaults are greedy. Raises UsageError for values out of range.

    ``temperature`` 0 is greedy; ``top_k`` 0 keeps all; ``top_p`` keeps the smallest set of likeliest tokens with
    that much probability; ``min_p`` drops tokens less likely than that share of the likeliest;
    ``repetition_penalty`` divides positive logits of tokens seen before and multiplies negative ones.
    """

    temperature: Annotated[float, Within(least=0)] = 0.0
    top_k: Annotated[int, Within(least=0)] = 0
    top_p: Annotated[float, Within(above=0, most=1)] = 1.0
    min_p: Annotated[float, Within(least=0, most=1)] = 0.0
    repetition_penalty: Annotated[float, PENALTY] = 1.0
    seed: Annotated[int | None, SEED] = None

    def __post_init__(self) -> None:
        check_fields(self)


class Guess(NamedTuple):
    """A drafted token and the distribution it was drawn from; None when greedy."""

    token: int
    distribution: Float64 | None


class Likely(NamedTuple):
    """A token and its natural-log probability."""

    id: int
    logprob: float


class Sampler:
    """Chooses tokens by ``params`` with a random state of its own; ``bias`` is added to the logits of some tokens."""

    def __init__(self, params: SamplingParams, bias: Mapping[int, float] | None = None) -> None:
        self.params = params
        self._biased = np.array(list(bias or ()), np.int64)
        self._bias = np.array(list((bias or {}).values()), np.float64)
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

    def _penalised(self, logits: NDArray[np.floating[Any]], history: Sequence[int]) -> NDArray[np.floating[Any]]:
        penalty = self.params.repetition_penalty
        if len(self._biased):
            logits = logits.astype(np.float64)
            logits[self._biased] += self._bias
        if penalty == 1 or not history:
            return logits
        # In float32 a penalty far from 1 makes infinities and zeros, which have no order.
        scores = logits.astype(np.float64)
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


def likeliest(logits: NDArray[np.float32], count: int) -> tuple[Likely, ...]:
    """The ``count`` tokens that unfiltered ``logits (V,)`` make likeliest, first the likeliest, equal ones by id."""
    if count == 0:
        return ()
    count = min(count, len(logits))
    least = np.partition(logits, -count)[-count]
    kept = np.flatnonzero(logits >= least)
    kept = kept[np.argsort(-logits[kept], kind="stable")][:count]
    logprob_of = _logprobs(logits)
    return tuple(Likely(token, logprob_of(token)) for token in kept.tolist())


def _logprob(logits: NDArray[np.float32], token: int) -> float:
    return _logprobs(logits)(token)


def _logprobs(logits: NDArray[np.float32]) -> Callable[[int], float]:
    """The natural-log probability of a token."""
    largest = logits.max()
    # float32 is a quarter of the time, and only the sum wants more; but differences must not leave its range.
    wide = logits if largest < _FAR_FROM_OVERFLOW else logits.astype(np.float64)
    total = np.exp(wide - largest).sum(dtype=np.float64)
    return lambda token: float(logits[token]) - float(largest) - math.log(total)


def _only(scores: Float64, kept: NDArray[np.int64]) -> Float64:
    filtered = np.full_like(scores, -np.inf)
    filtered[kept] = scores[kept]
    return filtered
