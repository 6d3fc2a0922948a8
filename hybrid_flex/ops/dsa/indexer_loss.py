"""The indexer's loss: how far its distribution is from the attention it should predict.

    p_t = sum over heads of softmax_s(scale q_t . k_s), L1-normalised        (a constant: no gradient)
    L   = 1 / (B T) sum_t KL(p_t || softmax_s(I_t))                          s over all visible keys, or over S_t
    dL / dI_ts = (softmax(I_t)_s - p_ts) / (B T)

The gradient is taken in logit space: forms such as ``target / (prediction + eps)`` lose it where the prediction is
small.  Both passes walk over blocks of queries; the backward recomputes the tiles from the saved log-sum-exps.  On CUDA
Triton kernels do this (kernels/dsa/loss.py); float64 there, and every dtype on CPU, take the form written here.
Source: DeepSeek-V3.2 report, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from hybrid_flex.ops.dsa.pooling import expand_pools

# NOTE [Loss workspace]: bytes of tiles that one block of queries may hold.
WORKSPACE_BYTES = 16 * 2**20


class _Block:
    """One block of queries of one batch entry: which keys and classes it compares, and both distributions.

    The dense stage sees a contiguous range of keys and every query shares it; the sparse stage fetches a row of keys
    and of index keys per query.  Classes are tokens, or pools of ``kpool`` tokens.
    """

    def __init__(
        self, rows: slice, keys: Tensor, classes: Tensor, seen: Tensor, allowed: Tensor, tokens: Tensor | None
    ):
        self.rows = rows
        self.keys = keys  # [L, Hkv, D] (dense) or [b, L, Hkv, D] (sparse)
        self.classes = classes  # [P, DI] (dense) or [b, P, DI] (sparse)
        self.seen = seen  # bool [b, L]: tokens the attention normalises over
        self.allowed = allowed  # bool [b, P]: classes compared
        self.slots = tokens  # int64 [b, P] rows of k_idx (sparse), None (dense)


def _logits(q: Tensor, keys: Tensor) -> Tensor:
    """``q [b, G, D]`` against ``keys [L, D]`` or ``[b, L, D]``: ``[b, G, L]``."""
    return torch.matmul(q, keys.transpose(-1, -2))


def _target(q: Tensor, block: _Block, scale: float, kpool: int, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum the attention's probabilities over heads and pools: ``p [b, P]``, and the heads' log-sum-exps ``[b, H]``."""
    num_kv_heads = block.keys.shape[-2]
    group = q.shape[1] // num_kv_heads
    unseen = ~block.seen[:, None]
    total = q.new_zeros(block.seen.shape)
    found = []
    for h in range(num_kv_heads):
        for g in range(group):
            head = h * group + g
            logits = _logits(q[:, head : head + 1] * scale, block.keys[..., h, :])
            logits.masked_fill_(unseen, float("-inf"))
            head_lse = logits.logsumexp(-1) if lse is None else lse[:, head : head + 1]
            found.append(head_lse)
            total += logits.sub_(head_lse.masked_fill(head_lse == float("-inf"), 0.0)[..., None]).exp_()[:, 0]
    num_classes = block.allowed.shape[1]
    width = num_classes * kpool
    total = torch.nn.functional.pad(total[:, :width], (0, max(0, width - total.shape[1])))
    p = total.view(-1, num_classes, kpool).sum(-1).masked_fill_(~block.allowed, 0.0)
    p /= p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return p, torch.cat(found, dim=1)


def _scores(q_idx: Tensor, block: _Block, w: Tensor) -> Tensor:
    """Indexer scores of one block, -inf outside the classes compared: ``[b, P]``."""
    scores = q_idx.new_zeros(block.allowed.shape)
    for head in range(q_idx.shape[1]):
        scores.addcmul_(_logits(q_idx[:, head : head + 1], block.classes)[:, 0].relu_(), w[:, head, None])
    return scores.masked_fill_(~block.allowed, float("-inf"))


