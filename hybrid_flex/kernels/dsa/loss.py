"""Launchers of the indexer's loss on CUDA: both stages, forward and backward.

Nothing waits for the device, and nothing of size T x S is made: what a chunk of rows needs beside inputs and results
stays below WORKSPACE_BYTES, and rows are worked on in as many chunks as that takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_flex.kernels.launch import (
    NARROWEST,
    device_limits,
    launchable,
    next_power_of_2,
    on_its_device,
    product_precision,
    two_widths,
)

from .loss_dense import attention_lse_kernel, compare_kernel, finish_kernel
from .loss_dense_backward import key_gradient_kernel, query_gradient_kernel
from .loss_sparse import sparse_compare_kernel, sparse_gradient_kernel, sparse_lse_kernel, sparse_target_kernel

# A quarter of a gigabyte holds 4096 rows of 32768 classes in 16 bits: four times the programs that run at once.
WORKSPACE_BYTES = 256 * 2**20
Ranges = tuple[Tensor, Tensor, Tensor, Tensor]

# NOTE [Loss tiles]
# Rows, columns, warps and loads on their way of each kernel, the best first; the first whose operands fit the device's
# shared memory is taken, with twice the warps where rows are so wide that addresses fill the registers of four.
# Columns stay at 64 where anything allows it: smaller products waste the tensor cores.
#   LSE      two blocks of 97 registers a thread on a multiprocessor of compute capability 9.0
#   PAIRS    two float32 tiles live at once, 64 registers each.  Where every head has its own keys both operands of a
#            product are read for it: 64 FLOP a byte with 128 x 128, 43 with 64 x 128, and level 2 gives 5.5 TB/s.
#   GROUPED  the keys stay in place, so half the rows do, and two blocks share a multiprocessor
#   LONG     one tile and one accumulator as wide as the indexer's heads
#   HEADS    the heads of one query; keys are fetched from anywhere, so loads run further ahead
LAST_RESORTS = ((64, 64, 4, 2), (64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1))
LSE = ((128, 128, 8, 2), (128, 64, 8, 2), *LAST_RESORTS)
PAIRS = ((128, 128, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2), *LAST_RESORTS)
GROUPED = ((64, 128, 4, 3), (64, 128, 4, 2), *LAST_RESORTS)
LONG = ((128, 64, 8, 3), (128, 64, 8, 2), *LAST_RESORTS)
HEADS = ((64, 64, 4, 3), *LAST_RESORTS)
# float32 is multiplied in three parts of tf32, which all take registers: 32 x 32 of rows of 128 leave few of them over.
PRECISE = ((32, 32, 4, 2), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1))
WIDE_BYTES = 512
# What kernels take for converting layouts and for reductions beside their operands.
SPARE_BYTES = 8 * 1024
GROUP = 16
FINISH_ROWS = 128
# Two blocks for each of an H100's 132 multiprocessors.
MIN_PROGRAMS = 264


class _Sizes(NamedTuple):
    """Shapes that all kernels share."""

    B: int
    T: int
    S: int
    P: int
    heads: dict[str, int]
    index: dict[str, int]


def _sizes(q_idx: Tensor, k_idx: Tensor, q: Tensor, k: Tensor) -> _Sizes:
    D, DI = int(q.shape[3]), int(q_idx.shape[3])
    DM, DR = two_widths(D)
    heads = {"H": int(q.shape[2]), "HKV": int(k.shape[2]), "D": D, "DM": DM, "DR": DR}
    # NOTE [Narrow products] in launch.py.
    narrowest = 16 if q_idx.dtype == torch.float32 else NARROWEST
    index = {"HI": int(q_idx.shape[2]), "DI": DI, "BD": max(narrowest, next_power_of_2(DI))}
    return _Sizes(q.shape[0], q.shape[1], k.shape[1], k_idx.shape[1], heads, index)


def _fitting(
    x: Tensor,
    tiles: tuple[tuple[int, int, int, int], ...],
    most: int,
    shared_bytes: Callable[[int, int, int], int],
    row_bytes: int,
) -> tuple[int, int, int, int]:
    """Return the first tile whose ``shared_bytes(rows, columns, loads)`` fit, with rows cut to ``most``.

    See NOTE [Loss tiles].
    """
    limit = device_limits(x.device)[0]
    is_precise = x.dtype == torch.float32
    tiles = PRECISE if is_precise else tiles
    fitting = (tile for tile in tiles if shared_bytes(tile[0], tile[1], tile[3]) + SPARE_BYTES <= limit)
    rows, columns, warps, stages = next(fitting, tiles[-1])
    if row_bytes > WIDE_BYTES and not is_precise:
        warps = 8
    return min(rows, max(16, next_power_of_2(most))), columns, warps, stages


def _chunks(B: int, T: int, row_bytes: int, workspace_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first batch entry, number of them, first row, one past the last) of what the workspace holds at once."""
    most = max(1, workspace_bytes // max(1, row_bytes))
    if most >= T:
        step = most // T
        for b in range(0, B, step):
            yield b, min(step, B - b), 0, T
        return
    step = most // 128 * 128 or most
    for b in range(B):
        for start in range(0, T, step):
            yield b, 1, start, min(start + step, T)


def _scaled(w: Tensor, dtype: torch.dtype) -> tuple[float, Tensor, Tensor | None]:
    """Return the scale of ds, w as dk takes it, and what w was multiplied with; NOTE [Scaled ds]."""
    if dtype != torch.float16:
        return 1.0, w, None
    w = w.float()
    factor = torch.exp2(-torch.ceil(torch.log2(w.abs().amax().clamp_min(2.0**-60))))
    return 2.0**15, w * factor, factor


@on_its_device
def loss_forward(
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    lse: Tensor | None,
    ranges: Ranges,
    scale: float,
    query_start: int,
    kpool: int,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss; arguments as those of the operator, which has checked them and that no size is zero.

    Args:
        q_idx: ``[B, T, HI, DI]``.
        k_idx: ``[B, P, DI]``.
        w: ``[B, T, HI]``.
        q: ``[B, T, H, D]``.
        k: ``[B, S, Hkv, D]``.
        indices: ``[B, T, J]``, or None for all visible classes.
        lse: float32 ``[B, T, H]``, log-sum-exps of the attention over ``indices``, or None.
        ranges: the visible tokens and classes of each query, ``first <= s < last``: four ``[T]``, non-decreasing.
        scale: factor of the attention's logits.
        query_start: position of query 0 among the keys.
        kpool: tokens per class.
        workspace_bytes: bound of what a chunk of rows takes, if one row fits.

    Returns:
        The loss, float32, and what `loss_backward` takes up.  Without ``indices``: float32 ``[B, T, H]``, log-sum-exps
        of the attention plus the log of the sum that normalises p, and float32 ``[B, T]``, log-sum-exps of the scores.
        With them: ds, float32 ``[B, T, J]``.  What there is none of is empty.
    """
    q_idx, k_idx, w, q, k = (x.contiguous() for x in (q_idx, k_idx, w, q, k))
    first, last, first_class, last_class = (x.int() for x in ranges)
    sizes, classes = _sizes(q_idx, k_idx, q, k), (first_class, last_class)
    tensors, scale_log2 = (q, k, q_idx, k_idx, w), scale * 1.4426950408889634
    kl = q.new_empty(q.shape[:2], dtype=torch.float32)
    if indices is None:
        lse, lse_idx = _dense_forward(tensors, (first, last), classes, kl, scale_log2, sizes, kpool, workspace_bytes)
        return kl.mean(), lse, lse_idx, kl.new_empty(0)
    indices = indices.contiguous()
    if lse is None:
        BH, BS, warps, stages = _head_tile(sizes, q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        launchable(sparse_lse_kernel, q)[(sizes.T, _head_groups(sizes, q), sizes.B)](
            q, k, indices, first, last, *classes, lse, scale_log2, query_start, sizes.T, sizes.S, indices.shape[2],
            **sizes.heads, KPOOL=kpool, BH=BH, BS=BS, PRECISION=product_precision(q), STAGES=stages, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
    ds = _sparse_forward(tensors, indices, lse.contiguous(), classes, kl, scale_log2, sizes, kpool, workspace_bytes)
    return kl.mean(), kl.new_empty(0), kl.new_empty(0), ds


@on_its_device
def loss_backward(
    grad: Tensor,
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    lse: Tensor,
    lse_idx: Tensor,
    ds: Tensor,
    ranges: Ranges,
    scale: float,
    kpool: int,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q_idx, k_idx and w from the results of `loss_forward`; ``grad`` is that of the loss."""
    q_idx, k_idx, w, lse, lse_idx, ds = (x.contiguous() for x in (q_idx, k_idx, w, lse, lse_idx, ds))
    classes = tuple(x.int() for x in ranges[2:])
    sizes = _sizes(q_idx, k_idx, q, k)
    B, T = sizes[:2]
    dq, dw = torch.empty_like(q_idx), torch.empty_like(w)
    ds_scale, w_scaled, w_factor = _scaled(w, q_idx.dtype)
    if indices is None:
        tensors = (q.contiguous(), k.contiguous(), q_idx, k_idx, w)
        dk = _dense_backward(
            grad, tensors, w_scaled, lse, lse_idx, classes, dq, dw, scale * 1.4426950408889634, ds_scale, sizes, kpool,
            workspace_bytes,
        )  # fmt: skip
    else:
        dk = _sparse_backward(grad, q_idx, k_idx, w, w_scaled, indices, ds, classes, dq, dw, ds_scale, sizes)
    factor = grad.float() / (B * T * ds_scale)
    dk *= factor if w_factor is None else factor / w_factor
    return dq, dk.to(k_idx.dtype), dw


def _dense_forward(
    tensors: tuple[Tensor, ...],
    tokens: tuple[Tensor, Tensor],
    classes: tuple[Tensor, Tensor],
    kl: Tensor,
    scale_log2: float,
    sizes: _Sizes,
    kpool: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Write each row's loss to ``kl``; return the log-sum-exps that `loss_forward` does."""
    B, T, S, P = sizes[:4]
    q, k, q_idx = tensors[:3]
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    lse_idx, log_N = (torch.empty_like(kl) for _ in range(2))
    width = (sizes.heads["DM"] + sizes.heads["DR"]) * q.element_size()
    BT, BS, warps, stages = _fitting(q, LSE, T, lambda t, s, n: (t + n * s) * width, width)
    launchable(attention_lse_kernel, q)[(-(-T // BT), q.shape[2], B)](
        q, k, *tokens, lse, scale_log2, T, S, **sizes.heads, BT=BT, BS=BS, PRECISION=product_precision(q),
        STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    BC = _dense_tile(sizes, q, q_idx)[1]
    num_tiles = -(-P // BC)
    for b, count, start, stop in _chunks(B, T, 5 * 4 * num_tiles, workspace_bytes):
        sums = q.new_empty((count, num_tiles, 5, stop - start), dtype=torch.float32)
        _compare(tensors, lse, lse_idx, classes, sums, scale_log2, sizes, kpool, (b, count, start, stop), False)
        launchable(finish_kernel, q)[(-(-(stop - start) // FINISH_ROWS), count)](
            sums, *classes, kl, lse_idx, log_N, b, start, stop, T, num_tiles, BC=BC, BLOCK=FINISH_ROWS,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        del sums  # or two of them would be held while the next is made
    return lse.add_(log_N[..., None]), lse_idx  # NOTE [Normaliser inside]


def _dense_tile(sizes: _Sizes, q: Tensor, q_idx: Tensor) -> tuple[int, int, int, int]:
    """Choose the tile of `compare_kernel`, the same in both passes."""
    width = (sizes.heads["DM"] + sizes.heads["DR"]) * q.element_size()
    index_width = sizes.index["BD"] * q_idx.element_size()
    grouped = sizes.heads["H"] != sizes.heads["HKV"]

    def shared_bytes(t: int, c: int, n: int) -> int:
        attention = (c + n * t) * width if grouped else n * (t + c) * width
        return max(attention, (c + n * t) * index_width)

    wider = q_idx if q_idx.dtype == torch.float32 else q
    return _fitting(wider, GROUPED if grouped else PAIRS, sizes.T, shared_bytes, width)


def _compare(
    tensors: tuple[Tensor, ...],
    lse: Tensor,
    lse_idx: Tensor,
    classes: tuple[Tensor, ...],
    out: Tensor,
    scale_log2: float,
    sizes: _Sizes,
    kpool: int,
    chunk: tuple[int, int, int, int],
    backward: bool,
    ds_scale: float = 1.0,
) -> None:
    b, count, start, stop = chunk
    q, k, q_idx, k_idx, w = tensors
    BT, BC, warps, stages = _dense_tile(sizes, q, q_idx)
    num_rows, num_columns = -(-(stop - start) // BT), -(-sizes.P // BC)
    launchable(compare_kernel, q)[(num_rows * num_columns, count)](
        q, k, lse, q_idx, k_idx, w, lse_idx, *classes, out, scale_log2, out.stride(1) if backward else 16, b, start,
        stop, sizes.T, sizes.S, sizes.P, num_rows, num_columns, **sizes.heads, **sizes.index, KPOOL=kpool, BT=BT,
        BC=BC, GROUP=GROUP, DS_SCALE=ds_scale, BACKWARD=backward, PRECISION=product_precision(q),
        PRECISION_IDX=product_precision(q_idx), STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _dense_backward(
    grad: Tensor,
    tensors: tuple[Tensor, ...],
    w_scaled: Tensor,
    lse: Tensor,
    lse_idx: Tensor,
    classes: tuple[Tensor, ...],
    dq: Tensor,
    dw: Tensor,
    scale_log2: float,
    ds_scale: float,
    sizes: _Sizes,
    kpool: int,
    workspace_bytes: int,
) -> Tensor:
    """Write dq and dw; return ``dk [B, P, DI]`` in float32, not yet scaled."""
    q_idx, k_idx, w = tensors[2:]
    B, T, _, P = sizes[:4]
    HI = sizes.index["HI"]
    precision, size = product_precision(q_idx), q_idx.element_size()
    width = sizes.index["BD"] * size
    BT, BC, warps, stages = _fitting(q_idx, LONG, T, lambda t, c, n: (t + n * c) * width + n * t * c * size, width)
    # The same tiles with queries and classes in each other's place.
    BC_k, BT_k, warps_k, stages_k = _fitting(q_idx, LONG, P, lambda c, t, n: (c + n * t) * width + t * c * size, width)
    # Class c is seen by the queries row_first[c] <= t < row_last[c], because first and last never decrease.
    classes_seen = torch.arange(P, dtype=torch.int32, device=q_idx.device)
    seen = tuple(torch.searchsorted(x, classes_seen, right=True, out_int32=True) for x in (classes[1], classes[0]))
    stride = -(-P // 128) * 128  # whole tiles of every kernel
    num_classes = -(-P // BC_k)
    groups = max(1, min(HI, 8, -(-MIN_PROGRAMS // (num_classes * B))))
    heads = -(-HI // groups)
    groups = -(-HI // heads)
    dk = q_idx.new_zeros((groups, B, P, q_idx.shape[3]), dtype=torch.float32)
    for chunk in _chunks(B, T, stride * q_idx.element_size(), workspace_bytes):
        b, count, start, stop = chunk
        ds = q_idx.new_empty((count, stop - start, stride))
        _compare(tensors, lse, lse_idx, classes, ds, scale_log2, sizes, kpool, chunk, True, ds_scale)
        launchable(query_gradient_kernel, q_idx)[(-(-(stop - start) // BT) * HI, count)](
            grad, ds, q_idx, k_idx, w, *classes, dq, dw, 1.0 / (B * T * ds_scale), stride, b, start, stop, T, P,
            **sizes.index, BT=BT, BC=BC, PRECISION=precision, STAGES=stages, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        launchable(key_gradient_kernel, q_idx)[(num_classes, groups, count)](
            ds, q_idx, k_idx, w_scaled, *classes, *seen, dk, stride, b, start, stop, T, P, B, **sizes.index,
            HEADS=heads, BT=BT_k, BC=BC_k, PRECISION=precision, STAGES=stages_k, num_warps=warps_k,
            num_stages=stages_k,
        )  # fmt: skip
        del ds  # or two of them would be held while the next is made
    return dk[0] if groups == 1 else dk.sum(0)


def _sparse_forward(
    tensors: tuple[Tensor, ...],
    indices: Tensor,
    lse: Tensor,
    classes: tuple[Tensor, Tensor],
    kl: Tensor,
    scale_log2: float,
    sizes: _Sizes,
    kpool: int,
    workspace_bytes: int,
) -> Tensor:
    """Write each row's loss to ``kl``; return ds."""
    q, k, q_idx, k_idx, w = tensors
    (B, T), groups, J = sizes[:2], _head_groups(sizes, q), indices.shape[2]
    BH, BS, warps, stages = _head_tile(sizes, q)
    width = sizes.index["BD"] * q_idx.element_size()
    BHI, BS_idx, warps_idx, stages_idx = _fitting(
        q_idx, HEADS, sizes.index["HI"], lambda h, s, n: (h + n * s) * width, width
    )
    ds = q.new_empty(indices.shape, dtype=torch.float32)
    for b, count, start, stop in _chunks(B, T, 4 * J * groups, workspace_bytes):
        rows = stop - start
        P = q.new_empty((count, rows, groups, J), dtype=torch.float32)
        launchable(sparse_target_kernel, q)[(rows, groups, count)](
            q, k, lse, indices, *classes, P, scale_log2, b, start, T, sizes.S, J, **sizes.heads, KPOOL=kpool, BH=BH,
            BS=BS, PRECISION=product_precision(q), STAGES=stages, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        launchable(sparse_compare_kernel, q_idx)[(rows, count)](
            q_idx, k_idx, w, P, indices, *classes, kl, ds, b, start, T, sizes.P, J, **sizes.index, GROUPS=groups,
            BHI=BHI, BS=BS_idx, PRECISION=product_precision(q_idx), STAGES=stages_idx, num_warps=warps_idx,
            num_stages=stages_idx,
        )  # fmt: skip
        del P  # or two of them would be held while the next is made
    return ds


def _head_tile(sizes: _Sizes, q: Tensor) -> tuple[int, int, int, int]:
    """Choose the tile of a group of a query's heads and of its selected keys."""
    width, group = (sizes.heads["DM"] + sizes.heads["DR"]) * q.element_size(), sizes.heads["H"] // sizes.heads["HKV"]
    return _fitting(q, HEADS, group, lambda h, s, n: (h + n * s) * width, width)


def _head_groups(sizes: _Sizes, q: Tensor) -> int:
    """Count the groups of heads: those that share a key head, at most a tile of them."""
    group = sizes.heads["H"] // sizes.heads["HKV"]
    return sizes.heads["HKV"] * -(-group // _head_tile(sizes, q)[0])


def _sparse_backward(
    grad: Tensor,
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    w_scaled: Tensor,
    indices: Tensor,
    ds: Tensor,
    classes: tuple[Tensor, ...],
    dq: Tensor,
    dw: Tensor,
    ds_scale: float,
    sizes: _Sizes,
) -> Tensor:
    """Write dq and dw; return ``dk [B, P, DI]`` in float32, not yet scaled."""
    (B, T), HI, width = sizes[:2], sizes.index["HI"], sizes.index["BD"] * q_idx.element_size()
    BHI, BS, warps, stages = _fitting(
        q_idx, LAST_RESORTS, HI, lambda h, s, n: (h + n * s) * width + s * width + h * s * 4, width
    )
    # Addresses of dk's atomics fill the registers of four warps.
    warps = 8 if BHI == 64 else warps
    dk = q_idx.new_zeros(k_idx.shape, dtype=torch.float32)
    launchable(sparse_gradient_kernel, q_idx)[(T, -(-HI // BHI), B)](
        grad, ds, q_idx, k_idx, w, w_scaled, indices.contiguous(), *classes, dq, dk, dw, 1.0 / (B * T * ds_scale), T,
        sizes.P, indices.shape[2], **sizes.index, BHI=BHI, BS=BS, DS_SCALE=ds_scale,
        PRECISION=product_precision(q_idx), STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dk
