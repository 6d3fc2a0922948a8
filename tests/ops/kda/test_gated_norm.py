"""gated_rms_norm against a float64 loop, its identities, the compiler, errors and poisoned memory.

Export, save and load in a fresh process: with short_conv, in test_short_conv.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from hybrid_flex.ops import gated_rms_norm

NAMES = ("x", "gate", "weight")
ACTIVATIONS = ("sigmoid", "silu")


def make(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Make x, gate and weight, which require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in (shape, shape, shape[-1:])
    ]


def outputs_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
    y = function(*inputs)
    weighting = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view_as(y).to(y.dtype)
    gradients = torch.autograd.grad((y * weighting).sum(), inputs)
    return {"y": y} | {f"d_{name}": g for name, g in zip(NAMES, gradients, strict=True)}


def plain(x: Tensor, gate: Tensor, weight: Tensor, activation: str = "sigmoid") -> Tensor:
    """Write the equation down in the dtype of the inputs."""
    act = torch.sigmoid(gate) if activation == "sigmoid" else gate * torch.sigmoid(gate)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight * act


def assert_all_close(got: dict[str, Tensor], want: dict[str, Tensor], **tolerance: float) -> None:
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_loop(activation: str) -> None:
    x, gate, weight = make(2, 3, 2, 5)
    y = gated_rms_norm(x, gate, weight, activation=activation)
    rows = zip(x.reshape(-1, 5).tolist(), gate.reshape(-1, 5).tolist(), y.reshape(-1, 5).tolist(), strict=True)
    for x_row, gate_row, y_row in rows:
        root = math.sqrt(sum(value * value for value in x_row) / 5 + 1e-6)
        for value, a, scale, got in zip(x_row, gate_row, weight.tolist(), y_row, strict=True):
            act = 1 / (1 + math.exp(-a)) * (a if activation == "silu" else 1)
            assert got == pytest.approx(value / root * scale * act, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 63, 3, 16), (1, 65, 1, 33), (0, 4)], ids=str)
def test_gradients_equal_autograd_of_the_equation(shape: tuple[int, ...], activation: str) -> None:
    inputs = make(*shape)
    got = outputs_and_gradients(lambda *a: gated_rms_norm(*a, activation=activation), inputs)
    want = outputs_and_gradients(lambda *a: plain(*a, activation), inputs)
    assert_all_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
def test_error_within_twice_the_plain_form(dtype: torch.dtype, activation: str) -> None:
    inputs = make(2, 65, 3, 32, dtype=dtype)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    exact = outputs_and_gradients(lambda *a: plain(*a, activation), doubles)
    got = outputs_and_gradients(lambda *a: gated_rms_norm(*a, activation=activation), inputs)
    low = outputs_and_gradients(lambda *a: plain(*a, activation), inputs)
    for name, value in exact.items():
        assert got[name].dtype == dtype
        budget = 2 * (low[name].double() - value).abs().max() + torch.finfo(dtype).eps * value.abs().max()
        assert (got[name].double() - value).abs().max() <= budget, name


def test_float32_weight_with_low_precision_rows() -> None:
    x, gate, weight = make(2, 5, 16, dtype=torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    got, want = (outputs_and_gradients(gated_rms_norm, [x, gate, w]) for w in (master, weight))
    assert got["d_weight"].dtype == torch.float32
    assert torch.equal(got["y"], want["y"]) and torch.equal(got["d_x"], want["d_x"])


def test_a_row_depends_on_nothing_else_bit_for_bit() -> None:
    x, gate, weight = (t.detach() for t in make(1, 33, 2, 17, dtype=torch.float32))
    y = gated_rms_norm(x, gate, weight)
    x[:, 20], gate[:, 21] = float("nan"), float("nan")
    after = gated_rms_norm(x, gate, weight)
    assert after[:, 20:22].isnan().all()
    keep = [t for t in range(33) if t not in (20, 21)]
    assert torch.equal(after[:, keep], y[:, keep])


def test_zero_rows_and_saturated_gates_stay_finite() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    gate = torch.tensor([[-1e4] * 8, [1e4] * 8], requires_grad=True)
    for activation in ACTIVATIONS:
        for name, value in outputs_and_gradients(
            lambda *a, activation=activation: gated_rms_norm(*a, activation=activation),
            [x, gate, torch.ones(8, requires_grad=True)],
        ).items():
            assert value.isfinite().all(), (activation, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation: str) -> None:
    x, gate, weight = make(2, 3, 5, dtype=torch.float32)
    torch.library.opcheck(torch.ops.hybrid_flex.gated_rms_norm.default, (x, gate, weight, 1e-6, activation))
    torch.library.opcheck(
        torch.ops.hybrid_flex.gated_rms_norm_backward.default,
        (torch.randn(2, 3, 5), x.detach(), gate.detach(), weight.detach(), 1e-6, activation),
    )


def test_one_graph_for_several_lengths(fresh_dynamo: None) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    # A literal eps is a constant of the graph; dynamic=True traces a default once as a symbol and then once more.
    compiled = torch.compile(lambda *a: gated_rms_norm(*a, eps=1e-6), fullgraph=True, backend=count, dynamic=True)
    for length in (9, 17, 33):
        inputs = make(2, length, 8, dtype=torch.float32)
        got = outputs_and_gradients(compiled, inputs)
        assert_all_close(got, outputs_and_gradients(gated_rms_norm, inputs), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_inductor_forward_and_backward(fresh_dynamo: None) -> None:
    inputs = make(2, 9, 8, dtype=torch.float32)
    got = outputs_and_gradients(torch.compile(gated_rms_norm, fullgraph=True), inputs)
    assert_all_close(got, outputs_and_gradients(gated_rms_norm, inputs), rtol=1e-5, atol=1e-5)


X = torch.randn(2, 5, 6)
BAD = [
    ({"x": torch.tensor(1.0)}, ValueError, "x must be [..., D], a tensor of rank 1 or more, got shape ()"),
    ({"x": X.long()}, TypeError, "x must have dtype bfloat16, float16, float32, float64, got int64"),
    ({"gate": X[:1]}, ValueError, "gate must have the shape of x, (2, 5, 6), got shape (1, 5, 6)"),
    ({"gate": X.half()}, TypeError, "gate must have dtype float32, got float16"),
    ({"gate": X.to("meta")}, ValueError, "gate must be on cpu, like the other tensors, got meta"),
    ({"weight": torch.ones(5)}, ValueError, "weight must be [D] = [6], got shape (5,)"),
    ({"weight": torch.ones(6).half()}, TypeError, "weight must have dtype float32, got float16"),
    ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
    ({"activation": "tanh"}, ValueError, "activation must be one of 'sigmoid', 'silu', got 'tanh'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m.split(",")[0] for _, _, m in BAD])
def test_error_message(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        gated_rms_norm(**({"x": X, "gate": X, "weight": torch.ones(6)} | change))  # type: ignore[arg-type]
    assert str(caught.value) == f"gated_rms_norm: {message}"


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        gated_rms_norm(X, X, torch.ones(6), residual=X)  # type: ignore[call-arg]


def test_poisoned_memory(nan_memory: None) -> None:
    for name, value in outputs_and_gradients(gated_rms_norm, make(2, 65, 3, 16, dtype=torch.float32)).items():
        assert value.isfinite().all(), name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    scale=st.floats(1e-3, 1e3),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 100),
)
def test_any_shape_and_scale(shape: list[int], scale: float, activation: str, seed: int) -> None:
    x, gate, weight = make(*shape, seed=seed)
    inputs = [(x.detach() * scale).requires_grad_(), gate, weight]
    got = outputs_and_gradients(lambda *a: gated_rms_norm(*a, activation=activation), inputs)
    want = outputs_and_gradients(lambda *a: plain(*a, activation), inputs)
    assert_all_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    inputs = make(2, 65, 3, 33)
    want = outputs_and_gradients(gated_rms_norm, inputs)
    got = outputs_and_gradients(gated_rms_norm, [t.detach().cuda().requires_grad_() for t in inputs])
    assert_all_close({name: value.cpu() for name, value in got.items()}, want, rtol=1e-10, atol=1e-10)


def on_cuda(activation: str = "sigmoid") -> Callable[..., Tensor]:
    """Return a function of CPU tensors that runs the operator on the device; gradients come back as well."""
    return lambda *inputs: gated_rms_norm(*(t.cuda() for t in inputs), activation=activation).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("shape", [(3, 7), (2, 65, 3, 128), (1, 300, 2, 96), (5, 4096)], ids=str)
def test_cuda_error_within_twice_the_plain_form(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    inputs = make(*shape, dtype=dtype)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    exact = outputs_and_gradients(lambda *a: gated_rms_norm(*a, activation=activation), doubles)
    low = outputs_and_gradients(lambda *a: plain(*a, activation), inputs)
    got = outputs_and_gradients(on_cuda(activation), inputs)
    again = outputs_and_gradients(on_cuda(activation), inputs)
    for name, value in exact.items():
        assert got[name].dtype == dtype
        budget = 2 * (low[name].double() - value).abs().max() + torch.finfo(dtype).eps * value.abs().max()
        assert (got[name].double() - value).abs().max() <= budget, name
        assert torch.equal(got[name], again[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_cuda_compiled_equals_eager(dtype: torch.dtype, fresh_dynamo: None) -> None:
    inputs = [t.detach().cuda().requires_grad_() for t in make(2, 65, 3, 128, dtype=dtype)]

    def run(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, weight, activation="silu")

    eager = outputs_and_gradients(run, inputs)
    compiled = outputs_and_gradients(torch.compile(run, fullgraph=True), inputs)
    for name in ("y", "d_x", "d_gate"):
        assert torch.equal(compiled[name], eager[name]), name
    # The compiler sums the partial sums of the weight, in float64, in an order of its own.
    assert_all_close(compiled, eager)


@pytest.mark.gpu
def test_cuda_one_graph_for_several_lengths(fresh_dynamo: None) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(lambda *a: gated_rms_norm(*a, eps=1e-6), fullgraph=True, backend=count)
    for length in (9, 129, 700):
        inputs = [t.detach().cuda().requires_grad_() for t in make(1, length, 1, 64, dtype=torch.float32)]
        for t in inputs[:2]:
            torch._dynamo.mark_dynamic(t, 1)
        got = outputs_and_gradients(compiled, inputs)
        assert_all_close(got, outputs_and_gradients(gated_rms_norm, inputs), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cuda_opcheck(activation: str) -> None:
    inputs = make(2, 3, 5, dtype=torch.float32)
    x, gate, weight = (t.detach().cuda().requires_grad_() for t in inputs)
    torch.library.opcheck(torch.ops.hybrid_flex.gated_rms_norm.default, (x, gate, weight, 1e-6, activation))
    torch.library.opcheck(
        torch.ops.hybrid_flex.gated_rms_norm_backward.default,
        (torch.randn(2, 3, 5, device="cuda"), x.detach(), gate.detach(), weight.detach(), 1e-6, activation),
    )


@pytest.mark.gpu
def test_cuda_more_than_int32_elements() -> None:
    rows = 2**24 + 33
    x = torch.zeros(rows, 128, device="cuda", dtype=torch.bfloat16)
    x[-40:] = torch.randn(40, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(128, device="cuda", dtype=torch.bfloat16)
    y = gated_rms_norm(x, x, weight)
    assert torch.equal(y[-40:], gated_rms_norm(x[-40:].clone(), x[-40:].clone(), weight))
    assert not y[:-40].any()
