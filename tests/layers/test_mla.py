"""Latent keys and values: the absorbed and the expanded form are one function, with the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hybrid_flex.layers import DeepSeekSparseMLA

SIZES = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 12, "index_heads": 3, "index_head_dim": 8}


def mla(**options: Any) -> DeepSeekSparseMLA:
    torch.manual_seed(0)
    return DeepSeekSparseMLA(32, 4, **{"topk": 8, **SIZES, **options})


@pytest.mark.parametrize(
    "options", [{"rope_dim": 4, "q_lora_rank": 12}, {"index_kpool": 4}], ids=["rope-qlora", "kpool4"]
)
def test_absorbed_equals_expanded(options: dict[str, int]) -> None:
    absorbed, expanded = (mla(form=form, **options).double() for form in ("absorbed", "expanded"))
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    results = []
    for layer in (absorbed, expanded):
        y, _, kl = layer.forward_with_indexer_loss(x)
        (y.square().sum() + kl).backward()
        results.append((y, kl, {n: p.grad for n, p in layer.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(results[0][1], results[1][1])
    for name, gradient in results[0][2].items():
        # The loss is a float32 scalar, so the indexer's gradients have its rounding.
        tolerance = 1e-5 if "indexer" in name else 1e-9
        torch.testing.assert_close(gradient, results[1][2][name], rtol=tolerance, atol=tolerance, msg=name)
    _, state = absorbed(x[:, :30])
    steps = [layer.step(x[:, 30], state)[0] for layer in (absorbed, expanded)]
    torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_equals_the_equations_with_everything_selected() -> None:
    layer = mla(topk=64, rope_dim=4, q_lora_rank=12).double()
    for norm in (layer.q_a_norm, layer.kv_a_norm):
        torch.nn.init.normal_(norm.weight)
    p, x = layer.state_dict(), torch.randn(30, 32, dtype=torch.float64)

    def rms(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def rotate(y: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(30).double()[:, None] * 10000.0 ** (-torch.arange(0, 4, 2).double() / 4)
        pairs = torch.view_as_complex(y.unflatten(-1, (2, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)

    q = (rms(x @ p["q_a_proj.weight"].T, p["q_a_norm.weight"]) @ p["q_b_proj.weight"].T).view(30, 4, 12)
    q = torch.cat([q[..., :8], rotate(q[..., 8:])], -1)
    latent, k_rot = (x @ p["kv_a_proj.weight"].T).split((16, 4), -1)
    kv = (rms(latent, p["kv_a_norm.weight"]) @ p["kv_b_proj.weight"].T).view(30, 4, 20)
    k = torch.cat([kv[..., :8], rotate(k_rot[:, None]).expand(-1, 4, -1)], -1)
    logits = torch.einsum("thd,shd->hts", q, k) * 12**-0.5
    weights = logits.masked_fill(torch.ones(30, 30).triu(1).bool(), float("-inf")).softmax(-1)
    y = torch.einsum("hts,shd->thd", weights, kv[..., 8:]).flatten(1) @ p["o_proj.weight"].T
    # Rotation angles of integer positions are float32, as in the published models.
    torch.testing.assert_close(layer(x[None])[0][0], y, rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_the_indexer_reads_the_query_latent() -> None:
    layer, x = mla(q_lora_rank=12), torch.randn(1, 30, 32)
    assert layer.indexer is not None and layer.indexer.wq.in_features == 12
    latent = F.rms_norm(layer.q_a_proj(x), (12,), layer.q_a_norm.weight, 1e-6)
    indices, _ = layer.indexer(x, query_input=latent)
    assert torch.equal(indices, layer.attend(x)[2])


def test_cache_is_one_latent_row_per_token() -> None:
    _, state = mla(rope_dim=4)(torch.randn(2, 9, 32))
    assert state.kv.shape == (2, 9, 1, 20) and state.index_keys.shape == (2, 9, 8)
    assert mla(index_kpool=4)(torch.randn(2, 9, 32))[1].index_keys.shape == (2, 9, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "folded"}, "form must be one of 'absorbed', 'expanded', got 'folded'"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be positive, got 0"),
        ({"rope_dim": 3}, "rope_dim must be even and not negative, got 3"),
        ({"q_lora_rank": -1}, "q_lora_rank must be positive, got -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"DeepSeekSparseMLA: {message}"):
        mla(**options)
