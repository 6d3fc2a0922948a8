"""Decoding with Kimi Delta Attention: a few tokens per sequence, the state read and written once.

Per sequence and value head, with raw inputs activated first (each line where its flag asks for it)::

    q, k  <- x / sqrt(sum x^2 + eps)                           beta <- sigmoid(beta), doubled with negative eigenvalues
    g     <- -exp(A_log) softplus(g + dt_bias)                 the softplus gate
    g     <- lower_bound sigmoid(exp(A_log) (g + dt_bias))     the lower-bound gate

    P   = Diag(exp(g)) S               the decayed state [K, V]
    u   = beta (v - P^T k)
    S'  = P + k u^T
    o   = scale S'^T q = scale (P^T q + <q, k> u)

The last form reads P twice and S' never, so that both sums over K run side by side and the output does not wait for the
new state.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybrid_flex.kernels.launch import computed_once, launchable, next_power_of_2, on_its_device
from hybrid_flex.kernels.masks import mask_if

from .decay import sigmoid, softplus

# NOTE [Decode tiles]
# One token per sequence moves 2 * 4 * K * V bytes of state per head for 8 * K * V operations: only the bytes count.  A
# program keeps a slice [BK, BV] of one state in registers.  Columns are independent of each other, so V is sliced and
# K is not.  32 columns of float32 are one 128-byte line; fewer (8 are one 32-byte sector, the least that is fetched)
# only where there are so few states that whole lines would leave processors idle: two programs for each of an H100's
# 132.  32 elements a thread are eight 16-byte loads in flight, and registers for sixteen or more warps a processor.
MIN_PROGRAMS = 264
LINE_WIDTHS = (32, 16, 8)
ELEMENTS_PER_THREAD = 32
MAX_WARPS = 8


@triton.jit
def _load(p, m, FULL: tl.constexpr):
    """Load a tile as float32, zeros where ``m`` is false; ``FULL`` promises that it is true everywhere."""
    if FULL:
        b = tl.load(p)
    else:
        b = tl.load(p, mask=m, other=0.0)
    return b.to(tl.float32)


@triton.jit
def _sums_over_K(b_x, b_y):
    """Sum two tiles over their first dimension together, with one way through shared memory instead of two."""
    return tl.split(tl.sum(tl.join(b_x, b_y), 0))


@triton.jit
def kda_decode_kernel(
    p_q,
    p_k,
    p_v,
    p_g,
    p_beta,
    p_A_log,
    p_dt_bias,
    p_initial,
    p_cu_seqlens,
    p_indices,
    p_o,
    p_state,
    scale,
    lower_bound,
    slot_stride,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    L2NORM: tl.constexpr,
    GATE: tl.constexpr,
    LOWER_BOUND: tl.constexpr,
    A_LOG: tl.constexpr,
    DT_BIAS: tl.constexpr,
    SIGMOID: tl.constexpr,
    NEG_EIGVAL: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    IN_PLACE: tl.constexpr,
    INDICES: tl.constexpr,
    V_FIRST: tl.constexpr,
):
    """Advance columns ``i_v`` of the state of sequence ``i_n``, value head ``i_hv``, by all tokens of the sequence.

    The state before is read from ``p_state`` itself with ``IN_PLACE``, from ``p_initial [N, HV, K, V]`` with
    ``INITIAL``, and is zero otherwise.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    FULL_K: tl.constexpr = K == BK
    FULL_V: tl.constexpr = V % BV == 0
    FULL: tl.constexpr = FULL_K and FULL_V
    # Slices of one state stand side by side in the grid: they share its q, k and g, and lines next to each other.
    i_program = tl.program_id(0)
    i_v = i_program % NV
    i_state = i_program // NV
    i_n = (i_state // HV).to(tl.int64)
    i_hv = i_state % HV
    i_h = i_hv // (HV // H)

    if PACKED:
        first = tl.load(p_cu_seqlens + i_n).to(tl.int64)
        num_tokens = tl.load(p_cu_seqlens + i_n + 1).to(tl.int64) - first
    else:
        first = i_n * T
        num_tokens = T

    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_S = m_k[:, None] & m_v[None, :]
    p_o += (first * HV + i_hv) * V + o_v

    slot = i_n
    if INDICES:
        slot = tl.load(p_indices + i_n).to(tl.int64)
        if slot < 0:
            for _ in range(num_tokens):
                tl.store(p_o, tl.zeros([BV], tl.float32).to(p_o.dtype.element_ty), mask=m_v)
                p_o += HV * V
            return

    if V_FIRST:
        o_S = i_hv * (K * V) + o_v[None, :] * K + o_k[:, None]
    else:
        o_S = i_hv * (K * V) + o_k[:, None] * V + o_v[None, :]
    p_S = p_state + slot * slot_stride + o_S
    # The loads of the state go first: they are nearly all there is to wait for.
    if IN_PLACE:
        b_S = _load(p_S, m_S, FULL)
    elif INITIAL:
        b_S = _load(p_initial + i_n * (HV * K * V) + o_S, m_S, FULL)
    else:
        b_S = tl.zeros([BK, BV], tl.float32)

    p_q += (first * H + i_h) * K + o_k
    p_k += (first * H + i_h) * K + o_k
    p_v += (first * HV + i_hv) * V + o_v
    p_g += (first * HV + i_hv) * K + o_k
    p_beta += first * HV + i_hv
    if GATE:
        slope = 1.0
        if A_LOG:
            slope = tl.exp(tl.load(p_A_log + i_hv).to(tl.float32))
        if DT_BIAS:
            b_bias = _load(p_dt_bias + i_hv * K + o_k, m_k, FULL_K)

    # Inputs are loaded one token ahead: a token then costs its arithmetic and not the way to memory as well.
    live = num_tokens > 0
    b_next_q = tl.load(p_q, mask=mask_if(m_k, live), other=0.0)
    b_next_k = tl.load(p_k, mask=mask_if(m_k, live), other=0.0)
    b_next_v = tl.load(p_v, mask=mask_if(m_v, live), other=0.0)
    b_next_g = tl.load(p_g, mask=mask_if(m_k, live), other=0.0)
    next_beta = tl.load(p_beta, mask=live, other=0.0)
    for i_t in range(num_tokens):
        b_q = b_next_q.to(tl.float32)
        b_k = b_next_k.to(tl.float32)
        b_v = b_next_v.to(tl.float32)
        b_g = b_next_g.to(tl.float32)
        beta = next_beta.to(tl.float32)
        p_q += H * K
        p_k += H * K
        p_v += HV * V
        p_g += HV * K
        p_beta += HV
        live = i_t + 1 < num_tokens
        b_next_q = tl.load(p_q, mask=mask_if(m_k, live), other=0.0)
        b_next_k = tl.load(p_k, mask=mask_if(m_k, live), other=0.0)
        b_next_v = tl.load(p_v, mask=mask_if(m_v, live), other=0.0)
        b_next_g = tl.load(p_g, mask=mask_if(m_k, live), other=0.0)
        next_beta = tl.load(p_beta, mask=live, other=0.0)
        if GATE:
            if DT_BIAS:
                b_g += b_bias
            if LOWER_BOUND:
                b_g = lower_bound * sigmoid(slope * b_g)
            else:
                b_g = -slope * softplus(b_g)
        if SIGMOID:
            beta = sigmoid(beta)
            if NEG_EIGVAL:
                beta *= 2.0
        b_S *= tl.exp(b_g)[:, None]
        b_Pk, b_Pq = _sums_over_K(b_S * b_k[:, None], b_S * b_q[:, None])
        # The norms 1 / |q| and 1 / |k| = r_k multiply sums, not tiles, so that no sum waits for another: b_w is r_k u,
        # and k u^T is (k_raw r_k) u^T = k_raw w^T.
        if L2NORM:
            # 1e-6 is the eps of the reference; inside the root it keeps a zero vector at zero.
            b_squares, b_qk = _sums_over_K(tl.join(b_q * b_q, b_k * b_k), tl.join(b_q * b_k, b_q * b_k))
            qq, kk = tl.split(b_squares)
            qk, _ = tl.split(b_qk)
            r_k = tl.rsqrt(kk + 1e-6)
            b_w = r_k * beta * (b_v - r_k * b_Pk)
            b_o = scale * tl.rsqrt(qq + 1e-6) * (b_Pq + qk * b_w)
        else:
            b_w = beta * (b_v - b_Pk)
            b_o = scale * (b_Pq + tl.sum(b_q * b_k, 0) * b_w)
        b_S += b_k[:, None] * b_w[None, :]
        tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=m_v)
        p_o += HV * V

    if FULL:
        tl.store(p_S, b_S)
    else:
        tl.store(p_S, b_S, mask=m_S)


