"""DeepSeek Sparse Attention as a layer: what it selects, what it equals, and who learns from which loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.layers import (
    CausalAttention,
    DeepSeekSparseAttention,
    DeepSeekSparseMLA,
    ParallelHybrid,
    SequentialHybrid,
)
from hybrid_flex.layers.kda import KimiDeltaAttention

D = 32
INDEX = {"topk": 8, "index_heads": 3, "index_head_dim": 8}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 12}


def dsa(**options: Any) -> DeepSeekSparseAttention:
    torch.manual_seed(0)
    return DeepSeekSparseAttention(D, 4, **{"num_kv_heads": 2, "rope_dim": 8, **INDEX, **options})


def mla(**options: Any) -> DeepSeekSparseMLA:
    torch.manual_seed(0)
    return DeepSeekSparseMLA(D, 4, **{"rope_dim": 4, "q_lora_rank": 12, **LATENT, **INDEX, **options})


def by_hand(layer: DeepSeekSparseAttention, x: Tensor) -> Tensor:
    """Run the layer query by query in float64; positions by complex rotation of half-split pairs."""
    p = {name: value.double() for name, value in layer.state_dict().items()}
    x = x.double()
    H, Hkv, E = layer.num_heads, layer.num_kv_heads, layer.head_dim
    indexer = layer.indexer
    assert indexer is not None

    def heads(y: Tensor, name: str, count: int, width: int, rope: int) -> Tensor:
        y = (y @ p[name].T).view(-1, count, width)
        return rotate(y, rope)

    def rotate(y: Tensor, rope: int) -> Tensor:
        if rope == 0:
            return y
        angle = torch.arange(y.shape[0]).double()[:, None] * layer.rope_theta ** (
            -torch.arange(0, rope, 2).double() / rope
        )
        turned = (
            torch.complex(y[..., : rope // 2], y[..., rope // 2 : rope]) * torch.polar(angle * 0 + 1, angle)[:, None]
        )
        return torch.cat([turned.real, turned.imag, y[..., rope:]], -1)

    outputs = []
    for sequence in x:
        q = heads(sequence, "q_proj.weight", H, E, layer.rope_dim)
        k = heads(sequence, "k_proj.weight", Hkv, E, layer.rope_dim).repeat_interleave(H // Hkv, 1)
        v = heads(sequence, "v_proj.weight", Hkv, E, 0).repeat_interleave(H // Hkv, 1)
        q_idx = heads(sequence, "indexer.wq.weight", indexer.num_heads, indexer.head_dim, indexer.rope_dim)
        k_idx = F.layer_norm(sequence @ p["indexer.wk.weight"].T, (indexer.head_dim,), eps=1e-6)
        k_idx = rotate((k_idx * p["indexer.k_norm.weight"] + p["indexer.k_norm.bias"])[:, None], indexer.rope_dim)[:, 0]
        w = sequence @ p["indexer.weights_proj.weight"].T * (indexer.num_heads * indexer.head_dim) ** -0.5
        rows = []
        for t in range(sequence.shape[0]):
            score = (w[t, :, None] * (q_idx[t] @ k_idx[: t + 1].T).relu()).sum(0)
            chosen = score.sort(descending=True, stable=True).indices[: indexer.topk]
            weights = (torch.einsum("hd,shd->hs", q[t], k[chosen]) * E**-0.5).softmax(-1)
            rows.append(torch.einsum("hs,shd->hd", weights, v[chosen]).flatten())
        outputs.append(torch.stack(rows) @ p["o_proj.weight"].T)
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("rope_dim", [0, 4, 8], ids=["rope0", "rope4", "rope8"])
def test_equals_the_equations(num_kv_heads: int, rope_dim: int) -> None:
    layer = dsa(num_kv_heads=num_kv_heads, rope_dim=rope_dim).double()
    nn.init.normal_(layer.indexer.k_norm.bias)
    x = torch.randn(2, 40, D, dtype=torch.float64)
    # Rotation angles of integer positions are float32, as in the published models.
    tolerance = 1e-9 if rope_dim == 0 else 1e-7
    torch.testing.assert_close(layer(x)[0], by_hand(layer, x), rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("make", [dsa, mla], ids=["dsa", "mla"])
@pytest.mark.parametrize("kpool", [1, 4], ids=["kpool1", "kpool4"])
def test_a_short_sequence_is_dense_causal_attention(make: Any, kpool: int) -> None:
    layer, x = make(topk=64, index_kpool=kpool), torch.randn(2, 50, D)
    dense, _, _, _ = layer.attend(x, stage="dense")
    torch.testing.assert_close(layer(x)[0], dense, rtol=1e-5, atol=2e-6)


@torch.no_grad()
def test_the_dense_stage_is_the_dense_layer_with_and_without_a_past() -> None:
    layer, plain, x = dsa(), CausalAttention(D, 4, num_kv_heads=2, rope_dim=8), torch.randn(2, 50, D)
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    expected, _ = plain(x)
    torch.testing.assert_close(layer.attend(x, stage="dense")[0], expected, rtol=1e-5, atol=1e-6)
    first, state, _, _ = layer.attend(x[:, :20], stage="dense")
    second, _, _, _ = layer.attend(x[:, 20:], state, stage="dense")
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=1e-5, atol=1e-6)
    packed, _, _, _ = layer.attend(x[:1], None, torch.tensor([0, 20, 50]), stage="dense")
    torch.testing.assert_close(packed[:, :20], expected[:1, :20], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed[:, 20:], plain(x[:1, 20:])[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("make", [dsa, mla], ids=["dsa", "mla"])
@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_backends_agree(make: Any, backend: str) -> None:
    x = torch.randn(2, 40, D)
    torch.testing.assert_close(make(backend=backend)(x)[0], make()(x)[0], rtol=1e-5, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("make", [dsa, mla], ids=["dsa", "mla"])
@pytest.mark.parametrize("kpool", [1, 4], ids=["kpool1", "kpool4"])
def test_a_shared_selection_is_the_given_one(make: Any, kpool: int) -> None:
    """A layer without an indexer, given the indices of one with, does what that one does: prefill and decode."""
    full, shared, x = make(index_kpool=kpool), make(share_indices=True), torch.randn(2, 45, D)
    shared.load_state_dict({n: p for n, p in full.state_dict().items() if "indexer" not in n})
    expected, full_state, indices, _ = full.attend(x[:, :40])
    got, shared_state = shared(x[:, :40], indices=indices)
    assert torch.equal(got, expected)
    assert indices.shape == (2, 40, 8 + kpool - 1) and shared_state.index_keys.shape == (2, 40, 0)
    for x_t in x[:, 40:].unbind(1):
        expected, full_state, indices, _ = full.attend(x_t[:, None], full_state)
        got, shared_state = shared.step(x_t, shared_state, indices=indices)
        assert torch.equal(got, expected[:, 0])


@pytest.mark.parametrize("make", [dsa, mla], ids=["dsa", "mla"])
def test_a_shared_selection_must_be_given(make: Any) -> None:
    with pytest.raises(ValueError, match="indices must come from an earlier layer, got None"):
        make(share_indices=True)(torch.randn(1, 5, D))


def hybrid(kind: type[nn.Module], **options: Any) -> nn.Module:
    return kind(KimiDeltaAttention(D, 2, 16), dsa(**options))


TRAINED = {
    "dsa": dsa,
    "dsa-kpool4": lambda: dsa(index_kpool=4),
    "mla": mla,
    "mla-kpool4-expanded": lambda: mla(index_kpool=4, form="expanded"),
    "sequential": lambda: hybrid(SequentialHybrid),
    "parallel": lambda: hybrid(ParallelHybrid),
}


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_indexer_learns_from_its_loss_and_the_rest_from_its_own(name: str, stage: str) -> None:
    layer, x = TRAINED[name](), torch.randn(2, 40, D, requires_grad=True)

    def grads(loss: Tensor) -> dict[str, Tensor | None]:
        x.grad = None
        layer.zero_grad()
        loss.backward(retain_graph=True)
        return {n: None if p.grad is None else p.grad.clone() for n, p in layer.named_parameters()}

    y, _, kl = layer.forward_with_indexer_loss(x, stage=stage)
    assert kl.dtype == torch.float32 and kl.shape == () and kl.item() > 0
    main, both = grads(y.square().mean()), grads(y.square().mean() + kl)
    from_kl = grads(kl)
    assert x.grad is None or not x.grad.any()
    for parameter, gradient in both.items():
        if "indexer" in parameter:
            assert main[parameter] is None or not main[parameter].any(), parameter
            # The bias of the index key norm and the like may be flat; the projections must move.
            assert gradient is not None and (gradient.any() or not parameter.endswith("weight")), parameter
            torch.testing.assert_close(gradient, from_kl[parameter], msg=parameter)
        else:
            assert from_kl[parameter] is None or not from_kl[parameter].any(), parameter
            assert gradient is not None and gradient.any(), parameter
            torch.testing.assert_close(gradient, main[parameter], msg=parameter)


@pytest.mark.parametrize("make", [dsa, mla], ids=["dsa", "mla"])
def test_the_loss_is_over_the_layers_own_selection_whatever_is_attended_to(make: Any) -> None:
    layer, x = make(), torch.randn(2, 40, D)
    own, other = layer.attend(x, stage="sparse"), torch.arange(5, dtype=torch.int32).expand(2, 40, -1)
    given = layer.attend(x, stage="sparse", indices=other)
    assert torch.equal(given[2], other) and not torch.equal(given[0], own[0])
    torch.testing.assert_close(given[3], own[3])


@pytest.mark.parametrize("make", [dsa, mla], ids=["dsa", "mla"])
def test_forward_leaves_no_gradient_in_the_indexer(make: Any) -> None:
    layer = make()
    y, state = layer(torch.randn(2, 30, D))
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.indexer.parameters())
    assert not state.index_keys.requires_grad and state.kv.requires_grad


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("kpool", [1, 4], ids=["kpool1", "kpool4"])
def test_training_lowers_the_indexers_loss(stage: str, kpool: int) -> None:
    layer, x = mla(index_kpool=kpool), torch.randn(2, 64, D)
    # Sharper attention than a fresh layer's, so that there is something to learn.
    nn.init.normal_(layer.q_b_proj.weight, std=1.0)
    optimizer = torch.optim.Adam(layer.indexer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        _, _, loss = layer.forward_with_indexer_loss(x, stage=stage)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("make", [dsa, mla], ids=["dsa", "mla"])
def test_indexer_training_is_one_graph(make: Any, stage: str) -> None:
    layer, backend = make(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer.forward_with_indexer_loss, backend=backend, fullgraph=True)
    for length in (70, 41, 97):
        x = torch.randn(2, length, D)
        torch._dynamo.mark_dynamic(x, 1)
        loss, expected = compiled(x, stage=stage)[2], layer.forward_with_indexer_loss(x, stage=stage)[2]
        torch.testing.assert_close(loss, expected)
        layer.zero_grad()
        loss.backward()
        got = layer.indexer.wq.weight.grad.clone()
        layer.zero_grad()
        expected.backward()
        torch.testing.assert_close(got, layer.indexer.wq.weight.grad)
    assert backend.frame_count == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "DeepSeekSparseAttention: num_kv_heads must divide num_heads = 4, got 3"),
        ({"topk": 0}, "DeepSeekSparseAttention: topk must be positive, got 0"),
        ({"index_kpool": 3}, "LightningIndexer: topk must be a multiple of kpool = 3, got 8"),
        ({"rope_dim": 5}, "rope_dim must be even and between 0 and head_dim = 8, got 5"),
        ({"rope_layout": "twisted"}, "rope_layout must be one of 'half', 'interleaved', 'none', got 'twisted'"),
        ({"index_rope_dim": 10}, "LightningIndexer: rope_dim must be between 0 and head_dim = 8, got 10"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsa(**options)


def test_bad_stage_and_foreign_state_are_refused() -> None:
    with pytest.raises(ValueError, match="stage must be one of None, 'dense', 'sparse', got 'warm'"):
        dsa().forward_with_indexer_loss(torch.randn(1, 5, D), stage="warm")
    with pytest.raises(ValueError, match=r"state.kv must be \[N, \*, 2, 16\], got shape \(1, 0, 1, 20\)"):
        dsa()(torch.randn(1, 5, D), mla().init_state(1))
