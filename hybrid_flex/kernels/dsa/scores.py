"""First kernels of the lightning indexer: scores of a stretch of queries, as integers that sort like them.

    I_ts = sum_j w_tj ReLU(q_idx_tj . k_idx_s)        in eight bits w_tj holds a query's scale, and I_ts takes the key's

The sum over heads runs in float32 registers, so only one number per query and key goes to memory, into a workspace
that the launcher bounds (topk.py) and select.py reads.

`scores_kernel` takes 64 queries and 128 keys at a time and walks over the heads.  `few_scores_kernel` serves calls of
few queries, decoding above all: there the heads of one query are the rows of the product, and every key is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(-(2**31))
"""What stands where there is no key; no score is as small."""


@triton.jit
def sortable(x):
    """Turn float32 into int32 in the same order; zeros of both signs are 0, and no number is NONE."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, NONE - bits, bits)


@triton.jit
def visible_range(
    p_first, p_last, i_b, i_t, m_t, T, S, query_start, KPOOL: tl.constexpr, CAUSAL: tl.constexpr, SEES: tl.constexpr
):
    """Return the keys ``first <= s < last`` that queries i_t of batch entry i_b see; none where ``m_t`` is False.

    SEES "all": keys 0 to S; "range": those from first[t] to last[t]; "length": of a cache of last[b] tokens, the last
    of which the last of the T queries is.
    """
    first = tl.zeros_like(i_t)
    last = tl.zeros_like(i_t) + S
    if SEES == "range":
        first = tl.load(p_first + i_t, mask=m_t, other=0).to(tl.int32)
        last = tl.load(p_last + i_t, mask=m_t, other=0).to(tl.int32)
    if SEES == "length":
        tokens = tl.load(p_last + i_b).to(tl.int32) - T + i_t + 1
        last = tl.minimum(tl.maximum(tokens, 0) // KPOOL, S)
    elif CAUSAL:
        last = tl.minimum(last, (query_start + i_t + 1) // KPOOL)
    return first, tl.where(m_t, last, 0)


@triton.jit
def key_places(p_table, i_b, i_s, S, PAGE: tl.constexpr, PAGES: tl.constexpr):
    """Return block and row of keys i_s of batch entry i_b in ``[blocks, rows, DI]``, and where there is one.

    Blocks are batch entries, or pages of PAGE keys, of which an entry has PAGES in the table.
    """
    m_s = i_s < S
    if PAGE > 0:
        i_block = tl.load(p_table + i_b * PAGES + i_s // PAGE, mask=m_s, other=0).to(tl.int64)
        i_row = i_s % PAGE
        m_s &= i_block >= 0
    else:
        i_block = tl.zeros_like(i_s).to(tl.int64) + i_b
        i_row = i_s
    return i_block, i_row, m_s


@triton.jit(do_not_specialize=["start", "T", "S", "query_start"])
def scores_kernel(
    p_q, p_k, p_w, p_scale, p_table, p_first, p_last, p_keys, stride_qb, stride_kb, stride_ks, stride_wb, stride_scale,
    stride_keys, start, rows, T, S, query_start, HI: tl.constexpr, DI: tl.constexpr, BT: tl.constexpr,
    BS: tl.constexpr, BD: tl.constexpr, TOPK: tl.constexpr, KPOOL: tl.constexpr, CAUSAL: tl.constexpr,
    SEES: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Score BT of the queries ``start <= t < start + rows`` of one batch entry against BS keys."""
    i_s, i_r, i_b = tl.program_id(0) * BS + tl.arange(0, BS), tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(2)
    i_t = start + i_r
    m_t, i_d = i_r < rows, tl.arange(0, BD)
    first, last = visible_range(p_first, p_last, i_b, i_t, m_t, T, S, query_start, KPOOL, CAUSAL, SEES)
    # Rows that see no more than they may keep need no scores.
    last = tl.where(last - first > TOPK, last, first)
    first = tl.where(last > first, first, S)
    if (tl.program_id(0) * BS >= tl.max(last, 0)) | (tl.program_id(0) * BS + BS <= tl.min(first, 0)):
        return
    m_d = i_d < DI
    i_block, i_row, m_s = key_places(p_table, i_b, i_s, S, PAGE, PAGES)
    p_k += (i_block * stride_kb + i_row * stride_ks)[:, None] + i_d[None, :]
    b_k = tl.load(p_k, mask=m_s[:, None] & m_d[None, :], other=0.0)
    p_q += i_b.to(tl.int64) * stride_qb + i_t.to(tl.int64)[:, None] * (HI * DI) + i_d[None, :]
    p_w += i_b.to(tl.int64) * stride_wb + i_t.to(tl.int64) * HI
    b_I = tl.zeros((BT, BS), dtype=tl.float32)
    for h in tl.range(HI, num_stages=STAGES):
        b_q = tl.load(p_q + h * DI, mask=m_t[:, None] & m_d[None, :], other=0.0)
        b_w = tl.load(p_w + h, mask=m_t, other=0.0).to(tl.float32)
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_I += tl.maximum(b_x, 0.0) * b_w[:, None]
    if SCALED:  # the queries' scales are in w
        b_I *= tl.load(p_scale + i_block * stride_scale + i_row, mask=m_s, other=0.0)[None, :]
    p_keys += (i_b * rows + tl.program_id(1) * BT).to(tl.int64) * stride_keys
    all_see = (tl.program_id(0) * BS >= tl.max(first, 0)) & (tl.program_id(0) * BS + BS <= tl.min(last, 0))
    b_keys = sortable(b_I)
    if not all_see:
        b_keys = tl.where((i_s[None, :] >= first[:, None]) & (i_s[None, :] < last[:, None]), b_keys, NONE)
    # Rows of one program are less than 2^31 numbers apart.
    offsets = (tl.arange(0, BT) * stride_keys)[:, None] + i_s[None, :]
    tl.store(p_keys + offsets, b_keys, mask=m_t[:, None] & (i_s < stride_keys)[None, :])


@triton.jit(do_not_specialize=["start", "T", "S", "query_start"])
def few_scores_kernel(
    p_q, p_k, p_w, p_scale, p_table, p_first, p_last, p_keys, stride_qb, stride_kb, stride_ks, stride_wb, stride_scale,
    stride_keys, start, rows, T, S, query_start, HI: tl.constexpr, DI: tl.constexpr, BH: tl.constexpr,
    BS: tl.constexpr, BD: tl.constexpr, TOPK: tl.constexpr, KPOOL: tl.constexpr, CAUSAL: tl.constexpr,
    SEES: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Score one of the queries ``start <= t < start + rows`` of one batch entry against BS keys."""
    i_s, i_r, i_b = tl.program_id(0) * BS + tl.arange(0, BS), tl.program_id(1), tl.program_id(2)
    i_t, i_h, i_d = start + i_r, tl.arange(0, BH), tl.arange(0, BD)
    first, last = visible_range(
        p_first, p_last, i_b, i_t, i_r < rows, T, S, query_start, KPOOL, CAUSAL, SEES
    )  # fmt: skip
    if (last - first <= TOPK) | (tl.program_id(0) * BS >= last) | (tl.program_id(0) * BS + BS <= first):
        return
    m_h, m_d = i_h < HI, i_d < DI
    i_block, i_row, m_s = key_places(p_table, i_b, i_s, S, PAGE, PAGES)
    p_k += (i_block * stride_kb + i_row * stride_ks)[:, None] + i_d[None, :]
    b_k = tl.load(p_k, mask=m_s[:, None] & m_d[None, :], other=0.0)
    p_q += i_b.to(tl.int64) * stride_qb + i_t.to(tl.int64) * (HI * DI)
    b_q = tl.load(p_q + i_h[:, None] * DI + i_d[None, :], mask=m_h[:, None] & m_d[None, :], other=0.0)
    b_w = tl.load(p_w + i_b.to(tl.int64) * stride_wb + i_t.to(tl.int64) * HI + i_h, mask=m_h, other=0.0)
    b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_I = tl.sum(tl.maximum(b_x, 0.0) * b_w.to(tl.float32)[:, None], 0)
    if SCALED:
        b_I *= tl.load(p_scale + i_block * stride_scale + i_row, mask=m_s, other=0.0)
    p_keys += (i_b * rows + i_r).to(tl.int64) * stride_keys + i_s
    seen = (i_s >= first) & (i_s < last)
    tl.store(p_keys, tl.where(seen, sortable(b_I), NONE), mask=i_s < stride_keys)
