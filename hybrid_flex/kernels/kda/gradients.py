"""Last kernels of the backward: gradients inside a chunk, for all chunks at once.

With S the state before a chunk, dS the gradient of the state after it, A = (I + L)^-1, KK_ij = <k_i, D_ij k_j> and the
names of prepare.py:

    dAqk = tril(do v_new^T)           dw  = -dv_new S^T          dkb = A^T dw          dvb = A^T dv_new
    dA = dv_new v^T + dw (P k)^T      dL = -stril(A^T dA Diag(beta) A^T)               dv = beta dvb

    dq_i = s (P_i (do S^T)_i + sum_j dAqk_ij D_ij k_j)
    r_i  = P_i dkb_i + sum_j dL_ij D_ij k_j                      (gradient of beta_i k_i as a row)
    c_j  = E_j (v_new dS^T)_j + sum_i dAqk_ij D_ij s q_i + sum_i dL_ij D_ij beta_i k_i     (of k_j as a column)
    dk = beta r + c
    dG = q dq + beta k r - k c;  every row also gets  total rowsum(S dS) + sum_j k_j E_j (v_new dS^T)_j
    dg = sum of dG from a row to the chunk's end

and then the derivatives of norm, gate and sigmoid.

# NOTE [Row sums]
What the norms and beta need of whole rows is a sum over matrices of C x C, so that K can be worked on in slices that
know nothing of each other.  o is linear in q, and scaling k_j scales row j and column j of L:

    <q_i, dq_i> = <o_i, do_i>                          <k_i, r_i> = sum_j dL_ij KK_ij + sum_j A_ji (dw (P k)^T)_ji
    <k_j, c_j>  = <v_new_j, dv_new_j> + sum_i beta_i KK_ij dL_ij         (Aqk takes part twice and cancels)
    dbeta_i     = <k_i, r_i> + sum_j A_ji (dv_new v^T)_ji
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import (
    decay_from_start,
    decay_to_end,
    decay_to_row_boundary,
    decay_to_tile_boundary,
    meets,
    sigmoid,
    softplus,
    sum_in_tile,
    sum_rows,
)
from .prepare import block_pointers, chunk_place, load_beta, load_gate, load_rows, store_block, store_rows
from .scan import state_pointers


@triton.jit(do_not_specialize=["T", "NT"])
def triangle_kernel(
    p_do, p_o, p_k, p_v, p_g, p_beta, p_A_log, p_dt_bias, p_chunk_token, p_chunk_length,
    p_A, p_kk, p_tiles, p_norms, p_states, p_v_new, p_dv_new, p_dv, p_d_beta, p_dAqk, p_dL, p_along, lower_bound, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WV: tl.constexpr, BV: tl.constexpr, SK: tl.constexpr, GATE: tl.constexpr, LOWER: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr, L2NORM: tl.constexpr, SIGMOID: tl.constexpr, FACTOR: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dv, dbeta, dAqk, dL and the row sums <q, dq>, <k, dk> of one chunk of one value head."""
    i_block = tl.program_id(0).to(tl.int64)
    i_chunk, i_head = tl.program_id(0) // HV, tl.program_id(0) % HV
    token, length = chunk_place(i_chunk, p_chunk_token, p_chunk_length, T, NT, C, PACKED)
    lower_bound = tl.cast(lower_bound, tl.float32)  # Inductor passes numbers as float64
    DT: tl.constexpr = p_A.dtype.element_ty
    i_row, i_col = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    i_token = tl.arange(0, C)
    b_beta, b_sigmoid = load_beta(p_beta, token, length, i_head, HV, C, SIGMOID, FACTOR)
    b_A = tl.load(block_pointers(p_A, i_block, 0, C, C, C))

    b_dA_v = tl.zeros((C, C), dtype=tl.float32)
    b_dAqk = tl.zeros((C, C), dtype=tl.float32)
    b_along_q = tl.zeros((C,), dtype=tl.float32)
    b_along_k = tl.zeros((C,), dtype=tl.float32)
    for i_v in tl.static_range(WV // BV):
        b_do = load_rows(p_do, token, length, i_head, HV, V, C, BV, i_v * BV)
        b_o = load_rows(p_o, token, length, i_head, HV, V, C, BV, i_v * BV)
        b_along_q += tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
        b_v_new = tl.load(block_pointers(p_v_new, i_block, i_v, C, WV, BV))
        b_dAqk += tl.dot(b_do.to(DT), tl.trans(b_v_new), input_precision=PRECISION)
        b_dv_new = tl.load(block_pointers(p_dv_new, i_block, i_v, C, WV, BV))
        b_along_k += tl.sum(b_v_new.to(tl.float32) * b_dv_new.to(tl.float32), 1)
        b_v = load_rows(p_v, token, length, i_head, HV, V, C, BV, i_v * BV).to(DT)
        b_dA_v += tl.dot(b_dv_new, tl.trans(b_v), input_precision=PRECISION)
        b_dvb = tl.dot(tl.trans(b_A), b_dv_new, input_precision=PRECISION)
        store_rows(p_dv, b_dvb * b_beta[:, None], token, length, i_head, HV, V, C, BV, i_v * BV)
    store_block(p_dAqk, tl.where(i_row >= i_col, b_dAqk, 0.0), i_block, C, C)

    # dw (P k)^T, a slice of K at a time; the norm of k is a factor of the columns.
    b_dA_k = tl.zeros((C, C), dtype=tl.float32)
    p_tiles += i_block * (C // 16 * BK)
    for i_s in tl.static_range(BK // SK):
        b_dw = tl.zeros((C, SK), dtype=tl.float32)
        for i_v in tl.static_range(WV // BV):
            b_dv_new = tl.load(block_pointers(p_dv_new, i_block, i_v, C, WV, BV))
            b_S = tl.load(state_pointers(p_states, i_block, i_s, i_v, BK, WV, SK, BV))
            b_dw = tl.dot(b_dv_new, tl.trans(b_S), b_dw, input_precision=PRECISION)
        _, _, b_g = load_gate(
            p_g, p_A_log, p_dt_bias, lower_bound, token, length, i_head, HV, K, C, SK, GATE, LOWER, HAS_SLOPE, HAS_BIAS,
            i_s * SK,
        )  # fmt: skip
        b_start = decay_from_start(sum_in_tile(b_g, C, DT), p_tiles, i_s * SK, C, BK, SK)
        b_k = load_rows(p_k, token, length, i_head // (HV // H), H, K, C, SK, i_s * SK).to(tl.float32)
        b_dA_k -= tl.dot(b_dw.to(DT), tl.trans((b_k * b_start).to(DT)), input_precision=PRECISION)
    b_dA_k *= tl.load(p_norms + i_block * (2 * C) + C + i_token)[None, :]

    b_dA = tl.where(i_row > i_col, (b_dA_v + b_dA_k) * b_beta[None, :], 0.0).to(DT)
    b_dL = tl.dot(b_dA, tl.trans(b_A), input_precision=PRECISION).to(DT)
    b_dL = -tl.dot(tl.trans(b_A), b_dL, input_precision=PRECISION)
    b_dL = tl.where(i_row > i_col, b_dL, 0.0)
    store_block(p_dL, b_dL, i_block, C, C)

    # NOTE [Row sums]
    b_dkk = b_dL * tl.load(block_pointers(p_kk, i_block, 0, C, C, C))
    b_k_row = tl.sum(b_dkk, 1) + tl.sum(b_A * b_dA_k, 0)
    b_along_k += b_beta * b_k_row + tl.sum(b_dkk * b_beta[:, None], 0)
    b_d_beta = b_k_row + tl.sum(b_A * b_dA_v, 0)
    if SIGMOID:
        b_d_beta *= FACTOR * b_sigmoid * (1.0 - b_sigmoid)
    p_d_beta += (token + i_token) * HV + i_head
    tl.store(p_d_beta, b_d_beta.to(p_d_beta.dtype.element_ty), mask=i_token < length)
    tl.store(p_along + i_block * (2 * C) + i_token, b_along_q)
    tl.store(p_along + i_block * (2 * C) + C + i_token, b_along_k)


@triton.jit
def level_gradients(
    b_q_row, b_k_row, b_k_col, p_q, p_k, b_rq, b_rk, b_beta, b_row, b_col, m_level, p_dAqk, p_dL,
    token, length, i_group, H, K, first, C: tl.constexpr, SK: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the pairs of one level, decayed by ``b_row`` and ``b_col``, to the gradients of rows and columns."""
    tl.debug_barrier()  # NOTE [Read again] in prepare.py
    b_left = load_rows(p_k, token, length, i_group, H, K, C, SK, first) * b_rk[:, None] * b_col
    b_left = b_left.to(DT)
    b_dqk = tl.where(m_level, tl.load(p_dAqk), 0.0).to(DT)
    b_q_row += tl.dot(b_dqk, b_left, input_precision=PRECISION) * b_row
    b_dkk = tl.where(m_level, tl.load(p_dL), 0.0).to(DT)
    b_k_row += tl.dot(b_dkk, b_left, input_precision=PRECISION) * b_row
    tl.debug_barrier()
    b_right = load_rows(p_q, token, length, i_group, H, K, C, SK, first) * b_rq[:, None] * b_row
    b_sum = tl.dot(tl.trans(b_dqk), b_right.to(DT), input_precision=PRECISION)
    b_right = load_rows(p_k, token, length, i_group, H, K, C, SK, first) * (b_rk * b_beta)[:, None] * b_row
    b_sum = tl.dot(tl.trans(b_dkk), b_right.to(DT), b_sum, input_precision=PRECISION)
    return b_q_row, b_k_row, b_k_col + b_sum * b_col


@triton.jit(do_not_specialize=["T", "NT"])
def inputs_kernel(
    p_do, p_q, p_k, p_g, p_beta, p_A_log, p_dt_bias, p_chunk_token, p_chunk_length,
    p_A, p_total, p_tiles, p_norms, p_states, p_d_states, p_v_new, p_dv_new, p_dAqk, p_dL, p_along,
    p_dq, p_dk, p_dg, p_d_slope, p_d_bias, scale, lower_bound, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WV: tl.constexpr, BV: tl.constexpr, SK: tl.constexpr, GATE: tl.constexpr, LOWER: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr, L2NORM: tl.constexpr, SIGMOID: tl.constexpr, FACTOR: tl.constexpr,
    ANCHOR: tl.constexpr, SAFE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the raw q, k and g, a slice of K of one chunk of one value head.

    dq and dk are ``[tokens, HV, K]``: grouped value heads are summed afterwards.  The gradients of A_log and dt_bias
    are left as partial sums.
    """
    i_block = tl.program_id(0).to(tl.int64)
    i_chunk, i_head, i_s = tl.program_id(0) // HV, tl.program_id(0) % HV, tl.program_id(1)
    token, length = chunk_place(i_chunk, p_chunk_token, p_chunk_length, T, NT, C, PACKED)
    i_group, first = i_head // (HV // H), i_s * SK
    scale, lower_bound = tl.cast(scale, tl.float32), tl.cast(lower_bound, tl.float32)
    DT: tl.constexpr = p_states.dtype.element_ty
    LEVELS: tl.constexpr = 6 if C == 64 else 5 if C == 32 else 4
    i_k = tl.arange(0, SK)

    # Through the state: do S^T, v_new dS^T, A^T dw and the decay of the whole chunk.
    b_q_row = tl.zeros((C, SK), dtype=tl.float32)
    b_k_col = tl.zeros((C, SK), dtype=tl.float32)
    b_dw = tl.zeros((C, SK), dtype=tl.float32)
    b_d_total = tl.zeros((SK,), dtype=tl.float32)
    for i_v in range(WV // BV):
        b_S = tl.load(state_pointers(p_states, i_block, i_s, i_v, BK, WV, SK, BV))
        b_dS = tl.load(state_pointers(p_d_states, i_block, i_s, i_v, BK, WV, SK, BV))
        b_d_total += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)
        b_do = load_rows(p_do, token, length, i_head, HV, V, C, BV, i_v * BV).to(DT)
        b_q_row = tl.dot(b_do, tl.trans(b_S), b_q_row, input_precision=PRECISION)
        b_v_new = tl.load(block_pointers(p_v_new, i_block, i_v, C, WV, BV))
        b_k_col = tl.dot(b_v_new, tl.trans(b_dS), b_k_col, input_precision=PRECISION)
        b_dv_new = tl.load(block_pointers(p_dv_new, i_block, i_v, C, WV, BV))
        b_dw = tl.dot(b_dv_new, tl.trans(b_S), b_dw, input_precision=PRECISION)
    b_A = tl.load(block_pointers(p_A, i_block, 0, C, C, C))
    b_k_row = tl.dot(tl.trans(b_A), (-b_dw).to(DT), input_precision=PRECISION)

    tl.debug_barrier()
    _, _, b_g = load_gate(
        p_g, p_A_log, p_dt_bias, lower_bound, token, length, i_head, HV, K, C, SK, GATE, LOWER, HAS_SLOPE, HAS_BIAS,
        first,
    )  # fmt: skip
    b_c = sum_in_tile(b_g, C, DT)
    p_tiles += i_block * (C // 16 * BK)
    b_start = decay_from_start(b_c, p_tiles, first, C, BK, SK)
    b_q_row *= b_start
    b_k_row *= b_start
    b_k_col *= decay_to_end(b_c, p_tiles, first, C, BK, SK)
    b_beta, _ = load_beta(p_beta, token, length, i_head, HV, C, SIGMOID, FACTOR)
    i_token = tl.arange(0, C)
    b_rq = tl.load(p_norms + i_block * (2 * C) + i_token)
    b_rk = tl.load(p_norms + i_block * (2 * C) + C + i_token)
    b_k_slice = load_rows(p_k, token, length, i_group, H, K, C, SK, first) * b_rk[:, None]
    b_d_total *= tl.load(p_total + i_block * BK + first + i_k)
    b_d_total += tl.sum(b_k_slice * b_k_col, 0)

    # Through the products inside the chunk, level by level.
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    p_dAqk = block_pointers(p_dAqk, i_block, 0, C, C, C)
    p_dL = block_pointers(p_dL, i_block, 0, C, C, C)
    for level in range(4, LEVELS):
        b_e = decay_to_tile_boundary(b_c, p_tiles, first, level, C, BK, SK)
        b_q_row, b_k_row, b_k_col = level_gradients(
            b_q_row, b_k_row, b_k_col, p_q, p_k, b_rq * scale, b_rk, b_beta, b_e, b_e, meets(level, C), p_dAqk, p_dL,
            token, length, i_group, H, K, first, C, SK, DT, PRECISION,
        )  # fmt: skip
    use_anchor = ANCHOR
    if ANCHOR and not SAFE:
        use_anchor = tl.min(tl.min(b_c, 1), 0) >= -116.0
    if use_anchor:
        b_q_row, b_k_row, b_k_col = level_gradients(
            b_q_row, b_k_row, b_k_col, p_q, p_k, b_rq * scale, b_rk, b_beta, tl.exp2(b_c), tl.exp2(-b_c),
            (i // 16 == j // 16) & (i >= j), p_dAqk, p_dL, token, length, i_group, H, K, first, C, SK, DT, PRECISION,
        )  # fmt: skip
    else:
        tl.debug_barrier()
        b_diagonal = tl.sum(tl.load(p_dAqk, mask=i == j, other=0.0).to(tl.float32), 1)
        b_k_again = load_rows(p_k, token, length, i_group, H, K, C, SK, first) * b_rk[:, None]
        b_q_row += b_diagonal[:, None] * b_k_again
        b_q_slice = load_rows(p_q, token, length, i_group, H, K, C, SK, first)
        b_k_col += b_q_slice * (b_diagonal * b_rq * scale)[:, None]
        b_z, slope, b_g = load_gate(
            p_g, p_A_log, p_dt_bias, lower_bound, token, length, i_head, HV, K, C, SK, GATE, LOWER, HAS_SLOPE, HAS_BIAS,
            first,
        )  # fmt: skip
        for level in range(4):
            b_e = decay_to_row_boundary(b_g, level, C, DT)
            b_q_row, b_k_row, b_k_col = level_gradients(
                b_q_row, b_k_row, b_k_col, p_q, p_k, b_rq * scale, b_rk, b_beta, b_e, b_e, meets(level, C), p_dAqk,
                p_dL, token, length, i_group, H, K, first, C, SK, DT, PRECISION,
            )  # fmt: skip
    # dG, its sum from each row to the end of the chunk, and through the norms.
    tl.debug_barrier()
    b_q = load_rows(p_q, token, length, i_group, H, K, C, SK, first) * b_rq[:, None]
    b_k = load_rows(p_k, token, length, i_group, H, K, C, SK, first) * b_rk[:, None]
    b_q_row *= scale
    b_k_row *= b_beta[:, None]
    b_dg = sum_rows(j >= i, b_q * b_q_row + b_k * (b_k_row - b_k_col), DT) + b_d_total[None, :]
    b_k_row += b_k_col
    if L2NORM:  # the norm removes the component along q or k
        b_q_row = b_rq[:, None] * (b_q_row - b_q * tl.load(p_along + i_block * (2 * C) + i_token)[:, None])
        b_k_row = b_rk[:, None] * (b_k_row - b_k * tl.load(p_along + i_block * (2 * C) + C + i_token)[:, None])
    store_rows(p_dq, b_q_row, token, length, i_head, HV, K, C, SK, first)
    store_rows(p_dk, b_k_row, token, length, i_head, HV, K, C, SK, first)

    # Through the gate.
    if GATE:
        tl.debug_barrier()
        b_z, slope, _ = load_gate(
            p_g, p_A_log, p_dt_bias, lower_bound, token, length, i_head, HV, K, C, SK, GATE, LOWER, HAS_SLOPE, HAS_BIAS,
            first,
        )  # fmt: skip
        if LOWER:
            b_s = sigmoid(slope * b_z)
            b_dg *= lower_bound * slope * b_s * (1.0 - b_s)
            b_d_slope = b_dg * b_z
        else:
            b_d_slope = -slope * softplus(b_z) * b_dg
            b_dg *= -slope * sigmoid(b_z)
        inside = (tl.arange(0, C)[:, None] < length) & (first + i_k[None, :] < K)
        if HAS_SLOPE:
            d_slope = tl.sum(tl.sum(tl.where(inside, b_d_slope, 0.0), 1), 0)
            tl.store(p_d_slope + i_block * (BK // SK) + i_s, d_slope)
        if HAS_BIAS:
            tl.store(p_d_bias + i_block * BK + first + i_k, tl.sum(tl.where(inside, b_dg, 0.0), 0))
    store_rows(p_dg, b_dg, token, length, i_head, HV, K, C, SK, first)
