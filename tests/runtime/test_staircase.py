"""The staircase with a scripted network: exact equals full after anything, and calls follow depth."""

import numpy as np
import pytest
from fakes.scripted_backend import ScriptedBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import DEPTHS, LOOPS, VOCAB, staircase

from mythos_edge.model.errors import CapacityError, UsageError
from mythos_edge.runtime.caches import ColumnBuffer
from mythos_edge.runtime.staircase import Fed, Staircase


def feed(stairs: Staircase, ids: list[int] | np.ndarray) -> Fed:
    chunk = np.atleast_2d(np.array(ids))
    return stairs.feed(chunk, np.arange(chunk.shape[1]))


def full_logits(ids: list[int], min_depth: int = 1) -> Fed:
    return feed(staircase("full", min_depth=min_depth), ids)


def assert_staircase(stairs: Staircase) -> None:
    lengths = stairs.lengths
    assert lengths == sorted(lengths, reverse=True)
    assert all(length <= stairs.columns for length in lengths)


tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
schedule = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), tokens),
        st.tuples(st.just("decode"), st.integers(0, VOCAB - 1)),
        st.tuples(st.just("rollback"), st.floats(0, 1)),
        st.tuples(st.just("flush"), st.none()),
        st.tuples(st.just("save and restore"), st.none()),
    ),
    max_size=14,
)


@settings(max_examples=200, deadline=None)
@given(start=tokens, actions=schedule, max_lag=st.sampled_from([None, 1, 3]))
def test_exact_equals_full_after_any_schedule(
    start: list[int], actions: list[tuple[str, object]], max_lag: int | None
) -> None:
    stairs, ids = staircase(max_lag=max_lag), list(start)
    feed(stairs, ids)
    for action, value in actions:
        if action == "feed" or action == "decode":
            new = value if isinstance(value, list) else [value]
            fed = feed(stairs, new)
            ids += new
            wanted = full_logits(ids)
            assert fed.depth[0].tolist() == wanted.depth[0, -len(new) :].tolist()
            np.testing.assert_allclose(fed.logits, wanted.logits[:, -len(new) :], atol=2e-4)
        elif action == "rollback":
            keep = int(float(value) * len(ids))
            stairs.rollback(keep)
            del ids[keep:]
        elif action == "flush":
            stairs.flush()
            assert stairs.lengths == [len(ids)] * LOOPS
        else:
            saved = stairs.state()
            stairs = staircase(max_lag=max_lag)
            stairs.restore(saved)
        assert stairs.columns == len(ids)
        assert_staircase(stairs)


def test_block_calls_of_a_decoded_token_equal_its_depth() -> None:
    stairs = staircase()
    feed(stairs, [0])
    for token, depth in [(1, 1), (3, 3), (0, 1), (5, 5), (6, LOOPS), (2, 2)]:
        before = stairs.block_calls
        assert feed(stairs, [token]).depth.tolist() == [[depth]]
        assert stairs.block_calls - before == depth


def test_catching_up_shares_the_call_of_the_token_that_needs_it() -> None:
    stairs = staircase()
    feed(stairs, [0])
    for _ in range(6):
        feed(stairs, [1])
    assert stairs.lengths == [7, 0, 0, 0, 0]
    rows, calls = stairs.block_rows, stairs.block_calls
    feed(stairs, [3])
    # Step 0 runs the new row; steps 1 and 2 run all eight, in one call each.
    assert (stairs.block_calls - calls, stairs.block_rows - rows) == (3, 1 + 8 + 8)
    assert stairs.catch_up_calls == 0


def test_max_lag_catches_up_one_call_a_token() -> None:
    stairs = staircase(max_lag=2)
    for _ in range(20):
        before = stairs.block_calls
        feed(stairs, [1])
        assert stairs.block_calls - before <= 2
    assert stairs.columns - stairs.lengths[1] <= 3
    assert stairs.catch_up_calls > 0


def test_flush_leaves_nothing_to_catch_up_and_no_pending_memory() -> None:
    stairs = staircase()
    for _ in range(100):
        feed(stairs, [1])
    held = stairs.nbytes
    stairs.flush()
    assert stairs.lengths == [100] * LOOPS
    assert stairs.nbytes < held + 4 * 2 * 128 * 4
    rows = stairs.block_rows
    feed(stairs, [5])
    assert stairs.block_rows - rows == LOOPS


def test_deep_slots_take_no_memory_before_their_first_use() -> None:
    stairs = staircase()
    feed(stairs, [1, 1, 1])
    assert [slots[1].nbytes > 0 for slots in stairs.loop_slots] == [True, False, False, False, False]


