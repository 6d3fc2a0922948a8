"""Attention over selected latent rows on Hopper: two warpgroups take turns, one weighs while the other multiplies.

With l = log2(e) scale, over tiles n of 64 slots, of which warpgroup w weighs those with n % 2 = w::

    s_j  = l q . k_{i_j}                -inf in unused slots           j in tile n
    m_n  = max(m_{n-1}, max_j s_j)      p_j = 2^(s_j - m_n)            a_n = 2^(m_{n-1} - m_n)
    L_w  = a_n L_w (+ sum_j p_j)        O_h = a_n O_h + sum_j p_j k_{i_j}[h]
    o_h  = O_h / (L_0 + L_1)            lse = log (L_0 + L_1) + m log 2

Either warpgroup adds all tiles to its half h of the value columns: the weights of every other tile come from the other
one.  Where both weigh at the same time, nothing is multiplied meanwhile: 2.33 and not 1.93 ms (4096 tokens, 64 heads,
2048 of 32768 rows of 512 columns).  Written in Gluon (hopper.py); in Triton it takes 4.0 ms.

# NOTE [Three partitions]
Two warpgroups weigh and multiply, four more warps copy rows.  A tile is copied, multiplied and freed in parts of 128
columns, and the 64 of 576 that are no values: two tiles fill the shared memory, so the copy of a part starts as soon as
the sums over that part of the tile before the last have been multiplied.  Parts come in the order in which they become
free: first the rest, which is only a key, then the first parts of both halves.

# NOTE [Who waits for whom]
Parts pass from those who copy to the owner of the tile through `ready` (and which slots are used through `biased`),
weights and maxima from the owner to the other warpgroup through `given`, parts back to those who copy through `free`,
which that warpgroup alone completes that multiplies the part as values: by then the owner has read it as keys, since
the weights come from that product.  Order the work like this::

    copy of tile n,  sums over tile n - 1 in the other half,  weights of tile n,  sums over it in the owner's half,
    copy of tile n + 1, ...

A copy waits for the sums over the tile two before, in both halves; sums wait for the weights of their tile, and those
in the other half, before they give their parts back, for the first EARLY + BETWEEN parts of the next tile; weights wait
for the copy of their tile and for the weights of the tile before.  All of that comes earlier, and everybody does his
own in this order, so nobody waits in a circle.

# NOTE [Order of a step]
While a warpgroup waits for the weights of the tile before, it multiplies EARLY parts of its own tile; then it adds that
tile to its half, and multiplies BETWEEN parts more before it waits for these sums.

# NOTE [Addresses]
An offset is 0, but as the compiler cannot know that, it computes the addresses of parts where they are used.  Otherwise
it would compute all of them once and keep them, for which there are no registers.

# NOTE [One place for weights]
Weights and maxima of all tiles lie in one place.  Who writes those of tile n has read those of tile n - 1 himself, and
they tell that those of tile n - 2, his own, have been read.
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

from hybrid_flex.kernels.launch import on_its_device

from .gather import LN_2, LOG2_E, LOWEST, launch_gather
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
from .spans import cut

HEADS = 64
VALUE_DIM = 512
KEY_DIMS = (512, 576)
# Of a token whose slots gather.py cuts into that many spans, its kernel is the faster one, by what a tile takes.
ENOUGH_SPANS = 4
ROWS = gl.constexpr(HEADS)
SLOTS = gl.constexpr(64)
PART = gl.constexpr(128)
PARTS = gl.constexpr(4)
THREADS = gl.constexpr(128)
COUNTED = gl.constexpr(2048)


@gluon.jit
def look_through(p_slots, J):
    """Return one more than the last slot in use, 0 without any."""
    LINE: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    b_last = gl.zeros([COUNTED], gl.int32, LINE)
    for j in range(0, J, COUNTED):
        i_slot = j + gl.arange(0, COUNTED, LINE)
        m_used = gl.load(p_slots + i_slot, mask=i_slot < J, other=-1) >= 0
        b_last = gl.maximum(b_last, gl.where(m_used, i_slot + 1, 0))
    return gl.max(b_last, 0)


@gluon.jit
def copy_part(s_part, ready, free, phase, p_rows, m_rows, layout: gl.constexpr):
    """Copy a part of a tile, as soon as its place is free; its barrier is completed when the rows have arrived."""
    mbarrier.wait(free, phase)
    copy_rows(s_part, p_rows, m_rows, layout)
    async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def copy_tiles(tiles, s_k, s_bias, ready, biased, free, p_k, k_row, p_slots, J, s_rest=None):
    """Copy the selected rows of all tiles."""
    STEPS: gl.constexpr = PARTS + (1 if s_rest is not None else 0)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, COPY)
    b_slot = load_slots(p_slots, 0, J, SLOTS, ROW)
    for n in range(0, tiles):
        owner, phase = n & 1, ((n >> 1) & 1) ^ 1  # the phase before a barrier's first one counts as complete
        p_rows, m_rows = selected_rows(p_k, b_slot, k_row)
        b_bias = gl.where(m_rows, 0.0, float("-inf"))
        b_slot = load_slots(p_slots, (n + 1) * SLOTS, J, SLOTS, ROW)
        if s_rest is not None:
            i = owner * STEPS + PARTS
            copy_part(s_rest.index(owner), ready.index(i), free.index(i), phase, p_rows + PARTS * PART, m_rows, COPY)
        for step in gl.static_range(PARTS):
            part = (owner ^ (step & 1)) * (PARTS // 2) + step // 2
            i, s_part = owner * STEPS + part, s_k.index(owner * PARTS + part)
            copy_part(s_part, ready.index(i), free.index(i), phase, p_rows + part * PART, m_rows, COPY)
        s_bias.index(owner).store(b_bias)
        signal(biased.index(owner))


@gluon.jit
def multiply_part(b_s, s_queries, s_keys, ready, phase, AGAIN: gl.constexpr):
    """Start multiplying a part of queries and keys as soon as it has arrived."""
    mbarrier.wait(ready, phase)
    fence_async_shared()
    return warpgroup_mma(s_queries, s_keys.permute((1, 0)), b_s, use_acc=AGAIN, is_async=True)


@gluon.jit
def multiply_step(b_s, s_q, s_k, ready, phase, zero, W: gl.constexpr, STEPS: gl.constexpr, STEP: gl.constexpr):
    """Start multiplying the part of warpgroup W's tile that comes at a step; the rest has come before."""
    part: gl.constexpr = (W ^ ((STEP - STEPS + PARTS) & 1)) * (PARTS // 2) + (STEP - STEPS + PARTS) // 2
    s_queries, s_keys = s_q.index(zero + part), s_k.index(zero + W * PARTS + part)
    return multiply_part(b_s, s_queries, s_keys, ready.index(W * STEPS + part), phase, STEP > 0)


@gluon.jit
def multiply(
    b_s, s_q, s_q_rest, s_k, s_rest, ready, phase, zero, W: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr
):  # fmt: skip
    """Start multiplying queries and keys of warpgroup W's tile, steps FIRST to LAST as their parts arrive."""
    STEPS: gl.constexpr = PARTS + (1 if s_rest is not None else 0)
    for step in gl.static_range(FIRST, LAST):
        if step < STEPS - PARTS:
            s_keys = s_rest.index(zero + W)
            b_s = multiply_part(b_s, s_q_rest, s_keys, ready.index(W * STEPS + PARTS), phase, False)
        else:
            b_s = multiply_step(b_s, s_q, s_k, ready, phase, zero, W, STEPS, step)
    return b_s


@gluon.jit
def add_values(b_p, b_a, b_o0, b_o1, s_k, first):
    """Start adding rows of two parts, the first at ``first``, to the sums."""
    O: gl.constexpr = b_o0.type.layout
    b_o0 = warpgroup_mma(b_p, s_k.index(first), b_o0 * as_rows(b_a, O), is_async=True)
    return b_o0, warpgroup_mma(b_p, s_k.index(first + 1), b_o1 * as_rows(b_a, O), is_async=True)


@gluon.jit
def wait_for_values(b_o0, b_o1, free, first, BEHIND: gl.constexpr):
    """Wait for the sums, behind which BEHIND products have been started, and give the parts back."""
    b_o0 = warpgroup_mma_wait(BEHIND + 1, deps=[b_o0])
    signal(free.index(first))
    b_o1 = warpgroup_mma_wait(BEHIND, deps=[b_o1])
    signal(free.index(first + 1))
    return b_o0, b_o1


@gluon.jit
def take_weights(b_m, b_L, b_o0, b_o1, s_p, s_m, given, phase, s_k, zero, W: gl.constexpr):
    """Start adding the other warpgroup's tile to the sums."""
    mbarrier.wait(given.index(1 - W), phase)
    b_largest = s_m.load(b_m.type.layout)
    b_a = gl.exp2(b_m - b_largest)
    b_o0, b_o1 = add_values(s_p, b_a, b_o0, b_o1, s_k, zero + (1 - W) * PARTS + W * (PARTS // 2))
    return b_largest, b_L * b_a, b_o0, b_o1


@gluon.jit
def give_weights(
    b_s, b_m, b_L, b_o0, b_o1, s_p, s_m, s_bias, biased, given, free, phase, s_k, zero, factor, W: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    """Wait for the logits of warpgroup W's own tile, weigh it, give the weights away, and add it to the sums."""
    OWN: gl.constexpr = W * (PARTS // 2)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    if STEPS > PARTS:
        signal(free.index(W * STEPS + PARTS))
    mbarrier.wait(biased.index(W), phase)
    b_s = b_s * factor + s_bias.index(W).load(gl.SliceLayout(0, b_s.type.layout))[None, :]
    b_largest = gl.maximum(b_m, gl.max(b_s, 1))
    b_p = gl.exp2(b_s - b_largest[:, None])
    b_a = gl.exp2(b_m - b_largest)
    b_L = b_L * b_a + gl.sum(b_p, 1)
    b_weight = as_operand(b_p, gl.DotOperandLayout(0, b_o0.type.layout, 2), s_p.dtype)
    s_p.store(b_p.to(s_p.dtype))  # NOTE [One place for weights]
    s_m.store(b_largest)
    fence_async_shared()
    signal(given.index(W))
    b_o0, b_o1 = add_values(b_weight, b_a, b_o0, b_o1, s_k, zero + W * PARTS + OWN)
    b_o0, b_o1 = wait_for_values(b_o0, b_o1, free, W * STEPS + OWN, 0)
    return b_largest, b_L, b_o0, b_o1


@gluon.jit
def attend_half(
    W: gl.constexpr, tiles, s_k, s_bias, ready, biased, free, s_q, s_p, s_m, s_L, asked, given, added, p_o, p_lse, G,
    scale, s_q_rest=None, s_rest=None,
):  # fmt: skip
    """Compute half of the columns of o; the first warpgroup also lse."""
    STEPS: gl.constexpr = PARTS + (1 if s_rest is not None else 0)
    # NOTE [Order of a step]: of (EARLY, BETWEEN) = (1, 1), (0, 1), (2, 1) and (1, 2) these took the least time.
    EARLY: gl.constexpr = STEPS - 3
    BETWEEN: gl.constexpr = 3 - EARLY
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLOTS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    SUM: gl.constexpr = gl.SliceLayout(1, S)
    OWN: gl.constexpr = W * (PARTS // 2)

    # Inductor passes numbers as float64.
    factor = gl.cast(scale, gl.float32) * LOG2_E
    b_m = gl.full([ROWS], LOWEST, gl.float32, SUM)
    b_L = gl.zeros([ROWS], gl.float32, SUM)
    b_o0 = gl.zeros([ROWS, PART], gl.float32, O)
    b_o1 = gl.zeros([ROWS, PART], gl.float32, O)
    b_none = gl.zeros([ROWS, SLOTS], gl.float32, S)
    mbarrier.wait(asked, 0)
    phase = 0
    if W == 0:
        b_s = multiply(b_none, s_q, s_q_rest, s_k, s_rest, ready, phase, 0, W, 0, STEPS)
        b_m, b_L, b_o0, b_o1 = give_weights(
            b_s, b_m, b_L, b_o0, b_o1, s_p, s_m, s_bias, biased, given, free, phase, s_k, 0, factor, W, STEPS
        )
        phase = 1
    for n in range(2 - W, tiles, 2):
        zero = n >> 30  # NOTE [Addresses]
        b_s = multiply(b_none, s_q, s_q_rest, s_k, s_rest, ready, phase, zero, W, 0, EARLY)
        b_m, b_L, b_o0, b_o1 = take_weights(b_m, b_L, b_o0, b_o1, s_p, s_m, given, phase ^ (1 - W), s_k, zero, W)
        b_s = multiply(b_s, s_q, s_q_rest, s_k, s_rest, ready, phase, zero, W, EARLY, EARLY + BETWEEN)
        b_o0, b_o1 = wait_for_values(b_o0, b_o1, free, (1 - W) * STEPS + OWN, BETWEEN)
        b_s = multiply(b_s, s_q, s_q_rest, s_k, s_rest, ready, phase, zero, W, EARLY + BETWEEN, STEPS)
        b_m, b_L, b_o0, b_o1 = give_weights(
            b_s, b_m, b_L, b_o0, b_o1, s_p, s_m, s_bias, biased, given, free, phase, s_k, zero, factor, W, STEPS
        )
        phase ^= 1
    if W == 0:
        b_m, b_L, b_o0, b_o1 = take_weights(b_m, b_L, b_o0, b_o1, s_p, s_m, given, phase ^ 1, s_k, 0, W)
        b_o0, b_o1 = warpgroup_mma_wait(0, deps=[b_o0, b_o1])

    s_L.index(W).store(b_L)
    signal(added.index(W))
    mbarrier.wait(added.index(1 - W), 0)
    b_L += s_L.index(1 - W).load(SUM)
    # With any key the sum is at least 1, the weight of the largest logit.
    b_total = gl.maximum(b_L, 1.0)
    b_r = as_rows(1.0 / b_total, O)
    # Through the place of the queries, for whole rows.
    s_q.index(OWN).store((b_o0 * b_r).to(s_q.dtype))
    s_q.index(OWN + 1).store((b_o1 * b_r).to(s_q.dtype))
    barrier()
    i_head = gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    p_part = (p_o + i_head * (PARTS * PART))[:, None] + gl.arange(0, PART, gl.SliceLayout(0, OUT))[None, :] + OWN * PART
    gl.store(p_part, s_q.index(OWN).load(OUT), mask=(i_head < G)[:, None])
    gl.store(p_part + PART, s_q.index(OWN + 1).load(OUT), mask=(i_head < G)[:, None])
    if W == 0:
        b_lse = gl.where(b_L > 0.0, b_m * LN_2 + gl.log(b_total), float("-inf"))
        i_head = gl.arange(0, ROWS, SUM)
        gl.store(p_lse + i_head, b_lse, mask=i_head < G)


@gluon.jit(do_not_specialize=["T", "J"])
def gather_hopper_kernel(
    p_q, p_k, p_slots, p_o, p_lse, scale, T, J, q_batch, q_token, q_head, k_batch, k_row, k_head,
    H: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """Compute o and lse of one token for 64 heads that share a key head, values being the first V of D columns."""
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    STEPS: gl.constexpr = PARTS + (1 if D > V else 0)
    G: gl.constexpr = H // HKV
    TILES: gl.constexpr = (G + ROWS - 1) // ROWS
    dtype: gl.constexpr = p_k.dtype.element_ty

    i_program = gl.program_id(0)
    i_kv = ((i_program // TILES) % HKV).to(gl.int64)
    i_token = (i_program // (TILES * HKV)).to(gl.int64)
    i_first = (i_program % TILES) * ROWS
    i_heads = i_token * H + i_kv * G + i_first
    p_slots += i_token * J
    p_k += (i_token // T) * k_batch + i_kv * k_head
    p_q += (i_token // T) * q_batch + (i_token % T) * q_token + (i_kv * G + i_first) * q_head

    s_q = gl.allocate_shared_memory(dtype, [PARTS, ROWS, PART], TILE)
    s_k = gl.allocate_shared_memory(dtype, [2 * PARTS, SLOTS, PART], TILE)
    s_p = gl.allocate_shared_memory(dtype, [ROWS, SLOTS], TILE)
    s_m = gl.allocate_shared_memory(gl.float32, [ROWS], LINE)
    s_L = gl.allocate_shared_memory(gl.float32, [2, ROWS], LINE)
    s_bias = gl.allocate_shared_memory(gl.float32, [2, SLOTS], LINE)
    s_q_rest = None
    s_rest = None
    if D > V:
        s_q_rest = gl.allocate_shared_memory(dtype, [ROWS, D - V], TILE)
        s_rest = gl.allocate_shared_memory(dtype, [2, SLOTS, D - V], TILE)
    ready = gl.allocate_shared_memory(gl.int64, [2 * STEPS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2 * STEPS, 1], mbarrier.MBarrierLayout())
    biased = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    added = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2 * STEPS):
        mbarrier.init(ready.index(n), count=THREADS)
        mbarrier.init(free.index(n), count=1)
    for n in gl.static_range(2):
        mbarrier.init(biased.index(n), count=1)
        mbarrier.init(given.index(n), count=1)
        mbarrier.init(added.index(n), count=1)
    mbarrier.init(asked, count=THREADS)
    barrier()
    i_head = gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    m_head = i_first + i_head < G
    p_heads = p_q + i_head.to(gl.int64) * q_head
    for part in gl.static_range(PARTS):
        copy_rows(s_q.index(part), p_heads + part * PART, m_head, COPY)
    if D > V:
        copy_rows(s_q_rest, p_heads + V, m_head, COPY)
    async_copy.mbarrier_arrive(asked, increment_count=False)
    # An even number: the second warpgroup weighs the last one.
    tiles = gl.maximum(look_through(p_slots, J) + 2 * SLOTS - 1, 2 * SLOTS) // (2 * SLOTS) * 2
    # Triton stores what partitions are given where this maximum was handed around, which every warp must have read.
    barrier()
    of_tiles = (tiles, s_k, s_bias, ready, biased, free)
    of_half = of_tiles + (
        s_q, s_p, s_m, s_L, asked, given, added, p_o + i_heads * V, p_lse + i_heads, G - i_first, scale
    )  # fmt: skip
    of_copies = of_tiles + (p_k, k_row, p_slots, J)
    if D > V:
        of_half += (s_q_rest, s_rest)
        of_copies += (s_rest,)
    gl.warp_specialize(  # NOTE [Three partitions]
        [
            (copy_tiles, of_copies),
            (attend_half, (0,) + of_half),
            (attend_half, (1,) + of_half),
        ],
        [4, 4],
        [224, 224],
    )


def is_served(q: Tensor, k: Tensor, value_dim: int) -> bool:
    """Tell whether the kernel takes latent rows of this kind, on this device: 33 heads or more, or it would pad."""
    if not is_on_hopper(q):
        return False
    return value_dim == VALUE_DIM and q.shape[3] in KEY_DIMS and 2 * (q.shape[2] // k.shape[2]) > HEADS


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
    gather_hopper_kernel[(B * T * programs,)](
        q, k, indices, o, lse, float(scale), T, J, *strides(q), *strides(k), H=H, HKV=HKV, D=D, V=VALUE_DIM, num_warps=4
    )  # fmt: skip
