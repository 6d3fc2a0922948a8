"""kda_gate against its equation, its gradients, extremes and errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hybrid_flex.ops import kda_gate
from hybrid_flex.ops.kda.gate import gate_backward


@pytest.mark.parametrize("lower_bound", [None, -5.0, -1e-4], ids=["softplus", "bound-5", "bound-near-0"])
@pytest.mark.parametrize("view", [(3,), (3, 1), (1, 1, 3, 1)], ids=str)
def test_equals_the_equation(lower_bound: float | None, view: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    raw, A_log, dt_bias = torch.randn(2, 4, 3, 5).double(), torch.randn(3).double(), torch.randn(3, 5).double()
    g = kda_gate(raw, A_log.view(view), dt_bias.flatten(), lower_bound=lower_bound)
    for b, t, h, i in itertools.product(range(2), range(4), range(3), range(5)):
        z, slope = float(raw[b, t, h, i] + dt_bias[h, i]), math.exp(A_log[h])
        want = -slope * math.log1p(math.exp(z)) if lower_bound is None else lower_bound / (1 + math.exp(-slope * z))
        assert math.isclose(float(g[b, t, h, i]), want, rel_tol=1e-8)


@pytest.mark.parametrize("lower_bound", [None, -5.0], ids=["softplus", "lower-bound"])
def test_hand_written_gradients_equal_autograd(lower_bound: float | None) -> None:
    torch.manual_seed(0)
    raw = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    A_log = torch.randn(3, dtype=torch.float64, requires_grad=True)
    dt_bias = torch.randn(15, dtype=torch.float64, requires_grad=True)
    g = kda_gate(raw, A_log, dt_bias, lower_bound=lower_bound)
    dg = torch.randn_like(g)
    want = torch.autograd.grad(g, (raw, A_log, dt_bias), dg)
    got = gate_backward(dg, raw, A_log, dt_bias, lower_bound)
    for name, a, b in zip(("g", "A_log", "dt_bias"), got, want, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, msg=lambda m, name=name: f"gradient of {name}: {m}")


def test_bias_and_slope_may_be_absent() -> None:
    raw = torch.randn(2, 3, 4)
    torch.testing.assert_close(kda_gate(raw, lower_bound=-5.0), -5 * torch.sigmoid(raw))
    torch.testing.assert_close(kda_gate(raw, torch.zeros(3)), -torch.nn.functional.softplus(raw))


def test_extremes_stay_finite_and_never_positive() -> None:
    raw = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).view(1, 5)
    for lower_bound in (None, -5.0, -1e-6):
        g = kda_gate(raw, torch.full((1,), math.log(16.0)), lower_bound=lower_bound)
        assert g.isfinite().all() and (g <= 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"A_log": None}, ValueError, "kda_gate: A_log must be given when lower_bound is None, got None"),
        ({"A_log": torch.zeros(2)}, ValueError, "kda_gate: A_log must have HV = 3 elements, got shape (2,)"),
        ({"dt_bias": torch.zeros(4)}, ValueError, "kda_gate: dt_bias must have HV * K = 12 elements, got shape (4,)"),
        ({"lower_bound": 0.5}, ValueError, "kda_gate: lower_bound must be negative, got 0.5"),
        (
            {"g": torch.zeros(2, 3, 4).int()},
            TypeError,
            "kda_gate: g must have dtype bfloat16, float16, float32, float64",
        ),
        ({"g": torch.zeros(3)}, ValueError, "kda_gate: g must be [..., HV, K], got shape (3,)"),
    ],
    ids=["no-slope", "A_log-size", "dt_bias-size", "positive-bound", "dtype", "rank"],
)
def test_error_message(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"g": torch.zeros(2, 3, 4), "A_log": torch.zeros(3), "dt_bias": None, "lower_bound": None, **change}
    with pytest.raises(error) as caught:
        kda_gate(**arguments)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
