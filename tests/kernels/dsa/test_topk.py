"""The kernels of lightning_topk against the specification: integers make every sum exact, so equality is bitwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.sizevars import SizeVarAllocator
from torch.export import Dim
from torch.fx.experimental import _config as symbolic_shapes

from hybrid_flex.kernels.dsa import select
from hybrid_flex.kernels.dsa import topk as launcher
from hybrid_flex.ops.dsa.reference import reference_scores, reference_topk, reference_visible

CASES = {
    # B, T, S, HI, DI, topk, query_start, causal, kpool
    "one": (1, 1, 1, 1, 16, 1, 0, True, 1),
    "off-tiles": (2, 63, 63, 3, 16, 16, 0, True, 1),
    "two-tiles": (1, 70, 130, 2, 24, 20, 60, True, 1),
    "full": (2, 33, 150, 1, 16, 7, 0, False, 1),
    "few-queries": (3, 2, 300, 5, 32, 17, 298, True, 1),
    "decode-one-head": (1, 1, 200, 1, 16, 3, 199, True, 1),
    "pools": (2, 37, 40, 2, 16, 4, 124, True, 4),
    "topk-passes-S": (1, 33, 20, 2, 16, 64, 0, True, 1),
    "fewer-keys-than-queries": (1, 40, 10, 2, 16, 4, 0, True, 1),
}
NAN = float("nan")


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def inputs(B: int, T: int, S: int, HI: int, DI: int) -> tuple[Tensor, Tensor, Tensor]:
    return integers(B, T, HI, DI, seed=0), integers(B, S, DI, seed=1), integers(B, T, HI, seed=2)


def expected(x: tuple[Tensor, Tensor, Tensor], topk: int, start: int, causal: bool, kpool: int, **packed: Tensor):
    visible = reference_visible(
        x[0].shape[1], x[1].shape[1], causal=causal, query_start=start, kpool=kpool, **packed
    )  # fmt: skip
    return reference_topk(reference_scores(*(t.double() for t in x)), visible, topk)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every fresh tensor of the launcher with what no result holds."""
    empty = torch.empty
    monkeypatch.setattr(launcher.torch, "empty", lambda *size, **kind: empty(*size, **kind).fill_(0x7ABCDEF0))


# Sixteen bits are loaded alike whatever the sizes.
HALF = [pytest.param(name, torch.float16, marks=() if name == "off-tiles" else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in CASES), *HALF])
def test_equals_the_reference_bitwise(name: str, dtype: torch.dtype, device: str) -> None:
    *sizes, topk, start, causal, kpool = CASES[name]
    x = inputs(*sizes)
    got = launcher.lightning_topk(*(t.to(device, dtype) for t in x), topk, causal, start, None, kpool)
    assert got.dtype == torch.int32
    assert torch.equal(got.cpu(), expected(x, topk, start, causal, kpool))


