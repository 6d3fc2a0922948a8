"""Launcher of the lightning indexer on CUDA: scores of as many queries as the workspace holds, then their selection.

    scores -> select -> indices        few rows of many keys: scores -> select, spans of a row -> select -> indices

Nothing waits for the device, and nothing of size T x S is made: WORKSPACE_BYTES bound scores and candidates,
whatever T and S are.  The same launcher is traced into graphs that leave B, T and S open: NOTE [Open sizes].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_flex.checks import is_plain
from hybrid_flex.kernels.launch import (
    computed_once,
    device_limits,
    launchable,
    next_power_of_2,
    on_its_device,
    upper_bound,
)

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
# Torch's compiler does not pass these on.
SELECT_REGISTERS = {"maxnreg": 128}
"""Of launches of 8192 candidates one would fill a multiprocessor of compute capability 9.0, with these two do."""
SCORE_REGISTERS = {"maxnreg": 160}
"""With keys of 128 bytes three blocks fit a multiprocessor and not two: 1.8 and not 2.0 ms (T 32768, 8 x 64)."""
ENOUGH_BLOCKS = 256
"""Blocks of the selection that keep a GPU busy; with fewer rows than that, a row is cut into spans of SPAN_WIDTHS."""
SPAN_WIDTHS = 4
FEW_ROWS = 64
"""Rows that leave most of a GPU idle: NOTE [Few rows]."""
FEW_WIDTH = 8192
"""Candidates that a block of few rows holds at least."""
FEW_ROUNDS = 3
"""Rounds of selection of few rows at most."""
MOST_ROWS = 65535 // QUERY_TILE * QUERY_TILE
"""Queries of one launch: CUDA's grids are no higher than 65535."""

# NOTE [Few rows]
# A block takes about 10 us for a tile of candidates, however many it holds: its search is one count after the other
# (one query on 131072 keys: 5 tiles, 50 us).  Where rows are few, and no block waits for another, a tile is as large as
# registers allow, all of those that a multiprocessor has; spans are one tile, and what they leave is cut again.

# NOTE [Open sizes]
# A graph that leaves B, T or S open holds a fixed number of launches: one for each block of queries, of all batch
# entries, that the largest sizes need; where nothing bounds T or S they count as OPEN_LENGTH, B as OPEN_BATCH, and
# there are MOST_BLOCKS blocks at most.  When the graph runs, a block takes as many queries as the workspace holds for
# the sizes of the day, so that most calls are served by the first, and the others, which begin after the last query,
# are launches of programs that return at once.  Where that would leave queries over, beyond the assumed sizes or
# because MOST_BLOCKS are too few, every block takes T / blocks of them and the workspace grows.  A graph of one query
# has one block whatever B is: its scores take 4 bytes for each index key, which has 100 or more itself.
# Nothing may ask a question about an open size, which would bind the graph to lengths of the same answer: what is left
# out for small sizes elsewhere is left out here only if it is for all sizes within the bounds.
# AOTInductor compiles every launch on its own, which is why MOST_BLOCKS are not more.
MOST_BLOCKS = 32
OPEN_LENGTH = 131072
OPEN_BATCH = 4


class _Block(NamedTuple):
    """Queries that one launch of each kernel serves."""

    batch: slice | None
    """Batch entries; None for all."""
    start: int
    count: int
    room: int
    """Queries that the workspace has room for, ``count`` at least; of one size for all blocks of open sizes."""


