"""lightning_scores and lightning_topk: reference, ties, causality, memory, the compiler, errors."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.ops.dsa import lightning_scores, lightning_topk, paged_rows
from hybrid_flex.ops.dsa.indexer import ScoreTiles, select_topk
from hybrid_flex.ops.dsa.quantize import hadamard, quantize
from hybrid_flex.ops.dsa.reference import reference_scores

CASES = [
    # B, T, S, HI, DI, topk, query_start, causal
    (1, 1, 1, 1, 8, 1, 0, True),
    (2, 63, 63, 3, 8, 16, 0, True),
    (2, 65, 65, 4, 16, 16, 0, True),
    (1, 257, 257, 2, 8, 64, 0, True),
    (2, 5, 70, 3, 8, 16, 65, True),
    (2, 1, 70, 3, 8, 16, 69, True),
    (1, 33, 20, 2, 8, 4, 0, True),
    (2, 37, 50, 3, 8, 16, 0, False),
    (1, 9, 9, 2, 8, 40, 0, True),
    (1, 9, 200, 2, 8, 199, 191, True),
]
IDS = [f"B{b}-T{t}-S{s}-HI{hi}-DI{di}-J{j}-at{q}-{'causal' if c else 'full'}" for b, t, s, hi, di, j, q, c in CASES]


def integers(*shape: int, seed: int, low: int = -2, high: int = 3) -> Tensor:
    """Draw small integers as float32: every score is then exact in any order of summation, and ties abound."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def indexer_inputs(b: int, t: int, s: int, hi: int, di: int) -> tuple[Tensor, Tensor, Tensor]:
    return integers(b, t, hi, di, seed=0), integers(b, s, di, seed=1), integers(b, t, hi, seed=2)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_integer_scores_match_the_reference_bitwise(case: tuple, small_blocks: None) -> None:
    b, t, s, hi, di, topk, start, causal = case
    inputs = indexer_inputs(b, t, s, hi, di)
    options = {"causal": causal, "query_start": start}
    expected = lightning_topk(*inputs, topk, backend="reference", **options)
    assert torch.equal(lightning_topk(*inputs, topk, **options), expected)
    assert expected.dtype == torch.int32 and expected.shape == (b, t, topk)


