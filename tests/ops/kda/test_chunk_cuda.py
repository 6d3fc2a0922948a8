"""The CUDA kernels of chunk_kda against the float64 form on the same device: values, gradients, identities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.ops import chunk_kda

pytestmark = pytest.mark.gpu

RAW = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
LOWER = {**RAW, "lower_bound": -5.0, "safe_gate": True}
# Relative error in the Frobenius norm.  In 16 bits twice what flash-linear-attention asks of its own kernels (outputs
# and states 0.005, dq dk dv 0.008, dg dbeta 0.02), because these inputs are small.  The gradients of A_log and dt_bias
# are a few sums of signed terms; there the error is held against the root of the terms' squares, which does not cancel.
BFLOAT16 = {"o": 0.01, "state": 0.01, "g": 0.02, "beta": 0.02, "A_log": 0.04, "dt_bias": 0.04}


def inputs(
    B: int, T: int, H: int, HV: int, K: int, V: int, dtype: torch.dtype, *, N: int | None = None, raw: bool = True
) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(T + K)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    x = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V)}
    if raw:
        x |= {"g": normal(B, T, HV, K), "beta": normal(B, T, HV)}
    else:
        x |= {name: torch.nn.functional.normalize(x[name], dim=-1) for name in "qk"}
        x |= {"g": -torch.nn.functional.softplus(2 * normal(B, T, HV, K)), "beta": normal(B, T, HV).sigmoid()}
    x = {name: t.to(dtype) for name, t in x.items()}
    if raw:
        x |= {"A_log": normal(HV).abs(), "dt_bias": normal(HV * K) - 2}
    x["initial_state"] = normal(B if N is None else N, HV, K, V)
    return {name: t.requires_grad_() for name, t in x.items()}


def results(x: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    o, state = chunk_kda(**x, **options, output_final_state=True)
    assert state is not None
    generator = torch.Generator("cuda").manual_seed(7)
    weights = [torch.randn(t.shape, generator=generator, device="cuda").to(t.dtype) for t in (o, state)]
    grads = torch.autograd.grad((o, state), list(x.values()), weights)
    return {"o": o.detach(), "state": state.detach(), **dict(zip(x, grads, strict=True))}


def in_float64(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().double().requires_grad_() for name, t in x.items()}


def check(x: dict[str, Tensor], **options: Any) -> None:
    got, want = results(x, **options), results(in_float64(x), **options)
    dtype = x["q"].dtype
    for name, expected in want.items():
        assert got[name].isfinite().all(), name
        budget = BFLOAT16.get(name, 0.016)
        if dtype != torch.bfloat16:
            budget *= 1e-3 if dtype == torch.float32 else 0.25
        size = expected.norm()
        if name in ("A_log", "dt_bias"):
            z = x["g"].double() + x["dt_bias"].double().view(x["g"].shape[2:])
            size = torch.maximum(size, (want["g"] * (z if name == "A_log" else 1)).norm())
        error = (got[name].double() - expected).norm() / size.clamp(min=1e-6)
        assert error < budget, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("options", [LOWER, RAW], ids=["lower-bound", "softplus"])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 255, 1000, 4097])
def test_lengths(T: int, options: dict[str, Any]) -> None:
    check(inputs(1, T, 2, 2, 128, 128, torch.bfloat16), **options)


@pytest.mark.parametrize(
    ("shape", "dtype", "C", "options"),
    [
        ((2, 200, 2, 4, 64, 128), torch.float16, 32, RAW),
        ((1, 150, 1, 2, 100, 48), torch.float32, 64, LOWER),
        ((1, 130, 1, 1, 256, 256), torch.bfloat16, 64, LOWER),
        ((2, 70, 1, 2, 16, 16), torch.bfloat16, 16, {**RAW, "allow_neg_eigval": True}),
        ((1, 300, 2, 2, 32, 64), torch.bfloat16, 64, LOWER),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_widths_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype, C: int, options: dict[str, Any]) -> None:
    check(inputs(*shape, dtype), chunk_size=C, **options)


def test_without_anything_inside() -> None:
    check(inputs(2, 130, 2, 2, 128, 128, torch.bfloat16, raw=False), scale=0.3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed(dtype: torch.dtype) -> None:
    bounds = [0, 130, 130, 131, 400, 464, 464]
    x = inputs(1, bounds[-1], 2, 2, 128, 128, torch.bfloat16, N=len(bounds) - 1)
    x["initial_state"] = x["initial_state"].detach().mT.contiguous().requires_grad_()
    check(x, cu_seqlens=torch.tensor(bounds, device="cuda", dtype=dtype), state_v_first=True, **LOWER)


def test_more_states_than_the_second_dimension_of_a_grid_holds() -> None:
    """300 sequences of one token and 70,000 empty ones: the same bits as the 300 alone, and states pass through."""
    N, T = 70_300, 300
    x = inputs(1, T, 1, 1, 16, 16, torch.bfloat16, N=N)
    bounds = torch.arange(N + 1, device="cuda", dtype=torch.int32).clamp_(max=T)
    got = results(x, cu_seqlens=bounds, **LOWER)
    few = {**x, "initial_state": x["initial_state"][:T].detach().requires_grad_()}
    o, state = chunk_kda(**few, cu_seqlens=bounds[: T + 1], output_final_state=True, **LOWER)
    assert state is not None
    assert torch.equal(got["o"], o) and torch.equal(got["state"][:T], state)
    assert torch.equal(got["state"][T:], x["initial_state"][T:])
    assert got["initial_state"].isfinite().all() and bool((got["initial_state"][T:] != 0).any())


@pytest.mark.parametrize("options", [LOWER, RAW], ids=["lower-bound", "softplus"])
@pytest.mark.parametrize("v_first", [False, True], ids=["k first", "v first"])
def test_segments(v_first: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One head and a long sequence: it is cut into segments that are scanned side by side."""
    from hybrid_flex.kernels.kda import chunk

    joins = []
    join = chunk._join
    monkeypatch.setattr(chunk, "_join", lambda *args, **kwargs: joins.append(args) or join(*args, **kwargs))
    x = inputs(1, 16400, 1, 1, 128, 64, torch.bfloat16)
    if v_first:
        x["initial_state"] = x["initial_state"].detach().mT.contiguous().requires_grad_()
    check(x, state_v_first=v_first, **options)
    assert len(joins) == 3  # states, twice, and gradients


