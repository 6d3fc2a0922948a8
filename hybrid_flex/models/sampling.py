"""Choosing the next token from logits, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hybrid_flex.checks import INTEGER, check, check_dtype, check_rank


class _StepwiseModel(Protocol):
    """What sampling asks of a model."""

    def __call__(self, ids: Tensor) -> tuple[Tensor, Any]: ...

    def reserve(self, states: Sequence[Any], max_length: int) -> Any: ...

    def step(self, ids_t: Tensor, states: Sequence[Any]) -> tuple[Tensor, Any]: ...


class SamplingOptions(NamedTuple):
    """How a token is chosen; the fields are described at `HybridLanguageModel.generate`."""

    greedy: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    generator: torch.Generator | None = None
    eos: int | None = None


def generate_stream(
    model: _StepwiseModel, ids: Tensor, max_new_tokens: int, options: SamplingOptions
) -> Iterator[Tensor]:
    """Check the arguments, then yield the tokens ``[B]`` that continue ``ids``; see `HybridLanguageModel.generate`."""
    op, temperature = "generate", options.temperature
    check_rank(op, "ids", ids, "[B, T]")
    check_dtype(op, "ids", ids, INTEGER)
    check(ids.shape[1] > 0, op, "ids", "hold at least one token per sequence", ids.shape[1])
    check(max_new_tokens >= 0, op, "max_new_tokens", "not be negative", max_new_tokens)
    check(temperature > 0, op, "temperature", "be positive (greedy=True takes the likeliest token)", temperature)
    check(0 < options.top_p <= 1, op, "top_p", "be in (0, 1]", options.top_p)
    only_one = options.seed is None or options.generator is None
    check(only_one, op, "seed", "be None when a generator is given", options.seed)
    if options.seed is not None:
        options = options._replace(generator=torch.Generator(device=ids.device).manual_seed(options.seed))
    return _tokens(model, ids, max_new_tokens, options)


def sample_token(
    logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one token per row from ``softmax(logits / temperature)``, cut to its nucleus of probability ``top_p``.

    Args:
        logits: ``[B, vocab_size]``.
        temperature: > 0.
        top_p: in (0, 1]; the likeliest token is always kept.
        generator: source of randomness.

    Returns:
        Token numbers ``[B]``, int64.
    """
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)


def _tokens(model: _StepwiseModel, ids: Tensor, max_new_tokens: int, options: SamplingOptions) -> Iterator[Tensor]:
    greedy, temperature, top_p, _, generator, eos = options
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    token: Tensor = ids
    states: Any = None
    for i in range(max_new_tokens):
        # no_grad stands inside the loop: around a yield it would leak into the caller's code.
        with torch.no_grad():
            if i == 0:
                whole, states = model(ids)
                logits, states = whole[:, -1], model.reserve(states, ids.shape[1] + max_new_tokens)
            else:
                logits, states = model.step(token, states)
            if greedy:
                token = logits.argmax(-1)
            else:
                token = sample_token(logits, temperature=temperature, top_p=top_p, generator=generator)
            if eos is not None:
                token = token.masked_fill(ended, eos)
                ended |= token == eos
        token = token.to(ids.dtype)
        yield token
        if eos is not None and bool(ended.all()):
            return
