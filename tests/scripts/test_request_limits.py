"""Numbers that no machine can take, one line each, from every verb that takes a request; nothing is left behind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import CHECKPOINT, Ran, refused

REQUESTS = {
    "deep": (("--max-depth", "10000000"), "max_depth is 10000000, expected at most 4096 loop steps"),
    "least deep": (("--min-depth", "5000"), "min_depth is 5000, expected at most 4096 loop steps"),
    "never halting": (("--threshold", "inf"), "threshold is inf, expected a finite number above 0"),
    "deep draft": (
        ("--draft-depth", "100000000", "--draft-tokens", "2"),
        "draft_depth is 100000000, expected at most 4096 loop steps",
    ),
    "deep and drafting": (
        ("--draft-depth", "auto", "--max-depth", "1000000000"),
        "max_depth is 1000000000, expected at most 4096 loop steps",
    ),
}
SAMPLING = {
    "seed": (("--seed", "-1"), "seed is -1, expected 0 or more"),
    "penalty": (("--repetition-penalty", "1e-300"), "repetition_penalty is 1e-300, expected at least 1e-200"),
    "penalty nan": (("--repetition-penalty", "nan"), "repetition_penalty is nan, expected a finite number"),
}


@pytest.mark.parametrize("case", REQUESTS | SAMPLING)
def test_generate(case: str, mla_bundle: Path, run: Callable[..., Ran]) -> None:
    argv, message = (REQUESTS | SAMPLING)[case]
    refused(run("generate", mla_bundle, "--ids", "1,2", *argv), message)


@pytest.mark.parametrize("case", REQUESTS)
def test_bench(case: str, mla_bundle: Path, run: Callable[..., Ran]) -> None:
    argv, message = REQUESTS[case]
    refused(run("bench", mla_bundle, "-p", "2", "-n", "2", "-r", "1", *argv), message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("-d", "inf"), "--depth is inf, expected at most 6, the largest number of loop steps"),
        (("-d", "7"), "--depth is 7, expected at most 6, the largest number of loop steps"),
        (("-d", "3", "--max-depth", "2"), "--depth is 3, expected at most 2, the largest number of loop steps"),
        (("-b", "10000000000"), "the caches of 10000000000 x 4 tokens need "),
    ],
)
def test_bench_of_more_than_there_is(
    argv: tuple[str, ...], message: str, mla_bundle: Path, run: Callable[..., Ran]
) -> None:
    refused(run("bench", mla_bundle, "-p", "2", "-n", "2", "-r", "1", *argv), message)


@pytest.mark.parametrize("threads", ["-1", "100000", "1000000000"])
def test_threads_in_every_verb(threads: str, mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    np.save(tmp_path / "ids.npy", np.ones((1, 12), np.int64))
    made = tmp_path / "made"
    for command in (
        ("generate", mla_bundle, "--ids", "1,2"),
        ("score", mla_bundle, "--ids", tmp_path / "ids.npy", "-o", made),
        ("bench", mla_bundle, "-p", "2", "-n", "2", "-r", "1"),
        ("tune", mla_bundle, "--data", tmp_path / "ids.npy", "-o", made),
    ):
        refused(run(*command, f"--threads={threads}"), f"threads is {threads}, expected ")
    assert not made.exists()


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_the_seed_of_validate(seed: str, mla_bundle: Path, run: Callable[..., Ran]) -> None:
    message = f"--seed is {seed}, expected "
    refused(run("validate", mla_bundle, f"--seed={seed}"), message)
    refused(run("validate", mla_bundle, f"--seed={seed}", "--against", CHECKPOINT), message)
