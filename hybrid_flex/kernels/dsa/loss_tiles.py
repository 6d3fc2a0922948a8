"""What the kernels of the indexer's loss share: rows of any width, and the order in which tiles are worked on.

# NOTE [Two widths]
A row of D numbers is taken as DM + DR numbers, both powers of two: 576 = 512 + 64, 192 = 128 + 64, 72 = 64 + 16 with
the last eight zero.  One power of two would multiply 1024 numbers for 576.  DR is 0 where one power is not wider.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_parts(p_rows, m_rows, D: tl.constexpr, DM: tl.constexpr, DR: tl.constexpr):
    """Load rows at pointers ``[N]`` as ``[N, DM]`` and ``[N, DR]``, zeros outside; NOTE [Two widths]."""
    i_d = tl.arange(0, DM)
    if DM > D:
        b = tl.load(p_rows[:, None] + i_d[None, :], mask=m_rows[:, None] & (i_d < D)[None, :], other=0.0)
    else:
        b = tl.load(p_rows[:, None] + i_d[None, :], mask=m_rows[:, None], other=0.0)
    b_rest = b
    if DR > 0:
        i_r = DM + tl.arange(0, DR)
        b_rest = tl.load(p_rows[:, None] + i_r[None, :], mask=m_rows[:, None] & (i_r < D)[None, :], other=0.0)
    return b, b_rest


@triton.jit
def products(b_x, b_x_rest, b_y, b_y_rest, DR: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply rows of x with rows of y, both in two parts: ``[N, M]`` in float32."""
    b_xy = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)
    if DR > 0:
        b_xy = tl.dot(b_x_rest, tl.trans(b_y_rest), b_xy, input_precision=PRECISION)
    return b_xy


@triton.jit
def finite_or_zero(x):
    """Replace -inf, the maximum of nothing, by 0, so that it can be subtracted."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def place_in_group(i_program, NT, NC, GROUP: tl.constexpr):
    """Return row and column of a tile: GROUP rows of tiles are walked column by column.

    Programs that run at the same time then share the rows of q and of k that they read, in a group's square.
    """
    i_group = i_program // (GROUP * NC)
    height = tl.minimum(NT - i_group * GROUP, GROUP)
    i_inside = i_program % (GROUP * NC)
    return i_group * GROUP + i_inside % height, i_inside // height
