"""Generation from a bundle: prompts in, tokens with their depth out.

    session = Session.open("model.bundle")
    print(session.generate("Once upon", max_new_tokens=50).text)
    for token in session.stream([1, 2, 3], temperature=0.8, seed=7):
        print(token.id, token.depth)

A session holds one sequence, or one batch of sequences in lockstep, at a time: ``generate`` and ``stream`` start
afresh unless told to ``resume``. Not thread-safe.
"""

import dataclasses
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.config import MythosConfig
from mythos_edge.model.errors import CapacityError, UsageError
from mythos_edge.runtime import saved_state
from mythos_edge.runtime.backend import TARGET, Backend, OrtBackend
from mythos_edge.runtime.caches import CachePlan, plan_cache, require_memory
from mythos_edge.runtime.halting import Depth, Policy, ResolvedDepth
from mythos_edge.runtime.sampling import Sampler, SamplingParams
from mythos_edge.runtime.staircase import Staircase
from mythos_edge.runtime.text import StopStrings, TextStream, Tokenizer

Int64 = NDArray[np.int64]
Prompt = str | Sequence[int]


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

    ``block_calls`` and ``block_rows`` count runs of the recurrent block and rows in them, prompt included, for the
    whole batch the prompt was part of; ``ttft_ms`` is the time to the first token.
    """

    ids: list[int] = field(default_factory=list)
    text: str | None = None
    logprobs: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    block_calls: int = 0
    block_rows: int = 0
    catch_up_calls: int = 0
    ttft_ms: float = 0.0
    decode_tokens_per_s: float | None = None


@dataclass(frozen=True)
class Score:
    """``logits (B, S, V)`` float32 and ``depth (B, S)`` int32 of given tokens, and the work it took."""

    logits: NDArray[np.float32]
    depth: NDArray[np.int32]
    block_calls: int
    block_rows: int
    catch_up_calls: int


class Session:
    """A bundle ready to run, and the sequence it is working on."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.config = bundle.manifest.config
        name = bundle.manifest.tokenizer
        self.tokenizer = None if name is None else Tokenizer(bundle.file(name))
        self._rows: list[_Row] = []
        self._staircase: Staircase | None = None
        self.last_generation = Generation()

    @classmethod
    def open(cls, path: Path | str, *, target: str = TARGET, threads: int = 0, hashes: bool = False) -> Self:
        """The bundle at ``path`` on ONNX Runtime; ``hashes`` also checks the sha256 of every file.

        ``target`` names what ``mythos-edge build`` made; by default the fp32 target that every bundle has.

        Raises BundleError, BackendUnavailable.
        """
        bundle = open_bundle(Path(path), hashes=hashes)
        return cls(bundle, OrtBackend(bundle, target, threads))

    def close(self) -> None:
        """Gives back the caches and the graphs."""
        self._staircase, self._rows = None, []
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def plan(self, context: int | None = None, batch: int = 1, max_depth: int | None = None) -> CachePlan:
        """The cache memory of ``context`` tokens (by default the longest) before anything is allocated."""
        depth = max_depth or self.config.max_loop_iters
        return plan_cache(self.config, depth, context or self.bundle.manifest.max_context, batch)

    @overload
    def generate(self, prompt: Prompt, *, resume: bool = False, **options: Any) -> Generation: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], *, resume: bool = False, **options: Any
    ) -> list[Generation]: ...
    def generate(self, prompt: Any, *, resume: bool = False, **options: Any) -> Generation | list[Generation]:
        """The Generation for a prompt (text or token ids), or a list of them for a list of prompts.

        ``options`` are the fields of Options. Every prompt of a batch generates what it would alone, with the same
        seed. ``resume`` appends the prompt (which may be empty) to the sequence of the call before.
        Raises UsageError, CapacityError.
        """
        many = not isinstance(prompt, str) and any(isinstance(item, str | Sequence | np.ndarray) for item in prompt)
        results = [Generation() for _ in (prompt if many else [prompt])]
        for _ in self._generate(list(prompt) if many else [prompt], results, resume, _options(options)):
            pass
        return results if many else results[0]

    def stream(self, prompt: Prompt, *, resume: bool = False, **options: Any) -> Iterator[Token]:
        """The tokens of one prompt as they come; parameters and errors as in ``generate``.

        ``last_generation`` is what has come so far, with its figures.
        """
        self.last_generation = Generation()
        for column in self._generate([prompt], [self.last_generation], resume, _options(options)):
            yield from (token for token in column if token is not None)

    def score(
        self,
        ids: Any,
        *,
        prefill: int | None = None,
        progress: Callable[[float], None] = lambda fraction: None,
        **options: Any,
    ) -> Score:
        """Logits and depth of every position of ``ids (B, S)``: the first ``prefill`` in one chunk (by default
        all), the rest one at a time, as decoding would. ``progress`` is told the share that is done; ``options``
        are the depth fields of Options. Raises UsageError, CapacityError."""
        ids = checked_ids(ids, self.config)
        positions = ids.shape[1]
        prefill = positions if prefill is None else prefill
        if not 0 <= prefill <= positions:
            raise UsageError(f"prefill is {prefill}, expected 0 .. {positions}, the positions given")
        wanted = _options(options)
        self._start(ids.tolist(), wanted.depth.resolve(self.config), wanted)
        staircase = self._staircase
        assert staircase is not None
        logits, depths = [], []
        for start, stop in _spans(prefill, positions):
            progress(start / positions)
            fed = staircase.feed(ids[:, start:stop], np.arange(stop - start))
            logits.append(fed.logits)
            depths.append(fed.depth)
        return Score(
            np.concatenate(logits, axis=1),
            np.concatenate(depths, axis=1).astype(np.int32),
            staircase.block_calls,
            staircase.block_rows,
            staircase.catch_up_calls,
        )

    @property
    def ids(self) -> list[int]:
        """The tokens of the present sequence, prompt and generated; a session with a batch has no such list."""
        return list(self._only_row().ids)

    def rollback(self, length: int) -> None:
        """Forgets the present sequence from position ``length`` on; no cache is copied."""
        row, staircase = self._only_row(), self._staircase
        assert staircase is not None
        if not 0 <= length <= len(row.ids):
            raise UsageError(f"rollback to {length} positions, expected 0 .. {len(row.ids)}, the present length")
        staircase.rollback(length)
        del row.ids[length:]

    def flush(self) -> None:
        """Catches up every loop step while nobody waits, so that the next token has nothing to wait for."""
        self._only_row()
        assert self._staircase is not None
        self._staircase.flush()

    def save(self, path: Path | str) -> None:
        """Writes the present sequence (tokens, caches, random state) to ``path``; the file appears whole or not."""
        row, staircase = self._only_row(), self._staircase
        assert staircase is not None
        saved_state.write(Path(path), self.bundle, row.ids, row.sampler, staircase)

    def restore(self, path: Path | str) -> None:
        """Takes up a sequence written by ``save`` with the same bundle; go on with ``resume=True``.

        Raises UsageError when the file is damaged or belongs to other weights.
        """
        saved = saved_state.read(Path(path), self.bundle)
        staircase = self._new_staircase(saved.depth, np.zeros(1, np.int64), None)
        sampler = Sampler(saved.sampling)
        try:
            staircase.restore(saved.arrays)
            sampler.restore(saved.sampler_state)
            _check_range(saved.ids, self.config)
        except (KeyError, ValueError, TypeError, IndexError, UsageError) as error:
            raise UsageError(f"{path}: not a saved session, or damaged: save it again") from error
        self._staircase, self._rows = staircase, [_Row(saved.ids, sampler, saved.sampling)]

    def _generate(
        self, prompts: Sequence[Prompt], results: list[Generation], resume: bool, options: Options
    ) -> Iterator[list[Token | None]]:
        """Yields one column of tokens per decode, None for rows that have finished; fills in ``results``."""
        started = time.perf_counter()
        encoded = [self._encode(prompt) for prompt in prompts]
        # Nothing of the session changes before everything that can be refused was.
        texts = [_RowText(self.tokenizer, options.stop_strings) for _ in encoded]
        self._take_prompts(encoded, resume, options)
        staircase, rows = self._staircase, self._rows
        assert staircase is not None
        for text, row in zip(texts, rows, strict=True):
            text.follow(row.ids)
        stop_ids = options.stop_ids if options.stop_ids is not None else self._end_ids()
        before = (staircase.block_calls, staircase.block_rows, staircase.catch_up_calls)
        logits, depth = self._prefill(options.chunk)
        first_token_at = None
        running = np.ones(len(rows), bool)
        for count in range(1, options.max_new_tokens + 1):
            column: list[Token | None] = [None] * len(rows)
            for index in np.flatnonzero(running):
                row, result, text = rows[index], results[index], texts[index]
                token_id, logprob = row.sampler.sample(logits[index], row.ids)
                row.ids.append(token_id)
                result.ids.append(token_id)
                result.logprobs.append(logprob)
                result.depths.append(int(depth[index]))
                reason = "stop_id" if token_id in stop_ids else "length" if count == options.max_new_tokens else None
                if reason is None and len(row.ids) > self.bundle.manifest.max_context:
                    reason = "context"
                shown = text.push(token_id, shown=reason != "stop_id", last=reason is not None)
                if self.tokenizer is not None:
                    result.text = (result.text or "") + shown
                if text.stopped:
                    reason = "stop_string"
                if reason is not None:
                    result.finish_reason, running[index] = reason, False
                column[index] = Token(token_id, shown, logprob, int(depth[index]))
            now = time.perf_counter()
            first_token_at = first_token_at or now
            for result, token in zip(results, column, strict=True):
                if token is not None:
                    result.ttft_ms = (first_token_at - started) * 1e3
                    spent = now - first_token_at
                    result.decode_tokens_per_s = (count - 1) / spent if count > 1 and spent > 0 else None
                result.block_calls = staircase.block_calls - before[0]
                result.block_rows = staircase.block_rows - before[1]
                result.catch_up_calls = staircase.catch_up_calls - before[2]
            yield column
            if not running.any():
                return
            logits, depth = self._decode(running)

    def _prefill(self, chunk: int) -> tuple[NDArray[np.float32], Int64]:
        """Feeds what has not been fed; logits (B, V) and depth (B,) of the last column."""
        staircase, rows = self._staircase, self._rows
        assert staircase is not None
        columns = len(rows[0].ids) + int(staircase.padding[0])
        ids = np.zeros((len(rows), columns), np.int64)
        for index, row in enumerate(rows):
            ids[index, staircase.padding[index] :] = row.ids
        # The logits of the last column are needed, so at least that one is fed.
        staircase.rollback(min(staircase.columns, columns - 1))
        while staircase.columns < columns:
            start = staircase.columns
            stop = min(columns, start + chunk)
            wanted = np.arange(stop - start - (stop == columns), stop - start) if stop == columns else _NO_ROWS
            fed = staircase.feed(ids[:, start:stop], wanted)
        return fed.logits[:, 0], fed.depth[:, -1]

    def _decode(self, running: NDArray[np.bool_]) -> tuple[NDArray[np.float32], Int64]:
        staircase, rows = self._staircase, self._rows
        assert staircase is not None
        ids = np.array([[row.ids[-1]] for row in rows], np.int64)
        fed = staircase.feed(ids, _FIRST_ROW, halted=None if running.all() else ~running)
        return fed.logits[:, 0], fed.depth[:, 0]

    def _take_prompts(self, encoded: list[list[int]], resume: bool, options: Options) -> None:
        depth = options.depth.resolve(self.config)
        if not resume:
            for ids in encoded:
                if not ids:
                    raise UsageError("the prompt is empty: give at least one token")
            self._start(encoded, depth, options, options.max_new_tokens)
            return
        row, staircase = self._only_row(), self._staircase
        assert staircase is not None
        if len(encoded) != 1:
            raise UsageError(f"resume goes on with one sequence, got {len(encoded)} prompts")
        differing = [name for name, value in vars(depth).items() if getattr(staircase.depth, name) != value]
        if differing:
            name = differing[0]
            raise UsageError(
                f"{name} is {getattr(depth, name)}, but the sequence was begun with {getattr(staircase.depth, name)}: "
                "resume with the same depth options, or start a new sequence"
            )
        ids = row.ids + encoded[0]
        if not ids:
            raise UsageError("the prompt is empty: give at least one token")
        self._check_length(len(ids))
        self._check_memory(len(ids) + options.max_new_tokens, 1, depth, staircase.nbytes)
        row.ids, staircase.max_lag = ids, options.max_lag
        if options.sampling != row.sampling:
            row.sampling, row.sampler = options.sampling, Sampler(options.sampling)

    def _start(self, encoded: list[list[int]], depth: ResolvedDepth, options: Options, new_tokens: int = 0) -> None:
        longest = max(len(ids) for ids in encoded)
        self._check_length(longest)
        held = 0 if self._staircase is None else self._staircase.nbytes
        self._check_memory(longest + new_tokens, len(encoded), depth, held)
        self._staircase, self._rows = None, []
        padding = np.array([longest - len(ids) for ids in encoded], np.int64)
        self._staircase = self._new_staircase(depth, padding, options.max_lag)
        sampling = options.sampling
        self._rows = [_Row(list(ids), Sampler(sampling), sampling) for ids in encoded]

    def _new_staircase(self, depth: ResolvedDepth, padding: Int64, max_lag: int | None) -> Staircase:
        return Staircase(self.backend, self.config, depth, self.bundle.manifest.max_context, padding, max_lag)

    def _check_length(self, tokens: int) -> None:
        limit = self.bundle.manifest.max_context
        if tokens > limit:
            raise CapacityError(
                f"the prompt has {tokens} tokens; this bundle was exported for {limit}: "
                f"export with --max-context {tokens} or shorten it"
            )

    def _check_memory(self, columns: int, batch: int, depth: ResolvedDepth, held: int) -> None:
        context = min(columns, self.bundle.manifest.max_context)
        require_memory(plan_cache(self.config, depth.max_depth, context, batch), held)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError("this bundle has no tokenizer: give token ids, or export with --tokenizer")
            return self.tokenizer.encode(prompt)
        try:
            ids = [operator.index(number) for number in prompt]
        except TypeError:
            raise UsageError("the prompt holds something that is no token id: expected text or integers") from None
        _check_range(ids, self.config)
        return ids

    def _end_ids(self) -> tuple[int, ...]:
        return () if self.tokenizer is None else tuple(self.tokenizer.eos_ids)

    def _only_row(self) -> "_Row":
        if len(self._rows) != 1:
            what = "no sequence yet" if not self._rows else f"a batch of {len(self._rows)} sequences"
            raise UsageError(f"this needs a session with one sequence, but it has {what}: generate from one prompt")
        return self._rows[0]


