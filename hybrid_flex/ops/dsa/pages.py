"""Caches in pages: a pool of pages of equal size that sequences share, and a table that says whose pages are whose."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_flex.checks import INTEGER, check, check_device, check_dtype, check_rank, check_shape


def paged_rows(indices: Tensor, block_table: Tensor, page_size: int) -> Tensor:
    """Say where the keys of a selection lie in a pool of pages: `sparse_attention` over ``pool.flatten(0, 1)``.

    ``row = block_table[b, s // page_size] * page_size + s % page_size``

    Args:
        indices: int32 or int64 ``[B, T, J]``, keys of each batch entry, -1 in unused slots.
        block_table: int32 or int64 ``[B, pages]``, the pages of each entry in the pool.
        page_size: keys of a page, >= 1.

    Returns:
        int64 ``[B, T, J]``: rows of the pool, -1 in unused slots.

    Raises:
        ValueError: shapes, devices or values that do not fit.
        TypeError: a tensor is not int32 or int64.

    Device: any; plain tensor code.
    Source: vLLM, arXiv:2309.06180, section 4.1 (caches in pages).

    Example:
        >>> paged_rows(torch.tensor([[[0, 5, -1]]]), torch.tensor([[3, 1]]), 4).tolist()
        [[[12, 5, -1]]]
    """
    op = "paged_rows"
    check_rank(op, "indices", indices, "[B, T, J]")
    check_shape(op, "block_table", block_table, (indices.shape[0], None), "[B, pages]")
    for name, tensor in (("indices", indices), ("block_table", block_table)):
        check_dtype(op, name, tensor, INTEGER)
    check_device(op, "block_table", block_table, indices.device)
    check(page_size >= 1, op, "page_size", "be at least 1", page_size)
    slots = indices.clamp_min(0).long()
    page = block_table.long().gather(1, (slots // page_size).flatten(1)).view(slots.shape)
    return torch.where(indices >= 0, page * page_size + slots % page_size, -1)
