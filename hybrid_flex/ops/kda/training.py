"""`chunk_kda` on CUDA where gradients are wanted: the same operator, which also returns what spares its backward work.

The inverse of every chunk's triangle and its products of queries and keys, 256 bytes per token and value head with
chunks of 64 rows in 16 bits, are a fifth of a training step to compute again.  `torch.no_grad` and `torch.export` leave
them out, and activation checkpointing (`torch.utils.checkpoint`) drops them with all else that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_flex.ops.dispatch import has_kernels, in_its_own_precision

from .chunk import backward, fake, setup_context
from .inputs import Raw


@torch.library.triton_op("hybrid_flex::chunk_kda_training", mutates_args=())
@in_its_own_precision
def _chunk_kda_training(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    l2norm: bool,
    gate: bool,
    sigmoid: bool,
    neg_eigval: bool,
    lower_bound: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    state_v_first: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from hybrid_flex.kernels.kda import chunk

    if not has_kernels(q):
        raise RuntimeError(f"chunk_kda_training: q must be on CUDA and not float64, got {q.device}, {q.dtype}")
    raw = Raw(q, k, v, g, beta, A_log, dt_bias, l2norm, gate, sigmoid, neg_eigval, lower_bound)
    return chunk.forward(  # type: ignore[return-value]
        raw, initial_state, cu_seqlens, scale, state_v_first, chunk_size, keep=True
    )


@_chunk_kda_training.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    from hybrid_flex.kernels.kda import chunk

    raw, cu_seqlens, chunk_size = Raw(*arguments[:12]), arguments[13], arguments[16]
    shape = chunk.shape_of_kept(raw, cu_seqlens, chunk_size)
    return (*fake(*arguments), raw.q.new_empty(shape), raw.q.new_empty(shape))


torch.library.register_autograd("hybrid_flex::chunk_kda_training", backward, setup_context=setup_context)
