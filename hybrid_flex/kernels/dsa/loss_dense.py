"""The indexer's loss over all visible keys: what both passes compute for a tile of queries and classes.

A class c is a key, or a pool of ``KPOOL`` keys; tokens behind the last complete pool belong to none.

    lse_th = log sum_s exp(scale q_th . k_s)                            over all visible tokens
    P_tc   = sum_h sum_{s in c} exp(scale q_th . k_s - lse_th)          p_tc = P_tc / N_t,  N_t = sum_c P_tc
    I_tc   = sum_j w_tj ReLU(q_idx_tj . k_idx_c)                        lse_I_t = log sum_c exp(I_tc)
    KL_t   = sum_c p_tc (log p_tc - I_tc) + lse_I_t
    ds_tc  = exp(I_tc - lse_I_t) - p_tc                                 the gradient of KL_t by I_tc

Forward:   `attention_lse_kernel` -> for each chunk of rows: `compare_kernel` (five sums per row and tile)
           -> `finish_kernel` (their sum over a row's tiles)
Backward:  for each chunk of rows: `compare_kernel` (ds into the workspace) -> the kernels of loss_dense_backward.py

# NOTE [Five sums]
Neither N nor lse_I is known before a row ends, but both separate from what is summed, with m the largest score so far:

    KL = (A - X) / N - log N + log L        A = sum P log P      X = sum P (I - m)      L = sum exp(I - m)

so one pass over the tiles is enough, and tiles are independent: each leaves m, L, N, A and X of its columns.  Scores
enter relative to m, because a row of large scores would cancel against lse_I.

# NOTE [Normaliser inside]
The forward returns lse_th + log N_t in place of lse_th.  The backward then gets the normalised p without knowing N:
sum_h exp(scale q_th . k_s - lse_th - log N_t).  Without pools N_t is the number of heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .loss_tiles import LN_2, LOG2_E, finite_or_zero, load_parts, place_in_group, products


@triton.jit(do_not_specialize=["T", "S"])
def attention_lse_kernel(
    p_q, p_k, p_first, p_last, p_lse, scale_log2, T, S, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
    DM: tl.constexpr, DR: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the log-sum-exp of BT queries of one head over the tokens they see."""
    # Under a causal mask the last queries see most: they go first.
    i_t = (tl.num_programs(0) - 1 - tl.program_id(0)) * BT
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t, o_s = tl.arange(0, BT), tl.arange(0, BS)
    m_t = i_t + o_t < T
    first = tl.load(p_first + i_t + o_t, mask=m_t, other=0)
    last = tl.load(p_last + i_t + o_t, mask=m_t, other=0)
    row = i_b * T + i_t
    b_q, b_q_rest = load_parts(p_q + (row * H + i_h) * D + o_t * (H * D), m_t, D, DM, DR)
    p_k += (i_b * S * HKV + i_h // (H // HKV)) * D
    b_max = tl.full((BT,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BT,), dtype=tl.float32)
    # Ranges of later queries begin and end no earlier.
    low, high = tl.load(p_first + i_t), tl.load(p_last + tl.minimum(i_t + BT, T) - 1)
    for i_s in tl.range(low, high, BS, num_stages=STAGES):
        p_rows = p_k + (i_s + o_s).to(tl.int64) * (HKV * D)
        b_k, b_k_rest = load_parts(p_rows, i_s + o_s < high, D, DM, DR)
        b_x = products(b_q, b_q_rest, b_k, b_k_rest, DR, PRECISION) * scale_log2
        s = (i_s + o_s)[None, :]
        b_x = tl.where((s >= first[:, None]) & (s < last[:, None]), b_x, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        base = finite_or_zero(b_new)
        b_sum = b_sum * tl.exp2(b_max - base) + tl.sum(tl.exp2(b_x - base[:, None]), 1)
        b_max = b_new
    b_lse = tl.where(b_sum > 0.0, (b_max + tl.log2(b_sum)) * LN_2, float("-inf"))
    tl.store(p_lse + (row + o_t) * H + i_h, b_lse, mask=m_t)


@triton.jit(do_not_specialize=["b0", "start", "stop", "T", "S", "P", "NT", "NC"])
def compare_kernel(
    p_q, p_k, p_lse, p_q_idx, p_k_idx, p_w, p_lse_idx, p_first, p_last, p_out, scale_log2, stride_out, b0, start, stop,
    T, S, P, NT, NC, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DM: tl.constexpr, DR: tl.constexpr,
    HI: tl.constexpr, DI: tl.constexpr, BD: tl.constexpr, KPOOL: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    GROUP: tl.constexpr, DS_SCALE: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    PRECISION_IDX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compare both distributions of BT of the queries ``start <= t < stop`` over BC classes.

    The forward writes five sums per row to ``p_out [NB, NC, 5, rows]``, NOTE [Five sums]; the backward writes
    ``DS_SCALE * ds`` to ``p_out [NB, rows, stride_out]``, and only where a row of the tile sees a class of it.
    """
    i_t, i_c = place_in_group(tl.program_id(0), NT, NC, GROUP)
    i_n, rows = tl.program_id(1).to(tl.int64), stop - start
    i_b = b0 + i_n
    i_r, i_c = i_t * BT, i_c * BC
    o_t, o_c = tl.arange(0, BT), tl.arange(0, BC)
    i_t = start + i_r
    # Ranges of later queries begin and end no earlier.
    if (i_c >= tl.load(p_last + tl.minimum(i_t + BT, stop) - 1)) | (i_c + BC <= tl.load(p_first + i_t)):
        return
    m_t, m_c = i_t + o_t < stop, i_c + o_c < P
    row = i_b * T + i_t

    b_p = tl.zeros((BT, BC), dtype=tl.float32)
    p_q += row * (H * D) + o_t * (H * D)
    p_k += (i_b * S + i_c.to(tl.int64) * KPOOL) * (HKV * D) + o_c * (KPOOL * HKV * D)
    p_lse += row * H + o_t * H
    # Tokens of a pool are taken one slot after the other, so that any KPOOL fits tiles that are powers of two.
    if H == HKV:
        for i in tl.range(H * KPOOL, num_stages=STAGES):
            i_h = i // KPOOL
            b_q, b_q_rest = load_parts(p_q + i_h * D, m_t, D, DM, DR)
            b_k, b_k_rest = load_parts(p_k + (i % KPOOL) * (HKV * D) + i_h * D, m_c, D, DM, DR)
            b_lse = tl.load(p_lse + i_h, mask=m_t, other=0.0) * LOG2_E
            b_x = products(b_q, b_q_rest, b_k, b_k_rest, DR, PRECISION)
            b_p += tl.exp2(b_x * scale_log2 - b_lse[:, None])
    else:
        for i in range(HKV * KPOOL):
            i_hk = i // KPOOL
            b_k, b_k_rest = load_parts(p_k + (i % KPOOL) * (HKV * D) + i_hk * D, m_c, D, DM, DR)
            for i_g in tl.range(H // HKV, num_stages=STAGES):
                i_h = i_hk * (H // HKV) + i_g
                b_q, b_q_rest = load_parts(p_q + i_h * D, m_t, D, DM, DR)
                b_lse = tl.load(p_lse + i_h, mask=m_t, other=0.0) * LOG2_E
                b_x = products(b_q, b_q_rest, b_k, b_k_rest, DR, PRECISION)
                b_p += tl.exp2(b_x * scale_log2 - b_lse[:, None])

    b_I = tl.zeros((BT, BC), dtype=tl.float32)
    i_d = tl.arange(0, BD)
    m_d = (i_d < DI)[None, :]
    p_k_idx += (i_b * P + i_c) * DI + o_c[:, None] * DI + i_d[None, :]
    b_k = tl.load(p_k_idx, mask=m_c[:, None] & m_d, other=0.0)
    p_q_idx += row * (HI * DI) + o_t[:, None] * (HI * DI) + i_d[None, :]
    p_w += row * HI + o_t * HI
    for i_h in tl.range(HI, num_stages=STAGES):
        b_q = tl.load(p_q_idx + i_h * DI, mask=m_t[:, None] & m_d, other=0.0)
        b_w = tl.load(p_w + i_h, mask=m_t, other=0.0).to(tl.float32) * LOG2_E
        b_I += tl.maximum(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION_IDX), 0.0) * b_w[:, None]

    first = tl.load(p_first + i_t + o_t, mask=m_t, other=0)
    last = tl.load(p_last + i_t + o_t, mask=m_t, other=0)
    c = (i_c + o_c)[None, :]
    allowed = (c >= first[:, None]) & (c < last[:, None])
    if BACKWARD:
        b_lse = tl.load(p_lse_idx + row + o_t, mask=m_t, other=0.0) * LOG2_E
        b_ds = (tl.exp2(b_I - b_lse[:, None]) - b_p) * DS_SCALE
        p_out += (i_n * rows + i_r + o_t)[:, None] * stride_out + c
        tl.store(p_out, tl.where(allowed, b_ds, 0.0).to(p_out.dtype.element_ty), mask=m_t[:, None] & m_c[None, :])
    else:
        b_p = tl.where(allowed, b_p, 0.0)
        b_max = tl.max(tl.where(allowed, b_I, float("-inf")), 1)
        b_I = tl.where(allowed, b_I - finite_or_zero(b_max)[:, None], 0.0)
        p_out += ((i_n * NC + i_c // BC) * 5) * rows + i_r + o_t
        tl.store(p_out, b_max, mask=m_t)
        tl.store(p_out + rows, tl.sum(tl.where(allowed, tl.exp2(b_I), 0.0), 1), mask=m_t)
        tl.store(p_out + 2 * rows, tl.sum(b_p, 1), mask=m_t)
        tl.store(p_out + 3 * rows, tl.sum(b_p * tl.log2(tl.where(b_p > 0.0, b_p, 1.0)), 1), mask=m_t)
        tl.store(p_out + 4 * rows, tl.sum(b_p * b_I, 1), mask=m_t)


@triton.jit
def kl_of_sums(b_max, b_L, b_N, b_A, b_X):
    """Return KL, lse_I and log N of rows from the five sums (base 2), NOTE [Five sums]; zeros for rows without class.

    A row whose attention is all in the tail has N = 0, and p = 0 for every class.
    """
    some, has_p = b_L > 0.0, b_N > 0.0
    b_log_L, b_log_N = tl.log2(tl.where(some, b_L, 1.0)), tl.log2(tl.where(has_p, b_N, 1.0))
    b_kl = tl.where(has_p, (b_A - b_X) / tl.where(has_p, b_N, 1.0) - b_log_N + b_log_L, 0.0)
    return b_kl * LN_2, tl.where(some, (b_max + b_log_L) * LN_2, float("-inf")), b_log_N * LN_2


@triton.jit(do_not_specialize=["b0", "start", "stop", "T", "NC"])
def finish_kernel(
    p_sums, p_first, p_last, p_kl, p_lse_idx, p_log_N, b0, start, stop, T, NC, BC: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the five sums of a row's tiles: the loss of BLOCK rows, lse_I, and log N, which the caller adds to lse."""
    i_r, i_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    rows, i_t = stop - start, start + i_r
    m_t = i_t < stop
    first = tl.load(p_first + i_t, mask=m_t, other=0)
    last = tl.load(p_last + i_t, mask=m_t, other=0)
    b_max = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    b_L = tl.zeros((BLOCK,), dtype=tl.float32)
    b_N = tl.zeros((BLOCK,), dtype=tl.float32)
    b_A = tl.zeros((BLOCK,), dtype=tl.float32)
    b_X = tl.zeros((BLOCK,), dtype=tl.float32)
    low = tl.load(p_first + start + tl.program_id(0) * BLOCK) // BC
    high = (tl.load(p_last + tl.minimum(start + (tl.program_id(0) + 1) * BLOCK, stop) - 1) + BC - 1) // BC
    for i_c in range(low, high):
        # Tiles that no row of theirs sees were not written.
        m = (i_c * BC < last) & (i_c * BC + BC > first)
        p = p_sums + ((i_n * NC + i_c) * 5) * rows + i_r
        b_tile_max = tl.load(p, mask=m, other=float("-inf"))
        b_new = tl.maximum(b_max, b_tile_max)
        base = finite_or_zero(b_new)
        b_tile_N = tl.load(p + 2 * rows, mask=m, other=0.0)
        b_L = b_L * tl.exp2(b_max - base) + tl.load(p + rows, mask=m, other=0.0) * tl.exp2(b_tile_max - base)
        b_X += b_N * (finite_or_zero(b_max) - base) + tl.load(p + 4 * rows, mask=m, other=0.0)
        b_X += b_tile_N * (finite_or_zero(b_tile_max) - base)
        b_N += b_tile_N
        b_A += tl.load(p + 3 * rows, mask=m, other=0.0)
        b_max = b_new
    b_kl, b_lse, b_log_N = kl_of_sums(b_max, b_L, b_N, b_A, b_X)
    row = (b0 + i_n) * T + i_t
    tl.store(p_kl + row, b_kl, mask=m_t)
    tl.store(p_lse_idx + row, b_lse, mask=m_t)
    tl.store(p_log_N + row, b_log_N, mask=m_t)
