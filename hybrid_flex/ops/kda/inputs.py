"""What every KDA operator does to its arguments: check them, activate the raw ones, send gradients back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_flex.checks import FLOATING, check, check_cu_seqlens, check_device, check_dtype, check_rank, check_shape

from .gate import check_gate_parameters, gate_backward, kda_gate

MAX_HEAD_DIM = 256
L2_NORM_EPS = 1e-6


class Raw(NamedTuple):
    """Arguments of a KDA operator as it receives them; the same names as in `chunk_kda`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    l2norm: bool
    gate: bool
    sigmoid: bool
    neg_eigval: bool
    lower_bound: float | None


class Active(NamedTuple):
    """What the recurrence reads, token-major, all in the accumulation dtype and with HV heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


class InputGrads(NamedTuple):
    """Gradients of the raw inputs, each in its input's dtype and shape; empty where the input is absent."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor
    dt_bias: Tensor


def check_inputs(
    op: str,
    raw: Raw,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_v_first: bool,
    safe_gate: bool,
) -> None:
    """Check every argument of a KDA operator; see `chunk_kda` for the rules."""
    q, k, v, g, beta = raw[:5]
    check_rank(op, "q", q, "[B, T, H, K]")
    check_rank(op, "v", v, "[B, T, HV, V]")
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    check_dtype(op, "q", q, FLOATING)
    check_shape(op, "k", k, (B, T, H, K), "[B, T, H, K]")
    check_shape(op, "v", v, (B, T, HV, V), "[B, T, HV, V]")
    check_shape(op, "g", g, (B, T, HV, K), "[B, T, HV, K]")
    check_shape(op, "beta", beta, (B, T, HV), "[B, T, HV]")
    check(HV % H == 0, op, "v", f"have a number of heads that is a multiple of H = {H}", HV)
    check(1 <= K <= MAX_HEAD_DIM, op, "q", f"have a head width K from 1 to {MAX_HEAD_DIM}", K)
    check(1 <= V <= MAX_HEAD_DIM, op, "v", f"have a head width V from 1 to {MAX_HEAD_DIM}", V)
    check(T >= 1, op, "q", "hold at least one token", tuple(q.shape))
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(op, name, tensor, (q.dtype,))
    for name, tensor in (("g", g), ("beta", beta)):
        check_dtype(op, name, tensor, FLOATING)
    for name, tensor in (("k", k), ("v", v), ("g", g), ("beta", beta)):
        check_device(op, name, tensor, q.device)
    if raw.gate:
        check_gate_parameters(op, g, raw.A_log, raw.dt_bias, raw.lower_bound)
    else:
        for name, parameter in (("A_log", raw.A_log), ("dt_bias", raw.dt_bias)):
            check(parameter is None, op, name, "come with use_gate_in_kernel=True", "use_gate_in_kernel=False")
    if safe_gate and raw.gate:
        ok = raw.lower_bound is not None and -5 <= raw.lower_bound < 0
        check(ok, op, "lower_bound", "be in [-5, 0) when safe_gate=True", raw.lower_bound)
    rule = "come with use_beta_sigmoid_in_kernel=True"
    check(raw.sigmoid or not raw.neg_eigval, op, "allow_neg_eigval", rule, "use_beta_sigmoid_in_kernel=False")
    num_sequences = B
    if cu_seqlens is not None:
        check_device(op, "cu_seqlens", cu_seqlens, q.device)
        check_cu_seqlens(op, cu_seqlens, B, T)
        num_sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        dims, legend = ((V, K), "[N, HV, V, K]") if state_v_first else ((K, V), "[N, HV, K, V]")
        check_shape(op, "initial_state", initial_state, (num_sequences, HV, *dims), legend)
        check_dtype(op, "initial_state", initial_state, (accumulation_dtype(q),))
        check_device(op, "initial_state", initial_state, q.device)


