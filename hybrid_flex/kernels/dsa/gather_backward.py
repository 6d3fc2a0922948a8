"""Attention over selected rows, backward.

With delta = do . o - dlse, x_j the selected row of x, and a head's slots j::

    p_j  = exp(scale q . k_j - lse)             e_j = p_j (do . v_j - delta)
    dq   = scale sum_j e_j k_j                  dk_j += scale sum_heads e_j q           dv_j += sum_heads p_j do

Where rows are narrow one kernel does all of it.  Of wide rows the weights of a piece of the queries come first
(weights_kernel leaves p and e in a workspace, in q's dtype), then everything else by columns (rows_kernel).  That the
scale comes last keeps e away from float16's smallest numbers.

# NOTE [Slices of columns]
The gradient of one token's queries, 64 x 576 sums of float32, does not fit the registers beside the rest, and so many
of every selected row are added to memory.  By slices of columns the sums are few, and the weights are read again for
each: 256 bytes a token and key with 64 heads and 16 bits, where 512 bytes are added.  All tokens of a slice run before
the next slice begins: of the gradients of 32,768 rows one slice of 128 columns is 16 MiB, which stays in the cache of
an H100, and the whole, 72 MiB, does not.

# NOTE [One sum]
Atomics bound all of this (2.3 TB/s on an H100).  Where the caller says that the values are the first columns of the
keys, both gradients are one sum, and are added to memory once.  Elsewhere each argument gets its own.

# NOTE [Sums apart]
The products of a row's pieces are added after they are scaled, not accumulated one onto the other: Triton gives a
product that another one follows to all warps of a tile of 64 heads twice, and 72 bytes a thread were spilled.

# NOTE [Pieces of queries]
The workspace holds both weights of as many tokens as fit `WORKSPACE_BYTES`; longer inputs take several rounds.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from hybrid_flex.kernels.launch import (
    HOPPER_BYTES,
    NARROWEST,
    device_limits,
    launchable,
    next_power_of_2,
    on_its_device,
)

from .gather import (
    LOG2_E,
    NOTHING_DONE,
    Done,
    Widths,
    dense_rows,
    is_done,
    load_piece,
    load_slots,
    look_through,
    place,
    row_pointers,
    sizes_of,
    token_rows,
    used_slots,
)

WORKSPACE_BYTES = 256 * 2**20
"""NOTE [Pieces of queries]: 256 tokens of 128 heads and 2048 slots, 512 blocks for the 132 processors of an H100."""
SLOT_TILE = 64
"""Rows of the workspace are padded to whole tiles of slots."""
SLICE = 128
WIDEST_NARROW = 128
"""Columns of rows that narrow_kernel takes."""
MOST_ROWS = 128
"""Heads that one program of rows_kernel adds up before it adds to memory; more take several."""


@triton.jit
def load_slice(
    p_rows, c0, m_rows, WIDTH: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Load BC columns from ``c0`` on of rows ``[N, 1]`` of WIDTH; zeros outside, and where ``m_rows`` is false.

    WHOLE says that no row ends inside of the columns, which need no mask then.
    """
    if WHOLE:
        b_x = load_piece(p_rows + c0, m_rows, 0, BC, BC, MASKED)
    else:
        i_column = c0 + tl.arange(0, BC)[None, :]
        if MASKED:
            b_x = tl.load(p_rows + i_column, mask=m_rows & (i_column < WIDTH), other=0.0)
        else:
            b_x = tl.load(p_rows + i_column, mask=i_column < WIDTH, other=0.0)
    return b_x


@triton.jit
def load_weights(p_w, m_head, MASKED: tl.constexpr):
    if MASKED:
        b_w = tl.load(p_w, mask=m_head, other=0.0)
    else:
        b_w = tl.load(p_w)
    return b_w


