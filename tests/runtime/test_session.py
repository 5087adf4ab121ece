"""Sessions on a real bundle: prompts, batches, drafts, resuming, rollback, saving, and the memory they take."""

import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from mythos_edge.model.errors import CapacityError, UsageError
from mythos_edge.model.families.table import config_of
from mythos_edge.runtime.session import Session

PROMPT = [5, 17, 300, 2, 9]


@pytest.fixture
def session(mla_bundle: Path) -> Iterator[Session]:
    with Session.open(mla_bundle) as opened:
        yield opened


def greedy_by_scoring(session: Session, prompt: list[int], count: int, **depth: Any) -> list[int]:
    """The tokens a full pass over everything so far would choose, one after the other."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(session.score([ids], policy="full", **depth).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_full_passes(session: Session) -> None:
    wanted = greedy_by_scoring(session, PROMPT, 8)
    for options in ({}, {"policy": "full"}, {"chunk": 2}, {"max_lag": 1}):
        assert session.generate(PROMPT, max_new_tokens=8, **options).ids == wanted


def test_stream_yields_what_generate_returns(session: Session) -> None:
    whole = session.generate(PROMPT, max_new_tokens=6)
    tokens = list(session.stream(PROMPT, max_new_tokens=6))
    assert [token.id for token in tokens] == whole.ids == session.last_generation.ids
    assert [token.depth for token in tokens] == whole.depths
    assert [token.logprob for token in tokens] == pytest.approx(whole.logprobs)
    assert whole.finish_reason == "length"
    assert whole.text is None
    assert whole.ttft_ms > 0
    assert whole.decode_tokens_per_s is not None


def test_logprobs_and_depths_are_those_of_the_predicting_position(session: Session) -> None:
    made = session.generate(PROMPT, max_new_tokens=4)
    score = session.score([PROMPT + made.ids])
    positions = slice(len(PROMPT) - 1, -1)
    assert made.depths == score.depth[0, positions].tolist()
    logits = score.logits[0, positions].astype(np.float64)
    logprobs = logits[range(4), made.ids] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(made.logprobs, logprobs, atol=1e-3)


def test_the_likeliest_tokens_beside_every_token_are_those_of_the_models_logits(session: Session) -> None:
    sampled: dict[str, Any] = {"temperature": 2.0, "top_k": 3, "repetition_penalty": 1.5, "seed": 4}
    together: dict[str, Any] = {"max_new_tokens": 6, "top_logprobs": 5, **sampled}
    drafting = {"draft_depth": 2, "draft_tokens": 4}
    runs = [
        session.generate(PROMPT, **together),
        session.generate(PROMPT, **together, **drafting),
        *session.generate([PROMPT, [3]], **{**together, "top_logprobs": 1}, each=[{"top_logprobs": 5}, drafting]),
    ]
    for prompt, made in zip([PROMPT, PROMPT, PROMPT, [3]], runs, strict=True):
        logits = session.score([prompt + made.ids]).logits[0, len(prompt) - 1 : -1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert len(made.top_logprobs) == 6
        for top, wanted in zip(made.top_logprobs, logprobs, strict=True):
            assert [one.id for one in top] == np.argsort(-wanted, kind="stable")[: len(top)].tolist()
            np.testing.assert_allclose([one.logprob for one in top], np.sort(wanted)[::-1][: len(top)], atol=1e-3)
            assert {one.text for one in top} == {None}
    assert [len(one.top_logprobs[0]) for one in runs] == [5, 5, 5, 1]
    for options in (together, {**together, **drafting}):
        tokens = list(session.stream(PROMPT, **options))
        assert [token.top_logprobs for token in tokens] == session.last_generation.top_logprobs
    assert session.generate(PROMPT, **sampled, max_new_tokens=2).top_logprobs == []
    (first,) = session.generate(PROMPT, max_new_tokens=1, top_logprobs=10_000).top_logprobs
    assert len({one.id for one in first}) == session.model.vocab_size


def test_every_row_of_a_batch_generates_what_it_would_alone(session: Session) -> None:
    prompts = [[3], PROMPT, [7, 8, 9]]
    for options in ({}, {"temperature": 0.9, "seed": 3, "top_k": 20}, {"policy": "full"}):
        alone = [session.generate(prompt, max_new_tokens=6, **options) for prompt in prompts]
        together = session.generate(prompts, max_new_tokens=6, **options)
        assert [one.ids for one in together] == [one.ids for one in alone]
        assert [one.depths for one in together] == [one.depths for one in alone]
        assert [one.block_calls for one in together] == [one.block_calls for one in alone]
        assert max(one.block_calls for one in alone) <= together[0].batch_runs < sum(one.block_calls for one in alone)


@pytest.mark.parametrize("draft", [{"draft_depth": 2, "draft_tokens": 4}, {"draft_depth": 1, "draft_tokens": 2}])
def test_speculation_changes_no_greedy_token(session: Session, draft: dict[str, Any], tmp_path: Path) -> None:
    prompts = [[3], PROMPT, [7, 8, 9]]
    for options in ({}, {"policy": "full"}, {"max_lag": 1}, {"threshold": 1e9}):
        plain = [session.generate(prompt, max_new_tokens=12, **options) for prompt in prompts]
        together = session.generate(prompts, max_new_tokens=12, **options, **draft)
        assert [(one.ids, one.depths) for one in together] == [(one.ids, one.depths) for one in plain]
        assert max(one.drafted for one in together) > 0
        assert [token.id for token in session.stream(PROMPT, max_new_tokens=12, **options, **draft)] == plain[1].ids
        session.generate(PROMPT, max_new_tokens=5, **options, **draft)
        session.save(tmp_path / "saved.npz")
        session.restore(tmp_path / "saved.npz")
        assert session.generate([], resume=True, max_new_tokens=7, **options, **draft).ids == plain[1].ids[5:]


def test_a_draft_left_to_the_session_changes_no_greedy_token(session: Session) -> None:
    for options in ({}, {"threshold": 1e9}, {"policy": "full"}):
        plain = session.generate(PROMPT, max_new_tokens=120, **options)
        assert session.generate(PROMPT, max_new_tokens=120, draft_depth="auto", **options).ids == plain.ids
        assert session.generate(PROMPT, max_new_tokens=60, draft_depth=2, **options).ids == plain.ids[:60]
        assert (
            session.generate(PROMPT, max_new_tokens=60, draft_depth="auto", draft_tokens=3, **options).ids
            == (plain.ids[:60])
        )


def test_sampling_with_drafts_repeats_with_its_seed_alone_or_together(session: Session) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0, "seed": 4, "draft_depth": 2, "draft_tokens": 3}
    prompts = [[3], PROMPT]
    alone = [session.generate(prompt, **options).ids for prompt in prompts]
    assert [one.ids for one in session.generate(prompts, **options)] == alone


def test_a_row_that_stops_early_leaves_the_others_alone(session: Session) -> None:
    prompts = [[3], PROMPT]
    free = [session.generate(prompt, max_new_tokens=8).ids for prompt in prompts]
    stop = free[0][1]
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in free]
    made = session.generate(prompts, max_new_tokens=8, stop_ids=(stop,))
    assert [one.ids for one in made] == expected
    assert made[0].finish_reason == "stop_id"


def test_seeds(session: Session) -> None:
    options = {"max_new_tokens": 10, "temperature": 1.5}
    first = session.generate(PROMPT, seed=1, **options).ids
    assert session.generate(PROMPT, seed=1, **options).ids == first
    assert session.generate(PROMPT, seed=2, **options).ids != first


def test_every_prompt_may_have_a_seed_of_its_own(session: Session) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.5}
    made = session.generate([PROMPT, PROMPT], seeds=[1, 2], **options)
    assert [one.ids for one in made] == [session.generate(PROMPT, seed=seed, **options).ids for seed in (1, 2)]
    assert made[0].ids != made[1].ids
    with pytest.raises(UsageError, match="seeds are 1 for 2 prompts: give one for each"):
        session.generate([PROMPT, PROMPT], seeds=[1], **options)
    with pytest.raises(UsageError, match="no seed beside"):
        session.generate([PROMPT], seeds=[1], seed=2, **options)
    with pytest.raises(UsageError, match="seed is -1"):
        session.generate([PROMPT], seeds=[-1], **options)


def test_every_prompt_may_have_options_of_its_own(session: Session) -> None:
    """Depth and drafts too: each is what it would be alone."""
    each: list[Any] = [
        {"max_new_tokens": 9, "temperature": 1.5, "seed": 3},
        {"max_new_tokens": 4, "max_depth": 2},
        {"stop_ids": (1, 2, 3)},
        {"draft_depth": 2, "draft_tokens": 3},
        {},
    ]
    prompts = [PROMPT, [3], PROMPT, [4, 5], PROMPT]
    made = session.generate(prompts, max_new_tokens=7, each=each)
    for prompt, own, found in zip(prompts, each, made, strict=True):
        alone = session.generate(prompt, **{"max_new_tokens": 7, **own})
        assert (found.ids, found.depths, found.finish_reason) == (alone.ids, alone.depths, alone.finish_reason)
    assert [len(one.ids) for one in made][:2] == [9, 4]
    with pytest.raises(UsageError, match="each has options for 1 prompts, there are 2: give one for each"):
        session.generate([PROMPT, PROMPT], each=[{}])
    with pytest.raises(UsageError, match="temperature is -1"):
        session.generate([PROMPT, PROMPT], each=[{}, {"temperature": -1}])
    with pytest.raises(UsageError, match="no seed beside"):
        session.generate([PROMPT, PROMPT], each=[{"seed": 1}, {}], seeds=[1, 2])


def test_a_request_is_checked_without_a_run(session: Session) -> None:
    before = session.generate(PROMPT, max_new_tokens=2)
    ids = session.ids
    assert session.check(PROMPT) == list(PROMPT)
    for prompt, options, message in (
        ([], {}, "the prompt is empty"),
        ([1] * 5000, {}, "the prompt has 5000 tokens"),
        ([99999], {}, "token id 99999 is out of range"),
        ("text", {}, "this bundle has no tokenizer"),
        (PROMPT, {"stop_strings": "x"}, "stop strings need a tokenizer"),
        (PROMPT, {"draft_depth": 99}, "draft_depth is 99"),
        (PROMPT, {"stop_ids": (99999,)}, "stop id 99999"),
        (PROMPT, {"temperature": "hot"}, "temperature is 'hot', expected a number"),
    ):
        with pytest.raises((UsageError, CapacityError), match=message):
            session.check(prompt, **options)
    assert session.ids == ids == [*PROMPT, *before.ids]


def test_resume_goes_on_where_the_sequence_ended(session: Session) -> None:
    whole = session.generate(PROMPT, max_new_tokens=9).ids
    first = session.generate(PROMPT, max_new_tokens=4).ids
    assert first + session.generate([], resume=True, max_new_tokens=5).ids == whole
    # A second turn with new prompt tokens.
    session.generate(PROMPT, max_new_tokens=3)
    again = session.generate([1, 2], resume=True, max_new_tokens=4).ids
    assert again == greedy_by_scoring(session, PROMPT + whole[:3] + [1, 2], 4)


def test_rollback_then_resume_with_other_tokens(session: Session) -> None:
    session.generate(PROMPT, max_new_tokens=5)
    session.rollback(3)
    assert session.ids == PROMPT[:3]
    made = session.generate([44], resume=True, max_new_tokens=4).ids
    assert made == greedy_by_scoring(session, [*PROMPT[:3], 44], 4)


def test_flush_changes_nothing_but_the_work_left(session: Session) -> None:
    whole = session.generate(PROMPT, max_new_tokens=8).ids
    first = session.generate(PROMPT, max_new_tokens=4).ids
    session.flush()
    assert first + session.generate([], resume=True, max_new_tokens=4).ids == whole


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 5}, {"max_depth": 3}])
def test_a_saved_session_goes_on_elsewhere(
    options: dict[str, Any], session: Session, mla_bundle: Path, tmp_path: Path
) -> None:
    session.generate(PROMPT, max_new_tokens=4, **options)
    session.save(tmp_path / "saved.npz")
    wanted = session.generate([], resume=True, max_new_tokens=6, **options)
    with Session.open(mla_bundle) as other:
        other.restore(tmp_path / "saved.npz")
        made = other.generate([], resume=True, max_new_tokens=6, **options)
    assert (made.ids, made.depths) == (wanted.ids, wanted.depths)
    assert [path.name for path in tmp_path.iterdir()] == ["saved.npz"]


def test_max_depth_beyond_training_is_allowed_with_one_warning(session: Session) -> None:
    with pytest.warns(UserWarning, match="max_depth 9 is beyond the 6 loop steps") as caught:
        made = session.generate(PROMPT, max_new_tokens=3, max_depth=9)
    assert len(caught) == 1
    assert len(made.ids) == 3


def test_threshold_and_bounds_steer_depth(session: Session) -> None:
    ids = [PROMPT]
    assert (session.score(ids, max_depth=1).depth == 1).all()
    assert (session.score(ids, threshold=1e-35).depth == 1).all()
    assert (session.score(ids, threshold=1e9).depth == 6).all()
    assert (session.score(ids, threshold=1e-35, min_depth=4).depth == 4).all()


def test_the_planner_is_right_about_a_full_context(session: Session) -> None:
    plan = session.plan(context=64)
    config = config_of(session.bundle.manifest)
    assert plan.bytes_per_token == (config.prelude_layers + 6 + config.coda_layers) * config.cache_width * 4
    session.score(np.ones((1, 64), np.int64), policy="full")
    staircase = session._sequences[0].staircase
    slots = [*staircase.prelude_slots, *chain(*staircase.loop_slots), *staircase.coda_slots]
    assert sum(slot.nbytes for slot in slots) == pytest.approx(plan.cache_bytes, rel=0.05)


def test_a_thousand_tokens_take_the_memory_that_was_planned(exported: Callable[..., Path]) -> None:
    """Within 5 %, and what a decoded token allocates is given back before the next."""
    path = exported(ROOT / "scripts" / "assets" / "carry_adder.pt", max_context=1100)
    with Session.open(path) as opened:
        stream = opened.stream([0, 90, 81], policy="full", max_new_tokens=998, stop_ids=())
        held = {}
        for count, _ in enumerate(stream, 3):
            if count == 600:
                tracemalloc.start()
            if count in (700, 1000):
                held[count] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert opened._sequences[0].staircase.columns == 1000
        assert opened._sequences[0].staircase.nbytes == pytest.approx(opened.plan(context=1000).cache_bytes, rel=0.05)
    # A token keeps its id, probability, depth and text: some hundred bytes.
    assert (held[1000] - held[700]) / 300 < 1000


@pytest.mark.parametrize(("prompt", "new"), [(5, 100), (70, 30), (3, 250)])
def test_any_request_takes_the_memory_that_was_planned(session: Session, prompt: int, new: int) -> None:
    session.generate([7] * prompt, policy="full", max_new_tokens=new, stop_ids=())
    staircase = session._sequences[0].staircase
    slots = [*staircase.prelude_slots, *chain(*staircase.loop_slots), *staircase.coda_slots]
    assert sum(slot.nbytes for slot in slots) == pytest.approx(session.plan(prompt + new).cache_bytes, rel=0.05)


def test_a_list_of_one_prompt_may_draft_automatically(session: Session) -> None:
    (one,) = session.generate([PROMPT], max_new_tokens=40, draft_depth="auto")
    assert one.ids == session.generate(PROMPT, max_new_tokens=40).ids


def test_columns_left_by_an_interrupt_are_not_taken_for_those_of_new_tokens(session: Session) -> None:
    session.generate(PROMPT, max_new_tokens=3)
    kept = session.ids
    # As when an interrupt falls after a draft was verified and before its tokens were taken in.
    session._sequences[0].staircase.feed(np.array([[kept[-1], 11, 12]]), np.array([0]))
    resumed = session.generate([21, 22, 23, 24], resume=True, max_new_tokens=5)
    assert resumed.ids == session.generate([*kept, 21, 22, 23, 24], max_new_tokens=5).ids


def test_a_session_is_saved_through_links_and_devices(mla_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/saved.npz")
    with Session.open(mla_bundle) as session:
        wanted = session.generate([1, 2, 3], max_new_tokens=4).ids
        session.save(tmp_path / "link")
        session.save("/dev/null")
        for place, reason in (("absent/x", "No such file"), ("far", "is a folder"), ("n" * 300, "name too long")):
            with pytest.raises(UsageError, match=f"cannot write the session: .*{reason}"):
                session.save(tmp_path / place)
        with pytest.raises(UsageError, match="cannot write the session: No space left"):
            session.save("/dev/full")
        session.restore(tmp_path / "far" / "saved.npz")
        assert session.ids[: 3 + len(wanted)] == [1, 2, 3, *wanted]
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / "link").is_symlink()
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["far", "link", "saved.npz"]


def test_decoding_keeps_memory_flat(session: Session) -> None:
    """Caches grow by doubling alone: between doublings a decoded token allocates nothing in them."""
    stream = session.stream(PROMPT, max_new_tokens=200)
    sizes = set()
    for _ in stream:
        sizes.add(session._sequences[0].staircase.loop_slots[0][0].nbytes)
    assert len(sizes) <= 3


def test_generation_ends_at_the_end_of_the_context(session: Session) -> None:
    made = session.generate([1] * 250, max_new_tokens=50)
    assert made.finish_reason == "context"
    assert len(made.ids) == 7


def test_score_counts_calls_and_rows(session: Session) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = session.score([PROMPT, PROMPT], prefill=2, policy="full")
    assert (full.block_calls, full.block_rows) == (2 * 4 * 6, 2 * 5 * 6)
    assert full.batch_runs == 4 * 6
    exact = session.score([PROMPT], prefill=1)
    assert exact.block_calls == exact.depth.sum()


def test_in_a_batch_every_row_has_the_whole_context(session: Session) -> None:
    prompts = [[1] * 250, [5, 17]]
    together = session.generate(prompts, max_new_tokens=12)
    alone = [session.generate(prompt, max_new_tokens=12) for prompt in prompts]
    assert [(one.ids, one.finish_reason) for one in together] == [(one.ids, one.finish_reason) for one in alone]
    assert [one.finish_reason for one in together] == ["context", "length"]


def test_resuming_nothing_is_refused(session: Session) -> None:
    session.generate(PROMPT, max_new_tokens=2)
    session.rollback(0)
    with pytest.raises(UsageError, match="the prompt is empty"):
        session.generate([], resume=True)
    assert session.generate(PROMPT, resume=True, max_new_tokens=4).ids == greedy_by_scoring(session, PROMPT, 4)
