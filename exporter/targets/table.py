"""The kinds of targets. Adding one is a file like its neighbours and a line here; its backend is the runtime's."""

from collections.abc import Mapping
from typing import Any

from mythos_edge.exporter.targets.ort_cpu import OrtCpuTarget
from mythos_edge.exporter.targets.ort_cuda import OrtCudaTarget
from mythos_edge.exporter.targets.spec import Option, Target
from mythos_edge.exporter.targets.tensorrt import TensorRTTarget
from mythos_edge.model.errors import BuildError

KINDS: list[type[Target]] = [OrtCpuTarget, OrtCudaTarget, TensorRTTarget]


def target_from(wish: str, given: Mapping[str, Any]) -> Target:
    """The target that ``wish`` and the options that were ``given`` ask for. Raises BuildError."""
    for kind in KINDS:
        recorded = kind.from_name(wish)
        if recorded is not None:
            raise BuildError(f"{wish} is the name of a built target: ask for it with {recorded.asked_for}")
    for kind in KINDS:
        understood = {option.field for option in kind.options}
        target = kind.from_wish(wish, **{name: value for name, value in given.items() if name in understood})
        if target is None:
            continue
        for name in sorted(set(given) - understood):
            known = ", ".join(option.flag for option in kind.options)
            raise BuildError(f"{Option(name, '').flag} means nothing to the target {wish}, which understands {known}")
        return target
    raise BuildError(f"target is {wish!r}, expected {', '.join(kind.wishes for kind in KINDS)}")
