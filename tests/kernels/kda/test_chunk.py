"""The chunked kernels against the float64 form: output, state and every gradient, on small and awkward sizes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_flex.ops.kda.chunk import chunk_kda
from hybrid_flex.ops.kda.inputs import Raw

NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def make(B: int, T: int, H: int, HV: int, K: int, V: int, N: int, raw: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T + K)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V)}
    x |= {"g": normal(B, T, HV, K), "beta": normal(B, T, HV)}
    if raw:
        x |= {"A_log": normal(HV), "dt_bias": normal(HV * K)}
    else:
        x["q"], x["k"] = (torch.nn.functional.normalize(x[name], dim=-1) for name in "qk")
        x |= {"g": -torch.nn.functional.softplus(3 * x["g"]), "beta": x["beta"].sigmoid()}
    x = {name: t.to(dtype) for name, t in x.items()}
    return {**x, "initial_state": normal(N, HV, K, V).float()}


def both(
    x: dict[str, Tensor], device: str, options: dict[str, Any], cu_seqlens: Tensor | None, v_first: bool, C: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return output, state and gradients of the kernels and of the float64 form."""
    from hybrid_flex.kernels.kda import chunk

    if v_first:
        x = {**x, "initial_state": x["initial_state"].mT.contiguous()}
    double = {name: t.double().requires_grad_() for name, t in x.items()}
    o, state = chunk_kda(**double, **options, cu_seqlens=cu_seqlens, state_v_first=v_first, output_final_state=True)
    generator = torch.Generator().manual_seed(0)
    d_o, d_state = (torch.randn(y.shape, generator=generator) for y in (o, state))
    d_o = d_o.to(x["q"].dtype)
    grads = torch.autograd.grad((o, state), list(double.values()), (d_o.double(), d_state.double()))
    want = {"o": o.detach(), "state": state.detach(), **dict(zip(double, grads, strict=True))}

    y = {name: t.to(device) for name, t in x.items()}
    flags = [options.get(f"use_{name}_in_kernel", False) for name in ("qk_l2norm", "gate", "beta_sigmoid")]
    raw = Raw(
        *(y.get(name) for name in NAMES[:7]), *flags, options.get("allow_neg_eigval", False), options.get("lower_bound")
    )
    bounds = None if cu_seqlens is None else cu_seqlens.to(device)
    scale = x["q"].shape[-1] ** -0.5
    o, state, *kept = chunk.forward(raw, y["initial_state"], bounds, scale, v_first, C, keep=True)
    assert [x.shape for x in kept] == [chunk.shape_of_kept(raw, bounds, C)] * 2
    arguments = (d_o.to(device), d_state.to(device), o, raw, y["initial_state"], bounds, scale, v_first, C)
    gradients = chunk.backward(*arguments)
    for again, gradient in zip(chunk.backward(*arguments, kept), gradients, strict=True):  # from what was kept
        largest = float(gradient.abs().max()) if gradient.numel() else 0.0
        torch.testing.assert_close(again, gradient, rtol=1e-5, atol=1e-5 * largest)
    got = {"o": o, "state": state, **dict(zip(NAMES, gradients, strict=True))}
    return {name: got[name].cpu() for name in want}, want


RAW = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
NEGATIVE = {**RAW, "lower_bound": -2.0, "allow_neg_eigval": True}
CASES = {
    "B2-T35-H2-K16-V16-softplus": ((2, 35, 2, 2, 16, 16), RAW, None, False, 32),
    "B1-T70-H1-HV2-K24-V40-lower": ((1, 70, 1, 2, 24, 40), {**RAW, "lower_bound": -5.0}, None, True, 64),
    "T40-packed-neg-lower": ((1, 40, 1, 1, 16, 16), NEGATIVE, [0, 17, 17, 40], False, 16),
    "B1-T65-K16-V32-plain": ((1, 65, 1, 1, 16, 32), {}, None, False, 64),
    "B1-T33-K80-V16": ((1, 33, 1, 1, 80, 16), RAW, None, False, 32),
    "B1-T1": ((1, 1, 1, 1, 16, 16), RAW, None, False, 64),
}  # fmt: skip


