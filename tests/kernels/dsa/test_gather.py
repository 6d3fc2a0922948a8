"""The gather kernels against dense attention in float64: outputs and gradients, at sizes on and off their tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_flex.kernels.dsa import gather, gather_backward, spans
from hybrid_flex.kernels.dsa.gather import (
    is_served,
    launch_gather,
    lies_within,
    tile_bytes,
    tile_sizes,
    widths,
)
from hybrid_flex.kernels.dsa.gather_backward import launch_gather_backward
from hybrid_flex.kernels.launch import HOPPER_BYTES
from hybrid_flex.ops.dsa.reference import reference_attention, reference_membership

NAN = float("nan")
NAMES = ("o", "lse", "dq", "dk", "dv")
# B, T, S, H, Hkv, D, Dv, J
SIZES = [
    (1, 1, 1, 1, 1, 16, 16, 1),
    (2, 3, 65, 3, 1, 24, 40, 64),
    (1, 3, 63, 16, 2, 64, 64, 65),
    (1, 2, 65, 65, 1, 16, 16, 64),
    (2, 1, 70, 6, 3, 128, 128, 33),
    (1, 1, 66, 2, 1, 576, 512, 65),
    (1, 2, 40, 4, 4, 80, 300, 20),
]


def select(B: int, T: int, S: int, J: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Draw a selection with unused slots in the middle, and the last token of the last entry without any key."""
    generator = torch.Generator().manual_seed(S + J)
    indices = torch.full((B, T, J), -1, dtype=dtype)
    for b in range(B):
        for t in range(T):
            number = min(S, J)
            places = torch.randperm(J, generator=generator)[:number]
            indices[b, t, places] = torch.randperm(S, generator=generator)[:number].to(dtype)
    indices[..., J // 3] = -1 if J > 1 else indices[..., 0]
    if T > 1:
        indices[-1, -1] = -1
    return indices


def make(
    B: int, T: int, S: int, H: int, Hkv: int, D: int, Dv: int, dtype: torch.dtype, shared: bool = False
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(D + Dv)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = {"q": normal(B, T, H, D), "k": normal(B, S, Hkv, D), "v": normal(B, S, Hkv, Dv)}
    x |= {"do": normal(B, T, H, Dv), "dlse": normal(B, T, H)}
    x = {name: t if name == "dlse" else t.to(dtype) for name, t in x.items()}
    if shared:
        x["v"] = x["k"][..., :Dv]
    return x


def plain_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend densely with products in q's dtype, the form that a low precision is measured by."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    chosen = reference_membership(indices, k.shape[1])[:, :, None]
    logits = (torch.einsum("bthd,bshd->bths", q, k).float() * scale).masked_fill(~chosen, -1e30)
    p = logits.softmax(-1).masked_fill(~chosen, 0.0)
    return torch.einsum("bths,bshd->bthd", p.to(q.dtype), v), logits.logsumexp(-1)


def add_up(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let the gradient of keys hold that of values, its first columns."""
    dv = found["dv"]
    found["dk"][..., : dv.shape[-1]] += dv
    return {**found, "dv": torch.zeros_like(dv)}


def results(
    x: dict[str, Tensor], indices: Tensor, scale: float, dtype: torch.dtype, attention: Callable[..., Any]
) -> dict[str, Tensor]:
    """Compute attention and gradients densely; v counts as a tensor of its own."""
    leaves = [x[name].detach().to(dtype).clone().requires_grad_() for name in ("q", "k", "v")]
    o, lse = attention(*leaves, indices, scale)
    lse = lse.masked_fill(lse < -1e20, float("-inf"))
    loss = (o * x["do"].to(dtype)).sum() + (lse.masked_fill(lse.isinf(), 0.0) * x["dlse"].to(lse.dtype)).sum()
    return dict(zip(NAMES, (o.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)), strict=True))


def run(device: str, x: dict[str, Tensor], indices: Tensor, scale: float, one_sum: bool = False) -> dict[str, Tensor]:
    """Run the kernels into memory that is NaN before; ``one_sum`` as `add_up`."""
    shared = lies_within(x["k"], x["v"])
    x = {name: t.to(device) for name, t in x.items()}
    if shared:
        x["v"] = x["k"][..., : x["v"].shape[-1]]
    indices = indices.to(device)
    q, k, v = (x[name] for name in ("q", "k", "v"))
    o = torch.full((*q.shape[:3], v.shape[-1]), NAN, dtype=q.dtype, device=device)
    lse = torch.full(q.shape[:3], NAN, device=device)
    launch_gather(q, k, v, indices, scale, o=o, lse=lse)
    dq = torch.full(q.shape, NAN, dtype=q.dtype, device=device)
    dk, dv = (torch.zeros(t.shape, device=device) for t in (k, v))
    outputs = (x["do"], x["dlse"], q, k, v, indices, o, lse)
    launch_gather_backward(*outputs, scale, dq=dq, dk=dk, dv=None if one_sum else dv)
    return {name: t.cpu() for name, t in zip(NAMES, (o, lse, dq, dk.to(q.dtype), dv.to(q.dtype)), strict=True)}


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def assert_as_good_as_plain(
    device: str, x: dict[str, Tensor], indices: Tensor, scale: float = 0.2, one_sum: bool = False
) -> None:
    """float32 within 1e-5 of float64; 16 bits within twice the error of the plain form in that dtype."""
    got = run(device, x, indices, scale, one_sum)
    exact = results(x, indices, scale, torch.float64, reference_attention)
    dtype = x["q"].dtype
    plain = exact if dtype == torch.float32 else results(x, indices, scale, dtype, plain_attention)
    if one_sum:
        exact, plain = add_up(exact), exact if plain is exact else add_up(plain)
    empty = exact["lse"].isinf()
    assert torch.equal(got["lse"].isinf(), empty) and (got["o"][empty] == 0).all()
    for name in NAMES:
        g, e, p = (y[name].masked_fill(empty, 0.0) if name == "lse" else y[name] for y in (got, exact, plain))
        if dtype == torch.float32 or name == "lse":
            budget = 1e-5
        else:
            budget = min(1e-2, 2 * error(p, e))
        assert g.isfinite().all(), name
        if e.norm() < 1e-6:  # one key alone: its weight is 1 whatever q and k are
            assert g.double().norm() < 1e-2 * x["do"].double().norm(), name
            continue
        assert error(g, e) <= budget, f"{name}: {error(g, e):.1e}, allowed {budget:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "B{}-T{}-S{}-H{}-Hkv{}-D{}-Dv{}-J{}".format(*s))
def test_sizes(device: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    B, T, S, *_, J = sizes
    assert_as_good_as_plain(device, make(*sizes[:7], dtype), select(B, T, S, J))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("one_sum", [False, True], ids=["two-sums", "one-sum"])
@pytest.mark.parametrize("D, Dv, shared", [(80, 64, True), (64, 64, True), (576, 512, True), (72, 40, False)])
def test_values_within_the_keys(device: str, D: int, Dv: int, shared: bool, one_sum: bool, dtype: torch.dtype) -> None:
    x = make(1, 2, 33, 3, 1, D, Dv, dtype, shared=True)
    assert lies_within(x["k"], x["v"]) and shared == widths(D, Dv, True).SHARED
    assert_as_good_as_plain(device, x, select(1, 2, 33, 20), one_sum=one_sum)


@pytest.mark.parametrize("D, Dv, H, one_sum", [(64, 64, 3, False), (128, 128, 2, True), (40, 80, 33, False)])
def test_wide_form_of_narrow_rows(
    device: str, D: int, Dv: int, H: int, one_sum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather_backward, "WIDEST_NARROW", 0)
    x = make(1, 2, 33, H, 1, D, Dv, torch.float16, shared=one_sum)
    assert_as_good_as_plain(device, x, select(1, 2, 33, 20), one_sum=one_sum)


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the slots of few tokens into spans of 16 and more, the first of each token without any key."""
    monkeypatch.setattr(spans, "TILE", 16)
    monkeypatch.setattr(spans, "LEAST_TILES", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("sizes", SIZES[1:], ids=lambda s: "B{}-T{}-S{}-H{}-Hkv{}-D{}-Dv{}-J{}".format(*s))
def test_few_tokens_in_spans(device: str, sizes: tuple[int, ...], dtype: torch.dtype, short_spans: None) -> None:
    B, T, S, _, Hkv, *_, J = sizes
    assert spans.cut(B, T, J, Hkv)[0] > 1
    indices = select(B, T, S, J)
    indices[:, 0, :16] = -1
    assert_as_good_as_plain(device, make(*sizes[:7], dtype), indices)


def test_spans_change_nothing_but_rounding(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, indices = make(2, 2, 90, 4, 2, 24, 40, torch.float32), select(2, 2, 90, 80)
    whole = run(device, x, indices, 0.2)
    monkeypatch.setattr(spans, "LEAST_TILES", 1)
    for tile, number in ((64, 2), (32, 3), (16, 5)):
        monkeypatch.setattr(spans, "TILE", tile)
        assert spans.cut(2, 2, 80, 2) == (number, tile)
        parts = run(device, x, indices, 0.2)
        for name in ("o", "lse"):
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)


def test_no_keys_in_any_span(device: str, short_spans: None) -> None:
    got = run(device, make(1, 2, 5, 2, 1, 16, 16, torch.float32), torch.full((1, 2, 40), -1, dtype=torch.int32), 0.2)
    assert (got["o"] == 0).all() and (got["lse"] == float("-inf")).all()


def test_slots_are_cut_where_programs_are_few() -> None:
    assert spans.cut(1, 1, 2048, 1) == (16, 128) and spans.cut(1, 1, 2051, 1) == (17, 128)
    assert spans.cut(8, 1, 2048, 1) == (16, 128) and spans.cut(64, 1, 2048, 1) == (2, 1024)
    assert spans.cut(1, 1, 2048, 8) == (16, 128) and spans.cut(1, 4096, 2048, 1)[0] == 1
    assert spans.cut(1, 1, 128, 1) == (1, 128) and spans.cut(0, 1, 0, 1)[0] == 1
    for B, T, J, programs in ((1, 1, 8191, 1), (3, 2, 1000, 2), (2, 5, 65, 8), (1, 1, 16384, 1)):
        number, span = spans.cut(B, T, J, programs)
        assert (number - 1) * span < J <= number * span and number <= spans.MOST_SPANS
        assert number == 1 or B * T * programs * number <= spans.ENOUGH_PROGRAMS


def test_values_elsewhere_in_the_cache(device: str) -> None:
    cache = make(2, 2, 9, 4, 2, 40, 40, torch.float32)
    x = {**cache, "q": cache["q"][..., :16], "k": cache["k"][..., :16], "v": cache["k"][..., 16:40]}
    x["do"] = cache["do"][..., :24]
    assert not lies_within(x["k"], x["v"])
    assert_as_good_as_plain(device, x, select(2, 2, 9, 6))


def test_any_strides(device: str) -> None:
    x = make(2, 2, 9, 4, 2, 16, 24, torch.float32)
    want = run(device, x, select(2, 2, 9, 6), 0.2)
    x["k"] = x["k"].transpose(1, 2).contiguous().transpose(1, 2)
    x["v"] = x["v"].transpose(1, 3).contiguous().transpose(1, 3)
    x["q"], x["do"] = (x[name].transpose(0, 2).contiguous().transpose(0, 2) for name in ("q", "do"))
    got = run(device, x, select(2, 2, 9, 6), 0.2)
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", ["head-major", "sliced", "batch-inside", "columns-apart"])
@pytest.mark.parametrize("sizes", [(2, 3, 20, 6, 2, 24, 16, 9), (2, 2, 20, 5, 1, 144, 128, 9)], ids=["narrow", "wide"])
def test_strides_of_queries_and_output_gradients(device: str, sizes: tuple[int, ...], layout: str) -> None:
    """Only columns that lie apart are copied; results are those of contiguous tensors, bit for bit where sums are."""
    x, indices = make(*sizes[:7], torch.float32), select(*sizes[:3], sizes[7])
    want = run(device, x, indices, 0.2)
    for name in ("q", "do"):
        wide = torch.full((*x[name].shape[:3], x[name].shape[3] + 5), NAN)
        wide[..., 3:-2] = x[name]
        x[name] = {
            "head-major": x[name].transpose(1, 2).contiguous().transpose(1, 2),
            "sliced": wide[..., 3:-2],
            "batch-inside": x[name].transpose(0, 1).contiguous().transpose(0, 1),
            "columns-apart": x[name].transpose(2, 3).contiguous().transpose(2, 3),
        }[layout]
        assert not x[name].is_contiguous()
    got = run(device, x, indices, 0.2)
    for name in NAMES:
        if device == "cpu" or name in ("o", "lse", "dq"):
            assert torch.equal(got[name], want[name]), name
        else:
            torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}")


def test_slots_of_either_width(device: str) -> None:
    x = make(1, 3, 20, 2, 1, 16, 16, torch.float32)
    got = [run(device, x, select(1, 3, 20, 11, dtype), 0.2) for dtype in (torch.int32, torch.int64)]
    assert torch.equal(got[0]["o"], got[1]["o"]) and torch.equal(got[0]["lse"], got[1]["lse"])
    torch.testing.assert_close(got[0]["dk"], got[1]["dk"])


def test_what_is_not_selected_changes_no_bit(device: str) -> None:
    x = make(1, 4, 30, 2, 1, 16, 16, torch.float32)
    indices = select(1, 4, 30, 12)
    indices[(indices >= 20) | (indices == 0)] = -1
    before = run(device, x, indices, 0.2)
    for name in ("k", "v"):
        x[name][:, 20:] = x[name][:, 0] = NAN
    after = run(device, x, indices, 0.2)
    assert all(torch.equal(before[name], after[name]) for name in ("o", "lse", "dq"))
    assert all((after[name][:, 20:] == 0).all() and (after[name][:, 0] == 0).all() for name in ("dk", "dv"))


def test_no_keys_at_all(device: str) -> None:
    for S, J in ((0, 3), (5, 0), (5, 3)):
        x = make(1, 2, S, 2, 1, 16, 16, torch.float32)
        got = run(device, x, torch.full((1, 2, J), -1, dtype=torch.int32), 0.2)
        assert (got["o"] == 0).all() and (got["lse"] == float("-inf")).all()
        assert (got["dq"] == 0).all() and (got["dk"] == 0).all() and (got["dv"] == 0).all()


def test_large_logits(device: str) -> None:
    x = make(1, 2, 40, 2, 1, 16, 16, torch.float32)
    x["q"] *= 300.0
    indices = select(1, 2, 40, 30)
    exact, got = results(x, indices, 1.0, torch.float64, reference_attention), run(device, x, indices, 1.0)
    assert error(got["o"], exact["o"]) < 1e-3 and error(got["dv"], exact["dv"]) < 1e-3


def test_pieces_of_queries(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, indices = make(2, 3, 20, 4, 2, 16, 16, torch.float32), select(2, 3, 20, 11)
    monkeypatch.setattr(gather_backward, "WIDEST_NARROW", 0)
    monkeypatch.setattr(gather_backward, "WORKSPACE_BYTES", 2 * 2 * 4 * 64 * 4)
    assert_as_good_as_plain(device, x, indices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tiles of other devices, for the interpreter")
@pytest.mark.parametrize("limits", [(99 * 1024, 8), (163 * 1024, 8), (HOPPER_BYTES, 10)], ids=str)
def test_tiles_of_other_devices(device: str, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gather, gather_backward):
        monkeypatch.setattr(module, "device_limits", lambda device: limits)
    for D, Dv, H in ((576, 512, 33), (128, 128, 65)):
        x = make(1, 1, 45, H, 1, D, Dv, torch.float16, shared=Dv < D)
        assert_as_good_as_plain(device, x, select(1, 1, 45, 40))


def test_columns_are_cut_without_much_padding() -> None:
    for D in (*range(1, 200), 256, 320, 512, 576, 640, 768):
        w = widths(D, 64, False)
        assert is_served(D, 64) and D <= w.key_columns <= max(16, 2 * D) and w.PIECES in (1, 2)
    assert widths(576, 512, True)[2:] == (256, 2, 64, 256, 2, True)
    assert widths(128, 128, False)[2:] == (128, 1, 0, 128, 1, False)
    assert not is_served(769, 64) and not is_served(64, 513)


def test_tiles_fit_and_hold_at_most_64_heads() -> None:
    for D, V in ((576, 512), (512, 512), (128, 128), (24, 40)):
        for group in (1, 16, 64, 128):
            for limits in ((99 * 1024, 8), (163 * 1024, 8), (HOPPER_BYTES, 9), (HOPPER_BYTES, 10), (99 * 1024, 12)):
                w = widths(D, V, V >= 512)
                tiles = tile_sizes(group, w, 2, limits)
                sizes = (tiles["BH"], tiles["BN"], tiles["STAGES"])
                assert tiles["BH"] <= 64 and tile_bytes(*sizes, w, 2) <= limits[0]
    mla = {"BH": 64, "BN": 64, "STAGES": 2, "num_warps": 8}
    assert tile_sizes(64, widths(576, 512, True), 2, (HOPPER_BYTES, 9)) == mla


def test_rows_on_lines() -> None:
    """What the kernel for Hopper copies as it is: strides that Triton knows to be multiples of 16 elements."""
    from hybrid_flex.kernels.dsa.hopper import lies_on_lines, strides

    x = torch.empty(2, 3, 4, 576, dtype=torch.bfloat16)
    assert lies_on_lines(x) and lies_on_lines(x.transpose(1, 2)) and lies_on_lines(x[..., 64:])
    for stride, on_lines in ((592, True), (584, False), (577, False)):
        wide = torch.empty(2, 3, 4, stride, dtype=torch.bfloat16)[..., :576]
        assert lies_on_lines(wide) == on_lines, stride
    assert not lies_on_lines(x[..., 4:]) and not lies_on_lines(x.transpose(2, 3))
    one = x.as_strided((1, 3, 1, 576), (1, 576, 7, 1))  # strides of what there is one of do not matter
    assert lies_on_lines(one) and strides(one) == (0, 576, 0)
