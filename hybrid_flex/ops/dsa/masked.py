"""Attention over a selection as dense products under a mask of bits, on CUDA: for few heads on a key head.

    U = {u_0 < u_1 < ...} = union of S_t over a tile of consecutive queries        bits[b, t, j] = 1  iff  u_j in S_t

Queries of a tile are multiplied with all keys of its union.  Tiles whose queries share too little of what they have
selected are left to the gather form; NOTE [Masked or gathered] in attention.py says when.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hybrid_flex.ops.dispatch import in_its_own_precision
from hybrid_flex.ops.dsa.attention import check_kernels
from hybrid_flex.ops.dsa.gather import fake_backward, fake_forward, setup_context

# NOTE [Masked or gathered] in attention.py: what a gathered key is worth.
FORWARD = 42
FORWARD_ON_HOPPER = 60
TRAINING = 72
TRAINING_ON_HOPPER = 110


def _is_nothing(k: Tensor, indices: Tensor) -> bool:
    """Tell whether there is nothing to attend to; a graph with open sizes has something."""
    return statically_known_true(k.shape[1] == 0) or any(statically_known_true(n == 0) for n in indices.shape)


def _most_shared(q: Tensor, k: Tensor, indices: Tensor, worth: int) -> tuple[Any, Any]:
    """Return how many keys a tile may multiply, and an upper bound of it: NOTE [Masked or gathered] in attention.py.

    Numbers, or of a graph open sizes; then the bound is the plainer one.
    """
    S, group = k.shape[1], q.shape[2] // k.shape[2]
    gathered = indices.shape[2] * 2 * worth // (2 * group + 1)
    # All tiles may be masked where a query in the middle, if the last one sees everything, sees no more than that.
    seen = torch.sym_max(S - q.shape[1] // 2, S - gathered)
    everything = torch.sym_min(1, torch.sym_max(gathered - seen + 1, 0))
    most = torch.sym_min(S, gathered)
    most += everything * (S - most)
    return most, most if isinstance(most, int) else torch.sym_min(S, 2 * gathered)


def _unions(q: Tensor, k: Tensor, indices: Tensor, worth: int) -> tuple[Any, Any]:
    """Make what the kernels read of a selection, and what they do of the attention."""
    from hybrid_flex.kernels.dsa.gather import Done
    from hybrid_flex.kernels.dsa.masked import launch_unions, queries_of_tile

    group, S = q.shape[2] // k.shape[2], k.shape[1]
    most, bound = _most_shared(q, k, indices, worth)
    unions = launch_unions(indices, S, group, most, bound)
    # No union has more keys than there are.
    return unions, Done(unions.number, queries_of_tile(group), torch.sym_min(1, torch.sym_max(S - most, 0)))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, in_gluon: bool = False
) -> tuple[Tensor, Tensor]:
    from hybrid_flex.kernels.dsa.gather import launch_gather
    from hybrid_flex.kernels.launch import computed_once

    if in_gluon:
        from hybrid_flex.kernels.dsa.masked_hopper import launch_masked_hopper as launch_masked
    else:
        from hybrid_flex.kernels.dsa.masked import launch_masked

    o, lse = fake_forward(q, k, v, indices, scale)
    if _is_nothing(k, indices):
        return o.zero_(), lse.fill_(float("-inf"))
    q, k, v, indices = (computed_once(x) for x in (q, k, v, indices))
    unions, done = _unions(q, k, indices, FORWARD_ON_HOPPER if in_gluon else FORWARD)
    launch_masked(q, k, v, unions, scale, o=o, lse=lse)
    launch_gather(q, k, v, indices, scale, done, o=o, lse=lse)
    return o, lse


@torch.library.triton_op("hybrid_flex::sparse_attention_masked", mutates_args=())
@in_its_own_precision
def _masked_forward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    check_kernels("sparse_attention_masked", q)
    return _attend(q, k, v, indices, scale)


# Not a triton_op: torch cannot carry a Gluon kernel in a graph.
@torch.library.custom_op("hybrid_flex::sparse_attention_masked_hopper", mutates_args=())
@in_its_own_precision
def _hopper_forward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Do what sparse_attention_masked does, for what masked_hopper.py serves."""
    check_kernels("sparse_attention_masked_hopper", q)
    return _attend(q, k, v, indices, scale, in_gluon=True)


_masked_forward.register_fake(fake_forward)
_hopper_forward.register_fake(fake_forward)


def _is_backward_in_gluon(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether the backward's kernel for Hopper serves these tensors; a version of Triton may not have Gluon."""
    try:
        from hybrid_flex.kernels.dsa.masked_backward_hopper import is_served
    except (ImportError, AttributeError):
        return False
    return is_served(q, k, v)


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
    from hybrid_flex.kernels.dsa.gather_backward import launch_gather_backward

    in_gluon = _is_backward_in_gluon(q, k, v)
    if in_gluon:
        from hybrid_flex.kernels.dsa.masked_backward_hopper import (
            launch_masked_backward_hopper as launch_masked_backward,
        )
    else:
        from hybrid_flex.kernels.dsa.masked_backward import launch_masked_backward

    check_kernels("sparse_attention_masked_backward", q)
    arguments = (do, dlse, q, k, v, indices, o, lse, scale)
    if _is_nothing(k, indices):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    if torch.are_deterministic_algorithms_enabled():
        # The kernels add to rows in whatever order they come; the sums of the plain form keep theirs.
        return torch.ops.hybrid_flex.sparse_attention_backward(*arguments)  # type: ignore[no-any-return]
    dq = q.new_empty(q.shape)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    # Made anew: kept from the forward, the bits of a long sequence would outweigh all else that is kept.
    unions, done = _unions(q, k, indices, TRAINING_ON_HOPPER if in_gluon else TRAINING)
    launch_masked_backward(do, dlse, q, k, v, unions, o, lse, scale, dq=dq, dk=dk, dv=dv)
    if done.is_part:
        launch_gather_backward(*arguments, done, dq=dq, dk=dk, dv=dv)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


_masked_backward.register_fake(fake_backward)


def _gradient(ctx: object, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, indices, o, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    arguments = (do, dlse, q, k, v, indices, o, lse, ctx.scale)  # type: ignore[attr-defined]
    return *torch.ops.hybrid_flex.sparse_attention_masked_backward(*arguments), None, None


_masked_forward.register_autograd(_gradient, setup_context=setup_context)
_hopper_forward.register_autograd(_gradient, setup_context=setup_context)
