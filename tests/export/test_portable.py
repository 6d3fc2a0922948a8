"""Programs that run with torch alone: every layer, prefill and decoding, where this library cannot be imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hybrid_flex import ops
from hybrid_flex.export import export_decode, export_prefill, load, portable, save
from hybrid_flex.export.portable import operators_of
from hybrid_flex.layers import (
    DeepSeekSparseAttention,
    DeepSeekSparseMLA,
    KimiDeltaAttention,
    ParallelHybrid,
    SequentialHybrid,
)
from hybrid_flex.models import HybridConfig, HybridLanguageModel

# Around chunks and blocks of 64: their padding is where a program may have been bound to its example.
SIZES = [(1, 1), (2, 63), (1, 64), (3, 65), (2, 131)]


def language_model() -> HybridLanguageModel:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=50, hidden_size=32, num_heads=2, pattern="KSRD", topk=8, index_heads=2, index_head_dim=8
    )
    return HybridLanguageModel(config)


def ids_of(batch_size: int, length: int) -> Tensor:
    return (torch.arange(batch_size * length) * 7 % 50).view(batch_size, length)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "kda": lambda: KimiDeltaAttention(32, num_heads=2, head_dim=16, lower_bound=-5.0),
    "dsa": lambda: DeepSeekSparseAttention(32, num_heads=4, num_kv_heads=2, topk=4, index_heads=2, index_head_dim=8),
    "mla": lambda: DeepSeekSparseMLA(
        32, 2, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=8, rope_dim=4, topk=4, index_heads=2, index_head_dim=8
    ),
    "pooled": lambda: DeepSeekSparseAttention(
        32, num_heads=2, topk=8, index_heads=2, index_head_dim=8, index_kpool=4, rope_dim=8
    ),
    "sequential": lambda: SequentialHybrid(LAYERS["kda"](), LAYERS["mla"]()),  # type: ignore[arg-type]
    "parallel": lambda: ParallelHybrid(LAYERS["kda"](), LAYERS["dsa"]()),  # type: ignore[arg-type]
}

TORCH_ALONE = """
import sys
sys.modules["hybrid_flex"] = None
import torch
from torch.utils import _pytree as pytree
module = torch.export.load(sys.argv[1]).module()
for x, want in torch.load(sys.argv[2]):
    for got, expected in zip(pytree.tree_leaves(module(x)), want, strict=True):
        torch.testing.assert_close(got, expected)
print("same")
"""


def save_with_results(
    program: torch.export.ExportedProgram, model: nn.Module, inputs: list[Tensor], folder: Path
) -> None:
    save(program, folder / "portable.pt2")
    with torch.no_grad():
        torch.save([(x, pytree.tree_leaves(model(x))) for x in inputs], folder / "expected.pt")


# The model below holds KDA and DSA layers, and the hybrids are made of layers.
QUICK = ("mla", "pooled")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]


@pytest.mark.parametrize("name", CASES)
def test_layer_runs_with_torch_alone(name: str, tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    program = portable(export_prefill(layer))
    assert not [node for node in program.graph.nodes if "hybrid_flex" in str(node.target)]
    sizes = [(b, max(t, 5)) for b, t in SIZES] if name == "pooled" else SIZES
    save_with_results(program, layer, [torch.randn(b, t, 32) for b, t in sizes], tmp_path)
    assert fresh_process(TORCH_ALONE, tmp_path / "portable.pt2", tmp_path / "expected.pt") == "same\n"


def test_model_runs_with_torch_alone_and_keeps_fused_attention(
    tmp_path: Path, fresh_process: Callable[..., str]
) -> None:
    model = language_model()
    save(export_prefill(model), tmp_path / "opaque.pt2")
    # A loaded program can be written out as well.
    program = portable(load(tmp_path / "opaque.pt2"))
    assert any("scaled_dot_product" in str(node.target) for node in program.graph.nodes)
    save_with_results(program, model, [ids_of(*size) for size in SIZES], tmp_path)
    assert fresh_process(TORCH_ALONE, tmp_path / "portable.pt2", tmp_path / "expected.pt") == "same\n"


GENERATE = """
import sys
sys.modules["hybrid_flex"] = None
import torch
prefill, decode = (torch.export.load(path).module() for path in sys.argv[1:3])
for ids, want in torch.load(sys.argv[3]):
    logits, states = prefill(ids)
    tokens = [ids, logits[:, -1:].argmax(-1)]
    while sum(x.shape[1] for x in tokens) < want.shape[1]:
        logits, states = decode(tokens[-1][:, 0], states)
        tokens.append(logits.argmax(-1)[:, None])
    assert torch.equal(torch.cat(tokens, 1), want)
