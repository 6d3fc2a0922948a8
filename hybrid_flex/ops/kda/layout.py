"""Token order and chunk order: ``[B, T, H, X]`` into ``[NC, B * H, C, X]`` and back, packed sequences included."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packing(NamedTuple):
    """Where packed sequences lie among chunks; every sequence starts a chunk of its own.

    The number of chunks is bounded by ``T // C + N`` whatever the lengths are, so all shapes are known without reading
    ``cu_seqlens``; chunks past the last used one hold only padding.
    """

    token: Tensor
    """Index of the token in each row of each chunk, [NC * C]; 0 where the row is padding."""
    valid: Tensor
    """Whether a row holds a token, [NC * C]."""
    row: Tensor
    """Row ``chunk * C + i`` of each token, [T]."""
    sequence: Tensor
    """Sequence of each chunk, [NC]."""
    is_first: Tensor
    """Whether a chunk is the first of its sequence, [NC]."""
    is_last: Tensor
    """Whether a chunk is the last of its sequence, [NC]."""
    first_chunk: Tensor
    """First chunk of each sequence, [N]; some chunk in range when the sequence is empty."""
    last_chunk: Tensor
    """Last chunk of each sequence, [N]; some chunk in range when the sequence is empty."""
    is_empty: Tensor
    """Whether a sequence has no token, [N]."""


def pack(cu_seqlens: Tensor, num_tokens: int, chunk_size: int) -> Packing:
    """Lay packed sequences with boundaries ``cu_seqlens [N + 1]`` out in chunks, without reading them on the host."""
    cu = cu_seqlens.long()
    device, num_sequences = cu.device, cu.shape[0] - 1
    num_chunks = num_tokens // chunk_size + num_sequences
    lengths = cu.diff()
    chunks = (lengths + chunk_size - 1) // chunk_size
    end = chunks.cumsum(0)
    start = end - chunks
    chunk = torch.arange(num_chunks, device=device)
    sequence = torch.searchsorted(end, chunk, right=True).clamp(max=num_sequences - 1)
    offset = (chunk - start[sequence])[:, None] * chunk_size + torch.arange(chunk_size, device=device)
    valid = (offset < lengths[sequence][:, None]) & (chunk < end[-1])[:, None]
    token = torch.where(valid, cu[sequence][:, None] + offset, 0)
    position = torch.arange(num_tokens, device=device)
    owner = torch.searchsorted(cu[1:], position, right=True).clamp(max=num_sequences - 1)
    return Packing(
        token=token.flatten(),
        valid=valid.flatten(),
        row=start[owner] * chunk_size + position - cu[owner],
        sequence=sequence,
        is_first=chunk == start[sequence],
        is_last=chunk == end[sequence] - 1,
        first_chunk=start.clamp(max=num_chunks - 1),
        last_chunk=(end - 1).clamp(min=0),
        is_empty=lengths == 0,
    )


def to_chunks(x_BTHX: Tensor, chunk_size: int, packing: Packing | None) -> Tensor:
    """Reorder ``[B, T, H, X]`` into ``[NC, B * H, C, X]``; rows without a token are zero."""
    if packing is None:
        num_chunks = (x_BTHX.shape[1] + chunk_size - 1) // chunk_size
        x = F.pad(x_BTHX, (0, 0, 0, 0, 0, num_chunks * chunk_size - x_BTHX.shape[1]))
        x = x.unflatten(1, (num_chunks, chunk_size)).permute(1, 0, 3, 2, 4)
    else:
        x = torch.where(packing.valid[:, None, None], x_BTHX[0].index_select(0, packing.token), 0)
        x = x.unflatten(0, (packing.sequence.shape[0], chunk_size)).permute(0, 2, 1, 3)[:, None]
    return x.flatten(1, 2).contiguous()


def to_tokens(x: Tensor, batch_size: int, num_tokens: int, packing: Packing | None) -> Tensor:
    """Undo `to_chunks`: ``[NC, B * H, C, ...]`` into ``[B, T, H, ...]``."""
    num_heads = x.shape[1] // batch_size
    x = x.unflatten(1, (batch_size, num_heads)).transpose(0, 1).transpose(2, 3).flatten(1, 2)
    if packing is not None:
        return x.index_select(1, packing.row)
    # Always a copy: a slice that fills its chunks is dense already, and keeping it would fix a compiled graph, traced
    # with another length, to lengths that do not fill theirs.
    return x.narrow(1, 0, num_tokens).clone(memory_format=torch.contiguous_format)
