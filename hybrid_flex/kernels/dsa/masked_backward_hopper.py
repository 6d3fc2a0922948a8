"""Attention to a selection under a mask of bits on Hopper: the backward of masked_backward.py, placed by hand.

With delta = do . o - dlse, over the union U = {u_0 < u_1 < ...} of what the queries of a tile have selected, and p = 0
where a query has not selected a key::

    p_tj = exp(scale q_t . k_{u_j} - lse_t)         e_tj = p_tj (do_t . v_{u_j} - delta_t)
    dq_t = scale sum_j e_tj k_{u_j}
    dk_{u_j} += scale sum_t e_tj q_t                dv_{u_j} += sum_t p_tj do_t

What bounds it are the sums in memory: of 64 keys 64 KB, for which the L2 takes 4000 cycles a multiprocessor (3.75 TB/s
on an H200, as words, vectors or whole rows alike); the products take 2560.  So those who add must not wait for others,
who may wait for them.

# NOTE [Four partitions]
Two warpgroups weigh half of the rows each, four warps add to memory, and four copy keys and values, which would else
stand behind what is being added.  The weights of all rows go to shared memory, where the first warpgroup multiplies p
with do and the second e with q; each leaves its sums in a place of its own, one of which is added while the other one
is filled.  A warpgroup's logits beside the last tile's sums took no less time: the tensor cores are not what it waits
for.

# NOTE [Two buffers]
A buffer of keys is free once both warpgroups have multiplied with it, and then nobody reads the weights of its tile any
more either.
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

from .gather import LOG2_E
from .hopper import (
    as_operand,
    as_rows,
    barrier,
    copy_rows,
    load_slots,
    on_lines,
    selected_rows,
    signal,
    strides,
)
from .masked import ROWS, Unions
from .masked_hopper import fits, place

THREADS = gl.constexpr(128)
"""Threads of the warps that copy."""
ADDED = gl.constexpr(16)
"""Rows that are in registers at once on their way to memory."""


@gluon.jit
def copy_tile(s_k, s_v, ready, i, p_k, p_v, k_row, v_row, b_key, layout: gl.constexpr):
    """Start copying the keys and values of a tile; its barrier is completed when they have arrived."""
    p_rows, m_rows = selected_rows(p_k, b_key, k_row)
    copy_rows(s_k.index(i), p_rows, m_rows, layout)
    p_rows, m_rows = selected_rows(p_v, b_key, v_row)
    copy_rows(s_v.index(i), p_rows, m_rows, layout)
    async_copy.mbarrier_arrive(ready.index(i), increment_count=False)


@gluon.jit
def load_rows(p_keys, j, number, BN: gl.constexpr, layout: gl.constexpr):
    """Load the keys of a tile, in the parts that are added at once."""
    rows = ()
    for first in gl.static_range(0, BN, ADDED):
        rows = rows + (load_slots(p_keys, j + first, number, ADDED, layout),)
    return rows


@gluon.jit
def add_tile(s_sum, given, taken, phase, p_x, x_row, rows, layout: gl.constexpr):
    """Add the sums over a tile's queries to the rows of its keys."""
    PARTS: gl.constexpr = s_sum.shape[0] // ADDED
    i_column = gl.arange(0, s_sum.shape[1], gl.SliceLayout(0, layout))[None, :]
    mbarrier.wait(given, phase)
    for n in gl.static_range(PARTS):
        b_x = s_sum.slice(n * ADDED, ADDED).load(layout)
        if n == PARTS - 1:
            signal(taken)
        p_rows, m_rows = selected_rows(p_x, rows[n], x_row)
        gl.atomic_add(p_rows[:, None] + i_column, b_x, mask=m_rows[:, None], sem="relaxed")


