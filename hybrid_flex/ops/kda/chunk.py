"""Chunked Kimi Delta Attention: the recurrence as matrix products over chunks of tokens and a scan over chunks.

Per sequence and value head, with ``D_ij = exp(g_{j+1} + ... + g_i)`` per key channel, ``P`` = decay from the chunk's
start through row i, ``E`` = decay after row i to the chunk's end, ``S`` the state before the chunk and ``s`` the scale:

    Aqk_ij = s <q_i, D_ij k_j>       i >= j                  L_ij = beta_i <k_i, D_ij k_j>   i > j
    (I + L) u = beta v               (I + L) w = beta P k
    v_new  = u - w S                 o = s (P q) S + Aqk v_new
    S'     = Diag(P_last) S + (E k)^T v_new

Everything but ``v_new`` and ``S'`` is computed for all chunks at once.  The backward is written out by hand as a second
operator; it recomputes the chunk quantities from the raw inputs, so the forward saves nothing but its arguments and its
output, which the kernels use, and on CUDA what training.py says (under torch.compile both stand in one graph, and
common subexpressions are computed once).
Source: Kimi Linear, arXiv:2510.26692, section 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_flex.checks import check_choice, is_exporting
from hybrid_flex.ops.chunk_scan import chunk_scan
from hybrid_flex.ops.dispatch import has_kernels, in_its_own_precision, plain_form

from .decay import Decay, DecayGrads, decay_tree, decay_tree_backward
from .inputs import (
    Active,
    Raw,
    accumulation_dtype,
    activate,
    activate_backward,
    check_inputs,
    state_or_zeros,
    state_shape,
)
from .intra import intra_chunk, intra_chunk_backward
from .layout import Packing, pack, to_chunks, to_tokens

CHUNK_SIZES = (16, 32, 64)


class _Chunks(NamedTuple):
    """Chunk quantities of the equations above, each ``[M, C, ...]`` over the M = NC * B * HV chunks of all heads."""

    q: Tensor
    """Scaled queries."""
    k: Tensor
    v: Tensor
    beta: Tensor
    k_beta: Tensor
    decay: Decay
    Aqk: Tensor
    triangle: Tensor
    """L with zeros on and above the diagonal; the solves take the unit diagonal for granted."""
    u: Tensor
    w: Tensor
    q_from_start: Tensor
    k_from_start: Tensor
    k_to_end: Tensor
    total: Tensor
    """Decay over the whole chunk, [M, K, 1]."""


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_v_first: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Run Kimi Delta Attention over whole sequences, chunk by chunk.

    The recurrence, per sequence and value head::

        S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
        o_t = scale * S_t^T q_t

    Args:
        q: queries, ``[B, T, H, K]``, bfloat16, float16, float32 or float64.
        k: keys, ``[B, T, H, K]``, dtype of q.
        v: values, ``[B, T, HV, V]``, dtype of q; HV is a multiple of H, and head h of q and k serves the value heads
            ``h * HV / H ... (h + 1) * HV / H - 1``.
        g: natural-log decay per token, ``[B, T, HV, K]``, any floating dtype, not positive (a positive value is
            undefined); the raw gate with ``use_gate_in_kernel``.
        beta: write strength, ``[B, T, HV]``, in [0, 1]; the raw logit with ``use_beta_sigmoid_in_kernel``.
        scale: factor of the output; None means ``K ** -0.5``.
        initial_state: state before the first token, ``[N, HV, K, V]``, float32 (float64 with float64 q); None means
            zero. N is B, or the number of packed sequences.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: divide q and k by ``sqrt(sum x^2 + 1e-6)`` first.
        use_gate_in_kernel: turn the raw gate g into a log decay with A_log, dt_bias and lower_bound, see `kda_gate`.
        use_beta_sigmoid_in_kernel: apply the sigmoid to beta.
        allow_neg_eigval: double the sigmoid's result, so that ``I - beta k k^T`` may have negative eigenvalues; needs
            ``use_beta_sigmoid_in_kernel``.
        safe_gate: promise that no log decay is below -5, which lets kernels take a faster path; with
            ``use_gate_in_kernel`` this needs a ``lower_bound`` in [-5, 0). The CPU form is exact without the promise.
        lower_bound: smallest log decay of the lower-bound gate; None selects the softplus gate.
        A_log: log slope of the gate, any view with HV elements.
        dt_bias: bias of the gate, any view with HV * K elements.
        cu_seqlens: boundaries of sequences packed along T, ``[N + 1]``, int32 or int64, from 0 to T, never decreasing,
            with B = 1; an empty sequence passes its state through. The values are checked only on CPU outside a graph.
        state_v_first: initial and final state are ``[N, HV, V, K]`` instead.
        chunk_size: tokens in a chunk: 16, 32 or 64.

    Returns:
        ``(o, final_state)``: o ``[B, T, HV, V]`` in the dtype of q; final_state ``[N, HV, K, V]`` in float32 (float64
        with float64 q), or None without ``output_final_state``.

    Raises:
        ValueError: a shape, size, device or option breaks a rule above.
        TypeError: a dtype is not supported, or a keyword is unknown.

    Device: CPU, in plain torch; CUDA, in Triton kernels (float64: plain torch); differentiable in q, k, v, g, beta,
        initial_state, A_log and dt_bias.

    Memory: the backward needs the arguments and o; on CUDA another 256 bytes per token and value head are kept for it
        (chunks of 64, 16-bit inputs), unless gradients are off.

    Source: Kimi Linear (arXiv:2510.26692), equations of section 3; the keywords are those of flash-linear-attention.

    >>> q = k = v = torch.randn(1, 100, 2, 16)
    >>> o, state = chunk_kda(q, k, v, -torch.rand(1, 100, 2, 16), torch.rand(1, 100, 2), output_final_state=True)
    >>> o.shape, state.shape
    (torch.Size([1, 100, 2, 16]), torch.Size([1, 2, 16, 16]))
    """
    check_choice("chunk_kda", "chunk_size", chunk_size, CHUNK_SIZES)
    flags = (use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound)
    raw = Raw(q, k, v, g, beta, A_log, dt_bias, *flags)
    check_inputs("chunk_kda", raw, initial_state, cu_seqlens, state_v_first, safe_gate)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    arguments = (*raw, initial_state, cu_seqlens, scale, state_v_first, chunk_size)
    if _is_training(raw, initial_state):
        o, final_state, _, _ = torch.ops.hybrid_flex.chunk_kda_training(*arguments)
    else:
        o, final_state = _chunk_kda(*arguments)
    return o, final_state if output_final_state else None


