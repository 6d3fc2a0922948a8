"""Attention over selected rows, forward: every program gathers what one token has selected.

With l = log2(e) scale, and the slots of a token taken in tiles::

    s_j  = l q . k_{i_j}                -inf in unused slots
    m'   = max(m, max_j s_j)            p_j = 2^(s_j - m')             a = 2^(m - m')
    L    = a L + sum_j p_j              O   = a O + sum_j p_j v_{i_j}
    o    = O / L                        lse = log L + m log 2

The heads that share a key head are the rows of every product, so that a tile of gathered rows serves all of them.

# NOTE [Pieces]
Rows are worked on in pieces of columns whose widths are powers of two: one or two equal ones, and for widths such as
576 = 256 + 256 + 64 a smaller rest (to pad it to 1024 would nearly double the work).  A piece of 256 columns is loaded
by a warp a row, 8 rows a thread, and the next piece lies at a constant distance from it; a piece of 512 columns would
be 16 rows a thread, and their addresses push the sums out of the registers.

# NOTE [Shared rows]
With latent attention v is the first columns of k.  A row is then loaded once, and its pieces are multiplied as keys and
as values where they lie.

# NOTE [Slots ahead]
The slots of the next tile are loaded one tile ahead and carried: the addresses of the rows would otherwise wait for
them in every step.  The mask needs other slots in each thread, 16 registers if they were carried as well; it goes by
the number of slots in use, and loads the slots of those tokens only that have unused ones between used ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_flex.kernels.launch import (
    NARROWEST,
    computed_once,
    device_limits,
    launchable,
    next_power_of_2,
    on_its_device,
    product_precision,
    two_widths,
)

from .spans import PIECE, combine_kernel, cut, is_cut, most_spans

# Values are padded to NARROWEST columns: NOTE [Narrow products] in launch.py.
WIDEST_PIECE = 256
MOST_HEADS = 64
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Below every logit in base 2, and finite: a difference of two of them is 0, not NaN.
LOWEST = tl.constexpr(-3.0e38)
COUNTED = tl.constexpr(512)


@triton.jit
def look_through(p_slots, J):
    """Return one more than the last slot in use (0 without any), whether unused ones lie before it, and its row.

    What lies behind the last slot in use is never looked at.
    """
    J = tl.cast(J, tl.int32)  # of a graph that leaves sizes open an int64
    b_last = tl.zeros([COUNTED], tl.int32)
    b_used = tl.zeros([COUNTED], tl.int32)
    for j in range(0, J, COUNTED):
        i_slot = j + tl.arange(0, COUNTED)
        m_used = tl.load(p_slots + i_slot, mask=i_slot < J, other=-1) >= 0
        b_last = tl.maximum(b_last, tl.where(m_used, i_slot + 1, 0))
        b_used += tl.where(m_used, 1, 0)
    number = tl.max(b_last, 0)
    last_row = tl.load(p_slots + number - 1, mask=number > 0, other=0)
    return number, tl.sum(b_used, 0) < number, last_row


@triton.jit
def load_slots(p_slots, j, number, BN: tl.constexpr):
    """Load the slots of a tile, -1 behind the last one in use."""
    i_slot = j + tl.arange(0, BN)
    return tl.load(p_slots + i_slot, mask=i_slot < number, other=-1)


@triton.jit
def row_pointers(p_x, b_slot, last_row, stride):
    """Return pointers ``[BN, 1]`` to the selected rows.

    An unused slot stands for the last selected row: a row that nobody selects may hold NaN, which a weight of zero
    would not silence.
    """
    return p_x + (tl.where(b_slot >= 0, b_slot, last_row).to(tl.int64) * stride)[:, None]


@triton.jit
def used_slots(p_slots, j, number, has_gaps, BN: tl.constexpr):
    """Return which slots of a tile are in use; only a token with gaps reads them again."""
    m_slot = j + tl.arange(0, BN) < number
    if has_gaps:
        m_slot = load_slots(p_slots, j, number, BN) >= 0
    return m_slot


@triton.jit
def load_piece(p_rows, m_rows, FIRST: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Load columns from ``FIRST`` on of rows ``[N, 1]`` of ``WIDTH``; zeros outside, and where ``m_rows`` is false."""
    i_column = FIRST + tl.arange(0, PIECE)[None, :]
    if FIRST + PIECE <= WIDTH:
        if MASKED:
            b_x = tl.load(p_rows + i_column, mask=m_rows, other=0.0)
        else:
            b_x = tl.load(p_rows + i_column)
    else:
        if MASKED:
            b_x = tl.load(p_rows + i_column, mask=m_rows & (i_column < WIDTH), other=0.0)
        else:
            b_x = tl.load(p_rows + i_column, mask=i_column < WIDTH, other=0.0)
    return b_x