def checked_ids(ids: Any, config: MythosConfig) -> Int64:
    """``ids`` as an int64 array (batch, positions). Raises UsageError when they are no tokens of the model."""
    given = np.asarray(ids)
    if given.ndim != 2 or 0 in given.shape or given.dtype.kind not in "iu":
        raise UsageError(f"ids are {given.dtype} of shape {given.shape}, expected integers (batch, positions)")
    _check_range(given.ravel().tolist(), config)
    return np.ascontiguousarray(given, np.int64)


def _check_range(ids: list[int], config: MythosConfig) -> None:
    wrong = next((number for number in ids if not 0 <= number < config.vocab_size), None)
    if wrong is not None:
        raise UsageError(f"token id {wrong} is out of range: this model knows 0 .. {config.vocab_size - 1}")


_NO_ROWS = np.zeros(0, np.int64)
_FIRST_ROW = np.zeros(1, np.int64)


@dataclass
class _Row:
    """One sequence: its tokens and its random state."""

    ids: list[int]
    sampler: Sampler
    sampling: SamplingParams


class _RowText:
    """The text of one sequence as it becomes final; empty without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, stop_strings: Sequence[str]) -> None:
        if stop_strings and tokenizer is None:
            raise UsageError("stop strings need a tokenizer, which this bundle has not: use stop ids")
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._stops = StopStrings(stop_strings)
        self.stopped = False

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


def _options(values: dict[str, Any]) -> Options:
    known = {item.name for item in dataclasses.fields(Options)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return Options(**values)


def _spans(prefill: int, positions: int) -> Iterator[tuple[int, int]]:
    if prefill:
        yield 0, prefill
    for position in range(prefill, positions):
        yield position, position + 1