@pytest.mark.parametrize("rows_that_fill_a_gpu", [1, 10**6], ids=["one-span", "spans"])
def test_walks_and_spans(rows_that_fill_a_gpu: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """5000 columns, of which 1024 are held at a time, in one walk or cut into two spans."""
    monkeypatch.setattr(launcher, "MAX_WIDTH", 1024)
    monkeypatch.setattr(launcher, "ENOUGH_BLOCKS", rows_that_fill_a_gpu)
    monkeypatch.setattr(launcher, "SPAN_WIDTHS", 2)
    for topk, causal, start in ((400, False, 0), (512, True, 4996), (3, True, 4996), (400, True, 2000)):
        x = inputs(1, 5, 5000, 1, 16)
        got = launcher.lightning_topk(*(t.to(device) for t in x), topk, causal, start, None, 1)
        assert torch.equal(got.cpu(), expected(x, topk, start, causal, 1)), topk


def test_three_rounds_where_rows_are_few(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """11500 columns leave 11 spans of 1024 and more, those 2, and those are selected from."""
    monkeypatch.setattr(launcher, "MAX_WIDTH", 1024)
    x, made = inputs(1, 2, 11500, 1, 16), []
    launchable = launcher.launchable
    monkeypatch.setattr(launcher, "launchable", lambda *kernel: made.append(kernel) or launchable(*kernel))
    for causal, start in ((True, 11490), (True, 3000)):
        made.clear()
        got = launcher.lightning_topk(*(t.to(device) for t in x), 200, causal, start, None, 1)
        assert torch.equal(got.cpu(), expected(x, 200, start, causal, 1))
        assert len(made) == (3 if start == 3000 else 4)  # scores included


def test_what_blocks_hold() -> None:
    assert launcher._held(512, True) == launcher._held(2048, True) == (launcher.FEW_WIDTH, 1)
    assert launcher._held(4096, True) == (launcher.MAX_WIDTH, 1)
    assert launcher._held(512, False) == (2048, launcher.SPAN_WIDTHS)
    assert launcher._has_few_rows(1, 1) and launcher._has_few_rows(16, 4)
    assert not launcher._has_few_rows(65, 1) and not launcher._has_few_rows(1, 16)


@pytest.mark.parametrize("scores", ["ascending", "stairs", "zeros", "extremes", "comb", "gaps"])
def test_walks_of_unkind_scores(scores: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column passes, tiles are equal, steps of the search cannot be taken in floats, or samples mislead."""
    monkeypatch.setattr(launcher, "MAX_WIDTH", 1024)
    q, k, w, column = torch.zeros(1, 2, 1, 16), torch.zeros(1, 4000, 16), torch.ones(1, 2, 1), torch.arange(4000.0)
    q[..., 0] = 1.0
    forms = {
        "ascending": column,
        "stairs": column // 300,
        "zeros": torch.where(column % 50 == 7, column, 0.0),
        # A sample takes every third column, of which there are 1334.
        "comb": torch.where(column % 3 == 0, column + 5000, column),
        "gaps": torch.where(column % 3 == 0, column, column + 5000),
        "extremes": torch.where(column % 5 == 0, 3e38, (column / 50 - 40).exp()),
    }
    k[0, :, 0] = forms[scores]
    if scores == "extremes":
        w[0, 1] = -1.0
    got = launcher.lightning_topk(*(x.to(device) for x in (q, k, w)), 300, False, 0, None, 1)
    assert torch.equal(got.cpu(), expected((q, k, w), 300, 0, False, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a function of a compiled kernel cannot be replaced")
def test_a_search_takes_few_sums(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a row one search in a sample and one among what it leaves, seldom more."""
    sums: list[int] = []
    kth_largest, between_bounds = select.kth_largest, select.between_bounds

    def search(*arguments: object) -> object:
        sums.append(0)
        return kth_largest(*arguments)

    def after_or_before_a_sum(*arguments: object) -> object:
        sums[-1] += 1
        return between_bounds(*arguments)

    monkeypatch.setattr(select, "kth_largest", search)
    monkeypatch.setattr(select, "between_bounds", after_or_before_a_sum)
    monkeypatch.setattr(launcher, "MAX_WIDTH", 1024)
    monkeypatch.setattr(launcher, "ENOUGH_BLOCKS", 1)
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(*size, generator=generator) for size in ((1, 6, 8, 16), (1, 8192, 16), (1, 6, 8))]
    launcher.lightning_topk(*x, 256, False, 0, None, 1)
    assert 12 <= len(sums) <= 14
    assert sum(sums) / 2 <= 6 * len(sums)


@pytest.mark.parametrize("rows", [64, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 30, 150))])
def test_a_small_workspace(rows: int, device: str) -> None:
    x = inputs(2, 80, 90, 1, 16)
    got = launcher.lightning_topk(*(t.to(device) for t in x), 9, True, 10, None, 1, workspace_bytes=rows * 424)
    assert torch.equal(got.cpu(), expected(x, 9, 10, True, 1))


def test_packed(device: str) -> None:
    x, bounds = inputs(1, 90, 90, 2, 16), torch.tensor([0, 0, 41, 42, 90])
    sequence = torch.searchsorted(bounds, torch.arange(90), right=True)
    ranges = (bounds[sequence - 1].to(device), bounds[sequence].to(device))
    for causal in (True, False):
        got = launcher.lightning_topk(*(t.to(device) for t in x), 7, causal, 0, ranges, 1)
        assert torch.equal(got.cpu(), expected(x, 7, 0, causal, 1, cu_seqlens=bounds))


def test_all_equal_and_extreme_scores(device: str) -> None:
    """Plateaus go to the lowest columns; infinities of both signs and zeros of both signs are in their places."""
    q, k, w = torch.ones(1, 20, 1, 16), torch.zeros(1, 300, 16), torch.ones(1, 20, 1)
    k[0, 250:260], k[0, 260] = 1e30, 3e38
    w[0, 10:] = -1.0
    x = tuple(t.to(device) for t in (q, k, w))
    got = launcher.lightning_topk(*x, 12, False, 0, None, 1).cpu()
    assert torch.equal(got, expected((q, k, w), 12, 0, False, 1))
    assert got[0, 0].tolist() == [0, *range(250, 261)] and got[0, 10].tolist() == list(range(12))


def test_strided_keys_and_weights_of_another_dtype(device: str) -> None:
    q, k, w = inputs(2, 20, 50, 2, 16)
    wide = torch.cat((k, k + 1), -1).to(device)
    got = launcher.lightning_topk(q.to(device), wide[..., :16], w.double().to(device), 5, False, 0, None, 1)
    assert torch.equal(got.cpu(), expected((q, k, w), 5, 0, False, 1))