@triton.jit
def store_piece(p_rows, b_x, m_rows, FIRST: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr):
    i_column = FIRST + tl.arange(0, PIECE)[None, :]
    tl.store(p_rows + i_column, b_x.to(p_rows.dtype.element_ty), mask=m_rows & (i_column < WIDTH))


@triton.jit
def place(i_program, num_tokens, T, first, H: tl.constexpr, HKV: tl.constexpr, BH: tl.constexpr):
    """Return token (of all of them), batch entry and key head of a program, and its heads ``[BH, 1]`` with their mask.

    Programs serve ``num_tokens`` tokens from ``first`` on.  Tiles of the heads of one token run side by side, as they
    gather the same rows; all tokens of a key head run before the next one's, so that its rows stay in the cache.
    """
    G: tl.constexpr = H // HKV
    TILES: tl.constexpr = (G + BH - 1) // BH
    i_kv = (i_program // (TILES * num_tokens)).to(tl.int64)
    i_token = (i_program // TILES % num_tokens).to(tl.int64) + first
    i_group = (i_program % TILES) * BH + tl.arange(0, BH)[:, None]
    return i_token, i_token // T, i_kv, i_token * H + i_kv * G + i_group, i_group < G


@triton.jit
def token_rows(p_x, i_token, i_batch, i_row, T, x_batch, x_token, x_head, H: tl.constexpr):
    """Return pointers ``[BH, 1]`` to the heads that `place` gave of a token, in a tensor with strides of its own."""
    return p_x + i_batch * x_batch + (i_token - i_batch * T) * x_token + (i_row - i_token * H) * x_head


@triton.jit
def is_done(p_done, i_token, i_batch, T, TILE: tl.constexpr):
    """Tell whether another form serves a token: ``p_done [B, tiles of TILE tokens]`` is not negative there."""
    i_tile = (i_token - i_batch * T) // TILE
    return tl.load(p_done + i_batch * ((T + TILE - 1) // TILE) + i_tile) >= 0


@triton.jit(do_not_specialize=["num_tokens", "T", "J", "spans", "span"])
def gather_kernel(
    p_q, p_k, p_v, p_slots, p_done, p_o, p_lse, scale, num_tokens, T, J, spans, span,
    q_batch, q_token, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr, REST: tl.constexpr, VPIECE: tl.constexpr, VPIECES: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, CUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute o and lse of one token for a tile of heads that share a key head; if TILE > 0, unless it `is_done`.

    If ``CUT``, those over one of its spans: ``p_o [tokens, H, spans, V]``, where there is a key, and ``p_lse``.
    """
    i_program = tl.program_id(0)
    if CUT:
        i_program = i_program // spans
    i_token, i_batch, i_kv, i_row, m_head = place(i_program, num_tokens, T, 0, H, HKV, BH)
    MASKED: tl.constexpr = (H // HKV) % BH != 0
    if TILE > 0:  # noqa: SIM102
        if is_done(p_done, i_token, i_batch, T, TILE):
            return
    p_slots += i_token * J
    if CUT:
        first = tl.program_id(0) % spans * span
        p_slots += first
        J = tl.minimum(J - first, span)
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    number, has_gaps, last_row = look_through(p_slots, J)
    # Inductor passes numbers as float64.
    factor = tl.cast(scale, tl.float32) * LOG2_E

    p_rows = token_rows(p_q, i_token, i_batch, i_row, T, q_batch, q_token, q_head, H)
    b_q0 = load_piece(p_rows, m_head, 0, PIECE, D, MASKED)
    if PIECES > 1:
        b_q1 = load_piece(p_rows, m_head, PIECE, PIECE, D, MASKED)
    if REST > 0:
        b_q2 = load_piece(p_rows, m_head, PIECES * PIECE, REST, D, MASKED)

    b_m = tl.full([BH], LOWEST, tl.float32)
    b_L = tl.zeros([BH], tl.float32)
    b_o0 = tl.zeros([BH, VPIECE], tl.float32)
    if VPIECES > 1:
        b_o1 = tl.zeros([BH, VPIECE], tl.float32)
    b_next = load_slots(p_slots, 0, number, BN)
    for j in tl.range(0, number, BN, num_stages=STAGES):
        b_slot = b_next  # NOTE [Slots ahead]
        b_next = load_slots(p_slots, j + BN, number, BN)
        p_keys = row_pointers(p_k, b_slot, last_row, k_row)
        b_k0 = load_piece(p_keys, None, 0, PIECE, D, False)
        b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)
        if PIECES > 1:
            b_k1 = load_piece(p_keys, None, PIECE, PIECE, D, False)
            b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision=PRECISION)
        if REST > 0:
            b_k2 = load_piece(p_keys, None, PIECES * PIECE, REST, D, False)
            b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision=PRECISION)

        b_s = tl.where(used_slots(p_slots, j, number, has_gaps, BN)[None, :], b_s * factor, float("-inf"))
        b_largest = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_largest[:, None])
        b_a = tl.exp2(b_m - b_largest)
        b_L = b_L * b_a + tl.sum(b_p, 1)
        b_m = b_largest

        b_p = b_p.to(p_v.dtype.element_ty)
        if SHARED:
            b_v0 = b_k0  # NOTE [Shared rows]
        else:
            p_values = row_pointers(p_v, b_slot, last_row, v_row)
            b_v0 = load_piece(p_values, None, 0, VPIECE, V, False)
        b_o0 = tl.dot(b_p, b_v0, b_o0 * b_a[:, None], input_precision=PRECISION)
        if VPIECES > 1:
            if SHARED:
                b_v1 = b_k1
            else:
                b_v1 = load_piece(p_values, None, VPIECE, VPIECE, V, False)
            b_o1 = tl.dot(b_p, b_v1, b_o1 * b_a[:, None], input_precision=PRECISION)

    # With any key the sum is at least 1, the weight of the largest logit.
    b_total = tl.maximum(b_L, 1.0)
    b_r = (1.0 / b_total)[:, None]
    # Where the results go is computed anew: kept through the loop, the addresses would take registers from the sums.
    # The grid has one dimension, which the compiler does not know; what it must not depend on is anything loaded, or
    # torch takes the slots for something that is written, and copies them around the kernel in every graph.
    i_program = tl.program_id(0) + tl.program_id(1)
    i_span = 0
    if CUT:
        i_span, i_program = i_program % spans, i_program // spans
    _, _, _, i_row, m_head = place(i_program, num_tokens, T, 0, H, HKV, BH)
    m_store = m_head
    if CUT:
        i_row = i_row * spans + i_span
        m_store = m_head & (b_L > 0.0)[:, None]
    p_rows = p_o + i_row * V
    store_piece(p_rows, b_o0 * b_r, m_store, 0, VPIECE, V)
    if VPIECES > 1:
        store_piece(p_rows, b_o1 * b_r, m_store, VPIECE, VPIECE, V)
    b_lse = tl.where(b_L > 0.0, b_m * LN_2 + tl.log(b_total), float("-inf"))
    tl.store(p_lse + i_row, b_lse[:, None], mask=m_head)


class Done(NamedTuple):
    """What another form does of an attention."""

    tiles: Tensor | None
    """int32 ``[B, TILES]``, negative for the tiles of queries that it leaves; None: nothing is done."""
    tile: int
    """Queries of a tile; 0 without tiles."""
    is_part: int = 1
    """0 if it is known to do everything, so that nothing need be launched; may be a number that a graph leaves open."""

    def pointer(self, x: Tensor) -> Tensor:
        """Return the tiles, or x, which no kernel looks at, where there are none."""
        return x if self.tiles is None else self.tiles


NOTHING_DONE = Done(None, 0)


class Widths(NamedTuple):
    """How the columns of keys and values are cut: NOTE [Pieces]; the names are the kernels'."""

    D: int
    V: int
    PIECE: int
    PIECES: int
    REST: int
    VPIECE: int
    VPIECES: int
    SHARED: bool

    @property
    def key_columns(self) -> int:
        """Count the columns of a loaded row of keys, padding included."""
        return self.PIECE * self.PIECES + self.REST

    @property
    def loaded_columns(self) -> int:
        """Count the columns of a loaded row of keys and values."""
        return self.key_columns + (0 if self.SHARED else self.VPIECE * self.VPIECES)


def widths(D: int, V: int, shared: bool) -> Widths:
    """Cut D and V columns into pieces; ``shared`` says that the values are the first columns of the keys."""
    main, rest = two_widths(D)
    shared = shared and main == V >= NARROWEST
    piece, value_piece = (min(n, WIDEST_PIECE) for n in (main, max(NARROWEST, next_power_of_2(V))))
    return Widths(D, V, piece, main // piece, rest, value_piece, -(-V // value_piece), shared)


def is_served(D: int, V: int) -> bool:
    """Tell whether the kernels take these widths: two pieces each, and a rest of the keys."""
    return 0 < D <= 3 * WIDEST_PIECE and 0 < V <= 2 * WIDEST_PIECE


def tile_sizes(group: int, width: Widths, element_size: int, limits: tuple[int, int]) -> dict[str, int]:
    """Choose tiles that fit the shared memory: queries stay in it, rows of keys and values go through."""
    limit, major = limits
    most = min(MOST_HEADS, max(16, next_power_of_2(group)))
    if element_size == 4:
        # Three passes of every product: registers, not bytes, are short.
        most = 16
    elif major == 10 and width.VPIECES > 1:
        # Tiles of 64 heads keep their sums in tensor memory, which is too small for 512 columns beside the logits.
        most = min(most, 32)
    choices = [(most, 64, 2), (most, 64, 1), (32, 64, 2), (32, 32, 1), (16, 64, 2), (16, 32, 2), (16, 32, 1)]
    fitting = [
        (BH, BN, stages)
        for BH, BN, stages in (choices if element_size < 4 else choices[-1:])
        if most >= BH and tile_bytes(BH, BN, stages, width, element_size) <= limit
    ]
    BH, BN, stages = fitting[0] if fitting else (16, 16, 1)
    return {"BH": BH, "BN": BN, "STAGES": stages, "num_warps": 4 if BH * width.VPIECE * width.VPIECES <= 8192 else 8}


def tile_bytes(BH: int, BN: int, stages: int, width: Widths, element_size: int) -> int:
    """Bound the shared memory of the forward, as read off compiled kernels: one stage also passes sums through it."""
    tiles = BH * width.key_columns + stages * BN * width.loaded_columns
    return tiles * element_size + (4 * BH * width.VPIECE if stages == 1 and BH < 64 else 0) + 1024


def lies_within(k: Tensor, v: Tensor) -> bool:
    """Tell whether v is a view of k's first columns, so that a row is gathered once: NOTE [Shared rows].

    While a graph is traced the storages are the traced ones, which views share as well.
    """
    if v.shape[-1] > k.shape[-1] or k.untyped_storage()._cdata != v.untyped_storage()._cdata:
        return False
    return bool(k.storage_offset() == v.storage_offset()) and k.stride() == v.stride()


def dense_rows(x: Tensor) -> Tensor:
    """Return x with the elements of a row side by side, a copy if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def sizes_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Any], Widths]:
    """Return the constants that every kernel takes, and the pieces of the columns."""
    H, HKV, D, V = (int(n) for n in (q.shape[2], k.shape[2], q.shape[3], v.shape[3]))
    width = widths(D, V, lies_within(k, v))
    return {"H": H, "HKV": HKV, **width._asdict(), "PRECISION": product_precision(q)}, width


@on_its_device
def launch_gather(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, done: Done = NOTHING_DONE, *, o: Tensor, lse: Tensor
) -> None:
    """Write the attention over the selected rows to ``o`` and its log-sum-exps to ``lse``.

    Args:
        q, k, v, indices, scale: arguments of `sparse_attention`, which has checked them.
        done: what another form has done.
        o: output, ``[B, T, H, Dv]``, contiguous, in q's dtype.
        lse: output, ``[B, T, H]``, contiguous, float32.
    """
    constants, width = sizes_of(q, k, v)
    q, k = dense_rows(q), computed_once(dense_rows(k))
    v = k if width.SHARED else dense_rows(v)
    B, T, J = q.shape[0], q.shape[1], indices.shape[2]
    H, HKV = constants["H"], constants["HKV"]
    tiles = tile_sizes(H // HKV, width, q.element_size(), device_limits(q.device))
    programs = HKV * -(-(H // HKV) // tiles["BH"])
    spans, span = cut(B, T, J, programs) if done.tile == 0 else (1, J)
    in_spans, o_spans, lse_spans = is_cut(spans), o, lse
    if in_spans:  # NOTE [Few tokens] in spans.py
        lse_spans = torch.empty((B * T * H, spans), dtype=torch.float32, device=q.device)
        o_spans = torch.empty((B * T * H, spans, width.V), dtype=torch.float32, device=q.device)
    indices = indices.contiguous()
    launchable(gather_kernel, q)[(B * T * programs * spans * done.is_part,)](
        q, k, v, indices, done.pointer(indices), o_spans, lse_spans, float(scale), B * T, T, J, spans, span,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **constants, **tiles, CUT=in_spans, TILE=done.tile,
        num_stages=tiles["STAGES"],
    )  # fmt: skip
    if in_spans:
        BV = min(PIECE, next_power_of_2(width.V))
        launchable(combine_kernel, q)[(B * T * H, -(-width.V // BV))](
            o_spans, lse_spans, o, lse, spans, V=width.V, BV=BV, BS=most_spans(spans), num_warps=4
        )
