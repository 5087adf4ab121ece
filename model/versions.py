"""Versions of installed packages."""

from importlib import metadata

UNKNOWN = "unknown"


def version_of(package: str) -> str:
    """The version that is installed; ``UNKNOWN`` in a source tree, or where another package brings the modules."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return UNKNOWN
