"""ONNX Runtime on a CPU: float32 mapped from the bundle or prepacked, or weights rounded to 8 and 4 bits.

    ort-cpu                     float32, read from the mapped file of the bundle: what every export has
    ort-cpu-fp32                the same weights, copied into the kernels' own layout when loaded
    ort-cpu-int8                the large matrices in int8, one scale a row, multiplied in integers
    ort-cpu-int4                routed experts (or the feed-forwards of a loop without) in int4, the others in int8
    ort-cpu-int4-dense-int4     all large matrices in int4

Every target has each stage twice: for the rows of one sequence, and for those of several at once. They share the
rounded matrices, and with the bundle all weights that stay in float32.
"""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from mythos_edge.exporter.targets.spec import EXPORT, RUN, Machine, Option, Work, Written, check_choices
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BuildError
from mythos_edge.model.looped import NARROW_CACHES, LoopedModel
from mythos_edge.plugins.processor import has_integer_dot_products

if TYPE_CHECKING:
    from mythos_edge.exporter.rounding import Importance, Rounding
    from mythos_edge.exporter.targets.ort_files import Forms

_KIND = "ort-cpu"
FORMS = ("fp32", "int8", "int4")
# The export's own target: float32 that is not copied.
MAPPED = "mapped"
_METHODS = {"int8": "rtn", "int4": "search"}
_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class OrtCpuTarget:
    """A target for ONNX Runtime's CPU provider; see the options for the fields.

    ``calibrate`` are token ids (B, S) to weigh the rounding error by.
    """

    weights: str = MAPPED
    dense: str | None = None
    block: int | None = None
    keep: tuple[str, ...] = ()
    method: str | None = None
    calibrate: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)

    kind: ClassVar[str] = _KIND
    wishes: ClassVar[str] = _KIND
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "weights", "fp32, int8, or int4: routed experts, or without any the loop, in int4, the rest int8", FORMS
        ),
        Option("dense", "form of what is no routed expert (default: as --weights says)", FORMS),
        Option("block", "values that share a scale: 32, 64, 128, or 0: a row", type=int, metavar="N"),
        Option(
            "keep",
            "stay fp32: head, attention, experts, shared, mlp, embedding, prelude, coda, or names of tensors",
            type=lambda text: tuple(text.split(",")),
            metavar="PARTS",
        ),
        Option("method", "round to nearest, or search each block's scale", ("rtn", "search")),
        Option("calibrate", "token ids to weigh the input channels with", metavar="NPY"),
    )
    machines: ClassVar[tuple[Machine, ...]] = (Machine(_KIND, (EXPORT,), (RUN,)),)

    def __post_init__(self) -> None:
        if self.weights == MAPPED:
            return
        check_choices(self)
        of_rounding = (self.dense, self.block, self.keep or None, self.method, self.calibrate)
        if self.weights == "fp32" and any(given is not None for given in of_rounding):
            raise BuildError(
                "dense, block, keep, method and calibration are for rounding, and fp32 rounds nothing: leave them out"
            )
        if self.calibrate is not None and self.method is not None:
            raise BuildError("calibration is a method of its own for int8 and int4: leave method out")
        if "" in self.keep:
            raise BuildError(
                f"--keep is {','.join(self.keep)!r}, expected parts or names of tensors, with commas between"
            )

    @classmethod
    def from_wish(cls, wish: str, **given: Any) -> Self | None:
        if wish != _KIND:
            return None
        if "weights" not in given:
            raise BuildError(f"{_KIND} is what every export has: say with --weights fp32, int8 or int4 what to add")
        return cls(**given)

    @classmethod
    def from_name(cls, name: str) -> Self | None:
        found = re.fullmatch(rf"{_KIND}-(fp32|int8|int4)(?:-dense-(fp32|int8|int4))?", name)
        return None if found is None else cls(found[1], found[2])

    @property
    def name(self) -> str:
        weights = "" if self.weights == MAPPED else f"-{self.weights}"
        return f"{_KIND}{weights}" + ("" if self.dense is None else f"-dense-{self.dense}")

    @property
    def asked_for(self) -> str:
        return f"--target {_KIND} --weights {self.weights}" + ("" if self.dense is None else f" --dense {self.dense}")

    def check(self, bundle: Bundle) -> None:
        del bundle  # whether blocks fit the matrices is known when they are planned

    def write(self, work: Work) -> Written:
        from mythos_edge.exporter.lowering.ort_cpu import lower_for_ort
        from mythos_edge.exporter.targets.ort_files import write_ort

        forms = self.forms(work.bundle.manifest.model)
        return write_ort(work, forms, lower_for_ort, lambda: self._importance(work), NARROW_CACHES)

    def forms(self, model: LoopedModel) -> "Forms":
        """The forms of the matrices of a model. Raises BuildError."""
        from mythos_edge.exporter.targets.ort_files import Forms

        by_part = self._forms_of_parts(model)
        roundings = {form: self._rounding(form, model.dim) for form in by_part.values() if form in _BITS}
        prepacked = self.weights != MAPPED
        return Forms(self.weights, "fp32", by_part, roundings, self.block, self.keep, prepacked)

    def _forms_of_parts(self, model: LoopedModel) -> dict[str, str]:
        """The form of each part, of all others under "".

        MatMulNBits computes the rows of int4 one by one; in int8 with a scale a row, several rows cost little more than
        one where the processor has integer dot products. A dense model has its bytes in the loop, which int4 is for;
        head and embedding, which are a small share of a token, keep more digits.
        """
        from mythos_edge.exporter.targets.ort_files import EXPERTS

        rest = "int8" if self.weights == "int4" and has_integer_dot_products() else self.weights
        if self.dense is not None:
            return {EXPERTS: self.weights, "": self.dense}
        if model.experts_per_token:
            return {EXPERTS: self.weights, "": rest}
        return {"": self.weights, "head": rest, "embedding": rest}

    def _rounding(self, form: str, dim: int) -> "Rounding":
        """The rounding of matrices of a form, in a model of width ``dim``. Raises BuildError."""
        from mythos_edge.exporter.rounding import Rounding

        method = "calibrated" if self.calibrate is not None else self.method or _METHODS[form]
        asked = self.block if form == self.weights else None
        return Rounding(_BITS[form], _default_block(form, dim) if asked is None else asked, method)

    def _importance(self, work: Work) -> "Importance | None":
        if self.calibrate is None:
            return None
        from mythos_edge.exporter.calibration import collect_importance

        return collect_importance(work.bundle, self.calibrate, work.progress).importance


def _default_block(form: str, dim: int) -> int:
    if form == "int8" and has_integer_dot_products():
        return 0
    wanted = 128 if form == "int8" else 64
    # Experts take only whole blocks.
    return next((block for block in (wanted, wanted // 2, 32) if dim % block == 0), wanted)
