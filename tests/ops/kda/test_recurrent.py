"""fused_recurrent_kda, kda_step and kda_decode: against the specification, each other and the chunked form."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.ops import chunk_kda, fused_recurrent_kda, kda_decode, kda_reference, kda_step

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


def pooled(x: dict[str, Tensor], indices: list[int], num_slots: int, v_first: bool = False) -> tuple[Tensor, Tensor]:
    """Take the initial states out of ``x`` into the slots of a pool that is NaN elsewhere; return indices and pool."""
    states = x.pop("initial_state")
    slots = torch.tensor(indices, device=states.device)
    states = states.mT if v_first else states
    pool = states.new_full((num_slots, *states.shape[1:]), float("nan"))
    pool[slots[slots >= 0]] = states[slots >= 0]
    return slots, pool


def expected_decode(
    x: dict[str, Tensor], slots: Tensor, pool: Tensor, v_first: bool = False, **options: object
) -> tuple[Tensor, Tensor]:
    """Run the specification on the states in the slots and put them back; a skipped sequence has zero output."""
    live = slots >= 0
    initial = torch.where(live[:, None, None, None], pool[slots.clamp(min=0)], 0)
    options = {**RAW, **options, "output_final_state": True, "state_v_first": v_first}
    o, final = kda_reference(**x, initial_state=initial, **options)
    bounds = options.get("cu_seqlens")
    owner = live[:, None] if bounds is None else live.repeat_interleave(bounds.diff())[None]
    after = pool.to(final.dtype, copy=True)
    after[slots[live]] = final[live]
    return o * owner[..., None, None], after


POOLS = pytest.mark.parametrize(
    ("indices", "bounds"),
    [
        ([2, 0, 4], None),
        ([3, -1, 1], None),
        ([3, -1, 0, -2], None),
        ([-1, -1], None),
        ([4, 0, -1, 2], [0, 3, 3, 5, 6]),
        ([-1, 0, 1], [0, 2, 3, 3]),
    ],
    ids=str,
)


@POOLS
@pytest.mark.parametrize("v_first", [False, True], ids=["state-KV", "state-VK"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["i32", "i64"])
def test_decode_equals_the_reference(
    make_kda: Make, indices: list[int], bounds: list[int] | None, v_first: bool, index: torch.dtype, nan_memory: None
) -> None:
    B, T = (len(indices), 2) if bounds is None else (1, bounds[-1])
    x = make_kda(B, T, 1, 4, 3, HV=2, num_sequences=len(indices), raw=True, grad=False)
    slots, pool = pooled(x, indices, 5, v_first)
    options = {"cu_seqlens": None if bounds is None else torch.tensor(bounds, dtype=index)}
    want_o, want_pool = expected_decode(x, slots, pool, v_first, **options)
    o = kda_decode(**x, **RAW, **options, state=pool, state_indices=slots.to(index), state_v_first=v_first)
    torch.testing.assert_close(o, want_o)
    torch.testing.assert_close(pool, want_pool, equal_nan=True)


def test_decode_without_indices_uses_the_first_slots(make_kda: Make) -> None:
    x = make_kda(2, 3, 1, 4, 3, HV=2, raw=True, grad=False)
    slots, pool = pooled(x, [0, 1], 4)
    want_o, want_pool = expected_decode(x, slots, pool, lower_bound=-5.0, scale=0.3)
    # Slots may lie apart, as in a buffer of all layers.
    buffer = torch.stack((pool, pool, pool), 1)
    o = kda_decode(**x, **RAW, state=buffer[:, 1], lower_bound=-5.0, scale=0.3)
    torch.testing.assert_close(o, want_o)
    torch.testing.assert_close(buffer, torch.stack((pool, want_pool, pool), 1), equal_nan=True)


def test_decode_token_by_token_equals_at_once_bit_for_bit(make_kda: Make) -> None:
    x = make_kda(2, 4, 2, 8, 8, raw=True, dtype=torch.float32, grad=False)
    slots, pool = pooled(x, [1, 2], 3)
    other, parameters = pool.clone(), {name: x.pop(name) for name in ("A_log", "dt_bias")}
    whole = kda_decode(**x, **parameters, **RAW, state=pool, state_indices=slots)
    rows = []
    for t in range(4):
        token = {name: y[:, t : t + 1] for name, y in x.items()}
        rows.append(kda_decode(**token, **parameters, **RAW, state=other, state_indices=slots))
    assert torch.equal(torch.cat(rows, 1), whole) and torch.equal(other[1:], pool[1:])


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("indices", [None, [3, -1, 0]], ids=["first-slots", "indices"])
def test_decode_opcheck(make_kda: Make, packed: bool, indices: list[int] | None, fresh_dynamo: None) -> None:
    cu_seqlens = torch.tensor([0, 2, 2, 4]) if packed else None
    x = make_kda(1 if packed else 3, 4, 1, 4, 4, HV=2, raw=True, dtype=torch.float32, grad=False)
    tensors = [x[n] for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")]
    slots = None if indices is None else torch.tensor(indices)
    arguments = (*tensors, True, True, True, False, None, torch.randn(5, 2, 4, 4), slots, cu_seqlens, 0.5, False)
    torch.library.opcheck(torch.ops.hybrid_flex.kda_decode.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_decode_one_graph_for_several_sizes(make_kda: Make, backend: str, fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(kda_decode, backend=counter, fullgraph=True, dynamic=True)
    for B, T in ((3, 5), (4, 3), (2, 6)):
        x = make_kda(B, T, 2, 8, 4, raw=True, dtype=torch.float32, grad=False)
        slots, pool = pooled(x, [-1, 5, 0, 3][:B], 6 + B)
        want_pool = pool.clone()
        got = compiled(**x, **RAW, state=pool, state_indices=slots)
        torch.testing.assert_close(got, kda_decode(**x, **RAW, state=want_pool, state_indices=slots))
        torch.testing.assert_close(pool, want_pool, equal_nan=True)
    assert counter.frame_count == 1


class Server(nn.Module):
    """A pool of states as a buffer, advanced by whatever sequences come."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pool", torch.zeros(6, 2, 8, 8))
        self.register_buffer("A_log", torch.tensor([0.0, 1.0]))

    def forward(self, x: Tensor, g: Tensor, beta: Tensor, slots: Tensor) -> Tensor:
        return kda_decode(x, x, x, g, beta, self.pool, state_indices=slots, A_log=self.A_log, **RAW)


