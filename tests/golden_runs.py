"""Ways to run a bundle on given tokens, each with logits and depths."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mythos_edge.runtime.backends.ort_session import ort_session
from mythos_edge.runtime.session import Session

Run = tuple[np.ndarray, np.ndarray]


def model_onnx(bundle: Path, ids: np.ndarray, max_depth: int, threshold: float) -> Run:
    feeds = {"input_ids": ids, "max_depth": np.array(max_depth), "threshold": np.array(threshold, np.float32)}
    logits, depth = ort_session(bundle / "model.onnx").run(None, feeds)
    return logits, depth


def model_with_past(session: Session, ids: np.ndarray, chunks: list[int], threshold: float | None = None) -> Run:
    """The graph for other languages, fed in chunks, its new rows appended to its past."""
    model = session.model
    graph = ort_session(session.bundle.path / "model_with_past.onnx")
    slots = model.prelude_slots + model.max_depth * model.step_slots + model.coda_slots
    past = np.zeros((slots, len(ids), 0, model.cache_width), np.float32)
    logits, depths, start = [], [], 0
    for size in chunks:
        feeds = {"input_ids": ids[:, start : start + size], "past": past}
        made = graph.run(None, {**feeds, "threshold": np.array(threshold or model.threshold, np.float32)})
        logits.append(made[0])
        depths.append(made[1])
        past, start = np.concatenate([past, made[2]], axis=2), start + size
    return np.concatenate(logits, axis=1), np.concatenate(depths, axis=1)


def runtime_runs(
    session: Session, ids: np.ndarray, max_depth: int, prefills: list[int], **options: float
) -> Iterator[tuple[str, Run]]:
    for policy in ("full", "exact"):
        for prefill in prefills:
            score = session.score(ids, prefill=prefill, policy=policy, max_depth=max_depth, **options)
            yield f"{policy}, prefill {prefill}", (score.logits, score.depth)


def chunked(session: Session, ids: np.ndarray, max_depth: int, chunk: int, **options: float) -> Run:
    """The staircase of every sequence fed in equal chunks."""
    logits, depth = np.zeros((*ids.shape, session.model.vocab_size)), np.zeros(ids.shape, np.int64)
    for row in range(len(ids)):
        session.score(ids[row : row + 1, :1], max_depth=max_depth, **options)
        staircase = session._sequences[0].staircase
        staircase.rollback(0)
        for start in range(0, ids.shape[1], chunk):
            piece = ids[row : row + 1, start : start + chunk]
            fed = staircase.feed(piece, np.arange(piece.shape[1]))
            logits[row, start : start + chunk], depth[row, start : start + chunk] = fed.logits[0], fed.depth[0]
    return logits, depth
