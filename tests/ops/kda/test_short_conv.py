"""short_conv against a float64 loop, its identities, the compiler, errors and poisoned memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from hybrid_flex.ops import gated_rms_norm, short_conv

NAMES = ("x", "weight", "bias", "initial_state")


def loop(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, bounds: list[int] | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Compute the convolution one token at a time, from the list of the inputs seen so far."""
    tail = weight.shape[1] - 1
    if bounds is None:
        parts = [(x[b], None if state is None else state[b]) for b in range(x.shape[0])]
    else:
        pairs = itertools.pairwise(bounds)
        parts = [(x[0, a:b], None if state is None else state[n]) for n, (a, b) in enumerate(pairs)]
    outputs, finals = [], []
    for tokens, first in parts:
        seen = [torch.zeros_like(weight[:, 0])] * tail if first is None else list(first)
        rows = []
        for token in tokens:
            seen.append(token)
            z = torch.zeros_like(token) if bias is None else bias
            for i in range(tail + 1):
                z = z + weight[:, i] * seen[len(seen) - tail - 1 + i]
            rows.append(z / (1 + torch.exp(-z)) if silu else z)
        outputs.append(torch.stack(rows) if rows else tokens)
        finals.append(torch.stack(seen[len(seen) - tail :]))
    y = torch.stack(outputs) if bounds is None else torch.cat(outputs).unsqueeze(0)
    return y, torch.stack(finals)


