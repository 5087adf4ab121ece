"""Sampling: each filter against distributions computed by hand, their order, the random state, bad parameters."""

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mythos_edge.model.errors import MythosEdgeError, UsageError
from mythos_edge.runtime.sampling import Sampler, SamplingParams, likeliest

# Four tokens of probability 1/2, 1/4, 1/8, 1/8, not in order of likelihood.
PROBABILITIES = np.array([0.125, 0.5, 0.125, 0.25])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def _distribution(logits: NDArray[np.float32] = LOGITS, history: tuple[int, ...] = (), **params: Any) -> list[float]:
    result = Sampler(SamplingParams(**({"temperature": 1.0} | params))).distribution(logits, history)
    assert result.shape == logits.shape
    assert result.dtype == np.float64
    return result.tolist()


def _approx(values: list[float]) -> Any:
    return pytest.approx(values, rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.125, 0.5, 0.125, 0.25]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 4}, [0.125, 0.5, 0.125, 0.25]),
        ({"top_k": 1000}, [0.125, 0.5, 0.125, 0.25]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8}, [1 / 7, 4 / 7, 0, 2 / 7]),  # of equals, the lower id is kept
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"min_p": 0.2}, [0.125, 0.5, 0.125, 0.25]),
        ({"min_p": 0.3}, [0, 2 / 3, 0, 1 / 3]),
        ({"min_p": 0.6}, [0, 1, 0, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 0.0, "top_k": 3, "top_p": 0.9, "min_p": 0.1}, [0, 1, 0, 0]),
    ],
)
def test_each_filter_gives_the_distribution_computed_by_hand(params: dict[str, Any], expected: list[float]) -> None:
    assert _distribution(**params) == _approx(expected)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # Temperature first: at 2 the likeliest has 0.38, so a nucleus of 0.45 needs two; without it one would do.
        ({"temperature": 2.0, "top_p": 0.45}, [0, math.sqrt(2) / (math.sqrt(2) + 1), 0, 1 / (math.sqrt(2) + 1)]),
        # And min-p 0.6 keeps the second, at 0.71 of the first.
        ({"temperature": 2.0, "min_p": 0.6}, [0, math.sqrt(2) / (math.sqrt(2) + 1), 0, 1 / (math.sqrt(2) + 1)]),
        # Top-k before top-p: of the two kept, the first has 2/3 and is a nucleus of 0.6; before, 1/2 was not.
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),
    ],
)
def test_filters_follow_one_another_in_the_order_told(params: dict[str, Any], expected: list[float]) -> None:
    assert _distribution(**params) == _approx(expected)


def test_top_p_comes_before_min_p() -> None:
    # A nucleus of 0.5 is two tokens, and min-p keeps both; the other way round the first has 4/7 and is the nucleus.
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)
    assert _distribution(logits, top_p=0.5, min_p=0.6) == _approx([4 / 7, 3 / 7, 0, 0])


def test_the_penalty_comes_first_and_counts_a_token_once() -> None:
    logits = np.array([2.0, -1.0, 0.0, 1.5], np.float32)
    weights = np.exp([1.0, -2.0, 0.0, 1.5])
    expected = (weights / weights.sum()).tolist()
    assert _distribution(logits, (0, 1, 2, 0, 0), repetition_penalty=2.0) == _approx(expected)
    # It decides about top-k, and about greedy.
    assert _distribution(logits, (0,), repetition_penalty=2.0, top_k=1) == [0, 0, 0, 1]
    assert _distribution(logits, (0,), repetition_penalty=2.0, temperature=0.0) == [0, 0, 0, 1]
    assert _distribution(logits, (), repetition_penalty=2.0, top_k=1) == [1, 0, 0, 0]
    # Below 1 it favours what was seen.
    assert _distribution(logits, (3,), repetition_penalty=0.5, top_k=1) == [0, 0, 0, 1]
    # Before the temperature: a score of 2 / 2 over 0.5.
    weights = np.exp(np.array([1.0, -2.0, 0.0, 1.5]) / 0.5)
    expected = (weights / weights.sum()).tolist()
    assert _distribution(logits, (0, 1, 2), repetition_penalty=2.0, temperature=0.5) == _approx(expected)


