"""Decay factors of one chunk inside a kernel, in powers of two: ``exp(x) = 2^(x log2 e)``, one instruction.

Every exponent that KDA needs is the sum of some rows' log decays: from the chunk's start through a row, after a row to
the chunk's end, or between a row and a boundary inside the chunk.  Each such set of sums is a matrix of zeros and ones
``[C, C]`` times the log decays ``[C, K]``, on the tensor cores.  The matrices stand in one table (`exponent_table`).

# NOTE [Chunk anchor]
With c the sum from the chunk's start through a row, all pairs of the chunk meet in one step,

    D_ij = row_i * col_j        row_i = 2^(c_i + SHIFT)        col_j = 2^(-c_j - SHIFT)        while c > -RANGE

as long as the factors are numbers.  Below that a row is far from the start, in that channel: row_i is taken as zero
there, and what the row receives comes from smaller steps, NOTE [Levels] and NOTE [Tile anchor] in the forward, NOTE
[Row tiles] in the backward, which are left out where no row of the chunk is far.  Which way a row takes in a channel
depends on rows up to it only, so causality holds bit for bit.  Only bfloat16 has the range for this.

The shift leaves room on both sides.  In the backward it is 80 of a range of 160 (111 nats within 64 tokens), so that
gradients may be large or small.  The forward meets states, which norms inside keep below what 2^104 leaves them (23
bits and a sign): 104 of 220.  Without norms inside it is 80 of 180.  With random softplus gates 28 % of the slices of
64 channels have rows beyond 160 bits, 6 % beyond 208, 3 % beyond 224.

# NOTE [Row tiles]
A chunk is divided into tiles of 16 or 32 rows.  With far rows, the backward lets rows i of tile I meet all rows j <= i
of the chunk in one step,

    D_ij = row_i * col_j        row_i = 2^c_i        col_j = 2^(sum after j to the tile's start)   j before tile I
                                                     col_j = 2^-c_j                                j in tile I

with c the sum from the start of a row's own tile through the row, so that every row has one factor, whatever it meets,
and each step adds to sums that stay in place.

# NOTE [Levels]
The forward takes fewer steps for far rows, each with factors of its own: pairs inside tiles first, then pairs of rows
in neighbouring tiles, then, where tiles have 16 rows, in neighbouring pairs of tiles.  In the last two, row = 2^x and
col = 2^x with x the sum between a row and the boundary of its block with its neighbour.  On one H100 at T 8192, H 96,
all rows this way and tiles of 16 rows, the kernel took 1.66 ms so and 1.90 ms by row tiles.

# NOTE [Tile anchor]
Inside a tile col_j grows.  A factor of 2^56 on rows and 2^-56 on columns puts the middle of float32's range where c is
-56, so both are numbers of float32, bfloat16 and tf32 while -c stays below 172.  Where c_i is below that in a channel,
row_i is taken as zero there: what the row receives from other tiles is below 2^-172, and what it receives inside its
tile comes from a tree of steps more, whose exponents are never positive, whatever the gate:

    diagonal        i = j                                             row = 1        col = 1
    level l         i, j in neighbouring blocks of 2^l rows           row = 2^x      col = 2^x

x is the sum between a row and the boundary of its block with its neighbour, l = 0 ... 3 or 4.  A row that takes the
tree is far from the chunk's start, too, in the backward (-172 against -160, whatever the sums' rounding); the forward,
whose range is wider, asks.  float16 cannot hold the growing factors and always takes the tree inside tiles; float32
does so too, for its digits.

Where a gate's lower bound is -7 or above, no 16 rows reach -172 (16 * 7 * log2 e = 161.6): tiles have 16 rows, and
kernels no tree.  Other gates have no such bound, and tiles of 32 rows, half as many: with random gates about a quarter
of the chunks have far rows, but hardly any has a row below -172 within 32.

# NOTE [Reset clamp]
A log decay below -160 (bits; -110 nats) is taken as -160.  2^-160 is zero in float32 already, and every factor that
contains the token contains the rest as factors of at most one, so no result changes; but small terms keep their digits
in a sum beside a reset (g = -1000).

# NOTE [Vectors from products]
For compute capability 10.0 Triton 3.6 and 3.7 do not compile the sum, or the least, of a vector that was itself reduced
from a product of the tensor cores.  Both axes at once work, and so does a vector that has been through memory.

# NOTE [Split sums]
The tensor cores round their operands.  Zeros and ones are exact; g is given in two parts of 16 bits, bfloat16 or
float16, so a term of -7 is off by less than 1e-4, below the rounding of the factors that it makes.  For float32 inputs
tf32 in three passes keeps float32's digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from hybrid_flex.checks import is_plain

INTERPRETED = tl.constexpr(knobs.runtime.interpret)

# Where matrices stand in the table: `exponent_table`.  Level l of blocks is number TREE + 1 + l.
ROWS, FROM_START, TO_END, FROM_ROW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
ONE, TREE = tl.constexpr(4), tl.constexpr(5)


def _exponent_table(C: int, tile_rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    i, j = torch.arange(C, device=device)[:, None], torch.arange(C, device=device)[None, :]
    i_tile, j_tile = i // tile_rows, j // tile_rows
    level = torch.arange(C.bit_length() - 1, device=device)[:, None, None]
    tile = torch.arange(C // tile_rows, device=device)[:, None, None]
    # Few pieces: a compiler makes one kernel of them, and one of each of many.
    sums = torch.stack([(i_tile == j_tile) & (j <= i), j <= i, j > i, j >= i, i == j, (i < 0) & (j < 0)])
    to_boundary = (i >> level == j >> level) & torch.where((i >> level) % 2 == 1, j <= i, j > i)
    before = (i_tile < tile) & (j > i) & (j_tile < tile)
    inside = (i_tile == tile) & (j_tile == tile) & (j <= i)
    to_tile = before.int() - inside.int()
    return torch.cat([sums.to(dtype), to_boundary.to(dtype), to_tile.to(dtype)])


_exponent_tables: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}


def exponent_table(C: int, tile_rows: int, like: Tensor) -> Tensor:
    """Return the matrices that sum log decays into exponents, ``[n, C, C]``, of zeros, ones, minus ones.

    In this order: the sums from the start of each row's tile through the row (NOTE [Row tiles]); from the chunk's start
    through each row, after each row to its end, from each row to its end; one; the diagonal and the levels of blocks
    of 1, 2, 4 ... C / 2 rows (NOTE [Tile anchor], NOTE [Levels]); columns for each row tile.  They have the dtype and
    device of ``like``.
    """
    key = (C, tile_rows, like.dtype, like.device)
    if not is_plain(like):
        return _exponent_table(*key)
    if key not in _exponent_tables:
        table = _exponent_table(*key)
        if like.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return table  # which lies in the memory of that graph
            torch.cuda.current_stream(like.device).synchronize()  # once: calls on other streams will read it, too
        _exponent_tables[key] = table
    return _exponent_tables[key]


@triton.jit
def instruct(x, TEXT: tl.constexpr):
    """Return what one instruction, without side effects, makes of float32 x."""
    return tl.inline_asm_elementwise(TEXT, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x):
    """Return 2^x, with zero for results below 2^-126; one instruction, which Triton's own exp2 wraps in three."""
    return tl.exp2(x) if INTERPRETED else instruct(x, "ex2.approx.ftz.f32 $0, $1;")


