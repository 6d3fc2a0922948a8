"""Attention to a selection under a mask of bits on Hopper: the forward of masked.py, every copy placed by hand.

With l = log2(e) scale, over the union U = {u_0 < u_1 < ...} of what the queries of a tile have selected::

    s_tj = q_t . k_{u_j}                -inf where bit j of query t is 0
    m'   = max(m, l max_j s_tj)         p_tj = 2^(l s_tj - m')         a = 2^(m - m')
    L    = a L + sum_j p_tj             O    = a O + sum_j p_tj v_{u_j}
    o    = O / L                        lse  = log L + m log 2

A negative l becomes positive, and the queries change their sign: the largest product must be the largest logit.

# NOTE [Mask as product]
Where a query has not selected a key, HIDDEN is added to the product::

    s = E N + q k^T         E_rt = 1 where row r belongs to query t of the warpgroup      N_tj = 0, or HIDDEN

E stays in registers, N is spread out by those who copy: one instruction of the tensor cores instead of three for each
product of each thread.  HIDDEN is finite, since 0 times -inf is no number, and maxima begin at half of it: what is
hidden weighs 2^(l HIDDEN / 2) = 0 even where nothing else has been seen.

Written in Gluon (hopper.py).  In Triton's pipeline products wait for weights and weights for products.

# NOTE [Three partitions]
Two warpgroups weigh and multiply half of the rows each, four more warps copy for both.  A tile's buffer passes from one
to the others and back through two barriers: `ready`, which those who copy complete, and `free`, which takes both
warpgroups.  So one may weigh while the other one's products run, and neither spends instructions on addresses.  How
many registers they get decides on more than spills: PTX cannot say that the weights of the last tile are in use while
this one is weighed, and with 208 or 224 ptxas gives their registers to the new ones, which then wait for the products.

# NOTE [Side by side]
While a tile is weighed, the logits of the next one and the sums over the one before are multiplied.  So a step begins
by starting both products, and ends by waiting for both; then the buffer of the tile before is free.

# NOTE [Five buffers]
Of every step one tile is read for its keys (the next), one is weighed, one is read for its values (the last), and two
are being copied: one, where more than 16 queries a warpgroup leave no room for another.

# NOTE [Queries in registers]
A warpgroup multiplies 64 rows.  Were its queries read from shared memory, a product of 64 x 64 x 16 would read 4 KB in
its 32 cycles, all that the memory gives; the copies need some of it.
"""

# ruff: noqa: RUF005 (Gluon cannot unpack)

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hybrid_flex.kernels.launch import next_power_of_2, on_its_device

from .gather import LN_2, LOG2_E, LOWEST
from .hopper import (
    as_operand,
    as_rows,
    barrier,
    copy_rows,
    is_on_hopper,
    load_slots,
    on_lines,
    selected_rows,
    signal,
    strides,
)
from .masked import ROWS, Unions

WIDTHS = (64, 128)
# NOTE [Mask as product]: the lowest number of bfloat16, and its bits.  Products are less than a third of it.
HIDDEN = gl.constexpr(-3.3895313892515355e38)
HIDDEN_BITS = gl.constexpr(-129)
# Of less all keys weigh the same, but HIDDEN would not be hidden.
SMALLEST = gl.constexpr(2.0**-100)


@gluon.jit
def copy_selected(s_x, i_buffer, p_x, b_key, x_row, layout: gl.constexpr):
    """Start copying the selected rows."""
    p_rows, m_rows = selected_rows(p_x, b_key, x_row)
    copy_rows(s_x.index(i_buffer), p_rows, m_rows, layout)


@gluon.jit
def load_words(p_words, CHOSEN, j, number, QUERIES: gl.constexpr, N: gl.constexpr, layout: gl.constexpr):
    """Load the two words of bits of a tile for the queries of a warpgroup, 0 where there are none."""
    i_query = gl.arange(0, N, layout)
    p_words += i_query.to(gl.int64) * CHOSEN + j // 32
    m_query = (i_query < QUERIES) & (j < number)
    return gl.load(p_words, mask=m_query, other=0), gl.load(p_words + 1, mask=m_query, other=0)


@gluon.jit
def spread(s_hidden, b_word0, b_word1, layout: gl.constexpr):
    """Store 0 where a bit is 1, HIDDEN where it is 0: NOTE [Mask as product]."""
    i_key = gl.arange(0, s_hidden.shape[1], gl.SliceLayout(0, layout))[None, :]
    # A thread's keys are 8 n to 8 n + 7: one shift serves all, the others are constants.
    b_word = gl.where(i_key < 32, b_word0[:, None], b_word1[:, None]) >> (i_key & 24)
    b_hidden = gl.where((b_word & (1 << (i_key & 7))) == 0, HIDDEN_BITS, 0)
    s_hidden.store(b_hidden.to(gl.int16).to(gl.bfloat16, bitcast=True))


