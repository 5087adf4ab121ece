"""Two folders that change their names in one step, so that nobody finds a name without a folder. Standard library only.

Only Linux is asked for it, and there not every file system can.
"""

import os
import sys
from pathlib import Path

# Source: rename(2) and fcntl(2) of Linux: RENAME_EXCHANGE, AT_FDCWD.
_EXCHANGE = 2
_HERE = -100


def swapped(one: Path, other: Path) -> bool:
    """Whether the two, both of which must be there, have each other's names now; if not, nothing has changed."""
    if sys.platform != "linux":
        return False
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
