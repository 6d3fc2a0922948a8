"""Second kernels of the chunked form: the state carried through the chunks, and its gradient carried back.

Per sequence, value head and slice of V, with the workspace of prepare.py:

    forward:    y = u - w S                  v_new = beta y      o = qg S + Aqk v_new
                S <- Diag(total) S + kg^T v_new
    backward:   dv_new = Aqk^T do + kg dS    dy = beta dv_new
                dS <- Diag(total) dS + qg^T do - w^T dy

S and dS stay in float32 registers; dS is the gradient of the state after the chunk.  qg and w come 1 / UNIT times as
large as they are.

# NOTE [Segments]
With few heads a sequence is cut into segments that are scanned side by side.  What a segment does to the state is an
affine map, and so is what it does to the gradient:

    S_out = M S_in + N          dS_in = M^T dS_out + R

N and R come from scans that begin with zero, M from one that begins with the identity and without u.  The maps are
joined in order, `join_kernel` in segments.py; then every segment is scanned with the state it begins with.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import exp2
from .prepare import block_pointers, load_rows, store_rows


@triton.jit
def load_state(p_S, i_state, i_v, K, V, BK: tl.constexpr, BV: tl.constexpr, V_FIRST: tl.constexpr, first=0):
    """Load ``[BK, BV]``, from a row on, of state i of ``[N * HV, K, V]``, or V, K; zero in the padding."""
    i_row, i_col = first + tl.arange(0, BK)[:, None], i_v * BV + tl.arange(0, BV)[None, :]
    offsets = i_col * K + i_row if V_FIRST else i_row * V + i_col
    return tl.load(p_S + i_state.to(tl.int64) * (K * V) + offsets, mask=(i_row < K) & (i_col < V), other=0.0)


@triton.jit
def store_state(p_S, b_S, i_state, i_v, K, V, BK: tl.constexpr, BV: tl.constexpr, V_FIRST: tl.constexpr):
    """Store ``[BK, BV]`` into state number i."""
    i_row, i_col = tl.arange(0, BK)[:, None], i_v * BV + tl.arange(0, BV)[None, :]
    offsets = i_col * K + i_row if V_FIRST else i_row * V + i_col
    tl.store(p_S + i_state.to(tl.int64) * (K * V) + offsets, b_S, mask=(i_row < K) & (i_col < V))


@triton.jit
def state_pointers(p_x, i_block, i_k, i_v, BK: tl.constexpr, WV: tl.constexpr, SK: tl.constexpr, BV: tl.constexpr):
    """Return pointers to ``[SK, BV]``, row slice i_k and column slice i_v of block i of a workspace ``[., BK, WV]``."""
    offsets = (i_k * SK + tl.arange(0, SK)[:, None]) * WV + i_v * BV + tl.arange(0, BV)[None, :]
    return p_x + i_block * (BK * WV) + offsets


@triton.jit
def segment_place(i, T, NT, NS, SC, C: tl.constexpr):
    """Return first row, first chunk and number of rows of segment i: NS segments of SC chunks to a sequence."""
    i_n, first = (i // NS).to(tl.int64), (i % NS) * SC
    return i_n * T + first * C, i_n * NT + first, tl.minimum(T - first * C, SC * C)


@triton.jit(do_not_specialize=["T", "NT", "NS", "SC"])
def scan_kernel(
    p_qg, p_kg, p_w, p_u, p_Aqk, p_total, p_strength, p_initial, p_o, p_final, p_states, p_y, p_cu_seqlens,
    p_first_chunk, T, NT, NS, SC, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WV: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr, V_FIRST: tl.constexpr,
    TRANSITION: tl.constexpr, WRITE_O: tl.constexpr, WRITE_FINAL: tl.constexpr, WRITE_STATES: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Carry the state of one sequence, or segment of it, and value head, ``[K, BV]`` of it, through the chunks.

    With TRANSITION it carries the identity, without u, and V is K: NOTE [Segments].
    """
    i_v, i_nh = tl.program_id(0) % (WV // BV), tl.program_id(0) // (WV // BV)
    i_n, i_head = i_nh // HV, i_nh % HV
    if PACKED:
        token, chunk = tl.load(p_cu_seqlens + i_n).to(tl.int64), tl.load(p_first_chunk + i_n).to(tl.int64)
        length = (tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - token).to(tl.int32)
    else:
        token, chunk, length = segment_place(i_n, T, NT, NS, SC, C)
    DT: tl.constexpr = p_w.dtype.element_ty
    if TRANSITION:
        b_S = tl.where(tl.arange(0, BK)[:, None] == i_v * BV + tl.arange(0, BV)[None, :], 1.0, 0.0)
    elif HAS_INITIAL:
        b_S = load_state(p_initial, i_nh, i_v, K, V, BK, BV, V_FIRST)
    else:
        b_S = tl.zeros((BK, BV), dtype=tl.float32)
    for i in tl.range((length + C - 1) // C, num_stages=STAGES):
        i_block = (chunk + i) * HV + i_head
        b_w = tl.load(block_pointers(p_w, i_block, 0, C, BK, BK))
        if not TRANSITION:
            b_u = tl.load(block_pointers(p_u, i_block, i_v, C, WV, BV)).to(tl.float32)
        else:
            b_u = tl.zeros((C, BV), dtype=tl.float32)
        b_kg = tl.load(block_pointers(p_kg, i_block, 0, C, BK, BK))
        b_total = exp2(tl.load(p_total + i_block * BK + tl.arange(0, BK)))
        b_S16 = b_S.to(DT)
        if WRITE_STATES:
            tl.store(block_pointers(p_states, i_block, i_v, BK, WV, BV), b_S16)
        b_y = b_u - UNIT * tl.dot(b_w, b_S16, input_precision=PRECISION)
        if WRITE_STATES:
            tl.store(block_pointers(p_y, i_block, i_v, C, WV, BV), b_y.to(DT))
        b_v = (b_y * tl.load(p_strength + i_block * C + tl.arange(0, C))[:, None]).to(DT)
        if WRITE_O:
            b_qg = tl.load(block_pointers(p_qg, i_block, 0, C, BK, BK))
            b_Aqk = tl.load(block_pointers(p_Aqk, i_block, 0, C, C, C))
            b_o = UNIT * tl.dot(b_qg, b_S16, input_precision=PRECISION)
            b_o = tl.dot(b_Aqk, b_v, b_o, input_precision=PRECISION)
            store_rows(p_o, b_o, token + i * C, length - i * C, i_head, HV, V, C, BV, i_v * BV)
        b_S = tl.dot(tl.trans(b_kg), b_v, b_S * b_total[:, None], input_precision=PRECISION)
    if WRITE_FINAL:
        store_state(p_final, b_S, i_nh, i_v, K, V, BK, BV, V_FIRST)


@triton.jit(do_not_specialize=["T", "NT", "NS", "SC"])
def scan_backward_kernel(
    p_do, p_d_final, p_qg, p_kg, p_w, p_Aqk, p_total, p_strength, p_d_states, p_dv_new, p_d_initial, p_cu_seqlens,
    p_first_chunk, T, NT, NS, SC, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WV: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_INITIAL: tl.constexpr,
    V_FIRST: tl.constexpr, WRITE_STATES: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Carry the gradient of the state of one sequence, or segment of it, and value head back through the chunks."""
    i_v, i_nh = tl.program_id(0) % (WV // BV), tl.program_id(0) // (WV // BV)
    i_n, i_head = i_nh // HV, i_nh % HV
    if PACKED:
        token, chunk = tl.load(p_cu_seqlens + i_n).to(tl.int64), tl.load(p_first_chunk + i_n).to(tl.int64)
        length = (tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - token).to(tl.int32)
    else:
        token, chunk, length = segment_place(i_n, T, NT, NS, SC, C)
    DT: tl.constexpr = p_w.dtype.element_ty
    if HAS_FINAL:
        b_dS = load_state(p_d_final, i_nh, i_v, K, V, BK, BV, V_FIRST)
    else:
        b_dS = tl.zeros((BK, BV), dtype=tl.float32)
    for step in tl.range((length + C - 1) // C, num_stages=STAGES):
        i = (length + C - 1) // C - 1 - step
        i_block = (chunk + i) * HV + i_head
        b_kg = tl.load(block_pointers(p_kg, i_block, 0, C, BK, BK))
        b_Aqk = tl.load(block_pointers(p_Aqk, i_block, 0, C, C, C))
        b_do = load_rows(p_do, token + i * C, length - i * C, i_head, HV, V, C, BV, i_v * BV).to(DT)
        b_dS16 = b_dS.to(DT)
        if WRITE_STATES:
            tl.store(block_pointers(p_d_states, i_block, i_v, BK, WV, BV), b_dS16)
        b_dv = tl.dot(tl.trans(b_Aqk), b_do, input_precision=PRECISION)
        b_dv = tl.dot(b_kg, b_dS16, b_dv, input_precision=PRECISION)
        if WRITE_STATES:
            tl.store(block_pointers(p_dv_new, i_block, i_v, C, WV, BV), b_dv.to(DT))
        b_dy = (b_dv * tl.load(p_strength + i_block * C + tl.arange(0, C))[:, None]).to(DT)
        b_total = exp2(tl.load(p_total + i_block * BK + tl.arange(0, BK)))
        b_qg = tl.load(block_pointers(p_qg, i_block, 0, C, BK, BK))
        b_w = tl.load(block_pointers(p_w, i_block, 0, C, BK, BK))
        b_within = tl.dot(tl.trans(b_qg), b_do, input_precision=PRECISION)
        b_within = tl.dot(tl.trans(b_w), -b_dy, b_within, input_precision=PRECISION)
        b_dS = b_dS * b_total[:, None] + UNIT * b_within
    if HAS_INITIAL:
        store_state(p_d_initial, b_dS, i_nh, i_v, K, V, BK, BV, V_FIRST)
