"""What must hold without a GPU: real checkpoints become real engines, with every plugin in its place.

A covering set instead of all combinations: each of SM 86, 89, 120 alone and together, fp16, bf16 and fp32, both
layouts, latent and grouped-query attention, 1, 8 and 16 loop steps, and all kinds of weights occur, most in both
layouts or with both attentions.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES

from mythos_edge.exporter.engine import declared_ports
from mythos_edge.exporter.export import export_bundle
from mythos_edge.exporter.lowering.tensorrt import EngineOptions, LoweredForTensorRT, lower_for_tensorrt
from mythos_edge.exporter.targets import engine_files
from mythos_edge.exporter.targets.build import Built, build
from mythos_edge.exporter.targets.table import target_from
from mythos_edge.model.bundle import Bundle, open_bundle, verify_hashes
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.families.openmythos.config import VARIANTS, MythosConfig, config_from_dict
from mythos_edge.model.families.table import config_of
from mythos_edge.model.target_options import EngineSpec, options_of
from mythos_edge.scripts.lab.random_checkpoints import write_checkpoint

pytest.importorskip("tensorrt_rtx")
# The state of a loop step, and what a step layout's engines have beside their caches.
STATE = ("h", "out", "halt_mass", "depth")
INPUTS = {
    "prelude": {"input_ids", "length"},
    "step": {*STATE, "e", "step_index", "threshold", "min_depth", "length"},
    "coda": {"out", "logit_rows", "length"},
    "model": {"input_ids", "max_depth", "threshold"},
}
OUTPUTS = {
    "prelude": {"e"},
    "step": {f"{name}_next" for name in STATE},
    "coda": {"logits"},
    "model": {"logits", "depth"},
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, exported: Callable[..., Path]) -> Callable[[str], Path]:
    """``mla-16`` is the bundle of random weights in the shape of ``mla-small`` with 16 loop steps, and so on."""
    made: dict[str, Path] = {}

    def bundle(name: str) -> Path:
        kind, _, loops = name.partition("-")
        if name not in made:
            fields = json.loads((FIXTURES / f"{kind}-small" / "config.json").read_text())
            config = config_from_dict({**fields, "max_loop_iters": int(loops)}, origin=name)
            made[name] = _random_bundle(config, tmp_path_factory.mktemp("random") / name)
        return made[name]

    return bundle


def _random_bundle(config: MythosConfig, folder: Path) -> Path:
    """A bundle of random weights, without the checkpoint it was made from."""
    write_checkpoint(config, folder)
    bundle = folder.with_suffix(".bundle")
    with open_checkpoint(folder) as checkpoint:
        export_bundle(checkpoint, bundle)
    shutil.rmtree(folder)
    return bundle


class Watched:
    """``lower_for_tensorrt``, which remembers the names of inputs and outputs."""

    def __init__(self, *stages: str) -> None:
        self._stages = stages
        self.inputs: dict[str, set[str]] = {}
        self.outputs: dict[str, set[str]] = {}

    def __call__(self, bundle: Bundle, folder: Path, options: EngineOptions, progress: Any) -> LoweredForTensorRT:
        lowered = lower_for_tensorrt(bundle, folder, options, progress)
        kept = {stage: graph for stage, graph in lowered.graphs.items() if stage in self._stages or not self._stages}
        for stage, graph in kept.items():
            inputs, outputs = declared_ports(graph)
            self.inputs[stage], self.outputs[stage] = set(inputs), set(outputs)
        return dataclasses.replace(lowered, graphs=kept)


def _check(built: Built, watched: Watched, plugins: dict[str, int], native: bool) -> None:
    """Engines, their plugins, and their inputs and outputs are those of the contract with the runtime.

    That no engine of a step layout reads an input on the host needs no check: it would not have been built.
    """
    bundle, target = built.bundle, built.bundle.manifest.targets[built.name]
    config = config_of(bundle.manifest)
    verify_hashes(bundle)
    assert options_of(target, EngineSpec).plugin_layers == plugins
    for stage, count in plugins.items():
        plan = bundle.file(target.graphs[stage]).read_bytes()
        # Names of plugins are in the plan as they are: they are how the runtime finds them.
        found = {name for name in ("LatentAttention", "SparseMoE", "QuantizedSparseMoE") if name.encode() in plan}
        assert bool(found) == bool(count)
        caches = {f"past_{index}" for index in range(config.looped.slots.get(stage, 0))}
        made = {f"{name}_next" if native else name.replace("past", "rows") for name in caches}
        assert watched.inputs[stage] == INPUTS[stage] | caches
        assert watched.outputs[stage] == OUTPUTS[stage] | made


def _built(bundle: Path, folder: Path, wish: str, *stages: str, **options: Any) -> tuple[Built, Watched]:
    path = Path(shutil.copytree(bundle, folder / "built.bundle"))
    watched = Watched(*stages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_files, "lower_for_tensorrt", watched)
        built = build(path, target_from(wish, options))
    assert built.bundle == open_bundle(path)
    return built, watched


ALL = "rtx-sm86+sm89+sm120"


@pytest.mark.parametrize(
    ("wish", "options"),
    [
        (ALL, {}),
        ("rtx-sm89", {"dtype": "bf16", "layout": "loop"}),
        ("rtx-sm120", {"dtype": "fp32"}),
        ("rtx-sm86", {"weights": "int4", "layout": "loop"}),
    ],
)
def test_the_demo_checkpoint(demo_bundle: Path, tmp_path: Path, wish: str, options: Any) -> None:
    built, watched = _built(demo_bundle, tmp_path, wish, max_context=64, **options)
    native = options.get("dtype") != "fp32"
    if options.get("layout") == "loop":
        # Latent attention in every block, the experts in one.
        _check(built, watched, {"model": 4}, native=False)
    else:
        attentions = 0 if native else 1
        _check(built, watched, {"prelude": attentions, "step": 1 + attentions, "coda": attentions}, native)


@pytest.mark.parametrize(
    ("checkpoint", "wish", "options"),
    [
        ("gqa-16", "rtx-sm120", {"weights": "int8", "dtype": "bf16"}),
        ("gqa-1", ALL, {"layout": "loop"}),
        ("mla-1", "rtx-sm86", {"weights": "int4"}),
        ("mla-16", "rtx-sm89+sm120", {"weights": "fp8", "dtype": "bf16"}),
        ("mla-16", ALL, {"weights": "int8", "dtype": "bf16", "layout": "loop"}),
    ],
)
def test_one_and_sixteen_loops_of_either_attention(
    bundles: Callable[[str], Path], tmp_path: Path, checkpoint: str, wish: str, options: Any
) -> None:
    built, watched = _built(bundles(checkpoint), tmp_path, wish, max_context=64, **options)
    config = config_of(built.bundle.manifest)
    blocks = config.prelude_layers + 1 + config.coda_layers
    if options.get("layout") == "loop":
        _check(built, watched, {"model": (blocks if config.is_mla else 0) + 1}, native=False)
    else:
        _check(built, watched, {"prelude": 0, "step": 1, "coda": 0}, native=True)


@pytest.mark.parametrize(
    ("wish", "options"),
    [("rtx-sm89", {}), ("rtx-sm86", {"weights": "int8", "dtype": "bf16"}), ("rtx-sm120", {"layout": "loop"})],
)
def test_windows_and_four_inner_layers(
    exported: Callable[..., Path], tmp_path: Path, wish: str, options: dict[str, Any]
) -> None:
    built, watched = _built(exported(FIXTURES / "dory-small"), tmp_path, wish, max_context=64, **options)
    stages = ["model"] if options.get("layout") == "loop" else ["prelude", "step", "coda"]
    _check(built, watched, dict.fromkeys(stages, 0), native=stages != ["model"])


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["none", "int4"])
def test_the_step_of_the_1b_shape(tmp_path: Path, weights: str) -> None:
    """The widths of the 1b variant with 8 of its 64 experts: about 0.5 GB of weights in fp16."""
    config = dataclasses.replace(VARIANTS["1b"], n_experts=8)
    bundle = _random_bundle(config, tmp_path / "wide")
    built, watched = _built(bundle, tmp_path, ALL, "step", weights=weights, max_context=512)
    # Its cache rows are wider than what TensorRT's own attention takes.
    _check(built, watched, {"step": 2}, native=False)
    assert built.reports["step"]["peak_bytes"] < 3e9
