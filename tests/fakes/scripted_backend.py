"""A backend of a network that is small enough to check by hand."""

from collections.abc import Mapping, Sequence

import numpy as np

from mythos_edge.runtime.backends.memory import HostMemory
from mythos_edge.runtime.backends.packing import Array, Arrays, Call


class ScriptedBackend:
    """A network small enough to check by hand: the token says at which loop step its position halts.

    Token ``v`` halts at depth ``depths[v]``. Every other value depends on all visible rows of every slot it should
    depend on, so that a wrong slot, row or order changes the logits. Cache rows are one value wide. ``windows`` are
    those of ``LoopedModel``.
    """

    max_context: int | None = None

    def __init__(
        self, depths: Mapping[int, int], vocab_size: int, windows: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        self.memory = HostMemory()
        self._windows = windows or {}
        self.calls: list[tuple[str, int]] = []
        self._depths, self._vocab_size = dict(depths), vocab_size

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None:
        rows = feeds["input_ids" if stage == "prelude" else "out" if stage == "coda" else "h"].shape[1]
        self.calls.append((stage, rows))
        made = getattr(self, f"_{stage}")(feeds)
        for name, array in outputs.items():
            assert array.shape == made[name].shape, (stage, name, array.shape, made[name].shape)
            array[...] = made[name]

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        """One entry in ``calls`` for all of them."""
        for call in calls:
            self.run(stage, *call)
        rows = sum(rows for _, rows in self.calls[-len(calls) :])
        self.calls[-len(calls) :] = [(stage, rows)]

    def close(self) -> None:
        self.calls.clear()

    def _prelude(self, feeds: Arrays) -> dict[str, Array]:
        ids = feeds["input_ids"].astype(np.float32)
        mixed = self._attended("prelude", 0, ids[..., None], feeds)
        # e = (token, what earlier tokens were)
        return {"e": np.concatenate([ids[..., None], mixed], -1), "rows_0": ids[..., None]}

    def _step(self, feeds: Arrays) -> dict[str, Array]:
        h, e, index = feeds["h"], feeds["e"], int(feeds["step_index"][0, 0])
        h_next, made_rows = (0.5 * h + 0.1 * e).astype(np.float32), {}
        for layer in range(sum(name.startswith("past_") for name in feeds)):
            rows = np.tanh((h + layer * h_next).sum(-1, keepdims=True) + index + layer)
            h_next = (h_next + self._attended("step", layer, rows, feeds)).astype(np.float32)
            made_rows[f"rows_{layer}"] = rows
        active = h.shape[1] - feeds["out"].shape[1]
        running = feeds["halt_mass"] < feeds["threshold"]
        depths = np.vectorize(self._depths.__getitem__, otypes=[np.int64])(e[:, active:, 0].astype(np.int64))
        halts = (depths <= index + 1) & (index + 1 >= feeds["min_depth"])
        out = np.where((running & halts)[..., None], h_next[:, active:], feeds["out"])
        return {
            "h_next": h_next,
            "out_next": out,
            "halt_mass_next": np.where(running & halts, np.float32(1), feeds["halt_mass"]),
            "depth_next": feeds["depth"] + running,
            **made_rows,
        }

    def _coda(self, feeds: Arrays) -> dict[str, Array]:
        out = feeds["out"]
        rows = out.sum(-1, keepdims=True)
        mixed = (rows + self._attended("coda", 0, rows, feeds))[:, feeds["logit_rows"]]
        return {
            "logits": np.cos(mixed * np.arange(1, self._vocab_size + 1)).astype(np.float32),
            "rows_0": rows,
        }

    def _attended(self, stage: str, slot: int, rows: Array, feeds: Arrays) -> Array:
        windows = self._windows.get(stage)
        return _attend(rows, feeds[f"past_{slot}"], feeds, windows[slot] if windows else 0)


def _attend(rows: Array, past: Array, feeds: Arrays, window: int) -> Array:
    """For each new row a mean of the rows it sees, weighted by position so that their order matters.

    With a window the cached rows may be the last ones only.
    """
    length, first = int(feeds["length"]), feeds["first"]
    mixed = np.zeros_like(rows)
    for b, s in np.ndindex(rows.shape[:2]):
        own = length + s
        oldest = min(max(int(first[b]), own - window + 1 if window else 0), own)
        given = past[b, :length]
        seen = np.concatenate([given, rows[b, : s + 1]])[oldest - (length - len(given)) :]
        assert len(seen) == own - oldest + 1, "rows that it sees are missing"
        weights = np.arange(1, len(seen) + 1, dtype=np.float32)[:, None]
        mixed[b, s] = (seen * weights).sum(0) / weights.sum()
    return mixed