def test_prefill_stops_when_every_position_has_halted() -> None:
    stairs = staircase()
    feed(stairs, [1, 3, 1, 1])
    # Steps 1 and 2 run for the first two positions only.
    assert stairs.lengths == [4, 2, 2, 0, 0]
    assert stairs.block_calls == 3


def test_min_depth_holds_positions_back() -> None:
    fed = feed(staircase(min_depth=3), [1, 2, 5])
    assert fed.depth.tolist() == [[3, 3, 5]]


def test_policy_last_copies_rows_and_keeps_nothing_pending() -> None:
    stairs = staircase("last")
    for token in [1, 3, 1, 1]:
        before = stairs.block_calls
        fed = feed(stairs, [token])
        assert stairs.block_calls - before == fed.depth[0, 0]
        assert stairs.lengths == [stairs.columns] * LOOPS
    for layer in range(2):
        copied = stairs.loop_slots[0][layer].view(2, 4)
        np.testing.assert_array_equal(stairs.loop_slots[4][layer].view(2, 4), copied)


def test_rollback_then_other_tokens_is_as_if_they_had_always_been_there() -> None:
    stairs = staircase()
    feed(stairs, [1, 5, 2, 6, 1])
    stairs.rollback(2)
    fed = feed(stairs, [3, 4])
    np.testing.assert_allclose(fed.logits, full_logits([1, 5, 3, 4]).logits[:, 2:], atol=2e-4)


def test_beyond_the_context_is_an_error_that_changes_nothing() -> None:
    stairs = staircase()
    feed(stairs, [1] * 200)
    with pytest.raises(CapacityError, match="201 positions are needed; this bundle was exported for 200"):
        feed(stairs, [1])
    assert stairs.columns == 200


class Interrupting(ScriptedBackend):
    """Stops at the given run of a stage, as Ctrl-C would."""

    stop_at: tuple[str, int] | None = None

    def run(self, stage, feeds, outputs):
        if self.stop_at == (stage, sum(name == stage for name, _ in self.calls)):
            raise KeyboardInterrupt
        super().run(stage, feeds, outputs)


@pytest.mark.parametrize(("stage", "number"), [("prelude", 1), ("step", 3), ("step", 5), ("coda", 1)])
def test_an_interrupted_feed_leaves_the_sequence_as_it_was(stage: str, number: int) -> None:
    backend = Interrupting(DEPTHS, VOCAB)
    stairs = staircase(backend=backend)
    feed(stairs, [1, 3])
    backend.stop_at = (stage, number)
    with pytest.raises(KeyboardInterrupt):
        feed(stairs, [5])
    backend.stop_at = None
    assert stairs.columns == 2
    np.testing.assert_allclose(feed(stairs, [2]).logits, full_logits([1, 3, 2]).logits[:, 2:], atol=2e-4)


def test_an_interrupted_flush_can_go_on() -> None:
    backend = Interrupting(DEPTHS, VOCAB)
    stairs = staircase(backend=backend)
    feed(stairs, [1, 1, 1])
    backend.stop_at = ("step", 2)
    with pytest.raises(KeyboardInterrupt):
        stairs.flush()
    backend.stop_at = None
    stairs.flush()
    np.testing.assert_allclose(feed(stairs, [6]).logits, full_logits([1, 1, 1, 6]).logits[:, 3:], atol=2e-4)


def test_a_sequence_torn_between_slot_and_state_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stairs = staircase()
    feed(stairs, [1, 1, 1])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ColumnBuffer, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            feed(stairs, [5])
    for use in (stairs.state, stairs.flush, lambda: feed(stairs, [1])):
        with pytest.raises(UsageError, match="start a new session"):
            use()


def test_max_lag_starves_no_slot() -> None:
    stairs = staircase(max_lag=2)
    for _ in range(120):
        feed(stairs, [1])
    assert stairs.lengths[-1] > 60
    np.testing.assert_allclose(feed(stairs, [6]).logits, full_logits([1] * 120 + [6]).logits[:, -1:], atol=2e-4)


def test_a_damaged_state_is_refused() -> None:
    stairs = staircase()
    feed(stairs, [1, 3, 2])
    good = stairs.state()
    staircase().restore(good)
    for name, value in {
        "loop_0_0.data": good["loop_0_0.data"][:, :1],
        "loop_2_0.columns": np.array([0, 3]),
        "columns": np.array(2),
        "h.columns": np.array([1, 2]),
        "coda_0.columns": np.array([0, 999]),
    }.items():
        with pytest.raises(ValueError, match=r"do not fit|no staircase"):
            staircase().restore({**good, name: value})
    with pytest.raises(KeyError):
        staircase().restore({name: array for name, array in good.items() if name != "loop_0_0.data"})
