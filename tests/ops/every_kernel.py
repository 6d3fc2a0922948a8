"""Launch every kernel once on small and ragged inputs and print the names, one a line: what a sanitizer watches.

compute-sanitizer --tool memcheck python tests/ops/every_kernel.py
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from hybrid_flex.ops import (
    chunk_kda,
    expand_pools,
    fused_recurrent_kda,
    gated_rms_norm,
    indexer_kl_loss,
    kda_decode,
    lightning_topk,
    short_conv,
    sparse_attention,
)
from hybrid_flex.ops.dsa import attention

INSIDE = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def inputs(device: str, T: int, H: int, K: int, V: int, dtype: torch.dtype, num_states: int) -> dict[str, Tensor]:
    """Draw inputs of a KDA operator, two value heads to a query head."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = {"q": normal(1, T, H, K), "k": normal(1, T, H, K), "v": normal(1, T, 2 * H, V)}
    x |= {"g": normal(1, T, 2 * H, K), "beta": normal(1, T, 2 * H)}
    x = {name: t.to(dtype) for name, t in x.items()}
    x |= {"A_log": normal(2 * H), "dt_bias": normal(2 * H * K)}
    return {**x, "initial_state": normal(num_states, 2 * H, K, V)}


def train(operator: Any, x: dict[str, Tensor], **options: Any) -> None:
    """Run an operator forward and backward."""
    x = {name: t.requires_grad_() for name, t in x.items()}
    outputs = operator(**x, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(sum(o.float().sum() for o in outputs if o is not None), list(x.values()))


def chunked(device: str) -> None:
    """Run chunk_kda with each way that its kernels take."""
    from hybrid_flex.kernels.kda import chunk

    bounds = torch.tensor([0, 70, 70, 100], device=device)
    options = {**INSIDE, "output_final_state": True}
    lower = {**options, "lower_bound": -5.0, "safe_gate": True}
    train(chunk_kda, inputs(device, 100, 1, 128, 128, torch.bfloat16, 1), **lower)
    train(chunk_kda, inputs(device, 100, 1, 100, 48, torch.bfloat16, 3), **options, cu_seqlens=bounds)
    train(chunk_kda, inputs(device, 50, 1, 64, 64, torch.float32, 1), **options)
    x = inputs(device, 100, 1, 128, 64, torch.bfloat16, 1)
    x["g"][:, ::7] += 40  # far rows, and some that take the tree
    train(chunk_kda, x, **options)
    num_segments, chunk.num_segments = chunk.num_segments, lambda *sizes: 2
    try:
        train(chunk_kda, inputs(device, 200, 1, 64, 64, torch.bfloat16, 1), **lower)
    finally:
        chunk.num_segments = num_segments


def others(device: str) -> None:
    """Run the operators beside chunk_kda."""
    with torch.no_grad():
        x = inputs(device, 3, 2, 128, 128, torch.bfloat16, 1)
        fused_recurrent_kda(**x, **INSIDE, output_final_state=True)
        x = inputs(device, 1, 2, 64, 32, torch.float32, 5)
        kda_decode(state=x.pop("initial_state"), **x, **INSIDE, state_indices=torch.tensor([3], device=device))
    bounds = torch.tensor([0, 37, 37, 77], device=device)
    x = {"x": torch.randn(1, 77, 40, device=device), "weight": torch.randn(40, 4, device=device)}
    train(short_conv, {**x, "bias": torch.randn(40, device=device)})
    train(short_conv, {**x, "initial_state": torch.randn(3, 3, 40, device=device)}, cu_seqlens=bounds)
    x = {name: torch.randn(1, 77, 2, 40, device=device) for name in ("x", "gate")}
    train(gated_rms_norm, {**x, "weight": torch.ones(40, device=device)})


def sparse(device: str) -> None:
    """Run the operators of sparse attention with each way that their kernels take."""
    for T, S, HI, DI, dtype in ((70, 140, 2, 64, torch.bfloat16), (3, 140, 3, 24, torch.float32)):
        q, k, w = (torch.randn(size, device=device, dtype=dtype) for size in ((1, T, HI, DI), (1, S, DI), (1, T, HI)))
        lightning_topk(q, k, w, 16, query_start=S - T)
        if DI == 64:
            lightning_topk(q, k, w, 16, quantization="fp8")
        lengths = torch.tensor([S // 4 * 4 - 5], device=device)
        table = torch.arange(S // 4, device=device)[None]
        lightning_topk(q, k[:, : S // 4 * 4].view(-1, 4, DI), w, 16, lengths=lengths, block_table=table)
    bounds = torch.tensor([0, 40, 40, 70], device=device)
    x = [torch.randn(size, device=device, dtype=torch.float16) for size in ((1, 70, 2, 64), (1, 70, 64), (1, 70, 2))]
    lightning_topk(*x, 16, cu_seqlens=bounds)
    q, k, w = (torch.randn(size, device=device) for size in ((1, 1, 1, 16), (1, 20000, 16), (1, 1, 1)))
    lightning_topk(q, k, w, 2048, causal=False)  # two rounds

    for H, Hkv, D, V, dtype in ((8, 2, 64, 64, torch.bfloat16), (20, 1, 576, 512, torch.bfloat16)):
        q, k = (torch.randn(1, n, h, D, device=device, dtype=dtype, requires_grad=True) for n, h in ((3, H), (90, Hkv)))
        indices = torch.rand(1, 3, 90, device=device).argsort(-1)[..., :70].sort(-1).values.int()
        v = k[..., :V] if Hkv == 1 else torch.randn(1, 90, Hkv, V, device=device, dtype=dtype, requires_grad=True)
        o, lse = sparse_attention(q, k, v, indices)
        torch.autograd.grad(o.float().sum() + lse.sum(), [x for x in (q, k, v) if x.is_leaf])
    # Few tokens of many slots, cut into spans.
    q, k = torch.randn(1, 1, 2, 64, device=device), torch.randn(1, 300, 1, 64, device=device)
    sparse_attention(q, k, None, torch.arange(300, device=device)[None, None], value_dim=64)
    # With 64 heads the kernel for latent rows on Hopper, and the sums of keys and values in one.
    for H, D in ((40, 576), (64, 512), (3, 128)):
        shapes = ((1, 3, H, D), (1, 90, 1, D))
        q, k = (torch.randn(x, device=device, dtype=torch.bfloat16, requires_grad=True) for x in shapes)
        indices = torch.rand(1, 3, 90, device=device).argsort(-1)[..., :70].sort(-1).values.int()
        o, lse = sparse_attention(q, k, None, indices, value_dim=min(D, 512))
        torch.autograd.grad(o.float().sum() + lse.sum(), (q, k))
    for H, D in ((6, 128), (130, 40)):
        shapes = ((1, 70, H, D), (1, 300, 2, D), (1, 300, 2, D))
        x = [torch.randn(n, device=device, dtype=torch.bfloat16, requires_grad=True) for n in shapes]
        indices = torch.rand(1, 70, 300, device=device).argsort(-1)[..., :40].int()
        if attention.has_kernels(x[0]):  # there is no other form of it
            o, lse = torch.ops.hybrid_flex.sparse_attention_masked(*x, indices, 1.0)
            torch.autograd.grad(o.float().sum() + lse.sum(), x)
            sparse_attention(*x, indices, backend="masked")  # on Hopper another kernel
    q, k = (torch.randn(1, 5, 2, 40, device=device, requires_grad=True) for _ in range(2))
    o, lse = sparse_attention(q, k, k.detach().clone(), torch.tensor([[[0, 3, -1]]], device=device).expand(1, 5, 3))
    torch.autograd.grad(o.sum() + lse.sum(), (q, k))

    torch.ops.hybrid_flex.select_blocks(torch.randn(2, 1, 7, 8, device=device), 3, 100, 120, 16, True, 20)
    expand_pools(torch.tensor([[[0, 2, -1], [1, 2, -1]]], device=device), 4, query_start=11)
    for kpool in (1, 4):
        x = [torch.randn(size, device=device) for size in ((1, 70, 2, 32), (1, 70 // kpool, 32), (1, 70, 2))]
        x = [t.to(torch.bfloat16).requires_grad_() for t in x]
        q, k = (torch.randn(1, 70, h, 64, device=device, dtype=torch.bfloat16) for h in (4, 2))
        for indices in (None, lightning_topk(*x, 8, kpool=kpool)):
            loss = indexer_kl_loss(*x, q, k, indices=indices, kpool=kpool)
            torch.autograd.grad(loss, x)


def main(device: str) -> None:
    """Run everything; on a CPU that only shows that the calls are right."""
    names: set[str] = set()
    if device == "cuda":
        from triton import knobs

        knobs.runtime.launch_enter_hook.add(lambda metadata: names.add(metadata.get()["name"]))
    for run in (chunked, others, sparse):
        run(device)
    if device == "cuda":
        torch.cuda.synchronize()
    print("\n".join(sorted(names)))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["cuda"]))
