"""Last kernels of the backward: gradients inside a chunk, for all chunks at once.

With S the state before a chunk, dS the gradient of the state after it, and the names of prepare.py:

    dy  = beta dv_new          dr = A^T dy, the gradient of what A multiplies, v - P k S         dv = dr
    dAqk_ij = <do_i, y_j> beta_j  (i >= j)               dKK_ij = -<dr_i, y_j> beta_j  (i > j)
    dbeta_j = <dv_new_j, y_j> - sum_i KK_ij <dr_i, y_j>              beta_j dbeta_j = <dr_j, y_j>

    dq_i = s (P_i (S do_i) + sum_j dAqk_ij D_ij k_j)
    r_i  = -P_i (S dr_i) + sum_j dKK_ij D_ij k_j                            (gradient of k_i as a row)
    c_j  = E_j (dS v_new_j) + sum_i dAqk_ij D_ij s q_i + sum_i dKK_ij D_ij k_i         (as a column)
    dk = r + c
    dG = q dq + k r - k c;  every row also gets  total rowsum(S dS) + sum_j k_j E_j (dS v_new_j)
    dg = sum of dG from a row to the chunk's end

and then the derivatives of norm, gate and sigmoid.

# NOTE [Row sums]
The norms need sums over whole rows of q and k, but K is worked on in slices that know nothing of each other.  The sums
follow from rows of V instead: o is linear in q, and scaling k_j scales row and column j of KK and row j of P k:

    <q_i, dq_i> = <o_i, do_i>                 <k_i, dk_i> = 2 <dr_i, y_i> - <dr_i, v_i>

Such sums of products of rows are diagonals of products of matrices, which need no operand in registers.

# NOTE [Two parts]
What is rounded on the way to dbeta adds up: in 16 bits beta A and dr enter as sums of two parts, so that neither is.
Without that the error of dbeta was 1.1 to 1.2 times flash-linear-attention's.

# NOTE [One anchor]
Without far rows (NOTE [Chunk anchor] in decay.py) all decays are products of factors of rows and columns,

    D_ij = row_i col_j        P_i = 2^-80 row_i        E_j = 2^80 total col_j

so what comes through the state and what comes from pairs meet in one sum each, before the factor is applied:

    dq = s row (dAqk (col k) + 2^-80 do S^T)            r = row (dKK (col k) - 2^-80 dr S^T)
    c  = col (dAqk^T (s row q) + dKK^T (row k) + 2^80 total v_new dS^T)
    dG = (s row q) (dq / s row) + (row k) (r / row) - (col k) (c / col)

The operands of these products are the factors of dG, too.  `near_inputs_kernel` does this; where rows are far,
`far_inputs_kernel` (far.py) goes the longer way, and each leaves the chunks of the other alone.

# NOTE [Pairs cancel]
A pair of rows i > j adds the same number to dG_i and takes it from dG_j, so that it counts for the tokens between them
only.  Both are computed from the same rounded operands: what remains of the difference is float32's rounding, even
where decays are weak and the sum over the chunk is a thousand times smaller than its terms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import (
    FROM_ROW,
    FROM_START,
    ONE,
    as_product,
    cast,
    exp2,
    hold,
    load_matrix,
    opaque_zero,
    reciprocal,
    sigmoid,
    softplus,
    split,
    sum_rows,
)
from .prepare import (
    block_pointers,
    chunk_place,
    load_gate,
    load_rows,
    store_block,
    store_rows,
)
from .scan import state_pointers


@triton.jit(do_not_specialize=["T", "NT"])
def triangle_kernel(
    p_do, p_o, p_v, p_chunk_token, p_chunk_length, p_strength, p_A, p_kk, p_y, p_dv_new, p_dv, p_d_beta, p_dAqk, p_dKK,
    p_along, T, NT, HV: tl.constexpr, V: tl.constexpr, C: tl.constexpr, WV: tl.constexpr, BV: tl.constexpr,
    SIGMOID: tl.constexpr, FACTOR: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dv, dbeta, dAqk, dKK and the row sums <q, dq>, <k, dk> of one chunk of one value head."""
    i_block = tl.program_id(0).to(tl.int64)
    i_chunk, i_head = tl.program_id(0) // HV, tl.program_id(0) % HV
    if PACKED:
        token, length = tl.load(p_chunk_token + i_chunk), tl.load(p_chunk_length + i_chunk)
    else:
        token, length = chunk_place(i_chunk, T, NT, C)
    DT: tl.constexpr = p_A.dtype.element_ty
    i_token = tl.arange(0, C)
    i, j = i_token[:, None], i_token[None, :]
    b_beta = tl.load(p_strength + i_block * C + i_token)
    # NOTE [Two parts]
    b_A, b_A_low = split(tl.load(block_pointers(p_A, i_block, 0, C, C, C)).to(tl.float32) * b_beta[:, None], DT)

    b_do_y = tl.zeros((C, C), dtype=tl.float32)
    b_dr_y = tl.zeros((C, C), dtype=tl.float32)
    b_do_o = tl.zeros((C, C), dtype=tl.float32)
    b_dr_v = tl.zeros((C, C), dtype=tl.float32)
    b_d_beta = tl.zeros((C,), dtype=tl.float32)
    for i_v in tl.range(WV // BV, num_stages=STAGES):
        b_dv_new = tl.load(block_pointers(p_dv_new, i_block, i_v, C, WV, BV))
        b_dr = tl.dot(tl.trans(b_A), b_dv_new, input_precision=PRECISION)
        if tl.float32 != DT:
            b_dr = tl.dot(tl.trans(b_A_low), b_dv_new, b_dr)
        b_dr, b_dr_low = split(b_dr, DT)
        store_rows(p_dv, b_dr, token, length, i_head, HV, V, C, BV, i_v * BV)
        b_y = tl.load(block_pointers(p_y, i_block, i_v, C, WV, BV))
        b_dr_y = tl.dot(b_dr, tl.trans(b_y), b_dr_y, input_precision=PRECISION)
        if tl.float32 != DT:
            b_dr_y = tl.dot(b_dr_low, tl.trans(b_y), b_dr_y)
        b_v = load_rows(p_v, token, length, i_head, HV, V, C, BV, i_v * BV).to(DT)
        b_dr_v = tl.dot(b_dr, tl.trans(b_v), b_dr_v, input_precision=PRECISION)
        b_do = load_rows(p_do, token, length, i_head, HV, V, C, BV, i_v * BV).to(DT)
        b_do_y = tl.dot(b_do, tl.trans(b_y), b_do_y, input_precision=PRECISION)
        b_o = load_rows(p_o, token, length, i_head, HV, V, C, BV, i_v * BV).to(DT)
        b_do_o = tl.dot(b_do, tl.trans(b_o), b_do_o, input_precision=PRECISION)
        if not SIGMOID:
            b_d_beta += tl.sum(b_dv_new.to(tl.float32) * b_y.to(tl.float32), 1)
    store_block(p_dAqk, tl.where(i >= j, b_do_y * b_beta[None, :], 0.0), i_block, C, C)
    store_block(p_dKK, tl.where(i > j, b_dr_y * -b_beta[None, :], 0.0), i_block, C, C)

    # NOTE [Row sums]
    p_along += i_block * (2 * C) + i_token
    tl.store(p_along, tl.sum(tl.where(i == j, b_do_o, 0.0), 1))
    tl.store(p_along + C, tl.sum(tl.where(i == j, 2.0 * b_dr_y - b_dr_v, 0.0), 1))
    if SIGMOID:
        b_d_beta = (1.0 - b_beta / FACTOR) * tl.sum(tl.where(i == j, b_dr_y, 0.0), 1)
    else:
        b_d_beta -= tl.sum(tl.load(block_pointers(p_kk, i_block, 0, C, C, C)) * b_dr_y, 0)
    p_d_beta += (token + i_token) * HV + i_head
    tl.store(p_d_beta, b_d_beta.to(p_d_beta.dtype.element_ty), mask=i_token < length)


@triton.jit
def load_product(
    p_table, p_x, token, length, i_head, HEADS, WIDTH, first, zero, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Load ``[C, BLOCK]`` of x [tokens, HEADS, WIDTH] in float32, laid out as products are; the phase's zero added."""
    b_one = load_matrix(p_table, ONE + zero, C)
    return as_product(b_one, load_rows(p_x, token + zero, length, i_head, HEADS, WIDTH, C, BLOCK, first))


@triton.jit
def store_gate_gradients(
    b_dG, b_d_total, p_g, p_A_log, p_dt_bias, p_table, p_dg, p_d_slope, p_d_bias, lower_bound, token, length, i_block,
    i_head, i_s, HV, K, C: tl.constexpr, BK: tl.constexpr, SK: tl.constexpr, GATE: tl.constexpr, LOWER: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Sum dG from each row to the chunk's end, take it through the gate, and store what comes out."""
    zero = opaque_zero("dg")
    i_k = i_s * SK + zero + tl.arange(0, SK)
    b_high, b_low = split(b_dG, DT)
    b_dg = sum_rows(load_matrix(p_table, FROM_ROW + zero, C), b_high, b_low) + b_d_total[None, :]
    if GATE:
        b_z, slope, _ = load_gate(
            p_g, p_A_log, p_dt_bias, lower_bound, token + zero, length, i_head, HV, K, C, SK, GATE, LOWER, HAS_SLOPE,
            HAS_BIAS, i_s * SK,
        )  # fmt: skip
        if LOWER:
            b_s = sigmoid(slope * b_z)
            b_dg *= lower_bound * slope * b_s * (1.0 - b_s)
            b_d_slope = b_dg * b_z
        else:
            b_d_slope = -slope * softplus(b_z) * b_dg
            b_dg *= -slope * sigmoid(b_z)
        m_inside = (tl.arange(0, C)[:, None] < length) & (i_k[None, :] < K)
        if HAS_SLOPE:
            d_slope = tl.sum(tl.where(m_inside, b_d_slope, 0.0))
            tl.store(p_d_slope + i_block * (BK // SK) + i_s, d_slope)
        if HAS_BIAS:
            tl.store(p_d_bias + i_block * BK + i_k, tl.sum(tl.where(m_inside, b_dg, 0.0), 0))
    store_rows(p_dg, b_dg, token + zero, length, i_head, HV, K, C, SK, i_s * SK)


@triton.jit(do_not_specialize=["T", "NT"])
def near_inputs_kernel(
    p_do, p_q, p_k, p_g, p_dr, p_A_log, p_dt_bias, p_chunk_token, p_chunk_length, p_table,
    p_total, p_strength, p_norms, p_far, p_states, p_d_states, p_y, p_dAqk, p_dKK, p_along,
    p_dq, p_dk, p_dg, p_d_slope, p_d_bias, scale, lower_bound, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WV: tl.constexpr, BV: tl.constexpr, SK: tl.constexpr, GATE: tl.constexpr, LOWER: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr, L2NORM: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the raw q, k and g, a slice of K of one chunk of one value head: NOTE [One anchor].

    dq and dk are ``[tokens, HV, K]``: grouped value heads are summed afterwards.  The gradients of A_log and dt_bias
    are left as partial sums.
    """
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
    if tl.load(p_far + i_block * (BK // SK) + i_s) == 0:
        # k through the state.
        b_r = tl.zeros((C, SK), dtype=tl.float32)
        b_c = tl.zeros((C, SK), dtype=tl.float32)
        b_S_dS = tl.zeros((SK, SK), dtype=tl.float32)
        for i_v in tl.range(WV // BV, num_stages=STAGES):
            b_S = tl.load(state_pointers(p_states, i_block, i_s, i_v, BK, WV, SK, BV))
            b_dr = load_rows(p_dr, token, length, i_head, HV, V, C, BV, i_v * BV).to(DT)
            b_r = tl.dot(b_dr, tl.trans(b_S), b_r, input_precision=PRECISION)
            b_dS = tl.load(state_pointers(p_d_states, i_block, i_s, i_v, BK, WV, SK, BV))
            b_y = tl.load(block_pointers(p_y, i_block, i_v, C, WV, BV))
            b_c = tl.dot(b_y, tl.trans(b_dS), b_c, input_precision=PRECISION)
            b_S_dS = tl.dot(b_S, tl.trans(b_dS), b_S_dS, input_precision=PRECISION)
        # The state's part of c, and the decay of the whole chunk, which waits in memory for its turn.
        zero = opaque_zero("whole chunk")
        i_k = tl.arange(0, SK)
        p_d_total = p_d_bias + (i_block + zero) * BK + first + i_k
        b_S_dS = tl.sum(tl.where(i_k[:, None] == i_k[None, :], b_S_dS, 0.0), 1)
        tl.store(p_d_total, exp2(tl.load(p_total + (i_block + zero) * BK + first + i_k)) * b_S_dS)
        b_total = tl.load(p_total + (i_block + zero) * BK + first + i_k)
        b_c *= tl.load(p_strength + (i_block + zero) * C + i_token)[:, None] * exp2(b_total + 80.0)[None, :]

        # k in pairs.
        zero = opaque_zero("decay")
        z, slope, b_g = load_gate(  # noqa: RUF059
            p_g, p_A_log, p_dt_bias, lower_bound, token + zero, length, i_head, HV, K, C, SK, GATE, LOWER, HAS_SLOPE,
            HAS_BIAS, first,
        )  # fmt: skip
        b_high, b_low = split(b_g, DT)
        b_row = exp2(sum_rows(load_matrix(p_table, FROM_START + zero, C), b_high, b_low) + 80.0)
        zero = opaque_zero("k in pairs")
        b_rk = tl.load(p_norms + (i_block + zero) * (2 * C) + C + i_token)
        b_k = load_product(p_table, p_k, token, length, i_group, H, K, first, zero, C, SK) * b_rk[:, None]
        b_left, b_right = cast(b_k * reciprocal(b_row), DT), cast(b_k * b_row, DT)
        p_d_total = p_d_bias + (i_block + zero) * BK + first + i_k
        tl.debug_barrier()
        tl.store(p_d_total, tl.load(p_d_total) + tl.sum(b_left * b_c, 0))
        b_dxk = tl.load(block_pointers(p_dKK, i_block + zero, 0, C, C, C))
        b_c = tl.dot(tl.trans(b_dxk), b_right, b_c, input_precision=PRECISION)
        b_r = tl.dot(b_dxk, b_left, -(2.0**-80) * b_r, input_precision=PRECISION)
        b_dG = b_right * b_r
        zero = opaque_zero("q in pairs")
        b_rq = tl.load(p_norms + (i_block + zero) * (2 * C) + i_token)
        b_q = load_product(p_table, p_q, token, length, i_group, H, K, first, zero, C, SK) * (b_rq * scale)[:, None]
        b_dxk = tl.load(block_pointers(p_dAqk, i_block + zero, 0, C, C, C))
        b_c = tl.dot(tl.trans(b_dxk), cast(b_q * b_row, DT), b_c, input_precision=PRECISION)
        b_dG -= b_left * b_c
        b_dk = b_r * b_row + b_c * reciprocal(b_row)
        if L2NORM:  # the norm removes the component along k
            zero = opaque_zero("dk")
            b_rk = tl.load(p_norms + (i_block + zero) * (2 * C) + C + i_token)
            b_along = tl.load(p_along + (i_block + zero) * (2 * C) + C + i_token)
            b_k = load_product(p_table, p_k, token, length, i_group, H, K, first, zero, C, SK) * b_rk[:, None]
            b_dk = b_rk[:, None] * (b_dk - b_k * b_along[:, None])
        zero = opaque_zero("store dk")
        store_rows(p_dk, b_dk, token + zero, length, i_head, HV, K, C, SK, first)

        # q.
        zero = opaque_zero("q")
        b_dq = tl.zeros((C, SK), dtype=tl.float32)
        for i_v in tl.range(WV // BV, num_stages=STAGES):
            b_dG, b_row = hold(b_dG, i_v), hold(b_row, i_v)
            b_S = tl.load(state_pointers(p_states, i_block + zero, i_s, i_v, BK, WV, SK, BV))
            b_do = load_rows(p_do, token + zero, length, i_head, HV, V, C, BV, i_v * BV).to(DT)
            b_dq = tl.dot(b_do, tl.trans(b_S), b_dq, input_precision=PRECISION)
        zero = opaque_zero("pairs of q")
        b_rk = tl.load(p_norms + (i_block + zero) * (2 * C) + C + i_token)
        b_k = load_product(p_table, p_k, token, length, i_group, H, K, first, zero, C, SK) * b_rk[:, None]
        b_dxk = tl.load(block_pointers(p_dAqk, i_block + zero, 0, C, C, C))
        b_left = cast(b_k * reciprocal(b_row), DT)
        b_dq = tl.dot(b_dxk, b_left, 2.0**-80 * b_dq, input_precision=PRECISION)
        zero = opaque_zero("dq")
        b_rq = tl.load(p_norms + (i_block + zero) * (2 * C) + i_token)
        b_q = load_product(p_table, p_q, token, length, i_group, H, K, first, zero, C, SK) * (b_rq * scale)[:, None]
        b_dG += cast(b_q * b_row, DT) * b_dq
        b_dq *= scale * b_row
        if L2NORM:
            b_along = tl.load(p_along + (i_block + zero) * (2 * C) + i_token) * b_rq / scale
            b_dq = b_rq[:, None] * b_dq - b_q * b_along[:, None]
        store_rows(p_dq, b_dq, token + zero, length, i_head, HV, K, C, SK, first)
        tl.debug_barrier()
        b_d_total = tl.load(p_d_bias + (i_block + opaque_zero("dG")) * BK + first + i_k)
        store_gate_gradients(
            b_dG, b_d_total, p_g, p_A_log, p_dt_bias, p_table, p_dg, p_d_slope, p_d_bias, lower_bound, token, length,
            i_block, i_head, i_s, HV, K, C, BK, SK, GATE, LOWER, HAS_SLOPE, HAS_BIAS, DT,
        )  # fmt: skip
