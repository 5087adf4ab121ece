"""Numbers from rounded weights, by arithmetic that every GPU has: int8, int4 and float8 e4m3 codes."""

import triton
import triton.language as tl


@triton.jit
def numbers(code, WEIGHTS: tl.constexpr):
    """The float32 numbers of a tile of int8 or float8 codes; those of float8 are 256 times too small.

    The bits of an integer are written into the mantissa of 2^23, which is many times faster than a conversion.
    """
    if WEIGHTS == "fp8":
        # Exponent and mantissa sit in a float16 as they are; only the bias differs, by 8. NaN codes are not written.
        bits = ((code.to(tl.int16) & 0x80) << 8) | ((code.to(tl.int16) & 0x7F) << 7)
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    bits = (code.to(tl.int32) & 0xFF) ^ 0x4B000080
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def number_pairs(code):
    """The float32 numbers of a tile of bytes with two int4 codes each: the even elements and the odd ones."""
    wide = code.to(tl.int32)
    even = ((wide & 0xF) ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0
    odd = (((wide >> 4) & 0xF) ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0
    return even, odd


@triton.jit
def group_scales(scale, index, length, blocks, start, inside, WEIGHTS: tl.constexpr, DEPTH: tl.constexpr):
    """The scales (rows, DEPTH / 32) of what ``numbers`` makes of rows ``index`` from ``start`` on, in groups of 32.

    A row of ``length`` codes has ``blocks`` of them; ``inside`` says which rows there are.
    """
    column = start + 32 * tl.arange(0, DEPTH // 32)
    mask = inside[:, None] & (column < length)[None, :]
    block = column // (length // blocks)
    each = tl.load(scale + index[:, None] * blocks + block[None, :], mask=mask, other=0.0).to(tl.float32)
    return each * 256.0 if WEIGHTS == "fp8" else each


@triton.jit
def silu(gate):
    return gate / (1.0 + tl.exp(-gate))
