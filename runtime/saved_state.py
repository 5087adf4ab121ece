"""A sequence on disk: tokens, caches, pending states and random state in one .npz, tied to its weights."""

import json
import math
import os
import struct
import tokenize
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bounded_files import open_regular
from mythos_edge.model.errors import UsageError, one_line
from mythos_edge.model.looped import LoopedModel
from mythos_edge.model.output_files import writing
from mythos_edge.runtime.backends.memory import ROW_DTYPES
from mythos_edge.runtime.halting import Depth, Policy, ResolvedDepth
from mythos_edge.runtime.request_values import Within, shown, token_ids, whole
from mythos_edge.runtime.sampling import Sampler, SamplingParams
from mythos_edge.runtime.staircase import Staircase

_FORMAT = 1
# What reading a damaged archive, array or header raises besides OSError.
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RecursionError,
    MemoryError,
    OverflowError,
    SyntaxError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Saved:
    """The content of a file that ``write`` made."""

    ids: list[int]
    depth: ResolvedDepth
    sampling: SamplingParams
    sampler_state: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def write(path: Path, weights: str, ids: list[int], sampler: Sampler, staircase: Staircase) -> None:
    """Writes the file, which appears whole or not at all; ``weights`` is their identity. Raises UsageError."""
    header = {
        "format": _FORMAT,
        "weights": weights,
        "ids": ids,
        "depth": asdict(staircase.depth),
        "sampling": asdict(sampler.params),
        "sampler_state": sampler.state(),
    }
    content: dict[str, Any] = {"header": np.array(json.dumps(header)), **staircase.state()}
    with writing(path, "the session") as file:
        np.savez(file, **content)


def read(path: Path, weights: str, model: LoopedModel, max_context: int) -> Saved:
    """Reads a saved session, in memory bounded by its size.

    Raises UsageError when the file is missing, damaged, or of other weights than those of the identity ``weights``.
    """
    try:
        arrays = _arrays(path)
        header = _header(arrays.pop("header"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the session: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise damaged(path, error) from error
    # Before anything else, which another format may hold in another way.
    if header["format"] is True or header["format"] != _FORMAT:
        raise UsageError(
            f"{path}: is of format {shown(header['format'])}, and this mythos-edge reads {_FORMAT}: "
            "restore it with the version that saved it"
        )
    if header["weights"] != weights:
        raise UsageError(f"{path}: was saved with another bundle or target: open it with the one it was made with")
    try:
        return _saved(header, arrays, model, max_context)
    except (*_DAMAGE, UsageError) as error:
        raise damaged(path, error) from error


def require_cache(path: Path, saved: Saved, cache: str) -> None:
    """Raises UsageError unless the cached rows of ``saved`` are in the form ``cache``."""
    rows = saved.arrays.get("loop_0_0.data")
    found = next((name for name, dtype in ROW_DTYPES.items() if rows is not None and rows.dtype == dtype), cache)
    if found != cache:
        raise UsageError(
            f"{path}: was saved with caches in {found}, this session keeps them in {cache}: open it with cache {found}"
        )


def damaged(path: Path, error: Exception) -> UsageError:
    """The error for a file that holds no session because of ``error``."""
    return UsageError(f"{path}: not a saved session, or damaged ({one_line(error)}): save it again")


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz as ``numpy.savez`` writes it. Raises ValueError for anything else in it."""
    with open_regular(path) as opened, zipfile.ZipFile(opened) as archive:
        members, size = archive.infolist(), os.fstat(opened.fileno()).st_size
        # Savez compresses nothing: what would unfold, or shares its bytes with another, was not written by it.
        if any(one.compress_type != zipfile.ZIP_STORED for one in members):
            raise ValueError("its records are compressed")
        if sum(one.file_size for one in members) > size or len({one.filename for one in members}) < len(members):
            raise ValueError("its records overlap")
        return {one.filename.removesuffix(".npy"): _array(archive.read(one)) for one in members}


def _array(content: bytes) -> NDArray[Any]:
    """The array in the bytes of a .npy file, sharing their memory."""
    stream = BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not an array as this version writes it")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    at = stream.tell()
    if fortran or dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - at:
        raise ValueError(f"an array of {dtype} and shape {shape} is not what its record holds")
    return np.frombuffer(content, dtype, offset=at).reshape(shape)


def _header(array: NDArray[Any]) -> dict[str, Any]:
    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} in its header")

    if array.shape or array.dtype.kind != "U":
        raise ValueError("its header is no text")
    header = json.loads(str(array), parse_constant=refuse)
    return _exactly(header, ("format", "weights", "ids", "depth", "sampling", "sampler_state"), "the header")


def _saved(header: Mapping[str, Any], arrays: dict[str, NDArray[Any]], model: LoopedModel, max_context: int) -> Saved:
    """The session of a header and arrays. Raises ValueError or UsageError for values that ``write`` does not write."""
    ids = token_ids("ids", header["ids"])
    if not all(0 <= number < model.vocab_size for number in ids):
        raise ValueError("a token id is out of range")
    # The last token of a full context has no column.
    if len(ids) > max_context + 1:
        raise ValueError(f"{len(ids)} tokens, more than the context has room for")
    depth = _depth(header["depth"])
    slots = model.prelude_slots + depth.max_depth * model.step_slots + model.coda_slots
    # Columns and data of every slot, h and e, and two counts; the names are checked as they are looked up.
    if len(arrays) != 2 * (slots + 2) + 2:
        raise ValueError(f"{len(arrays)} arrays are not those of {depth.max_depth} loop steps")
    if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in arrays.values()):
        raise ValueError("a cached value is not finite")
    columns, counts = arrays["columns"], arrays["counts"]
    if columns.shape or counts.shape != (4,) or columns.dtype.kind != "i" or counts.dtype.kind != "i":
        raise ValueError("its counts are no whole numbers")
    if not 0 <= int(columns) <= len(ids) or (counts < 0).any():
        raise ValueError(f"{int(columns)} columns for {len(ids)} tokens")
    names = [item.name for item in fields(SamplingParams)]
    sampling = SamplingParams(**_exactly(header["sampling"], names, "sampling"))
    return Saved(ids, depth, sampling, _sampler_state(header["sampler_state"]), arrays)


def _depth(values: Any) -> ResolvedDepth:
    names = [item.name for item in fields(ResolvedDepth)]
    given = Depth(**_exactly(values, names, "depth"))
    if given.max_depth is None or given.threshold is None or given.min_depth > given.max_depth:
        raise ValueError("its depth parameters are no numbers, or contradict each other")
    return ResolvedDepth(Policy(given.policy), given.max_depth, given.min_depth, given.threshold)


def _sampler_state(values: Any) -> dict[str, Any]:
    """The state of numpy's PCG64, which takes numbers beyond its range without a word."""
    outer = _exactly(values, ("bit_generator", "state", "has_uint32", "uinteger"), "the random state")
    inner = _exactly(outer["state"], ("state", "inc"), "the random state")
    if outer["bit_generator"] != "PCG64":
        raise ValueError("the random state is of another generator")
    for name, value, bits in (
        *((name, value, 128) for name, value in inner.items()),
        ("has_uint32", outer["has_uint32"], 1),
        ("uinteger", outer["uinteger"], 32),
    ):
        whole(name, value, Within(least=0, most=2**bits - 1))
    return outer


def _exactly(values: Any, names: Collection[str], what: str) -> dict[str, Any]:
    """``values`` as the JSON object with just these names."""
    if not isinstance(values, dict) or set(values) != set(names):
        raise ValueError(f"{what} has not the fields {', '.join(names)}")
    return values
