"""The layers have the structure of published checkpoints: transformers' weights give transformers' outputs."""

from __future__ import annotations

import pytest
import torch

from hybrid_flex.layers import DeepSeekSparseMLA, KimiDeltaAttention

pytest.importorskip("transformers.models.deepseek_v32")
pytest.importorskip("transformers.models.kimi_linear")


@torch.no_grad()
def test_kimi_linear() -> None:
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    torch.manual_seed(0)
    config = KimiLinearConfig(
        hidden_size=48, linear_num_heads=3, linear_head_dim=16, num_hidden_layers=2, num_attention_heads=3
    )
    theirs, ours = KimiLinearDeltaAttention(config, 0), KimiDeltaAttention(48, 3, 16, norm_eps=config.rms_norm_eps)
    theirs.forget_gate.A_log.copy_(ours.A_log.view_as(theirs.forget_gate.A_log))
    theirs.forget_gate.dt_bias.copy_(ours.dt_bias)
    for name in ("q_proj", "k_proj", "v_proj", "b_proj", "g_a_proj", "g_b_proj", "o_proj"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    for name in ("f_a_proj", "f_b_proj"):
        getattr(ours, name).load_state_dict(getattr(theirs.forget_gate, name).state_dict())
    for ours_taps, taps in zip(
        (ours.q_conv, ours.k_conv, ours.v_conv), theirs.conv1d.weight.squeeze(1).chunk(3), strict=True
    ):
        ours_taps.copy_(taps)
    ours.o_norm.copy_(theirs.o_norm.weight)
    x = torch.randn(2, 100, 48)
    torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_deepseek_v32() -> None:
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32
    from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config

    torch.manual_seed(0)
    # Many index heads: a score that is exactly zero would be a tie, which torch.topk breaks in no promised order.
    config = DeepseekV32Config(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16,
        num_hidden_layers=2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, index_n_heads=24,
        index_head_dim=8, index_topk=10,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = v32.DeepseekV32Attention(config, 0)
    ours = DeepSeekSparseMLA(
        48, 4, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=8, rope_dim=4, q_lora_rank=24, topk=10, index_heads=24,
        index_head_dim=8, rope_theta=config.rope_parameters["rope_theta"],
    )  # fmt: skip
    names = {
        "q_a_proj": "q_a_proj", "q_a_norm": "q_a_layernorm", "q_b_proj": "q_b_proj", "kv_a_proj": "kv_a_proj_with_mqa",
        "kv_a_norm": "kv_a_layernorm", "kv_b_proj": "kv_b_proj", "o_proj": "o_proj", "indexer.wq": "indexer.wq_b",
        "indexer.wk": "indexer.wk", "indexer.k_norm": "indexer.k_norm", "indexer.weights_proj": "indexer.weights_proj",
    }  # fmt: skip
    for name, their_name in names.items():
        ours.get_submodule(name).load_state_dict(theirs.get_submodule(their_name).state_dict())
    x, positions = torch.randn(2, 60, 48), torch.arange(60).expand(2, -1)
    mask = torch.full((2, 1, 60, 60), torch.finfo(torch.float32).min).triu(1)
    cos_sin = v32.DeepseekV32RotaryEmbedding(config)(x, positions)
    expected = theirs(x, cos_sin, mask, position_ids=positions)[0]
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-4, atol=1e-5)