@gluon.jit
def copy_tiles(number, s_k, s_v, ready, free, p_k, p_v, k_row, v_row, p_keys):
    """Copy the keys and values of all tiles."""
    BN: gl.constexpr = s_k.shape[1]
    D: gl.constexpr = s_k.shape[2]
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, COPY)
    b_key = load_slots(p_keys, 0, number, BN, ROW)
    i, phase = 0, 1  # the phase before a barrier's first one counts as complete
    for j in range(0, gl.maximum(number, 1), BN):  # of no keys a tile of zeros
        mbarrier.wait(free.index(i), phase)
        copy_tile(s_k, s_v, ready, i, p_k, p_v, k_row, v_row, b_key, COPY)
        b_key = load_slots(p_keys, j + BN, number, BN, ROW)
        phase ^= i
        i ^= 1


@gluon.jit
def add_tiles(number, s_sum, given, taken, p_keys, p_dk, p_dv, x_row):
    """Add what the warpgroups leave."""
    BN: gl.constexpr = s_sum.shape[1]
    D: gl.constexpr = s_sum.shape[2]
    ADD: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [4, 1], [1, 0])
    turn = 0
    for j in range(0, gl.maximum(number, 1), BN):
        rows = load_rows(p_keys, j, number, BN, gl.SliceLayout(1, ADD))
        add_tile(s_sum.index(0), given.index(0), taken.index(0), turn, p_dv, x_row, rows, ADD)
        add_tile(s_sum.index(1), given.index(1), taken.index(1), turn, p_dk, x_row, rows, ADD)
        turn ^= 1


@gluon.jit
def load_words(p_words, j, m):
    """Load the two words of bits of a tile for every row."""
    p_words += j // 32
    return gl.load(p_words, mask=m, other=0), gl.load(p_words + 1, mask=m, other=0)


@gluon.jit
def is_selected(b_word0, b_word1, BN: gl.constexpr, layout: gl.constexpr):
    """Test the bits of a tile's keys."""
    i_key = gl.arange(0, BN, gl.SliceLayout(0, layout))[None, :]
    b_word = gl.where(i_key < 32, b_word0[:, None], b_word1[:, None])
    # A thread's keys are 8 n and 8 n + 1 behind its first one: one shift serves all, the others are constants.
    return ((b_word >> (i_key & 6)) & (1 << (i_key & 25))) != 0


@gluon.jit
def sum_rows(s_weight, s_x, weighed, phase, b_nothing, W: gl.constexpr):
    """Start multiplying the weights of all rows with what they weigh, those of the other warpgroup when they come."""
    b_sum = warpgroup_mma(s_weight.index(W).permute((1, 0)), s_x.index(W), b_nothing, use_acc=False, is_async=True)
    mbarrier.wait(weighed.index(1 - W), phase)
    return warpgroup_mma(s_weight.index(1 - W).permute((1, 0)), s_x.index(1 - W), b_sum, is_async=True)