def make(
    batch_size: int,
    length: int,
    width: int,
    taps: int,
    *,
    sequences: int | None = None,
    bias: bool = True,
    state: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor | None]:
    """Make x, weight, bias and initial_state, which require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    x, weight = draw(batch_size, length, width), draw(width, taps)
    return [
        x,
        weight,
        draw(width) if bias else None,
        draw(batch_size if sequences is None else sequences, taps - 1, width) if state else None,
    ]


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor | None]
) -> dict[str, Tensor]:
    """Run ``function`` and differentiate a fixed weighting of both outputs."""
    y, final_state = function(*inputs)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in (y, final_state)]
    names = [name for name, t in zip(NAMES, inputs, strict=True) if t is not None]
    tensors = [t for t in inputs if t is not None]
    gradients = torch.autograd.grad(
        (y * weights[0]).sum() + (final_state * weights[1]).sum(), tensors, materialize_grads=True
    )
    return {"y": y, "final_state": final_state} | {f"d_{n}": g for n, g in zip(names, gradients, strict=True)}


def operator(bounds: list[int] | None = None, silu: bool = True) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        y, final_state = short_conv(
            x,
            weight,
            bias,
            activation="silu" if silu else None,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        assert final_state is not None
        return y, final_state

    return run


def assert_all_close(got: dict[str, Tensor], want: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize(("batch_size", "length", "taps"), [(2, 9, 4), (1, 1, 4), (3, 2, 8), (1, 7, 2), (2, 0, 3)])
def test_equals_the_loop(batch_size: int, length: int, taps: int, state: bool, bias: bool, silu: bool) -> None:
    inputs = make(batch_size, length, 5, taps, bias=bias, state=state)
    got = outputs_and_gradients(operator(silu=silu), inputs)
    want = outputs_and_gradients(lambda *a: loop(*a, None, silu), inputs)
    assert_all_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize(
    "bounds",
    [[0, 9], [0, 4, 9], [0, 0, 1, 1, 3, 9, 9], [0, 9, 9], [0, 2, 4, 5, 9], [0, 0]],
    ids=lambda b: "-".join(map(str, b)),
)
def test_packed_equals_the_loop(bounds: list[int], state: bool) -> None:
    inputs = make(1, bounds[-1], 5, 4, sequences=len(bounds) - 1, state=state)
    got = outputs_and_gradients(operator(bounds), inputs)
    want = outputs_and_gradients(lambda *a: loop(*a, bounds, True), inputs)
    assert_all_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("length", [1, 63, 65, 257], ids=lambda t: f"T{t}")
def test_error_within_twice_the_plain_form(length: int, dtype: torch.dtype) -> None:
    inputs = make(2, length, 16, 4, dtype=dtype)
    exact = outputs_and_gradients(
        operator(), [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    )
    got = outputs_and_gradients(operator(), inputs)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        extended = torch.cat([state, x], 1)
        z = bias + sum(weight[:, i] * extended[:, i : i + x.shape[1]] for i in range(4))
        return F.silu(z), extended[:, x.shape[1] :]

    low = outputs_and_gradients(plain, inputs)
    for name, value in exact.items():
        assert got[name].dtype == dtype
        scale = value.abs().max()
        budget = 2 * (low[name].double() - value).abs().max() + torch.finfo(dtype).eps * scale
        assert (got[name].double() - value).abs().max() <= budget, name


def test_float32_parameters_with_low_precision_tokens() -> None:
    x, weight, bias, state = make(2, 9, 6, 4, dtype=torch.bfloat16)
    master_weight, master_bias = weight.detach().float().requires_grad_(), bias.detach().float().requires_grad_()
    got = outputs_and_gradients(operator(), [x, master_weight, master_bias, state])
    want = outputs_and_gradients(operator(), [x, weight, bias, state])
    assert got["d_weight"].dtype == got["d_bias"].dtype == torch.float32
    for name in ("y", "final_state", "d_x", "d_initial_state"):
        assert torch.equal(got[name], want[name])


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 11, 12])
def test_split_with_carried_state_equals_whole(cut: int) -> None:
    inputs = make(2, 12, 5, 4)

    def split(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        first, middle = operator()(x[:, :cut], weight, bias, state)
        second, last = operator()(x[:, cut:], weight, bias, middle)
        return torch.cat([first, second], 1), last

    assert_all_close(
        outputs_and_gradients(split, inputs), outputs_and_gradients(operator(), inputs), rtol=1e-12, atol=1e-12
    )


def test_token_by_token_equals_whole() -> None:
    x, weight, bias, state = make(2, 7, 5, 4)
    y, final_state = operator()(x, weight, bias, state)
    rows = []
    for t in range(7):
        row, state = operator()(x[:, t : t + 1], weight, bias, state)
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows, 1), y, rtol=1e-12, atol=1e-12)
    assert torch.equal(state, final_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("bounds", [None, [0, 20, 20, 50, 67]], ids=["batch", "packed"])
def test_causality_is_bit_exact(bounds: list[int] | None, dtype: torch.dtype) -> None:
    x, weight, bias, state = make(1, 67, 33, 4, dtype=dtype, sequences=None if bounds is None else 4)
    with torch.no_grad():
        y, _ = operator(bounds)(x, weight, bias, state)
        for t in (0, 1, 19, 20, 49, 66):
            changed = x.clone()
            changed[:, t] = float("nan")
            after, _ = operator(bounds)(changed, weight, bias, state)
            assert torch.equal(after[:, :t], y[:, :t])
            # ... and what follows depends on it for W tokens at most, and never past its sequence.
            end = min(t + 4, next((b for b in bounds or [67] if b > t), 67))
            assert after[:, t:end].isnan().all()
            assert torch.equal(after[:, end:], y[:, end:])


@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("bounds", [None, [0, 2, 2, 7]], ids=["batch", "packed"])
def test_opcheck(bounds: list[int] | None, state: bool) -> None:
    x, weight, bias, initial = make(1, 7, 3, 4, dtype=torch.float32, sequences=bounds and 3, state=state, bias=state)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    torch.library.opcheck(torch.ops.hybrid_flex.short_conv.default, (x, weight, bias, initial, cu_seqlens, True, True))
    d_final_state = torch.randn(1 if bounds is None else 3, 3, 3)
    detached = [None if t is None else t.detach() for t in (x, weight, bias, initial)]
    torch.library.opcheck(
        torch.ops.hybrid_flex.short_conv_backward.default,
        (torch.randn(1, 7, 3), d_final_state, *detached, cu_seqlens, True),
    )


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_one_graph_for_several_lengths(packed: bool, fresh_dynamo: None) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, cu: Tensor | None) -> tuple[Tensor, Tensor]:
        y, final = short_conv(x, weight, bias, initial_state=state, output_final_state=True, cu_seqlens=cu)
        assert final is not None
        return y, final

    compiled = torch.compile(run, fullgraph=True, backend=count, dynamic=True)
    # No two sizes alike at the first call: equal sizes are taken for the same size.
    for length, sequences in ((11, 6), (17, 7), (33, 8)):
        bounds = [*[0, 2, 2, 5, 7, 8, 9, 10][:sequences], length] if packed else None
        inputs = make(1 if packed else 2, length, 5, 4, dtype=torch.float32, sequences=sequences if packed else None)
        cu = None if bounds is None else torch.tensor(bounds)
        got = outputs_and_gradients(lambda *a, cu=cu: compiled(*a, cu), inputs)
        assert_all_close(got, outputs_and_gradients(operator(bounds), inputs), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_inductor_forward_and_backward(fresh_dynamo: None) -> None:
    inputs = make(1, 9, 5, 4, dtype=torch.float32, sequences=3)
    compiled = torch.compile(operator([0, 2, 2, 9]), fullgraph=True)
    assert_all_close(
        outputs_and_gradients(compiled, inputs),
        outputs_and_gradients(operator([0, 2, 2, 9]), inputs),
        rtol=1e-5,
        atol=1e-5,
    )


class ConvolvedNorm(torch.nn.Module):
    """A short convolution, whose output gates the norm of its input, with the state going round."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = torch.nn.Parameter(torch.linspace(-1, 1, 24).view(6, 4))
        self.bias = torch.nn.Parameter(torch.linspace(-0.5, 0.5, 6))
        self.scale = torch.nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, final = short_conv(x, self.taps, self.bias, initial_state=state, output_final_state=True)
        assert final is not None
        return gated_rms_norm(x, y, self.scale), final


