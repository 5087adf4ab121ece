"""Slots whose layers see a window of the last positions: what they give up changes nothing but the memory they take."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Ran
from dory_models import GOLDEN
from fakes.scripted_backend import ScriptedBackend
from golden_runs import chunked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import DEPTHS, LOOPS, ONE_WIDE, VOCAB
from text_oracle import byte_level

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime import caches
from mythos_edge.runtime.backends.memory import HostMemory
from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.runtime.conversation import Conversation
from mythos_edge.runtime.decoding import Generation
from mythos_edge.runtime.halting import Policy, ResolvedDepth
from mythos_edge.runtime.options import Options
from mythos_edge.runtime.serving.engine import Engine, Request
from mythos_edge.runtime.serving.prompt_cache import PromptCache
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.slots import Slot
from mythos_edge.runtime.staircase import Fed, Staircase

# Of the prelude's slot, the two of a loop step, and the coda's: one sees all.
WINDOWS = (4, 2, 0, 3)
MODEL = dataclasses.replace(ONE_WIDE, slot_windows=WINDOWS)
WANTED = dict(np.load(GOLDEN / "golden.npz"))
IDS = WANTED["ids"]
ALLOWED = 3 * float(WANTED["fp32_error"])
# The window of the sliding layers of the golden model; the prelude's, three of four inner layers, the coda's.
WINDOW, SLIDING = 8, 5


def staircase(policy: str = "exact", max_lag: int | None = None, keeps_all: bool = False) -> Staircase:
    backend = ScriptedBackend(DEPTHS, VOCAB, MODEL.windows)
    backend.memory = HostMemory()
    backend.memory.keeps_all_columns = keeps_all
    return Staircase(backend, MODEL, ResolvedDepth(Policy(policy), LOOPS, 1, 0.99), 200, max_lag)


def feed(stairs: Staircase, ids: list[int]) -> Fed:
    return stairs.feed(np.array([ids]), np.arange(len(ids)))


def assert_bounded(stairs: Staircase, margin: int) -> None:
    """Every slot has what its next row sees and what the margin asks for, and no more."""
    groups = [stairs.prelude_slots, *stairs.loop_slots, stairs.coda_slots]
    windows = [WINDOWS[:1], *[WINDOWS[1:3]] * LOOPS, WINDOWS[3:]]
    for slots, sizes in zip(groups, windows, strict=True):
        for slot, window in zip(slots, sizes, strict=True):
            kept = slot.end - slot.start
            assert kept <= window - 1 + margin if window else slot.start == 0
            assert not window or kept >= min(slot.end, window - 1)


tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
schedule = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), tokens),
        st.tuples(st.just("rollback"), st.integers(0, 6)),
        st.tuples(st.just("flush"), st.none()),
        st.tuples(st.just("save and restore"), st.none()),
        st.tuples(st.just("copy"), st.integers(0, 3)),
    ),
    max_size=14,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=tokens,
    actions=schedule,
    max_lag=st.sampled_from([None, 1, 3]),
    margin=st.sampled_from([0, 1, 2, 5]),
)
def test_any_schedule_is_that_of_slots_that_keep_all(
    start: list[int],
    actions: list[tuple[str, Any]],
    max_lag: int | None,
    margin: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caches, "ROLLBACK_MARGIN", margin)
    stairs, ids = staircase(max_lag=max_lag), list(start)
    feed(stairs, ids)
    longest = len(ids)
    for action, value in actions:
        if action == "feed":
            lost = ids[stairs.columns :]  # by a rollback beyond what is kept
            ids += value
            found, wanted = feed(stairs, lost + value), feed(staircase("full", keeps_all=True), ids)
            count = len(lost + value)
            assert found.depth[0].tolist() == wanted.depth[0, -count:].tolist()
            np.testing.assert_allclose(found.logits, wanted.logits[:, -count:], atol=2e-4)
            assert_bounded(stairs, margin)
            longest = max(longest, len(ids))
            assert stairs.rollback_floor <= max(0, longest - margin)
        elif action == "rollback":
            keep, floor, columns = max(0, len(ids) - value), stairs.rollback_floor, stairs.columns
            stairs.rollback(keep)
            del ids[keep:]
            assert stairs.columns == (min(keep, columns) if keep >= floor else 0)
        elif action == "flush":
            stairs.flush()
            assert_bounded(stairs, margin)
        elif action == "copy":
            kept = max(stairs.rollback_floor, stairs.columns - value)
            stairs = stairs.copy(kept)
            del ids[kept:]
        else:
            saved, stairs = stairs.state(), staircase(max_lag=max_lag)
            stairs.restore(saved)


@pytest.mark.parametrize("fault", ["sees one less", "keeps one less"])
def test_a_window_off_by_one_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "ROLLBACK_MARGIN", 0)

    def too_few(self: Slot) -> Any:
        return self.view(max(0, self.end - self.window + 2) if self.window else 0, self.end)

    if fault == "sees one less":
        monkeypatch.setattr(Slot, "seen", too_few)
    else:
        monkeypatch.setattr(Slot, "give_up", lambda self, back_to: self.drop_before(self.end - self.window + 2))
    stairs = staircase()
    feed(stairs, [6, 1, 3, 6, 5, 1])
    with pytest.raises(AssertionError):
        feed(stairs, [6])


def test_a_saved_state_that_lacks_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "ROLLBACK_MARGIN", 0)
    stairs = staircase()
    feed(stairs, [6] * 12)
    saved = stairs.state()
    for name in ("prelude_0", "loop_0_1"):  # of a window, and of one that sees all
        start, end = saved[f"{name}.columns"]
        lacking = {f"{name}.columns": np.array([start + 1, end]), f"{name}.data": saved[f"{name}.data"][:, 1:]}
        with pytest.raises(ValueError, match="lack what the next row sees"):
            staircase().restore(saved | lacking)


def test_a_prompt_that_slots_do_not_go_back_to_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "ROLLBACK_MARGIN", 4)
    cache, ids = PromptCache(1 << 20), [1, 5, 2, 6, 1, 3] * 5
    short, whole = staircase(), staircase()
    feed(short, ids[:12])
    feed(whole, ids)
    depth = whole.depth
    cache.put(ids[:12], short)
    cache.put(ids, whole)
    # The short one goes back further than the whole.
    assert len(cache) == 2
    assert cache.take([*ids[:10], 0, 0], depth).columns == 10
    assert cache.take([*ids[:20], 0, 0], depth).columns == 12
    assert cache.take([*ids[:20], 0, 0], depth) is None
    found = cache.take([*ids[:28], 0, 0], depth)
    assert found.columns == 28
    np.testing.assert_allclose(
        feed(found, [3, 4]).logits, feed(staircase(keeps_all=True), [*ids[:28], 3, 4]).logits[:, -2:], atol=2e-4
    )


# --- a model whose layers slide -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(exported: Callable[..., Path]) -> Path:
    return exported(GOLDEN)


@pytest.fixture
def session(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """With a margin that is soon exceeded."""
    monkeypatch.setattr(caches, "ROLLBACK_MARGIN", 2)
    with Session.open(bundle) as opened:
        yield opened


@pytest.fixture
def keeping_all(bundle: Path) -> Iterator[Session]:
    with Session.open(bundle) as opened:
        opened.backend.memory.keeps_all_columns = True
        yield opened


def test_the_golden_model_stays_golden(session: Session) -> None:
    runs = {f"chunks of {size}": chunked(session, IDS, 2, size) for size in (1, 3, 7, 30)}
    for prefill in (0, 7, 30):
        runs[f"prefill {prefill}"] = (session.score(IDS, prefill=prefill).logits, np.array(2))
    for name, (logits, _) in runs.items():
        assert np.abs(logits - WANTED["logits"]).max() <= ALLOWED, name
    assert session._sequences[0].staircase.rollback_floor == 28


def test_a_window_off_by_one_is_not_golden(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slot, "seen", lambda self: self.view(max(0, self.end - (self.window or 999) + 2), self.end))
    assert np.abs(session.score(IDS, prefill=7).logits - WANTED["logits"]).max() > 100 * ALLOWED


@pytest.mark.parametrize("draft", [None, 2, 5])
def test_long_texts_together_and_drafted(session: Session, keeping_all: Session, draft: int | None) -> None:
    prompts = [[3], [5, 17, 200, 2, 9], list(range(1, 30))]
    options: dict[str, Any] = {"max_new_tokens": 24}
    wanted = [keeping_all.generate(prompt, **options).ids for prompt in prompts]
    if draft is not None:
        options |= {"draft_depth": 1, "draft_tokens": draft}
    assert [one.ids for one in session.generate(prompts, **options)] == wanted
    assert session.generate(prompts[2], **options, chunk=5).ids == wanted[2]
    # What a draft has given beyond the last token shown is taken back.
    stream = session.stream(prompts[2], **options)
    shown = [next(stream).id for _ in range(7)]
    stream.close()
    columns = session._sequences[0].staircase.columns
    assert session._sequences[0].staircase.rollback_floor < len(session.ids) <= columns + 1
    rest = session.generate([], resume=True, **options | {"max_new_tokens": 17})
    assert shown + rest.ids == wanted[2]


def test_memory_is_bounded(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for count in (40, 120, 240):
        session.generate([1, 2, 3], max_new_tokens=count, chunk=16)
        stairs = session._sequences[0].staircase
        sizes.append(sum(slot.nbytes for slot in stairs._windowed))
        plan = session.plan(context=count + 3)
        assert sum(slot.nbytes for slot in stairs._slots) <= plan.cache_bytes
    # One row of each kind that a slot keeps, and the spare ones.
    most = WINDOW - 1 + 2 + 64
    assert sizes[0] < sizes[1] == sizes[2] <= (2 + 3 * 2) * most * session.model.cache_width * 4


def test_a_long_chunk_gives_its_memory_back(session: Session, keeping_all: Session) -> None:
    ids = [number % 250 for number in range(250)]
    session.score([ids])
    keeping_all.score([ids])
    held, all_held = (one._sequences[0].staircase.nbytes for one in (session, keeping_all))
    full = 2 * 250 * session.model.cache_width * 4
    assert all_held == 5 * full
    assert held <= full + 8 * 146 * session.model.cache_width * 4


def test_a_rollback_says_how_far_back_it_can_go(session: Session, tmp_path: Path) -> None:
    whole = session.generate(list(range(1, 24)), max_new_tokens=30).ids
    floor = session.rollback_floor
    assert 0 < 53 - floor <= 4
    with pytest.raises(UsageError) as caught:
        session.rollback(floor - 1)
    assert str(caught.value) == (
        f"rollback to {floor - 1} positions, expected 0 or {floor} .. 53: layers with a window have given up "
        "what earlier ones see: generate from the tokens anew, without resume"
    )
    assert session.ids == [*range(1, 24), *whole]
    session.save(tmp_path / "saved.npz")
    session.rollback(floor)
    kept = floor - 23
    assert session.generate([], resume=True, max_new_tokens=30 - kept).ids == whole[kept:]
    session.restore(tmp_path / "saved.npz")
    assert session.rollback_floor == floor
    session.rollback(52)
    assert session.generate([], resume=True, max_new_tokens=1).ids == whole[-1:]
    session.rollback(0)
    assert session.generate(list(range(1, 24)), resume=True, max_new_tokens=30).ids == whole


def test_a_talk_is_computed_anew_where_slots_do_not_go_back(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "ROLLBACK_MARGIN", 2)
    byte_level([]).save(str(tmp_path / "tokenizer.json"))
    assert run("export", GOLDEN, "-o", tmp_path / "b", "--tokenizer", tmp_path / "tokenizer.json").code == 0
    options: dict[str, Any] = {"max_new_tokens": 20, "stop_ids": ()}
    with Session.open(tmp_path / "b") as session, Session.open(tmp_path / "b") as fresh:
        talk = Conversation(session, ChatTemplate.of(session.bundle, "plain"))

        def said(answer: Any) -> list[int]:
            return [token.id for token in answer]

        def alone() -> list[int]:
            messages = talk.messages[:-1]
            return fresh.generate(talk.template.ids(fresh.tokenizer, messages), **options).ids

        assert said(talk.answer("Once upon a time there was", **options)) == alone()
        assert said(talk.retry(**options)) == alone()
        assert talk.cached_tokens == 0
        talk.undo()
        assert said(talk.answer("Once upon another time there was", **options)) == alone()


def test_a_server_counts_the_window_and_answers_alike(session: Session, keeping_all: Session) -> None:
    prompts = [[*range(1, 40), number] for number in range(4)]
    wanted = [keeping_all.generate(prompt, max_new_tokens=25).ids for prompt in prompts]
    engine, heard = Engine(session, slots=2), []
    try:
        for prompt in [*prompts, *prompts]:
            engine.submit(Request(prompt, Options(max_new_tokens=25)), heard.append)
        engine.close(patience_s=60)
    finally:
        engine.close()
    made = [event for event in heard if isinstance(event, Generation)]
    assert sorted(one.ids for one in made) == sorted(wanted * 2)
    assert engine._plan(Request([1] * 200, Options(max_new_tokens=50, chunk=16))).window_bytes < 8 * 100 * 4 * 48


# --- windows as data ----------------------------------------------------------------------------------------------


def test_a_plan_counts_bounded_slots_by_their_bound(bundle: Path, run: Callable[..., Ran]) -> None:
    with Session.open(bundle) as session:
        row = session.model.cache_width * 4
        plan = session.plan(context=256)
        # The prelude's, three in each of two loop steps, the coda's; one in each loop step grows.
        assert (plan.slots, plan.bytes_per_token, plan.window_bytes) == (10, 2 * row, 8 * 256 * row)
        assert caches.plan_cache(session.model, 4, 10_000, 3).window_bytes == 14 * (7 + 256 + 65 + 512) * row
        session.backend.memory.keeps_all_columns = True
        plan = session.plan(context=256)
        assert (plan.bytes_per_token, plan.window_bytes) == (10 * row, 0)
    assert run("inspect", bundle, "--json").json["cache"]["window_bytes"] == 8 * 256 * row
    assert "kB a token and 0.4 MB of layers with a window" in run("inspect", bundle).out