@gluon.jit
def differentiate_rows(
    W: gl.constexpr, H: gl.constexpr, G: gl.constexpr, BG: gl.constexpr, number, s_k, s_v, ready, free, s_sum, given,
    taken, s_q, s_do, s_p, s_e, weighed, p_q, q_token, q_head, p_do, do_token, do_head, p_o, p_lse, p_dlse, p_dq,
    p_words, CHOSEN, scale, i_first, T, is_masked,
):  # fmt: skip
    """Compute dq of half of a tile's rows; the first warpgroup also dv of the keys, the second dk."""
    ROWS: gl.constexpr = s_q.shape[1]
    BN: gl.constexpr = s_k.shape[1]
    D: gl.constexpr = s_k.shape[2]
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    SUM: gl.constexpr = gl.SliceLayout(1, S)
    dtype: gl.constexpr = s_k.dtype

    b_row = W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    i_query, i_head = (i_first + b_row // BG).to(gl.int64), b_row % BG
    m_row = (i_query < T) & (i_head < G)
    copy_rows(s_q.index(W), p_q + i_query * q_token + i_head * q_head, m_row, COPY)
    copy_rows(s_do.index(W), p_do + i_query * do_token + i_head * do_head, m_row, COPY)
    async_copy.commit_group()
    p_rows = p_dq + (i_query * H + i_head) * D
    i_column = gl.arange(0, D, gl.SliceLayout(0, COPY))[None, :]
    m_out = (m_row & is_masked)[:, None]  # the gather form writes the others

    b_row = W * ROWS + gl.arange(0, ROWS, SUM)
    i_query, i_head = (i_first + b_row // BG).to(gl.int64), b_row % BG
    m_row, i_out = (i_query < T) & (i_head < G), i_query * H + i_head
    p_words += (b_row // BG).to(gl.int64) * CHOSEN
    b_word0, b_word1 = load_words(p_words, 0, m_row & (number > 0))
    b_lse = gl.load(p_lse + i_out, mask=m_row, other=0.0) * LOG2_E
    b_dlse = gl.load(p_dlse + i_out, mask=m_row, other=0.0)
    m_o, p_o_rows = as_rows(m_row, O), p_o + as_rows(i_out * D, O)
    b_o = gl.load(p_o_rows + gl.arange(0, D, gl.SliceLayout(0, O))[None, :], mask=m_o, other=0.0)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    b_delta = gl.sum(s_do.index(W).load(O).to(gl.float32) * b_o.to(gl.float32), 1)
    b_delta = gl.convert_layout(b_delta, SUM, assert_trivial=True) - b_dlse
    # Inductor passes numbers as float64.
    scale = gl.cast(scale, gl.float32)
    factor = scale * LOG2_E

    b_none = gl.zeros([ROWS, BN], gl.float32, S)
    b_nothing = gl.zeros([BN, D], gl.float32, O)
    b_dq = gl.zeros([ROWS, D], gl.float32, O)
    i, phase, turn = 0, 0, 0
    for j in range(0, gl.maximum(number, 1), BN):
        mbarrier.wait(ready.index(i), phase)
        fence_async_shared()
        b_s = warpgroup_mma(s_q.index(W), s_k.index(i).permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_e = warpgroup_mma(s_do.index(W), s_v.index(i).permute((1, 0)), b_none, use_acc=False, is_async=True)
        m_s = is_selected(b_word0, b_word1, BN, S)
        b_word0, b_word1 = load_words(p_words, j + BN, m_row & (j + BN < number))
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        # A head without keys has lse = -inf, and no key that is asked for its weight.
        b_p = gl.where(m_s, gl.exp2(b_s * factor - b_lse[:, None]), 0.0)
        b_e = b_p * (warpgroup_mma_wait(0, deps=[b_e]) - b_delta[:, None])
        mbarrier.wait(free.index(i ^ 1), phase ^ i ^ 1)  # NOTE [Two buffers]
        s_p.index(W).store(b_p.to(dtype))
        s_e.index(W).store(b_e.to(dtype))
        fence_async_shared()
        signal(weighed.index(W))
        b_dq = warpgroup_mma(as_operand(b_e, WEIGHTS, dtype), s_k.index(i), b_dq, is_async=True)
        if W == 0:
            b_sum = sum_rows(s_p, s_do, weighed, turn, b_nothing, W)
        else:
            b_sum = sum_rows(s_e, s_q, weighed, turn, b_nothing, W)
        b_dq, b_sum = warpgroup_mma_wait(0, deps=[b_dq, b_sum])
        if W == 1:
            b_sum *= scale
        signal(free.index(i))
        mbarrier.wait(taken.index(W), turn ^ 1)
        s_sum.index(W).store(b_sum)
        signal(given.index(W))
        turn ^= 1
        phase ^= i
        i ^= 1
    # Through the place of the sums, for whole rows.
    mbarrier.wait(taken.index(W), turn ^ 1)
    s_sum.index(W).store(b_dq * scale)
    barrier()
    gl.store(p_rows[:, None] + i_column, s_sum.index(W).load(COPY).to(dtype), mask=m_out)


@gluon.jit(do_not_specialize=["T", "S", "PADDED", "CHOSEN", "TILES", "ROOM"])
def masked_backward_hopper_kernel(
    p_q, p_k, p_v, p_bits, p_number, p_keys, p_o, p_lse, p_do, p_dlse, p_dq, p_dk, p_dv, scale,
    T, S, PADDED, CHOSEN, TILES, ROOM,
    q_batch, q_token, q_head, do_batch, do_token, do_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    H: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, BG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Compute dq of a tile of queries for the heads that share a key head, and add what they give to dk and dv."""
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    # A fourth of a warp stores 32 bytes of each of four rows at once.
    SUMS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    HALF: gl.constexpr = BM // 2
    G: gl.constexpr = H // HKV
    dtype: gl.constexpr = p_k.dtype.element_ty

    i_batch, i_kv, i_tile = place(TILES, HKV)
    i_first = i_tile * (BM // BG)
    number = gl.load(p_number + i_batch * TILES + i_tile)
    p_keys += (i_batch * TILES + i_tile) * ROOM
    p_words = p_bits + (i_batch * PADDED + i_first) * CHOSEN
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    p_q += i_batch * q_batch + i_kv * G * q_head
    p_do += i_batch * do_batch + i_kv * G * do_head
    p_dk += (i_batch * S * HKV + i_kv) * D
    p_dv += (i_batch * S * HKV + i_kv) * D
    i_heads = i_batch * T * H + i_kv * G

    s_q = gl.allocate_shared_memory(dtype, [2, HALF, D], TILE)
    s_do = gl.allocate_shared_memory(dtype, [2, HALF, D], TILE)
    s_k = gl.allocate_shared_memory(dtype, [2, BN, D], TILE)
    s_v = gl.allocate_shared_memory(dtype, [2, BN, D], TILE)
    s_p = gl.allocate_shared_memory(dtype, [2, HALF, BN], TILE)
    s_e = gl.allocate_shared_memory(dtype, [2, HALF, BN], TILE)
    s_sum = gl.allocate_shared_memory(gl.float32, [2, BN, D], SUMS)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    weighed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        mbarrier.init(ready.index(n), count=THREADS)
        mbarrier.init(free.index(n), count=2)
        mbarrier.init(weighed.index(n), count=1)
        mbarrier.init(given.index(n), count=1)
        mbarrier.init(taken.index(n), count=1)
    of_rows = (
        number, s_k, s_v, ready, free, s_sum, given, taken, s_q, s_do, s_p, s_e, weighed, p_q, q_token, q_head, p_do,
        do_token, do_head, p_o + i_heads * D, p_lse + i_heads, p_dlse + i_heads, p_dq + i_heads * D, p_words, CHOSEN,
        scale, i_first, T, number >= 0,
    )  # fmt: skip
    of_keys = (number, s_k, s_v, ready, free, p_k, p_v, k_row, v_row, p_keys)
    of_sums = (number, s_sum, given, taken, p_keys, p_dk, p_dv, HKV * D)
    gl.warp_specialize(  # NOTE [Four partitions]
        [
            (differentiate_rows, (0, H, G, BG) + of_rows),
            (differentiate_rows, (1, H, G, BG) + of_rows),
            (add_tiles, of_sums),
            (copy_tiles, of_keys),
        ],
        [4, 4, 4],
        [208, 64, 32],
    )


def is_served(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether the kernel takes keys and values of this kind, on this device."""
    return fits(q, k, v)


@on_its_device
def launch_masked_backward_hopper(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, unions: Unions, o: Tensor, lse: Tensor, scale: float,
    *, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write dq of the tiles that have a union, and add what they give to dk and dv.

    Arguments as those of `launch_masked_backward`.
    """
    do, q, k, v = (on_lines(x) for x in (do, q, k, v))
    dlse, o, lse = (x.contiguous() for x in (dlse, o, lse))
    B, T, H, D = q.shape
    HKV, tiles = k.shape[2], unions.keys.shape[1]
    masked_backward_hopper_kernel[(B * HKV * tiles,)](
        q, k, v, *unions, o, lse, do, dlse, dq, dk, dv, float(scale), T, k.shape[1], *unions.sizes,
        *strides(q), *strides(do), *strides(k), *strides(v),
        H=H, HKV=HKV, D=D, BG=next_power_of_2(H // HKV), BM=ROWS, BN=64, num_warps=4,
    )  # fmt: skip
