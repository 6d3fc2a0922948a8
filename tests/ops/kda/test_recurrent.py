"""fused_recurrent_kda and kda_step: against the specification, each other and the chunked form."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.ops import chunk_kda, fused_recurrent_kda, kda_reference, kda_step

Make = Callable[..., dict[str, Tensor]]
RAW = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def outputs_and_gradients(
    op: Callable[..., tuple[Tensor, Tensor | None]], x: dict[str, Tensor], **options: object
) -> list[Tensor]:
    o, state = op(**x, output_final_state=True, **options)
    assert state is not None
    # The squares make every gradient depend on every output.
    grads = torch.autograd.grad(o.square().sum() + state.square().sum(), list(x.values()))
    return [o.detach(), state.detach(), *grads]


@pytest.mark.parametrize(
    ("B", "T", "H", "HV", "K", "V"),
    [(2, 1, 1, 1, 4, 6), (1, 5, 2, 4, 8, 3), (3, 17, 2, 2, 16, 24)],
    ids=lambda n: str(n),
)
@pytest.mark.parametrize("lower_bound", [None, -5.0], ids=["softplus", "lower-bound"])
def test_equals_the_reference(
    make_kda: Make, B: int, T: int, H: int, HV: int, K: int, V: int, lower_bound: float | None
) -> None:
    x = make_kda(B, T, H, K, V, HV=HV, raw=True)
    options = {**RAW, "lower_bound": lower_bound, "allow_neg_eigval": T == 5, "scale": 0.4}
    got, want = (outputs_and_gradients(op, x, **options) for op in (fused_recurrent_kda, kda_reference))
    for name, a, b in zip(("o", "final_state", *x), got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("bounds", [[0, 1, 2, 3], [0, 0, 4, 4, 9, 10]], ids=str)
@pytest.mark.parametrize("v_first", [False, True], ids=["state-KV", "state-VK"])
def test_packed_equals_the_reference(make_kda: Make, bounds: list[int], v_first: bool) -> None:
    x = make_kda(1, bounds[-1], 1, 4, 4, HV=2, num_sequences=len(bounds) - 1, raw=True)
    options = {**RAW, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "state_v_first": v_first}
    got, want = (outputs_and_gradients(op, x, **options) for op in (fused_recurrent_kda, kda_reference))
    for name, a, b in zip(("o", "final_state", *x), got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
def test_error_within_twice_the_plain_form(make_kda: Make, dtype: torch.dtype) -> None:
    x = make_kda(2, 9, 2, 16, 16, raw=True, dtype=dtype, grad=False)
    exact = kda_reference(**{n: t.double() for n, t in x.items()}, **RAW, output_final_state=True)
    plain = kda_reference(**x, **RAW, output_final_state=True)
    got = fused_recurrent_kda(**x, **RAW, output_final_state=True)
    for a, b, want in zip(got, plain, exact, strict=True):
        assert a.dtype == b.dtype
        floor = 16 * torch.finfo(torch.float32).eps
        assert (a - want).norm() / want.norm() <= max(2 * (b - want).norm() / want.norm(), floor)


def test_chunk_equals_recurrent_equals_step(make_kda: Make) -> None:
    x = make_kda(2, 70, 2, 8, 4, HV=4, grad=False)
    chunked, final = chunk_kda(**x, output_final_state=True)
    recurrent, last = fused_recurrent_kda(**x, output_final_state=True)
    state, rows = x.pop("initial_state"), []
    for t in range(70):
        before = state.clone()
        o, new = kda_step(**{n: y[:, t] for n, y in x.items()}, state=state)
        assert torch.equal(state, before)
        rows.append(o)
        state = new
    for o, S in ((chunked, final), (recurrent, last)):
        torch.testing.assert_close(o, torch.stack(rows, 1))
        torch.testing.assert_close(S, state)


def test_step_gradients_equal_the_reference(make_kda: Make) -> None:
    x = make_kda(2, 1, 2, 8, 4, HV=4)
    o, state = kda_reference(**x, output_final_state=True)
    want = torch.autograd.grad(o.square().sum() + state.square().sum(), list(x.values()))
    token = {n: y[:, 0] for n, y in x.items() if n != "initial_state"}
    o, state = kda_step(**token, state=x["initial_state"])
    got = torch.autograd.grad(o.square().sum() + state.square().sum(), list(x.values()))
    for name, a, b in zip(x, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_split_equals_whole_bit_for_bit(make_kda: Make, cut: int) -> None:
    x = make_kda(2, 9, 2, 8, 8, raw=True, dtype=torch.float32, grad=False)
    whole, final = fused_recurrent_kda(**x, **RAW, output_final_state=True)
    state, parts = x.pop("initial_state"), []
    tokens = {n: t for n, t in x.items() if n not in ("A_log", "dt_bias")}
    gate = {n: x[n] for n in ("A_log", "dt_bias")}
    for span in (slice(0, cut), slice(cut, None)):
        o, state = fused_recurrent_kda(
            **{n: t[:, span] for n, t in tokens.items()}, **gate, **RAW, initial_state=state, output_final_state=True
        )
        parts.append(o)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(state, final)


def test_causality_is_bit_exact(make_kda: Make) -> None:
    x = make_kda(1, 9, 2, 8, 8, raw=True, dtype=torch.float32, grad=False)
    before, _ = fused_recurrent_kda(**x, **RAW)
    for name in ("q", "k", "v", "g", "beta"):
        x[name][:, 5] = 17.0
    after, _ = fused_recurrent_kda(**x, **RAW)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_opcheck(make_kda: Make, packed: bool, fresh_dynamo: None) -> None:
    cu_seqlens = torch.tensor([0, 2, 2, 4]) if packed else None
    x = make_kda(1, 4, 1, 4, 4, HV=2, num_sequences=3 if packed else None, raw=True, dtype=torch.float32, grad=False)
    x["initial_state"].requires_grad_()
    tensors = [x[n] for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")]
    arguments = (*tensors, True, True, True, False, None, x["initial_state"], cu_seqlens, 0.5, False, 16)
    torch.library.opcheck(torch.ops.hybrid_flex.fused_recurrent_kda.default, arguments)


def test_one_graph_for_several_lengths(make_kda: Make, fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_recurrent_kda, backend=counter, fullgraph=True, dynamic=True)
    for T in (5, 3, 16):
        x = make_kda(2, T, 1, 8, 4, raw=True, grad=False)
        for a, b in zip(compiled(**x, **RAW), fused_recurrent_kda(**x, **RAW), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_inductor_forward(make_kda: Make, fresh_dynamo: None) -> None:
    compiled = torch.compile(fused_recurrent_kda, fullgraph=True)
    x = make_kda(2, 3, 2, 16, 8, raw=True, dtype=torch.float32, grad=False)
    got, want = (op(**x, **RAW, output_final_state=True) for op in (compiled, fused_recurrent_kda))
    torch.testing.assert_close(got, want)


class Pair(nn.Module):
    """Both operators in one program: a prefill and, from its state, a few tokens more."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, x: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        options = {**RAW, "A_log": self.A_log, "output_final_state": True, "cu_seqlens": cu_seqlens}
        o, state = chunk_kda(x, x, x, g, beta, **options, chunk_size=16)
        tail, state = fused_recurrent_kda(x, x, x, g, beta, initial_state=state, **options)
        assert state is not None
        return o + tail, state


