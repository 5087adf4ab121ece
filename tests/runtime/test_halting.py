"""Depth parameters: their ranges, and the model's own values filled in."""

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import BundleError, ConfigError, UsageError
from mythos_edge.model.families.openmythos.config import VARIANTS
from mythos_edge.model.manifest import Preset
from mythos_edge.runtime.halting import Depth, Policy, ResolvedDepth, depth_of_preset

CONFIG = dataclasses.replace(VARIANTS["1b"], max_loop_iters=6, act_threshold=0.9)


def test_blanks_are_what_the_model_was_trained_with() -> None:
    assert Depth().resolve(CONFIG.looped) == ResolvedDepth(Policy.EXACT, 6, 1, 0.9)


def test_given_values_are_kept() -> None:
    given = Depth(Policy.LAST, max_depth=4, min_depth=2, threshold=1e-9)
    assert given.resolve(CONFIG.looped) == ResolvedDepth(Policy.LAST, 4, 2, 1e-9)
    # A threshold that is never reached is a way to ask for full depth.
    assert Depth(threshold=5).resolve(CONFIG.looped).threshold == 5


@pytest.mark.parametrize("name", ["exact", "full", "last"])
def test_a_policy_may_be_its_name(name: Any) -> None:
    assert Depth(policy=name).policy is Policy(name)


@pytest.mark.parametrize("policy", ["", "EXACT", "fast", None, 0])
def test_an_unknown_policy_is_told_the_known_ones(policy: Any) -> None:
    with pytest.raises(UsageError, match="expected one of exact, full, last"):
        Depth(policy=policy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_depth", 0),
        ("max_depth", -1),
        ("min_depth", 0),
        ("min_depth", -3),
        *[("threshold", value) for value in (0.0, 1e-50, -0.5, math.nan, math.inf, -math.inf)],
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} is {value}, expected "):
        Depth(**{name: value})


def test_min_depth_is_at_most_max_depth() -> None:
    assert Depth(max_depth=3, min_depth=3).resolve(CONFIG.looped).min_depth == 3
    assert Depth(min_depth=6).resolve(CONFIG.looped).min_depth == 6
    with pytest.raises(UsageError, match="min_depth is 4, expected at most max_depth 3"):
        Depth(max_depth=3, min_depth=4).resolve(CONFIG.looped)
    with pytest.raises(UsageError, match="min_depth is 7, expected at most max_depth 6"):
        Depth(min_depth=7).resolve(CONFIG.looped)


def test_where_nothing_halts_a_threshold_is_refused() -> None:
    model = dataclasses.replace(CONFIG.looped, exit_rule="none", threshold=1.0)
    assert Depth(threshold=1.0, max_depth=2).resolve(model) == ResolvedDepth(Policy.EXACT, 2, 1, 1.0)
    with pytest.raises(UsageError, match=r"threshold is 0\.5, but no position of this model halts by itself"):
        Depth(threshold=0.5).resolve(model)
    with pytest.raises(BundleError, match="exit_rule is 'sometimes', expected one of weighted, gate, none"):
        dataclasses.replace(CONFIG.looped, exit_rule="sometimes")


def test_depth_beyond_training_warns() -> None:
    with pytest.warns(UserWarning, match="max_depth 7 is beyond the 6 loop steps"):
        assert Depth(max_depth=7).resolve(CONFIG.looped).max_depth == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Depth(max_depth=6).resolve(CONFIG.looped)


def test_a_preset_sets_depth_and_an_unknown_one_names_the_known(demo_bundle: Path) -> None:
    manifest = open_bundle(demo_bundle).manifest
    with pytest.raises(UsageError, match="no preset 'fast', as it has no presets: mythos-edge tune makes one"):
        depth_of_preset(manifest, "fast")
    presets = {name: Preset("ort-cpu", 4, 0.5, 0.01, 0.99, 1.5, 2.0) for name in ("knee", "calm")}
    tuned = dataclasses.replace(manifest, presets=presets)
    fields = depth_of_preset(tuned, "knee")
    assert Depth(**fields).resolve(manifest.model) == ResolvedDepth(Policy.EXACT, 4, 1, 0.5)
    with pytest.raises(UsageError, match="no preset 'fast', only calm, knee"):
        depth_of_preset(tuned, "fast")


def test_a_model_deeper_than_any_is_refused_before_a_slot_is_made() -> None:
    with pytest.raises(ConfigError, match="max_loop_iters is 10000000, expected at most 4096"):
        dataclasses.replace(CONFIG, max_loop_iters=10**7)
