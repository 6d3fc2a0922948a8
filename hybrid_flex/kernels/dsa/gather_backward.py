"""Attention over selected rows, backward: weights of a piece of the queries first, then everything by columns.

With delta = do . o - dlse, x_j the selected row of x, and a head's slots j::

    p_j  = exp(scale q . k_j - lse)             e_j = p_j (do . v_j - delta)            weights_kernel
    dq   = scale sum_j e_j k_j                  dk_j += scale sum_heads e_j q           rows_kernel, slices of D
    dv_j += sum_heads p_j do                                                            rows_kernel, slices of V

p and e are left in a workspace, in q's dtype.  That the scale comes last keeps e away from float16's smallest numbers.

# NOTE [Slices of columns]
The gradient of one token's queries, 64 x 576 sums of float32, does not fit the registers beside the rest, and its
1088 of every selected row are added to memory.  By slices of columns the sums are few, and the weights are read again
for each: 128 bytes a token and key with 64 heads and 16 bits, where 512 bytes are added.  All tokens of a slice run
before the next slice begins: of the gradients of 32,768 rows one slice of 128 columns is 16 MiB, which stays in the
cache of an H100, and the whole, 136 MiB, does not.

# NOTE [Two sums]
Gradients of keys and values are added up apart from each other, also where the values are the first columns of the
keys: the operator owes one to each argument, although their sum is all that reaches the tensor below.

# NOTE [Sums apart]
The products of a row's pieces are added after they are scaled, not accumulated one onto the other: Triton gives a
product that another one follows to all warps of a tile of 64 heads twice, and 72 bytes a thread were spilled.

# NOTE [Pieces of queries]
The workspace holds both weights of as many tokens as fit `WORKSPACE_BYTES`; longer inputs take several rounds.
"""

from __future__ import annotations

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
    Widths,
    dense_rows,
    load_piece,
    load_slots,
    look_through,
    place,
    row_pointers,
    sizes_of,
    used_slots,
)

WORKSPACE_BYTES = 256 * 2**20
"""NOTE [Pieces of queries]: 256 tokens of 128 heads and 2048 slots, 512 blocks for the 132 processors of an H100."""
SLOT_TILE = 64
"""Rows of the workspace are padded to whole tiles of slots."""
SLICE = 128
MOST_ROWS = 128
"""Heads that one program of rows_kernel adds up before it adds to memory; more take several."""


@triton.jit
def _delta(p_o, b_do, i_row, m_head, FIRST: tl.constexpr, PIECE: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr):
    b_o = load_piece(p_o + i_row * V, m_head, FIRST, PIECE, V, MASKED)
    return tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)


@triton.jit(do_not_specialize=["T", "J", "first", "BLOCKS"])
def weights_kernel(
    p_q, p_k, p_v, p_slots, p_o, p_lse, p_do, p_dlse, p_p, p_e, scale, T, J, first, BLOCKS,
    k_batch, k_row, k_head, v_batch, v_row, v_head,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr, REST: tl.constexpr, VPIECE: tl.constexpr, VPIECES: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, SLOT_TILE: tl.constexpr,
):  # fmt: skip
    """Compute p and e of one token, from ``first`` on, for a tile of heads: ``[token, H, BLOCKS, SLOT_TILE]``."""
    G: tl.constexpr = H // HKV
    TILES: tl.constexpr = (G + BH - 1) // BH
    i_program = tl.program_id(0) + tl.cast(first, tl.int64) * (TILES * HKV)
    i_token, i_batch, i_kv, i_row, m_head = place(i_program, T, H, HKV, BH)
    MASKED: tl.constexpr = G % BH != 0
    p_slots += i_token * J
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    number, has_gaps, last_row = look_through(p_slots, J)
    factor = tl.cast(scale, tl.float32) * LOG2_E

    p_rows = p_do + i_row * V
    b_do0 = load_piece(p_rows, m_head, 0, VPIECE, V, MASKED)
    b_delta = _delta(p_o, b_do0, i_row, m_head, 0, VPIECE, V, MASKED)
    if VPIECES > 1:
        b_do1 = load_piece(p_rows, m_head, VPIECE, VPIECE, V, MASKED)
        b_delta += _delta(p_o, b_do1, i_row, m_head, VPIECE, VPIECE, V, MASKED)
    b_delta = b_delta[:, None] - tl.load(p_dlse + i_row, mask=m_head, other=0.0)
    b_lse = tl.load(p_lse + i_row, mask=m_head, other=0.0) * LOG2_E
    p_rows = p_q + i_row * D
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


