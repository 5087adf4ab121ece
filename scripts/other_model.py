"""``mythos-edge validate --against OTHER.onnx``: a whole model in one file, beside the graphs of a bundle.

smoke: it is sound, has inputs and outputs that are known, and runs. standard: logits and depth on the same tokens.
deep: its Loop is run with the values of every loop step as outputs, each a call that the bundle's target gets, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mythos_edge.exporter.target_weights import TargetWeights
from mythos_edge.exporter.whole_model import CARRIED, Inside, WholeModel
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BundleError
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import experts_of, recipes
from mythos_edge.model.linked_weights import weights_apart
from mythos_edge.model.network import LoopedNetwork
from mythos_edge.runtime import parity
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.session import Session
from mythos_edge.scripts.deep_check import Progress
from mythos_edge.scripts.deep_pair import Pair, network_with
from mythos_edge.scripts.deep_report import DeepReport, Divergence
from mythos_edge.scripts.deep_run import StageRun, TargetRun
from mythos_edge.scripts.weight_noise import references_of

Array = NDArray[Any]
_SMOKE_TOKENS = 8


def opened_model(path: Path, bundle: Bundle) -> WholeModel:
    """The model in a file, to be held against ``bundle``. Raises BundleError."""
    experts = experts_of(config_of(bundle.manifest))
    return WholeModel(path, None if experts is None else experts.router)


def smoke(model: WholeModel, bundle: Bundle) -> str:
    """Runs a few tokens; says what it made. Raises BundleError and MythosEdgeError."""
    ids = np.arange(_SMOKE_TOKENS)[None] % bundle.manifest.model.vocab_size
    found = _run(model, bundle, ids)
    return f"runs on {_SMOKE_TOKENS} tokens: logits {list(found['logits'].shape)}, all of them numbers"


def _run(model: WholeModel, bundle: Bundle, ids: Array) -> dict[str, Array]:
    """Logits (B, S, V) and, if it tells, depth (B, S). Raises BundleError for logits of another shape."""
    looped = bundle.manifest.model
    rows = [model.run(row[None], looped.max_depth, looped.threshold) for row in ids]
    found = {name: np.concatenate([row[name] for row in rows]) for name in model.outputs}
    wanted = {"logits": (*ids.shape, looped.vocab_size), "depth": ids.shape}
    for name, made in found.items():
        if made.shape != wanted[name]:
            raise BundleError(
                f"{model.path}: gives {name} of shape {list(made.shape)}, expected {list(wanted[name])}: "
                "give a file made from this model"
            )
    if not np.isfinite(found["logits"]).all():
        raise BundleError(f"{model.path}: gives logits that are no finite numbers: look at its weights, or at dtypes")
    return found


def standard(model: WholeModel, session: Session, ids: Array, seed: int) -> tuple[parity.ParityReport, float]:
    """Logits and depth beside the bundle's on ids (B, S), and the largest error that is allowed."""
    bundle = session.bundle
    found = _run(model, bundle, ids)
    weights = TargetWeights(bundle, None)
    network: LoopedNetwork = network_with(bundle, weights, ids.shape[1], torch.float64)
    exact, own_error = references_of(network, ids, [bundle.manifest.model.threshold], seed)
    reference = exact[bundle.manifest.model.threshold]
    score = session.score(ids, policy="full")
    # Either may be off by as much.
    allowed = 2 * parity.tolerance(own_error, float(np.abs(score.logits).max()))
    margins = reference.margin.numpy(), reference.router_margin.numpy()
    depth = found.get("depth", score.depth)
    return parity.compare(score.logits, found["logits"], score.depth, depth, *margins, allowed), allowed


@dataclass(frozen=True)
class OtherModel:
    """A whole model to be looked into beside the graphs of ``target``, whose backend is ``backend``."""

    model: WholeModel
    bundle: Bundle
    target: str
    backend: Backend
    seed: int = 0
    progress: Progress = lambda what, share: None

    def report(self, ids: NDArray[np.int64]) -> DeepReport:
        """The comparison on the tokens ``ids (S,)``. Raises BundleError, and MythosEdgeError where it does not run."""
        self.progress("looking into the file", 0.0)
        looped = self.bundle.manifest.model
        _run(self.model, self.bundle, ids[None])
        file = self.bundle.file(self.bundle.manifest.graphs["model"].file)
        like = WholeModel(file, self.model.router, weights_apart(self.bundle, file, None))
        inside = self.model.inside(ids[None], looped.max_depth, looped.threshold, like)
        given = _target_run(inside, ids, self.bundle)
        weights = _FileWeights(self.model, self.bundle)
        pair = Pair(self.bundle, self.target, self.backend, self.model.path.name, self.seed, self.progress)
        report = pair.report(given, weights)
        missing = (*report.missing, *weights.unseen())
        return replace(report, missing=missing, first_divergence=_ends(inside, self.bundle) or report.first_divergence)


