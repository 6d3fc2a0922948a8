"""Sequences cut into segments that are scanned side by side: NOTE [Segments] in scan.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Chunks that a segment should have at least, and segments that a sequence should have at least.  Cutting costs two more
# scans over the workspace, of K and of V columns, so few segments would only take more turns.
MIN_CHUNKS, MIN_SEGMENTS = 16, 6


class Segments(NamedTuple):
    """Where segments lie; the scans take them for packed sequences."""

    per_sequence: int
    bounds: Tensor
    """First row of each segment over all sequences, and the number of all rows, int64 [B * per_sequence + 1]."""
    first: Tensor
    """First chunk of each segment, int32 [B * per_sequence]."""


def num_segments(blocks: int, num_chunks: int, num_processors: int) -> int:
    """Choose how many segments to cut sequences of ``num_chunks`` into whose scans fill ``blocks`` multiprocessors."""
    count = min(num_processors // max(blocks, 1), num_chunks // MIN_CHUNKS)
    return count if count >= MIN_SEGMENTS else 1


def cut(B: int, T: int, C: int, count: int, device: torch.device) -> Segments:
    """Cut each of B sequences of T tokens into at most ``count`` segments of whole chunks of C, none of them empty."""
    num_chunks = -(-T // C)
    chunks = -(-num_chunks // count)
    count = -(-num_chunks // chunks)
    sequence, segment = torch.arange(B, device=device)[:, None], torch.arange(count, device=device)
    bounds = torch.nn.functional.pad((sequence * T + segment * (chunks * C)).flatten(), (0, 1), value=B * T)
    return Segments(count, bounds, (sequence * num_chunks + segment * chunks).flatten().int())


def join_states(M: Tensor, N: Tensor, initial: Tensor | None, v_first: bool) -> Tensor:
    """Return the states that segments begin with, of ``M [B, S, HV, K, K]`` and ``N [B, S, HV, K, V]`` (or V, K)."""
    S = torch.zeros_like(N[:, 0]) if initial is None else initial
    states = [S]
    for i in range(N.shape[1] - 1):
        S = N[:, i] + (S @ M[:, i].mT if v_first else M[:, i] @ S)
        states.append(S)
    return torch.stack(states, 1)


def join_gradients(M: Tensor, R: Tensor, d_final: Tensor, v_first: bool) -> Tensor:
    """Return the gradients of the states that segments end with, from those that zero at their ends leads to."""
    dS = d_final
    gradients = [dS]
    for i in range(R.shape[1] - 1, 0, -1):
        dS = R[:, i] + (dS @ M[:, i] if v_first else M[:, i].mT @ dS)
        gradients.append(dS)
    return torch.stack(gradients[::-1], 1)
