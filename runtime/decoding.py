"""One sequence being continued: the loop from a prompt to the last token.

Not here: which sequences there are, and who runs the stages they ask for.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.draft_tuner import DraftTuner
from mythos_edge.runtime.options import Options
from mythos_edge.runtime.sampling import Sampler
from mythos_edge.runtime.speculation import Draft, Drawn, Round, drawn_from, speculating
from mythos_edge.runtime.staircase import Fed, Staircase
from mythos_edge.runtime.text import StopStrings, TextStream, Tokenizer
from mythos_edge.runtime.together import StageCall, Work

_NO_ROWS = np.zeros(0, np.int64)
_FIRST_ROW = np.zeros(1, np.int64)


@dataclass(frozen=True)
class Alternative:
    """A token that might have come: ``text`` is its own, alone, and None without a tokenizer."""

    id: int
    text: str | None
    logprob: float


@dataclass(frozen=True)
class Token:
    """One generated token: ``text`` that is final with it (may be empty), natural-log probability, and ``depth``,
    the loop steps taken by the position that predicted it. ``top_logprobs`` are the likeliest there, if asked for."""

    id: int
    text: str
    logprob: float
    depth: int
    top_logprobs: tuple[Alternative, ...] = ()


@dataclass
class Generation:
    """The result of one prompt. ``finish_reason``: ``length``, ``stop_id``, ``stop_string`` or ``context``.

    ``block_calls`` counts the calls of the recurrent block that this sequence took part in, ``block_rows`` its rows
    in them, prompt included; ``batch_runs`` the runs of the block for all prompts given together, a shared one
    counted once. ``rolled_back_rows`` of the rows were forgotten again, because of ``drafted`` tokens only ``accepted``
    stood verification. ``ttft_ms`` is the time to the first token. ``top_logprobs`` holds the likeliest tokens beside
    each of ``ids`` where they were asked for, else nothing.
    """

    ids: list[int] = field(default_factory=list)
    text: str | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[Alternative, ...]] = field(default_factory=list)
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

    def rollback(self, length: int) -> None:
        """Forgets it from position ``length`` on."""
        self.staircase.rollback(length)
        del self.ids[length:]

    def check_rollback(self, length: int) -> None:
        """Raises UsageError unless it can be rolled back to ``length`` positions without computing it anew."""
        now, floor = len(self.ids), self.staircase.rollback_floor
        if not 0 <= length <= now:
            raise UsageError(f"rollback to {length} positions, expected 0 .. {now}, the present length")
        if 0 < length < floor:
            raise UsageError(
                f"rollback to {length} positions, expected 0 or {floor} .. {now}: layers with a window have given up "
                "what earlier ones see: generate from the tokens anew, without resume"
            )


class Decoding:
    """A request at work on a sequence: ``advance`` gives one more token until it has ``finished``."""

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
        self._waiting: deque[Drawn] = deque()
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

    def advance(self) -> Work[Token]:
        """The next token.

        A draft gives several at once. The sequence takes them in one by one as they are given out, so that it holds
        what a caller has seen, whatever the caller does next.
        """
        if not self._waiting:
            self._waiting.extend((yield from self._next_drawn()))
        token = self._take(self._waiting.popleft())
        if self.finished:
            # Drafted positions after the last token would be caught up for nothing.
            self._sequence.staircase.rollback(len(self._sequence.ids) - 1)
            self._count()
        return token

    def _next_drawn(self) -> Work[list[Drawn]]:
        """The next tokens to give out, at least one."""
        sequence = self._sequence
        if not self._result.ids:
            self._started = time.perf_counter()
        # Besides a prompt, saving takes back the columns of tokens that wait.
        if not self._result.ids or sequence.staircase.columns != len(sequence.ids) - 1:
            return self._drawn((yield from self._prefill()))
        draft = self._draft()
        return (yield from self._plain() if draft is None else self._speculative(draft))

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
        made: Round = yield from speculating(
            sequence.staircase, sequence.sampler, sequence.ids, draft, self._options.top_logprobs
        )
        result.drafted += made.drafted
        result.accepted += made.accepted
        if self._tuner is not None:
            self._tuner.note_round(draft, [one.depth for one in made.drawn], made.drafted, made.accepted)
        return made.drawn

    def _drawn(self, fed: Fed) -> list[Drawn]:
        return [drawn_from(fed, self._sequence.sampler, self._sequence.ids, self._options.top_logprobs)]

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
        top = tuple(Alternative(one.id, self._text.alone(one.id), one.logprob) for one in drawn.top)
        if self._options.top_logprobs:
            result.top_logprobs.append(top)
        reason = self._reason_to_finish(drawn.id)
        shown = self._text.push(drawn.id, ends=reason == "stop_id", last=reason is not None)
        if self._text.present:
            result.text = (result.text or "") + shown
        if self._text.stopped:
            reason = "stop_string"
        if reason is not None:
            result.finish_reason, self.finished = reason, True
        self._count()
        return Token(drawn.id, shown, drawn.logprob, drawn.depth, top)

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
        self._tokenizer = tokenizer
        self._stream = None if tokenizer is None else TextStream(tokenizer, options.special_tokens)
        self.stopped = False

    @property
    def present(self) -> bool:
        """Whether there is text at all."""
        return self._stream is not None

    def alone(self, token_id: int) -> str | None:
        """The text of one token by itself."""
        return None if self._tokenizer is None else self._tokenizer.text_alone(token_id)

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