@triton.jit(do_not_specialize=["S", "T", "J", "first", "num_tokens", "BLOCKS"])
def rows_kernel(
    p_w, p_x, p_k, p_slots, p_dx, p_dq, factor, S, T, J, first, num_tokens, BLOCKS, k_batch, k_row, k_head,
    H: tl.constexpr, HKV: tl.constexpr, WIDTH: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    DQ: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, SLOT_TILE: tl.constexpr,
):  # fmt: skip
    """Add ``factor sum_heads w_j x`` to the selected rows of dx ``[B, S, HKV, WIDTH]``: one token, a slice of columns.

    With ``DQ`` also compute that slice of ``dq = factor sum_j w_j k_j``.
    """
    G: tl.constexpr = H // HKV
    TILES: tl.constexpr = (G + BH - 1) // BH
    programs = num_tokens * (TILES * HKV)
    i_slice = tl.program_id(0) // programs
    i_program = tl.program_id(0) % programs + tl.cast(first, tl.int64) * (TILES * HKV)
    i_token, i_batch, i_kv, i_row, m_head = place(i_program, T, H, HKV, BH)
    MASKED: tl.constexpr = G % BH != 0
    p_slots += i_token * J
    number, _, last_row = look_through(p_slots, J)
    factor = tl.cast(factor, tl.float32)

    i_column = i_slice * BC + tl.arange(0, BC)[None, :]
    # Slices that end where the row does are all whole; a pointer is moved by its slice, so that load_piece sees none.
    m_column = i_column < WIDTH
    WHOLE: tl.constexpr = WIDTH % BC == 0
    if WHOLE:
        b_x = load_piece(p_x + i_row * WIDTH + i_slice * BC, m_head, 0, BC, BC, MASKED)
    else:
        b_x = tl.load(p_x + i_row * WIDTH + i_column, mask=m_head & m_column, other=0.0)
    p_dx += (i_batch * S * HKV + i_kv) * WIDTH
    if DQ:
        p_k += i_batch * k_batch + i_kv * k_head
        b_dq = tl.zeros([BH, BC], tl.float32)
    p_w += (i_row - tl.cast(first, tl.int64) * H) * BLOCKS * SLOT_TILE + tl.arange(0, BN)[None, :]
    for j in tl.range(0, number, BN, num_stages=STAGES):
        if MASKED:
            b_w = tl.load(p_w + j, mask=m_head, other=0.0)
        else:
            b_w = tl.load(p_w + j)
        b_slot = load_slots(p_slots, j, number, BN)
        if DQ:
            p_keys = row_pointers(p_k, b_slot, last_row, k_row)
            if WHOLE:
                b_k = load_piece(p_keys + i_slice * BC, None, 0, BC, BC, False)
            else:
                b_k = tl.load(p_keys + i_column, mask=m_column, other=0.0)
            b_dq = tl.dot(b_w, b_k, b_dq, input_precision=PRECISION)
        b_dx = tl.dot(tl.trans(b_w), b_x, input_precision=PRECISION) * factor
        p_rows = row_pointers(p_dx, b_slot, last_row, HKV * WIDTH)
        m_row = (b_slot >= 0)[:, None]
        if WHOLE:
            tl.atomic_add(p_rows + i_column, b_dx, mask=m_row, sem="relaxed")
        else:
            tl.atomic_add(p_rows + i_column, b_dx, mask=m_row & m_column, sem="relaxed")
    if DQ:
        p_dq += i_row * WIDTH + i_column
        tl.store(p_dq, (b_dq * factor).to(p_dq.dtype.element_ty), mask=m_head & m_column)


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


