"""Attention to a selection as dense products under a mask of bits, backward.

With delta = do . o - dlse, over the union u_0 < u_1 < ... of what a tile's queries have selected (NOTE [Unions] in
masked.py), and p = 0 where a query has not selected a key::

    p_tj = exp(scale q_t . k_{u_j} - lse_t)         e_tj = p_tj (do_t . v_{u_j} - delta_t)
    dq_t = scale sum_j e_tj k_{u_j}
    dk_{u_j} += scale sum_t e_tj q_t                dv_{u_j} += sum_t p_tj do_t

One program walks over the union of a tile of queries; what a tile gives to a key is added to memory once for all of its
queries and heads, in whatever order the tiles come.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybrid_flex.kernels.launch import launchable, on_its_device

from .gather import LOG2_E, dense_rows, load_piece, load_slots, row_pointers, store_piece
from .gather_backward import add_rows
from .masked import Unions, constants_of, is_selected, tile_rows, tile_union, tiles_of_keys


@triton.jit(do_not_specialize=["T", "S", "PADDED", "CHOSEN", "TILES", "ROOM"])
def masked_backward_kernel(
    p_q, p_k, p_v, p_bits, p_number, p_keys, p_o, p_lse, p_do, p_dlse, p_dq, p_dk, p_dv, scale,
    T, S, PADDED, CHOSEN, TILES, ROOM,
    q_batch, q_token, q_head, do_batch, do_token, do_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dq of a tile of queries for the heads that share a key head, and add what they give to dk and dv."""
    i_batch, i_kv, i_tile, i_query, i_head, m_row = tile_rows(tl.program_id(0), TILES, H, HKV, BG, BM)
    i_batch = i_batch.to(tl.int64)
    m_row = (m_row & (i_query < T))[:, None]
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    p_dk += (i_batch * S * HKV + i_kv) * D
    p_dv += (i_batch * S * HKV + i_kv) * V
    p_words, number, p_keys, last_key = tile_union(
        p_bits, p_number, p_keys, i_batch, i_tile, i_query, PADDED, CHOSEN, TILES, ROOM
    )
    i_token = i_query.to(tl.int64)
    i_out = ((i_batch * T + i_token) * H + i_head)[:, None]
    b_q = load_piece((p_q + i_batch * q_batch + i_token * q_token + i_head * q_head)[:, None], m_row, 0, BD, D, True)
    p_rows = (p_do + i_batch * do_batch + i_token * do_token + i_head * do_head)[:, None]
    b_do = load_piece(p_rows, m_row, 0, BV, V, True)
    b_o = load_piece(p_o + i_out * V, m_row, 0, BV, V, True)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)[:, None]
    b_delta -= tl.load(p_dlse + i_out, mask=m_row, other=0.0)
    b_lse = tl.load(p_lse + i_out, mask=m_row, other=0.0) * LOG2_E
    scale = tl.cast(scale, tl.float32)
    factor = scale * LOG2_E
    i_key_column, i_value_column = tl.arange(0, BD)[None, :], tl.arange(0, BV)[None, :]

    b_dq = tl.zeros([BM, BD], tl.float32)
    for j in tl.range(0, number, BN, num_stages=STAGES):
        b_key = load_slots(p_keys, j, number, BN)
        b_k = load_piece(row_pointers(p_k, b_key, last_key, k_row), None, 0, BD, D, False)
        b_v = load_piece(row_pointers(p_v, b_key, last_key, v_row), None, 0, BV, V, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_s = is_selected(p_words + j // 32, BN)
        # A head without keys has lse = -inf, and no key that is asked for its weight.
        b_p = tl.where(m_s, tl.exp2(b_s * factor - b_lse), 0.0)
        b_e = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - b_delta)
        b_p, b_e = b_p.to(b_v.dtype), b_e.to(b_k.dtype)
        b_dv = tl.dot(tl.trans(b_p), b_do, input_precision=PRECISION)
        add_rows(row_pointers(p_dv, b_key, last_key, HKV * V), b_dv, b_key, i_value_column, V, V == BV)
        b_dq = tl.dot(b_e, b_k, b_dq, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans(b_e), b_q, input_precision=PRECISION) * scale
        add_rows(row_pointers(p_dk, b_key, last_key, HKV * D), b_dk, b_key, i_key_column, D, D == BD)
    m_row = m_row & (number >= 0)  # the gather form writes the others
    store_piece(p_dq + i_out * D, b_dq * scale, m_row, 0, BD, D)


@on_its_device
def launch_masked_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, unions: Unions, o: Tensor, lse: Tensor, scale: float,
    *, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write dq of the tiles that have a union, and add what they give to dk and dv.

    Args:
        do, dlse: gradients of the outputs.
        q, k, v, unions, scale: arguments of the forward.
        o, lse: outputs of the forward.
        dq: output, contiguous, of q's shape and dtype.
        dk, dv: float32 ``[B, S, Hkv, D]`` and ``[B, S, Hkv, Dv]``, contiguous.
    """
    constants = constants_of(q, k, v)
    do, q, k, v = (dense_rows(x) for x in (do, q, k, v))
    dlse, o, lse = (x.contiguous() for x in (dlse, o, lse))
    strides = (*q.stride()[:3], *do.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    tiles = tiles_of_keys(((64, 2), (64, 1), (32, 1)), constants, constants["BD"] + constants["BV"], 1, q)
    launchable(masked_backward_kernel, q)[(q.shape[0] * k.shape[2] * unions.keys.shape[1],)](
        q, k, v, *unions, o, lse, do, dlse, dq, dk, dv, float(scale), q.shape[1], k.shape[1], *unions.sizes, *strides,
        **constants, **tiles, num_stages=tiles["STAGES"],
    )  # fmt: skip