@gluon.jit
def copy_tiles(
    QUERIES: gl.constexpr, s_hidden0, s_hidden1, number, s_k, s_v, ready, free, p_k, p_v, k_row, v_row, p_keys,
    p_words0, p_words1, CHOSEN,
):  # fmt: skip
    """Copy the keys and values of all tiles, each into the buffer that has been free for the longest, and its mask."""
    BUFFERS: gl.constexpr = s_k.shape[0]
    BN: gl.constexpr = s_k.shape[1]
    D: gl.constexpr = s_k.shape[2]
    N: gl.constexpr = s_hidden0.shape[1]
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    MASK: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, COPY)
    QUERY: gl.constexpr = gl.SliceLayout(1, MASK)
    b_key = load_slots(p_keys, 0, number, BN, ROW)
    b_word00, b_word01 = load_words(p_words0, CHOSEN, 0, number, QUERIES, N, QUERY)
    b_word10, b_word11 = load_words(p_words1, CHOSEN, 0, number, QUERIES, N, QUERY)
    i_before, i_buffer, phase = 0, 0, 1  # the phase before a barrier's first one counts as complete
    for j in range(0, gl.maximum(number, 1), BN):  # of no keys a tile of zeros
        mbarrier.wait(free.index(i_buffer), phase)
        copy_selected(s_k, i_buffer, p_k, b_key, k_row, COPY)
        copy_selected(s_v, i_buffer, p_v, b_key, v_row, COPY)
        async_copy.commit_group()
        b_key = load_slots(p_keys, j + BN, number, BN, ROW)
        if j > 0:
            async_copy.wait_group(1)
            fence_async_shared()
            signal(ready.index(i_before))
        spread(s_hidden0.index(i_buffer), b_word00, b_word01, MASK)
        spread(s_hidden1.index(i_buffer), b_word10, b_word11, MASK)
        b_word00, b_word01 = load_words(p_words0, CHOSEN, j + BN, number, QUERIES, N, QUERY)
        b_word10, b_word11 = load_words(p_words1, CHOSEN, j + BN, number, QUERIES, N, QUERY)
        i_before = i_buffer
        i_buffer = gl.where(i_buffer == BUFFERS - 1, 0, i_buffer + 1)
        phase ^= gl.where(i_buffer == 0, 1, 0)
    async_copy.wait_group(0)
    fence_async_shared()
    signal(ready.index(i_before))


@gluon.jit
def multiply(b_q, b_own, s_k, s_hidden, i, b_none):
    """Start multiplying queries with the keys of a tile, under its mask."""
    b_s = warpgroup_mma(b_own, s_hidden.index(i), b_none, use_acc=False, is_async=True)
    return warpgroup_mma(b_q, s_k.index(i).permute((1, 0)), b_s, is_async=True)


@gluon.jit
def weigh(b_s, factor, b_m, b_L):
    """Return the weights of a tile, what scales the sums, and the new maxima and totals."""
    b_largest = gl.maximum(b_m, gl.max(b_s, 1) * factor)
    b_p = gl.exp2(b_s * factor - b_largest[:, None])
    b_a = gl.exp2(b_m - b_largest)
    return b_p, b_a, b_largest, b_L * b_a + gl.sum(b_p, 1)


