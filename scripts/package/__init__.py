"""Runs OpenMythos checkpoints that were exported to ONNX, with exact dynamic depth.

    from mythos_edge import Session

    with Session.open("model.bundle") as session:
        print(session.generate("Once upon", max_new_tokens=50).text)

These names are the Python API of the runtime. Each is imported when it is first used, so this module costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mythos_edge.model.errors import (
        BackendUnavailable,
        BundleError,
        CapacityError,
        MythosEdgeError,
        SelfTestError,
        UsageError,
    )
    from mythos_edge.runtime.caches import CachePlan
    from mythos_edge.runtime.decoding import Generation, Token
    from mythos_edge.runtime.halting import Policy
    from mythos_edge.runtime.scoring import Score
    from mythos_edge.runtime.session import Session
    from mythos_edge.runtime.streams import TokenStream

    __version__: str

__all__ = [
    "BackendUnavailable",
    "BundleError",
    "CachePlan",
    "CapacityError",
    "Generation",
    "MythosEdgeError",
    "Policy",
    "Score",
    "SelfTestError",
    "Session",
    "Token",
    "TokenStream",
    "UsageError",
    "__version__",
]
# The module that each name is imported from; the errors share one.
_HOMES = {
    "CachePlan": "runtime.caches",
    "Generation": "runtime.decoding",
    "Policy": "runtime.halting",
    "Score": "runtime.scoring",
    "Session": "runtime.session",
    "Token": "runtime.decoding",
    "TokenStream": "runtime.streams",
}


def _imported(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        value = import_module("importlib.metadata").version("mythos-edge")
    else:
        value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'model.errors')}"), name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # to type checkers it would say that every name exists
    __getattr__ = _imported


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
