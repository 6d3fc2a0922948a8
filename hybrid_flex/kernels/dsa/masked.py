"""Attention to a selection as dense products under a mask of bits, forward: a tile of queries shares its keys.

With l = log2(e) scale, over the keys that any query of a tile has selected, its union U = {u_0 < u_1 < ...}::

    s_tj = l q_t . k_{u_j}              -inf where bit j of query t is 0
    m'   = max(m, max_j s_tj)           p_tj = 2^(s_tj - m')           a = 2^(m - m')
    L    = a L + sum_j p_tj             O    = a O + sum_j p_tj v_{u_j}
    o    = O / L                        lse  = log L + m log 2

The rows of a product are the queries of a tile times the heads that share a key head.

# NOTE [Unions]
A key of the union is fetched and multiplied once for the whole tile, so that neighbours which select alike share the
work.  What they do not share costs them nothing but the products, up to the point where a query does better alone:
a tile whose union is longer than `most` keys is left to the gather form, which looks here which tiles are left.  Until
then nobody knows how a selection turns out; both forms are launched and each does its tiles.

# NOTE [Words]
The mask is one bit for each pair of a query and a key of its union, ``bits [B, T, ROOM / 32]``.  A row of a tile reads
one word for 32 keys and tests its bits in registers; FlexAttention's mask_mod loads a byte for every element of a tile,
which takes longer than the products (H100, T 8192, 32 heads of 128 on 8: 7 ms, where dense attention takes 0.9).

# NOTE [Runs]
Bits are set by atomics, of which the L2 does one for a word at a time: 67 million took half a millisecond (H200).  As
slots ascend, a thread takes RUN neighbours and sets what falls into the same word at once.  Any order gives the bits.

# NOTE [Unseen rows]
What a query has not selected gets the weight 0, but a row of its tile's union is multiplied all the same: keys and
values that a neighbour selects must be finite.
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

from .gather import LN_2, LOG2_E, LOWEST, dense_rows, load_piece, load_slots, row_pointers, store_piece

Tiles = dict[str, int]

ROWS = 128
"""Rows of a tile: queries times the heads that share a key head, which are padded to a power of two."""
BLOCK = 128
"""Unions have room for a multiple of so many keys: whole tiles, and whole words of bits."""
WIDEST = 128
"""Columns of keys and of values that the kernels hold."""
SLOT_TILE = 1024
RUN = 8
WORD_TILE = 64


@triton.jit
def add_bits(p_words, b_word, b_bits):
    """Set bits of words, where there are any."""
    tl.atomic_or(p_words + b_word, b_bits, mask=b_bits != 0, sem="relaxed")


@triton.jit
def carry_bit(p_words, b_word, b_bits, b_place, m_place):
    """Add a bit to the word that a thread carries, and write that one if the bit is not in it: NOTE [Runs]."""
    b_next = b_place >> 5
    m_other = b_next != b_word
    add_bits(p_words, b_word, tl.where(m_other, b_bits, 0))
    return b_next, tl.where(m_other, 0, b_bits) | (m_place.to(tl.int32) << (b_place & 31))


@triton.jit(do_not_specialize=["J", "S", "T", "TILES", "WORDS"])
def mark_kernel(p_slots, p_union, J, S, T, TILES, WORDS, TILE: tl.constexpr, SLOTS: tl.constexpr, RUN: tl.constexpr):
    """Set the bits of the keys of one query in the union of its tile, ``[B, TILES, WORDS]``, zero before."""
    i_query = tl.program_id(0).to(tl.int64)
    p_slots += i_query * J
    p_union += (i_query // T * TILES + i_query % T // TILE) * WORDS
    for j in range(0, J, SLOTS):
        b_word = tl.full([SLOTS // RUN], -1, tl.int32)
        b_bits = tl.zeros([SLOTS // RUN], tl.int32)
        for n in tl.static_range(RUN):
            i_slot = j + tl.arange(0, SLOTS // RUN) * RUN + n
            # Loaded here and in no function of its own: of what a function returns torch takes all arguments for
            # written where an address is computed of it, and copies the slots in every graph (torch 2.11 then fails:
            # open strides).
            b_slot = tl.load(p_slots + i_slot, mask=i_slot < J, other=-1).to(tl.int32)
            m_slot = (b_slot >= 0) & (b_slot < S)
            b_word, b_bits = carry_bit(p_union, b_word, b_bits, b_slot, m_slot)
        add_bits(p_union, b_word, b_bits)


@triton.jit(do_not_specialize=["WORDS", "ROOM", "most"])
def list_kernel(p_union, p_before, p_keys, p_number, WORDS, ROOM, most, BW: tl.constexpr):
    """List the keys of a tile's union, and count them; -1 where there are more than ``most``: NOTE [Unions].

    ``before [B, TILES, WORDS]``: how many keys stand in the words before one.
    """
    i_tile = tl.program_id(0).to(tl.int64)
    p_union += i_tile * WORDS
    p_before += i_tile * WORDS
    p_keys += i_tile * ROOM
    i_bit = tl.arange(0, 32)[None, :]
    number = 0
    for first in range(0, WORDS, BW):
        i_word = first + tl.arange(0, BW)
        b_word = tl.load(p_union + i_word, mask=i_word < WORDS, other=0)
        b_bit = (b_word[:, None] >> i_bit) & 1
        b_count = tl.sum(b_bit, 1)
        b_before = number + tl.cumsum(b_count, 0) - b_count
        tl.store(p_before + i_word, b_before, mask=i_word < WORDS)
        i_place = b_before[:, None] + tl.cumsum(b_bit, 1) - b_bit
        tl.store(p_keys + i_place, i_word[:, None] * 32 + i_bit, mask=(b_bit != 0) & (i_place < most))
        number += tl.sum(b_count, 0)
    tl.store(p_number + i_tile, tl.where(number <= most, number, -1))


@triton.jit
def count_bits(x):
    """Count the ones of non-negative int32."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x += x >> 8
    return (x + (x >> 16)) & 63


