"""Block masks for FlexAttention that are exact: the mask_mod alone encodes the whole selection, block lists only skip.

    bits[b, t, s // 32] bit (s % 32) = 1  iff  s in S_t

NOTE [Opaque lists]: lists and bits are made inside operators.  Compiled CPU FlexAttention returns the fully masked
result, without an error, when its mask_mod captures the output of a scatter of the same compiled region; an operator's
output is a plain buffer to the compiler.

NOTE [Bytes]: a mask_mod reads single bytes, never words.  Triton fetches 32-bit loads of a loop ahead of it through
shared memory (cp.async), narrower ones it does not.  FlexAttention's loop reads one element for each pair of a tile:
with words, Inductor's choice for an H100 at D = 64 (128 x 128 pairs, 3 stages) asks for 245,760 bytes of shared memory,
of 232,448 there are; with bytes for 116,736 (torch 2.11, Triton 3.6).  Bits are packed as words, and viewed as bytes
outside of the mask_mod: on a little-endian machine bit s % 8 of byte s // 8 is bit s % 32 of word s // 32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from hybrid_flex.checks import FLOATING, INTEGER, check, check_dtype, check_rank
from hybrid_flex.ops.dispatch import has_kernels, in_its_own_precision
from hybrid_flex.ops.dsa.indexer import select_topk


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a 0/1 map ``[..., R, C]`` into ``num_blocks [..., R]`` and ``indices [..., R, C]``, chosen columns first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def pack_bits(indices: Tensor, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack a selection ``[..., J]`` into int32 words ``[..., ceil(kv_len / 32)]``.

    Also returns the indices as int64, 0 in unused slots, and which slots are used.
    """
    slots = indices.long()
    used = (slots >= 0) & (slots < kv_len)
    slots = slots.masked_fill(~used, 0)
    bits = torch.zeros(*indices.shape[:-1], _ceil_div(kv_len, 32), dtype=torch.int32, device=indices.device)
    # Every index occurs once in a row, so a sum of single bits is their union; the sign bit wraps as it should.
    bits.scatter_add_(-1, slots >> 5, used.int() << (slots & 31).int())
    return bits, slots, used


