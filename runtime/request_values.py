"""The values of a request, checked by the annotations of the dataclass that holds them.

A field's type says what it must be, and ``Annotated`` adds bounds or the words of an enumeration:

    max_depth: Annotated[int | None, Within(least=1)] = None

What is a number to numpy is taken as the Python number it is, so that a request can be written as JSON; a bool is no
number, a float is no whole number, and text is neither.
"""

import enum
import functools
import math
import operator
import os
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mythos_edge.model.errors import UsageError, one_line

_LONGEST_SHOWN = 60
# Python refuses to write integers of thousands of digits.
_LONGEST_NUMBER_BITS = 256


@dataclass(frozen=True)
class Within:
    """Bounds of a number: ``least`` and ``most`` belong to the range, ``above`` does not.

    ``unit`` is what is counted; ``says`` puts the whole range into words where its parts alone would not explain it.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    unit: str = ""
    says: str = ""

    def missed(self, number: float) -> str:
        """Says what was expected in place of ``number``; "" where it is finite and in range, which NaN never is."""
        low = high = ""
        if self.above is not None and not number > self.above:
            low = f"more than {self.above:g}"
        elif self.least is not None and not number >= self.least:
            low = f"at least {self._counted(self.least)}" if self.least else "0 or more"
        if self.most is not None and not number <= self.most:
            high = f"at most {self._counted(self.most)}"
        finite = "" if -math.inf < number < math.inf else "a finite number"
        missed = ", ".join(filter(None, (finite, low, high)))
        return self.says if missed and self.says else missed

    def _counted(self, number: float) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{number:g}{unit}" + ("s" if unit and number != 1 else "")


_ANY_NUMBER = Within()


def whole(name: str, value: Any, bounds: Within = _ANY_NUMBER, also: str = "") -> int:
    """The whole number ``value`` as Python's; ``also`` names what else is allowed. Raises UsageError."""
    number = None
    # Both kinds of truth values can stand for 0 and 1.
    if not isinstance(value, bool | np.bool_):
        try:
            number = int(operator.index(value))
        except TypeError:
            number = None
    if number is None:
        raise _unexpected(name, value, f"a whole number{also}")
    if missed := bounds.missed(number):
        raise _unexpected(name, number, f"{missed}{also}")
    return number


def real(name: str, value: Any, bounds: Within = _ANY_NUMBER) -> float:
    """The finite number ``value`` as Python's. Raises UsageError."""
    one = value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(one, bool) or not isinstance(one, int | float | np.integer | np.floating):
        raise _unexpected(name, value, "a number")
    try:
        number = float(one)
    except OverflowError:
        number = math.inf
    if missed := bounds.missed(number):
        raise _unexpected(name, one, missed)
    return number


def flag(name: str, value: Any) -> bool:
    """True or False. Raises UsageError for anything that merely counts as one."""
    if not isinstance(value, bool | np.bool_):
        raise _unexpected(name, value, "True or False")
    return bool(value)


def name_or_none(name: str, value: Any) -> str | None:
    """The text that names something, or None. Raises UsageError."""
    if value is not None and not isinstance(value, str):
        raise _unexpected(name, value, "a name")
    return value


def token_ids(name: str, value: Any, *, ordered: bool = True, of: str = "token id") -> list[int]:
    """The token ids in a list, a tuple or an array of integers with one axis; without ``ordered`` a set will do.

    ``of`` is what the numbers are, where they are none of tokens. Raises UsageError.
    """
    if hasattr(value, "__array__"):
        return _ids_of_array(name, value, of)
    kinds = (Sequence,) if ordered else (Sequence, AbstractSet)
    if not isinstance(value, kinds) or isinstance(value, str | bytes | bytearray | memoryview):
        raise UsageError(f"{name} is of type {type(value).__name__}, expected a list of {of}s")
    if all(type(item) is int for item in value):
        return list(value)
    return [whole(f"a {of} of {name}", item) for item in value]


def _ids_of_array(name: str, value: Any, of: str) -> list[int]:
    array = as_array(name, value)
    if array.ndim != 1:
        raise UsageError(f"{name} is an array of shape {array.shape}, expected {of}s along one axis")
    # An empty array has numpy's own dtype, float64.
    if array.size and array.dtype.kind not in "iu":
        raise UsageError(f"{name} is an array of {array.dtype}, expected {of}s, which are integers")
    return [int(number) for number in array.tolist()]


