"""The indexer's gradients over all visible keys, from ds of a chunk of rows (`compare_kernel` in loss_dense.py).

    x_tjc    = q_idx_tj . k_idx_c                          g_tjc = ds_tc where x_tjc > 0, else 0
    dw_tj    = sum_c g_tjc x_tjc
    dq_tj    = w_tj sum_c g_tjc k_idx_c
    dk_c     = sum_t sum_j (g_tjc w_tj) q_idx_tj

`query_gradient_kernel` walks over the classes of a tile of queries and one head, `key_gradient_kernel` over queries and
heads of a tile of classes; both recompute x.  Each sum has one order, so results are the same bits every time: dk is
kept in float32 from chunk to chunk, in one copy for each group of heads.

# NOTE [Scaled ds]
ds lies between -1 and 1, and its typical entry is a fraction of 1 / S: in float16 it is stored times 2^15, which keeps
what is above 2^-29 at full precision; w joins after the product in dq, and is scaled to at most 1 by the caller in dk.
bfloat16 and float32 have the range.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["b0", "start", "stop", "T", "P"])
def query_gradient_kernel(
    p_grad, p_ds, p_q_idx, p_k_idx, p_w, p_first, p_last, p_dq, p_dw, factor, stride_ds, b0, start, stop, T, P,
    HI: tl.constexpr, DI: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write dq and dw of BT of the queries ``start <= t < stop``, one head; ``factor`` times the gradient scales."""
    # Heads of one tile of queries stand side by side: they read the same ds.  The longest rows go first.
    i_h = tl.program_id(0) % HI
    i_r = (tl.num_programs(0) // HI - 1 - tl.program_id(0) // HI) * BT
    i_n, i_t = tl.program_id(1).to(tl.int64), start + i_r
    i_b = b0 + i_n
    o_t, o_c, i_d = tl.arange(0, BT), tl.arange(0, BC), tl.arange(0, BD)
    m_t, m_d = i_t + o_t < stop, (i_d < DI)[None, :]
    first = tl.load(p_first + i_t + o_t, mask=m_t, other=0)[:, None]
    last = tl.load(p_last + i_t + o_t, mask=m_t, other=0)[:, None]
    row = i_b * T + i_t
    o_q = (row * HI + i_h) * DI + o_t[:, None] * (HI * DI) + i_d[None, :]
    b_q = tl.load(p_q_idx + o_q, mask=m_t[:, None] & m_d, other=0.0)
    p_k_idx += i_b * P * DI
    p_ds += (i_n * (stop - start) + i_r + o_t)[:, None] * stride_ds
    DT: tl.constexpr = p_k_idx.dtype.element_ty
    b_dq = tl.zeros((BT, BD), dtype=tl.float32)
    b_dw = tl.zeros((BT,), dtype=tl.float32)
    # Ranges of later queries begin and end no earlier.
    low, high = tl.load(p_first + i_t) // BC * BC, tl.load(p_last + tl.minimum(i_t + BT, stop) - 1)
    for i_c in tl.range(low, high, BC, num_stages=STAGES):
        c = i_c + o_c
        b_k = tl.load(p_k_idx + c[:, None] * DI + i_d[None, :], mask=(c < P)[:, None] & m_d, other=0.0)
        # Rows of the workspace end with whole tiles.  What no kernel wrote is not visible either.
        b_ds = tl.load(p_ds + c[None, :], mask=m_t[:, None], other=0.0)
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        visible = (c[None, :] >= first) & (c[None, :] < last)
        b_g = tl.where(visible & (b_x > 0.0), b_ds.to(tl.float32), 0.0)
        b_dw += tl.sum(b_g * b_x, 1)
        b_dq = tl.dot(b_g.to(DT), b_k, b_dq, input_precision=PRECISION)
    scale = tl.load(p_grad).to(tl.float32) * factor
    o_w = (row + o_t) * HI + i_h
    b_w = tl.load(p_w + o_w, mask=m_t, other=0.0).to(tl.float32)
    b_dq *= (b_w * scale)[:, None]
    tl.store(p_dq + o_q, b_dq.to(p_dq.dtype.element_ty), mask=m_t[:, None] & m_d)
    tl.store(p_dw + o_w, (b_dw * scale).to(p_dw.dtype.element_ty), mask=m_t)


@triton.jit(do_not_specialize=["b0", "start", "stop", "T", "P", "B"])
def key_gradient_kernel(
    p_ds, p_q_idx, p_k_idx, p_w, p_first, p_last, p_row_first, p_row_last, p_dk, stride_ds, b0, start, stop, T, P, B,
    HI: tl.constexpr, HEADS: tl.constexpr, DI: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add to ``p_dk [groups, B, P, DI]`` what queries ``start <= t < stop`` and HEADS heads give to BC classes.

    Class c is seen by the queries ``row_first[c] <= t < row_last[c]``.
    """
    i_c, i_group = tl.program_id(0) * BC, tl.program_id(1)
    i_n = tl.program_id(2).to(tl.int64)
    i_b = b0 + i_n
    o_t, o_c, i_d = tl.arange(0, BT), tl.arange(0, BC), tl.arange(0, BD)
    c, m_d = (i_c + o_c)[:, None], (i_d < DI)[None, :]
    # Queries of later classes begin and end no earlier.
    low = tl.maximum(tl.load(p_row_first + i_c), start)
    high = tl.minimum(tl.load(p_row_last + tl.minimum(i_c + BC, P) - 1), stop)
    if low >= high:
        return
    o_k = (i_b * P + i_c) * DI + o_c[:, None] * DI + i_d[None, :]
    b_k = tl.load(p_k_idx + o_k, mask=(c < P) & m_d, other=0.0)
    p_ds += i_n * (stop - start) * stride_ds + c
    DT: tl.constexpr = p_k_idx.dtype.element_ty
    b_dk = tl.zeros((BC, BD), dtype=tl.float32)
    for i_t in range(low, high, BT):
        t = i_t + o_t
        m_t = t < high
        first = tl.load(p_first + t, mask=m_t, other=0)[None, :]
        last = tl.load(p_last + t, mask=m_t, other=0)[None, :]
        b_ds = tl.load(p_ds + (t - start).to(tl.int64)[None, :] * stride_ds, mask=m_t[None, :], other=0.0)
        b_ds = tl.where((c >= first) & (c < last), b_ds.to(tl.float32), 0.0)
        row = i_b * T + i_t
        p_q = p_q_idx + row * (HI * DI) + o_t[:, None] * (HI * DI) + i_d[None, :]
        p_w_t = p_w + row * HI + o_t * HI
        for i_h in tl.range(i_group * HEADS, tl.minimum(i_group * HEADS + HEADS, HI), num_stages=STAGES):
            b_q = tl.load(p_q + i_h * DI, mask=m_t[:, None] & m_d, other=0.0)
            b_w = tl.load(p_w_t + i_h, mask=m_t, other=0.0).to(tl.float32)
            b_x = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
            b_g = tl.where(b_x > 0.0, b_ds * b_w[None, :], 0.0)
            b_dk = tl.dot(b_g.to(DT), b_q, b_dk, input_precision=PRECISION)
    p_dk += i_group.to(tl.int64) * B * P * DI + o_k
    m = (c < P) & m_d
    tl.store(p_dk, tl.load(p_dk, mask=m, other=0.0) + b_dk, mask=m)
