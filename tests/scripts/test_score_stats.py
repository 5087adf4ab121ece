"""``score --stats``: depth and routing, against the checkpoint's network in torch, counted by hand."""

import html
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Ran, refused
from conftest import FIXTURES
from html_pages import Page

from mythos_edge.exporter.probes import Router
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.layout import load_network
from mythos_edge.scripts.routing import Routing

TEXT = "Return the sum of all that was given, or none. " * 4


def stats_of(run: Callable[..., Ran], folder: Path, *argv: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file and the JSON that the command prints."""
    ran = run("score", *argv, "--stats", folder / "stats.json", "--json")
    assert ran.code == 0, ran.err
    return json.loads((folder / "stats.json").read_text()), ran.json["stats"]


def seen_by_torch(name: str, ids: np.ndarray) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    """The pass of the checkpoint's own network, the router's logits and the halting mass of every loop step."""
    logits, masses = [], []
    with open_checkpoint(FIXTURES / name) as checkpoint:
        network = load_network(checkpoint)
    mixture = network.step.block.ffn
    mixture.register_forward_pre_hook(lambda module, given: logits.append(given[0] @ module.router.T))
    step = network.loop_step

    def watched(*given: Any) -> Any:
        state, rows = step(*given)
        masses.append(state.halt_mass)
        return state, rows

    network.loop_step = watched  # type: ignore[method-assign]
    with torch.no_grad():
        return network(torch.from_numpy(ids)), logits, masses


@pytest.mark.parametrize("options", [(), ("--prefill", 3), ("--policy", "full")])
def test_routing_and_depth_are_those_of_torch(
    golden_bundle: Path,
    golden_name: str,
    tmp_path: Path,
    random: np.random.Generator,
    run: Callable[..., Ran],
    options: tuple[object, ...],
) -> None:
    ids = random.integers(0, 300, (3, 11))
    np.save(tmp_path / "ids.npy", ids)
    found, told = stats_of(run, tmp_path, golden_bundle, "--ids", tmp_path / "ids.npy", *options)
    scored, logits, masses = seen_by_torch(golden_name, ids)
    depth, chosen = scored.depth.numpy(), scored.experts.numpy()
    count, each = logits[0].shape[-1], chosen.shape[-1]
    assert len({*depth.ravel().tolist()}) > 1
    assert found["experts"]["count"] == count
    assert found["experts"]["chosen_each"] == each < count
    assert len(found["loop_steps"]) == depth.max()
    everything: Counter[int] = Counter()
    for index, step in enumerate(found["loop_steps"]):
        load: Counter[int] = Counter()
        entropies, before, first, left = [], [], [], []
        for place in np.argwhere(depth > index):
            row, position = place.tolist()
            sets = [set(chosen[row, position, earlier].tolist()) for earlier in range(index + 1)]
            load.update(sets[index])
            before.append(len(sets[index] & sets[max(index - 1, 0)]) / each)
            first.append(len(sets[index] & sets[0]) / each)
            shares = logits[index].view(*depth.shape, count)[row, position].double().softmax(-1)
            entropies.append(float(torch.distributions.Categorical(probs=shares).entropy()))
            left.append(max(0.0, 1 - float(masses[index][row, position])))
        everything += load
        assert step["step_index"] == index
        assert step["positions"] == len(left)
        assert step["load"] == [load[expert] for expert in range(count)]
        assert step["dead"] == [expert for expert in range(count) if expert not in load]
        assert step["router_entropy"] == pytest.approx(np.mean(entropies), rel=1e-3)
        assert step["mean_mass_left"] == pytest.approx(np.mean(left), abs=1e-4)
        assert step["same_as_step_before"] == (pytest.approx(np.mean(before)) if index else None)
        assert step["same_as_first_step"] == (pytest.approx(np.mean(first)) if index else None)
    assert found["experts"]["load"] == [everything[expert] for expert in range(count)]
    assert found["experts"]["dead"] == [expert for expert in range(count) if expert not in everything]
    ends = [[float(masses[d - 1][row, at]) for at, d in enumerate(line)] for row, line in enumerate(depth)]
    assert found["mean_mass_left"] == pytest.approx(np.maximum(0, 1 - np.array(ends)).mean(), abs=1e-4)
    assert [(one["row"], one["position"]) for one in found["positions"]] == list(np.ndindex(ids.shape))
    assert [one["id"] for one in found["positions"]] == ids.ravel().tolist()
    assert [one["depth"] for one in found["positions"]] == depth.ravel().tolist()
    assert all(one["text"] is None for one in found["positions"])
    assert found["depth_histogram"] == {str(one): int((depth == one).sum()) for one in np.unique(depth)}
    assert found["mean_depth"] == pytest.approx(depth.mean())
    # What is printed is the same without the positions.
    kept = {name: value for name, value in found.items() if name in told}
    assert told == {**kept, "file": str(tmp_path / "stats.json"), "report": None}


def test_every_token_of_a_text_is_counted_once(text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    argv = (text_bundle, "--text", tmp_path / "text.txt", "--row-tokens", 50)
    found, _ = stats_of(run, tmp_path, *argv)
    alone = run("score", *argv, "--json").json
    assert "".join(one["text"] for one in found["positions"]) == TEXT
    assert found["tokens"] == alone["tokens"] == len(TEXT)
    assert found["depth_histogram"] == alone["depth_histogram"]
    steps = found["loop_steps"]
    assert steps[0]["positions"] == len(TEXT)
    for index, step in enumerate(steps):
        assert step["positions"] == sum(
            count for depth, count in found["depth_histogram"].items() if int(depth) > index
        )
        assert sum(step["load"]) == step["positions"] * found["experts"]["chosen_each"]
    assert (found["bundle"], found["tokens_of"]) == (str(text_bundle), str(tmp_path / "text.txt"))
    assert found["policy"] == "exact"


@pytest.mark.parametrize(("name", "halts"), [("ouro-small", True), ("dory-small", False)])
def test_a_family_without_experts_has_depth_alone(
    exported: Callable[..., Path], tmp_path: Path, run: Callable[..., Ran], name: str, halts: bool
) -> None:
    np.save(tmp_path / "ids.npy", np.arange(12).reshape(2, 6))
    argv = (exported(FIXTURES / name), "--ids", tmp_path / "ids.npy")
    found, _ = stats_of(run, tmp_path, *argv)
    assert found["experts"] is None
    assert all(step.keys() == {"step_index", "positions", "mean_mass_left"} for step in found["loop_steps"])
    assert (found["mean_mass_left"] is not None) == halts
    assert all((one["mass_left"] is not None) == halts for one in found["positions"])
    said = run("score", *argv, "--stats", tmp_path / "stats.json").out
    assert ("mass left" in said) == halts
    assert "experts     " not in said


def test_the_figures_for_people(mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    np.save(tmp_path / "ids.npy", np.arange(40).reshape(4, 10))
    argv = (mla_bundle, "--ids", tmp_path / "ids.npy")
    found, _ = stats_of(run, tmp_path, *argv)
    lines = run("score", *argv, "--stats", tmp_path / "stats.json").out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert rows[0] == ["loop step", "positions", "entropy", "busiest", "dead", "as step before", "as first"]
    for cells, step in zip(rows[1:], found["loop_steps"], strict=True):
        assert cells[:2] == [str(step["step_index"]), str(step["positions"])]
        assert cells[3] == f"{max(step['load']) / sum(step['load']):.1%}"
        assert cells[4] == str(len(step["dead"]))
        later = step["step_index"] > 0
        assert cells[5] == (f"{step['same_as_step_before']:.1%}" if later else "-")
    assert lines[-1] == f"written     {tmp_path / 'stats.json'}"
    assert max(map(len, lines[:-1])) <= 80


def test_the_page_shows_the_same(text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    (tmp_path / "text.txt").write_text("if a < b & c:\n    return <b>\n" * 3)
    argv = (text_bundle, "--text", tmp_path / "text.txt", "--report", tmp_path / "page.html")
    found, told = stats_of(run, tmp_path, *argv)
    assert told["report"] == str(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    (table,) = page.tables
    assert [int(row[1]) for row in table[1:]] == [step["positions"] for step in found["loop_steps"]]
    assert [row[4] for row in table[1:]] == [str(len(step["dead"])) for step in found["loop_steps"]]
    for index, step in enumerate(found["loop_steps"]):
        for expert, count in enumerate(step["load"]):
            assert f"expert {expert}, loop step {index}: chosen {count} times" in text
    for depth, count in found["depth_histogram"].items():
        assert f"<title>{depth}: {count}</title>" in text
    assert html.unescape("".join(re.findall(r"<b style[^>]*>([^<]*)</b>", text))) == (
        (tmp_path / "text.txt").read_text().replace("\n", "↵\n")
    )
    assert "text.bundle does with text.txt" in page.text.replace(text_bundle.name, "text.bundle")
    # The page alone.
    assert run("score", *argv).code == 0


def test_dead_experts_and_overlap_of_a_made_up_router() -> None:
    routing = Routing(5, 2)
    chosen = np.array([[[0, 1], [1, 2]], [[1, 0], [3, 4]], [[-1, -1], [3, 1]]])
    taken = np.array([[True, True], [True, True], [False, True]])
    routing.add(chosen, np.ones((3, 2)), taken)
    steps = routing.steps()
    assert [step.load for step in steps] == [(1, 2, 1, 0, 0), (1, 1, 0, 1, 1), (0, 1, 0, 1, 0)]
    assert [step.dead for step in steps] == [[3, 4], [2], [0, 2, 4]]
    assert math.isnan(steps[0].as_before)
    assert [(step.as_before, step.as_first) for step in steps[1:]] == [(0.5, 0.5), (0.5, 0.5)]
    assert routing.dead == []
    assert steps[0].largest_share == 0.5


def test_entropy_says_how_undecided_a_router_is() -> None:
    router = Router("router", np.eye(4, dtype=np.float32), np.array([9, 0, 0, 0], np.float32), 1)
    found = router.entropy(np.array([[0, 0, 0, 0], [0, 1e4, 0, 0], [0, 0, 50, 50]], np.float32))
    np.testing.assert_allclose(found, [math.log(4), 0, math.log(2)], atol=1e-6)


def test_mistakes_are_one_line(mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    np.save(tmp_path / "ids.npy", np.arange(6)[None])
    argv = ("score", mla_bundle, "--ids", tmp_path / "ids.npy", "--stats")
    refused(run(*argv, tmp_path / "nowhere" / "stats.json"), "cannot write the stats")
    refused(run(*argv[:-1], "--report", tmp_path / "nowhere" / "page.html"), "cannot write the page")
    refused(run(*argv, tmp_path / "out", "--report", tmp_path / "out"), "is where the stats go")
    refused(run(*argv, tmp_path / "out", "-o", tmp_path / "out"), "is where the scores go")
    assert not (tmp_path / "out").exists()
    packed = tmp_path / "packed.bundle"
    assert run("pack", mla_bundle, "-o", packed, "--target", "ort-cpu").code == 0
    argv = ("score", packed, "--ids", tmp_path / "ids.npy", "--stats", tmp_path / "stats.json")
    refused(run(*argv), "look at its router with the bundle it was packed from")
    assert not (tmp_path / "stats.json").exists()