@triton.jit
def reciprocal(x):
    """Return 1 / x to the last digit but one of float32."""
    return 1.0 / x if INTERPRETED else instruct(x, "rcp.approx.ftz.f32 $0, $1;")


@triton.jit
def log2(x):
    """Return the binary logarithm of x, one of float32's normal numbers, to 2^-22 of the result or of one."""
    return tl.log2(x) if INTERPRETED else instruct(x, "lg2.approx.ftz.f32 $0, $1;")


@triton.jit
def opaque_zero(PHASE: tl.constexpr, step=0):
    """Return 0 in a way that the compiler cannot see through, another one for every phase and step: NOTE [Phases].

    # NOTE [Phases]
    A long kernel is written in phases that share only the sums they add up.  Every phase reads its operands again, from
    the cache, by addresses to which it adds a zero of its own.  The compiler would otherwise find that it has computed
    these addresses, loaded these rows or formed these products before, and keep all of them in registers from the first
    phase to the last, where they push out the sums.  A loop that only passes the sums of earlier phases on holds them
    (`hold`): the compiler would otherwise put off their last additions until after the loop, and keep the terms.

    All of this is assembly without side effects: torch.compile, which reads off a kernel what it writes, takes a kernel
    with any other assembly to write to all its arguments, the raw inputs included.  That rules out Triton's volatile
    form, which stays where it stands; here an operand that changes from phase to phase or step to step does the same.
    """
    if INTERPRETED:
        return 0
    else:
        TEXT: tl.constexpr = "and.b32 $0, $1, 0; // " + PHASE
        return tl.inline_asm_elementwise(TEXT, "=r,r", [step], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def hold(b_x, step):
    """Return float32 x, which a loop that does this in every step gets ready-made: NOTE [Phases]."""
    if INTERPRETED:
        return b_x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f,r", [b_x, step], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return reciprocal(1.0 + exp2(-1.4426950408889634 * x))


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), without overflow and with float32's digits for large negative x."""
    e = exp2(-1.4426950408889634 * tl.abs(x))
    # log(1 + e) loses the digits of a small e; its series does not.
    return tl.maximum(x, 0.0) + tl.where(
        e < 2e-2, e * (1.0 - e * (0.5 - e * 0.3333333)), 0.6931471805599453 * log2(1.0 + e)
    )


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
def cast(b_x, DT: tl.constexpr):
    """Round float32 to DT, two numbers an instruction where Triton would spend four on them."""
    if INTERPRETED or b_x.dtype != tl.float32 or (tl.bfloat16 != DT and tl.float16 != DT):
        return b_x.to(DT)
    elif tl.bfloat16 == DT:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [b_x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [b_x], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def widen(b_x, step):
    """Return x in float32, converted in every step of a loop: NOTE [Phases].

    The compiler takes the conversion of what a loop does not change out of the loop, where it costs two registers a
    pair of numbers instead of one.
    """
    if INTERPRETED or b_x.dtype != tl.bfloat16:
        return b_x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r,r,r",
            [b_x, step],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )


