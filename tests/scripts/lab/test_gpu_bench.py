"""Kernels checked and timed without a GPU: cases, what is counted, torch beside. On a fake driver they are Python."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import SMALL
from fakes.driver import BrokenDriver, FakeDriver
from fakes.kernels import fake_kernel

from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.model.families.openmythos.config import VARIANTS
from mythos_edge.plugins import kernel_store
from mythos_edge.plugins.launches import program
from mythos_edge.scripts.lab import gpu_bench, gpu_check, gpu_kernels, kernel_cases, torch_kernels
from mythos_edge.scripts.lab.gpu_bench import MeasuredGpu
from mythos_edge.scripts.lab.kernel_cases import GROUPS, NUMPY, Case


@pytest.fixture
def gpu() -> Iterator[MeasuredGpu]:
    driver = FakeDriver()
    with MeasuredGpu(driver, load_kernel=fake_kernel) as opened:
        yield opened
    assert driver.live_bytes == 0


def _answering(gpu: MeasuredGpu, case: Case, answer: np.ndarray) -> None:
    """Makes the last kernel of a case write ``answer``, whatever it is given."""
    last = program(case.op, case.shapes, case.dtypes, case.attributes).launches[-1]
    place = next(i for i, argument in enumerate(last.arguments) if getattr(argument, "name", "") == case.output)

    def write(driver: FakeDriver, grid: tuple[int, ...], *arguments: Any) -> None:
        made = answer.astype(NUMPY[case.dtype])
        driver.array(arguments[place], made.dtype, made.shape)[...] = made

    gpu.driver.kernels[fake_kernel(last.kernel, 89).entry] = write


@pytest.mark.parametrize("shape", ["1b", "3b"])
def test_every_kernel_is_there_for_every_case_of_the_real_shapes(shape: str) -> None:
    """By shapes alone: the weights of these cases are gigabytes."""
    config = VARIANTS[shape]
    made = [case for group in GROUPS for case in kernel_cases.cases_of(group, shape, SMALL, contexts=(128, 4096))]
    assert len(made) == 2 * (3 + 3 + 6)
    assert {case.op for case in made} == {"SparseMoE", "QuantizedSparseMoE", "LatentAttention"}
    assert {case.decode for case in made if "1 row" in case.label} == {True}
    for rows in (1, 64):
        x, router = (rows, config.dim), (config.n_experts, config.dim)
        stacks = {"fc1": (config.n_experts, 2 * config.expert_dim, config.dim)}
        stacks["fc2"] = (config.n_experts, config.dim, config.expert_dim)
        shapes = {"x": x, "router": router, "router_bias": (config.n_experts,), **stacks}
        made_program = program("SparseMoE", shapes, dict.fromkeys(shapes, "fp16"), {"top_k": config.n_experts_per_tok})
        for launch in made_program.launches:
            assert kernel_store.kernel(launch.kernel, 89).cubin


def test_bytes_moved_are_those_of_the_chosen_experts() -> None:
    one = kernel_cases.experts("small", SMALL, 1, "fp16", "")
    expert = 3 * SMALL.dim * SMALL.expert_dim * 2
    beside = (SMALL.n_experts * SMALL.dim + SMALL.n_experts + 2 * SMALL.dim) * 2
    assert one.bytes_moved == 2 * expert + beside
    packed = kernel_cases.experts("small", SMALL, 1, "fp16", "int4")
    scales = (2 * SMALL.expert_dim + SMALL.dim) * 2
    assert packed.bytes_moved == 2 * (expert // 4 + scales) + beside
    many = kernel_cases.experts("small", SMALL, 64, "fp16", "")
    assert many.notes["experts"] == SMALL.n_experts
    attention = kernel_cases.attention("small", SMALL, 1, "bf16", 128)
    assert attention.bytes_moved == (129 * 40 + 4 * 40 + 4 * 32) * 2 + 2 * 8


def test_int4_is_packed_as_onnx_has_it() -> None:
    assert kernel_cases.as_stored(np.array([[1, -1, 7, -7]], np.int8), "int4").tolist() == [0xF1, 0x97]


def test_rows_of_repeated_weights_differ() -> None:
    fc1 = kernel_cases.experts("small", SMALL, 1, "fp32", "").inputs["fc1"]
    assert len(np.unique(fc1.reshape(-1, SMALL.dim), axis=0)) == SMALL.n_experts * 2 * SMALL.expert_dim


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("kind", ["attention", "", "int8", "int4", "fp8"])
def test_right_answers_pass_and_wrong_ones_do_not(gpu: MeasuredGpu, dtype: str, kind: str) -> None:
    case = (
        kernel_cases.attention("small", SMALL, 3, dtype, 40)
        if kind == "attention"
        else kernel_cases.experts("small", SMALL, 3, dtype, kind)
    )
    wanted = case.wanted()
    assert 0.05 < np.abs(wanted).max() < 100, "of a size that every type can hold"
    _answering(gpu, case, wanted)
    row = gpu_bench.check(gpu, case)
    assert row["ok"], row
    _answering(gpu, case, wanted * 1.05)
    assert not gpu_bench.check(gpu, case)["ok"]
    _answering(gpu, case, np.full(wanted.shape, np.nan))
    assert gpu_bench.check(gpu, case)["error"] == float("inf")


def test_times_come_from_a_graph_of_runs_with_other_inputs(gpu: MeasuredGpu) -> None:
    case = kernel_cases.experts("small", SMALL, 1, "fp16", "int8")
    row = gpu_bench.measure(gpu, case, copy_bytes_per_s=1e9)
    assert row["us"] > 0
    assert row["share_of_copy"] == pytest.approx(case.bytes_moved / (row["us"] * 1e-6) / 1e9, rel=0.02)
    assert row["target"] == 0.7
    driver: Any = gpu.driver
    assert driver.calls.count("launch_graph") == 23
    router = fake_kernel(program(case.op, case.shapes, case.dtypes, case.attributes).launches[0].kernel, 89).entry
    inputs = {record.arguments[0] for record in driver.launches if record.entry == router}
    assert len(inputs) == case.turns[1] == 4
    assert "target" not in gpu_bench.measure(gpu, kernel_cases.experts("small", SMALL, 64, "fp16", ""), 1e9)


def test_copies_are_counted_as_read_and_written(gpu: MeasuredGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "_seconds_of_graph", lambda gpu, queue: 2.0)
    assert gpu_bench.copy_bandwidth(gpu, size=1000) == 4 * 2 * 1000 / 2.0


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("attention", [True, False])
def test_torch_computes_the_same(rows: int, attention: bool) -> None:
    case = (
        kernel_cases.attention("small", SMALL, rows, "fp32", 20)
        if attention
        else kernel_cases.experts("small", SMALL, rows, "fp32", "")
    )
    run = torch_kernels.runner(case, "cpu")
    assert run is not None
    assert kernel_cases.relative_error(run().numpy(), case.wanted()) < 1e-5
    assert torch_kernels.runner(kernel_cases.experts("small", SMALL, 1, "fp16", "int4"), "cpu") is None


def _torchless(case: Case) -> dict[str, Any]:
    return {}


def test_a_kernel_that_is_missing_fails_its_row_only(gpu: MeasuredGpu, small_copies: None) -> None:
    good = kernel_cases.experts("small", SMALL, 1, "fp16", "")
    bad = dataclasses.replace(good, label="bad", op="NoSuchOp")
    copy, *made = gpu_kernels.rows(gpu, [bad, good], _torchless)
    assert copy["gb_per_s"] > 0
    assert made[0]["why"].startswith("no kernels for NoSuchOp")
    # The good one is wrong as well, by kernels that do nothing, and timed all the same.
    assert not made[1]["ok"]
    assert made[1]["us"] > 0
    section = gpu_check.Section("kernels", rows=[copy, *made])
    gpu_check.judge_kernels(section)
    assert section.status == "failed"
    assert section.reason.startswith("2 wrong or without an answer, the first is bad: no kernels for NoSuchOp")


@pytest.mark.parametrize("good", [0, 1, 4, 20])
def test_after_an_illegal_address_the_rest_of_a_group_is_skipped(good: int, small_copies: None) -> None:
    case = kernel_cases.experts("small", SMALL, 1, "fp16", "")
    with MeasuredGpu(BrokenDriver(good), load_kernel=fake_kernel) as gpu:
        _, first, second = gpu_kernels.rows(gpu, [case, dataclasses.replace(case, label="second")], _torchless)
    assert first["why"] == "CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)"
    assert not first["ok"]
    assert second == {"case": "second", "skipped": f"an earlier case made the GPU useless: {first['why']}"}
    section = gpu_check.Section("kernels", rows=[first, second])
    gpu_check.judge_kernels(section)
    assert section.reason.startswith("1 wrong or without an answer; 1 skipped, the first is small experts")


def test_closing_does_not_hide_the_first_error() -> None:
    driver = BrokenDriver(0)

    def lose(gpu: MeasuredGpu) -> None:
        with gpu.memory(1):
            driver.broken = True
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), MeasuredGpu(driver, load_kernel=fake_kernel) as gpu:
        lose(gpu)
    driver = BrokenDriver(0)
    with (
        pytest.raises(MythosEdgeError, match="ILLEGAL_ADDRESS"),
        MeasuredGpu(driver, load_kernel=fake_kernel) as gpu,
    ):
        driver.broken = True


@pytest.mark.parametrize("works", [True, False])
def test_the_faster_way_of_torch_counts(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = kernel_cases.experts("small", SMALL, 1, "fp32", "")
    times = iter([2e-6, 1e-6])

    def compile_it(run: Any, **_: Any) -> Any:
        if not works:
            raise RuntimeError("no working Triton\nis installed")
        return run

    monkeypatch.setattr(torch_kernels.torch, "compile", compile_it)
    columns = torch_kernels.best_time(case, "cpu", timer=lambda run: next(times))
    if works:
        assert columns == {"torch_us": 1.0, "torch": "compiled", "eager_us": 2.0, "compiled_us": 1.0}
    else:
        why = "RuntimeError: no working Triton is installed"
        assert columns == {"torch_us": 2.0, "torch": "eager", "eager_us": 2.0, "compiled_us": why}
    assert torch_kernels.best_time(kernel_cases.experts("small", SMALL, 1, "fp16", "int8"), "cpu") == {}


def test_torch_without_a_gpu_is_named_in_the_row() -> None:
    case = kernel_cases.experts("small", SMALL, 1, "fp32", "")
    assert gpu_kernels.torch_comparison("best")(case) == {"torch": "torch has no GPU here"}
    assert gpu_kernels.torch_comparison("none")(case) == {}