@triton.jit(do_not_specialize=["J", "S", "T", "PADDED", "TILES", "WORDS", "CHOSEN"])
def pack_kernel(
    p_slots, p_union, p_before, p_number, p_bits, J, S, T, PADDED, TILES, WORDS, CHOSEN,
    TILE: tl.constexpr, SLOTS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Set the bits of the keys of one query by their places in the union; ``bits [B, PADDED, CHOSEN]``, zero before."""
    i_query = tl.program_id(0).to(tl.int64)
    i_tile = i_query // T * TILES + i_query % T // TILE
    p_slots += i_query * J
    p_union += i_tile * WORDS
    p_before += i_tile * WORDS
    p_bits += (i_query // T * PADDED + i_query % T) * CHOSEN
    number = tl.load(p_number + i_tile)
    for j in range(0, tl.where(number > 0, J, 0), SLOTS):
        b_chosen = tl.full([SLOTS // RUN], -1, tl.int32)
        b_bits = tl.zeros([SLOTS // RUN], tl.int32)
        for n in tl.static_range(RUN):
            i_slot = j + tl.arange(0, SLOTS // RUN) * RUN + n
            b_slot = tl.load(p_slots + i_slot, mask=i_slot < J, other=-1).to(tl.int32)
            m_slot = (b_slot >= 0) & (b_slot < S)
            b_word = tl.load(p_union + (b_slot >> 5), mask=m_slot, other=0)
            b_below = b_word & ((m_slot.to(tl.int32) << (b_slot & 31)) - 1)
            b_place = tl.load(p_before + (b_slot >> 5), mask=m_slot, other=0) + count_bits(b_below)
            b_chosen, b_bits = carry_bit(p_bits, b_chosen, b_bits, b_place, m_slot)
        add_bits(p_bits, b_chosen, b_bits)


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
def is_selected(p_words, BN: tl.constexpr):
    """Test the bits of BN keys, whose words begin at ``p_words [BM, 1]``: NOTE [Words]."""
    i_key = tl.arange(0, BN)[None, :]
    b_word = tl.load(p_words)
    for n in tl.static_range(1, BN // 32):
        b_word = tl.where(i_key < 32 * n, b_word, tl.load(p_words + n))
    return (b_word & (1 << (i_key & 31))) != 0


@triton.jit
def tile_union(p_bits, p_number, p_keys, i_batch, i_tile, i_query, PADDED, CHOSEN, TILES, ROOM):
    """Return pointers ``[BM, 1]`` to the words of a tile's rows, how many keys its union has, and a pointer to these.

    Behind the last key no bit is set; its row stands for those that are not there.
    """
    i_list = i_batch * TILES + i_tile
    p_words = (p_bits + (i_batch * PADDED + i_query) * CHOSEN)[:, None]
    p_keys += i_list * ROOM
    number = tl.load(p_number + i_list)
    return p_words, number, p_keys, tl.load(p_keys + number - 1, mask=number > 0, other=0)


@triton.jit(do_not_specialize=["T", "PADDED", "CHOSEN", "TILES", "ROOM"])
def masked_kernel(
    p_q, p_k, p_v, p_bits, p_number, p_keys, p_o, p_lse, scale, T, PADDED, CHOSEN, TILES, ROOM,
    q_batch, q_token, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute o and lse of a tile of queries for the heads that share a key head."""
    i_batch, i_kv, i_tile, i_query, i_head, m_row = tile_rows(tl.program_id(0), TILES, H, HKV, BG, BM)
    i_batch = i_batch.to(tl.int64)
    m_row = (m_row & (i_query < T))[:, None]
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    p_words, number, p_keys, last_key = tile_union(
        p_bits, p_number, p_keys, i_batch, i_tile, i_query, PADDED, CHOSEN, TILES, ROOM
    )
    p_rows = (p_q + i_batch * q_batch + i_query.to(tl.int64) * q_token + i_head * q_head)[:, None]
    b_q = load_piece(p_rows, m_row, 0, BD, D, True)
    factor = tl.cast(scale, tl.float32) * LOG2_E

    b_m = tl.full([BM], LOWEST, tl.float32)
    b_L = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BV], tl.float32)
    b_next = load_slots(p_keys, 0, number, BN)
    for j in tl.range(0, number, BN, num_stages=STAGES):
        b_key = b_next  # NOTE [Slots ahead] in gather.py
        b_next = load_slots(p_keys, j + BN, number, BN)
        b_k = load_piece(row_pointers(p_k, b_key, last_key, k_row), None, 0, BD, D, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_s = is_selected(p_words + j // 32, BN)
        b_s = tl.where(m_s, b_s * factor, float("-inf"))
        b_largest = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_largest[:, None])
        b_a = tl.exp2(b_m - b_largest)
        b_L = b_L * b_a + tl.sum(b_p, 1)
        b_m = b_largest
        b_v = load_piece(row_pointers(p_v, b_key, last_key, v_row), None, 0, BV, V, False)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_a[:, None], input_precision=PRECISION)

    # With any key the sum is at least 1, the weight of the largest logit.
    b_total = tl.maximum(b_L, 1.0)
    m_row = m_row & (number >= 0)  # the gather form writes the others
    i_out = ((i_batch * T + i_query) * H + i_head)[:, None]
    store_piece(p_o + i_out * V, b_o / b_total[:, None], m_row, 0, BV, V)
    b_lse = tl.where(b_L > 0.0, b_m * LN_2 + tl.log(b_total), float("-inf"))
    tl.store(p_lse + i_out, b_lse[:, None], mask=m_row)


