"""Attention to a selection under a mask of bits on Hopper: the forward of masked.py, every copy placed by hand.

With l = log2(e) scale, over the union U = {u_0 < u_1 < ...} of what the queries of a tile have selected::

    s_tj = l q_t . k_{u_j}              -inf where bit j of query t is 0
    m'   = max(m, max_j s_tj)           p_tj = 2^(s_tj - m')           a = 2^(m - m')
    L    = a L + sum_j p_tj             O    = a O + sum_j p_tj v_{u_j}
    o    = O / L                        lse  = log L + m log 2

Written in Gluon, as gather_hopper.py is.  In Triton's pipeline products wait for weights and weights for products:
335 of some 900 TFLOP/s, where 1965 of 4489 cycles of a tile are products.  `sparse_attention` does not choose it yet:
it has been compiled and modelled (tests/ops/dsa/gluon_machine.py), but not timed on a device.

# NOTE [Side by side]
While a tile is weighed, the logits of the next one and the sums over the one before are multiplied.  So a step begins
by starting both products, and ends by waiting for both; between them nothing that is asked for is on its way.

# NOTE [Five buffers]
Of every step one tile is read for its keys (the next), one is weighed, one is read for its values (the last), and two
are being copied.  The buffer that a step fills was read by the sums of the step before, which every thread has waited
for when the barrier behind `wait_group`, which the compiler places, lets the step begin.

# NOTE [Queries in registers]
A warpgroup multiplies 64 rows.  Were its queries read from shared memory, a product of 64 x 64 x 16 would read 4 KB in
its 32 cycles, all that the memory gives; the copies need some of it.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hybrid_flex.kernels.launch import next_power_of_2, on_its_device

from .gather import LN_2, LOG2_E, LOWEST
from .gather_hopper import (
    as_operand,
    as_rows,
    copy_rows,
    copy_selected,
    is_on_hopper,
    load_slots,
    on_lines,
    strides,
    weigh,
)
from .masked import ROWS, Unions

BUFFERS = gl.constexpr(5)  # NOTE [Five buffers]
WIDTHS = (64, 128)
BITS_OF_MINUS_INFINITY = gl.constexpr(-(2**23))


@gluon.jit
def copy_tile(s_k, s_v, i_buffer, p_k, p_v, b_key, k_row, v_row, layout: gl.constexpr):
    """Start copying the keys and values of a tile, as one group."""
    copy_selected(s_k, i_buffer, p_k, b_key, k_row, 0, layout)
    copy_selected(s_v, i_buffer, p_v, b_key, v_row, 0, layout)
    async_copy.commit_group()


@gluon.jit
def load_words(p_words, j, number):
    """Load the words of bits of a tile, 0 behind the last key."""
    p_words += j // 32
    return gl.load(p_words, mask=j < number, other=0), gl.load(p_words + 1, mask=j < number, other=0)


@gluon.jit
def masked_logits(b_s, b_word0, b_word1, factor):
    """Scale products to logits, -inf where a bit is 0."""
    i_key = gl.arange(0, b_s.shape[1], gl.SliceLayout(0, b_s.type.layout))[None, :]
    b_word = gl.where(i_key < 32, b_word0[:, None], b_word1[:, None])
    # A thread's columns are 8 n + 2 (lane % 4) + 0 or 1: one shift by its lane serves all, the others are constants.
    # The bit is spread over a word that picks the logit's bits or those of -inf; 32 conditions are more than a thread
    # can hold, which costs 28 instructions of 578.
    b_keep = ((b_word >> (i_key & 6)) << (31 - (i_key & 25))) >> 31
    b_s = ((b_s * factor).to(gl.int32, bitcast=True) & b_keep) | (~b_keep & BITS_OF_MINUS_INFINITY)
    return b_s.to(gl.float32, bitcast=True)


@gluon.jit(do_not_specialize=["T", "PADDED", "CHOSEN", "TILES", "ROOM"])
def masked_hopper_kernel(
    p_q, p_k, p_v, p_bits, p_number, p_keys, p_o, p_lse, scale, T, PADDED, CHOSEN, TILES, ROOM,
    q_batch, q_token, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    H: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, BG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Compute o and lse of a tile of queries for the heads that share a key head."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    ROW: gl.constexpr = gl.SliceLayout(1, COPY)
    SUM: gl.constexpr = gl.SliceLayout(1, S)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    AHEAD: gl.constexpr = BUFFERS - 2
    G: gl.constexpr = H // HKV
    dtype: gl.constexpr = p_k.dtype.element_ty

    # Late tiles first, all tiles of a key head before the next one's: tile_rows in masked.py.
    i_program = gl.program_id(0)
    i_tile = TILES - 1 - i_program % TILES
    i_kv = (i_program // TILES % HKV).to(gl.int64)
    i_batch = (i_program // (TILES * HKV)).to(gl.int64)
    number = gl.load(p_number + i_batch * TILES + i_tile)
    if number < 0:
        return  # the gather form serves this tile
    p_keys += (i_batch * TILES + i_tile) * ROOM
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    i_first = i_tile * (BM // BG)

    s_q = gl.allocate_shared_memory(dtype, [BM, D], TILE)
    s_k = gl.allocate_shared_memory(dtype, [BUFFERS, BN, D], TILE)
    s_v = gl.allocate_shared_memory(dtype, [BUFFERS, BN, D], TILE)

    i_row = gl.arange(0, BM, ROW)
    i_query = i_first + i_row // BG
    p_rows = p_q + i_batch * q_batch + i_query.to(gl.int64) * q_token + (i_kv * G + i_row % BG) * q_head
    copy_rows(s_q, p_rows, (i_query < T) & (i_row % BG < G), 0, COPY)
    for n in gl.static_range(AHEAD):
        copy_tile(s_k, s_v, n, p_k, p_v, load_slots(p_keys, n * BN, number, BN, ROW), k_row, v_row, COPY)
    b_key = load_slots(p_keys, AHEAD * BN, number, BN, ROW)
    i_query = i_first + gl.arange(0, BM, SUM) // BG
    p_words = p_bits + (i_batch * PADDED + i_query) * CHOSEN
    b_word0, b_word1 = load_words(p_words, 0, number)
    # Inductor passes numbers as float64.
    factor = gl.cast(scale, gl.float32) * LOG2_E

    b_m = gl.full([BM], LOWEST, gl.float32, SUM)
    b_L = gl.zeros([BM], gl.float32, SUM)
    b_o = gl.zeros([BM, D], gl.float32, O)
    b_none = gl.zeros([BM, BN], gl.float32, S)
    # The first step has no tile before it: its values get no weight.
    b_p, b_a = gl.zeros([BM, BN], dtype, WEIGHTS), gl.full([BM], 1.0, gl.float32, SUM)
    async_copy.wait_group(AHEAD - 1)
    fence_async_shared()
    b_q = s_q.load(gl.DotOperandLayout(0, S, 2))  # NOTE [Queries in registers]
    b_s = warpgroup_mma(b_q, s_k.index(0).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    i_last, i_buffer = 0, 0
    for j in range(0, number - BN, BN):
        # b_s are the logits of this tile, b_p the weights of the one before: NOTE [Side by side].
        async_copy.wait_group(AHEAD - 2)
        fence_async_shared()
        i_next = gl.where(i_buffer == BUFFERS - 1, 0, i_buffer + 1)
        i_free = gl.where(i_buffer < 2, i_buffer + AHEAD, i_buffer - 2)
        b_next = warpgroup_mma(b_q, s_k.index(i_next).permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_o = warpgroup_mma(b_p, s_v.index(i_last), b_o * as_rows(b_a, O), is_async=True)
        copy_tile(s_k, s_v, i_free, p_k, p_v, b_key, k_row, v_row, COPY)
        b_key = load_slots(p_keys, j + (AHEAD + 1) * BN, number, BN, ROW)
        b_weight, b_a, b_m, b_L = weigh(masked_logits(b_s, b_word0, b_word1, factor), b_m, b_L)
        b_word0, b_word1 = load_words(p_words, j + BN, number)
        b_o, b_s, b_weight = warpgroup_mma_wait(0, deps=[b_o, b_next, b_weight])
        b_p = as_operand(b_weight, WEIGHTS, dtype)
        i_last, i_buffer = i_buffer, i_next
    async_copy.wait_group(0)
    fence_async_shared()
    b_o = warpgroup_mma(b_p, s_v.index(i_last), b_o * as_rows(b_a, O), is_async=True)
    b_weight, b_a, b_m, b_L = weigh(masked_logits(b_s, b_word0, b_word1, factor), b_m, b_L)
    b_o, b_weight = warpgroup_mma_wait(0, deps=[b_o, b_weight])
    b_o, b_p = b_o * as_rows(b_a, O), as_operand(b_weight, WEIGHTS, dtype)
    b_o = warpgroup_mma(b_p, s_v.index(i_buffer), b_o, is_async=True)
    b_o = warpgroup_mma_wait(0, deps=[b_o])

    # With any key the sum is at least 1, the weight of the largest logit.
    b_total = gl.maximum(b_L, 1.0)
    b_r = as_rows(1.0 / b_total, O)
    # Through the place of the queries, for whole rows.
    s_q.store((b_o * b_r).to(dtype))
    i_query = i_first + i_row // BG
    p_rows = p_o + ((i_batch * T + i_query) * H + i_kv * G + i_row % BG) * D
    m_row = (i_query < T) & (i_row % BG < G)
    i_column = gl.arange(0, D, gl.SliceLayout(0, COPY))
    gl.store(p_rows[:, None] + i_column[None, :], s_q.load(COPY), mask=m_row[:, None])
    i_row = gl.arange(0, BM, SUM)
    i_query = i_first + i_row // BG
    b_lse = gl.where(b_L > 0.0, b_m * LN_2 + gl.log(b_total), float("-inf"))
    p_rows = p_lse + (i_batch * T + i_query) * H + i_kv * G + i_row % BG
    gl.store(p_rows, b_lse, mask=(i_query < T) & (i_row % BG < G))


def is_served(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether the kernel takes keys and values of this kind, on this device."""
    if not is_on_hopper(q):
        return False
    return q.shape[3] in WIDTHS and v.shape[3] == q.shape[3] and q.shape[2] // k.shape[2] <= ROWS


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
        H=H, HKV=HKV, D=D, BG=next_power_of_2(H // HKV), BM=ROWS, BN=64, num_warps=8,
    )  # fmt: skip
