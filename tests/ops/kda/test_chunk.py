"""chunk_kda against kda_reference: outputs, states, every gradient, identities, the compiler, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.ops import chunk_kda, kda_reference

Make = Callable[..., dict[str, Tensor]]
RAW = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
}


def results(
    op: Callable[..., tuple[Tensor, Tensor | None]], x: dict[str, Tensor], **options: object
) -> dict[str, Tensor]:
    """Run an operator and return output, state and the gradient of every argument under fixed output gradients."""
    o, state = op(**x, output_final_state=True, **options)
    assert state is not None
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (o, state)]
    loss = sum((t.double() * w).sum() for t, w in zip((o, state), weights, strict=True))
    grads = torch.autograd.grad(loss, list(x.values()))
    return {"o": o.detach(), "final_state": state.detach()} | {
        f"d_{name}": grad for name, grad in zip(x, grads, strict=True)
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, expected in want.items():
        assert got[name].shape == expected.shape and got[name].dtype == expected.dtype, name
        assert got[name].isfinite().all(), f"{name} is not finite"
        error = relative_error(got[name], expected)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(
    ("B", "T", "H", "HV", "K", "V"),
    [(2, 1, 1, 1, 4, 6), (1, 15, 2, 2, 8, 8), (1, 63, 1, 1, 8, 4), (2, 65, 2, 4, 8, 12), (1, 257, 3, 3, 32, 48)],
    ids=lambda n: str(n),
)
def test_equals_the_reference(make_kda: Make, B: int, T: int, H: int, HV: int, K: int, V: int) -> None:
    x = make_kda(B, T, H, K, V, HV=HV)
    assert_same(results(chunk_kda, x), results(kda_reference, x), 1e-12)


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("lower_bound", [None, -5.0], ids=["softplus", "lower-bound"])
def test_raw_inputs_equal_the_reference(make_kda: Make, chunk_size: int, lower_bound: float | None) -> None:
    x = make_kda(2, 70, 2, 8, 6, HV=4, raw=True)
    options = {
        **RAW,
        "lower_bound": lower_bound,
        "allow_neg_eigval": chunk_size == 32,
        "state_v_first": chunk_size == 16,
    }
    if options["state_v_first"]:
        x["initial_state"] = x["initial_state"].detach().mT.contiguous().requires_grad_()
    got = results(chunk_kda, x, chunk_size=chunk_size, safe_gate=lower_bound is not None, **options)
    assert_same(got, results(kda_reference, x, **options), 1e-12)


def test_each_flag_alone_equals_the_reference(make_kda: Make) -> None:
    x = make_kda(1, 20, 2, 4, 4, raw=True)
    for flag in RAW:
        taken = dict(x)
        if flag != "use_gate_in_kernel":
            del taken["A_log"], taken["dt_bias"]
            taken["g"] = -x["g"].detach().abs().requires_grad_()
        options = {flag: True, "scale": 0.7}
        assert_same(results(chunk_kda, taken, **options), results(kda_reference, taken, **options), 1e-12)


@pytest.mark.parametrize("bounds", [[0, 40], [0, 0, 1, 1, 17, 40, 40], [0, 16, 32, 40], [0, 39, 40]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_packed_equals_the_reference(make_kda: Make, bounds: list[int], dtype: torch.dtype) -> None:
    x = make_kda(1, 40, 1, 8, 4, HV=2, num_sequences=len(bounds) - 1, raw=True)
    options = {**RAW, "cu_seqlens": torch.tensor(bounds, dtype=dtype)}
    assert_same(results(chunk_kda, x, chunk_size=16, **options), results(kda_reference, x, **options), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("lower_bound", [None, -5.0], ids=["softplus", "lower-bound"])
def test_error_within_twice_the_plain_form(make_kda: Make, dtype: torch.dtype, lower_bound: float | None) -> None:
    x = make_kda(1, 130, 2, 32, 32, raw=True, dtype=dtype)
    options = {**RAW, "lower_bound": lower_bound}
    exact = results(kda_reference, {n: t.detach().double().requires_grad_() for n, t in x.items()}, **options)
    plain, got = results(kda_reference, x, **options), results(chunk_kda, x, **options)
    for name, want in exact.items():
        assert got[name].dtype == plain[name].dtype
        error, budget = relative_error(got[name], want), 2 * relative_error(plain[name], want)
        # Both are sums in float32: below 16 units in its last place the order of the sums decides.
        budget = max(budget, 16 * torch.finfo(torch.float32).eps)
        assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.2e}"


def _extreme(kind: str, x: dict[str, Tensor]) -> dict[str, object]:
    """Change the arguments in place to an extreme of their range and return the options that go with it."""
    with torch.no_grad():
        if kind == "no-decay":
            x["g"].zero_()
        elif kind == "full-reset":
            x["g"].fill_(-1000)
        elif kind == "resets-among-slow-decay":
            x["g"].fill_(-1e-3)[:, ::7] = -1000
        elif kind == "beta-0":
            x["beta"].zero_()
        elif kind == "beta-1":
            x["beta"].fill_(1)
        elif kind == "zero-keys":
            x["k"].zero_()
        elif kind == "steep-softplus":
            x["A_log"].fill_(math.log(16))
            x["dt_bias"].fill_(30)
            return RAW
        elif kind == "bound-near-0":
            return {**RAW, "lower_bound": -1e-4}
    return {}


@pytest.mark.parametrize(
    "kind",
    [
        "no-decay",
        "full-reset",
        "resets-among-slow-decay",
        "beta-0",
        "beta-1",
        "zero-keys",
        "steep-softplus",
        "bound-near-0",
    ],
)
def test_extremes_in_float32(make_kda: Make, kind: str) -> None:
    raw = kind in ("steep-softplus", "bound-near-0")
    x = make_kda(1, 100, 2, 16, 8, raw=raw, dtype=torch.float32)
    options = _extreme(kind, x)
    exact = results(kda_reference, {n: t.detach().double().requires_grad_() for n, t in x.items()}, **options)
    got = results(chunk_kda, x, **options)
    for name, want in exact.items():
        assert got[name].isfinite().all(), name
        # Where a gradient vanishes (g = -1000) an absolute bound takes over.
        error = float((got[name].double() - want).norm()) / max(float(want.norm()), 1e-2)
        assert error < 2e-5, f"{name}: error {error:.2e}"


@pytest.mark.parametrize("token", [0, 20, 63, 64, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_causality_is_bit_exact(make_kda: Make, token: int, dtype: torch.dtype) -> None:
    x = make_kda(1, 100, 2, 16, 16, raw=True, dtype=dtype, grad=False)
    before, _ = chunk_kda(**x, **RAW)
    for name in ("q", "k", "v", "g", "beta"):
        x[name][:, token] = 17.0
    after, _ = chunk_kda(**x, **RAW)
    assert torch.equal(before[:, :token], after[:, :token])
    assert not torch.equal(before[:, token:], after[:, token:])


@pytest.mark.parametrize("cut", [1, 37, 64, 99])
def test_split_with_carried_state_equals_whole(make_kda: Make, cut: int) -> None:
    x = make_kda(2, 100, 2, 8, 8, grad=False)
    whole, final = chunk_kda(**x, output_final_state=True)
    state, parts = x.pop("initial_state"), []
    for span in (slice(0, cut), slice(cut, None)):
        o, state = chunk_kda(**{n: t[:, span] for n, t in x.items()}, initial_state=state, output_final_state=True)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


def test_packed_equals_each_sequence_alone(make_kda: Make) -> None:
    bounds = [0, 5, 5, 70, 101]
    x = make_kda(1, 101, 2, 8, 8, num_sequences=4, grad=False)
    o, final = chunk_kda(**x, cu_seqlens=torch.tensor(bounds), output_final_state=True)
    states = x.pop("initial_state")
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            assert torch.equal(final[n], states[n])
            continue
        alone, last = chunk_kda(
            **{name: t[:, start:end] for name, t in x.items()}, initial_state=states[n : n + 1], output_final_state=True
        )
        torch.testing.assert_close(o[:, start:end], alone)
        torch.testing.assert_close(final[n : n + 1], last)


def test_final_state_only_on_request(make_kda: Make) -> None:
    assert chunk_kda(**make_kda(1, 3, 1, 4, 4))[1] is None


def test_arguments_are_left_alone(make_kda: Make) -> None:
    x = make_kda(1, 33, 2, 8, 8, raw=True, grad=False)
    before = {name: t.clone() for name, t in x.items()}
    chunk_kda(**x, **RAW, output_final_state=True)
    assert all(torch.equal(t, before[name]) for name, t in x.items())


def test_non_contiguous_arguments(make_kda: Make) -> None:
    x = make_kda(2, 20, 2, 8, 8, grad=False)
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in x.items()}
    torch.testing.assert_close(chunk_kda(**strided)[0], chunk_kda(**x)[0])


def test_positive_decay_does_not_hang(make_kda: Make) -> None:
    x = make_kda(1, 70, 1, 8, 8, dtype=torch.float32, grad=False)
    assert chunk_kda(**x | {"g": torch.full_like(x["g"], 5.0)})[0].shape == x["v"].shape


def test_gradcheck(make_kda: Make) -> None:
    x = make_kda(1, 18, 1, 3, 2, HV=2, raw=True)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        o, state = chunk_kda(**dict(zip(x, tensors, strict=True)), **RAW, chunk_size=16, output_final_state=True)
        assert state is not None
        return o, state

    assert torch.autograd.gradcheck(run, tuple(x.values()), fast_mode=True)


def test_the_operator_that_keeps_is_for_cuda(make_kda: Make) -> None:
    x = make_kda(1, 19, 1, 4, 4, raw=True, dtype=torch.float32)
    tensors = [x.get(n) for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")]
    with pytest.raises(RuntimeError, match=r"chunk_kda_training: q must be on CUDA and not float64, got cpu"):
        torch.ops.hybrid_flex.chunk_kda_training(*tensors, True, True, True, False, None, None, None, 0.5, False, 16)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["batched", "packed"])
def test_opcheck(make_kda: Make, packed: bool, fresh_dynamo: None) -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 19]) if packed else None
    x = make_kda(1, 19, 1, 4, 4, HV=2, num_sequences=3 if packed else None, raw=packed, dtype=torch.float32)
    flags = (packed, packed, packed, False, None)
    tensors = [x.get(n) for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")]
    arguments = (*tensors, *flags, x["initial_state"], cu_seqlens, 0.5, False, 16)
    torch.library.opcheck(torch.ops.hybrid_flex.chunk_kda.default, arguments)
    o, state = torch.ops.hybrid_flex.chunk_kda(*arguments)
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    gradients = (torch.randn(o.shape), torch.randn(state.shape))
    torch.library.opcheck(torch.ops.hybrid_flex.chunk_kda_backward.default, (*gradients, o.detach(), *detached))


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_one_graph_for_several_lengths(make_kda: Make, packed: bool, fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chunk_kda, backend=counter, fullgraph=True, dynamic=True)
    for T, bounds in ((70, [0, 3, 70]), (33, [0, 20, 33]), (130, [0, 64, 130])):
        x = make_kda(1 if packed else 2, T, 1, 8, 4, num_sequences=2 if packed else None, raw=True)
        options = {**RAW, "chunk_size": 16, "cu_seqlens": torch.tensor(bounds) if packed else None}
        assert_same(results(compiled, x, **options), results(chunk_kda, x, **options), 1e-12)
    assert counter.frame_count == 1


def test_inductor_forward_and_backward(make_kda: Make, fresh_dynamo: None) -> None:
    # From a zero state, with gradients through the final state and a length that varies: there, differentiating a scan
    # of torch gives wrong gradients without any error, which is one reason for a backward of our own.
    compiled = torch.compile(chunk_kda, fullgraph=True)
    for T in (50, 37):
        x = make_kda(1, T, 2, 16, 8, raw=True, dtype=torch.float32)
        del x["initial_state"]
        for name in ("q", "k", "v", "g", "beta"):
            torch._dynamo.mark_dynamic(x[name], 1)
        options = {**RAW, "chunk_size": 16}
        assert_same(results(compiled, x, **options), results(chunk_kda, x, **options), 1e-5)


def test_poisoned_memory(make_kda: Make, nan_memory: None) -> None:
    x = make_kda(1, 21, 1, 8, 4, num_sequences=3, raw=True)
    options = {**RAW, "cu_seqlens": torch.tensor([0, 5, 5, 21])}
    assert_same(results(chunk_kda, x, chunk_size=16, **options), results(kda_reference, x, **options), 1e-12)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    H=st.integers(1, 2),
    group=st.integers(1, 2),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    chunk_size=st.sampled_from([16, 32, 64]),
    shift=st.sampled_from([-8.0, 0.0, 8.0, 40.0]),
    seed=st.integers(0, 10),
)
def test_any_shape_gate_and_packing(
    make_kda: Make, lengths: list[int], H: int, group: int, K: int, V: int, chunk_size: int, shift: float, seed: int
) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    x = make_kda(1, bounds[-1], H, K, V, HV=H * group, num_sequences=len(lengths), raw=True, seed=seed)
    with torch.no_grad():
        x["g"] += shift
    options = {**RAW, "cu_seqlens": torch.tensor(bounds)}
    assert_same(results(chunk_kda, x, chunk_size=chunk_size, **options), results(kda_reference, x, **options), 1e-9)


X = {
    "q": torch.zeros(1, 4, 2, 8),
    "k": torch.zeros(1, 4, 2, 8),
    "v": torch.zeros(1, 4, 4, 6),
    "g": torch.zeros(1, 4, 4, 8),
    "beta": torch.zeros(1, 4, 4),
}
BAD = [
    ({"q": X["q"][0]}, ValueError, "q must be [B, T, H, K], a tensor of rank 4, got shape (4, 2, 8)"),
    ({"v": X["v"][0]}, ValueError, "v must be [B, T, HV, V], a tensor of rank 4, got shape (4, 4, 6)"),
    ({"k": X["k"][:, :, :1]}, ValueError, "k must be [B, T, H, K] = [1, 4, 2, 8], got shape (1, 4, 1, 8)"),
    ({"g": X["g"][:, :, :2]}, ValueError, "g must be [B, T, HV, K] = [1, 4, 4, 8], got shape (1, 4, 2, 8)"),
    ({"beta": X["beta"][:, :3]}, ValueError, "beta must be [B, T, HV] = [1, 4, 4], got shape (1, 3, 4)"),
    (
        {"v": torch.zeros(1, 4, 3, 6), "g": torch.zeros(1, 4, 3, 8), "beta": torch.zeros(1, 4, 3)},
        ValueError,
        "v must have a number of heads that is a multiple of H = 2, got 3",
    ),
    (
        {"q": torch.zeros(1, 4, 2, 257), "k": torch.zeros(1, 4, 2, 257), "g": torch.zeros(1, 4, 4, 257)},
        ValueError,
        "q must have a head width K from 1 to 256, got 257",
    ),
    ({"v": torch.zeros(1, 4, 4, 300)}, ValueError, "v must have a head width V from 1 to 256, got 300"),
    ({"q": X["q"].int()}, TypeError, "q must have dtype bfloat16, float16, float32, float64, got int32"),
    ({"k": X["k"].half()}, TypeError, "k must have dtype float32, got float16"),
    ({"beta": X["beta"].bool()}, TypeError, "beta must have dtype bfloat16, float16, float32, float64, got bool"),
    ({"g": X["g"].to("meta")}, ValueError, "g must be on cpu, like the other tensors, got meta"),
    (
        {"initial_state": torch.zeros(2, 4, 8, 6)},
        ValueError,
        "initial_state must be [N, HV, K, V] = [1, 4, 8, 6], got shape (2, 4, 8, 6)",
    ),
    (
        {"initial_state": torch.zeros(1, 4, 8, 6), "state_v_first": True},
        ValueError,
        "initial_state must be [N, HV, V, K] = [1, 4, 6, 8], got shape (1, 4, 8, 6)",
    ),
    (
        {"initial_state": torch.zeros(1, 4, 8, 6).half()},
        TypeError,
        "initial_state must have dtype float32, got float16",
    ),
    ({"use_gate_in_kernel": True}, ValueError, "A_log must be given when lower_bound is None, got None"),
    ({"A_log": torch.zeros(4)}, ValueError, "A_log must come with use_gate_in_kernel=True"),
    (
        {"use_gate_in_kernel": True, "safe_gate": True, "A_log": torch.zeros(4)},
        ValueError,
        "lower_bound must be in [-5, 0) when safe_gate=True, got None",
    ),
    ({"allow_neg_eigval": True}, ValueError, "allow_neg_eigval must come with use_beta_sigmoid_in_kernel=True"),
    ({"cu_seqlens": torch.tensor([1, 4])}, ValueError, "cu_seqlens must start at 0, got 1"),
    ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, ValueError, "cu_seqlens must never decrease, got [0, 3, 2, 4]"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens must end at T = 4, got 5"),
    ({"cu_seqlens": torch.tensor([0.0, 4.0])}, TypeError, "cu_seqlens must have dtype int32, int64, got float32"),
    (
        {name: torch.cat((t, t)) for name, t in X.items()} | {"cu_seqlens": torch.tensor([0, 4])},
        ValueError,
        "cu_seqlens must come with a batch size of 1 (sequences are packed along T), got 2",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_error_message(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        chunk_kda(**{**X, **change})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"chunk_kda: {message}")


def test_chunk_size_and_unknown_keyword() -> None:
    with pytest.raises(ValueError, match="chunk_kda: chunk_size must be one of 16, 32, 64, got 48"):
        chunk_kda(**X, chunk_size=48)
    with pytest.raises(TypeError, match="unexpected keyword argument 'head_first'"):
        chunk_kda(**X, head_first=True)  # type: ignore[call-arg]
