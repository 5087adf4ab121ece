"""Which mapping of what a trainer saved holds the model's tensors, by the keys that trainers use, or by ``--key``.

A mapping fits when its names look like those of an OpenMythos model. Several that fit are never chosen from in
silence, and one under a key that no known trainer uses is named, not taken.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mythos_edge.model.errors import CheckpointError
from mythos_edge.model.json_files import few

# In the order in which they are preferred: what was trained goes before its running average.
TENSOR_KEYS = ("model", "state_dict", "model_state_dict", "module", "ema", "params", "weights", "net")
_DEEPEST = 3
# Under these a trainer's file, or a config.json of several sections, keeps the model's fields.
CONFIG_KEYS = (
    "cfg", "config", "model_config", "model_cfg", "mythos_config", "model_args", "hyper_parameters", "hparams", "args",
)  # fmt: skip

Named = Mapping[Any, Any]


@dataclass(frozen=True)
class Choice:
    """The chosen mapping, the dotted path of keys that leads to it ("" for the file itself), and notes on others."""

    tensors: Named
    path: str
    notes: tuple[str, ...] = ()


def choose_tensors(loaded: Named, key: str | None, origin: str) -> Choice:
    """The model's tensors in ``loaded``: those under the dotted ``key``, else those under a known key that fit.

    Raises CheckpointError, naming the keys that hold tensors, when there is no such key or none fits.
    """
    if key is not None:
        return Choice(_under(loaded, key, origin), key)
    holders = dict(_holders(loaded))
    fitting = [path for path, tensors in holders.items() if _fits(tensors)]
    known = sorted((path for path in fitting if _rank(path) is not None), key=lambda path: _rank(path) or 0)
    if known:
        others = [path for path in known[1:] if not _same(holders[path], holders[known[0]])]
        others += [path for path in fitting if path not in known and not _same(holders[path], holders[known[0]])]
        note = (
            f"{origin}: took the tensors of {known[0] or 'the file itself'}; "
            f"{few(others)} {'holds' if len(others) == 1 else 'hold'} a model, too: --key {others[0]} takes that"
            if others
            else None
        )
        return Choice(holders[known[0]], known[0], () if note is None else (note,))
    if fitting:
        raise CheckpointError(
            f"{origin}: no model under a known key ({', '.join(TENSOR_KEYS)}); tensors of one are under "
            f"{few(fitting)}: take it with --key {fitting[0]}"
        )
    # Nothing looks like a model: what a known key holds, or the file itself, is told what it lacks.
    for name in TENSOR_KEYS:
        if name in holders:
            return Choice(holders[name], name)
    if holders and "" not in holders:
        raise CheckpointError(
            f"{origin}: no model under a known key ({', '.join(TENSOR_KEYS)}); there are tensors under "
            f"{few(holders)}: name the model's with --key NAME"
        )
    return Choice(loaded, "")


def under_prefix(names: Mapping[str, Any], prefix: str, origin: str) -> dict[str, Any]:
    """The entries whose names begin with the dotted ``prefix``, under the rest of the name. Raises CheckpointError."""
    found = {name[len(prefix) + 1 :]: value for name, value in names.items() if str(name).startswith(f"{prefix}.")}
    if not found:
        beginnings = list(dict.fromkeys(str(name).partition(".")[0] for name in names))
        raise CheckpointError(f"{origin}: no tensors under the key {prefix!r}: there are {few(beginnings)}")
    return found


def _under(loaded: Named, key: str, origin: str) -> Named:
    """Follows the dotted ``key``, through nested mappings and, from there on, as the beginning of names."""
    place, rest = loaded, key
    while rest:
        parts = rest.split(".")
        heads = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        head = next((head for head in heads if isinstance(place.get(head), Mapping)), None)
        if head is None:
            break
        place, rest = place[head], rest[len(head) + 1 :]
    if rest and any(str(name).startswith(f"{rest}.") for name in place):
        return under_prefix(place, rest, origin)
    if not rest and _holds_tensors(place):
        return place
    keys = [path for path, _ in _holders(loaded) if path]
    raise CheckpointError(f"{origin}: no tensors under the key {key!r}: there are {few(keys)}")


def _holders(loaded: Named, path: str = "", depth: int = 0) -> Iterator[tuple[str, Named]]:
    """Every mapping, by its dotted path, that holds tensors itself."""
    if _holds_tensors(loaded):
        yield path, loaded
    if depth < _DEEPEST:
        for name, value in loaded.items():
            if isinstance(value, Mapping):
                yield from _holders(value, f"{path}.{name}".lstrip("."), depth + 1)


def _holds_tensors(mapping: Named) -> bool:
    return any(isinstance(value, Tensor) for value in mapping.values())


def _fits(tensors: Named) -> bool:
    names = [str(name) for name in tensors]
    return any(name.endswith("embed.weight") for name in names) and any("recurrent." in name for name in names)


def _rank(path: str) -> int | None:
    """The place of a path in the order of known keys, the file itself before them; None where a part is not known."""
    if not path:
        return 0
    parts = path.split(".")
    if not set(parts) <= set(TENSOR_KEYS):
        return None
    return 1 + 10 * TENSOR_KEYS.index(parts[0]) + len(parts)


def _same(one: Named, other: Named) -> bool:
    """Whether two mappings name the same bytes of the file."""
    if one.keys() != other.keys():
        return False
    return all(_place(one[name]) == _place(other[name]) for name in one)


def _place(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return id(value)
    storage = value.untyped_storage()
    return getattr(storage, "_checkpoint_offset", None), value.storage_offset(), tuple(value.shape)
