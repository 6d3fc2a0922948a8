"""The two mixers together: how they are joined, and what may not be joined."""

from __future__ import annotations

import pytest
import torch

from hybrid_flex import DSACache
from hybrid_flex.layers import (
    DeepSeekSparseAttention,
    DeepSeekSparseMLA,
    KimiDeltaAttention,
    ParallelHybrid,
    SequentialHybrid,
    SwiGLU,
)


def parts(hidden_size: int = 32) -> tuple[KimiDeltaAttention, DeepSeekSparseAttention]:
    torch.manual_seed(0)
    dsa = DeepSeekSparseAttention(hidden_size, 4, topk=8, index_heads=3, index_head_dim=8)
    return KimiDeltaAttention(hidden_size, 2, 16), dsa


@torch.no_grad()
def test_sequential_is_two_residual_layers() -> None:
    kda, dsa = parts()
    layer, x = SequentialHybrid(kda, dsa), torch.randn(2, 20, 32)
    torch.nn.init.normal_(layer.dsa_norm.weight)
    h = x + kda(torch.nn.functional.rms_norm(x, (32,), eps=1e-5))[0]
    y = h + dsa(torch.nn.functional.rms_norm(h, (32,), layer.dsa_norm.weight, 1e-5))[0]
    torch.testing.assert_close(layer(x)[0], y, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_parallel_merges_by_a_gate_that_begins_even() -> None:
    kda, dsa = parts()
    layer, x = ParallelHybrid(kda, dsa), torch.randn(2, 20, 32)
    h = torch.nn.functional.rms_norm(x, (32,), eps=1e-5)
    torch.testing.assert_close(layer(x)[0], x + 0.5 * kda(h)[0] + 0.5 * dsa(h)[0], rtol=1e-5, atol=1e-6)
    torch.nn.init.normal_(layer.gate_proj.weight)
    gate = torch.sigmoid(h @ layer.gate_proj.weight.T + layer.gate_proj.bias)
    torch.testing.assert_close(layer(x)[0], x + gate * kda(h)[0] + (1 - gate) * dsa(h)[0], rtol=1e-5, atol=1e-6)


def test_the_gate_learns() -> None:
    layer = ParallelHybrid(*parts())
    layer(torch.randn(2, 20, 32))[0].square().mean().backward()
    assert layer.gate_proj.weight.grad.any() and layer.gate_proj.bias.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("kind", [SequentialHybrid, ParallelHybrid])
def test_steps_into_a_reserved_cache_equal_the_whole(kind: type) -> None:
    layer, x = kind(*parts()), torch.randn(2, 40, 32)
    whole, _ = layer(x)
    for begin in (0, 25):
        _, state = layer(x[:, :begin]) if begin else (None, layer.init_state(2))
        state = layer.reserve(state, 40)
        cache = state[1]
        assert isinstance(cache, DSACache) and cache.kv.shape[1] == 40
        for t in range(begin, 40):
            y_t, state = layer.step(x[:, t], state)
            torch.testing.assert_close(y_t, whole[:, t], rtol=1e-5, atol=5e-6)
        assert state[1] is cache and cache.lengths.tolist() == [40, 40]


def test_latent_attention_fits_too() -> None:
    mla = DeepSeekSparseMLA(32, 4, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=8, topk=8, index_head_dim=8)
    y, (_, cache) = SequentialHybrid(parts()[0], mla)(torch.randn(1, 12, 32))
    assert y.isfinite().all() and cache.kv.shape == (1, 12, 1, 16)


@pytest.mark.parametrize("kind", [SequentialHybrid, ParallelHybrid])
def test_what_does_not_fit_is_refused(kind: type) -> None:
    with pytest.raises(ValueError, match=r"dsa must have the hidden_size of kda, 32, got hidden_size 64"):
        kind(parts()[0], parts(64)[1])
    shared = DeepSeekSparseAttention(32, 4, topk=8, share_indices=True)
    with pytest.raises(ValueError, match="dsa must have its own indexer"):
        kind(parts()[0], shared)
    layer = kind(*parts())
    _, state = layer(torch.randn(1, 9, 32), cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="state must hold a cache, got the state of packed sequences"):
        layer.step(torch.randn(1, 32), state)
    with pytest.raises(ValueError, match="reserve: state must hold a cache, got the state of packed sequences"):
        layer.reserve(state, 20)
    _, state = layer(torch.randn(1, 9, 32))
    with pytest.raises(ValueError, match="max_length must be at least 9, the tokens held, got 8"):
        layer.reserve(state, 8)
    with pytest.raises(ValueError, match="reserve: state must hold a DSAState, which grows, got a DSACache"):
        layer.reserve(layer.reserve(state, 12), 20)


def test_swiglu_is_its_equation() -> None:
    mlp, x = SwiGLU(8, 12), torch.randn(3, 8)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T)
    with pytest.raises(ValueError, match="SwiGLU: mlp_size must be positive, got 0"):
        SwiGLU(8, 0)
