"""Generation from a bundle: prompts in, tokens with their depth out.

    session = Session.open("model.bundle")
    print(session.generate("Once upon", max_new_tokens=50).text)
    for token in session.stream([1, 2, 3], temperature=0.8, seed=7):
        print(token.id, token.depth)

A session holds one sequence, or several that run together, at a time: ``generate`` and ``stream`` start afresh
unless told to ``resume``. Not thread-safe.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import CPU_PROVIDER, CUDA_PROVIDER, TARGET, TENSORRT_PROVIDER, Bundle, open_bundle
from mythos_edge.model.config import MythosConfig
from mythos_edge.model.errors import BundleError, CapacityError, UsageError
from mythos_edge.runtime import saved_state
from mythos_edge.runtime.backend import Backend, OrtBackend
from mythos_edge.runtime.caches import CachePlan, plan_cache, require_memory
from mythos_edge.runtime.decoding import Decoding, Generation, Options, TextSoFar, Token, TokenSequence
from mythos_edge.runtime.draft_tuner import DraftTuner
from mythos_edge.runtime.halting import ResolvedDepth, depth_of_preset
from mythos_edge.runtime.ort_cuda_backend import OrtCudaBackend
from mythos_edge.runtime.ort_tensorrt_backend import OrtTensorrtBackend
from mythos_edge.runtime.sampling import Sampler
from mythos_edge.runtime.speculation import AUTO, check_draft
from mythos_edge.runtime.staircase import Fed, Staircase
from mythos_edge.runtime.text import Tokenizer
from mythos_edge.runtime.together import Work, run_alone, run_together
from mythos_edge.runtime.trt_backend import TrtBackend

# By the providers that a target is for.
_ORT_BACKENDS: dict[tuple[str, ...], Callable[[Bundle, str, int], OrtBackend]] = {
    (CPU_PROVIDER,): OrtBackend,
    (CUDA_PROVIDER,): OrtCudaBackend,
    (TENSORRT_PROVIDER, CUDA_PROVIDER): OrtTensorrtBackend,
}
Int64 = NDArray[np.int64]
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Score:
    """``logits (B, S, V)`` float32 and ``depth (B, S)`` int32 of given tokens, and the work it took.

    ``block_calls``, ``block_rows`` and ``catch_up_calls`` are sums over the sequences; ``batch_runs`` counts a run of
    the recurrent block that several shared once.
    """

    logits: NDArray[np.float32]
    depth: NDArray[np.int32]
    block_calls: int
    block_rows: int
    catch_up_calls: int
    batch_runs: int


class Session:
    """A bundle ready to run, and the sequence it is working on."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.config = bundle.manifest.config
        self._max_context = min(bundle.manifest.max_context, backend.max_context or bundle.manifest.max_context)
        name = bundle.manifest.tokenizer
        self.tokenizer = None if name is None else Tokenizer(bundle.file(name))
        self._sequences: list[TokenSequence] = []
        # What is known of drafts serves the next request, too.
        self._tuners: dict[tuple[object, ...], DraftTuner] = {}
        self.last_generation = Generation()
        self._defaults: dict[str, Any] = {}
        self._target = TARGET

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        target: str | None = None,
        preset: str | None = None,
        threads: int = 0,
        hashes: bool = False,
        trust: bool = False,
    ) -> Self:
        """The bundle at ``path`` on one of its targets; ``hashes`` also checks the sha256 of every file.

        ``target`` names what ``mythos-edge build`` made; by default the fp32 target that every bundle has. ``preset``
        names what ``mythos-edge tune`` found: its target, and its depth for every request that sets none of its own.
        ``trust`` takes TensorRT engines that are not the files the manifest lists, which are native code.
        Raises BundleError, BackendUnavailable, UsageError.
        """
        bundle = open_bundle(Path(path), hashes=hashes, trust_engines=trust)
        defaults: dict[str, Any] = {}
        if preset is not None:
            defaults = depth_of_preset(bundle.manifest, preset)
            found_for = bundle.manifest.presets[preset].target
            if target not in (None, found_for):
                raise UsageError(f"preset {preset!r} was found for target {found_for!r}, not {target!r}: leave one out")
            target = found_for
        session = cls(bundle, open_backend(bundle, target or TARGET, threads, trust))
        session._defaults = defaults
        session._target = target or TARGET
        return session

    def close(self) -> None:
        """Gives back the caches and the graphs."""
        self._sequences = []
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _options(self, values: dict[str, Any]) -> Options:
        """The request, with the preset's depth where it sets none of its own."""
        known = {item.name for item in dataclasses.fields(Options)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError(f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        given = {name: value for name, value in values.items() if value is not None or name not in self._defaults}
        return Options(**{**self._defaults, **given})

    def plan(self, context: int | None = None, batch: int = 1, max_depth: int | None = None) -> CachePlan:
        """The cache memory of ``context`` tokens (by default the longest) before anything is allocated."""
        depth = max_depth or self.config.max_loop_iters
        memory = self.backend.memory
        room = memory.room_of(context or self._max_context)
        return plan_cache(self.config, depth, room, batch, memory.dtype.itemsize)

    @overload
    def generate(
        self, prompt: Prompt, *, resume: bool = False, seeds: Sequence[int] | None = None, **options: Any
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        resume: bool = False,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> list[Generation]: ...
    def generate(
        self, prompt: Any, *, resume: bool = False, seeds: Sequence[int] | None = None, **options: Any
    ) -> Generation | list[Generation]:
        """The Generation for a prompt (text or token ids), or a list of them for a list of prompts.

        ``options`` are the fields of Options. The prompts of a list run together, and each generates what it would
        alone, with the same seed, or with its own of ``seeds``. ``resume`` appends the prompt (which may be empty) to
        the sequence of the call before. Raises UsageError, CapacityError.
        """
        many = not isinstance(prompt, str) and any(isinstance(item, str | Sequence | np.ndarray) for item in prompt)
        results = [Generation() for _ in (prompt if many else [prompt])]
        samplers = self._samplers(seeds, len(results), options)
        decodings = self._begin(list(prompt) if many else [prompt], results, resume, self._options(options))
        for sequence, sampler in zip(self._sequences, samplers, strict=False):
            sequence.sampler = sampler
        if len(decodings) == 1:
            run_alone(decodings[0].whole(), self.backend, decodings[0].note)
            return results if many else results[0]
        _, runs = run_together([decoding.whole() for decoding in decodings], self.backend)
        for result in results:
            result.batch_runs = runs["step"]
        return results

    def stream(self, prompt: Prompt, *, resume: bool = False, **options: Any) -> Iterator[Token]:
        """The tokens of one prompt as they come; parameters and errors as in ``generate``.

        ``last_generation`` is what has come so far, with its figures.
        """
        self.last_generation = Generation()
        (decoding,) = self._begin([prompt], [self.last_generation], resume, self._options(options))
        while not decoding.finished:
            yield from run_alone(decoding.advance(), self.backend, decoding.note)

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
        wanted = self._options(options)
        self._start(ids.tolist(), wanted.depth.resolve(self.config), wanted)
        spans = list(_spans(prefill, positions))
        first, *others = self._sequences
        works = [_scored(first, spans, progress), *(_scored(other, spans, lambda fraction: None) for other in others)]
        scored, runs = run_together(works, self.backend)
        stairs = [sequence.staircase for sequence in self._sequences]
        return Score(
            np.concatenate([fed.logits for fed in scored]),
            np.concatenate([fed.depth for fed in scored]).astype(np.int32),
            sum(one.block_calls for one in stairs),
            sum(one.block_rows for one in stairs),
            sum(one.catch_up_calls for one in stairs),
            runs["step"],
        )

    @property
    def ids(self) -> list[int]:
        """The tokens of the present sequence, prompt and generated; a session with several has no such list."""
        return list(self._only_sequence().ids)

    def rollback(self, length: int) -> None:
        """Forgets the present sequence from position ``length`` on; no cache is copied."""
        sequence = self._only_sequence()
        if not 0 <= length <= len(sequence.ids):
            raise UsageError(f"rollback to {length} positions, expected 0 .. {len(sequence.ids)}, the present length")
        sequence.staircase.rollback(length)
        del sequence.ids[length:]

    def flush(self) -> None:
        """Catches up every loop step while nobody waits, so that the next token has nothing to wait for."""
        self._only_sequence().staircase.flush()

    def save(self, path: Path | str) -> None:
        """Writes the present sequence (tokens, caches, random state) to ``path``; the file appears whole or not."""
        sequence = self._only_sequence()
        # An interrupt may have fallen between the caches and the list of tokens.
        sequence.staircase.rollback(len(sequence.ids))
        saved_state.write(
            Path(path), self.bundle.weights_identity(self._target), sequence.ids, sequence.sampler, sequence.staircase
        )

    def restore(self, path: Path | str) -> None:
        """Takes up a sequence written by ``save`` with the same bundle and target; go on with ``resume=True``.

        Raises UsageError when the file is damaged or belongs to other weights.
        """
        saved = saved_state.read(Path(path), self.bundle.weights_identity(self._target))
        sequence = TokenSequence(saved.ids, self._new_staircase(saved.depth, None), Sampler(saved.sampling))
        try:
            sequence.staircase.restore(saved.arrays)
            sequence.sampler.restore(saved.sampler_state)
            _check_range(saved.ids, self.config)
        except (KeyError, ValueError, TypeError, IndexError, UsageError) as error:
            raise UsageError(f"{path}: not a saved session, or damaged: save it again") from error
        self._sequences = [sequence]

    def _begin(
        self, prompts: Sequence[Prompt], results: list[Generation], resume: bool, options: Options
    ) -> list[Decoding]:
        """The requests at work on the prompts, each filling in its own of ``results``."""
        encoded = [self._encode(prompt) for prompt in prompts]
        # Nothing of the session changes before everything that can be refused was.
        texts = [TextSoFar(self.tokenizer, options.stop_strings) for _ in encoded]
        _check_range(() if options.stop_ids is None else options.stop_ids, self.config, "stop id")
        depth = options.depth.resolve(self.config)
        tuner = self._tuner(options, depth, len(encoded))
        self._take_prompts(encoded, resume, options, depth)
        stop_ids = options.stop_ids if options.stop_ids is not None else self._end_ids()
        return [
            Decoding(sequence, options, stop_ids, text, result, tuner)
            for sequence, text, result in zip(self._sequences, texts, results, strict=True)
        ]

    def _samplers(self, seeds: Sequence[int] | None, prompts: int, options: dict[str, Any]) -> list[Sampler]:
        """A sampler for every prompt, where each has a seed of its own."""
        if seeds is None:
            return []
        if len(seeds) != prompts or options.get("seed") is not None:
            raise UsageError(f"seeds are {len(seeds)} for {prompts} prompts: give one for each, and no seed beside")
        return [Sampler(self._options({**options, "seed": seed}).sampling) for seed in seeds]

    def _tuner(self, options: Options, depth: ResolvedDepth, prompts: int) -> DraftTuner | None:
        """What chooses drafts where the options leave it open. Raises UsageError for drafts that are not possible."""
        wanted = options.draft_depth, options.draft_tokens
        check_draft(options.draft_depth, depth)
        if AUTO not in wanted:
            return None
        if prompts > 1:
            raise UsageError(f"a draft that is auto measures one sequence alone, got {prompts} prompts: give numbers")
        free = [None if number == AUTO else number for number in wanted]
        return self._tuners.setdefault((depth, *free), DraftTuner(depth, *free))

    def _take_prompts(self, encoded: list[list[int]], resume: bool, options: Options, depth: ResolvedDepth) -> None:
        if not resume:
            for ids in encoded:
                if not ids:
                    raise UsageError("the prompt is empty: give at least one token")
            self._start(encoded, depth, options, options.max_new_tokens)
            return
        sequence = self._only_sequence()
        if len(encoded) != 1:
            raise UsageError(f"resume goes on with one sequence, got {len(encoded)} prompts")
        begun = sequence.staircase.depth
        differing = [name for name, value in vars(depth).items() if getattr(begun, name) != value]
        if differing:
            name = differing[0]
            raise UsageError(
                f"{name} is {getattr(depth, name)}, but the sequence was begun with {getattr(begun, name)}: "
                "resume with the same depth options, or start a new sequence"
            )
        ids = sequence.ids + encoded[0]
        if not ids:
            raise UsageError("the prompt is empty: give at least one token")
        self._check_length(len(ids))
        self._check_memory(len(ids) + options.max_new_tokens, 1, depth, sequence.staircase.nbytes)
        # An interrupt may have left more cached columns than tokens; they are of other tokens than those to come.
        sequence.staircase.rollback(len(sequence.ids))
        sequence.staircase.expect(len(ids) + options.max_new_tokens)
        sequence.ids, sequence.staircase.max_lag = ids, options.max_lag
        if options.sampling != sequence.sampler.params:
            sequence.sampler = Sampler(options.sampling)

    def _start(self, encoded: list[list[int]], depth: ResolvedDepth, options: Options, new_tokens: int = 0) -> None:
        longest = max(len(ids) for ids in encoded)
        self._check_length(longest)
        held = sum(sequence.staircase.nbytes for sequence in self._sequences)
        self._check_memory(longest + new_tokens, len(encoded), depth, held)
        self._sequences = []
        self._sequences = [
            TokenSequence(list(ids), self._new_staircase(depth, options.max_lag), Sampler(options.sampling))
            for ids in encoded
        ]
        for sequence in self._sequences:
            sequence.staircase.expect(len(sequence.ids) + new_tokens)

    def _new_staircase(self, depth: ResolvedDepth, max_lag: int | None) -> Staircase:
        return Staircase(self.backend, self.config, depth, self._max_context, max_lag)

    def _check_length(self, tokens: int) -> None:
        limit = self._max_context
        if tokens > limit:
            raise CapacityError(
                f"the prompt has {tokens} tokens; this bundle was exported for {limit}: "
                f"export with --max-context {tokens} or shorten it"
            )

    def _check_memory(self, columns: int, batch: int, depth: ResolvedDepth, held: int) -> None:
        context = min(columns, self._max_context)
        require_memory(self.plan(context, batch, depth.max_depth), held, self.backend.memory.free_bytes())

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

    def _only_sequence(self) -> TokenSequence:
        if len(self._sequences) != 1:
            what = f"{len(self._sequences)} sequences" if self._sequences else "no sequence yet"
            raise UsageError(f"this needs a session with one sequence, but it has {what}: generate from one prompt")
        return self._sequences[0]


def open_backend(bundle: Bundle, target: str, threads: int = 0, trust: bool = False) -> OrtBackend | TrtBackend:
    """What runs a target; parameters and errors as in ``Session.open``."""
    spec = bundle.target(target)
    if spec.engine is not None:
        return TrtBackend(bundle, target, trust=trust)
    if not spec.providers:
        raise BundleError(
            f"{bundle.path}: target {target!r} has neither an engine nor providers of ONNX Runtime: build it again"
        )
    if spec.providers not in _ORT_BACKENDS:
        raise BundleError(
            f"{bundle.path}: target {target!r} is for {', '.join(spec.providers)} of ONNX Runtime, "
            "which this mythos-edge does not know: build it again"
        )
    return _ORT_BACKENDS[spec.providers](bundle, target, threads)


def checked_ids(ids: Any, config: MythosConfig) -> Int64:
    """``ids`` as an int64 array (batch, positions). Raises UsageError when they are no tokens of the model."""
    given = np.asarray(ids)
    if not given.size:
        raise UsageError(f"ids are empty, of shape {given.shape}: expected at least one token")
    if given.ndim != 2 or given.dtype.kind not in "iu":
        mend = ": ids[None] makes a batch of them" if given.ndim == 1 and given.dtype.kind in "iu" else ""
        raise UsageError(f"ids are {given.dtype} of shape {given.shape}, expected integers (batch, positions){mend}")
    _check_range(given.ravel().tolist(), config)
    return np.ascontiguousarray(given, np.int64)


def _check_range(ids: Sequence[int], config: MythosConfig, what: str = "token id") -> None:
    wrong = next((number for number in ids if not 0 <= number < config.vocab_size), None)
    if wrong is not None:
        raise UsageError(f"{what} {wrong} is out of range: this model knows 0 .. {config.vocab_size - 1}")


def _spans(prefill: int, positions: int) -> Iterator[tuple[int, int]]:
    if prefill:
        yield 0, prefill
    for position in range(prefill, positions):
        yield position, position + 1


def _scored(sequence: TokenSequence, spans: list[tuple[int, int]], progress: Callable[[float], None]) -> Work[Fed]:
    """The work of feeding a sequence in ``spans``: logits and depth of every position."""
    ids = np.array([sequence.ids], np.int64)
    fed = []
    for start, stop in spans:
        progress(start / ids.shape[1])
        fed.append((yield from sequence.staircase.feeding(ids[:, start:stop], np.arange(stop - start))))
    return Fed(np.concatenate([one.logits for one in fed], axis=1), np.concatenate([one.depth for one in fed], axis=1))
