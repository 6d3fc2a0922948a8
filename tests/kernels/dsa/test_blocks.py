"""The kernel that selects blocks of keys against the plain form: ties, infinities, ragged borders, every output."""

from __future__ import annotations

import pytest
import torch

from hybrid_flex.ops.dsa import block_mask

# B, H, q_len, kv_len, block size, blocks to keep, query_start
SIZES = [(1, 1, 1, 1, 16, 1, 0), (2, 3, 200, 200, 16, 4, 0), (1, 2, 70, 300, 32, 3, 230), (1, 1, 100, 90, 16, 40, 0)]
NAMES = ("member", "number", "order", "full_number", "full_order")


@pytest.mark.parametrize("scores", ["random", "whole", "extreme"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "B{}-H{}-T{}-S{}-{}-{}-{}".format(*s))
def test_equals_the_plain_form(
    device: str, sizes: tuple[int, ...], causal: bool, scores: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    B, H, q_len, kv_len, size, topk, start = sizes
    generator = torch.Generator().manual_seed(q_len)
    x = torch.randn(B, H, -(-q_len // size), -(-kv_len // size), generator=generator)
    x = x.mul(2).round() if scores == "whole" else x
    if scores == "extreme":
        x[..., ::3], x[..., 1::3], x[0, 0, -1, 0] = float("inf"), float("-inf"), float("nan")
    options = (topk, q_len, kv_len, size, causal, start)
    monkeypatch.setattr(block_mask, "has_kernels", lambda x: False)
    want = torch.ops.hybrid_flex.select_blocks(x.to(device), *options)
    monkeypatch.setattr(block_mask, "has_kernels", lambda x: True)
    got = torch.ops.hybrid_flex.select_blocks(x.to(device), *options)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