@triton.jit
def split(b_x, DT: tl.constexpr):
    """Return x as a sum of two parts of the type of the products: NOTE [Split sums]."""
    b_high = cast(b_x, DT)
    return b_high, cast(b_x - b_high.to(tl.float32), DT)


@triton.jit
def load_matrix(p_table, index, C: tl.constexpr):
    """Load a matrix [C, C] of the table."""
    i_row, i_col = tl.arange(0, C)[:, None].to(tl.int64), tl.arange(0, C)[None, :]
    return tl.load(p_table + index * (C * C) + i_row * C + i_col, eviction_policy="evict_last")


@triton.jit
def sum_rows(b_m, b_high, b_low):
    """Return the sums [C, K] of rows of high + low that the matrix ``b_m [C, C]`` names."""
    if tl.float32 == b_m.dtype:
        b_sum = tl.dot(b_m, b_high, input_precision="tf32x3")
    else:
        b_sum = tl.dot(b_m, b_low, tl.dot(b_m, b_high))
    return b_sum


@triton.jit
def as_product(b_one, b_x):
    """Return x [C, K] in float32, laid out over the threads as products are: the matrix one times x, exactly.

    Loaded the usual way x would pass through shared memory once more, in float32, to be laid out like that.  In a loop
    x stays in shared memory, as an operand, and comes into registers in every turn that needs it.
    """
    if tl.float32 == b_one.dtype:
        b_x = tl.dot(b_one, b_x, input_precision="tf32x3")
    else:
        b_x = tl.dot(b_one, b_x)
    return b_x


@triton.jit
def meets(step, C: tl.constexpr, UNIT: tl.constexpr):
    """Return [C, C], whether rows i >= j meet in a unit of UNIT rows, 0, or in neighbouring blocks of 2^(step-1) units.

    What it says of i < j means nothing.
    """
    i, j = tl.arange(0, C)[:, None] // UNIT, tl.arange(0, C)[None, :] // UNIT
    return ((i ^ j) >= (1 << step) // 2) & ((i ^ j) < (1 << step))


@triton.jit
def is_far(b_c, RANGE: tl.constexpr):
    """Tell where c is below what the chunk's anchor can carry: NOTE [Chunk anchor]."""
    return b_c < -1.0 * RANGE


@triton.jit
def anchor_rows(b_c, SHIFT: tl.constexpr, RANGE: tl.constexpr):
    """Return the factors of rows for the chunk's anchor, zero where a row is far: NOTE [Chunk anchor]."""
    return exp2(tl.where(is_far(b_c, RANGE), -1000.0, b_c + SHIFT))


@triton.jit
def anchor_columns(b_row):
    """Return the factors of columns for the chunk's anchor, from those of rows: zero where a row is far."""
    return tl.where(b_row > 0.0, reciprocal(b_row), 0.0)


@triton.jit
def row_decay(b_c, ANCHOR: tl.constexpr, SAFE: tl.constexpr):
    """Return the factors of rows from the sums c: NOTE [Tile anchor]."""
    if ANCHOR:
        b_c += 56.0
        if not SAFE:
            b_c = tl.where(b_c < -116.0, -1000.0, b_c)
    return exp2(b_c)


@triton.jit
def col_decay(b_x, ANCHOR: tl.constexpr, SAFE: tl.constexpr):
    """Return the factors of columns for a row tile from their exponents; zero where no row uses them."""
    if ANCHOR:
        b_x -= 56.0
        if not SAFE:
            b_x = tl.where(b_x > 116.0, -1000.0, b_x)
    else:
        b_x = tl.where(b_x > 0.0, -1000.0, b_x)
    return exp2(b_x)


@triton.jit
def tree_decay(b_x, b_c, ANCHOR: tl.constexpr):
    """Return the factors of rows in a step of the tree; zero where a row uses the tile anchor."""
    if ANCHOR:
        b_x = tl.where(b_c + 56.0 < -116.0, b_x, -1000.0)
    return exp2(b_x)


@triton.jit
def needs_tree(b_c, ANCHOR: tl.constexpr):
    """Tell whether some row of the chunk needs the tree in some channel."""
    if ANCHOR:  # not along one axis, then the other: NOTE [Vectors from products]
        return tl.min(b_c) + 56.0 < -116.0
    else:
        return True
