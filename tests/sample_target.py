"""A target of made-up files, added to the sample bundle as the builders add theirs."""

import dataclasses
from pathlib import Path

from mythos_edge.exporter.target_files import files_beside, install, log_file, log_of, settled, weights_file
from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.bundle_writer import update_manifest
from mythos_edge.model.manifest import TARGET

NAME = "rtx-sm89-fp16"


def make_buildable(path: Path) -> None:
    """Makes the sample bundle, whose identity is made up, one that targets can be added to."""
    opened = open_bundle(path)
    export = dataclasses.replace(opened.manifest.targets[TARGET], bundle=opened.manifest.identity)
    update_manifest(opened, targets={TARGET: export})


def build(path: Path, content: str, name: str = NAME) -> Bundle:
    """The bundle with a target whose files all say ``content``, and whose graph says where its weights are."""
    bundle = open_bundle(path)
    spec = dataclasses.replace(bundle.manifest.targets[TARGET], graphs={"step": f"step.{name}.onnx"}, note=content)
    with files_beside(bundle, name, lambda phase, fraction: None) as folder:
        (folder / weights_file(name)).write_text(f"{content} weights")
        weights = settled(bundle, folder, weights_file(name))
        (folder / f"step.{name}.onnx").write_text(f"{content}: {weights}")
        (folder / log_file(name)).write_text(f"{content} said")
        return install(bundle, folder, name, spec)


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
