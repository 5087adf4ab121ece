"""``mythos-edge tune``: which threshold, depth and target trade how much quality for how much speed.

Quality is measured teacher-forced on given tokens against the fp32 target at full depth; speed by decoding them one at
a time. The fastest point within a budget of KL divergence becomes a preset of the bundle.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.bundle_writer import update_manifest
from mythos_edge.model.config import MythosConfig
from mythos_edge.model.errors import UsageError, unavailable
from mythos_edge.model.manifest import MANIFEST_FILE, TARGET, Preset
from mythos_edge.model.output_files import check_output, check_output_folder
from mythos_edge.runtime.halting import Depth
from mythos_edge.runtime.prompts import checked_ids
from mythos_edge.runtime.quality import kl_divergence
from mythos_edge.runtime.session import Session, open_backend
from mythos_edge.scripts import arguments, measuring, options
from mythos_edge.scripts.console import Console

HELP = "measure quality against speed over thresholds, depths and targets, and save the best point as a preset"
EXAMPLE = "mythos-edge tune model.bundle --data ids.npy --targets ort-cpu,ort-cpu-int4"

# Shares of the model's own threshold: halting mass adds up to about 1, so lower ones end loops earlier.
_THRESHOLD_SHARES = (0.3, 0.5, 0.7, 0.9, 0.95, 1.0)
_DEPTH_SHARES = (0.5, 0.75, 1.0)
_LEAST_POSITIONS = 8
_MOST_TIMED_TOKENS = 64
# Medians this close are equally fast; then the better quality decides.
_TIMING_NOISE = 0.03


@dataclass(frozen=True)
class Setting:
    """A target and how deep it thinks."""

    target: str
    threshold: float
    max_depth: int

    @property
    def depth(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "max_depth": self.max_depth}


@dataclass(frozen=True)
class Point:
    """What a setting gave: mean KL divergence to full depth in nats, share of equal top tokens, mean depth in loop
    steps, median milliseconds per decoded token, and the time of full depth over that."""

    setting: Setting
    kl: float
    top1_agreement: float
    mean_depth: float
    ms_per_token: float
    speedup: float

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values.pop("setting"), **values}

    def preset(self) -> Preset:
        values = self.to_dict()
        del values["ms_per_token"]  # of this machine alone
        return Preset(**values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)
    parser.add_argument(
        "--data",
        type=arguments.file_name,
        required=True,
        metavar="NPY",
        help="tokens of the kind the model is for (rows, positions)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=arguments.path,
        metavar="FOLDER",
        help="for curve.png and curve.html (default: BUNDLE-tune)",
    )
    parser.add_argument("--targets", default=TARGET, metavar="T,T", help=f"default: {TARGET}")
    parser.add_argument("--thresholds", metavar="X,X", help="default: some from 0.3 of the model's own on")
    parser.add_argument(
        "--max-depths", metavar="N,N", help="default: half, three quarters and all of the trained depth"
    )
    parser.add_argument("--max-kl", type=float, default=0.01, metavar="NATS", help="budget of the knee (default: 0.01)")
    parser.add_argument("--save", default="knee", metavar="NAME", help="the preset's name (default: knee)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N")
    options.add_threads(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    report = _report_module()
    if args.repetitions < 1:
        raise UsageError(f"--repetitions is {args.repetitions}, expected at least 1")
    options.check_nats(args.max_kl)
    if not args.save:
        raise UsageError("--save is empty, expected a name for the preset")
    bundle = open_bundle(args.bundle)
    ids = checked_ids(options.ids_from_file(args.data), bundle.manifest.config)
    if ids.shape[1] < _LEAST_POSITIONS:
        raise UsageError(f"{args.data}: has {ids.shape[1]} positions a row, expected at least {_LEAST_POSITIONS}")
    settings = settings_of(args, bundle)
    folder = args.output or args.bundle.with_name(f"{args.bundle.name}-tune")
    _check_outputs(bundle, folder, report.FILES)
    points, full_ms = _measure(bundle, settings, ids, args, console)
    knee = knee_of(points, args.max_kl)
    files = report.write(folder, points, knee, full_ms, args.max_kl, f"{args.bundle}, {args.data}")
    _tell(points, knee, full_ms, args, bundle.manifest.config, console)
    if knee is not None:
        # Measuring takes minutes, in which others may have changed the bundle, or built this target again.
        preset = {args.save: knee.preset()}
        update_manifest(bundle, held_to=knee.setting.target, presets=lambda presets: {**presets, **preset})
    console.result(
        {
            "full_depth_ms_per_token": full_ms,
            "points": [point.to_dict() for point in points],
            "knee": None if knee is None else knee.to_dict(),
            "preset": None if knee is None else args.save,
            "files": [str(file) for file in files],
        }
    )
    return 0 if knee is not None else 1


def _check_outputs(bundle: Bundle, folder: Path, files: Sequence[str]) -> None:
    """Raises UsageError or BundleError where the curve or the preset cannot be written: before minutes of measuring."""
    check_output_folder(folder, "the curve")
    for name in files if folder.is_dir() else ():
        check_output(folder / name, "the curve")
    bundle.require_own_files()
    check_output(bundle.path / MANIFEST_FILE, "the preset")


def settings_of(args: argparse.Namespace, bundle: Bundle) -> list[Setting]:
    """Every combination asked for, and each target as trained. Raises UsageError, BundleError."""
    config = bundle.manifest.config
    own, trained = config.act_threshold, config.max_loop_iters
    thresholds = _numbers(args.thresholds, "--thresholds", float) or [own * share for share in _THRESHOLD_SHARES]
    depths = _numbers(args.max_depths, "--max-depths", int) or [max(1, round(trained * s)) for s in _DEPTH_SHARES]
    targets = [name for name in args.targets.split(",") if name]
    if not targets:
        raise UsageError(f"--targets is {args.targets!r}, expected names like {TARGET}")
    for name in targets:
        bundle.target(name)
    wanted = [Setting(*one) for one in itertools.product(targets, {*thresholds, own}, {*depths, trained})]
    for setting in wanted:
        Depth(**setting.depth)
    return sorted(set(wanted), key=lambda one: (targets.index(one.target), -one.max_depth, -one.threshold))


def knee_of(points: Sequence[Point], max_kl: float) -> Point | None:
    """The fastest point within the budget; of those as fast, the one nearest to full depth."""
    good = [point for point in points if point.kl <= max_kl]
    if not good:
        return None
    limit = min(point.ms_per_token for point in good) * (1 + _TIMING_NOISE)
    return min((point for point in good if point.ms_per_token <= limit), key=lambda point: point.kl)


def _measure(
    bundle: Bundle, settings: list[Setting], ids: NDArray[np.int64], args: argparse.Namespace, console: Console
) -> tuple[list[Point], float]:
    """The points of all settings, and the milliseconds per token of the fp32 target at full depth."""
    with ExitStack() as stack:
        names = dict.fromkeys([TARGET, *(setting.target for setting in settings)])
        sessions = {
            name: stack.enter_context(Session(bundle, open_backend(bundle, name, args.threads))) for name in names
        }
        quality = _quality(sessions, settings, ids, console)
        ms = _times(sessions, settings, ids, args.repetitions, console)
    full_ms = ms[None]
    return [Point(one, *quality[one], ms_per_token=ms[one], speedup=full_ms / ms[one]) for one in settings], full_ms


def _quality(
    sessions: dict[str, Session], settings: list[Setting], ids: NDArray[np.int64], console: Console
) -> dict[Setting, tuple[float, float, float]]:
    """Mean KL divergence, top-1 agreement and mean depth of each setting, one row of ``ids`` at a time."""
    figures: dict[Setting, list[NDArray[np.float64]]] = {setting: [] for setting in settings}
    for number, row in enumerate(ids):
        reference = sessions[TARGET].score(row[None], policy="full").logits[0]
        for index, setting in enumerate(settings):
            console.progress("quality", (number + index / len(settings)) / len(ids))
            score = sessions[setting.target].score(row[None], **setting.depth)
            same = reference.argmax(-1) == score.logits[0].argmax(-1)
            figures[setting].append(np.stack([kl_divergence(reference, score.logits[0]), same, score.depth[0]]))
    means = {setting: np.concatenate(rows, axis=1).mean(axis=1) for setting, rows in figures.items()}
    return {setting: (float(kl), float(same), float(depth)) for setting, (kl, same, depth) in means.items()}


def _times(
    sessions: dict[str, Session], settings: list[Setting], ids: NDArray[np.int64], repetitions: int, console: Console
) -> dict[Setting | None, float]:
    """Median milliseconds per token of each setting; None stands for the fp32 target at full depth.

    Every round times all of them on the same tokens, each in another order, so that a machine that slows down or
    speeds up favours none.
    """
    random = np.random.default_rng(0)
    runs: list[Setting | None] = [None, *settings]
    times: dict[Setting | None, list[float]] = {one: [] for one in runs}
    prefill = ids.shape[1] // 2
    for number in range(repetitions + 1):
        row = ids[number % len(ids), : prefill + _MOST_TIMED_TOKENS]
        for index, place in enumerate(random.permutation(len(runs))):
            console.progress("timing", (number + index / len(runs)) / (repetitions + 1))
            one = runs[place]
            if one is None:
                ms = _decode_ms(sessions[TARGET], row, prefill, policy="full")
            else:
                ms = _decode_ms(sessions[one.target], row, prefill, **one.depth)
            times[one].append(ms)
    # The first round warms caches and is left out.
    spreads = {one: measuring.spread_of(spent[1:]) for one, spent in times.items()}
    if spreads[None].share > measuring.NOISY_SHARE:  # full depth is the same work in every round
        console.note(f"full depth took times {spreads[None].share:.0%} apart: the machine was noisy, measure again")
    return {one: spread.median for one, spread in spreads.items()}


def _decode_ms(session: Session, row: NDArray[np.int64], prefill: int, **depth: Any) -> float:
    """Milliseconds per token after the first ``prefill``, which are fed at once; loop steps caught up included."""
    told: list[tuple[float, float]] = []
    session.score(row[None], prefill=prefill, progress=lambda share: told.append((share, time.perf_counter())), **depth)
    begin, started = next(one for one in told if one[0] > 0)
    end, ended = told[-1]
    return (ended - started) * 1e3 / ((end - begin) * len(row))


def _tell(
    points: list[Point],
    knee: Point | None,
    full_ms: float,
    args: argparse.Namespace,
    config: MythosConfig,
    console: Console,
) -> None:
    console.say(f"full depth of {TARGET}: {full_ms:.3g} ms per token\n")
    columns = ("target", "threshold", "max depth", "KL", "top-1", "mean depth", "ms/token", "speedup")
    console.say("| " + " | ".join(f"{name:>12}" for name in columns) + " |")
    console.say("|" + "|".join("-" * 13 + ":" for _ in columns) + "|")
    for point in points:
        one = point.setting
        mark = " <- knee" if point is knee else ""
        console.say(
            f"| {one.target:>12} | {one.threshold:12.4g} | {one.max_depth:12} | {point.kl:12.2g} "
            f"| {point.top1_agreement:12.1%} | {point.mean_depth:12.2f} | {point.ms_per_token:12.3g} "
            f"| {point.speedup:11.2f}x |{mark}"
        )
    if knee is None:
        console.note(f"no point has KL <= {args.max_kl:g}: allow a larger --max-kl or try more --thresholds")
        return
    own = Setting(knee.setting.target, config.act_threshold, config.max_loop_iters)
    gain = next(point.ms_per_token for point in points if point.setting == own) / knee.ms_per_token - 1
    console.say(
        f"\n{gain:.0%} faster than the model's own depth at KL <= {args.max_kl:g}: --threshold "
        f"{knee.setting.threshold:.4g} --max-depth {knee.setting.max_depth} on {knee.setting.target}, "
        f"saved as preset {args.save!r}"
    )


def _numbers(text: str | None, option: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers from ``1,2,3``; none when nothing was given."""
    try:
        return [] if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"{option} is {text!r}, expected numbers like {'0.5,0.9' if kind is float else '4,8'}"
        ) from None


def _report_module() -> Any:
    """The module that draws; before anything is measured, so that a missing library is told at once."""
    try:
        from mythos_edge.scripts import tune_report
    except ImportError as error:
        raise unavailable(error, "drawing the curve", "pip install 'mythos-edge[tune]'") from error
    return tune_report
