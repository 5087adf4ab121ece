"""One sequence being continued: what a request may ask for, and the loop from a prompt to the last token.

Not here: which sequences there are, and who runs the stages they ask for.
"""

import dataclasses
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.draft_tuner import DraftTuner
from mythos_edge.runtime.halting import Depth, Policy
from mythos_edge.runtime.sampling import Sampler, SamplingParams
from mythos_edge.runtime.speculation import AUTO, Draft, Drawn, Round, speculating
from mythos_edge.runtime.staircase import Fed, Staircase
from mythos_edge.runtime.text import StopStrings, TextStream, Tokenizer
from mythos_edge.runtime.together import StageCall, Work

_NO_ROWS = np.zeros(0, np.int64)
_FIRST_ROW = np.zeros(1, np.int64)


@dataclass(frozen=True)
class Options:
    """What a request may ask for. Raises UsageError for values out of range.

    Depth: see ``halting.Depth``. Sampling: see ``sampling.SamplingParams`` (temperature 0 is greedy).
    ``stop_ids``: tokens that end the text; by default the bundle's end tokens. ``stop_strings``: texts that end it; one
    that is a special token becomes a stop id beside those. ``special_tokens``: whether these are shown in the text, the
    one that ends it included. ``chunk``: prompt positions run at once. ``max_lag``: positions a loop step may fall
    behind before it is caught up in the background, one call a token; by default it catches up only when needed.
    ``draft_depth`` and ``draft_tokens``: self-speculation with that many tokens drafted at that many loop steps, see
    ``speculation``; ``"auto"`` chooses what is fastest, plain decoding included, which makes sampling depend on the
    machine's pace whatever the seed.
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
    special_tokens: bool = False
    chunk: int = 512
    max_lag: int | None = None
    draft_depth: int | Literal["auto"] | None = None
    draft_tokens: int | Literal["auto"] | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "chunk", "max_lag", "draft_depth", "draft_tokens"):
            value = getattr(self, name)
            if value is None or (value == AUTO and name.startswith("draft")):
                continue
            try:
                number = operator.index(value)
            except TypeError:
                raise UsageError(f"{name} is {value!r}, expected a whole number") from None
            if number < 1:
                raise UsageError(f"{name} is {number}, expected at least 1")
            object.__setattr__(self, name, number)
        if self.draft_tokens is not None and self.draft_depth is None:
            raise UsageError(f"draft_tokens is {self.draft_tokens} without draft_depth: give both, or neither")
        if self.draft_tokens is None and self.draft_depth is not None:
            object.__setattr__(self, "draft_tokens", AUTO)
        if isinstance(self.stop_strings, str):  # one string, not its letters
            object.__setattr__(self, "stop_strings", (self.stop_strings,))

    @property
    def depth(self) -> Depth:
        return Depth(self.policy, self.max_depth, self.min_depth, self.threshold)

    @property
    def draft(self) -> Draft | None:
        """The draft of every round, when it is given in numbers."""
        depth, tokens = self.draft_depth, self.draft_tokens
        return Draft(depth, tokens) if isinstance(depth, int) and isinstance(tokens, int) else None

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
    counted once. ``rolled_back_rows`` of the rows were forgotten again, because of ``drafted`` tokens only ``accepted``
    stood verification. ``ttft_ms`` is the time to the first token.
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
    drafted: int = 0
    accepted: int = 0
    rolled_back_rows: int = 0
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
        self,
        sequence: TokenSequence,
        options: Options,
        stop_ids: Sequence[int],
        text: "TextSoFar",
        result: Generation,
        tuner: DraftTuner | None = None,
    ) -> None:
        self.finished = False
        self._tuner = tuner
        self._sequence, self._options, self._stop_ids = sequence, options, stop_ids
        self._text, self._result = text, result
        self._text.follow(sequence.ids)
        self._counts = sequence.staircase.counts
        self._started = self._first_token_at = time.perf_counter()

    def whole(self) -> Work[None]:
        """All tokens, into the result."""
        while not self.finished:
            yield from self.advance()

    def advance(self) -> Work[list[Token]]:
        """The next tokens, at least one."""
        if not self._result.ids:
            drawn = self._drawn((yield from self._prefill()))
        elif (draft := self._draft()) is None:
            drawn = yield from self._plain()
        else:
            drawn = yield from self._speculative(draft)
        tokens = []
        for one in drawn:
            tokens.append(self._take(one))
            if self.finished:
                # Drafted positions after the last token would be caught up for nothing.
                self._sequence.staircase.rollback(len(self._sequence.ids) - 1)
                self._count()
                break
        return tokens

    def note(self, call: StageCall, seconds: float) -> None:
        """To be told how long the calls of this request take when it runs alone."""
        if self._tuner is not None:
            self._tuner.note_call(call.stage, call.rows, seconds)

    def _draft(self) -> Draft | None:
        """How to draft the next tokens, if at all."""
        wanted = self._options.draft if self._tuner is None else self._tuner.choose()
        if wanted is None:
            return None
        staircase, left = self._sequence.staircase, self._options.max_new_tokens - len(self._result.ids)
        count = min(wanted.tokens, left, staircase.max_context - staircase.columns)
        # A draft of one token would be verified by what plain decoding does anyway.
        return Draft(wanted.depth, count) if count > 1 else None

    def _plain(self) -> Work[list[Drawn]]:
        ids = np.array([[self._sequence.ids[-1]]])
        drawn = self._drawn((yield from self._sequence.staircase.feeding(ids, _FIRST_ROW)))
        if self._tuner is not None:
            self._tuner.note_plain(drawn[0].depth)
        return drawn

    def _speculative(self, draft: Draft) -> Work[list[Drawn]]:
        sequence, result = self._sequence, self._result
        made: Round = yield from speculating(sequence.staircase, sequence.sampler, sequence.ids, draft)
        result.drafted += made.drafted
        result.accepted += made.accepted
        if self._tuner is not None:
            self._tuner.note_round(draft, [one.depth for one in made.drawn], made.drafted, made.accepted)
        return made.drawn

    def _drawn(self, fed: Fed) -> list[Drawn]:
        return [Drawn(*self._sequence.sampler.sample(fed.logits[0, 0], self._sequence.ids), int(fed.depth[0, -1]))]

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

    def _take(self, drawn: Drawn) -> Token:
        """Adds a token to the sequence and the result, and sees whether it ends them."""
        sequence, result = self._sequence, self._result
        sequence.ids.append(drawn.id)
        result.ids.append(drawn.id)
        result.logprobs.append(drawn.logprob)
        result.depths.append(drawn.depth)
        reason = self._reason_to_finish(drawn.id)
        shown = self._text.push(drawn.id, ends=reason == "stop_id", last=reason is not None)
        if self._text.present:
            result.text = (result.text or "") + shown
        if self._text.stopped:
            reason = "stop_string"
        if reason is not None:
            result.finish_reason, self.finished = reason, True
        self._count()
        return Token(drawn.id, shown, drawn.logprob, drawn.depth)

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
        counts = (now - before for now, before in zip(self._sequence.staircase.counts, self._counts, strict=True))
        result.block_calls, result.block_rows, result.catch_up_calls, result.rolled_back_rows = counts
        result.batch_runs = result.block_calls


class TextSoFar:
    """The text of one sequence as it becomes final; empty without a tokenizer.

    Raises UsageError for a request that needs a tokenizer where there is none.
    """

    def __init__(self, tokenizer: Tokenizer | None, options: Options) -> None:
        asked = {"stop strings need": options.stop_strings, "special tokens need": options.special_tokens}
        needs = next((words for words, wanted in asked.items() if wanted), None)
        if needs and tokenizer is None:
            raise UsageError(f"{needs} a tokenizer, which this bundle has not: use stop ids, and read the ids")
        special = {} if tokenizer is None else {stop: tokenizer.special_id(stop) for stop in options.stop_strings}
        # Special tokens have no text that a stop string could be found in.
        self.stop_ids = tuple(number for number in special.values() if number is not None)
        self._stops = StopStrings([stop for stop in options.stop_strings if special.get(stop) is None])
        self._stream = None if tokenizer is None else TextStream(tokenizer, options.special_tokens)
        self.stopped = False

    @property
    def present(self) -> bool:
        """Whether there is text at all."""
        return self._stream is not None

    def follow(self, ids: Sequence[int]) -> None:
        """The tokens before the first, which decide how its text begins."""
        if self._stream is not None:
            self._stream.follow(ids)

    def push(self, token_id: int, *, ends: bool, last: bool) -> str:
        """The text that is final with this token; with the ``last`` one nothing is held back.

        A token that ``ends`` the text belongs to it where it is a special one, so that it is seen where these are.
        """
        if self._stream is None:
            return ""
        shown = not ends or (token_id not in self.stop_ids and self._stream.is_special(token_id))
        text = self._stream.push(token_id) if shown else ""
        if last:
            text += self._stream.flush()
        emitted, self.stopped = self._stops.push(text)
        return emitted if self.stopped or not last else emitted + self._stops.flush()
