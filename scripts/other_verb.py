"""``mythos-edge validate --against OTHER.onnx``: the levels of this comparison, and the report for people."""

import argparse
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import UsageError, unavailable
from mythos_edge.runtime import parity
from mythos_edge.runtime.backends.opening import open_backend
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import deep_verb
from mythos_edge.scripts.console import Console

if TYPE_CHECKING:
    from mythos_edge.exporter.whole_model import WholeModel

Comparison = Callable[[Session], dict[str, Any]]


def of_file(
    args: argparse.Namespace, bundle: Bundle, ids: NDArray[np.int64], console: Console, opened: ExitStack
) -> Comparison:
    """The comparison with the model in the file that --against names, at the level that --level names.

    Raises UsageError and BundleError.
    """
    try:
        from mythos_edge.model.families.table import config_of
        from mythos_edge.model.layout import recipes
        from mythos_edge.scripts import other_model
    except ImportError as error:
        raise unavailable(error, "comparing with a graph", "pip install 'mythos-edge[export]'") from error
    model = other_model.opened_model(Path(args.against), bundle)
    if args.level == "smoke":
        return lambda session: _smoke(model, bundle, console)
    deep_verb.check_memory(sum(math.prod(recipe.shape) for recipe in recipes(config_of(bundle.manifest), 1)))
    if args.level == "standard":
        return lambda session: _standard(model, session, ids, args.seed, console)
    target = args.target or bundle.manifest.default_target
    if bundle.target(target).is_native:
        raise UsageError(f"--target {target}: its engines show nothing of their inside: name one for ONNX Runtime")
    backend = open_backend(bundle, target, trust=args.trust)
    opened.callback(backend.close)
    other = other_model.OtherModel(model, bundle, target, backend, args.seed, console.progress)
    about = (
        f"The file {args.against} beside the target {target}. What is allowed is measured: it follows how far float32 "
        "takes the reference itself from float64 on the same inputs."
    )
    return deep_verb.telling(args, bundle, target, ids, console, other.report, about)


def _smoke(model: "WholeModel", bundle: Bundle, console: Console) -> dict[str, Any]:
    from mythos_edge.scripts import other_model

    told = other_model.smoke(model, bundle)
    console.say(f"{model.path.name}: {told}")
    return {
        "passed": True,
        "level": "smoke",
        "against": str(model.path),
        "inputs": model.inputs,
        "outputs": model.outputs,
    }


def _standard(
    model: "WholeModel", session: Session, ids: NDArray[np.int64], seed: int, console: Console
) -> dict[str, Any]:
    from mythos_edge.scripts import other_model

    console.progress("comparing", 0.0)
    report, allowed = other_model.standard(model, session, ids, seed)
    passed, tells = parity.passes(report, allowed), "depth" in model.outputs
    depth = f"{report.depth_agreement:.1%}" if tells else "not told by the file"
    console.say(
        f"{model.path.name} {'ok' if passed else 'DIFFERS'}: max abs {report.max_abs:.2g}, allowed {allowed:.2g}; "
        f"top-1 {report.top1_agreement:.1%}, depth {depth}, {report.compared:.1%} of positions compared"
    )
    return {
        "passed": passed,
        "level": "standard",
        "against": str(model.path),
        "allowed_max_abs": allowed,
        **report.to_dict(),
        "depth_agreement": report.depth_agreement if tells else None,
    }
