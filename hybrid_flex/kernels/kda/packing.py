"""Where packed sequences lie among chunks, worked out on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_flex.kernels.launch import launchable


class ChunkMap(NamedTuple):
    """Chunks of packed sequences, each sequence beginning one of its own; unused slots have length 0."""

    token: Tensor
    """First token of each chunk, int64 [slots]."""
    length: Tensor
    """Number of tokens of each chunk, int32 [slots]."""
    first: Tensor
    """First chunk of each sequence, int32 [N]."""


@triton.jit(do_not_specialize=["NUM_SLOTS"])
def chunk_map_kernel(p_cu_seqlens, p_token, p_length, p_first, NUM_SLOTS, C: tl.constexpr, BLOCK: tl.constexpr):
    """Write the chunks of one sequence: count those of the sequences before it, then number its own."""
    i_n = tl.program_id(0)
    first = 0
    for i in range(0, i_n, BLOCK):
        i_before = i + tl.arange(0, BLOCK)
        m_before = i_before < i_n
        b_start = tl.load(p_cu_seqlens + i_before, mask=m_before, other=0)
        b_end = tl.load(p_cu_seqlens + i_before + 1, mask=m_before, other=0)
        first += tl.sum((b_end - b_start + C - 1) // C).to(tl.int32)
    tl.store(p_first + i_n, first)
    start = tl.load(p_cu_seqlens + i_n).to(tl.int64)
    length = (tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - start).to(tl.int32)
    for i in range(0, length, C * BLOCK):
        b_row = i + tl.arange(0, BLOCK) * C
        b_slot = first + b_row // C
        # Boundaries that do not end at T, which no one has read yet, must not write past the slots.
        mask = (b_row < length) & (b_slot < NUM_SLOTS)
        tl.store(p_token + b_slot, start + b_row, mask=mask)
        tl.store(p_length + b_slot, tl.minimum(length - b_row, C), mask=mask)


def chunk_map(cu_seqlens: Tensor, num_tokens: int, chunk_size: int) -> ChunkMap:
    """Place sequences with boundaries ``cu_seqlens [N + 1]`` in at most ``num_tokens // chunk_size + N`` chunks."""
    num_sequences = cu_seqlens.shape[0] - 1
    num_slots = num_tokens // chunk_size + num_sequences
    token = torch.zeros(num_slots, dtype=torch.int64, device=cu_seqlens.device)
    length = torch.zeros(num_slots, dtype=torch.int32, device=cu_seqlens.device)
    first = torch.empty(num_sequences, dtype=torch.int32, device=cu_seqlens.device)
    launchable(chunk_map_kernel)[(num_sequences,)](cu_seqlens, token, length, first, num_slots, C=chunk_size, BLOCK=128)
    return ChunkMap(token, length, first)
