"""The independent reference: the ``open-mythos`` package, for training, benches and tests. Not part of the runtime."""

import importlib
import importlib.util
import sys
import types
from typing import Any


def open_mythos() -> Any:
    """The module ``open_mythos.main`` without the package's own __init__, which needs transformers."""
    if "open_mythos" not in sys.modules:
        spec = importlib.util.find_spec("open_mythos")
        if spec is None:
            raise SystemExit("this needs the reference: pip install open-mythos==0.5.0 --no-deps")
        package = types.ModuleType("open_mythos")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["open_mythos"] = package
    return importlib.import_module("open_mythos.main")