def _blocks(
    b: int,
    q: Tensor,
    k: Tensor,
    k_idx: Tensor,
    indices: Tensor | None,
    ranges: tuple[Tensor, Tensor, Tensor, Tensor],
    query_start: int,
    kpool: int,
    causal: bool,
) -> Iterator[tuple[_Block, int]]:
    """Yield the blocks of batch entry ``b``."""
    num_queries, num_keys, num_classes = q.shape[1], k.shape[1], k_idx.shape[1]
    dtype = accumulate_dtype(q)
    first, last, first_class, last_class = ranges
    if indices is None:
        keys, classes = k[b].to(dtype), k_idx[b].to(dtype)
        # About six tiles [block, S] live at once: logits, masks, the sum, scores and their gradient.
        size = max(1, min(num_queries, WORKSPACE_BYTES // (6 * num_keys * dtype.itemsize)))
        for start in range(0, num_queries, size):
            rows = slice(start, min(start + size, num_queries))
            upper = min(num_keys, query_start + rows.stop) if causal else num_keys
            low, high = block_range(first[rows], last[rows], upper)
            low = low // kpool * kpool
            stop = min(num_classes, -(-high // kpool))
            token = torch.arange(low, high, device=q.device)
            seen = (token >= first[rows, None]) & (token < last[rows, None])
            pool = torch.arange(low // kpool, max(stop, low // kpool), device=q.device)
            allowed = (pool >= first_class[rows, None]) & (pool < last_class[rows, None])
            yield _Block(rows, keys[low:high], classes[low // kpool : stop], seen, allowed, None), low // kpool
        return
    row_bytes = indices.shape[-1] * (kpool * k.shape[2] * k.shape[3] + k_idx.shape[2]) * dtype.itemsize
    size = max(1, min(num_queries, WORKSPACE_BYTES // (2 * max(1, row_bytes))))
    for start in range(0, num_queries, size):
        rows = slice(start, min(start + size, num_queries))
        pools = indices[b, rows].long()
        allowed = (pools >= first_class[rows, None]) & (pools < last_class[rows, None])
        tokens = expand_pools(pools[None], kpool, query_start=query_start + start)[0].long() if kpool > 1 else pools
        seen = (tokens >= first[rows, None]) & (tokens < last[rows, None])
        pools, tokens = pools.clamp_min(0), tokens.clamp_min(0)
        keys, classes = k[b][tokens].to(dtype), k_idx[b][pools].to(dtype)
        yield _Block(rows, keys, classes, seen, allowed, pools), 0


def _ranges(
    q: Tensor, k: Tensor, k_idx: Tensor, causal: bool, query_start: int, cu_seqlens: Tensor | None, kpool: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    scale: float,
    causal: bool,
    query_start: int,
    cu_seqlens: Tensor | None,
    kpool: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, num_queries = q.shape[:2]
    dtype = accumulate_dtype(q)
    loss = q.new_zeros((), dtype=dtype)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    lse_idx = q.new_full(q.shape[:2], float("-inf"), dtype=dtype)
    if _compares_nothing(q, k_idx, indices):
        return loss, lse, lse_idx
    ranges = _ranges(q, k, k_idx, causal, query_start, cu_seqlens, kpool)
    if has_kernels(q) and has_kernels(q_idx):
        from hybrid_flex.kernels.dsa.loss import loss_forward

        # Its log-sum-exps include the log of p's normaliser, which divides out where the form below reads them.
        return loss_forward(q_idx, k_idx, w, q, k, indices, ranges, scale, query_start, kpool)
    for b in range(batch_size):
        for block, _ in _blocks(b, q, k, k_idx, indices, ranges, query_start, kpool, causal):
            rows = block.rows
            if block.allowed.shape[1] == 0:
                continue
            p, lse[b, rows] = _target(q[b, rows].to(dtype), block, scale, kpool, None)
            scores = _scores(q_idx[b, rows].to(dtype), block, w[b, rows].to(dtype))
            lse_idx[b, rows] = scores.logsumexp(-1)
            log_prediction = (scores - lse_idx[b, rows, None]).masked_fill_(~block.allowed, 0.0)
            loss += torch.special.xlogy(p, p).sub_(log_prediction.mul_(p)).sum()
    return loss / (batch_size * num_queries), lse, lse_idx


@_forward.register_fake
def _(q_idx: Tensor, k_idx: Tensor, w: Tensor, q: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(q)
    return (
        q.new_empty((), dtype=dtype),
        q.new_empty(q.shape[:3], dtype=dtype),
        q.new_empty(q.shape[:2], dtype=dtype),
    )


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

        return loss_backward(grad, q_idx, k_idx, w, q, k, indices, lse, lse_idx, ranges, scale, kpool)
    grad = grad.to(dtype) / (batch_size * num_queries)
    for b in range(batch_size):
        for block, offset in _blocks(b, q, k, k_idx, indices, ranges, query_start, kpool, causal):
            rows = block.rows
            if block.allowed.shape[1] == 0:
                continue
            q_b, w_b = q_idx[b, rows].to(dtype), w[b, rows].to(dtype)
            p, _ = _target(q[b, rows].to(dtype), block, scale, kpool, lse[b, rows])
            scores = _scores(q_b, block, w_b)
            row_lse = lse_idx[b, rows, None]
            ds = scores.sub_(row_lse.masked_fill(row_lse == float("-inf"), 0.0)).exp_().sub_(p).mul_(grad)
            for head in range(q_b.shape[1]):
                product = _logits(q_b[:, head : head + 1], block.classes)[:, 0]
                on = product > 0
                dw[b, rows, head] = (product.relu_() * ds).sum(-1).to(dw.dtype)
                dx = (ds * w_b[:, head, None]).mul_(on)
                if block.slots is None:
                    dq[b, rows, head] = torch.mm(dx, block.classes).to(dq.dtype)
                    dk[b, offset : offset + dx.shape[1]].addmm_(dx.T, q_b[:, head])
                else:
                    dq[b, rows, head] = torch.bmm(dx[:, None], block.classes)[:, 0].to(dq.dtype)
                    outer = (dx[..., None] * q_b[:, head, None]).flatten(0, 1)
                    dk[b].scatter_add_(0, block.slots.flatten()[:, None].expand_as(outer), outer)
    return dq, dk.to(k_idx.dtype), dw


@_backward.register_fake
def _(grad: Tensor, q_idx: Tensor, k_idx: Tensor, w: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return q_idx.new_empty(q_idx.shape), k_idx.new_empty(k_idx.shape), w.new_empty(w.shape)


def _setup_context(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    q_idx, k_idx, w, q, k, indices, scale, causal, query_start, cu_seqlens, kpool = inputs
    _, lse, lse_idx = output
    ctx.mark_non_differentiable(lse, lse_idx)  # type: ignore[attr-defined]
    ctx.save_for_backward(q_idx, k_idx, w, q, k, indices, lse, lse_idx, cu_seqlens)  # type: ignore[attr-defined]
    ctx.options = (scale, causal, query_start, kpool)  # type: ignore[attr-defined]


def _autograd(ctx: object, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors  # type: ignore[attr-defined]
    scale, causal, query_start, kpool = ctx.options  # type: ignore[attr-defined]
    grads = torch.ops.hybrid_flex.indexer_kl_loss_backward(
        grad, *tensors, scale, causal, query_start, cu_seqlens, kpool
    )
    return *grads, *(None,) * 8


_forward.register_autograd(_autograd, setup_context=_setup_context)


def indexer_kl_loss(
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    indices: Tensor | None = None,
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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    loss: Tensor = torch.ops.hybrid_flex.indexer_kl_loss(
        q_idx, k_idx, w, q.detach(), k.detach(), indices, scale, causal, query_start, cu_seqlens, kpool
    )[0]
    return loss
