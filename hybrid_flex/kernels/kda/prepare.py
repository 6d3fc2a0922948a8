"""First kernel of the chunked form: everything inside a chunk that does not need the state.

Per chunk and value head, with D, P (decay from the chunk's start) and E (decay to its end) as in ops/kda/chunk.py, and
q, k already divided by their norms:

    Aqk_ij = s <q_i, D_ij k_j>     KK_ij = <k_i, D_ij k_j>  (i > j)     A = (I + KK Diag(beta))^-1
    u = A v                        w = A P k                            qg = s P q         kg = E k

so that ``y = u - w S`` is what every token writes before its strength, and ``v_new = beta y``: in ops/kda/chunk.py beta
stands on the left of the triangle instead, which is the same v_new.  Here no gradient ever divides by beta.

With an anchor (NOTE [Chunk anchor] in decay.py) rows of q and k carry its factor, so qg and w are left 2^SHIFT times as
large, and the scans divide by it.  Their products with the columns of k are the pairs: a kernel of few registers makes
all three and reads them again, a second one does the rest for chunks with far rows.

# NOTE [Block inverse]
The inverse of a unit lower triangular matrix whose diagonal blocks of m rows have the inverses X and whose blocks below
them, between neighbours, are B:  X <- X - X B X.  Starting from 1 x 1 blocks, six steps reach 64 rows.  It is block
substitution: no power of the triangle is ever formed, so nothing grows that the inverse does not hold.

Its products take operands of 11 bits, float16's or tf32's.  With norm and sigmoid inside, keys are no longer than one
and beta is at most two, so each row writes what a product of contractions leaves of it: no entry of an inverse, whole
or of a block, exceeds two, nor any sum on the way float16's range, and float16 halves what passes through shared
memory.  Otherwise it is tf32, float32 inputs in three passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import (
    FROM_START,
    ONE,
    ROWS,
    TO_END,
    TREE,
    anchor_columns,
    anchor_rows,
    as_product,
    cast,
    col_decay,
    exp2,
    is_far,
    load_matrix,
    log2_decay,
    meets,
    needs_tree,
    opaque_zero,
    row_decay,
    sigmoid,
    split,
    sum_rows,
    tree_decay,
    widen,
)


@triton.jit
def chunk_place(i_chunk, T, NT, C: tl.constexpr):
    """Return the first row (over all sequences) and the number of rows of a chunk of sequences of equal length.

    The places of packed chunks are loaded by the kernels themselves: torch.compile, which follows an address back to
    the arguments, knows what a load is, but takes the result of a function to point into all that it was given.
    """
    start = (i_chunk % NT) * C
    return (i_chunk // NT).to(tl.int64) * T + start, tl.minimum(T - start, C)


@triton.jit
def row_pointers(p_x, token, i_head, HEADS, WIDTH, C: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """Return pointers to ``[C, BLOCK]`` of x [tokens, HEADS, WIDTH] from a row and a column on."""
    i_row, i_col = tl.arange(0, C)[:, None].to(tl.int64), tl.arange(0, BLOCK)[None, :]
    return p_x + (token * HEADS + i_head) * WIDTH + first + i_row * (HEADS * WIDTH) + i_col


@triton.jit
def load_rows(
    p_x, token, length, i_head, HEADS, WIDTH, C: tl.constexpr, BLOCK: tl.constexpr, first=0, LAST: tl.constexpr = False
):
    """Load ``[C, BLOCK]`` of x from a row and a column on; zero past the chunk's rows and the width."""
    mask = (tl.arange(0, C)[:, None] < length) & (first + tl.arange(0, BLOCK)[None, :] < WIDTH)
    pointers = row_pointers(p_x, token, i_head, HEADS, WIDTH, C, BLOCK, first)
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first" if LAST else "")