# In 16 bits the same code runs, but for how it adds up log decays, which every case does.
HALF_TOO = ("B1-T65-K16-V32-plain", "B1-T33-K80-V16", "B1-T1")
BOTH = [
    pytest.param(case, dtype, marks=marks, id=f"{case}-{name}")
    for case in CASES
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16))
    for marks in [() if name == "fp32" or case in HALF_TOO else pytest.mark.slow]
]


@pytest.mark.parametrize(("case", "dtype"), BOTH)
def test_equals_the_float64_form(case: str, dtype: torch.dtype, device: str) -> None:
    shape, options, bounds, v_first, C = CASES[case]
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    N = shape[0] if bounds is None else len(bounds) - 1
    x = make(*shape, N, bool(options), dtype)
    got, want = both(x, device, options, cu_seqlens, v_first, C)
    budgets = dict.fromkeys(want, 2e-5 if dtype == torch.float32 else 4e-3)
    # Sums of signed terms over all tokens: what cancels in the sum does not cancel in its rounding errors.
    budgets |= dict.fromkeys(("A_log", "dt_bias"), 1e-4 if dtype == torch.float32 else 2e-2)
    errors = {name: ((got[name].double() - want[name]).norm() / want[name].norm()).item() for name in want}
    assert not [name for name in want if not errors[name] < budgets[name]], errors