def as_array(name: str, value: Any) -> np.ndarray[Any, Any]:
    """``value`` as numpy sees it. Raises UsageError for rows of different lengths, and where it does not."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        why = "its rows differ in length" if "inhomogeneous" in str(error) else one_line(error)
        raise UsageError(f"{name}: {type(value).__name__} is no array of integers: {why}") from None


def texts(name: str, value: Any) -> tuple[str, ...]:
    """The texts in a list or tuple; one alone is a text, not its letters. Raises UsageError."""
    if isinstance(value, str):
        return (str(value),)
    good = isinstance(value, Sequence | AbstractSet) and not isinstance(value, bytes | bytearray | memoryview)
    if not good or not all(isinstance(item, str) for item in value):
        raise _unexpected(name, value, "text or a list of texts")
    return tuple(str(item) for item in value)


def check_fields(request: Any) -> None:
    """Checks every field of a frozen dataclass by its annotation, and puts plain Python values in their places.

    Raises UsageError.
    """
    kind: Any = type(request)
    for name, rule in _rules(kind).items():
        object.__setattr__(request, name, rule.checked(name, getattr(request, name)))


def check_names(kind: type, names: Collection[str]) -> None:
    """Raises UsageError when one of ``names`` is no field of the dataclass ``kind``."""
    assert is_dataclass(kind)
    known = {item.name for item in fields(kind)}
    unknown = sorted(set(names) - known)
    if unknown:
        raise UsageError(f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}")


@dataclass(frozen=True)
class _Rule:
    """The rule of one field: the type of its value, bounds, words that may stand in its place, and None."""

    kind: Any
    bounds: Within
    words: tuple[str, ...]
    enumeration: type[enum.StrEnum] | None
    optional: bool

    def checked(self, name: str, value: Any) -> Any:
        if value is None and self.optional:
            return None
        if isinstance(value, str) and value in self.words:
            return str(value)
        also = "".join(f" or {word!r}" for word in self.words)
        if self.enumeration is not None:
            if not isinstance(value, str) or value not in list(self.enumeration):
                raise _unexpected(name, value, f"one of {', '.join(self.enumeration)}")
            return self.enumeration(value)
        if self.kind is int:
            return whole(name, value, self.bounds, also)
        if self.kind is float:
            return real(name, value, self.bounds)
        if self.kind is bool:
            return flag(name, value)
        if self.kind == tuple[int, ...]:
            return tuple(token_ids(name, value, ordered=False))
        assert self.kind == tuple[str, ...], f"no rule for {name} of type {self.kind}"
        return texts(name, value)


@functools.cache
def _rules(kind: Any) -> Mapping[str, _Rule]:
    return {name: _rule(hint) for name, hint in typing.get_type_hints(kind, include_extras=True).items()}


def _rule(hint: Any) -> _Rule:
    hint, *extras = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    words = [word for part in parts if typing.get_origin(part) is Literal for word in typing.get_args(part)]
    (plain,) = [part for part in parts if part is not types.NoneType and typing.get_origin(part) is not Literal]
    bounds = next((extra for extra in extras if isinstance(extra, Within)), _ANY_NUMBER)
    enumeration = next((one for one in extras if isinstance(one, type) and issubclass(one, enum.StrEnum)), None)
    return _Rule(plain, bounds, tuple(words), enumeration, types.NoneType in parts)


def shown(value: Any) -> str:
    """A value in an error: on one line, and not too much of it."""
    if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER_BITS:
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # anybody's class may be shown, and a list may hold a number as long as those above
        text = f"of type {type(value).__name__}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _unexpected(name: str, value: Any, expected: str) -> UsageError:
    return UsageError(f"{name} is {shown(value)}, expected {expected}")


def path_of(value: Any, of: str) -> Path:
    """The place that ``value`` names, as a path. Raises UsageError for what names none."""
    if not isinstance(value, str | os.PathLike):
        raise UsageError(f"path is {shown(value)}, expected the path of {of}")
    return Path(value)
