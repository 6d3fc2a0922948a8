"""Kimi Delta Attention as written in the paper: the specification that every other form is judged against."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def kda_reference(
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
    lower_bound: float | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run the exact KDA recurrence, one token after another::

        S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
        o_t = scale * S_t^T q_t

    Slow and plain, in float64 for float64 inputs and in float32 otherwise; `chunk_kda` says more about the arguments.

    Args:
        q: queries, ``[B, T, H, K]``.
        k: keys, ``[B, T, H, K]``.
        v: values, ``[B, T, HV, V]``, HV a multiple of H.
        g: log decay, or the raw gate, ``[B, T, HV, K]``.
        beta: write strength, or its logit, ``[B, T, HV]``.
        scale: factor of the output; None means ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]``; None means zero.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: divide q and k by ``sqrt(sum x^2 + 1e-6)`` first.
        use_gate_in_kernel: turn the raw gate into a log decay.
        use_beta_sigmoid_in_kernel: apply the sigmoid to beta.
        allow_neg_eigval: double the sigmoid's result.
        lower_bound: smallest log decay of the lower-bound gate; None selects the softplus gate.
        A_log: log slope of the gate, HV elements.
        dt_bias: bias of the gate, HV * K elements.
        cu_seqlens: boundaries of packed sequences, ``[N + 1]``, read on the host.
        state_v_first: states are ``[N, HV, V, K]``.

    Returns:
        ``(o, final_state or None)``: o ``[B, T, HV, V]`` in the dtype of q, final_state in the dtype of the sums.

    Raises:
        RuntimeError: whatever torch raises where shapes do not fit; the specification checks nothing itself.

    Device: any; differentiable by autograd.

    Source: Kimi Linear (arXiv:2510.26692), section 3.

    >>> x = torch.randn(1, 5, 2, 8)
    >>> kda_reference(x, x, x, -torch.rand(1, 5, 2, 8), torch.rand(1, 5, 2))[0].shape
    torch.Size([1, 5, 2, 8])
    """
    out_dtype, dtype = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    (HV, V), K = v.shape[2:], k.shape[-1]
    scale = K**-0.5 if scale is None else scale
    if use_qk_l2norm_in_kernel:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if use_gate_in_kernel:
        z = g if dt_bias is None else g + dt_bias.to(dtype).reshape(HV, K)
        slope = 1.0 if A_log is None else A_log.to(dtype).exp().reshape(HV, 1)
        g = -slope * F.softplus(z) if lower_bound is None else lower_bound * torch.sigmoid(slope * z)
    if use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(beta) * (2.0 if allow_neg_eigval else 1.0)
    q, k = (x.repeat_interleave(HV // x.shape[2], dim=2) for x in (q, k))

    if cu_seqlens is None:
        spans = [(b, 0, q.shape[1]) for b in range(q.shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        spans = [(0, start, end) for start, end in itertools.pairwise(bounds)]
    outputs, finals = [], []
    for n, (b, start, end) in enumerate(spans):
        S = q.new_zeros(HV, K, V) if initial_state is None else initial_state[n].to(dtype)
        if initial_state is not None and state_v_first:
            S = S.mT
        for t in range(start, end):
            S = g[b, t].exp()[..., None] * S
            prediction = torch.einsum("hk,hkv->hv", k[b, t], S)
            S = S + torch.einsum("hk,hv->hkv", beta[b, t, :, None] * k[b, t], v[b, t] - prediction)
            outputs.append(scale * torch.einsum("hk,hkv->hv", q[b, t], S))
        finals.append(S.mT if state_v_first else S)
    o = torch.stack(outputs).view(v.shape).to(out_dtype)
    return o, torch.stack(finals) if output_final_state else None
