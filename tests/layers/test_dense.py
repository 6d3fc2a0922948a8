"""Dense attention's cache of fixed size: decoding from it equals decoding from a state that grows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid_flex import CausalAttention, KVCache, KVState
from hybrid_flex.layers.dense import cached_attention

SHAPES: dict[str, dict[str, int]] = {
    "mha": {},
    "gqa-rope": {"num_kv_heads": 2, "rope_dim": 4},
    "mqa-rope": {"num_kv_heads": 1, "rope_dim": 8},
    "gqa-wide-heads": {"num_kv_heads": 2, "head_dim": 12},
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def make(shape: str = "gqa-rope", dtype: torch.dtype = torch.float64) -> CausalAttention:
    torch.manual_seed(0)
    return CausalAttention(32, 4, **SHAPES[shape]).to(dtype).requires_grad_(False)


def random(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def test_attention_equals_a_loop() -> None:
    """Query by query, head by head, in float64, over rows up to the query's own."""
    torch.manual_seed(0)
    q, k, v = random(2, 3, 6, 5), random(2, 11, 2, 5), random(2, 11, 2, 7)
    positions = torch.tensor([[0, 1, 2], [8, 9, 10]])
    o = cached_attention(q, k, v, positions, scale=0.3)
    assert o.shape == (2, 3, 6, 7)
    for b in range(2):
        for t in range(3):
            for h in range(6):
                seen = int(positions[b, t]) + 1
                logits = [0.3 * float(q[b, t, h].dot(k[b, s, h // 3])) for s in range(seen)]
                weights = torch.tensor(logits, dtype=torch.float64).exp()
                want = sum(weights[s] / weights.sum() * v[b, s, h // 3] for s in range(seen))
                torch.testing.assert_close(o[b, t, h], want, rtol=1e-12, atol=1e-12)


@every_shape
def test_several_lengths_in_a_batch_equal_whole_sequences(shape: str) -> None:
    layer = make(shape)
    cache = layer.init_cache(3, 39)
    x = [random(1, length, 32) for length in (13, 0, 30)]
    for b, prompt in enumerate(x):
        if prompt.shape[1] > 0:
            layer.fill_cache(cache, b, layer(prompt)[1])
    for T in (1, 1, 3, 1, 2, 1):
        new = random(3, T, 32)
        y = layer.decode(new, cache)
        x = [torch.cat((past, new[b : b + 1]), 1) for b, past in enumerate(x)]
        for b, whole in enumerate(x):
            torch.testing.assert_close(y[b], layer(whole)[0][0, -T:], rtol=1e-9, atol=1e-9)
    assert cache.lengths.tolist() == [22, 9, 39], "the longest ends where the cache does"


@every_shape
def test_steps_equal_those_on_a_state_that_grows(shape: str) -> None:
    layer = make(shape)
    _, state = layer(random(2, 10, 32))
    cache = layer.reserve(state, 20)
    memory = cache.kv.data_ptr()
    for t in range(10):
        x_t = random(2, 32)
        expected, state = layer.step(x_t, state)
        y_t, new = layer.step(x_t, cache)
        torch.testing.assert_close(y_t, expected, rtol=1e-9, atol=1e-9)
        assert new is cache and cache.kv.data_ptr() == memory and cache.lengths.tolist() == [11 + t] * 2
    torch.testing.assert_close(cache.kv, state.kv, rtol=1e-12, atol=1e-12)


def test_what_was_there_before_does_not_matter() -> None:
    layer = make()
    cache, fresh = layer.init_cache(2, 20), layer.init_cache(2, 20)
    cache.kv.normal_(std=100)
    for _ in range(9):
        x = random(2, 1, 32)
        assert torch.equal(layer.decode(x, cache), layer.decode(x, fresh))
    # A sequence that ends makes room for another.
    cache.lengths[0], other = 0, layer.init_cache(1, 20)
    for _ in range(5):
        x = random(2, 1, 32)
        torch.testing.assert_close(layer.decode(x, cache)[:1], layer.decode(x[:1], other), rtol=1e-12, atol=1e-12)


def test_low_precision_keeps_its_dtype_and_its_budget() -> None:
    exact, low = make(), make(dtype=torch.bfloat16)
    exact.load_state_dict(low.state_dict())
    x = random(2, 24, 32).bfloat16()
    cache, reference = low.reserve(low(x[:, :16])[1], 24), exact(x.double())[0][:, 16:]
    assert cache.kv.dtype == torch.bfloat16
    y = low.decode(x[:, 16:], cache)
    assert y.dtype == torch.bfloat16
    plain_error = (low(x)[0][:, 16:].double() - reference).norm()
    assert (y.double() - reference).norm() < 2 * plain_error


def test_one_graph_and_no_gradient(fresh_dynamo: None) -> None:
    layer = make().requires_grad_(True)
    cache, eager = layer.init_cache(2, 24), layer.init_cache(2, 24)
    compiled = torch.compile(layer.decode, fullgraph=True)
    for _ in range(6):
        x = random(2, 1, 32)
        y = compiled(x, cache)
        # Cosines are float32, which compiled code rounds in another order.
        torch.testing.assert_close(y, layer.decode(x, eager), rtol=1e-6, atol=1e-6)
        assert not y.requires_grad and not cache.kv.requires_grad
    assert torch.equal(cache.lengths, eager.lengths)


def test_poisoned_memory(nan_memory: None) -> None:
    layer = make()
    cache = layer.reserve(layer(random(2, 5, 32))[1], 9)
    assert cache.kv.isfinite().all() and layer.decode(random(2, 2, 32), cache).isfinite().all()


def test_errors() -> None:
    layer = make()
    cache, name = layer.init_cache(2, 8), "CausalAttention"
    state = layer(random(2, 5, 32))[1]

    def expect(message: str, call: Callable[[], object], kind: type[Exception] = ValueError) -> None:
        before = cache.lengths.clone()
        with pytest.raises(kind, match=message):
            call()
        assert torch.equal(cache.lengths, before)

    expect(f"{name}: batch_size must be at least 1, got 0", lambda: layer.init_cache(0, 8))
    expect(f"{name}: max_length must be at least 1, got 0", lambda: layer.init_cache(1, 0))
    expect(rf"{name}: x must be \[B, T, D\] = \[2, \*, 32\]", lambda: layer.decode(random(1, 1, 32), cache))
    expect(f"{name}: max_length must be at least 5, the tokens held, got 4", lambda: layer.reserve(state, 4))
    expect("state must hold 1 sequences", lambda: layer.fill_cache(cache, 0, state))
    long = KVState(random(1, 9, 2, 16))
    expect(
        f"{name}: state must hold at most 8 tokens, the cache's length, got 9", lambda: layer.fill_cache(cache, 0, long)
    )
    foreign = KVCache(random(2, 8, 4, 16), torch.zeros(2, dtype=torch.int32))
    expect(rf"{name}: cache.kv must be \[N, \*, 2, 16\], got shape", lambda: layer.decode(random(2, 1, 32), foreign))
    grows = f"{name}: state must be a state that grows, which `decode` does not need, got KVCache"
    expect(grows, lambda: layer(random(2, 3, 32), cache))
    expect(grows, lambda: layer.reserve(cache, 20))  # type: ignore[arg-type]
    for _ in range(4):
        layer.decode(random(2, 2, 32), cache)
    expect("out of", lambda: layer.decode(random(2, 1, 32), cache), IndexError)


@pytest.mark.gpu
def test_a_step_is_captured_in_a_cuda_graph() -> None:
    layer = make(dtype=torch.float32).cuda()
    prompt = torch.randn(2, 10, 32, device="cuda")
    cache, eager = (layer.reserve(layer(prompt)[1], 40) for _ in range(2))
    x = torch.randn(2, 1, 32, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer.decode(x, layer.init_cache(2, 40))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer.decode(x, cache)
    for _ in range(12):
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, layer.decode(x, eager))
    assert cache.lengths.tolist() == [22, 22]
