"""Second kernel of the lightning indexer: the topk largest of a row of sortable integers, exactly.

NOTE [Selection]: one block of threads walks over a row.  Of up to WIDTH candidates in registers it finds the topk-th
largest value x* and keeps what is above x*, and of what equals x* the lowest columns until topk are kept.  Of the rest
of the row only what is above x* can still be among the topk (a later column loses against an equal one); that is
appended until WIDTH candidates are together again, and so on to the end of the row.  In ascending order there is one
selection for every WIDTH - topk columns, in any order about log(n / topk) for n columns, but for NOTE [Sample].  A
running count over the columns says where each candidate goes, so that they stay in ascending order of columns.

NOTE [Sample]: a row wider than WIDTH begins with a value that about 5/8 WIDTH of its columns reach, by a sample, so
that nearly always what is above it at the end of the row fits and one selection is enough.  If fewer than topk reach
it, the walk begins again without.

x* is searched by counting: how many are at least a, how many at least b, in one sum.  The first a and b come from mean
and deviation of a sample, as if scores were normal, and of candidates that an earlier selection has cut off below as if
they fell off exponentially; the next from the line through the last two counts.  Where that halved neither the
candidates between the bounds nor those between k and the nearer bound, a and b cut the range of integers in three.  The
search ends early where exactly topk are at least a or b: for real scores after four or five sums, at worst after some
forty.

A model of this (numpy; normal scores, such with a trend, and those of 8 heads with a ReLU; topk 2048 of 32768 and
131072) takes one selection of five sums for a row, and four or five sums over a sample of 1024.  Without a sample, with
the guess for normal scores everywhere, and with thirds of the integers wherever the candidates between the bounds were
not halved, it took 2.5 and 3.6 selections and 22 and 36 sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import NONE, sortable, visible_range

VECTOR = tl.constexpr(4)
"""Columns side by side that one thread holds: tiles are ``[VECTOR, columns / VECTOR]``, 16 bytes a load."""
ALIGNED = tl.constexpr(16)
"""Columns to which loads are rounded, so that they are whole vectors; the launcher's rows are as long."""
LANES = tl.constexpr(32)
"""Threads of a warp."""
BYTES = tl.constexpr(4)
"""Counts that one word holds."""
SAMPLE = tl.constexpr(8)
"""One of so many candidates is in the sample."""
LARGEST = tl.constexpr(0x7FFFFFFF)
"""Largest integer."""
MANY = tl.constexpr(1 << 20)
"""More than there are candidates."""


@triton.jit
def as_float(x):
    """Turn a sortable integer back into float32."""
    return tl.where(x < 0, NONE - x, x).to(tl.float32, bitcast=True)


