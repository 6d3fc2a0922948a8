"""kda_reference against a float64 loop over matrices, written from the paper and from nothing else."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hybrid_flex.ops import kda_reference


def matrix_loop(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run one sequence of one head, with the transition matrix written out: q, k, g [T, K], v [T, V], beta [T]."""
    S, rows = state.clone(), []
    for t in range(q.shape[0]):
        transition = (torch.eye(k.shape[1]).double() - beta[t] * torch.outer(k[t], k[t])) @ torch.diag(g[t].exp())
        S = transition @ S + beta[t] * torch.outer(k[t], v[t])
        rows.append(scale * S.T @ q[t])
    return (torch.stack(rows) if rows else v), S


@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 9, 10]], ids=["batched", "packed"])
@pytest.mark.parametrize("v_first", [False, True], ids=["state-KV", "state-VK"])
def test_equals_the_matrix_loop(bounds: list[int] | None, v_first: bool) -> None:
    torch.manual_seed(0)
    B, T, H, HV, K, V = (2 if bounds is None else 1), 10, 2, 4, 5, 3
    q, k = torch.randn(2, B, T, H, K).double()
    v, g, beta = torch.randn(B, T, HV, V).double(), -torch.rand(B, T, HV, K).double(), torch.rand(B, T, HV).double()
    spans = [(b, 0, T) for b in range(B)] if bounds is None else [(0, a, b) for a, b in itertools.pairwise(bounds)]
    states = torch.randn(len(spans), HV, K, V).double()
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    initial = states.mT if v_first else states
    o, final = kda_reference(
        q, k, v, g, beta, 0.3, initial, output_final_state=True, cu_seqlens=cu_seqlens, state_v_first=v_first
    )
    for n, (b, start, end) in enumerate(spans):
        for h in range(HV):
            here, shared = (b, slice(start, end), h), (b, slice(start, end), h // 2)
            want, S = matrix_loop(q[shared], k[shared], v[here], g[here], beta[here], 0.3, states[n, h])
            torch.testing.assert_close(o[here], want)
            torch.testing.assert_close(final[n, h].T if v_first else final[n, h], S)


@pytest.mark.parametrize("lower_bound", [None, -5.0], ids=["softplus", "lower-bound"])
@pytest.mark.parametrize("neg_eigval", [False, True], ids=["beta", "beta2"])
def test_activations_are_the_paper_s(lower_bound: float | None, neg_eigval: bool) -> None:
    torch.manual_seed(1)
    T, HV, K, V = 4, 2, 3, 2
    q, k, v = torch.randn(T, HV, K).double(), torch.randn(T, HV, K).double(), torch.randn(T, HV, V).double()
    raw_g, raw_beta = torch.randn(T, HV, K).double(), torch.randn(T, HV).double()
    A_log, dt_bias = torch.randn(1, 1, HV, 1).double(), torch.randn(HV * K).double()
    o, _ = kda_reference(
        *(x[None] for x in (q, k, v, raw_g, raw_beta)),
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=neg_eigval,
        lower_bound=lower_bound,
        A_log=A_log,
        dt_bias=dt_bias,
    )
    g, beta, unit_q, unit_k = (torch.empty_like(x) for x in (raw_g, raw_beta, q, k))
    for t in range(T):
        for h in range(HV):
            beta[t, h] = (2 if neg_eigval else 1) / (1 + math.exp(-raw_beta[t, h]))
            for source, target in ((q, unit_q), (k, unit_k)):
                norm = math.sqrt(sum(float(x) ** 2 for x in source[t, h]) + 1e-6)
                target[t, h] = source[t, h] / norm
            for i in range(K):
                z = float(raw_g[t, h, i] + dt_bias[h * K + i])
                slope = math.exp(A_log[0, 0, h, 0])
                g[t, h, i] = -slope * math.log1p(math.exp(z))
                if lower_bound is not None:
                    g[t, h, i] = lower_bound / (1 + math.exp(-slope * z))
    for h in range(HV):
        state = torch.zeros(K, V).double()
        want, _ = matrix_loop(unit_q[:, h], unit_k[:, h], v[:, h], g[:, h], beta[:, h], K**-0.5, state)
        torch.testing.assert_close(o[0, :, h], want)
