"""The short convolution's kernels against the float64 CPU form: y, final state and every gradient, by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hybrid_flex  # noqa: F401  (registers the operators)
from hybrid_flex.kernels.kda.short_conv import short_conv, short_conv_backward

NAMES = ("y", "final_state", "d_x", "d_weight", "d_bias", "d_initial_state")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}


def make(
    B: int,
    T: int,
    D: int,
    W: int,
    *,
    N: int | None = None,
    bias: bool = True,
    state: bool = True,
    d_final: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    N = B if N is None else N

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    tensors: dict[str, Tensor | None] = {"x": draw(B, T, D), "weight": draw(D, W), "dy": draw(B, T, D)}
    tensors["bias"] = draw(D) if bias else None
    tensors["initial_state"] = draw(N, W - 1, D) if state else None
    tensors["d_final_state"] = draw(N, W - 1, D) if d_final else None
    return tensors


def run(tensors: dict[str, Tensor | None], bounds: list[int] | None, silu: bool, exact: bool) -> dict[str, Tensor]:
    """Run the kernels, or the operators' CPU form in float64."""
    t = {name: None if v is None else v.cpu().double() for name, v in tensors.items()} if exact else tensors
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=t["x"].device)
    forward, backward = short_conv, short_conv_backward
    if exact:
        forward, backward = torch.ops.hybrid_flex.short_conv, torch.ops.hybrid_flex.short_conv_backward
    arguments = t["x"], t["weight"], t["bias"], t["initial_state"], cu_seqlens, silu
    outputs = forward(*arguments, True)
    gradients = backward(t["dy"], t["d_final_state"], *arguments)
    return dict(zip(NAMES, (*outputs, *gradients), strict=True))


def check(tensors: dict[str, Tensor | None], bounds: list[int] | None = None, silu: bool = True) -> None:
    got, want = run(tensors, bounds, silu, False), run(tensors, bounds, silu, True)
    dtype = tensors["x"].dtype
    for name, value in want.items():
        assert got[name].dtype == dtype and got[name].shape == value.shape, name
        assert got[name].is_contiguous(), name
        if value.numel():
            error = (got[name].cpu().double() - value).abs().max() / value.abs().max().clamp(min=1)
            assert error <= TOLERANCE[dtype], (name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("W", [2, 4, 8], ids=lambda w: f"W{w}")
@pytest.mark.parametrize("T", [1, 2, 3, 17, 65], ids=lambda t: f"T{t}")
def test_equals_the_cpu_form(T: int, W: int, dtype: torch.dtype, device: str, nan_memory: None) -> None:
    check(make(2, T, 33, W, dtype=dtype, device=device))


@pytest.mark.parametrize("W", [3, 5, 6, 7], ids=lambda w: f"W{w}")
def test_other_numbers_of_taps(W: int, device: str, nan_memory: None) -> None:
    check(make(1, 11, 5, W, device=device))


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "none"])
@pytest.mark.parametrize("d_final", [True, False], ids=["dfinal", "nodfinal"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_optional_arguments(bias: bool, state: bool, d_final: bool, silu: bool, device: str, nan_memory: None) -> None:
    tensors = make(1, 6, 3, 4, bias=bias, state=state, d_final=d_final, device=device)
    check(tensors, silu=silu)
    check(tensors, [0, 6], silu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("W", [4, pytest.param(8, marks=pytest.mark.slow)], ids=lambda w: f"W{w}")
@pytest.mark.parametrize(
    "bounds",
    [[0, 9], [0, 0, 1, 1, 3, 9, 9], [0, 63, 65, 65, 66, 130], [0, 127, 128, 140], [0, 0]],
    ids=lambda b: "-".join(map(str, b)),
)
def test_packed_equals_the_cpu_form(
    bounds: list[int], W: int, state: bool, dtype: torch.dtype, device: str, nan_memory: None
) -> None:
    check(make(1, bounds[-1], 7, W, N=len(bounds) - 1, state=state, dtype=dtype, device=device), bounds)


def test_many_tiles_and_channel_blocks(device: str, nan_memory: None) -> None:
    check(make(2, 140, 600, 4, dtype=torch.float16, device=device))
    check(make(1, 140, 600, 4, N=4, device=device), [0, 40, 41, 130, 140])


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)], ids=str)
def test_empty(shape: tuple[int, int, int], device: str, nan_memory: None) -> None:
    check(make(*shape, 4, device=device))


def test_strided_inputs_and_float32_parameters(device: str) -> None:
    tensors = make(2, 9, 6, 4, dtype=torch.float16, device=device)
    want = run(tensors, None, True, False)
    tensors["x"] = torch.stack([tensors["x"], tensors["x"]], -1)[..., 0]
    tensors["dy"] = tensors["dy"].mT.contiguous().mT
    tensors["weight"] = tensors["weight"].t().contiguous().t()
    for name, value in run(tensors, None, True, False).items():
        assert torch.equal(value, want[name]), name
    tensors["weight"], tensors["bias"] = tensors["weight"].float(), tensors["bias"].float()
    got = run(tensors, None, True, False)
    assert got["d_weight"].dtype == got["d_bias"].dtype == torch.float32
    for name in ("y", "final_state", "d_x", "d_initial_state"):
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("changed", [0, 19, 20, 49, 64])
def test_nothing_leaks_from_the_future_or_from_another_sequence(changed: int, device: str) -> None:
    bounds = [0, 20, 20, 50, 67]
    tensors = make(1, 67, 5, 4, N=4, device=device)
    before = run(tensors, bounds, True, False)
    end = next(b for b in bounds if b > changed)
    start = max(b for b in bounds if b <= changed)
    for name in ("x", "dy"):
        poisoned = tensors[name].clone()
        poisoned[:, changed] = float("nan")
        after = run(tensors | {name: poisoned}, bounds, True, False)
        reached = range(changed, min(changed + 4, end)) if name == "x" else range(0)
        for t in range(67):
            same = torch.equal(after["y"][:, t], before["y"][:, t])
            assert same if t not in reached else after["y"][:, t].isnan().all(), t
            if not start <= t < end:
                assert torch.equal(after["d_x"][:, t], before["d_x"][:, t]), t


@pytest.mark.parametrize("bounds", [[0, 5], [2, 9], [0, 4, 30], [0, 7, 3, 9], [-3, 9]], ids=str)
def test_wrong_boundaries_read_nothing_outside(bounds: list[int], device: str) -> None:
    tensors = make(1, 9, 5, 4, N=len(bounds) - 1, device=device)
    for name in ("x", "dy", "initial_state", "d_final_state"):
        around = torch.full((3, *tensors[name].shape), float("nan"), device=device)
        around[1] = tensors[name]
        tensors[name] = around[1]
    for name, value in run(tensors, bounds, True, False).items():
        assert value.isfinite().all(), name


def test_same_bits_twice(device: str) -> None:
    tensors = make(2, 140, 33, 4, device=device)
    first, second = run(tensors, None, True, False), run(tensors, None, True, False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
