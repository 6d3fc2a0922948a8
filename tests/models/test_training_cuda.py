"""A small model trained on a GPU in bfloat16 follows the loss of the same model trained on a CPU in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_flex import HybridConfig, HybridLanguageModel

CONFIG = HybridConfig(vocab_size=64, hidden_size=64, pattern="KKKK", num_heads=2, chunk_size=16)


def batch(step: int) -> Tensor:
    """Draw sequences that count, modulo 64, by a stride that the model has to find out."""
    generator = torch.Generator().manual_seed(step)
    start, stride = torch.randint(64, (8, 1), generator=generator), torch.randint(1, 5, (8, 1), generator=generator)
    return (start + stride * torch.arange(48)) % 64


def losses(device: str, dtype: torch.dtype, num_steps: int) -> Tensor:
    """Train in ``dtype`` under autocast, with float32 weights, and return the loss of every step."""
    torch.manual_seed(0)
    model = HybridLanguageModel(CONFIG).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    kept = []
    for step in range(num_steps):
        ids = batch(step).to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits, _ = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kept.append(loss.detach().cpu())
    return torch.stack(kept)


def check_curves(low: Tensor, full: Tensor) -> None:
    """Compare means of ten steps, to 3 % and to 0.03, by which neighbouring means of one curve differ at its end."""
    low, full = (curve.unflatten(0, (-1, 10)).mean(1) for curve in (low, full))
    assert full[-1] < full[0] - 0.3, "the reference has not learned anything"
    assert ((low - full).abs() < 0.03 * full + 0.03).all(), f"{low}\n{full}"


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_follows_float32_on_a_cpu() -> None:
    full = losses("cpu", torch.float32, 200)
    check_curves(losses("cuda", torch.bfloat16, 200), full)


@pytest.mark.slow
def test_bfloat16_follows_float32_on_a_cpu() -> None:
    check_curves(losses("cpu", torch.bfloat16, 200), losses("cpu", torch.float32, 200))