def row_tiles(group: int, columns: int, of_keys: bool, element_size: int, limit: int) -> dict[str, int]:
    """Choose tiles of rows_kernel for a row of so many columns; two blocks side by side where that is possible."""
    BH = min(MOST_ROWS, max(16, next_power_of_2(group)))
    if element_size == 4:
        return {"BH": min(BH, 32), "BN": 32, "BC": NARROWEST, "STAGES": 1, "num_warps": 4}
    BN, BC = 64, NARROWEST if columns <= NARROWEST else SLICE
    # The sums of a tile pass through shared memory, in float32, on their way to the rows.
    stages = {n: (BH * BC + n * BN * (BH + of_keys * BC)) * element_size + 4 * BN * BC + 1024 for n in (3, 2)}
    fitting = [n for bound in (limit // 2, limit) for n in stages if stages[n] <= bound]
    num_warps = 8 if BH * BC >= 8192 else 4
    return {"BH": BH, "BN": BN, "BC": BC, "STAGES": fitting[0] if fitting else 1, "num_warps": num_warps}


@on_its_device
def launch_gather_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, o: Tensor, lse: Tensor, scale: float,
    *, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of q to ``dq``, and add those of k and v to ``dk`` and ``dv``.

    The order of the additions, and so the last bits of dk and dv, change from run to run.

    Args:
        do, dlse: gradients of the outputs.
        q, k, v, indices, scale: arguments of the forward.
        o, lse: its outputs.
        dq: output, ``[B, T, H, D]``, contiguous, in q's dtype.
        dk: float32 ``[B, S, Hkv, D]``, contiguous, zero before.
        dv: float32 ``[B, S, Hkv, Dv]``, contiguous, zero before.
    """
    constants, width = sizes_of(q, k, v)
    k = dense_rows(k)
    v = k if width.SHARED else dense_rows(v)
    do, dlse, q, indices, o, lse = (x.contiguous() for x in (do, dlse, q, indices, o, lse))
    H, HKV, precision = constants["H"], constants["HKV"], constants["PRECISION"]
    group, size, limit = H // HKV, q.element_size(), device_limits(q.device)[0]
    (B, T), J, S = q.shape[:2], indices.shape[2], k.shape[1]
    blocks = -(-J // SLOT_TILE)
    # NOTE [Pieces of queries]
    most = max(1, WORKSPACE_BYTES // max(1, 2 * H * blocks * SLOT_TILE * size))
    work = q.new_empty(2, min(most, B * T), H, blocks, SLOT_TILE)
    strides = k.stride()[:3]
    tiles = weight_tiles(group, width, size, limit)
    for first in range(0, B * T, most):
        number = min(most, B * T - first)
        launchable(weights_kernel)[(number * HKV * -(-group // tiles["BH"]),)](
            q, k, v, indices, o, lse, do, dlse, *work, float(scale), T, J, first, blocks, *strides, *v.stride()[:3],
            **constants, **tiles, SLOT_TILE=SLOT_TILE, num_stages=tiles["STAGES"],
        )  # fmt: skip
        for weights, x, dx, factor, of_keys in ((work[1], q, dk, scale, True), (work[0], do, dv, 1.0, False)):
            columns = int(x.shape[-1])
            cut = row_tiles(group, columns, of_keys, size, limit)
            grid = (-(-columns // cut["BC"]) * number * HKV * -(-group // cut["BH"]),)
            launchable(rows_kernel)[grid](
                weights, x, k, indices, dx, dq, float(factor), S, T, J, first, number, blocks, *strides,
                H=H, HKV=HKV, WIDTH=columns, DQ=of_keys, PRECISION=precision, SLOT_TILE=SLOT_TILE, **cut,
                num_stages=cut["STAGES"],
            )  # fmt: skip
