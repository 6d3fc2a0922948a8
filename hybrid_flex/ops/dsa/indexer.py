"""Lightning indexer: score every visible key and keep the ``topk`` best, streaming over blocks of queries.

    I_ts = sum_j w_tj ReLU(q_idx_tj . k_idx_s)
    S_t  = the topk visible s with the largest I_ts; among equals the lower s

Nothing of size T x S is ever stored: a block of queries is scored against the keys it can see, selected, and forgotten.
On CUDA that happens in Triton kernels (kernels/dsa/topk.py), in plain torch elsewhere and in float64.
Source: DeepSeek-V3.2 report, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hybrid_flex.checks import (
    FLOATING,
    INTEGER,
    check,
    check_choice,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_rank,
    check_shape,
    is_exporting,
)
from hybrid_flex.ops.dispatch import has_kernels, in_its_own_precision
from hybrid_flex.ops.dsa.quantize import check_fp8, quantize, rounded
from hybrid_flex.ops.dsa.reference import reference_scores, reference_topk, reference_visible

# NOTE [Score workspace]: queries of one block, and bytes of products [block * HI, keys] that live at once.  Measured on
# one Zen 5 core at HI = 8, DI = 64: 75 GFLOP/s from 2 MiB kept across tiles, 20 to 45 from fresh or larger buffers.
BLOCK_SIZE = 32
PRODUCT_BYTES = 2 * 2**20


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which an operator on ``tensor`` sums: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class ScoreTiles:
    """Score blocks of queries against a range of keys, in buffers that are made once."""

    def __init__(self, block_size: int, num_heads: int, num_keys: int, like: Tensor, dtype: torch.dtype):
        self.tile_size = max(64, min(num_keys, PRODUCT_BYTES // (block_size * num_heads * dtype.itemsize)))
        self.products = like.new_empty(block_size * num_heads * self.tile_size, dtype=dtype)
        self.scores = like.new_empty(block_size * num_keys, dtype=dtype)

    def empty(self, num_queries: int, num_keys: int) -> Tensor:
        """Lend the score buffer as ``[b, L]``; the next call overwrites it."""
        return self.scores[: num_queries * num_keys].view(num_queries, num_keys)

    def __call__(self, q_idx: Tensor, k_idx: Tensor, w: Tensor) -> Tensor:
        """Score ``[b, HI, DI], [L, DI], [b, HI] -> [b, L]``, all in the dtype of the buffers."""
        num_queries, num_heads, width = q_idx.shape
        scores = self.empty(num_queries, k_idx.shape[0])
        flat = q_idx.reshape(num_queries * num_heads, width)
        for start in range(0, k_idx.shape[0], self.tile_size):
            keys = k_idx[start : start + self.tile_size]
            products = self.products[: flat.shape[0] * keys.shape[0]].view(flat.shape[0], keys.shape[0])
            torch.mm(flat, keys.T, out=products)
            tile = torch.bmm(w[:, None], products.relu_().view(num_queries, num_heads, keys.shape[0]))
            scores[:, start : start + keys.shape[0]] = tile[:, 0]
        return scores


def visible_ranges(
    num_queries: int,
    num_keys: int,
    causal: bool,
    query_start: int,
    cu_seqlens: Tensor | None,
    kpool: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Give each query its visible keys ``first <= s < last``: two int64 ``[T]``."""
    t = torch.arange(num_queries, device=device)
    first = torch.zeros_like(t)
    last = torch.full_like(t, num_keys)
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(device=device, dtype=torch.int64)
        sequence = torch.searchsorted(bounds, t, right=True)
        first, last = bounds[sequence - 1], bounds[sequence]
    if causal:
        last = torch.minimum(last, (t + (query_start + 1)) // kpool)
    return first, last


def cached_ranges(lengths: Tensor, num_queries: int, num_keys: int, kpool: int) -> tuple[Tensor, Tensor]:
    """Give the last queries of caches that hold ``lengths [...]`` tokens their visible keys: two int64 ``[..., T]``."""
    seen = lengths.long()[..., None] - num_queries + 1 + torch.arange(num_queries, device=lengths.device)
    return torch.zeros_like(seen), (seen.clamp_min(0) // kpool).clamp_max(num_keys)


def block_range(first: Tensor, last: Tensor, upper: int) -> tuple[int, int]:
    """Bound the keys a block of queries can see; exact on CPU, ``[0, upper)`` on a GPU, where reading would wait."""
    if first.device.type != "cpu":
        return 0, upper
    low = int(first.min())
    return low, max(low, min(upper, int(last.max())))


def select_topk(scores: Tensor, first: Tensor, last: Tensor, topk: int) -> Tensor:
    """Select per row the ``topk`` largest scores of columns ``first <= s < last``; among equals the lower column.

    Args:
        scores: ``[b, L]``; may be overwritten with -inf outside the range.
        first: int64 ``[b]``.
        last: int64 ``[b]``.
        topk: number of columns to keep.

    Returns:
        int64 ``[b, min(topk, L)]``: columns, ascending, ``L`` in unused slots at the end.
    """
    width = scores.shape[1]
    column = torch.arange(width, device=scores.device)
    if topk >= width:
        return _lowest((column >= first[:, None]) & (column < last[:, None]), topk)
    if scores.device.type != "cpu":
        return _lowest(mark_topk(scores, first, last, topk), topk)
    first, last = first[:, None], last[:, None]
    # Only the ragged borders are masked: most columns are visible to every row of the block.
    for border in (slice(0, int(first.max())), slice(int(last.min()), width)):
        inside = (column[border] >= first) & (column[border] < last)
        scores[:, border].masked_fill_(~inside, float("-inf"))
    threshold = scores.topk(topk, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    keep = scores >= threshold
    # torch.topk promises no order among equals: where more columns reach the threshold than there are slots, take all
    # above it and fill up with the lowest columns that equal it.  Rows that see too few columns have a threshold of
    # -inf.
    rows = (keep.sum(-1) != topk).nonzero()[:, 0]
    if rows.numel() > 0:
        exact = _fill(scores[rows], threshold[rows], first[rows], last[rows], topk)
        keep[rows] = exact
        # Rows that see too few columns, or hold NaN, do not fill their slots.
        if bool((exact.sum(-1) != topk).any()):
            return _lowest(keep, topk)
    return keep.nonzero()[:, 1].view(-1, topk)


def mark_topk(scores: Tensor, first: Tensor, last: Tensor, topk: int) -> Tensor:
    """Mark what `select_topk` selects among ``scores [b, L]``, ``L >= topk``: bool ``[b, L]``.

    A graph with open sizes can hold it: nothing is read, nothing overwritten.
    """
    first, last = first[:, None], last[:, None]
    column = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.masked_fill((column < first) | (column >= last), float("-inf"))
    threshold = scores.topk(topk, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return _fill(scores, threshold, first, last, topk)


def _fill(scores: Tensor, threshold: Tensor, first: Tensor, last: Tensor, topk: int) -> Tensor:
    """Mark everything above the threshold and the lowest columns that equal it, ``topk`` in all, inside the range."""
    column = torch.arange(scores.shape[1], device=scores.device)
    above = scores > threshold
    equal = (scores == threshold) & (column >= first) & (column < last)
    return above | (equal & (equal.cumsum(-1) <= topk - above.sum(-1, keepdim=True)))


def _lowest(keep: Tensor, topk: int) -> Tensor:
    """List the marked columns of each row, ascending, padded with the width at the end: ``[b, topk]``."""
    column = torch.arange(keep.shape[1], device=keep.device)
    return torch.where(keep, column, keep.shape[1]).sort(dim=-1).values[:, :topk]


@torch.library.custom_op("hybrid_flex::lightning_topk", mutates_args=())
@in_its_own_precision
def _lightning_topk(
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    topk: int,
    causal: bool,
    query_start: int,
    cu_seqlens: Tensor | None,
    kpool: int,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    fp8: bool = False,
) -> Tensor:
    batch_size, num_queries, num_heads, _ = q_idx.shape
    num_keys = k_idx.shape[1] if block_table is None else k_idx.shape[1] * block_table.shape[1]
    if _is_in_kernels(q_idx, topk) and num_keys > 0 and batch_size * num_queries > 0:
        options = (topk, causal, query_start, cu_seqlens, kpool, lengths, block_table, fp8)
        return _in_kernels(q_idx, k_idx, w, *options)
    indices = q_idx.new_full((batch_size, num_queries, topk), -1, dtype=torch.int32)
    if num_keys == 0 or indices.numel() == 0:
        return indices
    if fp8:
        q_idx, k_idx = rounded(q_idx), rounded(k_idx)
    dtype = accumulate_dtype(q_idx)
    ranges = visible_ranges(num_queries, num_keys, causal, query_start, cu_seqlens, kpool, q_idx.device)
    block = min(num_queries, BLOCK_SIZE)
    tiles = ScoreTiles(block, num_heads, num_keys, q_idx, dtype)
    for b in range(batch_size):
        keys = (k_idx[b] if block_table is None else k_idx[block_table[b].clamp_min(0).long()].flatten(0, 1)).to(dtype)
        if lengths is not None:
            ranges = cached_ranges(lengths[b], num_queries, num_keys, kpool)
        for start in range(0, num_queries, block):
            stop = min(start + block, num_queries)
            first, last = (x[start:stop] for x in ranges)
            upper = min(num_keys, max(0, (query_start + stop) // kpool)) if causal and lengths is None else num_keys
            low, high = block_range(first, last, upper)
            if high == low:
                continue
            first, last = first - low, last - low
            if high - low <= topk:  # everything visible is selected: no scores needed
                scores = tiles.empty(stop - start, high - low)
            else:
                scores = tiles(q_idx[b, start:stop].to(dtype), keys[low:high], w[b, start:stop].to(dtype))
            chosen = select_topk(scores, first, last, topk)
            indices[b, start:stop, : chosen.shape[1]] = torch.where(chosen < high - low, chosen + low, -1)
    return indices


def _is_in_kernels(q_idx: Tensor, topk: int) -> bool:
    """Tell whether the kernels serve these queries."""
    if not has_kernels(q_idx):
        return False
    from hybrid_flex.kernels.dsa.topk import MAX_TOPK

    return topk <= MAX_TOPK


def _in_kernels(
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    topk: int,
    causal: bool,
    query_start: int,
    cu_seqlens: Tensor | None,
    kpool: int,
    lengths: Tensor | None,
    block_table: Tensor | None,
    fp8: bool,
) -> Tensor:
    from hybrid_flex.kernels.dsa import topk as kernels

    ranges = None
    if cu_seqlens is not None:
        ranges = visible_ranges(q_idx.shape[1], k_idx.shape[1], False, 0, cu_seqlens, 1, q_idx.device)
    key_scale = None
    if fp8:
        (q_idx, query_scale), (k_idx, key_scale) = quantize(q_idx), quantize(k_idx)
        w = w.float() * query_scale
    options = (topk, causal, query_start, ranges, kpool, lengths, block_table)
    return kernels.lightning_topk(q_idx, k_idx, w, *options, key_scale=key_scale)


@torch.library.triton_op("hybrid_flex::lightning_topk_cuda", mutates_args=())
@in_its_own_precision
def _cuda_topk(
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    topk: int,
    causal: bool,
    query_start: int,
    cu_seqlens: Tensor | None,
    kpool: int,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    fp8: bool = False,
) -> Tensor:
    """Do what lightning_topk does for tensors that the kernels serve, in a number of launches that a graph can hold."""
    if not _is_in_kernels(q_idx, topk):
        rule = "q_idx must be on CUDA and not float64, and topk at most 8192"
        raise RuntimeError(f"lightning_topk_cuda: {rule}, got {q_idx.device}, {q_idx.dtype}, topk = {topk}")
    if statically_known_true(q_idx.shape[0] * q_idx.shape[1] * k_idx.shape[1] == 0):
        return q_idx.new_full((q_idx.shape[0], q_idx.shape[1], topk), -1, dtype=torch.int32)
    return _in_kernels(q_idx, k_idx, w, topk, causal, query_start, cu_seqlens, kpool, lengths, block_table, fp8)


@_cuda_topk.register_fake
@_lightning_topk.register_fake
def _(
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    topk: int,
    causal: bool,
    query_start: int,
    cu_seqlens: Tensor | None,
    kpool: int,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    fp8: bool = False,
) -> Tensor:
    return q_idx.new_empty((q_idx.shape[0], q_idx.shape[1], topk), dtype=torch.int32)


def check_indexer(op: str, q_idx: Tensor, k_idx: Tensor, w: Tensor, *, paged: bool = False) -> None:
    """Check the three tensors every indexer operator takes; ``paged`` keys are a pool that batch entries share."""
    check_rank(op, "q_idx", q_idx, "[B, T, HI, DI]")
    batch_size, num_queries, num_heads, width = q_idx.shape
    wanted = "[num_pages, page_size, DI] with block_table" if paged else "[B, S, DI]"
    check_shape(op, "k_idx", k_idx, (None if paged else batch_size, None, width), wanted)
    check_shape(op, "w", w, (batch_size, num_queries, num_heads), "[B, T, HI]")
    check_dtype(op, "q_idx", q_idx, FLOATING)
    check_dtype(op, "k_idx", k_idx, (q_idx.dtype,))
    check_dtype(op, "w", w, FLOATING)
    for name, tensor in (("k_idx", k_idx), ("w", w)):
        check_device(op, name, tensor, q_idx.device)


def check_visibility(
    op: str, num_queries: int, num_keys: int, batch_size: int, query_start: int, cu_seqlens: Tensor | None, kpool: int
) -> None:
    """Check the arguments that say which keys a query sees."""
    check(kpool >= 1, op, "kpool", "be at least 1", kpool)
    check(query_start >= 0, op, "query_start", "be at least 0", query_start)
    if cu_seqlens is None:
        return
    check(kpool == 1, op, "kpool", "be 1 with cu_seqlens (pools would straddle the sequences)", kpool)
    check(query_start == 0, op, "query_start", "be 0 with cu_seqlens", query_start)
    if num_keys != num_queries:  # formatted only on failure: formatting a symbolic size fixes it in a compiled graph
        raise ValueError(f"{op}: k_idx must have S = T = {num_queries} with cu_seqlens, got S = {num_keys}")
    check_cu_seqlens(op, cu_seqlens, batch_size, num_queries)


def _check_cache(
    op: str, batch_size: int, device: torch.device, causal: bool, query_start: int, cu_seqlens: Tensor | None,
    lengths: Tensor | None, block_table: Tensor | None,
) -> None:  # fmt: skip
    """Check the arguments that say how long caches are and where they lie."""
    if lengths is None:
        check(block_table is None, op, "block_table", "come with lengths", "lengths = None")
        return
    check_shape(op, "lengths", lengths, (batch_size,), "[B]")
    check(causal, op, "causal", "be True with lengths", causal)
    check(query_start == 0, op, "query_start", "be 0 with lengths, which say where queries stand", query_start)
    check(cu_seqlens is None, op, "cu_seqlens", "be None with lengths", "a tensor")
    if block_table is not None:
        check_shape(op, "block_table", block_table, (batch_size, None), "[B, pages]")
    for name, tensor in (("lengths", lengths), ("block_table", block_table)):
        if tensor is not None:
            check_dtype(op, name, tensor, INTEGER)
            check_device(op, name, tensor, device)


def lightning_scores(q_idx: Tensor, k_idx: Tensor, w: Tensor) -> Tensor:
    """Score every key for every query, densely (for small sizes, figures and tests).

    ``I_ts = sum_j w_tj ReLU(q_idx_tj . k_idx_s)``

    Args:
        q_idx: ``[B, T, HI, DI]`` indexer queries, rotated already.
        k_idx: ``[B, S, DI]`` index keys, one per token, shared by the heads; q_idx's dtype.
        w: ``[B, T, HI]`` head weights, scales included; may be negative; any floating dtype.

    Returns:
        float32 ``[B, T, S]`` (float64 for float64 inputs), no mask applied.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.

    Device: any; plain tensor code, differentiable; holds ``[B, T, HI, S]``.
    Source: DeepSeek-V3.2 report, equation 1.

    Example:
        >>> lightning_scores(torch.ones(2, 3, 4, 8), torch.ones(2, 5, 8), torch.ones(2, 3, 4)).shape
        torch.Size([2, 3, 5])
    """
    check_indexer("lightning_scores", q_idx, k_idx, w)
    return reference_scores(q_idx, k_idx, w)


def lightning_topk(
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    topk: int,
    *,
    causal: bool = True,
    query_start: int = 0,
    cu_seqlens: Tensor | None = None,
    kpool: int = 1,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    quantization: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Select for every query the ``topk`` visible keys with the largest indexer scores.

    ``S_t = top-k over visible s of I_ts``; larger score first, then the LOWER index; everything while fewer are
    visible.

    Args:
        q_idx: ``[B, T, HI, DI]`` indexer queries, rotated already.
        k_idx: ``[B, S, DI]`` index keys, or ``[B, P, DI]`` pooled keys with ``kpool > 1``; q_idx's dtype.
        w: ``[B, T, HI]`` head weights, scales included; may be negative; any floating dtype.
        topk: keys (pools) to keep, >= 1; may pass S.
        causal: query t sees key s iff ``s <= query_start + t``; False: it sees all of its sequence.
        query_start: position of query 0 among the keys, >= 0 (the length of the cache).
        cu_seqlens: int32 or int64 ``[N + 1]`` boundaries of packed sequences, B = 1 and S = T; indices stay global.
            Read on CPU outside graphs only, to check them.
        kpool: tokens per pooled key; pool p is visible iff its last token ``p * kpool + kpool - 1`` is.
        lengths: int32 or int64 ``[B]``, for caches that are longer than what they hold: tokens in each batch entry's
            cache, the new ones included, so that query t stands at ``lengths[b] - T + t``; causal, without
            ``query_start`` and ``cu_seqlens``. Read on the device: a CUDA graph replays with the lengths of the day.
        block_table: int32 or int64 ``[B, pages]``, with ``lengths``: k_idx is a pool ``[num_pages, page_size, DI]``
            and key s of entry b lies in page ``block_table[b, s // page_size]``; entries of unused pages do not
            matter. Indices stay those of the entry's own keys (`paged_rows` says where they lie in the pool).
        quantization: ``"fp8"`` scores in eight bits: queries and keys are rotated by a Hadamard matrix (DI a power of
            two) and rounded to e4m3 with one scale a vector; None scores them as they are.
        backend: ``"stream"`` (blocks of queries, bounded workspace), ``"reference"`` (dense, stable sort) or
            ``"auto"``, which is ``"stream"``.

    Returns:
        int32 ``[B, T, topk]``, ascending, -1 in unused slots at the end.  No gradient.

    Raises:
        ValueError: shapes, devices or values that do not fit; ``cu_seqlens`` with ``kpool > 1``.
        TypeError: dtypes that do not fit.
        RuntimeError: ``quantization="fp8"`` on a CUDA device older than compute capability 8.9.

    Device: CPU, in plain torch; CUDA, in Triton kernels (float64, and ``topk`` above 8192: plain torch). Scores are
        summed in float32 (float64 for float64 inputs); the workspace is at most 512 MiB on CUDA, whatever T and S.
    Source: DeepSeek-V3.2 report, section 2.

    Example:
        >>> lightning_topk(torch.ones(2, 3, 4, 8), torch.ones(2, 3, 8), torch.ones(2, 3, 4), 2)[0].tolist()
        [[0, -1], [0, 1], [0, 1]]
    """
    op = "lightning_topk"
    check_choice(op, "backend", backend, ("auto", "stream", "reference"))
    check(topk >= 1, op, "topk", "be at least 1", topk)
    check_indexer(op, q_idx, k_idx, w, paged=block_table is not None)
    batch_size, num_queries, num_keys = q_idx.shape[0], q_idx.shape[1], k_idx.shape[1]
    check_visibility(op, num_queries, num_keys, batch_size, query_start, cu_seqlens, kpool)
    _check_cache(op, batch_size, q_idx.device, causal, query_start, cu_seqlens, lengths, block_table)
    check_choice(op, "quantization", quantization, (None, "fp8"))
    fp8 = quantization == "fp8"
    if fp8:
        check_fp8(op, q_idx)
    q_idx, k_idx, w = q_idx.detach(), k_idx.detach(), w.detach()
    if backend == "reference":
        if fp8:
            q_idx, k_idx = rounded(q_idx), rounded(k_idx)
        if lengths is not None:
            return _reference_cache(q_idx, k_idx, w, topk, kpool, lengths, block_table)
        visible = reference_visible(
            num_queries,
            num_keys,
            causal=causal,
            query_start=query_start,
            cu_seqlens=cu_seqlens,
            kpool=kpool,
            device=q_idx.device,
        )
        return reference_topk(reference_scores(q_idx, k_idx, w), visible, topk)
    # A program that is exported takes the form whose kernels a package can carry; elsewhere one without a bound on its
    # launches serves, which a graph need not hold.
    is_carried = is_exporting() and _is_in_kernels(q_idx, topk)
    operator = torch.ops.hybrid_flex.lightning_topk_cuda if is_carried else torch.ops.hybrid_flex.lightning_topk
    options = (topk, causal, query_start, cu_seqlens, kpool, lengths, block_table, fp8)
    indices: Tensor = operator(q_idx, k_idx, w, *options)
    return indices


def _reference_cache(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, topk: int, kpool: int, lengths: Tensor, block_table: Tensor | None
) -> Tensor:
    """Select densely from caches of several lengths."""
    keys = k_idx if block_table is None else k_idx[block_table.clamp_min(0).long()].flatten(1, 2)
    position = lengths[:, None, None] - q_idx.shape[1] + torch.arange(q_idx.shape[1], device=q_idx.device)[:, None]
    visible = torch.arange(keys.shape[1], device=q_idx.device) * kpool + kpool - 1 <= position
    return reference_topk(reference_scores(q_idx, keys, w), visible, topk)
