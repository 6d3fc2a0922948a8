"""Attention to a selection as dense products under a mask of bits, forward: a tile of queries shares its keys.

With l = log2(e) scale, over the blocks of keys that any query of a tile has selected::

    s_tj = l q_t . k_j                  -inf where bit j of query t is 0
    m'   = max(m, max_j s_tj)           p_tj = 2^(s_tj - m')           a = 2^(m - m')
    L    = a L + sum_j p_tj             O    = a O + sum_j p_tj v_j
    o    = O / L                        lse  = log L + m log 2

The rows of a product are the queries of a tile times the heads that share a key head.

# NOTE [Words]
The mask is one bit for each pair of a query and a key, ``bits [B, T, S / 32]``.  A row of a tile reads one word for 32
keys and tests its bits in registers; FlexAttention's mask_mod loads a byte for every element of a tile, which takes
longer than the products (H100, T 8192, 32 heads of 128 on 8: 7 ms, where dense attention takes 0.9).

# NOTE [Unseen rows]
What a query has not selected gets the weight 0, but the row is multiplied all the same: keys and values that nobody
selects must be finite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_flex.kernels.launch import (
    NARROWEST,
    device_limits,
    launchable,
    next_power_of_2,
    on_its_device,
    product_precision,
)

from .gather import LN_2, LOG2_E, LOWEST, dense_rows, load_piece, store_piece

Tiles = dict[str, int]

ROWS = 128
"""Rows of a tile: queries times the heads that share a key head, which are padded to a power of two."""
BLOCK = 128
"""Keys of a block, four words."""
WIDEST = 128
"""Columns of keys and of values that the kernels hold."""
SLOT_TILE = 512
WORD_TILE = 256
COLUMN_TILE = 512


@triton.jit(do_not_specialize=["J", "S", "T", "PADDED", "WORDS"])
def pack_kernel(p_slots, p_bits, J, S, T, PADDED, WORDS, SLOTS: tl.constexpr):
    """Set the bit of every slot in use of one query; the bits, ``[B, PADDED, WORDS]``, are zero before."""
    i_query = tl.program_id(0).to(tl.int64)
    p_slots += i_query * J
    p_bits += (i_query // T * PADDED + i_query % T) * WORDS
    for j in range(0, J, SLOTS):
        i_slot = j + tl.arange(0, SLOTS)
        b_slot = tl.load(p_slots + i_slot, mask=i_slot < J, other=-1).to(tl.int32)
        # A selection names a key once, so that the sum of its bits is their union.
        m_slot = (b_slot >= 0) & (b_slot < S)
        tl.atomic_add(p_bits + (b_slot >> 5), (m_slot.to(tl.int32)) << (b_slot & 31), mask=m_slot, sem="relaxed")


@triton.jit(do_not_specialize=["WORDS", "BLOCKS"])
def touch_kernel(p_bits, p_touched, WORDS, BLOCKS, TILE: tl.constexpr, BW: tl.constexpr, BLOCK: tl.constexpr):
    """Mark which blocks of keys any query of a tile has selected: ``touched [B, TILES, BLOCKS]``, uint8."""
    PER_BLOCK: tl.constexpr = BLOCK // 32
    i_tile = tl.program_id(0).to(tl.int64)
    p_bits += i_tile * TILE * WORDS
    i_word = tl.program_id(1) * BW + tl.arange(0, BW)
    b_any = tl.zeros([BW], tl.int32)
    for t in range(0, TILE):
        b_any |= tl.load(p_bits + t * WORDS + i_word, mask=i_word < WORDS, other=0)
    b_touched = tl.max(tl.reshape((b_any != 0).to(tl.int32), [BW // PER_BLOCK, PER_BLOCK]), 1)
    i_block = tl.program_id(1) * (BW // PER_BLOCK) + tl.arange(0, BW // PER_BLOCK)
    tl.store(p_touched + i_tile * BLOCKS + i_block, b_touched.to(tl.uint8), mask=i_block < BLOCKS)


@triton.jit(do_not_specialize=["COLUMNS", "row", "column"])
def list_kernel(p_touched, p_number, p_order, ROWS, COLUMNS, batch, row, column, BC: tl.constexpr):
    """List the columns that a row of a map ``[B, ROWS, COLUMNS]`` marks, and count them; the map may be transposed."""
    i_row = tl.program_id(0).to(tl.int64)
    p_touched += i_row // ROWS * batch + i_row % ROWS * row
    p_order += i_row * COLUMNS
    number = 0
    for first in range(0, COLUMNS, BC):
        i_column = first + tl.arange(0, BC)
        b_touched = tl.load(p_touched + i_column * column, mask=i_column < COLUMNS, other=0).to(tl.int32)
        i_place = number + tl.cumsum(b_touched, 0) - 1
        tl.store(p_order + i_place, i_column, mask=b_touched != 0)
        number += tl.sum(b_touched, 0)
    tl.store(p_number + i_row, number)


@triton.jit
def tile_rows(i_program, TILES, H: tl.constexpr, HKV: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr):
    """Return batch entry, key head, query ``[BM]`` and head ``[BM]`` of a tile's rows, and which are no padding.

    Late tiles, which see more keys, run first; all tiles of a key head before the next one's, whose rows then stay in
    the cache.
    """
    G: tl.constexpr = H // HKV
    i_tile = TILES - 1 - i_program % TILES
    i_kv = (i_program // TILES % HKV).to(tl.int64)
    i_row = tl.arange(0, BM)
    i_group = i_row % BG
    i_query = i_tile * (BM // BG) + i_row // BG
    return i_program // (TILES * HKV), i_kv, i_tile, i_query, i_kv * G + i_group, i_group < G


@triton.jit
def is_selected(p_words, i_key, BN: tl.constexpr):
    """Test the bits of BN keys, whose words begin at ``p_words``, one pointer a row: NOTE [Words].

    ``i_key`` counts the keys of the tile, along the other dimension than the rows; both have two dimensions.
    """
    b_word = tl.load(p_words)
    for n in tl.static_range(1, BN // 32):
        b_word = tl.where(i_key < 32 * n, b_word, tl.load(p_words + n))
    return (b_word & (1 << (i_key & 31))) != 0


@triton.jit
def tile_lists(p_bits, p_number, p_order, i_batch, i_tile, i_query, PADDED, WORDS, TILES, BLOCKS):
    """Return pointers ``[BM, 1]`` to the words of a tile's rows, how many blocks it touches, and pointers to these."""
    i_list = i_batch * TILES + i_tile
    p_words = (p_bits + (i_batch * PADDED + i_query) * WORDS)[:, None]
    return p_words, tl.load(p_number + i_list), p_order + i_list * BLOCKS