def anchored_inputs(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return inputs whose chunks are near, far, or of both kinds, by slices of K: NOTE [Chunk anchor]."""
    x = make(1, 70, 1, 2, 80, 24, 1, case in ("near", "lower bound", "softplus"), torch.float32)
    if case == "near":
        x["dt_bias"] -= 6.0
    elif case == "one far channel":
        x["g"] *= 0.02
        x["g"][:, :, 0, 70] = -8.0
    elif case == "resets":
        x["g"][:, ::5] = -1000.0
        x["g"][:, 7::9, :, ::3] *= 20
    options = RAW if case == "softplus" else {**RAW, "lower_bound": -5.0} if case in ("near", "lower bound") else {}
    return x, options


def force_anchor(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], shift: int = 104, reach: int = 220
) -> list[Tensor]:
    """Let float32 go the way of bfloat16; return a list that collects which slices of chunks are far."""
    from hybrid_flex.kernels.kda import chunk, decay

    far: list[Tensor] = []
    prepare = chunk._prepare

    def spy(*args: Any, **kwargs: Any) -> Any:
        work = prepare(*args, **kwargs)
        far.append(work.far)
        return work

    monkeypatch.setattr(chunk, "_prepare", spy)
    safe = "lower_bound" in options
    anchor = {"ANCHOR": True, "SHIFT": shift, "RANGE": reach, "SAFE": safe, "TILE": 16 if safe else 32}
    monkeypatch.setattr(chunk, "_anchor", lambda raw, C: anchor)
    if decay.INTERPRETED:  # a GPU has no room for 64 rows of float32
        monkeypatch.setattr(chunk, "_most_rows", lambda width, element_size: 64)
    return far


@pytest.mark.parametrize(("shift", "reach"), [(80, 160), (104, 220)])
@pytest.mark.parametrize("case", ["near", "one far channel", "lower bound", "softplus", "resets"])
def test_anchors(case: str, shift: int, reach: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of bfloat16, in float32: one anchor for a chunk, far rows by tiles, and rows that must take the tree."""
    x, options = anchored_inputs(case)
    far = force_anchor(monkeypatch, options, shift, reach)
    got, want = both(x, device, options, None, False, 64)
    slices = far[-1].bool()  # [chunks * 2 heads, 2 slices of K]; 2 where rows are far for the forward, too
    if case == "near":
        assert not slices.any()
    elif case == "one far channel":
        chunks_of_14_rows = 1 if slices.shape[0] == 4 else 2  # fewer do not come to -160 bits
        assert slices.nonzero().tolist() == [[2 * i, 1] for i in range(chunks_of_14_rows)]
    else:
        assert slices.any()
    # Behind a reset the initial state has no gradient at all.
    errors = {n: ((got[n].double() - want[n]).norm() / want[n].norm().clamp(min=1e-3)).item() for n in want}
    assert not [name for name in want if not errors[name] < 5e-5], errors


SEGMENTS = [
    pytest.param(count, v_first, marks=marks, id=f"{count}-{'v' if v_first else 'k'} first")
    for count, v_first, marks in (
        *((2, True, ()), (3, False, ())),
        *((count, v_first, pytest.mark.slow) for count, v_first in ((2, False), (3, True), (5, False), (5, True))),
    )
]


@pytest.mark.parametrize(("count", "v_first"), SEGMENTS)
def test_segments(count: int, v_first: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences cut into segments: the last one shorter, their states and gradients joined."""
    from hybrid_flex.kernels.kda import chunk

    x = make(2, 75, 1, 2, 48, 24, 2, True, torch.float32)
    monkeypatch.setattr(chunk, "_segments", lambda plan: chunk.cut(5, count))
    got, want = both(x, device, RAW, None, v_first, 16)
    errors = {name: ((got[name].double() - want[name]).norm() / want[name].norm()).item() for name in want}
    assert not [name for name in want if not errors[name] < 2e-5], errors


@pytest.mark.parametrize("token", [0, 20, 63])
def test_far_rows_keep_causality(token: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that becomes far, and makes its chunk take other steps, changes no bit of the rows before it."""
    from hybrid_flex.kernels.kda import chunk

    x, _ = anchored_inputs("one far channel")
    x["g"][:, :, 0, 70] = -0.5
    x = {name: t.to(device) for name, t in x.items()}
    force_anchor(monkeypatch, {})
    outputs = []
    for value in (-0.5, -30.0, -1000.0):
        x["g"][:, token:, :, 70:] = value
        raw = Raw(*(x.get(name) for name in NAMES[:7]), False, False, False, False, None)
        outputs.append(chunk.forward(raw, x["initial_state"], None, 0.1, False, 64)[0])
    for o in outputs[1:]:
        assert torch.equal(o[:, :token], outputs[0][:, :token]) and not torch.equal(o, outputs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_without_decay(dtype: torch.dtype, device: str) -> None:
    """Log decays of exactly zero, everywhere or in some tiles and channels, count no pair twice."""
    x = make(1, 70, 1, 1, 16, 16, 1, False, dtype)
    x["g"][:, :20] = 0.0
    x["g"][:, 20:, :, ::2] = 0.0
    got, want = both(x, device, {}, None, False, 64)
    errors = {name: ((got[name].double() - want[name]).norm() / want[name].norm()).item() for name in want}
    assert not [name for name in want if not errors[name] < (2e-5 if dtype == torch.float32 else 4e-3)], errors


@pytest.mark.parametrize("raw", [False, True], ids=["nothing inside", "all inside"])
def test_behind_the_operator(raw: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through dispatch and autograd, which also refuse outputs that share memory; some of them are empty."""
    x = make(1, 33, 1, 2, 16, 16, 1, raw, torch.float32)
    x = {name: t.to(device).requires_grad_() for name, t in x.items()}
    results = []
    for kernels in (False, True):
        for name in ("chunk", "training"):
            module = importlib.import_module(f"hybrid_flex.ops.kda.{name}")
            monkeypatch.setattr(module, "has_kernels", lambda q, answer=kernels: answer)
        o, state = chunk_kda(**x, **(RAW if raw else {}), output_final_state=True)
        assert o.grad_fn.name().startswith("GeneratedBackwardFor_hybrid_flex_chunk_kda")
        assert ("training" in o.grad_fn.name()) == kernels
        results.append((o, state, *torch.autograd.grad(o.square().sum() + state.sum(), list(x.values()))))
    for plain, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-5)