@pytest.mark.parametrize("kind", ["none", "reset", "mixed", "beta 0", "beta 1", "k 0"])
def test_extremes(kind: str) -> None:
    x = {name: t.detach() for name, t in inputs(1, 200, 2, 2, 128, 128, torch.bfloat16, raw=False).items()}
    if kind == "none":
        x["g"] = torch.zeros_like(x["g"])
    elif kind == "reset":
        x["g"] = torch.full_like(x["g"], -1000.0)
    elif kind == "mixed":
        x["g"] = x["g"].clone()
        x["g"][:, ::7] = -1000.0
        x["g"][:, 100:] *= 20
    elif kind.startswith("beta"):
        x["beta"] = torch.full_like(x["beta"], float(kind[-1]))
    else:
        x["k"] = torch.zeros_like(x["k"])
    x = {name: t.requires_grad_() for name, t in x.items()}
    got, want = results(x), results(in_float64(x))
    for name, expected in want.items():
        assert got[name].isfinite().all(), name
        if name not in ("g", "beta"):  # where nothing decays into anything, their gradients are rounding errors
            error = (got[name].double() - expected).norm() / expected.norm().clamp(min=1e-3)
            assert error < BFLOAT16.get(name, 0.016), f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("options", [LOWER, RAW], ids=["lower-bound", "softplus"])
@pytest.mark.parametrize("token", [3, 40, 64, 150])
def test_causality_is_bit_exact(token: int, options: dict[str, Any]) -> None:
    x = {name: t.detach() for name, t in inputs(1, 200, 2, 2, 128, 128, torch.bfloat16).items()}
    before, _ = chunk_kda(**x, **options)
    for name in ("q", "k", "v", "g", "beta"):
        x[name] = x[name].clone()
        x[name][:, token:] = 30 * torch.randn_like(x[name][:, token:])
    after, _ = chunk_kda(**x, **options)
    assert torch.equal(before[:, :token], after[:, :token]) and not torch.equal(before, after)


def test_same_bits_every_run_with_poisoned_memory(nan_memory: None) -> None:
    x = inputs(2, 300, 2, 2, 128, 128, torch.bfloat16)
    first = results(x, **RAW)
    for name, again in results(x, **RAW).items():
        assert again.isfinite().all() and torch.equal(first[name], again), name