FRESH_LOAD = """
import sys, torch
import hybrid_flex
torch.manual_seed(0)
for path in sys.argv[2:]:
    module = torch.export.load(path).module()
    for (batch_size, length), want in torch.load(sys.argv[1]).items():
        x = torch.linspace(-2, 2, batch_size * length * 6).view(batch_size, length, 6).requires_grad_()
        state = torch.linspace(-1, 1, batch_size * 18).view(batch_size, 3, 6).requires_grad_()
        y, final = module(x, state)
        parameters = dict(module.named_parameters())
        gradients = torch.autograd.grad(y.square().sum() + final.sum(), [x, state, *parameters.values()])
        for got, expected in zip([y, final, *gradients], want, strict=True):
            torch.testing.assert_close(got, expected)
print("equal")
"""


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
def test_export_keeps_one_node_per_operator(strict: bool, fresh_dynamo: None) -> None:
    program = _export(strict)
    names = [str(node.target) for node in program.graph.nodes if "hybrid_flex" in str(node.target)]
    assert names == ["hybrid_flex.short_conv.default", "hybrid_flex.gated_rms_norm.default"]


def _export(strict: bool) -> torch.export.ExportedProgram:
    batch, length = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    return torch.export.export(
        ConvolvedNorm(),
        (torch.randn(3, 5, 6), torch.randn(3, 3, 6)),
        dynamic_shapes=({0: batch, 1: length}, {0: batch}),
        strict=strict,
    )


def test_saved_program_runs_and_trains_in_a_fresh_process(
    tmp_path: Path, fresh_process: Callable[..., str], fresh_dynamo: None
) -> None:
    model, expected = ConvolvedNorm(), {}
    for batch_size, length in ((2, 9), (4, 1), (1, 31)):
        x = torch.linspace(-2, 2, batch_size * length * 6).view(batch_size, length, 6).requires_grad_()
        state = torch.linspace(-1, 1, batch_size * 18).view(batch_size, 3, 6).requires_grad_()
        y, final = model(x, state)
        gradients = torch.autograd.grad(y.square().sum() + final.sum(), [x, state, *model.parameters()])
        expected[batch_size, length] = [t.detach() for t in (y, final, *gradients)]
    torch.save(expected, tmp_path / "expected.pt")
    paths = [tmp_path / "strict.pt2", tmp_path / "nonstrict.pt2"]
    for path, strict in zip(paths, (True, False), strict=True):
        torch.export.save(_export(strict), path)
    assert fresh_process(FRESH_LOAD, tmp_path / "expected.pt", *paths).strip() == "equal"