@triton.jit
def keys_of_part(p_order, i, S, BN: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first key of part i of the blocks in a list, and the rows ``[BN, 1]`` of its keys.

    Behind the last key no bit is set; its row stands for those that are not there.
    """
    PARTS: tl.constexpr = BLOCK // BN
    first = tl.load(p_order + i // PARTS) * BLOCK + i % PARTS * BN
    return first, tl.minimum(first + tl.arange(0, BN), S - 1).to(tl.int64)[:, None]


@triton.jit(do_not_specialize=["T", "S", "PADDED", "WORDS", "TILES", "BLOCKS"])
def masked_kernel(
    p_q, p_k, p_v, p_bits, p_number, p_order, p_o, p_lse, scale, T, S, PADDED, WORDS, TILES, BLOCKS,
    q_batch, q_token, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute o and lse of a tile of queries for the heads that share a key head."""
    i_batch, i_kv, i_tile, i_query, i_head, m_row = tile_rows(tl.program_id(0), TILES, H, HKV, BG, BM)
    i_batch = i_batch.to(tl.int64)
    m_row = (m_row & (i_query < T))[:, None]
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    p_words, number, p_order = tile_lists(
        p_bits, p_number, p_order, i_batch, i_tile, i_query, PADDED, WORDS, TILES, BLOCKS
    )
    p_rows = (p_q + i_batch * q_batch + i_query.to(tl.int64) * q_token + i_head * q_head)[:, None]
    b_q = load_piece(p_rows, m_row, 0, BD, D, True)
    factor = tl.cast(scale, tl.float32) * LOG2_E
    i_column = tl.arange(0, BN)

    b_m = tl.full([BM], LOWEST, tl.float32)
    b_L = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BV], tl.float32)
    for i in tl.range(0, number * (BLOCK // BN), num_stages=STAGES):
        first, i_key = keys_of_part(p_order, i, S, BN, BLOCK)
        b_k = load_piece(p_k + i_key * k_row, None, 0, BD, D, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_s = is_selected(p_words + first // 32, i_column[None, :], BN)
        b_s = tl.where(m_s, b_s * factor, float("-inf"))
        b_largest = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_largest[:, None])
        b_a = tl.exp2(b_m - b_largest)
        b_L = b_L * b_a + tl.sum(b_p, 1)
        b_m = b_largest
        b_v = load_piece(p_v + i_key * v_row, None, 0, BV, V, False)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_a[:, None], input_precision=PRECISION)

    # With any key the sum is at least 1, the weight of the largest logit.
    b_total = tl.maximum(b_L, 1.0)
    i_out = ((i_batch * T + i_query) * H + i_head)[:, None]
    store_piece(p_o + i_out * V, b_o / b_total[:, None], m_row, 0, BV, V)
    b_lse = tl.where(b_L > 0.0, b_m * LN_2 + tl.log(b_total), float("-inf"))
    tl.store(p_lse + i_out, b_lse[:, None], mask=m_row)


class Selection(NamedTuple):
    """A selection as the kernels read it."""

    bits: Tensor
    """int32 ``[B, PADDED, WORDS]``, whole tiles of queries and whole blocks of keys."""
    number: Tensor
    """int32 ``[B, TILES]``: blocks of keys that a tile of queries touches."""
    order: Tensor
    """int32 ``[B, TILES, BLOCKS]``: these blocks, and behind them nothing that counts."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """PADDED, WORDS, TILES and BLOCKS."""
        return (*self.bits.shape[1:], *self.order.shape[1:])  # type: ignore[return-value]


def queries_of_tile(group: int) -> int:
    """Return how many queries make up the rows of a tile, with so many heads on a key head."""
    return ROWS // next_power_of_2(group)


def is_served(group: int, D: int, V: int, element_size: int) -> bool:
    """Tell whether the kernels take so many heads on a key head, these widths, and elements of so many bytes."""
    return group <= ROWS and 0 < D <= WIDEST and 0 < V <= WIDEST and element_size == 2


def constants_of(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """Return the constants that every kernel takes."""
    H, HKV, D, V = (int(n) for n in (q.shape[2], k.shape[2], q.shape[3], v.shape[3]))
    BD, BV = (max(NARROWEST, next_power_of_2(n)) for n in (D, V))
    sizes = {"H": H, "HKV": HKV, "D": D, "V": V, "BD": BD, "BV": BV, "BG": next_power_of_2(H // HKV)}
    return {**sizes, "BLOCK": BLOCK, "PRECISION": product_precision(q)}


def tiles_of_keys(choices: tuple[tuple[int, int], ...], constants: dict[str, Any], held: int, x: Tensor) -> Tiles:
    """Choose keys of a tile and stages that fit the shared memory beside ``held`` columns of queries."""
    size, limit = x.element_size(), device_limits(x.device)[0]
    columns = constants["BD"] + constants["BV"]
    fits = (c for c in choices if (ROWS * held + c[0] * c[1] * columns) * size + 16 * ROWS * c[1] <= limit)
    BN, stages = next(fits, choices[-1])
    return {"BM": ROWS, "BN": BN, "STAGES": stages, "num_warps": 8}


@on_its_device
def launch_pack(indices: Tensor, num_keys: int, group: int) -> tuple[Tensor, Tensor]:
    """Pack ``indices [B, T, J]``: bits as in `Selection`, and ``touched [B, TILES, BLOCKS]``, one where tiles look."""
    B, T, J = indices.shape
    tile = queries_of_tile(group)
    tiles, blocks = (T + tile - 1) // tile, (num_keys + BLOCK - 1) // BLOCK
    bits = indices.new_zeros((B, tiles * tile, blocks * (BLOCK // 32)), dtype=torch.int32)
    sizes = (J, num_keys, T, *bits.shape[1:])
    launchable(pack_kernel, indices)[(B * T,)](indices.contiguous(), bits, *sizes, SLOTS=SLOT_TILE, num_warps=4)
    touched = indices.new_empty((B, tiles, blocks), dtype=torch.uint8)
    grid = (B * tiles, (bits.shape[2] + WORD_TILE - 1) // WORD_TILE)
    launchable(touch_kernel, indices)[grid](
        bits, touched, bits.shape[2], blocks, TILE=tile, BW=WORD_TILE, BLOCK=BLOCK, num_warps=4
    )
    return bits, touched


@on_its_device
def launch_lists(touched: Tensor) -> tuple[Tensor, Tensor]:
    """List what rows of a map ``[B, ROWS, COLUMNS]`` mark: numbers ``[B, ROWS]``, columns ``[B, ROWS, COLUMNS]``."""
    B, rows, columns = touched.shape
    number = touched.new_empty((B, rows), dtype=torch.int32)
    order = touched.new_empty((B, rows, columns), dtype=torch.int32)
    sizes = (rows, columns, *touched.stride())
    launchable(list_kernel, touched)[(B * rows,)](touched, number, order, *sizes, BC=COLUMN_TILE, num_warps=4)
    return number, order


@on_its_device
def launch_masked(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float, *, o: Tensor, lse: Tensor
) -> None:
    """Write attention under a mask to ``o`` and its log-sum-exps to ``lse``.

    Args:
        q, k, v, scale: arguments of `sparse_attention`, which has checked them.
        selection: the mask.
        o: output, ``[B, T, H, Dv]``, contiguous, in q's dtype.
        lse: output, ``[B, T, H]``, contiguous, float32.
    """
    constants = constants_of(q, k, v)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    tiles = tiles_of_keys(((128, 2), (64, 2), (32, 1)), constants, constants["BD"], q)
    num_tiles = selection.order.shape[1]
    launchable(masked_kernel, q)[(q.shape[0] * k.shape[2] * num_tiles,)](
        q, k, v, *selection, o, lse, float(scale), q.shape[1], k.shape[1], *selection.sizes,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **constants, **tiles, num_stages=tiles["STAGES"],
    )  # fmt: skip
