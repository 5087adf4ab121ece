"""One sequence being continued: what a request may ask for, and the loop from a prompt to the last token.

Not here: which sequences there are, and who runs the stages they ask for.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.halting import Depth, Policy
from mythos_edge.runtime.sampling import Sampler, SamplingParams
from mythos_edge.runtime.staircase import Fed, Staircase
from mythos_edge.runtime.text import StopStrings, TextStream, Tokenizer
from mythos_edge.runtime.together import Work

_NO_ROWS = np.zeros(0, np.int64)
_FIRST_ROW = np.zeros(1, np.int64)


@dataclass(frozen=True)
class Options:
    """What a request may ask for. Raises UsageError for values out of range.

    Depth: see ``halting.Depth``. Sampling: see ``sampling.SamplingParams`` (temperature 0 is greedy).
    ``stop_ids``: tokens that end the text; by default the tokenizer's own end tokens. ``chunk``: prompt positions
    run at once. ``max_lag``: positions a loop step may fall behind before it is caught up in the background, one
    call a token; by default it catches up only when needed.
    """

    max_new_tokens: int = 128
    policy: str = Policy.EXACT
    max_depth: int | None = None
    min_depth: int = 1
    threshold: float | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    chunk: int = 512
    max_lag: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "chunk", "max_lag"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, expected at least 1")
        if isinstance(self.stop_strings, str):  # one string, not its letters
            object.__setattr__(self, "stop_strings", (self.stop_strings,))

    @property
    def depth(self) -> Depth:
        return Depth(self.policy, self.max_depth, self.min_depth, self.threshold)

    @property
    def sampling(self) -> SamplingParams:
        names = [item.name for item in dataclasses.fields(SamplingParams)]
        return SamplingParams(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Token:
    """One generated token: ``text`` that is final with it (may be empty), natural-log probability, and ``depth``,
    the loop steps taken by the position that predicted it."""

    id: int
    text: str
    logprob: float
    depth: int


@dataclass
class Generation:
    """What one prompt gave. ``finish_reason``: ``length``, ``stop_id``, ``stop_string`` or ``context``.

    ``block_calls`` counts the calls of the recurrent block that this sequence took part in, ``block_rows`` its rows
    in them, prompt included; ``batch_runs`` the runs of the block for all prompts given together, a shared one
    counted once. ``ttft_ms`` is the time to the first token.
    """

    ids: list[int] = field(default_factory=list)
    text: str | None = None
    logprobs: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    block_calls: int = 0
    block_rows: int = 0
    catch_up_calls: int = 0
    batch_runs: int = 0
    ttft_ms: float = 0.0
    decode_tokens_per_s: float | None = None


@dataclass
class TokenSequence:
    """One sequence: its tokens, its caches and its random state."""

    ids: list[int]
    staircase: Staircase
    sampler: Sampler


class Decoding:
    """A request at work on a sequence: ``advance`` gives more tokens until it has ``finished``."""

    def __init__(
        self, sequence: TokenSequence, options: Options, stop_ids: Sequence[int], text: "TextSoFar", result: Generation
    ) -> None:
        self.finished = False
        self._sequence, self._options, self._stop_ids = sequence, options, stop_ids
        self._text, self._result = text, result
        self._text.follow(sequence.ids)
        self._counts = _counts(sequence.staircase)
        self._started = self._first_token_at = time.perf_counter()

    def whole(self) -> Work[None]:
        """All tokens, into the result."""
        while not self.finished:
            yield from self.advance()

    def advance(self) -> Work[list[Token]]:
        """The next tokens, at least one."""
        fed = yield from (self._decode() if self._result.ids else self._prefill())
        token_id, logprob = self._sequence.sampler.sample(fed.logits[0, 0], self._sequence.ids)
        return [self._take(token_id, logprob, int(fed.depth[0, -1]))]

    def _prefill(self) -> Work[Fed]:
        """Feeds what has not been fed; logits and depth of the last column."""
        staircase, ids = self._sequence.staircase, np.array([self._sequence.ids], np.int64)
        columns = ids.shape[1]
        # The logits of the last column are needed, so at least that one is fed.
        staircase.rollback(min(staircase.columns, columns - 1))
        while True:
            start = staircase.columns
            stop = min(columns, start + self._options.chunk)
            last = np.array([stop - start - 1]) if stop == columns else _NO_ROWS
            fed = yield from staircase.feeding(ids[:, start:stop], last)
            if stop == columns:
                return fed

    def _decode(self) -> Work[Fed]:
        return self._sequence.staircase.feeding(np.array([[self._sequence.ids[-1]]]), _FIRST_ROW)

    def _take(self, token_id: int, logprob: float, depth: int) -> Token:
        """Adds a token to the sequence and the result, and sees whether it ends them."""
        sequence, result = self._sequence, self._result
        sequence.ids.append(token_id)
        result.ids.append(token_id)
        result.logprobs.append(logprob)
        result.depths.append(depth)
        reason = self._reason_to_finish(token_id)
        shown = self._text.push(token_id, shown=reason != "stop_id", last=reason is not None)
        if self._text.present:
            result.text = (result.text or "") + shown
        if self._text.stopped:
            reason = "stop_string"
        if reason is not None:
            result.finish_reason, self.finished = reason, True
        self._count()
        return Token(token_id, shown, logprob, depth)

    def _reason_to_finish(self, token_id: int) -> str | None:
        if token_id in self._stop_ids:
            return "stop_id"
        if len(self._result.ids) == self._options.max_new_tokens:
            return "length"
        return "context" if len(self._sequence.ids) > self._sequence.staircase.max_context else None

    def _count(self) -> None:
        """Brings the figures of the result up to date."""
        result, now, count = self._result, time.perf_counter(), len(self._result.ids)
        if count == 1:
            self._first_token_at = now
            result.ttft_ms = (now - self._started) * 1e3
        elif now > self._first_token_at:
            result.decode_tokens_per_s = (count - 1) / (now - self._first_token_at)
        counts = [now - before for now, before in zip(_counts(self._sequence.staircase), self._counts, strict=True)]
        result.block_calls, result.block_rows, result.catch_up_calls = counts
        result.batch_runs = result.block_calls


def _counts(staircase: Staircase) -> tuple[int, int, int]:
    return staircase.block_calls, staircase.block_rows, staircase.catch_up_calls


class TextSoFar:
    """The text of one sequence as it becomes final; empty without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, stop_strings: Sequence[str]) -> None:
        if stop_strings and tokenizer is None:
            raise UsageError("stop strings need a tokenizer, which this bundle has not: use stop ids")
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._stops = StopStrings(stop_strings)
        self.stopped = False

    @property
    def present(self) -> bool:
        """Whether there is text at all."""
        return self._stream is not None

    def follow(self, ids: Sequence[int]) -> None:
        """The tokens before the first, which decide whether it begins with a space."""
        if self._stream is not None:
            self._stream.follow(ids)

    def push(self, token_id: int, *, shown: bool, last: bool) -> str:
        """The text that is final with this token; with the ``last`` one nothing is held back."""
        if self._stream is None:
            return ""
        text = self._stream.push(token_id) if shown else ""
        if last:
            text += self._stream.flush()
        emitted, self.stopped = self._stops.push(text)
        return emitted if self.stopped or not last else emitted + self._stops.flush()
