"""DSA layers on CUDA against the same layers in float64 on a CPU: outputs, gradients, decoding in a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid_flex import DeepSeekSparseAttention, DeepSeekSparseMLA
from hybrid_flex.layers.sparse import SparseLayer

pytestmark = pytest.mark.gpu

INDEXER = {"topk": 64, "index_heads": 4, "index_head_dim": 64}


def gqa(kpool: int) -> SparseLayer:
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "rope_dim": 32, "index_kpool": kpool}
    return DeepSeekSparseAttention(256, **sizes, **INDEXER)  # type: ignore[arg-type]


def mla(kpool: int) -> SparseLayer:
    sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 64, "v_head_dim": 64, "rope_dim": 64, "q_lora_rank": 128}
    return DeepSeekSparseMLA(256, 8, **sizes, **INDEXER, index_kpool=kpool)  # type: ignore[arg-type]


each_layer = pytest.mark.parametrize("kpool", [1, 4])
each_kind = pytest.mark.parametrize("make", [gqa, mla])


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double().cpu() - y).norm() / y.norm())


@each_kind
@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [300, 60], ids=["selected", "short"])
def test_equals_the_layer_on_a_cpu(
    make: Callable[[int], SparseLayer], kpool: int, dtype: torch.dtype, length: int
) -> None:
    torch.manual_seed(0)
    layer = make(kpool).to(dtype)
    exact = copy.deepcopy(layer).double()
    layer = layer.cuda()
    x = torch.randn(2, length, 256).to(dtype)
    x_cuda, x_exact = x.cuda().requires_grad_(), x.double().requires_grad_()
    y, _, indices, loss = layer.attend(x_cuda, stage="sparse")
    # What is almost equal may be selected otherwise; both attend to one selection.
    want, _, _, _ = exact.attend(x_exact, indices=indices.cpu())
    own, want_loss = exact.attend(x_exact, stage="sparse")[2:]
    assert (indices.cpu() == own).float().mean() > (0.999 if dtype == torch.float32 else 0.6)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    assert relative(y, want) < bound
    assert float((loss.cpu() - want_loss).abs() / want_loss) < 5 * bound
    d_y = torch.randn(y.shape).double()
    layer_parameters = {n: p for n, p in layer.named_parameters() if not n.startswith("indexer")}
    grads = torch.autograd.grad(y, [x_cuda, *layer_parameters.values()], d_y.to(dtype).cuda())
    exact_parameters = [dict(exact.named_parameters())[name] for name in layer_parameters]
    for name, grad, right in zip(
        ["x", *layer_parameters], grads, torch.autograd.grad(want, [x_exact, *exact_parameters], d_y), strict=True
    ):
        assert relative(grad, right) < 2 * bound, name


@each_kind
@each_layer
@pytest.mark.parametrize("page_size", [None, 64], ids=["one-piece", "pages"])
@torch.no_grad()
def test_decoding_in_a_cuda_graph(make: Callable[[int], SparseLayer], kpool: int, page_size: int | None) -> None:
    torch.manual_seed(0)
    layer = make(kpool).cuda()
    caches = [layer.init_cache(3, 600, page_size=page_size) for _ in range(2)]
    for b, length in enumerate((500, 3, 130)):
        state = layer(torch.randn(1, length, 256, device="cuda"))[1]
        for cache in caches:
            layer.fill_cache(cache, b, state)
    x = torch.randn(3, 1, 256, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer.decode(x, copy.deepcopy(caches[0]))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer.decode(x, caches[0])
    for _ in range(9):
        x.copy_(torch.randn(3, 1, 256))
        graph.replay()
        torch.testing.assert_close(y, layer.decode(x, caches[1]), rtol=1e-5, atol=1e-5)
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == [509, 12, 139]


@each_kind
@torch.no_grad()
def test_steps_compiled_into_graphs(make: Callable[[int], SparseLayer]) -> None:
    torch.manual_seed(0)
    layer = make(4).cuda()
    cache, eager = layer.init_cache(2, 600), layer.init_cache(2, 600)
    step = torch.compile(layer.decode, fullgraph=True, mode="reduce-overhead")
    for _ in range(12):
        x = torch.randn(2, 1, 256, device="cuda")
        torch.testing.assert_close(step(x, cache).clone(), layer.decode(x, eager), rtol=1e-4, atol=1e-4)
