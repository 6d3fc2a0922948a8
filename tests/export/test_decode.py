"""export_decode: equal to eager steps, any batch, saved and loaded in a fresh process, caches written in place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hybrid_flex import export
from hybrid_flex.export import export_decode, export_prefill, load, save
from hybrid_flex.export.decode import empty_states
from hybrid_flex.layers import (
    CausalAttention,
    DeepSeekSparseAttention,
    DeepSeekSparseMLA,
    DSACache,
    KimiDeltaAttention,
    KVCache,
    ParallelHybrid,
    SequentialHybrid,
)
from hybrid_flex.models import HybridBlock, HybridConfig, HybridLanguageModel, LayerWiseHybrid

LENGTH = 40
INDEX = {"topk": 8, "index_heads": 2, "index_head_dim": 8}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 12}


def config(pattern: str, **options: Any) -> HybridConfig:
    return HybridConfig(vocab_size=50, hidden_size=32, num_heads=2, pattern=pattern, **INDEX, **options)


def kda() -> KimiDeltaAttention:
    return KimiDeltaAttention(32, 2, 16)


def gqa(**options: Any) -> DeepSeekSparseAttention:
    return DeepSeekSparseAttention(32, 4, num_kv_heads=2, **INDEX, **options)


def mla(**options: Any) -> DeepSeekSparseMLA:
    return DeepSeekSparseMLA(32, 4, **LATENT, **INDEX, **options)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "kda": kda,
    "kda-HV4-lower_bound": lambda: KimiDeltaAttention(32, 2, 16, num_v_heads=4, v_head_dim=8, lower_bound=-5.0),
    "gqa": gqa,
    "gqa-rope-kpool4": lambda: gqa(rope_dim=4, index_kpool=4),
    "mla": mla,
    "mla-rope-qlora-kpool4": lambda: mla(rope_dim=4, q_lora_rank=12, index_kpool=4),
    "dense-gqa-rope": lambda: CausalAttention(32, 4, num_kv_heads=2, rope_dim=8),
    "sequential": lambda: SequentialHybrid(kda(), mla(rope_dim=4)),
    "parallel": lambda: ParallelHybrid(kda(), gqa()),
    "block-S": lambda: HybridBlock(config("S"), "S"),
    "block-D": lambda: HybridBlock(config("D"), "D"),
    "stack": lambda: LayerWiseHybrid(config("KSRD")),
    "model-KKKS": lambda: HybridLanguageModel(config("KKKS")),
    "model-KSRD-kpool4": lambda: HybridLanguageModel(config("KSRD", index_kpool=4)),
    "model-KSRD-mla-rope": lambda: HybridLanguageModel(config("KSRD", sparse_attention="mla", rope_dim=4)),
}
every_module = pytest.mark.parametrize("name", MODULES)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]()


def inputs(model: nn.Module, batch_size: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, HybridLanguageModel):
        return torch.randint(50, (batch_size, length), generator=generator)
    return torch.randn(batch_size, length, 32, generator=generator)


def reserved(model: Any, states: Any, length: int = LENGTH) -> Any:
    return model.reserve(states, length) if hasattr(model, "reserve") else states


def caches(states: Any) -> list[DSACache | KVCache]:
    flat = states if isinstance(states, tuple) else (states,)
    return [state for state in flat if isinstance(state, DSACache | KVCache)]


def assert_steps_equal(model: Any, step: Any, batch_size: int, prompt: int = 15, count: int = 20) -> None:
    """Run the program and the model side by side from the same prompt; compare outputs and states, by identity too."""
    x = inputs(model, batch_size, prompt + count)
    with torch.no_grad():
        if prompt:
            states = model(x[:, :prompt])[1]
            states, expected = reserved(model, states), reserved(model, states)
        else:
            states, expected = (empty_states(model, batch_size, LENGTH) for _ in range(2))
    places = [cache.kv.data_ptr() for cache in caches(states)]
    for t in range(prompt, prompt + count):
        got, states = step(x[:, t], states)
        with torch.no_grad():
            want, expected = model.step(x[:, t], expected)[:2]
        torch.testing.assert_close(got, want)
        assert not got.requires_grad
    assert type(states) is type(expected)
    for a, b in zip(pytree.tree_leaves(states), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad
    assert [cache.kv.data_ptr() for cache in caches(states)] == places, "caches are written where they lie"
    assert all(cache.lengths.tolist() == [prompt + count] * batch_size for cache in caches(states))


@every_module
def test_twenty_steps_from_a_prompt_equal_eager_steps(name: str) -> None:
    """Outside of no_grad: a loop of steps must not chain its graphs."""
    model = build(name)
    step = export_decode(model, max_length=LENGTH).module()
    for batch_size in (1, 2, 5):
        assert_steps_equal(model, step, batch_size)
    assert_steps_equal(model, step, 3, prompt=0)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "name",
    ["mla", "model-KSRD-kpool4"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("kda", "gqa-rope-kpool4", "dense-gqa-rope", "parallel")],
)
def test_a_strict_program_does_the_same(name: str) -> None:
    model = build(name)
    step = export_decode(model, max_length=LENGTH, strict=True).module()
    for batch_size in (1, 3):
        assert_steps_equal(model, step, batch_size)


def test_steps_continue_the_prefill_program() -> None:
    """Nothing of the model's own code runs between the two programs but `reserve`."""
    model: Any = build("model-KSRD-kpool4")
    prefill, step = export_prefill(model).module(), export_decode(model, max_length=LENGTH).module()
    ids = inputs(model, 2, 11)
    expected = model.generate(ids, 20, greedy=True)
    logits, states = prefill(ids)
    states, token, out = model.reserve(states, LENGTH), logits[:, -1].argmax(-1), [ids]
    for _ in range(20):
        out.append(token[:, None])
        logits, states = step(token, states)
        token = logits.argmax(-1)
    assert torch.equal(torch.cat(out, 1), expected)


