"""FLOP formulas: every operator has one, each equals a count by hand, and a whole model is counted right."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from hybrid_flex import CausalAttention, HybridConfig, HybridLanguageModel, profiling
from hybrid_flex.ops import (
    chunk_kda,
    fused_recurrent_kda,
    gated_rms_norm,
    indexer_kl_loss,
    lightning_topk,
    short_conv,
    sparse_attention,
)
from hybrid_flex.profiling.flops import visible_pairs

OURS = sorted({s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("hybrid_flex::")})
CPU_FORMS = "sparse_attention_gather", "sparse_attention_backward"


def counted(call: Callable[[], Any]) -> dict[str, int]:
    """Count with torch's counter; operators by name, those without FLOP left out."""
    with FlopCounterMode(display=False) as counter:
        call()
    found = counter.get_flop_counts().get("Global", {})
    return {str(name).replace("hybrid_flex.", ""): flop for name, flop in found.items() if flop}


def products(*shapes: tuple[int, int, int]) -> int:
    """Add up products of ``[m, k]`` by ``[k, n]``, given as (m, n, k)."""
    return sum(2 * m * n * k for m, n, k in shapes)


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.requires_grad_() for x in tensors]


@pytest.mark.parametrize("name", OURS)
def test_every_operator_has_a_formula(name: str) -> None:
    assert getattr(torch.ops.hybrid_flex, name.removeprefix("hybrid_flex::")) in flop_registry


def test_the_formula_of_another_stays() -> None:
    operator = torch.ops.hybrid_flex.short_conv
    mine = flop_registry[operator]
    profiling.flops._register(lambda *x, **y: 7, operator)  # type: ignore[attr-defined]
    assert flop_registry[operator] is mine


# One chunk of C tokens of one head: the equations of ops/kda/chunk.py, product by product.


def chunk_by_hand(C: int, K: int, V: int) -> int:
    solve = C * C * (K + V)  # substitution: row i takes i multiply-adds per column, C^2 / 2 of them
    return solve + products((C, C, K), (C, C, K), (C, V, K), (C, V, K), (C, V, C), (K, V, C))


def chunk_backward_by_hand(C: int, K: int, V: int) -> int:
    solve = C * C * (K + V)
    again = solve + products((C, C, K), (C, C, K), (C, V, K), (K, V, C))  # Aqk, L, w S, the states
    scan = products((C, V, C), (K, V, C), (C, V, K), (K, V, C))  # Aqk^T dO, (P q)^T dO, (E k) dS, w^T d_v_new
    right = products((C, K, V)) + solve + products((C, C, V), (C, C, K))  # -d_v_new S^T, its solve, dL
    outputs = products((C, C, V), (C, K, V), (C, K, V))  # dAqk, d(P q), d(E k)
    inside = products(*[(C, K, C)] * 4)  # dq and dk by Aqk, d(beta k) and dk by L
    return again + scan + right + outputs + inside


@pytest.mark.parametrize(("T", "chunk_size"), [(64, 64), (96, 32), (7, 16)])
def test_chunk_kda(T: int, chunk_size: int) -> None:
    B, H, HV, K, V = 2, 1, 2, 16, 24
    q, k = leaves(torch.randn(B, T, H, K), torch.randn(B, T, H, K))
    v, g, beta = leaves(torch.randn(B, T, HV, V), -torch.rand(B, T, HV, K), torch.rand(B, T, HV))
    found = counted(lambda: chunk_kda(q, k, v, g, beta, chunk_size=chunk_size)[0].sum().backward())
    C = min(chunk_size, T)
    number = B * HV * T // C
    assert found == {
        "chunk_kda": number * chunk_by_hand(C, K, V),
        "chunk_kda_backward": number * chunk_backward_by_hand(C, K, V),
    }


def test_what_the_forward_kept_is_not_counted_again() -> None:
    B, T, H, K, V, C = 1, 128, 2, 16, 24, 64
    formula = flop_registry[torch.ops.hybrid_flex.chunk_kda_backward]
    o, k = (B, T, H, V), (B, T, H, K)
    given = (o, None, o, k, k, o, k, (B, T, H), None, None, *[False] * 4, None, None, None, 1.0, False, C)
    without = products((C, C, K), (C, C, K)) * B * H * T // C
    assert formula(*given) - formula(*given, (1, C, C), (1, C, C)) == without
    assert formula(*given) == chunk_backward_by_hand(C, K, V) * B * H * T // C


