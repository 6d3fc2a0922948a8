"""Decay factors of one chunk inside a kernel, in powers of two: ``exp(x) = 2^(x log2 e)``, one instruction.

A chunk of C rows is N = C / 16 tiles.  With c the sum of log decays from a tile's first row through a row, and T a
tile's total, every exponent that KDA needs is c or T - c plus the totals of some other tiles, and none is positive
(NOTE [Decay tree] in ops/kda/decay.py has the levels).  c is a matrix of zeros and ones times the log decays, on the
tensor cores; nothing is the difference of two sums longer than a tile.

# NOTE [Reset clamp]
A log decay below -160 (bits; -110 nats) is taken as -160.  2^-160 is zero in float32 already, and every factor that
contains the token contains the rest as factors of at most one, so no result changes; but small terms keep their digits
in a sum beside a reset (g = -1000).

# NOTE [Split sums]
The tensor cores round their operands.  Zeros and ones are exact; g is given in two parts of bfloat16, 16 bits, so a sum
of 16 terms of -7 is off by less than 1e-3, below the rounding of the bfloat16 factors that it makes.  For float16 and
float32 inputs tf32 in three passes keeps float32's digits.

# NOTE [Tile anchor]
Inside a tile D_ij = 2^c_i 2^-c_j.  While -c stays below 116 (the lower-bound gate with -5 allows 16 * 5 * log2 e =
115.4) both factors are numbers of float32, bfloat16 and tf32, and one product serves the whole tile.  A row whose sum
is below -116 in some channel takes the four levels of the tree instead.  Which of the two a row takes depends on rows
up to it only, so causality holds bit for bit.  float16 cannot hold the factors and always takes the tree.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)); a reciprocal by rsqrt is two instructions, a division eight."""
    r = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return r * r


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), without overflow and exact for large negative x to the last digits of float32."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    # log(1 + e) loses the digits of a small e; its series does not.
    return tl.maximum(x, 0.0) + tl.where(e < 1e-3, e * (1.0 - 0.5 * e), tl.log(1.0 + e))


@triton.jit
def log2_decay(b_z, slope, lower_bound, GATE: tl.constexpr, LOWER: tl.constexpr):
    """Return the log decay, in bits, of raw gates ``z = g + dt_bias``, or of z where the caller applied the gate."""
    if GATE:
        if LOWER:
            b_z = (1.4426950408889634 * lower_bound) * sigmoid(slope * b_z)
        else:
            b_z = (-1.4426950408889634 * slope) * softplus(b_z)
    else:
        b_z = 1.4426950408889634 * b_z
    return tl.maximum(b_z, -160.0)


@triton.jit
def sum_rows(m_rows, b_x, DT: tl.constexpr):
    """Sum the rows of x [C, K] that each row of the 0/1 matrix ``m_rows [C, C]`` names: NOTE [Split sums]."""
    if tl.bfloat16 == DT:
        b_high = b_x.to(tl.bfloat16)
        b_low = (b_x - b_high.to(tl.float32)).to(tl.bfloat16)
        b_m = m_rows.to(tl.bfloat16)
        b_sum = tl.dot(b_m, b_high)
        b_sum = tl.dot(b_m, b_low, b_sum)
    else:
        b_sum = tl.dot(m_rows.to(tl.float32), b_x, input_precision="tf32x3")
    return b_sum


