"""The families of published looped models, from folder to tokens: every way to run a bundle against its golden folder.

The standard: within 3x of the reference's own float32 error against float64, and equal depths.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import Ran, refused
from conftest import FIXTURES
from golden_runs import Run, chunked, model_onnx, model_with_past, runtime_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from looped_llamas import changed, golden_of, weights_of
from text_oracle import byte_level

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.model.manifest import ChatTemplate, EndToken
from mythos_edge.runtime import parity
from mythos_edge.runtime.backends.ort_session import ort_session
from mythos_edge.runtime.halting import Depth
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.staircase import Fed, Staircase

NAMES = ("ouro-small", "nanbeige-small", "dory-small")
THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 1.0)


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def session(family: str, exported: Callable[..., Path]) -> Iterator[Session]:
    with Session.open(exported(FIXTURES / family)) as opened:
        yield opened


def runs_of(session: Session, golden: dict[str, np.ndarray], threshold: float | None) -> dict[str, Run]:
    """The golden tokens through every graph and every schedule."""
    ids, prefill, loops = golden["ids"], int(golden["prefill"]), int(golden["n_loops"])
    options = {} if threshold is None else {"threshold": threshold}
    chunks = [prefill, 1, 1, ids.shape[1] - prefill - 2]
    least = session.model.threshold if threshold is None else threshold
    runs = {
        "model.onnx": model_onnx(session.bundle.path, ids, loops, least),
        "model_with_past.onnx": model_with_past(session, ids, chunks, least),
    }
    runs |= dict(runtime_runs(session, ids, loops, [0, 1, 7, prefill, ids.shape[1]], **options))
    return runs | {f"chunks of {size}": chunked(session, ids, loops, size, **options) for size in (1, 7, ids.shape[1])}


def test_the_golden_folder_through_every_graph_and_schedule(session: Session, family: str) -> None:
    golden = golden_of(family)
    for name, (logits, depth) in runs_of(session, golden, None).items():
        assert np.abs(logits - golden["logits"]).max() <= parity.NOISE_FACTOR * golden["fp32_error"], name
        assert (depth == golden["n_loops"]).all(), name


@pytest.fixture(scope="module")
def ouro(exported: Callable[..., Path]) -> Iterator[Session]:
    with Session.open(exported(FIXTURES / "ouro-small")) as opened:
        yield opened


@pytest.mark.parametrize("index", range(len(THRESHOLDS)))
def test_depths_of_ouro_at_every_threshold(ouro: Session, index: int) -> None:
    golden = golden_of("ouro-small")
    assert golden["thresholds"][index] == THRESHOLDS[index]
    for name, (logits, depth) in runs_of(ouro, golden, THRESHOLDS[index]).items():
        assert (depth == golden["depth"][index]).all(), name
        assert np.abs(logits - golden["logits_at"][index]).max() <= parity.NOISE_FACTOR * golden["fp32_error"], name


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_block_calls_are_the_sum_of_depths(ouro: Session, threshold: float) -> None:
    """The work follows the depth: a token costs its own loop steps, and those before it none again."""
    ids = golden_of("ouro-small")["ids"][:1]
    score = ouro.score(ids, prefill=1, threshold=threshold)
    assert score.block_calls == score.depth.sum()
    full = ouro.score(ids, prefill=1, threshold=threshold, policy="full")
    assert full.block_calls == ids.size * ouro.model.max_depth


PROMPTS = [[5, 9, 2], [7], [11, 3, 200, 41, 8, 17, 33, 2, 9], [250, 1, 4, 4]]


def test_a_batch_of_unequal_prompts_is_each_alone(session: Session) -> None:
    options: dict[str, float] = {"threshold": 0.5} if session.model.halts else {}
    together = session.generate(PROMPTS, max_new_tokens=7, **options)
    for prompt, made in zip(PROMPTS, together, strict=True):
        alone = session.generate(prompt, max_new_tokens=7, **options)
        assert (made.ids, made.depths) == (alone.ids, alone.depths)
        np.testing.assert_allclose(made.logprobs, alone.logprobs, atol=1e-4)


@pytest.mark.parametrize("draft_depth", [1, 2])
def test_drafts_change_nothing(session: Session, draft_depth: int) -> None:
    """At the full depth of Nanbeige a draft of two loop steps is none."""
    if draft_depth == session.model.max_depth:
        draft_depth = 1
    plain = session.generate(PROMPTS[2], max_new_tokens=12)
    drafted = session.generate(PROMPTS[2], max_new_tokens=12, draft_depth=draft_depth, draft_tokens=3)
    assert (drafted.ids, drafted.depths) == (plain.ids, plain.depths)
    assert drafted.drafted > 0


def test_depth_is_a_request_s_to_choose(session: Session, family: str) -> None:
    ids, golden = golden_of(family)["ids"], golden_of(family)
    shallow = session.score(ids, prefill=7, max_depth=1)
    assert (shallow.depth == 1).all()
    assert np.abs(shallow.logits - golden["logits"]).max() > 0.1
    if not session.model.halts:
        with pytest.raises(UsageError, match=r"threshold is 0\.5, but no position of this model halts by itself"):
            session.score(ids, threshold=0.5)


def test_the_verbs(family: str, exported: Callable[..., Path], tmp_path: Path, run: Callable[..., Ran]) -> None:
    golden, bundle = golden_of(family), tmp_path / "made.bundle"
    assert run("export", FIXTURES / family, "-o", bundle).code == 0
    inspected = run("inspect", bundle, "--json").json
    assert inspected["family"] == family.removesuffix("-small")
    assert f"family     {inspected['family']}" in run("inspect", bundle).out
    np.save(tmp_path / "ids.npy", golden["ids"])
    for options in ((), ("--policy", "full"), ("--prefill", 7), ("--max-depth", 1)):
        argv = ("score", bundle, "--ids", tmp_path / "ids.npy", "-o", tmp_path / "out.npz", *options)
        assert run(*argv).code == 0
        with np.load(tmp_path / "out.npz") as made:
            if "--max-depth" in options:
                assert (made["depth"] == 1).all()
            else:
                assert np.abs(made["logits"] - golden["logits"]).max() <= parity.NOISE_FACTOR * golden["fp32_error"]
    made = run("generate", bundle, "--ids", "5,9,2", "--max-new-tokens", 6, "--json").json
    assert len(made["ids"]) == 6


def test_graphs_of_standard_ops_alone(family: str, exported: Callable[..., Path]) -> None:
    bundle, golden = exported(FIXTURES / family, portable=True), golden_of(family)
    feeds = {"input_ids": golden["ids"], "max_depth": golden["n_loops"], "threshold": np.array(1, np.float32)}
    logits, depth = ort_session(bundle / "model.portable.onnx").run(None, feeds)
    assert np.abs(logits - golden["logits"]).max() <= parity.NOISE_FACTOR * golden["fp32_error"]
    assert (depth == golden["n_loops"]).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_validate_compares_with_the_folder(
    family: str, dtype: str, exported: Callable[..., Path], run: Callable[..., Ran]
) -> None:
    bundle = exported(FIXTURES / family, dtype=dtype)
    ran = run("validate", bundle, "--against", FIXTURES / family, "--json")
    assert ran.json["passed"], ran.json
    # Ouro's own threshold tells nothing of its gate.
    assert ("exact at 0.5, prefill 7" in ran.json["routes"]) == (family == "ouro-small")
    assert "router" not in run("validate", bundle, "--against", FIXTURES / family).out


def test_validate_sees_another_gate(exported: Callable[..., Path], tmp_path: Path, run: Callable[..., Ran]) -> None:
    other = {"model.early_exit_gate.bias": weights_of("ouro-small")["model.early_exit_gate.bias"] + 0.5}
    folder = changed(tmp_path / "other", "ouro-small", tensors=other)
    ran = run("validate", exported(FIXTURES / "ouro-small"), "--against", folder, "--json")
    assert ran.code == 1
    assert ran.json["routes"]["exact, prefill all"]["depth_agreement"] == 1
    assert ran.json["routes"]["exact at 0.5, prefill all"]["depth_agreement"] < 1


def test_a_deeper_model_is_lowered_by_a_given_config(tmp_path: Path, run: Callable[..., Ran]) -> None:
    folder = changed(tmp_path / "deep", "ouro-small", {"total_ut_steps": 6})
    refused(run("export", folder, "-o", tmp_path / "b"), "total_ut_steps is 6, expected at most 4", "--config")
    (tmp_path / "lower.json").write_text('{"total_ut_steps": 3}')
    assert run("export", folder, "-o", tmp_path / "b", "--config", tmp_path / "lower.json").code == 0
    with Session.open(tmp_path / "b") as session:
        assert session.model.max_depth == 3


def test_the_tokens_of_ouro_come_right_from_its_folder(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """Its configs say that <|endoftext|> ends a text, which pads; with it no answer of a chat would end."""
    folder, names = changed(tmp_path / "ouro", "ouro-small"), ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    byte_level(list(names), names).save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}')
    template = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    tokenizer = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    ran = run("export", folder, "-o", tmp_path / "b", "--tokenizer", folder)
    assert "<|im_end|> (id 2) is taken" in ran.err
    manifest = open_bundle(tmp_path / "b").manifest
    assert manifest.end_tokens == (EndToken(2, "<|im_end|>"),)
    assert manifest.chat_template == ChatTemplate("chat_template.jinja", "<|im_start|>", "<|im_end|>")
    with Session.open(tmp_path / "b") as session:
        assert len(session.generate("hello", max_new_tokens=4).ids) <= 4


tokens = st.lists(st.integers(0, 255), min_size=1, max_size=6)
schedules = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), tokens),
        st.tuples(st.just("rollback"), st.floats(0, 1)),
        st.tuples(st.just("flush"), st.none()),
        st.tuples(st.just("save and restore"), st.none()),
    ),
    max_size=8,
)


def staircase_of(session: Session, policy: str, threshold: float, max_lag: int | None = None) -> Staircase:
    given = None if not session.model.halts else threshold
    depth = Depth(policy, threshold=given).resolve(session.model)
    return Staircase(session.backend, session.model, depth, session.max_context, max_lag)


def fed(stairs: Staircase, ids: list[int]) -> Fed:
    return stairs.feed(np.array([ids]), np.arange(len(ids)))


@settings(max_examples=60, deadline=None)
@given(start=tokens, actions=schedules, threshold=st.sampled_from(THRESHOLDS), max_lag=st.sampled_from([None, 1, 3]))
def test_exact_equals_full_after_any_schedule(
    session: Session, start: list[int], actions: list[tuple[str, object]], threshold: float, max_lag: int | None
) -> None:
    stairs, ids = staircase_of(session, "exact", threshold, max_lag), list(start)
    fed(stairs, ids)
    for action, value in actions:
        if isinstance(value, list):
            made = fed(stairs, value)
            ids += value
            wanted = fed(staircase_of(session, "full", threshold), ids)
            assert made.depth[0].tolist() == wanted.depth[0, -len(value) :].tolist()
            np.testing.assert_allclose(made.logits, wanted.logits[:, -len(value) :], atol=2e-4)
        elif action == "rollback":
            keep = int(float(str(value)) * len(ids))
            stairs.rollback(keep)
            del ids[keep:]
        elif action == "flush":
            stairs.flush()
            assert stairs.lengths == [len(ids)] * session.model.max_depth
        else:
            saved = stairs.state()
            stairs = staircase_of(session, "exact", threshold, max_lag)
            stairs.restore(saved)
        assert stairs.columns == len(ids)
        assert stairs.lengths == sorted(stairs.lengths, reverse=True)