@triton.jit
def add_rows(p_rows, b_x, b_slot, i_column, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Add b_x to columns ``i_column [1, N]`` of the rows whose slots are in use."""
    m_row = (b_slot >= 0)[:, None]
    if WHOLE:
        tl.atomic_add(p_rows + i_column, b_x, mask=m_row, sem="relaxed")
    else:
        tl.atomic_add(p_rows + i_column, b_x, mask=m_row & (i_column < WIDTH), sem="relaxed")


@triton.jit
def _delta(p_o, b_do, i_row, m_head, FIRST: tl.constexpr, PIECE: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr):
    b_o = load_piece(p_o + i_row * V, m_head, FIRST, PIECE, V, MASKED)
    return tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)


@triton.jit(do_not_specialize=["num_tokens", "T", "J", "first", "BLOCKS"])
def weights_kernel(
    p_q, p_k, p_v, p_slots, p_done, p_o, p_lse, p_do, p_dlse, p_p, p_e, scale, num_tokens, T, J, first, BLOCKS,
    q_batch, q_token, q_head, do_batch, do_token, do_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr, REST: tl.constexpr, VPIECE: tl.constexpr, VPIECES: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, SLOT_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute p and e of one token, from ``first`` on, for a tile of heads: ``[token, H, BLOCKS, SLOT_TILE]``.

    Here and below, if TILE > 0 nothing is done for a token that `is_done`.
    """
    i_token, i_batch, i_kv, i_row, m_head = place(tl.program_id(0), num_tokens, T, first, H, HKV, BH)
    MASKED: tl.constexpr = (H // HKV) % BH != 0
    if TILE > 0:  # noqa: SIM102
        if is_done(p_done, i_token, i_batch, T, TILE):
            return
    p_slots += i_token * J
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    number, has_gaps, last_row = look_through(p_slots, J)
    factor = tl.cast(scale, tl.float32) * LOG2_E

    p_rows = token_rows(p_do, i_token, i_batch, i_row, T, do_batch, do_token, do_head, H)
    b_do0 = load_piece(p_rows, m_head, 0, VPIECE, V, MASKED)
    b_delta = _delta(p_o, b_do0, i_row, m_head, 0, VPIECE, V, MASKED)
    if VPIECES > 1:
        b_do1 = load_piece(p_rows, m_head, VPIECE, VPIECE, V, MASKED)
        b_delta += _delta(p_o, b_do1, i_row, m_head, VPIECE, VPIECE, V, MASKED)
    b_delta = b_delta[:, None] - tl.load(p_dlse + i_row, mask=m_head, other=0.0)
    b_lse = tl.load(p_lse + i_row, mask=m_head, other=0.0) * LOG2_E
    p_rows = token_rows(p_q, i_token, i_batch, i_row, T, q_batch, q_token, q_head, H)
    b_q0 = load_piece(p_rows, m_head, 0, PIECE, D, MASKED)
    if PIECES > 1:
        b_q1 = load_piece(p_rows, m_head, PIECE, PIECE, D, MASKED)
    if REST > 0:
        b_q2 = load_piece(p_rows, m_head, PIECES * PIECE, REST, D, MASKED)

    i_column = tl.arange(0, BN)[None, :]
    o_row = (i_row - tl.cast(first, tl.int64) * H) * BLOCKS * SLOT_TILE + i_column
    # Whole tiles of the workspace are written, which rows_kernel may read in larger ones.
    end = (number + SLOT_TILE - 1) // SLOT_TILE * SLOT_TILE
    for j in tl.range(0, end, BN, num_stages=STAGES):
        b_slot = load_slots(p_slots, j, number, BN)
        p_keys = row_pointers(p_k, b_slot, last_row, k_row)
        b_k0 = load_piece(p_keys, None, 0, PIECE, D, False)
        # NOTE [Sums apart]
        b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION) * factor - b_lse
        if PIECES > 1:
            b_k1 = load_piece(p_keys, None, PIECE, PIECE, D, False)
            b_s += tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION) * factor
        if REST > 0:
            b_k2 = load_piece(p_keys, None, PIECES * PIECE, REST, D, False)
            b_s += tl.dot(b_q2, tl.trans(b_k2), input_precision=PRECISION) * factor
        # A head without keys has lse = -inf, and no slot that is asked for its weight.
        m_slot = used_slots(p_slots, j, number, has_gaps, BN)[None, :]
        b_p = tl.where(m_slot, tl.exp2(b_s), 0.0)
        tl.store(p_p + o_row + j, b_p.to(p_p.dtype.element_ty), mask=m_head)

        if SHARED:
            b_v0 = b_k0
        else:
            p_values = row_pointers(p_v, b_slot, last_row, v_row)
            b_v0 = load_piece(p_values, None, 0, VPIECE, V, False)
        b_e = b_p * (tl.dot(b_do0, tl.trans(b_v0), input_precision=PRECISION) - b_delta)
        if VPIECES > 1:
            if SHARED:
                b_v1 = b_k1
            else:
                b_v1 = load_piece(p_values, None, VPIECE, VPIECE, V, False)
            b_e += b_p * tl.dot(b_do1, tl.trans(b_v1), input_precision=PRECISION)
        tl.store(p_e + o_row + j, b_e.to(p_e.dtype.element_ty), mask=m_head)


