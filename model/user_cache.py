"""The folder of this user for what can be made again. Standard library only."""

import os
import sys
from pathlib import Path

from mythos_edge.model.errors import UsageError


def cache_folder() -> Path:
    """The user's cache folder for this program; not the temporary folder, which others own as well.

    A relative XDG_CACHE_HOME is ignored, as the standard asks. Raises UsageError for a user without a home.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else _platform_folder()) / "mythos-edge"
    except RuntimeError as error:
        raise UsageError("this user has no home folder: set XDG_CACHE_HOME to a folder that can be written") from error


def _platform_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path.home() / ".cache"
