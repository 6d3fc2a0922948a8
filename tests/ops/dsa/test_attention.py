"""sparse_attention, gather form: reference, gradients by name, dense limit, causality, the compiler, errors."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.ops.dsa import attention, lightning_topk, sparse_attention

CASES = [
    # B, T, S, H, Hkv, D, Dv, J
    (1, 1, 1, 1, 1, 8, 8, 1),
    (2, 63, 63, 4, 1, 24, 16, 16),
    (2, 65, 65, 4, 2, 16, 16, 20),
    (1, 257, 257, 4, 4, 8, 6, 32),
    (2, 1, 70, 6, 3, 8, 8, 16),
    (1, 20, 20, 32, 32, 4, 4, 8),
    (1, 9, 5, 2, 1, 8, 8, 12),
]
IDS = [f"B{b}-T{t}-S{s}-H{h}-Hkv{g}-D{d}-Dv{e}-J{j}" for b, t, s, h, g, d, e, j in CASES]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(b: int, t: int, s: int, h: int, g: int, d: int, e: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, t, h, d), (b, s, g, d), (b, s, g, e))
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for x in shapes]


def results(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, backend: str) -> dict[str, Tensor]:
    """Give o, lse and the gradients of a weighting of both."""
    o, lse = sparse_attention(q, k, v, indices, backend=backend)
    generator = torch.Generator().manual_seed(7)
    loss = (o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum()
    weights = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    loss = loss + (lse.masked_fill(lse == float("-inf"), 0.0).double() * weights).sum()
    grads = torch.autograd.grad(loss, (q, k, v))
    return {"o": o, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).norm().item() / (exact.norm().item() + 1e-30)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_float64_outputs_and_gradients(case: tuple, selection: Callable[..., Tensor], small_blocks: None) -> None:
    b, t, s, h, g, d, e, j = case
    inputs, indices = draw(b, t, s, h, g, d, e, torch.float64), selection(b, t, s, j)
    got, want = (results(*inputs, indices, backend) for backend in ("gather", "reference"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES[1:3], ids=IDS[1:3])
def test_error_budget(case: tuple, dtype: torch.dtype, selection: Callable[..., Tensor]) -> None:
    """The error against float64 is at most twice that of the plain form in the same dtype."""
    b, t, s, h, g, d, e, j = case
    inputs, indices = draw(b, t, s, h, g, d, e, dtype), selection(b, t, s, j)
    got, plain = (results(*inputs, indices, backend) for backend in ("gather", "reference"))
    exact = results(*(x.detach().double().requires_grad_() for x in inputs), indices, "reference")
    assert got["o"].dtype == got["dq"].dtype == dtype and got["lse"].dtype == torch.float32
    for name in ("o", "dq", "dk", "dv"):
        assert error(got[name], exact[name]) <= 2 * error(plain[name], exact[name]) + 1e-7, name
    finite = exact["lse"].isfinite()
    torch.testing.assert_close(got["lse"][finite].double(), exact["lse"][finite], rtol=1e-5, atol=1e-5)


def test_gradcheck(selection: Callable[..., Tensor]) -> None:
    inputs, indices = draw(1, 4, 5, 2, 1, 3, 2, torch.float64), selection(1, 4, 5, 3)

    def finite(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = sparse_attention(q, k, v, indices)
        return o, lse.masked_fill(lse == float("-inf"), 0.0)

    assert torch.autograd.gradcheck(finite, inputs)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 12), st.integers(1, 20), st.integers(1, 3), st.integers(1, 3), st.integers(1, 25), st.integers(0, 9)
)
def test_property_any_shape(num_queries: int, num_keys: int, group: int, num_kv: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = draw(2, num_queries, num_keys, group * num_kv, num_kv, 4, 3, torch.float64)
    number = torch.randint(0, min(width, num_keys) + 1, (2, num_queries), generator=generator)
    indices = torch.rand(2, num_queries, num_keys, generator=generator).argsort(-1)[..., :width]
    indices = torch.nn.functional.pad(indices, (0, width - indices.shape[-1]), value=-1)
    indices = indices.masked_fill(torch.arange(width) >= number[..., None], -1)
    got, want = (results(*inputs, indices, backend) for backend in ("gather", "reference"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", ["mla", "gqa-side-by-side", "head-major", "reversed-stride", "separate"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_views_of_a_cache(
    layout: str, dtype: torch.dtype, selection: Callable[..., Tensor], small_blocks: None
) -> None:
    torch.manual_seed(0)
    num_kv = 1 if layout == "mla" else 2
    q = torch.randn(2, 30, 4, 12, dtype=torch.float64).to(dtype).requires_grad_()
    cache = torch.randn(2, 40, num_kv, 20, dtype=torch.float64).to(dtype)
    if layout == "mla":
        k, v = cache[..., 2:14], cache[..., 2:10]
    elif layout == "head-major":
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        k, v = cache[..., :12], cache[..., 12:]
    elif layout == "reversed-stride":
        cache = cache.transpose(2, 3).contiguous().transpose(2, 3)
        k, v = cache[..., :12], cache[..., 12:]
    else:
        k, v = cache[..., :12], cache[..., 12:]
        if layout == "separate":
            k, v = k.contiguous(), v.contiguous()
    indices = selection(2, 30, 40, 9)
    leaves = [q, k.detach().requires_grad_(), v.detach().requires_grad_()]
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in leaves]
    got, want = results(*leaves, indices, "gather"), results(*copies, indices, "reference")
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_selecting_everything_is_dense_causal_attention(backend: str) -> None:
    q, k, v = draw(2, 33, 33, 4, 2, 16, 16, torch.float64)
    scores = [torch.randn(*s, dtype=torch.float64) for s in ((2, 33, 2, 4), (2, 33, 4), (2, 33, 2))]
    indices = lightning_topk(*scores, 50)
    o, _ = sparse_attention(q, k, v, indices, backend=backend)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(o, dense, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(o)
    for got, want in zip(
        torch.autograd.grad(o, (q, k, v), weights), torch.autograd.grad(dense, (q, k, v), weights), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_causality_is_bit_exact() -> None:
    q, k, v = (x.detach() for x in draw(1, 50, 50, 4, 2, 8, 8, torch.float32))
    scores = [torch.randn(*s) for s in ((1, 50, 2, 4), (1, 50, 4), (1, 50, 2))]
    indices = lightning_topk(*scores, 10)
    o, lse = sparse_attention(q, k, v, indices)
    k[:, 31:], v[:, 31:] = float("nan"), float("nan")
    later, later_lse = sparse_attention(q, k, v, indices)
    assert torch.equal(later[:, :31], o[:, :31]) and torch.equal(later_lse[:, :31], lse[:, :31])


def test_unselected_keys_do_not_matter_not_even_row_zero(selection: Callable[..., Tensor]) -> None:
    # Unused slots fetch row 0; a NaN there must not leak.
    q, k, v = (x.detach() for x in draw(1, 6, 12, 2, 1, 8, 8, torch.float32))
    indices = torch.tensor([[[3, 5, -1]] * 6], dtype=torch.int32)
    o, lse = sparse_attention(q, k, v, indices)
    k[:, 11], v[:, 11] = float("nan"), float("nan")
    assert torch.equal(sparse_attention(q, k, v, indices)[0], o)
    k[:, 0], v[:, 0] = 1e30, 1e30
    moved, moved_lse = sparse_attention(q, k, v, indices)
    torch.testing.assert_close(moved, o)
    torch.testing.assert_close(moved_lse, lse)


def test_rows_without_keys(selection: Callable[..., Tensor]) -> None:
    inputs = draw(1, 4, 6, 2, 1, 8, 8, torch.float32)
    indices = torch.full((1, 4, 3), -1, dtype=torch.int32)
    for value in results(*inputs, indices, "gather").values():
        assert not value.isnan().any()
    o, lse = sparse_attention(*inputs, indices)
    assert (o == 0).all() and lse.isneginf().all()
    o, lse = sparse_attention(inputs[0], inputs[1][:, :0], inputs[2][:, :0], indices)
    assert (o == 0).all() and lse.isneginf().all()


def test_two_halves_merge_through_the_log_sum_exp(selection: Callable[..., Tensor]) -> None:
    q, k, v = (x.detach() for x in draw(1, 8, 40, 2, 1, 8, 8, torch.float64))
    indices = torch.arange(40).expand(1, 8, 40)
    whole, _ = sparse_attention(q, k, v, indices)
    parts = [sparse_attention(q, k, v, x.contiguous()) for x in (indices[..., :15], indices[..., 15:])]
    lse = torch.stack([x[1] for x in parts])
    merged = (lse.softmax(0)[..., None] * torch.stack([x[0] for x in parts])).sum(0)
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-12)


def test_workspace_does_not_grow_with_length() -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                    self.bytes = max(self.bytes, x.untyped_storage().nbytes())
            return out

    q, k, v = (x.detach() for x in draw(1, 1024, 1024, 1, 1, 64, 64, torch.float32))
    known = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    indices = torch.arange(512, dtype=torch.int32).expand(1, 1024, 512).contiguous()
    known.add(indices.untyped_storage().data_ptr())
    with Largest() as largest:
        torch.ops.hybrid_flex.sparse_attention_gather.default(q, k, v, indices, 0.125)
    # One query at a time would fetch 256 KiB, all of them 256 MiB.
    assert 0 < largest.bytes <= 4 * 2**20


def test_opcheck(selection: Callable[..., Tensor]) -> None:
    for case in (CASES[4], CASES[6]):
        b, t, s, h, g, d, e, j = case
        inputs, indices = draw(b, t, s, h, g, d, e, torch.float64), selection(b, t, s, j)
        torch.library.opcheck(torch.ops.hybrid_flex.sparse_attention_gather.default, (*inputs, indices, 0.5))
        o, lse = (x.detach() for x in sparse_attention(*inputs, indices, scale=0.5))
        args = (o, lse.exp(), *(x.detach() for x in inputs), indices, o, lse, 0.5)
        torch.library.opcheck(torch.ops.hybrid_flex.sparse_attention_backward.default, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_one_graph_for_several_lengths(
    backend: str, fresh_dynamo: None, selection: Callable[..., Tensor]
) -> None:
    counter = CompileCounterWithBackend(backend)

    def loss(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
        o, lse = sparse_attention(q, k, v, indices, scale=0.3)
        return (o * o).sum() + lse.exp().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for num_queries, num_keys in ((9, 11), (13, 40), (21, 22)):
        inputs = draw(2, num_queries, num_keys, 6, 3, 8, 10, torch.float32)
        indices = selection(2, num_queries, num_keys, 7)
        got, want = (f(*inputs, indices) for f in (compiled, loss))
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["gather", "flex", "reference"])
def test_values_within_the_keys(backend: str, selection: Callable[..., Tensor]) -> None:
    dtype = torch.float32 if backend == "flex" else torch.float64
    q, k, _ = draw(2, 9, 12, 4, 2, 8, 6, dtype)
    indices, found = selection(2, 9, 12, 5), []
    for v, value_dim in ((None, 6), (k[..., :6], None)):
        o, lse = sparse_attention(q, k, v, indices, backend=backend, value_dim=value_dim)
        loss = o.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()
        found.append((o.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k))))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_outputs_are_written_everywhere(nan_memory: None, selection: Callable[..., Tensor]) -> None:
    inputs, indices = draw(2, 9, 12, 4, 2, 8, 6, torch.float64), selection(2, 9, 12, 5)
    got, want = (results(*inputs, indices, backend) for backend in ("gather", "reference"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_errors() -> None:
    q, k, v = (x.detach() for x in draw(1, 4, 6, 4, 2, 8, 8, torch.float32))
    indices = torch.zeros(1, 4, 3, dtype=torch.int32)

    def expect(kind: type[Exception], message: str, *args: object, **options: object) -> None:
        with pytest.raises(kind, match=message):
            sparse_attention(*args, **options)  # type: ignore[arg-type]

    expect(ValueError, r"sparse_attention: q must be \[B, T, H, D\], a tensor of rank 4", q[0], k, v, indices)
    expect(ValueError, r"sparse_attention: k must be \[B, S, Hkv, D\] = \[1, \*, \*, 8\]", q, k[..., :7], v, indices)
    expect(ValueError, r"sparse_attention: v must be \[B, S, Hkv, Dv\] = \[1, 6, 2, \*\]", q, k, v[:, 1:], indices)
    expect(ValueError, r"q and k must have H a multiple of Hkv, got \(3, 2\)", q[:, :, :3], k, v, indices)
    expect(ValueError, r"sparse_attention: indices must be \[B, T, J\] = \[1, 4, \*\]", q, k, v, indices[:, 1:])
    expect(ValueError, r"sparse_attention: indices must be \[B, T, J\]", q, k, v, indices[0])
    expect(TypeError, r"sparse_attention: indices must have dtype int32, int64, got float32", q, k, v, indices.float())
    expect(TypeError, r"sparse_attention: k must have dtype float32, got float64", q, k.double(), v, indices)
    expect(TypeError, r"sparse_attention: v must have dtype float32, got bfloat16", q, k, v.bfloat16(), indices)
    expect(TypeError, r"sparse_attention: q must have dtype", q.int(), k, v, indices)
    expect(ValueError, r"sparse_attention: backend must be one of .*, got 'dense'", q, k, v, indices, backend="dense")
    for wrong in (None, 0, 9):
        message = rf"sparse_attention: value_dim must be in \[1, 8\] where v is None, got {wrong}"
        expect(ValueError, message, q, k, None, indices, value_dim=wrong)
    message = "sparse_attention: value_dim must be None where v is given, got 8"
    expect(ValueError, message, q, k, v, indices, value_dim=8)
    message = r"sparse_attention: q must be on CUDA, of 16 bits, with D and Dv up to 128 .* got cpu, torch.float32"
    expect(ValueError, message, q, k, v, indices, backend="masked")
    doubles = (x.double() for x in (q, k, v))
    expect(
        TypeError,
        r"sparse_attention: q must have dtype bfloat16, float16, float32, got float64",
        *doubles,
        indices,
        backend="flex",
    )
    with pytest.raises(IndexError):
        sparse_attention(q, k, v, indices + 6)


@pytest.mark.parametrize(
    "T, H, Hkv, J, masked",
    [
        (2047, 32, 8, 2048, False),
        (2048, 32, 8, 2048, True),
        (131072, 32, 8, 2048, True),
        (2**18, 32, 8, 2048, True),
        (2**18 + 1, 32, 8, 2048, False),  # 16 bytes a query and 1024 keys
        (2**18, 32, 4, 2048, False),  # 16 queries a tile
        (4096, 16, 1, 2048, True),
        (4096, 17, 1, 2048, False),
        (4096, 8, 8, 256, True),
        (4096, 8, 4, 256, False),  # 2^22 rows
    ],
)
def test_auto_takes_the_form_that_was_measured_to_be_faster(
    T: int, H: int, Hkv: int, J: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_kernels", lambda x: True)
    q, k = (torch.empty(1, T, heads, 128, device="meta", dtype=torch.bfloat16) for heads in (H, Hkv))
    indices = torch.empty(1, T, J, device="meta", dtype=torch.int32)
    assert attention._is_masked_faster(q, k, k, indices) == masked
    assert not attention._is_masked_faster(q.float(), k.float(), k.float(), indices)


def test_auto_asks_the_same_while_compiling(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    monkeypatch.setattr(attention, "has_kernels", lambda x: True)
    monkeypatch.setattr(attention, "FEWEST_QUERIES", 256)
    monkeypatch.setattr(attention, "FEWEST_ROWS", 0)
    monkeypatch.setattr(attention, "UNION_BYTES", 320 * 320 // 128)

    def chosen(q: Tensor, k: Tensor, indices: Tensor) -> Tensor:
        return q.sum() + (1 if attention._is_masked_faster(q, k, k, indices) else 0)

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    for T, masked in ((250, 0), (300, 1), (400, 0)):
        q, k = (torch.zeros(1, T, heads, 64, dtype=torch.bfloat16) for heads in (8, 2))
        indices = torch.zeros(1, T, 10, dtype=torch.int32)
        assert compiled(q, k, indices) == chosen(q, k, indices) == masked
