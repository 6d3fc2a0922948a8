"""Pooled index keys: against loops, the expansion to tokens, gradients, the compiler, errors."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hybrid_flex.ops.dsa import expand_pools, lightning_topk, pool_index_keys


@pytest.mark.parametrize(("length", "kpool"), [(11, 4), (8, 4), (3, 4), (5, 1), (0, 2)])
def test_pool_against_loop(length: int, kpool: int) -> None:
    torch.manual_seed(0)
    keys, gate = torch.randn(2, length, 3, dtype=torch.float64), torch.randn(2, length, 3, dtype=torch.float64)
    ape = torch.randn(kpool, 3, dtype=torch.float64)
    pooled = pool_index_keys(keys, gate, ape, kpool)
    assert pooled.shape == (2, length // kpool, 3)
    for b in range(2):
        for p in range(length // kpool):
            for c in range(3):
                weights = [math.exp(gate[b, p * kpool + i, c] + ape[i, c]) for i in range(kpool)]
                average = sum(x * keys[b, p * kpool + i, c].item() for i, x in enumerate(weights)) / sum(weights)
                assert pooled[b, p, c].item() == pytest.approx(average, rel=1e-12)


def test_pool_gradients() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 7, 2), (1, 7, 2), (3, 2))]
    assert torch.autograd.gradcheck(lambda k, g, a: pool_index_keys(k, g, a, 3), inputs)


def test_pool_low_precision_sums_in_float32() -> None:
    torch.manual_seed(0)
    keys, gate, ape = torch.randn(1, 8, 4).bfloat16(), torch.randn(1, 8, 4).bfloat16(), torch.randn(4, 4)
    expected = pool_index_keys(keys.float(), gate.float(), ape, 4).bfloat16()
    assert torch.equal(pool_index_keys(keys, gate, ape, 4), expected)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 9), st.integers(1, 5), st.integers(0, 99))
def test_expand_against_loop(kpool: int, num_queries: int, query_start: int, topk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_pools = (query_start + num_queries) // kpool
    pools = torch.full((1, num_queries, topk), -1, dtype=torch.int32)
    for t in range(num_queries):
        visible = min(num_pools, (query_start + t + 1) // kpool)
        number = min(topk, visible)
        pools[0, t, :number] = torch.randperm(visible, generator=generator)[:number].sort().values
    tokens = expand_pools(pools, kpool, query_start=query_start)
    assert tokens.dtype == torch.int32 and tokens.shape == (1, num_queries, topk * kpool + kpool - 1)
    for t in range(num_queries):
        expected = [p * kpool + i for p in pools[0, t].tolist() if p >= 0 for i in range(kpool)]
        expected += range((query_start + t + 1) // kpool * kpool, query_start + t + 1)
        assert tokens[0, t].tolist() == expected + [-1] * (tokens.shape[2] - len(expected))


def test_all_pools_selected_is_every_visible_token() -> None:
    indices = lightning_topk(torch.randn(1, 13, 2, 4), torch.randn(1, 3, 4), torch.randn(1, 13, 2), 3, kpool=4)
    tokens = expand_pools(indices, 4)
    for t in range(13):
        assert [s for s in tokens[0, t].tolist() if s >= 0] == list(range(t + 1))


def test_fullgraph_one_graph_for_several_lengths(fresh_dynamo: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    def both(
        keys: torch.Tensor, gate: torch.Tensor, ape: torch.Tensor, pools: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return pool_index_keys(keys, gate, ape, 4), expand_pools(pools, 4)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, fullgraph=True, backend=counter, dynamic=True)
    for length in (29, 40, 43, 16):
        keys, gate, ape = torch.randn(2, length, 6), torch.randn(2, length, 6), torch.randn(4, 6)
        pools = lightning_topk(
            torch.randn(2, length, 2, 6), torch.randn(2, length // 4, 6), torch.randn(2, length, 2), 3, kpool=4
        )
        for got, want in zip(compiled(keys, gate, ape, pools), both(keys, gate, ape, pools), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_errors() -> None:
    keys = torch.randn(1, 8, 4)
    with pytest.raises(ValueError, match=r"pool_index_keys: kpool must be at least 1, got 0"):
        pool_index_keys(keys, keys, keys[0], 0)
    with pytest.raises(ValueError, match=r"pool_index_keys: ape must be \[kpool, DI\] = \[4, 4\], got shape \(3, 4\)"):
        pool_index_keys(keys, keys, torch.randn(3, 4), 4)
    with pytest.raises(ValueError, match=r"pool_index_keys: gate must be"):
        pool_index_keys(keys, keys[:, 1:], torch.randn(4, 4), 4)
    with pytest.raises(TypeError, match=r"expand_pools: pool_indices must have dtype int32, int64, got float32"):
        expand_pools(keys, 4)
    with pytest.raises(ValueError, match=r"expand_pools: pool_indices must be \[B, T, Jp\]"):
        expand_pools(torch.zeros(2, 3, dtype=torch.int32), 4)