def test_top_k_keeps_exactly_k_of_equals() -> None:
    result = _distribution(np.zeros(10, np.float32), top_k=3)
    assert sorted(result) == _approx([0.0] * 7 + [1 / 3] * 3)


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = np.array([0.0, 3.0, 1.0, 3.0, 3.0], np.float32)
    assert Sampler(SamplingParams()).sample(logits, [])[0] == 1
    assert Sampler(SamplingParams()).distribution(logits, []).tolist() == [0, 1, 0, 0, 0]


def test_the_logits_are_not_changed() -> None:
    logits, before = LOGITS.copy(), LOGITS.copy()
    Sampler(SamplingParams(1.0, 2, 0.9, 0.1, 1.5, seed=0)).sample(logits, [0, 1])
    Sampler(SamplingParams(repetition_penalty=1.5)).sample(logits, [0, 1])
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.3, "top_k": 1}, {"repetition_penalty": 9.0}, {"temperature": 2.0, "seed": 3}],
)
def test_the_logprob_is_of_the_unfiltered_logits(params: dict[str, Any]) -> None:
    token, logprob = Sampler(SamplingParams(**params)).sample(LOGITS + np.float32(30), [1])
    assert type(token) is int
    assert type(logprob) is float
    assert logprob == pytest.approx(math.log(PROBABILITIES[token]), abs=1e-5)


def test_large_logits_give_no_overflow() -> None:
    logits = np.array([1e4, -1e4, 1e4], np.float32)
    token, logprob = Sampler(SamplingParams(temperature=0.01, seed=0)).sample(logits, [])
    assert token in (0, 2)
    assert logprob == pytest.approx(-math.log(2))


@pytest.mark.parametrize("temperature", [1e-30, 1e-320])
def test_a_tiny_temperature_is_greedy_in_the_limit(temperature: float) -> None:
    assert _distribution(temperature=temperature) == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}, {"temperature": 0.5, "top_p": 0.95}],
)
def test_samples_follow_the_distribution(params: dict[str, Any]) -> None:
    count = 4000
    sampler = Sampler(SamplingParams(**({"temperature": 1.0, "seed": 5} | params)))
    expected = sampler.distribution(LOGITS, [])
    tokens = [sampler.sample(LOGITS, [])[0] for _ in range(count)]
    share = np.bincount(tokens, minlength=len(expected)) / count
    assert (share[expected == 0] == 0).all()
    # Five standard deviations of a share.
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_the_seed_decides_and_no_seed_does_not() -> None:
    logits = np.zeros(1000, np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.sample(logits, [])[0] for _ in range(10)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(0) == draws(0)
    assert draws(None) != draws(None)


def test_greedy_takes_nothing_from_the_random_state() -> None:
    sampler = Sampler(SamplingParams(seed=1))
    before = sampler.state()
    sampler.sample(LOGITS, [])
    assert sampler.state() == before


def test_a_restored_state_goes_on_identically() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(40, 50)).astype(np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.9, seed=11))
    for row in logits[:20]:
        sampler.sample(row, [])
    saved = json.loads(json.dumps(sampler.state()))
    rest = [sampler.sample(row, []) for row in logits[20:]]
    other = Sampler(SamplingParams(temperature=1.0, top_p=0.9, seed=12))
    other.restore(saved)
    assert [other.sample(row, []) for row in logits[20:]] == rest


