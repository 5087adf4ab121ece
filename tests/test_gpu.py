"""On a GPU: every kernel against the float64 oracle, and engines of the demo model against the same bundle on the CPU.

Each test is skipped with its reason where there is no driver, GPU or package. ``scripts/gpu_check`` runs them all.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import build_engines
from conftest import SMALL

from mythos_edge.exporter.targets.gpus import THIS_GPU
from mythos_edge.exporter.targets.tensorrt import DTYPES, LAYOUTS, WEIGHTS
from mythos_edge.model.errors import BackendUnavailable
from mythos_edge.model.families.openmythos.config import MythosConfig
from mythos_edge.plugins import trt_bindings
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.plugins.kernels import variants
from mythos_edge.plugins.launches import program
from mythos_edge.runtime.backends.tensorrt import TrtBackend
from mythos_edge.runtime.decoding import Generation
from mythos_edge.runtime.loop_engine import LoopEngine
from mythos_edge.runtime.scoring import Score
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import addition
from mythos_edge.scripts.lab import gpu_bench
from mythos_edge.scripts.lab.gpu_bench import MeasuredGpu
from mythos_edge.scripts.lab.kernel_cases import NUMPY, TOLERANCES, Case, attention, experts, relative_error

FLOATS, CODES = ("fp16", "bf16", "fp32"), ("int8", "int4", "fp8")
# One row is decoding, three a short chunk, 64 fill tiles of experts.
ROWS = (1, 3, 64)
# Room and how much of it is filled: nothing, less than a tile, and enough to be split.
CONTEXTS = ((40, 0), (40, 40), (900, 700))
# Sizes that no alignment divides.
ODD = dataclasses.replace(SMALL, dim=101, expert_dim=53)
# Latent ranks and rotary dims for every width of tile, aligned and not.
RANKS = ((32, 8), (200, 64), (384, 32), (1000, 64), (20, 6), (300, 70))
# The first compute capability with a type.
LEAST = {"bf16": 80, "int4": 86, "fp8": 89}


@pytest.fixture(scope="module")
def driver() -> Driver:
    try:
        found = Driver.load()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    if not found.device_count():
        pytest.skip("the driver sees no GPU")
    return found


@pytest.fixture(scope="module")
def lost() -> list[str]:
    """Why the GPU is of no use to this process any more, once it is."""
    return []


@pytest.fixture
def gpu(driver: Driver, lost: list[str]) -> Iterator[MeasuredGpu]:
    if lost:
        pytest.skip(f"an earlier test made the GPU useless: {lost[0]}")
    with MeasuredGpu(driver) as opened:
        yield opened
        if not opened.still_works():
            lost.append(str(opened.lost))


def require(capability: int, *kinds: str) -> None:
    """Skips where the GPU has no such type."""
    for kind in kinds:
        if capability < LEAST.get(kind, 0):
            pytest.skip(f"sm{capability} has no {kind}, which begins with sm{LEAST[kind]}")


# Kernels.


def expert_cases(dtype: str, codes: str) -> Iterator[Case]:
    models: dict[str, MythosConfig] = {"small": SMALL} if codes else {"small": SMALL, "odd": ODD}
    for name, config in models.items():
        for rows in ROWS:
            yield experts(name, config, rows, dtype, codes)


def attention_cases(dtype: str) -> Iterator[Case]:
    for rank, rope in RANKS:
        if dtype == "fp32" and rank > max(variants.RANKS["fp32"]):
            continue
        config = dataclasses.replace(SMALL, kv_lora_rank=rank, qk_rope_head_dim=rope)
        for rows in ROWS:
            for context, filled in CONTEXTS:
                yield attention(f"rank {rank}", config, rows, dtype, context, filled)


def output_so_far(dtype: str) -> Case:
    """What the runtime reads between two loop steps: the output over the halting mass, where a row is running."""
    random = np.random.default_rng(0)
    rows, dim = 5, 300
    inputs = {
        "out": random.standard_normal((rows, dim)).astype(NUMPY[dtype]),
        "halt_mass": np.array([0.0, 0.3, 0.9, 0.99, 1.2], np.float32),
        "threshold": np.array(0.95, np.float32),
    }
    mass = np.array([1.0, 0.3, 0.9, 1.0, 1.0], np.float32)[:, None]
    return Case(
        label=f"output so far {dtype}",
        op="OutputSoFar",
        output="so_far",
        dtype=dtype,
        inputs=inputs,
        dtypes={"out": dtype, "halt_mass": "fp32", "threshold": "fp32"},
        attributes={},
        output_shape=(rows, dim),
        bytes_moved=0,
        wanted=lambda: inputs["out"].astype(np.float64) / mass,
    )


def running_columns(mass: list[float]) -> Case:
    """One more than the last row that is running; an int32, which travels in the bits of a float32."""
    inputs = {"halt_mass": np.array(mass, np.float32), "threshold": np.array(0.95, np.float32)}
    count = 1 + max((index for index, value in enumerate(mass) if value < 0.95), default=-1)
    return Case(
        label=f"running columns of {len(mass)}",
        op="RunningColumns",
        output="count",
        dtype="fp32",
        inputs=inputs,
        dtypes=dict.fromkeys(inputs, "fp32"),
        attributes={},
        output_shape=(1,),
        bytes_moved=0,
        wanted=lambda: np.array([count], np.int32),
    )


RUNNING = ([1.0, 0.2, 1.0], [1.0, 1.0], [0.0], [0.5] * 2000 + [1.0] * 100)


def test_every_kernel_is_in_a_case() -> None:
    """By names, on any machine."""
    made = [case for dtype in FLOATS for codes in ("", *CODES) for case in expert_cases(dtype, codes)]
    made += [case for dtype in FLOATS for case in (*attention_cases(dtype), output_so_far(dtype))]
    made += map(running_columns, RUNNING)
    launches = [
        launch for case in made for launch in program(case.op, case.shapes, case.dtypes, case.attributes).launches
    ]
    assert {launch.kernel for launch in launches} == set(variants.VARIANTS)


def assert_right(gpu: MeasuredGpu, made: Iterator[Case]) -> None:
    wrong = [row for row in (gpu_bench.check(gpu, case) for case in made) if not row["ok"]]
    assert not wrong


@pytest.mark.gpu
@pytest.mark.parametrize("codes", ["", *CODES])
@pytest.mark.parametrize("dtype", FLOATS)
def test_experts_on_the_gpu(dtype: str, codes: str, gpu: MeasuredGpu) -> None:
    require(gpu.capability, dtype)
    assert_right(gpu, expert_cases(dtype, codes))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_on_the_gpu(dtype: str, gpu: MeasuredGpu) -> None:
    require(gpu.capability, dtype)
    assert_right(gpu, attention_cases(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_output_so_far_on_the_gpu(dtype: str, gpu: MeasuredGpu) -> None:
    require(gpu.capability, dtype)
    assert_right(gpu, iter([output_so_far(dtype)]))


@pytest.mark.gpu
@pytest.mark.parametrize("mass", RUNNING, ids=len)
def test_running_columns_on_the_gpu(mass: list[float], gpu: MeasuredGpu) -> None:
    case = running_columns(mass)
    with gpu.prepared(case) as prepared:
        prepared.run()
        assert prepared.output().view(np.int32).tolist() == case.wanted().tolist()


@pytest.mark.gpu
def test_a_graph_of_a_kernel_gives_what_the_kernel_does(gpu: MeasuredGpu) -> None:
    case = experts("small", SMALL, 1, "fp16", "")
    with gpu.prepared(case) as prepared:
        prepared.run()
        gpu.driver.synchronize(gpu.stream)
        gpu.driver.begin_capture(gpu.stream)
        prepared.run()
        graph = gpu.driver.end_capture(gpu.stream)
        for _ in range(3):
            gpu.driver.launch_graph(graph, gpu.stream)
        assert relative_error(prepared.output(), case.wanted()) <= TOLERANCES["fp16"]
        gpu.driver.destroy_graph(graph)


# Engines of the demo model. Its top token leads by 5.6 in logits at least, and 8- and 4-bit weights change none on
# the CPU: what is left for the GPU to differ in is halting close to the threshold, and what follows from it.
@dataclass(frozen=True)
class Limits:
    """Least shares of positions with the same top token, and with the same depth."""

    top1: float
    depth: float


# Products of float32 may be rounded to TF32 on the way, which can tip a halting mass at the threshold, and no token.
EXACT = Limits(top1=1.0, depth=0.98)
# 8 bits of a bfloat16 leave 0.4 % of a halting mass open.
ROUNDED = Limits(top1=0.95, depth=0.9)
STREAMS = addition.random_streams(np.random.default_rng(0), 4, 22)
PROMPT = STREAMS[0].tolist()
NEW_TOKENS = 16
# Prompt and new tokens fit; smaller engines build faster.
MAX_CONTEXT = 64


@dataclass(frozen=True)
class Host:
    """What the bundle says on the CPU in float32."""

    score: Score
    generation: Generation


@pytest.fixture(scope="module")
def host(demo_bundle: Path) -> Host:
    with Session.open(demo_bundle) as session:
        return Host(session.score(STREAMS), session.generate(PROMPT, max_new_tokens=NEW_TOKENS))


@pytest.fixture(params=["rtx", "trt"])
def wish(request: pytest.FixtureRequest, gpu: MeasuredGpu) -> str:
    """The target to ask for with either TensorRT."""
    flavour = str(request.param)
    try:
        trt = trt_bindings.load(flavour)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    if flavour == "trt":
        return THIS_GPU
    if gpu.capability not in trt_bindings.known_compute_capabilities(trt):
        pytest.skip(f"TensorRT for RTX does not serve sm{gpu.capability}")
    return f"rtx-sm{gpu.capability}"


def limits_of(dtype: str, weights: str) -> Limits:
    return EXACT if (dtype, weights) == ("fp32", "none") else ROUNDED


def assert_agrees(score: Score, host: Host, limits: Limits) -> None:
    same = score.logits.argmax(-1) == host.score.logits.argmax(-1)
    assert np.isfinite(score.logits).all()
    assert same.mean() >= limits.top1
    assert (score.depth == host.score.depth).mean() >= limits.depth


def assert_session_agrees(session: Session, host: Host, limits: Limits) -> None:
    """Scores and tokens are the host's; every policy and speculation give what plain greedy decoding does."""
    assert isinstance(session.backend, TrtBackend)
    score, full = session.score(STREAMS), session.score(STREAMS, policy="full")
    assert_agrees(score, host, limits)
    assert_agrees(full, host, limits)
    # The same engine in other chunks: its tactics may differ, and with them the last bits.
    assert (score.logits.argmax(-1) == full.logits.argmax(-1)).all()
    assert (score.depth == full.depth).mean() >= limits.depth
    assert_agrees(session.score(STREAMS, prefill=3), host, limits)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS}
    plain = session.generate(PROMPT, **options)
    pairs = list(zip(plain.ids, host.generation.ids, strict=True))
    assert sum(a == b for a, b in pairs) >= limits.top1 * len(pairs)
    assert session.generate(PROMPT, policy="full", **options).ids == plain.ids
    drafted = session.generate(PROMPT, draft_depth=1, draft_tokens=3, **options)
    assert drafted.ids == plain.ids
    assert drafted.drafted > 0
    assert session.backend.uses_graphs


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_on_the_gpu(
    layout: str,
    dtype: str,
    weights: str,
    wish: str,
    gpu: MeasuredGpu,
    demo_bundle: Path,
    host: Host,
    tmp_path: Path,
) -> None:
    require(gpu.capability, dtype, weights)
    path = Path(shutil.copytree(demo_bundle, tmp_path / "demo.bundle"))
    options = {"dtype": dtype, "weights": weights, "layout": layout}
    built = build_engines(path, wish, max_context=MAX_CONTEXT, **options)
    limits = limits_of(dtype, weights)
    if layout == "step":
        with Session.open(path, target=built.name) as session:
            assert_session_agrees(session, host, limits)
    else:
        with LoopEngine.open(path, built.name) as engine:
            assert_agrees(engine.score(STREAMS), host, limits)
            # Not deeper than it is told.
            assert engine.score(STREAMS, max_depth=2).depth.max() <= 2
