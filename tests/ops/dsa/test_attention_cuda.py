"""sparse_attention on CUDA: reference, gradients by name, views of a cache, the compiler, export, determinism."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.kernels.dsa import gather_backward
from hybrid_flex.ops.dsa import sparse_attention

pytestmark = pytest.mark.gpu

NAMES = ("o", "lse", "dq", "dk", "dv")
# B, T, S, H, Hkv, D, Dv, J, v is k's first columns
CASES = [
    (1, 1, 1, 1, 1, 16, 16, 1, False),
    (2, 33, 65, 3, 1, 24, 40, 64, False),
    (1, 70, 300, 64, 1, 128, 128, 130, False),
    (2, 40, 200, 32, 4, 64, 64, 65, False),
    (1, 20, 100, 65, 1, 192, 128, 64, False),
    (1, 50, 400, 64, 1, 576, 512, 257, True),
    (1, 30, 300, 128, 1, 576, 512, 128, True),
    (2, 30, 200, 16, 1, 512, 512, 100, True),
    (1, 20, 100, 64, 1, 576, 512, 64, False),
    (1, 20, 100, 32, 1, 256, 256, 64, True),
    (1, 9, 5, 2, 1, 16, 16, 12, False),
    (1, 300, 2000, 64, 1, 576, 512, 1024, True),
    (1, 1, 3000, 64, 1, 576, 512, 2051, True),
    (2, 3, 3000, 32, 8, 128, 128, 2048, False),
    (3, 1, 3000, 20, 1, 512, 512, 1000, True),
]
IDS = ["B{}-T{}-S{}-H{}-Hkv{}-D{}-Dv{}-J{}{}".format(*case[:8], "-shared" if case[8] else "") for case in CASES]


def draw(case: tuple, dtype: torch.dtype) -> list[Tensor]:
    b, t, s, h, g, d, e, _, shared = case
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator, device="cuda").to(dtype)
        for shape in ((b, t, h, d), (b, s, g, d), (b, s, g, e))
    )
    return [x.detach().requires_grad_() for x in (q, k, k[..., :e] if shared else v)]


def weighted(o: Tensor, lse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs and gradients for them, zero where a row has no keys."""
    generator = torch.Generator("cuda").manual_seed(7)
    do, dlse = (torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype) for x in (o, lse))
    return [o, lse], [do, dlse.masked_fill(lse.isinf(), 0.0)]


def results(inputs: list[Tensor], indices: Tensor, backend: str = "gather") -> dict[str, Tensor]:
    o, lse = sparse_attention(*inputs, indices, backend=backend)
    outputs, gradients = weighted(o, lse)
    grads = torch.autograd.grad(outputs, inputs, gradients)
    return dict(zip(NAMES, (o.detach(), lse.detach(), *grads), strict=True))