X, WEIGHT = torch.randn(2, 5, 6), torch.randn(6, 4)
PACKED = {"x": X[:1]}
BAD = [
    ({"x": X[0]}, ValueError, "x must be [B, T, D], a tensor of rank 3, got shape (5, 6)"),
    ({"x": X.int()}, TypeError, "x must have dtype bfloat16, float16, float32, float64, got int32"),
    ({"weight": WEIGHT[:5]}, ValueError, "weight must be [D, W] = [6, *], got shape (5, 4)"),
    ({"weight": WEIGHT[:, :1]}, ValueError, "weight must have 2 to 8 taps, got 1"),
    ({"weight": torch.randn(6, 9)}, ValueError, "weight must have 2 to 8 taps, got 9"),
    ({"weight": WEIGHT.double()}, TypeError, "weight must have dtype float32, got float64"),
    ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu, like the other tensors, got meta"),
    ({"bias": torch.randn(5)}, ValueError, "bias must be [D] = [6], got shape (5,)"),
    ({"activation": "gelu"}, ValueError, "activation must be one of 'silu', None, got 'gelu'"),
    (
        {"initial_state": torch.randn(3, 3, 6)},
        ValueError,
        "initial_state must be [N, W - 1, D] = [2, 3, 6], got shape (3, 3, 6)",
    ),
    ({"initial_state": torch.randn(2, 3, 6).half()}, TypeError, "initial_state must have dtype float32, got float16"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens must come with a batch size of 1"),
    (PACKED | {"cu_seqlens": torch.tensor([1, 5])}, ValueError, "cu_seqlens must start at 0, got 1"),
    (
        PACKED | {"cu_seqlens": torch.tensor([0, 3, 2, 5])},
        ValueError,
        "cu_seqlens must never decrease, got [0, 3, 2, 5]",
    ),
    (PACKED | {"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens must end at T = 5, got 6"),
    (
        PACKED | {"cu_seqlens": torch.tensor([0.0, 5.0])},
        TypeError,
        "cu_seqlens must have dtype int32, int64, got float32",
    ),
    (
        PACKED | {"cu_seqlens": torch.tensor([0, 2, 5]), "initial_state": torch.randn(1, 3, 6)},
        ValueError,
        "initial_state must be [N, W - 1, D] = [2, 3, 6], got shape (1, 3, 6)",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m.split(",")[0] for _, _, m in BAD])
def test_error_message(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        short_conv(**({"x": X, "weight": WEIGHT} | change))  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"short_conv: {message}")


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        short_conv(X, WEIGHT, backend="cuda")  # type: ignore[call-arg]


@pytest.mark.parametrize("bounds", [None, [0, 0, 5, 67]], ids=["batch", "packed"])
def test_poisoned_memory(bounds: list[int] | None, nan_memory: None) -> None:
    inputs = make(1, 67, 5, 4, dtype=torch.float32, sequences=bounds and 3)
    for name, value in outputs_and_gradients(operator(bounds), inputs).items():
        assert value.isfinite().all(), name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    taps=st.integers(2, 8),
    width=st.integers(1, 5),
    silu=st.booleans(),
    state=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_packing_equals_its_sequences(
    lengths: list[int], taps: int, width: int, silu: bool, state: bool, seed: int
) -> None:
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    inputs = make(1, bounds[-1], width, taps, sequences=len(lengths), state=state, seed=seed)

    def one_by_one(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        results = [
            operator(silu=silu)(x[:, a:b], weight, bias, None if initial is None else initial[n : n + 1])
            for n, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        return torch.cat([y for y, _ in results], 1), torch.cat([final for _, final in results])

    got = outputs_and_gradients(operator(bounds, silu), inputs)
    assert_all_close(got, outputs_and_gradients(one_by_one, inputs), rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, [0, 0, 20, 67]], ids=["batch", "packed"])
def test_cuda_equals_cpu(bounds: list[int] | None) -> None:
    inputs = make(1, 67, 33, 4, sequences=bounds and 3)
    want = outputs_and_gradients(operator(bounds), inputs)
    on_cuda = [None if t is None else t.detach().cuda().requires_grad_() for t in inputs]
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device="cuda")
    y, final = short_conv(
        on_cuda[0], on_cuda[1], on_cuda[2], initial_state=on_cuda[3], output_final_state=True, cu_seqlens=cu_seqlens
    )
    torch.testing.assert_close(y.cpu(), want["y"])
    torch.testing.assert_close(final.cpu(), want["final_state"])


def on_cuda(bounds: list[int] | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a function of CPU tensors that runs the operator on the device; gradients come back as well."""

    def run(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        x, weight, bias, state = (None if t is None else t.cuda() for t in inputs)
        cu_seqlens = None if bounds is None else torch.tensor(bounds, device=x.device)
        y, final_state = short_conv(
            x, weight, bias, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
        )
        return y.cpu(), final_state.cpu()

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize(
    ("batch_size", "bounds", "width"),
    [(2, [0, 1], 16), (2, [0, 65], 600), (1, [0, 257], 512), (1, [0, 0, 1, 1, 40, 170, 257], 512)],
    ids=["B2-T1-D16", "B2-T65-D600", "B1-T257-D512", "packed-T257-D512"],
)
def test_cuda_error_within_twice_the_plain_form(
    batch_size: int, bounds: list[int], width: int, dtype: torch.dtype
) -> None:
    packed = None if len(bounds) == 2 else bounds
    inputs = make(batch_size, bounds[-1], width, 4, dtype=dtype, sequences=packed and len(bounds) - 1)
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in inputs]

    def plain(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs, finals = [], []
        for n, (a, b) in enumerate(itertools.pairwise(bounds)):
            extended = torch.cat([state if packed is None else state[n : n + 1], x[:, a:b]], 1)
            z = bias + sum(weight[:, i] * extended[:, i : i + b - a] for i in range(4))
            outputs.append(F.silu(z))
            finals.append(extended[:, b - a :])
        return torch.cat(outputs, 1), torch.cat(finals)

    exact = outputs_and_gradients(operator(packed), doubles)
    low = outputs_and_gradients(plain, inputs)
    got = outputs_and_gradients(on_cuda(packed), inputs)
    again = outputs_and_gradients(on_cuda(packed), inputs)
    for name, value in exact.items():
        assert got[name].dtype == dtype
        budget = 2 * (low[name].double() - value).abs().max() + torch.finfo(dtype).eps * value.abs().max()
        assert (got[name].double() - value).abs().max() <= budget, name
        assert torch.equal(got[name], again[name]), name


@pytest.mark.gpu
def test_cuda_token_by_token_equals_whole() -> None:
    x, weight, bias, state = (t.detach().cuda() for t in make(2, 7, 600, 4, dtype=torch.bfloat16))
    y, final_state = short_conv(x, weight, bias, initial_state=state, output_final_state=True)
    rows = []
    for t in range(7):
        row, state = short_conv(x[:, t : t + 1], weight, bias, initial_state=state, output_final_state=True)
        rows.append(row)
    # One rounding to bfloat16 apart at most, should the two configurations contract other products.
    torch.testing.assert_close(torch.cat(rows, 1), y, rtol=2**-7, atol=1e-6)
    assert torch.equal(state, final_state)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("bounds", [None, [0, 20, 20, 67]], ids=["batch", "packed"])
def test_cuda_compiled_equals_eager(bounds: list[int] | None, dtype: torch.dtype, fresh_dynamo: None) -> None:
    inputs = [t.detach().cuda().requires_grad_() for t in make(1, 67, 64, 4, dtype=dtype, sequences=bounds and 3)]
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device="cuda")

    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, final = short_conv(x, weight, bias, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
        assert final is not None
        return y, final

    def outputs(function: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return outputs_and_gradients(lambda *a: tuple(o.cpu() for o in function(*a)), inputs)

    eager, compiled = outputs(run), outputs(torch.compile(run, fullgraph=True))
    for name in ("y", "final_state", "d_x", "d_initial_state"):
        assert torch.equal(compiled[name], eager[name]), name
    # The compiler sums the partial sums of parameters, in float64, in an order of its own.
    assert_all_close(compiled, eager)


@pytest.mark.gpu
def test_cuda_one_graph_for_several_lengths(fresh_dynamo: None) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, final = short_conv(x, weight, bias, initial_state=state, output_final_state=True)
        assert final is not None
        return y, final

    compiled = torch.compile(run, fullgraph=True, backend=count)
    for length in (30, 129, 300):
        inputs = make(1, length, 64, 4, dtype=torch.float32)
        on_device = [t.detach().cuda().requires_grad_() for t in inputs]
        torch._dynamo.mark_dynamic(on_device[0], 1)
        y, final_state = compiled(*on_device)
        (y.sum() + final_state.sum()).backward()
        want, _ = on_cuda()(*inputs)
        torch.testing.assert_close(y.cpu(), want)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("bounds", [None, [0, 2, 2, 7]], ids=["batch", "packed"])
def test_cuda_opcheck(bounds: list[int] | None, state: bool) -> None:
    inputs = make(1, 7, 3, 4, dtype=torch.float32, sequences=bounds and 3, state=state, bias=state)
    x, weight, bias, initial = (None if t is None else t.detach().cuda().requires_grad_() for t in inputs)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device="cuda")
    torch.library.opcheck(torch.ops.hybrid_flex.short_conv.default, (x, weight, bias, initial, cu_seqlens, True, True))
    d_final_state = torch.randn(1 if bounds is None else 3, 3, 3, device="cuda")
    detached = [None if t is None else t.detach() for t in (x, weight, bias, initial)]
    torch.library.opcheck(
        torch.ops.hybrid_flex.short_conv_backward.default,
        (torch.randn(1, 7, 3, device="cuda"), d_final_state, *detached, cu_seqlens, True),
    )


@pytest.mark.gpu
def test_cuda_more_than_int32_elements() -> None:
    length, width = 2**18 + 65, 2**13
    x = torch.zeros(1, length, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(width, 4, device="cuda", dtype=torch.bfloat16)
    x[:, -70:] = torch.randn(1, 70, width, device="cuda", dtype=torch.bfloat16)
    y, final_state = short_conv(x, weight, output_final_state=True)
    want, want_final = short_conv(x[:, -70:].contiguous(), weight, output_final_state=True)
    assert torch.equal(y[:, -70:], want) and torch.equal(final_state, want_final)
    assert not y[:, :-70].any()
