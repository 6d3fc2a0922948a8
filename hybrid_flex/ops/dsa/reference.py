"""DeepSeek Sparse Attention written for reading: dense, differentiable, in float64 when the inputs are float64.

    I_ts = sum_j w_tj ReLU(q_idx_tj . k_idx_s)                 lightning indexer
    S_t  = the topk visible s with the largest I_ts             ties: the lower s
    o_t  = softmax_{s in S_t}(scale q_t . k_s) v_s              attention over the selection
    L    = mean_t KL(p_t || softmax(I_t))                       p_t = head sum of the attention, L1-normalised

Everything else in this folder is measured against these functions; they import no sibling and hold ``[T, S]`` tensors.
Source: DeepSeek-V3.2 report, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_scores(q_idx: Tensor, k_idx: Tensor, w: Tensor) -> Tensor:
    """Score every key for every query: ``[B, T, HI, DI], [B, S, DI], [B, T, HI] -> [B, T, S]``."""
    dtype = torch.float64 if q_idx.dtype == torch.float64 else torch.float32
    products = torch.einsum("bthd,bsd->bths", q_idx.to(dtype), k_idx.to(dtype))
    return (w.to(dtype)[..., None] * products.relu()).sum(2)


def reference_visible(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool = True,
    query_start: int = 0,
    cu_seqlens: Tensor | None = None,
    kpool: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """Say which key (or pool of ``kpool`` keys) each query may see: bool ``[T, S]``."""
    t = torch.arange(num_queries, device=device)[:, None] + query_start
    s = torch.arange(num_keys, device=device)[None, :]
    visible = s * kpool + kpool - 1 <= t if causal else torch.ones_like(s <= t)
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(t.device)[:, None]
        visible = visible & ((t.reshape(1, -1) >= bounds).sum(0)[:, None] == (s >= bounds).sum(0)[None, :])
    return visible


def reference_topk(scores: Tensor, visible: Tensor, topk: int) -> Tensor:
    """Select by a stable descending sort, so that among equal scores the lower index comes first.

    Args:
        scores: ``[B, T, S]``.
        visible: bool ``[T, S]`` or ``[B, T, S]``.
        topk: width of the result.

    Returns:
        int32 ``[B, T, topk]``, ascending, -1 in unused slots at the end.
    """
    num_keys = scores.shape[-1]
    visible = visible.expand(scores.shape)
    # Two stable sorts: first by score, then visible ones to the front, so that a visible -inf still beats an invisible
    # key.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    by_visibility = visible.gather(-1, order).int().sort(dim=-1, descending=True, stable=True)
    chosen = order.gather(-1, by_visibility.indices)[..., :topk]
    chosen = chosen.masked_fill(by_visibility.values[..., :topk] == 0, num_keys).sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == num_keys, -1)
    return torch.nn.functional.pad(chosen, (0, topk - chosen.shape[-1]), value=-1).int()


def reference_membership(indices: Tensor, num_keys: int) -> Tensor:
    """Turn indices ``[B, T, J]`` with -1 in unused slots into a bool map ``[B, T, S]``."""
    slots = indices.long().masked_fill(indices < 0, num_keys)
    chosen = torch.zeros(*indices.shape[:2], num_keys + 1, dtype=torch.bool, device=indices.device)
    return chosen.scatter(-1, slots, True)[..., :num_keys]


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend over the selected keys only, through a dense mask.

    Args:
        q: ``[B, T, H, D]``.
        k: ``[B, S, Hkv, D]``; query head h reads key head ``h // (H // Hkv)``.
        v: ``[B, S, Hkv, Dv]``.
        indices: integers ``[B, T, J]``, -1 unused.
        scale: default ``D ** -0.5``.

    Returns:
        ``o [B, T, H, Dv]`` in q's dtype and ``lse [B, T, H]`` in float32 (float64 for float64 inputs); a row without
        keys has o = 0 and lse = -inf.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    k_full, v_full = (x.to(dtype).repeat_interleave(group, dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bthd,bshd->bths", q.to(dtype), k_full) * scale
    chosen = reference_membership(indices, k.shape[1])[:, :, None]
    empty = ~chosen.any(-1, keepdim=True)
    # An empty row takes logits of zero through the softmax and is blanked afterwards: -inf alone would give NaN
    # gradients.
    logits = logits.masked_fill(~chosen & ~empty, float("-inf")).masked_fill(empty, 0.0)
    p = logits.softmax(-1).masked_fill(empty, 0.0)
    lse = logits.logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    return torch.einsum("bths,bshd->bthd", p, v_full).to(q.dtype), lse


def reference_kl_loss(
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
    """Compare the indexer's distribution with the attention's: mean over tokens of ``KL(p_t || softmax(I_t))``.

    With ``kpool > 1`` the classes are pools: the attention runs over tokens (selected pools and the incomplete tail
    pool), its probabilities are summed per pool, the tail is dropped, and the rest is normalised.  Rows without a class
    count 0.
    """
    dtype = torch.float64 if q_idx.dtype == torch.float64 else torch.float32
    num_tokens, num_keys, num_classes = q.shape[1], k.shape[1], k_idx.shape[1]

    def visible(count: int, pool: int) -> Tensor:
        return reference_visible(
            num_tokens,
            count,
            causal=causal,
            query_start=query_start,
            cu_seqlens=cu_seqlens,
            kpool=pool,
            device=q.device,
        ).expand(q.shape[0], -1, -1)

    tokens, classes = visible(num_keys, 1), visible(num_classes, kpool)
    if indices is not None:
        classes = classes & reference_membership(indices, num_classes)
    pooled = classes.repeat_interleave(kpool, dim=-1)
    if kpool == 1:
        tokens = tokens & classes
    else:
        token = torch.arange(num_keys, device=q.device)
        tail_start = (torch.arange(num_tokens, device=q.device) + query_start + 1) // kpool * kpool
        in_pool = torch.zeros_like(tokens)
        in_pool[..., : pooled.shape[-1]] = pooled[..., :num_keys]
        tokens = tokens & (in_pool | (token >= tail_start[:, None]))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k_full = k.detach().to(dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    logits = torch.einsum("bthd,bshd->bths", q.detach().to(dtype), k_full) * scale
    p = logits.masked_fill(~tokens[:, :, None], float("-inf")).softmax(-1).nan_to_num(0.0).sum(2)
    width = num_classes * kpool
    p = torch.nn.functional.pad(p[..., :width], (0, max(0, width - num_keys)))
    p = p.unflatten(-1, (num_classes, kpool)).sum(-1) * classes
    p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    empty = ~classes.any(-1, keepdim=True)
    scores = reference_scores(q_idx, k_idx, w).masked_fill(~classes & ~empty, float("-inf"))
    log_prediction = scores.log_softmax(-1).masked_fill(~classes, 0.0)
    return (torch.special.xlogy(p, p) - p * log_prediction).sum() / (q.shape[0] * num_tokens)
