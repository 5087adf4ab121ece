"""``validate --level deep``: the network in torch, given the very inputs of a target's stage calls, and run freely.

A call's rows are compared with what the network makes of the same state and the same cached rows, so that the first
part that errs is the one that is wrong, and nothing that merely follows from it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mythos_edge.model.eager_ops import chosen_experts
from mythos_edge.model.network import Halting, LoopedNetwork, LoopState, Window
from mythos_edge.model.observed import collecting
from mythos_edge.model.stages import STAGES
from mythos_edge.scripts.deep_run import StageRun
from mythos_edge.scripts.weight_noise import FLOAT32_RUNS, jitter

Array = NDArray[Any]
Values = dict[str, Array]
_ATTENTION = "attention."
# Every value has as many errors as there are rows, so that fewer runs show what is usual.
_LOCAL_RUNS = 2


@torch.no_grad()
def values_of(network: LoopedNetwork, run: StageRun) -> Values:
    """All that the network makes of a call's inputs, in the order of computation; each (rows, channels)."""
    dtype = next(network.parameters()).dtype
    feeds = {name: _tensor(array, dtype) for name, array in run.feeds.items()}
    window = Window(feeds["length"], feeds["first"])
    past = _past_of(run, feeds, int(window.length))
    made: dict[str, Tensor] = {}
    with collecting() as found:
        if run.stage == "prelude":
            made["e"], rows = network.prelude(feeds["input_ids"], window, *past)
        elif run.stage == "step":
            wide = torch.promote_types(dtype, torch.float32)
            state = LoopState(feeds["h"], feeds["out"], feeds["halt_mass"].to(wide), feeds["depth"])
            halting = Halting(feeds["threshold"].to(wide), feeds["min_depth"])
            after, rows = network.loop_step(state, feeds["e"], feeds["step_index"], halting, window, *past)
            made |= {f"{name}_next": value for name, value in after._asdict().items()}
        else:
            made["logits"], rows = network.coda(feeds["out"], feeds["logit_rows"], window, *past)
    made |= {f"rows_{slot}": value for slot, value in enumerate(rows)}
    flat = {name: value[0] if value.ndim > 2 else value[0].unsqueeze(-1) for name, value in made.items()}
    inside = {name: value.reshape(-1, value.shape[-1]) for name, value in found.items()}
    return {name: value.numpy() for name, value in _in_order(inside, flat)}


