"""The rotary table that a checkpoint holds, against the one its config implies.

The reference computes with the stored table: it is a part of the model. Complex, it holds a rotation for each position
and frequency. Real, it holds the cosines alone (what ``model.to(bfloat16)`` leaves of a complex buffer); the reference
then multiplies by them and turns nothing. Some rows are read, so that memory does not grow with the table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mythos_edge.model.errors import CheckpointError, ConfigError
from mythos_edge.model.families.openmythos.config import MythosConfig
from mythos_edge.model.layers import rope_frequencies
from mythos_edge.model.tensor_files import TensorEntry

ROPE_TABLE_CHOICES = ("config", "stored")
# How far an angle may lie from the config's, relative to it: powers and products of float32 differ by some units in
# the last place between machines.
_ANGLE_ERROR = 1e-6
_LENGTH_ERROR = 1e-5
_MOST_DIGITS = 9
_WAYS_ON = (
    "choose --rope-table config (rotate as the config says) or --rope-table stored (use the file's table as it is)"
)
_COMPLEX = (torch.complex64, torch.complex128)
_REAL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WIDE = (*_COMPLEX, torch.float32, torch.float64)

Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class StoredTable:
    """A checkpoint's table: ``entry`` says where, ``rows`` reads some of it in the file's dtype."""

    entry: TensorEntry
    rows: Rows

    @property
    def length(self) -> int:
        """Positions it covers."""
        return self.entry.shape[0]

    @property
    def width(self) -> int:
        """Frequencies it covers: half the rotary dimension."""
        return self.entry.shape[1]

    @property
    def is_real(self) -> bool:
        """Whether it holds cosines alone."""
        return len(self.entry.shape) == 2 and self.entry.dtype in _REAL

    @property
    def dtype(self) -> str:
        return str(self.entry.dtype).removeprefix("torch.")

    def check_length(self, max_context: int, path: str) -> None:
        """Raises ConfigError when it has fewer positions than are wanted."""
        if max_context > self.length:
            raise ConfigError(
                f"{path}: the rotary table {self.entry.name} has {self.length} positions, wanted are {max_context}: "
                f"--max-context {self.length} at most with --rope-table stored, or --rope-table config"
            )

    @property
    def malformed(self) -> bool:
        """Whether its axes or its dtype are those of no table."""
        shape, dtype = self.entry.shape, self.entry.dtype
        if 0 in shape:
            return True
        pairs = len(shape) == 3 and shape[2] == 2 and dtype in _REAL
        return not pairs and (len(shape) != 2 or dtype not in _COMPLEX + _REAL)

    def check(self, path: str) -> None:
        """Raises CheckpointError for a table that is none: malformed, or not finite in a row that is looked at."""
        name, shape = self.entry.name, self.entry.shape
        if self.malformed:
            raise CheckpointError(
                f"{path}: the rotary table {name} has shape {shape} and dtype {self.dtype}, expected (positions, "
                "frequencies) of complex64: --rope-table config computes it again from the config"
            )
        for start in self._looked_at():
            if not all(torch.isfinite(part).all() for part in cos_and_sin(self.rows(start, start + 1))):
                raise CheckpointError(
                    f"{path}: the rotary table {name} holds NaN or infinity at position {start}: "
                    "--rope-table config computes it again from the config"
                )

    def check_width(self, config: MythosConfig, path: str) -> None:
        """Raises CheckpointError when it is of another rotary dimension than the model."""
        if self.width != config.rope_dim // 2:
            raise CheckpointError(
                f"{path}: the rotary table {self.entry.name} has {self.width} frequencies, the model has "
                f"{config.rope_dim // 2}: --rope-table config computes it again from the config"
            )

    def theta(self) -> float | None:
        """The shortest number that the table can be made from; None when no number, or more than one, makes it.

        A table of cosines alone, or of fewer than two positions or frequencies, or of narrow numbers, tells none.
        """
        if self.is_real or self.length < 2 or self.width < 2 or self.entry.dtype not in _WIDE:
            return None
        cos, sin = (part.double() for part in cos_and_sin(self.rows(1, 2)))
        slowest = math.atan2(sin[0, -1].item(), cos[0, -1].item())
        if not 0 < slowest < 1:
            return None
        # The slowest frequency is theta to the power -(width - 1) / width.
        near = slowest ** (-self.width / (self.width - 1))
        numbers = (float(f"{near:.{digits}e}") for digits in range(_MOST_DIGITS)) if near < 1e300 else ()
        return next((number for number in numbers if self.made_from(number)), None)

    def made_from(self, theta: float) -> bool:
        """Whether ``theta`` gives the rows, but for what float32 leaves open on another machine."""
        frequencies = rope_frequencies(2 * self.width, theta)
        narrow = torch.finfo(self.entry.dtype).eps
        for start in self._looked_at():
            cos, sin = (part.double()[0] for part in cos_and_sin(self.rows(start, start + 1)))
            angles = (start * frequencies).double()
            allowed = _ANGLE_ERROR * angles + 2 * narrow * angles.clamp(max=1.0)
            off = torch.atan2(sin, cos) - angles
            off = (off - (off / (2 * math.pi)).round() * 2 * math.pi).abs()
            length = (torch.hypot(cos, sin) - 1.0).abs()
            if not ((off <= allowed).all() and (length <= _LENGTH_ERROR + 2 * narrow).all()):
                return False
        return True

    def _looked_at(self) -> list[int]:
        """The first positions, then ever fewer, and the last."""
        spread = [2**power - back for power in range(self.length.bit_length()) for back in (0, 1)]
        return sorted({*range(min(8, self.length)), *(i for i in spread if i < self.length), self.length - 1})


def cos_and_sin(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and sines that the reference multiplies with, of some rows of a stored table; float32 at least.

    Source: ``apply_rope``, the product of complex pairs with the table: a real number multiplies both members of a
    pair alike, as a cosine without a sine does. Differs: a last axis of two is read as the parts of a complex number,
    as files have it whose format knows none.
    """
    if rows.is_complex():
        return rows.real.contiguous(), rows.imag.contiguous()
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (wide, torch.zeros_like(wide)) if wide.ndim == 2 else (wide[..., 0].contiguous(), wide[..., 1].contiguous())