def test_a_state_is_a_copy() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1))
    state = sampler.state()
    before = json.dumps(state)
    sampler.sample(LOGITS, [])
    assert json.dumps(state) == before
    assert json.dumps(sampler.state()) != before


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(MythosEdgeError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature, seed=0)).sample(logits, [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (-0.1, math.nan, math.inf, -math.inf)],
        ("top_k", -1),
        *[("top_p", value) for value in (0.0, -0.5, 1.0001, math.nan, math.inf)],
        *[("min_p", value) for value in (-0.1, 1.1, math.nan, math.inf)],
        *[("repetition_penalty", value) for value in (0.0, -1.0, math.nan, math.inf)],
        ("seed", -1),
    ],
)
def test_a_parameter_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} is {value}, expected ") as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0}, {"top_k": 0}, {"top_p": 1}, {"min_p": 0}, {"min_p": 1}, {"seed": 0}, {"top_p": 1e-300}],
)
def test_the_ends_of_the_ranges_are_allowed(params: dict[str, Any]) -> None:
    token, _ = Sampler(SamplingParams(**({"temperature": 1.0, "seed": 0} | params))).sample(LOGITS, [])
    assert 0 <= token < len(LOGITS)


@pytest.mark.parametrize("penalty", [1e-200, 1e-40, 1e-38, 1e-10, 0.5, 1.3, 1e10, 1e38, 1e40, 1e200])
def test_greedy_and_sampling_agree_on_any_penalty(penalty: float) -> None:
    """The order of the scores is that of exact arithmetic, however far they are apart."""
    logits = np.array([3.0, 2.0, -1.0, -2.0, 2.5, -0.0, 3.4e38, -3.4e38, 1e-45, -1e-45], np.float32)
    for history in ((0,), (0, 1), (2, 3), (0, 1, 2, 3), (6,), (7,), (8, 9), tuple(range(10))):
        exact = [Fraction(float(value)) for value in logits]
        factor = Fraction(penalty)
        for token in history:
            exact[token] = exact[token] / factor if exact[token] > 0 else exact[token] * factor
        wanted = exact.index(max(exact))
        assert Sampler(SamplingParams(repetition_penalty=penalty)).sample(logits, history)[0] == wanted
        sampler = Sampler(SamplingParams(repetition_penalty=penalty, temperature=1.0, top_k=1, seed=0))
        assert sampler.sample(logits, history)[0] == wanted
        free = SamplingParams(repetition_penalty=penalty, temperature=1.0, seed=0)
        distribution = Sampler(free).distribution(logits, history)
        assert np.isfinite(distribution).all()
        assert distribution[wanted] == distribution.max()
        assert 0 <= Sampler(free).sample(logits, history)[0] < len(logits)


def test_the_likeliest_are_those_of_the_unfiltered_logits() -> None:
    assert likeliest(LOGITS, 0) == ()
    for count in range(1, 5):
        found = likeliest(LOGITS + np.float32(30), count)
        assert [one.id for one in found] == [1, 3, 0, 2][:count]  # of equals, the lower id first
        assert [one.logprob for one in found] == pytest.approx([math.log(PROBABILITIES[one.id]) for one in found])
        assert {type(value) for one in found for value in one} == {int, float}
    assert [one.id for one in likeliest(np.zeros(50, np.float32), 3)] == [0, 1, 2]
    far = likeliest(np.array([-3.4e38, 3.4e38, 0], np.float32), 3)
    assert [one.id for one in far] == [1, 2, 0]
    assert far[0].logprob == 0


def test_the_likeliest_say_what_sampling_says() -> None:
    random = np.random.default_rng(7)
    logits = random.normal(size=500).astype(np.float32) * 4
    by_id = dict(likeliest(logits, 500))
    assert sorted(by_id) == list(range(500))
    assert sum(map(math.exp, by_id.values())) == pytest.approx(1)
    sampler = Sampler(SamplingParams(temperature=3.0, repetition_penalty=2.0, seed=1))
    for _ in range(20):
        token, logprob = sampler.sample(logits, [5, 6])
        assert by_id[token] == logprob
