"""Second kernel of the lightning indexer: the topk largest of a row of sortable integers, exactly.

NOTE [Selection]: a block of threads holds WIDTH columns of a row in registers and looks for the topk-th largest value
x* by splitting the range of values in three: how many are at least a, how many at least b, in one sum.  Kept is what is
above x*, and of what equals x* the lowest columns until topk are kept; a running sum over the columns says where each
goes, so the result is in ascending order of columns whatever the order of threads.  The search ends early where exactly
topk values are at least a or b, for real scores after a dozen sums.

Rows wider than WIDTH are cut into segments; what each segment keeps, at most topk, is the row of the next round.  A
column that is not among the topk of its segment is not among those of its row, and lower segments come first, so that
among equals the lower column still wins.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import visible_range

NONE = tl.constexpr(-(2**31))
"""What stands where there is no key; no score is as small."""


@triton.jit
def kth_largest(b_x, k, LARGE: tl.constexpr):
    """Return x and m, so that of ``b_x`` what is above x and m of what equals x are its k largest; it has k or more."""
    low = tl.min(tl.where(b_x == NONE, LARGE, b_x), 0).to(tl.int64)
    high = tl.max(b_x, 0).to(tl.int64)
    missing = tl.full((), 1, tl.int32)  # 0 once exactly k are known to be above low
    # At least k values are >= low, fewer than k are > high.
    while low < high:
        third = (high - low) // 3
        a = low + 1 + third
        b = tl.minimum(a + third + 1, high)
        counts = tl.sum((b_x >= a.to(tl.int32)).to(tl.int32) + ((b_x >= b.to(tl.int32)).to(tl.int32) << 16), 0)
        from_a, from_b = counts & 0xFFFF, counts >> 16
        if from_b == k:
            low, high, missing = b - 1, b - 1, missing * 0
        elif from_a == k:
            low, high, missing = a - 1, a - 1, missing * 0
        elif from_b > k:
            low = b
        elif from_a > k:
            low, high = a, b - 1
        else:
            high = a - 1
    x = low.to(tl.int32)
    return x, missing * (k - tl.sum((b_x > x).to(tl.int32), 0))


@triton.jit(do_not_specialize=["start", "T", "S", "query_start", "width"])
def select_kernel(
    p_keys, p_columns, p_first, p_last, p_out_keys, p_out, stride_keys, stride_out_b, start, rows, T, S,
    query_start, width, TOPK: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, KPOOL: tl.constexpr,
    CAUSAL: tl.constexpr, SEES: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Keep the TOPK best of one segment of one query's row of keys, ``[batch, rows, stride_keys]``.

    In the FIRST round a row's columns are the keys' own numbers, and those a query sees count; later they stand in
    ``p_columns``, beside their keys, and those that are not NONE count.  The LAST round, of one segment, writes int32
    indices, -1 in unused slots; the others write keys and columns for the next round.
    """
    i_segment, i_r, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = (i_b * rows + i_r).to(tl.int64)
    i_c, i_k = i_segment * WIDTH + tl.arange(0, WIDTH), tl.arange(0, BK)
    m_k = i_k < TOPK
    p_keys += i_row * stride_keys
    if LAST:
        p_out += i_b.to(tl.int64) * stride_out_b + (start + i_r).to(tl.int64) * TOPK
    else:
        slot = (i_row * tl.num_programs(0) + i_segment) * TOPK
        p_out += slot
        p_out_keys += slot
    if FIRST:
        first, last = visible_range(
            p_first, p_last, i_b, start + i_r, i_r < rows, T, S, query_start, KPOOL, CAUSAL, SEES
        )  # fmt: skip
        seen = last - first
        first = tl.maximum(first, i_segment * WIDTH)
        count = tl.maximum(tl.minimum(last, i_segment * WIDTH + WIDTH) - first, 0)
        if count <= TOPK:
            tl.store(p_out + i_k, tl.where(i_k < count, first + i_k, -1), mask=m_k)
            if not LAST:
                # A row that may keep all it sees has no scores; any do.
                scored = tl.where(seen > TOPK, count, 0)
                b_x = tl.load(p_keys + first + i_k, mask=i_k < scored, other=0)
                tl.store(p_out_keys + i_k, tl.where(i_k < count, b_x, NONE), mask=m_k)
            return
        b_x = tl.load(p_keys + i_c, mask=(i_c >= first) & (i_c < first + count), other=NONE)
    else:
        b_x = tl.load(p_keys + i_c, mask=i_c < width, other=NONE)
        count = tl.sum((b_x != NONE).to(tl.int32), 0)
    keep = tl.minimum(count, TOPK)
    x, missing = tl.full((), NONE, tl.int32), tl.full((), 0, tl.int32)
    if count > TOPK:
        x, missing = kth_largest(b_x, TOPK, 0x7FFFFFFF)
    running = tl.cumsum((b_x > x).to(tl.int32) + ((b_x == x).to(tl.int32) << 16), 0)
    num_above, num_equal = running & 0xFFFF, running >> 16
    m = (b_x > x) | ((b_x == x) & (num_equal <= missing))
    i_slot = num_above + tl.minimum(num_equal, missing) - 1
    if FIRST:
        columns = i_c
    else:
        columns = tl.load(p_columns + i_row * stride_keys + i_c, mask=m, other=0)
    tl.store(p_out + i_slot, columns, mask=m)
    tl.store(p_out + i_k, tl.zeros_like(i_k) - 1, mask=m_k & (i_k >= keep))
    if not LAST:
        tl.store(p_out_keys + i_slot, b_x, mask=m)
        tl.store(p_out_keys + i_k, tl.zeros_like(i_k) + NONE, mask=m_k & (i_k >= keep))