def accumulation_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of the state and of every sum: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def state_shape(raw: Raw, cu_seqlens: Tensor | None, state_v_first: bool) -> tuple[int, ...]:
    """Return the shape of initial and final states."""
    K, (B, _, HV, V) = raw.k.shape[-1], raw.v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (N, HV, V, K) if state_v_first else (N, HV, K, V)


def state_or_zeros(raw: Raw, state: Tensor | None, cu_seqlens: Tensor | None, state_v_first: bool) -> Tensor:
    """Return an initial state, or the gradient of a final one, ``[N, HV, K, V]``; zeros where there is none."""
    if state is not None:
        return state.mT if state_v_first else state
    return raw.v.new_zeros(state_shape(raw, cu_seqlens, False), dtype=accumulation_dtype(raw.q))


def activate(raw: Raw) -> Active:
    """Apply norm, gate and sigmoid where asked for, and give q and k one copy per value head."""
    dtype, HV = accumulation_dtype(raw.q), raw.v.shape[2]
    q, k = raw.q.to(dtype), raw.k.to(dtype)
    if raw.l2norm:
        q, k = q * _inverse_norm(q), k * _inverse_norm(k)
    g = kda_gate(raw.g, raw.A_log, raw.dt_bias, lower_bound=raw.lower_bound) if raw.gate else raw.g
    beta = raw.beta.to(dtype)
    if raw.sigmoid:
        beta = torch.sigmoid(beta) * (2 if raw.neg_eigval else 1)
    return Active(_repeat_heads(q, HV), _repeat_heads(k, HV), raw.v.to(dtype), g.to(dtype), beta)


def activate_backward(raw: Raw, grads: Active) -> InputGrads:
    """Send gradients of the activated inputs back to the raw ones."""
    dtype, H = accumulation_dtype(raw.q), raw.q.shape[2]
    dq, dk = _sum_heads(grads.q, H), _sum_heads(grads.k, H)
    if raw.l2norm:
        dq, dk = _l2_norm_backward(raw.q.to(dtype), dq), _l2_norm_backward(raw.k.to(dtype), dk)
    dg, dbeta = grads.g, grads.beta
    d_A_log = d_dt_bias = raw.g.new_empty(0)
    if raw.gate:
        dg, d_A_log, d_dt_bias = gate_backward(dg, raw.g, raw.A_log, raw.dt_bias, raw.lower_bound)
    if raw.sigmoid:
        s = torch.sigmoid(raw.beta.to(dtype))
        dbeta = dbeta * s * (1 - s) * (2 if raw.neg_eigval else 1)
    return InputGrads(
        dq.to(raw.q.dtype),
        dk.to(raw.k.dtype),
        grads.v.to(raw.v.dtype),
        dg.to(raw.g.dtype),
        dbeta.to(raw.beta.dtype),
        raw.g.new_empty(0) if raw.A_log is None else d_A_log.reshape(raw.A_log.shape).to(raw.A_log.dtype),
        raw.g.new_empty(0) if raw.dt_bias is None else d_dt_bias.reshape(raw.dt_bias.shape).to(raw.dt_bias.dtype),
    )


def _inverse_norm(x: Tensor) -> Tensor:
    """Return ``1 / sqrt(sum x^2 + eps)`` per head; eps inside the root keeps a zero vector at zero."""
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_NORM_EPS)


def _l2_norm_backward(x: Tensor, dy: Tensor) -> Tensor:
    r = _inverse_norm(x)
    y = x * r
    return r * (dy - y * (dy * y).sum(-1, keepdim=True))


def _repeat_heads(x: Tensor, num_value_heads: int) -> Tensor:
    """Give every group of value heads its copy of a query or key head: ``[B, T, H, K] -> [B, T, HV, K]``."""
    group = num_value_heads // x.shape[2]
    return x if group == 1 else x.repeat_interleave(group, dim=2)


def _sum_heads(dx: Tensor, num_heads: int) -> Tensor:
    return dx if dx.shape[2] == num_heads else dx.unflatten(2, (num_heads, -1)).sum(3)