def test_reals_select_no_score_below_one_left_out(device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = tuple(torch.randn(size, generator=generator) for size in ((1, 64, 4, 32), (1, 400, 32), (1, 64, 4)))
    got = launcher.lightning_topk(*(t.to(device) for t in x), 50, False, 0, None, 1).cpu()
    scores = reference_scores(*(t.double() for t in x))
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, got.long(), True)
    assert (chosen.sum(-1) == 50).all()
    kept, left = scores.masked_fill(~chosen, NAN).nan_to_num(1e9).amin(-1), scores.masked_fill(chosen, -1e9).amax(-1)
    assert (kept >= left - 1e-4).all()


def test_what_is_not_visible_changes_nothing(device: str) -> None:
    x = tuple(t.to(device) for t in inputs(1, 70, 70, 2, 16))
    before = launcher.lightning_topk(*x, 8, True, 0, None, 1)
    x[1][:, 40:] = NAN
    after = launcher.lightning_topk(*x, 8, True, 0, None, 1)
    assert torch.equal(before[:, :40], after[:, :40])


@pytest.mark.parametrize("T", [1, 3, 20])
def test_caches_of_several_lengths_and_pages(T: int, device: str) -> None:
    """The keys of three caches lie in pages of 16, in any order, and no page follows the last of each."""
    (q, k, w), lengths = inputs(3, T, 96, 2, 16), torch.tensor([96, 5, 40])
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1))
    pool = torch.full((20, 16, 16), NAN).index_copy(0, order, k.view(18, 16, 16))
    table = torch.where(torch.arange(6) * 16 < lengths[:, None], order.view(3, 6), -1).int()
    position = lengths[:, None, None] - T + torch.arange(T)[:, None]
    want = reference_topk(reference_scores(q, k, w), torch.arange(96) <= position, 9)
    for keys, pages in ((k, None), (pool, table.to(device))):
        x = (t.to(device) for t in (q, keys, w))
        got = launcher.lightning_topk(*x, 9, True, 0, None, 1, lengths.to(device), pages)
        assert torch.equal(got.cpu(), want)


def test_eight_bits(device: str) -> None:
    """Small integers are exact in e4m3, and powers of two as scales: equality is bitwise again."""
    q, k, w = inputs(2, 20, 70, 2, 16)
    scale = torch.randint(-3, 4, (2, 70), generator=torch.Generator().manual_seed(5)).float().exp2()
    expects = expected((q, k * scale[..., None], w), 9, 0, False, 1)
    eight = (x.to(device, torch.float8_e4m3fn) for x in (q, k))
    got = launcher.lightning_topk(*eight, w.to(device), 9, False, 0, None, 1, key_scale=scale.to(device))
    assert torch.equal(got.cpu(), expects)


class OpenSizes:
    """Run the launcher as a graph would that leaves sizes open: it sees symbols, kernels and memory their values.

    Args:
        patch: what hides the launcher's own sizes.
        bounds: largest value of each open size, None without one, by the name of the size: B, T or S.
    """

    def __init__(self, patch: pytest.MonkeyPatch, **bounds: int | None) -> None:
        names, example = list(bounds), tuple(torch.empty(3 + i) for i in range(len(bounds)))
        limits = ({} if most is None else {"max": most} for most in bounds.values())
        dims = tuple({0: Dim.DYNAMIC(min=1, **limit)} for limit in limits)
        forward = nn.Sequential()
        forward.forward = lambda *x: [t + 1 for t in x]  # type: ignore[method-assign]
        with symbolic_shapes.patch(backed_size_oblivious=True):
            program = torch.export.export(forward, example, dynamic_shapes=(dims,))
        inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
        self.symbols = {name: x.shape[0] for name, x in zip(names, inputs, strict=True)}
        self.values: dict[Any, int] = {}
        self.launches: list[tuple[int, ...]] = []
        self.allocated = 0
        empty, sizes, launchable = launcher.torch.empty, launcher._sizes, launcher.launchable

        def open_sizes(q_idx: Tensor, k_idx: Tensor, table: Tensor | None) -> tuple[Any, ...]:
            given = dict(zip("BTS", sizes(q_idx, k_idx, table), strict=True))
            self.values = {x.node.expr: given[name] for name, x in self.symbols.items()}
            return tuple(self.symbols.get(name, n) for name, n in given.items())

        def allocate(shape: tuple[Any, ...], **kind: Any) -> Tensor:
            x = empty(tuple(map(self.value, shape)), **kind)
            self.allocated += x.nbytes
            return x

        def launched(kernel: Any, x: Tensor) -> Any:
            return _Launched(self, launchable(kernel, x))

        patch.setattr(launcher.torch, "empty", allocate)
        patch.setattr(launcher, "_sizes", open_sizes)
        patch.setattr(launcher, "launchable", launched)
        self.guards = lambda: inputs[0].fake_mode.shape_env.guards

    def value(self, x: Any) -> Any:
        """Return what a symbol stands for; all else as it is."""
        return int(x.node.expr.subs(self.values)) if isinstance(x, torch.SymInt) else x