class Unions(NamedTuple):
    """A selection as the kernels read it: NOTE [Unions]."""

    bits: Tensor
    """int32 ``[B, PADDED, ROOM / 32]``, whole tiles of queries: which keys of its tile's union a query has selected."""
    number: Tensor
    """int32 ``[B, TILES]``: how many keys a tile's union has, -1 where the tile is left to the gather form."""
    keys: Tensor
    """int32 ``[B, TILES, ROOM]``: these keys, ascending, and behind them nothing that counts."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """PADDED, CHOSEN, TILES and ROOM."""
        return (*self.bits.shape[1:], *self.keys.shape[1:])  # type: ignore[return-value]


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
    return {**sizes, "PRECISION": product_precision(q)}


def tiles_of_keys(
    choices: tuple[tuple[int, int], ...], constants: dict[str, Any], held: int, weights: int, x: Tensor
) -> Tiles:
    """Choose keys of a tile and stages that fit the shared memory.

    Beside them lie ``held`` columns of queries and ``weights`` tiles of weights.
    """
    size, limit = x.element_size(), device_limits(x.device)[0]
    columns = constants["BD"] + constants["BV"]

    def number_of_bytes(BN: int, stages: int) -> int:
        return (ROWS * (held + weights * BN) + stages * BN * columns) * size + 16 * ROWS * stages

    BN, stages = next((choice for choice in choices if number_of_bytes(*choice) <= limit), choices[-1])
    return {"BM": ROWS, "BN": BN, "STAGES": stages, "num_warps": 8}


@on_its_device
def launch_unions(indices: Tensor, num_keys: int, group: int, most: int, bound: int) -> Unions:
    """Unite the selections ``indices [B, T, J]`` of the queries of every tile.

    Args:
        indices: argument of `sparse_attention`.
        num_keys: S.
        group: heads on a key head, which decide on the queries of a tile.
        most: keys that a union may have.
        bound: not less than ``most``; there is room for so many.
    """
    B, T, J = indices.shape
    tile, indices = queries_of_tile(group), indices.contiguous()
    tiles, words = (T + tile - 1) // tile, (num_keys + 31) // 32
    room = (bound + BLOCK - 1) // BLOCK * BLOCK
    union = indices.new_zeros((B, tiles, words), dtype=torch.int32)
    before = indices.new_empty((B, tiles, words), dtype=torch.int32)
    keys = indices.new_empty((B, tiles, room), dtype=torch.int32)
    number = indices.new_empty((B, tiles), dtype=torch.int32)
    bits = indices.new_zeros((B, tiles * tile, room // 32), dtype=torch.int32)
    sizes, constants = (J, num_keys, T), {"TILE": tile, "SLOTS": SLOT_TILE, "RUN": RUN, "num_warps": 4}
    launchable(mark_kernel, indices)[(B * T,)](indices, union, *sizes, tiles, words, **constants)
    launchable(list_kernel, indices)[(B * tiles,)](
        union, before, keys, number, words, room, most, BW=WORD_TILE, num_warps=4
    )
    launchable(pack_kernel, indices)[(B * T,)](
        indices, union, before, number, bits, *sizes, tiles * tile, tiles, words, room // 32, **constants
    )
    return Unions(bits, number, keys)


@on_its_device
def launch_masked(q: Tensor, k: Tensor, v: Tensor, unions: Unions, scale: float, *, o: Tensor, lse: Tensor) -> None:
    """Write attention under a mask to ``o`` and its log-sum-exps to ``lse``, of the tiles that have a union.

    Args:
        q, k, v, scale: arguments of `sparse_attention`, which has checked them.
        unions: the mask.
        o: output, ``[B, T, H, Dv]``, contiguous, in q's dtype.
        lse: output, ``[B, T, H]``, contiguous, float32.
    """
    constants = constants_of(q, k, v)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    tiles = tiles_of_keys(((64, 3), (64, 2), (32, 1)), constants, constants["BD"], 0, q)
    num_tiles = unions.keys.shape[1]
    launchable(masked_kernel, q)[(q.shape[0] * k.shape[2] * num_tiles,)](
        q, k, v, *unions, o, lse, float(scale), q.shape[1], *unions.sizes,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **constants, **tiles, num_stages=tiles["STAGES"],
    )  # fmt: skip
