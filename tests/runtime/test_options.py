"""The options of a request: what is taken for a number, a list of ids or a text, and what type checkers are told."""

import dataclasses
import inspect
import json
import math
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from mypy import api

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.halting import Depth, Policy
from mythos_edge.runtime.options import DepthOptions, Options, RequestOptions, ScoreOptions
from mythos_edge.runtime.sampling import SamplingParams
from mythos_edge.runtime.session import Session

WHOLE = ("max_new_tokens", "max_depth", "min_depth", "top_k", "seed", "chunk", "max_lag", "top_logprobs", "draft_depth")
REAL = ("threshold", "temperature", "top_p", "min_p", "repetition_penalty")
NUMPY_ONES = [np.int64(1), np.uint8(1), np.array(1), np.int32(1)]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", NUMPY_ONES, ids=repr)
def test_whole_numbers_of_numpy_become_pythons(name: str, value: Any) -> None:
    made = getattr(Options(**{name: value}), name)
    assert type(made) is int
    assert made == 1


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("value", [*NUMPY_ONES, np.float32(0.7), np.float64(0.7), np.array(0.7), 1, 0.7], ids=repr)
def test_numbers_of_numpy_become_pythons(name: str, value: Any) -> None:
    made = getattr(Options(**{name: value}), name)
    assert type(made) is float
    assert made == float(value)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "value", [True, np.True_, np.array(True), 1.0, 8.0, np.float64(8), math.nan, "1", b"1", [1], np.array([1, 2]), {}]
)
def test_what_is_no_whole_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} is .*, expected a whole number") as caught:
        Options(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("value", [True, np.False_, np.array(True), "0.5", b"1", [0.5], np.array([0.5]), 1j, object()])
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} is .*, expected a number$") as caught:
        Options(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*WHOLE, *REAL])