def _is_training(raw: Raw, initial_state: Tensor | None) -> bool:
    """Tell whether to keep what spares the backward work: training.py."""
    if not (has_kernels(raw.q) and torch.is_grad_enabled()) or is_exporting():
        return False
    return any(x is not None and x.requires_grad for x in (*raw[:7], initial_state))


@torch.library.triton_op("hybrid_flex::chunk_kda", mutates_args=())
@plain_form("chunk_kda")
@in_its_own_precision
def _chunk_kda(
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
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    state_v_first: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    raw = Raw(q, k, v, g, beta, A_log, dt_bias, l2norm, gate, sigmoid, neg_eigval, lower_bound)
    if has_kernels(q):
        from hybrid_flex.kernels.kda import chunk

        return chunk.forward(raw, initial_state, cu_seqlens, scale, state_v_first, chunk_size)
    (B, T), HV = v.shape[:2], v.shape[2]
    packing = None if cu_seqlens is None else pack(cu_seqlens, T, chunk_size)
    x = _prepare(activate(raw), scale, chunk_size, packing)
    initial = state_or_zeros(raw, initial_state, cu_seqlens, state_v_first)
    sources = (*raw[:5], initial_state, cu_seqlens)
    states, v_new, final = _scan_states(x, initial, packing, sources)
    o = torch.bmm(x.q_from_start, states) + torch.bmm(x.Aqk, v_new)
    o = to_tokens(o.unflatten(0, (-1, B * HV)), B, T, packing)
    return o.to(q.dtype).contiguous(), _final_layout(final, state_v_first)


def fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return output and final state of a KDA operator as shapes and dtypes only."""
    raw, cu_seqlens, state_v_first = Raw(*arguments[:12]), arguments[13], arguments[15]
    shape = state_shape(raw, cu_seqlens, state_v_first)
    return raw.q.new_empty(raw.v.shape), raw.q.new_empty(shape, dtype=accumulation_dtype(raw.q))


_chunk_kda.register_fake(fake)


@torch.library.triton_op("hybrid_flex::chunk_kda_backward", mutates_args=())
@in_its_own_precision
def _chunk_kda_backward(
    d_o: Tensor,
    d_final: Tensor | None,
    o: Tensor,
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
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    state_v_first: bool,
    chunk_size: int,
    A: Tensor | None = None,
    Aqk: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    raw = Raw(q, k, v, g, beta, A_log, dt_bias, l2norm, gate, sigmoid, neg_eigval, lower_bound)
    if has_kernels(q):
        from hybrid_flex.kernels.kda import chunk

        kept = None if A is None or Aqk is None else (A, Aqk)
        return chunk.backward(  # type: ignore[return-value]
            d_o, d_final, o, raw, initial_state, cu_seqlens, scale, state_v_first, chunk_size, kept
        )
    (B, T), HV = v.shape[:2], v.shape[2]
    packing = None if cu_seqlens is None else pack(cu_seqlens, T, chunk_size)
    x = _prepare(activate(raw), scale, chunk_size, packing)
    initial = state_or_zeros(raw, initial_state, cu_seqlens, state_v_first)
    sources = (*raw[:5], initial_state, cu_seqlens, d_o, d_final)
    states, v_new, _ = _scan_states(x, initial, packing, sources)
    dO = to_chunks(d_o.to(states.dtype), chunk_size, packing).flatten(0, 1)
    d_final = state_or_zeros(raw, d_final, cu_seqlens, state_v_first)
    d_states, d_v_new, d_initial = _scan_states_backward(x, dO, d_final, packing, sources)
    grads = _prepare_backward(x, states, v_new, dO, d_states, d_v_new, scale)
    dq, dk, dv, dg, d_beta = (to_tokens(grad.unflatten(0, (-1, B * HV)), B, T, packing) for grad in grads)
    active = Active(dq, dk, dv, dg, d_beta)
    d_initial = q.new_empty(0) if initial_state is None else _final_layout(d_initial, state_v_first)
    return tuple(t.contiguous() for t in (*activate_backward(raw, active), d_initial))  # type: ignore[return-value]


@_chunk_kda_backward.register_fake
def _(d_o: Tensor, d_final: Tensor | None, o: Tensor, *args: Any) -> tuple[Tensor, ...]:
    raw, initial_state = Raw(*args[:12]), args[12]
    like = (raw.q, raw.k, raw.v, raw.g, raw.beta, raw.A_log, raw.dt_bias, initial_state)
    return tuple(
        raw.q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in like
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the arguments and the output of a KDA operator, which the caller holds anyway, and what it kept besides."""
    o, _, *kept = output
    ctx.save_for_backward(o, *inputs[:7], *inputs[12:14], *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # or zeros as large as what was kept would be made
    ctx.options = (inputs[7:12], inputs[14:])


def backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Compute gradients of a KDA operator's arguments, in the order of its schema."""
    saved = ctx.saved_tensors  # asked for once: checkpointing allows no more
    o, *raw, initial_state, cu_seqlens = saved[:10]
    flags, options = ctx.options
    d_o = torch.zeros_like(o) if d_o is None else d_o
    arguments = (*raw, *flags, initial_state, cu_seqlens, *options)
    grads = _chunk_kda_backward(d_o, d_final, o, *arguments, *saved[10:])
    wanted = [None if x is None else grad for x, grad in zip((*raw, initial_state), grads, strict=True)]
    return (*wanted[:7], *[None] * len(flags), wanted[7], None, *[None] * len(options))


torch.library.register_autograd("hybrid_flex::chunk_kda", backward, setup_context=setup_context)


def _prepare(x: Active, scale: float, chunk_size: int, packing: Packing | None) -> _Chunks:
    """Compute, for all chunks at once, everything that does not need the state."""
    chunked = (to_chunks(t, chunk_size, packing).flatten(0, 1) for t in (*x[:4], x.beta[..., None]))
    q, k, v, g, beta = chunked
    q, k_beta = q * scale, beta * k
    decay = decay_tree(g)
    Aqk, L = intra_chunk(q, k, k_beta, decay)
    k_from_start = k_beta * decay.from_start
    solution = _solve(L, torch.cat((beta * v, k_from_start), -1), transposed=False)
    u, w = solution.split((v.shape[-1], k.shape[-1]), -1)
    total = decay.from_start[:, -1, :, None]
    inter = (q * decay.from_start, k_from_start, k * decay.to_end, total)
    return _Chunks(q, k, v, beta, k_beta, decay, Aqk, L, u, w, *inter)


def _solve(L: Tensor, right: Tensor, transposed: bool) -> Tensor:
    """Solve ``(I + L) x = right [M, C, X]``, or ``(I + L)^T x = right``, by substitution."""
    matrix = L.mT if transposed else L
    return torch.linalg.solve_triangular(matrix, right, upper=transposed, unitriangular=True)


def _final_layout(state: Tensor, state_v_first: bool) -> Tensor:
    return (state.mT if state_v_first else state).contiguous()


def _scan_states(
    x: _Chunks, initial: Tensor, packing: Packing | None, sources: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry the state through the chunks.

    Returns the state before every chunk ``[M, K, V]``, ``v_new [M, C, V]`` and the final states ``[N, HV, K, V]``.
    """
    num_rows = initial.shape[0] * initial.shape[1] if packing is None else initial.shape[1]
    xs = tuple(t.unflatten(0, (-1, num_rows)) for t in (x.u, x.w, x.k_to_end, x.total))
    if packing is None:
        start = initial.flatten(0, 1)
    else:
        start = torch.zeros_like(initial[0])
        xs += (packing.is_first, initial.index_select(0, packing.sequence))

    def step(S: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        u, w, k_to_end, total, *restart = xs
        if restart:
            S = torch.where(restart[0], restart[1], S)
        v_new = torch.baddbmm(u, w, S, alpha=-1)
        return torch.baddbmm(total * S, k_to_end.mT, v_new), (S, v_new)

    final, (states, v_new) = chunk_scan(step, start, xs, sources)
    if packing is None:
        final = final.view(initial.shape)
    else:
        # The state after the last chunk of each sequence, by one more step from the state before it.
        last = (t.index_select(0, packing.last_chunk) for t in (xs[3], xs[2], states, v_new))
        total, k_to_end, S, v = last
        final = torch.where(packing.is_empty[:, None, None, None], initial, total * S + k_to_end.mT @ v)
    return states.flatten(0, 1), v_new.flatten(0, 1), final


def _scan_states_backward(
    x: _Chunks, dO: Tensor, d_final: Tensor, packing: Packing | None, sources: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry the state's gradient through the chunks in reverse.

    Returns the gradient of the state after every chunk ``[M, K, V]``, that of ``v_new [M, C, V]``, and that of the
    initial states ``[N, HV, K, V]``.
    """
    num_rows = d_final.shape[0] * d_final.shape[1] if packing is None else d_final.shape[1]
    inside = (torch.bmm(x.Aqk.mT, dO), torch.bmm(x.q_from_start.mT, dO), x.w, x.k_to_end, x.total)
    xs = tuple(t.unflatten(0, (-1, num_rows)).flip(0) for t in inside)
    if packing is None:
        start = d_final.flatten(0, 1)
    else:
        start = torch.zeros_like(d_final[0])
        xs += (packing.is_last.flip(0), d_final.index_select(0, packing.sequence.flip(0)))

    def step(dS: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        d_v, from_output, w, k_to_end, total, *restart = xs
        if restart:
            dS = torch.where(restart[0], restart[1], dS)
        d_v_new = torch.baddbmm(d_v, k_to_end, dS)
        return torch.baddbmm(total * dS + from_output, w.mT, d_v_new, alpha=-1), (dS, d_v_new)

    d_initial, stacked = chunk_scan(step, start, xs, sources)
    d_states, d_v_new = (t.flip(0) for t in stacked)
    if packing is None:
        d_initial = d_initial.view(d_final.shape)
    else:
        # The gradient before the first chunk of each sequence, by one more step from the gradient after it.
        source = (*(t.flip(0) for t in (xs[4], xs[1], xs[2])), d_states, d_v_new)
        total, from_output, w, dS, d_v = (t.index_select(0, packing.first_chunk) for t in source)
        inner = total * dS + from_output - w.mT @ d_v
        d_initial = torch.where(packing.is_empty[:, None, None, None], d_final, inner)
    return d_states.flatten(0, 1), d_v_new.flatten(0, 1), d_initial


def _prepare_backward(
    x: _Chunks, S: Tensor, v_new: Tensor, dO: Tensor, dS: Tensor, d_v_new: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of the chunked q, k, v and g, each ``[M, C, X]``, and beta ``[M, C]``.

    With ``X = (I + L)^-1 Y`` the gradients are ``dY = (I + L)^-T dX`` and ``dL = -dY X^T``; here ``X = [u, w]``,
    ``dX = [d_v_new, -d_v_new S^T]`` and ``Y = [beta v, P beta k]``.
    """
    V = x.v.shape[-1]
    d_solution = torch.cat((d_v_new, -torch.bmm(d_v_new, S.mT)), -1)
    d_right = _solve(x.triangle, d_solution, transposed=True)
    d_v_beta, d_k_from_start = d_right[..., :V], d_right[..., V:]
    d_L = -(torch.bmm(d_v_beta, x.u.mT) + torch.bmm(d_k_from_start, x.w.mT))
    d_Aqk = torch.bmm(dO, v_new.mT)
    d_q_from_start, d_k_to_end = torch.bmm(dO, S.mT), torch.bmm(v_new, dS.mT)
    intra = intra_chunk_backward(x.q, x.k, x.k_beta, x.decay, d_Aqk, d_L)
    dq, dk, dk_beta, d_tile, d_levels = intra

    from_start, to_end = x.decay.from_start, x.decay.to_end
    dq = dq + d_q_from_start * from_start
    dk_beta = dk_beta + d_k_from_start * from_start
    dk = dk + d_k_to_end * to_end + dk_beta * x.beta
    d_beta = (d_v_beta * x.v).sum(-1) + (dk_beta * x.k).sum(-1)
    d_prefix = d_q_from_start * x.q_from_start + d_k_from_start * x.k_from_start
    d_total = (x.total * S * dS).sum(-1)  # the exponent of the whole chunk's decay is the prefix of its last row
    d_prefix = torch.cat((d_prefix[:, :-1], d_prefix[:, -1:] + d_total[:, None]), 1)
    dg = decay_tree_backward(DecayGrads(d_tile, d_levels, d_prefix, d_k_to_end * x.k_to_end))
    # Solutions come column by column. Left so, one chunk cut off after T rows would be dense for T = 64 alone, and a
    # graph traced with that length would serve no other.
    dv = (d_v_beta * x.beta).contiguous()
    return dq * scale, dk, dv, dg, d_beta