def test_recurrent_kda() -> None:
    B, T, H, K, V = 3, 2, 2, 16, 24
    k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    found = counted(lambda: fused_recurrent_kda(k, k, v, -torch.rand(B, T, H, K), torch.rand(B, T, H)))
    assert found == {"fused_recurrent_kda": B * T * H * products((1, V, K), (K, V, 1), (1, V, K))}


@pytest.mark.parametrize("activation", ["silu", None])
def test_short_conv_counts_like_a_convolution(activation: str | None) -> None:
    B, T, D, W = 2, 20, 6, 4
    x, weight = leaves(torch.randn(B, T, D), torch.randn(D, W))
    found = counted(lambda: short_conv(x, weight, activation=activation)[0].sum().backward())
    assert found == {
        "short_conv": 2 * B * T * D * W,
        "short_conv_backward": (3 if activation else 2) * 2 * B * T * D * W,
    }
    padded = torch.nn.functional.pad(x.detach().mT, (W - 1, 0))
    theirs = counted(lambda: torch.nn.functional.conv1d(padded, weight.detach()[:, None], groups=D))
    assert theirs == {"aten.convolution": found["short_conv"]}


def test_norms_count_nothing_as_in_torch() -> None:
    x, gate, weight = leaves(torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.ones(8))
    assert counted(lambda: gated_rms_norm(x, gate, weight).sum().backward()) == {}
    assert counted(lambda: torch.nn.RMSNorm(8)(x).sum().backward()) == {}


