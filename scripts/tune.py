"""``mythos-edge tune``: which threshold, depth and target trade how much quality for how much speed.

Quality is measured teacher-forced on given tokens against the fp32 target at full depth; speed by decoding them one at
a time. The fastest point within a budget of KL divergence becomes a preset of the bundle.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.bundle_writer import update_manifest
from mythos_edge.model.errors import UsageError, unavailable
from mythos_edge.model.manifest import MANIFEST_FILE, Manifest
from mythos_edge.model.output_files import check_output, check_output_folder
from mythos_edge.runtime.backends.opening import open_backend, require_cache
from mythos_edge.runtime.halting import Depth
from mythos_edge.runtime.quality import kl_divergence
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import arguments, given_tokens, measuring, options
from mythos_edge.scripts.console import Console
from mythos_edge.scripts.tune_points import Point, Setting, knee_of

HELP = "measure quality against speed over thresholds, depths and targets, and save the best point as a preset"
EXAMPLE = "mythos-edge tune model.bundle --data ids.npy --targets ort-cpu,ort-cpu-int4"

# Shares of the model's own threshold: halting mass adds up to about 1, so lower ones end loops earlier.
_THRESHOLD_SHARES = (0.3, 0.5, 0.7, 0.9, 0.95, 1.0)
_DEPTH_SHARES = (0.5, 0.75, 1.0)
_LEAST_POSITIONS = 8
# The session that others are compared with; no target has this name.
_REFERENCE = ""
_REPETITIONS, _LEAST_REPETITIONS = 5, 3
# Of every repetition, spread over some rows: each does the same work, so that only the machine tells them apart.
_MOST_TIMED_TOKENS, _MOST_TIMED_ROWS = 64, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)
    tokens = parser.add_mutually_exclusive_group(required=True)
    text = "tokens of the kind the model is for (rows, positions)"
    tokens.add_argument("--data", type=arguments.file_name, metavar="NPY", help=text)
    given_tokens.add_text(tokens)
    given_tokens.add_row_tokens(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=arguments.path,
        metavar="FOLDER",
        help="for curve.png and curve.html (default: BUNDLE-tune; none with --html)",
    )
    parser.add_argument("--html", type=arguments.path, metavar="FILE", help="write the curve and all points as a page")
    parser.add_argument("--targets", metavar="T,T", help="names of targets (default: the first of the bundle)")
    parser.add_argument("--thresholds", metavar="X,X", help="default: some from 0.3 of the model's own on")
    parser.add_argument(
        "--max-depths", metavar="N,N", help="default: half, three quarters and all of the trained depth"
    )
    parser.add_argument("--max-kl", type=float, default=0.01, metavar="NATS", help="budget of the knee (default: 0.01)")
    parser.add_argument("--save", default="knee", metavar="NAME", help="the preset's name (default: knee)")
    parser.add_argument("-r", "--repetitions", type=int, default=_REPETITIONS, metavar="N", help="default: 5")
    options.add_cache(parser)
    options.add_threads(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    report = _report_module()
    arguments.require_positive(args, "repetitions")
    options.check_nats(args.max_kl)
    if not args.save:
        raise UsageError("--save is empty, expected a name for the preset")
    given_tokens.are_given(args, "--data", args.data)
    bundle = open_bundle(args.bundle)
    tokens = given_tokens.tokens_of(args, args.data, bundle)
    ids = tokens.ids
    if ids.shape[1] < _LEAST_POSITIONS:
        raise UsageError(f"{tokens.file}: has {ids.shape[1]} positions a row, expected at least {_LEAST_POSITIONS}")
    _check_reference(bundle)
    settings = settings_of(args, bundle)
    if args.cache is not None:
        for name in {setting.target for setting in settings}:
            require_cache(bundle, name, bundle.target(name), args.cache)
    folder = args.output
    if folder is None and args.html is None:
        folder = args.bundle.with_name(f"{args.bundle.name}-tune")
    _check_outputs(bundle, folder, report.FILES, args.html)
    if args.html is not None:
        console.leave_stdout_to(args.html)
    points, full = _measure(bundle, settings, ids, args, console)
    full_ms = full.median
    knee = knee_of(points, args.max_kl) if full.share <= measuring.NOISY_SHARE else None
    files = report.write(folder, args.html, points, knee, full_ms, args.max_kl, f"{args.bundle}, {tokens.file}")
    _tell_points(points, knee, full_ms, bundle.manifest.default_target, console)
    for note in notes_of(points, knee, full, args.max_kl, args.repetitions):
        console.note(note)
    if knee is not None:
        # Measuring takes minutes, in which others may have changed the bundle, or built this target again.
        preset = {args.save: knee.preset()}
        update_manifest(bundle, held_to=knee.setting.target, presets=lambda presets: {**presets, **preset})
        _tell_knee(points, knee, args, bundle.manifest, console)
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


def _check_outputs(bundle: Bundle, folder: Path | None, files: Sequence[str], page_file: Path | None) -> None:
    """Raises UsageError or BundleError where the curve or the preset cannot be written: before minutes of measuring."""
    places = [] if page_file is None else [page_file]
    if folder is not None:
        check_output_folder(folder, "the curve")
        places += [folder / name for name in files if folder.is_dir()]
    for place in places:
        check_output(place, "the curve")
    bundle.require_own_files()
    check_output(bundle.path / MANIFEST_FILE, "the preset")


def settings_of(args: argparse.Namespace, bundle: Bundle) -> list[Setting]:
    """Every combination asked for, and each target as trained. Raises UsageError, BundleError."""
    model = bundle.manifest.model
    own, trained = model.threshold, model.max_depth
    shares = _THRESHOLD_SHARES if model.halts else ()
    thresholds = _numbers(args.thresholds, "--thresholds", float) or [own * share for share in shares]
    depths = _numbers(args.max_depths, "--max-depths", int) or [max(1, round(model.deepest * s)) for s in _DEPTH_SHARES]
    default = bundle.manifest.default_target
    targets = [default] if args.targets is None else arguments.target_names(args.targets, "--targets")
    for name in targets:
        bundle.target(name)
    wanted = [Setting(*one) for one in itertools.product(targets, {*thresholds, own}, {*depths, trained})]
    for setting in wanted:
        Depth(**setting.depth).resolve(model)
    return sorted(set(wanted), key=lambda one: (targets.index(one.target), -one.max_depth, -one.threshold))


def _measure(
    bundle: Bundle, settings: list[Setting], ids: NDArray[np.int64], args: argparse.Namespace, console: Console
) -> tuple[list[Point], measuring.Spread]:
    """The points of all settings, and the milliseconds per token of the fp32 target at full depth."""
    with ExitStack() as stack:
        default = bundle.manifest.default_target

        def opened(name: str, cache: str | None = None) -> Session:
            return stack.enter_context(Session(bundle, open_backend(bundle, name, args.threads, cache=cache)))

        # Others are compared with the first, whatever their caches.
        sessions = {_REFERENCE: opened(default)}
        for name in dict.fromkeys(setting.target for setting in settings):
            as_is = args.cache in (None, bundle.target(name).own_cache)
            sessions[name] = sessions[_REFERENCE] if name == default and as_is else opened(name, args.cache)
        quality = _quality(sessions, settings, ids, console)
        ms = _times(sessions, settings, ids, args.repetitions, console)
    full = ms[None]
    return [Point(s, *quality[s], ms[s].median, ms[s].share, full.median / ms[s].median) for s in settings], full


def _check_reference(bundle: Bundle) -> None:
    """Raises UsageError where the target that others are compared with, the first, is rounded itself."""
    name = bundle.manifest.default_target
    weights = bundle.target(name).weights
    if {"int8", "int4", "fp8"} & set(weights.values()):
        raise UsageError(
            f"{bundle.path}: tune compares with the first target, and {name} is rounded: "
            "tune the full bundle, and pack it then, as presets are packed too"
        )


def _reference(sessions: dict[str, Session]) -> Session:
    """The session of the target that others are compared with, which is the first."""
    return sessions[_REFERENCE]


def _quality(
    sessions: dict[str, Session], settings: list[Setting], ids: NDArray[np.int64], console: Console
) -> dict[Setting, tuple[float, float, float]]:
    """Mean KL divergence, top-1 agreement and mean depth of each setting, one row of ``ids`` at a time."""
    figures: dict[Setting, list[NDArray[np.float64]]] = {setting: [] for setting in settings}
    for number, row in enumerate(ids):
        reference = _reference(sessions).score(row[None], policy="full").logits[0]
        for index, setting in enumerate(settings):
            console.progress("quality", (number + index / len(settings)) / len(ids))
            score = sessions[setting.target].score(row[None], **setting.depth)
            same = reference.argmax(-1) == score.logits[0].argmax(-1)
            figures[setting].append(np.stack([kl_divergence(reference, score.logits[0]), same, score.depth[0]]))
    means = {setting: np.concatenate(rows, axis=1).mean(axis=1) for setting, rows in figures.items()}
    return {setting: (float(kl), float(same), float(depth)) for setting, (kl, same, depth) in means.items()}


def _times(
    sessions: dict[str, Session], settings: list[Setting], ids: NDArray[np.int64], repetitions: int, console: Console
) -> dict[Setting | None, measuring.Spread]:
    """Milliseconds per token of each setting; None stands for the fp32 target at full depth.

    Every repetition times all of them on the same tokens, each time in another order, so that a machine that slows down
    or speeds up favours none, and what repetitions of one setting differ by is the machine's doing.
    """
    random = np.random.default_rng(0)
    runs: list[Setting | None] = [None, *settings]
    times: dict[Setting | None, list[float]] = {one: [] for one in runs}
    prefill, rows = ids.shape[1] // 2, ids[:_MOST_TIMED_ROWS]
    rows = rows[:, : prefill + _MOST_TIMED_TOKENS // len(rows)]
    for number in range(repetitions + 1):
        for index, place in enumerate(random.permutation(len(runs))):
            console.progress("timing", (number + index / len(runs)) / (repetitions + 1))
            one = runs[place]
            session = _reference(sessions) if one is None else sessions[one.target]
            depth = {"policy": "full"} if one is None else one.depth
            times[one].append(statistics.fmean(_decode_ms(session, row, prefill, **depth) for row in rows))
    # The first round warms caches and is left out.
    return {one: _spread(spent[1:]) for one, spent in times.items()}


def _spread(times: list[float]) -> measuring.Spread:
    """The spread of repetitions; of five and more without the fastest and the slowest, which one hiccup may be."""
    return measuring.spread_of(sorted(times)[1:-1] if len(times) >= _REPETITIONS else times)


def _decode_ms(session: Session, row: NDArray[np.int64], prefill: int, **depth: Any) -> float:
    """Milliseconds per token after the first ``prefill``, which are fed at once; loop steps caught up included."""
    told: list[tuple[float, float]] = []
    session.score(row[None], prefill=prefill, progress=lambda share: told.append((share, time.perf_counter())), **depth)
    begin, started = next(one for one in told if one[0] > 0)
    end, ended = told[-1]
    return (ended - started) * 1e3 / ((end - begin) * len(row))


def notes_of(
    points: Sequence[Point], knee: Point | None, full: measuring.Spread, max_kl: float, repetitions: int
) -> list[str]:
    """Why there is no knee, or how far the measuring can be trusted; nothing where all was steady."""
    limit, again = f"{measuring.NOISY_SHARE:.0%}", "measure again when the machine has nothing else to do"
    if full.share > measuring.NOISY_SHARE:
        return [
            f"no preset is saved: full depth is the same work every time, and its times are {full.share:.0%} apart, "
            f"more than {limit}: {again}"
        ]
    noisy = sum(not point.steady for point in points)
    if knee is None and any(point.kl <= max_kl for point in points):
        return [f"no preset is saved: the times of each point with KL <= {max_kl:g} are over {limit} apart: {again}"]
    if knee is None:
        return [f"no point has KL <= {max_kl:g}: allow a larger --max-kl or try more --thresholds"]
    if repetitions < _LEAST_REPETITIONS:
        return [
            f"note: whether the machine was steady shows from -r {_LEAST_REPETITIONS} on, this was -r {repetitions}"
        ]
    return (
        [f"note: points marked ~ cannot be the knee, as their times are over {limit} apart: {again}"] if noisy else []
    )


def _tell_points(points: list[Point], knee: Point | None, full_ms: float, target: str, console: Console) -> None:
    console.say(f"full depth of {target}: {full_ms:.3g} ms per token\n")
    rows = [("  target", "threshold", "max", "KL", "top-1", "depth", "ms/token", "speedup")]
    for point in points:
        one = point.setting
        mark = "*" if point is knee else " " if point.steady else "~"
        depths = f"{one.threshold:.4g}", str(one.max_depth)
        quality = f"{point.kl:.2g}", f"{point.top1_agreement:.1%}", f"{point.mean_depth:.2f}"
        rows.append((f"{mark} {one.target}", *depths, *quality, f"{point.ms_per_token:.3g}", f"{point.speedup:.2f}x"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        console.say("  ".join((row[0].ljust(widths[0]), *cells)))


def _tell_knee(
    points: list[Point], knee: Point, args: argparse.Namespace, manifest: Manifest, console: Console
) -> None:
    """The preset, in figures of the table above."""
    one = knee.setting
    own = Setting(one.target, manifest.model.threshold, manifest.model.max_depth)
    as_trained = next(point.speedup for point in points if point.setting == own)
    console.say(
        f"\n* the knee: {knee.speedup:.2f}x the speed of full depth at KL <= {args.max_kl:g}\n"
        f"  (the model's own depth on {one.target}: {as_trained:.2f}x), saved as preset {args.save!r}:\n"
        f"  --target {one.target} --threshold {one.threshold:.4g} --max-depth {one.max_depth}"
    )
    if args.cache is not None:
        console.note(f"note: a preset says nothing of caches: give --cache {args.cache} with it, as was measured")


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