@gluon.jit
def attend_rows(
    FIRST: gl.constexpr, H: gl.constexpr, G: gl.constexpr, BG: gl.constexpr, s_q, s_hidden, number, s_k, s_v, ready,
    free, p_q, q_token, q_head, p_o, p_lse, scale, i_first, T, is_masked,
):  # fmt: skip
    """Compute o and lse of the rows of a tile from FIRST on, as many as a warpgroup multiplies."""
    ROWS: gl.constexpr = s_q.shape[0]
    BUFFERS: gl.constexpr = s_k.shape[0]
    BN: gl.constexpr = s_k.shape[1]
    D: gl.constexpr = s_k.shape[2]
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    SUM: gl.constexpr = gl.SliceLayout(1, S)
    OWN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, s_hidden.shape[1], 16])
    dtype: gl.constexpr = s_k.dtype

    b_row = FIRST + gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    i_query, i_head = i_first + b_row // BG, b_row % BG
    m_row = (i_query < T) & (i_head < G)
    copy_rows(s_q, p_q + i_query.to(gl.int64) * q_token + i_head * q_head, m_row, COPY)
    async_copy.commit_group()
    i_own = gl.arange(0, ROWS, gl.SliceLayout(1, OWN)) // BG
    b_own = i_own[:, None] == gl.arange(0, s_hidden.shape[1], gl.SliceLayout(0, OWN))[None, :]
    b_own = as_operand(gl.where(b_own, 1.0, 0.0), gl.DotOperandLayout(0, OWN, 2), gl.bfloat16)
    # Inductor passes numbers as float64.
    factor = gl.cast(scale, gl.float32) * LOG2_E
    async_copy.wait_group(0)
    barrier()
    b_q = s_q.load(gl.DotOperandLayout(0, S, 2))  # NOTE [Queries in registers]
    if factor < 0.0:
        b_q = -b_q
    factor = gl.maximum(gl.abs(factor), SMALLEST)

    b_m = gl.zeros([ROWS], gl.float32, SUM) + gl.maximum(0.5 * HIDDEN * factor, LOWEST)  # NOTE [Mask as product]
    b_L = gl.zeros([ROWS], gl.float32, SUM)
    b_o = gl.zeros([ROWS, D], gl.float32, O)
    b_none = gl.zeros([ROWS, BN], gl.float32, S)
    # The first step has no tile before it: its values get no weight.
    b_p, b_a = gl.zeros([ROWS, BN], dtype, WEIGHTS), gl.full([ROWS], 1.0, gl.float32, SUM)
    mbarrier.wait(ready.index(0), 0)
    b_s = warpgroup_mma_wait(0, deps=[multiply(b_q, b_own, s_k, s_hidden, 0, b_none)])
    i_last, i_buffer, phase = 0, 0, 0
    for j in range(0, number - BN, BN):
        # b_s are the products of this tile, b_p the weights of the one before: NOTE [Side by side].
        i_next = gl.where(i_buffer == BUFFERS - 1, 0, i_buffer + 1)
        phase ^= gl.where(i_next == 0, 1, 0)
        mbarrier.wait(ready.index(i_next), phase)
        b_next = multiply(b_q, b_own, s_k, s_hidden, i_next, b_none)
        b_o = warpgroup_mma(b_p, s_v.index(i_last), b_o * as_rows(b_a, O), is_async=True)
        b_weight, b_a, b_m, b_L = weigh(b_s, factor, b_m, b_L)
        b_o, b_s, b_weight = warpgroup_mma_wait(0, deps=[b_o, b_next, b_weight])
        signal(free.index(i_last), j > 0)
        b_p = as_operand(b_weight, WEIGHTS, dtype)
        i_last, i_buffer = i_buffer, i_next
    b_o = warpgroup_mma(b_p, s_v.index(i_last), b_o * as_rows(b_a, O), is_async=True)
    b_weight, b_a, b_m, b_L = weigh(b_s, factor, b_m, b_L)
    b_o, b_weight = warpgroup_mma_wait(0, deps=[b_o, b_weight])
    b_o, b_p = b_o * as_rows(b_a, O), as_operand(b_weight, WEIGHTS, dtype)
    b_o = warpgroup_mma(b_p, s_v.index(i_buffer), b_o, is_async=True)
    b_o = warpgroup_mma_wait(0, deps=[b_o])

    b_total = gl.where(b_L > 0.0, b_L, 1.0)
    # Through the place of the queries, for whole rows.
    s_q.store((b_o * as_rows(1.0 / b_total, O)).to(dtype))
    barrier()
    p_rows = p_o + (i_query.to(gl.int64) * H + i_head) * D
    i_column = gl.arange(0, D, gl.SliceLayout(0, COPY))
    gl.store(p_rows[:, None] + i_column[None, :], s_q.load(COPY), mask=(m_row & is_masked)[:, None])
    b_lse = gl.where(b_L > 0.0, b_m * LN_2 + gl.log(b_total), float("-inf"))
    b_row = FIRST + gl.arange(0, ROWS, SUM)
    i_query, i_head = i_first + b_row // BG, b_row % BG
    gl.store(p_lse + i_query.to(gl.int64) * H + i_head, b_lse, mask=(i_query < T) & (i_head < G) & is_masked)


