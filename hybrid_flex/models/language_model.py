"""A causal language model around a stack of hybrid blocks.

ids -> embedding -> blocks of a pattern such as "KKKS" (norm, mixer, norm, MLP) -> norm -> logits
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike

import torch
from torch import Tensor, nn

from hybrid_flex.checks import INTEGER, check_dtype, check_rank
from hybrid_flex.models import checkpoint as files
from hybrid_flex.models import sampling
from hybrid_flex.models.block import LayerState, LayerWiseHybrid
from hybrid_flex.models.config import HybridConfig


class HybridLanguageModel(nn.Module):
    """Predict the next token: ``logits = W_out RMSNorm(blocks(W_emb[ids]))``.

    Args:
        config: widths, pattern and options.

    Device: CPU and CUDA.

    Example:
        >>> model = HybridLanguageModel(HybridConfig(vocab_size=50, hidden_size=32, num_heads=2, pattern="KS", topk=4))
        >>> logits, states = model(torch.randint(50, (2, 10)))
        >>> logits.shape, len(states)
        (torch.Size([2, 10, 50]), 2)
        >>> model.generate(torch.randint(50, (2, 10)), max_new_tokens=3, greedy=True).shape
        torch.Size([2, 13])
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = LayerWiseHybrid(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.output: nn.Linear | None = None
        if not config.tie_embeddings:
            self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the matrices from N(0, init_std^2), scaled down where they write into the residual stream.

        Decay parameters, convolution taps and norms keep what their layers gave them.
        """
        std = self.config.init_std
        residual_std = std / (2 * len(self.stack.blocks)) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes_residual = name.endswith(("mixer.o_proj", "mlp.down_proj"))
                nn.init.normal_(module.weight, std=residual_std if writes_residual else std)
        nn.init.normal_(self.embedding.weight, std=std)

    def forward(
        self, ids: Tensor, states: Sequence[LayerState] | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[LayerState | None, ...]]:
        """Predict the token after each of ``ids``.

        Args:
            ids: token numbers ``[B, T]``, int32 or int64, in ``[0, vocab_size)``.
            states: what an earlier call returned; None to begin.
            cu_seqlens: int32 or int64 ``[N + 1]`` boundaries of sequences packed along T, with B = 1.

        Returns:
            logits ``[B, T, vocab_size]`` and one state per layer (None for attention layers when sequences are packed).

        Raises:
            ValueError: a shape does not fit, or the states are of another batch size or number of layers.
            TypeError: ``ids`` are no integers.
        """
        x, new_states, _ = self.stack.run(self._embed(ids), states, cu_seqlens)
        return self._logits(x), new_states

    def forward_with_indexer_loss(
        self,
        ids: Tensor,
        states: Sequence[LayerState] | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        stage: str = "sparse",
    ) -> tuple[Tensor, tuple[LayerState | None, ...], Tensor]:
        """Predict tokens and return the sum of the indexers' losses too.

        Args:
            ids: token numbers ``[B, T]``.
            states: what an earlier call returned; None to begin.
            cu_seqlens: boundaries of packed sequences.
            stage: "dense" for the warm-up of the indexers, in which S and R layers attend to every visible key, or
                "sparse".

        Returns:
            logits, states, and a float32 scalar whose gradient reaches the indexers only.
        """
        x, new_states, loss = self.stack.run(self._embed(ids), states, cu_seqlens, stage)
        return self._logits(x), new_states, loss

    def step(self, ids_t: Tensor, states: Sequence[LayerState]) -> tuple[Tensor, tuple[LayerState, ...]]:
        """Predict from one token per sequence, ``ids_t [B] -> logits [B, vocab_size]``, with the recurrent forms."""
        check_rank("HybridLanguageModel", "ids_t", ids_t, "[B]")
        check_dtype("HybridLanguageModel", "ids_t", ids_t, INTEGER)
        x_t, new_states = self.stack.step(self.embedding(ids_t), states)
        return self._logits(x_t), new_states

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[LayerState, ...]:
        """Make the states of ``batch_size`` sequences without a past, one per layer."""
        return self.stack.init_state(batch_size, device=device, dtype=dtype)

    def reserve(self, states: Sequence[LayerState], max_length: int) -> tuple[LayerState, ...]:
        """Give attention layers room for ``max_length`` tokens: `step` then writes in place instead of copying caches.

        Args:
            states: what `forward` returned.
            max_length: tokens that every sequence may reach, prompt included.

        Returns:
            One state per layer, with a `DSACache` in the place of each `DSAState` and a `KVCache` in that of each
            `KVState`; KDA states do not grow and stay.

        Raises:
            ValueError: a state holds more tokens than that.
        """
        return self.stack.reserve(states, max_length)

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        greedy: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        eos: int | None = None,
    ) -> Tensor:
        """Continue ``ids``.

        Args:
            ids: prompts ``[B, T]``, T >= 1.
            max_new_tokens: how many tokens to add at most.
            greedy: take the likeliest token; the options below are then unused.
            temperature: divisor of the logits, > 0; small is cautious.
            top_p: sample only from the smallest set of tokens whose probabilities sum to at least this, in (0, 1].
            seed: seed of a fresh generator.
            generator: a `torch.Generator` on the device of ``ids``, instead of ``seed``.
            eos: token that ends a sequence; ended ones are filled up with it, and all ended ends the call.

        Returns:
            Prompts and continuations, ``[B, T + n]`` with ``n <= max_new_tokens``.

        Raises:
            ValueError: an option out of its range, an empty prompt, or both ``seed`` and ``generator``.
        """
        stream = self.generate_stream(
            ids,
            max_new_tokens,
            greedy=greedy,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            generator=generator,
            eos=eos,
        )
        return torch.cat([ids, *(token.unsqueeze(1) for token in stream)], dim=1)

    def generate_stream(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        greedy: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        eos: int | None = None,
    ) -> Iterator[Tensor]:
        """Continue ``ids`` and yield each new token ``[B]`` as soon as it is known; arguments as `generate`."""
        options = sampling.SamplingOptions(greedy, temperature, top_p, seed, generator, eos)
        return sampling.generate_stream(self, ids, max_new_tokens, options)

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``directory``, which is made if absent.

        Each file appears whole or not at all: it is written beside its place and renamed.
        """
        files.save(self, directory)

    @classmethod
    def from_pretrained(
        cls, directory: str | PathLike[str], *, device: torch.device | str = "cpu"
    ) -> HybridLanguageModel:
        """Read a model that `save_pretrained` wrote; dtypes are those of the file.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files are truncated, of another model, or do not fit each other.  Nothing is then loaded.
        """
        return files.load(cls, directory, device)

    def _embed(self, ids: Tensor) -> Tensor:
        check_rank("HybridLanguageModel", "ids", ids, "[B, T]")
        check_dtype("HybridLanguageModel", "ids", ids, INTEGER)
        return self.embedding(ids)

    def _logits(self, x: Tensor) -> Tensor:
        weight = self.embedding.weight if self.output is None else self.output.weight
        return nn.functional.linear(self.norm(x), weight)
