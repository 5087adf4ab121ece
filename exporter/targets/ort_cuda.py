"""ONNX Runtime's CUDA provider: the products of large matrices in float16 or of rounded weights, all else in float32.

    ort-cuda-fp32         everything in float32, the bundle's own weights
    ort-cuda-fp16         the large matrices in float16, all else in float32
    ort-cuda-fp16-int8    the large matrices rounded to 8 or 4 bits, products in float16
    ort-cuda-fp16-int4

Building needs neither a GPU nor onnxruntime-gpu; running them does (``runtime.backends.ort_cuda``).
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mythos_edge.exporter.targets.spec import CUDA_GPU, EXPORT, Machine, Option, Packages, Work, Written, check_choices
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BuildError
from mythos_edge.model.families.table import config_of
from mythos_edge.model.target_options import ONNXRUNTIME_GPU

if TYPE_CHECKING:
    from mythos_edge.exporter.lowering.ort_cuda import Narrowed
    from mythos_edge.exporter.rounding import Matrix

_KIND = "ort-cuda"
DTYPES = ("fp16", "fp32")
WEIGHTS = ("none", "int8", "int4")
# Values that share a scale. The kernels of QMoE take 64 and 128, on Turing to Ada no others.
BLOCKS = (64, 128)
_ROUNDINGS = {"int8": (8, "rtn"), "int4": (4, "search")}
_NOTE = "activations of the large products are float16: beyond 65504 they overflow"
_PACKAGES = Packages(_KIND, {"onnxruntime-gpu": "onnxruntime"}, ONNXRUNTIME_GPU)


@dataclass(frozen=True)
class OrtCudaTarget:
    """A target for ONNX Runtime's CUDA provider; see the options for the fields."""

    dtype: str = "fp16"
    weights: str = "none"
    block: int | None = None

    kind: ClassVar[str] = _KIND
    wishes: ClassVar[str] = _KIND
    options: ClassVar[tuple[Option, ...]] = (
        Option("dtype", "type of the large products (default: fp16)", DTYPES),
        Option("weights", "none (default), int8 or int4", WEIGHTS),
        Option("block", "values that share a scale: 64 or 128", type=int, metavar="N"),
    )
    machines: ClassVar[tuple[Machine, ...]] = (Machine(_KIND, (EXPORT,), (_PACKAGES, CUDA_GPU)),)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.weights == "none":
            if self.block is not None:
                raise BuildError("block is for rounding, and weights none rounds nothing: leave it out")
            return
        if self.dtype != "fp16":
            raise BuildError(
                f"the CUDA kernel of rounded experts has no {self.dtype} form: build {self.weights} with --dtype fp16"
            )
        if self.block is not None and self.block not in BLOCKS:
            raise BuildError(f"block is {self.block}, expected one of {', '.join(map(str, BLOCKS))} for {_KIND}")

    @classmethod
    def from_wish(cls, wish: str, **given: Any) -> Self | None:
        return cls(**given) if wish == _KIND else None

    @classmethod
    def from_name(cls, name: str) -> Self | None:
        found = re.fullmatch(rf"{_KIND}-(fp16|fp32)(?:-(int8|int4))?", name)
        return None if found is None else cls(found[1], found[2] or "none")

    @property
    def name(self) -> str:
        return f"{_KIND}-{self.dtype}" + ("" if self.weights == "none" else f"-{self.weights}")

    @property
    def asked_for(self) -> str:
        return f"--target {_KIND} --dtype {self.dtype}" + (
            "" if self.weights == "none" else f" --weights {self.weights}"
        )

    def check(self, bundle: Bundle) -> None:
        model, block = bundle.manifest.model, self.block or min(BLOCKS)
        if self.weights != "none" and model.experts_per_token and model.dim % block:
            fits = next((f"--block {each}" for each in BLOCKS if model.dim % each == 0), "--weights none")
            raise BuildError(
                f"the experts' rows of {model.dim} values do not divide into blocks of {block}, which the CUDA kernel "
                f"wants: build with {fits}"
            )

    def write(self, work: Work) -> Written:
        from functools import partial

        from mythos_edge.exporter.lowering.ort_cuda import lower_for_ort_cuda
        from mythos_edge.exporter.rounding import Rounding
        from mythos_edge.exporter.targets.ort_files import Forms, matrices_of, write_ort

        config, roundings = config_of(work.bundle.manifest), {}
        if self.weights != "none":
            bits, method = _ROUNDINGS[self.weights]
            wide = self.weights == "int8" and config.looped.dim % 128 == 0
            roundings[self.weights] = Rounding(bits, self.block or (128 if wide else 64), method)
        note = _NOTE if self.dtype == "fp16" else ""
        forms = Forms(self.weights, self.dtype, {"": self.weights}, roundings, self.block, note=note)

        narrowed = None if self.dtype == "fp32" else _narrowed(work, matrices_of(config, forms))
        return write_ort(work, forms, partial(lower_for_ort_cuda, narrowed=narrowed))


def _narrowed(work: Work, rounded: "list[Matrix]") -> "Narrowed":
    """The matrices that are not ``rounded`` in float16: as they are stored, or written to the target's folder."""
    import onnx_ir as ir

    from mythos_edge.exporter.narrowing import plan_narrow, write_narrow
    from mythos_edge.exporter.targets.ort_files import stages_of
    from mythos_edge.model.bundle_writer import require_free_space

    bundle = work.bundle
    if bundle.manifest.dtype == "fp16":
        weights = [value for model in stages_of(work).values() for value in model.graph.initializers.values()]
        stored = {str(value.name): value.const_value for value in weights if value.dtype == ir.DataType.FLOAT16}
        return {key: tensor for key, tensor in stored.items() if tensor is not None}
    plan = plan_narrow(bundle, [matrix.name for matrix in rounded])
    file = work.weights_file("narrow")
    require_free_space(bundle.path, plan.total_bytes)
    write_narrow(plan, bundle, work.folder / file, lambda done: work.progress("narrowing", done))
    return plan.tensors(work.settled(file), work.folder)
