"""The figures of ``score``, against torch and against their definitions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Ran, refused

from mythos_edge.runtime.scoring import nats_of
from mythos_edge.scripts import score

TEXT = "Return the naïve sum of 合計 — or none. " * 6


def test_nats_are_torchs_cross_entropy(random: np.random.Generator) -> None:
    logits = random.normal(0, 8, (3, 150, 50)).astype(np.float32)
    ids = random.integers(0, 50, (3, 150))
    wanted = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, :-1]).double().transpose(1, 2), torch.from_numpy(ids[:, 1:]), reduction="none"
    )
    np.testing.assert_allclose(nats_of(logits, ids), wanted.numpy(), rtol=1e-12)
    assert nats_of(logits[:, :1], ids[:, :1]).shape == (3, 0)
    assert nats_of(np.full((1, 2, 4), 3e38, np.float32), ids[:1, :2] % 4) == pytest.approx(np.log(4))
    assert np.isnan(nats_of(np.full((1, 2, 4), np.inf, np.float32), ids[:1, :2] % 4)).all()


def test_perplexity_and_depth_of_ids(
    mla_bundle: Path, tmp_path: Path, random: np.random.Generator, run: Callable[..., Ran]
) -> None:
    ids = random.integers(0, 300, (70, 9))  # more rows than run together
    np.save(tmp_path / "ids.npy", ids)
    argv = ("score", mla_bundle, "--ids", tmp_path / "ids.npy")
    found = run(*argv, "-o", tmp_path / "out.npz", "--json").json
    with np.load(tmp_path / "out.npz") as out:
        logits, depth = out["logits"], out["depth"]
    wanted = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, :-1]).double().flatten(0, 1), torch.from_numpy(ids[:, 1:].ravel())
    )
    assert found["perplexity"] == pytest.approx(float(wanted.exp()), rel=1e-9)
    assert (found["tokens"], found["predicted"]) == (70 * 9, 70 * 8)
    assert found["mean_depth"] == pytest.approx(depth.mean())
    values, counts = np.unique(depth, return_counts=True)
    assert len(values) > 1
    assert found["depth_histogram"] == {str(one): count for one, count in zip(values, counts.tolist(), strict=True)}
    assert "bits_per_byte" not in found
    # Without a file the same is told.
    alone = run(*argv, "--json").json
    assert alone == {**found, "output": None}


def test_bits_per_byte_of_a_text(text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    data = TEXT.encode()
    (tmp_path / "text.txt").write_bytes(data)
    argv = ("score", text_bundle, "--text", tmp_path / "text.txt", "--row-tokens", 50)
    found = run(*argv, "-o", tmp_path / "out.npz", "--json").json
    with np.load(tmp_path / "out.npz") as out:
        ids, logits, depth = out["ids"], out["logits"].astype(np.float64), out["depth"]
    # The ids of this model are the bytes; its rows begin every 49 tokens, the last one ends with the text.
    nats, depths = {}, {}
    starts = [*range(0, len(data) - 50, 49), len(data) - 50]
    for start, row, of_row, taken in zip(starts, ids, logits, depth, strict=True):
        assert bytes(row.tolist()) == data[start : start + 50]
        for place, token in enumerate(row):
            if place:
                shares = np.exp(of_row[place - 1])
                nats.setdefault(start + place, -np.log(shares[token] / shares.sum()))
            depths.setdefault(start + place, taken[place])
    assert sorted(nats) == list(range(1, len(data)))
    assert found["bits_per_byte"] == pytest.approx(sum(nats.values()) / np.log(2) / len(data), rel=1e-6)
    assert found["text_bytes"] == len(data) > len(TEXT)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(list(nats.values()))), rel=1e-6)
    assert found["mean_depth"] == pytest.approx(np.mean(list(depths.values())))
    assert sum(found["depth_histogram"].values()) == len(data)


def test_the_figures_for_people(
    text_bundle: Path, mla_bundle: Path, tmp_path: Path, random: np.random.Generator, run: Callable[..., Ran]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    argv = ("score", text_bundle, "--text", tmp_path / "text.txt")
    told, found = run(*argv).out, run(*argv, "--json").json
    assert f"perplexity  {found['perplexity']:.4g} (" in told
    assert f"bits/byte   {found['bits_per_byte']:.4g} over {len(TEXT.encode())} bytes" in told
    np.save(tmp_path / "ids.npy", random.integers(0, 300, (20, 9)))
    argv = ("score", mla_bundle, "--ids", tmp_path / "ids.npy")
    lines, found = run(*argv).out.splitlines(), run(*argv, "--json").json
    bars = {line.split()[0]: line for line in lines if line.split()[0].isdigit()}
    assert list(bars) == list(found["depth_histogram"])
    assert max(line.count("#") for line in bars.values()) == 50
    most = max(found["depth_histogram"].values())
    for depth, count in found["depth_histogram"].items():
        assert 0 <= bars[depth].count("#") - 50 * count / most < 1
        assert bars[depth].split()[1] == f"{count / 180:.1%}"
    assert max(map(len, lines)) <= 80
    assert all(line.isascii() for line in lines)


def test_tokens_that_predict_nothing(mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    np.save(tmp_path / "ids.npy", np.array([[1], [2]]))
    ran = run("score", mla_bundle, "--ids", tmp_path / "ids.npy")
    assert ran.code == 0
    assert "2 in 2 x 1 positions, 0 predicted" in ran.out
    assert "perplexity" not in ran.out
    found = run("score", mla_bundle, "--ids", tmp_path / "ids.npy", "--json").json
    assert (found["perplexity"], found["predicted"], found["tokens"]) == (None, 0, 2)


def test_rows_are_scored_in_parts_of_bounded_logits(
    mla_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    np.save(tmp_path / "ids.npy", np.arange(30).reshape(5, 6))
    argv = ("score", mla_bundle, "--ids", tmp_path / "ids.npy", "--json")
    whole = run(*argv).json
    monkeypatch.setattr(score, "_MOST_LOGITS_BYTES", 1)
    ran = run(*argv)
    assert ran.json["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
    assert ran.json["depth_histogram"] == whole["depth_histogram"]
    refused(run(*argv[:-1], "--prefill", 99), "prefill is 99")
