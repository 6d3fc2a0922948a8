"""Random arguments for the KDA operators, shared by their tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def make_kda() -> Callable[..., dict[str, Tensor]]:
    """Make q, k, v, g, beta (raw when ``raw``, then A_log and dt_bias too) and one initial state per sequence."""

    def make(
        B: int,
        T: int,
        H: int,
        K: int,
        V: int,
        *,
        HV: int | None = None,
        num_sequences: int | None = None,
        raw: bool = False,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        grad: bool = True,
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        HV = H if HV is None else HV

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        q, k = normal(B, T, H, K), normal(B, T, H, K)
        if not raw:
            q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
        x = {"q": q.to(dtype), "k": k.to(dtype), "v": normal(B, T, HV, V).to(dtype)}
        g, beta = normal(B, T, HV, K), normal(B, T, HV)
        if raw:
            x |= {"g": g.to(dtype), "beta": beta.to(dtype)}
            x |= {"A_log": normal(1, 1, HV, 1).to(state_dtype), "dt_bias": normal(HV * K).to(state_dtype)}
        else:
            x |= {"g": -torch.nn.functional.softplus(g).to(state_dtype), "beta": torch.sigmoid(beta).to(state_dtype)}
        x["initial_state"] = normal(B if num_sequences is None else num_sequences, HV, K, V).to(state_dtype)
        return {name: t.requires_grad_(grad) for name, t in x.items()}

    return make