def _tensor(array: Array, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _past_of(run: StageRun, feeds: Mapping[str, Tensor], length: int) -> list[Tensor]:
    """The cached rows of each slot; those before a window, which no row sees, are zeros."""
    slots = sum(name.startswith("past_") for name in feeds)
    given = [feeds[f"past_{slot}"] for slot in range(slots)]
    return [
        torch.nn.functional.pad(rows, (0, 0, max(0, length - rows.shape[1]), 0))[:, max(0, rows.shape[1] - length) :]
        for rows in given
    ]


def _in_order(found: Mapping[str, Tensor], made: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Observed values, the new rows of an attention before it, then the outputs, the state before what halts."""
    for name, value in found.items():
        rows = f"rows_{name.removeprefix(_ATTENTION)}"
        if name.startswith(_ATTENTION) and rows in made:
            yield rows, made.pop(rows)
        yield name, value
    yield from sorted(made.items(), key=lambda item: _OUTPUTS.index(item[0].rpartition("_")[0] or item[0]))


_OUTPUTS = (
    "rows",
    "e",
    "h",
    "halt_mass",
    "depth",
    "out",
    "logits",
    "h_next",
    "halt_mass_next",
    "depth_next",
    "out_next",
)


@dataclass(frozen=True)
class Local:
    """The reference's values for every call in float64, and by stage and name the largest error of its float32 runs.

    ``excused`` are by call the rows (S,) whose experts and halting say nothing, as a tie decided them.
    """

    exact: list[Values]
    own_error: dict[tuple[str, str], float]
    largest: dict[tuple[str, str], float]
    excused: Sequence[NDArray[np.bool_]] = ()


def local_reference(networks: "Networks", runs: Sequence[StageRun]) -> Local:
    """The reference on the inputs of every call."""
    exact = [values_of(networks.exact, run) for run in runs]
    own: dict[tuple[str, str], float] = {}
    largest: dict[tuple[str, str], float] = {}
    for run, wanted in zip(runs, exact, strict=True):
        for name, value in wanted.items():
            if value.size:
                key = run.stage, name
                largest[key] = max(largest.get(key, 0.0), float(np.abs(_finite(value)).max()))
    for network in networks.noisy(_LOCAL_RUNS):
        for run, wanted in zip(runs, exact, strict=True):
            found = values_of(network, run)
            same = ~_parted(wanted, found, networks.top_k)
            for name, value in wanted.items():
                rows = same[len(same) - len(value) :] if len(value) <= len(same) else np.ones(len(value), np.bool_)
                error = np.abs(value.astype(np.float64) - found[name])[rows]
                if error.size:
                    key = run.stage, name
                    own[key] = max(own.get(key, 0.0), float(_finite(error).max()))
    return Local(exact, own, largest)


def _finite(values: Array) -> Array:
    return np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)


def _parted(wanted: Values, found: Values, top_k: int) -> NDArray[np.bool_]:
    """The rows for which two runs chose other experts, or halted otherwise."""
    rows = max(len(value) for value in wanted.values())
    parted = np.zeros(rows, np.bool_)
    if "router.0" in wanted:
        parted |= (chosen_of(wanted["router.0"], top_k)[0] != chosen_of(found["router.0"], top_k)[0]).any(-1)
    if "depth_next" in wanted:
        other = (wanted["depth_next"] != found["depth_next"]).any(-1)
        parted[rows - len(other) :] |= other
    return parted


def chosen_of(scores: Array, top_k: int) -> tuple[NDArray[np.int64], Array]:
    """The experts of each row by its ``scores (N, E)``, in the order of their indices, and how clear the choice is."""
    experts, margin = chosen_experts(torch.from_numpy(scores), top_k)
    return experts.sort(dim=-1).values.numpy(), margin.numpy()


class _RoundedRows(TorchFunctionMode):
    """Rounds to 8 bits every row that is multiplied with a matrix in one of ``storages``, as integer products do."""

    def __init__(self, storages: Collection[int]) -> None:
        super().__init__()
        self._storages = storages

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.linear and args[1].untyped_storage().data_ptr() in self._storages:
            x, *others = args
            scale = x.abs().amax(-1, keepdim=True) / 127
            rows = (x / torch.where(scale == 0, 1, scale)).round() * scale
            return func(rows, *others, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Networks:
    """The reference in float64, and how far float32 is from it; ``exact`` stays as it is.

    What is multiplied with the matrices ``rounded`` is rounded, too, so that the error of that is a reference's own.
    Memory: the model in float64 and twice in float32.
    """

    def __init__(
        self, exact: LoopedNetwork, float32: LoopedNetwork, seed: int = 0, rounded: Collection[str] = ()
    ) -> None:
        self.exact, self._float32, self._seed = exact, float32, seed
        parameters = dict(exact.named_parameters())
        self._rounded = {parameters[name].untyped_storage().data_ptr() for name in rounded}
        self.top_k = exact.looped.experts_per_token
        self._weights = {name: value.data.clone() for name, value in float32.named_parameters()}

    def noisy(self, runs: int = FLOAT32_RUNS) -> Iterator[LoopedNetwork]:
        """The reference in float32, each time with a little more of its weights moved by a rounding error."""
        for name, value in self._float32.named_parameters():
            value.data.copy_(self._weights[name])
        for index in range(runs):
            if index:
                jitter(self._float32, self._seed + index)
            yield self._float32
        if self._rounded:
            with _RoundedRows(self._rounded):
                yield self.exact


@dataclass(frozen=True)
class FreeRun:
    """A network's own pass over tokens (S,): ``logits (S, V)``, ``depth (S,)``, and by loop step the states
    ``h (M, S, D)``, the halting mass (M, S), and what the router chose by, ``scores (M, S, E)`` or None."""

    logits: Array
    depth: Array
    h: Array
    mass: Array
    scores: Array | None


@torch.no_grad()
def free_run(network: LoopedNetwork, ids: NDArray[np.int64], threshold: float) -> FreeRun:
    """The network over ``ids (S,)`` in one chunk, as ``LoopedNetwork.forward`` runs it, with its states."""
    looped, count = network.looped, len(ids)
    dtype = next(network.parameters()).dtype
    window, nothing = Window(torch.tensor(0), torch.zeros(1, dtype=torch.int64)), torch.empty(1, 0, looped.cache_width)
    pasts = {stage: [nothing.to(dtype)] * looped.slots[stage] for stage in STAGES}
    e, _ = network.prelude(torch.from_numpy(ids[None]), window, *pasts["prelude"])
    mass = torch.zeros(1, count, dtype=torch.promote_types(e.dtype, torch.float32))
    state = LoopState(e, torch.zeros_like(e), mass, torch.zeros(1, count, dtype=torch.int64))
    halting = Halting(torch.tensor(threshold), torch.tensor(1))
    states, masses, scores = [], [], []
    for index in range(looped.max_depth):
        with collecting() as found:
            step_index = torch.full((1, count), index)
            state, _ = network.loop_step(state, e, step_index, halting, window, *pasts["step"])
        states.append(state.h[0].numpy())
        masses.append(state.halt_mass[0].numpy())
        scores += [found["router.0"].numpy()] if "router.0" in found else []
    logits, _ = network.coda(state.out, torch.arange(count), window, *pasts["coda"])
    stacked = np.stack(scores) if scores else None
    return FreeRun(logits[0].numpy(), state.depth[0].numpy(), np.stack(states), np.stack(masses), stacked)
