"""The gated RMS norm's kernels against the float64 CPU form: y and every gradient, by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hybrid_flex  # noqa: F401  (registers the operators)
from hybrid_flex.kernels.kda.gated_norm import gated_rms_norm, gated_rms_norm_backward

NAMES = ("y", "d_x", "d_gate", "d_weight")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}


def make(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Make dy, x, gate and weight."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).to(device)
        for s in (shape, shape, shape, shape[-1:])
    ]


def run(tensors: list[Tensor], activation: str, exact: bool) -> dict[str, Tensor]:
    """Run the kernels, or the operators' CPU form in float64."""
    forward, backward = gated_rms_norm, gated_rms_norm_backward
    if exact:
        tensors = [t.cpu().double() for t in tensors]
        forward, backward = torch.ops.hybrid_flex.gated_rms_norm, torch.ops.hybrid_flex.gated_rms_norm_backward
    y = forward(*tensors[1:], 1e-6, activation)
    return dict(zip(NAMES, (y, *backward(*tensors, 1e-6, activation)), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (3, 7), (2, 65, 3, 16), (1, 17, 3, 128), (1, 300, 1, 100), (40, 256), (5, 1300), (0, 4), (4, 0)],
    ids=str,
)
def test_equals_the_cpu_form(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype, device: str, nan_memory: None
) -> None:
    tensors = make(*shape, dtype=dtype, device=device)
    got, want = run(tensors, activation, False), run(tensors, activation, True)
    for name, value in want.items():
        assert got[name].dtype == dtype and got[name].shape == value.shape, name
        if value.numel():
            error = (got[name].cpu().double() - value).abs().max() / value.abs().max().clamp(min=1)
            assert error <= TOLERANCE[dtype], (name, error)


def test_one_row_alone(device: str, nan_memory: None) -> None:
    dy, x, gate, weight = make(1, 7, device=device)
    rows, row = run([dy, x, gate, weight], "silu", False), run([dy[0], x[0], gate[0], weight], "silu", False)
    for name, value in row.items():
        assert value.shape == (7,) and torch.equal(value, rows[name].view(7)), name


def test_strided_inputs_and_float32_weight(device: str) -> None:
    dy, x, gate, weight = make(2, 9, 16, dtype=torch.float16, device=device)
    want = run([dy, x, gate, weight], "silu", False)
    strided = [dy.mT.contiguous().mT, torch.stack([x, x], -1)[..., 0], gate.transpose(0, 1).contiguous()]
    got = run([strided[0], strided[1], strided[2].transpose(0, 1), weight.float()], "silu", False)
    assert got["d_weight"].dtype == torch.float32
    for name in ("y", "d_x", "d_gate"):
        assert torch.equal(got[name], want[name]), name


def test_a_row_depends_on_nothing_else_bit_for_bit(device: str) -> None:
    dy, x, gate, weight = make(70, 17, device=device)
    before = run([dy, x, gate, weight], "sigmoid", False)
    x, gate, dy = x.clone(), gate.clone(), dy.clone()
    x[20], gate[21], dy[22] = float("nan"), float("nan"), float("nan")
    after = run([dy, x, gate, weight], "sigmoid", False)
    keep = [t for t in range(70) if t not in (20, 21, 22)]
    for name in ("y", "d_x", "d_gate"):
        assert torch.equal(after[name][keep], before[name][keep]), name


@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_zero_rows_and_saturated_gates_stay_finite(activation: str, device: str) -> None:
    gate = torch.tensor([[-1e4] * 8, [1e4] * 8], device=device)
    dy, x, weight = torch.ones_like(gate), torch.zeros_like(gate), torch.ones(8, device=device)
    for name, value in run([dy, x, gate, weight], activation, False).items():
        assert value.isfinite().all(), name


def test_same_bits_twice(device: str) -> None:
    tensors = make(300, 128, device=device)
    first, second = run(tensors, "silu", False), run(tensors, "silu", False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