@torch.library.custom_op("hybrid_flex::pack_selection", mutates_args=())
@in_its_own_precision
def _pack_selection(
    indices: Tensor, kv_len: int, q_block: int, kv_block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch_size, num_queries, num_slots = indices.shape
    num_rows, num_columns = _ceil_div(num_queries, q_block), _ceil_div(kv_len, kv_block)
    bits, slots, used = pack_bits(indices, kv_len)
    pad = num_rows * q_block - num_queries
    column = torch.nn.functional.pad(slots // kv_block, (0, 0, 0, pad)).view(batch_size, num_rows, q_block * num_slots)
    one = torch.nn.functional.pad(used.int(), (0, 0, 0, pad)).view(batch_size, num_rows, q_block * num_slots)
    count = torch.zeros(batch_size, num_rows, num_columns, dtype=torch.int32, device=indices.device)
    count.scatter_add_(-1, column, one)
    full = count == q_block * kv_block
    partial = (count > 0) & ~full
    number, order, full_number, full_order = (x[:, None] for x in (*_lists(partial), *_lists(full)))
    return bits, number, order, full_number, full_order


@_pack_selection.register_fake
def _(indices: Tensor, kv_len: int, q_block: int, kv_block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch_size, num_queries, _ = indices.shape
    num_rows, num_columns = _ceil_div(num_queries, q_block), _ceil_div(kv_len, kv_block)
    number = indices.new_empty((batch_size, 1, num_rows), dtype=torch.int32)
    order = indices.new_empty((batch_size, 1, num_rows, num_columns), dtype=torch.int32)
    bits = indices.new_empty((batch_size, num_queries, _ceil_div(kv_len, 32)), dtype=torch.int32)
    return bits, number, order, number.clone(), order.clone()


def topk_block_mask(indices: Tensor, kv_len: int, block_size: int = 128) -> BlockMask:
    """Build the exact BlockMask of a token-level selection.

    ``mask(b, h, t, s) = bit s of query t``; touched blocks are listed, fully selected ones as full blocks, which skip
    the ``mask_mod``.

    Args:
        indices: int32 or int64 ``[B, T, J]`` in [0, kv_len), each at most once in a row, -1 in unused slots.
        kv_len: number of keys S.
        block_size: queries and keys per block, a multiple of 16.

    Returns:
        BlockMask of shape ``[B, 1, T, S]``.  Its ``mask_mod`` encodes the whole selection, so that eager FlexAttention,
        which ignores the lists, gives the same result.  ``kv_indices`` is as wide as the number of key blocks.

    Raises:
        ValueError: wrong rank, ``kv_len < 1``, block size not a positive multiple of 16.
        TypeError: ``indices`` is not int32 or int64.

    Device: any; holds ``B * T * S / 8`` bytes of bits.
    Source: DeepSeek-V3.2 report, section 2, on FlexAttention.

    Example:
        >>> topk_block_mask(torch.zeros(2, 200, 4, dtype=torch.int32), 300).shape
        (2, 1, 200, 300)
    """
    op = "topk_block_mask"
    check_rank(op, "indices", indices, "[B, T, J]")
    check_dtype(op, "indices", indices, INTEGER)
    check(kv_len >= 1, op, "kv_len", "be at least 1", kv_len)
    _check_block_size(op, block_size)
    bits, number, order, full_number, full_order = torch.ops.hybrid_flex.pack_selection(
        indices, kv_len, block_size, block_size
    )
    octets = bits.view(torch.uint8)  # NOTE [Bytes]

    def selected(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ((octets[b, q_idx, kv_idx >> 3] >> (kv_idx & 7)) & 1) == 1

    return BlockMask.from_kv_blocks(
        *(number, order, full_number, full_order),
        BLOCK_SIZE=block_size,
        mask_mod=selected,
        seq_lengths=(indices.shape[1], kv_len),
    )


@torch.library.custom_op("hybrid_flex::select_blocks", mutates_args=())
@in_its_own_precision
def _select_blocks(
    scores: Tensor, topk_blocks: int, q_len: int, kv_len: int, block_size: int, causal: bool, query_start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_columns = scores.shape[-2:]
    if has_kernels(scores) and scores.numel() > 0:
        from hybrid_flex.kernels.dsa import blocks

        if num_columns <= blocks.MOST_COLUMNS:
            found = _fake_select_blocks(scores, topk_blocks, q_len, kv_len, block_size, causal, query_start)
            options = (topk_blocks, q_len, kv_len, block_size, causal, query_start)
            blocks.launch_select_blocks(scores.contiguous(), *options, found[0].view(torch.uint8), *found[1:])
            return found
    flat = scores.float().reshape(-1, num_columns).clone()
    row = torch.arange(flat.shape[0], device=scores.device) % num_rows
    first = torch.zeros_like(row)
    last = torch.full_like(row, num_columns)
    start = row * block_size + query_start
    if causal:
        stop = torch.clamp((row + 1) * block_size, max=q_len) + query_start
        last = torch.minimum(last, (stop + block_size - 1) // block_size)
    chosen = select_topk(flat, first, last, topk_blocks)
    member = torch.zeros(flat.shape[0], num_columns + 1, dtype=torch.bool, device=scores.device)
    member = member.scatter_(-1, chosen, True)[:, :num_columns]
    # A block is full when its last key is visible to the block's first query; ragged borders stay partial.
    column_stop = (torch.arange(num_columns, device=scores.device) + 1) * block_size
    full = member & (column_stop <= kv_len) & ((row + 1) * block_size <= q_len)[:, None]
    if causal:
        full = full & (column_stop <= start[:, None] + 1)
    member, full = member.view(scores.shape), full.view(scores.shape)
    return member.contiguous(), *_lists(member & ~full), *_lists(full)  # NOTE [Bytes]


@_select_blocks.register_fake
def _fake_select_blocks(
    scores: Tensor, topk_blocks: int, q_len: int, kv_len: int, block_size: int, causal: bool, query_start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    member = scores.new_empty(scores.shape, dtype=torch.bool)
    number, full_number = (scores.new_empty(scores.shape[:-1], dtype=torch.int32) for _ in range(2))
    order, full_order = (scores.new_empty(scores.shape, dtype=torch.int32) for _ in range(2))
    return member, number, order, full_number, full_order


def block_topk_mask(
    scores: Tensor,
    topk_blocks: int,
    q_len: int,
    kv_len: int,
    *,
    block_size: int = 128,
    causal: bool = True,
    query_start: int = 0,
) -> BlockMask:
    """Build the BlockMask that lets each block of queries see its ``topk_blocks`` best blocks of keys.

    A block-level selection (MoBA, NSA, VSA style), not token-level DSA: all queries of a block share it.  Ties go to
    the lower block.  No block is forced; give the diagonal a score of +inf to keep it always.

    Args:
        scores: ``[B, nQ, nKV]`` (one selection for all heads) or ``[B, H, nQ, nKV]`` with
            ``nQ = ceil(q_len / block_size)`` and ``nKV = ceil(kv_len / block_size)``.
        topk_blocks: blocks to keep, >= 1.
        q_len: number of queries T.
        kv_len: number of keys S.
        block_size: queries and keys per block, a multiple of 16.
        causal: query t sees key s of a chosen block iff ``s <= query_start + t``; blocks no query of the row can see
            are never chosen.
        query_start: position of query 0 among the keys, >= 0.

    Returns:
        BlockMask of shape ``[B, 1 or H, T, S]``; its ``mask_mod`` encodes blocks and causality.

    Raises:
        ValueError: shapes or values that do not fit.
        TypeError: ``scores`` is not floating.

    Device: any.
    Source: MoBA (arXiv:2502.13189), selection of whole blocks by their scores.

    Example:
        >>> block_topk_mask(torch.randn(2, 3, 3), 1, 300, 300).shape
        (2, 1, 300, 300)
    """
    op = "block_topk_mask"
    check(scores.dim() in (3, 4), op, "scores", "have shape [B, nQ, nKV] or [B, H, nQ, nKV]", tuple(scores.shape))
    check_dtype(op, "scores", scores, FLOATING)
    check(topk_blocks >= 1, op, "topk_blocks", "be at least 1", topk_blocks)
    check(query_start >= 0, op, "query_start", "be at least 0", query_start)
    _check_block_size(op, block_size)
    want = (_ceil_div(q_len, block_size), _ceil_div(kv_len, block_size))
    got = (scores.shape[-2], scores.shape[-1])
    rule = "have ceil(q_len / block_size) rows and ceil(kv_len / block_size) columns"
    check(got[0] == want[0] and got[1] == want[1], op, "scores", rule, got)
    scores = (scores[:, None] if scores.dim() == 3 else scores).detach()
    member, number, order, full_number, full_order = torch.ops.hybrid_flex.select_blocks(
        scores, topk_blocks, q_len, kv_len, block_size, causal, query_start
    )
    num_heads = scores.shape[1]

    def selected(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        head = h if num_heads > 1 else h * 0
        chosen = member[b, head, q_idx // block_size, kv_idx // block_size]
        return chosen & (kv_idx <= q_idx + query_start) if causal else chosen

    return BlockMask.from_kv_blocks(
        *(number, order, full_number, full_order),
        BLOCK_SIZE=block_size,
        mask_mod=selected,
        seq_lengths=(q_len, kv_len),
    )


def _check_block_size(op: str, block_size: int) -> None:
    rule = "be a positive multiple of 16"
    check(block_size > 0 and block_size % 16 == 0, op, "block_size", rule, block_size)
