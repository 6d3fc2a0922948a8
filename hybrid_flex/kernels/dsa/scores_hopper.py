"""Scores of the lightning indexer on Hopper, for few narrow heads: scores_kernel of scores.py, placed by hand.

    I_ts = sum_j w_tj ReLU(q_idx_tj . k_idx_s)

With 8 heads of 64 a tile of 64 queries and 128 keys is 2048 cycles of products, and as many cycles pass before the
first operand of a program has come.  So a program keeps its queries, of all heads, and walks over keys: the next tile
of them is copied and the next head multiplied while a head's products are added up.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .hopper import barrier, copy_rows, is_on_hopper
from .scores import NONE

WIDTH = 64
MOST_HEADS = 8
"""Two programs of so many fit a multiprocessor."""
QUERIES = 64
KEYS = 128
TILES = 16
"""Tiles of keys that a program walks over."""


@gluon.jit
def sortable(x):
    """Do what `sortable` in scores.py does, without a comparison, of which the compiler packs eight into a word."""
    bits = x.to(gl.int32, bitcast=True)
    sign = bits >> 31
    return (bits ^ (sign.to(gl.uint32, bitcast=True) >> 1).to(gl.int32, bitcast=True)) - sign


@gluon.jit
def copy_keys(s_k, p_k, stride_ks, i_key, S, layout: gl.constexpr):
    """Start copying a tile of keys."""
    i_key = i_key + gl.arange(0, s_k.shape[0], gl.SliceLayout(1, layout))
    copy_rows(s_k, p_k + i_key.to(gl.int64) * stride_ks, i_key < S, layout)
    async_copy.commit_group()


@gluon.jit
def multiply(s_q, s_k, h: gl.constexpr, b_none):
    """Start multiplying a head's queries with the keys of a tile."""
    return warpgroup_mma(s_q.index(h), s_k.permute((1, 0)), b_none, use_acc=False, is_async=True)


