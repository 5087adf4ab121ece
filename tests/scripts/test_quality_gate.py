"""``validate --against fp32``: a rounded target is measured, the gate decides, and mistakes are one line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Ran, refused

from mythos_edge.exporter.probes import Probe, router_of
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.families.table import config_of
from mythos_edge.runtime.backends.ort_cpu import OrtCpuBackend
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import addition
from mythos_edge.scripts.quality_gate import GATES, _Traced


def test_a_rounded_target_passes_the_gate_of_its_weights(rounded_bundle: Path, run: Callable[..., Ran]) -> None:
    ran = run(
        "validate", rounded_bundle, "--against", "fp32", "--target", "ort-cpu-int4", "--demo-streams", 20, "--json"
    )
    assert ran.code == 0
    report = ran.json
    assert report["passed"] is True
    assert (report["target"], report["gate"]) == ("ort-cpu-int4", vars(GATES["int4"]))
    assert report["weights"] == open_bundle(rounded_bundle).target("ort-cpu-int4").weights
    quality = report["quality"]
    assert quality["positions"] == 20 * 14
    assert 0 < quality["kl_mean"] <= quality["kl_p99"] <= quality["kl_max"] < 0.01
    assert quality["top1_agreement"] > 0.99
    assert len(quality["loop_steps"]) == config_of(open_bundle(rounded_bundle).manifest).max_loop_iters
    for step in quality["loop_steps"]:
        assert 0.005 < step["h_error_mean"] <= step["h_error_p99"] < 0.6
        assert 0.8 < step["common_experts"] <= 1.0
    assert report["exact_sums"]["ort-cpu"] == 1.0
    assert report["exact_sums"]["ort-cpu-int4"] > 0.8


def test_any_two_targets_are_compared(rounded_bundle: Path, run: Callable[..., Ran]) -> None:
    options = ("--demo-streams", 4, "--json")
    forth = run("validate", rounded_bundle, "--against", "ort-cpu", "--target", "ort-cpu-int4", *options).json
    named = run("validate", rounded_bundle, "--against", "fp32", "--target", "ort-cpu-int4", *options).json
    assert forth["quality"] == named["quality"]
    back = run("validate", rounded_bundle, "--against", "ort-cpu-int4", *options).json
    assert (back["target"], back["against"], back["gate"]) == ("ort-cpu", "ort-cpu-int4", vars(GATES["int4"]))
    assert back["quality"]["kl_mean"] != forth["quality"]["kl_mean"]
    steps = zip(back["quality"]["loop_steps"], forth["quality"]["loop_steps"], strict=True)
    assert all(one["common_experts"] == other["common_experts"] for one, other in steps)


def test_a_gate_that_is_too_strict_is_exit_code_1(
    rounded_bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    np.save(tmp_path / "ids.npy", np.arange(20).reshape(2, 10))
    argv = (rounded_bundle, "--against", "fp32", "--target", "ort-cpu-int4", "--ids", tmp_path / "ids.npy")
    ran = run("validate", *argv, "--max-kl", 1e-12, "--min-top1", 0, "--json")
    report = ran.json
    assert (ran.code, report["passed"]) == (1, False)
    assert (report["gate"]["max_kl"], report["gate"]["min_top1"]) == (1e-12, 0.0)
    assert "kl" in report["failures"]
    assert report["quality"]["positions"] == 20
    assert report["exact_sums"] is None
    ran = run("validate", *argv, "--max-kl", 1e-12)
    assert ran.code == 1
    shown = ran.out
    assert "FAILED" in shown
    assert "allowed mean 1e-12" in shown
    assert "| loop step |" in shown


def test_a_trace_is_what_the_bundle_computes(demo_bundle: Path) -> None:
    """The states written down, fed to the portable graph by hand, give the next ones and the same experts."""
    bundle = open_bundle(demo_bundle)
    ids = np.array([addition.stream_of(98765, 1299)])
    with OrtCpuBackend(bundle, "ort-cpu") as backend:
        trace = _Traced(bundle, "ort-cpu", backend).trace(ids)
        score = Session(bundle, backend).score(ids, policy="full")
    np.testing.assert_array_equal(trace.logits, score.logits[0])
    np.testing.assert_array_equal(trace.depth, score.depth[0])
    config = config_of(bundle.manifest)
    router = router_of(bundle)
    assert router is not None
    probe = Probe(bundle, "step.onnx", [router.name], kept=["h_next"])
    prelude = Probe(bundle, "prelude.onnx", [], kept=["e"])
    window = {"length": np.array(0), "first": np.zeros(1, np.int64)}
    empty = np.zeros((1, 0, config.cache_width), np.float32)
    e = prelude.run({"input_ids": ids, "past_0": empty, **window})["e"]
    h, flat = e, np.zeros(ids.shape, np.float32)
    for index in range(config.max_loop_iters):
        made = probe.run(
            {
                "h": h, "e": e, "out": np.zeros_like(e), "halt_mass": flat, "depth": np.zeros(ids.shape, np.int64),
                "step_index": np.full(ids.shape, index), "threshold": np.array(0.9, np.float32),
                "min_depth": np.array(1), "past_0": empty, **window,
            }
        )  # fmt: skip
        h = made["h_next"]
        np.testing.assert_allclose(trace.h[index], h[0], rtol=1e-3, atol=1e-4)
        chosen = router.chosen(made[router.name])
        np.testing.assert_array_equal(np.sort(trace.chosen[index]), np.sort(chosen))


def test_what_is_written_down_does_not_depend_on_chunks(demo_bundle: Path) -> None:
    bundle = open_bundle(demo_bundle)
    ids = np.array([addition.stream_of(98765, 1299)])
    with OrtCpuBackend(bundle, "ort-cpu") as backend:
        whole = _Traced(bundle, "ort-cpu", backend).trace(ids)
        in_chunks = _Traced(bundle, "ort-cpu", backend).trace(ids, prefill=2)
    np.testing.assert_allclose(in_chunks.h, whole.h, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(np.sort(in_chunks.chosen), np.sort(whole.chosen))
    np.testing.assert_array_equal(in_chunks.tied, whole.tied)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--against", "fp32"), "name it with --target"),
        (("--against", "fp32", "--target", "ort-cpu"), "name it with --target"),
        (("--against", "fp32", "--target", "ort-tpu"), "no target 'ort-tpu', only ort-cpu"),
        (("--against", "ort-cpu"), "name it with --target"),
        (("--target", "ort-cpu-int4"), "--target is for quality: add --against fp32"),
        (("--max-kl", "0.1"), "--max-kl is for quality"),
        (("--against", "fp32", "--target", "x", "--ids", "a.npy", "--demo-streams"), "give one of them"),
        (("--against", "fp32", "--target", "x", "--demo-streams", "0"), "--demo-streams is 0, expected at least 1"),
        (("--against", "fp32", "--target", "x", "--max-kl", "nan"), "--max-kl is nan, expected 0 or more nats"),
        (("--against", "fp32", "--target", "x", "--max-kl=-1"), "--max-kl is -1.0, expected 0 or more nats"),
        (("--against", "fp32", "--target", "x", "--max-kl", "inf"), "--max-kl is inf, expected 0 or more nats"),
        (
            ("--against", "fp32", "--target", "x", "--min-top1", "nan"),
            "--min-top1 is nan, expected a share from 0 to 1",
        ),
        (
            ("--against", "fp32", "--target", "x", "--min-top1", "1.5"),
            "--min-top1 is 1.5, expected a share from 0 to 1",
        ),
        (("--seed=-1",), "--seed is -1, expected 0 to 4294967295"),
        (("--seed", str(1 << 70)), "--seed is 1180591620717411303424, expected 0 to 4294967295"),
    ],
)
def test_mistakes_are_one_line(demo_bundle: Path, argv: tuple[str, ...], words: str, run: Callable[..., Ran]) -> None:
    refused(run("validate", demo_bundle, *argv), words)


def test_demo_streams_need_the_demo_model(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    refused(
        run("validate", mla_bundle, "--against", "fp32", "--target", "x", "--demo-streams"),
        "--demo-streams is for the demo model of 110 tokens, this one has 331: give --ids",
    )


def test_random_streams_are_whole_additions(random: np.random.Generator) -> None:
    streams = addition.random_streams(random, 50, 12)
    assert streams.shape == (50, 14)
    for stream in streams.tolist():
        a = sum(number // 10 * 10**place for place, number in enumerate(stream[1:]))
        b = sum(number % 10 * 10**place for place, number in enumerate(stream[1:]))
        digits = addition.digits(np.array(stream))[1:]
        assert sum(int(digit) * 10**place for place, digit in enumerate(digits)) == a + b
        assert stream == [0, *addition.columns_of(a, b, 13)]
