"""Attention over selected rows on Hopper: the forward of gather.py for latent attention, every copy placed by hand.

With l = log2(e) scale, and the slots of a token taken in tiles::

    s_j  = l q . k_{i_j}                -inf in unused slots
    m'   = max(m, max_j s_j)            p_j = 2^(s_j - m')             a = 2^(m - m')
    L    = a L + sum_j p_j              O   = a O + sum_j p_j k_{i_j}[:V]
    o    = O / L                        lse = log L + m log 2

Written in Gluon, the lower level of Triton, whose compiler gives each warpgroup all of q k^T where another product
follows, and starts the copy of a tile only after the products of the one before: 4.35 ms where this takes 2.6 (4096
tokens, 64 heads, 576 columns, 2048 of 32768 rows).  Graphs that leave the process carry gather.py's kernel instead:
torch has no way to take a Gluon kernel along.

# NOTE [Two warpgroups]
A block is one token, 64 of its heads, and two warpgroups.  For the logits each takes half of the slots of a tile, for
the sums half of the columns: the weights pass from one to the other through shared memory.

# NOTE [Early copies]
Queries and two tiles of rows fill the shared memory.  The copy of a tile starts as soon as the sums have read the tile
before the last; meanwhile the first columns of the next logits are multiplied.

# NOTE [Zero rows]
An unused slot is copied as a row of zeros, which reads nothing: a row that nobody selects may hold NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from hybrid_flex.kernels.launch import device_limits, on_its_device

from .gather import LN_2, LOG2_E, LOWEST, launch_gather
from .spans import cut

# Names of Triton 3.7 and 3.9, and what they were before.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

COUNTED = gl.constexpr(2048)
# NOTE [Early copies]: columns of the logits that are multiplied while the sums are.
FIRST = gl.constexpr(256)

HEADS = 64
VALUE_DIM = 512
KEY_DIMS = (512, 576)
# Of a token whose slots gather.py cuts into that many spans, its kernel is the faster one, by what a tile takes.
ENOUGH_SPANS = 4


@gluon.jit
def look_through(p_slots, J, WARPS: gl.constexpr):
    """Return one more than the last slot in use (0 without any), and whether unused ones lie before it."""
    LINE: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    b_last = gl.zeros([COUNTED], gl.int32, LINE)
    b_used = gl.zeros([COUNTED], gl.int32, LINE)
    for j in range(0, J, COUNTED):
        i_slot = j + gl.arange(0, COUNTED, LINE)
        m_used = gl.load(p_slots + i_slot, mask=i_slot < J, other=-1) >= 0
        b_last = gl.maximum(b_last, gl.where(m_used, i_slot + 1, 0))
        b_used += gl.where(m_used, 1, 0)
    number = gl.max(b_last, 0)
    return number, gl.sum(b_used, 0) < number


@gluon.jit
def load_slots(p_slots, j, J, BN: gl.constexpr, layout: gl.constexpr):
    """Load the slots of a tile, -1 behind the last one."""
    i_slot = j + gl.arange(0, BN, layout)
    return gl.load(p_slots + i_slot, mask=i_slot < J, other=-1)


@gluon.jit
def copy_rows(s_x, p_rows, m_rows, C0: gl.constexpr, layout: gl.constexpr):
    """Start copying columns from C0 on of rows ``[N]``, zeros where ``m_rows`` is false."""
    i_column = C0 + gl.arange(0, s_x.shape[1], gl.SliceLayout(0, layout))
    async_load(s_x, p_rows[:, None] + i_column[None, :], mask=m_rows[:, None])


@gluon.jit
def copy_selected(s_x, i_buffer, p_x, b_slot, x_row, C0: gl.constexpr, layout: gl.constexpr):
    """Start copying columns from C0 on of the selected rows: NOTE [Zero rows]."""
    copy_rows(s_x.index(i_buffer), p_x + gl.maximum(b_slot, 0).to(gl.int64) * x_row, b_slot >= 0, C0, layout)


@gluon.jit
def copy_tile(s_k, s_kr, i_buffer, p_k, b_slot, k_row, V: gl.constexpr, layout: gl.constexpr):
    """Start copying the selected rows of a tile, as one group; the rest of the keys lies behind V columns."""
    copy_selected(s_k, i_buffer, p_k, b_slot, k_row, 0, layout)
    if s_kr is not None:
        copy_selected(s_kr, i_buffer, p_k, b_slot, k_row, V, layout)
    async_copy.commit_group()


@gluon.jit
def as_rows(b_x, layout: gl.constexpr):
    """Return what belongs to the rows of the logits in the layout of the sums."""
    return gl.convert_layout(b_x, gl.SliceLayout(1, layout), assert_trivial=True)[:, None]


@gluon.jit
def as_operand(b_p, layout: gl.constexpr, dtype: gl.constexpr):
    """Return weights as the next product reads them, out of registers."""
    return gl.convert_layout(b_p.to(dtype), layout, assert_trivial=True)


@gluon.jit
def weigh(b_s, b_m, b_L):
    """Return the weights of a tile, what scales the sums, and the new maxima and totals."""
    b_largest = gl.maximum(b_m, gl.max(b_s, 1))
    b_p = gl.exp2(b_s - b_largest[:, None])
    b_a = gl.exp2(b_m - b_largest)
    return b_p, b_a, b_largest, b_L * b_a + gl.sum(b_p, 1)


@gluon.jit
def multiply(s_q, s_keys, b_s, C0: gl.constexpr, COLUMNS: gl.constexpr, AGAIN: gl.constexpr):
    """Start multiplying columns from C0 on of queries and keys, onto b_s if AGAIN."""
    s_columns = s_keys.slice(C0, COLUMNS, 1).permute((1, 0))
    return warpgroup_mma(s_q.slice(C0, COLUMNS, 1), s_columns, b_s, use_acc=AGAIN, is_async=True)


@gluon.jit
def multiply_others(s_q, s_qr, s_keys, s_kr, i_buffer, b_s):
    """Start multiplying the columns from FIRST on."""
    b_s = multiply(s_q, s_keys, b_s, FIRST, s_q.shape[1] - FIRST, True)
    if s_kr is not None:
        b_s = warpgroup_mma(s_qr, s_kr.index(i_buffer).permute((1, 0)), b_s, is_async=True)
    return b_s


@gluon.jit
def row_maxima(b_s, s_m, BH: gl.constexpr, BN: gl.constexpr):
    """Return the largest logit of every row; warpgroups exchange theirs with one barrier, where `gl.max` takes two."""
    PAIR: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0], [0, 1]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0], [0, 0]], [], [BH, 2]
    )
    b_half = gl.max(gl.reshape(b_s, [BH, 2, BN // 2]), 2)
    s_m.store(b_half)
    return gl.convert_layout(gl.max(s_m.load(PAIR), 1), gl.SliceLayout(1, b_s.type.layout), assert_trivial=True)


@gluon.jit
def mask_slots(b_s, p_slots, j, number, has_gaps, BN: gl.constexpr):
    """Set logits of unused slots to -inf; only a token with gaps reads its slots again."""
    if (j + BN > number) | has_gaps:
        i_slot = j + gl.arange(0, BN, gl.SliceLayout(0, b_s.type.layout))
        m_slot = i_slot < number
        if has_gaps:
            m_slot = gl.load(p_slots + i_slot, mask=m_slot, other=-1) >= 0
        b_s = gl.where(m_slot[None, :], b_s, float("-inf"))
    return b_s


@gluon.jit
def add_values(
    b_s, b_m, b_L, b_o, s_p, s_m, s_keys, p_slots, j, number, has_gaps, factor, BH: gl.constexpr, BN: gl.constexpr
):  # fmt: skip
    """Weigh a tile, and start adding its rows to the sums."""
    O: gl.constexpr = b_o.type.layout
    b_s = mask_slots(b_s * factor, p_slots, j, number, has_gaps, BN)
    b_largest = gl.maximum(b_m, row_maxima(b_s, s_m, BH, BN))
    b_p = gl.exp2(b_s - b_largest[:, None])
    b_a = gl.exp2(b_m - b_largest)
    b_L = b_L * b_a[:, None] + b_p
    s_p.store(b_p.to(s_p.dtype))  # NOTE [Two warpgroups]
    b_o = b_o * as_rows(b_a, O)
    b_o = warpgroup_mma(s_p.load(gl.DotOperandLayout(0, O, 2)), s_keys, b_o, is_async=True)
    return b_largest, b_L, b_o


@gluon.jit(do_not_specialize=["T", "J"])
def gather_hopper_kernel(
    p_q, p_k, p_slots, p_o, p_lse, scale, T, J, q_batch, q_token, q_head, k_batch, k_row, k_head,
    H: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, V: gl.constexpr, BH: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Compute o and lse of one token for BH heads that share a key head."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BN // 2, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, V // 2, 16])
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    HEAD: gl.constexpr = gl.SliceLayout(1, ROWS)
    SUM: gl.constexpr = gl.SliceLayout(1, S)
    REST: gl.constexpr = D - V
    dtype: gl.constexpr = p_k.dtype.element_ty

    G: gl.constexpr = H // HKV
    TILES: gl.constexpr = (G + BH - 1) // BH
    i_program = gl.program_id(0)
    i_kv = ((i_program // TILES) % HKV).to(gl.int64)
    i_token = (i_program // (TILES * HKV)).to(gl.int64)
    i_first = (i_program % TILES) * BH
    p_slots += i_token * J
    p_k += (i_token // T) * k_batch + i_kv * k_head
    i_heads = i_token * H + i_kv * G + i_first
    p_q += (i_token // T) * q_batch + (i_token % T) * q_token + (i_kv * G + i_first) * q_head

    s_q = gl.allocate_shared_memory(dtype, [BH, V], TILE)
    s_k = gl.allocate_shared_memory(dtype, [2, BN, V], TILE)
    s_p = gl.allocate_shared_memory(dtype, [BH, BN], TILE)
    s_m = gl.allocate_shared_memory(gl.float32, [BH, 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    s_qr = None
    s_kr = None
    if REST > 0:
        s_qr = gl.allocate_shared_memory(dtype, [BH, REST], TILE)
        s_kr = gl.allocate_shared_memory(dtype, [2, BN, REST], TILE)

    b_slot = load_slots(p_slots, 0, J, BN, HEAD)
    i_head = gl.arange(0, BH, HEAD)
    m_head = i_first + i_head < G
    p_heads = p_q + i_head.to(gl.int64) * q_head
    copy_rows(s_q, p_heads, m_head, 0, ROWS)
    if REST > 0:
        copy_rows(s_qr, p_heads, m_head, V, ROWS)
    copy_tile(s_k, s_kr, 0, p_k, b_slot, k_row, V, ROWS)
    b_slot = load_slots(p_slots, BN, J, BN, HEAD)
    number, has_gaps = look_through(p_slots, J, 8)
    # Inductor passes numbers as float64.
    factor = gl.cast(scale, gl.float32) * LOG2_E

    b_m = gl.full([BH], LOWEST, gl.float32, SUM)
    b_L = gl.zeros([BH, BN], gl.float32, S)
    b_o = gl.zeros([BH, V], gl.float32, O)
    b_none = gl.zeros([BH, BN], gl.float32, S)
    async_copy.wait_group(0)
    fence_async_shared()
    copy_tile(s_k, s_kr, 1, p_k, b_slot, k_row, V, ROWS)
    b_slot = load_slots(p_slots, 2 * BN, J, BN, HEAD)
    b_s = multiply(s_q, s_k.index(0), b_none, 0, FIRST, False)
    b_s = multiply_others(s_q, s_qr, s_k.index(0), s_kr, 0, b_s)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    i_buffer = 0
    for j in range(0, number - BN, BN):
        # b_s are the logits of this tile, the copy of the next one is on its way.
        b_m, b_L, b_o = add_values(
            b_s, b_m, b_L, b_o, s_p, s_m, s_k.index(i_buffer), p_slots, j, number, has_gaps, factor, BH, BN
        )
        s_next = s_k.index(1 - i_buffer)
        async_copy.wait_group(0)
        fence_async_shared()
        b_s = multiply(s_q, s_next, b_none, 0, FIRST, False)
        b_o = warpgroup_mma_wait(1, deps=[b_o])
        barrier()  # the other warpgroup has read this tile as well
        copy_tile(s_k, s_kr, i_buffer, p_k, b_slot, k_row, V, ROWS)
        b_s = multiply_others(s_q, s_qr, s_next, s_kr, 1 - i_buffer, b_s)
        b_slot = load_slots(p_slots, j + 3 * BN, J, BN, HEAD)
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        i_buffer = 1 - i_buffer
    if number > 0:
        j = (number - 1) // BN * BN
        b_m, b_L, b_o = add_values(
            b_s, b_m, b_L, b_o, s_p, s_m, s_k.index(i_buffer), p_slots, j, number, has_gaps, factor, BH, BN
        )
        b_o = warpgroup_mma_wait(0, deps=[b_o])
    async_copy.wait_group(0)

    # With any key the sum is at least 1, the weight of the largest logit.
    b_sum = gl.sum(b_L, 1)
    b_total = gl.maximum(b_sum, 1.0)
    b_r = as_rows(1.0 / b_total, O)
    # Through the place of the queries, for whole rows.
    s_q.store((b_o * b_r).to(dtype))
    i_head = gl.arange(0, BH, gl.SliceLayout(1, OUT))
    p_rows = p_o + (i_heads + i_head) * V
    i_column = gl.arange(0, V, gl.SliceLayout(0, OUT))
    gl.store(p_rows[:, None] + i_column[None, :], s_q.load(OUT), mask=(i_first + i_head < G)[:, None])
    b_lse = gl.where(b_sum > 0.0, b_m * LN_2 + gl.log(b_total), float("-inf"))
    i_head = gl.arange(0, BH, SUM)
    gl.store(p_lse + i_heads + i_head, b_lse, mask=i_first + i_head < G)


def is_on_hopper(x: Tensor) -> bool:
    """Tell whether kernels in Gluon take tensors of this dtype, on this device."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16) and device_limits(x.device)[1] == 9


