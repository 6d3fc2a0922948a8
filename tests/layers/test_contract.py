"""What every mixer promises: split = whole = step, bit-exact causality, packed = separate, clear errors, one graph."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.layers import (
    CausalAttention,
    DeepSeekSparseAttention,
    DeepSeekSparseMLA,
    KimiDeltaAttention,
    ParallelHybrid,
    SequentialHybrid,
)

D = 32
INDEX = {"topk": 8, "index_heads": 3, "index_head_dim": 8}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 12}


def kda() -> KimiDeltaAttention:
    return KimiDeltaAttention(D, 2, 16)


def dsa() -> DeepSeekSparseAttention:
    return DeepSeekSparseAttention(D, 4, num_kv_heads=2, rope_dim=8, **INDEX)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "kda": kda,
    "kda-HV4-V8-lower_bound": lambda: KimiDeltaAttention(
        D, 2, 16, num_v_heads=4, v_head_dim=8, lower_bound=-5.0, allow_neg_eigval=True, conv_size=3, chunk_size=16
    ),
    "dense-gqa": lambda: CausalAttention(D, 4, num_kv_heads=2, rope_dim=8),
    "dsa-mha": lambda: DeepSeekSparseAttention(D, 4, **INDEX),
    "dsa-gqa-rope": dsa,
    "dsa-mqa-kpool4": lambda: DeepSeekSparseAttention(D, 4, num_kv_heads=1, rope_dim=4, index_kpool=4, **INDEX),
    "mla-rope-qlora": lambda: DeepSeekSparseMLA(D, 4, rope_dim=4, q_lora_rank=12, **LATENT, **INDEX),
    "mla-kpool4": lambda: DeepSeekSparseMLA(D, 4, index_kpool=4, **LATENT, **INDEX),
    "mla-expanded": lambda: DeepSeekSparseMLA(D, 4, form="expanded", **LATENT, **INDEX),
    # A short chunk: half the nodes in the graph, half the time to compile it.
    "sequential": lambda: SequentialHybrid(KimiDeltaAttention(D, 2, 16, chunk_size=16), dsa()),
    "parallel": lambda: ParallelHybrid(KimiDeltaAttention(D, 2, 16, chunk_size=16), dsa()),
}
PACKABLE = [name for name in LAYERS if "kpool" not in name]
# One name per code path of the compiler; the others differ by sizes.
COMPILED = [
    "kda",
    "dense-gqa",
    "dsa-gqa-rope",
    "dsa-mqa-kpool4",
    "mla-rope-qlora",
    "mla-kpool4",
    pytest.param("sequential", marks=pytest.mark.slow),  # the parts are those of the next one
    "parallel",
]
every_layer = pytest.mark.parametrize("name", LAYERS)
# Summing in another order moves a float32 output of order 1 by a few 1e-7.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layer = LAYERS[name]()
    if name == "parallel":
        nn.init.normal_(layer.gate_proj.weight)
    return layer


def steps(layer: nn.Module, x: Tensor, state: Any) -> Tensor:
    out = []
    for x_t in x.unbind(1):
        y_t, state = layer.step(x_t, state)
        out.append(y_t)
    return torch.stack(out, 1)


@torch.no_grad()
@every_layer
def test_split_and_steps_equal_the_whole(name: str) -> None:
    layer, x = build(name), torch.randn(2, 83, D)
    whole, _ = layer(x)
    first, state = layer(x[:, :17])
    second, state = layer(x[:, 17:78], state)
    torch.testing.assert_close(torch.cat([first, second, steps(layer, x[:, 78:], state)], 1), whole, **CLOSE)
    torch.testing.assert_close(steps(layer, x[:, :30], layer.init_state(2)), whole[:, :30], **CLOSE)


@torch.no_grad()
@settings(max_examples=8, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, 69), max_size=4), name=st.sampled_from(sorted(LAYERS)))
def test_any_split_equals_the_whole(name: str, cuts: set[int]) -> None:
    layer, x = build(name), torch.randn(1, 70, D)
    out, state = [], None
    for part in x.tensor_split(sorted(cuts), dim=1):
        y, state = layer(part, state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), layer(x)[0], **CLOSE)


@torch.no_grad()
@every_layer
def test_the_future_changes_no_bit_of_the_past(name: str) -> None:
    layer, x = build(name), torch.randn(2, 90, D)
    changed = x.clone()
    changed[:, 50:] = 3 * torch.randn(2, 40, D)
    assert torch.equal(layer(x)[0][:, :50], layer(changed)[0][:, :50])
    assert not torch.equal(layer(x)[0][:, 50], layer(changed)[0][:, 50])


@torch.no_grad()
@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["i32", "i64"])
def test_packed_equals_separate(name: str, dtype: torch.dtype) -> None:
    layer, x = build(name), torch.randn(1, 75, D)
    bounds = [0, 1, 1, 40, 70, 75]
    packed, state = layer(x, cu_seqlens=torch.tensor(bounds, dtype=dtype))
    for begin, end in pairwise(bounds):
        if end > begin:
            torch.testing.assert_close(packed[:, begin:end], layer(x[:, begin:end])[0], **CLOSE)
    if name.startswith("kda"):
        assert state.S.shape[0] == state.conv_q.shape[0] == 5
        torch.testing.assert_close(state.S[2:3], layer(x[:, 1:40])[1].S, **CLOSE)
        assert (state.S[1] == 0).all() and (state.conv_v[1] == 0).all()
    elif name not in ("sequential", "parallel"):
        assert state is None


@torch.no_grad()
@every_layer
def test_half_precision_keeps_the_dtype_of_x(name: str) -> None:
    layer, x = build(name), torch.randn(2, 20, D)
    low, state = layer.to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    if name.startswith("kda"):
        assert state.S.dtype == torch.float32
    if "dsa" in name or "mla" in name:
        return  # rounding moves the scores of the selection
    exact, _ = layer.float()(x)
    assert (low.float() - exact).norm() / exact.norm() < 0.02


@every_layer
def test_decode_on_a_state_of_another_batch_size_is_refused(name: str) -> None:
    layer = build(name)
    _, state = layer(torch.randn(2, 5, D))
    with pytest.raises(ValueError, match=r": state must hold 3 sequences, as many as the input, got 2 in state\."):
        layer.step(torch.randn(3, D), state)
    with pytest.raises(ValueError, match="state must hold 3 sequences"):
        layer(torch.randn(3, 4, D), state)


@every_layer
def test_wrong_input_is_refused(name: str) -> None:
    layer = build(name)
    with pytest.raises((ValueError, RuntimeError), match=r"x must be \[B, T, D\]|shape"):
        layer(torch.randn(2, 5, D + 1))
    with pytest.raises(ValueError, match=r"cu_seqlens must come with a batch size of 1"):
        layer(torch.randn(2, 5, D), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"cu_seqlens must end at T = 5"):
        layer(torch.randn(1, 5, D), cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.parametrize("name", [name for name in LAYERS if "dsa" in name or "mla" in name or "dense" in name])
def test_a_cache_does_not_go_with_packing(name: str) -> None:
    layer = build(name)
    with pytest.raises(ValueError, match="state must be None with cu_seqlens"):
        layer(torch.randn(1, 5, D), layer.init_state(1), torch.tensor([0, 5]))


@pytest.mark.parametrize("name", [name for name in LAYERS if "kpool" in name])
def test_pools_do_not_go_with_packing(name: str) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens must be None with pooled keys, got kpool = 4"):
        build(name)(torch.randn(1, 12, D), None, torch.tensor([0, 5, 12]))


def gradients(layer: nn.Module, y: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    y.square().mean().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_for_all_sizes_forward_and_backward(name: str) -> None:
    layer = build(name)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    # A second symbol doubles the time to trace the many nodes of KDA; export has both dynamic for every layer.
    any_batch = "dsa" in name or "mla" in name
    for batch, length in ((2, 130), (3, 70), (4, 97)):
        x = torch.randn(batch if any_batch else 2, length, D)
        torch._dynamo.mark_dynamic(x, 1)
        if any_batch:
            torch._dynamo.mark_dynamic(x, 0)
        y, expected = compiled(x)[0], layer(x)[0]
        torch.testing.assert_close(y, expected, **CLOSE)
        got, want = gradients(layer, y), gradients(layer, expected)
        assert got.keys() == want.keys()
        for parameter in want:
            torch.testing.assert_close(got[parameter], want[parameter], **CLOSE, msg=parameter)
    assert backend.frame_count == 1


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["kda", "dsa-gqa-rope", "dsa-mqa-kpool4"])
def test_decoding_and_packing_stay_in_few_graphs(name: str) -> None:
    """Automatic dynamic shapes: a graph for the first size and one for all others."""
    layer = build(name)
    backend = CompileCounterWithBackend("aot_eager")
    step = torch.compile(layer.step, backend=backend, fullgraph=True)
    _, state = layer(torch.randn(2, 11, D))
    for x_t in torch.randn(6, 2, D):
        expected, _ = layer.step(x_t, state)
        y_t, state = step(x_t, state)
        torch.testing.assert_close(y_t, expected, **CLOSE)
    assert backend.frame_count <= 2
    if name not in PACKABLE:
        return
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for bounds in ([0, 10, 70], [0, 3, 3, 100, 130], [0, 50, 60, 90, 95, 97]):
        x, cu_seqlens = torch.randn(1, bounds[-1], D), torch.tensor(bounds)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
        torch.testing.assert_close(compiled(x, None, cu_seqlens)[0], layer(x, None, cu_seqlens)[0], **CLOSE)
    assert backend.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
@pytest.mark.parametrize("name", COMPILED)
def test_export_with_dynamic_batch_and_length(name: str, strict: bool) -> None:
    layer = build(name)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(layer, (torch.randn(2, 33, D),), dynamic_shapes=(sizes,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, length in ((2, 33), (3, 70), (1, 129)):
        x = torch.randn(batch, length, D)
        torch.testing.assert_close(loaded(x)[0], layer(x)[0], **CLOSE)
    gradients(layer, loaded(torch.randn(2, 40, D))[0])
    assert all(p.grad is not None for n, p in loaded.named_parameters() if "indexer" not in n)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["kda", "mla-kpool4"])
def test_export_with_a_state(name: str) -> None:
    layer = build(name)
    dynamic = torch.export.Dim.DYNAMIC
    _, state = layer(torch.randn(2, 21, D))
    grows = {0: dynamic} if name == "kda" else {0: dynamic, 1: dynamic}
    shapes = ({0: dynamic, 1: dynamic}, [grows] * len(vars(state)))
    program = torch.export.export(layer, (torch.randn(2, 33, D), state), dynamic_shapes=shapes, strict=False)
    x = torch.randn(3, 75, D)
    _, state = layer(x[:, :40])
    y, new_state = program.module()(x[:, 40:], state)
    torch.testing.assert_close(y, layer(x)[0][:, 40:], **CLOSE)
    assert type(new_state) is type(state)