def _target_run(inside: Inside, ids: Array, bundle: Bundle) -> TargetRun:
    """The pass as calls of the three stages: what each was given, and what it made."""
    looped = bundle.manifest.model
    count, steps = len(ids), min(len(inside.carried["h"]), looped.max_depth)
    positions, zero = np.arange(count), {"length": np.array(0), "first": np.zeros(1, np.int64)}

    def call(stage: str, index: int, feeds: Mapping[str, Array], values: Mapping[str, Array]) -> StageRun:
        past = np.zeros((1, 0, looped.cache_width), np.float32)
        slots = {f"past_{slot}": past for slot in range(looped.slots[stage])}
        flat = {name: _rows(name, value) for name, value in values.items()}
        return StageRun(stage, index, positions, {**feeds, **zero, **slots}, flat)

    e = inside.begun["h"]
    runs = [call("prelude", 0, {"input_ids": ids[None]}, {**inside.taps["prelude"], "e": e})]
    state = inside.begun
    fixed = {"e": e, "threshold": np.array(looped.threshold, np.float32), "min_depth": np.array(1)}
    for index in range(steps):
        after = {name: inside.carried[name][index] for name in CARRIED}
        feeds = {**state, **fixed, "step_index": np.full((1, count), index)}
        taps = {name: values[index] for name, values in inside.taps["step"].items()}
        runs.append(call("step", index, feeds, {**taps, **{f"{name}_next": value for name, value in after.items()}}))
        state = after
    coda = {**inside.taps["coda"], "logits": inside.logits}
    runs.append(call("coda", looped.max_depth - 1, {"out": state["out"], "logit_rows": positions}, coda))
    h = np.full((looped.max_depth, count, looped.dim), np.nan, np.float32)
    h[:steps] = inside.carried["h"][:steps, 0]
    return TargetRun(ids, looped.threshold, runs, [], inside.logits[0], state["depth"][0], h)


def _rows(name: str, value: Array) -> Array:
    return value.reshape(-1, 1) if name in ("halt_mass_next", "depth_next") else value.reshape(-1, value.shape[-1])


def _ends(inside: Inside, bundle: Bundle) -> Divergence | None:
    """The divergence of a Loop that begins with a state of its own, or ends too early or too late."""
    looped, steps = bundle.manifest.model, len(inside.carried["h"])
    for name in ("out", "halt_mass", "depth"):
        if inside.begun[name].any():
            return Divergence(0, 0, "halting", "graph", name, detail=f"{name} does not begin with zeros")
    running = inside.carried["halt_mass"][-1][0] < looped.threshold if steps else np.ones(1, np.bool_)
    if steps > looped.max_depth or (steps < looped.max_depth and running.any()):
        what = f"the Loop ends after {steps} loop steps, where position {int(running.argmax())} has not halted"
        what = f"the Loop runs {steps} loop steps, expected {looped.max_depth}" if steps > looped.max_depth else what
        return Divergence(int(running.argmax()), max(0, steps - 1), "halting", "graph", "cond_out", detail=what)
    return None


class _FileWeights:
    """The weights of a file that have the names and shapes of the bundle's."""

    rounded: frozenset[str] = frozenset()

    def __init__(self, model: WholeModel, bundle: Bundle) -> None:
        self._stages = TargetWeights(bundle, None)
        shapes = {one.name: one.shape for one in recipes(config_of(bundle.manifest), bundle.manifest.max_context)}
        stored = model.weights
        self._known = {
            name: stored[name]
            for name, shape in shapes.items()
            if name in stored and tuple(stored[name].shape.numpy()) == tuple(shape)
        }
        self._count = len(shapes)

    def stages_of(self, name: str) -> list[str]:
        """The stages that read a weight; none for one that the file does not have."""
        return self._stages.stages_of(name) if name in self._known else []

    def read(self, stage: str, name: str, start: int, stop: int | None = None) -> tuple[Array, float]:
        """The values ``start .. stop`` of a weight, flat, which no rounding has moved."""
        values: Array = self._known[name].numpy().reshape(-1)[start:stop].astype(np.float32)
        return values, 0.0

    def unseen(self) -> list[str]:
        """A line on the weights that were not compared."""
        left = self._count - len(self._known)
        return [f"weights: {left} of {self._count}, which have other names or shapes in the file"] if left else []
