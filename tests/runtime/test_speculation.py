"""Self-speculation on the scripted network: the tokens of plain decoding, in the calls that were promised."""

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from fakes.scripted_backend import ScriptedBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import DEPTHS, LOOPS, VOCAB, Leaning, staircase

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.caches import ColumnBuffer
from mythos_edge.runtime.decoding import Decoding, Generation, Options, TextSoFar, TokenSequence
from mythos_edge.runtime.halting import Policy, ResolvedDepth
from mythos_edge.runtime.sampling import Sampler, SamplingParams
from mythos_edge.runtime.speculation import check_draft
from mythos_edge.runtime.together import run_alone, run_together

CONTEXT = 200


def begun(prompt: list[int], backend: Backend, options: Options) -> TokenSequence:
    stairs = staircase(options.policy, max_lag=options.max_lag, backend=backend)
    return TokenSequence(list(prompt), stairs, Sampler(options.sampling))


def continued(sequences: list[TokenSequence], backend: Backend, options: list[Options]) -> list[Generation]:
    """What the next request on each sequence gives: one alone, several together."""
    results = [Generation() for _ in sequences]
    works = [
        Decoding(sequence, wanted, wanted.stop_ids or (), TextSoFar(None, wanted), result).whole()
        for sequence, wanted, result in zip(sequences, options, results, strict=True)
    ]
    if len(works) == 1:
        run_alone(works[0], backend)
    else:
        run_together(works, backend)
    return results


def generated(prompt: list[int], backend: Backend, **options: Any) -> Generation:
    wanted = Options(**options)
    return continued([begun(prompt, backend, wanted)], backend, [wanted])[0]


def alternatives(made: Generation) -> list[list[tuple[int, Any]]]:
    return [[(one.id, pytest.approx(one.logprob)) for one in top] for top in made.top_logprobs]


drafts = st.one_of(
    st.just({}), st.fixed_dictionaries({"draft_depth": st.integers(1, 4), "draft_tokens": st.integers(1, 6)})
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("generate"), st.integers(1, 12), st.lists(drafts, min_size=3, max_size=3)),
        st.tuples(st.just("rollback"), st.floats(0, 1), st.none()),
        st.tuples(st.just("flush"), st.none(), st.none()),
        st.tuples(st.just("save and restore"), st.none(), st.none()),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6), min_size=1, max_size=3),
    actions=actions,
    policy=st.sampled_from(["exact", "full"]),
    max_lag=st.sampled_from([None, 1, 3]),
    stop=st.sampled_from([(), (3,)]),
    lean=st.sampled_from([0.0, 0.5, 1.0]),
    favourite=st.sampled_from([4, 6, 8]),
    top=st.sampled_from([0, 1, 4]),
)
def test_any_mixture_gives_the_tokens_and_depths_of_plain_decoding(
    prompts: list[list[int]],
    actions: list[tuple[str, Any, Any]],
    policy: str,
    max_lag: int | None,
    stop: tuple[int, ...],
    lean: float,
    favourite: int,
    top: int,
) -> None:
    backend = Leaning(favourite, lean)
    given_options: dict[str, Any] = {"policy": policy, "max_lag": max_lag, "stop_ids": stop}
    sequences = [begun(prompt, backend, Options(**given_options)) for prompt in prompts]
    plain = [begun(prompt, backend, Options(policy=policy)) for prompt in prompts]
    for action, value, chosen in actions:
        if action == "generate":
            given_options["top_logprobs"] = top
            wanted = [Options(max_new_tokens=value, **given_options, **draft) for draft in chosen[: len(prompts)]]
            found = continued(sequences, backend, wanted)
            for one, reference in zip(found, plain, strict=True):
                simple = Options(max_new_tokens=value, policy=policy, stop_ids=stop, top_logprobs=top)
                (expected,) = continued([reference], backend, [simple])
                assert (one.ids, one.depths) == (expected.ids, expected.depths)
                assert (one.finish_reason, one.logprobs) == (expected.finish_reason, pytest.approx(expected.logprobs))
                assert one.accepted <= one.drafted
                assert alternatives(one) == alternatives(expected)
                assert len(one.top_logprobs) == (len(one.ids) if top else 0)
        for sequence in [*sequences, *plain]:
            if action == "rollback":
                keep = max(1, int(value * len(sequence.ids)))
                sequence.staircase.rollback(keep)
                del sequence.ids[keep:]
            elif action == "flush":
                sequence.staircase.flush()
            elif action == "save and restore":
                saved = sequence.staircase.state()
                sequence.staircase = staircase(policy, max_lag=max_lag, backend=backend)
                sequence.staircase.restore(saved)
        for sequence, reference in zip(sequences, plain, strict=True):
            assert sequence.ids == reference.ids
            assert sequence.staircase.columns <= len(sequence.ids)
            lengths = [sequence.staircase.columns, *sequence.staircase.lengths]
            assert lengths == sorted(lengths, reverse=True)
            assert policy == "exact" or len(set(lengths)) == 1


