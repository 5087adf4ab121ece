"""Messages of errors, however long what they tell of is."""

import errno
import os
import pickle

import pytest

from mythos_edge.model.errors import (
    BackendUnavailable,
    BuildError,
    BundleError,
    ExportError,
    MythosEdgeError,
    OSErrorAs,
    UsageError,
)


def test_a_very_long_message_is_cut_in_the_middle() -> None:
    """A file that somebody made may hold a name of a megabyte, which a message would repeat."""
    error = UsageError("model.json: dim is " + "9" * 1_000_000 + ", expected a number")
    assert len(str(error)) < 2001
    assert str(error).startswith("model.json: dim is 999")
    assert " [...] " in str(error)
    assert str(error).endswith("9, expected a number")
    assert len(str(BuildError("x" * 10_000))) < 2001
    assert str(BackendUnavailable("no torch", "pip install torch")) == "no torch: run `pip install torch`"


def test_a_message_is_as_it_was_written() -> None:
    assert str(MythosEdgeError()) == ""
    assert str(UsageError("x" * 2000)) == "x" * 2000
    assert str(pickle.loads(pickle.dumps(UsageError("from a child")))) == "from a child"


def _raised_by_a_library(error: Exception) -> None:
    try:
        raise error
    except Exception as caught:
        raise RuntimeError("a pass failed") from caught


def test_an_os_error_that_a_library_wrapped_is_told_as_any_other() -> None:
    read, written = OSErrorAs(BundleError, "cannot be read"), OSErrorAs(ExportError, "cannot be written")
    broken = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(BundleError, match=r"^cannot be read: Input/output error$"), read:
        _raised_by_a_library(broken)
    with pytest.raises(RuntimeError, match="a pass failed"), read:
        _raised_by_a_library(ValueError("of another kind"))
    with pytest.raises(BundleError, match=r"^cannot be read: Input/output error$"), written, read:
        raise broken
