"""Every DSA operator in one program: exported strict and non-strict, saved, loaded in a fresh process,
differentiated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hybrid_flex.ops.dsa import (
    apply_rope,
    expand_pools,
    indexer_kl_loss,
    lightning_topk,
    pool_index_keys,
    rope_cos_sin,
    sparse_attention,
)


class Program(nn.Module):
    """Selection, pooled selection, attention in both forms and the indexer's loss, dynamic in batch and length."""

    def forward(
        self, q_idx: Tensor, k_idx: Tensor, w: Tensor, q: Tensor, k: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cos, sin = rope_cos_sin(torch.arange(k.shape[1]), 4)
        start = k.shape[1] - q.shape[1]
        q_idx, k_idx = apply_rope(q_idx, cos[start:], sin[start:]), apply_rope(k_idx, cos, sin)
        indices = lightning_topk(q_idx, k_idx, w, 5, query_start=start)
        o, _ = sparse_attention(q, k, k[..., :6], indices)
        flex, _ = sparse_attention(q, k, k[..., :6], indices, backend="flex")
        pooled = pool_index_keys(k_idx, k_idx, torch.zeros_like(k_idx[0, :2]), 2)
        pools = lightning_topk(q_idx, pooled, w, 2, query_start=start, kpool=2)
        wide, lse = sparse_attention(q, k, k, expand_pools(pools, 2, query_start=start))
        loss = indexer_kl_loss(q_idx, k_idx, w, q, k, indices=indices, query_start=start)
        return o + flex, wide, lse, loss + indexer_kl_loss(q_idx, k_idx, w, q, k, query_start=start)


def inputs(batch_size: int, num_queries: int, num_keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_keys)
    shapes = ((batch_size, num_queries, 2, 4), (batch_size, num_keys, 4), (batch_size, num_queries, 2))
    shapes += ((batch_size, num_queries, 4, 8), (batch_size, num_keys, 1, 8))
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


FRESH = """
import sys, torch
import hybrid_flex.ops.dsa
program, tensors, outputs = sys.argv[1:]
module = torch.export.load(program).module()
for given, expected in zip(torch.load(tensors), torch.load(outputs)):
    given = [x.requires_grad_() for x in given]
    got = module(*given)
    loss = sum(x.square().sum() for x in got)
    for a, b in zip((*got, *torch.autograd.grad(loss, given)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
print("equal")
"""


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_save_load(strict: bool, tmp_path: Path, fresh_process: Callable[..., str], fresh_dynamo: None) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    shapes = [{0: dynamic, 1: dynamic} for _ in range(5)]
    program = torch.export.export(Program(), tuple(inputs(2, 9, 14)), dynamic_shapes=tuple(shapes), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    for name in ("lightning_topk", "sparse_attention_gather", "sparse_attention_flex", "indexer_kl_loss"):
        assert f"hybrid_flex.{name}.default" in targets
    torch.export.save(program, tmp_path / "program.pt2")
    cases, expected = [], []
    for sizes in ((2, 9, 14), (3, 6, 40), (2, 30, 30)):
        given = inputs(*sizes)
        outputs = Program()(*given)
        loss = torch.stack([x.square().sum() for x in outputs]).sum()
        expected.append([x.detach() for x in (*outputs, *torch.autograd.grad(loss, given))])
        cases.append([x.detach() for x in given])
    torch.save(cases, tmp_path / "cases.pt")
    torch.save(expected, tmp_path / "expected.pt")
    files = [tmp_path / x for x in ("program.pt2", "cases.pt", "expected.pt")]
    assert fresh_process(FRESH, *files).strip().endswith("equal")
