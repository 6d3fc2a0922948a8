"""lightning_topk on CUDA: the kernels against the specification, at the sizes of models; memory, graphs, compiling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes

from hybrid_flex.ops.dsa import lightning_topk
from hybrid_flex.ops.dsa.reference import reference_scores

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASES = {
    # B, T, S, HI, DI, topk, query_start, causal, kpool
    "models": (1, 300, 3000, 64, 128, 512, 2700, True, 1),
    "pools": (1, 4096, 1024, 32, 128, 128, 0, True, 4),
    "one-span": (1, 130, 40000, 4, 64, 2048, 39000, True, 1),
    "walk": (1, 300, 70000, 4, 64, 512, 69700, True, 1),
    "widest-topk": (1, 20, 20000, 2, 64, 8192, 0, False, 1),
    "plain-topk": (1, 20, 20000, 2, 64, 9000, 0, False, 1),
    "decode": (3, 1, 70000, 64, 128, 2048, 69999, True, 1),
    "few": (2, 5, 5000, 8, 96, 100, 4995, True, 1),
    "batch": (5, 257, 257, 3, 16, 16, 0, True, 1),
    "million-keys": (1, 40, 2**20, 2, 32, 4096, 2**20 - 40, True, 1),
    "million-decode": (1, 1, 2**20, 4, 64, 2048, 2**20 - 1, True, 1),
}


def integers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Draw small integers: every sum is exact in any order, and ties abound."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator, device="cuda").to(dtype)


def inputs(B: int, T: int, S: int, HI: int, DI: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((B, T, HI, DI), (B, S, DI), (B, T, HI))
    q, k, w = (integers(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes))
    return q, k, w


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_integer_scores_match_the_reference_bitwise(name: str, dtype: str) -> None:
    *sizes, topk, start, causal, kpool = CASES[name]
    x = inputs(*sizes, dtype=DTYPES[dtype])
    options = {"causal": causal, "query_start": start, "kpool": kpool}
    expected = lightning_topk(*x, topk, backend="reference", **options)
    torch.use_deterministic_algorithms(True)  # fresh memory holds no indices
    try:
        got = lightning_topk(*x, topk, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got, expected)


def test_packed() -> None:
    x = inputs(1, 3000, 3000, 8, 64, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 700, 700, 701, 2300, 3000], device="cuda")
    for causal in (True, False):
        options = {"causal": causal, "cu_seqlens": bounds}
        expected = lightning_topk(*x, 128, backend="reference", **options)
        assert torch.equal(lightning_topk(*x, 128, **options), expected)


def test_reals_select_no_score_below_one_left_out() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((1, 8192, 64, 128), (1, 8192, 128), (1, 8192, 64))
    x = tuple(torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16) for size in sizes)
    got = lightning_topk(*x, 2048)
    for t in (2048, 5000, 8191):
        scores = reference_scores(x[0][:, t : t + 1].double(), x[1].double(), x[2][:, t : t + 1].double())[
            0, 0, : t + 1
        ]
        chosen = got[0, t].long()
        assert (chosen[1:] > chosen[:-1]).all() and chosen[-1] <= t
        left = torch.ones_like(scores, dtype=torch.bool)
        left[chosen] = False
        # Sums of 64 products in float32, each of some 130.
        assert scores[chosen].min() >= scores[left].max() - 0.01


def test_the_workspace_is_bounded() -> None:
    x = inputs(1, 20000, 20000, 2, 64, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    indices = lightning_topk(*x, 64)
    extra = torch.cuda.max_memory_allocated() - before - indices.nbytes
    assert extra <= 512 * 2**20 + 2**20


def test_equal_bits_and_a_cuda_graph() -> None:
    x = inputs(2, 1, 30000, 64, 128, dtype=torch.bfloat16)
    expected = lightning_topk(*x, 2048, query_start=29999)
    assert torch.equal(expected, lightning_topk(*x, 2048, query_start=29999))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = lightning_topk(*x, 2048, query_start=29999)
    got.fill_(-7)
    graph.replay()
    assert torch.equal(got, expected)


def test_one_graph_for_several_lengths() -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lightning_topk, fullgraph=True, dynamic=True, backend=counter)
    for T in (70, 130, 200):
        x = inputs(1, T, T, 4, 64, dtype=torch.bfloat16)
        assert torch.equal(compiled(*x, 16), lightning_topk(*x, 16))
    assert counter.frame_count == 1
    torch.library.opcheck(
        torch.ops.hybrid_flex.lightning_topk.default,
        (*inputs(1, 70, 70, 4, 64, dtype=torch.bfloat16), 16, True, 0, None, 1),
    )


class Exported(nn.Module):
    def forward(self, q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        return lightning_topk(q, k, w, 64)


class Rotated(nn.Module):
    def forward(self, q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        return lightning_topk(-q, -k, w * 2, 64)


def open_program(most: int | None, module: type[nn.Module] = Exported, HI: int = 4) -> torch.export.ExportedProgram:
    sizes = {0: Dim.DYNAMIC(min=1, max=4), 1: Dim.DYNAMIC(min=1) if most is None else Dim.DYNAMIC(min=1, max=most)}
    with torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):
        example = inputs(3, 131, 131, HI, 64, torch.bfloat16)
        program = torch.export.export(module(), example, dynamic_shapes=(sizes,) * 3)
    assert program.graph.find_nodes(op="call_function", target=torch.ops.hybrid_flex.lightning_topk_cuda.default), (
        "the operator whose kernels a package carries"
    )
    return program


OPEN_SIZES = [(1, 1), (2, 2), (1, 63), (3, 64), (1, 65), (2, 257), (1, 300)]


def test_an_exported_program_selects_what_eager_mode_does() -> None:
    module = open_program(None).module()
    for B, T in OPEN_SIZES:
        x = inputs(B, T, T, 4, 64, dtype=torch.bfloat16)
        assert torch.equal(module(*x), lightning_topk(*x, 64))


@pytest.mark.parametrize(("most", "workspace"), [(300, None), (300, 4 * 64 * 1300), (None, None)])
def test_one_compiled_graph_launches_the_kernels_for_every_size(
    most: int | None,
    workspace: int | None,
    packaged: Callable[[ExportedProgram], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled ahead of time from one example, in one block, in five of 64 queries, and in as many as there can be."""
    from hybrid_flex.kernels.dsa import topk as kernels

    launch: Any = kernels.lightning_topk
    if workspace is not None:
        monkeypatch.setattr(kernels, "lightning_topk", functools.partial(launch, workspace_bytes=workspace))
    monkeypatch.setattr(kernels, "MOST_BLOCKS", 6)
    compiled = packaged(open_program(most))
    for B, T in OPEN_SIZES:
        x = inputs(B, T, T, 4, 64, dtype=torch.bfloat16)
        assert torch.equal(compiled(*x), lightning_topk(*x, 64)), (B, T)


