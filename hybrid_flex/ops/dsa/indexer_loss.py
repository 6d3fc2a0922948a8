"""The indexer's loss: how far its distribution is from the attention it should predict.

    p_t = sum over heads of softmax_s(scale q_t . k_s), L1-normalised        (a constant: no gradient)
    L   = 1 / (B T) sum_t KL(p_t || softmax_s(I_t))                          s over all visible keys, or over S_t
    dL / dI_ts = (softmax(I_t)_s - p_ts) / (B T)

The gradient is taken in logit space: forms such as ``target / (prediction + eps)`` lose it where the prediction is
small.  Both passes walk over blocks of queries.  Of a selection the forward keeps ``ds = softmax(I_t) - p_t``, as large
as the selection, so that the keys of the attention are fetched once; over all visible keys, where that would be T x S,
the backward recomputes the tiles from the saved log-sum-exps.  On CUDA Triton kernels do this (kernels/dsa/loss.py);
float64 there, and every dtype on CPU, take the form written here.
Source: DeepSeek-V3.2 report, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_flex.checks import INTEGER, check, check_device, check_dtype, check_shape
from hybrid_flex.ops.dispatch import has_kernels, in_its_own_precision
from hybrid_flex.ops.dsa.attention import check_attention
from hybrid_flex.ops.dsa.indexer import (
    accumulate_dtype,
    block_range,
    check_indexer,
    check_visibility,
    visible_ranges,
)

# NOTE [Loss workspace]: bytes of tiles that one block of queries may hold.
WORKSPACE_BYTES = 16 * 2**20

Ranges = tuple[Tensor, Tensor, Tensor, Tensor]
"""First and last token, first and last class of every query, ``[T]`` each."""


class _Block(NamedTuple):
    """One block of queries of one batch entry: which keys and classes it compares.

    The dense stage sees a contiguous range of keys and every query shares it; the sparse stage fetches a row of keys
    and of index keys per query.  Classes are tokens, or pools of ``kpool`` tokens.
    """

    rows: slice
    keys: Tensor
    """``[L, Hkv, D]`` (dense) or ``[b, L, Hkv, D]`` (sparse)."""
    classes: Tensor
    """``[P, DI]`` (dense) or ``[b, P, DI]`` (sparse)."""
    seen: Tensor
    """bool ``[b, L]``: tokens the attention normalises over."""
    allowed: Tensor
    """bool ``[b, P]``: classes compared."""
    slots: slice | Tensor
    """Rows of k_idx that the classes are: a range (dense) or int64 ``[b, P]`` (sparse)."""


def _products(q: Tensor, keys: Tensor) -> Tensor:
    """``q [b, G, D]`` against ``keys [L, D]`` or ``[b, L, D]``: ``[b, G, L]``."""
    return torch.matmul(q, keys.transpose(-1, -2))


def _target(q: Tensor, block: _Block, scale: float, kpool: int, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum the attention's probabilities over heads and pools: ``p [b, P]``, and the heads' log-sum-exps ``[b, H]``."""
    num_kv_heads = block.keys.shape[-2]
    group = q.shape[1] // num_kv_heads
    total = q.new_zeros(block.seen.shape)
    found = []
    for h in range(num_kv_heads):
        heads = slice(h * group, (h + 1) * group)
        logits = _products(q[:, heads] * scale, block.keys[..., h, :])
        logits.masked_fill_(~block.seen[:, None], float("-inf"))
        found.append(logits.logsumexp(-1) if lse is None else lse[:, heads])
        total += logits.sub_(_finite_or_zero(found[-1])[..., None]).exp_().sum(1)
    num_classes = block.allowed.shape[1]
    width = num_classes * kpool
    total = torch.nn.functional.pad(total[:, :width], (0, max(0, width - total.shape[1])))
    p = total.view(-1, num_classes, kpool).sum(-1).masked_fill_(~block.allowed, 0.0)
    p /= p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return p, torch.cat(found, dim=1)


