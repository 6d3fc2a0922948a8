"""Decoding from a cache of fixed size, in one piece and in pages: it equals decoding from a state that grows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_flex import (
    CausalAttention,
    DeepSeekSparseAttention,
    DeepSeekSparseMLA,
    DSACache,
    KimiDeltaAttention,
)

Layer = DeepSeekSparseAttention | DeepSeekSparseMLA
INDEXER = {"topk": 8, "index_heads": 2, "index_head_dim": 8}


def gqa(kpool: int, **options: bool) -> Layer:
    sizes = {"num_heads": 4, "num_kv_heads": 2, "rope_dim": 4, "index_kpool": kpool}
    return DeepSeekSparseAttention(32, **sizes, **INDEXER, **options)  # type: ignore[arg-type]


def mla(kpool: int, **options: bool) -> Layer:
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8, "rope_dim": 4, "index_kpool": kpool}
    return DeepSeekSparseMLA(32, 4, **sizes, **INDEXER, **options)  # type: ignore[arg-type]


def make(kind: Callable[..., Layer], kpool: int, **options: bool) -> Layer:
    torch.manual_seed(0)
    return kind(kpool, **options).double().requires_grad_(False)


def prompts(layer: Layer, cache: DSACache, lengths: list[int]) -> list[Tensor]:
    """Prefill each sequence alone and put its state into the cache; return the prompts."""
    x = [torch.randn(1, length, 32, dtype=torch.float64) for length in lengths]
    for b, prompt in enumerate(x):
        if prompt.shape[1] > 0:
            layer.fill_cache(cache, b, layer(prompt)[1])
    return x


@pytest.mark.parametrize("page_size", [None, 8], ids=["one-piece", "pages"])
@pytest.mark.parametrize("kpool", [1, 4])
@pytest.mark.parametrize("kind", [gqa, mla])
def test_equals_whole_sequences(kind: Callable[..., Layer], kpool: int, page_size: int | None) -> None:
    layer = make(kind, kpool)
    cache = layer.init_cache(3, 43, page_size=page_size)
    x = prompts(layer, cache, [13, 0, 30])
    for T in (1, 1, 3, 1, 2, 1):
        new = torch.randn(3, T, 32, dtype=torch.float64)
        y = layer.decode(new, cache)
        x = [torch.cat((past, new[b : b + 1]), 1) for b, past in enumerate(x)]
        for b, whole in enumerate(x):
            torch.testing.assert_close(y[b], layer(whole)[0][0, -T:], rtol=1e-9, atol=1e-9)
    assert cache.lengths.tolist() == [22, 9, 39]


def test_pages_may_lie_anywhere_and_be_few() -> None:
    layer = make(mla, 1)
    whole, pages = layer.init_cache(2, 24), layer.init_cache(2, 24, page_size=8, num_pages=4)
    assert pages.block_table is not None and (pages.block_table == -1).all()
    pages.block_table[0, :2], pages.block_table[1, :1] = torch.tensor([2, 0]), 3
    x = torch.randn(2, 8, 32, dtype=torch.float64)
    for t in range(8):
        one, other = layer.decode(x[:, t : t + 1], whole), layer.decode(x[:, t : t + 1], pages)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert (pages.kv[1] == 0).all() and (pages.kv[0] == 0).all()


def test_a_sequence_without_a_page_disturbs_nobody() -> None:
    layer = make(gqa, 4)
    cache, alone = layer.init_cache(2, 16, page_size=8, num_pages=2), layer.init_cache(1, 16)
    assert cache.block_table is not None
    cache.block_table[1] = torch.tensor([1, 0])
    for _ in range(12):
        x = torch.randn(2, 1, 32, dtype=torch.float64)
        y = layer.decode(x, cache)
        torch.testing.assert_close(y[1:], layer.decode(x[1:], alone), rtol=1e-12, atol=1e-12)
        assert y.isfinite().all()


def test_what_was_there_before_does_not_matter() -> None:
    layer = make(gqa, 4)
    cache, fresh = layer.init_cache(2, 20), layer.init_cache(2, 20)
    for tensor in (cache.kv, cache.index_keys, cache.index_tail):
        tensor.normal_()
    for _ in range(9):
        x = torch.randn(2, 1, 32, dtype=torch.float64)
        assert torch.equal(layer.decode(x, cache), layer.decode(x, fresh))


def test_shared_indices() -> None:
    layer, sharing = make(mla, 1), make(mla, 1, share_indices=True)
    cache, other = layer.init_cache(2, 20, page_size=4), sharing.init_cache(2, 20)
    assert other.index_keys.shape[-1] == 0
    state = None
    for _ in range(12):
        x = torch.randn(2, 1, 32, dtype=torch.float64)
        _, indices = layer.decode_and_select(x, cache)
        y = sharing.decode(x, other, indices=indices)
        expected, state = sharing(x, state, indices=indices)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


def test_one_graph_and_no_gradient(fresh_dynamo: None) -> None:
    layer = make(mla, 4).requires_grad_(True)
    cache, eager = layer.init_cache(2, 24), layer.init_cache(2, 24)
    compiled = torch.compile(layer.decode, fullgraph=True)
    for _ in range(6):
        x = torch.randn(2, 1, 32, dtype=torch.float64)
        y = compiled(x, cache)
        # Cosines and the norm of index keys are float32, which compiled code rounds in another order.
        torch.testing.assert_close(y, layer.decode(x, eager), rtol=1e-6, atol=1e-6)
        assert not y.requires_grad and not cache.kv.requires_grad
    assert torch.equal(cache.lengths, eager.lengths)


def test_errors() -> None:
    layer = make(gqa, 4)
    cache = layer.init_cache(2, 8)

    def expect(message: str, call: Callable[[], object], kind: type[Exception] = ValueError) -> None:
        before = cache.lengths.clone()
        with pytest.raises(kind, match=message):
            call()
        assert torch.equal(cache.lengths, before)

    name = "DeepSeekSparseAttention"
    expect(f"{name}: batch_size must be at least 1, got 0", lambda: layer.init_cache(0, 8))
    expect(f"{name}: max_length must be at least 1, got 0", lambda: layer.init_cache(1, 0))
    expect(f"{name}: num_pages must come with page_size, got 3", lambda: layer.init_cache(1, 8, num_pages=3))
    expect(
        f"{name}: page_size must be a positive multiple of kpool = 4, got 6",
        lambda: layer.init_cache(1, 8, page_size=6),
    )
    expect(r"x must be \[B, T, D\] = \[2, \*, 32\]", lambda: layer.decode(torch.zeros(1, 1, 32), cache))
    state = layer(torch.randn(2, 5, 32, dtype=torch.float64))[1]
    expect("state must hold 1 sequences", lambda: layer.fill_cache(cache, 0, state))
    expanded = DeepSeekSparseMLA(32, 4, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=8, form="expanded", **INDEXER)
    message = "DeepSeekSparseMLA: form must be 'absorbed' to decode, got 'expanded'"
    expect(message, lambda: expanded.decode(torch.zeros(1, 1, 32), expanded.init_cache(1, 8)))
    sharing = make(gqa, 1, share_indices=True)
    one = torch.zeros(1, 1, 32, dtype=torch.float64)
    expect("indices must come from an earlier layer", lambda: sharing.decode(one, sharing.init_cache(1, 8)))
    for _ in range(4):
        layer.decode(torch.zeros(2, 2, 32, dtype=torch.float64), cache)
    expect("out of", lambda: layer.decode(torch.zeros(2, 1, 32, dtype=torch.float64), cache), IndexError)


def test_states_are_saved_and_loaded(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    """By `torch.save` and `torch.load`, which by default trusts no class it does not know."""
    layer, kda, dense = make(gqa, 4), KimiDeltaAttention(32, 2, 16).double(), CausalAttention(32, 4).double()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    states = [layer(x)[1], kda(x)[1], dense(x)[1], layer.init_cache(2, 8, page_size=4), dense.init_cache(2, 8)]
    torch.save(states, tmp_path / "states.pt")
    loaded = torch.load(tmp_path / "states.pt")
    for a, b in zip(loaded, states, strict=True):
        assert type(a) is type(b)
        for name, value in vars(b).items():
            torch.testing.assert_close(getattr(a, name), value, rtol=0, atol=0)
    source = "import sys, torch, hybrid_flex; print(*[type(s).__name__ for s in torch.load(sys.argv[1])])"
    kinds = ["DSAState", "KDAState", "KVState", "DSACache", "KVCache"]
    assert fresh_process(source, tmp_path / "states.pt").split() == kinds
