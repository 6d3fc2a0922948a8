"""Token-by-token Kimi Delta Attention: `kda_step` for one token, `fused_recurrent_kda` for a few (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_flex.checks import FLOATING, check, check_choice, check_dtype, check_rank, check_shape
from hybrid_flex.ops.chunk_scan import chunk_scan

from .chunk import CHUNK_SIZES, backward, fake, setup_context
from .inputs import Raw, accumulation_dtype, activate, check_inputs, initial_state_or_zeros


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
    x = activate(raw)
    start = initial_state_or_zeros(raw, initial_state, cu_seqlens, state_v_first)
    # Token-major slices for the scan: [T, B, HV, ...].
    tokens = tuple(t.transpose(0, 1) for t in (x.q * scale, x.k, x.v, x.g, x.beta[..., None]))
    if cu_seqlens is not None:
        position = torch.arange(q.shape[1], device=q.device)
        owner = torch.searchsorted(cu_seqlens[1:].long(), position, right=True)
        tokens += (owner[:, None],)

    def step(S: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if cu_seqlens is None:
            o, S = _advance(S, *xs)
            return S, (o,)
        # The carry holds the states of all packed sequences; this token advances the one it belongs to.
        *token, owner = xs
        o, advanced = _advance(S.index_select(0, owner), *token)
        return S.index_copy(0, owner, advanced), (o,)

    final, (o,) = chunk_scan(step, start, tokens, (*raw[:5], initial_state, cu_seqlens))
    final = final.mT if state_v_first else final
    return o.transpose(0, 1).to(q.dtype).contiguous(), final.contiguous()


_fused_recurrent_kda.register_fake(fake)
torch.library.register_autograd("hybrid_flex::fused_recurrent_kda", backward, setup_context=setup_context)


def _advance(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Advance states ``[..., K, V]`` by a token: scaled q, k, g ``[..., K]``, v ``[..., V]``, beta ``[..., 1]``."""
    S = g.exp()[..., None] * S
    prediction = (k[..., None, :] @ S).squeeze(-2)
    S = S + (beta * k)[..., None] * (v - prediction)[..., None, :]
    return (q[..., None, :] @ S).squeeze(-2), S
