"""FlexAttention over an exact BlockMask, closed inside one operator.

A program that holds a bare flex_attention node cannot be saved by torch.export, and on a CPU such a node has no
backward.  This operator hides both: its body runs a FlexAttention compiled for static sizes, its backward is the gather
operator's.  The mask comes in one of two forms; in both ``mask_mod`` reads the bits of every query's own selection:

    union of queries   rows of a product are queries of one head       128 queries share blocks of 128 keys
    heads as rows      rows are the heads of ONE token and key head    a token has its own blocks of 16 keys

NOTE [Few queries]: the union form works through whole blocks of 128 queries, so that fewer cost as many, and of their
keys it skips next to nothing once neighbours select for themselves.  With heads as rows a token is an entry of the
batch, and skips what it has not selected: with 2048 of 32768 keys drawn one by one 36 % of the blocks, 77 % with pools
of 4, 94 % with pools of 16.  Tokens and key heads that are at most 128 together, T * Hkv, take this form; on CUDA 1024.
Measured on two cores of a CPU (16 heads on one of 64, 256 of 4096 keys drawn one by one): one query 0.6 instead of
24 ms, 16 queries 2.5 instead of 20, 128 queries 19 instead of 20; with 16 key heads 16 queries 18 instead of 25, and
128 longer, 130 instead of 26.  On an H100 (2048 of 32768 keys; 32 heads of 128 on 8): one query 1.7 instead of 4.9 ms,
64 queries 3.1 instead of 4.9, 128 as many; 64 heads of 128 on one: 512 queries 3.4 instead of 8.5; of 512 on one: 128
queries 5.1 instead of 7.4.  Most of that is launching; the gather form takes 0.2 to 1.0.

NOTE [Buckets]: the inner compilation is static, so every new size would compile again (seconds each).  Queries and keys
are padded to powers of two (few queries to powers of four), and on a CPU, where dynamic lengths with captured tensors
fail in several ways, batch entries run one by one.  Padding costs memory and copies only: no list names a padded block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from hybrid_flex.ops.dispatch import in_its_own_precision
from hybrid_flex.ops.dsa.attention import is_in_kernels
from hybrid_flex.ops.dsa.gather import backward, fake_forward, gather_lse, setup_context
from hybrid_flex.ops.dsa.indexer import accumulate_dtype

BLOCK_SIZE = 128
"""Queries (or heads as rows) and keys in a block; rows of a product never pass it."""
KEY_BLOCK = 16
"""Keys in a block with heads as rows: the fewest that a product on CUDA takes."""
FEW_QUERIES = 128  # times key heads
CUDA_FACTOR = 8  # as many more there
"""NOTE [Few queries]."""
MOST_ENTRIES = 65535
"""The batch lies along the second dimension of a CUDA grid."""


def _attend(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    bits: Tensor,
    lists: list[Tensor],
    scale: float,
    key_block: int,
    with_lse: bool,
    options: Any,
) -> tuple[Tensor, ...]:
    """Call FlexAttention on head-major tensors; every tensor of the mask is an argument, hence an input of the graph.

    ``bits`` are those of `pack_selection`, of every query ``[B, T, S / 32]`` or of a whole entry ``[B, S / 32]``, read
    as NOTE [Bytes] in block_mask.py says.
    """
    octets = bits.view(torch.uint8)

    def of_query(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ((octets[b, q_idx, kv_idx >> 3] >> (kv_idx & 7)) & 1) == 1

    def of_entry(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ((octets[b, kv_idx >> 3] >> (kv_idx & 7)) & 1) == 1

    number, order, full_number, full_order = lists
    mask = BlockMask.from_kv_blocks(
        *(number, order, full_number, full_order),
        BLOCK_SIZE=(BLOCK_SIZE, key_block),
        mask_mod=of_query if bits.dim() == 3 else of_entry,
        seq_lengths=(q_BHTD.shape[2], k_BHSD.shape[2]),
        compute_q_blocks=False,
    )
    gqa = q_BHTD.shape[1] != k_BHSD.shape[1]
    attend = functools.partial(flex_attention, q_BHTD, k_BHSD, v_BHSD, block_mask=mask, scale=scale, enable_gqa=gqa)
    if with_lse:
        o, auxiliary = attend(kernel_options=options, return_aux=AuxRequest(lse=True))
        return o, auxiliary.lse  # type: ignore[union-attr,return-value]
    return (attend(kernel_options=options),)  # type: ignore[return-value]


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_attend, dynamic=False, fullgraph=True)


def _call(*arguments: Any) -> tuple[Tensor, ...]:
    # Past the limit the compiler would fall back to the eager form, which holds T x S scores: better to stop.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=128, fail_on_recompile_limit_hit=True):
        return _compiled()(*arguments)


def _bucket(length: int) -> int:
    return max(BLOCK_SIZE, 1 << (length - 1).bit_length())


def _few(num_queries: int) -> int:
    """Return the bucket of a number of queries whose heads are rows: few of them, as padding costs next to nothing."""
    return next((n for n in (1, 4, 16, 64) if num_queries <= n), _bucket(num_queries))


def _padded(x: Tensor, length: int, value: float = 0) -> Tensor:
    """Pad the tokens of x ``[B, T, ...]`` to ``length``; x itself where there is nothing to pad."""
    if x.shape[1] == length:
        return x
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, length - x.shape[1]), value=value)


def kernel_options(num_rows: int, D: int, V: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Choose the tiles of the CUDA kernel where Inductor's own choice does not do.

    Its kernel for short queries is asked for as many rows as queries and grouped heads together, which no block of the
    union form holds.  For rows of more than 256 columns it asks for more shared memory than an H100 has; 8 warps and 3
    stages were the fastest of those tried there with heads as rows (512 columns and 64 heads, 95 TFLOP/s, torch 2.11).
    For 64 columns and less its 128 x 128 pairs on 4 warps spill 3.4 KB a thread as soon as a mask reads bits.  What is
    chosen here was compiled for compute capability 9.0 (Triton 3.7): in 16 bits it spills nothing but 208 bytes where
    the heads of few tokens have 512 columns.

    Args:
        num_rows: heads as rows, or 0 for the union form.
        D: width of queries and keys.
        V: width of values.
        dtype: of queries, keys and values.
        device: where they lie; a CPU has no options.
    """
    if device.type != "cuda":
        return {}
    from hybrid_flex.kernels.launch import device_limits, next_power_of_2

    size = dtype.itemsize
    D, V = (max(16, next_power_of_2(n)) for n in (D, V))
    union: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True} if num_rows == 0 else {}
    if union and max(D, V) <= 256:
        if max(D, V) <= 64:
            union |= {"BLOCK_M": 128, "BLOCK_N": 64 if size < 4 else 32, "num_warps": 8, "num_stages": 3}
        return union
    # More than 64 KiB of queries would push the sums out of the registers.
    rows = max(16, min(64, next_power_of_2(num_rows or BLOCK_SIZE), 2**16 // (size * max(D, V))))
    # Queries stay, tiles of keys and values go through.
    sizes = {n: (rows * D + n * KEY_BLOCK * (D + V)) * size for n in (3, 2, 1)}
    stages = next((n for n in sizes if sizes[n] + 1024 <= device_limits(device)[0]), 1)
    tiles = {
        "BLOCK_M": rows,
        "BLOCK_N": KEY_BLOCK,
        "num_warps": 8 if rows * V * size > 16384 else 4,
        "num_stages": stages,
    }
    return {**tiles, **union}


def _union_of_queries(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Attend with blocks of queries; no log-sum-exps on a CPU."""
    on_cpu = q.device.type == "cpu"
    num_queries, keys = q.shape[1], _bucket(k.shape[1])
    queries = _bucket(num_queries)
    bits, *lists = torch.ops.hybrid_flex.pack_selection(_padded(indices, queries, -1), keys, BLOCK_SIZE, BLOCK_SIZE)
    tensors = [_padded(q, queries), _padded(k, keys), _padded(v, keys)]
    tensors = [*(x.transpose(1, 2) for x in tensors), bits, *lists]
    entries = [slice(b, b + 1) for b in range(q.shape[0])] if on_cpu else [slice(None)]
    options = kernel_options(0, q.shape[3], v.shape[3], q.dtype, q.device)
    found = []
    for entry in entries:
        own = [x[entry] for x in tensors]
        found.append(_call(*own[:4], own[4:], scale, BLOCK_SIZE, not on_cpu, options))
    o, *lse = (torch.cat(x).transpose(1, 2)[:, :num_queries].contiguous() for x in zip(*found, strict=True))
    return o, lse[0] if lse else None


def _heads_as_rows(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Attend with an entry of the batch for every token; no log-sum-exps on a CPU."""
    on_cpu = q.device.type == "cpu"
    batch_size, num_queries, _, width = q.shape
    num_kv_heads, keys, queries = k.shape[2], _bucket(k.shape[1]), _few(num_queries)
    bits, *lists = torch.ops.hybrid_flex.pack_selection(_padded(indices, queries, -1), keys, 1, KEY_BLOCK)
    rows = _padded(q, queries).unflatten(2, (num_kv_heads, -1))
    blocks = -(-rows.shape[3] // BLOCK_SIZE)
    # [B, 1, T, ...] -> [B, T, 1, blocks of rows, ...]: every block of rows has the token's own lists.
    lists = [x.transpose(1, 2).unsqueeze(3).repeat_interleave(blocks, 3) for x in lists]
    entries = [rows, bits, *lists]
    heads = [_padded(x, keys).transpose(1, 2) for x in (k, v)]
    if queries == 1:
        # One token of each sequence: every entry has keys of its own.
        groups = [([x[:, 0] for x in entries], heads)]
    else:
        groups = [([x[b] for x in entries], [x[b : b + 1] for x in heads]) for b in range(batch_size)]
    options = kernel_options(rows.shape[3], width, v.shape[3], q.dtype, q.device)
    found = []
    for own, own_heads in groups:
        for first in range(0, own[0].shape[0], MOST_ENTRIES):
            piece = slice(first, first + MOST_ENTRIES)
            q_b, bits_b, *lists_b = (x[piece] for x in own)
            k_b, v_b = (x[piece] if queries == 1 else x for x in own_heads)
            found.append(_call(q_b, k_b, v_b, bits_b, lists_b, scale, KEY_BLOCK, not on_cpu, options))
    results = (torch.cat(x).unflatten(0, (batch_size, queries)) for x in zip(*found, strict=True))
    o, *lse = (x[:, :num_queries].flatten(2, 3).contiguous() for x in results)
    return o, lse[0] if lse else None


@torch.library.custom_op("hybrid_flex::sparse_attention_flex", mutates_args=())
@in_its_own_precision
def _flex_forward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if k.shape[1] == 0 or indices.numel() == 0:
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=accumulate_dtype(q))
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    # The checks of FlexAttention look at requires_grad although gradients are this operator's business.
    q, k, v = q.detach(), k.detach(), v.detach()
    indices = indices[..., : k.shape[1]]
    few = q.shape[1] * k.shape[2] <= FEW_QUERIES * (CUDA_FACTOR if q.is_cuda else 1)
    form = _heads_as_rows if few else _union_of_queries
    o, own_lse = form(q, k, v, indices, scale)
    return o, gather_lse(q, k, indices, scale) if own_lse is None else own_lse


_flex_forward.register_fake(fake_forward)


def _gradient(ctx: object, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradient by the kernels of the gather form where they serve, else in the plain form."""
    q, k, v, indices, o, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    if not is_in_kernels(q, v):
        return backward(ctx, do, dlse)
    scale = ctx.scale  # type: ignore[attr-defined]
    arguments = (do, dlse, q, k, v, indices, o, lse, scale, 0)
    return *torch.ops.hybrid_flex.sparse_attention_cuda_backward(*arguments), None, None


_flex_forward.register_autograd(_gradient, setup_context=setup_context)