def test_blocks_of_a_compiled_graph_share_what_it_computes(
    packaged: Callable[[ExportedProgram], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_flex.kernels.dsa import topk as kernels

    launch = functools.partial(kernels.lightning_topk, workspace_bytes=4 * 128 * (4 * 600 + 64))
    monkeypatch.setattr(kernels, "lightning_topk", launch)
    compiled = packaged(open_program(600, Rotated, HI=64))
    x = inputs(1, 500, 500, 64, 64, dtype=torch.bfloat16)
    assert torch.equal(compiled(*x), lightning_topk(*x, 64))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    compiled(*x)
    # The negated queries and the scores of five blocks, but not five times the queries.
    assert torch.cuda.max_memory_allocated() - before < 2 * x[0].nbytes + 5 * 4 * 500 * 512


def test_a_compiled_decoding_step_cuts_rows_into_spans(packaged: Callable[[ExportedProgram], Any]) -> None:
    class Step(nn.Module):
        def forward(self, q: Tensor, k: Tensor, w: Tensor, lengths: Tensor) -> Tensor:
            return lightning_topk(q, k, w, 512, lengths=lengths)

    lengths = torch.tensor([70000, 3, 30000], device="cuda")
    B = {0: Dim.DYNAMIC(min=1)}
    with torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):
        example = (*inputs(3, 1, 70000, 4, 64, dtype=torch.bfloat16), lengths)
        compiled = packaged(torch.export.export(Step(), example, dynamic_shapes=(B,) * 4))
    for B in (1, 2, 3):
        x = (*inputs(B, 1, 70000, 4, 64, dtype=torch.bfloat16), lengths[:B].clone())
        assert torch.equal(compiled(*x), lightning_topk(*x[:3], 512, lengths=x[3])), B
        assert torch.equal(x[3], lengths[:B])