FRESH_DECODE = """
import sys, torch, hybrid_flex
inputs, want_o, want_pool = torch.load(sys.argv[1])
module = torch.export.load(sys.argv[2]).module()
with torch.no_grad():
    for x, want in zip(inputs, want_o, strict=True):
        torch.testing.assert_close(module(*x), want)
torch.testing.assert_close(dict(module.named_buffers())["pool"], want_pool)
print("equal")
"""


@torch.no_grad()
def test_decode_program_keeps_its_pool_in_a_fresh_process(
    tmp_path: Path, fresh_process: Callable[..., str], fresh_dynamo: None
) -> None:
    def inputs(slots: list[int], T: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(T)
        shapes = ((len(slots), T, 2, 8), (len(slots), T, 2, 8), (len(slots), T, 2))
        return (*(torch.randn(s, generator=generator) for s in shapes), torch.tensor(slots))

    model = Server()
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = (dynamic, dynamic, dynamic, {0: torch.export.Dim.DYNAMIC})
    program = torch.export.export(model, inputs([1, 4, -1], 5), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "decode.pt2")
    calls = [inputs([2, 5], 3), inputs([0, -1, 2, 4], 2), inputs([5, 0], 4)]
    outputs = [model(*call) for call in calls]
    torch.save((calls, outputs, model.pool), tmp_path / "expected.pt")
    assert fresh_process(FRESH_DECODE, tmp_path / "expected.pt", tmp_path / "decode.pt2").strip() == "equal"


DECODE = {"q": torch.zeros(2, 1, 2, 8), "k": torch.zeros(2, 1, 2, 8), "v": torch.zeros(2, 1, 4, 6)}
DECODE |= {"g": torch.zeros(2, 1, 4, 8), "beta": torch.zeros(2, 1, 4), "state": torch.zeros(5, 4, 8, 6)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"state": torch.zeros(5, 4, 6, 8)},
            ValueError,
            "state must be [num_slots, HV, K, V] = [*, 4, 8, 6], got shape (5, 4, 6, 8)",
        ),
        ({"state": torch.zeros(5, 4, 8, 6).half()}, TypeError, "state must have dtype float32, got float16"),
        (
            {"state": torch.zeros(5, 4, 6, 8).mT},
            ValueError,
            "state must have the strides of contiguous slots, got (192, 48, 1, 8)",
        ),
        (
            {"state": torch.zeros(1, 4, 8, 6)},
            ValueError,
            "state must have a slot for every sequence, or come with state_indices, got 1",
        ),
        ({"state_indices": torch.zeros(3).long()}, ValueError, "state_indices must be [N] = [2], got shape (3,)"),
        ({"state_indices": torch.zeros(2)}, TypeError, "state_indices must have dtype int32, int64, got float32"),
        (
            {"v": torch.zeros(2, 1, 4, 6).requires_grad_()},
            ValueError,
            "v must not require grad: this operator has no backward, call it under torch.no_grad(), "
            "got requires_grad=True",
        ),
        (
            {"A_log": torch.zeros(4)},
            ValueError,
            "A_log must come with use_gate_in_kernel=True, got use_gate_in_kernel=False",
        ),
    ],
    ids=["shape", "dtype", "strides", "too-few-slots", "num-indices", "float-indices", "grad", "no-gate"],
)
def test_decode_error_message(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        kda_decode(**{**DECODE, **change})
    assert str(caught.value) == f"kda_decode: {message}"


def test_decode_of_parameters_needs_no_grad(make_kda: Make) -> None:
    x = make_kda(2, 1, 2, 8, 4, raw=True)
    slots, pool = pooled({name: t.detach() for name, t in x.items()}, [1, 0], 2)
    del x["initial_state"]
    for name in x:
        rest = {other: t if other == name else t.detach() for other, t in x.items()}
        with pytest.raises(ValueError, match=f"kda_decode: {name} must not require grad"):
            kda_decode(**rest, **RAW, state=pool, state_indices=slots)
    with pytest.raises(ValueError, match="kda_decode: state must not require grad"):
        kda_decode(**{n: t.detach() for n, t in x.items()}, **RAW, state=pool.clone().requires_grad_())
    with torch.no_grad():
        assert not kda_decode(**x, **RAW, state=pool, state_indices=slots).requires_grad


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slots=st.permutations(range(-3, 5)), count=st.integers(1, 8), seed=st.integers(0, 10))
def test_decode_of_any_slots_equals_the_reference(make_kda: Make, slots: list[int], count: int, seed: int) -> None:
    x = make_kda(count, 2, 1, 3, 2, raw=True, seed=seed, grad=False)
    indices, pool = pooled(x, slots[:count], 5)
    want_o, want_pool = expected_decode(x, indices, pool)
    torch.testing.assert_close(kda_decode(**x, **RAW, state=pool, state_indices=indices), want_o)
    torch.testing.assert_close(pool, want_pool, equal_nan=True)


