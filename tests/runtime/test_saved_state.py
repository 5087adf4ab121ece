"""Saved sessions that were damaged, or made to do harm: one line, bounded by the file, and nothing changes."""

import copy
import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.session import Session

PROMPT = [5, 17, 300, 2, 9]
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def session(mla_bundle: Path) -> Iterator[Session]:
    with Session.open(mla_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def saved(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    """The arrays that a session saves."""
    session.generate(PROMPT, max_new_tokens=6, temperature=1.0, seed=3, max_lag=2)
    path = tmp_path_factory.mktemp("saved") / "saved.npz"
    session.save(path)
    with np.load(path) as file:
        return dict(file)


def refused(session: Session, path: Path, message: str = "not a saved session, or damaged") -> None:
    """``path`` is refused in one line, and the session goes on as if nothing had been."""
    wanted = session.generate(PROMPT, max_new_tokens=3).ids
    session.generate(PROMPT, max_new_tokens=1)
    with pytest.raises(UsageError, match=message) as caught:
        session.restore(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert session.generate([], resume=True, max_new_tokens=2).ids == wanted[1:]


def with_header(saved: Arrays, change: Callable[[dict[str, Any]], object]) -> Arrays:
    header = json.loads(str(saved["header"]))
    change(header)
    return saved | {"header": np.array(json.dumps(header))}


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for name in path[:-1]:
            header = header[name]
        header[path[-1]] = value

    return change


def test_what_was_saved_is_taken_up(session: Session, saved: Arrays, tmp_path: Path) -> None:
    np.savez(tmp_path / "same.npz", **saved)
    session.restore(tmp_path / "same.npz")
    request: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_new_tokens": 5}
    made = session.generate([], resume=True, **request).ids
    whole = session.generate(PROMPT, **{**request, "max_new_tokens": 11}).ids
    assert whole[6:] == made


@pytest.mark.parametrize("value", [0, 2, "1", None, True, 1.5, 10**30, [1], "x" * 10_000])
def test_another_format_says_so(session: Session, saved: Arrays, tmp_path: Path, value: Any) -> None:
    np.savez(tmp_path / "bad.npz", **with_header(saved, put("format", value=value)))
    message = "is of format .*, and this mythos-edge reads 1: restore it with the version that saved it"
    refused(session, tmp_path / "bad.npz", message)


HEADERS: list[tuple[tuple[str, ...], list[Any]]] = [
    (("ids",), ["12", [1.0], ["1"], [True], [None], [331], [-1], [10**30], [1] * 300, {"1": 1}, None, [[1]], [1, 2]]),
    (("depth",), [None, [], {}, "exact", {"policy": "exact"}]),
    (("depth", "policy"), ["fast", None, 1, ["exact"]]),
    (("depth", "max_depth"), [0, -1, 10**7, 10**30, 4096, 5, 7, 6.0, "6", True, None, [6]]),
    (("depth", "min_depth"), [0, 7, 10**7, 1.0, "1", None]),
    (("depth", "threshold"), [0, -1.0, 1e39, "0.9", None, True, [0.9]]),
    (("depth", "more"), [1]),
    (("sampling",), [None, [], {}, {"seed": 1}]),
    (("sampling", "temperature"), [-1, "1", None, True, []]),
    (("sampling", "top_k"), [-1, 1.5, "1", None]),
    (("sampling", "repetition_penalty"), [0, -1, "1", 1e300]),
    (("sampling", "seed"), [-1, 1.5, "1", 2**300, True]),
    (("sampler_state",), [None, [], {}, "PCG64"]),
    (("sampler_state", "bit_generator"), ["MT19937", None, 1]),
    (("sampler_state", "state"), [None, 1, {}, {"state": 1}, {"state": 1, "inc": 1, "more": 1}]),
    (("sampler_state", "state", "state"), [-1, 2**128, 1.5, "1", None, True]),
    (("sampler_state", "state", "inc"), [-1, 2**128, 1.5, "1", None, True]),
    (("sampler_state", "has_uint32"), [-1, 2, "0", None, 0.0, True]),
    (("sampler_state", "uinteger"), [-1, 2**32, "0", None, 0.0]),
]


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in HEADERS for value in values], ids=lambda one: str(one)[:40]
)
def test_a_header_of_other_values_is_refused(
    session: Session, saved: Arrays, tmp_path: Path, path: tuple[str, ...], value: Any
) -> None:
    np.savez(tmp_path / "bad.npz", **with_header(saved, put(*path, value=value)))
    refused(session, tmp_path / "bad.npz")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        "5",
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5000,
        '{"format": 1, "format": 1}',
        "Infinity",
    ],
    ids=lambda text: text[:12],
)
def test_a_header_that_is_no_object_is_refused(session: Session, saved: Arrays, tmp_path: Path, text: str) -> None:
    np.savez(tmp_path / "bad.npz", **saved | {"header": np.array(text)})
    refused(session, tmp_path / "bad.npz")


@pytest.mark.parametrize("word", ["Infinity", "-Infinity", "NaN", "1e999"])
@pytest.mark.parametrize("place", ["threshold", "temperature"])
def test_a_header_of_numbers_that_are_not_finite_is_refused(
    session: Session, saved: Arrays, tmp_path: Path, word: str, place: str
) -> None:
    text = str(with_header(saved, put("depth" if place == "threshold" else "sampling", place, value=77.5))["header"])
    assert "77.5" in text
    np.savez(tmp_path / "bad.npz", **saved | {"header": np.array(text.replace("77.5", word))})
    refused(session, tmp_path / "bad.npz")


