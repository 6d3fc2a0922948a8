"""indexer_kl_loss: reference, gradients by name, both stages, who gets a gradient, the compiler, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.ops.dsa import expand_pools, indexer_kl_loss, lightning_topk, sparse_attention
from hybrid_flex.ops.dsa.reference import reference_kl_loss

CASES = [
    # B, T, S, query_start, kpool, causal, cu_seqlens
    (1, 1, 1, 0, 1, True, None),
    (2, 65, 65, 0, 1, True, None),
    (2, 5, 40, 35, 1, True, None),
    (2, 16, 30, 0, 1, False, None),
    (2, 63, 63, 0, 4, True, None),
    (2, 7, 30, 23, 4, True, None),
    (1, 37, 37, 0, 1, True, (0, 5, 5, 20, 37)),
    (1, 37, 37, 0, 1, False, (0, 5, 5, 20, 37)),
]
IDS = [
    f"B{b}-T{t}-S{s}-at{q}-kpool{p}-{'causal' if c else 'full'}{'-packed' if u else ''}"
    for b, t, s, q, p, c, u in CASES
]
NAMES = ("q_idx", "k_idx", "w")


def draw(b: int, t: int, s: int, kpool: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Make (q_idx, k_idx, w) with gradients, and (q, k)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, t, 3, 4), (b, s // kpool, 4), (b, t, 3), (b, t, 4, 8), (b, s, 2, 8))
    tensors = [torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes]
    return [x.requires_grad_() for x in tensors[:3]], tensors[3:]


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_float64_loss_and_gradients(case: tuple, stage: str, small_blocks: None) -> None:
    b, t, s, start, kpool, causal, bounds = case
    indexer, attention = draw(b, t, s, kpool)
    options = {"causal": causal, "query_start": start, "kpool": kpool}
    options["cu_seqlens"] = None if bounds is None else torch.tensor(bounds)
    indices = lightning_topk(*indexer, 5, **options) if stage == "sparse" else None
    got, want = (f(*indexer, *attention, indices=indices, **options) for f in (indexer_kl_loss, reference_kl_loss))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert got >= 0
    grads = (torch.autograd.grad(x, indexer) for x in (3.0 * got, 3.0 * want))
    for name, a, e in zip(NAMES, *grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"d{n}: {m}")
        assert t == 1 or e.abs().max() > 0


@pytest.mark.parametrize("kpool", [1, 4])
def test_log_sum_exps_of_the_attention_may_be_given(kpool: int, small_blocks: None) -> None:
    indexer, (q, k) = draw(2, 30, 30, kpool)
    indices = lightning_topk(*indexer, 3, kpool=kpool)
    _, lse = sparse_attention(q, k.requires_grad_(), k.detach(), expand_pools(indices, kpool))
    given = indexer_kl_loss(*indexer, q, k, indices=indices, lse=lse, kpool=kpool)
    want = reference_kl_loss(*indexer, q, k.detach(), indices=indices, kpool=kpool)
    torch.testing.assert_close(given, want, rtol=1e-10, atol=1e-12)
    grads = (torch.autograd.grad(x, indexer, retain_graph=True) for x in (given, want))
    for name, a, e in zip(NAMES, *grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"d{n}: {m}")
    assert torch.autograd.grad(given, k, allow_unused=True) == (None,)
    # They are what is read: heads count as much as theirs say.
    other = indexer_kl_loss(*indexer, q, k, indices=indices, lse=lse + torch.arange(4), kpool=kpool)
    assert not other.isclose(want, rtol=1e-3)


@pytest.mark.parametrize("kpool", [1, 4])
def test_unused_slots_may_stand_anywhere(kpool: int, small_blocks: None) -> None:
    indexer, attention = draw(2, 30, 30, kpool)
    indices = lightning_topk(*indexer, 5, kpool=kpool)
    indices[:, :, 1] = -1
    indices[:, 9] = -1
    got, want = (f(*indexer, *attention, indices=indices, kpool=kpool) for f in (indexer_kl_loss, reference_kl_loss))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for a, e in zip(*(torch.autograd.grad(x, indexer) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_gradcheck(stage: str) -> None:
    indexer, attention = draw(1, 5, 6, 1)
    indices = lightning_topk(*indexer, 3, query_start=1) if stage == "sparse" else None
    assert torch.autograd.gradcheck(lambda *x: indexer_kl_loss(*x, *attention, indices=indices, query_start=1), indexer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_sum_in_float32(dtype: torch.dtype) -> None:
    indexer, attention = draw(1, 40, 40, 1, dtype)
    loss = indexer_kl_loss(*indexer, *attention)
    exact_inputs = [x.detach().double().requires_grad_() for x in indexer]
    exact = reference_kl_loss(*exact_inputs, *(x.double() for x in attention))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for name, got, want in zip(
        NAMES, torch.autograd.grad(loss, indexer), torch.autograd.grad(exact, exact_inputs), strict=True
    ):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= tolerance * want.norm(), name


def test_zero_when_the_indexer_is_right() -> None:
    # One indexer head whose positive products equal the attention's logits predicts it exactly.
    torch.manual_seed(0)
    q, k = torch.rand(1, 9, 1, 4, dtype=torch.float64), torch.rand(1, 9, 1, 4, dtype=torch.float64)
    indexer = [
        x.requires_grad_() for x in (q.clone(), k[:, :, 0].clone(), torch.ones(1, 9, 1, dtype=torch.float64) / 2)
    ]
    loss = indexer_kl_loss(*indexer, q, k)
    assert loss.abs() < 1e-14
    for grad in torch.autograd.grad(loss, indexer):
        assert grad.abs().max() < 1e-14


def test_gradient_is_in_logit_space() -> None:
    # With w = 1 and positive products, dI = dx: the row sums of q's gradient are those of (softmax(I) - p) k.
    torch.manual_seed(0)
    q_idx = torch.rand(1, 4, 1, 3, dtype=torch.float64, requires_grad=True)
    k_idx, w = torch.rand(1, 4, 3, dtype=torch.float64), torch.ones(1, 4, 1, dtype=torch.float64)
    q, k = torch.randn(1, 4, 2, 5, dtype=torch.float64), torch.randn(1, 4, 1, 5, dtype=torch.float64)
    (grad,) = torch.autograd.grad(indexer_kl_loss(q_idx, k_idx, w, q, k), q_idx)
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    scores = (q_idx.detach()[0, :, 0] @ k_idx[0].T).masked_fill(hidden, float("-inf"))
    logits = torch.einsum("thd,sd->ths", q[0], k[0, :, 0]) * 5**-0.5
    p = logits.masked_fill(hidden[:, None], float("-inf")).softmax(-1).mean(1)
    torch.testing.assert_close(grad[0, :, 0], (scores.softmax(-1) - p) @ k_idx[0] / 4)


def test_the_attention_gets_no_gradient() -> None:
    indexer, attention = draw(1, 6, 6, 1)
    attention = [x.requires_grad_() for x in attention]
    indexer_kl_loss(*indexer, *attention).backward()
    assert all(x.grad is None for x in attention) and all(x.grad is not None for x in indexer)
    assert not indexer_kl_loss(*(x.detach() for x in indexer), *attention).requires_grad


def test_sparse_stage_with_everything_selected_is_the_dense_stage() -> None:
    indexer, attention = draw(2, 20, 20, 1)
    indices = lightning_topk(*indexer, 30)
    dense, sparse = (indexer_kl_loss(*indexer, *attention, indices=x) for x in (None, indices))
    torch.testing.assert_close(dense, sparse, rtol=1e-12, atol=1e-14)


def test_repeated_descent_lowers_the_loss() -> None:
    indexer, attention = draw(1, 32, 32, 1)
    first = indexer_kl_loss(*indexer, *attention).item()
    optimizer = torch.optim.Adam(indexer, lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        loss = indexer_kl_loss(*indexer, *attention)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_opcheck(stage: str) -> None:
    indexer, attention = draw(1, 6, 9, 1)
    indices = lightning_topk(*indexer, 3, query_start=3) if stage == "sparse" else None
    args = (*indexer, *attention, indices, None, 0.3, True, 3, None, 1)
    torch.library.opcheck(torch.ops.hybrid_flex.indexer_kl_loss.default, args)
    plain = [x.detach() for x in (*indexer, *attention)]
    loss, *kept = torch.ops.hybrid_flex.indexer_kl_loss(*plain, *args[5:])
    torch.library.opcheck(
        torch.ops.hybrid_flex.indexer_kl_loss_backward.default, (loss, *plain, indices, *kept, 0.3, True, 3, None, 1)
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_one_graph_for_several_lengths(backend: str, fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend(backend)

    def loss(q_idx: Tensor, k_idx: Tensor, w: Tensor, q: Tensor, k: Tensor) -> Tensor:
        indices = lightning_topk(q_idx, k_idx, w, 5)
        sparse = indexer_kl_loss(q_idx, k_idx, w, q, k, indices=indices)
        return sparse + 2 * indexer_kl_loss(q_idx, k_idx, w, q, k)

    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for length in (9, 14, 33):
        indexer, attention = draw(2, length, length, 1, torch.float32)
        got, want = (f(*indexer, *attention) for f in (compiled, loss))
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, indexer), torch.autograd.grad(want, indexer), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_outputs_are_written_everywhere(stage: str, nan_memory: None) -> None:
    indexer, attention = draw(2, 11, 11, 4)
    indices = lightning_topk(*indexer, 1, kpool=4) if stage == "sparse" else None
    loss = indexer_kl_loss(*indexer, *attention, indices=indices, kpool=4)
    want = reference_kl_loss(*indexer, *attention, indices=indices, kpool=4)
    torch.testing.assert_close(loss, want)
    for a, b in zip(torch.autograd.grad(loss, indexer), torch.autograd.grad(want, indexer), strict=True):
        torch.testing.assert_close(a, b)


def test_errors() -> None:
    (q_idx, k_idx, w), (q, k) = draw(1, 6, 6, 1)

    def expect(kind: type[Exception], message: str, *args: object, **options: object) -> None:
        with pytest.raises(kind, match=message):
            indexer_kl_loss(*args, **options)  # type: ignore[arg-type]

    expect(ValueError, r"indexer_kl_loss: q must be \[B, T, H, D\] = \[1, 6, \*, \*\]", q_idx, k_idx, w, q[:, 1:], k)
    expect(ValueError, r"indexer_kl_loss: k_idx must have S // kpool keys", q_idx, k_idx, w, q, k[:, 1:])
    expect(
        ValueError,
        r"indexer_kl_loss: k_idx must have S // kpool keys.* got \(6, 6, 2\)",
        q_idx,
        k_idx,
        w,
        q,
        k,
        kpool=2,
    )
    expect(TypeError, r"indexer_kl_loss: k must have dtype float64, got float32", q_idx, k_idx, w, q, k.float())
    indices = torch.zeros(1, 5, 2, dtype=torch.int32)
    expect(
        ValueError,
        r"indexer_kl_loss: indices must be \[B, T, J\] = \[1, 6, \*\]",
        q_idx,
        k_idx,
        w,
        q,
        k,
        indices=indices,
    )
    lse = torch.zeros(1, 6, 4, dtype=torch.float64)
    expect(ValueError, r"indexer_kl_loss: lse must be None without indices", q_idx, k_idx, w, q, k, lse=lse)
    chosen = {"indices": torch.zeros(1, 6, 2, dtype=torch.int32)}
    message = r"indexer_kl_loss: lse must be \[B, T, H\] = \[1, 6, 4\], got shape \(1, 6, 3\)"
    expect(ValueError, message, q_idx, k_idx, w, q, k, lse=lse[..., 1:], **chosen)
    message = r"indexer_kl_loss: lse must have dtype float64, got float32"
    expect(TypeError, message, q_idx, k_idx, w, q, k, lse=lse.float(), **chosen)
    pools = {"indices": torch.zeros(1, 6, 2, dtype=torch.int32), "kpool": 2, "causal": False}
    message = r"indexer_kl_loss: causal must be True with indices of pools, got False"
    expect(ValueError, message, q_idx, k_idx[:, :3], w, q, k, **pools)
    cu = torch.tensor([0, 6])
    expect(
        ValueError,
        r"indexer_kl_loss: kpool must be 1 with cu_seqlens",
        q_idx,
        k_idx[:, :3],
        w,
        q,
        k,
        kpool=2,
        cu_seqlens=cu,
    )