def test_default_workspace_matches_the_reference_bitwise() -> None:
    inputs = indexer_inputs(1, 300, 5000, 8, 8)
    for causal in (True, False):
        options = {"causal": causal, "query_start": 4700 * causal}
        expected = lightning_topk(*inputs, 100, backend="reference", **options)
        assert torch.equal(lightning_topk(*inputs, 100, **options), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 4),
    st.integers(1, 70),
    st.integers(0, 50),
    st.booleans(),
    st.integers(1, 4),
)
def test_property_any_shape(
    num_queries: int, num_keys: int, num_heads: int, topk: int, query_start: int, causal: bool, kpool: int
) -> None:
    inputs = indexer_inputs(2, num_queries, num_keys, num_heads, 3)
    options = {"causal": causal, "query_start": query_start, "kpool": kpool}
    got = lightning_topk(*inputs, topk, **options)
    assert torch.equal(got, lightning_topk(*inputs, topk, backend="reference", **options))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(lambda x: sum(x) > 0), st.integers(1, 30), st.booleans()
)
def test_property_packed_sequences(lengths: list[int], topk: int, causal: bool) -> None:
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = sum(lengths)
    inputs = indexer_inputs(1, total, total, 2, 3)
    got = lightning_topk(*inputs, topk, causal=causal, cu_seqlens=cu)
    for begin, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        if begin < end:
            alone = lightning_topk(*(x[:, begin:end] for x in inputs), topk, causal=causal)
            assert torch.equal(got[:, begin:end], torch.where(alone >= 0, alone + begin, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_real_scores_are_selected_by_score(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q_idx, k_idx, w = (torch.randn(*s).to(dtype) for s in ((2, 90, 4, 16), (2, 90, 16), (2, 90, 4)))
    indices = lightning_topk(q_idx, k_idx, w, 20)
    scores = reference_scores(q_idx.double(), k_idx.double(), w.double())
    for b in range(2):
        for t in range(90):
            row = [s for s in indices[b, t].tolist() if s >= 0]
            assert len(row) == min(t + 1, 20) and row == sorted(set(row)) and max(row) <= t
            rest = sorted(set(range(t + 1)) - set(row))
            if rest:
                assert scores[b, t, row].min() >= scores[b, t, rest].max() - 1e-4


def test_all_zero_scores_take_the_lowest_indices() -> None:
    q_idx, k_idx, w = torch.zeros(1, 50, 2, 4), torch.randn(1, 50, 4), torch.randn(1, 50, 2)
    indices = lightning_topk(q_idx, k_idx, w, 8)
    for t in range(50):
        number = min(t + 1, 8)
        assert indices[0, t].tolist() == [*range(number), *[-1] * (8 - number)]


def test_plateau_below_a_few_large_scores() -> None:
    # One key scores above a plateau of zeros (after the ReLU): it, then the lowest of the plateau.
    q_idx, w = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1)
    k_idx = -torch.ones(1, 1000, 1)
    k_idx[0, 700] = 3.0
    assert lightning_topk(q_idx, k_idx, w, 4, query_start=999).tolist() == [[[0, 1, 2, 700]]]
    assert lightning_topk(q_idx, k_idx, -w, 4, query_start=999).tolist() == [[[0, 1, 2, 3]]]


def test_negative_weights_and_negative_zero() -> None:
    # -1 * ReLU(x <= 0) is -0.0: equal to 0.0, so the index decides.
    q_idx, k_idx = torch.ones(1, 1, 2, 1), torch.tensor([-1.0, -2.0, 5.0, -3.0])[None, :, None]
    w = torch.tensor([[[-1.0, 0.5]]])
    assert lightning_topk(q_idx, k_idx, w, 2, query_start=3).tolist() == [[[0, 1]]]


def test_causality_is_exact_and_not_off_by_one(small_blocks: None) -> None:
    q_idx, k_idx, w = torch.ones(1, 40, 1, 1), torch.arange(1.0, 41.0)[None, :, None], torch.ones(1, 40, 1)
    # Scores grow with the position: the best key is always the last visible one.
    assert lightning_topk(q_idx, k_idx, w, 1)[0, :, 0].tolist() == list(range(40))
    assert lightning_topk(q_idx[:, :5], k_idx, w[:, :5], 1, query_start=10)[0, :, 0].tolist() == list(range(10, 15))
    assert lightning_topk(q_idx[:, :5], k_idx, w[:, :5], 1, causal=False)[0, :, 0].tolist() == [39] * 5


def test_the_future_changes_no_selection() -> None:
    torch.manual_seed(0)
    q_idx, k_idx, w = torch.randn(1, 130, 3, 8), torch.randn(1, 130, 8), torch.randn(1, 130, 3)
    whole = lightning_topk(q_idx, k_idx, w, 10)
    k_idx[:, 77:] = float("nan")
    q_idx[:, 77:] = float("nan")
    assert torch.equal(lightning_topk(q_idx[:, :77], k_idx[:, :77], w[:, :77], 10), whole[:, :77])
    assert torch.equal(lightning_topk(q_idx, k_idx, w, 10)[:, :64], whole[:, :64])


@pytest.mark.parametrize("kpool", [1, 4])
def test_prefill_in_pieces_and_decode_equal_the_whole(kpool: int) -> None:
    q_idx, w = integers(2, 50, 3, 4, seed=0), integers(2, 50, 3, seed=1)
    k_idx = integers(2, 50 // kpool, 4, seed=2)
    whole = lightning_topk(q_idx, k_idx, w, 6, kpool=kpool)
    pieces = []
    for begin, end in ((0, 17), (17, 48), (48, 49), (49, 50)):
        visible = k_idx[:, : end // kpool]
        piece = lightning_topk(q_idx[:, begin:end], visible, w[:, begin:end], 6, query_start=begin, kpool=kpool)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_gpu_form_of_the_selection_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_flex.ops.dsa.indexer import _fill, _lowest

    scores = integers(20, 60, seed=3)
    first, last = torch.arange(20) // 2, torch.arange(20) * 3 + 1
    expected = select_topk(scores.clone(), first, last, 9)
    column = torch.arange(60)
    scores = scores.masked_fill((column < first[:, None]) | (column >= last[:, None]), float("-inf"))
    threshold = scores.topk(9).values[:, -1:]
    assert torch.equal(_lowest(_fill(scores, threshold, first[:, None], last[:, None], 9), 9), expected)


def test_score_tiles_match_dense_scores() -> None:
    torch.manual_seed(0)
    q_idx, k_idx, w = torch.randn(5, 3, 8), torch.randn(200, 8), torch.randn(5, 3)
    tiles = ScoreTiles(5, 3, 200, q_idx, torch.float32)
    tiles.tile_size = 64
    torch.testing.assert_close(tiles(q_idx, k_idx, w), lightning_scores(q_idx[None], k_idx[None], w[None])[0])


def test_scores_have_gradients_and_the_selection_has_none() -> None:
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 3, 2, 4), (1, 5, 4), (1, 3, 2))]
    assert torch.autograd.gradcheck(lightning_scores, inputs)
    assert not lightning_topk(*inputs, 2).requires_grad


def test_memory_does_not_grow_with_scores() -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, Tensor):
                    self.bytes = max(self.bytes, x.untyped_storage().nbytes())
            return out

    length = 2048
    inputs = indexer_inputs(1, length, length, 4, 8)
    with Largest() as largest:
        torch.ops.hybrid_flex.lightning_topk.default(*inputs, 64, True, 0, None, 1)
    assert 0 < largest.bytes <= 3 * 2**20 < length * length * 4


