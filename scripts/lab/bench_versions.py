"""Speed of two installed versions beside each other, taking turns, so that a change is seen not to cost any.

    before=../before/.venv/bin/mythos-edge
    python -m mythos_edge.scripts.lab.bench_versions --before $before scripts/assets/carry_adder.pt
    python -m mythos_edge.scripts.lab.bench_versions --before $before --shape d1024 -p 128 -n 32 --weights int8

Each version exports the checkpoint (or random weights of a shape of ``bench_peers``) itself, then both run
``mythos-edge bench`` on their own bundle in turn, the first in each round changing. Prints a table of medians over the
rounds with the ratio of the later to the earlier, then one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from mythos_edge.scripts import measuring

# Figures of ``bench`` that show what a version costs.
_FIGURES = ("ms_per_token", "prefill_tokens_per_s", "ttft_ms", "host_us_per_loop_step", "load_ms")
_CONTEXT = 1024


def main(argv: list[str] | None = None) -> int:
    """Measures both versions; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure two installed versions in turn.")
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--shape", metavar="NAME", help="random weights of this shape instead of a checkpoint: d1024")
    parser.add_argument("--before", type=Path, required=True, metavar="COMMAND", help="mythos-edge of the old version")
    after = Path(sys.executable).with_name("mythos-edge")
    parser.add_argument("--after", type=Path, default=after, metavar="COMMAND", help="default: the one installed here")
    parser.add_argument("--weights", metavar="FORM", help="build and measure the target with these weights: int8")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=64)
    parser.add_argument("-n", "--new-tokens", type=int, default=64)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.shape is None):
        parser.error("give a checkpoint, or --shape, and not both")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = args.checkpoint or random_checkpoint(args.shape, folder)
        commands = {"before": args.before, "after": args.after}
        for version, command in commands.items():
            run_command(command, "export", str(checkpoint), "-o", str(folder / version), "--max-context", str(_CONTEXT))
            if args.weights is not None:
                run_command(command, "build", str(folder / version), "--weights", args.weights)
        rounds: dict[str, list[dict[str, float]]] = {version: [] for version in commands}
        for index in range(args.rounds):
            for version in list(commands)[:: 1 if index % 2 else -1]:
                rounds[version].append(_figures(commands[version], folder / version, args))
    medians = {
        version: {figure: statistics.median(one[figure] for one in made) for figure in _FIGURES}
        for version, made in rounds.items()
    }
    print(f"| {args.shape or args.checkpoint.name}, {args.weights or 'fp32'} | before | after | after / before |")
    print("|---|---:|---:|---:|")
    for figure in _FIGURES:
        before, later = (medians[version][figure] for version in commands)
        print(f"| {figure} | {before:.4g} | {later:.4g} | {later / before:.3f} |")
    print(json.dumps({"machine": measuring.machine(), "medians": medians, "rounds": rounds}))
    return 0


def random_checkpoint(shape: str, folder: Path) -> Path:
    import torch

    from mythos_edge.scripts.lab.bench_peers import SHAPES, reference_model

    model = reference_model(replace(SHAPES[shape], max_seq_len=_CONTEXT), seed=0)
    torch.save({"model": model.state_dict(), "cfg": model.cfg}, folder / "model.pt")
    return folder / "model.pt"


def _figures(command: Path, bundle: Path, args: argparse.Namespace) -> dict[str, float]:
    """The medians that one run of ``bench`` gives."""
    options = ["-p", str(args.prompt_tokens), "-n", str(args.new_tokens), "-r", "3"]
    options += [] if args.weights is None else ["--target", f"ort-cpu-{args.weights}"]
    (target,) = json.loads(run_command(command, "bench", str(bundle), *options, "--json"))["targets"].values()
    return {name: found["median"] if isinstance(found := target[name], dict) else found for name in _FIGURES}


def run_command(command: Path, *arguments: str) -> str:
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command} {arguments[0]} ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
