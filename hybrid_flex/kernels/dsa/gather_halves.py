"""Attention over selected latent rows on Hopper: two warpgroups, each with half of the columns of everything.

With l = log2(e) scale, and columns cut into halves h, of which each warpgroup copies, holds and multiplies one::

    s_j  = l (q_1 . k_1j + q_2 . k_2j)  -inf in unused slots           k_hj: half of row i_j
    m'   = max(m, max_j s_j)            p_j = 2^(s_j - m')             a = 2^(m - m')
    L    = a L + sum_j p_j              O_h = a O_h + sum_j p_j k_hj
    o_h  = O_h / L                      lse = log L + m log 2

What one warpgroup needs of the other is its part of the logits, 8 KB for 32 slots and 64 heads.  gather_hopper.py cuts
the slots instead, so that both read all columns, and has room for two tiles, whose copies wait for products: 4260
cycles for 64 slots of 512 columns, where products take 2048 and the rows 2800 at 5.5 TB/s.  Here halves of the queries
lie in registers, which leaves room for five tiles of half the slots (with 576 columns four).  `sparse_attention` does
not choose this kernel yet: it has been compiled and modelled (tests/ops/dsa/gluon_machine.py), not timed on a device.

# NOTE [A step]
A step weighs a tile.  It begins by starting the products of the next one's logits and of the sums over the last one,
and ends by waiting for both; then it hands its part of the next logits over.  Of the buffers one is read by each of
these products, one holds the tile that is weighed, and the others are being copied, AHEAD - 1 in number.

# NOTE [Rest]
The last 64 of 576 columns, which are no values, are multiplied by the first warpgroup.

# NOTE [Hand over]
Parts lie in two places that take turns, and so do the barriers that say they are there.  A warpgroup writes the part of
tile j + 2 where that of tile j lay: the other one has read that, since it did so before it handed over tile j + 1, for
which this one has waited.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gather import LN_2, LOG2_E, LOWEST
from .gather_hopper import (
    as_operand,
    as_rows,
    barrier,
    copy_rows,
    copy_tile,
    load_slots,
    look_through,
    mask_slots,
    weigh,
)

HEADS = gl.constexpr(64)
SLOTS = gl.constexpr(32)


@gluon.jit
def multiply(b_q, s_q, s_q_rest, s_tiles, s_rest, i, layout: gl.constexpr):
    """Start multiplying queries, half of which lie in registers, with the rows of a tile."""
    s_tile = s_tiles.index(i)
    b_s = gl.zeros([HEADS, SLOTS], gl.float32, layout)
    s_held = s_tile.slice(0, b_q.shape[1], 1).permute((1, 0))
    b_s = warpgroup_mma(b_q, s_held, b_s, use_acc=False, is_async=True)
    b_s = warpgroup_mma(s_q, s_tile.slice(b_q.shape[1], s_q.shape[1], 1).permute((1, 0)), b_s, is_async=True)
    if s_rest is not None:  # NOTE [Rest]
        b_s = warpgroup_mma(s_q_rest, s_rest.index(i).permute((1, 0)), b_s, is_async=True)
    return b_s


@gluon.jit
def hand_over(b_own, s_own, ready, i):
    """Give the other warpgroup a part of the logits."""
    s_own.index(i).store(b_own)
    barrier()
    mbarrier.arrive(ready.index(i), count=1)


@gluon.jit
def attend_half(
    p_q, q_head, p_k, k_row, p_slots, p_o, p_lse, G, lse_heads, J, scale, s_q, s_tiles, s_own, s_other, own_ready,
    other_ready, s_q_rest=None, s_rest=None,
):  # fmt: skip
    """Compute half of the columns of o, and lse of the first ``lse_heads``; all pointers are to the half."""
    C: gl.constexpr = s_tiles.shape[2]
    HELD: gl.constexpr = C - s_q.shape[1]
    BUFFERS: gl.constexpr = s_tiles.shape[0]
    AHEAD: gl.constexpr = BUFFERS - 2
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLOTS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, COPY)
    SUM: gl.constexpr = gl.SliceLayout(1, S)
    dtype: gl.constexpr = p_k.dtype.element_ty

    number, has_gaps = look_through(p_slots, J, 4)
    factor = gl.cast(scale, gl.float32) * LOG2_E
    i_head = gl.arange(0, HEADS, ROW)
    p_heads = p_q + i_head.to(gl.int64) * q_head
    copy_rows(s_q, p_heads, i_head < G, 0, COPY)
    async_copy.commit_group()
    async_copy.wait_group(0)
    b_q = s_q.load(gl.DotOperandLayout(0, S, 2))
    barrier()
    copy_rows(s_q, p_heads, i_head < G, HELD, COPY)
    if s_rest is not None:
        copy_rows(s_q_rest, p_heads, i_head < G, 2 * C, COPY)
    for n in gl.static_range(AHEAD):
        b_slot = load_slots(p_slots, n * SLOTS, number, SLOTS, ROW)
        copy_tile(s_tiles, s_rest, n, p_k, b_slot, k_row, 2 * C, COPY)
    b_slot = load_slots(p_slots, AHEAD * SLOTS, number, SLOTS, ROW)

    b_m = gl.full([HEADS], LOWEST, gl.float32, SUM)
    b_L = gl.zeros([HEADS], gl.float32, SUM)
    b_o = gl.zeros([HEADS, C], gl.float32, O)
    # The first step has no tile before it: its values get no weight.
    b_p, b_a = gl.zeros([HEADS, SLOTS], dtype, WEIGHTS), gl.full([HEADS], 1.0, gl.float32, SUM)
    async_copy.wait_group(AHEAD - 1)
    fence_async_shared()
    b_own = multiply(b_q, s_q, s_q_rest, s_tiles, s_rest, 0, S)
    b_own = warpgroup_mma_wait(0, deps=[b_own])
    hand_over(b_own, s_own, own_ready, 0)
    i_last, i_tile, turn, phase = 0, 0, 0, 0
    for j in range(0, number, SLOTS):  # NOTE [A step]
        async_copy.wait_group(AHEAD - 2)
        fence_async_shared()
        i_next = gl.where(i_tile == BUFFERS - 1, 0, i_tile + 1)
        i_free = gl.where(i_tile < 2, i_tile + AHEAD, i_tile - 2)
        b_next = multiply(b_q, s_q, s_q_rest, s_tiles, s_rest, i_next, S)
        b_o = warpgroup_mma(b_p, s_tiles.index(i_last), b_o * as_rows(b_a, O), is_async=True)
        copy_tile(s_tiles, s_rest, i_free, p_k, b_slot, k_row, 2 * C, COPY)
        b_slot = load_slots(p_slots, j + (AHEAD + 1) * SLOTS, number, SLOTS, ROW)
        mbarrier.wait(other_ready.index(turn), phase)  # NOTE [Hand over]
        b_s = (b_own + s_other.index(turn).load(S)) * factor
        b_s = mask_slots(b_s, p_slots, j, number, has_gaps, SLOTS)
        b_weight, b_a, b_m, b_L = weigh(b_s, b_m, b_L)
        b_o, b_own, b_weight = warpgroup_mma_wait(0, deps=[b_o, b_next, b_weight])
        hand_over(b_own, s_own, own_ready, 1 - turn)
        b_p = as_operand(b_weight, WEIGHTS, dtype)
        i_last, i_tile = i_tile, i_next
        phase ^= turn
        turn = 1 - turn
    async_copy.wait_group(0)
    fence_async_shared()
    b_o = warpgroup_mma(b_p, s_tiles.index(i_last), b_o * as_rows(b_a, O), is_async=True)
    b_o = warpgroup_mma_wait(0, deps=[b_o])

    # With any key the sum is at least 1, the weight of the largest logit.
    b_total = gl.maximum(b_L, 1.0)
    b_o = (b_o * as_rows(1.0 / b_total, O)).to(dtype)
    i_head = gl.arange(0, HEADS, gl.SliceLayout(1, O))
    p_rows = p_o + i_head * (2 * C)
    i_column = gl.arange(0, C, gl.SliceLayout(0, O))
    gl.store(p_rows[:, None] + i_column[None, :], b_o, mask=(i_head < G)[:, None])
    b_lse = gl.where(b_L > 0.0, b_m * LN_2 + gl.log(b_total), float("-inf"))
    i_head = gl.arange(0, HEADS, SUM)
    gl.store(p_lse + i_head, b_lse, mask=i_head < lse_heads)


@gluon.jit(do_not_specialize=["T", "J"])
def gather_halves_kernel(
    p_q, p_k, p_slots, p_o, p_lse, scale, T, J, q_batch, q_token, q_head, k_batch, k_row, k_head,
    H: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """Compute o and lse of one token for 64 heads that share a key head, values being the first V of D columns."""
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PART: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    C: gl.constexpr = V // 2
    REST: gl.constexpr = D - V
    BUFFERS: gl.constexpr = 5 if REST == 0 else 4
    G: gl.constexpr = H // HKV
    TILES: gl.constexpr = (G + HEADS - 1) // HEADS
    dtype: gl.constexpr = p_k.dtype.element_ty

    i_program = gl.program_id(0)
    i_kv = ((i_program // TILES) % HKV).to(gl.int64)
    i_token = (i_program // (TILES * HKV)).to(gl.int64)
    i_first = (i_program % TILES) * HEADS
    i_heads = i_token * H + i_kv * G + i_first
    p_slots += i_token * J
    p_k += (i_token // T) * k_batch + i_kv * k_head
    p_q += (i_token // T) * q_batch + (i_token % T) * q_token + (i_kv * G + i_first) * q_head
    p_o += i_heads * V
    p_lse += i_heads

    s_q0 = gl.allocate_shared_memory(dtype, [HEADS, C // 2], TILE)
    s_q1 = gl.allocate_shared_memory(dtype, [HEADS, C // 2], TILE)
    s_0 = gl.allocate_shared_memory(dtype, [BUFFERS, SLOTS, C], TILE)
    s_1 = gl.allocate_shared_memory(dtype, [BUFFERS, SLOTS, C], TILE)
    s_s0 = gl.allocate_shared_memory(gl.float32, [2, HEADS, SLOTS], PART)
    s_s1 = gl.allocate_shared_memory(gl.float32, [2, HEADS, SLOTS], PART)
    ready0 = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready1 = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        mbarrier.init(ready0.index(n), count=1)
        mbarrier.init(ready1.index(n), count=1)
    heads = G - i_first
    first = (
        p_q, q_head, p_k, k_row, p_slots, p_o, p_lse, heads, heads, J, scale, s_q0, s_0, s_s0, s_s1, ready0, ready1
    )  # fmt: skip
    second = (
        p_q + C, q_head, p_k + C, k_row, p_slots, p_o + C, p_lse, heads, 0, J, scale, s_q1, s_1, s_s1, s_s0, ready1,
        ready0,
    )  # fmt: skip
    if REST > 0:
        s_q_rest = gl.allocate_shared_memory(dtype, [HEADS, REST], TILE)
        s_rest = gl.allocate_shared_memory(dtype, [BUFFERS, SLOTS, REST], TILE)
        first += (s_q_rest, s_rest)
    gl.warp_specialize([(attend_half, first), (attend_half, second)], [4], [256])
