"""Gradients of q, k and g in chunks where decays are too strong for one anchor: NOTE [Row tiles] in decay.py.

The equations are those of gradients.py.  What comes through the state, from pairs in row tiles and from pairs in the
tree inside tiles has its own factors here, one phase after another: NOTE [Phases] in decay.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import (
    FROM_START,
    ONE,
    ROWS,
    TO_END,
    TREE,
    as_product,
    cast,
    col_decay,
    exp2,
    hold,
    load_matrix,
    meets,
    needs_tree,
    opaque_zero,
    row_decay,
    split,
    sum_rows,
    tree_decay,
)
from .gradients import load_product, store_gate_gradients
from .prepare import block_pointers, chunk_place, load_gate, load_rows, store_rows
from .scan import state_pointers


@triton.jit
def load_parts(p_high, p_low, i_block, i_s, C: tl.constexpr, BK: tl.constexpr, SK: tl.constexpr):
    """Load the two parts of a slice of log decays, [C, SK]."""
    b_high = tl.load(block_pointers(p_high, i_block, i_s, C, BK, SK))
    b_low = tl.load(block_pointers(p_low, i_block, i_s, C, BK, SK))
    return b_high, b_low


@triton.jit
def tree_gradients(
    b_dq, b_dk, b_dG, b_q, b_k, b_rq, b_rk, b_high, b_low, p_table, p_dqk, p_dkk, ANCHOR: tl.constexpr,
    C: tl.constexpr, TILE: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what pairs in the tree inside tiles give to q, k and dG: NOTE [Tile anchor]."""
    for step in range(6 if TILE == 32 else 5):
        b_dq, b_dk, b_dG = hold(b_dq, step), hold(b_dk, step), hold(b_dG, step)
        zero = opaque_zero("level of the tree", step)
        b_c = sum_rows(load_matrix(p_table, ROWS + zero, C), b_high, b_low)
        b_x = sum_rows(load_matrix(p_table, TREE + step + zero, C), b_high, b_low)
        b_row, b_col = tree_decay(b_x, b_c, ANCHOR), exp2(b_x)
        b_one = load_matrix(p_table, ONE + zero, C)
        b_k32 = as_product(b_one, b_k) * b_rk[:, None]
        b_left, b_right = cast(b_k32 * b_col, DT), cast(b_k32 * b_row, DT)
        b_dxk = tl.where(meets(step, C, 1), tl.load(p_dkk), 0.0).to(DT)
        b_r = tl.dot(b_dxk, b_left, input_precision=PRECISION)
        b_dk += b_r * b_row
        b_dG += b_right * b_r
        b_t = tl.dot(tl.trans(b_dxk), b_right, input_precision=PRECISION)
        b_right = cast(as_product(b_one, b_q) * b_rq[:, None] * b_row, DT)
        b_dxk = tl.where(meets(step, C, 1), tl.load(p_dqk), 0.0).to(DT)
        b_r = tl.dot(b_dxk, b_left, input_precision=PRECISION)
        b_dq += b_r * b_row
        b_dG += b_right * b_r
        b_t = tl.dot(tl.trans(b_dxk), b_right, b_t, input_precision=PRECISION)
        b_dk += b_t * b_col
        b_dG -= b_left * b_t
    return b_dq, b_dk, b_dG