def brute_pairs(T: int, S: int, causal: bool, start: int, kpool: int, beyond: int) -> int:
    seen = [min(S, (start + t + 1) // kpool) if causal else S for t in range(T)]
    return sum(n for n in seen if n > beyond)


def test_visible_pairs_by_brute_force() -> None:
    sizes = itertools.product((1, 5, 9), (1, 4, 30), (True, False), (0, 3), (1, 4), (0, 1, 6))
    for T, S, causal, start, kpool, beyond in sizes:
        found = visible_pairs(T, S, causal=causal, query_start=start, kpool=kpool, beyond=beyond)
        assert found == brute_pairs(T, S, causal, start, kpool, beyond), (T, S, causal, start, kpool, beyond)
    packed = visible_pairs(11, 11, num_sequences=3, beyond=2)
    assert packed == sum(brute_pairs(T, T, True, 0, 1, 2) for T in (3, 4, 4))


@pytest.mark.parametrize("kpool", [1, 2])
def test_selection_counts_what_has_to_be_scored(kpool: int) -> None:
    B, T, S, HI, DI, topk = 2, 30, 40, 3, 8, 4
    q, k, w = torch.randn(B, T, HI, DI), torch.randn(B, S // kpool, DI), torch.randn(B, T, HI)
    found = counted(lambda: lightning_topk(q, k, w, topk, query_start=10, kpool=kpool))
    pairs = brute_pairs(T, S // kpool, True, 10, kpool, topk)
    assert found == {"lightning_topk": B * pairs * products((HI, 1, DI), (1, 1, HI))}
    assert counted(lambda: lightning_topk(q, k, w, S)) == {}, "everything is selected, nothing is scored"


def test_a_full_cache_and_packed_sequences() -> None:
    HI, DI, topk = 2, 8, 3
    each = products((HI, 1, DI), (1, 1, HI))
    q, w = torch.randn(2, 1, HI, DI), torch.randn(2, 1, HI)
    table = torch.tensor([[0, 1], [2, 3]])
    found = counted(
        lambda: lightning_topk(q, torch.randn(4, 5, DI), w, topk, lengths=torch.tensor([7, 9]), block_table=table)
    )
    assert found == {"lightning_topk": 2 * 10 * each}
    q, w = torch.randn(1, 12, HI, DI), torch.randn(1, 12, HI)
    found = counted(lambda: lightning_topk(q, torch.randn(1, 12, DI), w, topk, cu_seqlens=torch.tensor([0, 6, 12])))
    assert found == {"lightning_topk": 2 * brute_pairs(6, 6, True, 0, 1, topk) * each}


@pytest.mark.parametrize(("J", "S"), [(5, 20), (9, 6)])
def test_attention_counts_slots_and_not_keys(J: int, S: int) -> None:
    B, T, H, Hkv, D, Dv = 2, 4, 4, 2, 8, 6
    q, k, v = leaves(torch.randn(B, T, H, D), torch.randn(B, S, Hkv, D), torch.randn(B, S, Hkv, Dv))
    indices = torch.arange(J).where(torch.arange(J) < S, -1).expand(B, T, J).contiguous()
    found = counted(lambda: sparse_attention(q, k, v, indices)[0].sum().backward())
    pairs, slots = B * T * H, min(J, S)
    assert found == {
        "sparse_attention_gather": pairs * products((1, slots, D), (1, Dv, slots)),
        "sparse_attention_backward": pairs
        * products((1, slots, D), (1, slots, Dv), (1, D, slots), (slots, D, 1), (slots, Dv, 1)),
    }


def test_latent_values_count_with_their_own_width() -> None:
    q, k, none, indices = (2, 4, 8, 24), (2, 30, 1, 24), (0,), (2, 4, 5)
    pairs = 2 * 4 * 8 * 5
    forward = flop_registry[torch.ops.hybrid_flex.sparse_attention_hopper](q, k, none, indices, 1.0, 16)
    assert forward == 2 * pairs * (24 + 16)
    o, lse = (2, 4, 8, 16), (2, 4, 8)
    backward = flop_registry[torch.ops.hybrid_flex.sparse_attention_cuda_backward]
    assert backward(o, lse, q, k, none, indices, o, lse, 1.0, 16) == 2 * pairs * (3 * 24 + 2 * 16)


@pytest.mark.parametrize(("J", "kpool"), [(None, 1), (None, 2), (3, 1), (3, 2)])
def test_indexer_loss(J: int | None, kpool: int) -> None:
    B, T, HI, DI, H, D = 2, 12, 3, 8, 4, 16
    S = T // kpool
    q_idx, k_idx, w = leaves(torch.randn(B, T, HI, DI), torch.randn(B, S, DI), torch.randn(B, T, HI))
    q, k = torch.randn(B, T, H, D), torch.randn(B, T, 2, D)
    indices = None if J is None else torch.full((B, T, J), -1)
    found = counted(lambda: indexer_kl_loss(q_idx, k_idx, w, q, k, indices=indices, kpool=kpool).backward())
    if J is None:
        tokens, classes = brute_pairs(T, T, True, 0, 1, 0), brute_pairs(T, S, True, 0, kpool, 0)
    else:
        tokens, classes = T * (J * kpool + kpool - 1), T * J
    logits, scores = B * tokens * products((H, 1, D)), B * classes * products((HI, 1, DI), (1, 1, HI))
    gradients = B * classes * products((HI, 1, DI), (HI, DI, 1), (1, DI, HI), (1, HI, 1))
    again = logits + B * classes * products((1, 1, HI)) if J is None else 0
    assert found == {"indexer_kl_loss": logits + scores, "indexer_kl_loss_backward": again + gradients}


def test_dense_attention_on_a_cpu_is_counted_with_any_torch() -> None:
    B, T, H, D, width = 2, 10, 4, 8, 32
    layer = CausalAttention(width, H, num_kv_heads=2, head_dim=D)
    found = counted(lambda: layer(torch.randn(B, T, width))[0].sum().backward())
    attention = B * H * products((T, T, D), (T, D, T))
    assert sum(flop for name, flop in found.items() if "dot_product" in name or "bmm" in name) == pytest.approx(
        attention + B * H * products((T, T, D), (T, T, D), (T, D, T), (T, D, T), (T, D, T))
    )


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn"])
def test_grouped_heads_are_counted_with_any_torch(kind: str) -> None:
    q, k = torch.empty(2, 6, 5, 8, device="meta"), torch.empty(2, 3, 7, 8, device="meta")
    operator = f"_scaled_dot_product_{kind}_attention"
    forward, backward = (flop_registry[getattr(torch.ops.aten, operator + way)] for way in ("", "_backward"))
    assert forward(q, k, k, out_val=q) == 2 * 6 * products((5, 8, 7), (5, 7, 8))
    gradients = products((5, 8, 7), (5, 8, 7), (7, 5, 8), (5, 7, 8), (8, 5, 7))
    assert backward(q, q, k, k, out_val=q) == 2 * 6 * gradients


def model_by_hand(
    B: int, T: int, D: int, vocab: int, heads: int, C: int, topk: int, HI: int, DI: int
) -> dict[str, int]:
    """Count a "KS" model of tied embeddings: its projections in one number, and every operator."""
    K = D // heads
    W, mlp = 4, -(-8 * D // 96) * 32
    n = B * T
    # Forward, gradient of the input, gradient of the weight.
    both = [(n, D, D)] * 4 + [(n, K, D), (n, D, K)] * 2 + [(n, heads, D)]  # KDA: q k v o, two low-rank gates, beta
    both += [(n, D, D)] * 4  # DSA: q k v o
    both += [(n, mlp, D), (n, mlp, D), (n, D, mlp)] * 2 + [(n, vocab, D)]
    # The indexer's input is detached: no gradient of it.
    indexer = [(n, HI * DI, D), (n, DI, D), (n, HI, D)]
    number, pairs = B * heads * T // C, brute_pairs(T, T, True, 0, 1, topk)
    slots, classes = n * heads * topk, n * topk
    logits, scores = classes * 2 * heads * K, classes * products((HI, 1, DI), (1, 1, HI))
    return {
        "aten.mm": 3 * products(*both) + 2 * products(*indexer),
        "short_conv": 3 * 2 * n * D * W,
        "short_conv_backward": 3 * 6 * n * D * W,
        "chunk_kda": number * chunk_by_hand(C, K, K),
        "chunk_kda_backward": number * chunk_backward_by_hand(C, K, K),
        "lightning_topk": B * pairs * products((HI, 1, DI), (1, 1, HI)),
        "sparse_attention_gather": slots * 4 * K,
        "sparse_attention_backward": slots * 10 * K,
        "indexer_kl_loss": logits + scores,
        "indexer_kl_loss_backward": classes * products((HI, 1, DI), (HI, DI, 1), (1, DI, HI), (1, HI, 1)),
    }


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_whole_model_forward_and_backward(checkpointed: bool) -> None:
    B, T, D, vocab, heads, C, topk, HI, DI = 2, 48, 32, 40, 2, 16, 8, 3, 16
    config = HybridConfig(
        vocab_size=vocab,
        hidden_size=D,
        pattern="KS",
        num_heads=heads,
        chunk_size=C,
        topk=topk,
        index_heads=HI,
        index_head_dim=DI,
        checkpoint_activations=checkpointed,
    )
    model, ids = HybridLanguageModel(config), torch.randint(vocab, (B, T))

    def step() -> None:
        logits, _, loss = model.forward_with_indexer_loss(ids)
        (logits.sum() + loss).backward()

    by_hand = model_by_hand(B, T, D, vocab, heads, C, topk, HI, DI)
    found = counted(step)
    if not checkpointed:
        assert found == by_hand
        return
    # Recomputed in the backward: the blocks' forward a second time.
    for name in ("chunk_kda", "short_conv", "lightning_topk", "sparse_attention_gather"):
        assert found[name] == 2 * by_hand[name]
    assert found["chunk_kda_backward"] == by_hand["chunk_kda_backward"]


def test_shapes_alone_are_enough() -> None:
    # As for a model that is too large to run: fake tensors, on no device.
    config = HybridConfig(vocab_size=40, hidden_size=32, pattern="KS", num_heads=2, chunk_size=16, topk=8)
    with torch.device("meta"):
        model = HybridLanguageModel(config)
        ids = torch.zeros(2, 48, dtype=torch.int64)
    real = HybridLanguageModel(config)
    there = counted(lambda: model(ids)[0])
    assert there == counted(lambda: real(torch.zeros(2, 48, dtype=torch.int64))[0])
    assert there["chunk_kda"] > 0
