"""The addition task against plain arithmetic, and the committed demo model against the unmodified reference."""

from collections.abc import Iterator
from functools import cache
from importlib import resources
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import UsageError
from mythos_edge.scripts import addition
from mythos_edge.scripts.lab.reference import open_mythos

ASSET = resources.files("mythos_edge.scripts") / "assets" / "carry_adder.pt"
NUMBERS = st.integers(0, 10**18)
COLUMNS = st.lists(st.one_of(st.integers(0, 99), st.integers(1, 10).map(lambda a: 9 * a)), min_size=1, max_size=20)
SUMS = [
    (0, 0),
    (1, 2),
    (5, 5),
    (9, 1),
    (99, 1),
    (12345, 67890),
    (99999999, 1),
    (1, 9999999),
    (45454545, 54545455),
    (123456789012, 987654321099),
    (999999, 999998),
    (3141592653589793, 2718281828459045),
    (70000000000000000, 30000000000000000),
]
# Two lowest columns that are alike, which only the column of zeros in front tells apart.
ALIKE = [(55, 55), (999999, 999999), (123456789012, 987654321098)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only wait for each other over tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digit_seeing(columns: list[int], place: int, reach: int) -> int:
    """The digit at ``place`` by adding whole numbers made of it and the ``reach`` columns below."""
    seen = columns[max(0, place - reach) : place + 1]
    total = sum((column // 10 + column % 10) * 10**power for power, column in enumerate(seen))
    return total // 10 ** (len(seen) - 1) % 10


def settled_after(columns: list[int], place: int) -> int:
    """The fewest columns below, at least 1, after which no carry from further below can change the digit.

    Where the stream begins is not known beforehand: that there is no column below the first counts as one look.
    """
    for reach in range(1, place + 1):
        below = columns[place - reach : place]
        total = sum((column // 10 + column % 10) * 10**power for power, column in enumerate(below))
        if total // 10**reach == (total + 1) // 10**reach:
            return reach
    return place + 1


@given(NUMBERS, NUMBERS)
def test_digits_are_those_of_the_sum(a: int, b: int) -> None:
    columns = addition.columns_of(a, b)
    assert len(columns) == max(len(str(a)), len(str(b))) + 1
    ids = (addition.digits(np.array(columns)) + addition.DIGIT_BASE).tolist()
    assert all(addition.DIGIT_BASE <= number < addition.VOCAB_SIZE for number in ids)
    assert addition.sum_from_ids(ids) == a + b


@given(NUMBERS, NUMBERS, st.integers(1, 30))
def test_columns_hold_both_numbers(a: int, b: int, width: int) -> None:
    columns = addition.columns_of(a, b, width)
    assert len(columns) == width
    assert all(0 <= column < addition.DIGIT_BASE for column in columns)
    assert sum(column // 10 * 10**place for place, column in enumerate(columns)) == a % 10**width
    assert sum(column % 10 * 10**place for place, column in enumerate(columns)) == b % 10**width


def test_columns_by_hand() -> None:
    assert addition.columns_of(70, 5) == [5, 70, 0]
    assert addition.columns_of(0, 0) == [0, 0]
    assert addition.sum_from_ids([105, 107, 100]) == 75
    assert addition.sum_from_ids([]) == 0


@given(COLUMNS)
def test_chain_lengths_against_brute_force(columns: list[int]) -> None:
    expected = [settled_after(columns, place) for place in range(len(columns))]
    assert addition.chain_lengths(np.array(columns)).tolist() == expected


@given(COLUMNS, st.integers(1, 22))
def test_digits_within_reach_against_brute_force(columns: list[int], reach: int) -> None:
    expected = [digit_seeing(columns, place, reach) for place in range(len(columns))]
    assert addition.digits(np.array(columns), reach).tolist() == expected


def test_every_short_stream_of_carry_kinds() -> None:
    kinds = (0, 90, 99)  # sums 0, 9 and 18: no carry, passes one on, makes one
    streams = np.array(list(product(kinds, repeat=6)))
    lengths = addition.chain_lengths(streams)
    assert lengths.tolist() == [[settled_after(row, place) for place in range(6)] for row in streams.tolist()]
    for reach in range(1, 7):
        expected = [[digit_seeing(row, place, reach) for place in range(6)] for row in streams.tolist()]
        assert addition.digits(streams, reach).tolist() == expected
    assert (addition.digits(streams) == addition.digits(streams, 6)).all()


def test_leading_axes_are_kept(random: np.random.Generator) -> None:
    columns = addition.random_columns(random, 6, 9)
    cube = columns.reshape(2, 3, 9)
    assert (addition.digits(cube).reshape(6, 9) == addition.digits(columns)).all()
    assert (addition.chain_lengths(cube).reshape(6, 9) == addition.chain_lengths(columns)).all()


def test_random_columns_have_chains_of_every_length(random: np.random.Generator) -> None:
    columns = addition.random_columns(random, 400, 24)
    assert columns.shape == (400, 24)
    assert columns.min() >= 0
    assert columns.max() < addition.DIGIT_BASE
    assert set(range(1, 9)) <= set(addition.chain_lengths(columns).flatten().tolist())


@given(NUMBERS)
def test_operands_round_trip(number: int) -> None:
    assert addition.check_operand(str(number)) == number
    assert addition.check_operand(f"00{number}") == number


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", "1e3", " 1", "1_000", "0x10", "nine", "²", "٣"])
def test_bad_operands(text: str) -> None:
    with pytest.raises(UsageError, match="expected a whole number, 0 or more") as caught:
        addition.check_operand(text)
    assert repr(text) in str(caught.value)


# --- the committed demo model --------------------------------------------------------------------------------


@cache
def demo_model() -> Any:
    """The unmodified reference with the committed weights."""
    main = open_mythos()
    with resources.as_file(ASSET) as path, open_checkpoint(path) as checkpoint:
        model = main.OpenMythos(main.MythosConfig(**vars_of(checkpoint.config, main)))
        weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # The head is tied and the tables are computed.
    assert set(missing) <= {"head.weight", "freqs_cis", "freqs_cis_mla"}
    assert not unexpected
    return model.eval()


def vars_of(config: Any, main: Any) -> dict[str, Any]:
    """The fields that the reference's config has too."""
    return {name: getattr(config, name) for name in main.MythosConfig.__dataclass_fields__ if hasattr(config, name)}


@torch.no_grad()
def demo_sum(a: int, b: int) -> int:
    """The sum as the reference forward says it."""
    logits = demo_model()(torch.tensor([addition.stream_of(a, b)]))
    return addition.sum_from_ids(logits[0, 1:].argmax(-1).tolist())


def test_demo_model_is_small_enough_to_ship() -> None:
    with resources.as_file(ASSET) as path:
        assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize(("a", "b"), SUMS)
def test_demo_model_adds_with_the_reference(a: int, b: int) -> None:
    assert demo_sum(a, b) == a + b
    assert demo_sum(b, a) == a + b


def test_demo_model_on_random_streams(random: np.random.Generator) -> None:
    columns = addition.random_columns(random, 100, 24)
    solvable = addition.chain_lengths(columns) <= demo_model().cfg.max_loop_iters
    with torch.no_grad():
        predicted = demo_model()(torch.from_numpy(columns)).argmax(-1).numpy() - addition.DIGIT_BASE
    assert (predicted == addition.digits(columns))[solvable].mean() > 0.998


@pytest.mark.parametrize(("a", "b"), ALIKE)
def test_demo_model_on_alike_lowest_columns(a: int, b: int) -> None:
    assert demo_sum(a, b) == a + b


def test_demo_model_on_every_pair_of_columns_after_a_zero() -> None:
    columns = np.array([(0, below, column) for below in range(100) for column in range(100)])
    with torch.no_grad():
        predicted = demo_model()(torch.from_numpy(columns)).argmax(-1).numpy() - addition.DIGIT_BASE
    assert (predicted == addition.digits(columns)).all()
    assert demo_sum(9999990, 9999990) == 2 * 9999990
