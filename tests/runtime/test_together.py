"""Several sequences at once: each gets what it gets alone, and a run is shared by all who wait for its stage."""

from typing import Any

import numpy as np
import pytest
from fakes.scripted_backend import ScriptedBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import DEPTHS, LOOPS, VOCAB, staircase

from mythos_edge.model.stages import MAX_TOGETHER
from mythos_edge.runtime import together
from mythos_edge.runtime.staircase import Fed, Staircase
from mythos_edge.runtime.together import Together, Work, run_alone, run_together

prompts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), min_size=1, max_size=11)


def fed_in_turn(stairs: Staircase, ids: list[int], chunk: int) -> Work[list[Fed]]:
    """The work of feeding ``ids`` in chunks."""
    fed = []
    for start in range(0, len(ids), chunk):
        piece = np.array([ids[start : start + chunk]])
        fed.append((yield from stairs.feeding(piece, np.arange(piece.shape[1]))))
    return fed


@settings(max_examples=60, deadline=None)
@given(prompts=prompts, chunk=st.integers(1, 4), policy=st.sampled_from(["exact", "full", "last"]), lag=st.booleans())
def test_every_sequence_gets_what_it_gets_alone(prompts: list[list[int]], chunk: int, policy: str, lag: bool) -> None:
    backend = ScriptedBackend(DEPTHS, VOCAB)
    stairs = [staircase(policy, max_lag=2 if lag else None, backend=backend) for _ in prompts]
    made, runs = run_together([fed_in_turn(*both, chunk) for both in zip(stairs, prompts, strict=True)], backend)
    for ids, one, fed in zip(prompts, stairs, made, strict=True):
        alone = staircase(policy, max_lag=2 if lag else None)
        expected = run_alone(fed_in_turn(alone, ids, chunk), alone._backend)
        for found, wanted in zip(fed, expected, strict=True):
            np.testing.assert_array_equal(found.logits, wanted.logits)
            np.testing.assert_array_equal(found.depth, wanted.depth)
        assert (one.block_calls, one.block_rows, one.lengths) == (alone.block_calls, alone.block_rows, alone.lengths)
    assert runs["step"] == sum(stage == "step" for stage, _ in backend.calls)
    assert max(one.block_calls for one in stairs) <= runs["step"] <= sum(one.block_calls for one in stairs)


def decoded_together(count: int, token: int, tokens: int) -> tuple[ScriptedBackend, dict[str, int]]:
    backend = ScriptedBackend(DEPTHS, VOCAB)
    works = [fed_in_turn(staircase(backend=backend), [token] * tokens, 1) for _ in range(count)]
    return backend, dict(run_together(works, backend)[1])


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (2, 1), (MAX_TOGETHER, 1), (MAX_TOGETHER + 1, 2), (17, 3)])
def test_equal_sequences_share_runs_as_far_as_one_takes_them(count: int, groups: int) -> None:
    backend, runs = decoded_together(count, token=5, tokens=3)
    for stage, calls in (("prelude", 3), ("step", 3 * LOOPS), ("coda", 3)):
        # Groups need not stay together, so those left over by one share the next.
        assert calls * count / MAX_TOGETHER <= runs[stage] <= calls * groups
    assert max(rows for _, rows in backend.calls) <= MAX_TOGETHER


def test_a_deep_sequence_is_joined_by_those_that_went_ahead() -> None:
    """Two shallow ones fetch their next tokens before they go on with the deep one: the majority decides."""
    backend = ScriptedBackend(DEPTHS, VOCAB)
    works = [fed_in_turn(staircase(backend=backend), ids, 1) for ids in ([5, 5], [0, 4, 4], [0, 4, 4])]
    _, runs = run_together(works, backend)
    assert runs["step"] < 2 * LOOPS + 4


def test_a_rare_kind_is_not_put_off_for_ever() -> None:
    """Two long sequences agree on every run; the one of another least depth gets its share nevertheless."""
    backend = ScriptedBackend(DEPTHS, VOCAB)
    both: Together[list[Fed]] = Together(backend)
    for number in range(2):
        both.join(number, fed_in_turn(staircase(backend=backend), [6] * 190, 1))
    both.join(2, fed_in_turn(staircase(backend=backend, min_depth=2), [5] * 3, 1))
    calls_of_the_rare = 3 * (LOOPS + 2)
    for _ in range(calls_of_the_rare * (together.PATIENCE + 1)):
        both.round()
    assert 2 in both.results
    assert len(both) == 2
    both.close()


def test_prompts_share_a_run_as_far_as_its_rows_go(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, shared in ((512, 1), (10, 2), (14, 2), (1, 4)):
        monkeypatch.setattr(together, "MAX_ROWS", limit)
        backend = ScriptedBackend(DEPTHS, VOCAB)
        works = [fed_in_turn(staircase(backend=backend), [1, 2, 3, 4, 5], 5) for _ in range(4)]
        _, runs = run_together(works, backend)
        assert runs["prelude"] == shared


class Failing(ScriptedBackend):
    """Stops at the third run of the coda, as Ctrl-C would."""

    failing = True

    def run(self, stage: str, feeds: Any, outputs: Any) -> None:
        if self.failing and stage == "coda" and sum(name == "coda" for name, _ in self.calls) == 2:
            raise KeyboardInterrupt
        super().run(stage, feeds, outputs)


@pytest.mark.parametrize("count", [1, 3])
def test_an_interrupt_leaves_every_sequence_as_after_its_last_token(count: int) -> None:
    backend = Failing(DEPTHS, VOCAB)
    stairs = [staircase(backend=backend) for _ in range(count)]
    with pytest.raises(KeyboardInterrupt):
        run_together([fed_in_turn(one, [3, 1, 2, 5], 1) for one in stairs], backend)
    backend.failing = False
    for one in stairs:
        known = [3, 1, 2, 5][: one.columns]
        expected = run_alone(fed_in_turn(staircase(), [*known, 6], 1), ScriptedBackend(DEPTHS, VOCAB))[-1]
        np.testing.assert_array_equal(one.feed(np.array([[6]]), np.array([0])).logits, expected.logits)
