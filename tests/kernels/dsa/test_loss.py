"""The kernels of the indexer's loss against the specification in float64: loss and every gradient, both stages."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hybrid_flex.kernels.dsa import loss as launchers
from hybrid_flex.ops.dsa.indexer import visible_ranges
from hybrid_flex.ops.dsa.pooling import expand_pools
from hybrid_flex.ops.dsa.reference import reference_attention, reference_kl_loss, reference_visible

NAMES = ("q_idx", "k_idx", "w")
GRAD = 3.0


class Case(NamedTuple):
    """Sizes and options of one call."""

    B: int
    T: int
    S: int
    H: int = 2
    HKV: int = 1
    D: int = 16
    HI: int = 3
    DI: int = 16
    kpool: int = 1
    causal: bool = True
    start: int = 0
    bounds: tuple[int, ...] | None = None

    def __str__(self) -> str:
        heads = f"H{self.H}x{self.HKV}-D{self.D}-HI{self.HI}-DI{self.DI}-kpool{self.kpool}"
        tail = ("" if self.causal else "-full") + ("" if self.bounds is None else "-packed")
        return f"B{self.B}-T{self.T}-S{self.S}-at{self.start}-{heads}{tail}"


DENSE = [
    Case(1, 1, 1, H=1),
    Case(2, 3, 63, start=60),
    Case(1, 65, 65, H=5, HKV=5, D=72, HI=1),
    Case(2, 65, 130, H=4, HKV=2, D=64, HI=16, DI=64, start=65),
    Case(1, 70, 130, H=5, HKV=1, DI=72, causal=False),
    Case(1, 130, 130, kpool=4),
    Case(2, 37, 150, H=4, HKV=4, D=24, kpool=4, start=113),
    Case(1, 3, 14, H=3, HKV=3, kpool=3, start=11),
    Case(1, 20, 66, kpool=4, causal=False),
    Case(1, 70, 70, bounds=(0, 5, 5, 20, 70)),
    Case(1, 70, 70, bounds=(0, 5, 5, 64, 70), causal=False),
]
# The interpreter takes its time for each query here, and little for its width.
SPARSE = [
    Case(1, 1, 1, H=1),
    Case(2, 3, 130, H=5, HKV=5, D=72, HI=1, start=127),
    Case(2, 5, 130, H=4, HKV=2, D=64, HI=16, DI=64, start=100),
    Case(1, 6, 130, H=5, HKV=1, DI=72, causal=False),
    Case(1, 11, 11, kpool=4),
    Case(2, 3, 400, H=2, HKV=2, D=24, kpool=4, start=390),
    Case(1, 3, 14, H=3, HKV=3, kpool=3, start=11),
    Case(1, 12, 12, bounds=(0, 3, 3, 5, 12)),
    Case(1, 12, 12, bounds=(0, 3, 3, 5, 12), causal=False),
]
BOTH = [("dense", case) for case in DENSE] + [("sparse", case) for case in SPARSE]


def draw(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Return q_idx, k_idx, w, q, k."""
    B, T, S, H, HKV, D, HI, DI, kpool = case[:9]
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, HI, DI), (B, S // kpool, DI), (B, T, HI), (B, T, H, D), (B, S, HKV, D))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def select(case: Case, width: int = 70, seed: int = 0) -> Tensor:
    """Draw a selection of visible classes in random slots, -1 between them, the middle row without any."""
    generator = torch.Generator().manual_seed(seed)
    bounds = None if case.bounds is None else torch.tensor(case.bounds)
    num_classes = case.S // case.kpool
    visible = reference_visible(
        case.T, num_classes, causal=case.causal, query_start=case.start, cu_seqlens=bounds, kpool=case.kpool
    )
    indices = torch.full((case.B, case.T, width), -1, dtype=torch.int32)
    for row, seen in zip(indices.flatten(0, 1), visible.repeat(case.B, 1), strict=True):
        classes = seen.nonzero()[:, 0]
        classes = classes[torch.randperm(len(classes), generator=generator)][: width - 2]
        row[torch.randperm(width, generator=generator)[: len(classes)]] = classes.int()
    if case.T > 1:
        indices[:, case.T // 2] = -1
    return indices


def ranges_of(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bounds = None if case.bounds is None else torch.tensor(case.bounds, device=device)
    options = (case.causal, case.start, bounds)
    tokens = visible_ranges(case.T, case.S, *options, 1, torch.device(device))
    return *tokens, *visible_ranges(case.T, case.S // case.kpool, *options, case.kpool, torch.device(device))


def run(
    device: str,
    case: Case,
    tensors: list[Tensor],
    indices: Tensor | None,
    workspace_bytes: int = 2**28,
    lse: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and GRAD times its gradients, from the kernels."""
    tensors = [x.to(device) for x in tensors]
    indices, lse = (None if x is None else x.to(device) for x in (indices, lse))
    ranges, scale = ranges_of(case, device), case.D**-0.5
    grad = torch.tensor(GRAD, device=device)
    # In the dense stage a row takes ten times as much in the backward of these sizes.
    forward_bytes = workspace_bytes // 10 if indices is None else workspace_bytes
    loss, *kept = launchers.loss_forward(*tensors, indices, lse, ranges, scale, case.start, case.kpool, forward_bytes)
    assert {x.dtype for x in (loss, *kept)} == {torch.float32}
    grads = launchers.loss_backward(grad, *tensors, indices, *kept, ranges, scale, case.kpool, workspace_bytes)
    assert [x.dtype for x in grads] == [x.dtype for x in tensors[:3]]
    return loss.cpu(), dict(zip(NAMES, (x.cpu() for x in grads), strict=True))


def expect(case: Case, tensors: list[Tensor], indices: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the same from the specification, in float64."""
    exact = [x.double() for x in tensors]
    indexer = [x.requires_grad_() for x in exact[:3]]
    bounds = None if case.bounds is None else torch.tensor(case.bounds)
    options: dict[str, Any] = {"causal": case.causal, "query_start": case.start, "kpool": case.kpool}
    loss = reference_kl_loss(*exact, indices=indices, cu_seqlens=bounds, **options)
    return loss.detach(), dict(zip(NAMES, torch.autograd.grad(GRAD * loss, indexer), strict=True))


def check(
    got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-5
) -> None:
    assert got[0].isfinite()
    assert (got[0].double() - want[0]).abs() <= tolerance * want[0].abs().clamp_min(1.0), (got[0], want[0])
    for name, expected in want[1].items():
        assert got[1][name].isfinite().all(), name
        error, rounding = ((x.double() - expected).norm() for x in (got[1][name], expected.to(got[1][name].dtype)))
        assert error <= tolerance * expected.norm() + 2 * rounding, f"d{name}: relative error {error:.1e}"


STAGES = pytest.mark.parametrize("stage", ["dense", "sparse"])
TYPICAL = {"dense": Case(2, 65, 130, H=4, HKV=2, D=64, HI=5, DI=64, start=65), "sparse": SPARSE[2]}
POOLED = {"dense": DENSE[5], "sparse": SPARSE[4]}
CHUNKED_BYTES = {"dense": 30_000, "sparse": 800}


@pytest.mark.parametrize(("stage", "case"), BOTH, ids=str)
def test_float32(device: str, case: Case, stage: str, nan_memory: None) -> None:
    tensors, indices = draw(case), select(case) if stage == "sparse" else None
    check(run(device, case, tensors, indices), expect(case, tensors, indices))


@STAGES
@pytest.mark.parametrize("cases", [TYPICAL, POOLED], ids=["typical", "pooled"])
def test_float16(device: str, cases: dict[str, Case], stage: str, nan_memory: None) -> None:
    case = cases[stage]
    tensors, indices = draw(case, torch.float16), select(case) if stage == "sparse" else None
    check(run(device, case, tensors, indices), expect(case, tensors, indices), 1e-3)


@STAGES
def test_float16_with_small_weights_and_an_attention_in_float32(device: str, stage: str, nan_memory: None) -> None:
    case = TYPICAL[stage]
    tensors, indices = draw(case, torch.float16), select(case) if stage == "sparse" else None
    tensors[2] = tensors[2].float() * 1e-5
    tensors[3:] = [x.float() for x in tensors[3:]]
    check(run(device, case, tensors, indices), expect(case, tensors, indices), 1e-3)


@STAGES
@pytest.mark.parametrize("cases", [TYPICAL, POOLED], ids=["typical", "pooled"])
def test_many_chunks_of_rows(device: str, cases: dict[str, Case], stage: str, nan_memory: None) -> None:
    case = cases[stage]
    tensors, indices = draw(case), select(case) if stage == "sparse" else None
    loss = run(device, case, tensors, indices)[0]
    parts = run(device, case, tensors, indices, CHUNKED_BYTES[stage])
    assert loss == parts[0]
    check(parts, expect(case, tensors, indices))


@pytest.mark.parametrize("case", [SPARSE[2], SPARSE[4], SPARSE[8]], ids=str)
def test_log_sum_exps_may_be_given(device: str, case: Case, nan_memory: None) -> None:
    tensors, indices = draw(case), select(case)
    tokens = indices
    if case.kpool > 1:
        tokens = expand_pools(indices.sort(-1, descending=True).values, case.kpool, query_start=case.start)
    q, k = (x.double() for x in tensors[3:])
    lse = reference_attention(q, k, k, tokens, case.D**-0.5)[1]
    check(run(device, case, tensors, indices, lse=lse.float()), expect(case, tensors, indices))
    # They are what is read: heads count as much as theirs say.
    wrong = run(device, case, tensors, indices, lse=lse.float() + torch.arange(case.H))
    assert not wrong[0].isclose(expect(case, tensors, indices)[0].float(), rtol=1e-3)


@STAGES
def test_scores_that_all_tie(device: str, stage: str, nan_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "GROUP", 2)  # of three rows of tiles
    case = TYPICAL[stage]
    tensors, indices = draw(case), select(case) if stage == "sparse" else None
    tensors[0][:, 1] = 0.0
    tensors[2][:, 3] = 0.0
    check(run(device, case, tensors, indices), expect(case, tensors, indices))


@STAGES
def test_large_scores_and_logits(device: str, stage: str, nan_memory: None) -> None:
    case = TYPICAL[stage]
    tensors, indices = draw(case), select(case) if stage == "sparse" else None
    for i, size in ((2, 30.0), (3, 50.0)):
        tensors[i] *= size
    loss, grads = run(device, case, tensors, indices)
    want, exact = expect(case, tensors, indices)
    # Scores of about 1000 carry float32's rounding of 1e-4 each.
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=0.0)
    for name in NAMES:
        assert (grads[name].double() - exact[name]).norm() <= 1e-3 * exact[name].norm(), name


def test_everything_selected_is_the_dense_stage(device: str) -> None:
    case = TYPICAL["sparse"]
    tensors = draw(case)
    indices = torch.arange(case.S, dtype=torch.int64).expand(case.B, case.T, -1).contiguous()
    dense, sparse = (run(device, case, tensors, x) for x in (None, indices))
    torch.testing.assert_close(sparse[0], dense[0], rtol=1e-5, atol=1e-6)
    for name in NAMES:
        torch.testing.assert_close(sparse[1][name], dense[1][name], rtol=1e-4, atol=1e-6)


@STAGES
def test_many_heads_and_other_dtypes_of_w(device: str, stage: str, nan_memory: None) -> None:
    case = Case(1, 3, 40, H=70, HKV=1, D=16, HI=70, DI=16, start=34)
    tensors, indices = draw(case), select(case, 20) if stage == "sparse" else None
    tensors[2] = tensors[2].double()
    check(run(device, case, tensors, indices), expect(case, tensors, indices))


@STAGES
def test_wide_heads_on_devices_with_little_shared_memory(
    device: str, stage: str, nan_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "device_limits", lambda device: (99 * 1024, 8))
    case = Case(1, 4, 40, H=2, HKV=1, D=576, HI=2, DI=128, start=31)
    tensors, indices = draw(case), select(case, 20) if stage == "sparse" else None
    check(run(device, case, tensors, indices), expect(case, tensors, indices))


def test_no_classes_at_all(device: str, nan_memory: None) -> None:
    case = Case(1, 4, 4)
    tensors = draw(case)
    loss, grads = run(device, case, tensors, torch.full((1, 4, 3), -1))
    assert loss == 0 and all((x == 0).all() for x in grads.values())


def test_attention_all_in_the_tail(device: str, nan_memory: None) -> None:
    # The pool's probability is zero in float32: p is zero, as where nothing is compared, and the scores still learn.
    case = Case(1, 11, 11, H=1, kpool=4)
    tensors = draw(case)
    tensors[3].fill_(1.0)
    tensors[4].fill_(-100.0)[:, 8:] = 100.0
    loss, grads = run(device, case, tensors, None)
    assert loss.isfinite() and all(x.isfinite().all() for x in grads.values())


def test_widths_are_split_where_that_is_narrower() -> None:
    split = {1: (16, 0), 16: (16, 0), 17: (32, 0), 72: (64, 16), 100: (128, 0), 128: (128, 0), 192: (128, 64)}
    split |= {512: (512, 0), 576: (512, 64), 640: (512, 128)}
    for width, parts in split.items():
        assert launchers.two_widths(width) == parts


def test_chunks_cover_all_rows_once_and_fit() -> None:
    for B, T, row_bytes, limit in ((3, 10, 100, 2000), (2, 1000, 100, 20_000), (2, 7, 100, 50), (5, 4, 1, 7)):
        seen = torch.zeros(B, T)
        for b, count, start, stop in launchers._chunks(B, T, row_bytes, limit):
            seen[b : b + count, start:stop] += 1
            assert count * (stop - start) * row_bytes <= max(limit, row_bytes)
        assert (seen == 1).all()
