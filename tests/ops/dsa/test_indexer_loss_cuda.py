"""The CUDA kernels of indexer_kl_loss against the specification in float64 on the same device, and the compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.ops.dsa import expand_pools, indexer_kl_loss, lightning_topk, sparse_attention
from hybrid_flex.ops.dsa.reference import reference_kl_loss

pytestmark = pytest.mark.gpu

NAMES = ("q_idx", "k_idx", "w")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
STAGES = pytest.mark.parametrize("stage", ["dense", "sparse"])
# Products of 16 bits are exact in float32; ds is rounded once on its way into the gradients' products.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}
CASES = {
    # B, T, S, H, Hkv, D, HI, DI, kpool, bounds; the queries are the last T tokens
    "one": (1, 1, 1, 1, 1, 64, 1, 16, 1, None),
    "off-tile": (2, 65, 130, 5, 5, 72, 3, 72, 1, None),
    "mha": (1, 300, 300, 16, 16, 128, 16, 128, 1, None),
    "gqa": (2, 129, 257, 8, 2, 64, 16, 64, 1, None),
    "mla": (1, 70, 200, 128, 1, 576, 64, 128, 1, None),
    "pooled": (1, 150, 1027, 64, 1, 512, 32, 128, 4, None),
    "packed": (1, 300, 300, 4, 2, 128, 8, 64, 1, (0, 5, 5, 200, 300)),
}


def draw(case: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Return q_idx, k_idx, w with gradients, q, k, and the options of a call."""
    B, T, S, H, HKV, D, HI, DI, kpool, bounds = CASES[case]
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((B, T, HI, DI), (B, S // kpool, DI), (B, T, HI), (B, T, H, D), (B, S, HKV, D))
    tensors = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    tensors[2] *= HI**-0.5 * DI**-0.5
    tensors = [x.to(dtype) for x in tensors]
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device="cuda")
    options = {"query_start": S - T, "kpool": kpool, "cu_seqlens": cu_seqlens}
    return [x.requires_grad_() for x in tensors[:3]] + tensors[3:], options


def select(tensors: list[Tensor], options: dict[str, Any], topk: int = 70) -> Tensor:
    """Choose as the indexer does, with one row empty and unused slots in the middle of others."""
    indices = lightning_topk(*(x.float().detach() for x in tensors[:3]), topk, **options)
    indices[:, indices.shape[1] // 2] = -1
    indices[:, 1:, 5] = -1
    return indices


def results(function: Any, tensors: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Return the loss, and the gradients of the sum over tokens, which are of the order of one."""
    loss = function(*tensors, **options)
    total = loss * (tensors[0].shape[0] * tensors[0].shape[1])
    return {"loss": loss.detach()} | dict(zip(NAMES, torch.autograd.grad(total, tensors[:3]), strict=True))


def poison() -> None:
    """Leave NaN in the memory that the next allocations get, small and large."""
    blocks = [torch.full((2**n,), float("nan"), device="cuda") for n in range(6, 26) for _ in range(4)]
    del blocks


@DTYPES
@STAGES
@pytest.mark.parametrize("case", CASES)
def test_equals_the_specification(case: str, stage: str, dtype: torch.dtype) -> None:
    tensors, options = draw(case, dtype)
    if stage == "sparse":
        options["indices"] = select(tensors, options)
    poison()
    got = results(indexer_kl_loss, tensors, **options)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    want = results(reference_kl_loss, exact, **options)
    assert got["loss"].dtype == torch.float32
    for name, expected in want.items():
        assert got[name].isfinite().all(), name
        error, size = (got[name].double() - expected).norm(), expected.norm()
        # A row with one class has a gradient of zero, up to the rounding of its probability.
        assert error <= TOLERANCE[dtype] * size + 3e-6, f"{name}: error {error:.1e} of {size:.1e}"


@STAGES
def test_dtypes_may_differ(stage: str) -> None:
    tensors, options = draw("gqa", torch.bfloat16)
    tensors[:3] = [x.detach().float().requires_grad_() for x in tensors[:3]]
    if stage == "sparse":
        options["indices"] = select(tensors, options).long()
    got = results(indexer_kl_loss, tensors, **options)
    want = results(reference_kl_loss, [x.detach().double().requires_grad_(x.requires_grad) for x in tensors], **options)
    for name, expected in want.items():
        assert (got[name].double() - expected).norm() <= 1e-4 * expected.norm().clamp_min(1e-2), name


@STAGES
def test_the_kernels_equal_the_plain_form(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = draw("gqa", torch.float32)
    if stage == "sparse":
        options["indices"] = select(tensors, options)
    got = results(indexer_kl_loss, tensors, **options)
    monkeypatch.setattr("hybrid_flex.ops.dsa.indexer_loss.has_kernels", lambda x: False)
    want = results(indexer_kl_loss, tensors, **options)
    for name, expected in want.items():
        assert (got[name] - expected).norm() <= 2e-5 * expected.norm(), name


def test_float64_takes_the_plain_form() -> None:
    tensors, options = draw("gqa", torch.float32)
    tensors = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    got, want = (results(f, tensors, **options) for f in (indexer_kl_loss, reference_kl_loss))
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-9, atol=1e-12)


@DTYPES
def test_the_dense_stage_is_the_same_bits_every_time(dtype: torch.dtype) -> None:
    tensors, options = draw("mha", dtype)
    first, *others = (results(indexer_kl_loss, tensors, **options) for _ in range(4))
    for other in others:
        for name, x in first.items():
            assert torch.equal(x, other[name]), name


def test_the_sparse_stage_can_be_the_same_bits_every_time() -> None:
    tensors, options = draw("gqa", torch.bfloat16)
    options["indices"] = select(tensors, options)
    free = results(indexer_kl_loss, tensors, **options)
    # Warnings only: cuBLAS asks for a variable of the environment otherwise.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (results(indexer_kl_loss, tensors, **options) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
        torch.testing.assert_close(free[name].double(), x.double(), rtol=0.1, atol=1e-2 * float(x.abs().max()))


@STAGES
def test_many_chunks_of_rows(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_flex.kernels.dsa import loss as launchers

    tensors, options = draw("mha", torch.bfloat16)
    if stage == "sparse":
        options["indices"] = select(tensors, options)
    whole = results(indexer_kl_loss, tensors, **options)
    for name in ("loss_forward", "loss_backward"):
        launcher = getattr(launchers, name)
        monkeypatch.setattr(launchers, name, lambda *args, run=launcher: run(*args, workspace_bytes=100_000))
    parts = results(indexer_kl_loss, tensors, **options)
    for name, expected in whole.items():
        assert (parts[name].double() - expected.double()).norm() <= 5e-3 * expected.double().norm(), name


@pytest.mark.parametrize("case", ["mla", "pooled", "gqa"])
def test_log_sum_exps_of_the_attention_may_be_given(case: str) -> None:
    tensors, options = draw(case, torch.bfloat16)
    start, kpool = options["query_start"], options["kpool"]
    indices = lightning_topk(*(x.float().detach() for x in tensors[:3]), 70, **options)
    q, k = tensors[3:]
    tokens = indices if kpool == 1 else expand_pools(indices, kpool, query_start=start)
    _, lse = sparse_attention(q, k, None, tokens, value_dim=min(512, k.shape[3]))
    own = results(indexer_kl_loss, tensors, indices=indices, **options)
    given = results(indexer_kl_loss, tensors, indices=indices, lse=lse, **options)
    for name, x in own.items():
        torch.testing.assert_close(given[name].double(), x.double(), rtol=1e-2, atol=1e-3 * float(x.abs().max()))
    other = results(indexer_kl_loss, tensors, indices=indices, lse=lse + torch.arange(q.shape[2]).cuda(), **options)
    assert not other["loss"].isclose(own["loss"], rtol=1e-3)


@STAGES
def test_memory_does_not_grow_with_t_times_s(stage: str) -> None:
    B, T, H, D, HI, DI = 1, 32768, 2, 64, 2, 64
    shapes = ((B, T, HI, DI), (B, T, DI), (B, T, HI), (B, T, H, D), (B, T, 1, D))
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    tensors = [x.requires_grad_() for x in tensors[:3]] + tensors[3:]
    indices = None
    if stage == "sparse":
        indices = (torch.arange(T, device="cuda")[:, None] - torch.arange(64, device="cuda"))[None].clamp_min(-1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = indexer_kl_loss(*tensors, indices=indices)
    torch.autograd.grad(loss, tensors[:3])
    assert torch.cuda.max_memory_allocated() - before <= 2**29
    assert loss.isfinite()


@STAGES
def test_nothing_waits_for_the_device(stage: str) -> None:
    tensors, options = draw("gqa", torch.bfloat16)
    if stage == "sparse":
        options["indices"] = select(tensors, options)
    results(indexer_kl_loss, tensors, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(indexer_kl_loss, tensors, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@STAGES
def test_opcheck(stage: str) -> None:
    tensors, options = draw("gqa", torch.float32)
    indices = select(tensors, options) if stage == "sparse" else None
    args = (*tensors, indices, None, 0.125, True, options["query_start"], None, 1)
    torch.library.opcheck(torch.ops.hybrid_flex.indexer_kl_loss.default, args)
    plain = [x.detach() for x in tensors]
    loss, *kept = torch.ops.hybrid_flex.indexer_kl_loss(*plain, *args[5:])
    others = (indices, *kept, *args[7:])
    # Atomics make two runs differ in their last bits: only what opcheck compares exactly is left out.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.hybrid_flex.indexer_kl_loss_backward.default, (loss, *plain, *others), test_utils=tests
    )


def test_fullgraph_one_graph_for_several_lengths(fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend("inductor")

    def loss(q_idx: Tensor, k_idx: Tensor, w: Tensor, q: Tensor, k: Tensor) -> Tensor:
        indices = lightning_topk(q_idx, k_idx, w, 20)
        return indexer_kl_loss(q_idx, k_idx, w, q, k, indices=indices) + indexer_kl_loss(q_idx, k_idx, w, q, k)

    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    tensors, _ = draw("mha", torch.bfloat16)
    for length in (50, 129, 300):
        cut = [x[:, :length].detach().requires_grad_(x.requires_grad) for x in tensors]
        got, want = (results(f, cut) for f in (compiled, loss))
        for name, expected in want.items():
            error = (got[name].double() - expected.double()).norm()
            assert error <= 5e-3 * expected.double().norm(), name
    assert counter.frame_count == 1


def test_autocast_changes_nothing() -> None:
    tensors, options = draw("gqa", torch.float32)
    want = results(indexer_kl_loss, tensors, **options)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = results(indexer_kl_loss, tensors, **options)
    for name, expected in want.items():
        assert torch.equal(got[name], expected), name
