"""The shape of a looped model, whatever its family: all that runtime and manifest need to know of it. Import-light."""

from dataclasses import asdict, dataclass

from mythos_edge.model.errors import BundleError

# Every loop step has cache slots of its own, so that a mistyped number would fill the memory with empty slots. The
# deepest published model takes 64 loop steps.
MOST_DEPTH = 4096
_MOST_SLOTS = 1 << 12
# The output of a position: the sum of its states, each with its halting mass; the state of the last loop step that it
# took, which a gate decides; or the state of the last of all, where nothing halts and depth is the request's to choose.
EXIT_RULES = ("weighted", "gate", "none")
# What a value of a cached row can be kept in, and its bytes. In int8 each part of a row has a scale of two more values.
CACHE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
NARROW_CACHES = ("fp16", "int8")
_SCALE_VALUES = 2
_LARGEST = (1 << 31) - 1


@dataclass(frozen=True)
class LoopedModel:
    """Sizes of a looped model.

    ``cache_width`` values are kept by one position in one cache slot. ``step_slots`` are those of one loop step, one
    for each inner layer. A request takes ``max_depth`` loop steps unless it says otherwise, which are those that were
    trained, unless ``trained_depth`` is more. ``threshold`` is the halting mass that ends a position's loop.
    ``attention`` is latent or grouped, ``head_dim`` the size of a query, and ``experts_per_token`` the routed experts
    that each loop step chooses, 0 without any. ``exit_rule`` is one of ``EXIT_RULES``.
    ``slot_windows`` says of each slot (of the prelude, of one loop step, of the coda) how many positions a row of it
    sees, its own included, and 0 for all; it is empty where all see all.
    ``cache_parts`` are the widths of what has a scale of its own where a cached row is kept in int8, such as the key
    and the value of each head; it is empty where a row is one part, or one of keys and one of values. A row of grouped
    attention is keys, then as many values: each has half of the parts.
    Raises BundleError for numbers that no model has.
    """

    vocab_size: int
    dim: int
    cache_width: int
    prelude_slots: int
    step_slots: int
    coda_slots: int
    max_depth: int
    threshold: float
    attention: str
    head_dim: int
    experts_per_token: int
    exit_rule: str = "weighted"
    trained_depth: int = 0
    slot_windows: tuple[int, ...] = ()
    cache_parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bounds = {"prelude_slots": (0, _MOST_SLOTS), "step_slots": (1, _MOST_SLOTS), "coda_slots": (0, _MOST_SLOTS)}
        bounds |= {"max_depth": (1, MOST_DEPTH), "trained_depth": (0, MOST_DEPTH)}
        bounds |= {"experts_per_token": (0, _MOST_SLOTS * 16)}
        for name, value in asdict(self).items():
            least, most = bounds.get(name, (1, _LARGEST))
            if isinstance(value, int) and not least <= value <= most:
                raise BundleError(f"model.{name} is {value}, expected {least} to {most}")
        slots, windows = sum(self.slots.values()), self.slot_windows
        if windows and (len(windows) != slots or not all(0 <= window <= _LARGEST for window in windows)):
            given = f"{len(windows)} numbers" if len(windows) > 8 else list(windows)
            raise BundleError(f"model.slot_windows is {given}, expected {slots} numbers of positions, or none")
        parts = self.cache_parts
        if parts and (len(parts) > _MOST_SLOTS or min(parts) < 1 or sum(parts) != self.cache_width):
            given = f"{len(parts)} numbers" if len(parts) > 8 else list(parts)
            raise BundleError(
                f"model.cache_parts is {given}, expected widths that add up to {self.cache_width}, or none"
            )
        unlike = len(parts) % 2 or any(2 * sum(half) != self.cache_width for half in self.halves)
        if parts and self.attention == "grouped" and unlike:
            given = f"{len(parts)} numbers" if len(parts) > 8 else list(parts)
            raise BundleError(
                f"model.cache_parts is {given}, expected of grouped attention widths of keys, then of as many values, "
                f"and each to add up to half of {self.cache_width}"
            )
        if not self.threshold > 0:
            raise BundleError(f"model.threshold is {self.threshold}, expected a number above 0")
        if self.attention not in ("latent", "grouped"):
            raise BundleError(f"model.attention is {self.attention!r}, expected latent or grouped")
        if self.exit_rule not in EXIT_RULES:
            raise BundleError(f"model.exit_rule is {self.exit_rule!r}, expected one of {', '.join(EXIT_RULES)}")

    @property
    def deepest(self) -> int:
        """The most loop steps that were trained."""
        return max(self.max_depth, self.trained_depth)

    @property
    def halts(self) -> bool:
        """Whether positions halt by themselves."""
        return self.exit_rule != "none"

    @property
    def slots(self) -> dict[str, int]:
        """Cache slots that one run of each stage reads and writes."""
        return {"prelude": self.prelude_slots, "step": self.step_slots, "coda": self.coda_slots}

    @property
    def windows(self) -> dict[str, tuple[int, ...]]:
        """The windows of the slots of each stage, 0 for a slot whose rows see all."""
        given = iter(self.slot_windows)
        return {stage: tuple(next(given, 0) for _ in range(count)) for stage, count in self.slots.items()}

    @property
    def parts(self) -> tuple[int, ...]:
        """The widths of the parts of a cached row."""
        if self.cache_parts:
            return self.cache_parts
        return (self.cache_width // 2,) * 2 if self.attention == "grouped" else (self.cache_width,)

    @property
    def halves(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The widths of the parts of keys and of values, in a row of grouped attention."""
        count = len(self.parts) // 2
        return self.parts[:count], self.parts[count:]

    def row_width(self, cache: str) -> int:
        """Values of a row that is kept in ``cache``, one of ``CACHE_BYTES``, with the scales of int8."""
        return self.cache_width + (_SCALE_VALUES * len(self.parts) if cache == "int8" else 0)

    def row_bytes(self, cache: str) -> int:
        """Bytes of a row that is kept in ``cache``."""
        return self.row_width(cache) * CACHE_BYTES[cache]