def exact(inputs: list[Tensor], indices: Tensor) -> dict[str, Tensor]:
    """Compute in float64, with the gradients that the outputs of the inputs' own dtype get."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    o, lse = sparse_attention(*wide, indices, backend="reference")
    _, gradients = weighted(o.to(inputs[0].dtype), lse.float())
    grads = torch.autograd.grad([o, lse], wide, [x.double() for x in gradients])
    return dict(zip(NAMES, (o.detach(), lse.detach(), *grads), strict=True))


def check(inputs: list[Tensor], indices: Tensor) -> None:
    got, want = results(inputs, indices), exact(inputs, indices)
    dtype = inputs[0].dtype
    budget = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    empty = want["lse"].isinf()
    assert torch.equal(got["lse"].isinf(), empty) and (got["o"][empty] == 0).all()
    for name in NAMES:
        g, e = (x[name].masked_fill(empty, 0.0) if name == "lse" else x[name] for x in (got, want))
        assert g.isfinite().all(), name
        # A lone query without keys has o = 0.
        size = e.norm().clamp_min(1e-3 * max(1, int(indices.ge(0).sum())) ** 0.5)
        error = ((g.double() - e).norm() / size).item()
        assert error <= (1e-5 if name == "lse" else budget), f"{name}: relative error {error:.1e}"
    assert got["o"].dtype == got["dk"].dtype == dtype and got["lse"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_outputs_and_gradients(case: tuple, dtype: torch.dtype, selection: Callable[..., Tensor]) -> None:
    b, t, s, *_, j, _ = case
    check(draw(case, dtype), selection(b, t, s, j).cuda())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float64_and_wide_heads_take_the_plain_form(dtype: torch.dtype, selection: Callable[..., Tensor]) -> None:
    indices = selection(1, 5, 9, 4).cuda()
    check(draw((1, 5, 9, 2, 1, 1024, 64, 4, False), dtype), indices)
    inputs = draw((1, 5, 9, 2, 1, 16, 16, 4, False), torch.float64)
    got, want = results(inputs, indices), results(inputs, indices, "reference")
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_unused_slots_anywhere(selection: Callable[..., Tensor]) -> None:
    indices = selection(2, 30, 200, 130).cuda()
    order = torch.rand(indices.shape, device="cuda").argsort(-1)
    check(draw((2, 30, 200, 64, 1, 576, 512, 130, True), torch.bfloat16), indices.gather(-1, order))


@pytest.mark.parametrize(
    "layout", ["head-major", "values-strided", "side-by-side", "batch-expanded", "queries-head-major", "queries-sliced"]
)
@pytest.mark.parametrize("width", [64, 144])
def test_any_strides(layout: str, width: int, selection: Callable[..., Tensor]) -> None:
    q, k, v = (x.detach() for x in draw((2, 30, 80, 8, 2, width, width, 20, False), torch.bfloat16))
    if layout == "queries-head-major":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "queries-sliced":
        q = torch.cat((q, q), -1)[..., 3 : width + 3]
    elif layout == "head-major":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    elif layout == "values-strided":
        v = v.transpose(1, 3).contiguous().transpose(1, 3)
    elif layout == "side-by-side":
        k, v = torch.cat((k, v), -1).split(width, -1)
    else:
        k, v = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)
    check([x.detach().requires_grad_() for x in (q, k, v)], selection(2, 30, 80, 20).cuda())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("D", "Dv"), [(576, 512), (512, 512), (128, 128), (80, 40)])
def test_gradient_of_a_latent_cache(D: int, Dv: int, dtype: torch.dtype, selection: Callable[..., Tensor]) -> None:
    """Values that are the first columns of the keys: the sum of both gradients, in one or in two parts."""
    q, cache, _ = draw((1, 30, 100, 16, 1, D, Dv, 40, True), dtype)
    indices = selection(1, 30, 100, 40).cuda()
    gradients = []
    for backend in ("gather", "two sums", "reference"):
        inputs = [
            x.detach().to(torch.float64 if backend == "reference" else dtype).requires_grad_() for x in (q, cache)
        ]
        v, options = None, {"value_dim": Dv, "backend": backend}
        if backend == "two sums":
            v, options = inputs[1][..., :Dv], {}
        o, lse = sparse_attention(*inputs, v, indices, **options)
        outputs, weights = weighted(o, lse)
        weights = [x.to(dtype).to(y.dtype) for x, y in zip(weights, outputs, strict=True)]
        gradients.append(torch.autograd.grad(outputs, inputs, weights))
    for found in gradients[:2]:
        for got, want in zip(found, gradients[2], strict=True):
            assert (got - want).norm() < (1e-4 if dtype == torch.float32 else 1e-2) * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("D", "H", "J"), [(576, 64, 300), (512, 128, 64), (576, 40, 7), (512, 65, 129)])
def test_latent_rows_on_hopper(
    D: int,
    H: int,
    J: int,
    dtype: torch.dtype,
    selection: Callable[..., Tensor],
) -> None:
    """The kernel for latent rows: slots in use, unused ones behind and between, rows that nobody selects are NaN."""
    q, cache, _ = (x.detach() for x in draw((2, 40, 500, H, 1, D, 512, J, True), dtype))
    behind = selection(2, 40, 500, J).cuda()
    between = behind.gather(-1, torch.rand(behind.shape, device="cuda").argsort(-1))
    between[:, ::5] = -1
    for indices in (behind, between, between.long()):
        k = cache.clone()
        used = torch.zeros(2, 501, dtype=torch.bool, device="cuda").scatter_(1, indices.flatten(1).long() % 501, True)
        k[~used[:, :500]] = float("nan")
        o, lse = sparse_attention(q, k, None, indices, value_dim=512)
        right, right_lse = sparse_attention(q.double(), cache.double(), None, indices, value_dim=512)
        empty = right_lse.isinf()
        assert torch.equal(lse.isinf(), empty) and (o[empty] == 0).all()
        assert (o - right).norm() < 5e-3 * right.norm()
        torch.testing.assert_close(lse[~empty].double(), right_lse[~empty], rtol=1e-5, atol=1e-5)
        assert torch.equal(o, sparse_attention(q, k, None, indices, value_dim=512)[0])
    o = sparse_attention(q, cache, None, behind, value_dim=512)[0]
    for pad in (1, 8):  # rows that begin between lines, and at lines of which Triton does not know
        wide = torch.cat((cache[..., :pad], cache), dim=-1)[..., pad:]
        assert torch.equal(sparse_attention(q, wide, None, behind, value_dim=512)[0], o)
    head_major = q.transpose(1, 2).contiguous().transpose(1, 2)
    between_lines = torch.cat((q[..., :1], q), dim=-1)[..., 1:]
    for queries in (head_major, between_lines, q[:1].expand(2, -1, -1, -1)):
        want = sparse_attention(queries.contiguous(), cache, None, behind, value_dim=512)
        got = sparse_attention(queries, cache, None, behind, value_dim=512)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize(("H", "Hkv", "D"), [(64, 1, 512), (32, 8, 128)], ids=["latent", "grouped"])
def test_few_tokens_in_one_graph_for_all_numbers_of_sequences(
    H: int, Hkv: int, D: int, selection: Callable[..., Tensor], fresh_dynamo: None
) -> None:
    counter = CompileCounterWithBackend("inductor")

    def attend(q: Tensor, k: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return sparse_attention(q, k, None, indices, value_dim=D)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for batch_size in (2, 5, 70, 200):
        q, k, _ = (x.detach() for x in draw((batch_size, 1, 900, H, Hkv, D, D, 700, True), torch.bfloat16))
        indices = selection(batch_size, 1, 900, 700).cuda()
        right = sparse_attention(q.double(), k.double(), None, indices, value_dim=D)
        for o, lse in (compiled(q, k, indices), attend(q, k, indices)):
            assert (o - right[0]).norm() < 5e-3 * right[0].norm()
            torch.testing.assert_close(lse.double(), right[1], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_latent_rows_compiled_and_exported(selection: Callable[..., Tensor], fresh_dynamo: None) -> None:
    q, cache, _ = (x.detach() for x in draw((1, 20, 300, 64, 1, 576, 512, 70, True), torch.bfloat16))
    indices = selection(1, 20, 300, 70).cuda()
    want = LatentAttention()(q, cache, indices)
    program = torch.export.export(LatentAttention(), (q, cache, indices))
    for form in (torch.compile(LatentAttention(), fullgraph=True), program.module()):
        for got, right in zip(form(q, cache, indices), want, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-2, atol=1e-2)
    # What leaves the process holds the kernel that torch can carry.
    assert "sparse_attention_hopper" not in str(program.graph) and "sparse_attention_cuda" in str(program.graph)


def test_long_slots_and_pieces_of_queries(selection: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    case = (2, 30, 200, 64, 1, 128, 128, 100, False)
    indices = selection(2, 30, 200, 100).cuda()
    monkeypatch.setattr(gather_backward, "WORKSPACE_BYTES", 7 * 2 * 64 * 128 * 2)
    check(draw(case, torch.bfloat16), indices.long())


def test_the_forward_and_dq_repeat_their_bits_and_deterministic_mode_all(
    selection: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for before it multiplies in this mode
    inputs = draw((1, 200, 300, 16, 1, 128, 128, 64, False), torch.bfloat16)
    indices = selection(1, 200, 300, 64).cuda()
    first, second = results(inputs, indices), results(inputs, indices)
    assert all(torch.equal(first[name], second[name]) for name in ("o", "lse", "dq"))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = results(inputs, indices), results(inputs, indices)
        check(inputs, indices)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_fresh_memory_is_written_everywhere(
    selection: Callable[..., Tensor], nan_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Deterministic mode, which fills fresh memory, would take the plain backward.
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    check(draw(CASES[2], torch.bfloat16), selection(1, 70, 300, 130).cuda())


def test_causality_is_bit_exact(selection: Callable[..., Tensor]) -> None:
    q, k, v = (x.detach() for x in draw((1, 60, 60, 16, 1, 128, 128, 20, False), torch.bfloat16))
    indices = selection(1, 60, 60, 20).cuda()
    before = sparse_attention(q, k, v, indices)
    k[:, 40:], v[:, 40:] = float("nan"), float("nan")
    after = sparse_attention(q, k, v, indices)
    assert all(torch.equal(x[:, :40], y[:, :40]) for x, y in zip(before, after, strict=True))


def test_nothing_selected_and_nothing_there() -> None:
    for t, s, j in ((3, 0, 2), (3, 5, 0), (0, 5, 2), (3, 5, 2)):
        inputs = draw((1, t, s, 2, 1, 16, 16, j, False), torch.bfloat16)
        got = results(inputs, torch.full((1, t, j), -1, dtype=torch.int32, device="cuda"))
        assert (got["lse"] == float("-inf")).all()
        assert all((got[name] == 0).all() for name in ("o", "dq", "dk", "dv"))


def test_opcheck(selection: Callable[..., Tensor]) -> None:
    inputs, indices = draw((1, 5, 9, 4, 2, 16, 16, 4, False), torch.float32), selection(1, 5, 9, 4).cuda()
    torch.library.opcheck(torch.ops.hybrid_flex.sparse_attention_cuda.default, (*inputs, indices, 0.5, 0))
    nothing = torch.empty(0, device="cuda")
    torch.library.opcheck(torch.ops.hybrid_flex.sparse_attention_cuda.default, (*inputs[:2], nothing, indices, 0.5, 8))
    with torch.no_grad():
        o, lse = torch.ops.hybrid_flex.sparse_attention_cuda(*inputs, indices, 0.5, 0)
        tensors = [x.detach() for x in (o, lse, *inputs)]
        args = (*tensors, indices, o, lse, 0.5, 0)
        # The last bits of dk and dv change from run to run, within these tolerances.
        torch.library.opcheck(torch.ops.hybrid_flex.sparse_attention_cuda_backward.default, args)


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_one_graph_for_several_lengths(shared: bool, selection: Callable[..., Tensor], fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend("inductor")

    def attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        cache = k * 1.0
        return sparse_attention(q, cache, None if shared else v, indices, value_dim=64 if shared else None)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for length in (33, 70, 129):
        inputs = [x.detach().requires_grad_() for x in draw((1, length, length, 16, 1, 80, 64, 20, 0), torch.bfloat16)]
        indices = selection(1, length, length, 20).cuda()
        both = []
        for form in (compiled, attend):
            outputs, weights = weighted(*form(*inputs, indices))
            grads = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
            both.append([*outputs, *(x for x in grads if x is not None)])
        for got, want in zip(*both, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("H", "D", "Dv"), [(64, 512, 512), (16, 80, 64)], ids=["hopper", "triton"])
def test_a_graph_that_makes_its_queries(
    H: int, D: int, Dv: int, selection: Callable[..., Tensor], fresh_dynamo: None
) -> None:
    """Absorbed queries come head-major out of a product; the compiler may not change what the kernels were told."""

    def attend(x: Tensor, w: Tensor, cache: Tensor, indices: Tensor) -> Tensor:
        q = torch.einsum("bthd,hdr->bthr", x, w)
        o, _ = sparse_attention(q, cache, None, indices, value_dim=Dv, scale=0.1)
        return torch.einsum("bthr,hdr->bthd", o, w[..., :Dv])

    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for length in (70, 129):
        _, cache, _ = (y.detach() for y in draw((2, length, length, H, 1, D, Dv, 20, True), torch.bfloat16))
        generator = torch.Generator("cuda").manual_seed(length)
        x = torch.randn(2, length, H, 24, generator=generator, device="cuda").bfloat16()
        w = torch.randn(H, 24, D, generator=generator, device="cuda").bfloat16() * 0.2
        leaves = [y.requires_grad_() for y in (x, w, cache)]
        indices = selection(2, length, length, 20).cuda()
        both = []
        for form in (compiled, attend):
            y = form(*leaves, indices)
            both.append([y, *torch.autograd.grad(y.float().square().mean(), leaves)])
        for got, want in zip(*both, strict=True):
            assert (got - want).norm() < 2e-2 * want.norm()


def test_a_graph_copies_no_slots(selection: Callable[..., Tensor], fresh_dynamo: None) -> None:
    """Torch reads off a kernel what it writes; whatever else it takes for written it copies, in every graph."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    q, k, v = (x.detach() for x in draw((1, 20, 50, 8, 2, 64, 64, 12, False), torch.bfloat16))
    indices = selection(1, 20, 50, 12).cuda()
    with torch.no_grad():
        torch.compile(sparse_attention, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(q, k, v, indices)
    nodes = [n for n in graphs[0].graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert len(nodes) == 1 and set(nodes[0].kwargs["tensors_to_clone"]) <= {"p_o", "p_lse"}


@pytest.mark.parametrize("heads", [16, 64], ids=["gather", "hopper"])
def test_a_call_is_noted_down_nowhere(heads: int, selection: Callable[..., Tensor]) -> None:
    """Torch notes down what it launches for graphs, and forgets none of it: a decoder would fill the memory."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    q, cache, _ = (x.detach() for x in draw((1, 1, 300, heads, 1, 576, 512, 0, False), torch.bfloat16))
    indices = selection(1, 1, 300, 200).cuda()
    before = len(kernel_side_table.constant_args)
    sparse_attention(q, cache, None, indices, value_dim=512)
    assert len(kernel_side_table.constant_args) == before


class LatentAttention(torch.nn.Module):
    def forward(self, q: Tensor, cache: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return sparse_attention(q, cache, None, indices, value_dim=512)


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, cache: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return sparse_attention(q, cache, None, indices, value_dim=64)


def test_export_keeps_lengths_open_and_gradients(
    selection: Callable[..., Tensor], tmp_path: Path, fresh_dynamo: None
) -> None:
    def inputs(length: int) -> list[Tensor]:
        q, cache, _ = draw((1, length, length, 16, 1, 80, 64, 20, False), torch.bfloat16)
        return [q, cache, selection(1, length, length, 20).cuda()]

    any_length = torch.export.Dim.DYNAMIC
    program = torch.export.export(Attention(), tuple(inputs(30)), dynamic_shapes=[{1: any_length}] * 3)
    torch.export.save(program, tmp_path / "attention.pt2")
    module = torch.export.load(tmp_path / "attention.pt2").module()
    for length in (17, 90):
        q, cache, indices = inputs(length)
        both = []
        for form in (module, Attention()):
            outputs, weights = weighted(*form(q, cache, indices))
            both.append([*outputs, *torch.autograd.grad(outputs, (q, cache), weights)])
        for got, want in zip(*both, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_autocast_changes_nothing(selection: Callable[..., Tensor]) -> None:
    inputs = [x.detach() for x in draw((1, 9, 20, 4, 1, 16, 16, 8, False), torch.float32)]
    indices = selection(1, 9, 20, 8).cuda()
    want = sparse_attention(*inputs, indices)
    with torch.autocast("cuda", torch.bfloat16):
        got = sparse_attention(*inputs, indices)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_more_than_two_to_the_31_elements_of_a_cache(selection: Callable[..., Tensor]) -> None:
    """A row's address is more than 32 bits."""
    cache = torch.zeros(1, 2**22 + 8, 1, 576, dtype=torch.bfloat16, device="cuda")
    cache[:, -50:] = torch.randn(50, 1, 576, device="cuda").bfloat16()
    q = torch.randn(1, 4, 16, 576, device="cuda").bfloat16()
    indices = selection(1, 4, 50, 30).cuda()
    small, first = cache[:, -50:].clone(), cache.shape[1] - 50
    want = sparse_attention(q, small, small[..., :512], indices)
    got = sparse_attention(q, cache, cache[..., :512], torch.where(indices >= 0, indices + first, -1))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
