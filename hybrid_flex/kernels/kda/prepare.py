"""First kernel of the chunked form: everything inside a chunk that does not need the state.

Per chunk and value head, with D, P (decay from the chunk's start) and E (decay to its end) as in ops/kda/chunk.py, and
q, k already divided by their norms:

    Aqk_ij = s <q_i, D_ij k_j>     L_ij = beta_i <k_i, D_ij k_j>     A = (I + L)^-1
    u = A (beta v)                 w = A (beta P k)                  qg = s P q         kg = E k

# NOTE [Block inverse]
The inverse of a unit lower triangular matrix whose diagonal blocks of m rows have the inverses X and whose blocks below
them, between neighbours, are B:  X <- X - X B X.  Starting from 1 x 1 blocks, six steps reach 64 rows.  It is block
substitution: no power of L is ever formed, so nothing grows that the inverse does not hold.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import (
    decay_from_start,
    decay_to_end,
    decay_to_row_boundary,
    decay_to_tile_boundary,
    load_total,
    log2_decay,
    meets,
    sigmoid,
    store_totals,
    sum_in_tile,
)


@triton.jit
def chunk_place(i_chunk, p_chunk_token, p_chunk_length, T, NT, C: tl.constexpr, PACKED: tl.constexpr):
    """Return the first row (over all sequences) and the number of rows of a chunk."""
    if PACKED:
        token = tl.load(p_chunk_token + i_chunk).to(tl.int64)
        length = tl.load(p_chunk_length + i_chunk)
    else:
        start = (i_chunk % NT) * C
        token = (i_chunk // NT).to(tl.int64) * T + start
        length = tl.minimum(T - start, C)
    return token, length


@triton.jit
def load_rows(p_x, token, length, i_head, HEADS, WIDTH, C: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """Load ``[C, BLOCK]`` of x [tokens, HEADS, WIDTH] from a column on; zero past the chunk's rows and the width."""
    i_row = tl.arange(0, C)[:, None]
    i_col = first + tl.arange(0, BLOCK)[None, :]
    pointers = p_x + (token * HEADS + i_head) * WIDTH + i_row * (HEADS * WIDTH) + i_col
    return tl.load(pointers, mask=(i_row < length) & (i_col < WIDTH), other=0.0)


