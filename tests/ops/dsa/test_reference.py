"""The specification against plain Python loops in float64, which share no einsum, sort or mask with it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid_flex.ops.dsa.reference import (
    reference_attention,
    reference_kl_loss,
    reference_scores,
    reference_topk,
    reference_visible,
)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score_loop(q_idx: Tensor, k_idx: Tensor, w: Tensor) -> list[list[list[float]]]:
    """Score with scalar arithmetic only."""
    result = []
    for b in range(q_idx.shape[0]):
        rows = []
        for t in range(q_idx.shape[1]):
            row = []
            for s in range(k_idx.shape[1]):
                total = 0.0
                for j in range(q_idx.shape[2]):
                    dot = sum(float(a) * float(c) for a, c in zip(q_idx[b, t, j], k_idx[b, s], strict=True))
                    total += float(w[b, t, j]) * max(dot, 0.0)
                row.append(total)
            rows.append(row)
        result.append(rows)
    return result


def visible_loop(
    t: int, num_keys: int, causal: bool, query_start: int, bounds: list[int] | None, kpool: int
) -> list[int]:
    """List the keys (pools) query t sees."""
    keys = []
    for s in range(num_keys):
        last_token = s * kpool + kpool - 1
        if causal and last_token > query_start + t:
            continue
        if bounds is not None and not any(a <= t < b and a <= s < b for a, b in itertools.pairwise(bounds)):
            continue
        keys.append(s)
    return keys


def test_scores_against_loop() -> None:
    q_idx, k_idx, w = draw(2, 4, 3, 5, seed=0), draw(2, 6, 5, seed=1), draw(2, 4, 3, seed=2)
    expected = torch.tensor(score_loop(q_idx, k_idx, w), dtype=torch.float64)
    torch.testing.assert_close(reference_scores(q_idx, k_idx, w), expected, rtol=1e-12, atol=1e-12)
    assert (w < 0).any() and (expected < 0).any()


@pytest.mark.parametrize("bounds", [None, [0, 4, 4, 9], [0, 9]], ids=["whole", "packed-with-empty", "packed-one"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_visible_against_loop(bounds: list[int] | None, causal: bool) -> None:
    cu = None if bounds is None else torch.tensor(bounds)
    visible = reference_visible(9, 9, causal=causal, cu_seqlens=cu)
    for t in range(9):
        assert visible[t].nonzero()[:, 0].tolist() == visible_loop(t, 9, causal, 0, bounds, 1)


def test_visible_pools_and_start_against_loop() -> None:
    visible = reference_visible(7, 4, query_start=5, kpool=3)
    for t in range(7):
        assert visible[t].nonzero()[:, 0].tolist() == visible_loop(t, 4, True, 5, None, 3)


def test_topk_takes_the_lower_index_among_equals() -> None:
    scores = torch.tensor([[[1.0, 3.0, 3.0, 2.0, 3.0, 0.0], [0.0, 0.0, -1.0, 0.0, 5.0, 0.0]]])
    visible = torch.ones(2, 6, dtype=torch.bool)
    assert reference_topk(scores, visible, 2).tolist() == [[[1, 2], [0, 4]]]
    assert reference_topk(scores, visible, 4).tolist() == [[[1, 2, 3, 4], [0, 1, 3, 4]]]
    assert reference_topk(scores, visible, 8).tolist() == [[[0, 1, 2, 3, 4, 5, -1, -1]] * 2]
    visible[1, [0, 4]] = False
    assert reference_topk(scores, visible, 3).tolist() == [[[1, 2, 4], [1, 3, 5]]]
    visible[1] = False
    assert reference_topk(scores, visible, 3).tolist()[0][1] == [-1, -1, -1]


def attention_loop(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend one query and head at a time over a Python list of keys."""
    group = q.shape[2] // k.shape[2]
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            keys = [int(s) for s in indices[b, t] if s >= 0]
            for h in range(q.shape[2]):
                weights = [math.exp(scale * float(torch.dot(q[b, t, h], k[b, s, h // group]))) for s in keys]
                if keys:
                    lse[b, t, h] = math.log(sum(weights))
                for weight, s in zip(weights, keys, strict=True):
                    o[b, t, h] += weight / sum(weights) * v[b, s, h // group]
    return o, lse


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_against_loop(num_kv_heads: int, selection: Callable[..., Tensor]) -> None:
    q, k, v = draw(2, 5, 4, 6, seed=0), draw(2, 8, num_kv_heads, 6, seed=1), draw(2, 8, num_kv_heads, 3, seed=2)
    indices = selection(2, 5, 8, 4)
    o, lse = reference_attention(q, k, v, indices)
    expected_o, expected_lse = attention_loop(q, k, v, indices, 6**-0.5)
    torch.testing.assert_close(o, expected_o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    assert lse.isneginf().any() and (o[lse.isneginf()] == 0).all()


@pytest.mark.parametrize("kpool", [1, 3])
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_kl_loss_against_loop(kpool: int, stage: str) -> None:
    num_queries, num_keys, start = 7, 11, 4
    num_classes = num_keys // kpool
    q_idx, k_idx, w = (
        draw(1, num_queries, 2, 4, seed=0),
        draw(1, num_classes, 4, seed=1),
        draw(1, num_queries, 2, seed=2),
    )
    q, k = draw(1, num_queries, 4, 5, seed=3), draw(1, num_keys, 2, 5, seed=4)
    scores = score_loop(q_idx, k_idx, w)
    total, chosen_rows = 0.0, []
    for t in range(num_queries):
        classes = visible_loop(t, num_classes, True, start, None, kpool)
        tokens = list(range(start + t + 1))
        if stage == "sparse":
            classes = classes[::2]
            tail = list(range((start + t + 1) // kpool * kpool, start + t + 1))
            tokens = [c * kpool + i for c in classes for i in range(kpool)] + tail
        chosen_rows.append(classes + [-1] * (num_classes - len(classes)))
        p = dict.fromkeys(classes, 0.0)
        for h in range(4):
            weights = {s: math.exp(5**-0.5 * float(torch.dot(q[0, t, h], k[0, s, h // 2]))) for s in tokens}
            for s in tokens:
                if s // kpool in p:
                    p[s // kpool] += weights[s] / sum(weights.values())
        mass, partition = sum(p.values()), sum(math.exp(scores[0][t][c]) for c in classes)
        total += sum(p[c] / mass * math.log(p[c] / mass / (math.exp(scores[0][t][c]) / partition)) for c in classes)
    indices = torch.tensor([chosen_rows]) if stage == "sparse" else None
    loss = reference_kl_loss(q_idx, k_idx, w, q, k, indices=indices, query_start=start, kpool=kpool)
    assert loss.item() == pytest.approx(total / num_queries, rel=1e-10)
