"""Which draft is fastest, from what rounds took and gave so far: decisions only, no clock and no sequence.

Expected tokens per second are computed for every candidate and for plain decoding from running estimates. Drafts
nobody tried lately are thought to be good, so each is tried now and then. What keeps that cheap is an allowance: every
token adds a little time that may be lost against plain decoding, and a draft that could lose more is not made.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from mythos_edge.runtime.halting import Policy, ResolvedDepth
from mythos_edge.runtime.speculation import Draft

_DEPTHS = (1, 2, 3, 4, 6, 8, 12)
_TOKENS = (2, 3, 4, 6, 8)
# Tokens decoded plainly before the first draft: a session's first calls are slow.
_FIRST_TOKENS = 4
# Times of a plain token that may be lost: at first, more with each token, and at most.
_FIRST_ALLOWANCE, _ALLOWANCE, _MOST_ALLOWANCE = 1.5, 0.025, 8.0
# A draft must promise this much more than plain decoding.
_MIN_GAIN = 1.03
# An untried draft counts as if so many of its tokens had been tried, with that much success.
_PRIOR_WEIGHT, _PRIOR_ACCEPTANCE = 4.0, 0.9
# What is left of old evidence after each token.
_MEMORY = 0.995
_DEPTH_RATE = 0.05
# Larger chunks are prompts and catching up, which say nothing about drafts.
_MOST_ROWS = 32
# Kinds of requests whose evidence a session keeps.
_MOST_KINDS = 32
# Weighing all candidates takes as long as a call of a tiny model.
_ROUNDS_PER_CHOICE = 8


class _Seconds:
    """Seconds of a stage as a line over the rows of a call, from medians: other programs' pauses do not count."""

    def __init__(self) -> None:
        self._one: deque[float] = deque(maxlen=15)
        self._slopes: deque[float] = deque([0.1], maxlen=15)
        self.one, self.slope = 0.0, 0.1

    def note(self, rows: int, seconds: float) -> None:
        if rows == 1:
            self._one.append(seconds)
            self.one = _median(self._one)
        elif self.one:
            self._slopes.append(max(0.0, seconds / self.one - 1) / (rows - 1))
            self.slope = _median(self._slopes)

    def at(self, rows: int) -> float:
        return self.one * (1 + self.slope * (rows - 1))


