"""Generation from a bundle: prompts in, tokens with their depth out.

    session = Session.open("model.bundle")
    print(session.generate("Once upon", max_new_tokens=50).text)
    for token in session.stream([1, 2, 3], temperature=0.8, seed=7):
        print(token.id, token.depth)

A session holds one sequence, or several that run together, at a time: ``generate`` and ``stream`` start afresh
unless told to ``resume``. It serves one call at a time, of whatever thread: one that comes while another runs is a
UsageError. Several threads open a session each, or one gives several prompts to ``generate``.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, Unpack, cast, overload

from mythos_edge.model.bundle import Bundle, made_of_bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.runtime import saved_state
from mythos_edge.runtime.backends.opening import open_backend
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.caches import CachePlan, plan_in, require_memory
from mythos_edge.runtime.decoding import Decoding, Generation, TextSoFar, TokenSequence
from mythos_edge.runtime.draft_tuner import DraftTuner, DraftTuners
from mythos_edge.runtime.halting import LOOP_STEPS, ResolvedDepth, target_and_depth
from mythos_edge.runtime.options import Options, RequestOptions, ScoreOptions, options_of_each
from mythos_edge.runtime.prompts import Prompt, Prompts, check_length, check_range, checked_ids, ids_of, separate
from mythos_edge.runtime.request_values import Within, check_names, flag, name_or_none, path_of, whole
from mythos_edge.runtime.sampling import Sampler
from mythos_edge.runtime.scoring import Score, score_of, scoring, spans_of
from mythos_edge.runtime.selftest import require_self_test
from mythos_edge.runtime.speculation import AUTO, check_draft
from mythos_edge.runtime.staircase import Staircase
from mythos_edge.runtime.streams import TokenStream
from mythos_edge.runtime.text import Tokenizer
from mythos_edge.runtime.together import run_alone, run_together
from mythos_edge.runtime.turns import Turns, in_turn, last_turn

_COUNT = Within(least=1)


class Session:
    """A bundle ready to run, and the sequence it is working on; for one call at a time.

    Every method raises UsageError while another call runs, of this thread or another, and once the session is closed.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle.at_absolute_path(), backend
        self._turns = Turns("session", "open one Session a thread, or use generate([...]) for several prompts")
        # The one that is half read. Not kept alive: nobody may be reading it any more.
        self._stream: weakref.ref[TokenStream] | None = None
        self.model = bundle.manifest.model
        self.max_context = min(bundle.manifest.max_context, backend.max_context or bundle.manifest.max_context)
        name = bundle.manifest.tokenizer
        self.tokenizer = None
        if name is not None:
            with bundle.unchanged():
                self.tokenizer = Tokenizer(bundle.file(name))
        self._sequences: list[TokenSequence] = []
        # What is known of drafts serves the next request, too.
        self._tuners = DraftTuners()
        self.last_generation = Generation()
        self._defaults: dict[str, Any] = {}
        self.target = bundle.manifest.default_target

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
        cache: str | None = None,
        selftest: bool = False,
    ) -> Self:
        """The bundle at ``path`` on one of its targets; ``hashes`` also checks the sha256 of every file.

        ``target`` names what ``mythos-edge build`` made; by default it is the first of the bundle, which is fp32 where
        the bundle was exported. ``preset`` names what ``mythos-edge tune`` found: its target, and its depth for
        every request that sets none of its own.
        ``threads`` are by default one per core. ``trust`` takes TensorRT engines that are not the files the manifest
        lists, which are native code. ``selftest`` raises SelfTestError unless this machine computes what the exporter
        saw. ``cache`` is what cached rows are kept in: fp32, or fp16 or int8, which take a half and about a quarter of
        the memory; by default the target's own, which is fp32 on a CPU.
        Raises BundleError, BackendUnavailable, UsageError.
        """
        path, hashes, trust = path_of(path, "a bundle's folder"), flag("hashes", hashes), flag("trust", trust)
        options: Any = {"target": target, "preset": preset, "threads": threads, "trust": trust, "selftest": selftest}
        return made_of_bundle(path, lambda bundle: cls.of(bundle, cache=cache, **options), hashes, trust)

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        *,
        target: str | None = None,
        preset: str | None = None,
        threads: int = 0,
        trust: bool = False,
        cache: str | None = None,
        selftest: bool = False,
    ) -> Self:
        """A bundle that is open already, and was looked at, on one of its targets; parameters and errors as ``open``.

        What stands at its path now may be another bundle, which is refused.
        """
        target, preset = name_or_none("target", target), name_or_none("preset", preset)
        trust, selftest = flag("trust", trust), flag("selftest", selftest)
        target, defaults = target_and_depth(bundle.manifest, target, preset)
        session = cls(bundle, open_backend(bundle, target, threads, trust, name_or_none("cache", cache)))
        session._defaults = defaults
        session.target = target
        if selftest:
            require_self_test(session)
            session._sequences = []  # it is no sequence to go on with
        return session

    @property
    def cache(self) -> str:
        """The form in which it keeps cached rows: fp32, fp16, bf16 or int8."""
        return self.backend.memory.cache

    @last_turn
    def close(self) -> None:
        """Gives back the caches and the graphs; again is nothing."""
        self._change()  # what is half read holds caches, too
        self._sequences = []
        self.backend.close()

    @in_turn
    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # What a call that still runs elsewhere says must not hide the error under way.
        with suppress(UsageError) if kind is not None else nullcontext():
            self.close()

    def _options(self, values: Mapping[str, object]) -> Options:
        """The request, with the preset's depth where it sets none of its own."""
        check_names(Options, values)
        given = {name: value for name, value in values.items() if value is not None or name not in self._defaults}
        return Options(**{**self._defaults, **given})

    @in_turn
    def plan(self, context: int | None = None, batch: int = 1, max_depth: int | None = None) -> CachePlan:
        """The cache memory of ``context`` tokens (by default the longest) before anything is allocated."""
        room = Within(least=1, most=self.max_context)
        tokens = self.max_context if context is None else whole("context", context, room)
        depth = self.model.max_depth if max_depth is None else whole("max_depth", max_depth, LOOP_STEPS)
        return plan_in(self.backend.memory, self.model, depth, tokens, whole("batch", batch, _COUNT))

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        resume: bool = False,
        seeds: Sequence[int] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: Prompts,
        *,
        resume: bool = False,
        seeds: Sequence[int] | None = None,
        each: Sequence[RequestOptions] | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Generation]: ...
    @in_turn
    def generate(
        self,
        prompt: Any,
        *,
        resume: bool = False,
        seeds: Sequence[int] | None = None,
        each: Sequence[RequestOptions] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generation | list[Generation]:
        """The Generation for a prompt (text or token ids), or a list of them for a list of prompts.

        ``options`` are the fields of Options. The prompts of a list run together, and each generates what it would
        alone, with the same seed, or with its own of ``seeds``; ``each`` gives every prompt options of its own, which
        win over ``options``. ``resume`` appends the prompt (which may be empty) to
        the sequence of the call before, without the tokens that the tokenizer puts around a first one, but with the
        space that some put before every text. Raises UsageError, CapacityError.
        """
        prompts, many = separate(prompt)
        results = [Generation() for _ in prompts]
        wanted = [self._options(own) for own in options_of_each(len(prompts), options, each, seeds)]
        decodings = self._begin(prompts, results, resume, wanted)
        if seeds is not None:
            for sequence, one in zip(self._sequences, wanted, strict=True):
                sequence.sampler = Sampler(one.sampling)
        if len(decodings) == 1:
            run_alone(decodings[0].whole(), self.backend, decodings[0].note)
            return results if many else results[0]
        _, runs = run_together([decoding.whole() for decoding in decodings], self.backend)
        for result in results:
            result.batch_runs = runs["step"]
        return results

    @in_turn
    def stream(self, prompt: Prompt, *, resume: bool = False, **options: Unpack[RequestOptions]) -> TokenStream:
        """The tokens of one prompt as they come; parameters and errors as in ``generate``.

        The sequence begins with this call, and holds what has been given out, so that a half-read stream may be left.
        One whose sequence another call changes (``generate``, ``stream``, ``score``, ``rollback``, ``restore``) ends
        with a UsageError at its next token. ``last_generation`` is what has come so far, with its figures.
        """
        prompts, many = separate(prompt)
        if many:
            raise UsageError(f"a stream has one prompt, got a list of {len(prompts)}: use generate")
        result = Generation()
        (decoding,) = self._begin(prompts, [result], resume, [self._options(options)])
        self.last_generation = result
        stream = TokenStream(self._turns, self.backend, decoding)
        self._stream = weakref.ref(stream)
        return stream

    @in_turn
    def check(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> list[int]:
        """The token ids of a prompt that ``generate`` would take with these options; raises what it would refuse.

        Whether there is memory for it is not asked.
        """
        ids = ids_of(prompt, self.model, self.tokenizer, first=True)
        self._checked(self._options(options))
        check_length(len(ids), self.max_context)
        return ids

    @in_turn
    def score(
        self,
        ids: Any,
        *,
        prefill: int | None = None,
        progress: Callable[[float], None] = lambda fraction: None,
        **options: Unpack[ScoreOptions],
    ) -> Score:
        """Logits and depth of every position of ``ids (B, S)``: the first ``prefill`` in one chunk (by default
        all), the rest one at a time, as decoding would. ``progress`` is told the share that is done; ``options``
        are the depth fields of Options, and ``max_lag``. Raises UsageError, CapacityError."""
        ids = checked_ids(ids, self.model)
        positions = ids.shape[1]
        prefill = positions if prefill is None else whole("prefill", prefill)
        if not 0 <= prefill <= positions:
            raise UsageError(f"prefill is {prefill}, expected 0 .. {positions}, the positions given")
        meaningless = sorted(set(options) & RequestOptions.__annotations__.keys() - ScoreOptions.__annotations__.keys())
        if meaningless:
            raise UsageError(f"score chooses no tokens, and {meaningless[0]} means nothing to it: leave it out")
        wanted = self._options({**options, "chunk": max(1, prefill)})
        self._start(ids.tolist(), [wanted.depth.resolve(self.model)] * len(ids), [wanted] * len(ids))
        spans = list(spans_of(prefill, positions))
        first, *others = self._sequences
        works = [scoring(first, spans, progress), *(scoring(other, spans, lambda fraction: None) for other in others)]
        scored, runs = run_together(works, self.backend)
        return score_of(scored, self._sequences, runs["step"])

    @property
    @in_turn
    def ids(self) -> list[int]:
        """The tokens of the present sequence, prompt and generated; a session with several has no such list."""
        return list(self._only_sequence().ids)

    @property
    @in_turn
    def begun_with(self) -> RequestOptions:
        """The depth and sampling options of the present sequence; with them ``resume`` goes on as if it never ended."""
        sequence = self._only_sequence()
        return cast(RequestOptions, {**asdict(sequence.staircase.depth), **asdict(sequence.sampler.params)})

    @property
    @in_turn
    def rollback_floor(self) -> int:
        """The fewest positions, besides none, that ``rollback`` goes back to: layers with a window give up rows."""
        return self._only_sequence().staircase.rollback_floor

    @in_turn
    def rollback(self, length: int) -> None:
        """Forgets the present sequence from position ``length`` on; no cache is copied. At least ``rollback_floor``."""
        sequence, length = self._only_sequence(), whole("length", length)
        sequence.check_rollback(length)
        self._change()
        sequence.rollback(length)

    @in_turn
    def flush(self, until: Callable[[], bool] = lambda: False) -> None:
        """Catches up every loop step while nobody waits, so that the next token has nothing to wait for.

        ``until`` is asked before each loop step, and ends it there when it says so.
        """
        self._only_sequence().staircase.flush(until)

    @in_turn
    def save(self, path: Path | str) -> None:
        """Writes the present sequence (tokens, caches, random state) to ``path``; the file appears whole or not.

        Raises UsageError.
        """
        path = path_of(path, "the file to write")
        sequence = self._only_sequence()
        # An interrupt may have fallen between the caches and the list of tokens.
        sequence.staircase.rollback(len(sequence.ids))
        saved_state.write(
            path, self.bundle.weights_identity(self.target), sequence.ids, sequence.sampler, sequence.staircase
        )

    @in_turn
    def restore(self, path: Path | str) -> None:
        """Takes up a sequence written by ``save`` with the same bundle and target; go on with ``resume=True``.

        Raises UsageError when the file is damaged or belongs to other weights; the session is then as it was.
        """
        path = path_of(path, "a file that save wrote")
        saved = saved_state.read(path, self.bundle.weights_identity(self.target), self.model, self.max_context)
        saved_state.require_cache(path, saved, self.cache)
        sequence = TokenSequence(saved.ids, self._new_staircase(saved.depth, None), Sampler(saved.sampling))
        try:
            sequence.staircase.restore(saved.arrays)
        except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
            raise saved_state.damaged(path, error) from error
        sequence.sampler.restore(saved.sampler_state)
        self._change()
        self._sequences = [sequence]

    def _change(self) -> None:
        """To be called before the sequences change: a stream that is half read would go on with another one."""
        stream = None if self._stream is None else self._stream()
        if stream is not None:
            stream.end(f"{self._turns.call} changed its sequence")
        self._stream = None

    def _begin(
        self, prompts: Sequence[Any], results: list[Generation], resume: bool, options: list[Options]
    ) -> list[Decoding]:
        """The requests at work on the prompts, each filling in its own of ``results``."""
        resume = flag("resume", resume)
        goes_on = resume and any(sequence.ids for sequence in self._sequences)
        encoded = [ids_of(prompt, self.model, self.tokenizer, first=not goes_on) for prompt in prompts]
        # Nothing of the session changes before everything that can be refused was.
        texts, depths = zip(*map(self._checked, options), strict=True)
        tuners = [self._tuner(one, depth, len(encoded)) for one, depth in zip(options, depths, strict=True)]
        self._take_prompts(encoded, resume, options, depths)
        return [
            Decoding(sequence, one, (*self._stop_ids(one), *text.stop_ids), text, result, tuner)
            for sequence, one, text, result, tuner in zip(self._sequences, options, texts, results, tuners, strict=True)
        ]

    def _checked(self, options: Options) -> tuple[TextSoFar, ResolvedDepth]:
        """The text and the depth of a request. Raises UsageError for one that this bundle cannot do."""
        text = TextSoFar(self.tokenizer, options)
        check_range(() if options.stop_ids is None else options.stop_ids, self.model, "stop id")
        depth = options.depth.resolve(self.model)
        check_draft(options.draft_depth, depth)
        return text, depth

    def _tuner(self, options: Options, depth: ResolvedDepth, prompts: int) -> DraftTuner | None:
        """The tuner of drafts that the options leave open. Raises UsageError where it cannot measure them."""
        wanted = options.draft_depth, options.draft_tokens
        if AUTO not in wanted:
            return None
        if prompts > 1:
            raise UsageError(f"a draft that is auto measures one sequence alone, got {prompts} prompts: give numbers")
        free = [None if number == AUTO else number for number in wanted]
        return self._tuners.of(depth, *free)

    def _take_prompts(
        self, encoded: list[list[int]], resume: bool, each: list[Options], depths: Sequence[ResolvedDepth]
    ) -> None:
        if not resume:
            self._start(encoded, depths, each, generating=True)
            return
        sequence, options, depth = self._only_sequence(), each[0], depths[0]
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
        check_length(len(ids), self.max_context)
        self._check_memory(len(ids) + options.max_new_tokens, [options], depth, sequence.staircase.nbytes)
        self._change()
        # An interrupt may have left more cached columns than tokens; they are of other tokens than those to come.
        sequence.staircase.rollback(len(sequence.ids))
        sequence.staircase.expect(len(ids) + options.max_new_tokens)
        sequence.ids, sequence.staircase.max_lag = ids, options.max_lag
        if options.sampling != sequence.sampler.params:
            sequence.sampler = Sampler(options.sampling)

    def _start(
        self,
        encoded: list[list[int]],
        depths: Sequence[ResolvedDepth],
        each: Sequence[Options],
        generating: bool = False,
    ) -> None:
        for ids in encoded:
            check_length(len(ids), self.max_context)
        columns = [len(ids) + generating * one.max_new_tokens for ids, one in zip(encoded, each, strict=True)]
        held = sum(sequence.staircase.nbytes for sequence in self._sequences)
        deepest = max(depths, key=lambda depth: depth.max_depth)
        self._check_memory(max(columns), each, deepest, held)
        self._change()
        self._sequences = []
        self._sequences = [
            TokenSequence(list(ids), self._new_staircase(depth, one.max_lag), Sampler(one.sampling))
            for ids, depth, one in zip(encoded, depths, each, strict=True)
        ]
        for sequence, count in zip(self._sequences, columns, strict=True):
            sequence.staircase.expect(count)

    def _new_staircase(self, depth: ResolvedDepth, max_lag: int | None) -> Staircase:
        return Staircase(self.backend, self.model, depth, self.max_context, max_lag)

    def _check_memory(self, columns: int, each: Sequence[Options], depth: ResolvedDepth, held: int) -> None:
        memory, context, chunk = self.backend.memory, min(columns, self.max_context), max(one.chunk for one in each)
        plan = plan_in(memory, self.model, depth.max_depth, context, len(each), chunk)
        require_memory(plan, held, memory.free_bytes())

    def _stop_ids(self, options: Options) -> tuple[int, ...]:
        ends = self.bundle.manifest.end_tokens
        return tuple(token.id for token in ends) if options.stop_ids is None else options.stop_ids

    def _only_sequence(self) -> TokenSequence:
        if len(self._sequences) != 1:
            what = f"{len(self._sequences)} sequences" if self._sequences else "no sequence yet"
            raise UsageError(f"this needs a session with one sequence, but it has {what}: generate from one prompt")
        return self._sequences[0]