@pytest.mark.parametrize("policy", ["exact", "full"])
@pytest.mark.parametrize(("depth", "count"), [(1, 2), (2, 3), (3, 4), (4, 8)])
def test_with_everything_accepted_the_calls_are_those_promised(policy: str, depth: int, count: int) -> None:
    backend = Leaning(6, 10.0)  # always the token that takes every step
    options = {"policy": policy, "draft_depth": depth, "draft_tokens": count}
    made = generated([6], backend, max_new_tokens=1 + 3 * count, **options)
    assert made.ids == [6] * (1 + 3 * count)
    assert made.block_calls == LOOPS + 3 * (count * depth + (LOOPS - depth))
    assert (made.drafted, made.accepted, made.rolled_back_rows) == (3 * count, 3 * count, 0)
    assert made.block_rows == LOOPS * (1 + 3 * count)


def test_a_token_that_halts_within_the_draft_needs_no_verification() -> None:
    backend = Leaning(1, 10.0)
    made = generated([1], backend, max_new_tokens=10, draft_depth=2, draft_tokens=4)
    assert (made.drafted, made.block_calls) == (0, 10)
    assert Counter(stage for stage, _ in backend.calls)["coda"] == 10


def test_rejected_tokens_are_counted_and_their_rows_rolled_back() -> None:
    backend = ScriptedBackend(DEPTHS, VOCAB)
    options = Options(max_new_tokens=30, draft_depth=1, draft_tokens=4)
    sequence = begun([6, 4], backend, options)
    (made,) = continued([sequence], backend, [options])
    assert 0 < made.accepted < made.drafted
    assert made.rolled_back_rows > 0
    assert made.block_rows - made.rolled_back_rows == sum(sequence.staircase.lengths)


def test_a_draft_ends_with_the_tokens_asked_for_and_with_the_context() -> None:
    backend = Leaning(6, 10.0)
    options = Options(max_new_tokens=300, draft_depth=2, draft_tokens=7)
    sequence = begun([6] * 180, backend, options)
    (made,) = continued([sequence], backend, [options])
    assert (made.finish_reason, len(sequence.ids), sequence.staircase.columns) == ("context", CONTEXT + 1, CONTEXT)
    assert len(generated([6], backend, max_new_tokens=5, draft_depth=2, draft_tokens=7).ids) == 5


def test_a_stop_within_a_draft_leaves_nothing_beyond_it() -> None:
    backend = Leaning(6, 10.0)
    options = Options(max_new_tokens=20, draft_depth=2, draft_tokens=7, stop_ids=(6,))
    sequence = begun([5], backend, options)
    continued([sequence], backend, [Options(max_new_tokens=1)])
    (made,) = continued([sequence], backend, [Options(max_new_tokens=1)])
    (made,) = continued([sequence], backend, [options])
    assert (made.ids, made.finish_reason) == ([6], "stop_id")
    assert sequence.staircase.columns == len(sequence.ids) - 1


@pytest.mark.parametrize("stop_at", range(12))
def test_an_interrupt_within_a_round_leaves_the_tokens_drawn_before(stop_at: int) -> None:
    class Interrupting(Leaning):
        left = 1000

        def run(self, stage: str, feeds: Any, outputs: Any) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            super().run(stage, feeds, outputs)

    backend = Interrupting(6, 10.0)
    options = Options(max_new_tokens=8, draft_depth=2, draft_tokens=3)
    sequence = begun([6, 3], backend, options)
    expected = generated([6, 3], backend, max_new_tokens=8).ids
    backend.left = 10 + stop_at
    with pytest.raises(KeyboardInterrupt):
        continued([sequence], backend, [options])
    backend.left = 1000
    assert not sequence.staircase.drafted
    drawn = sequence.ids[2:]
    assert drawn + continued([sequence], backend, [options])[0].ids == (expected + [6] * len(drawn))[: 8 + len(drawn)]


