"""Engines of others that read the graphs of a bundle, and a host that drives the stages in any of them."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from mythos_edge.model.families.openmythos.config import MythosConfig
from mythos_edge.model.stages import HALVES

Arrays = dict[str, np.ndarray]
# Runs the graph in a file of the bundle; feeds that the graph does not ask for are left out.
Engine = Callable[[str, Arrays | None], Arrays]
WEB = ROOT / "tests" / "web"


def openvino_engine(bundle: Path) -> Engine:
    import openvino

    core, compiled = openvino.Core(), {}

    def run(file: str, feeds: Arrays | None) -> Arrays:
        if file not in compiled:
            # By itself it computes in bfloat16 on processors that have it, and then it does not compile the Loop.
            options = {"INFERENCE_PRECISION_HINT": "f32"}
            compiled[file] = core.compile_model(core.read_model(bundle / file), "CPU", options)
        graph = compiled[file]
        if feeds is None:
            return {}
        made = graph({value.get_any_name(): feeds[value.get_any_name()] for value in graph.inputs})
        return {value.get_any_name(): np.array(made[value]) for value in graph.outputs}

    return run


def needed(lack: str | None) -> None:
    """Skips the test where something lacks, unless the environment says that nothing may."""
    if lack is not None:
        assert not os.environ.get("MYTHOS_EDGE_REQUIRE_NODE"), lack
        pytest.skip(lack)


@contextmanager
def web_engine(bundle: Path) -> Iterator[Engine]:
    """Runs onnxruntime-web under node. Skips where there is none, unless the environment says that there must be."""
    node = shutil.which("node")
    there = node is not None and (WEB / "node_modules" / "onnxruntime-web").is_dir()
    needed(
        None if there else "node with the packages of tests/web is not here: scripts/test installs them where npm is"
    )
    command = [str(node), str(WEB / "run.mjs"), str(bundle)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        talk_in, talk_out = process.stdin, process.stdout

        def run(file: str, feeds: Arrays | None) -> Arrays:
            sent = feeds and {
                name: {"type": value.dtype.name, "shape": value.shape, "data": value.ravel().tolist()}
                for name, value in feeds.items()
            }
            print(json.dumps({"file": file, "feeds": sent}), file=talk_in, flush=True)
            answer = json.loads(talk_out.readline())
            assert "error" not in answer, answer
            return {
                name: np.array(value["data"], value["type"]).reshape(value["shape"]) for name, value in answer.items()
            }

        yield run


def model_in(engine: Engine, file: str, config: MythosConfig, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and depth that the whole model in one graph gives."""
    feeds = {
        "input_ids": ids,
        "max_depth": np.array(config.max_loop_iters),
        "threshold": np.array(config.act_threshold, np.float32),
    }
    made = engine(file, feeds)
    return made["logits"], made["depth"]


def stages_in(
    engine: Engine, form: str, config: MythosConfig, ids: np.ndarray, chunks: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and depth that prelude, every loop step and coda give, fed in chunks with a cache for each slot.

    ``form`` is what stands between the stage and ``.onnx`` in the names of the files.
    """
    # Of grouped attention, graphs of ort-cpu take and give keys and values apart.
    parts = tuple(f".{half}" for half in HALVES) if form == ".ort-cpu" and config.attn_type == "gqa" else ("",)
    caches = {
        (*slot, part): np.zeros((1, 0, config.cache_width // len(parts)), np.float32)
        for part in parts
        for slot in (
            *(("prelude", index) for index in range(config.prelude_layers)),
            *(("step", index) for index in range(config.max_loop_iters)),
            *(("coda", index) for index in range(config.coda_layers)),
        )
    }

    def run(stage: str, columns: np.ndarray, feeds: Arrays, step_index: int | None = None) -> Arrays:
        slots = [slot for slot in caches if slot[0] == stage and step_index in (None, slot[1])]
        first = slots[0][1] if slots else 0
        names = [f"past_{number - first}{part}" for _, number, part in slots]
        places = {"length": np.array(columns[0]), "first": np.zeros(1, np.int64), "positions": columns[None]}
        pasts = {name: caches[slot] for name, slot in zip(names, slots, strict=True)}
        made = engine(f"{stage}{form}.onnx", {**feeds, **places, **pasts})
        for name, slot in zip(names, slots, strict=True):
            caches[slot] = np.concatenate([caches[slot], made[name.replace("past", "rows")]], axis=1)
        return made

    logits, depths, start = [], [], 0
    halting = {"threshold": np.array(config.act_threshold, np.float32), "min_depth": np.array(1)}
    for size in chunks:
        columns, shape = np.arange(start, start + size), (1, size)
        e = run("prelude", columns, {"input_ids": ids[:, start : start + size]})["e"]
        zeros = np.zeros(shape, np.float32)
        state = {"h": e, "out": np.zeros_like(e), "halt_mass": zeros, "depth": zeros.astype(np.int64)}
        for index in range(config.max_loop_iters):
            made = run("step", columns, {**state, **halting, "e": e, "step_index": np.full(shape, index)}, index)
            state = {name: made[f"{name}_next"] for name in state}
        made = run("coda", columns, {"out": state["out"], "logit_rows": np.arange(size)})
        logits.append(made["logits"])
        depths.append(state["depth"])
        start += size
    return np.concatenate(logits, axis=1), np.concatenate(depths, axis=1)