class _Launched:
    def __init__(self, sizes: OpenSizes, kernel: Any) -> None:
        self.sizes, self.kernel = sizes, kernel

    def __getitem__(self, grid: tuple[Any, ...]) -> Any:
        grid = tuple(map(self.sizes.value, grid))
        assert min(grid) >= 1, "a grid of no programs cannot be launched"
        self.sizes.launches.append(grid)

        def run(*args: Any, **kwargs: Any) -> None:
            constants = [name for name, x in kwargs.items() if isinstance(x, torch.SymInt)]
            assert not constants, f"{constants} would be compiled for one size"
            columns = dict(zip(self.kernel.arg_names, args, strict=False))["stride_keys"]
            if isinstance(columns, torch.SymInt):
                known = SizeVarAllocator(columns.node.shape_env)
                assert known.statically_known_multiple_of(columns.node.expr, 16), "rows would be loaded bit by bit"
            self.kernel[grid](*map(self.sizes.value, args), **kwargs)

        return run


@pytest.mark.parametrize("T", [1, 16, 65, *(pytest.param(T, marks=pytest.mark.slow) for T in (2, 15, 63, 130))])
@pytest.mark.parametrize(("most", "launches"), [(130, 6), (None, 64)], ids=["bounded", "unbounded"])
def test_open_sizes(T: int, most: int | None, launches: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace holds 64 queries of two entries at the largest sizes, or less than one: launches stay the same."""
    sizes = OpenSizes(monkeypatch, B=2 if most else None, T=most, S=most)
    x = inputs(2, T, T, 1, 16)
    bytes_at_most = 2 * 64 * (4 * 130 + 64)
    got = launcher.lightning_topk(*(t.to(device) for t in x), 9, True, 0, None, 1, workspace_bytes=bytes_at_most)
    assert torch.equal(got.cpu(), expected(x, 9, 0, True, 1))
    assert len(sizes.launches) == launches and not sizes.guards()
    if most:
        assert sizes.allocated - got.nbytes <= 3 * (bytes_at_most + 2 * 64 * 4 * 16)


@pytest.mark.parametrize("S", [1, 3, 20, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("T", [1, 70])
def test_open_keys_fewer_or_more_than_slots(T: int, S: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left out for few keys, and candidates have the width of the most."""
    sizes = OpenSizes(monkeypatch, T=100, S=5000)
    for causal, start in ((True, S - 1), (False, 0)):
        x = inputs(2, T, S, 2, 16)
        got = launcher.lightning_topk(*(t.to(device) for t in x), 20, causal, start, None, 1)
        assert torch.equal(got.cpu(), expected(x, 20, start, causal, 1))
    assert len(sizes.launches) == 4 and not sizes.guards()


def test_open_pools_of_which_there_are_none_yet(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    OpenSizes(monkeypatch, T=100, S=25)
    for T, S in ((3, 0), (40, 10)):
        x = inputs(1, T, S, 1, 16)
        got = launcher.lightning_topk(*(t.to(device) for t in x), 4, True, 0, None, 4, workspace_bytes=10_000)
        assert torch.equal(got.cpu(), expected(x, 4, 0, True, 4) if S else torch.full((1, T, 4), -1).int())


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("paged", [False, True], ids=["whole", "pages"])
def test_open_batch_of_caches_in_spans(B: int, paged: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step: one query for each of B caches of fixed size, whose rows are cut into spans."""
    monkeypatch.setattr(launcher, "MAX_WIDTH", 1024)
    monkeypatch.setattr(launcher, "SPAN_WIDTHS", 1)
    monkeypatch.setattr(launcher, "ENOUGH_BLOCKS", 4)
    (q, k, w), lengths = inputs(B, 1, 4096, 1, 16), torch.tensor([4096, 2, 1500])[:B]
    sizes = OpenSizes(monkeypatch, B=None)
    want = reference_topk(reference_scores(q, k, w), torch.arange(4096) < lengths[:, None, None], 300)
    table = torch.arange(B * 16).flip(0).view(B, 16) if paged else None
    if paged:
        k = k.view(B * 16, 256, 16).flip(0)
    x = (t.to(device) for t in (q, k, w))
    got = launcher.lightning_topk(
        *x, 300, True, 0, None, 1, lengths.to(device), None if table is None else table.to(device)
    )
    assert torch.equal(got.cpu(), want)
    assert [grid[0] for grid in sizes.launches[1:]] == [3 if B == 1 else 1, 1] and not sizes.guards()
