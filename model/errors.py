"""Everything mythos-edge raises on purpose, as one tree.

    MythosEdgeError
    ├── UsageError           a request parameter is out of range
    ├── ConfigError          a configuration is incomplete or contradicts itself or the weights
    ├── CheckpointError      a checkpoint file is missing, damaged, unsafe or not an OpenMythos model
    ├── ExportError          a sound checkpoint could not be written as a bundle
    ├── BuildError           a bundle could not be lowered to a target; carries TensorRT's log where there is one
    ├── BundleError          a bundle is missing, damaged, unsafe or from a newer schema
    ├── BackendUnavailable   a library this machine lacks is needed; carries the install line
    ├── SelfTestError        this machine computes something else than the exporter saw
    └── CapacityError        a request is longer or deeper than the bundle or session allows

A message is one line: what, got, expected, how to mend; the CLI prints it and exits with 1. A very long one, as a
stranger's file can cause it, is cut in the middle. Broken invariants of our own are ``assert``.
"""

from pathlib import Path

_MOST_CHARACTERS = 2000


class MythosEdgeError(Exception):
    """Base of all errors a caller may want to catch."""

    def __init__(self, message: str = "") -> None:
        if len(message) > _MOST_CHARACTERS:
            half = _MOST_CHARACTERS // 2 - 10
            message = f"{message[:half]} [...] {message[-half:]}"
        super().__init__(message)


class UsageError(MythosEdgeError):
    """A request parameter is out of its range."""


class ConfigError(MythosEdgeError):
    """A configuration is incomplete, unknown or contradicts itself or the weights."""


class CheckpointError(MythosEdgeError):
    """A checkpoint cannot be read as an OpenMythos model."""


class ExportError(MythosEdgeError):
    """A bundle could not be written."""


class BuildError(MythosEdgeError):
    """A target could not be built; ``log`` is the file with what a native builder said, where one ran."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message if log is None else f"{message}; its log: {log}")
        self.log = log


class BundleError(MythosEdgeError):
    """A bundle cannot be trusted or read."""


class BackendUnavailable(MythosEdgeError):
    """A library is missing; ``install`` is the command that brings it."""

    def __init__(self, message: str, install: str) -> None:
        super().__init__(f"{message}: run `{install}`")
        self.install = install


class CapacityError(MythosEdgeError):
    """A request exceeds the context or depth that was planned for."""


class SelfTestError(MythosEdgeError):
    """The golden sample of a bundle comes to other numbers on this machine."""


class OSErrorAs:
    """Tells an OSError of a block as ``refusal``: ``with OSErrorAs(BundleError, f"{path}: cannot be read"): ...``.

    Also one that a library has raised an error of its own from.
    """

    def __init__(self, refusal: type[MythosEdgeError], what: str) -> None:
        self._refusal, self._what = refusal, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        behind = error
        while behind is not None and not isinstance(behind, OSError | MythosEdgeError):
            behind = behind.__cause__
        if isinstance(behind, OSError):
            raise self._refusal(f"{self._what}: {behind.strerror or behind}") from error


def one_line(error: object) -> str:
    """The message of a foreign exception on one line; the name of its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def unavailable(error: ImportError, purpose: str, install: str) -> BackendUnavailable:
    """The error for a library that does not let itself be imported; ``purpose`` says what needs it, as in "exporting".

    Raises KeyboardInterrupt where one broke off the import: some libraries make an ImportError of it.
    """
    raise_interrupt(error)
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return BackendUnavailable(f"{purpose} needs {error.name}, which is not installed", install)
    why = one_line(error)
    return BackendUnavailable(f"{purpose} needs a library that is installed and cannot be imported: {why}", install)


def raise_interrupt(error: BaseException) -> None:
    """Raises the KeyboardInterrupt that ``error`` came of, if it did."""
    behind, seen = [error], set[int]()
    while behind:
        one = behind.pop()
        if isinstance(one, KeyboardInterrupt):
            raise one
        seen.add(id(one))
        behind += [more for more in (one.__cause__, one.__context__) if more is not None and id(more) not in seen]
