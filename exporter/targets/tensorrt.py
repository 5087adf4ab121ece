"""TensorRT engines, built on this machine for GPUs that need not be here (TensorRT for RTX), or for the one that is.

rtx-sm89                TensorRT for RTX, GPUs of compute capability 8.9
rtx-sm86+sm89+sm120     the same engines for several GPUs
trt-this-gpu            full TensorRT, for the GPU of this machine (Jetson, data centre); recorded as trt-sm87

rtx-sm89-fp16           recorded: float16, an engine a stage
rtx-sm89-fp16-int4      with the large matrices rounded to int4
rtx-sm89-fp16-loop      one engine with the loop inside
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from mythos_edge.exporter.targets.gpus import THIS_GPU, Gpus, capabilities_in, check_gpus
from mythos_edge.exporter.targets.spec import (
    CUDA_GPU,
    EXPORT,
    GpuNeed,
    Machine,
    Option,
    Packages,
    Work,
    Written,
    check_choices,
)
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BuildError
from mythos_edge.plugins import trt_bindings
from mythos_edge.plugins.cuda_driver import Driver

DTYPES = ("fp16", "bf16", "fp32")
LAYOUTS = ("step", "loop")
WEIGHTS = ("none", "int8", "int4", "fp8")
# Rows of the longest chunk of a step layout, unless asked for otherwise.
DEFAULT_MAX_ROWS = 64
_RTX = Packages("tensorrt-rtx", {"tensorrt-rtx-cu13": "tensorrt_rtx"}, "pip install 'mythos-edge[tensorrt-rtx]'")
_TRT = Packages("tensorrt", {"tensorrt": "tensorrt"}, "pip install 'mythos-edge[tensorrt]'")
_RTX_GPU = GpuNeed(
    "a GPU of TensorRT for RTX", lambda capability: capability in trt_bindings.rtx_compute_capabilities()
)


@dataclass(frozen=True)
class TensorRTTarget:
    """A target of TensorRT engines; see the options for the other fields.

    ``layout`` step has an engine a stage; ``loop`` has one with the loop inside, no cache, and takes the whole sequence
    as one chunk.
    """

    gpus: Gpus
    dtype: str = "fp16"
    weights: str = "none"
    layout: str = "step"
    max_context: int | None = None
    max_rows: int | None = None

    kind: ClassVar[str] = "tensorrt"
    wishes: ClassVar[str] = f"rtx-sm89 (or several GPUs, as in rtx-sm86+sm89), {THIS_GPU}"
    options: ClassVar[tuple[Option, ...]] = (
        Option("dtype", "type that is computed in (default: fp16)", DTYPES),
        Option("weights", "none (default), int8, int4 or fp8", WEIGHTS),
        Option("layout", "an engine a stage (step), or one with the loop", LAYOUTS),
        Option("max_context", "longest sequence (default: the bundle's)", type=int, metavar="N"),
        Option("max_rows", f"longest chunk of a sequence at once (default: {DEFAULT_MAX_ROWS})", type=int, metavar="N"),
    )
    machines: ClassVar[tuple[Machine, ...]] = (
        # Engines for RTX are built for any GPU on any machine, those of TensorRT on the GPU they are for.
        Machine("rtx-smXX", (EXPORT, _RTX), (_RTX, _RTX_GPU)),
        Machine(THIS_GPU, (EXPORT, _TRT, CUDA_GPU), (_TRT, CUDA_GPU)),
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.layout == "loop" and self.max_rows is not None:
            raise BuildError("max_rows is for the step layout: a loop layout takes the whole sequence at once")

    @classmethod
    def from_wish(cls, wish: str, **given: Any) -> Self | None:
        if wish == THIS_GPU:
            driver = Driver.load()
            if not driver.device_count():
                raise BuildError(f"{THIS_GPU}: this machine has no GPU: build there, or for known GPUs as in rtx-sm89")
            return cls(Gpus("trt", (driver.compute_capability(0),), driver.device_name(0)), **given)
        if not re.fullmatch(r"rtx-sm\d{2,3}(\+sm\d{2,3})*", wish):
            return None
        return cls(Gpus("rtx", capabilities_in(wish)), **given)

    @classmethod
    def from_name(cls, name: str) -> Self | None:
        rounded = "|".join(WEIGHTS[1:])
        pattern = rf"(rtx|trt)-(sm\d{{2,3}}(?:\+sm\d{{2,3}})*)-({'|'.join(DTYPES)})(?:-({rounded}))?(-loop)?"
        found = re.fullmatch(pattern, name)
        if found is None:
            return None
        layout = "loop" if found[5] else "step"
        return cls(Gpus(found[1], capabilities_in(found[2])), found[3], found[4] or "none", layout)

    @property
    def name(self) -> str:
        rounded = "" if self.weights == "none" else f"-{self.weights}"
        return f"{self.gpus.name}-{self.dtype}{rounded}{'-loop' if self.layout == 'loop' else ''}"

    @property
    def asked_for(self) -> str:
        weights = "" if self.weights == "none" else f" --weights {self.weights}"
        layout = "" if self.layout == "step" else f" --layout {self.layout}"
        return f"--target {self.gpus.wish} --dtype {self.dtype}{weights}{layout}"

    def check(self, bundle: Bundle) -> None:
        context, rows = self.sizes(bundle)
        if rows < 1 or rows > context:
            raise BuildError(f"max_rows is {rows}, expected 1 to max_context, which is {context}")
        check_gpus(self.gpus, (self.dtype, self.weights))

    def sizes(self, bundle: Bundle) -> tuple[int, int]:
        """The longest sequence and the longest chunk, with defaults filled in. Raises BuildError."""
        longest = bundle.manifest.max_context
        context = longest if self.max_context is None else self.max_context
        if context < 1 or context > longest:
            mend = f": export with --max-context {context}" if context > longest else ""
            raise BuildError(
                f"max_context is {context}, expected 1 to {longest}, for which the bundle was exported{mend}"
            )
        if self.layout == "loop":
            return context, context
        return context, min(DEFAULT_MAX_ROWS, context) if self.max_rows is None else self.max_rows

    def write(self, work: Work) -> Written:
        from mythos_edge.exporter.lowering.tensorrt import EngineOptions
        from mythos_edge.exporter.targets.engine_files import write_engines

        context, rows = self.sizes(work.bundle)
        return write_engines(self.gpus, EngineOptions(self.dtype, self.layout, self.weights, context, rows), work)
