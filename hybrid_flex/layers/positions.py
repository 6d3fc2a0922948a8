"""Where each token of a call stands in its own sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def token_positions(num_tokens: int, start: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Count the positions of ``num_tokens`` tokens: ``start + t``, or from 0 in every packed sequence.

    Args:
        num_tokens: T.
        start: tokens already in the cache; 0 with ``cu_seqlens``.
        cu_seqlens: boundaries ``[N + 1]`` of packed sequences, or None.  Empty sequences are legal.
        device: where the result lies.

    Returns:
        Positions ``[T]``, int64.

    Example:
        >>> token_positions(5, 0, torch.tensor([0, 2, 2, 5]), torch.device("cpu")).tolist()
        [0, 1, 0, 1, 2]
    """
    token = torch.arange(num_tokens, device=device)
    if cu_seqlens is None:
        return token + start
    return token - cu_seqlens.to(torch.int64)[sequence_of_token(token, cu_seqlens)]


def sequence_of_token(token: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Find the packed sequence of each ``token`` index: the n with ``cu_seqlens[n] <= token < cu_seqlens[n + 1]``."""
    return torch.searchsorted(cu_seqlens[1:].to(torch.int64).contiguous(), token, right=True)