def _scores(q_idx: Tensor, block: _Block, w: Tensor) -> Tensor:
    """Indexer scores of one block, -inf outside the classes compared: ``[b, P]``."""
    scores = torch.matmul(w[:, None], _products(q_idx, block.classes).relu_())[:, 0]
    return scores.masked_fill_(~block.allowed, float("-inf"))


def _finite_or_zero(lse: Tensor) -> Tensor:
    """Replace -inf, the log-sum-exp of nothing, by 0, so that it can be subtracted."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _difference(scores: Tensor, lse_idx: Tensor, p: Tensor) -> Tensor:
    """Turn scores ``[b, P]`` into ``softmax(I) - p``, zeros in rows without a class."""
    return scores.sub_(_finite_or_zero(lse_idx)[:, None]).exp_().sub_(p)


def _blocks(
    b: int,
    q_idx: Tensor,
    q: Tensor,
    k: Tensor,
    k_idx: Tensor,
    indices: Tensor | None,
    ranges: Ranges,
    query_start: int,
    kpool: int,
    causal: bool,
    *,
    with_keys: bool = True,
) -> Iterator[_Block]:
    """Yield the blocks of batch entry ``b``; those of a selection can do without the keys of the attention."""
    num_queries, num_keys, num_classes = q.shape[1], k.shape[1], k_idx.shape[1]
    num_kv_heads = k.shape[2]
    dtype = accumulate_dtype(q)
    first, last, first_class, last_class = ranges
    # Logits of a group of heads, products of the indexer's heads and their gradients live at once, and a few sums.
    tiles = 2 * max(q.shape[2] // num_kv_heads, q_idx.shape[2]) + 4
    if indices is None:
        keys, classes = k[b].to(dtype), k_idx[b].to(dtype)
        size = max(1, min(num_queries, WORKSPACE_BYTES // (tiles * num_keys * dtype.itemsize)))
        for start in range(0, num_queries, size):
            rows = slice(start, min(start + size, num_queries))
            upper = min(num_keys, query_start + rows.stop) if causal else num_keys
            low, high = block_range(first[rows], last[rows], upper)
            low = low // kpool * kpool
            token = torch.arange(low, high, device=q.device)
            seen = (token >= first[rows, None]) & (token < last[rows, None])
            pools = slice(low // kpool, max(min(num_classes, -(-high // kpool)), low // kpool))
            pool = torch.arange(pools.start, pools.stop, device=q.device)
            allowed = (pool >= first_class[rows, None]) & (pool < last_class[rows, None])
            yield _Block(rows, keys[low:high], classes[pools], seen, allowed, pools)
        return
    row_bytes = indices.shape[-1] * (kpool * (num_kv_heads * k.shape[3] + tiles) + 2 * k_idx.shape[2]) * dtype.itemsize
    size = max(1, min(num_queries, WORKSPACE_BYTES // max(1, row_bytes)))
    for start in range(0, num_queries, size):
        rows = slice(start, min(start + size, num_queries))
        chosen = indices[b, rows].long()
        allowed = (chosen >= first_class[rows, None]) & (chosen < last_class[rows, None])
        tokens = chosen if kpool == 1 else _tokens(chosen, kpool, query_start + start)
        seen = (tokens >= first[rows, None]) & (tokens < last[rows, None])
        slots = chosen.clamp_min(0)
        keys = k[b][tokens.clamp_min(0)].to(dtype) if with_keys else k.new_empty(0)
        yield _Block(rows, keys, k_idx[b][slots].to(dtype), seen, allowed, slots)


def _tokens(pools: Tensor, kpool: int, query_start: int) -> Tensor:
    """Write out the tokens of ``pools [b, P]``, in place, and of the tail after them: ``[b, P kpool + kpool - 1]``.

    `expand_pools` wants unused slots at the end, and lets the tail follow what is used.
    """
    inside = torch.arange(kpool, device=pools.device)
    tokens = torch.where(pools[..., None] < 0, -1, pools[..., None] * kpool + inside).flatten(-2)
    length = query_start + 1 + torch.arange(pools.shape[0], device=pools.device)[:, None]
    tail = length // kpool * kpool + inside[:-1]
    return torch.cat((tokens, torch.where(tail < length, tail, -1)), dim=-1)


def _ranges(
    q: Tensor, k: Tensor, k_idx: Tensor, causal: bool, query_start: int, cu_seqlens: Tensor | None, kpool: int
) -> Ranges:
    tokens = visible_ranges(q.shape[1], k.shape[1], causal, query_start, cu_seqlens, 1, q.device)
    classes = visible_ranges(q.shape[1], k_idx.shape[1], causal, query_start, cu_seqlens, kpool, q.device)
    return *tokens, *classes


def _compares_nothing(q: Tensor, k_idx: Tensor, indices: Tensor | None) -> bool:
    return 0 in (*q.shape[:2], k_idx.shape[1]) or (indices is not None and indices.shape[2] == 0)


@torch.library.custom_op("hybrid_flex::indexer_kl_loss", mutates_args=())
@in_its_own_precision
def _forward(
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    query_start: int,
    cu_seqlens: Tensor | None,
    kpool: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss, and what the backward takes up.

    Without a selection that are log-sum-exps of the attention ``[B, T, H]`` and of the scores ``[B, T]``, with one
    ds ``[B, T, J]``; what is not taken up is empty.
    """
    if _compares_nothing(q, k_idx, indices):
        return tuple(x.zero_() for x in _fake(q_idx, k_idx, w, q, k, indices))  # type: ignore[return-value]
    ranges = _ranges(q, k, k_idx, causal, query_start, cu_seqlens, kpool)
    if has_kernels(q) and has_kernels(q_idx):
        from hybrid_flex.kernels.dsa.loss import loss_forward

        return loss_forward(q_idx, k_idx, w, q, k, indices, lse, ranges, scale, query_start, kpool)
    dtype = accumulate_dtype(q)
    loss, lse_out, lse_idx_out, ds_out = _fake(q_idx, k_idx, w, q, k, indices)
    for x, of_nothing in ((loss, 0.0), (lse_out, float("-inf")), (lse_idx_out, float("-inf")), (ds_out, 0.0)):
        x.fill_(of_nothing)
    for b in range(q.shape[0]):
        for block in _blocks(b, q_idx, q, k, k_idx, indices, ranges, query_start, kpool, causal):
            rows = block.rows
            if block.allowed.shape[1] == 0:
                continue
            p, lse_b = _target(q[b, rows].to(dtype), block, scale, kpool, None if lse is None else lse[b, rows])
            scores = _scores(q_idx[b, rows].to(dtype), block, w[b, rows].to(dtype))
            lse_idx = scores.logsumexp(-1)
            log_prediction = (scores - lse_idx[:, None]).masked_fill_(~block.allowed, 0.0)
            loss += torch.special.xlogy(p, p).sub_(log_prediction.mul_(p)).sum()
            if indices is None:
                lse_out[b, rows], lse_idx_out[b, rows] = lse_b, lse_idx
            else:
                ds_out[b, rows] = _difference(scores, lse_idx, p)
    loss /= q.shape[0] * q.shape[1]
    return loss, lse_out, lse_idx_out, ds_out


