"""A dataclass from the JSON object that describes it, checked all the way down. Standard library only.

Made for the bundle's manifest, so errors are BundleErrors. No schema language and no file reader: the annotations are
the schema. Of types it knows what the manifest needs: bool, int, float and str, ``dict[str, X]``, ``tuple[X, ...]``,
dataclasses, Any, and unions of plain types or of one dataclass and None.
Nothing is converted but whole numbers to the floats they stand for, no field may be left out, floats are finite.
"""

import dataclasses
import math
import reprlib
import types
import typing
from typing import Any, TypeVar

from mythos_edge.model.errors import BundleError

T = TypeVar("T")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def dataclass_from_json(kind: type[T], value: Any, where: str) -> T:
    """The ``kind`` whose fields the JSON object ``value`` has; ``where`` names it in errors.

    Raises BundleError for another type, an unknown and a missing field.
    """
    values, hints = _expect(value, dict, where), typing.get_type_hints(kind)
    unknown, missing = sorted(set(values) - set(hints)), sorted(set(hints) - set(values))
    if unknown or missing:
        what = f"unknown field {unknown[0]!r}" if unknown else f"missing field {missing[0]!r}"
        raise BundleError(f"{where} has {what}: it was damaged or edited")
    return kind(**{name: _typed(hint, values[name], f"{where}.{name}") for name, hint in hints.items()})


def _typed(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type ``kind``."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return dataclass_from_json(kind, value, where)
    if origin is dict:
        items = _expect(value, dict, where).items()
        return {name: _typed(arguments[1], item, f"{where}.{name}") for name, item in items}
    if origin is tuple:
        return tuple(_typed(arguments[0], item, where) for item in _expect(value, list, where))
    if origin is types.UnionType:
        nested = next(filter(dataclasses.is_dataclass, arguments), None)
        if nested is not None and isinstance(value, dict):
            return _typed(nested, value, where)
        if isinstance(value, bool) or not isinstance(value, arguments):
            raise BundleError(f"{where} is {_REPR.repr(value)}, expected {kind}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise BundleError(f"{where} is too large a number: it was damaged or edited") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise BundleError(f"{where} is {value}, expected a finite number: it was damaged or edited")
    return _expect(value, kind, where)


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BundleError(f"{where} is {_REPR.repr(value)}, expected {kind.__name__}")
    return value
