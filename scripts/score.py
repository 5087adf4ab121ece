"""``mythos-edge score``: how well a model predicts given tokens and how deep it thinks, and the logits as a file."""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.model.output_files import check_output, writing
from mythos_edge.model.stages import MAX_TOGETHER
from mythos_edge.runtime.loop_engine import LoopEngine
from mythos_edge.runtime.scoring import Score, nats_of
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import arguments, given_tokens, options
from mythos_edge.scripts.console import Console
from mythos_edge.scripts.model_stats import PAGE, STATS, ModelStats

HELP = "perplexity, bits per byte and depth of a text or of given tokens, and their logits as a file"
EXAMPLE = (
    "mythos-edge score model.bundle --text notes.txt\n  mythos-edge score model.bundle --ids ids.npy -o scores.npz\n"
    "  mythos-edge score model.bundle --text notes.txt --stats stats.json"
)
_SCORES = "the scores"
# Of the rows that are scored together; a row alone may need more.
_MOST_LOGITS_BYTES = 1 << 28
# So that a line of the histogram has 80 columns at most.
_BAR = 50
Scorer: TypeAlias = Callable[[NDArray[np.int64], Callable[[float], None]], Score]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)
    tokens = parser.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--ids", type=arguments.file_name, metavar="NPY", help="int64 array (batch, positions)")
    given_tokens.add_text(tokens)
    given_tokens.add_row_tokens(parser)
    text = "write ids, logits and depth of every position (default: print the figures alone)"
    parser.add_argument("-o", "--output", type=arguments.path, metavar="NPZ", help=text)
    text = "write what the model does: depth of every token, and which experts each loop step chooses"
    parser.add_argument("--stats", type=arguments.path, metavar="JSON", help=text)
    text = "write the same as one HTML page for people"
    parser.add_argument("--report", type=arguments.path, metavar="HTML", help=text)
    parser.add_argument("--prefill", type=int, metavar="N", help="positions fed as one chunk (default: all)")
    options.add_depth(parser)
    options.add_target(parser)
    options.add_threads(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    given_tokens.are_given(args, "--ids", args.ids)
    bundle = open_bundle(args.bundle, trust_engines=args.trust)
    tokens = given_tokens.tokens_of(args, args.ids, bundle)
    _check_outputs(args, console)
    figures, scores, stats = _score(args, bundle, tokens, console)
    if args.output is not None:
        with writing(args.output, _SCORES) as file:
            np.savez(
                file,
                ids=tokens.ids,
                logits=np.concatenate([score.logits for score in scores]),
                depth=np.concatenate([score.depth for score in scores]),
                block_calls=np.array(figures.block_calls),
                block_rows=np.array(figures.block_rows),
            )
    if stats is not None and args.stats is not None:
        stats.write(args.stats, {"bundle": str(args.bundle), "tokens_of": tokens.file, **options.depth_of(args)})
    if stats is not None and args.report is not None:
        stats.write_page(args.report, f"What {args.bundle.name} does with {Path(tokens.file).name}")
    _tell(args, tokens, figures, stats, console)
    output = None if args.output is None else str(args.output)
    looked_at = {} if stats is None else {"stats": {**_places(args), **stats.summary()}}
    console.result({"output": output, **figures.to_dict(tokens), **looked_at})
    return 0


def _places(args: argparse.Namespace) -> dict[str, str | None]:
    given = {"file": args.stats, "report": args.report}
    return {name: None if path is None else str(path) for name, path in given.items()}


def _check_outputs(args: argparse.Namespace, console: Console) -> None:
    """Raises UsageError where what is asked for cannot be written, as that is better known before the work."""
    outputs = [(args.output, _SCORES), (args.stats, STATS), (args.report, PAGE)]
    given = [(path, what) for path, what in outputs if path is not None]
    for number, (path, what) in enumerate(given):
        taken = next((other for place, other in given[:number] if place == path), None)
        if taken is not None:
            raise UsageError(f"{path}: is where {taken} go: choose another place for {what}")
        check_output(path, what)
        console.leave_stdout_to(path)


@dataclass
class _Figures:
    """Sums over the tokens, each counted once: ``nats`` of the ``predicted`` ones, positions by depth, block calls."""

    nats: float = 0.0
    predicted: int = 0
    depths: Counter[int] = field(default_factory=Counter)
    block_calls: int = 0
    block_rows: int = 0
    catch_up_calls: int = 0

    def add(self, ids: NDArray[np.int64], seen: NDArray[np.int64], score: Score) -> None:
        """Takes in rows of ids (B, S), of which the first ``seen (B,)`` positions are counted already."""
        counted = np.arange(ids.shape[1]) >= seen[:, None]
        self.nats += float(nats_of(score.logits, ids)[counted[:, 1:]].sum())
        self.predicted += int(counted[:, 1:].sum())
        self.depths.update(score.depth[counted].tolist())
        self.block_calls += score.block_calls
        self.block_rows += score.block_rows
        self.catch_up_calls += score.catch_up_calls

    @property
    def mean_depth(self) -> float:
        return sum(depth * count for depth, count in self.depths.items()) / self.depths.total()

    @property
    def nats_per_token(self) -> float:
        """NaN where no token follows another."""
        return self.nats / self.predicted if self.predicted else math.nan

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        return self.nats / math.log(2) / text_bytes

    def to_dict(self, tokens: given_tokens.Tokens) -> dict[str, Any]:
        """The figures by name, with bits per byte where the tokens are a text."""
        text = tokens.text_bytes
        of_text = {} if text is None else {"text_bytes": text, "bits_per_byte": self.bits_per_byte(text)}
        return {
            "tokens": self.depths.total(),
            "predicted": self.predicted,
            "nats_per_token": self.nats_per_token,
            "perplexity": self.perplexity,
            **of_text,
            "mean_depth": self.mean_depth,
            "depth_histogram": {str(depth): self.depths[depth] for depth in sorted(self.depths)},
            "block_calls": self.block_calls,
            "block_rows": self.block_rows,
            "catch_up_calls": self.catch_up_calls,
        }


def _score(
    args: argparse.Namespace, bundle: Bundle, tokens: given_tokens.Tokens, console: Console
) -> tuple[_Figures, list[Score], ModelStats | None]:
    """The figures of all rows, and their scores and stats where they are to be written."""
    figures, scores, (rows, positions) = _Figures(), [], tokens.ids.shape
    row_bytes = 4 * positions * bundle.manifest.model.vocab_size
    # Of rows that run together nobody could tell which is seen at a loop step.
    together = 1 if _watched(args) else max(1, min(MAX_TOGETHER, _MOST_LOGITS_BYTES // row_bytes))
    with _scorer(args, bundle) as (score_of, stats):
        for start in range(0, rows, together):
            some = slice(start, start + together)

            def tell(fraction: float, done: int = start, share: int = len(tokens.ids[some])) -> None:
                console.progress("scoring", (done + share * fraction) / rows)

            score = score_of(tokens.ids[some], tell)
            figures.add(tokens.ids[some], tokens.seen[some], score)
            if stats is not None:
                stats.add(start, tokens.ids[start], int(tokens.seen[start]), score.depth[0])
            if args.output is not None:
                scores.append(score)
    return figures, scores, stats


def _watched(args: argparse.Namespace) -> bool:
    """Whether the loop steps are to be looked at."""
    return args.stats is not None or args.report is not None


@contextmanager
def _scorer(args: argparse.Namespace, bundle: Bundle) -> Iterator[tuple[Scorer, ModelStats | None]]:
    """How the target that was asked for scores rows of ids, which is told how much of them is done, and the stats
    that look on where they are wanted."""
    depth = options.depth_of(args)
    spec = None if args.target is None else bundle.target(args.target)
    if spec is not None and spec.has_loop_inside:
        if args.prefill is not None:
            raise UsageError("--prefill is for a cache, and this target has none: leave it out")
        if _watched(args):
            raise UsageError(
                "--stats and --report look at every loop step, which this target has inside: choose another"
            )
        if args.cache is not None:
            raise UsageError("--cache is the form of a cache, and this target has none: leave it out")
        with LoopEngine(bundle, args.target, trust=args.trust) as engine:
            yield lambda ids, _: engine.score(ids, **depth), None
        return
    with Session.of(bundle, **options.target_of(args)) as session:
        stats = ModelStats(session) if _watched(args) else None
        yield lambda ids, tell: session.score(ids, prefill=args.prefill, progress=tell, **depth), stats


def _tell(
    args: argparse.Namespace,
    tokens: given_tokens.Tokens,
    figures: _Figures,
    stats: ModelStats | None,
    console: Console,
) -> None:
    rows, positions = tokens.ids.shape
    console.say(
        f"tokens      {figures.depths.total()} in {rows} x {positions} positions, {figures.predicted} predicted"
    )
    if figures.predicted:
        console.say(f"perplexity  {figures.perplexity:.4g} ({figures.nats_per_token:.4g} nats a token)")
    if tokens.text_bytes is not None:
        console.say(f"bits/byte   {figures.bits_per_byte(tokens.text_bytes):.4g} over {tokens.text_bytes} bytes")
    console.say(f"depth       mean {figures.mean_depth:.2f} loop steps, {figures.block_calls} block calls")
    most = max(figures.depths.values())
    for depth in range(min(figures.depths), max(figures.depths) + 1):
        count = figures.depths[depth]
        bar = "#" * math.ceil(_BAR * count / most)
        console.say(f"{depth:11} {count / figures.depths.total():6.1%} {bar}".rstrip())
    if stats is not None:
        stats.tell(console)
    for path in (args.output, args.stats, args.report):
        if path is not None:
            console.say(f"written     {path}")
