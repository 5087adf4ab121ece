"""Calibration: statistics equal what torch multiplies the same matrices with, and loop steps count alike."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mythos_edge.exporter.calibration import Calibration, _Tally, collect_importance
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import CapacityError
from mythos_edge.model.families.openmythos.network import Network
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import load_network, recipes


class _Watching(TorchFunctionMode):
    """Writes down the squares of everything a matrix of ``network`` is multiplied with, by name and expert."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.seen: dict[tuple[str, int], list[Tensor]] = {}
        self._named = {parameter.data_ptr(): (name, parameter) for name, parameter in network.named_parameters()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            x, weight = args
            start = max(pointer for pointer in self._named if pointer <= weight.data_ptr())
            name, parameter = self._named[start]
            expert = (weight.data_ptr() - start) // (parameter[0].numel() * parameter.element_size())
            self.seen.setdefault((name, expert if parameter.ndim == 3 else 0), []).append(x.detach().square())
        return func(*args, **(kwargs or {}))


def _wanted(seen: list[Tensor], steps: int) -> np.ndarray:
    """Mean over loop steps of the normalised mean square; ``seen`` holds one array a loop step."""
    assert len(seen) == steps
    means = [squares.mean(0) for squares in seen]
    return np.asarray(torch.stack([mean / mean.mean() for mean in means]).mean(0))


def _ids(vocab_size: int, random: np.random.Generator, shape: tuple[int, int] = (1, 12)) -> np.ndarray:
    return random.integers(0, vocab_size, shape)


def test_equals_what_torch_sees(golden_bundle: Path, golden_name: str, random: np.random.Generator) -> None:
    bundle = open_bundle(golden_bundle)
    config = config_of(bundle.manifest)
    ids = _ids(config.vocab_size, random)
    found = collect_importance(bundle, ids)
    with open_checkpoint(FIXTURES / golden_name) as checkpoint, torch.no_grad():
        network = load_network(checkpoint, dtype=torch.float64)
        with _Watching(network) as watching:
            network(torch.from_numpy(ids))
    # Narrow matrices are those that a target may round; key_up and value_up are multiplied per head, not by rows.
    stored = {recipe.name for recipe in recipes(config, 8) if recipe.narrow}
    assert set(found.importance) == {name for name in stored if not name.endswith(("key_up", "value_up"))}
    for name, importance in found.importance.items():
        if name.endswith(("fc1", "fc2")):
            continue
        wanted = _wanted(watching.seen[name, 0], config.max_loop_iters if name.startswith("step.") else 1)
        np.testing.assert_allclose(importance, wanted, rtol=2e-3, atol=1e-5, err_msg=name)
    # The network asks its router twice a loop step: for the experts, and for how clear their choice is.
    router = _wanted(watching.seen["step.block.ffn.router", 0][::2], config.max_loop_iters)
    np.testing.assert_allclose(found.importance["step.block.ffn.fc1"], router, rtol=2e-3, atol=1e-5)
    per_step = [float(squares.mean()) for squares in watching.seen["step.block.attn.wo", 0]]
    np.testing.assert_allclose(found.per_step["step.block.attn.wo"], per_step, rtol=1e-3)


def test_experts_see_their_own_rows(golden_bundle: Path, golden_name: str, random: np.random.Generator) -> None:
    bundle = open_bundle(golden_bundle)
    config = config_of(bundle.manifest)
    ids = _ids(config.vocab_size, random)
    importance = collect_importance(bundle, ids).importance["step.block.ffn.fc2"]
    assert importance.shape == (config.n_experts, config.expert_dim)
    with open_checkpoint(FIXTURES / golden_name) as checkpoint, torch.no_grad():
        network = load_network(checkpoint, dtype=torch.float64)
        with _Watching(network) as watching:
            network(torch.from_numpy(ids))
    for expert in range(config.n_experts):
        seen = watching.seen.get(("step.block.ffn.fc2", expert))
        if seen is None:
            np.testing.assert_array_equal(importance[expert], 1.0)
            continue
        rows = np.array([len(squares) for squares in seen], float)
        levels = np.stack([np.asarray(squares.mean(0) / squares.mean(0).mean()) for squares in seen])
        wanted = (levels * rows[:, None]).sum(0) / rows.sum()
        np.testing.assert_allclose(importance[expert], wanted, rtol=5e-3, atol=1e-4)


def test_a_loud_loop_step_does_not_drown_the_others() -> None:
    tally = _Tally((2, 2))
    tally.add(0, np.array([[1.0, 0.0]], np.float32))
    tally.add(1, np.array([[0.0, 1000.0]], np.float32))
    np.testing.assert_allclose(tally.importance(), [1.0, 1.0])
    np.testing.assert_allclose(tally.per_step(), [0.5, 500_000.0])


def test_loop_steps_count_by_their_rows_and_what_was_never_seen_is_even() -> None:
    tally = _Tally((2, 3, 2))
    tally.add((0, 0), np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], np.float32))
    tally.add((1, 0), np.array([[0.0, 2.0]], np.float32))
    tally.add((1, 1), np.zeros((4, 2), np.float32))
    np.testing.assert_allclose(tally.importance(), [[1.5, 0.5], [1.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(tally.per_step(), [0.5, 0.4])


def test_rows_add_up(mla_bundle: Path, random: np.random.Generator) -> None:
    """Two sequences give the average of both, weighed by nothing but their equal lengths, where levels are equal."""
    bundle = open_bundle(mla_bundle)
    ids = _ids(config_of(bundle.manifest).vocab_size, random, (2, 9))
    told: list[float] = []
    both = collect_importance(bundle, ids, lambda phase, fraction: told.append(fraction))
    first, second = (collect_importance(bundle, row[None]) for row in ids)
    for name in both.per_step:
        wanted = (first.per_step[name] + second.per_step[name]) / 2
        np.testing.assert_allclose(both.per_step[name], wanted, rtol=1e-5)
    assert told == [0.0, 0.5]


def test_narrow_storage_gives_the_same(
    exported: Callable[..., Path], mla_bundle: Path, random: np.random.Generator
) -> None:
    narrow = open_bundle(exported(FIXTURES / "mla-small", dtype="bf16"))
    ids = _ids(config_of(narrow.manifest).vocab_size, random, (1, 40))
    found: list[Calibration] = [collect_importance(bundle, ids) for bundle in (open_bundle(mla_bundle), narrow)]
    for name, importance in found[0].importance.items():
        if not name.endswith("fc2"):  # an expert more or less near a tie
            assert np.corrcoef(importance, found[1].importance[name])[0, 1] > 0.98, name


def test_too_many_positions_are_one_line(mla_bundle: Path) -> None:
    bundle = open_bundle(mla_bundle)
    with pytest.raises(CapacityError, match="positions; this bundle was exported for"):
        collect_importance(bundle, np.zeros((1, bundle.manifest.max_context + 1), np.int64))