class DraftTuner:
    """Chooses among drafts, and none, within the ``bounds`` of a request; ``None`` for what is left to it.

    Tell it every call (``note_call``) and every token or round (``note_plain``, ``note_round``).
    """

    def __init__(self, bounds: ResolvedDepth, depth: int | None, tokens: int | None) -> None:
        depths = [depth] if depth else [few for few in _DEPTHS if bounds.min_depth <= few < bounds.max_depth]
        self._candidates = [Draft(few, count) for few in depths for count in ([tokens] if tokens else _TOKENS)]
        self._bounds = bounds
        self._seconds = {stage: _Seconds() for stage in ("prelude", "step", "coda")}
        self._accepted, self._tried = np.zeros(bounds.max_depth), np.zeros(bounds.max_depth)
        # Share of tokens that take more than so many loop steps.
        self._deeper = np.ones(bounds.max_depth)
        self._tokens, self._allowance = 0, _FIRST_ALLOWANCE
        self._choice: Draft | None = None
        self._rounds_left = 0  # before the next choice

    def note_call(self, stage: str, rows: int, seconds: float) -> None:
        """A call of ``stage`` took this long, all that the host did for it included."""
        if rows <= _MOST_ROWS:
            self._seconds[stage].note(rows, seconds)

    def note_plain(self, depth: int) -> None:
        """A token of this depth was decoded plainly."""
        self._note_depths([depth])

    def note_round(self, draft: Draft, depths: Sequence[int], drafted: int, accepted: int) -> None:
        """A round gave tokens of these ``depths``; ``accepted`` of the ``drafted`` ones stood, up to the first bad."""
        self._note_depths(depths)
        if not drafted:  # the first had halted: a token decoded plainly
            return
        self._tried[draft.depth] += min(drafted, accepted + 1)
        self._accepted[draft.depth] += accepted
        lost = self._round_seconds(draft) / self._plain_seconds() - len(depths)
        self._allowance = min(self._allowance - lost, _MOST_ALLOWANCE)
        if lost > 0:
            self._rounds_left = 0

    def choose(self) -> Draft | None:
        """The draft of the next round; None for a token decoded plainly."""
        if self._tokens < _FIRST_TOKENS:
            return None
        if self._rounds_left == 0:
            self._choice, self._rounds_left = self._best(), _ROUNDS_PER_CHOICE
        self._rounds_left -= 1
        return self._choice

    def _note_depths(self, depths: Sequence[int]) -> None:
        self._tokens += len(depths)
        self._allowance = min(self._allowance + _ALLOWANCE * len(depths), _MOST_ALLOWANCE)
        self._accepted *= _MEMORY ** len(depths)
        self._tried *= _MEMORY ** len(depths)
        if self._bounds.policy is not Policy.FULL:  # which runs every step for every token
            for depth in depths:
                self._deeper += _DEPTH_RATE * ((depth > np.arange(self._bounds.max_depth)) - self._deeper)

    def _best(self) -> Draft | None:
        plain = self._plain_seconds()
        best, best_rate = None, _MIN_GAIN / plain
        for draft in self._candidates:
            # The worst round gives one token, which plain decoding would give as well.
            affordable = self._round_seconds(draft) <= (1 + self._allowance) * plain
            if affordable and (rate := self._tokens_per_second(draft)) > best_rate:
                best, best_rate = draft, rate
        return best

    def _acceptance(self, depth: int) -> float:
        success = self._accepted[depth] + _PRIOR_WEIGHT * _PRIOR_ACCEPTANCE
        return float(success / (self._tried[depth] + _PRIOR_WEIGHT))

    def _fixed_seconds(self) -> float:
        """Seconds that a token costs besides its loop steps."""
        return self._seconds["prelude"].at(1) + self._seconds["coda"].at(1)

    def _plain_seconds(self) -> float:
        return self._fixed_seconds() + self._seconds["step"].at(1) * float(self._deeper.sum())

    def _round_seconds(self, draft: Draft) -> float:
        """Expected time of a draft and its verification, once its first token has not halted within its depth."""
        depth, count = draft
        step, deeper = self._seconds["step"], self._deeper
        draft_steps = depth + (count - 1) * float(deeper[:depth].sum())
        first = deeper[depth:] / max(float(deeper[depth]), 1e-9)
        # A step is run when any of the tokens needs it.
        verify_steps = float((1 - (1 - first) * (1 - deeper[depth:]) ** (count - 1)).sum())
        verification = verify_steps * step.at(count) + self._seconds["coda"].at(count)
        return count * self._fixed_seconds() + draft_steps * step.at(1) + verification

    def _tokens_per_second(self, draft: Draft) -> float:
        """Over tokens that halt within the draft's depth, which are decoded plainly, and the rounds between them."""
        opens = float(self._deeper[draft.depth])
        acceptance = self._acceptance(draft.depth)
        tokens = sum(acceptance**count for count in range(draft.tokens))
        easy_steps = float(self._deeper[: draft.depth].sum()) - draft.depth * opens
        easy = (1 - opens) * self._fixed_seconds() + easy_steps * self._seconds["step"].at(1)
        return (1 - opens + opens * tokens) / (easy + opens * self._round_seconds(draft))


class DraftTuners:
    """The tuners of a session, one for each kind of request; of many kinds the ones used last."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], DraftTuner] = {}

    def of(self, bounds: ResolvedDepth, depth: int | None, tokens: int | None) -> DraftTuner:
        """The tuner of requests with these bounds, and what they leave to it; see ``DraftTuner``."""
        kind = (bounds, depth, tokens)
        tuner = self._kept.pop(kind, None) or DraftTuner(bounds, depth, tokens)
        self._kept[kind] = tuner
        if len(self._kept) > _MOST_KINDS:
            del self._kept[next(iter(self._kept))]
        return tuner


def _median(values: deque[float]) -> float:
    return sorted(values)[len(values) // 2]