def unlike_the_config(
    table: StoredTable, config: MythosConfig, origin: str, path: str
) -> tuple[str, ConfigError] | None:
    """How the table differs from the config's ("real" or "theta") and the error that says so; None where it does not.

    ``origin`` is where the config's rope_theta comes from.
    """
    name = table.entry.name
    if table.is_real:
        return "real", ConfigError(
            f"{path}: the rotary table {name} is real ({table.dtype}), expected complex: model.to({table.dtype}) "
            "left its cosines only, and with those the reference multiplies without rotating: --rope-table config "
            "rotates as the config says (right if the model was only saved so), --rope-table stored computes as the "
            "reference does with this file"
        )
    if table.made_from(config.rope_theta):
        return None
    theta = table.theta()
    what = "is of no rope_theta (scaled?)" if theta is None else f"was made with rope_theta {theta!r}"
    mend = "" if theta is None else f"give rope_theta {theta!r} in --config, or "
    return "theta", ConfigError(
        f"{origin}: rope_theta is {config.rope_theta!r}, but the rotary table {name} of {path} {what}: {mend}{_WAYS_ON}"
    )


def unknown_theta(table: StoredTable, path: str) -> ConfigError | None:
    """Why no rope_theta comes from the table, where that is its fault; None where it is too small to tell."""
    if table.is_real:
        said = f"is real ({table.dtype}) and does not tell it"
    elif table.length < 2 or table.width < 2 or table.entry.dtype not in _WIDE:
        return None
    else:
        said = "is of no rope_theta (scaled?)"
    return ConfigError(
        f"{path}: missing config field rope_theta, and the rotary table {table.entry.name} {said}: "
        f"give it in --config, and {_WAYS_ON}"
    )
