"""Prompts and tokens to score in every form, and those that are refused in one line."""

import array
import io
from collections import UserList, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.session import Session

PROMPT = [5, 17, 300, 2, 9]


@pytest.fixture(scope="module")
def session(mla_bundle: Path) -> Iterator[Session]:
    with Session.open(mla_bundle) as opened:
        yield opened


class Tensor:
    """An array as other libraries have it."""

    ndim = 1

    def __init__(self, values: list[int], dtype: str = "int64") -> None:
        self._values, self._dtype = values, dtype

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return np.array(self._values, self._dtype)


class OnTheGpu:
    ndim = 1

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy.\nUse Tensor.cpu()")


class Text(str):
    """Text all the same."""


@pytest.mark.parametrize(
    "prompt",
    [
        tuple(PROMPT),
        np.array(PROMPT),
        np.array(PROMPT, np.uint16),
        np.array(PROMPT, ">i4"),
        np.array(PROMPT)[::1],
        [np.int64(number) for number in PROMPT],
        [np.uint32(number) for number in PROMPT],
        [np.array(number) for number in PROMPT],
        deque(PROMPT),
        UserList(PROMPT),
        array.array("q", PROMPT),
        Tensor(PROMPT),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_ids_in_every_form(prompt: Any, session: Session) -> None:
    wanted = session.generate(PROMPT, max_new_tokens=3).ids
    assert session.generate(prompt, max_new_tokens=3).ids == wanted
    assert [token.id for token in session.stream(prompt, max_new_tokens=3)] == wanted
    assert session.ids == PROMPT + wanted
    assert all(type(number) is int for number in session.ids)


def test_several_prompts_in_every_form(session: Session) -> None:
    rows = [[5, 17], [300, 2]]
    wanted = [one.ids for one in session.generate(rows, max_new_tokens=3)]
    for given in (tuple(rows), np.array(rows), [np.array(row) for row in rows], [tuple(row) for row in rows]):
        made = session.generate(given, max_new_tokens=3)  # type: ignore[call-overload]
        assert [one.ids for one in made] == wanted
    (one,) = session.generate([[5, 17]], max_new_tokens=3)
    assert one.ids == wanted[0]


def test_text_of_a_class_of_its_own(text_bundle: Path) -> None:
    with Session.open(text_bundle) as opened:
        wanted = opened.generate("the", max_new_tokens=3).ids
        assert opened.generate(Text("the"), max_new_tokens=3).ids == wanted
        assert opened.generate(np.str_("the"), max_new_tokens=3).ids == wanted
        mixed = opened.generate(["the", [1, 2]], max_new_tokens=3)  # type: ignore[call-overload]
        assert mixed[0].ids == wanted
        ids = opened.tokenizer.encode("the")  # type: ignore[union-attr]
        with pytest.raises(UsageError, match="the prompts hold 5, expected each to be text or a list of token ids"):
            opened.generate(["the", 5])  # type: ignore[call-overload]
        assert opened.generate(ids, max_new_tokens=3).ids == wanted


KINDS = r"expected text, a list of token ids, or a list of prompts$"
REFUSALS: list[tuple[Any, str]] = [
    ((number for number in PROMPT), f"the prompt is of type generator, {KINDS}"),
    (map(int, "12"), f"the prompt is of type map, {KINDS}"),
    (iter(PROMPT), f"the prompt is of type list_iterator, {KINDS}"),
    ({1: 2}, f"the prompt is of type dict, {KINDS}"),
    ({1: 2}.keys(), f"the prompt is of type dict_keys, {KINDS}"),
    ({1, 2}, f"the prompt is of type set, {KINDS}"),
    (b"text", f"the prompt is of type bytes, {KINDS}"),
    (bytearray(b"text"), f"the prompt is of type bytearray, {KINDS}"),
    (memoryview(b"text"), f"the prompt is of type memoryview, {KINDS}"),
    (io.StringIO("text"), f"the prompt is of type StringIO, {KINDS}"),
    (Path("prompt.txt"), f"the prompt is of type PosixPath, {KINDS}"),
    (None, f"the prompt is of type NoneType, {KINDS}"),
    (5, f"the prompt is of type int, {KINDS}"),
    (np.int64(5), r"the prompt is an array of shape \(\), expected token ids along one axis"),
    (np.array(5), r"the prompt is an array of shape \(\), expected token ids along one axis"),
    (np.zeros((1, 2, 3), int), r"the prompt is an array of shape \(1, 2, 3\), expected token ids along one axis"),
    (np.zeros((0, 3), int), r"the prompts are an array of shape \(0, 3\), expected at least one row"),
    (np.array([1.0, 2.0]), "the prompt is an array of float64, expected token ids, which are integers"),
    (np.array([True, False]), "the prompt is an array of bool, expected token ids, which are integers"),
    (np.array(["1"]), "the prompt is an array of <U1, expected token ids, which are integers"),
    (np.array([1, None]), "the prompt is an array of object, expected token ids, which are integers"),
    (np.array([2**63], np.uint64), "token id 9223372036854775808 is out of range: this model knows 0 .. 330"),
    (Tensor([1, 2], "float32"), "the prompt is an array of float32, expected token ids, which are integers"),
    (OnTheGpu(), "the prompt: OnTheGpu is no array of integers: can't convert cuda:0 device type tensor to numpy"),
    ([1, 2.0], "a token id of the prompt is 2.0, expected a whole number"),
    ([1, True], "a token id of the prompt is True, expected a whole number"),
    ([np.True_], "a token id of the prompt is np.True_, expected a whole number"),
    ([np.float32(3)], r"a token id of the prompt is np.float32\(3.0\), expected a whole number"),
    ([1, None], "a token id of the prompt is None, expected a whole number"),
    ([{}], "a token id of the prompt is {}, expected a whole number"),
    ([10**5000], "token id a whole number of 16610 bits is out of range: this model knows 0 .. 330"),
    ([1, [2]], "the prompts hold 1, expected each to be text or a list of token ids"),
    ([[1], 2], "the prompts hold 2, expected each to be text or a list of token ids"),
    ([[1], {2}], r"the prompts hold \{2\}, expected each to be text or a list of token ids"),
    ([[1], b"a"], "the prompt is of type bytes, expected a list of token ids"),
    ([[1], [[2]]], r"a token id of the prompt is \[2\], expected a whole number"),
    ([[1], []], "the prompt is empty"),
    ([[]], "the prompt is empty"),
    ([], "the prompt is empty"),
    (np.array([]), "the prompt is empty"),
]


@pytest.mark.parametrize(("prompt", "message"), REFUSALS, ids=[message for _, message in REFUSALS])
def test_what_is_no_prompt_is_refused(prompt: Any, message: str, session: Session) -> None:
    session.generate([3], max_new_tokens=1)
    before = session.ids
    with pytest.raises(UsageError, match=f"^{message}") as caught:
        session.generate(prompt)
    assert "\n" not in str(caught.value)
    assert session.ids == before


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], [3]], "ids: list is no array of integers: its rows differ in length"),
        ([[1, True]], "a token id of ids is True, expected a whole number"),
        ([np.array([True, False])], r"ids are bool of shape \(1, 2\), expected integers \(batch, positions\)"),
        ([[1, 2.0]], r"ids are float64 of shape \(1, 2\), expected integers \(batch, positions\)"),
        ([["1"]], r"ids are <U1 of shape \(1, 1\), expected integers"),
        ([[None]], r"ids are object of shape \(1, 1\), expected integers"),
        ([[2**70]], r"ids are object of shape \(1, 1\), expected integers"),
        ((row for row in [[1]]), r"ids are object of shape \(\), expected integers"),
        ({}, r"ids are object of shape \(\), expected integers"),
        (b"12", r"ids are \|S2 of shape \(\), expected integers"),
        ([[331]], "token id 331 is out of range"),
        ([[-1, 5]], "token id -1 is out of range"),
        (np.array([[2**64 - 1]], np.uint64), "token id 18446744073709551615 is out of range"),
        ([], r"ids are empty, of shape \(0,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_scored_is_refused(ids: Any, message: str, session: Session) -> None:
    with pytest.raises(UsageError, match=f"^{message}") as caught:
        session.score(ids)
    assert "\n" not in str(caught.value)


def test_ids_to_score_in_every_form(session: Session) -> None:
    wanted = session.score([PROMPT]).logits
    for ids in (np.array([PROMPT], np.uint16), np.asfortranarray([PROMPT]), [np.array(PROMPT)], (tuple(PROMPT),)):
        np.testing.assert_array_equal(session.score(ids).logits, wanted)
