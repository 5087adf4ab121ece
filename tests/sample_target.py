"""A target of made-up files, added to the sample bundle as every target is."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mythos_edge.exporter.targets import build as build_module
from mythos_edge.exporter.targets.spec import Work, Written, log_of
from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.bundle_writer import update_manifest

NAME = "rtx-sm89-fp16"


@dataclass(frozen=True)
class SampleTarget:
    """A target whose files all say ``content``, and whose graph says where its weights are."""

    content: str
    name: str = NAME
    kind: ClassVar[str] = "sample"
    wishes: ClassVar[str] = NAME
    options: ClassVar[tuple[Any, ...]] = ()
    machines: ClassVar[tuple[Any, ...]] = ()
    asked_for: ClassVar[str] = ""

    @classmethod
    def from_wish(cls, wish: str, **given: Any) -> None:
        """Nobody asks for it."""

    @classmethod
    def from_name(cls, name: str) -> None:
        """Nobody asks for it."""

    def check(self, bundle: Bundle) -> None:
        """Everything goes."""

    def write(self, work: Work) -> Written:
        (work.folder / work.weights_file()).write_text(f"{self.content} weights")
        weights = work.settled(work.weights_file())
        (work.folder / f"step.{self.name}.onnx").write_text(f"{self.content}: {weights}")
        (work.folder / work.log_file).write_text(f"{self.content} said")
        return Written({"step": f"step.{self.name}.onnx"}, "fp32", {}, 1, 2, "made up", _NoOptions(), self.content)


@dataclass(frozen=True)
class _NoOptions:
    pass


def make_buildable(path: Path) -> None:
    """Makes the sample bundle, whose identity is made up, one that targets can be added to."""
    opened = open_bundle(path)
    export = dataclasses.replace(opened.manifest.targets["ort-cpu"], bundle=opened.manifest.identity)
    update_manifest(opened, targets={"ort-cpu": export})


def build(path: Path, content: str, name: str = NAME) -> Bundle:
    """The bundle with the sample target added."""
    return build_module.build(path, SampleTarget(content, name)).bundle


def content_of(bundle: Bundle, name: str = NAME) -> str:
    """The content of all files of the target, which are of one build."""
    spec = bundle.target(name)
    (weights,) = bundle.own_weights(name)
    assert bundle.file(spec.graphs["step"]).read_text() == f"{spec.note}: {weights}"
    assert bundle.file(weights).read_text() == f"{spec.note} weights"
    log = log_of(bundle, name)
    assert log is not None
    assert log.read_text() == f"{spec.note} said"
    return spec.note
