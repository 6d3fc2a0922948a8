"""Decay factors of one chunk inside a kernel: the gate, and sums of log decays as products with 0/1 matrices.

Every exponent that KDA needs is a sum of the log decays of some rows next to each other, and none is positive
(NOTE [Decay tree] in ops/kda/decay.py has the levels).  A matrix of zeros and ones, made from row numbers, times the
chunk's log decays ``g [C, K]`` gives all C sums at once on the tensor cores; nothing is ever the difference of two long
sums.

# NOTE [Reset clamp]
A log decay below -110 is taken as -110.  exp(-110) is zero in float32 already, and every factor that contains the
token contains the rest as factors of at most one, so no result changes; but small terms keep their digits in a sum
beside a reset (g = -1000).

# NOTE [Split sums]
The tensor cores round their operands.  Zeros and ones are exact; g is given in two parts of bfloat16, 16 bits, so a sum
of 64 terms of -5 is off by less than 1e-3, below the rounding of the bfloat16 factors that it makes.  For float16 and
float32 inputs tf32 in three passes keeps float32's digits.

# NOTE [Tile anchor]
Inside a tile of 16 rows D_ij = exp(c_i) exp(-c_j), c the sum from the tile's first row.  With a lower bound of -5 the
second factor is at most exp(16 * 5) = 5.5e34, a number of float32, bfloat16 and tf32, and the first at least 1.8e-35:
one product serves the whole tile, and row i depends on rows up to i only.  Without that bound, and in float16, the tile
takes the four levels of the tree.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), without overflow for either sign."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), without overflow and exact for large negative x to the last digits of float32."""
    e = tl.exp(-tl.abs(x))
    # log(1 + e) loses the digits of a small e; its series does not.
    return tl.maximum(x, 0.0) + tl.where(e < 1e-3, e * (1.0 - 0.5 * e), tl.log(1.0 + e))


@triton.jit
def log_decay(b_z, slope, lower_bound, GATE: tl.constexpr, LOWER: tl.constexpr):
    """Return the log decay of raw gates ``z = g + dt_bias``, or z itself where the caller applied the gate."""
    if GATE:
        if LOWER:
            b_z = lower_bound * sigmoid(slope * b_z)
        else:
            b_z = -slope * softplus(b_z)
    return tl.maximum(b_z, -110.0)


@triton.jit
def sum_rows(m_rows, b_x, DT: tl.constexpr):
    """Sum the rows of x [C, K] that each row of the 0/1 matrix ``m_rows [C, C]`` names: NOTE [Split sums]."""
    if DT == tl.bfloat16:
        b_high = b_x.to(tl.bfloat16)
        b_low = (b_x - b_high.to(tl.float32)).to(tl.bfloat16)
        b_m = m_rows.to(tl.bfloat16)
        b_sum = tl.dot(b_m, b_high)
        b_sum = tl.dot(b_m, b_low, b_sum)
    else:
        b_sum = tl.dot(m_rows.to(tl.float32), b_x, input_precision="tf32x3")
    return b_sum


@triton.jit
def decay_from_start(b_g, C: tl.constexpr, DT: tl.constexpr):
    """Return P [C, K]: the decay from the chunk's start through each row."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.exp(sum_rows(j <= i, b_g, DT))


@triton.jit
def decay_to_end(b_g, C: tl.constexpr, DT: tl.constexpr):
    """Return E [C, K]: the decay after each row to the chunk's end."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.exp(sum_rows(j > i, b_g, DT))


@triton.jit
def decay_to_boundary(b_g, level, C: tl.constexpr, DT: tl.constexpr):
    """Return [C, K], the decay between each row and the boundary of its block of 2^level rows with its neighbour.

    Rows of a right block decay from the block's start, rows of a left block to the block's end.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    is_right = ((i >> level) & 1) == 1
    return tl.exp(sum_rows(((i >> level) == (j >> level)) & ((j <= i) == is_right), b_g, DT))


@triton.jit
def sum_in_tile(b_g, C: tl.constexpr, DT: tl.constexpr):
    """Return [C, K], the sum of log decays from the start of each row's tile through the row."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return sum_rows((i // 16 == j // 16) & (j <= i), b_g, DT)


@triton.jit
def meets(level, C: tl.constexpr):
    """Return [C, C], whether rows i and j stand in the right and the left of two neighbouring blocks of 2^level rows.

    # NOTE [Run-time level]
    Levels are counted by loops that stay loops.  Unrolled, the comparisons of all levels are made at the start and
    held in registers until they are used, which pushes everything else out.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return ((i >> level) > (j >> level)) & ((i >> (level + 1)) == (j >> (level + 1)))
