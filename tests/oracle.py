"""The independent reference in tests: the open-mythos package from PyPI, a development dependency only."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def open_mythos_main() -> Any:
    """``open_mythos.main``, imported without running the package's ``__init__`` (it wants transformers)."""
    if "open_mythos" not in sys.modules:
        spec = importlib.util.find_spec("open_mythos")
        assert spec is not None, "pip install open-mythos==0.5.0"
        assert spec.origin is not None
        package = ModuleType("open_mythos")
        package.__path__ = [str(Path(spec.origin).parent)]
        sys.modules["open_mythos"] = package
    return importlib.import_module("open_mythos.main")