@_forward.register_fake
def _fake(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, q: Tensor, k: Tensor, indices: Tensor | None, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(q)
    lse, lse_idx, ds = (q.shape[:3], q.shape[:2], (0,)) if indices is None else ((0,), (0,), indices.shape)
    return tuple(q.new_empty(x, dtype=dtype) for x in ((), lse, lse_idx, ds))  # type: ignore[return-value]


@torch.library.custom_op("hybrid_flex::indexer_kl_loss_backward", mutates_args=())
@in_its_own_precision
def _backward(
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
    scale: float,
    causal: bool,
    query_start: int,
    cu_seqlens: Tensor | None,
    kpool: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, num_queries = q.shape[:2]
    dtype = accumulate_dtype(q)
    dq = torch.zeros_like(q_idx, memory_format=torch.contiguous_format)
    dw = torch.zeros_like(w, memory_format=torch.contiguous_format)
    dk = k_idx.new_zeros(k_idx.shape, dtype=dtype)
    if _compares_nothing(q, k_idx, indices):
        return dq, dk.to(k_idx.dtype), dw
    ranges = _ranges(q, k, k_idx, causal, query_start, cu_seqlens, kpool)
    # The kernels add up dk of a selection in the order in which queries happen to finish.
    in_any_order = indices is None or not torch.are_deterministic_algorithms_enabled()
    if has_kernels(q) and has_kernels(q_idx) and in_any_order:
        from hybrid_flex.kernels.dsa.loss import loss_backward

        return loss_backward(grad, q_idx, k_idx, w, q, k, indices, lse, lse_idx, ds, ranges, scale, kpool)
    grad = grad.to(dtype) / (batch_size * num_queries)
    options = (indices, ranges, query_start, kpool, causal)
    for b in range(batch_size):
        for block in _blocks(b, q_idx, q, k, k_idx, *options, with_keys=indices is None):
            rows = block.rows
            if block.allowed.shape[1] == 0:
                continue
            q_b, w_b = q_idx[b, rows].to(dtype), w[b, rows].to(dtype)
            if indices is None:
                p, _ = _target(q[b, rows].to(dtype), block, scale, kpool, lse[b, rows])
                difference = _difference(_scores(q_b, block, w_b), lse_idx[b, rows], p)
            else:
                difference = ds[b, rows]
            # From the scores to the products under the ReLU, x [b, HI, P].
            x = _products(q_b, block.classes).relu_()
            ds_b = (difference * grad)[:, None]
            dw[b, rows] = torch.matmul(x, ds_b.mT)[..., 0].to(dw.dtype)
            dx = torch.where(x > 0, ds_b * w_b[..., None], 0.0)
            dq[b, rows] = torch.matmul(dx, block.classes).to(dq.dtype)
            if isinstance(block.slots, slice):
                dk[b, block.slots].addmm_(dx.flatten(0, 1).T, q_b.flatten(0, 1))
            else:
                dk[b].index_add_(0, block.slots.flatten(), torch.bmm(dx.mT, q_b).flatten(0, 1))
    return dq, dk.to(k_idx.dtype), dw


@_backward.register_fake
def _(grad: Tensor, q_idx: Tensor, k_idx: Tensor, w: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return q_idx.new_empty(q_idx.shape), k_idx.new_empty(k_idx.shape), w.new_empty(w.shape)


def _setup_context(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q_idx, k_idx, w, q, k, indices, _, scale, causal, query_start, cu_seqlens, kpool = inputs
    ctx.mark_non_differentiable(*output[1:])  # type: ignore[attr-defined]
    ctx.save_for_backward(q_idx, k_idx, w, q, k, indices, *output[1:], cu_seqlens)  # type: ignore[attr-defined]
    ctx.options = (scale, causal, query_start, kpool)  # type: ignore[attr-defined]


def _autograd(ctx: object, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors  # type: ignore[attr-defined]
    scale, causal, query_start, kpool = ctx.options  # type: ignore[attr-defined]
    grads = torch.ops.hybrid_flex.indexer_kl_loss_backward(
        grad, *tensors, scale, causal, query_start, cu_seqlens, kpool
    )
    return *grads, *(None,) * 9


_forward.register_autograd(_autograd, setup_context=_setup_context)


def indexer_kl_loss(
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    indices: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    query_start: int = 0,
    cu_seqlens: Tensor | None = None,
    kpool: int = 1,
) -> Tensor:
    """Measure how well the indexer predicts the attention: mean over tokens of ``KL(p_t || softmax(I_t))``.

    ``p_t`` is the attention of (q, k) summed over heads and L1-normalised; ``I_t`` the indexer's scores.  Without
    ``indices`` both run over every visible key (dense warm-up); with them over the selection (sparse stage).

    Args:
        q_idx: ``[B, T, HI, DI]`` indexer queries; detach the indexer's INPUT, not these.
        k_idx: ``[B, S, DI]`` index keys, or pooled keys ``[B, P, DI]`` with ``kpool > 1``; q_idx's dtype.
        w: ``[B, T, HI]`` head weights, any floating dtype.
        q: ``[B, T, H, D]`` queries of the main attention; no gradient reaches them.
        k: ``[B, S, Hkv, D]`` keys of the main attention, q's dtype; no gradient reaches them.
        indices: int32 or int64 ``[B, T, J]`` selection (`lightning_topk`), -1 unused; POOL indices with ``kpool > 1``.
        lse: ``[B, T, H]``, float32 (float64 for float64 inputs): the log-sum-exps that `sparse_attention` returned for
            these q, k, scale and ``indices`` (with ``kpool > 1``: what `expand_pools` made of them), which spares a
            third of the sparse stage's work; no gradient reaches them.  None: computed here.
        scale: factor of the attention's logits; default ``D ** -0.5``.
        causal: as in `lightning_topk`; True with indices of pools.
        query_start: as in `lightning_topk`.
        cu_seqlens: as in `lightning_topk`.
        kpool: tokens per class.  The attention then runs over tokens (the selected pools and the tail), its
            probabilities are summed per pool, the tail is dropped and the rest normalised.

    Returns:
        Scalar float32 (float64 for float64 inputs).  Tokens without a class to compare count 0.

    Raises:
        ValueError: shapes, devices or values that do not fit.
        TypeError: dtypes that do not fit.

    Device: any; the workspace does not grow with T * S.  On CUDA k_idx's gradient of a selection is added up by
        atomics, whose order is not fixed; `torch.use_deterministic_algorithms` chooses a slower form that has one.
    Source: DeepSeek-V3.2 report, equations 3 and 4.

    Example:
        >>> q_idx, k_idx, w = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 8), torch.ones(2, 3, 4)
        >>> indexer_kl_loss(q_idx, k_idx, w, torch.ones(2, 3, 2, 16), torch.ones(2, 3, 1, 16)).shape
        torch.Size([])
    """
    op = "indexer_kl_loss"
    check_indexer(op, q_idx, k_idx, w)
    check_attention(op, q, k)
    check_device(op, "q", q, q_idx.device)
    batch_size, num_queries, num_keys = q_idx.shape[0], q_idx.shape[1], k_idx.shape[1]
    check_shape(op, "q", q, (batch_size, num_queries, None, None), "[B, T, H, D]")
    check_visibility(op, num_queries, num_keys, batch_size, query_start, cu_seqlens, kpool)
    # No f-string here: formatting a dynamic size would bind the graph to its value.
    rule = "have S // kpool keys, (keys, S, kpool) given"
    check(num_keys == k.shape[1] // kpool, op, "k_idx", rule, (num_keys, k.shape[1], kpool))
    if indices is not None:
        # The incomplete pool that a query attends to besides is the one it stands in.
        check(causal or kpool == 1, op, "causal", "be True with indices of pools", causal)
        check_shape(op, "indices", indices, (batch_size, num_queries, None), "[B, T, J]")
        check_dtype(op, "indices", indices, INTEGER)
        check_device(op, "indices", indices, q_idx.device)
    if lse is not None:
        check(indices is not None, op, "lse", "be None without indices", tuple(lse.shape))
        check_shape(op, "lse", lse, q.shape[:3], "[B, T, H]")
        check_dtype(op, "lse", lse, (accumulate_dtype(q),))
        check_device(op, "lse", lse, q_idx.device)
        lse = lse.detach()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    loss: Tensor = torch.ops.hybrid_flex.indexer_kl_loss(
        q_idx, k_idx, w, q.detach(), k.detach(), indices, lse, scale, causal, query_start, cu_seqlens, kpool
    )[0]
    return loss
