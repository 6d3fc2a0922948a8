"""Needles in a long sequence: the layer finds keys planted at known places and returns what lies under them.

Weights are written by hand.  A token is [code | payload | question]: the indexer and the attention compare the question
of a query with the codes of the past, and the attention returns the payload.  Codes are random signs; a needle's code
is asked for by the questions after it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_flex import DeepSeekSparseAttention, DeepSeekSparseMLA
from hybrid_flex.layers.sparse import SparseLayer
from hybrid_flex.ops import expand_pools

E = 128
"""Channels of a code, a payload and a question."""
POSITIONS = (3, 0.1, 0.37, 0.5, 0.92)
"""Places of the needles: a token, or a part of the length."""


def dsa(kpool: int) -> SparseLayer:
    layer = DeepSeekSparseAttention(3 * E, 1, head_dim=E, topk=64, index_heads=1, index_head_dim=E, index_kpool=kpool)
    code, payload, question = torch.eye(3 * E).split(E)
    with torch.no_grad():
        layer.q_proj.weight.copy_(question)
        layer.k_proj.weight.copy_(code)
        layer.v_proj.weight.copy_(payload)
        layer.o_proj.weight.copy_(payload.T)
    return asks_for_codes(layer)


def mla(kpool: int) -> SparseLayer:
    """The latent is [code | payload], whose norm is one because every code and payload has the same length."""
    layer = DeepSeekSparseMLA(
        3 * E, 1, kv_lora_rank=2 * E, qk_nope_head_dim=E, v_head_dim=E, topk=64, index_heads=1, index_head_dim=E,
        index_kpool=kpool,
    )  # fmt: skip
    code, payload, question = torch.eye(3 * E).split(E)
    with torch.no_grad():
        layer.q_proj.weight.copy_(question)
        layer.kv_a_proj.weight.copy_(torch.cat((code, payload)))
        layer.kv_b_proj.weight.copy_(torch.eye(2 * E))
        layer.o_proj.weight.copy_(payload.T)
    return asks_for_codes(layer)


def asks_for_codes(layer: SparseLayer) -> SparseLayer:
    code, _, question = torch.eye(3 * E).split(E)
    indexer = layer.indexer
    assert indexer is not None
    with torch.no_grad():
        indexer.wq.weight.copy_(question)
        indexer.wk.weight.copy_(code)
        # Positive whatever the token: the payload's first channel is one everywhere.
        indexer.weights_proj.weight.zero_()[:, E] = 1.0
        if indexer.kpool > 1:
            indexer.pool_gate.weight.zero_()
    return layer.requires_grad_(False)


def haystack(T: int, device: str, dtype: torch.dtype) -> tuple[Tensor, list[int], Tensor]:
    """Return x ``[1, T, 3 E]``, the needles' places and their payloads; the last tokens ask for one needle each."""
    generator = torch.Generator().manual_seed(0)
    code, payload = (torch.randint(0, 2, (T, E), generator=generator) * 2.0 - 1 for _ in range(2))
    payload[:, 0] = 1.0
    question = torch.zeros(T, E)
    places = [int(p * T) if p < 1 else int(p) for p in POSITIONS]
    for i, place in enumerate(places):
        question[T - len(places) + i] = code[place]
    x = torch.cat((code, payload, 4 * question), -1)
    return x[None].to(device, dtype), places, payload[places]


def check(layer: SparseLayer, T: int, device: str, dtype: torch.dtype) -> None:
    layer = layer.to(device, dtype)
    x, places, payload = haystack(T, device, dtype)
    y, _, indices, _ = layer.attend(x)
    for i, place in enumerate(places):
        assert place in indices[0, T - len(places) + i].tolist()
    # A needle's logit is 4 * 128 / 128^0.5 = 45, those of the others are 4 times a standard normal number.
    got = y[0, -len(places) :, E : 2 * E].float().cpu()
    assert (got - payload).abs().max() < 0.05


@pytest.mark.parametrize("kpool", [1, 4])
@pytest.mark.parametrize("make", [dsa, mla])
def test_needles_are_found(make, kpool: int) -> None:
    check(make(kpool), 1003, "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("kpool", [1, 4])
@pytest.mark.parametrize("make", [dsa, mla])
def test_needles_are_found_at_128k(make, kpool: int) -> None:
    check(make(kpool), 131072, "cuda", torch.bfloat16)


def test_a_key_too_far_is_not_seen() -> None:
    """The token that asks and the ones after it hold the code, too, and are not found before their time."""
    x, _, _ = haystack(400, "cpu", torch.float32)
    t = 200
    x[0, t, 2 * E :] = 4 * x[0, t + 1, :E]
    _, _, indices, _ = dsa(1).attend(x)
    assert t + 1 not in indices[0, t].tolist() and indices[0, t].max() <= t
    x[0, t + 1, 2 * E :] = 4 * x[0, t + 1, :E]
    assert t + 1 in dsa(1).attend(x)[2][0, t + 1].tolist()


def test_a_dropped_tail_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The needle lies in the incomplete pool: without the tail the layer misses it."""
    T = 402
    x, _, _ = haystack(T, "cpu", torch.float32)
    x[0, T - 1, 2 * E :] = 4 * x[0, T - 2, :E]

    def answer() -> Tensor:
        return dsa(4).attend(x)[0][0, -1, E : 2 * E]

    assert (answer() - x[0, T - 2, E : 2 * E]).abs().max() < 0.05

    def without_tail(pools: Tensor, kpool: int, *, query_start: int) -> Tensor:
        width = pools.shape[-1] * kpool
        used = (pools >= 0).sum(-1, keepdim=True) * kpool
        return expand_pools(pools, kpool, query_start=query_start)[..., :width].where(torch.arange(width) < used, -1)

    monkeypatch.setattr("hybrid_flex.layers.indexer.expand_pools", without_tail)
    assert (answer() - x[0, T - 2, E : 2 * E]).abs().max() > 0.5