def test_numbers_of_any_size_are_refused_in_one_short_line(name: str) -> None:
    for value in (-(10**5000), -(10**400), 10**5000 if name not in ("max_new_tokens", "chunk", "max_lag") else -1):
        if name == "top_k" and value > 0:
            continue
        with pytest.raises(UsageError, match=f"^{name} is ") as caught:
            Options(**{name: value})
        assert len(str(caught.value)) < 120


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.array(np.inf), -1e300])
def test_numbers_that_are_not_finite_or_in_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} is .*, expected ") as caught:
        Options(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", -1, "seed is -1, expected 0 or more"),
        ("seed", np.int64(-7), "seed is -7, expected 0 or more"),
        ("max_depth", 10**9, "max_depth is 1000000000, expected at most 4096 loop steps"),
        ("min_depth", 4097, "min_depth is 4097, expected at most 4096 loop steps"),
        ("draft_depth", 10**7, "draft_depth is 10000000, expected at most 4096 loop steps or 'auto'"),
        ("draft_depth", "often", "draft_depth is 'often', expected a whole number or 'auto'"),
        ("top_p", 1.5, "top_p is 1.5, expected at most 1"),
        ("top_p", 0.0, "top_p is 0.0, expected more than 0"),
        ("threshold", 1e39, "threshold is 1e+39, expected a finite number above 0 (more than 1e-37, at most 3e+38)"),
        ("repetition_penalty", 0, "repetition_penalty is 0.0, expected at least 1e-200"),
        ("repetition_penalty", 1e201, "repetition_penalty is 1e+201, expected at most 1e+200"),
        ("policy", 1, "policy is 1, expected one of exact, full, last"),
        ("policy", Policy, "policy is <enum 'Policy'>, expected one of exact, full, last"),
        ("stop_ids", 5, "stop_ids is of type int, expected a list of token ids"),
        ("stop_ids", "5", "stop_ids is of type str, expected a list of token ids"),
        ("stop_ids", {5: 1}, "stop_ids is of type dict, expected a list of token ids"),
        ("stop_ids", [5.0], "a token id of stop_ids is 5.0, expected a whole number"),
        ("stop_ids", [True], "a token id of stop_ids is True, expected a whole number"),
        ("stop_ids", np.array([0.5]), "stop_ids is an array of float64, expected token ids, which are integers"),
        ("stop_strings", 5, "stop_strings is 5, expected text or a list of texts"),
        ("stop_strings", ["a", 5], "stop_strings is ['a', 5], expected text or a list of texts"),
        ("stop_strings", b"a", "stop_strings is b'a', expected text or a list of texts"),
    ],
)
def test_refusals_say_what_was_expected(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Options(**{name: value})
    assert str(caught.value) == message.replace("repetition_penalty is 0.0", "repetition_penalty is 0")


def test_lists_of_ids_and_texts_in_every_form() -> None:
    for given in ([3, 5], (3, 5), {3, 5}, np.array([3, 5], np.uint16), [np.int64(3), np.array(5)], range(3, 6, 2)):
        made = Options(stop_ids=given).stop_ids  # type: ignore[arg-type]
        assert made is not None
        assert sorted(made) == [3, 5]
        assert all(type(number) is int for number in made)
    assert Options(stop_strings="end").stop_strings == ("end",)  # type: ignore[arg-type]
    assert Options(stop_strings=["a", "b"]).stop_strings == ("a", "b")  # type: ignore[arg-type]
    assert Options(stop_strings=()).stop_strings == ()


def test_the_keywords_of_the_methods_are_the_fields() -> None:
    assert set(RequestOptions.__annotations__) == {item.name for item in dataclasses.fields(Options)}
    assert set(DepthOptions.__annotations__) == {item.name for item in dataclasses.fields(Depth)}
    assert set(ScoreOptions.__annotations__) == {*DepthOptions.__annotations__, "max_lag"}
    # Whatever a keyword may be, its default may.
    for item in dataclasses.fields(Options):
        hint = typing.get_type_hints(RequestOptions)[item.name]
        if item.default is None:
            assert type(None) in typing.get_args(hint), item.name


def test_an_option_is_declared_once() -> None:
    shared = {*vars(Depth())} | {*vars(SamplingParams())}
    assert shared.isdisjoint(inspect.get_annotations(Options))
    options = Options(temperature=0.5, seed=3, max_depth=2, policy="last")
    assert options.depth == Depth(policy="last", max_depth=2)
    assert options.sampling == SamplingParams(temperature=0.5, seed=3)


def test_a_session_that_used_numpys_numbers_can_be_saved(mla_bundle: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {
        "max_new_tokens": np.int64(5),
        "temperature": np.float32(0.7),
        "top_k": np.array(9),
        "top_p": np.float64(0.9),
        "seed": np.uint32(3),
        "max_depth": np.int16(4),
        "threshold": np.float32(0.9),
        "stop_ids": np.array([330]),
        "repetition_penalty": np.float16(1.5),
    }
    with Session.open(mla_bundle) as session:
        made = session.generate(np.array([1, 2], np.uint16), **request)
        assert made.ids == session.generate([1, 2], **{**request, "seed": 3, "max_depth": 4}).ids
        session.save(tmp_path / "saved.npz")
        after = session.generate([], resume=True, **request).ids
        session.restore(tmp_path / "saved.npz")
        assert session.generate([], resume=True, **request).ids == after
        json.dumps(session.ids)


def test_score_takes_what_means_something_to_it(mla_bundle: Path) -> None:
    with Session.open(mla_bundle) as session:
        for name, value in (("temperature", 0.5), ("stop_ids", ()), ("max_new_tokens", 3), ("draft_depth", 2)):
            with pytest.raises(UsageError, match=f"score chooses no tokens, and {name} means nothing to it: leave it"):
                session.score([[1]], **{name: value})
        with pytest.raises(UsageError, match="unknown option colour; known: "):
            session.score([[1]], colour=1)  # type: ignore[call-arg]
        session.score([[1]], max_lag=1, min_depth=2, policy="full")
        for prefill in (True, 1.0, "1"):
            with pytest.raises(UsageError, match=r"prefill is .*, expected a whole number"):
                session.score([[1]], prefill=prefill)  # type: ignore[arg-type]


def test_the_other_numbers_of_a_session_are_held_to_the_same_rules(mla_bundle: Path) -> None:
    with Session.open(mla_bundle) as session:
        session.generate([1, 2], max_new_tokens=2)
        for bad in (True, 1.0, "1", None):
            with pytest.raises(UsageError, match=r"length is .*, expected a whole number"):
                session.rollback(bad)  # type: ignore[arg-type]
        assert len(session.ids) == 4
        for name in ("context", "batch", "max_depth"):
            for bad in (0, -1, 1.5, True):
                with pytest.raises(UsageError, match=f"{name} is {bad}, expected "):
                    session.plan(**{name: bad})
        with pytest.raises(UsageError, match="resume is 1, expected True or False"):
            session.generate([1], resume=1)  # type: ignore[call-overload]
        assert session.plan(np.int64(10), max_depth=np.int64(2)).context == 10


@pytest.mark.parametrize("threads", [-1, 100_000, 10**9, 1.0, True, "2"])
def test_threads_are_a_number_that_can_be_started(threads: Any, mla_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"^threads is .*, expected "):
        Session.open(mla_bundle, threads=threads)
    with Session.open(mla_bundle, threads=np.int64(2)) as session:  # type: ignore[arg-type]
        assert session.generate([1], max_new_tokens=1).ids


SNIPPET = """
import numpy as np
from mythos_edge.runtime.session import Session

with Session.open("model.bundle") as session:
    one = session.generate("text", max_new_tokens=np.int64(3), temperature=0.5, stop_ids={1}, draft_depth="auto")
    reveal_type(one)
    reveal_type(session.generate([[1], [2]], policy="full"))
    reveal_type(session.generate(["a", "b"], stop_strings="x"))
    reveal_type(next(session.stream(np.array([1, 2]), seed=None)).id)
    session.score([[1]], threshold=np.float32(0.5))
    session.generate("text", max_new_token=3)  # line 12
    session.generate("text", temperature="hot")  # line 13
    session.stream("text", draft_depth="often")  # line 14
    session.score([[1]], temperature=0.5)  # line 15
"""


@pytest.mark.slow
def test_a_type_checker_knows_the_options(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET, encoding="utf-8")
    cache = ROOT / ".mypy_cache"
    output, _, _ = api.run(["--strict", f"--cache-dir={cache}", "--config-file=", str(tmp_path / "snippet.py")])
    lines = [line.partition("snippet.py:")[2] for line in output.splitlines() if "snippet.py:" in line]
    notes = [line.partition("Revealed type is ")[2].split(".")[-1].strip('"]') for line in lines if "Revealed" in line]
    assert notes == ["Generation", "Generation", "Generation", "int"]
    errors = {int(line.split(":")[0]) for line in lines if " error: " in line}
    assert errors == {12, 13, 14, 15}, output
