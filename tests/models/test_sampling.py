"""Choosing tokens: the nucleus, temperature, seeds, the end of sequences, and refused options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybrid_flex.models import HybridConfig, HybridLanguageModel
from hybrid_flex.models.sampling import SamplingOptions, generate_stream, sample_token


@pytest.fixture(scope="module")
def model() -> HybridLanguageModel:
    torch.manual_seed(0)
    return HybridLanguageModel(HybridConfig(vocab_size=20, hidden_size=32, num_heads=2, pattern="KS", topk=4))


PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(top_p=st.floats(0.05, 1.0), seed=st.integers(0, 100))
def test_only_the_nucleus_is_drawn(top_p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 12, generator=generator) * 2
    probabilities, order = logits[0].softmax(-1).sort(descending=True)
    size = int((probabilities.cumsum(-1) < top_p - 1e-6).sum()) + 1
    drawn = sample_token(logits.expand(200, -1), top_p=top_p, generator=generator)
    assert set(drawn.tolist()) <= set(order[: size + 1].tolist())
    assert order[0].item() in drawn.tolist() or top_p > 0.9


def test_frequencies_follow_the_tempered_softmax() -> None:
    logits, generator = torch.tensor([[0.0, 1.0, 2.0]]), torch.Generator().manual_seed(0)
    drawn = sample_token(logits.expand(40000, -1), temperature=0.5, generator=generator)
    frequency = torch.bincount(drawn, minlength=3) / 40000
    torch.testing.assert_close(frequency, (logits[0] / 0.5).softmax(-1), atol=0.01, rtol=0)


def test_a_tiny_nucleus_and_a_cold_temperature_are_greedy(model: HybridLanguageModel) -> None:
    greedy = model.generate(PROMPT, 6, greedy=True)
    assert torch.equal(model.generate(PROMPT, 6, top_p=1e-6, seed=0), greedy)
    assert torch.equal(model.generate(PROMPT, 6, temperature=1e-4, seed=0), greedy)


def test_a_seed_repeats_and_another_does_not(model: HybridLanguageModel) -> None:
    first = model.generate(PROMPT, 10, seed=3)
    assert torch.equal(first, model.generate(PROMPT, 10, seed=3))
    assert torch.equal(first, model.generate(PROMPT, 10, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(first, model.generate(PROMPT, 10, seed=4))


class Script:
    """A model that says what it is told, one row of tokens after the other."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = torch.tensor(rows)
        self.steps = 0

    def __call__(self, ids: Tensor) -> tuple[Tensor, Any]:
        return torch.nn.functional.one_hot(self.rows[:, :1].expand(-1, ids.shape[1]), 10).float(), ()

    def reserve(self, states: Sequence[Any], max_length: int) -> Any:
        return states

    def step(self, ids_t: Tensor, states: Sequence[Any]) -> tuple[Tensor, Any]:
        self.steps += 1
        return torch.nn.functional.one_hot(self.rows[:, self.steps], 10).float(), states


def test_ended_sequences_are_filled_and_all_ended_ends() -> None:
    script = Script([[1, 9, 3, 4, 5], [1, 2, 3, 9, 5]])
    out = torch.stack(list(generate_stream(script, PROMPT, 5, SamplingOptions(greedy=True, eos=9))), 1)
    assert out.tolist() == [[1, 9, 9, 9], [1, 2, 3, 9]]
    assert script.steps == 3


def test_streaming_is_lazy_and_keeps_the_callers_grad_mode(model: HybridLanguageModel) -> None:
    script = Script([[1, 2, 3, 4, 5]])
    stream = generate_stream(script, PROMPT[:1], 5, SamplingOptions(greedy=True))
    assert next(stream).tolist() == [1] and script.steps == 0
    assert torch.is_grad_enabled()
    assert next(stream).tolist() == [2] and script.steps == 1
    assert model.generate(PROMPT, 0).tolist() == PROMPT.tolist()
    assert model.generate(PROMPT.int(), 2, seed=0).dtype == torch.int32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        ({"seed": 1, "generator": torch.Generator()}, "seed must be None when a generator is given, got 1"),
        ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, "ids must hold at least one token per sequence, got 0"),
    ],
)
def test_bad_options_are_refused(model: HybridLanguageModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"generate: {message}"):
        model.generate(**{"ids": PROMPT, "max_new_tokens": 2, **options})
    with pytest.raises(ValueError, match=f"generate: {message}"):
        model.generate_stream(**{"ids": PROMPT, "max_new_tokens": 2, **options})
