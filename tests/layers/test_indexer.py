"""The indexer as a module: its selection, its layouts, its pools, and its float32 norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hybrid_flex.layers import LightningIndexer
from hybrid_flex.ops import lightning_topk


def make(**options: Any) -> LightningIndexer:
    torch.manual_seed(0)
    return LightningIndexer(32, **{"num_heads": 8, "head_dim": 16, "topk": 8, **options})


@torch.no_grad()
@pytest.mark.parametrize("layout", ["half", "interleaved", "none"])
def test_selects_what_the_equations_select(layout: str) -> None:
    indexer = make(rope_dim=8, rope_layout=layout).double()
    torch.nn.init.normal_(indexer.k_norm.weight)
    x = torch.randn(40, 32, dtype=torch.float64)
    p = indexer.state_dict()

    def rotate(y: torch.Tensor) -> torch.Tensor:
        if layout == "none":
            return y
        angle = torch.arange(40).double()[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
        first = list(range(4)) if layout == "half" else [0, 2, 4, 6]
        second = [i + 4 for i in first] if layout == "half" else [1, 3, 5, 7]
        out = y.clone()
        for pair, (a, b) in enumerate(zip(first, second, strict=True)):
            cos, sin = angle[:, pair, None].cos(), angle[:, pair, None].sin()
            out[..., a] = y[..., a] * cos - y[..., b] * sin
            out[..., b] = y[..., b] * cos + y[..., a] * sin
        return out

    q = rotate((x @ p["wq.weight"].T).view(40, 8, 16))
    k = F.layer_norm(x @ p["wk.weight"].T, (16,), p["k_norm.weight"], p["k_norm.bias"], 1e-6)
    k = rotate(k[:, None])[:, 0]
    w = x @ p["weights_proj.weight"].T * 8**-0.5 * 16**-0.5
    scores = torch.einsum("th,ths->ts", w, torch.einsum("thd,sd->ths", q, k).relu())
    indices, _ = indexer(x[None])
    for t in range(40):
        want = scores[t, : t + 1].topk(min(8, t + 1)).indices.sort().values
        assert indices[0, t, : len(want)].tolist() == want.tolist()
        assert (indices[0, t, len(want) :] == -1).all()


@torch.no_grad()
def test_the_layout_matters() -> None:
    x = torch.randn(2, 60, 32)
    half, interleaved = (make(rope_dim=16, rope_layout=layout)(x)[0] for layout in ("half", "interleaved"))
    assert (half != interleaved).float().mean() > 0.05


@torch.no_grad()
def test_pools_select_whole_pools_and_the_tail() -> None:
    indexer, x = make(kpool=4, topk=8), torch.randn(1, 30, 32)
    torch.nn.init.normal_(indexer.pool_ape)
    indices, index_keys = indexer(x)
    assert index_keys.shape == (1, 30, 32) and indices.shape == (1, 30, 11)
    for t in range(30):
        chosen = [i for i in indices[0, t].tolist() if i >= 0]
        complete, tail = (t + 1) // 4, list(range((t + 1) // 4 * 4, t + 1))
        assert chosen == sorted(set(chosen)) and chosen[len(chosen) - len(tail) :] == tail
        pools = {i // 4 for i in chosen[: len(chosen) - len(tail)]}
        assert len(pools) == min(2, complete)
        assert chosen[: len(chosen) - len(tail)] == [4 * pool + i for pool in sorted(pools) for i in range(4)]


@torch.no_grad()
@pytest.mark.parametrize("kpool", [1, 4], ids=["kpool1", "kpool4"])
def test_a_cache_continues_the_selection(kpool: int) -> None:
    indexer, x = make(kpool=kpool, rope_dim=8), torch.randn(2, 41, 32)
    whole, whole_keys = indexer(x)
    first, keys = indexer(x[:, :19])
    second, keys = indexer(x[:, 19:], keys)
    assert torch.equal(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(keys, whole_keys)


def test_the_key_norm_stays_in_float32() -> None:
    indexer = make().to(torch.bfloat16)
    assert indexer.k_norm.weight.dtype == indexer.k_norm.bias.dtype == torch.float32
    assert indexer.wk.weight.dtype == torch.bfloat16
    assert indexer.k_norm(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 0}, "topk must be positive, got 0"),
        ({"topk": 6, "kpool": 4}, "topk must be a multiple of kpool = 4, got 6"),
        ({"rope_dim": 18}, "rope_dim must be between 0 and head_dim = 16, got 18"),
        ({"rope_dim": 3}, "rope_dim must be even, got 3"),
        ({"quantization": "int4"}, "quantization must be one of None, 'fp8', got 'int4'"),
        ({"rope_layout": "thirds"}, "rope_layout must be one of 'half', 'interleaved', 'none', got 'thirds'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LightningIndexer: {message}"):
        make(**options)


def test_eight_bits_select_almost_the_same() -> None:
    indexer, x = make(topk=16), torch.randn(1, 90, 32)
    exact, cache = indexer(x)
    indexer.quantization = "fp8"
    rounded, _ = indexer(x)
    q_idx, w, keys = indexer.project(x, torch.arange(90))
    assert torch.equal(rounded, lightning_topk(q_idx, keys, w, 16, quantization="fp8")) and torch.equal(keys, cache)
    common = (rounded[..., None] == exact[..., None, :]).any(-1).float().mean()
    assert 0.9 < common < 1.0 and "quantization=fp8" in repr(indexer)
