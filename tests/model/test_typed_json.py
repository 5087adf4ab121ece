"""Dataclasses read from JSON: every type it knows, and the one line each thing that does not fit ends in."""

from dataclasses import dataclass
from typing import Any

import pytest

from mythos_edge.model.errors import BundleError
from mythos_edge.model.typed_json import dataclass_from_json


@dataclass(frozen=True)
class _Leaf:
    on: bool
    size: float


@dataclass(frozen=True)
class _Tree:
    age: int
    leaves: dict[str, _Leaf]
    shape: tuple[int | str, ...]
    top: _Leaf | None
    note: str | None
    config: dict[str, Any]


LEAF = {"on": True, "size": 1.5}
TREE: dict[str, Any] = {
    "age": 7,
    "leaves": {"left": LEAF, "right": LEAF},
    "shape": ["B", 3],
    "top": LEAF,
    "note": "x",
    "config": {"dim": 8},
}


def _read(**changes: Any) -> _Tree:
    return dataclass_from_json(_Tree, TREE | changes, "tree")


def test_every_type_is_read_at_every_level() -> None:
    leaf = _Leaf(True, 1.5)
    assert _read() == _Tree(7, {"left": leaf, "right": leaf}, ("B", 3), leaf, "x", {"dim": 8})
    assert _read(leaves={}, shape=[], top=None, note=None) == _Tree(7, {}, (), None, None, {"dim": 8})


def test_whole_numbers_are_read_as_floats_where_floats_are_meant() -> None:
    size = dataclass_from_json(_Leaf, {"on": True, "size": -3}, "leaf").size
    assert type(size) is float
    assert size == -3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"age": True}, "tree.age is True, expected int"),
        ({"age": 7.0}, "tree.age is 7.0, expected int"),
        ({"leaves": []}, "tree.leaves is [], expected dict"),
        ({"leaves": {"left": 1}}, "tree.leaves.left is 1, expected dict"),
        ({"leaves": {"left": {**LEAF, "on": 1}}}, "tree.leaves.left.on is 1, expected bool"),
        ({"top": {**LEAF, "size": True}}, "tree.top.size is True, expected float"),
        ({"top": {**LEAF, "size": 10**400}}, "tree.top.size is too large a number: it was damaged or edited"),
        ({"top": {"on": True}}, "tree.top has missing field 'size': it was damaged or edited"),
        ({"top": {**LEAF, "b": 1, "a": 1}}, "tree.top has unknown field 'a': it was damaged or edited"),
        ({"shape": "B"}, "tree.shape is 'B', expected list"),
        ({"shape": [True]}, "tree.shape is True, expected int | str"),
        ({"note": 3}, "tree.note is 3, expected str | None"),
        ({"config": None}, "tree.config is None, expected dict"),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError) as caught:
        _read(**changes)
    assert str(caught.value) == message
