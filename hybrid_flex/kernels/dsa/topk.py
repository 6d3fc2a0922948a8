"""Launcher of the lightning indexer on CUDA: scores of as many queries as the workspace holds, then their selection.

    scores -> select -> indices        few rows of many keys: scores -> select, spans of a row -> select -> indices

Nothing waits for the device, and nothing of size T x S is made: WORKSPACE_BYTES bound scores and candidates,
whatever T and S are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_flex.kernels.launch import device_limits, launchable, next_power_of_2, on_its_device

from .scores import few_scores_kernel, scores_kernel
from .select import select_kernel

WORKSPACE_BYTES = 512 * 2**20
QUERY_TILE = 64
# Below this many queries the heads of one are the rows of the product instead of the queries.
FEW_QUERIES = 16
MAX_WIDTH = 16384
"""Candidates that a block of threads holds at most, see NOTE [Selection]."""
MIN_WIDTH = 1024
"""Smallest tile of candidates that the kernel counts in, see places()."""
MAX_TOPK = MAX_WIDTH // 2
"""Largest topk for which at least half of the candidates fall out."""
WARP_WIDTH = 1024
"""Candidates that a warp holds: 32 registers a thread."""
MAX_REGISTERS = 128
"""What a thread of the selection may have, so that two blocks of 8192 candidates share a multiprocessor of 9.0."""
ENOUGH_BLOCKS = 256
"""Blocks of the selection that keep a GPU busy; with fewer rows than that, a row is cut into spans of SPAN_WIDTHS."""
SPAN_WIDTHS = 4


class _Rows(NamedTuple):
    """Which queries a launch serves, and how they see: arguments that all kernels of it share."""

    first: Tensor | None
    last: Tensor | None
    table: Tensor | None
    """Pages of each batch entry, ``[batch, PAGES]``, where the keys are a pool of pages."""
    start: int
    count: int
    numbers: tuple[int, int, int]
    """T, S and the position of query 0 among the keys."""
    flags: dict[str, Any]

    def pointers(self, other: Tensor) -> list[Tensor]:
        """Return table, first and last, or a pointer that no kernel reads."""
        return [other if x is None else x for x in (self.table, self.first, self.last)]


@on_its_device
def lightning_topk(
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    topk: int,
    causal: bool,
    query_start: int,
    ranges: tuple[Tensor, Tensor] | None,
    kpool: int,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    key_scale: Tensor | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """Select the topk best keys of every query; arguments as those of the operator, which has checked them.

    Args:
        q_idx: ``[B, T, HI, DI]``.
        k_idx: ``[B, S, DI]``, or pages ``[num_pages, page_size, DI]`` with ``block_table``.
        w: ``[B, T, HI]``.
        topk: at most MAX_TOPK.
        causal: as in the operator; with ``ranges`` too, not with ``lengths``.
        query_start: position of query 0 among the keys.
        ranges: first and one past the last key of every query, integers ``[T]``, where sequences are packed.
        kpool: tokens per key.
        lengths: tokens of each batch entry's cache, ``[B]``, or None.
        block_table: pages of each batch entry, ``[B, pages]``, or None.
        key_scale: float32 ``[B, S]``, or as the pages are, which a key's scores are multiplied with; or None.
        workspace_bytes: bound of what is allocated beside the result, if one query's row fits.

    Returns:
        int32 ``[B, T, topk]``, ascending, -1 in unused slots at the end.
    """
    (B, T), page, num_pages = q_idx.shape[:2], 0, 0
    S = k_idx.shape[1]
    if block_table is not None:
        page, num_pages = (int(n) for n in (S, block_table.shape[1]))
        block_table, S = block_table.contiguous(), page * num_pages
    q_idx, w = q_idx.contiguous(), w.contiguous()
    k_idx = k_idx if k_idx.stride(2) == 1 else k_idx.contiguous()
    indices = torch.empty((B, T, topk), dtype=torch.int32, device=q_idx.device)
    first, last = (None, None) if ranges is None else ranges
    sees = "length" if lengths is not None else "all" if ranges is None else "range"
    flags = {"TOPK": topk, "KPOOL": kpool, "CAUSAL": causal, "SEES": sees}
    num_batch, num_rows = _rows_at_once(B, T, S, topk, workspace_bytes)
    for b in range(0, B, num_batch):
        batch = slice(b, min(b + num_batch, B))
        own, table = (batch, None) if block_table is None else (slice(None), block_table[batch])
        keys, scale = k_idx[own], None if key_scale is None else key_scale[own]
        last = last if lengths is None else lengths[batch]
        for start in range(0, T, num_rows):
            stop = min(start + num_rows, T)
            upper = min(S, (query_start + stop) // kpool) if causal and lengths is None else S
            rows = _Rows(first, last, table, start, stop - start, (T, S, query_start), flags)
            scores = indices
            if upper > topk:
                scores = _score(q_idx[batch], keys, w[batch], scale, rows, upper, {"PAGE": page, "PAGES": num_pages})
            _select(scores, rows, max(upper, 1), topk, indices[batch])
    return indices


def _width(topk: int) -> int:
    """Return how many candidates to hold: enough that most of them fall out, and that there is work for a warp."""
    return min(max(4 * next_power_of_2(topk), 2048), MAX_WIDTH)


def _rows_at_once(B: int, T: int, S: int, topk: int, workspace_bytes: int) -> tuple[int, int]:
    """Return how many batch entries and queries of each the workspace holds: whole tiles of queries, if it can."""
    row_bytes, width = 4 * S + 64, _width(topk)
    if width < S:
        row_bytes += 8 * width
    most = workspace_bytes // row_bytes
    if most < ENOUGH_BLOCKS and 2 * SPAN_WIDTHS * width <= S:  # spans have candidates and results of their own
        most = (workspace_bytes - ENOUGH_BLOCKS * 8 * (width + topk)) // row_bytes
    most = max(1, most)
    if most >= T:
        return max(1, min(B, most // max(T, 1))), max(T, 1)
    return 1, most // QUERY_TILE * QUERY_TILE or most


def _tiles(device: torch.device, row_bytes: int) -> tuple[int, int]:
    """Choose the keys of a tile, and how many heads' queries are on their way at once, by the device's shared memory.

    Two blocks fit a multiprocessor of compute capability 9.0 with 128 keys of 256 bytes and three heads on their way.
    """
    limit = device_limits(device)[0] - 4096
    sizes = ((128, 3), (128, 2), (64, 2), (64, 1), (32, 1))
    fits = (x for x in sizes if row_bytes * (x[0] + x[1] * QUERY_TILE) <= limit)
    return next(fits, sizes[-1])


def _score(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, scale: Tensor | None, rows: _Rows, upper: int, pages: dict[str, int]
) -> Tensor:
    """Return sortable scores ``[batch, rows, columns]`` of keys 0 to ``upper``; where a query sees none, noise."""
    B, _, HI, DI = (int(n) if i > 1 else n for i, n in enumerate(q_idx.shape))
    columns = (upper + 15) // 16 * 16
    keys = torch.empty((B, rows.count, columns), dtype=torch.int32, device=q_idx.device)
    strides = (q_idx.stride(0), k_idx.stride(0), k_idx.stride(1), w.stride(0), 0 if scale is None else scale.stride(0))
    numbers = (rows.start, rows.count, *rows.numbers)
    tensors = (q_idx, k_idx, w, w if scale is None else scale, *rows.pointers(w), keys)
    BD = max(16, next_power_of_2(DI))
    key_tile, stages = _tiles(q_idx.device, BD * q_idx.element_size())
    keywords = {"HI": HI, "DI": DI, "BS": key_tile, "BD": BD, **rows.flags, **pages, "SCALED": scale is not None}
    keywords["PRECISION"] = "ieee" if q_idx.dtype == torch.float32 else "tf32"
    num_tiles = -(-columns // key_tile)
    if rows.count < FEW_QUERIES:
        heads = max(16, next_power_of_2(HI))
        launchable(few_scores_kernel)[(num_tiles, rows.count, B)](
            *tensors, *strides, columns, *numbers, **keywords, BH=heads, num_warps=4, num_stages=1
        )
        return keys
    launchable(scores_kernel)[(num_tiles, -(-rows.count // QUERY_TILE), B)](
        *tensors, *strides, columns, *numbers, **keywords, BT=QUERY_TILE, STAGES=stages, num_warps=4, num_stages=stages
    )
    return keys


def _spans(num_rows: int, upper: int, width: int, topk: int) -> int:
    """Return into how many spans to cut rows: as many as keep the GPU busy, of several widths each."""
    return max(1, min(ENOUGH_BLOCKS // num_rows, upper // max(SPAN_WIDTHS * width, 4 * topk)))


def _select(keys: Tensor, rows: _Rows, upper: int, topk: int, indices: Tensor) -> None:
    """Select from ``keys [batch, rows, columns]``, ``upper`` of them scores, into ``indices [batch, T, topk]``."""
    B, columns, first_round = indices.shape[0], keys, True
    num_spans = _spans(B * rows.count, upper, _width(topk), topk)
    while True:
        last_round = num_spans == 1
        width = max(min(next_power_of_2(upper), _width(topk)), MIN_WIDTH)
        span = -(-upper // num_spans // 16) * 16
        kept = out_keys = out = indices
        if not last_round:
            out_keys, out = (keys.new_empty((B, rows.count, num_spans * topk)) for _ in range(2))
        if span > width:
            kept = keys.new_empty((B, rows.count, num_spans, 2, width))
        launchable(select_kernel)[(num_spans, rows.count, B)](
            keys, columns, kept, *rows.pointers(keys)[1:], out_keys, out, keys.stride(1), indices.stride(0), rows.start,
            rows.count, *rows.numbers, upper, span, **rows.flags, WIDTH=width, BK=next_power_of_2(topk),
            FIRST=first_round, LAST=last_round, num_warps=max(1, width // WARP_WIDTH), num_stages=1,
            maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        if last_round:
            return
        keys, columns, upper, num_spans, first_round = out_keys, out, num_spans * topk, 1, False
