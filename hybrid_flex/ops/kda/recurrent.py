"""Token-by-token Kimi Delta Attention.

`kda_step` for one token, `fused_recurrent_kda` for a few, `kda_decode` for a few with the states of a server's pool
updated where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_flex.checks import (
    FLOATING,
    INTEGER,
    check,
    check_choice,
    check_device,
    check_dtype,
    check_rank,
    check_shape,
)
from hybrid_flex.ops.chunk_scan import chunk_scan
from hybrid_flex.ops.dispatch import has_kernels, in_its_own_precision, plain_form

from .chunk import CHUNK_SIZES, backward, fake, setup_context
from .inputs import Raw, accumulation_dtype, activate, check_inputs, state_or_zeros


def kda_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Advance the KDA state by one token and read it::

        S' = (I - beta k k^T) Diag(exp(g)) S + beta k v^T,      o = scale * S'^T q

    Args:
        q: query, ``[B, H, K]``, any floating dtype.
        k: key, ``[B, H, K]``.
        v: value, ``[B, HV, V]``, HV a multiple of H.
        g: natural-log decay, ``[B, HV, K]``, not positive.
        beta: write strength, ``[B, HV]``.
        state: S before the token, ``[B, HV, K, V]``, float32 (float64 with float64 q); it is not modified.
        scale: factor of the output; None means ``K ** -0.5``.

    Returns:
        ``(o, new_state)``: o ``[B, HV, V]`` in the dtype of q, new_state like ``state``.

    Raises:
        ValueError: a shape does not match.
        TypeError: a dtype is not floating point, or the state's dtype is not the one above.

    Device: any; differentiable in every tensor.

    Source: Kimi Linear (arXiv:2510.26692), section 3.

    >>> q = k = v = torch.randn(2, 3, 8)
    >>> o, state = kda_step(q, k, v, -torch.rand(2, 3, 8), torch.rand(2, 3), torch.zeros(2, 3, 8, 8))
    >>> o.shape, state.shape
    (torch.Size([2, 3, 8]), torch.Size([2, 3, 8, 8]))
    """
    check_rank("kda_step", "q", q, "[B, H, K]")
    check_rank("kda_step", "v", v, "[B, HV, V]")
    (B, H, K), (HV, V) = q.shape, v.shape[1:]
    check_dtype("kda_step", "q", q, FLOATING)
    check_shape("kda_step", "k", k, (B, H, K), "[B, H, K]")
    check_shape("kda_step", "v", v, (B, HV, V), "[B, HV, V]")
    check(HV % H == 0, "kda_step", "v", f"have a number of heads that is a multiple of H = {H}", HV)
    check_shape("kda_step", "g", g, (B, HV, K), "[B, HV, K]")
    check_shape("kda_step", "beta", beta, (B, HV), "[B, HV]")
    check_shape("kda_step", "state", state, (B, HV, K, V), "[B, HV, K, V]")
    dtype = accumulation_dtype(q)
    check_dtype("kda_step", "state", state, (dtype,))
    query, key = (x.to(dtype).repeat_interleave(HV // H, dim=1) for x in (q, k))
    scale = K**-0.5 if scale is None else scale
    o, S = _advance(state, query * scale, key, v.to(dtype), g.to(dtype), beta.to(dtype)[..., None])
    return o.to(q.dtype), S


def fused_recurrent_kda(
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
    """Run Kimi Delta Attention token after token: the form for decoding a few tokens per sequence.

    Takes and returns what `chunk_kda` does and computes the same function::

        S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
        o_t = scale * S_t^T q_t

    Args:
        q: queries, ``[B, T, H, K]``.
        k: keys, ``[B, T, H, K]``.
        v: values, ``[B, T, HV, V]``.
        g: log decay or raw gate, ``[B, T, HV, K]``.
        beta: write strength or its logit, ``[B, T, HV]``.
        scale: factor of the output; None means ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]``, float32 (float64 with float64 q), not modified; None means zero.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: normalise q and k first.
        use_gate_in_kernel: g is the raw gate, see `kda_gate`.
        use_beta_sigmoid_in_kernel: beta is a logit.
        allow_neg_eigval: double the sigmoid's result.
        safe_gate: promise that no log decay is below -5.
        lower_bound: smallest log decay of the lower-bound gate.
        A_log: log slope of the gate, HV elements.
        dt_bias: bias of the gate, HV * K elements.
        cu_seqlens: boundaries of packed sequences, ``[N + 1]``, with B = 1.
        state_v_first: states are ``[N, HV, V, K]``.
        chunk_size: tokens in a chunk of the backward, which is the chunked one: 16, 32 or 64.

    Returns:
        ``(o, final_state or None)``: o ``[B, T, HV, V]`` in the dtype of q.

    Raises:
        ValueError: a shape, size, device or option breaks a rule.
        TypeError: a dtype is not supported, or a keyword is unknown.

    Device: CPU and CUDA; differentiable.

    Source: Kimi Linear (arXiv:2510.26692), section 3; the keywords are those of flash-linear-attention.

    >>> q = k = v = torch.randn(2, 1, 3, 16)
    >>> fused_recurrent_kda(q, k, v, -torch.rand(2, 1, 3, 16), torch.rand(2, 1, 3))[0].shape
    torch.Size([2, 1, 3, 16])
    """
    check_choice("fused_recurrent_kda", "chunk_size", chunk_size, CHUNK_SIZES)
    flags = (use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound)
    raw = Raw(q, k, v, g, beta, A_log, dt_bias, *flags)
    check_inputs("fused_recurrent_kda", raw, initial_state, cu_seqlens, state_v_first, safe_gate)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, final_state = _fused_recurrent_kda(*raw, initial_state, cu_seqlens, scale, state_v_first, chunk_size)
    return o, final_state if output_final_state else None


@torch.library.triton_op("hybrid_flex::fused_recurrent_kda", mutates_args=())
@plain_form("fused_recurrent_kda")
@in_its_own_precision
def _fused_recurrent_kda(
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
        from hybrid_flex.kernels.kda.decode import launch_decode

        o, final = fake(*raw, initial_state, cu_seqlens, scale, state_v_first, chunk_size)
        launch_decode(*raw, cu_seqlens, scale, state_v_first, o=o, state=final, initial_state=initial_state)
        return o, final
    start = state_or_zeros(raw, initial_state, cu_seqlens, state_v_first)
    o, final = _recur(raw, start, cu_seqlens, scale, (initial_state,))
    return o, (final.mT if state_v_first else final).contiguous()


_fused_recurrent_kda.register_fake(fake)
torch.library.register_autograd("hybrid_flex::fused_recurrent_kda", backward, setup_context=setup_context)


def kda_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    state_indices: Tensor | None = None,
    scale: float | None = None,
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
) -> Tensor:
    """Decode a few tokens per sequence and update the states in place, in the slots of a pool.

    The function of `fused_recurrent_kda`, for inference servers::

        S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T          S_0 = state[state_indices[n]]
        o_t = scale * S_t^T q_t                                                         state[state_indices[n]] = S_T

    Inference only: nothing is recorded for a backward, so an argument that requires grad is refused unless gradients
    are switched off (``torch.no_grad``, ``torch.inference_mode``).  Nothing waits for the device, so calls can be
    captured in a CUDA graph; pad a captured batch with sequences of slot -1.

    Args:
        q: queries of the new tokens, ``[B, T, H, K]``, bfloat16, float16, float32 or float64.
        k: keys, ``[B, T, H, K]``, dtype of q.
        v: values, ``[B, T, HV, V]``, dtype of q; HV is a multiple of H.
        g: log decay or raw gate, ``[B, T, HV, K]``, any floating dtype.
        beta: write strength or its logit, ``[B, T, HV]``, any floating dtype.
        state: the pool, ``[num_slots, HV, K, V]``, float32 (float64 with float64 q), modified in place; each slot
            contiguous, the distance between slots free.
        state_indices: slot of each sequence, ``[N]``, int32 or int64, below ``num_slots``, no slot twice; a negative
            one skips its sequence: no slot is touched and the output rows are zero. None: sequence n has slot n.
        scale: factor of the output; None means ``K ** -0.5``.
        use_qk_l2norm_in_kernel: divide q and k by ``sqrt(sum x^2 + 1e-6)`` first.
        use_gate_in_kernel: g is the raw gate, see `kda_gate`.
        use_beta_sigmoid_in_kernel: beta is a logit.
        allow_neg_eigval: double the sigmoid's result.
        safe_gate: promise that no log decay is below -5.
        lower_bound: smallest log decay of the lower-bound gate; None selects the softplus gate.
        A_log: log slope of the gate, HV elements.
        dt_bias: bias of the gate, HV * K elements.
        cu_seqlens: boundaries of packed sequences, ``[N + 1]``, with B = 1, for numbers of new tokens that differ; an
            empty sequence leaves its slot as it is. Without it N = B.
        state_v_first: the pool is ``[num_slots, HV, V, K]``.

    Returns:
        o, ``[B, T, HV, V]``, in the dtype of q.

    Raises:
        ValueError: a shape, size, device, stride or option breaks a rule, or gradients would have to be recorded.
        TypeError: a dtype is not supported, or a keyword is unknown.

    Device: CPU and CUDA; not differentiable.

    Source: Kimi Linear (arXiv:2510.26692), section 3.

    >>> q = k = v = torch.randn(2, 1, 3, 16)
    >>> pool, slots = torch.zeros(8, 3, 16, 16), torch.tensor([5, 2])
    >>> o = kda_decode(q, k, v, -torch.rand(2, 1, 3, 16), torch.rand(2, 1, 3), pool, state_indices=slots)
    >>> o.shape, pool.flatten(1).any(1).nonzero().flatten()
    (torch.Size([2, 1, 3, 16]), tensor([2, 5]))
    """
    op = "kda_decode"
    flags = (use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound)
    raw = Raw(q, k, v, g, beta, A_log, dt_bias, *flags)
    check_inputs(op, raw, None, cu_seqlens, state_v_first, safe_gate)
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check_pool(op, raw, state, state_indices, num_sequences, state_v_first)
    if torch.is_grad_enabled():
        rule = "not require grad: this operator has no backward, call it under torch.no_grad()"
        for name, x in (*zip(Raw._fields[:7], raw[:7], strict=True), ("state", state)):
            check(not (isinstance(x, Tensor) and x.requires_grad), op, name, rule, "requires_grad=True")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _kda_decode(*raw, state, state_indices, cu_seqlens, scale, state_v_first)


@torch.library.triton_op("hybrid_flex::kda_decode", mutates_args=("state",))
@in_its_own_precision
def _kda_decode(
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
    state: Tensor,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    state_v_first: bool,
) -> Tensor:
    raw = Raw(q, k, v, g, beta, A_log, dt_bias, l2norm, gate, sigmoid, neg_eigval, lower_bound)
    if has_kernels(q):
        from hybrid_flex.kernels.kda.decode import launch_decode

        o = q.new_empty(v.shape)
        options = (cu_seqlens, scale, state_v_first)
        launch_decode(*raw, *options, o=o, state=state, in_place=True, state_indices=state_indices)
        return o
    pool = state.mT if state_v_first else state
    if state_indices is None:
        slots = pool.narrow(0, 0, q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        o, final = _recur(raw, slots, cu_seqlens, scale, (state,))
        slots.copy_(final)
        return o
    rows, skip = state_indices.long().clamp(min=0), state_indices < 0
    o, final = _recur(raw, pool.index_select(0, rows), cu_seqlens, scale, (state, state_indices))
    # A skipped sequence has no slot to write to, and how many are skipped must not become a size.  All of them write to
    # slot 0 what belongs there: the new state of the sequence that owns it, or what it holds if none does.
    owns_first = state_indices == 0
    new_first = final.index_select(0, owns_first.int().argmax(0, keepdim=True))
    first = torch.where(owns_first.any(), new_first, pool[:1])
    pool.index_copy_(0, rows, torch.where(skip[:, None, None, None], first, final))
    skipped_tokens = skip[:, None] if cu_seqlens is None else skip[_owner(cu_seqlens, q)][None]
    return torch.where(skipped_tokens[..., None, None], 0, o)


@_kda_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty(v.shape)


def _check_pool(
    op: str, raw: Raw, state: Tensor, state_indices: Tensor | None, num_sequences: int, state_v_first: bool
) -> None:
    """Check the pool of states and the slots of the sequences."""
    K, (HV, V) = raw.k.shape[-1], raw.v.shape[2:]
    dims, legend = ((V, K), "[num_slots, HV, V, K]") if state_v_first else ((K, V), "[num_slots, HV, K, V]")
    check_shape(op, "state", state, (None, HV, *dims), legend)
    check_dtype(op, "state", state, (accumulation_dtype(raw.q),))
    check_device(op, "state", state, raw.q.device)
    want = 1
    for size, stride in zip(reversed(state.shape[1:]), reversed(state.stride()[1:]), strict=True):
        # The stride of a dimension of size 1 means nothing.
        check(size == 1 or stride == want, op, "state", "have the strides of contiguous slots", state.stride())
        want = want * size
    if state_indices is None:
        rule = "have a slot for every sequence, or come with state_indices"
        check(state.shape[0] >= num_sequences, op, "state", rule, state.shape[0])
        return
    check_shape(op, "state_indices", state_indices, (num_sequences,), "[N]")
    check_dtype(op, "state_indices", state_indices, INTEGER)
    check_device(op, "state_indices", state_indices, raw.q.device)


def _recur(
    raw: Raw, start: Tensor, cu_seqlens: Tensor | None, scale: float, sources: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Run the tokens of each sequence from ``start [N, HV, K, V]``: the plain form, on any device.

    Returns the output ``[B, T, HV, V]`` and the states after the last tokens; ``sources`` as in `chunk_scan`.
    """
    x = activate(raw)
    # Token-major slices for the scan: [T, B, HV, ...].
    tokens = tuple(t.transpose(0, 1) for t in (x.q * scale, x.k, x.v, x.g, x.beta[..., None]))
    if cu_seqlens is not None:
        tokens += (_owner(cu_seqlens, raw.q)[:, None],)

    def step(S: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if cu_seqlens is None:
            o, S = _advance(S, *xs)
            return S, (o,)
        # The carry holds the states of all packed sequences; this token advances the one it belongs to.
        *token, owner = xs
        o, advanced = _advance(S.index_select(0, owner), *token)
        return S.index_copy(0, owner, advanced), (o,)

    final, (o,) = chunk_scan(step, start, tokens, (*raw[:5], *sources, cu_seqlens))
    return o.transpose(0, 1).to(raw.q.dtype).contiguous(), final


def _owner(cu_seqlens: Tensor, q: Tensor) -> Tensor:
    """Return the packed sequence that each token of ``q [1, T, H, K]`` belongs to, ``[T]``."""
    position = torch.arange(q.shape[1], device=q.device)
    return torch.searchsorted(cu_seqlens[1:].long(), position, right=True)


def _advance(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Advance states ``[..., K, V]`` by a token: scaled q, k, g ``[..., K]``, v ``[..., V]``, beta ``[..., 1]``."""
    S = g.exp()[..., None] * S
    prediction = (k[..., None, :] @ S).squeeze(-2)
    S = S + (beta * k)[..., None] * (v - prediction)[..., None, :]
    return (q[..., None, :] @ S).squeeze(-2), S