@triton.jit
def store_rows(p_x, b_x, token, length, i_head, HEADS, WIDTH, C: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """Store ``[C, BLOCK]`` into x from a row and a column on, without the padding."""
    mask = (tl.arange(0, C)[:, None] < length) & (first + tl.arange(0, BLOCK)[None, :] < WIDTH)
    pointers = row_pointers(p_x, token, i_head, HEADS, WIDTH, C, BLOCK, first)
    tl.store(pointers, cast(b_x, p_x.dtype.element_ty), mask=mask)


@triton.jit
def block_pointers(p_x, i_block, i_s, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return pointers to ``[C, BLOCK]``, slice i_s of block i of a workspace ``[blocks, C, WIDTH]``."""
    i_row, i_col = tl.arange(0, C)[:, None].to(tl.int64), tl.arange(0, BLOCK)[None, :]
    return p_x + i_block * (C * WIDTH) + i_s * BLOCK + i_row * WIDTH + i_col


@triton.jit
def store_block(p_x, b_x, i_block, C: tl.constexpr, WIDTH: tl.constexpr):
    """Store block ``[C, WIDTH]`` number i of a workspace ``[blocks, C, WIDTH]``."""
    pointers = block_pointers(p_x, i_block, 0, C, WIDTH, WIDTH)
    tl.store(pointers, cast(b_x, p_x.dtype.element_ty), eviction_policy="evict_first")


@triton.jit
def load_gate(
    p_g, p_A_log, p_dt_bias, lower_bound, token, length, i_head, HV, K,
    C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, LOWER: tl.constexpr, HAS_SLOPE: tl.constexpr,
    HAS_BIAS: tl.constexpr, first=0,
):  # fmt: skip
    """Load the gate of a chunk: its argument z = g + dt_bias [C, BK], its slope, and the log decay in bits [C, BK]."""
    i_k = first + tl.arange(0, BK)[None, :]
    b_z = load_rows(p_g, token, length, i_head, HV, K, C, BK, first, True).to(tl.float32)
    slope = 1.0
    if HAS_BIAS:
        b_z += tl.load(p_dt_bias + i_head * K + i_k, mask=i_k < K, other=0.0).to(tl.float32)
    if HAS_SLOPE:
        slope = tl.exp(tl.load(p_A_log + i_head).to(tl.float32))
    inside = (tl.arange(0, C)[:, None] < length) & (i_k < K)
    return b_z, slope, tl.where(inside, log2_decay(b_z, slope, lower_bound, GATE, LOWER), 0.0)


@triton.jit
def load_strength(p_beta, token, length, i_head, HV, C: tl.constexpr, SIGMOID: tl.constexpr, FACTOR: tl.constexpr):
    """Load beta [C] of a chunk, zero past its rows, and apply its sigmoid."""
    i_row = tl.arange(0, C)
    b_beta = tl.load(p_beta + (token + i_row) * HV + i_head, mask=i_row < length, other=0.0).to(tl.float32)
    if SIGMOID:
        b_beta = FACTOR * sigmoid(b_beta)
    return tl.where(i_row < length, b_beta, 0.0)


@triton.jit
def inverse_norm(p_x, token, length, i_head, HEADS, WIDTH, C: tl.constexpr, BLOCK: tl.constexpr, L2NORM: tl.constexpr):
    """Return ``1 / sqrt(sum x^2 + 1e-6)`` of the rows of a chunk, [C], or ones."""
    if L2NORM:
        b_x = load_rows(p_x, token, length, i_head, HEADS, WIDTH, C, BLOCK).to(tl.float32)
        b_root = tl.rsqrt(tl.sum(b_x * b_x, 1) + 1e-6)
    else:
        b_root = tl.full((C,), 1.0, dtype=tl.float32)
    return b_root


@triton.jit
def step_products(
    b_qk, b_kk, b_q, b_k, b_row, b_col, m_pairs, step, DT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Add the pairs of one step, by its factors of rows and columns, to ``<q_i, D_ij k_j>`` and ``<k_i, D_ij k_j>``."""
    b_k32 = widen(b_k, step)
    b_left = tl.trans(cast(b_k32 * b_col, DT))
    b_kk += tl.where(m_pairs, tl.dot(cast(b_k32 * b_row, DT), b_left, input_precision=PRECISION), 0.0)
    b_right = cast(widen(b_q, step) * b_row, DT)
    b_qk += tl.where(m_pairs, tl.dot(b_right, b_left, input_precision=PRECISION), 0.0)
    return b_qk, b_kk


@triton.jit
def far_pairs(
    b_qk, b_kk, b_q, b_k, b_high, b_low, p_table, C: tl.constexpr, TILE: tl.constexpr, ANCHOR: tl.constexpr,
    SAFE: tl.constexpr, RANGE: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the pairs of a slice of K whose row is far from the chunk's start: NOTE [Chunk anchor] in decay.py.

    Step 0 is the tile anchor, step l + 1 the level of blocks of TILE * 2^l rows: NOTE [Levels].  Without anchors every
    row counts as far.
    """
    IN_TILE: tl.constexpr = 5 if TILE == 32 else 4  # levels inside a tile
    LEVELS: tl.constexpr = (6 if C == 64 else 5 if C == 32 else 4) - IN_TILE
    for step in range(0 if ANCHOR else 1, LEVELS + 1):
        b_x = sum_rows(load_matrix(p_table, tl.where(step == 0, ROWS, TREE + IN_TILE + step), C), b_high, b_low)
        b_row = row_decay(b_x, ANCHOR, SAFE)
        if ANCHOR:
            zero = opaque_zero("level", step)
            b_c = sum_rows(load_matrix(p_table, FROM_START + zero, C), b_high, b_low)
            b_row = tl.where(is_far(b_c, RANGE), b_row, 0.0)
        b_col = col_decay(tl.where(step == 0, -1.0, 1.0) * b_x, ANCHOR, SAFE)
        b_qk, b_kk = step_products(b_qk, b_kk, b_q, b_k, b_row, b_col, meets(step, C, TILE), step, DT, PRECISION)
    if not SAFE:
        needs = needs_tree(sum_rows(load_matrix(p_table, ROWS, C), b_high, b_low), ANCHOR)
        if needs:
            for step in range(1 + IN_TILE):
                zero = opaque_zero("level of the tree", step)
                b_c = sum_rows(load_matrix(p_table, ROWS + zero, C), b_high, b_low)
                b_x = sum_rows(load_matrix(p_table, TREE + step, C), b_high, b_low)
                b_row, b_col = tree_decay(b_x, b_c, ANCHOR), exp2(b_x)
                if ANCHOR:
                    b_c = sum_rows(load_matrix(p_table, FROM_START + zero, C), b_high, b_low)
                    b_row = tl.where(is_far(b_c, RANGE), b_row, 0.0)
                b_qk, b_kk = step_products(b_qk, b_kk, b_q, b_k, b_row, b_col, meets(step, C, 1), step, DT, PRECISION)
    return b_qk, b_kk


@triton.jit
def unit_inverse(b_L, C: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """Return ``(I + L)^-1`` of a strictly lower triangular matrix [C, C]: NOTE [Block inverse].

    X is block diagonal, so the blocks of X L X between neighbours are those of X B X: the mask comes last.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    b_X = tl.where(i == j, 1.0, tl.where((i ^ j) == 1, -b_L, 0.0))
    b_L = cast(b_L, DT)
    for level in range(1, 6 if C == 64 else 5 if C == 32 else 4):
        b_x = cast(b_X, DT)
        b_Lx = cast(tl.dot(b_L, b_x, input_precision=PRECISION), DT)
        b_xLx = tl.dot(b_x, b_Lx, input_precision=PRECISION)
        b_X -= tl.where(((i ^ j) >> level) == 1, b_xLx, 0.0)
    return b_X


@triton.jit
def apply_inverse(
    b_A, b_v, p_w, p_u, i_block, C: tl.constexpr, BK: tl.constexpr, WV: tl.constexpr, PRECISION: tl.constexpr
):
    """Leave ``u = A v`` and, where P k waits, ``w = A P k``."""
    b_u = tl.dot(b_A, b_v, input_precision=PRECISION)
    store_block(p_u, b_u, i_block, C, WV)
    zero = opaque_zero("P k")
    b_Pk = tl.load(block_pointers(p_w, i_block + zero, 0, C, BK, BK))
    tl.debug_barrier()  # P k has been read
    b_w = tl.dot(b_A, b_Pk, input_precision=PRECISION)
    store_block(p_w, b_w, i_block, C, BK)


@triton.jit
def finish_chunk(
    b_qk, b_kk, p_v, p_qg, p_kc, p_w, p_u, p_Aqk, p_strength, p_A, p_kk, i_block, token, length, i_head, HV, V,
    C: tl.constexpr, BK: tl.constexpr, WV: tl.constexpr, SK: tl.constexpr, L2NORM: tl.constexpr, SIGMOID: tl.constexpr,
    ANCHOR: tl.constexpr, FOR_BACKWARD: tl.constexpr, KEEP: tl.constexpr, KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the pairs of rows that share the chunk's anchor to those of far rows; leave Aqk, A, u and w.

    With KEPT, A and Aqk are there, and KK is what is missing.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    b_v = load_rows(p_v, token, length, i_head, HV, V, C, WV, 0, True).to(p_Aqk.dtype.element_ty)  # on its way early
    if ANCHOR:
        WC: tl.constexpr = BK if BK > WV else WV
        for i_s in range(BK // SK):
            b_left = tl.trans(tl.load(block_pointers(p_kc, i_block, i_s, C, WC, SK)))
            b_kk = tl.dot(tl.load(block_pointers(p_w, i_block, i_s, C, BK, SK)), b_left, b_kk)
            if not KEPT:
                b_qk = tl.dot(tl.load(block_pointers(p_qg, i_block, i_s, C, BK, SK)), b_left, b_qk)
    if not KEPT:
        store_block(p_Aqk, tl.where(i >= j, b_qk, 0.0), i_block, C, C)
    b_kk = tl.where(i > j, b_kk, 0.0)
    if FOR_BACKWARD and not SIGMOID:
        store_block(p_kk, b_kk, i_block, C, C)
    if KEPT:
        b_A = tl.load(block_pointers(p_A, i_block, 0, C, C, C))
    else:
        zero = opaque_zero("strength", length)
        b_beta = tl.load(p_strength + (i_block + zero) * C + tl.arange(0, C))
        HALF: tl.constexpr = tl.float16 if L2NORM and SIGMOID and PRECISION == "tf32" else tl.float32
        b_A = cast(unit_inverse(b_kk * b_beta[None, :], C, HALF, PRECISION), p_Aqk.dtype.element_ty)
        if KEEP:
            store_block(p_A, b_A, i_block, C, C)
    apply_inverse(b_A, b_v, p_w, p_u, i_block, C, BK, WV, PRECISION)


@triton.jit(do_not_specialize=["T", "NT"])
def prepare_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_A_log, p_dt_bias, p_chunk_token, p_chunk_length, p_table,
    p_qg, p_kg, p_w, p_u, p_Aqk, p_total, p_strength, p_A, p_kk, p_norms, p_far, p_kc, scale, lower_bound, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WV: tl.constexpr, SK: tl.constexpr, GATE: tl.constexpr, LOWER: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr, L2NORM: tl.constexpr, SIGMOID: tl.constexpr, FACTOR: tl.constexpr,
    ANCHOR: tl.constexpr, SHIFT: tl.constexpr, RANGE: tl.constexpr, PACKED: tl.constexpr, FOR_BACKWARD: tl.constexpr,
    KEEP: tl.constexpr, KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Prepare one chunk of one value head; blocks of the workspace are numbered ``chunk * HV + head``.

    A chunk with far rows is left to `prepare_far_kernel` with qg, P k in the place of w, the inverse norms of q and k,
    the strength, the decay of the whole chunk in bits, and whether a slice of K has far rows.
    With KEEP it leaves A; with KEPT, A and Aqk are there from the forward.
    """
    i_block = tl.program_id(0).to(tl.int64)
    i_chunk, i_head = tl.program_id(0) // HV, tl.program_id(0) % HV
    if PACKED:
        token, length = tl.load(p_chunk_token + i_chunk), tl.load(p_chunk_length + i_chunk)
    else:
        token, length = chunk_place(i_chunk, T, NT, C)
    i_group = i_head // (HV // H)
    # Inductor passes numbers as float64.
    scale, lower_bound = tl.cast(scale, tl.float32), tl.cast(lower_bound, tl.float32)
    DT: tl.constexpr = p_qg.dtype.element_ty
    i_row = tl.arange(0, C)

    tl.store(p_strength + i_block * C + i_row, load_strength(p_beta, token, length, i_head, HV, C, SIGMOID, FACTOR))
    b_rq = inverse_norm(p_q, token, length, i_group, H, K, C, BK, L2NORM)
    b_rk = inverse_norm(p_k, token, length, i_group, H, K, C, BK, L2NORM)
    tl.store(p_norms + i_block * (2 * C) + i_row, b_rq)
    tl.store(p_norms + i_block * (2 * C) + C + i_row, b_rk)

    if WV >= BK:
        p_kc = p_u  # which comes last
    WC: tl.constexpr = BK if BK > WV else WV
    b_start, b_one = load_matrix(p_table, FROM_START, C), load_matrix(p_table, ONE, C)
    for i_s in tl.range(BK // SK, disable_licm=True):  # what is made anew in every turn takes no registers
        first = i_s * SK
        b_z, slope, b_g = load_gate(  # noqa: RUF059 (a loop of Triton has no throw-away names)
            p_g, p_A_log, p_dt_bias, lower_bound, token, length, i_head, HV, K, C, SK, GATE, LOWER, HAS_SLOPE, HAS_BIAS,
            first,
        )  # fmt: skip
        b_high, b_low = split(b_g, DT)
        b_c = sum_rows(b_start, b_high, b_low)
        i_k = first + tl.arange(0, SK)
        b_total = tl.min(b_c, 0)  # the last row's
        tl.store(p_total + i_block * BK + i_k, b_total)
        if ANCHOR:
            b_row = anchor_rows(b_c, SHIFT, RANGE)
        else:
            b_row = exp2(b_c)
        zero = opaque_zero("q", i_s)
        b_q = cast(as_product(b_one, load_rows(p_q, token + zero, length, i_group, H, K, C, SK, first, True)), DT)
        b_qg = widen(b_q, zero) * (b_rq * scale)[:, None] * b_row
        tl.store(block_pointers(p_qg, i_block + zero, i_s, C, BK, SK), cast(b_qg, DT))
        zero = opaque_zero("k", i_s)
        b_k = cast(as_product(b_one, load_rows(p_k, token + zero, length, i_group, H, K, C, SK, first, True)), DT)
        zero = opaque_zero("rows of k", i_s)
        b_Pk = widen(b_k, zero) * b_rk[:, None] * b_row
        tl.store(block_pointers(p_w, i_block + zero, i_s, C, BK, SK), cast(b_Pk, DT), eviction_policy="evict_last")
        if ANCHOR:  # E_j = 2^SHIFT total col_j
            zero = opaque_zero("columns of k", i_s)
            b_kc = widen(b_k, zero) * b_rk[:, None] * anchor_columns(b_row)
            if not (KEPT and SIGMOID):
                p_slice = block_pointers(p_kc, i_block + zero, i_s, C, WC, SK)
                tl.store(p_slice, cast(b_kc, DT), eviction_policy="evict_last")
            b_kg = b_kc * exp2(b_total + SHIFT)[None, :]
            p_slice = block_pointers(p_kg, i_block + zero, i_s, C, BK, SK)
            tl.store(p_slice, cast(b_kg, DT), eviction_policy="evict_first")

    tl.debug_barrier()  # all of this has been stored
    any_far = True
    if ANCHOR:
        # 1 for slices of K with rows that are far for the backward, 2 for both: NOTE [Vectors from products].
        b_total = tl.reshape(tl.load(p_total + i_block * BK + tl.arange(0, BK)), (BK // SK, SK))
        b_far = tl.min(b_total, 1)
        b_far = is_far(b_far, 160).to(tl.int32) + is_far(b_far, RANGE).to(tl.int32)
        tl.store(p_far + i_block * (BK // SK) + tl.arange(0, BK // SK), b_far)
        any_far = tl.max(b_far, 0) == 2
    if KEPT and SIGMOID:
        b_A = tl.load(block_pointers(p_A, i_block, 0, C, C, C))
        b_v = load_rows(p_v, token, length, i_head, HV, V, C, WV).to(DT)
        apply_inverse(b_A, b_v, p_w, p_u, i_block, C, BK, WV, PRECISION)
    elif not any_far:
        b_qk = tl.zeros((C, C), dtype=tl.float32)
        b_kk = tl.zeros((C, C), dtype=tl.float32)
        finish_chunk(
            b_qk, b_kk, p_v, p_qg, p_kc, p_w, p_u, p_Aqk, p_strength, p_A, p_kk, i_block, token, length, i_head, HV, V,
            C, BK, WV, SK, L2NORM, SIGMOID, ANCHOR, FOR_BACKWARD, KEEP, KEPT, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "NT", "NB"])
def prepare_far_kernel(
    p_q, p_k, p_v, p_g, p_A_log, p_dt_bias, p_chunk_token, p_chunk_length, p_table,
    p_qg, p_kg, p_w, p_u, p_Aqk, p_strength, p_A, p_kk, p_norms, p_far, p_kc, scale, lower_bound, T, NT, NB,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WV: tl.constexpr, SK: tl.constexpr, GROUP: tl.constexpr, GATE: tl.constexpr, LOWER: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr, L2NORM: tl.constexpr, SIGMOID: tl.constexpr,
    ANCHOR: tl.constexpr, RANGE: tl.constexpr, SAFE: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr,
    FOR_BACKWARD: tl.constexpr, KEEP: tl.constexpr, KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Prepare what `prepare_kernel` left of chunks with far rows: kg of slices that have some, and all that follows.

    Most chunks have none: a block looks at GROUP of the NB chunks, or less would be done than blocks begun.
    """
    NUM: tl.constexpr = BK // SK
    i_flags = tl.program_id(0).to(tl.int64) * (GROUP * NUM) + tl.arange(0, GROUP * NUM)
    far_in_group = tl.max(tl.load(p_far + i_flags, mask=i_flags < NB * NUM, other=0), 0) if ANCHOR else 2
    if far_in_group < 2:
        return
    # Inductor passes numbers as float64.
    scale, lower_bound = tl.cast(scale, tl.float32), tl.cast(lower_bound, tl.float32)
    DT: tl.constexpr = p_qg.dtype.element_ty
    if WV >= BK:
        p_kc = p_u
    for i in tl.range(GROUP, disable_licm=True):
        i_block = tl.program_id(0).to(tl.int64) * GROUP + i
        i_flag = i_block * NUM + tl.arange(0, NUM)
        far_in_chunk = tl.max(tl.load(p_far + i_flag, mask=i_flag < NB * NUM, other=0), 0) if ANCHOR else 2
        if far_in_chunk == 2:
            i_chunk, i_head = (i_block // HV).to(tl.int32), (i_block % HV).to(tl.int32)
            if PACKED:
                token, length = tl.load(p_chunk_token + i_chunk), tl.load(p_chunk_length + i_chunk)
            else:
                token, length = chunk_place(i_chunk, T, NT, C)
            i_group = i_head // (HV // H)
            i_row = tl.arange(0, C)
            b_rq = tl.load(p_norms + i_block * (2 * C) + i_row)
            b_rk = tl.load(p_norms + i_block * (2 * C) + C + i_row)

            b_qk = tl.zeros((C, C), dtype=tl.float32)
            b_kk = tl.zeros((C, C), dtype=tl.float32)
            for i_s in range(NUM):
                first = i_s * SK
                far = tl.load(p_far + i_block * NUM + i_s) if ANCHOR else 2
                if far == 2:
                    b_z, slope, b_g = load_gate(  # noqa: RUF059 (a loop of Triton has no throw-away names)
                        p_g, p_A_log, p_dt_bias, lower_bound, token, length, i_head, HV, K, C, SK, GATE, LOWER,
                        HAS_SLOPE, HAS_BIAS, first,
                    )  # fmt: skip
                    b_high, b_low = split(b_g, DT)
                    b_one = load_matrix(p_table, ONE, C)
                    b_k = cast(as_product(b_one, load_rows(p_k, token, length, i_group, H, K, C, SK, first)), DT)
                    b_E = exp2(sum_rows(load_matrix(p_table, TO_END, C), b_high, b_low))
                    zero = opaque_zero("k", i_s)
                    b_kg = widen(b_k, zero) * b_rk[:, None] * b_E
                    tl.store(block_pointers(p_kg, i_block + zero, i_s, C, BK, SK), cast(b_kg, DT))
                    if not (KEPT and SIGMOID):
                        b_q = cast(as_product(b_one, load_rows(p_q, token, length, i_group, H, K, C, SK, first)), DT)
                        b_qk, b_kk = far_pairs(
                            b_qk, b_kk, b_q, b_k, b_high, b_low, p_table, C, TILE, ANCHOR, SAFE, RANGE, DT, PRECISION
                        )
            if not (KEPT and SIGMOID):
                # The norms are factors of rows and columns: they are applied to the products, which are smaller.
                b_qk *= (b_rq * scale)[:, None] * b_rk[None, :]
                b_kk *= b_rk[:, None] * b_rk[None, :]
                finish_chunk(
                    b_qk, b_kk, p_v, p_qg, p_kc, p_w, p_u, p_Aqk, p_strength, p_A, p_kk, i_block, token, length, i_head,
                    HV, V, C, BK, WV, SK, L2NORM, SIGMOID, ANCHOR, FOR_BACKWARD, KEEP, KEPT, PRECISION,
                )  # fmt: skip