@pytest.mark.parametrize("name", ["chunk_kda", "chunk_kda_training"])
def test_opcheck(name: str) -> None:
    x = {name: t.detach() for name, t in inputs(1, 100, 2, 2, 128, 128, torch.bfloat16).items()}
    named = [x[name].requires_grad_() for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")]
    arguments = (*named, True, True, True, False, -5.0, x["initial_state"], None, 0.1, False, 64)
    torch.library.opcheck(getattr(torch.ops.hybrid_flex, name).default, arguments)


def test_one_graph_for_several_lengths_forward_and_backward(fresh_dynamo: None) -> None:
    """The compiled graph holds the same kernels: same bits."""
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(chunk_kda, backend=backend, fullgraph=True)
    for T in (200, 130, 1000):
        x = inputs(1, T, 2, 2, 128, 128, torch.bfloat16)
        for name in ("q", "k", "v", "g", "beta"):
            torch._dynamo.mark_dynamic(x[name], 1)
        o, state = compiled(**x, **LOWER, output_final_state=True)
        grads = torch.autograd.grad(o.sum() + state.sum(), list(x.values()))
        o_eager, state_eager = chunk_kda(**x, **LOWER, output_final_state=True)
        wanted = torch.autograd.grad(o_eager.sum() + state_eager.sum(), list(x.values()))
        for name, got, want in zip(
            ("o", "state", *x), (o, state, *grads), (o_eager, state_eager, *wanted), strict=True
        ):
            if name in ("A_log", "dt_bias"):  # sums over chunks, in an order that the compiler chooses
                assert (got - want).norm() < 1e-5 * want.norm(), name
            else:
                assert torch.equal(got, want), name
    assert backend.frame_count == 1


def test_training_step_in_a_cuda_graph(fresh_dynamo: None) -> None:
    x = inputs(1, 200, 2, 2, 128, 128, torch.bfloat16)

    def loss(**x: Tensor) -> Tensor:
        o, state = chunk_kda(**x, **LOWER, output_final_state=True)
        assert state is not None
        return o.float().square().mean() + state.square().mean()

    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # two calls to warm up, then replays, each with other values
        torch.compiler.cudagraph_mark_step_begin()
        grads = [grad.clone() for grad in torch.autograd.grad(compiled(**x), list(x.values()))]
        for name, got, want in zip(x, grads, torch.autograd.grad(loss(**x), list(x.values())), strict=True):
            assert (got - want).float().norm() < 1e-2 * want.float().norm(), name
        with torch.no_grad():
            for t in x.values():
                t.add_(0.1 * torch.randn_like(t))


def test_a_captured_call_shares_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every call needs is made once, not again in every graph."""
    from hybrid_flex.kernels.kda import decay

    x = {name: t.detach() for name, t in inputs(1, 100, 2, 2, 64, 64, torch.bfloat16).items()}
    want, _ = chunk_kda(**x, **LOWER)

    def fail(*_: object) -> Tensor:
        raise AssertionError("the table was made again")

    monkeypatch.setattr(decay, "_exponent_table", fail)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = chunk_kda(**x, **LOWER)
    o.fill_(float("nan"))
    graph.replay()
    assert torch.equal(o, want)


def test_the_backward_is_compiled_with_the_forward() -> None:
    from hybrid_flex.kernels.kda import chunk

    kernels = [kernel for name, kernel in vars(chunk).items() if name.endswith("_kernel")]

    def num_compiled() -> int:
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    chunk._compiled.clear()
    x = inputs(1, 100, 3, 3, 32, 32, torch.bfloat16)
    o, _ = chunk_kda(**x, **LOWER)
    after_forward = num_compiled()
    torch.autograd.grad(o.sum(), list(x.values()))
    assert num_compiled() == after_forward


def test_large_values() -> None:
    """States of 10^5 meet decays that are carried 2^104 times too large: NOTE [Chunk anchor]."""
    x = inputs(1, 300, 2, 2, 128, 128, torch.bfloat16)
    with torch.no_grad():
        x["v"] *= 3e4
        x["initial_state"] *= 3e4
        x["dt_bias"] -= 6
    check(x, **LOWER)
