"""Selection of whole blocks of keys: marks, counts and lists of `block_topk_mask` in one pass over a row of scores.

    rank_c = #{visible j: s_j > s_c, or s_j = s_c and j < c}        chosen_c = visible_c and rank_c < topk

Every pair of columns is compared: a row has no more than MOST_COLUMNS.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybrid_flex.kernels.launch import launchable, next_power_of_2, on_its_device

MOST_COLUMNS = 2048


@triton.jit
def _list(p_number, p_order, i_row, b_chosen, i_column, columns):
    """Write how many columns are chosen, and all columns, chosen ones first."""
    b_chosen = b_chosen.to(tl.int32)
    number = tl.sum(b_chosen, 0)
    before = tl.cumsum(b_chosen, 0)
    i_place = tl.where(b_chosen != 0, before - 1, number + i_column - before)
    tl.store(p_order + i_row * columns + i_place, i_column, mask=i_column < columns)
    tl.store(p_number + i_row, number)


@triton.jit(do_not_specialize=["rows", "columns", "topk", "q_len", "kv_len", "query_start"])
def select_blocks_kernel(
    p_scores, p_member, p_number, p_order, p_full_number, p_full_order, rows, columns, topk, q_len, kv_len, query_start,
    SIZE: tl.constexpr, CAUSAL: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Choose the blocks of one row; ``rows`` rows of blocks to a head, SIZE tokens to a block."""
    i_row = tl.program_id(0).to(tl.int64)
    p_scores += i_row * columns
    i_block = (i_row % rows).to(tl.int32)
    last = columns
    if CAUSAL:
        stop = tl.minimum((i_block + 1) * SIZE, q_len) + query_start
        last = tl.minimum(columns, (stop + SIZE - 1) // SIZE)
    i_column = tl.arange(0, BN)
    b_s = tl.load(p_scores + i_column, mask=i_column < last, other=0.0).to(tl.float32)
    # A row with a score that is no number chooses nothing, unless there is no choice.
    is_number = (tl.sum((b_s != b_s).to(tl.int32), 0) == 0) | (topk >= columns)
    b_rank = tl.zeros([BN], tl.int32)
    for j in range(0, last, BJ):
        i_j = j + tl.arange(0, BJ)
        b_j = tl.load(p_scores + i_j, mask=i_j < last, other=0.0).to(tl.float32)[None, :]
        m_before = (b_j > b_s[:, None]) | ((b_j == b_s[:, None]) & (i_j[None, :] < i_column[:, None]))
        b_rank += tl.sum((m_before & (i_j[None, :] < last)).to(tl.int32), 1)
    b_member = (i_column < last) & ((b_rank < topk) & is_number)
    # A block is full when its last key is visible to the block's first query; ragged borders stay partial.
    column_stop = (i_column + 1) * SIZE
    b_full = b_member & (column_stop <= kv_len) & ((i_block + 1) * SIZE <= q_len)
    if CAUSAL:
        b_full = b_full & (column_stop <= i_block * SIZE + query_start + 1)
    tl.store(p_member + i_row * columns + i_column, b_member.to(tl.uint8), mask=i_column < columns)
    _list(p_number, p_order, i_row, b_member & (b_full == 0), i_column, columns)
    _list(p_full_number, p_full_order, i_row, b_full, i_column, columns)


@on_its_device
def launch_select_blocks(
    scores: Tensor, topk: int, q_len: int, kv_len: int, size: int, causal: bool, query_start: int,
    *outputs: Tensor,
) -> None:  # fmt: skip
    """Select among ``scores [..., rows, columns]``, contiguous; the outputs are the operator's, marks as uint8."""
    rows, columns = scores.shape[-2:]
    numbers = (rows, columns, topk, q_len, kv_len, query_start)
    launchable(select_blocks_kernel, scores)[(scores.numel() // columns,)](
        scores, *outputs, *numbers, SIZE=size, CAUSAL=causal, BN=max(16, next_power_of_2(columns)), BJ=16, num_warps=4
    )