def _arrays(change: str, saved: Arrays) -> Arrays:
    """The arrays with one damage."""
    made = copy.deepcopy(saved)
    columns = int(made["columns"])
    changes: dict[str, Arrays] = {
        "more columns than tokens": {"columns": np.array(columns + 2)},
        "no columns": {"columns": np.array(0)},
        "negative columns": {"columns": np.array(-1)},
        "columns of floats": {"columns": np.array(float(columns))},
        "columns of text": {"columns": np.array(str(columns))},
        "columns in a list": {"columns": np.array([columns])},
        "counts of floats": {"counts": made["counts"].astype(float)},
        "negative counts": {"counts": -made["counts"] - 1},
        "few counts": {"counts": made["counts"][:3]},
        "no staircase": {"loop_0_0.columns": np.array([0, 1]), "loop_0_0.data": made["loop_0_0.data"][:, :1]},
        "a wider cache": {"loop_0_0.data": np.repeat(made["loop_0_0.data"], 2, -1)},
        "a cache of another dtype": {"loop_0_0.data": made["loop_0_0.data"].astype(np.float64)},
        "a cache of text": {"loop_0_0.data": made["loop_0_0.data"].astype(str)},
        "a cache that is not finite": {"loop_0_0.data": made["loop_0_0.data"] * np.float32(np.inf)},
        "a cache in the other order": {"loop_0_0.data": np.asfortranarray(np.ones((2, 3, 4), np.float32))},
        "bounds that are no pair": {"loop_0_0.columns": np.array([0, 1, 2])},
        "bounds of text": {"loop_0_0.columns": np.array(["0", "x"])},
        "huge bounds": {"loop_0_0.columns": np.array([0, 2**62])},
        "one array more": {"loop_6_0.data": np.zeros(1)},
        "another name": {"loop_9_0.data": made.pop("loop_5_0.data")} if change == "another name" else {},
    }
    return made | changes[change]


@pytest.mark.parametrize(
    "change",
    [
        "more columns than tokens",
        "no columns",
        "negative columns",
        "columns of floats",
        "columns of text",
        "columns in a list",
        "counts of floats",
        "negative counts",
        "few counts",
        "no staircase",
        "a wider cache",
        "a cache of another dtype",
        "a cache of text",
        "a cache that is not finite",
        "a cache in the other order",
        "bounds that are no pair",
        "bounds of text",
        "huge bounds",
        "one array more",
        "another name",
    ],
)
def test_arrays_that_are_no_sequence_are_refused(session: Session, saved: Arrays, tmp_path: Path, change: str) -> None:
    np.savez(tmp_path / "bad.npz", **_arrays(change, saved))
    with np.errstate(invalid="ignore"):
        refused(session, tmp_path / "bad.npz")


def test_a_file_cut_or_changed_anywhere_is_refused(session: Session, saved: Arrays, tmp_path: Path) -> None:
    whole = BytesIO()
    np.savez(whole, **saved)
    content = whole.getvalue()
    path = tmp_path / "bad.npz"
    for end in [*range(0, 200, 37), *range(200, len(content), len(content) // 25)]:
        path.write_bytes(content[:end])
        refused(session, path)
    random = np.random.default_rng(0)
    wanted = session.generate(PROMPT, max_new_tokens=2).ids
    told = []
    for at in random.integers(0, len(content), 300):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            session.restore(path)  # the archive has bytes that mean nothing, such as dates
        except UsageError as error:
            told.append(str(error))
    assert len(told) > 200
    assert not any("\n" in line for line in told)
    assert session.generate(PROMPT, max_new_tokens=2).ids == wanted


def test_what_unfolds_is_refused_before_it_does(session: Session, saved: Arrays, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", **saved | {"loop_0_0.data": np.zeros(50_000_000, np.float32)})
    assert (tmp_path / "bomb.npz").stat().st_size < 2_000_000
    tracemalloc.start()
    with pytest.raises(UsageError, match="its records are compressed"):
        session.restore(tmp_path / "bomb.npz")
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


def test_records_that_share_their_bytes_are_refused(session: Session, saved: Arrays, tmp_path: Path) -> None:
    """A central directory that names one stored record many times, as overlapping bombs do."""
    stored = BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("header.npy", bytes(1_000_000))
    content = stored.getvalue()
    at = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    entry, count = content[at:end], 500
    entries = b"".join(entry.replace(b"header.npy", b"h%05d.npy" % number) for number in range(count))
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(entries), at, 0)
    (tmp_path / "bad.npz").write_bytes(content[:at] + entries + last)
    tracemalloc.start()
    with pytest.raises(UsageError, match="its records overlap"):
        session.restore(tmp_path / "bad.npz")
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(-5,)", "(1e9,)", "('a',)", "((((((((1", "(1,)" * 3000])
def test_an_array_that_says_it_is_another_is_refused(
    session: Session, saved: Arrays, tmp_path: Path, shape: str
) -> None:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n" + bytes(64)
    np.savez(tmp_path / "bad.npz", **{name: array for name, array in saved.items() if name != "loop_0_0.data"})
    with zipfile.ZipFile(tmp_path / "bad.npz", "a") as archive:
        archive.writestr("loop_0_0.data.npy", member)
    refused(session, tmp_path / "bad.npz")


def test_objects_are_refused(session: Session, saved: Arrays, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **saved | {"counts": np.array([1, None, 2, 3])})
    refused(session, tmp_path / "bad.npz")


def test_what_is_no_file_is_refused(session: Session, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refused(session, tmp_path / "fifo", "is a (pipe|device|socket), expected a file|Is a directory")
    refused(session, Path("/dev/zero"), "is a (pipe|device|socket), expected a file|Is a directory")
    refused(session, tmp_path, "is a (pipe|device|socket), expected a file|Is a directory")
    refused(session, tmp_path / "missing.npz", "cannot read the session: No such file")