def on_gpu(x: dict[str, Tensor], grad: bool = False) -> dict[str, Tensor]:
    return {name: t.detach().cuda().requires_grad_(grad) for name, t in x.items()}


@contextlib.contextmanager
def nan_outputs() -> Iterator[None]:
    """Fill fresh memory with NaN around calls of ours: in that mode torch refuses cuBLAS, which references need."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def assert_as_good_as_plain(got: tuple[Tensor, ...], x: dict[str, Tensor], **options: object) -> None:
    """Allow twice the error of the specification run in the low precision itself, against it in float64."""
    exact = kda_reference(**{n: t.double() for n, t in x.items()}, **options, output_final_state=True)
    plain = kda_reference(**x, **options, output_final_state=True)
    for name, a, b, want in zip(("o", "state"), got, plain, exact, strict=True):
        assert a.dtype == b.dtype
        budget = max(2 * relative_error(b, want), 16 * torch.finfo(torch.float32).eps)
        assert relative_error(a, want) <= budget, f"{name}: {relative_error(a, want):.1e}, allowed {budget:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("lower_bound", [None, -5.0], ids=["softplus", "lower-bound"])
@pytest.mark.parametrize(
    ("B", "T", "H", "HV", "K", "V"),
    [
        (1, 1, 32, 32, 128, 128),
        (64, 1, 32, 32, 128, 128),
        (1, 6, 32, 32, 128, 128),
        (8, 3, 4, 16, 128, 128),
        (3, 2, 2, 4, 72, 40),
        (2, 2, 2, 2, 256, 256),
        (2, 2, 1, 3, 1, 5),
    ],
    ids=lambda n: str(n),
)
@pytest.mark.parametrize("v_first", [False, True], ids=["state-KV", "state-VK"])
def test_gpu_error_within_twice_the_plain_form(
    make_kda: Make,
    B: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    lower_bound: float | None,
    dtype: torch.dtype,
    v_first: bool,
) -> None:
    x = on_gpu(make_kda(B, T, H, K, V, HV=HV, raw=True, dtype=dtype, grad=False))
    if v_first:
        x["initial_state"] = x["initial_state"].mT.contiguous()
    options = {**RAW, "lower_bound": lower_bound, "allow_neg_eigval": T == 2, "state_v_first": v_first}
    with nan_outputs():
        got = fused_recurrent_kda(**x, **options, output_final_state=True)
    assert all(t.is_contiguous() and t.isfinite().all() for t in got if t is not None)
    assert_as_good_as_plain(got, x, **options)
    # The same in place, where outputs and states have to be the same.
    pool = x.pop("initial_state").clone()
    with nan_outputs():
        o = kda_decode(**x, **options, state=pool)
    torch.testing.assert_close(o, got[0])
    torch.testing.assert_close(pool, got[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_gpu_log_decay_and_extremes(make_kda: Make, dtype: torch.dtype) -> None:
    x = on_gpu(make_kda(2, 4, 4, 128, 128, HV=8, dtype=dtype, grad=False))
    assert_as_good_as_plain(fused_recurrent_kda(**x, output_final_state=True), x)
    x["g"][:, 0], x["g"][:, 1], x["g"][:, 2, :, ::2] = 0.0, -1000.0, -1000.0
    x["beta"][:, 0], x["beta"][:, 1] = 1.0, 0.0
    x["k"][:, 2] = 0.0
    with nan_outputs():
        got = fused_recurrent_kda(**x, output_final_state=True)
    assert (got[0][:, 1] == 0).all(), "the second token erases all and writes nothing"
    assert_as_good_as_plain(got, x)


@pytest.mark.gpu
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["i32", "i64"])
@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
def test_gpu_packed(make_kda: Make, index: torch.dtype, initial: bool) -> None:
    bounds = torch.tensor([0, 0, 3, 4, 4, 16, 17, 17], device="cuda", dtype=index)
    x = on_gpu(make_kda(1, 17, 8, 128, 128, num_sequences=7, raw=True, dtype=torch.bfloat16, grad=False))
    if not initial:
        del x["initial_state"]
    options = {**RAW, "cu_seqlens": bounds}
    with nan_outputs():
        got = fused_recurrent_kda(**x, **options, output_final_state=True)
    assert_as_good_as_plain(got, x, **options)
    for n in (0, 3, 6):
        assert torch.equal(got[1][n], x["initial_state"][n] if initial else torch.zeros_like(got[1][n]))


@pytest.mark.gpu
def test_gpu_slices_of_one_projection(make_kda: Make) -> None:
    """Inputs need not be contiguous."""
    x = on_gpu(make_kda(4, 2, 4, 64, 64, raw=True, dtype=torch.bfloat16, grad=False))
    want = fused_recurrent_kda(**x, **RAW, output_final_state=True)
    fused = torch.cat((x["q"], x["k"], x["v"]), 2)
    sliced = {**x, **dict(zip("qkv", fused.split(4, 2), strict=True))}
    sliced["initial_state"] = torch.stack((x["initial_state"],) * 2, 1)[:, 1]
    torch.testing.assert_close(fused_recurrent_kda(**sliced, **RAW, output_final_state=True), want, rtol=0, atol=0)


@pytest.mark.gpu
def test_gpu_gradients_equal_the_reference(make_kda: Make) -> None:
    x = on_gpu(make_kda(2, 5, 2, 32, 32, HV=4, raw=True, dtype=torch.float32), grad=True)
    got = outputs_and_gradients(fused_recurrent_kda, x, **RAW)
    exact = {n: t.detach().double().requires_grad_() for n, t in x.items()}
    want = outputs_and_gradients(kda_reference, exact, **RAW)
    for name, a, b in zip(("o", "final_state", *x), got, want, strict=True):
        assert relative_error(a, b) < 1e-4, name


@pytest.mark.gpu
@POOLS
@pytest.mark.parametrize("v_first", [False, True], ids=["state-KV", "state-VK"])
def test_gpu_decode_in_slots(make_kda: Make, indices: list[int], bounds: list[int] | None, v_first: bool) -> None:
    B, T = (len(indices), 2) if bounds is None else (1, bounds[-1])
    x = on_gpu(make_kda(B, T, 4, 128, 128, num_sequences=len(indices), raw=True, dtype=torch.float32, grad=False))
    slots, pool = pooled(x, indices, 5, v_first)
    # Slots may lie apart, as in a buffer of all layers.
    buffer = torch.stack((pool, pool, pool), 1)
    options = {"cu_seqlens": None if bounds is None else torch.tensor(bounds, device="cuda", dtype=torch.int32)}
    want_o, want_pool = expected_decode({n: t.double() for n, t in x.items()}, slots, pool.double(), v_first, **options)
    with nan_outputs():
        o = kda_decode(**x, **RAW, **options, state=buffer[:, 1], state_indices=slots.int(), state_v_first=v_first)
    torch.testing.assert_close(o.double(), want_o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(buffer[:, 1].double(), want_pool, rtol=1e-5, atol=1e-5, equal_nan=True)
    for other in (0, 2):
        torch.testing.assert_close(buffer[:, other], pool, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_gpu_decode_opcheck(make_kda: Make, fresh_dynamo: None) -> None:
    x = on_gpu(make_kda(3, 2, 2, 16, 16, raw=True, dtype=torch.float32, grad=False))
    tensors = [x[n] for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")]
    flags = (True, True, True, False, None)
    pool, slots = torch.randn(5, 2, 16, 16, device="cuda"), torch.tensor([3, -1, 0], device="cuda")
    torch.library.opcheck(torch.ops.hybrid_flex.kda_decode.default, (*tensors, *flags, pool, slots, None, 0.5, False))
    x["initial_state"].requires_grad_()
    arguments = (*tensors, *flags, x["initial_state"], None, 0.5, False, 16)
    torch.library.opcheck(torch.ops.hybrid_flex.fused_recurrent_kda.default, arguments)


@pytest.mark.gpu
def test_gpu_cuda_graph_of_decoding(make_kda: Make) -> None:
    """Capture one token of a batch once, then replay it with new tokens and new slots; padding has slot -1."""
    steps = []
    for seed in range(4):
        x = on_gpu(make_kda(4, 1, 8, 128, 128, raw=True, dtype=torch.bfloat16, seed=seed, grad=False))
        x["slots"] = torch.tensor(
            [[5, 1, -1, 0], [5, 1, 2, 0], [-1, -1, 3, 5], [4, 5, 0, 1]][seed], device="cuda"
        ).int()
        steps.append(x)
    pool = torch.randn(6, 8, 128, 128, device="cuda")
    want_pool, want = pool.clone(), []
    parameters = {name: steps[0][name] for name in ("A_log", "dt_bias")}
    names = ("q", "k", "v", "g", "beta")
    for x in steps:
        tokens = {name: x[name] for name in names}
        want.append(kda_decode(**tokens, **parameters, **RAW, state=want_pool, state_indices=x["slots"]))

    static = {name: steps[0][name].clone() for name in (*names, "slots")}
    scratch = pool.clone()

    def step() -> Tensor:
        tokens = {name: static[name] for name in names}
        return kda_decode(**tokens, **parameters, **RAW, state=scratch, state_indices=static["slots"])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    scratch.copy_(pool)
    for x, want_o in zip(steps, want, strict=True):
        for name, t in static.items():
            t.copy_(x[name])
        o.fill_(float("nan"))
        graph.replay()
        assert torch.equal(o, want_o)
    assert torch.equal(scratch, want_pool)


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_gpu_compiled_equals_eager(make_kda: Make, dynamic: bool, fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend("inductor")
    recurrent = torch.compile(fused_recurrent_kda, backend=counter, fullgraph=True, dynamic=dynamic)
    decode = torch.compile(kda_decode, backend=counter, fullgraph=True, dynamic=dynamic)
    for T in (5, 3, 7) if dynamic else (5,):
        x = on_gpu(make_kda(3, T, 4, 64, 32, HV=8, raw=True, dtype=torch.bfloat16, grad=False))
        got, want = (op(**x, **RAW, output_final_state=True) for op in (recurrent, fused_recurrent_kda))
        torch.testing.assert_close(got, want)
        slots, pool = pooled(x, [6, -1, 0], 9)
        want_pool, address = pool.clone(), pool.data_ptr()
        want_o = kda_decode(**x, **RAW, state=want_pool, state_indices=slots)
        torch.testing.assert_close(decode(**x, **RAW, state=pool, state_indices=slots), want_o)
        torch.testing.assert_close(pool, want_pool, equal_nan=True)
        assert pool.data_ptr() == address
    assert counter.frame_count == 2


@pytest.mark.gpu
def test_gpu_compiled_decode_copies_no_pool(make_kda: Make, fresh_dynamo: None) -> None:
    """A mutated argument can cost a copy of itself under the compiler; a pool of states fills the memory."""
    x = on_gpu(make_kda(2, 1, 4, 128, 128, raw=True, dtype=torch.bfloat16, grad=False))
    del x["initial_state"]
    pool, slots = torch.zeros(512, 4, 128, 128, device="cuda"), torch.tensor([7, 300], device="cuda")
    compiled = torch.compile(kda_decode, fullgraph=True)
    compiled(**x, **RAW, state=pool, state_indices=slots)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compiled(**x, **RAW, state=pool, state_indices=slots)
    assert torch.cuda.max_memory_allocated() - before < pool.nbytes / 4


@pytest.mark.gpu
def test_gpu_exported_pair_in_a_fresh_process(
    tmp_path: Path, fresh_process: Callable[..., str], fresh_dynamo: None
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 2, 8), (2, 5, 2, 8), (2, 5, 2))
    x = tuple(torch.randn(s, generator=generator).cuda().requires_grad_() for s in shapes)
    model = Pair().cuda()
    o, state = model(*x)
    grads = torch.autograd.grad(o.sum() + state.sum(), [*x, *model.parameters()])
    torch.save([(x, [t.detach() for t in (o, state, *grads)])], tmp_path / "expected.pt")
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, x, dynamic_shapes=(dynamic,) * 3)
    torch.export.save(program, tmp_path / "pair.pt2")
    assert fresh_process(FRESH_LOAD, tmp_path / "expected.pt", tmp_path / "pair.pt2").strip() == "equal"
