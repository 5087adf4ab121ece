"""A target as data: a frozen value that names itself, refuses what it cannot be, and writes its stages.

Each kind of target is one class with this shape, in a file of its own, and ``table`` lists them. Command-line options,
refusals, ``doctor`` and the manifest's record follow from the class. Imports nothing that takes time: what writes a
target is imported when it is written.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BuildError
from mythos_edge.model.manifest import TargetRecord

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Option:
    """A field of a target that the command line sets: ``--max-context`` for ``max_context``."""

    field: str
    help: str
    choices: tuple[str, ...] = ()
    type: Callable[[str], Any] = str
    metavar: str | None = None

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return f"--{self.field.replace('_', '-')}"


@dataclass(frozen=True)
class Packages:
    """The Python packages that something needs, package -> module, and the command that installs them."""

    name: str
    modules: Mapping[str, str]
    install: str


@dataclass(frozen=True)
class GpuNeed:
    """A GPU that something needs: in words, and whether one of a compute capability (89 for SM 8.9) will do."""

    name: str
    fits: Callable[[int], bool]


@dataclass(frozen=True)
class Machine:
    """The needs of the machines that build and run a target; ``wish`` is how it is asked for, with smXX for a GPU."""

    wish: str
    build: tuple[Packages | GpuNeed, ...]
    run: tuple[Packages | GpuNeed, ...]


RUN = Packages(
    "run",
    {"numpy": "numpy", "onnxruntime": "onnxruntime", "tokenizers": "tokenizers"},
    "pip install mythos-edge",
)
EXPORT = Packages(
    "export",
    {"torch": "torch", "onnx": "onnx", "onnx-ir": "onnx_ir", "onnxscript": "onnxscript", "jaxtyping": "jaxtyping"},
    "pip install 'mythos-edge[export]'",
)


# The kernels of onnxruntime-gpu and of this package begin with Turing.
CUDA_GPU = GpuNeed("a GPU of sm75 or newer", lambda capability: capability >= 75)


@dataclass(frozen=True)
class Work:
    """The place where a target is written: new files go to ``folder``, and are named after ``name``."""

    bundle: Bundle
    folder: Path
    name: str
    progress: Progress
    settled: Callable[[str], str]

    def weights_file(self, part: str = "") -> str:
        """The name of a file of rounded or narrowed weights; ``part`` tells several apart.

        Once it is written, ``settled`` gives the name that it will have in the bundle, which graphs may use.
        """
        return f"weights.{self.name}.{part + '.' if part else ''}safetensors"

    @property
    def log_file(self) -> str:
        """The name of the file with the words of a native builder."""
        return f"build.{self.name}.log"


@dataclass(frozen=True)
class Written:
    """The result of writing a target, see ``TargetRecord``; ``options`` is a dataclass of the kind's own fields.

    ``reports`` are facts about the build for people and for JSON, which the manifest does not keep.
    """

    graphs: dict[str, str]
    compute_dtype: str
    weights: dict[str, str]
    fixed_bytes: int
    step_bytes: int
    summary: str
    options: Any
    note: str = ""
    reports: Mapping[str, Any] = field(default_factory=dict)


class Target(Protocol):
    """A kind of target; its instances are the targets of that kind."""

    kind: ClassVar[str]
    # The names by which targets of this kind are asked for, for help and refusals.
    wishes: ClassVar[str]
    options: ClassVar[tuple[Option, ...]]
    machines: ClassVar[tuple[Machine, ...]]

    @classmethod
    def from_wish(cls, wish: str, **given: Any) -> Self | None:
        """The target that is asked for by ``wish`` and the options ``given``; None for a wish of another kind.

        Raises BuildError for what it cannot be on any bundle.
        """
        ...

    @classmethod
    def from_name(cls, name: str) -> Self | None:
        """The target that a bundle records under ``name``, its other fields by default; None for another kind's."""
        ...

    @property
    def name(self) -> str:
        """The name under which a bundle records it."""
        ...

    @property
    def asked_for(self) -> str:
        """The options of ``build`` that ask for it."""
        ...

    def check(self, bundle: Bundle) -> None:
        """Raises BuildError for what it cannot be on this bundle."""
        ...

    def write(self, work: Work) -> Written:
        """Writes its graphs, weights and logs. Raises BuildError, and ExportError without room on the disk."""
        ...


def check_choices(target: Target) -> None:
    """Raises BuildError for a field of ``target`` that is given and is none of the choices of its option."""
    for option in target.options:
        given = getattr(target, option.field)
        if option.choices and given is not None and given not in option.choices:
            elsewhere = ": fp8 is for TensorRT's targets" if (option.field, given) == ("weights", "fp8") else ""
            raise BuildError(
                f"{option.field} is {given!r}, expected one of {', '.join(option.choices)} for {target.kind}{elsewhere}"
            )


def form_of_parts(forms: Mapping[str, Collection[str]]) -> dict[str, str]:
    """The table part -> form of a record; a part whose matrices have several forms names them all."""
    return {part: "+".join(sorted(found)) for part, found in forms.items()}


def log_of(bundle: Bundle, name: str) -> Path | None:
    """The file with the words of the native builder of a target that is in the bundle; None where it has none."""
    logs = sorted(file for file in bundle.manifest.files_of(name) if file.startswith(f"build.{name}."))
    return bundle.path / logs[0] if logs else None


def record_of(kind: str, written: Written, bundle_identity: str) -> TargetRecord:
    """The record of a written target."""
    return TargetRecord(
        kind=kind,
        graphs=written.graphs,
        compute_dtype=written.compute_dtype,
        weights=written.weights,
        fixed_bytes=written.fixed_bytes,
        step_bytes=written.step_bytes,
        bundle=bundle_identity,
        summary=written.summary,
        note=written.note,
        options=_as_json(asdict(written.options)),
    )


def _as_json(value: Any) -> Any:
    """The value with lists for tuples, as it is read back from a manifest."""
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, tuple | list) else value
