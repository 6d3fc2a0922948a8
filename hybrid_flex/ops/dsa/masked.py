"""Attention over a selection as dense products under a mask of bits, on CUDA: for many key heads and few queries.

    bits[b, t, s // 32] bit (s % 32) = 1  iff  s in S_t

Blocks of keys that no query of a tile has selected are left out; what is left costs as much as dense attention, however
few of its keys are used.  NOTE [Masked or gathered] in attention.py says when that is the faster form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hybrid_flex.ops.dispatch import in_its_own_precision
from hybrid_flex.ops.dsa.attention import check_kernels
from hybrid_flex.ops.dsa.gather import fake_backward, fake_forward, setup_context


def _is_nothing(k: Tensor, indices: Tensor) -> bool:
    """Tell whether there is nothing to attend to; a graph with open sizes has something."""
    return statically_known_true(k.shape[1] == 0) or any(statically_known_true(n == 0) for n in indices.shape)


def _selection(q: Tensor, k: Tensor, indices: Tensor) -> tuple[Any, Tensor]:
    """Make what the kernels read of a selection, and the map ``[B, TILES, BLOCKS]`` of what tiles of queries touch."""
    from hybrid_flex.kernels.dsa.masked import Selection, launch_lists, launch_pack

    bits, touched = launch_pack(indices, k.shape[1], q.shape[2] // k.shape[2])
    return Selection(bits, *launch_lists(touched)), touched


def _attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from hybrid_flex.kernels.dsa.masked import launch_masked

    o, lse = fake_forward(q, k, v, indices, scale)
    launch_masked(q, k, v, _selection(q, k, indices)[0], scale, o=o, lse=lse)
    return o, lse


@torch.library.triton_op("hybrid_flex::sparse_attention_masked", mutates_args=())
@in_its_own_precision
def _masked_forward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    check_kernels("sparse_attention_masked", q)
    if _is_nothing(k, indices):
        o, lse = fake_forward(q, k, v, indices, scale)
        return o.zero_(), lse.fill_(float("-inf"))
    return _attend(q, k, v, indices, scale)


_masked_forward.register_fake(fake_forward)


@torch.library.custom_op("hybrid_flex::sparse_attention_masked_backward", mutates_args=())
@in_its_own_precision
def _masked_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from hybrid_flex.kernels.dsa.masked import launch_lists
    from hybrid_flex.kernels.dsa.masked_backward import launch_masked_backward

    check_kernels("sparse_attention_masked_backward", q)
    dq, dk, dv = fake_backward(do, dlse, q, k, v, indices, o, lse, scale)
    if _is_nothing(k, indices):
        return dq.zero_(), dk.zero_(), dv.zero_()
    # Made anew: kept from the forward, the bits of a long sequence would outweigh all else that is kept.
    selection, touched = _selection(q, k, indices)
    by_keys = launch_lists(touched.transpose(1, 2))
    tensors = (do, dlse, q, k, v, selection, by_keys, o, lse, scale)
    launch_masked_backward(*tensors, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


_masked_backward.register_fake(fake_backward)


def _gradient(ctx: object, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, indices, o, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    arguments = (do, dlse, q, k, v, indices, o, lse, ctx.scale)  # type: ignore[attr-defined]
    return *torch.ops.hybrid_flex.sparse_attention_masked_backward(*arguments), None, None


_masked_forward.register_autograd(_gradient, setup_context=setup_context)