print("same")
"""


def test_generation_by_two_portable_programs(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    model = language_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # or every step would predict the same token
    save(portable(export_prefill(model, max_length=90)), tmp_path / "prefill.pt2")
    save(portable(export_decode(model, max_length=90)), tmp_path / "decode.pt2")
    prompts = [ids_of(1, 1), ids_of(3, 5), ids_of(2, 70)]
    expected = [(ids, model.generate(ids, 20, greedy=True)) for ids in prompts]
    assert len(set(expected[1][1][0, 5:].tolist())) > 3
    torch.save(expected, tmp_path / "expected.pt")
    paths = (tmp_path / name for name in ("prefill.pt2", "decode.pt2", "expected.pt"))
    assert fresh_process(GENERATE, *paths) == "same\n"


def test_flat_states_are_the_same_tensors() -> None:
    model = language_model()
    program = export_prefill(model, max_length=40)
    logits, states = portable(program).module()(ids_of(2, 9))
    assert [len(state) for state in states] == [4, 4, 4, 2]
    flat = portable(program, flat=True).module()(ids_of(2, 9))
    for got, want in zip(flat, pytree.tree_leaves((logits, states)), strict=True):
        torch.testing.assert_close(got, want)


def test_a_loaded_decoding_program_is_written_out(tmp_path: Path) -> None:
    layer = LAYERS["dsa"]()
    save(export_decode(layer, max_length=20), tmp_path / "decode.pt2")
    step = portable(load(tmp_path / "decode.pt2")).module()
    x = torch.randn(3, 8, 32)
    state = layer.reserve(layer.init_state(3), 20)
    tensors = tuple(t.clone() for t in pytree.tree_leaves(state))
    for t in range(8):
        y, tensors = step(x[:, t].contiguous(), tensors)
        torch.testing.assert_close(y, layer.step(x[:, t], state)[0])
    assert tensors[-1].tolist() == [8, 8, 8]


def test_the_model_still_learns() -> None:
    layer = LAYERS["kda"]()
    program = portable(export_prefill(layer))
    assert all(parameter.requires_grad for parameter in layer.parameters())
    assert not any(parameter.requires_grad for parameter in program.parameters())


def test_fixed_sizes_stay_fixed() -> None:
    layer = LAYERS["dsa"]()
    module = portable(export_prefill(layer, batch_size=1, seq_len=70, dynamic=False)).module()
    x = torch.randn(1, 70, 32)
    torch.testing.assert_close(module(x)[0], layer(x)[0])
    with pytest.raises(AssertionError):
        module(torch.randn(1, 71, 32))


class Loss(nn.Module):
    def forward(self, q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        return ops.indexer_kl_loss(q, k, w, q, k[:, :, None], scale=1.0)


def test_messages() -> None:
    with pytest.raises(TypeError) as wrong_type:
        portable(nn.Linear(2, 2))  # type: ignore[arg-type]
    assert str(wrong_type.value) == "portable: program must be a torch.export.ExportedProgram, got Linear"
    q, k, w = torch.randn(1, 5, 2, 4), torch.randn(1, 5, 4), torch.randn(1, 5, 2)
    with pytest.raises(ValueError) as no_form:
        portable(torch.export.export(Loss(), (q, k, w)))
    assert str(no_form.value) == (
        "portable: program must hold operators that have a plain form, got hybrid_flex::indexer_kl_loss"
    )


def test_poisoned_memory(nan_memory: None) -> None:
    logits, states = portable(export_prefill(language_model())).module()(ids_of(2, 70))
    assert all(leaf.isfinite().all() for leaf in pytree.tree_leaves((logits, states)))


@pytest.mark.parametrize("name", ["parallel", "mla"])
def test_operators_on_cuda_have_plain_forms(name: str, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    program = export_prefill(layer)
    assert {"lightning_topk_cuda", "sparse_attention_cuda"} <= operators_of(program)
    written = portable(program)
    assert not operators_of(written)
    monkeypatch.undo()
    x = torch.randn(2, 70, 32)
    torch.testing.assert_close(written.module()(x)[0], layer(x)[0])


@pytest.mark.gpu
def test_portable_on_cuda_holds_no_kernels() -> None:
    layer = LAYERS["parallel"]().cuda()
    program = portable(export_prefill(layer))
    assert not [node for node in program.graph.nodes if "triton" in str(node.target)]
    x = torch.randn(2, 70, 32, device="cuda")
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0], rtol=1e-3, atol=1e-4)
