"""The GPUs that engines are built for: how they are named, and which have what an engine asks for."""

import re
from dataclasses import dataclass

from mythos_edge.model.errors import BuildError
from mythos_edge.plugins import kernel_store, trt_bindings

THIS_GPU = "trt-this-gpu"
_FLAVOURS = {"rtx": "TensorRT for RTX", "trt": "TensorRT"}
# Machines that people try, and that only full TensorRT serves.
_ELSEWHERE = {87: "Jetson Orin", 90: "Hopper", 100: "data centre Blackwell", 110: "Jetson Thor"}
# The least compute capability on which TensorRT has a type; TensorRT for RTX has no float32 products on Turing.
_LEAST = {"bf16": 80, "int4": 86, "fp8": 89}
_LEAST_OF = {"rtx": {**_LEAST, "fp32": 80}, "trt": _LEAST}


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a target is for: the TensorRT, and the compute capabilities in ascending order (89 for SM 8.9).

    ``device`` is the name of this machine's GPU where the engines are for it alone, "" where they are not.
    """

    flavour: str
    compute_capabilities: tuple[int, ...]
    device: str = ""

    @property
    def name(self) -> str:
        """The GPUs as the name of a target begins with them."""
        return f"{self.flavour}-{'+'.join(f'sm{number}' for number in self.compute_capabilities)}"

    @property
    def wish(self) -> str:
        """The name by which they are asked for."""
        return THIS_GPU if self.flavour == "trt" else self.name

    @property
    def builder(self) -> str:
        """The TensorRT that builds for them, in words."""
        return _FLAVOURS[self.flavour]


def capabilities_in(text: str) -> tuple[int, ...]:
    """The compute capabilities that a name tells, in ascending order."""
    return tuple(sorted({int(number) for number in re.findall(r"\d+", text)}))


def check_gpus(gpus: Gpus, types: tuple[str, ...]) -> None:
    """Raises BuildError for a GPU that TensorRT or our kernels do not know, or without the ``types`` asked for."""
    known = trt_bindings.known_compute_capabilities(trt_bindings.load(gpus.flavour))
    for number in gpus.compute_capabilities:
        if known and number not in known:
            mend = f": for {_ELSEWHERE[number]} use {THIS_GPU} there" if number in _ELSEWHERE else ""
            raise BuildError(
                f"sm{number} is not among those {gpus.builder} builds for ({' '.join(map(str, known))}){mend}"
            )
        for kind in types:
            least = _LEAST_OF[gpus.flavour].get(kind, 0)
            if number < least:
                raise BuildError(
                    f"sm{number} has no {kind}, which begins with sm{least}: choose another dtype or weights"
                )
        if number not in kernel_store.compute_capabilities():
            kernels = " ".join(map(str, kernel_store.compute_capabilities()))
            raise BuildError(f"there are no kernels for sm{number}, expected one of {kernels}")