FRESH_LOAD = """
import sys, torch, hybrid_flex
expected = torch.load(sys.argv[1])
for path in sys.argv[2:]:
    module = torch.export.load(path).module()
    for inputs, want in expected:
        o, state = module(*inputs)
        grads = torch.autograd.grad(o.sum() + state.sum(), [*inputs, *module.parameters()])
        for a, b in zip((o, state, *grads), want, strict=True):
            torch.testing.assert_close(a, b)
print("equal")
"""


def test_exported_programs_run_and_train_in_a_fresh_process(
    tmp_path: Path, fresh_process: Callable[..., str], fresh_dynamo: None
) -> None:
    def inputs(B: int, T: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(T)
        shapes = ((B, T, 2, 8), (B, T, 2, 8), (B, T, 2))
        return tuple(torch.randn(s, generator=generator).requires_grad_() for s in shapes)

    model, expected, paths = Pair(), [], []
    for B, T in ((2, 19), (3, 40), (2, 2)):
        x = inputs(B, T)
        o, state = model(*x)
        grads = torch.autograd.grad(o.sum() + state.sum(), [*x, *model.parameters()])
        expected.append((x, [t.detach() for t in (o, state, *grads)]))
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    for strict in (True, False):
        torch._dynamo.reset()
        program = torch.export.export(model, inputs(3, 21), dynamic_shapes=(dynamic,) * 3, strict=strict)
        names = [str(node.target) for node in program.graph.nodes if "hybrid_flex" in str(node.target)]
        assert names == ["hybrid_flex.chunk_kda.default", "hybrid_flex.fused_recurrent_kda.default"]
        paths.append(tmp_path / f"strict-{strict}.pt2")
        torch.export.save(program, paths[-1])
    torch.save(expected, tmp_path / "expected.pt")
    assert fresh_process(FRESH_LOAD, tmp_path / "expected.pt", *paths).strip() == "equal"


def test_packed_program_takes_other_packings(fresh_dynamo: None) -> None:
    def inputs(bounds: list[int]) -> tuple[Tensor, ...]:
        T = bounds[-1]
        generator = torch.Generator().manual_seed(T)
        tokens = (torch.randn(s, generator=generator) for s in ((1, T, 2, 8), (1, T, 2, 8), (1, T, 2)))
        return (*tokens, torch.tensor(bounds))

    tokens, sequences = {1: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}
    model = Pair()
    program = torch.export.export(
        model, inputs([0, 5, 21]), dynamic_shapes=(tokens, tokens, tokens, sequences), strict=False
    )
    for bounds in ([0, 5, 21], [0, 0, 40, 41, 50], [0, 18, 18]):
        torch.testing.assert_close(program.module()(*inputs(bounds)), model(*inputs(bounds)))


X = {"q": torch.zeros(2, 2, 8), "k": torch.zeros(2, 2, 8), "v": torch.zeros(2, 4, 6), "g": torch.zeros(2, 4, 8)}
X |= {"beta": torch.zeros(2, 4), "state": torch.zeros(2, 4, 8, 6)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": X["q"][0]}, ValueError, "q must be [B, H, K], a tensor of rank 3, got shape (2, 8)"),
        ({"state": X["state"][:1]}, ValueError, "state must be [B, HV, K, V] = [2, 4, 8, 6], got shape (1, 4, 8, 6)"),
        ({"state": X["state"].half()}, TypeError, "state must have dtype float32, got float16"),
        ({"g": X["g"][:, :2]}, ValueError, "g must be [B, HV, K] = [2, 4, 8], got shape (2, 2, 8)"),
        ({"q": X["q"].int()}, TypeError, "q must have dtype bfloat16, float16, float32, float64, got int32"),
    ],
    ids=["rank", "batch-size", "state-dtype", "heads", "dtype"],
)
def test_step_error_message(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        kda_step(**{**X, **change})
    assert str(caught.value) == f"kda_step: {message}"


def test_recurrent_error_message() -> None:
    x = torch.zeros(2, 1, 2, 8)
    with pytest.raises(ValueError, match="fused_recurrent_kda: initial_state must be"):
        fused_recurrent_kda(x, x, x, x, x[..., 0], initial_state=torch.zeros(3, 2, 8, 8))
    with pytest.raises(ValueError, match="fused_recurrent_kda: chunk_size must be one of 16, 32, 64, got 8"):
        fused_recurrent_kda(x, x, x, x, x[..., 0], chunk_size=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'head_first'"):
        fused_recurrent_kda(x, x, x, x, x[..., 0], head_first=True)  # type: ignore[call-arg]


def test_poisoned_memory(make_kda: Make, nan_memory: None) -> None:
    x = make_kda(1, 6, 1, 8, 4, num_sequences=3, raw=True)
    options = {**RAW, "cu_seqlens": torch.tensor([0, 2, 2, 6])}
    got, want = (outputs_and_gradients(op, x, **options) for op in (fused_recurrent_kda, kda_reference))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), seed=st.integers(0, 10))
def test_any_packing_equals_the_chunked_form(make_kda: Make, lengths: list[int], seed: int) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    x = make_kda(1, bounds[-1], 2, 5, 3, num_sequences=len(lengths), raw=True, seed=seed, grad=False)
    options = {**RAW, "cu_seqlens": torch.tensor(bounds), "output_final_state": True}
    torch.testing.assert_close(fused_recurrent_kda(**x, **options), chunk_kda(**x, **options))
