"""Sequences of at most topk tokens: dense attention, no scores, and yet everything a selection would have given."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.layers import DeepSeekSparseAttention, DeepSeekSparseMLA, indexer, sparse
from hybrid_flex.layers.sparse import SparseLayer

D, TOPK = 32, 64
INDEX = {"topk": TOPK, "index_heads": 3, "index_head_dim": 8}
LAYERS: dict[str, Callable[..., SparseLayer]] = {
    "gqa": lambda **o: DeepSeekSparseAttention(D, 4, num_kv_heads=2, rope_dim=8, **INDEX, **o),
    "mqa-kpool4": lambda **o: DeepSeekSparseAttention(D, 4, num_kv_heads=1, index_kpool=4, **INDEX, **o),
    "mla": lambda **o: DeepSeekSparseMLA(
        D, 4, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=8, rope_dim=4, q_lora_rank=12, **INDEX, **o
    ),
    "mla-wide-values-kpool4": lambda **o: DeepSeekSparseMLA(
        D, 4, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=12, index_kpool=4, **INDEX, **o
    ),
    "mla-expanded": lambda **o: DeepSeekSparseMLA(
        D, 4, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=4, rope_dim=4, form="expanded", **INDEX, **o
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str, **options: Any) -> SparseLayer:
    torch.manual_seed(0)
    return LAYERS[name](**options)


@pytest.fixture
def dense_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the number of queries of every call of dense attention."""
    calls: list[int] = []
    dense_attention = sparse.dense_attention

    def noted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(q.shape[1])
        return dense_attention(q, *args, **kwargs)

    monkeypatch.setattr(sparse, "dense_attention", noted)
    return calls


@pytest.mark.parametrize("stage", [None, "sparse"])
@every_layer
def test_equals_the_selected_form_with_its_gradients_and_state(name: str, stage: str | None) -> None:
    for length in (1, 3, 50, TOPK):
        x = torch.randn(2, length, D, dtype=torch.float64)
        found = []
        for backend in ("auto", "gather"):
            layer, leaf = build(name, backend=backend).double(), x.clone().requires_grad_()
            y, state, indices, loss = layer.attend(leaf, stage=stage)
            (y.sin().sum() + loss).backward()
            # Whether an indexer that no loss reaches has zeros or nothing is not the point.
            gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in layer.named_parameters()}
            found.append((y, loss, state, indices, {**gradients, "x": leaf.grad}))
        (y, loss, state, indices, gradients), want = found
        torch.testing.assert_close(y, want[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss, want[1])
        assert torch.equal(state.kv, want[2].kv) and torch.equal(state.index_keys, want[2].index_keys)
        assert torch.equal(indices, want[3]) and indices.dtype == want[3].dtype == torch.int32
        for parameter, gradient in gradients.items():
            # The loss is a float32 scalar, so the indexer's gradients have its rounding.
            tolerance = 1e-5 if "indexer" in parameter else 1e-9
            torch.testing.assert_close(gradient, want[4][parameter], rtol=tolerance, atol=tolerance, msg=parameter)


@torch.no_grad()
@pytest.mark.parametrize("kpool", [1, 2, 8])
def test_indices_are_those_of_the_indexer_bit_for_bit(kpool: int) -> None:
    torch.manual_seed(0)
    layer = DeepSeekSparseAttention(D, 4, topk=16, index_heads=3, index_head_dim=8, index_kpool=kpool)
    for length in range(1, 17):
        x = torch.randn(2, length, D)
        selected, _ = layer.indexer(x)
        got = layer.attend(x)[2]
        assert torch.equal(got, selected) and got.dtype == selected.dtype


@torch.no_grad()
@every_layer
def test_nothing_is_scored(name: str, dense_calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("scored")

    layer = build(name)
    monkeypatch.setattr(indexer, "lightning_topk", refuse)
    layer(torch.randn(2, TOPK, D))
    layer.forward_with_indexer_loss(torch.randn(2, TOPK, D))
    assert dense_calls == [TOPK, TOPK]
    with pytest.raises(AssertionError, match="scored"):
        layer(torch.randn(2, TOPK + 1, D))


@torch.no_grad()
def test_what_does_not_take_the_short_way(dense_calls: list[int]) -> None:
    x = torch.randn(1, TOPK, D)
    for backend in ("gather", "reference"):
        build("gqa", backend=backend)(x)
    layer = build("gqa")
    _, state = layer(torch.randn(1, TOPK + 1, D))
    layer(x[:, :3], state)
    layer.step(x[:, 0], layer.init_state(1))
    layer(x, cu_seqlens=torch.tensor([0, 20, TOPK]))
    build("gqa", share_indices=True)(x, indices=layer.indexer(x)[0])
    layer(x, indices=layer.indexer(x)[0])
    assert not dense_calls


@torch.no_grad()
@every_layer
def test_the_future_changes_no_bit_of_the_past(name: str) -> None:
    layer, x = build(name), torch.randn(2, TOPK, D)
    changed = x.clone()
    changed[:, 50:] = 3 * torch.randn(2, TOPK - 50, D)
    assert torch.equal(layer(x)[0][:, :50], layer(changed)[0][:, :50])


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["mqa-kpool4", "mla"])
def test_two_graphs_one_on_either_side_of_topk(name: str) -> None:
    layer, backend = build(name), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for length, graphs in ((20, 1), (TOPK, 1), (7, 1), (TOPK + 1, 2), (130, 2), (33, 2)):
        x = torch.randn(2, length, D)
        torch._dynamo.mark_dynamic(x, 1)
        y, expected = compiled(x)[0], layer(x)[0]
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=5e-6)
        got, want = (torch.autograd.grad(z.sin().sum(), layer.o_proj.weight)[0] for z in (y, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert backend.frame_count == graphs


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
@pytest.mark.parametrize("name", ["gqa", "mla-wide-values-kpool4"])
def test_a_program_made_of_a_short_sequence_takes_long_ones(name: str, strict: bool) -> None:
    layer, dynamic = build(name), torch.export.Dim.DYNAMIC
    program = torch.export.export(
        layer, (torch.randn(2, 33, D),), dynamic_shapes=({0: dynamic, 1: dynamic},), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, length in ((2, 33), (1, TOPK), (3, 130)):
        x = torch.randn(batch, length, D)
        torch.testing.assert_close(loaded(x)[0], layer(x)[0], rtol=1e-5, atol=5e-6)
