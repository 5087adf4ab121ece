"""What the runtime asks of a chunk between two loop steps, answered on the device."""

import triton
import triton.language as tl


@triton.jit
def running_columns(halt_mass, threshold, count, columns, BLOCK: tl.constexpr):
    """``count ()`` int32: 1 + index of the last of ``halt_mass (S)`` below the threshold, 0 when there is none."""
    limit = tl.load(threshold)
    last = 0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        running = inside & (tl.load(halt_mass + column, mask=inside, other=0.0) < limit)
        last = tl.maximum(last, tl.max(tl.where(running, column + 1, 0), axis=0))
    tl.store(count, last)


@triton.jit
def output_so_far(out, halt_mass, threshold, so_far, dim, CHANNELS: tl.constexpr):
    """``so_far (S, D)``: ``out`` over the halting mass where a row is running and has any, else ``out``."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mass = tl.load(halt_mass + row)
    mass = tl.where((mass > 0.0) & (mass < tl.load(threshold)), mass, 1.0)
    value = tl.load(out + row * dim + channel, mask=channel < dim, other=0.0).to(tl.float32) / mass
    tl.store(so_far + row * dim + channel, value.to(so_far.dtype.element_ty), mask=channel < dim)
