"""A conversation says what the same talk says in a fresh session, whatever happened before, and computes only news."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mythos_edge.model.errors import CapacityError, UsageError
from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.runtime.conversation import Conversation
from mythos_edge.runtime.session import Session

OPTIONS: dict[str, Any] = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def bundle(text_bundle: Path) -> Path:
    return text_bundle


@pytest.fixture
def session(bundle: Path) -> Iterator[Session]:
    with Session.open(bundle) as opened:
        yield opened


@pytest.fixture
def talk(session: Session) -> Conversation:
    return Conversation(session, ChatTemplate.of(session.bundle, "chatml"))


def _text(tokens: Iterator[Any]) -> str:
    return "".join(token.text for token in tokens)


def _alone(bundle: Path, talk: Conversation, **options: Any) -> str:
    """The answer that a session without a past gives to the same messages."""
    messages = talk.messages[:-1] if talk.messages[-1]["role"] == "assistant" else talk.messages
    with Session.open(bundle) as fresh:
        ids = talk.template.ids(fresh.tokenizer, messages)
        return fresh.generate(ids, **{**OPTIONS, "stop_strings": talk.template.stops, **options}).text


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_every_turn_says_what_a_fresh_session_says(bundle: Path, session: Session, template: str) -> None:
    talk = Conversation(session, ChatTemplate.of(session.bundle, template))
    for turn, text in enumerate(("Return the ", "def ", "class A")):
        answer = _text(talk.answer(text, **OPTIONS))
        assert answer == _alone(bundle, talk)
        assert talk.messages[-2:] == [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        assert (talk.cached_tokens > 0) == (turn > 0)
    assert talk.cached_tokens > len(session.ids) / 2
    talk.undo()
    assert _text(talk.answer("import ", **OPTIONS)) == _alone(bundle, talk)
    assert talk.cached_tokens > 0


def test_another_answer_another_system_message_and_another_depth(bundle: Path, talk: Conversation) -> None:
    _text(talk.answer("Return ", **OPTIONS))
    first = talk.messages[-1]["content"]
    sampled = {"temperature": 1.5, "seed": 3}
    assert _text(talk.retry(**OPTIONS, **sampled)) == _alone(bundle, talk, **sampled) != first
    assert len(talk.messages) == 2
    talk.system = "You are a test."
    assert _text(talk.retry(**OPTIONS)) == _alone(bundle, talk)
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    assert _text(talk.answer("more", **OPTIONS, max_depth=2)) == _alone(bundle, talk, max_depth=2)
    assert talk.cached_tokens == 0  # rows of another depth are of no use
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "You are a test."}]
    talk.system = None
    assert talk.messages == []


def test_an_answer_that_is_broken_off_is_as_long_as_it_was_shown(bundle: Path, talk: Conversation) -> None:
    answer = talk.answer("The ", **OPTIONS)
    shown = "".join(next(answer).text for _ in range(4))
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": shown}
    assert _text(talk.answer("and", **OPTIONS)) == _alone(bundle, talk)
    assert talk.cached_tokens > 0


def test_what_cannot_be_answered_leaves_the_talk_as_it_was(talk: Conversation) -> None:
    _text(talk.answer("The ", **OPTIONS))
    before = list(talk.messages)
    with pytest.raises(CapacityError):
        talk.answer("x" * 100_000, **OPTIONS)
    with pytest.raises(UsageError, match="temperature"):
        talk.answer("x", temperature=-1)
    assert talk.messages == before
    assert _text(talk.answer("on", **OPTIONS))


def test_skipped_loop_steps_are_caught_up_while_nobody_waits(bundle: Path, talk: Conversation) -> None:
    _text(talk.answer("Return the ", threshold=0.3, **OPTIONS))
    (sequence,) = talk.session._sequences
    lagging = list(sequence.staircase.lengths)
    talk.idle()
    assert talk._idle is not None
    talk._idle.join(30)
    talk.busy()
    assert set(sequence.staircase.lengths) == {sequence.staircase.columns}
    assert min(lagging) < sequence.staircase.columns
    assert _text(talk.answer("def ", threshold=0.3, **OPTIONS)) == _alone(bundle, talk, threshold=0.3)
    talk.idle()
    assert _text(talk.answer("def ", threshold=0.3, **OPTIONS)) == _alone(bundle, talk, threshold=0.3)


def test_a_flush_ends_between_two_loop_steps(talk: Conversation) -> None:
    _text(talk.answer("Return the ", threshold=0.3, **OPTIONS))
    (sequence,) = talk.session._sequences
    before = list(sequence.staircase.lengths)
    asked = iter([False, False, True])
    talk.session.flush(lambda: next(asked))
    after = sequence.staircase.lengths
    assert after[:2] == [sequence.staircase.columns] * 2
    assert after[2:] == before[2:]


def test_a_talk_is_saved_and_taken_up(bundle: Path, talk: Conversation, session: Session, tmp_path: Path) -> None:
    talk.system = "ä"
    _text(talk.answer("Return ", **OPTIONS))
    talk.save(tmp_path / "talk.json")
    other = Conversation(session, talk.template)
    other.load(tmp_path / "talk.json")
    assert other.messages == talk.messages
    assert _text(other.answer("on", **OPTIONS)) == _alone(bundle, other)
    wrong: list[Any] = [[], {"messages": [{"role": "user"}]}, {"messages": [{"role": "tool", "content": "x"}]}]
    wrong += [{"messages": [{"role": "user", "content": 1}]}]
    for content in (b"{", *(json.dumps(values).encode() for values in wrong)):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.json") as caught:
            other.load(tmp_path / "bad.json")
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot read the talk"):
        other.load(tmp_path / "absent.json")
    assert other.messages[:-2] == talk.messages


def test_nothing_to_take_back_is_one_line(talk: Conversation, demo_bundle: Path) -> None:
    talk.system = "s"
    with pytest.raises(UsageError, match="nothing was said yet"):
        talk.undo()
    with pytest.raises(UsageError, match="nothing was asked yet"):
        talk.retry()
    with (
        Session.open(demo_bundle) as session,
        pytest.raises(UsageError, match="has no tokenizer, which a talk needs"),
    ):
        Conversation(session, talk.template)
