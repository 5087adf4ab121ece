"""Scoring with one TensorRT engine that has the loop inside: whole sequences, no cache, one call each."""

import ctypes
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.errors import CapacityError, UsageError
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.runtime.backends.device import DeviceMemory
from mythos_edge.runtime.backends.trt_engine import Runtime
from mythos_edge.runtime.halting import Depth, Policy
from mythos_edge.runtime.options import DepthOptions
from mythos_edge.runtime.prompts import checked_ids
from mythos_edge.runtime.request_values import check_names
from mythos_edge.runtime.scoring import Score
from mythos_edge.runtime.turns import Turns, in_turn, last_turn


class LoopEngine:
    """A bundle's target of layout ``loop`` on a GPU, for one call at a time. Raises as ``TrtBackend`` does."""

    def __init__(
        self, bundle: Bundle, target: str, *, device: int = 0, trust: bool = False, driver: Driver | None = None
    ) -> None:
        spec = bundle.target(target)
        if not spec.has_loop_inside:
            raise UsageError(f"target {target!r} has no loop inside: open it as a session")
        self.model = bundle.manifest.model
        self._turns = Turns("engine", "open one a thread, or give several rows of ids")
        bundle = bundle.at_absolute_path()
        self._runtime = Runtime(bundle, target, driver, device)
        try:
            with bundle.unchanged(target):
                self._engine = self._runtime.load("model", trust)
        except BaseException:
            self._runtime.close()
            raise
        self._max_rows = self._runtime.spec.max_rows
        self._memory = DeviceMemory(self._runtime.gpu, spec.compute_dtype)

    @classmethod
    def open(cls, path: Path | str, target: str, *, trust: bool = False) -> Self:
        """The target of the bundle at ``path``."""
        return cls(open_bundle(path, trust_engines=trust), target, trust=trust)

    @in_turn
    def score(self, ids: Any, **depth: Unpack[DepthOptions]) -> Score:
        """Logits and depth of every position of ``ids (B, S)``; ``depth`` are the fields of Depth.

        ``block_rows`` counts what the deepest position of a sequence needs for all of its rows. Raises UsageError for a
        policy or a least depth, which the loop inside does not know, and CapacityError.
        """
        ids = checked_ids(ids, self.model)
        check_names(Depth, depth)
        given: dict[str, Any] = {name: value for name, value in depth.items() if value is not None}
        wanted = Depth(**given).resolve(self.model)
        if wanted.policy is not Policy.EXACT or wanted.min_depth != 1:
            raise UsageError("a loop inside the engine runs as policy exact with min_depth 1: build --layout step")
        if ids.shape[1] > self._max_rows:
            raise CapacityError(
                f"the sequence has {ids.shape[1]} tokens; this engine was built for {self._max_rows}: "
                f"build with --max-rows {ids.shape[1]}"
            )
        scored = [self._sequence(row[None], wanted.max_depth, wanted.threshold) for row in ids]
        logits, depths = (np.concatenate(parts) for parts in zip(*scored, strict=True))
        calls = int(depths.max(axis=1).sum())
        return Score(logits, depths.astype(np.int32), calls, calls * ids.shape[1], 0, calls)

    def _sequence(
        self, ids: NDArray[np.int64], max_depth: int, threshold: float
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        self._runtime.gpu.use()
        memory, rows = self._memory, ids.shape[1]
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": ids,
            "max_depth": np.array(max_depth, np.int64),
            "threshold": np.array(threshold, np.float32),
        }
        on_host = {name for name, tensor in self._engine.tensors.items() if tensor.on_host}
        arrays = {name: memory.from_host(array) for name, array in feeds.items() if name not in on_host}
        made = {
            "logits": memory.empty((1, rows, self.model.vocab_size), np.float32),
            "depth": memory.empty((1, rows), np.int64),
        }
        addresses = {name: array.pointer for name, array in (arrays | made).items()}
        # TensorRT reads the limit of a loop on the host.
        held = {name: ctypes.c_int64(int(feeds[name])) for name in on_host}
        addresses |= {name: ctypes.addressof(value) for name, value in held.items()}
        self._engine.run({"input_ids": ids.shape}, addresses, rows, memory.stream, captured=False)
        return memory.to_host(made["logits"]), memory.to_host(made["depth"])

    @last_turn
    def close(self) -> None:
        """Gives the engine and its memory back."""
        self._engine.close()
        self._memory.close()
        self._runtime.close()

    @in_turn
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
