"""chunk_kda on random configurations against float64: sizes, dtypes, gates, packing, states; a GPU runs 200 of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_flex.ops import chunk_kda, kda_reference

# Relative errors in the Frobenius norm; bfloat16 twice what flash-linear-attention asks of its kernels on large inputs.
BUDGETS = {torch.float32: 5e-5, torch.float16: 6e-3, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """One drawn call: its tensors, in float64, and its options."""

    x: dict[str, Tensor]
    options: dict[str, Any]
    dtype: torch.dtype


def draw(seed: int) -> Case:
    """Draw sizes, gate, packing, layout and numbers from one seed."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    packed, raw = choose.random() < 0.4, choose.random() < 0.7
    B, T = (1, choose.randint(1, 200)) if packed else (choose.randint(1, 3), choose.randint(1, 200))
    H, group = choose.choice((1, 2, 3)), choose.choice((1, 1, 2))
    K, V = (choose.choice((16, 24, 32, 64, 80, 128)) for _ in "KV")
    HV, bounds = H * group, None
    if packed:  # cuts may coincide: empty sequences
        bounds = torch.tensor(sorted([0, T, *(choose.randint(0, T) for _ in range(choose.randint(0, 3)))]))
    N = B if bounds is None else len(bounds) - 1
    x = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V)}
    options: dict[str, Any] = {"chunk_size": choose.choice((16, 32, 64)), "cu_seqlens": bounds}
    options["state_v_first"] = choose.random() < 0.5
    if raw:
        x |= {
            "g": 2 * normal(B, T, HV, K),
            "beta": normal(B, T, HV),
            "A_log": normal(HV),
            "dt_bias": normal(HV * K) - 1,
        }
        options |= {f"use_{part}_in_kernel": True for part in ("qk_l2norm", "gate", "beta_sigmoid")}
        options |= {"lower_bound": choose.choice((None, -5.0, -1.0)), "allow_neg_eigval": choose.random() < 0.3}
    else:
        x["q"], x["k"] = (torch.nn.functional.normalize(x[name], dim=-1) for name in "qk")
        x |= {"g": -torch.nn.functional.softplus(3 * normal(B, T, HV, K)), "beta": normal(B, T, HV).sigmoid()}
    if choose.random() < 0.6:
        x["initial_state"] = normal(N, HV, *((V, K) if options["state_v_first"] else (K, V)))
    return Case(x, options, choose.choice((torch.float32, torch.float16, torch.bfloat16, torch.bfloat16)))


def results(operator: Any, x: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in x.items()}
    o, state = operator(**leaves, **options, output_final_state=True)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (o, state)]
    grads = torch.autograd.grad((o, state), list(leaves.values()), weights)
    return {"o": o.detach(), "state": state.detach(), **dict(zip(leaves, grads, strict=True))}


SEEDS = [*range(8), *(pytest.param(seed, marks=pytest.mark.gpu) for seed in range(8, 200))]


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_float64(seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = draw(seed)
    bounds = case.options["cu_seqlens"]
    case.options["cu_seqlens"] = None if bounds is None else bounds.to(device)
    # What the kernels see, rounded, is what the reference gets.
    x = {name: t.to(device, torch.float32 if name == "initial_state" else case.dtype) for name, t in case.x.items()}
    got = results(chunk_kda, x, case.options)
    without_chunks = {name: value for name, value in case.options.items() if name != "chunk_size"}
    want = results(kda_reference, {name: t.double() for name, t in x.items()}, without_chunks)
    scale = max(want[name].norm().item() for name in ("o", "state"))
    for name, expected in want.items():
        assert got[name].isfinite().all(), name
        size = expected.norm()
        if name in ("A_log", "dt_bias"):  # sums of signed terms: their size is that of the terms
            z = x["g"].double() + x["dt_bias"].double().view(x["g"].shape[2:])
            size = torch.maximum(size, (want["g"] * (z if name == "A_log" else 1)).norm())
        error = (got[name].double() - expected).norm() / size.clamp(min=1e-3 * scale)
        assert error < BUDGETS[case.dtype], f"{name}: relative error {error:.1e} of {case.options}"
