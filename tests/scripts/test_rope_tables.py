"""The rotary table on the command line: export refuses or records, validate and inspect go by the record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Ran, refused
from test_parity import save_random_model

from mythos_edge.model.bundle import open_bundle
from mythos_edge.runtime.session import Session

Run = Callable[..., Ran]
TABLE = "freqs_cis_mla"


def _changed(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint with another rotary table."""
    content = torch.load(path, weights_only=False)
    content["model"] = dict(content["model"]) | {TABLE: change(content["model"][TABLE])}
    torch.save(content, path.parent / name)
    return path.parent / name


@pytest.fixture(scope="module")
def model_and_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path]]:
    """The reference's model, and its checkpoint with a complex table, with cosines alone and of another theta."""
    complex_table = tmp_path_factory.mktemp("rope") / "complex.pt"
    model = save_random_model(complex_table, {"max_loop_iters": 2}, seed=3)
    return model, {
        "complex": complex_table,
        "real": _changed(complex_table, "real.pt", lambda table: table.real.bfloat16()),
        "theta": _changed(complex_table, "theta.pt", lambda table: torch.polar(table.abs(), table.angle() * 0.9)),
    }


@pytest.fixture(scope="module")
def bundles(model_and_files: tuple[Any, dict[str, Path]]) -> dict[str, Path]:
    """Bundles of the checkpoint with cosines alone, with each choice."""
    from mythos_edge.scripts import cli

    real = model_and_files[1]["real"]
    made = {choice: real.parent / f"{choice}.bundle" for choice in ("config", "stored")}
    for choice, path in made.items():
        assert cli.main(["export", str(real), "-o", str(path), "--rope-table", choice]) == 0
    return made


def test_export_refuses_and_leaves_nothing(
    run: Run, model_and_files: tuple[Any, dict[str, Path]], tmp_path: Path
) -> None:
    _, files = model_and_files
    out = tmp_path / "out.bundle"
    refused(run("export", files["real"], "-o", out), "real (bfloat16)", "--rope-table config", "--rope-table stored")
    refused(run("export", files["theta"], "-o", out), "rope_theta is 500.0", "--rope-table config")
    longer = ("--rope-table", "stored", "--max-context", "33")
    refused(run("export", files["real"], "-o", out, *longer), "32 positions, wanted are 33: --max-context 32 at most")
    assert list(tmp_path.iterdir()) == []


def test_the_bundle_computes_what_was_chosen(
    run: Run, model_and_files: tuple[Any, dict[str, Path]], bundles: dict[str, Path]
) -> None:
    model, files = model_and_files
    ids = torch.tensor(np.random.default_rng(0).integers(0, 61, (1, 20)))
    with torch.no_grad():
        expected = {"config": model(ids, n_loops=2).numpy()}
        rotating = getattr(model, TABLE)
        setattr(model, TABLE, torch.load(files["real"], weights_only=False)["model"][TABLE])
        expected["stored"] = model(ids, n_loops=2).numpy()
        setattr(model, TABLE, rotating)
    assert np.abs(expected["stored"] - expected["config"]).max() > 0.1
    for choice, bundle in bundles.items():
        for prefill in (20, 7):
            with Session.open(bundle) as session:
                found = session.score(ids.numpy(), prefill=prefill).logits
            np.testing.assert_allclose(found, expected[choice], rtol=1e-4, atol=2e-4)
        assert open_bundle(bundle).manifest.rope_table == choice
        assert run("inspect", bundle, "--json").json["rope_table"] == choice
        assert (
            f"rotary     {'angles computed' if choice == 'config' else 'the checkpoint'}" in run("inspect", bundle).out
        )
    # A saved sequence of the one means nothing to the other.
    one, other = (open_bundle(bundle).manifest for bundle in bundles.values())
    assert one.config == other.config
    assert one.identity != other.identity


@pytest.mark.parametrize("choice", ["config", "stored"])
def test_validate_goes_by_the_record(
    run: Run, model_and_files: tuple[Any, dict[str, Path]], bundles: dict[str, Path], choice: str
) -> None:
    files = model_and_files[1]
    passed = run("validate", bundles[choice], "--against", files["real"], "--json")
    assert passed.json["passed"], passed
    assert ("is real (bfloat16)" in passed.err) == (choice == "config")
    other = "stored" if choice == "config" else "config"
    clash = run("validate", bundles[choice], "--against", files["real"], "--rope-table", other)
    refused(clash, f"--rope-table is {other}, but the bundle was made with the table {choice}")


def test_validate_does_not_pass_over_another_table(
    run: Run, model_and_files: tuple[Any, dict[str, Path]], bundles: dict[str, Path]
) -> None:
    files = model_and_files[1]
    # The weights are those of the bundle; the table is not what it was made with.
    refused(run("validate", bundles["config"], "--against", files["theta"]), "rope_theta is 500.0", TABLE)
    for name in ("theta", "complex"):
        wrong = run("validate", bundles["stored"], "--against", files[name], "--json")
        assert (wrong.code, wrong.json["passed"]) == (1, False)
    excused = run("validate", bundles["config"], "--against", files["theta"], "--rope-table", "config", "--json")
    assert excused.json["passed"]


def test_inspect_tells_of_a_checkpoints_table(run: Run, model_and_files: tuple[Any, dict[str, Path]]) -> None:
    files = model_and_files[1]
    told = run("inspect", files["complex"], "--json")
    table = {"name": TABLE, "dtype": "complex64", "shape": [32, 3], "theta": 500.0, "as_config": True}
    assert told.json["stored_rope_table"] == table
    assert told.err == ""
    told = run("inspect", files["real"], "--json")
    assert told.json["stored_rope_table"] == table | {"dtype": "bfloat16", "theta": None, "as_config": False}
    assert "is real (bfloat16)" in told.err
    told = run("inspect", files["theta"])
    assert "is of no rope_theta" in told.err
    assert "as_config: False" in told.out


def test_notes_of_a_checkpoint_are_shown(
    run: Run, model_and_files: tuple[Any, dict[str, Path]], tmp_path: Path
) -> None:
    content = torch.load(model_and_files[1]["complex"], weights_only=False)
    torch.save(content | {"ema": {name: value + 1 for name, value in content["model"].items()}}, tmp_path / "two.pt")
    told = run("inspect", tmp_path / "two.pt", "--json")
    assert "note: " in told.err
    assert "ema holds a model, too: --key ema takes that" in told.err
    refused(run("inspect", tmp_path / "two.pt", "--key", "nope"), "no tensors under the key 'nope'", "ema")
