"""The kernel of expand_pools against its plain form: any widths, starts of every kind, nothing selected."""

from __future__ import annotations

import pytest
import torch

from hybrid_flex.kernels.dsa import pools as kernels
from hybrid_flex.ops.dsa import expand_pools, pooling


@pytest.mark.parametrize("each", [False, True], ids=["one-start", "starts"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("kpool", "J"), [(4, 37), (3, 16), (1, 20), (2, 1)])
def test_tokens(
    device: str, kpool: int, J: int, dtype: torch.dtype, each: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "COLUMNS", 16)
    B, T = 2, 5
    generator = torch.Generator().manual_seed(J)
    pools = torch.full((B, T, J), -1, dtype=dtype)
    for b in range(B):
        for t in range(T):
            number = int(torch.randint(0, J + 1, (), generator=generator))
            pools[b, t, :number] = torch.randperm(2 * J, generator=generator)[:number].sort().values
    starts: int | torch.Tensor = torch.tensor([2 * J * kpool, 2 * J * kpool + 6]) if each else 2 * J * kpool + 1
    monkeypatch.setattr(pooling, "has_kernels", lambda x: False)
    want = expand_pools(pools, kpool, query_start=starts)
    monkeypatch.setattr(pooling, "has_kernels", lambda x: True)
    on_device = starts.to(device) if isinstance(starts, torch.Tensor) else starts
    got = expand_pools(pools.to(device), kpool, query_start=on_device)
    assert got.dtype == torch.int32 and torch.equal(got.cpu(), want)


def test_no_queries(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "has_kernels", lambda x: True)
    assert expand_pools(torch.zeros(1, 0, 3, dtype=torch.int32, device=device), 4).shape == (1, 0, 15)
