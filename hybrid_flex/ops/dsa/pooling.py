"""Pooled index keys: one key for ``kpool`` consecutive tokens, selected together (GLM-5.3-Flash).

a_s      = softmax over the kpool slots of (gate_s + ape_slot)      per channel
key_P    = sum over the slots of a_s * k_idx_s
pool P holds tokens P * kpool ... P * kpool + kpool - 1 and may be selected once its LAST token is visible;
the tokens after the last complete pool (the tail) are always attended.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_flex.checks import FLOATING, INTEGER, check, check_dtype, check_rank, check_shape, is_plain
from hybrid_flex.ops.dispatch import has_kernels


def pool_index_keys(k_idx: Tensor, gate: Tensor, ape: Tensor, kpool: int) -> Tensor:
    """Average each ``kpool`` consecutive index keys with a learned softmax per channel.

    ``key_P = sum_i softmax_i(gate_{P kpool + i} + ape_i) * k_idx_{P kpool + i}``

    Args:
        k_idx: ``[B, S, DI]`` index keys, counted from the first real token.
        gate: ``[B, S, DI]`` gate logits, a linear map of the hidden state.
        ape: ``[kpool, DI]`` learned logit of each slot.
        kpool: tokens per pool, >= 1.

    Returns:
        ``[B, S // kpool, DI]`` in k_idx's dtype, computed in float32 (float64 for float64).  The incomplete last pool
        has no key.

    Raises:
        ValueError: shapes that do not fit, ``kpool < 1``.
        TypeError: a tensor is not floating.

    Device: any; plain tensor code, differentiable.
    Source: GLM-5.3-Flash, pooled lightning indexer.

    Example:
        >>> pool_index_keys(torch.ones(2, 11, 8), torch.zeros(2, 11, 8), torch.zeros(4, 8), 4).shape
        torch.Size([2, 2, 8])
    """
    op = "pool_index_keys"
    check(kpool >= 1, op, "kpool", "be at least 1", kpool)
    check_rank(op, "k_idx", k_idx, "[B, S, DI]")
    check_shape(op, "gate", gate, k_idx.shape, "[B, S, DI]")
    check_shape(op, "ape", ape, (kpool, k_idx.shape[-1]), "[kpool, DI]")
    for name, tensor in (("k_idx", k_idx), ("gate", gate), ("ape", ape)):
        check_dtype(op, name, tensor, FLOATING)
    dtype = torch.float64 if k_idx.dtype == torch.float64 else torch.float32
    num_pools = k_idx.shape[1] // kpool
    # Not a slice: whether that is contiguous depends on S % kpool, and a graph would be bound to one of the two cases.
    token = torch.arange(num_pools * kpool, device=k_idx.device)
    keys, logits = (x.index_select(1, token).to(dtype).unflatten(1, (num_pools, kpool)) for x in (k_idx, gate))
    weights = (logits + ape.to(dtype)).softmax(dim=2)
    return (weights * keys).sum(2).to(k_idx.dtype)


def expand_pools(pool_indices: Tensor, kpool: int, *, query_start: int | Tensor = 0) -> Tensor:
    """Write out the tokens of the selected pools, and the visible tokens of the incomplete tail pool after them.

    Args:
        pool_indices: int32 or int64 ``[B, T, Jp]``, ascending, -1 in unused slots at the end (`lightning_topk`).
        kpool: tokens per pool, >= 1.
        query_start: position of query 0 among the keys, >= 0; integers ``[B]`` where it differs.

    Returns:
        int32 ``[B, T, Jp * kpool + kpool - 1]``: token indices, ascending, -1 in unused slots at the end.

    Raises:
        ValueError: wrong rank, ``kpool < 1``.
        TypeError: ``pool_indices`` is not int32 or int64.

    Device: any; plain tensor code, and one Triton kernel on CUDA outside of traced graphs.
    Source: GLM-5.3-Flash, pooled lightning indexer.

    Example:
        >>> expand_pools(torch.tensor([[[0, -1]]]), 2, query_start=4)
        tensor([[[ 0,  1,  4, -1, -1]]], dtype=torch.int32)
    """
    op = "expand_pools"
    check(kpool >= 1, op, "kpool", "be at least 1", kpool)
    check_rank(op, "pool_indices", pool_indices, "[B, T, Jp]")
    check_dtype(op, "pool_indices", pool_indices, INTEGER)
    if isinstance(query_start, Tensor):
        check_shape(op, "query_start", query_start, (pool_indices.shape[0],), "[B]")
        check_dtype(op, "query_start", query_start, INTEGER)
    device = pool_indices.device
    batch_size, num_queries, num_slots = pool_indices.shape
    # A compiler makes one kernel of what follows; run one by one these are ten passes over the result.
    if has_kernels(pool_indices) and is_plain(pool_indices):
        from hybrid_flex.kernels.dsa.pools import launch_expand

        width = num_slots * kpool + kpool - 1
        found = pool_indices.new_empty((batch_size, num_queries, width), dtype=torch.int32)
        if batch_size * num_queries > 0:
            launch_expand(pool_indices, kpool, query_start, found)
        return found
    slot = torch.arange(kpool, device=device, dtype=torch.int32)
    tokens = (pool_indices.int()[..., None] * kpool + slot).flatten(-2)
    tokens = torch.nn.functional.pad(tokens, (0, kpool - 1), value=-1)
    # Pools and tail are ascending runs already: the tail only has to start where the last selected pool ends.
    column = torch.arange(num_slots * kpool + kpool - 1, device=device, dtype=torch.int32)
    used = (pool_indices >= 0).sum(-1, keepdim=True, dtype=torch.int32) * kpool
    start = query_start[:, None, None] if isinstance(query_start, Tensor) else query_start
    length = torch.arange(num_queries, device=device, dtype=torch.int32)[:, None] + start + 1
    tail_start = length // kpool * kpool
    tail = tail_start + column - used
    tail = torch.where(tail < length, tail, -1)
    return torch.where(column < used, tokens, tail).to(torch.int32)