@triton.jit
def load_sample(p_keys, number, SIZE: tl.constexpr):
    """Load SIZE of ``p_keys[:number]``, evenly spaced; NONE where there are fewer."""
    i = tl.arange(0, SIZE) * tl.maximum(number // SIZE, 1)
    return tl.load(p_keys + i, mask=i < number, other=NONE)


@triton.jit
def guess(b_x, number, k, is_tail):
    """Return two values, as floats, that the k-th largest of ``number`` keys may lie between, by a sample of them.

    ``is_tail``: these are what was left of more, the largest.
    """
    m = b_x != NONE
    b_v = tl.where(m, as_float(b_x), 0.0)
    size = tl.sum(m.to(tl.int32), 0).to(tl.float32)
    mean = tl.sum(b_v, 0) / size
    deviation = tl.sqrt(tl.maximum(tl.sum(b_v * b_v, 0) / size - mean * mean, 0.0))
    # The quantile of the logistic distribution, in deviations of the normal one that it resembles.
    middle = 0.6 * tl.log((number - k).to(tl.float32) / k)
    # That of the exponential one is log(number / k) - 1; normal scores fall off a little faster.
    middle = tl.where(is_tail, tl.log(number.to(tl.float32) / k) - 1.1, middle)
    return mean + (middle - 0.07) * deviation, mean + (middle + 0.07) * deviation


@triton.jit
def between_bounds(from_low, above, high, k):
    """Return how many candidates lie between the bounds of a search, and between k and the nearer one.

    MANY on a side that no count has bounded yet.
    """
    over, under = from_low - k, tl.where(high == LARGEST, MANY, k - above)
    return over + under, tl.minimum(over, under)


@triton.jit
def kth_largest(b_x, k, lower, upper):
    """Return x and m, so that of ``b_x`` what is above x and m of what equals x are its k largest; it has k or more.

    Args:
        b_x: sortable integers.
        k: how many.
        lower: float where the search begins.
        upper: the other one.
    """
    low, high = tl.full((), NONE, tl.int32), tl.full((), LARGEST, tl.int32)
    # At least k are >= low, in number from_low, and fewer than k are > high, in number above.
    from_low, above = tl.full((), MANY, tl.int32), tl.full((), 0, tl.int32)
    missing = tl.full((), 1, tl.int32)  # 0 once exactly k are known to be above low
    stalled = low > high
    while low < high:
        a, b = sortable(lower), sortable(upper)
        if stalled:
            third = (((high.to(tl.int64) - low) * 0x5555) >> 16).to(tl.int32)
            # Zero first: there the ReLU leaves plateaus.
            zero = (low <= 0) & (high >= 0)
            a, b = tl.where(zero, 0, low + 1 + third), tl.where(zero, 1, high - third)
        a = tl.minimum(tl.maximum(a, low + 1), high)
        b = tl.minimum(tl.maximum(b, a), high)
        counts = tl.sum(tl.where(b_x >= b, 0x10001, tl.where(b_x >= a, 1, 0)))
        from_a, from_b = counts & 0xFFFF, counts >> 16
        held, near = between_bounds(from_low, above, high, k)
        if from_b == k:
            low, high, missing = b - 1, b - 1, missing * 0
        elif from_a == k:
            low, high, missing = a - 1, a - 1, missing * 0
        elif from_b > k:
            low, from_low = b, from_b
        elif from_a > k:
            low, high, from_low, above = a, b - 1, from_a, from_b
        else:
            high, above = a - 1, from_a
        holds, nearer = between_bounds(from_low, above, high, k)
        stalled = ((2 * holds > held) & (2 * nearer > near)) | (from_a == from_b)
        # The line through both counts meets k at centre; as many columns either way as counts deviate from a line.
        value = as_float(b)
        between = tl.maximum(from_a - from_b, 1).to(tl.float32)
        slope = (value - as_float(a)) / between
        centre = value + ((from_b - k).to(tl.float32) + 0.5) * slope
        beyond = tl.minimum(tl.abs(from_a - k), tl.abs(from_b - k)).to(tl.float32)
        inside = (from_a > k) & (from_b < k)
        margin = slope * tl.where(inside, 0.35 * tl.sqrt(between), tl.maximum(0.25 * beyond, 1.0))
        lower, upper = centre - margin, centre + margin
    return low, missing * (k - above)


@triton.jit
def tile_columns(SIZE: tl.constexpr):
    """Return 0 to SIZE as a tile ``[VECTOR, SIZE / VECTOR]``."""
    return tl.arange(0, SIZE // VECTOR)[None, :] * VECTOR + tl.arange(0, VECTOR)[:, None]


@triton.jit
def _aligned(i):
    return (i + (ALIGNED - 1)) // ALIGNED * ALIGNED


@triton.jit
def load_columns(p_keys, last, EXACT: tl.constexpr, SIZE: tl.constexpr):
    """Load SIZE columns, NONE from ``last`` on; if not EXACT, what stands to the end of a vector is NONE already."""
    i_c = tile_columns(SIZE)
    end = last
    if not EXACT:
        end = _aligned(last)
    return tl.load(p_keys + i_c, mask=i_c < end, other=NONE)


@triton.jit
def places(m):
    """Return how many of ``m [VECTOR, columns / VECTOR]`` are True left of each stack of VECTOR, and in all."""
    # Runs are the stacks that one warp holds side by side: within them no thread waits for another warp.  A run counts
    # to 128 at most, so that one word counts in BYTES runs.
    stacks: tl.constexpr = m.shape[1]
    runs = tl.reshape(tl.sum(m.to(tl.int32), 0), (BYTES, stacks // LANES // BYTES, LANES))
    shift = tl.arange(0, BYTES)[:, None, None] * 8
    packed = tl.sum(runs << shift, 0)
    within = ((tl.cumsum(packed, 1)[None, :, :] >> shift) & 0xFF) - runs
    totals = tl.reshape((tl.sum(packed, 1)[None, :, None] >> shift) & 0xFF, (stacks // LANES,))
    before = tl.reshape(tl.cumsum(totals, 0) - totals, (BYTES, stacks // LANES // BYTES))
    return tl.reshape(within + before[:, :, None], (stacks,)), tl.sum(totals, 0)


@triton.jit
def row_of(b_x, i: tl.constexpr):
    """Return row i of ``b_x [VECTOR, columns / VECTOR]``, which every thread has of its own columns."""
    return tl.sum(tl.where(tl.arange(0, VECTOR)[:, None] == i, b_x, 0), 0)


@triton.jit
def store_above(b_x, x, i_to, start, p_list, listed, p_to, p_to_keys, with_keys):
    """Store the columns of what is above x in ``b_x`` to ``p_to + i_to``, which places() gave, and its keys.

    Column c of the tile is ``start + c``, or stands in ``p_list + c``.  The tile goes row by row: a store of all of it
    would first deal the columns to other threads.
    """
    i_c = tile_columns(b_x.shape[1] * VECTOR)
    for i in tl.static_range(VECTOR):
        b_row = row_of(b_x, i)
        i_row = row_of(i_c, i)
        m = b_row > x
        columns = start + i_row
        if listed:
            columns = tl.load(p_list + i_row, mask=m, other=0)
        tl.store(p_to + i_to, columns, mask=m)
        if with_keys:
            tl.store(p_to_keys + i_to, b_row, mask=m)
        i_to += m.to(tl.int32)


@triton.jit
def without_ties(b_x, x, missing):
    """Take out of ``b_x`` what equals x, but for the first columns, ``missing`` in number."""
    ties = b_x == x
    i_tie, _ = places(ties)
    i_tie = i_tie[None, :] + tl.cumsum(ties.to(tl.int32), 0)
    return tl.where(ties & (i_tie > missing), NONE, b_x)


@triton.jit
def reached_by(p_keys, number, wanted, SIZE: tl.constexpr):
    """Return a value that about ``wanted`` of ``p_keys[:number]`` reach, by a sample of SIZE of them."""
    b_x = load_sample(p_keys, number, SIZE)
    lower, upper = guess(b_x, number, wanted, False)
    x, _ = kth_largest(b_x, tl.maximum(wanted * SIZE // number, 1), lower, upper)
    return x


@triton.jit
def append_above(
    p_keys, p_columns, p_to, p_to_keys, x, kept, position, last, start, FIRST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Append what is above x from ``position`` on to the candidates, half a tile at a time while there is room.

    Returns:
        how many candidates there are, and the first column that is not among those looked at.
    """
    half: tl.constexpr = WIDTH // 2
    room = tl.full((), True, tl.int1)
    b_next = load_columns(p_keys + position, last - position, not FIRST, half)
    for _ in range(position, last, half):  # a `while` that ends with the room could not carry the next half
        b_new, ahead = b_next, position + half
        b_next = load_columns(p_keys + ahead, tl.where(room, last - ahead, 0), not FIRST, half)
        if room:
            i_new, number = places(b_new > x)
            room = kept + number <= WIDTH
            if room:
                store_above(
                    b_new, x, i_new, start + position, p_columns + position, not FIRST, p_to + kept, p_to_keys + kept,
                    True,
                )  # fmt: skip
                kept += number
                position = ahead
    return kept, position


@triton.jit
def end_vector(p_keys, number):
    """Write NONE behind ``number`` keys, to the end of a vector."""
    i_pad = number + tl.arange(0, ALIGNED)
    tl.store(p_keys + i_pad, tl.zeros_like(i_pad) + NONE, mask=i_pad < _aligned(number))


@triton.jit(do_not_specialize=["start", "T", "S", "query_start", "width"])
def select_kernel(
    p_keys, p_columns, p_kept, p_first, p_last, p_out_keys, p_out, stride_keys, stride_out_b, start, rows, T, S,
    query_start, width, span, TOPK: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, KPOOL: tl.constexpr,
    CAUSAL: tl.constexpr, SEES: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Keep the TOPK best of ``span`` columns of one query's row of keys, ``[batch, rows, stride_keys]``.

    In the FIRST round a row's columns are the keys' own numbers, and those a query sees count; later they stand in
    ``p_columns``, beside their keys, and those that are not NONE count.  The LAST round, of one span, writes int32
    indices, -1 in unused slots; the other writes keys and columns for it.  Of ``p_kept [batch, rows, spans, 3, WIDTH]``
    two thirds take the columns of candidates in turn, the last their keys.
    """
    i_span, i_r, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i_r >= rows:  # a launch without queries has a program nevertheless
        return
    # Columns and queries are int32; sizes of a graph that leaves them open are not.
    start, T, S = tl.cast(start, tl.int32), tl.cast(T, tl.int32), tl.cast(S, tl.int32)
    query_start, width, span = tl.cast(query_start, tl.int32), tl.cast(width, tl.int32), tl.cast(span, tl.int32)
    i_row = (i_b * rows + i_r).to(tl.int64)
    i_k = tl.arange(0, BK)[None, :]
    m_k = i_k < TOPK
    p_keys += i_row * stride_keys
    p_columns += i_row * stride_keys
    slot = i_row * tl.num_programs(0) + i_span
    p_kept += slot * (3 * WIDTH)
    if LAST:
        p_out += i_b.to(tl.int64) * stride_out_b + (start + i_r).to(tl.int64) * TOPK
    else:
        p_out += slot * TOPK
        p_out_keys += slot * TOPK
    first, last = i_span * span, tl.minimum(i_span * span + span, width)
    if FIRST:
        from_key, to_key = visible_range(
            p_first, p_last, i_b, start + i_r, i_r < rows, T, S, query_start, KPOOL, CAUSAL, SEES
        )  # fmt: skip
        first = tl.maximum(first, from_key)
        last = tl.maximum(tl.minimum(last, to_key), first)
        if last - first <= TOPK:
            tl.store(p_out + i_k, tl.where(i_k < last - first, first + i_k, -1), mask=m_k)
            if not LAST:
                # A row that may keep all it sees has no scores; any do.
                scored = tl.where(to_key - from_key > TOPK, last - first, 0)
                b_x = tl.load(p_keys + first + i_k, mask=i_k < scored, other=0)
                tl.store(p_out_keys + i_k, tl.where(i_k < last - first, b_x, NONE), mask=m_k)
            return
    start = first // ALIGNED * ALIGNED
    p_keys += start
    p_columns += start
    last -= start
    # Candidates: what is above x of the columns before `position`, `kept` in number.  Of a row that fits they are all
    # columns, where they lie; else their columns lie on one side of p_kept, those of the next ones on the other.
    p_kept_keys = p_kept + 2 * WIDTH
    lowest, none = tl.full((), NONE, tl.int32), tl.full((), 0, tl.int32)
    fits, walking, sampled = last <= WIDTH, tl.full((), True, tl.int1), tl.full((), False, tl.int1)
    x, kept, position, side = lowest, last, _aligned(last), 0
    if not fits:
        kept, position = none, none
        if FIRST:
            sampled = tl.full((), True, tl.int1)
            x = tl.maximum(reached_by(p_keys, last, 5 * WIDTH // 8, max(1024, WIDTH // SAMPLE)), NONE + 1) - 1
    while walking:
        kept, position = append_above(
            p_keys, p_columns, p_kept + side, p_kept_keys, x, kept, position, last, start, FIRST, WIDTH
        )
        if sampled & (kept < TOPK):
            x, kept, position = lowest, none, none
        else:
            walking = position < last
            p_list, p_list_keys = p_columns, p_keys
            if not fits:
                end_vector(p_kept_keys, kept)
                tl.debug_barrier()
                p_list, p_list_keys = p_kept + side, p_kept_keys
            b_x = load_columns(p_list_keys, kept, not FIRST, WIDTH)
            listed = (not FIRST) | (not fits)
            above = lowest
            if kept > TOPK:
                b_sample = load_sample(p_list_keys, kept, WIDTH // SAMPLE)
                lower, upper = guess(b_sample, kept, TOPK, listed)
                x, missing = kth_largest(b_x, TOPK, lower, upper)
                above = x
                if (missing > 0) & (x != NONE):
                    b_x = without_ties(b_x, x, missing)
                    above = x - 1
            i_to, kept = places(b_x > above)
            side = WIDTH - side
            p_to, p_to_keys = p_kept + side, p_kept_keys
            if not walking:
                p_to, p_to_keys = p_out, p_out_keys
            tl.debug_barrier()  # the candidates have been read
            store_above(b_x, above, i_to, start, p_list, listed, p_to, p_to_keys, walking | (not LAST))
        sampled = tl.full((), False, tl.int1)
    tl.store(p_out + i_k, tl.zeros_like(i_k) - 1, mask=m_k & (i_k >= kept))
    if not LAST:
        tl.store(p_out_keys + i_k, tl.zeros_like(i_k) + NONE, mask=m_k & (i_k >= kept))
