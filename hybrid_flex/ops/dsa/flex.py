"""FlexAttention over an exact BlockMask, closed inside one operator.

A program that holds a bare flex_attention node cannot be saved by torch.export, and on a CPU such a node has no
backward.  This operator hides both: its body runs a FlexAttention compiled for static sizes, its backward is the gather
operator's.

NOTE [Buckets]: the inner compilation is static, so every new size would compile again (seconds each).  On a CPU, where
dynamic lengths with captured tensors fail in several ways, queries and keys are padded to powers of two and batch
entries run one by one.  Padding costs memory only: no list names a padded block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hybrid_flex.ops.dispatch import in_its_own_precision
from hybrid_flex.ops.dsa.attention import (
    accumulate_dtype,
    backward,
    gather_lse,
    setup_context,
)

BLOCK_SIZE = 128


def _attend(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, bits: Tensor, lists: list[Tensor], scale: float, with_lse: bool
) -> tuple[Tensor, ...]:
    """Call FlexAttention on head-major tensors; every tensor of the mask is an argument, hence an input of the graph.

    ``bits`` are those of `pack_selection`, read as NOTE [Bytes] in block_mask.py says.
    """
    octets = bits.view(torch.uint8)

    def selected(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ((octets[b, q_idx, kv_idx >> 3] >> (kv_idx & 7)) & 1) == 1

    number, order, full_number, full_order = lists
    mask = BlockMask.from_kv_blocks(
        *(number, order, full_number, full_order),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=selected,
        seq_lengths=(q_BHTD.shape[2], k_BHSD.shape[2]),
        compute_q_blocks=False,
    )
    tensors = (q_BHTD, k_BHSD, v_BHSD)
    if with_lse:
        return flex_attention(*tensors, block_mask=mask, scale=scale, enable_gqa=True, return_lse=True)
    return (flex_attention(*tensors, block_mask=mask, scale=scale, enable_gqa=True),)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_attend, dynamic=False, fullgraph=True)


def _bucket(length: int) -> int:
    return max(BLOCK_SIZE, 1 << (length - 1).bit_length())


@torch.library.custom_op("hybrid_flex::sparse_attention_flex", mutates_args=())
@in_its_own_precision
def _flex_forward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch_size, num_queries, num_heads, _ = q.shape
    num_keys, value_width = v.shape[1], v.shape[3]
    if num_keys == 0 or indices.numel() == 0:
        lse = q.new_full((batch_size, num_queries, num_heads), float("-inf"), dtype=accumulate_dtype(q))
        return q.new_zeros(batch_size, num_queries, num_heads, value_width), lse
    on_cpu = q.device.type == "cpu"
    query_bucket = _bucket(num_queries) if on_cpu else num_queries
    key_bucket = _bucket(num_keys) if on_cpu else num_keys
    pad = torch.nn.functional.pad
    # The checks of FlexAttention look at requires_grad although gradients are this operator's business.
    padded_q = pad(q.detach(), (0, 0, 0, 0, 0, query_bucket - num_queries))
    padded_k, padded_v = (pad(x.detach(), (0, 0, 0, 0, 0, key_bucket - num_keys)) for x in (k, v))
    slots = pad(indices, (0, 0, 0, query_bucket - num_queries), value=-1)
    bits, *lists = torch.ops.hybrid_flex.pack_selection(slots, key_bucket, BLOCK_SIZE, BLOCK_SIZE)
    tensors = [padded_q.transpose(1, 2), padded_k.transpose(1, 2), padded_v.transpose(1, 2), bits, *lists]
    entries = [[x[b : b + 1] for x in tensors] for b in range(batch_size)] if on_cpu else [tensors]
    # Past the limit the compiler would fall back to the eager form, which holds T x S scores: better to stop.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        results = [_compiled()(*x[:4], x[4:], scale, not on_cpu) for x in entries]
    if on_cpu:
        o = torch.cat([x[0] for x in results]).transpose(1, 2)[:, :num_queries].contiguous()
        return o, gather_lse(q, k, indices, scale)
    o, lse = results[0]
    return o.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


@_flex_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[-1])
    return o, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q))


_flex_forward.register_autograd(backward, setup_context=setup_context)