def is_served(q: Tensor, k: Tensor, value_dim: int) -> bool:
    """Tell whether the kernel takes latent rows of this kind, on this device: 33 heads or more, or it would pad."""
    if not is_on_hopper(q):
        return False
    return value_dim == VALUE_DIM and q.shape[3] in KEY_DIMS and 2 * (q.shape[2] // k.shape[2]) > HEADS


def strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of x but the last, 0 along what there is one of, whose stride may be anything."""
    return tuple(n if size > 1 else 0 for n, size in zip(x.stride()[:3], x.shape[:3], strict=True))


def lies_on_lines(x: Tensor) -> bool:
    """Tell whether every row begins at a multiple of the 16 bytes that are copied at once, its columns side by side.

    Of a stride Triton knows whether it is a multiple of 16 elements, not of 8.
    """
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in strides(x))


def on_lines(x: Tensor) -> Tensor:
    """Return x, or a copy that lies on lines."""
    return x if lies_on_lines(x) else x.clone(memory_format=torch.contiguous_format)


@on_its_device
def launch_gather_hopper(q: Tensor, k: Tensor, indices: Tensor, scale: float, *, o: Tensor, lse: Tensor) -> None:
    """Write the attention over the selected rows to ``o`` and its log-sum-exps to ``lse``.

    Tokens are few where this kernel would leave most of the device idle; then gather.py does it.

    Args:
        q, indices, scale: arguments of `sparse_attention`, which has checked them.
        k: its keys, whose first VALUE_DIM columns are the values.
        o: output, ``[B, T, H, VALUE_DIM]``, contiguous, in q's dtype.
        lse: output, ``[B, T, H]``, contiguous, float32.
    """
    B, T, H, D = q.shape
    HKV, J = k.shape[2], indices.shape[2]
    programs = HKV * -(-(H // HKV) // HEADS)
    if cut(B, T, J, programs)[0] >= ENOUGH_SPANS:
        launch_gather(q, k, k[..., :VALUE_DIM], indices, scale, o=o, lse=lse)
        return
    indices = indices.contiguous()
    q, k = on_lines(q), on_lines(k)
    grid, arguments = (B * T * programs,), (q, k, indices, o, lse, float(scale), T, J, *strides(q), *strides(k))
    gather_hopper_kernel[grid](*arguments, H=H, HKV=HKV, D=D, V=VALUE_DIM, BH=HEADS, BN=64, num_warps=8)