def test_opcheck() -> None:
    for args in (
        (*indexer_inputs(2, 9, 9, 2, 4), 4, True, 0, None, 1),
        (*indexer_inputs(1, 9, 9, 2, 4), 4, True, 0, torch.tensor([0, 4, 9]), 1),
        (*indexer_inputs(1, 9, 2, 2, 4), 4, True, 3, None, 4),
    ):
        torch.library.opcheck(torch.ops.hybrid_flex.lightning_topk.default, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_one_graph_for_several_lengths(backend: str, fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend(backend)

    def select(q_idx: Tensor, k_idx: Tensor, w: Tensor) -> Tensor:
        return lightning_topk(q_idx, k_idx, w, 4, query_start=k_idx.shape[1] - q_idx.shape[1]) + 1

    compiled = torch.compile(select, fullgraph=True, backend=counter, dynamic=True)
    for num_queries, num_keys in ((9, 11), (13, 40), (21, 22)):
        inputs = indexer_inputs(2, num_queries, num_keys, 2, 4)
        assert torch.equal(compiled(*inputs), select(*inputs))
    assert counter.frame_count == 1


def test_outputs_are_written_everywhere(nan_memory: None) -> None:
    inputs = indexer_inputs(2, 37, 37, 2, 4)
    assert torch.equal(lightning_topk(*inputs, 50), lightning_topk(*inputs, 50, backend="reference"))
    empty = lightning_topk(inputs[0], inputs[1][:, :0], inputs[2], 5)
    assert (empty == -1).all()


def test_errors() -> None:
    q_idx, k_idx, w = indexer_inputs(1, 6, 6, 2, 4)

    def expect(kind: type[Exception], message: str, *args: object, **options: object) -> None:
        with pytest.raises(kind, match=message):
            lightning_topk(*args, **options)  # type: ignore[arg-type]

    expect(ValueError, r"lightning_topk: topk must be at least 1, got 0", q_idx, k_idx, w, 0)
    expect(ValueError, r"lightning_topk: q_idx must be \[B, T, HI, DI\], a tensor of rank 4", q_idx[0], k_idx, w, 2)
    expect(ValueError, r"lightning_topk: k_idx must be \[B, S, DI\] = \[1, \*, 4\]", q_idx, k_idx[..., :3], w, 2)
    expect(ValueError, r"lightning_topk: w must be \[B, T, HI\] = \[1, 6, 2\]", q_idx, k_idx, w[..., :1], 2)
    expect(TypeError, r"lightning_topk: k_idx must have dtype float32, got float64", q_idx, k_idx.double(), w, 2)
    expect(TypeError, r"lightning_topk: q_idx must have dtype", q_idx.int(), k_idx, w, 2)
    expect(ValueError, r"lightning_topk: query_start must be at least 0, got -1", q_idx, k_idx, w, 2, query_start=-1)
    expect(ValueError, r"lightning_topk: backend must be one of", q_idx, k_idx, w, 2, backend="cuda")
    cu = torch.tensor([0, 2, 6])
    expect(ValueError, r"lightning_topk: kpool must be 1 with cu_seqlens", q_idx, k_idx, w, 2, cu_seqlens=cu, kpool=2)
    expect(ValueError, r"lightning_topk: query_start must be 0 with", q_idx, k_idx, w, 2, cu_seqlens=cu, query_start=1)
    expect(ValueError, r"lightning_topk: k_idx must have S = T = 6 with", q_idx, k_idx[:, 1:], w, 2, cu_seqlens=cu)
    expect(ValueError, r"cu_seqlens must never decrease", q_idx, k_idx, w, 2, cu_seqlens=torch.tensor([0, 4, 2, 6]))
    expect(ValueError, r"cu_seqlens must end at T = 6, got 5", q_idx, k_idx, w, 2, cu_seqlens=torch.tensor([0, 5]))
    expect(ValueError, r"cu_seqlens must start at 0, got 1", q_idx, k_idx, w, 2, cu_seqlens=torch.tensor([1, 6]))
    expect(TypeError, r"cu_seqlens must have dtype int32, int64", q_idx, k_idx, w, 2, cu_seqlens=cu.float())
    two = (x.expand(2, *x.shape[1:]) for x in (q_idx, k_idx, w))
    expect(ValueError, r"cu_seqlens must come with a batch size of 1", *two, 2, cu_seqlens=cu)
    with pytest.raises(TypeError, match="unexpected keyword"):
        lightning_topk(q_idx, k_idx, w, 2, top=3)  # type: ignore[call-arg]


def pages_of(k_idx: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Cut caches ``[B, S, DI]`` into pages, shuffle them into a pool, and say which are whose; unused ones are -1."""
    num_pages = -(-k_idx.shape[1] // page_size)
    padded = torch.nn.functional.pad(k_idx, (0, 0, 0, num_pages * page_size - k_idx.shape[1]))
    pages = padded.unflatten(1, (num_pages, page_size)).flatten(0, 1)
    order = torch.randperm(len(pages) + 2, generator=torch.Generator().manual_seed(9))[: len(pages)]
    pool = torch.full((len(pages) + 2, page_size, k_idx.shape[2]), float("nan")).index_copy(0, order, pages)
    table = order.view(k_idx.shape[0], num_pages)
    return pool, torch.nn.functional.pad(table, (0, 1), value=-1)


@pytest.mark.parametrize("kpool", [1, 4])
@pytest.mark.parametrize("backend", ["stream", "reference"])
def test_caches_of_several_lengths_equal_each_alone(backend: str, kpool: int) -> None:
    q_idx, k_idx, w = indexer_inputs(4, 3, 50, 2, 8)
    lengths = torch.tensor([200 // kpool, 3, 57, 2])
    got = lightning_topk(q_idx, k_idx, w, 6, lengths=lengths, kpool=kpool, backend=backend)
    for b, length in enumerate(lengths.tolist()):
        keys = k_idx[b : b + 1, : max(length // kpool, 0)]
        for t in range(3):
            part = (q_idx[b : b + 1, t : t + 1], keys, w[b : b + 1, t : t + 1])
            position = length - 3 + t  # a cache shorter than its queries: the first of them see nothing
            alone = lightning_topk(*part, 6, query_start=max(position, 0), kpool=kpool, backend="reference")
            alone = alone if position >= 0 else torch.full_like(alone, -1)
            assert torch.equal(got[b : b + 1, t : t + 1], alone), (b, t)


@pytest.mark.parametrize("backend", ["stream", "reference"])
def test_pages_equal_a_cache_in_one_piece(backend: str) -> None:
    q_idx, k_idx, w = indexer_inputs(3, 2, 50, 2, 8)
    lengths = torch.tensor([50, 9, 33], dtype=torch.int32)
    pool, table = pages_of(k_idx, 8)
    expected = lightning_topk(q_idx, k_idx, w, 6, lengths=lengths)
    assert torch.equal(lightning_topk(q_idx, pool, w, 6, lengths=lengths, block_table=table, backend=backend), expected)
    rows = paged_rows(expected, table, 8)
    assert torch.equal(rows < 0, expected < 0)
    for b in range(3):
        used = expected[b] >= 0
        assert torch.equal(pool.flatten(0, 1)[rows[b][used]], k_idx[b][expected[b][used].long()])


def test_errors_of_caches() -> None:
    q_idx, k_idx, w = indexer_inputs(2, 1, 8, 2, 4)
    lengths, table = torch.tensor([8, 3]), torch.tensor([[0, 1], [2, 3]])

    def expect(kind: type[Exception], message: str, **options: object) -> None:
        with pytest.raises(kind, match=message):
            lightning_topk(q_idx, k_idx, w, 2, **options)  # type: ignore[arg-type]

    expect(ValueError, r"lightning_topk: lengths must be \[B\] = \[2\], got shape \(1,\)", lengths=lengths[:1])
    expect(TypeError, r"lightning_topk: lengths must have dtype int32, int64, got float32", lengths=lengths.float())
    expect(ValueError, r"lightning_topk: causal must be True with lengths, got False", lengths=lengths, causal=False)
    expect(ValueError, r"lightning_topk: query_start must be 0 with lengths", lengths=lengths, query_start=3)
    expect(ValueError, r"lightning_topk: block_table must come with lengths, got lengths = None", block_table=table)
    expect(ValueError, r"block_table must be \[B, pages\] = \[2, \*\]", lengths=lengths, block_table=table[:1])
    for indices, message in ((table, r"paged_rows: indices must be \[B, T, J\]"),):
        with pytest.raises(ValueError, match=message):
            paged_rows(indices, table, 4)
    with pytest.raises(ValueError, match="paged_rows: page_size must be at least 1, got 0"):
        paged_rows(table[None].expand(2, 2, 2), table, 0)


def test_fp8() -> None:
    generator = torch.Generator().manual_seed(4)
    q_idx, k_idx, w = (torch.randn(s, generator=generator) for s in ((2, 20, 8, 64), (2, 300, 64), (2, 20, 8)))
    q_idx[..., 3] *= 30  # an outlier, which eight bits without the rotation would give all their digits to
    options = {"causal": False, "quantization": "fp8"}
    got = lightning_topk(q_idx, k_idx, w, 50, **options)  # type: ignore[arg-type]
    rounded = [(lambda x8, scale: x8.double() * scale[..., None].double())(*quantize(x)) for x in (q_idx, k_idx)]
    scores = reference_scores(*rounded, w.double())
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, got.long(), True)
    kept, left = scores.masked_fill(~chosen, 1e9).amin(-1), scores.masked_fill(chosen, -1e9).amax(-1)
    assert (kept >= left - 1e-3).all()
    assert torch.equal(got, lightning_topk(q_idx, k_idx, w, 50, backend="reference", **options))  # type: ignore[arg-type]
    exact = lightning_topk(q_idx, k_idx, w, 50, causal=False)
    common = (got[..., None] == exact[..., None, :]).any(-1).float().mean()
    assert 0.9 < common < 1.0
    with pytest.raises(
        ValueError, match="lightning_topk: q_idx must have a width that is a power of two for fp8, got 24"
    ):
        lightning_topk(q_idx[..., :24], k_idx[..., :24], w, 5, quantization="fp8")
    with pytest.raises(ValueError, match="lightning_topk: quantization must be one of"):
        lightning_topk(q_idx, k_idx, w, 5, quantization="int8")


def test_the_rotation_is_hadamards() -> None:
    matrix = hadamard(torch.eye(16, dtype=torch.float64)) * 4
    assert torch.equal(matrix.abs(), torch.ones(16, 16, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, 16 * torch.eye(16, dtype=torch.float64))
    x8, scale = quantize(torch.zeros(3, 16))
    assert torch.equal(x8.float(), torch.zeros(3, 16)) and (scale == scale.new_tensor(1e-4) / 448).all()
