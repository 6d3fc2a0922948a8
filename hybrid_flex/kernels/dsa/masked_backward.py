"""Attention to a selection as dense products under a mask of bits, backward.

With delta = do . o - dlse, and p = 0 where a query has not selected a key::

    p_tj = exp(scale q_t . k_j - lse_t)         e_tj = p_tj (do_t . v_j - delta_t)
    dq_t = scale sum_j e_tj k_j                 dk_j = scale sum_t e_tj q_t          dv_j = sum_t p_tj do_t

One kernel walks over the keys of a tile of queries and leaves dq and delta, the other over the queries of a block of
keys and leaves dk and dv.  Nothing is added to memory, so that bits repeat from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybrid_flex.kernels.launch import launchable, on_its_device

from .gather import LOG2_E, dense_rows, load_piece, store_piece
from .masked import (
    ROWS,
    Selection,
    Tiles,
    constants_of,
    is_selected,
    keys_of_part,
    tile_lists,
    tile_rows,
    tiles_of_keys,
)


@triton.jit(do_not_specialize=["T", "S", "PADDED", "WORDS", "TILES", "BLOCKS"])
def masked_queries_kernel(
    p_q, p_k, p_v, p_bits, p_number, p_order, p_o, p_lse, p_do, p_dlse, p_delta, p_dq, scale,
    T, S, PADDED, WORDS, TILES, BLOCKS,
    q_batch, q_token, q_head, do_batch, do_token, do_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute delta and dq of a tile of queries for the heads that share a key head."""
    i_batch, i_kv, i_tile, i_query, i_head, m_row = tile_rows(tl.program_id(0), TILES, H, HKV, BG, BM)
    i_batch = i_batch.to(tl.int64)
    m_row = (m_row & (i_query < T))[:, None]
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    p_words, number, p_order = tile_lists(
        p_bits, p_number, p_order, i_batch, i_tile, i_query, PADDED, WORDS, TILES, BLOCKS
    )
    i_token = i_query.to(tl.int64)
    i_out = ((i_batch * T + i_token) * H + i_head)[:, None]
    b_q = load_piece((p_q + i_batch * q_batch + i_token * q_token + i_head * q_head)[:, None], m_row, 0, BD, D, True)
    p_rows = (p_do + i_batch * do_batch + i_token * do_token + i_head * do_head)[:, None]
    b_do = load_piece(p_rows, m_row, 0, BV, V, True)
    b_o = load_piece(p_o + i_out * V, m_row, 0, BV, V, True)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)[:, None]
    b_delta -= tl.load(p_dlse + i_out, mask=m_row, other=0.0)
    tl.store(p_delta + i_out, b_delta, mask=m_row)
    b_lse = tl.load(p_lse + i_out, mask=m_row, other=0.0) * LOG2_E
    factor = tl.cast(scale, tl.float32) * LOG2_E
    i_column = tl.arange(0, BN)

    b_dq = tl.zeros([BM, BD], tl.float32)
    for i in tl.range(0, number * (BLOCK // BN), num_stages=STAGES):
        first, i_key = keys_of_part(p_order, i, S, BN, BLOCK)
        b_k = load_piece(p_k + i_key * k_row, None, 0, BD, D, False)
        b_v = load_piece(p_v + i_key * v_row, None, 0, BV, V, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_s = is_selected(p_words + first // 32, i_column[None, :], BN)
        b_p = tl.where(m_s, tl.exp2(b_s * factor - b_lse), 0.0)
        b_e = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - b_delta)
        b_dq = tl.dot(b_e.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    store_piece(p_dq + i_out * D, b_dq * tl.cast(scale, tl.float32), m_row, 0, BD, D)


@triton.jit(do_not_specialize=["T", "S", "PADDED", "WORDS", "TILES", "BLOCKS"])
def masked_keys_kernel(
    p_q, p_k, p_v, p_bits, p_number, p_order, p_lse, p_do, p_delta, p_dk, p_dv, scale,
    T, S, PADDED, WORDS, TILES, BLOCKS,
    q_batch, q_token, q_head, do_batch, do_token, do_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of BN keys; ``p_number [B, BLOCKS]`` and ``p_order [B, BLOCKS, TILES]`` name tiles of queries.

    Products are transposed, keys by queries, so that their results are the left operands of the next ones.
    """
    G: tl.constexpr = H // HKV
    PARTS: tl.constexpr = BLOCK // BN
    i_program = tl.program_id(0)
    # Early keys, which more queries see, run first.
    i_part = i_program % (BLOCKS * PARTS)
    i_kv = (i_program // (BLOCKS * PARTS) % HKV).to(tl.int64)
    i_batch = (i_program // (BLOCKS * PARTS * HKV)).to(tl.int64)
    i_block = i_part // PARTS
    p_number += i_batch * BLOCKS + i_block
    p_order += (i_batch * BLOCKS + i_block) * TILES
    p_q += i_batch * q_batch
    p_do += i_batch * do_batch
    p_bits += i_batch * PADDED * WORDS + i_part * (BN // 32)
    i_row = tl.arange(0, BM)
    i_head = i_kv * G + i_row % BG
    i_column = tl.arange(0, BN)
    i_key = (i_part * BN + i_column).to(tl.int64)[:, None]
    m_key = i_key < S
    b_k = load_piece(p_k + i_batch * k_batch + i_kv * k_head + i_key * k_row, m_key, 0, BD, D, True)
    b_v = load_piece(p_v + i_batch * v_batch + i_kv * v_head + i_key * v_row, m_key, 0, BV, V, True)
    factor = tl.cast(scale, tl.float32) * LOG2_E

    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BV], tl.float32)
    STEPS: tl.constexpr = ROWS // BM
    for i in tl.range(0, tl.load(p_number) * STEPS, num_stages=STAGES):
        i_query = tl.load(p_order + i // STEPS) * (ROWS // BG) + i % STEPS * (BM // BG) + i_row // BG
        m_row = (i_row % BG < G) & (i_query < T)
        # No bit of a padded query is set; the last row stands for it, and the first head for one that is not there.
        i_token = tl.minimum(i_query, T - 1).to(tl.int64)
        i_own = tl.where(m_row, i_head, i_kv * G)
        i_out = (i_batch * T + i_token) * H + i_own
        b_q = load_piece((p_q + i_token * q_token + i_own * q_head)[:, None], None, 0, BD, D, False)
        b_do = load_piece((p_do + i_token * do_token + i_own * do_head)[:, None], None, 0, BV, V, False)
        b_lse = tl.load(p_lse + i_out)[None, :] * LOG2_E
        b_delta = tl.load(p_delta + i_out)[None, :]
        m_s = is_selected((p_bits + i_query.to(tl.int64) * WORDS)[None, :], i_column[:, None], BN)
        if BG > G:
            m_s = m_s & m_row[None, :]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_p = tl.where(m_s, tl.exp2(b_s * factor - b_lse), 0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_e = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - b_delta)
        b_dk = tl.dot(b_e.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    p_rows = (i_batch * S + i_key) * HKV + i_kv
    store_piece(p_dk + p_rows * D, b_dk * tl.cast(scale, tl.float32), m_key, 0, BD, D)
    store_piece(p_dv + p_rows * V, b_dv, m_key, 0, BV, V)


def tiles_of_queries(group: int) -> Tiles:
    """Choose the rows that masked_keys_kernel takes at once; ``group`` heads, padded, are never divided."""
    BM = max(64, group)
    return {"BM": BM, "BN": 64, "STAGES": 2 if BM == 64 else 1, "num_warps": 4 if BM == 64 else 8}


@on_its_device
def launch_masked_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, selection: Selection, by_keys: tuple[Tensor, Tensor],
    o: Tensor, lse: Tensor, scale: float, *, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v.

    Args:
        do, dlse: gradients of the outputs.
        q, k, v, selection, scale: arguments of the forward.
        by_keys: ``number [B, BLOCKS]`` and ``order [B, BLOCKS, TILES]`` of the tiles of queries that touch a block.
        o, lse: outputs of the forward.
        dq, dk, dv: outputs, contiguous, of the shapes and dtypes of q, k and v.
    """
    constants = constants_of(q, k, v)
    do, q, k, v = (dense_rows(x) for x in (do, q, k, v))
    dlse, o, lse = (x.contiguous() for x in (dlse, o, lse))
    delta = lse.new_empty(lse.shape)
    strides = (*q.stride()[:3], *do.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    numbers = (float(scale), q.shape[1], k.shape[1], *selection.sizes)
    (B, HKV), (_, _, num_tiles, num_blocks) = (q.shape[0], k.shape[2]), selection.sizes
    tiles = tiles_of_keys(((64, 2), (32, 2), (32, 1)), constants, constants["BD"] + constants["BV"], q)
    launchable(masked_queries_kernel, q)[(B * HKV * num_tiles,)](
        q, k, v, *selection, o, lse, do, dlse, delta, dq, *numbers, *strides, **constants, **tiles,
        num_stages=tiles["STAGES"],
    )  # fmt: skip
    tiles = tiles_of_queries(constants["BG"])
    parts = constants["BLOCK"] // tiles["BN"]
    launchable(masked_keys_kernel, q)[(B * HKV * num_blocks * parts,)](
        q, k, v, selection.bits, *by_keys, lse, do, delta, dk, dv, *numbers, *strides, **constants, ROWS=ROWS, **tiles,
        num_stages=tiles["STAGES"],
    )  # fmt: skip