@gluon.jit
def place(TILES, HKV: gl.constexpr):
    """Return batch entry, key head and tile of a program.

    Late tiles first, all tiles of a key head before the next one's: tile_rows in masked.py.
    """
    i_program = gl.program_id(0)
    i_tile = TILES - 1 - i_program % TILES
    i_kv = (i_program // TILES % HKV).to(gl.int64)
    i_batch = (i_program // (TILES * HKV)).to(gl.int64)
    return i_batch, i_kv, i_tile


@gluon.jit(do_not_specialize=["T", "PADDED", "CHOSEN", "TILES", "ROOM"])
def masked_hopper_kernel(
    p_q, p_k, p_v, p_bits, p_number, p_keys, p_o, p_lse, scale, T, PADDED, CHOSEN, TILES, ROOM,
    q_batch, q_token, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    H: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, BG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Compute o and lse of a tile of queries for the heads that share a key head."""
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    HALF: gl.constexpr = BM // 2
    QUERIES: gl.constexpr = HALF // BG if BG < HALF else 1
    N: gl.constexpr = QUERIES if QUERIES > 16 else 16
    BUFFERS: gl.constexpr = 5 if N == 16 else 4  # NOTE [Five buffers]
    G: gl.constexpr = H // HKV
    dtype: gl.constexpr = p_k.dtype.element_ty

    i_batch, i_kv, i_tile = place(TILES, HKV)
    i_first = i_tile * (BM // BG)
    number = gl.load(p_number + i_batch * TILES + i_tile)
    is_masked = number >= 0  # the gather form serves the others
    p_keys += (i_batch * TILES + i_tile) * ROOM
    p_words = p_bits + (i_batch * PADDED + i_first) * CHOSEN
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    p_q += i_batch * q_batch + i_kv * G * q_head
    i_heads = i_batch * T * H + i_kv * G

    s_q0 = gl.allocate_shared_memory(dtype, [HALF, D], TILE)
    s_q1 = gl.allocate_shared_memory(dtype, [HALF, D], TILE)
    s_k = gl.allocate_shared_memory(dtype, [BUFFERS, BN, D], TILE)
    s_v = gl.allocate_shared_memory(dtype, [BUFFERS, BN, D], TILE)
    s_hidden0 = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, N, BN], TILE)
    s_hidden1 = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, N, BN], TILE)
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(BUFFERS):
        mbarrier.init(ready.index(n), count=1)
        mbarrier.init(free.index(n), count=2)
    tiles = (number, s_k, s_v, ready, free)
    of_rows = tiles + (p_q, q_token, q_head, p_o + i_heads * D, p_lse + i_heads, scale, i_first, T, is_masked)
    of_keys = tiles + (p_k, p_v, k_row, v_row, p_keys, p_words, p_words + HALF // BG * CHOSEN, CHOSEN)
    gl.warp_specialize(  # NOTE [Three partitions]
        [
            (attend_rows, (0, H, G, BG, s_q0, s_hidden0) + of_rows),
            (attend_rows, (HALF, H, G, BG, s_q1, s_hidden1) + of_rows),
            (copy_tiles, (QUERIES, s_hidden0, s_hidden1) + of_keys),
        ],
        [4, 4],
        [216, 72],
    )


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether kernels of these tiles take keys and values of this kind, on this device."""
    return is_on_hopper(q) and q.shape[3] in WIDTHS and v.shape[3] == q.shape[3] and q.shape[2] // k.shape[2] <= ROWS


def is_served(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether the kernel takes keys and values of this kind, on this device, and is the faster one.

    With one head on a key head the mask is a fourth of all products, and spreading it out takes longer than they do.
    """
    return fits(q, k, v) and q.shape[2] > k.shape[2]


@on_its_device
def launch_masked_hopper(
    q: Tensor, k: Tensor, v: Tensor, unions: Unions, scale: float, *, o: Tensor, lse: Tensor
) -> None:
    """Write attention under a mask to ``o`` and its log-sum-exps to ``lse``, of the tiles that have a union.

    Args:
        q, k, v, scale: arguments of `sparse_attention`, which has checked them.
        unions: the mask.
        o: output, ``[B, T, H, D]``, contiguous, in q's dtype.
        lse: output, ``[B, T, H]``, contiguous, float32.
    """
    q, k, v = on_lines(q), on_lines(k), on_lines(v)
    B, T, H, D = q.shape
    HKV, tiles = k.shape[2], unions.keys.shape[1]
    masked_hopper_kernel[(B * HKV * tiles,)](
        q, k, v, *unions, o, lse, float(scale), T, *unions.sizes, *strides(q), *strides(k), *strides(v),
        H=H, HKV=HKV, D=D, BG=next_power_of_2(H // HKV), BM=ROWS, BN=64, num_warps=4,
    )  # fmt: skip
