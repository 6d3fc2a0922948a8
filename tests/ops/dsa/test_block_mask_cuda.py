"""FlexAttention with our masks on CUDA, trained and compiled: exact at token level, one graph for many masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from hybrid_flex.ops.dsa import block_topk_mask, topk_block_mask
from hybrid_flex.ops.dsa.reference import reference_attention

pytestmark = pytest.mark.gpu

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def inputs(T: int, S: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = ((1, T, 4, 64), (1, S, 2, 64), (1, S, 2, 64))
    return [torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in sizes]


def by_tokens(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
    mask = topk_block_mask(indices, k.shape[1])
    q_BHTK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q_BHTK, k_BHSK, v_BHSK, block_mask=mask, enable_gqa=True).transpose(1, 2)


def by_blocks(q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
    mask = block_topk_mask(scores, 3, q.shape[1], k.shape[1], query_start=k.shape[1] - q.shape[1])
    q_BHTK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q_BHTK, k_BHSK, v_BHSK, block_mask=mask, enable_gqa=True).transpose(1, 2)


def token_selection(T: int, S: int, seed: int) -> Tensor:
    """Draw 40 keys of those each query may see, ascending, -1 where it sees fewer."""
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = torch.rand(1, T, S, generator=generator, device="cuda")
    visible = torch.arange(S, device="cuda") <= torch.arange(S - T, S, device="cuda")[:, None]
    order = draw.masked_fill(~visible, 2.0).argsort(-1)[..., :40]
    chosen = torch.where(visible.expand(1, T, S).gather(-1, order), order, S).sort(-1).values
    return torch.where(chosen < S, chosen, -1).int()


def block_selection(T: int, S: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw scores of blocks, and write the three best that each block of queries sees out as token indices."""
    generator = torch.Generator("cuda").manual_seed(seed)
    rows, columns = -(-T // 128), -(-S // 128)
    scores = torch.randn(1, rows, columns, generator=generator, device="cuda")
    t, s = torch.arange(S - T, S, device="cuda")[:, None], torch.arange(S, device="cuda")
    last = torch.clamp(torch.arange(1, rows + 1, device="cuda") * 128, max=T) + S - T
    seen = torch.arange(columns, device="cuda") * 128 < last[:, None]
    best = scores.masked_fill(~seen, float("-inf")).topk(3, dim=-1).indices
    member = torch.zeros_like(seen[None]).scatter(-1, best, True) & seen
    member = member.repeat_interleave(128, 1)[:, :T].repeat_interleave(128, 2)[..., :S] & (s <= t)
    chosen = torch.where(member, s, S).sort(-1).values[..., :384]
    return scores, torch.where(chosen < S, chosen, -1).int()


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


def compare(attend: Attend, x: list[Tensor], chosen: Tensor, indices: Tensor) -> None:
    exact = [t.detach().double().requires_grad_() for t in x]
    want, _ = reference_attention(*exact, indices)
    got = attend(*x, chosen)
    d_o = torch.randn(want.shape, generator=torch.Generator("cuda").manual_seed(8), device="cuda", dtype=torch.float64)
    assert relative(got, want) < 1e-2
    grads = torch.autograd.grad(got, x, d_o.to(got.dtype))
    for name, grad, right in zip("qkv", grads, torch.autograd.grad(want, exact, d_o), strict=True):
        assert relative(grad, right) < 2e-2, name


@pytest.mark.parametrize(("T", "S"), [(512, 512), (300, 700), (1, 130)])
def test_a_token_selection_forward_and_backward(T: int, S: int, fresh_dynamo: None) -> None:
    indices = token_selection(T, S, seed=1)
    compare(torch.compile(by_tokens, fullgraph=True), inputs(T, S), indices, indices)


@pytest.mark.parametrize(("T", "S"), [(1024, 1024), (300, 1000)])
def test_a_block_selection_forward_and_backward(T: int, S: int, fresh_dynamo: None) -> None:
    scores, indices = block_selection(T, S, seed=1)
    compare(torch.compile(by_blocks, fullgraph=True), inputs(T, S), scores, indices)


@pytest.mark.parametrize("kind", ["tokens", "blocks"])
def test_a_hundred_masks_take_one_compilation(kind: str, fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend("inductor")
    attend = torch.compile(by_tokens if kind == "tokens" else by_blocks, fullgraph=True, backend=counter)
    x = inputs(512, 512)
    for seed in range(100):
        scores, indices = block_selection(512, 512, seed)
        if kind == "tokens":
            scores = indices = token_selection(512, 512, seed)
        got = attend(*x, scores)
        torch.autograd.grad(got.sum(), x)
        if seed % 33 == 0:
            assert relative(got, reference_attention(*(t.detach().double() for t in x), indices)[0]) < 1e-2
    assert counter.frame_count == 1