@pytest.mark.parametrize("max_length", [24, 64])
@pytest.mark.parametrize(
    "name", ["model-KSRD-kpool4", "model-KSRD-mla-rope", "sequential", "block-D", "gqa-rope-kpool4"]
)
def test_the_prefill_program_can_reserve_by_itself(name: str, max_length: int) -> None:
    """Its states are the decoding program's: no code of the model runs between the two, at any length of the prompt."""
    model = build(name)
    prefill = export_prefill(model, max_length=max_length).module()
    step = export_decode(model, max_length=max_length).module()
    for batch_size, length in ((1, 1), (2, 2), (1, 6), (3, 7), (2, max_length - 1), (1, max_length)):
        x = inputs(model, batch_size, max_length)
        with torch.no_grad():
            y, states = prefill(x[:, :length])
            want, expected = model(x[:, :length])
            expected = reserved(model, expected, max_length)
            torch.testing.assert_close(y, want)
            for t in range(length, min(length + 3, max_length)):
                y_t, states = step(x[:, t], states)
                want_t, expected = model.step(x[:, t], expected)[:2]  # type: ignore[operator]
                torch.testing.assert_close(y_t, want_t)
        for a, b in zip(pytree.tree_leaves(states), pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(a, b)


FRESH = """
import sys, torch
from pathlib import Path
from torch.utils import _pytree as pytree
from hybrid_flex.export import load
for path in sorted(Path(sys.argv[1]).glob("*.pt2")):
    step = load(path).module()
    for x, states, wanted in torch.load(path.with_suffix(".pt")):
        for x_t, want in zip(x.unbind(1), wanted, strict=True):
            y_t, states = step(x_t, states)
            torch.testing.assert_close(y_t, want)
    print(path.stem)
"""


def test_saved_programs_run_in_a_fresh_process(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    for name in MODULES:
        model: Any = build(name)
        save(export_decode(model, max_length=LENGTH), tmp_path / f"{name}.pt2")
        cases = []
        for batch_size in (1, 4):
            x = inputs(model, batch_size, 35)
            with torch.no_grad():
                states = reserved(model, model(x[:, :15])[1])
                own, wanted = pytree.tree_map(torch.clone, states), []
                for x_t in x[:, 15:].unbind(1):
                    y_t, own = model.step(x_t, own)[:2]
                    wanted.append(y_t)
            cases.append((x[:, 15:], states, wanted))
        torch.save(cases, tmp_path / f"{name}.pt")
    assert sorted(fresh_process(FRESH, tmp_path).split()) == sorted(MODULES)


def test_the_file_holds_the_weights_and_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build("model-KSRD-kpool4")
    program = export_decode(model, max_length=20000)
    save(program, tmp_path / "step.pt2")
    assert program.example_inputs is not None, "the program in memory keeps what compiling it asks for"
    weights = sum(p.nbytes for p in model.parameters())
    assert (tmp_path / "step.pt2").stat().st_size < weights + 2_000_000
    loaded = load(tmp_path / "step.pt2")
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warnings, "torch has nothing to say about the file"
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in loaded.module().named_parameters()} == names


def test_the_model_stays_as_it_was() -> None:
    model: Any = build("model-KKKS")
    before, kind = {name: p.clone() for name, p in model.named_parameters()}, type(model)
    program = export_decode(model, max_length=LENGTH)
    assert type(model) is kind and type(model.stack.blocks[0]) is HybridBlock
    for name, p in model.named_parameters():
        assert p.requires_grad and torch.equal(p, before[name])
    # The program's weights are the model's memory, not a copy, and learn nothing.
    own = dict(model.named_parameters())
    for name, p in program.module().named_parameters():
        assert p.data_ptr() == own[name].data_ptr() and not p.requires_grad


def test_the_graph_holds_operators_and_no_grad_mode() -> None:
    program = export_decode(build("model-KSRD-kpool4"), max_length=LENGTH)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "hybrid_flex.fused_recurrent_kda.default" in targets and "hybrid_flex.lightning_topk.default" in targets
    assert not any("grad" in target for target in targets)


@pytest.mark.parametrize("name", ["gqa-rope-kpool4", "mla-rope-qlora-kpool4", "parallel"])
def test_sizes_and_bounds(name: str) -> None:
    model = build(name)
    fixed = export_decode(model, max_length=LENGTH, batch_size=3, dynamic=False)
    assert_steps_equal(model, fixed.module(), 3)
    with pytest.raises((AssertionError, RuntimeError), match=r"x_t.size\(\)\[0\] == 3"):
        fixed.module()(torch.randn(2, 32), empty_states(model, 2, LENGTH))
    for largest, sizes in ((1, (1,)), (2, (1, 2)), (4, (1, 4))):
        step = export_decode(model, max_length=LENGTH, max_batch_size=largest).module()
        for batch_size in sizes:
            assert_steps_equal(model, step, batch_size)
        with pytest.raises((AssertionError, RuntimeError), match=rf"x_t.size\(\)\[0\] [<=]= {largest}|x_t"):
            step(torch.randn(largest + 1, 32), empty_states(model, largest + 1, LENGTH))


def test_a_full_cache_is_not_written_behind_its_end() -> None:
    for name in ("gqa", "dense-gqa-rope"):
        model: Any = build(name)
        step = export_decode(model, max_length=8).module()
        state = model.init_cache(2, 8)
        for _ in range(8):
            _, state = step(torch.randn(2, 32), state)
        with pytest.raises(IndexError, match="out of"):
            step(torch.randn(2, 32), state)
        assert state.lengths.tolist() == [8, 8]


def test_poisoned_memory(nan_memory: None) -> None:
    model: Any = build("model-KSRD-kpool4")
    step = export_decode(model, max_length=LENGTH).module()
    states = model.reserve(model.init_state(2), LENGTH)
    for ids_t in inputs(model, 2, 10).unbind(1):
        logits, states = step(ids_t, states)
        assert logits.isfinite().all()


def test_low_precision() -> None:
    model: Any = build("model-KSRD-mla-rope").to(torch.bfloat16)
    assert_steps_equal(model, export_decode(model, max_length=LENGTH).module(), 2)


def test_messages() -> None:
    model = build("model-KKKS")
    for keyword in ("batch_size", "max_length", "max_batch_size"):
        with pytest.raises(ValueError) as size:
            export_decode(model, **{"max_length": 8, keyword: 0})  # type: ignore[arg-type]
        assert str(size.value) == f"export_decode: {keyword} must be positive, got 0"
    with pytest.raises(ValueError) as bound:
        export_decode(model, max_length=8, dynamic=False, max_batch_size=4)
    assert str(bound.value) == "export_decode: max_batch_size must be None with dynamic=False, got 4"
    with pytest.raises(ValueError) as foreign:
        export_decode(nn.Linear(3, 3), max_length=8)
    assert str(foreign.value) == (
        "export_decode: model must have step and init_state, as models and layers do, got Linear"
    )
    with pytest.raises(ValueError, match="indices must come from an earlier layer, got None"):
        export_decode(gqa(share_indices=True), max_length=8)
    with pytest.raises(ValueError, match="form must be 'absorbed' to decode, got 'expanded'"):
        export_decode(mla(form="expanded"), max_length=8)
    assert export.export_decode is export_decode


@pytest.mark.gpu
def test_cuda_program(tmp_path: Path) -> None:
    model: Any = build("model-KSRD-kpool4").cuda()
    save(export_decode(model, max_length=LENGTH), tmp_path / "step.pt2")
    step = load(tmp_path / "step.pt2").module()
    ids = inputs(model, 3, 35).cuda()
    with torch.no_grad():
        prefilled = model(ids[:, :15])[1]
        states, expected = model.reserve(prefilled, LENGTH), model.reserve(prefilled, LENGTH)
        for t in range(15, 35):
            got, states = step(ids[:, t], states)
            want, expected = model.step(ids[:, t], expected)
            torch.testing.assert_close(got, want)