PARAMS = [
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 0.7, "top_p": 0.6, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("policy", ["exact", "full"])
def test_drawn_tokens_have_the_distribution_of_plain_decoding(params: dict[str, Any], policy: str) -> None:
    backend, prompt, count = Leaning(4, 0.4), [6, 2], 1200
    expected = sequence_probabilities(prompt, Sampler(SamplingParams(**params)), 3)
    options = Options(policy=policy, max_new_tokens=3, draft_depth=1, draft_tokens=3, seed=5, **params)
    sequence = begun(prompt, backend, options)
    found: Counter[tuple[int, ...]] = Counter()
    drafted = accepted = 0
    for _ in range(count):
        sequence.ids = list(prompt)
        (made,) = continued([sequence], backend, [options])
        found[tuple(made.ids)] += 1
        drafted, accepted = drafted + made.drafted, accepted + made.accepted
    assert 0.1 < accepted / drafted < 0.9
    assert set(found) <= set(expected)
    # Rare outcomes are one cell.
    cells = [ids for ids, share in expected.items() if share * count >= 5]
    counts = np.array([found[ids] for ids in cells])
    means = np.array([expected[ids] * count for ids in cells])
    counts, means = np.append(counts, count - counts.sum()), np.append(means, count - means.sum() + 1e-9)
    chi_square, freedom = ((counts - means) ** 2 / np.maximum(means, 1)).sum(), len(means) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def sequence_probabilities(prompt: list[int], sampler: Sampler, count: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation by ``count`` tokens."""
    found = {(): 1.0}
    for _ in range(count):
        longer = {}
        for ids, share in found.items():
            history = [*prompt, *ids]
            fed = staircase("full", backend=Leaning(4, 0.4)).feed(np.array([history]), np.array([len(history) - 1]))
            for token, chance in enumerate(sampler.distribution(fed.logits[0, 0], history)):
                if chance:
                    longer[*ids, token] = share * float(chance)
        found = longer
    return found


@pytest.mark.parametrize("draft", [{}, {"draft_depth": 2, "draft_tokens": 4}])
def test_a_decoded_token_copies_its_own_rows_and_no_cache(
    draft: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values copied into buffers and moved by growing them, for the first and for the later tokens."""
    copied = 0

    def counting(method: Any, size: Any) -> Any:
        def call(buffer: ColumnBuffer, *args: Any) -> Any:
            nonlocal copied
            copied += size(buffer, *args)
            return method(buffer, *args)

        return call

    monkeypatch.setattr(ColumnBuffer, "append", counting(ColumnBuffer.append, lambda _, rows: rows.size))
    monkeypatch.setattr(ColumnBuffer, "write", counting(ColumnBuffer.write, lambda _, column, rows: rows.size))
    backend = Leaning(6, 0.8)
    options = Options(max_new_tokens=60, **draft)
    sequence = begun([6], backend, options)
    (made,) = continued([sequence], backend, [options])
    early, copied = copied, 0
    (later,) = continued([sequence], backend, [options])
    # h and e of every column, and h again at every loop step.
    per_row = (early / made.block_rows, copied / later.block_rows)
    assert max(per_row) < 2 * 2
    assert per_row[1] < 1.2 * per_row[0]


def array_bytes() -> int:
    arrays = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces)


@pytest.mark.parametrize("draft", [{}, {"draft_depth": 2, "draft_tokens": 4}])
def test_memory_of_arrays_stays_flat_while_decoding(draft: dict[str, Any]) -> None:
    backend = Leaning(6, 0.8)
    options = Options(max_new_tokens=20, **draft)
    sequence = begun([6] * 140, backend, options)  # buffers for 128 columns have grown to the limit
    tracemalloc.start()
    try:
        continued([sequence], backend, [options])
        held = array_bytes()
        continued([sequence], backend, [options])
        assert array_bytes() - held < 256
    finally:
        tracemalloc.stop()


BOUNDS = ResolvedDepth(Policy.EXACT, LOOPS, 2, 0.99)


def test_what_cannot_be_drafted_is_refused_in_one_line() -> None:
    check_draft(None, ResolvedDepth(Policy.LAST, 1, 1, 0.99))
    check_draft(4, BOUNDS)
    check_draft("auto", BOUNDS)
    for depth in (1, 5, 9):
        with pytest.raises(UsageError, match=rf"^draft_depth is {depth}, expected 2 .. 4: at least min_depth and less"):
            check_draft(depth, BOUNDS)
    for depth in (2, "auto"):
        with pytest.raises(UsageError, match=r"^policy is last, which keeps no exact cache rows"):
            check_draft(depth, ResolvedDepth(Policy.LAST, LOOPS, 1, 0.99))
    with pytest.raises(UsageError, match=r"^draft_tokens is 0, expected at least 1"):
        Options(draft_depth=2, draft_tokens=0)
    with pytest.raises(UsageError, match=r"^draft_tokens is 3 without draft_depth"):
        Options(draft_tokens=3)