@triton.jit(do_not_specialize=["T", "NT"])
def far_inputs_kernel(
    p_do, p_q, p_k, p_g, p_dr, p_A_log, p_dt_bias, p_chunk_token, p_chunk_length, p_table,
    p_total, p_strength, p_norms, p_far, p_high, p_low, p_states, p_d_states, p_y, p_dAqk, p_dKK, p_along,
    p_dq, p_dk, p_dg, p_d_slope, p_d_bias, scale, lower_bound, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WV: tl.constexpr, BV: tl.constexpr, SK: tl.constexpr, GATE: tl.constexpr, LOWER: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr, L2NORM: tl.constexpr, ANCHOR: tl.constexpr, SAFE: tl.constexpr,
    TILE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do what `near_inputs_kernel` does, for a slice of K that has far rows; without anchors, for all."""
    # Slices of one chunk run side by side: they share what they load.
    i_block, i_s = tl.program_id(0) // (BK // SK), tl.program_id(0) % (BK // SK)
    i_chunk, i_head, i_block = i_block // HV, i_block % HV, i_block.to(tl.int64)
    if PACKED:
        token, length = tl.load(p_chunk_token + i_chunk), tl.load(p_chunk_length + i_chunk)
    else:
        token, length = chunk_place(i_chunk, T, NT, C)
    i_group, first = i_head // (HV // H), i_s * SK
    scale, lower_bound = tl.cast(scale, tl.float32), tl.cast(lower_bound, tl.float32)
    DT: tl.constexpr = p_states.dtype.element_ty
    i_token = tl.arange(0, C)

    if ANCHOR:
        far = tl.load(p_far + i_block * (BK // SK) + i_s)
    else:
        far = 1
    if far != 0:
        z, slope, b_g = load_gate(  # noqa: RUF059
            p_g, p_A_log, p_dt_bias, lower_bound, token, length, i_head, HV, K, C, SK, GATE, LOWER, HAS_SLOPE, HAS_BIAS,
            first,
        )  # fmt: skip
        # The two parts of the log decays wait in memory from one phase to the next: NOTE [Phases] in decay.py.
        b_high, b_low = split(b_g, DT)
        tl.store(block_pointers(p_high, i_block, i_s, C, BK, SK), b_high)
        tl.store(block_pointers(p_low, i_block, i_s, C, BK, SK), b_low)
        tl.debug_barrier()
        b_rq = tl.load(p_norms + i_block * (2 * C) + i_token) * scale
        b_rk = tl.load(p_norms + i_block * (2 * C) + C + i_token)
        FIRST_TILE: tl.constexpr = TREE + (7 if C == 64 else 6 if C == 32 else 5)

        # Pairs: NOTE [Row tiles], NOTE [Pairs cancel].
        zero = opaque_zero("factors of rows")
        b_high, b_low = load_parts(p_high, p_low, i_block + zero, i_s, C, BK, SK)
        b_row = row_decay(sum_rows(load_matrix(p_table, ROWS + zero, C), b_high, b_low), ANCHOR, SAFE)
        b_q = load_product(p_table, p_q, token, length, i_group, H, K, first, zero, C, SK)
        b_right_q = cast(b_q * b_rq[:, None] * b_row, DT)
        b_k = load_product(p_table, p_k, token, length, i_group, H, K, first, zero, C, SK)
        b_right_k = cast(b_k * b_rk[:, None] * b_row, DT)
        b_dq = tl.zeros((C, SK), dtype=tl.float32)
        b_r = tl.zeros((C, SK), dtype=tl.float32)
        b_dk = tl.zeros((C, SK), dtype=tl.float32)
        b_dG = tl.zeros((C, SK), dtype=tl.float32)
        zero = opaque_zero("pairs")
        i_tile, j_tile = (tl.arange(0, C)[:, None] + zero) // TILE, tl.arange(0, C)[None, :] // TILE
        p_dqk = block_pointers(p_dAqk, i_block + zero, 0, C, C, C)
        p_dkk = block_pointers(p_dKK, i_block + zero, 0, C, C, C)
        b_high, b_low = load_parts(p_high, p_low, i_block + zero, i_s, C, BK, SK)
        b_k16 = load_rows(p_k, token + zero, length, i_group, H, K, C, SK, first)
        for tile in range(C // TILE):
            b_col = col_decay(sum_rows(load_matrix(p_table, FIRST_TILE + tile, C), b_high, b_low), ANCHOR, SAFE)
            # tile // 8 is zero, but not before the loop: there the product would be taken to stay in registers.
            b_k = as_product(load_matrix(p_table, ONE + tile // 8, C), b_k16) * b_rk[:, None]
            b_left = cast(b_k * b_col, DT)
            m_pairs = i_tile == tile
            if not ANCHOR:  # pairs inside the tile are the tree's
                m_pairs = m_pairs & (j_tile < tile)
            b_dqk = tl.load(p_dqk, mask=m_pairs, other=0.0)
            b_dkk = tl.load(p_dkk, mask=m_pairs, other=0.0)
            b_t = tl.dot(tl.trans(b_dqk), b_right_q, input_precision=PRECISION)
            b_t = tl.dot(tl.trans(b_dkk), b_right_k, b_t, input_precision=PRECISION)
            b_dk += b_t * b_col
            b_dG -= b_left * b_t
            b_dq = tl.dot(b_dqk, b_left, b_dq, input_precision=PRECISION)
            b_r = tl.dot(b_dkk, b_left, b_r, input_precision=PRECISION)
        zero = opaque_zero("after pairs")
        b_high, b_low = load_parts(p_high, p_low, i_block + zero, i_s, C, BK, SK)
        b_c = sum_rows(load_matrix(p_table, ROWS + zero, C), b_high, b_low)
        if not SAFE:
            needs = needs_tree(b_c, ANCHOR)
        b_row = row_decay(b_c, ANCHOR, SAFE)
        b_q = load_product(p_table, p_q, token, length, i_group, H, K, first, zero, C, SK)
        b_dG += cast(b_q * b_rq[:, None] * b_row, DT) * b_dq
        b_dq *= b_row
        b_k = load_product(p_table, p_k, token, length, i_group, H, K, first, zero, C, SK)
        b_dG += cast(b_k * b_rk[:, None] * b_row, DT) * b_r
        b_dk += b_r * b_row
        if not SAFE:  # noqa: SIM102 (the inner condition is a run-time one)
            if needs:
                zero = opaque_zero("tree")
                p_dqk = block_pointers(p_dAqk, i_block + zero, 0, C, C, C)
                p_dkk = block_pointers(p_dKK, i_block + zero, 0, C, C, C)
                b_high, b_low = load_parts(p_high, p_low, i_block + zero, i_s, C, BK, SK)
                b_q16 = load_rows(p_q, token + zero, length, i_group, H, K, C, SK, first)
                b_k16 = load_rows(p_k, token + zero, length, i_group, H, K, C, SK, first)
                b_dq, b_dk, b_dG = tree_gradients(
                    b_dq, b_dk, b_dG, b_q16, b_k16, b_rq, b_rk, b_high, b_low, p_table, p_dqk, p_dkk, ANCHOR, C, TILE,
                    DT, PRECISION,
                )  # fmt: skip

        # Through the state, q: S do.
        b_r = tl.zeros((C, SK), dtype=tl.float32)
        zero = opaque_zero("S do")
        for i_v in range(WV // BV):
            b_S = tl.load(state_pointers(p_states, i_block + zero, i_s, i_v, BK, WV, SK, BV))
            b_do = load_rows(p_do, token + zero, length, i_head, HV, V, C, BV, i_v * BV).to(DT)
            b_dq, b_dk, b_dG = hold(b_dq, i_v), hold(b_dk, i_v), hold(b_dG, i_v)
            b_r = tl.dot(b_do, tl.trans(b_S), b_r, input_precision=PRECISION)
        zero = opaque_zero("dq")
        b_high, b_low = load_parts(p_high, p_low, i_block + zero, i_s, C, BK, SK)
        b_r *= exp2(sum_rows(load_matrix(p_table, FROM_START + zero, C), b_high, b_low))
        b_q = load_product(p_table, p_q, token, length, i_group, H, K, first, zero, C, SK) * b_rq[:, None]
        b_dG += b_q * b_r
        b_dq = scale * (b_dq + b_r)
        if L2NORM:  # the norm removes the component along q
            b_rq = tl.load(p_norms + (i_block + zero) * (2 * C) + i_token)
            b_along = tl.load(p_along + (i_block + zero) * (2 * C) + i_token) * b_rq / scale
            b_dq = b_rq[:, None] * b_dq - b_q * b_along[:, None]
        store_rows(p_dq, b_dq, token + zero, length, i_head, HV, K, C, SK, first)

        # Through the state, k: -S dr as a row, dS v_new as a column; and the decay of the whole chunk.
        b_r = tl.zeros((C, SK), dtype=tl.float32)
        b_d_col = tl.zeros((C, SK), dtype=tl.float32)
        b_S_dS = tl.zeros((SK, SK), dtype=tl.float32)
        zero = opaque_zero("S dr, dS v_new")
        for i_v in range(WV // BV):
            b_S = tl.load(state_pointers(p_states, i_block + zero, i_s, i_v, BK, WV, SK, BV))
            b_dk, b_dG = hold(b_dk, i_v), hold(b_dG, i_v)
            b_dr = load_rows(p_dr, token + zero, length, i_head, HV, V, C, BV, i_v * BV).to(DT)
            b_r = tl.dot(b_dr, tl.trans(b_S), b_r, input_precision=PRECISION)
            b_dS = tl.load(state_pointers(p_d_states, i_block + zero, i_s, i_v, BK, WV, SK, BV))
            b_y = tl.load(block_pointers(p_y, i_block + zero, i_v, C, WV, BV))
            b_d_col = tl.dot(b_y, tl.trans(b_dS), b_d_col, input_precision=PRECISION)
            b_S_dS = tl.dot(b_S, tl.trans(b_dS), b_S_dS, input_precision=PRECISION)
        zero = opaque_zero("dk")
        i_k = tl.arange(0, SK) + zero
        b_d_total = tl.sum(tl.where(i_k[:, None] == i_k[None, :], b_S_dS, 0.0), 0)
        b_d_total *= exp2(tl.load(p_total + i_block * BK + first + i_k))
        b_high, b_low = load_parts(p_high, p_low, i_block + zero, i_s, C, BK, SK)
        b_r *= exp2(sum_rows(load_matrix(p_table, FROM_START + zero, C), b_high, b_low))
        b_E = exp2(sum_rows(load_matrix(p_table, TO_END + zero, C), b_high, b_low))
        b_d_col *= b_E * tl.load(p_strength + (i_block + zero) * C + i_token)[:, None]
        b_k = load_product(p_table, p_k, token, length, i_group, H, K, first, zero, C, SK) * b_rk[:, None]
        b_dG -= b_k * (b_r + b_d_col)
        b_d_total += tl.sum(b_k * b_d_col, 0)
        b_dk += b_d_col - b_r
        if L2NORM:
            b_along = tl.load(p_along + (i_block + zero) * (2 * C) + C + i_token)
            b_dk = b_rk[:, None] * (b_dk - b_k * b_along[:, None])
        store_rows(p_dk, b_dk, token + zero, length, i_head, HV, K, C, SK, first)
        store_gate_gradients(
            b_dG, b_d_total, p_g, p_A_log, p_dt_bias, p_table, p_dg, p_d_slope, p_d_bias, lower_bound, token, length,
            i_block, i_head, i_s, HV, K, C, BK, SK, GATE, LOWER, HAS_SLOPE, HAS_BIAS, DT,
        )  # fmt: skip