@triton.jit(do_not_specialize=["S", "T", "J", "first", "num_tokens", "BLOCKS", "first_slice"])
def rows_kernel(
    p_e, p_p, p_q, p_do, p_k, p_slots, p_done, p_dx, p_dq, scale, S, T, J, first, num_tokens, BLOCKS, first_slice,
    q_batch, q_token, q_head, do_batch, do_token, do_head, k_batch, k_row, k_head,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, BH: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, SLOT_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add to the selected rows of dx ``[B, S, HKV, WIDTH]``: one token, a slice of columns from ``first_slice`` on.

    KEYS adds ``scale sum_heads e_j q`` and computes the slice of dq as well, VALUES adds ``sum_heads p_j do``.
    """
    G: tl.constexpr = H // HKV
    TILES: tl.constexpr = (G + BH - 1) // BH
    programs = num_tokens * (TILES * HKV)
    c0 = (first_slice + tl.program_id(0) // programs) * BC
    i_token, i_batch, i_kv, i_row, m_head = place(tl.program_id(0) % programs, num_tokens, T, first, H, HKV, BH)
    MASKED: tl.constexpr = G % BH != 0
    if TILE > 0:  # noqa: SIM102
        if is_done(p_done, i_token, i_batch, T, TILE):
            return
    p_slots += i_token * J
    number, _, last_row = look_through(p_slots, J)
    scale = tl.cast(scale, tl.float32)

    i_column = c0 + tl.arange(0, BC)[None, :]
    if KEYS:
        p_rows = token_rows(p_q, i_token, i_batch, i_row, T, q_batch, q_token, q_head, H)
        b_q = load_slice(p_rows, c0, m_head, D, BC, WHOLE, MASKED)
        p_k += i_batch * k_batch + i_kv * k_head
        b_dq = tl.zeros([BH, BC], tl.float32)
    if VALUES:
        p_rows = token_rows(p_do, i_token, i_batch, i_row, T, do_batch, do_token, do_head, H)
        b_do = load_slice(p_rows, c0, m_head, V, BC, WHOLE, MASKED)
    p_dx += (i_batch * S * HKV + i_kv) * WIDTH
    o_w = (i_row - tl.cast(first, tl.int64) * H) * BLOCKS * SLOT_TILE + tl.arange(0, BN)[None, :]
    for j in tl.range(0, number, BN, num_stages=STAGES):
        b_slot = load_slots(p_slots, j, number, BN)
        if KEYS:
            b_e = load_weights(p_e + o_w + j, m_head, MASKED)
            b_k = load_slice(row_pointers(p_k, b_slot, last_row, k_row), c0, None, D, BC, WHOLE, False)
            b_dq = tl.dot(b_e, b_k, b_dq, input_precision=PRECISION)
            b_dx = tl.dot(tl.trans(b_e), b_q, input_precision=PRECISION) * scale
            if VALUES:
                b_p = load_weights(p_p + o_w + j, m_head, MASKED)
                b_dx += tl.dot(tl.trans(b_p), b_do, input_precision=PRECISION)
        else:
            b_p = load_weights(p_p + o_w + j, m_head, MASKED)
            b_dx = tl.dot(tl.trans(b_p), b_do, input_precision=PRECISION)
        add_rows(row_pointers(p_dx, b_slot, last_row, HKV * WIDTH), b_dx, b_slot, i_column, WIDTH, WHOLE)
    if KEYS:
        p_dq += i_row * D + i_column
        tl.store(p_dq, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_head & (i_column < D))


@triton.jit(do_not_specialize=["num_tokens", "S", "T", "J"])
def narrow_kernel(
    p_q, p_k, p_v, p_slots, p_done, p_o, p_lse, p_do, p_dlse, p_dq, p_dk, p_dv, scale, num_tokens, S, T, J,
    q_batch, q_token, q_head, do_batch, do_token, do_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr, REST: tl.constexpr, VPIECE: tl.constexpr, VPIECES: tl.constexpr,
    SHARED: tl.constexpr, ONE_SUM: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute dq of one token for a tile of heads, and add what it gives to dk and dv: rows of one piece each."""
    i_token, i_batch, i_kv, i_row, m_head = place(tl.program_id(0), num_tokens, T, 0, H, HKV, BH)
    MASKED: tl.constexpr = (H // HKV) % BH != 0
    if TILE > 0:  # noqa: SIM102
        if is_done(p_done, i_token, i_batch, T, TILE):
            return
    p_slots += i_token * J
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    p_dk += (i_batch * S * HKV + i_kv) * D
    p_dv += (i_batch * S * HKV + i_kv) * V
    number, has_gaps, last_row = look_through(p_slots, J)
    scale = tl.cast(scale, tl.float32)
    p_rows = token_rows(p_q, i_token, i_batch, i_row, T, q_batch, q_token, q_head, H)
    b_q = load_piece(p_rows, m_head, 0, PIECE, D, MASKED)
    p_rows = token_rows(p_do, i_token, i_batch, i_row, T, do_batch, do_token, do_head, H)
    b_do = load_piece(p_rows, m_head, 0, VPIECE, V, MASKED)
    b_delta = _delta(p_o, b_do, i_row, m_head, 0, VPIECE, V, MASKED)[:, None]
    b_delta -= tl.load(p_dlse + i_row, mask=m_head, other=0.0)
    b_lse = tl.load(p_lse + i_row, mask=m_head, other=0.0) * LOG2_E
    i_column, i_value = tl.arange(0, PIECE)[None, :], tl.arange(0, VPIECE)[None, :]
    b_dq = tl.zeros([BH, PIECE], tl.float32)
    for j in tl.range(0, number, BN, num_stages=STAGES):
        b_slot = load_slots(p_slots, j, number, BN)
        b_k = load_piece(row_pointers(p_k, b_slot, last_row, k_row), None, 0, PIECE, D, False)
        if SHARED:
            b_v = b_k
        else:
            b_v = load_piece(row_pointers(p_v, b_slot, last_row, v_row), None, 0, VPIECE, V, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E) - b_lse
        # A head without keys has lse = -inf, and no slot that is asked for its weight.
        b_p = tl.where(used_slots(p_slots, j, number, has_gaps, BN)[None, :], tl.exp2(b_s), 0.0)
        b_e = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - b_delta)
        b_p, b_e = b_p.to(p_q.dtype.element_ty), b_e.to(p_q.dtype.element_ty)
        b_dq = tl.dot(b_e, b_k, b_dq, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans(b_e), b_q, input_precision=PRECISION) * scale
        b_dv = tl.dot(tl.trans(b_p), b_do, input_precision=PRECISION)
        if ONE_SUM:  # NOTE [One sum]: the rows have one width
            b_dk += b_dv
        add_rows(row_pointers(p_dk, b_slot, last_row, HKV * D), b_dk, b_slot, i_column, D, D == PIECE)
        if not ONE_SUM:
            add_rows(row_pointers(p_dv, b_slot, last_row, HKV * V), b_dv, b_slot, i_value, V, V == VPIECE)
    p_dq += i_row * D + i_column
    tl.store(p_dq, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_head & (i_column < D))


def weight_tiles(group: int, width: Widths, element_size: int, limit: int) -> dict[str, int]:
    """Choose tiles of weights_kernel, whose queries and output gradients stay in shared memory beside one tile of
    rows."""
    # Where operands do not stay in shared memory, as they do from compute capability 9.0 on, 64 heads would spill.
    most = 16 if element_size == 4 else min(64 if limit >= HOPPER_BYTES else 32, max(16, next_power_of_2(group)))
    held = width.key_columns + width.VPIECE * width.VPIECES
    choices = [(most, 64, 2), (most, 64, 1), (32, 64, 1), (16, 64, 2), (16, 64, 1), (16, 32, 1)]
    if element_size == 4:
        choices = [(16, 32, 1)]
    fitting = [
        (BH, BN, stages)
        for BH, BN, stages in choices
        if most >= BH and (BH * held + stages * BN * width.loaded_columns) * element_size + 1024 <= limit
    ]
    BH, BN, stages = fitting[0] if fitting else (16, 16, 1)
    return {"BH": BH, "BN": BN, "STAGES": stages, "num_warps": 8 if BH * held > 16384 else 4}


def row_tiles(group: int, columns: int, num_weights: int, element_size: int, limit: int) -> dict[str, int]:
    """Choose tiles of rows_kernel for a row of so many columns; two blocks side by side where that is possible."""
    BH = min(MOST_ROWS, max(16, next_power_of_2(group)))
    if element_size == 4:
        return {"BH": min(BH, 32), "BN": 32, "BC": NARROWEST, "STAGES": 1, "num_warps": 4}
    # With few rows three small blocks side by side hide more of what they wait for than one large one.
    BN, BC = 64, NARROWEST if columns <= NARROWEST or (BH <= 64 and num_weights > 1) else SLICE
    # The sums of a tile pass through shared memory, in float32, on their way to the rows.
    stages = {n: num_weights * (BH * BC + n * BN * (BH + BC)) * element_size + 4 * BN * BC + 1024 for n in (3, 2)}
    fitting = [n for bound in (limit // 2, limit) for n in stages if stages[n] <= bound]
    num_warps = 8 if BH * BC >= 8192 else 4
    return {"BH": BH, "BN": BN, "BC": BC, "STAGES": fitting[0] if fitting else 1, "num_warps": num_warps}


def narrow_tiles(group: int, width: Widths, element_size: int, limit: int) -> dict[str, int] | None:
    """Choose tiles of narrow_kernel, or None where rows are too wide for it."""
    if width.REST > 0 or max(width.PIECE, width.VPIECE) > WIDEST_NARROW or width.PIECES * width.VPIECES > 1:
        return None
    if element_size == 4:
        return {"BH": 16, "BN": 32, "STAGES": 1, "num_warps": 4}
    # 64 rows of a tile are given to eight warps twice, and do not fit the registers of four.
    BH, BN = min(64, max(16, next_power_of_2(group))), 32
    held = BH * (width.PIECE + width.VPIECE) + 2 * BH * BN
    sums = 4 * BN * max(width.PIECE, width.VPIECE)
    sizes = {n: (held + n * BN * width.loaded_columns) * element_size + sums + 1024 for n in (2, 1)}
    fitting = [n for n in sizes if sizes[n] <= limit and not (n == 2 and width.SHARED)]
    return {"BH": BH, "BN": BN, "STAGES": fitting[0], "num_warps": 4} if fitting else None


@on_its_device
def launch_gather_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, o: Tensor, lse: Tensor, scale: float,
    done: Done = NOTHING_DONE, *, dq: Tensor, dk: Tensor, dv: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradient of q to ``dq``, and add those of k and v to ``dk`` and ``dv``.

    The order of the additions, and so the last bits of dk and dv, change from run to run.

    Args:
        do, dlse: gradients of the outputs.
        q, k, v, indices, scale: arguments of the forward.
        o, lse: its outputs.
        done: what another form has done.
        dq: output, ``[B, T, H, D]``, contiguous, in q's dtype.
        dk: float32 ``[B, S, Hkv, D]``, contiguous, zero before.
        dv: float32 ``[B, S, Hkv, Dv]``, contiguous, zero before; None where v is the first columns of k, whose gradient
            is then that of both.
    """
    constants, width = sizes_of(q, k, v)
    do, q, k = (dense_rows(x) for x in (do, q, k))
    v = k if width.SHARED else dense_rows(v)
    dlse, indices, o, lse = (x.contiguous() for x in (dlse, indices, o, lse))
    H, HKV, D, V = (constants[name] for name in ("H", "HKV", "D", "V"))
    group, size, limit = H // HKV, q.element_size(), device_limits(q.device)[0]
    (B, T), J, S = q.shape[:2], indices.shape[2], k.shape[1]
    strides = (*q.stride()[:3], *do.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    p_done = done.pointer(indices)
    tiles = narrow_tiles(group, width, size, limit)
    if tiles is not None and (dv is not None or D == V):
        launchable(narrow_kernel, q)[(B * T * HKV * -(-group // tiles["BH"]),)](
            q, k, v, indices, p_done, o, lse, do, dlse, dq, dk, dk if dv is None else dv, float(scale), B * T, S, T,
            J, *strides, **constants, ONE_SUM=dv is None, **tiles, TILE=done.tile, num_stages=tiles["STAGES"],
        )  # fmt: skip
        return
    blocks = -(-J // SLOT_TILE)
    # NOTE [Pieces of queries]
    most = max(1, WORKSPACE_BYTES // max(1, 2 * H * blocks * SLOT_TILE * size))
    p, e = q.new_empty(2, min(most, B * T), H, blocks, SLOT_TILE)
    tiles = weight_tiles(group, width, size, limit)
    for first in range(0, B * T, most):
        number = min(most, B * T - first)
        launchable(weights_kernel, q)[(number * HKV * -(-group // tiles["BH"]),)](
            q, k, v, indices, p_done, o, lse, do, dlse, p, e, float(scale), number, T, J, first, blocks, *strides,
            **constants, **tiles, SLOT_TILE=SLOT_TILE, TILE=done.tile, num_stages=tiles["STAGES"],
        )  # fmt: skip
        for dx, begin, end, of_keys, of_values in _sums(dk, dv, D, V):
            cut = row_tiles(group, end - begin, of_keys + of_values, size, limit)
            whole = (end - begin) % cut["BC"] == 0 and (not of_values or end <= V)
            grid = (-(-(end - begin) // cut["BC"]) * number * HKV * -(-group // cut["BH"]),)
            launchable(rows_kernel, q)[grid](
                e, p, q, do, k, indices, p_done, dx, dq, float(scale), S, T, J, first, number, blocks,
                begin // cut["BC"], *strides[:9], H=H, HKV=HKV, D=D, V=V, WIDTH=int(dx.shape[3]), WHOLE=whole,
                KEYS=of_keys, VALUES=of_values, PRECISION=constants["PRECISION"], SLOT_TILE=SLOT_TILE, **cut,
                TILE=done.tile, num_stages=cut["STAGES"],
            )  # fmt: skip


def _sums(dk: Tensor, dv: Tensor | None, D: int, V: int) -> Iterator[tuple[Tensor, int, int, bool, bool]]:
    """Yield what rows_kernel adds to, columns from and up to, and whether gradients of keys and of values go there."""
    if dv is not None:
        yield dk, 0, D, True, False
        yield dv, 0, V, False, True
        return
    if V % SLICE > 0:  # a slice with columns of both
        V = D
    yield dk, 0, V, True, True
    if D > V:
        yield dk, V, D, True, False
