"""Names put around a model's parts: which ranges a trace has, and that nothing is left behind."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import profile

from hybrid_flex import (
    CausalAttention,
    DeepSeekSparseAttention,
    DeepSeekSparseMLA,
    HybridConfig,
    HybridLanguageModel,
    KimiDeltaAttention,
    SequentialHybrid,
    export,
    profiling,
)
from hybrid_flex.profiling.names import kind_of

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_heads": 2, "topk": 4, "index_head_dim": 16}
IDS = torch.arange(18).view(2, 9)


def tiny(pattern: str = "KSD", **options: Any) -> HybridLanguageModel:
    torch.manual_seed(0)
    return HybridLanguageModel(HybridConfig(pattern=pattern, **SIZES, **options))


def ranges(call: Any, *models: nn.Module) -> Counter[str]:
    """Count the ranges that a call opens."""
    with profile() as profiler, profiling.named(*models):
        call()
    return Counter(event.name for event in profiler.events() if event.is_user_annotation)


def traces_of_names(model: nn.Module) -> list[str]:
    """Find hooks and replaced methods in a model."""
    left = []
    for path, module in model.named_modules():
        left += [f"{path}.{name}" for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        left += [f"{path}.{name}" for name in ("_project", "_logits", "_output", "_attended") if name in vars(module)]
        left += [f"{path} hook"] * bool(module._forward_hooks or module._forward_pre_hooks)
        left += [f"{path} always"] * bool(module._forward_hooks_always_called)
    return left


def test_a_language_model() -> None:
    model = tiny()
    found = ranges(lambda: model(IDS), model)
    once = ["HybridLanguageModel", "embedding", "norm", "logits", "block 2/mixer"]
    once += [f"block {i}{part}" for i in range(3) for part in ("", "/mixer", "/mlp")]
    assert all(found[name] == 1 for name in once), found
    assert found["block 0/mixer/projections"] == 9, "q, k, v, two low-rank gates of two each, beta, o"
    assert found["block 1/mixer/topk"] == 1 and found["block 1/mixer/indexer"] >= 1
    assert found["block 2/mixer/projections"] >= 4 and found["block 1/norm"] == 2
    assert not [name for name in found if "stack" in name or "proj" in name.replace("projections", "")]


def test_training_and_decoding() -> None:
    model = tiny()

    def train() -> None:
        logits, _, loss = model.forward_with_indexer_loss(IDS)
        (logits.sum() + loss).backward()

    found = ranges(train, model)
    assert found["block 1/mixer/indexer_loss"] == 1 and found["block 1/mixer"] == 1
    with torch.no_grad():
        _, states = model(IDS)
        found = ranges(lambda: model.step(IDS[:, 0], states), model)
        assert all(found[f"block {i}/mixer"] >= 1 for i in range(3)) and found["logits"] == 1
        reserved = model.reserve(states, 20)
        found = ranges(lambda: model.step(IDS[:, 0], reserved), model)
        assert all(found[f"block {i}/mixer"] >= 1 for i in range(3)) and found["block 1/mixer/topk"] == 1


LAYERS = {
    "KimiDeltaAttention": (lambda: KimiDeltaAttention(32, 2, 16), {"projections": 9}),
    "DeepSeekSparseAttention": (
        lambda: DeepSeekSparseAttention(32, 2, topk=4, index_heads=2, index_head_dim=16),
        {"topk": 1},
    ),
    "DeepSeekSparseMLA": (
        lambda: DeepSeekSparseMLA(
            32, 2, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=8, topk=4, index_heads=2, index_head_dim=16
        ),
        {"topk": 1, "norm": 1},
    ),
    "CausalAttention": (lambda: CausalAttention(32, 2), {}),
    "SequentialHybrid": (
        lambda: SequentialHybrid(
            KimiDeltaAttention(32, 2, 16),
            DeepSeekSparseAttention(32, 2, topk=4, index_heads=2, index_head_dim=16),
        ),
        {"kda": 1, "dsa": 1, "kda/projections": 9, "dsa/topk": 1, "norm": 2},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_alone(name: str) -> None:
    make, wanted = LAYERS[name]
    layer = make()
    found = ranges(lambda: layer(torch.randn(2, 9, 32)), layer)
    assert found[name] == 1
    assert found["projections"] + found["dsa/projections"] >= 1
    assert {key: found[key] for key in wanted} == wanted
    assert not traces_of_names(layer)


def test_modules_of_others_are_named_by_their_attributes() -> None:
    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.GELU())
            self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
            self.final_norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.final_norm(self.body(x))
            return self.heads[0](x) + self.heads[1](x)

    model = Theirs()
    found = ranges(lambda: model(torch.randn(2, 4)), model)
    assert set(found) == {"Theirs", "body", "body 0", "body 1", "head 0", "head 1", "norm"}
    assert not traces_of_names(model)


def test_nothing_is_left_behind_even_by_an_error() -> None:
    model = tiny()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with profiling.named(model):
        assert traces_of_names(model)
    assert not traces_of_names(model)

    def fail(*arguments: Any) -> None:
        raise KeyError("lost")

    handle = model.stack.blocks[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="lost"), profiling.named(model):
        model(IDS)
    handle.remove()
    assert not traces_of_names(model)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert {k: list(v) for k, v in before.items()} == {k: list(v) for k, v in after.items()}
    # A range that the error left open would swallow what comes after it.
    found = ranges(lambda: model(IDS), model)
    assert found["block 1/mlp"] == 1 and found["block 2"] == 1


def test_ranges_close_when_a_forward_fails() -> None:
    model = tiny()

    def fail(*arguments: Any) -> None:
        raise KeyError("lost")

    with profile() as profiler, profiling.named(model):
        handle = model.stack.blocks[0].mlp.register_forward_hook(fail)
        with pytest.raises(KeyError):
            model(IDS)
        handle.remove()
        torch.ones(3).cos()
    (cosine,) = [event for event in profiler.events() if event.name == "aten::cos"]
    assert cosine.cpu_parent is None


def test_a_model_named_twice_is_named_once() -> None:
    model = tiny("K")
    with profiling.named(model):
        found = ranges(lambda: model(IDS), model)
    assert found["block 0"] == 1 and not traces_of_names(model)


def test_a_copy_made_meanwhile_is_a_model_of_its_own() -> None:
    model = tiny("KS")
    with profiling.named(model):
        copied = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    for other in (copied, plain):
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(1.5)
    with profiling.named(model):
        assert torch.equal(copied(IDS)[0], plain(IDS)[0])
        assert not torch.equal(model(IDS)[0], plain(IDS)[0])
    found = ranges(lambda: copied(IDS), copied)
    assert found["block 1"] == 1, "and can be named itself"


def test_what_somebody_put_in_place_of_a_method_is_called_and_stays() -> None:
    model, calls = tiny("K"), []
    run = model.stack.blocks[0].run

    def mine(*given: Any) -> Any:
        calls.append(1)
        return run(*given)

    model.stack.blocks[0].run = mine
    assert ranges(lambda: model(IDS), model)["block 0"] == 1
    assert calls == [1] and model.stack.blocks[0].run is mine


def test_numbers_do_not_change() -> None:
    model = tiny()
    expected, _ = model(IDS)
    with profiling.named(model):
        found, _ = model(IDS)
    assert torch.equal(found, expected)


def count_graphs(graphs: list[int]) -> Any:
    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        graphs.append(1)
        assert not [node for node in graph.graph.nodes if "record_function" in str(node.target)]
        return graph.forward

    return backend


def test_a_compiled_model_stays_as_it_is(fresh_dynamo: None) -> None:
    model, graphs = tiny("KS"), []
    compiled = torch.compile(model, backend=count_graphs(graphs), fullgraph=True)
    expected, _ = model(IDS)
    torch.testing.assert_close(compiled(IDS)[0], expected)
    with torch.compiler.set_stance("fail_on_recompile"), profiling.named(compiled):
        torch.testing.assert_close(compiled(IDS)[0], expected)
    assert len(graphs) == 1 and not traces_of_names(model)


@pytest.mark.parametrize("first", ["outside", "inside"])
def test_a_function_that_calls_the_model_compiles_before_and_meanwhile(first: str, fresh_dynamo: None) -> None:
    model, graphs = tiny("KS"), []
    compiled = torch.compile(lambda ids: model(ids)[0], backend=count_graphs(graphs), fullgraph=True)
    expected, _ = model(IDS)
    if first == "outside":
        torch.testing.assert_close(compiled(IDS), expected)
    with profiling.named(model):
        torch.testing.assert_close(compiled(IDS), expected)
    torch.testing.assert_close(compiled(IDS), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(IDS), expected)
    assert len(graphs) <= 2


def test_only_what_is_not_compiled_is_named(fresh_dynamo: None) -> None:
    model, graphs = tiny("KS"), []
    model.stack.blocks[0].mlp.compile(backend=count_graphs(graphs))
    found = ranges(lambda: model(IDS), model)
    assert graphs and found["block 1/mlp"] == 1 and found["block 0/mlp"] == 0 and found["block 0/mixer"] == 1


def test_an_exported_program_has_no_profiler_in_it(fresh_dynamo: None) -> None:
    model = tiny("KS")
    with profiling.named(model):
        program = export.export_prefill(model.eval())
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("hybrid_flex" in name for name in targets)
    assert not [name for name in targets if "record_function" in name or "profiler" in name]


def test_every_operator_of_ours_has_a_kind() -> None:
    names = sorted({s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("hybrid_flex::")})
    kinds = {name.removeprefix("hybrid_flex::"): kind_of(name) for name in names}
    assert None not in kinds.values()
    assert kinds["chunk_kda"] == kinds["chunk_kda_training"] == kinds["chunk_kda_backward"] == "kda_chunk"
    assert kinds["sparse_attention_hopper"] == kinds["sparse_attention_backward"] == "attention"
    assert kinds["gated_rms_norm_backward"] == "gated_norm" and kinds["short_conv"] == "short_conv"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu_backward") == "attention"
    assert kind_of("hybrid_flex::something_new_backward") == "something_new"
    assert kind_of("aten::mm") is None and kind_of("forward") is None


def test_messages() -> None:
    with pytest.raises(TypeError) as caught, profiling.named("model"):  # type: ignore[arg-type]
        pass
    assert str(caught.value) == "named: model must be a torch.nn.Module, got str"
    with pytest.raises(ValueError) as error, profiling.trace("unused", model=[]):
        pass
    assert str(error.value) == "trace: model must hold at least one module, got none"
