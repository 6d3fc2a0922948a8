"""Lightning indexer: score every visible key and keep the ``topk`` best, streaming over blocks of queries.

    I_ts = sum_j w_tj ReLU(q_idx_tj . k_idx_s)          S_t = the topk visible s with the largest I_ts, ties: the lower s

Nothing of size T x S is ever stored: a block of queries is scored against the keys it can see, selected, and forgotten.
Source: DeepSeek-V3.2 report, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_flex.checks import (
    FLOATING,
    check,
    check_choice,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_rank,
    check_shape,
)
from hybrid_flex.ops.dsa.reference import reference_scores, reference_topk, reference_visible

# NOTE [Score workspace]: bytes of scores that one block of queries may hold.
WORKSPACE_BYTES = 16 * 2**20


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which an operator on ``tensor`` sums: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def score_tile(q_idx: Tensor, k_idx: Tensor, w: Tensor) -> Tensor:
    """Score one block of queries: ``[b, HI, DI], [L, DI], [b, HI] -> [b, L]``, all three in one dtype."""
    num_queries, num_heads, _ = q_idx.shape
    keys = k_idx.T
    scores = q_idx.new_zeros(num_queries, k_idx.shape[0])
    for head in range(num_heads):
        scores.addcmul_(torch.mm(q_idx[:, head], keys).relu_(), w[:, head, None])
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


def block_range(first: Tensor, last: Tensor, upper: int) -> tuple[int, int]:
    """Bound the keys a block of queries can see; exact on CPU, ``[0, upper)`` on a GPU, where reading would wait."""
    if first.device.type != "cpu":
        return 0, upper
    low = int(first.min())
    return low, max(low, min(upper, int(last.max())))


def select_topk(scores: Tensor, first: Tensor, last: Tensor, topk: int) -> Tensor:
    """Select per row the ``topk`` largest scores of columns ``first <= s < last``; among equals the lower column.

    Args:
        scores: ``[b, L]``; overwritten with -inf outside the range.
        first: int64 ``[b]``.
        last: int64 ``[b]``.
        topk: number of columns to keep.

    Returns:
        int64 ``[b, min(topk, L)]``: columns, ascending, ``L`` in unused slots at the end.
    """
    width = scores.shape[1]
    first, last = first[:, None], last[:, None]
    column = torch.arange(width, device=scores.device)
    if topk >= width:
        return torch.where((column >= first) & (column < last), column, width).sort(dim=-1).values
    scores.masked_fill_((column < first) | (column >= last), float("-inf"))
    values, chosen = scores.topk(topk, dim=-1, sorted=False)
    chosen.masked_fill_((chosen < first) | (chosen >= last), width)
    chosen = chosen.sort(dim=-1).values
    # torch.topk promises no order among equals: where more columns reach the smallest kept score than there are slots,
    # take all above it and fill up with the lowest columns that equal it.
    threshold = values.amin(dim=-1, keepdim=True)
    ambiguous = ((scores >= threshold).sum(-1) > topk) & (last - first > topk)[:, 0]
    if scores.device.type == "cpu":
        rows = ambiguous.nonzero()[:, 0]
        if rows.numel() == 0:
            return chosen
        scores, threshold = scores[rows], threshold[rows]
    above = scores > threshold
    equal = scores == threshold
    keep = above | (equal & (equal.cumsum(-1) <= topk - above.sum(-1, keepdim=True)))
    exact = torch.where(keep, column, width).sort(dim=-1).values[:, :topk]
    if scores.device.type == "cpu":
        chosen[rows] = exact
        return chosen
    return torch.where(ambiguous[:, None], exact, chosen)


@torch.library.custom_op("hybrid_flex::lightning_topk", mutates_args=())
def _lightning_topk(
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    topk: int,
    causal: bool,
    query_start: int,
    cu_seqlens: Tensor | None,
    kpool: int,
) -> Tensor:
    batch_size, num_queries, num_heads, _ = q_idx.shape
    num_keys = k_idx.shape[1]
    indices = q_idx.new_full((batch_size, num_queries, topk), -1, dtype=torch.int32)
    if num_keys == 0 or indices.numel() == 0:
        return indices
    dtype = accumulate_dtype(q_idx)
    ranges = visible_ranges(num_queries, num_keys, causal, query_start, cu_seqlens, kpool, q_idx.device)
    # Two [block, S] tiles live at once: the products of one head and their weighted sum.
    block = max(1, min(num_queries, WORKSPACE_BYTES // (2 * num_keys * dtype.itemsize)))
    for b in range(batch_size):
        keys = k_idx[b].to(dtype)
        for start in range(0, num_queries, block):
            stop = min(start + block, num_queries)
            first, last = (x[start:stop] for x in ranges)
            upper = min(num_keys, max(0, (query_start + stop) // kpool)) if causal else num_keys
            low, high = block_range(first, last, upper)
            if high == low:
                continue
            first, last = first - low, last - low
            if high - low <= topk:  # everything visible is selected: no scores needed
                scores = q_idx.new_empty(stop - start, high - low)
            else:
                scores = score_tile(q_idx[b, start:stop].to(dtype), keys[low:high], w[b, start:stop].to(dtype))
            chosen = select_topk(scores, first, last, topk)
            indices[b, start:stop, : chosen.shape[1]] = torch.where(chosen < high - low, chosen + low, -1)
    return indices


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
) -> Tensor:
    return q_idx.new_empty((q_idx.shape[0], q_idx.shape[1], topk), dtype=torch.int32)


def check_indexer(op: str, q_idx: Tensor, k_idx: Tensor, w: Tensor) -> None:
    """Check the three tensors every indexer operator takes."""
    check_rank(op, "q_idx", q_idx, "[B, T, HI, DI]")
    batch_size, num_queries, num_heads, width = q_idx.shape
    check_shape(op, "k_idx", k_idx, (batch_size, None, width), "[B, S, DI]")
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
    check(num_keys == num_queries, op, "k_idx", f"have S = T = {num_queries} with cu_seqlens", f"S = {num_keys}")
    check_cu_seqlens(op, cu_seqlens, batch_size, num_queries)


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
    backend: str = "auto",
) -> Tensor:
    """Select for every query the ``topk`` visible keys with the largest indexer scores.

    ``S_t = top-k over visible s of I_ts``; larger score first, then the LOWER index; everything while fewer are visible.

    Args:
        q_idx: ``[B, T, HI, DI]`` indexer queries, rotated already.
        k_idx: ``[B, S, DI]`` index keys, or ``[B, P, DI]`` pooled keys with ``kpool > 1``; q_idx's dtype.
        w: ``[B, T, HI]`` head weights, scales included; may be negative; any floating dtype.
        topk: keys (pools) to keep, >= 1; may pass S.
        causal: query t sees key s iff ``s <= query_start + t``; False: it sees all of its sequence.
        query_start: position of query 0 among the keys, >= 0 (the length of the cache).
        cu_seqlens: int32 or int64 ``[N + 1]`` boundaries of packed sequences, B = 1 and S = T; indices stay global.  Read
            on CPU outside graphs only, to check them.
        kpool: tokens per pooled key; pool p is visible iff its last token ``p * kpool + kpool - 1`` is.
        backend: ``"stream"`` (blocks of queries, bounded workspace), ``"reference"`` (dense, stable sort) or ``"auto"``,
            which is ``"stream"``.

    Returns:
        int32 ``[B, T, topk]``, ascending, -1 in unused slots at the end.  No gradient.

    Raises:
        ValueError: shapes, devices or values that do not fit; ``cu_seqlens`` with ``kpool > 1``.
        TypeError: dtypes that do not fit.

    Device: any; scores are summed in float32 (float64 for float64 inputs).
    Source: DeepSeek-V3.2 report, section 2.

    Example:
        >>> lightning_topk(torch.ones(2, 3, 4, 8), torch.ones(2, 3, 8), torch.ones(2, 3, 4), 2)[0].tolist()
        [[0, -1], [0, 1], [0, 1]]
    """
    op = "lightning_topk"
    check_choice(op, "backend", backend, ("auto", "stream", "reference"))
    check(topk >= 1, op, "topk", "be at least 1", topk)
    check_indexer(op, q_idx, k_idx, w)
    batch_size, num_queries, num_keys = q_idx.shape[0], q_idx.shape[1], k_idx.shape[1]
    check_visibility(op, num_queries, num_keys, batch_size, query_start, cu_seqlens, kpool)
    q_idx, k_idx, w = q_idx.detach(), k_idx.detach(), w.detach()
    if backend == "reference":
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
    indices: Tensor = torch.ops.hybrid_flex.lightning_topk(
        q_idx, k_idx, w, topk, causal, query_start, cu_seqlens, kpool
    )
    return indices
