"""Messages of errors, however long what they tell of is."""

import pickle

from mythos_edge.model.errors import BackendUnavailable, BuildError, MythosEdgeError, UsageError


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