@gluon.jit(do_not_specialize=["start", "S", "query_start"])
def scores_hopper_kernel(
    p_q, p_k, p_w, p_first, p_last, p_keys, stride_qb, stride_kb, stride_ks, stride_wb, stride_keys, start, rows, S,
    query_start, HI: gl.constexpr, DI: gl.constexpr, BT: gl.constexpr, BS: gl.constexpr, TILES: gl.constexpr,
    TOPK: gl.constexpr, KPOOL: gl.constexpr, CAUSAL: gl.constexpr, SEES: gl.constexpr,
):  # fmt: skip
    """Score BT of the queries ``start <= t < start + rows`` of one batch entry against TILES times BS keys."""
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DI, DI // 8], [4, 1], [1, 0])
    I: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, I)
    dtype: gl.constexpr = p_k.dtype.element_ty

    i_b, i_row = gl.program_id(2), gl.program_id(1) * BT
    i_r = i_row + gl.arange(0, BT, ROW)
    m_r = i_r < rows
    first, last = gl.zeros([BT], gl.int32, ROW), gl.zeros([BT], gl.int32, ROW) + S
    if SEES == "range":
        first = gl.load(p_first + start + i_r, mask=m_r, other=0).to(gl.int32)
        last = gl.load(p_last + start + i_r, mask=m_r, other=0).to(gl.int32)
    if CAUSAL:
        last = gl.minimum(last, (query_start + start + i_r + 1) // KPOOL)
    last = gl.where(m_r & (last - first > TOPK), last, first)  # as scored_range in scores.py
    first = gl.where(last > first, first, S)
    from_first, to_last = gl.max(first, 0), gl.min(last, 0)
    i_first = gl.program_id(0) * (TILES * BS)
    i_last = gl.minimum(i_first + TILES * BS, gl.max(last, 0))
    i_first = gl.maximum(i_first, gl.min(first, 0) // BS * BS)
    if i_first < i_last:
        s_q = gl.allocate_shared_memory(dtype, [HI, BT, DI], TILE)
        s_k = gl.allocate_shared_memory(dtype, [2, BS, DI], TILE)
        i_q = i_row + gl.arange(0, BT, gl.SliceLayout(1, COPY))
        p_q += i_b.to(gl.int64) * stride_qb + gl.cast(start, gl.int64) * (HI * DI)
        for h in gl.static_range(HI):
            copy_rows(s_q.index(h), p_q + i_q * (HI * DI) + h * DI, i_q < rows, COPY)
        p_k += i_b.to(gl.int64) * stride_kb
        copy_keys(s_k.index(0), p_k, stride_ks, i_first, S, COPY)
        p_w += i_b.to(gl.int64) * stride_wb + gl.cast(start, gl.int64) * HI
        p_weights = p_w + i_r * HI
        p_keys += (i_b * rows + i_row).to(gl.int64) * stride_keys
        p_rows = p_keys + (i_r - i_row)[:, None] * stride_keys

        b_none = gl.zeros([BT, BS], gl.float32, I)
        i = 0
        for j in range(i_first, i_last, BS):
            async_copy.wait_group(0)
            fence_async_shared()
            barrier()
            b_x = multiply(s_q, s_k.index(i), 0, b_none)
            copy_keys(s_k.index(i ^ 1), p_k, stride_ks, j + BS, S, COPY)
            b_I = gl.zeros([BT, BS], gl.float32, I)
            for h in gl.static_range(HI):
                b_w = gl.load(p_weights + h, mask=m_r, other=0.0).to(gl.float32)[:, None]
                # The sums, too, pass through the waits: or the compiler would put off what is added to them.
                if h + 1 < HI:
                    b_next = multiply(s_q, s_k.index(i), h + 1, b_none)
                    b_x, b_I = warpgroup_mma_wait(1, deps=[b_x, b_I])
                else:
                    b_next = b_x
                    b_x, b_I = warpgroup_mma_wait(0, deps=[b_x, b_I])
                b_I += gl.maximum(b_x, 0.0) * b_w
                b_x = b_next
            b_out = sortable(b_I)
            i_s = j + gl.arange(0, BS, gl.SliceLayout(0, I))[None, :]
            if (j >= from_first) & (j + BS <= to_last):
                gl.store(p_rows + i_s, b_out)
            else:
                b_out = gl.where((i_s >= first[:, None]) & (i_s < last[:, None]), b_out, NONE)
                gl.store(p_rows + i_s, b_out, mask=m_r[:, None] & (i_s < stride_keys))
            i ^= 1
        async_copy.wait_group(0)


def is_served(q_idx: Tensor, k_idx: Tensor) -> bool:
    """Tell whether the kernel takes indexer queries ``[B, T, HI, DI]``, contiguous, and keys ``[B, S, DI]``, here."""
    if not is_on_hopper(q_idx) or q_idx.shape[3] != WIDTH or q_idx.shape[2] > MOST_HEADS:
        return False
    steps = (k_idx.stride(1), k_idx.stride(0) if k_idx.shape[0] > 1 else 0)
    return q_idx.data_ptr() % 16 == 0 and k_idx.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in steps)


def launch_scores_hopper(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, ranges: tuple[Tensor, Tensor] | None, keys: Tensor, start: int, rows: int,
    upper: int, query_start: int, flags: dict[str, Any],
) -> None:  # fmt: skip
    """Write sortable scores of ``rows`` queries from ``start`` on to ``keys [B, rows, columns]``, NONE where unseen.

    Args:
        q_idx, k_idx, w: arguments of `lightning_topk`, of what `is_served` serves.
        ranges: first and one past the last key of every query, int32 ``[T]``, or None.
        keys: output, int32, contiguous, with a column for each of ``upper`` keys and for whole vectors.
        start, rows: which queries.
        upper: keys from here on are not looked at.
        query_start: position of query 0 among the keys.
        flags: TOPK, KPOOL, CAUSAL and SEES of the kernel.
    """
    B, _, HI, DI = q_idx.shape
    first, last = (keys, keys) if ranges is None else ranges
    grid = (-(-max(upper, 1) // (TILES * KEYS)), -(-rows // QUERIES), B)
    scores_hopper_kernel[grid](
        q_idx, k_idx, w, first, last, keys, q_idx.stride(0), k_idx.stride(0), k_idx.stride(1), w.stride(0),
        keys.stride(1), start, rows, k_idx.shape[1], query_start,
        HI=HI, DI=DI, BT=QUERIES, BS=KEYS, TILES=TILES, **flags, num_warps=4,
    )  # fmt: skip