@triton.jit
def store_rows(p_x, b_x, token, length, i_head, HEADS, WIDTH, C: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """Store ``[C, BLOCK]`` into x [tokens, HEADS, WIDTH] from a column on, without the padding."""
    i_row = tl.arange(0, C)[:, None]
    i_col = first + tl.arange(0, BLOCK)[None, :]
    pointers = p_x + (token * HEADS + i_head) * WIDTH + i_row * (HEADS * WIDTH) + i_col
    tl.store(pointers, b_x.to(p_x.dtype.element_ty), mask=(i_row < length) & (i_col < WIDTH))


@triton.jit
def block_pointers(p_x, i_block, i_s, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return pointers to ``[C, BLOCK]``, slice i_s of block i of a workspace ``[blocks, C, WIDTH]``."""
    offsets = tl.arange(0, C)[:, None] * WIDTH + i_s * BLOCK + tl.arange(0, BLOCK)[None, :]
    return p_x + i_block * (C * WIDTH) + offsets


@triton.jit
def store_block(p_x, b_x, i_block, C: tl.constexpr, WIDTH: tl.constexpr):
    """Store block ``[C, WIDTH]`` number i of a workspace ``[blocks, C, WIDTH]``."""
    tl.store(block_pointers(p_x, i_block, 0, C, WIDTH, WIDTH), b_x.to(p_x.dtype.element_ty))


@triton.jit
def load_gate(
    p_g, p_A_log, p_dt_bias, lower_bound, token, length, i_head, HV, K,
    C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, LOWER: tl.constexpr, HAS_SLOPE: tl.constexpr,
    HAS_BIAS: tl.constexpr, first=0,
):  # fmt: skip
    """Load the gate of a chunk: its argument z = g + dt_bias [C, BK], its slope, and the log decay in bits [C, BK]."""
    i_k = first + tl.arange(0, BK)[None, :]
    b_z = load_rows(p_g, token, length, i_head, HV, K, C, BK, first).to(tl.float32)
    slope = 1.0
    if HAS_BIAS:
        b_z += tl.load(p_dt_bias + i_head * K + i_k, mask=i_k < K, other=0.0).to(tl.float32)
    if HAS_SLOPE:
        slope = tl.exp(tl.load(p_A_log + i_head).to(tl.float32))
    inside = (tl.arange(0, C)[:, None] < length) & (i_k < K)
    return b_z, slope, tl.where(inside, log2_decay(b_z, slope, lower_bound, GATE, LOWER), 0.0)


@triton.jit
def load_beta(p_beta, token, length, i_head, HV, C: tl.constexpr, SIGMOID: tl.constexpr, FACTOR: tl.constexpr):
    """Load the write strength [C] of a chunk, zero past its rows, with its sigmoid (1 where there is none)."""
    i_row = tl.arange(0, C)
    b_raw = tl.load(p_beta + (token + i_row) * HV + i_head, mask=i_row < length, other=0.0).to(tl.float32)
    b_beta = b_raw
    if SIGMOID:
        b_beta = FACTOR * sigmoid(b_raw)
    return tl.where(i_row < length, b_beta, 0.0), sigmoid(b_raw)


@triton.jit
def inverse_root(b_square, L2NORM: tl.constexpr):
    """Return ``1 / sqrt(b_square + 1e-6)``, the inverse norms of rows from their sums of squares, or ones."""
    if L2NORM:
        return tl.rsqrt(b_square + 1e-6)
    else:
        return b_square * 0.0 + 1.0


@triton.jit
def tree_products(
    b_qk, b_kk, m_rows, p_q, p_k, b_g, token, length, i_group, H, K, first, C: tl.constexpr, SK: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the products inside tiles, of rows ``m_rows [C, 1]``, by the tree's levels 1, 2, 4, 8."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    b_q = load_rows(p_q, token, length, i_group, H, K, C, SK, first).to(tl.float32)
    b_k = load_rows(p_k, token, length, i_group, H, K, C, SK, first).to(tl.float32)
    b_qk += tl.where(m_rows & (i == j), tl.sum(b_q * b_k, 1)[:, None], 0.0)
    for level in range(4):
        tl.debug_barrier()  # NOTE [Read again]
        b_e = decay_to_row_boundary(b_g, level, C, DT)
        b_ke = (load_rows(p_k, token, length, i_group, H, K, C, SK, first) * b_e).to(DT)
        b_qe = (load_rows(p_q, token, length, i_group, H, K, C, SK, first) * b_e).to(DT)
        m_level = meets(level, C) & m_rows
        b_qk += tl.where(m_level, tl.dot(b_qe, tl.trans(b_ke), input_precision=PRECISION), 0.0)
        b_kk += tl.where(m_level, tl.dot(b_ke, tl.trans(b_ke), input_precision=PRECISION), 0.0)
    return b_qk, b_kk


@triton.jit
def slice_products(
    b_qk, b_kk, p_q, p_k, b_g, b_c, p_tiles, token, length, i_group, H, K, first, ANCHOR: tl.constexpr,
    SAFE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, SK: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a slice of K's part of ``<q_i, D_ij k_j>`` for i >= j and ``<k_i, D_ij k_j>`` for i > j, [C, C].

    # NOTE [Read again]
    Every stage reads q and k anew, from the cache.  Kept, they and what the compiler derives from them would fill the
    registers; the barrier keeps it from merging the loads.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for level in range(4, LEVELS):
        b_e = decay_to_tile_boundary(b_c, p_tiles, first, level, C, BK, SK)
        b_ke = (load_rows(p_k, token, length, i_group, H, K, C, SK, first) * b_e).to(DT)
        b_qe = (load_rows(p_q, token, length, i_group, H, K, C, SK, first) * b_e).to(DT)
        m_level = meets(level, C)
        b_qk += tl.where(m_level, tl.dot(b_qe, tl.trans(b_ke), input_precision=PRECISION), 0.0)
        b_kk += tl.where(m_level, tl.dot(b_ke, tl.trans(b_ke), input_precision=PRECISION), 0.0)
        tl.debug_barrier()
    if ANCHOR:
        b_k = load_rows(p_k, token, length, i_group, H, K, C, SK, first)
        b_col = tl.trans((b_k * tl.exp2(tl.minimum(-b_c, 126.0))).to(DT))
        b_row = tl.exp2(b_c)
        m_tile = i // 16 == j // 16
        if not SAFE:
            m_rows = tl.min(b_c, 1) < -116.0  # NOTE [Tile anchor]
            m_tile = m_tile & (m_rows[:, None] == 0)
        b_ke = (b_k * b_row).to(DT)
        b_kk += tl.where(m_tile & (i > j), tl.dot(b_ke, b_col, input_precision=PRECISION), 0.0)
        b_qe = (load_rows(p_q, token, length, i_group, H, K, C, SK, first) * b_row).to(DT)
        b_qk += tl.where(m_tile & (i >= j), tl.dot(b_qe, b_col, input_precision=PRECISION), 0.0)
        if not SAFE:  # noqa: SIM102 (the inner condition is a run-time one)
            if tl.max(m_rows.to(tl.int32), 0) == 1:
                b_qk, b_kk = tree_products(
                    b_qk, b_kk, m_rows[:, None], p_q, p_k, b_g, token, length, i_group, H, K, first, C, SK, DT,
                    PRECISION,
                )  # fmt: skip
    else:
        b_qk, b_kk = tree_products(
            b_qk, b_kk, i >= 0, p_q, p_k, b_g, token, length, i_group, H, K, first, C, SK, DT, PRECISION
        )
    return b_qk, b_kk


@triton.jit
def unit_inverse(b_L, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Return ``(I + L)^-1`` of a strictly lower triangular matrix [C, C]: NOTE [Block inverse]."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    b_X = tl.where(i == j, 1.0, 0.0) - tl.where(meets(0, C), b_L, 0.0)
    for level in range(1, LEVELS):
        b_BX = tl.dot(tl.where(meets(level, C), b_L, 0.0), b_X, input_precision=PRECISION)
        b_X -= tl.dot(b_X, b_BX, input_precision=PRECISION)
    return b_X


@triton.jit(do_not_specialize=["T", "NT"])
def prepare_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_A_log, p_dt_bias, p_chunk_token, p_chunk_length,
    p_qg, p_kg, p_w, p_u, p_Aqk, p_A, p_kk, p_total, p_tiles, p_norms, scale, lower_bound, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WV: tl.constexpr, SK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, LOWER: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr, L2NORM: tl.constexpr, SIGMOID: tl.constexpr, FACTOR: tl.constexpr,
    ANCHOR: tl.constexpr, SAFE: tl.constexpr, PACKED: tl.constexpr, FOR_BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Prepare one chunk of one value head; blocks of the workspace are numbered ``chunk * HV + head``.

    For the backward it also leaves A, ``<k_i, D_ij k_j>``, and the inverse norms of q and k.
    """
    i_block = tl.program_id(0).to(tl.int64)
    i_chunk, i_head = tl.program_id(0) // HV, tl.program_id(0) % HV
    token, length = chunk_place(i_chunk, p_chunk_token, p_chunk_length, T, NT, C, PACKED)
    i_group = i_head // (HV // H)
    scale, lower_bound = (
        tl.cast(scale, tl.float32),
        tl.cast(lower_bound, tl.float32),
    )  # Inductor passes numbers as float64
    DT: tl.constexpr = p_qg.dtype.element_ty
    LEVELS: tl.constexpr = 6 if C == 64 else 5 if C == 32 else 4

    b_beta, b_unused = load_beta(p_beta, token, length, i_head, HV, C, SIGMOID, FACTOR)  # noqa: RUF059
    b_k = load_rows(p_k, token, length, i_group, H, K, C, BK).to(tl.float32)
    b_rk = inverse_root(tl.sum(b_k * b_k, 1), L2NORM)
    b_k = load_rows(p_q, token, length, i_group, H, K, C, BK).to(tl.float32)
    b_rq = inverse_root(tl.sum(b_k * b_k, 1), L2NORM)
    if FOR_BACKWARD:
        i_row = i_block * (2 * C) + tl.arange(0, C)
        tl.store(p_norms + i_row, b_rq)
        tl.store(p_norms + i_row + C, b_rk)

    # A slice of K at a time: kg, qg, P k (which waits in the place of w), and its part of the products.
    p_tiles += i_block * (C // 16 * BK)
    b_Aqk = tl.zeros((C, C), dtype=tl.float32)
    b_kk = tl.zeros((C, C), dtype=tl.float32)
    for i_s in range(BK // SK):
        tl.debug_barrier()
        first = i_s * SK
        b_z, slope, b_g = load_gate(  # noqa: RUF059 (a loop of Triton has no throw-away names)
            p_g, p_A_log, p_dt_bias, lower_bound, token, length, i_head, HV, K, C, SK, GATE, LOWER, HAS_SLOPE, HAS_BIAS,
            first,
        )  # fmt: skip
        b_c = sum_in_tile(b_g, C, DT)
        store_totals(p_tiles + first, b_c, C, BK, SK)
        tl.debug_barrier()  # other threads of this program read the totals
        b_total = load_total(p_tiles, 0, first, C, BK, SK) + load_total(p_tiles, 1, first, C, BK, SK)
        b_total += load_total(p_tiles, 2, first, C, BK, SK) + load_total(p_tiles, 3, first, C, BK, SK)
        tl.store(p_total + i_block * BK + first + tl.arange(0, SK), tl.exp2(b_total))
        b_ks = load_rows(p_k, token, length, i_group, H, K, C, SK, first) * b_rk[:, None]
        b_end = decay_to_end(b_c, p_tiles, first, C, BK, SK)
        tl.store(block_pointers(p_kg, i_block, i_s, C, BK, SK), (b_ks * b_end).to(DT))
        b_start = decay_from_start(b_c, p_tiles, first, C, BK, SK)
        tl.store(block_pointers(p_w, i_block, i_s, C, BK, SK), (b_ks * b_start).to(DT))
        b_qs = load_rows(p_q, token, length, i_group, H, K, C, SK, first) * (b_rq * scale)[:, None]
        tl.store(block_pointers(p_qg, i_block, i_s, C, BK, SK), (b_qs * b_start).to(DT))
        tl.debug_barrier()
        b_Aqk, b_kk = slice_products(
            b_Aqk, b_kk, p_q, p_k, b_g, b_c, p_tiles, token, length, i_group, H, K, first, ANCHOR, SAFE, C, BK, SK,
            LEVELS, DT, PRECISION,
        )  # fmt: skip

    # The norms are factors of rows and columns: they are applied to the products, which are smaller.
    store_block(p_Aqk, b_Aqk * (b_rq * scale)[:, None] * b_rk[None, :], i_block, C, C)
    b_kk *= b_rk[:, None] * b_rk[None, :]
    b_A = unit_inverse(b_kk * b_beta[:, None], C, LEVELS, PRECISION)
    if FOR_BACKWARD:
        store_block(p_kk, b_kk, i_block, C, C)
        store_block(p_A, b_A, i_block, C, C)
    b_Ab = (b_A * b_beta[None, :]).to(DT)
    for i_s in range(BK // SK):
        b_ks = tl.load(block_pointers(p_w, i_block, i_s, C, BK, SK))
        b_w = tl.dot(b_Ab, b_ks, input_precision=PRECISION)
        tl.debug_barrier()  # every thread has read what is now overwritten
        tl.store(block_pointers(p_w, i_block, i_s, C, BK, SK), b_w.to(DT))
    for i_v in range(WV // BV):
        b_v = load_rows(p_v, token, length, i_head, HV, V, C, BV, i_v * BV).to(DT)
        b_u = tl.dot(b_Ab, b_v, input_precision=PRECISION)
        tl.store(block_pointers(p_u, i_block, i_v, C, WV, BV), b_u.to(DT))