class _Rows(NamedTuple):
    """Which queries a launch serves, and how they see: arguments that all kernels of it share."""

    first: Tensor | None
    last: Tensor | None
    table: Tensor | None
    """Pages of each batch entry, ``[batch, PAGES]``, where the keys are a pool of pages."""
    batch: int
    start: int
    count: int
    room: int
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
    (B, T, S), page, num_pages = _sizes(q_idx, k_idx, block_table), 0, 0
    if block_table is not None:
        page, num_pages, block_table = k_idx.shape[1], block_table.shape[1], block_table.contiguous()
        if not (isinstance(page, int) and isinstance(num_pages, int)):
            rule = "have a fixed size, like its pages, in a graph that leaves other sizes open"
            raise ValueError(f"lightning_topk: block_table must {rule}, got open ones")
    q_idx, w = computed_once(q_idx.contiguous()), computed_once(w.contiguous())
    k_idx = computed_once(k_idx if k_idx.stride(2) == 1 else k_idx.contiguous())
    key_scale = None if key_scale is None else computed_once(key_scale)
    indices = _integers(q_idx, B, T, topk)
    first, last = (None, None) if ranges is None else ranges
    sees = "length" if lengths is not None else "all" if ranges is None else "range"
    flags = {"TOPK": topk, "KPOOL": kpool, "CAUSAL": causal, "SEES": sees}
    if lengths is not None and not is_plain(lengths):
        # Torch takes what stores depend on for written, and a graph's input would be; a clone would be optimised away.
        lengths = lengths.clamp(min=0)
    is_open = not all(isinstance(n, int) for n in (B, T, S))
    for block in (_open_blocks if is_open else _blocks)(B, T, S, topk, workspace_bytes):

        def own(x: Tensor | None, batch: slice | None = block.batch) -> Any:
            return x if x is None or batch is None else x[batch]

        keys, scale = (k_idx, key_scale) if page else (own(k_idx), own(key_scale))
        stop, out = block.start + block.count, own(indices)
        upper = torch.sym_min(S, (query_start + stop) // kpool) if causal and lengths is None else S
        own_last = last if lengths is None else own(lengths)
        num_batch = B if block.batch is None else out.shape[0]
        rows = _Rows(first, own_last, own(block_table), num_batch, *block[1:], (T, S, query_start), flags)
        if upper_bound(upper) > topk:
            columns, pages = S if is_open else upper, {"PAGE": page, "PAGES": num_pages}
            scores = _score(own(q_idx), keys, own(w), scale, rows, upper, columns, pages)
        else:
            scores = _unread(out)
        _select(scores, rows, torch.sym_max(upper, 1), topk, _has_few_rows(B, T), out)
        del scores  # before the next block's are made
    return indices


def _sizes(q_idx: Tensor, k_idx: Tensor, block_table: Tensor | None) -> tuple[int, int, int]:
    """Return B, T and S."""
    B, T = q_idx.shape[:2]
    return B, T, k_idx.shape[1] * (1 if block_table is None else block_table.shape[1])


def _unread(x: Tensor) -> Tensor:
    """Return what stands for a pointer that a kernel does not use: x, or memory of its own while a graph is traced.

    There a tensor that is passed as two arguments, each of which the kernel may write, would be copied for one of them.
    """
    return x if is_plain(x) else x.new_empty((1,) * x.dim())


def _integers(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=x.device)


def _has_few_rows(B: int, T: int) -> bool:
    """Tell whether NOTE [Few rows] applies: any number of caches counts as few."""
    return upper_bound(T) < FEW_QUERIES and (not isinstance(B, int) or B * T <= FEW_ROWS)


def _held(topk: int, few: bool) -> tuple[int, int]:
    """Return how many candidates a block holds, and how many times as many columns a span has at least.

    Enough that most of them fall out, and that there is work for a warp.
    """
    least, span_widths = (FEW_WIDTH, 1) if few else (2048, SPAN_WIDTHS)
    return min(max(4 * next_power_of_2(topk), least), MAX_WIDTH), span_widths


def _row_bytes(S: int, width: int) -> int:
    """Return what scores and candidates of one query take."""
    return 4 * S + 64 + (12 * width if width < upper_bound(S) else 0)


def _rows_at_once(B: int, T: int, S: int, topk: int, workspace_bytes: int) -> tuple[int, int]:
    """Return how many batch entries and queries of each the workspace holds: whole tiles of queries, if it can."""
    width, span_widths = _held(topk, _has_few_rows(B, T))
    row_bytes = _row_bytes(S, width)
    most = workspace_bytes // row_bytes
    if most < ENOUGH_BLOCKS and 2 * span_widths * width <= S:  # spans have candidates and results of their own
        most = (workspace_bytes - ENOUGH_BLOCKS * (12 * width + 8 * topk)) // row_bytes
    most = max(1, most)
    if most >= T and T <= MOST_ROWS:
        return max(1, min(B, most // max(T, 1))), max(T, 1)
    return 1, min(most // QUERY_TILE * QUERY_TILE or most, MOST_ROWS)


def _blocks(B: int, T: int, S: int, topk: int, workspace_bytes: int) -> Iterator[_Block]:
    """Cut queries into blocks that the workspace holds."""
    num_batch, num_rows = _rows_at_once(B, T, S, topk, workspace_bytes)
    for b in range(0, B, num_batch):
        batch = slice(b, min(b + num_batch, B)) if num_batch < B else None
        for start in range(0, T, num_rows):
            count = min(num_rows, T - start)
            yield _Block(batch, start, count, count)


def _open_blocks(B: int, T: int, S: int, topk: int, workspace_bytes: int) -> Iterator[_Block]:
    """Cut queries into a fixed number of blocks, of which the last may be empty: NOTE [Open sizes]."""
    most_B, most_T, most_S = upper_bound(B, OPEN_BATCH), upper_bound(T, OPEN_LENGTH), upper_bound(S, OPEN_LENGTH)
    width, _ = _held(topk, _has_few_rows(B, T))
    fewest = max(1, min(workspace_bytes // (most_B * _row_bytes(most_S, width)), MOST_ROWS))
    tile = QUERY_TILE if fewest >= QUERY_TILE else 1
    number = min(-(-most_T // (fewest // tile * tile)), MOST_BLOCKS)
    if number == 1:
        yield _Block(None, 0, T, T)
        return
    held = workspace_bytes // (B * _row_bytes(S, width)) // tile * tile
    enough = (T + number * tile - 1) // (number * tile) * tile
    room = torch.sym_min(T, torch.sym_max(torch.sym_min(held, MOST_ROWS), enough))
    for i in range(number):
        yield _Block(None, i * room, torch.sym_max(torch.sym_min(room, T - i * room), 0), room)


def _tiles(device: torch.device, row_bytes: int) -> tuple[int, int]:
    """Choose the keys of a tile, and how many heads' queries are on their way at once, by the device's shared memory.

    Two blocks fit a multiprocessor of compute capability 9.0 with 128 keys of 256 bytes and three heads on their way.
    """
    limit = device_limits(device)[0] - 4096
    sizes = ((128, 3), (128, 2), (64, 2), (64, 1), (32, 1))
    fits = (x for x in sizes if row_bytes * (x[0] + x[1] * QUERY_TILE) <= limit)
    return next(fits, sizes[-1])


def _score(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, scale: Tensor | None, rows: _Rows, upper: int, columns: int,
    pages: dict[str, int],
) -> Tensor:  # fmt: skip
    """Return sortable scores ``[batch, rows, columns]`` of keys 0 to ``upper``; where a query sees none, noise.

    ``columns``, of which there are at least ``upper``, are rounded up to whole vectors.
    """
    B, HI, DI = rows.batch, *map(int, q_idx.shape[2:])
    # In this form the compiler sees that rows begin at whole vectors, whatever an open size is, and loads vectors.
    num_rows, columns = torch.sym_max(rows.count, 1), 16 * torch.sym_max((columns + 15) // 16, 1)
    keys = _integers(q_idx, B, rows.room, columns)
    strides = (q_idx.stride(0), k_idx.stride(0), k_idx.stride(1), w.stride(0), 0 if scale is None else scale.stride(0))
    numbers = (rows.start, rows.count, *rows.numbers)
    tensors = (q_idx, k_idx, w, w if scale is None else scale, *rows.pointers(w), keys)
    BD = max(16, next_power_of_2(DI))
    key_tile, stages = _tiles(q_idx.device, BD * q_idx.element_size())
    keywords = {"HI": HI, "DI": DI, "BS": key_tile, "BD": BD, **rows.flags, **pages, "SCALED": scale is not None}
    keywords["PRECISION"] = "ieee" if q_idx.dtype == torch.float32 else "tf32"
    num_tiles = torch.sym_max(((upper + 15) // 16 * 16 + key_tile - 1) // key_tile, 1)
    if upper_bound(rows.count) < FEW_QUERIES:
        heads = max(16, next_power_of_2(HI))
        launchable(few_scores_kernel, q_idx)[(num_tiles, num_rows, B)](
            *tensors, *strides, columns, *numbers, **keywords, BH=heads, num_warps=4, num_stages=1
        )
        return keys
    grid = (num_tiles, (num_rows + QUERY_TILE - 1) // QUERY_TILE, B)
    registers = SCORE_REGISTERS if is_plain(keys) and BD * q_idx.element_size() <= 128 else {}
    launchable(scores_kernel, q_idx)[grid](
        *tensors, *strides, columns, *numbers, **keywords, BT=QUERY_TILE, STAGES=stages, num_warps=4,
        num_stages=stages, **registers,
    )  # fmt: skip
    return keys


def _spans(num_rows: int, upper: int, least: int) -> int:
    """Return into how many spans of at least so many columns to cut rows: as many as keep the GPU busy."""
    return torch.sym_max(1, torch.sym_min(ENOUGH_BLOCKS // num_rows, upper // least))


def _select(keys: Tensor, rows: _Rows, upper: int, topk: int, few: bool, indices: Tensor) -> None:
    """Select from ``keys [batch, rows, columns]``, ``upper`` of them scores, into ``indices [batch, T, topk]``."""
    most_width, span_widths = _held(topk, few)
    B, num_rows, columns = rows.batch, torch.sym_max(rows.count, 1), _unread(keys)
    # Of open sizes only those of few queries: the others would write results of one span, mostly, to read them again.
    rounds = 1
    if isinstance(rows.count, int) or upper_bound(rows.count) < FEW_QUERIES:
        rounds = FEW_ROUNDS if few else 2
    seen = [_unread(keys) if x is None else x for x in (rows.first, rows.last)]
    registers = SELECT_REGISTERS if is_plain(keys) and not few else {}
    for i_round in range(rounds):
        num_spans = 1
        if i_round + 1 < rounds:
            num_spans = _spans(B * num_rows, upper, max(span_widths * most_width, 4 * topk))
        # An open number of spans may be one, but the rounds must serve them all.
        last_round = upper_bound(num_spans) == 1
        num_spans = 1 if last_round else num_spans
        width = max(min(next_power_of_2(upper_bound(upper)), most_width), MIN_WIDTH)
        span = ((upper + num_spans - 1) // num_spans + 15) // 16 * 16
        kept, out_keys, out = _unread(indices), _unread(indices), indices
        if not last_round:
            out_keys, out = (_integers(keys, B, rows.room, num_spans * topk) for _ in range(2))
        if upper_bound(span) > width:
            kept = _integers(keys, B, rows.room, num_spans, 3, width)
        launchable(select_kernel, keys)[(num_spans, num_rows, B)](
            keys, columns, kept, *seen, out_keys, out, keys.stride(1), indices.stride(0), rows.start,
            rows.count, *rows.numbers, upper, span, **rows.flags, WIDTH=width, BK=next_power_of_2(topk),
            FIRST=i_round == 0, LAST=last_round, num_warps=max(1, width // WARP_WIDTH), num_stages=1, **registers,
        )  # fmt: skip
        if last_round:
            return
        keys, columns, upper = out_keys, out, num_spans * topk