@triton.jit
def sum_in_tile(b_g, C: tl.constexpr, DT: tl.constexpr):
    """Return c [C, K], the sum of log decays from the start of each row's tile through the row."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return sum_rows((i // 16 == j // 16) & (j <= i), b_g, DT)


@triton.jit
def store_totals(p_tiles, b_c, C: tl.constexpr, K: tl.constexpr, SK: tl.constexpr):
    """Store the totals of the tiles, the last row of c [C, SK] in each, into columns of ``[N, K]``."""
    i, k = tl.arange(0, C)[:, None], tl.arange(0, SK)[None, :]
    tl.store(p_tiles + (i // 16) * K + k, b_c, mask=i % 16 == 15)


@triton.jit
def load_total(p_tiles, tile: tl.constexpr, first, C: tl.constexpr, K: tl.constexpr, SK: tl.constexpr):
    """Load the total of a tile, ``[SK]`` from a column on; zero where the chunk has no such tile."""
    if tile * 16 < C:
        b_total = tl.load(p_tiles + tile * K + first + tl.arange(0, SK))
    else:
        b_total = tl.zeros((SK,), dtype=tl.float32)
    return b_total


@triton.jit
def by_tile(b_0, b_1, b_2, b_3, C: tl.constexpr):
    """Give the rows of each tile a vector of their own: four ``[K]`` into ``[C, K]``."""
    tile = tl.arange(0, C)[:, None] // 16
    b_low = tl.where(tile == 0, b_0[None, :], b_1[None, :])
    if C > 32:
        b_low = tl.where(tile < 2, b_low, tl.where(tile == 2, b_2[None, :], b_3[None, :]))
    return b_low


@triton.jit
def decay_from_start(b_c, p_tiles, first, C: tl.constexpr, K: tl.constexpr, SK: tl.constexpr):
    """Return P [C, SK], the decay from the chunk's start through each row, from c and the totals of the tiles.

    Columns ``first`` and up of the stored totals ``[N, K]`` are read here, and again by every stage that needs them:
    kept in registers, the totals and their sums would fill them.
    """
    b_0 = load_total(p_tiles, 0, first, C, K, SK)
    b_1 = b_0 + load_total(p_tiles, 1, first, C, K, SK)
    b_2 = b_1 + load_total(p_tiles, 2, first, C, K, SK)
    return tl.exp2(b_c + by_tile(b_0 * 0.0, b_0, b_1, b_2, C))


@triton.jit
def decay_to_end(b_c, p_tiles, first, C: tl.constexpr, K: tl.constexpr, SK: tl.constexpr):
    """Return E [C, SK], the decay after each row to the chunk's end."""
    b_3 = load_total(p_tiles, 3, first, C, K, SK)
    b_2 = b_3 + load_total(p_tiles, 2, first, C, K, SK)
    b_1 = b_2 + load_total(p_tiles, 1, first, C, K, SK)
    b_0 = b_1 + load_total(p_tiles, 0, first, C, K, SK)
    return tl.exp2(by_tile(b_0, b_1, b_2, b_3, C) - b_c)


@triton.jit
def decay_to_tile_boundary(b_c, p_tiles, first, level, C: tl.constexpr, K: tl.constexpr, SK: tl.constexpr):
    """Return [C, SK], the decay between each row and the boundary of its block of 2^level = 16 or 32 rows.

    Rows of a right block decay from the boundary with their left neighbour, rows of a left block to it.  The tiles
    between a row's own and the boundary: for blocks of 16 none; for 32 tile 1 for rows of tile 0, tile 2 for tile 3.
    """
    is_right = ((tl.arange(0, C)[:, None] >> level) & 1) == 1
    is_32 = (level - 4) * 1.0
    b_0 = load_total(p_tiles, 0, first, C, K, SK)
    b_1 = load_total(p_tiles, 1, first, C, K, SK) * is_32
    b_2 = load_total(p_tiles, 2, first, C, K, SK)
    b_other = by_tile(b_0 + b_1, b_1, b_2 * (1.0 - is_32), b_2 * is_32, C)
    return tl.exp2(b_other + tl.where(is_right, b_c, -b_c))


@triton.jit
def decay_to_row_boundary(b_g, level, C: tl.constexpr, DT: tl.constexpr):
    """Return [C, K], the same for blocks of 2^level = 1, 2, 4 or 8 rows, inside tiles.

    # NOTE [Run-time level]
    These levels are counted by a loop that stays one.  Unrolled, the comparisons of all levels would be made at the
    start and held in registers until they are used, which pushes everything else out.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    is_right = ((i >> level) & 1) == 1
    return tl.exp2(sum_rows(((i >> level) == (j >> level)) & ((j <= i) == is_right), b_g, DT))


@triton.jit
def meets(level, C: tl.constexpr):
    """Return [C, C], whether rows i, j stand in the right and the left of two neighbouring blocks of 2^level rows."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return ((i >> level) > (j >> level)) & ((i >> (level + 1)) == (j >> (level + 1)))
