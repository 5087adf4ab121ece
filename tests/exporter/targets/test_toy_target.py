"""The proof that a target is declared once: a toy one is built, run, listed and refused without a change elsewhere."""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import onnxruntime
import pytest
from command_line import Ran, refused

from mythos_edge.exporter.targets import table
from mythos_edge.exporter.targets.spec import EXPORT, RUN, Machine, Option, Work, Written
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BuildError
from mythos_edge.model.stages import STAGES
from mythos_edge.runtime.backends import opening
from mythos_edge.runtime.backends.memory import HostMemory
from mythos_edge.runtime.backends.packing import Arrays, Call


@dataclass(frozen=True)
class ToyTarget:
    """The portable stages as they are, in plain onnxruntime."""

    speed: str = "slow"
    kind: ClassVar[str] = "toy"
    wishes: ClassVar[str] = "toy"
    options: ClassVar[tuple[Option, ...]] = (Option("speed", "how fast (default: slow)", ("slow", "fast")),)
    machines: ClassVar[tuple[Machine, ...]] = (Machine("toy", (EXPORT,), (RUN,)),)

    @classmethod
    def from_wish(cls, wish: str, **given: Any) -> Self | None:
        return cls(**given) if wish == "toy" else None

    @classmethod
    def from_name(cls, name: str) -> Self | None:
        found = re.fullmatch("toy-(slow|fast)", name)
        return None if found is None else cls(found[1])

    @property
    def name(self) -> str:
        return f"toy-{self.speed}"

    @property
    def asked_for(self) -> str:
        return f"--target toy --speed {self.speed}"

    def check(self, bundle: Bundle) -> None:
        if self.speed == "fast" and bundle.manifest.max_context > 128:
            raise BuildError(f"fast is for 128 positions, this bundle has {bundle.manifest.max_context}: build it slow")

    def write(self, work: Work) -> Written:
        graphs = {stage: f"{stage}.{work.name}.onnx" for stage in STAGES}
        for stage, file in graphs.items():
            shutil.copyfile(work.bundle.file(f"{stage}.onnx"), work.folder / file)
        return Written(graphs, "fp32", {"all": "fp32"}, 1, 1, "fp32 as exported", self)


class ToyBackend:
    max_context = None

    def __init__(self, bundle: Bundle, target: str) -> None:
        self.memory, graphs = HostMemory(), bundle.target(target).graphs
        self._graphs = {stage: onnxruntime.InferenceSession(bundle.file(graphs[stage])) for stage in STAGES}

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None:
        made = self._graphs[stage].run(list(outputs), dict(feeds))
        for wanted, found in zip(outputs.values(), made, strict=True):
            wanted[...] = found

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        for call in calls:
            self.run(stage, *call)

    def close(self) -> None:
        self._graphs.clear()


@pytest.fixture
def bundle(exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setitem(opening.BACKENDS, "toy", lambda bundle, target, threads, trust: ToyBackend(bundle, target))
    table.KINDS.append(ToyTarget)
    made = exported(Path(__file__).parents[2] / "fixtures" / "mla-small")
    yield Path(shutil.copytree(made, tmp_path / "toy.bundle"))
    table.KINDS.remove(ToyTarget)


def test_a_toy_target_is_a_target(bundle: Path, run: Callable[..., Ran]) -> None:
    assert run("build", bundle, "--target", "toy").code == 0
    command = ("generate", bundle, "--ids", "5,7,11", "--max-new-tokens", 6, "--json")
    toy, plain = run(*command, "--target", "toy-slow"), run(*command)
    assert (toy.json["ids"], toy.json["depths"]) == (plain.json["ids"], plain.json["depths"])
    assert "fp32 as exported" in run("inspect", bundle).out
    assert run("doctor", "--json").json["targets"]["toy"] == {"build": "yes", "run": "yes"}
    refused(run("build", bundle, "--target", "toy", "--block", 32), "--block means nothing to the target toy, which")
    refused(run("build", bundle, "--target", "toy-fast"), "ask for it with --target toy --speed fast")