def tile_sizes(num_states: int, K: int, V: int) -> tuple[int, int, int]:
    """Return BK, BV and the number of warps for states ``[num_states, K, V]``; see NOTE [Decode tiles]."""
    BK = max(16, next_power_of_2(K))
    widest = max(LINE_WIDTHS[-1], next_power_of_2(V))
    widths = [width for width in LINE_WIDTHS if width <= widest]
    BV = next((width for width in widths if num_states * -(-V // width) >= MIN_PROGRAMS), widths[-1])
    return BK, BV, min(MAX_WARPS, max(1, BK * BV // (32 * ELEMENTS_PER_THREAD)))


@on_its_device
def launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    l2norm: bool,
    gate: bool,
    sigmoid: bool,
    neg_eigval: bool,
    lower_bound: float | None,
    cu_seqlens: Tensor | None,
    scale: float,
    state_v_first: bool,
    *,
    o: Tensor,
    state: Tensor,
    initial_state: Tensor | None = None,
    in_place: bool = False,
    state_indices: Tensor | None = None,
) -> None:
    """Write the outputs to ``o`` and the states after the last token to ``state``.

    Args:
        q, k, v, g, beta, A_log, dt_bias: arguments of the operators, which have checked them, as the flags that follow.
        cu_seqlens: boundaries of packed sequences, ``[N + 1]``, or None.
        scale: factor of the output.
        state_v_first: states are ``[..., HV, V, K]``.
        o: output, ``[B, T, HV, V]``, contiguous.
        state: float32 ``[num_slots, HV, K, V]``, contiguous from the second dimension on; slot n belongs to sequence n
            unless ``state_indices`` says otherwise.
        initial_state: states before the first token, ``[N, HV, K, V]``; None means zero.
        in_place: read the states before the first token from ``state`` instead.
        state_indices: slot of each sequence, ``[N]``; a negative one leaves the state alone and makes the output zero.
    """
    B, T = v.shape[:2]
    # Widths and heads are constants of the kernel (and of a graph); batch size and length are not.
    (H, K), (HV, V) = (tuple(int(size) for size in x.shape[2:]) for x in (q, v))
    num_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    BK, BV, num_warps = tile_sizes(num_sequences * HV, K, V)
    # What is absent is some pointer that the kernel does not follow: every argument keeps one type.
    tensors = (x if x is None else x.contiguous() for x in (A_log, dt_bias, initial_state, cu_seqlens, state_indices))
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    q = computed_once(q)
    pointers = tuple(q if x is None else x for x in tensors)
    launchable(kda_decode_kernel)[(num_sequences * HV * -(-V // BV),)](
        q,
        k,
        v,
        g,
        beta,
        *pointers,
        o,
        state,
        float(scale),
        0.0 if lower_bound is None else float(lower_bound),
        state.stride(0),
        T,
        H=H,
        HV=HV,
        K=K,
        V=V,
        BK=BK,
        BV=BV,
        L2NORM=l2norm,
        GATE=gate,
        LOWER_BOUND=lower_bound is not None,
        A_LOG=A_log is not None,
        DT_BIAS=dt_bias is not None,
        SIGMOID=sigmoid,
        NEG_EIGVAL=neg_eigval,
        PACKED=cu_seqlens is not None,
        INITIAL=initial_state is not None,
        IN_PLACE=in_place,
        INDICES=state_indices is not None,
        V_FIRST=state_v_first,
        num_warps=num_warps,
        num_stages=1,
    )
