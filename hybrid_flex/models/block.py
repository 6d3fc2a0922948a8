"""One layer of a hybrid model (norm, mixer, norm, MLP), and a stack of them that follows a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybrid_flex.checks import check, check_choice, is_exporting
from hybrid_flex.layers import (
    CausalAttention,
    DeepSeekSparseAttention,
    DeepSeekSparseMLA,
    DSACache,
    DSAState,
    KDAState,
    KimiDeltaAttention,
    KVCache,
    KVState,
    SwiGLU,
)
from hybrid_flex.models.config import LETTERS, HybridConfig

LayerState = KDAState | DSAState | DSACache | KVState | KVCache
Mixer = KimiDeltaAttention | DeepSeekSparseAttention | DeepSeekSparseMLA | CausalAttention


def build_mixer(config: HybridConfig, letter: str) -> Mixer:
    """Make the mixer that ``letter`` names, with the widths of ``config``."""
    check_choice("build_mixer", "letter", letter, tuple(LETTERS))
    head_dim = config.hidden_size // config.num_heads if config.head_dim is None else config.head_dim
    if letter == "K":
        return KimiDeltaAttention(
            config.hidden_size,
            config.num_heads if config.kda_num_heads is None else config.kda_num_heads,
            head_dim if config.kda_head_dim is None else config.kda_head_dim,
            num_v_heads=config.kda_num_v_heads,
            v_head_dim=config.kda_v_head_dim,
            conv_size=config.conv_size,
            gate_rank=config.gate_rank,
            lower_bound=config.lower_bound,
            allow_neg_eigval=config.allow_neg_eigval,
            norm_eps=config.norm_eps,
            chunk_size=config.chunk_size,
        )
    if letter == "D":
        return CausalAttention(
            config.hidden_size,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=head_dim,
            rope_dim=config.rope_dim,
            rope_layout=config.rope_layout,
            rope_theta=config.rope_theta,
        )
    if config.sparse_attention == "gqa":
        return DeepSeekSparseAttention(
            config.hidden_size,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=head_dim,
            topk=config.topk,
            index_heads=config.index_heads,
            index_head_dim=config.index_head_dim,
            index_kpool=config.index_kpool,
            rope_dim=config.rope_dim,
            rope_layout=config.rope_layout,
            rope_theta=config.rope_theta,
            index_rope_layout=config.index_rope_layout,
            share_indices=letter == "R",
            backend=config.backend,
        )
    return DeepSeekSparseMLA(
        config.hidden_size,
        config.num_heads,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=head_dim,
        v_head_dim=head_dim if config.v_head_dim is None else config.v_head_dim,
        rope_dim=config.rope_dim,
        q_lora_rank=config.q_lora_rank,
        topk=config.topk,
        index_heads=config.index_heads,
        index_head_dim=config.index_head_dim,
        index_kpool=config.index_kpool,
        rope_layout=config.rope_layout,
        rope_theta=config.rope_theta,
        index_rope_layout=config.index_rope_layout,
        norm_eps=config.norm_eps,
        share_indices=letter == "R",
        backend=config.backend,
    )


class HybridBlock(nn.Module):
    """Mix tokens, then transform each: ``h = x + mixer(RMSNorm(x))`` and ``y = h + SwiGLU(RMSNorm(h))``.

    Args:
        config: widths.
        letter: which mixer, a letter of `HybridConfig.pattern`.

    Raises:
        ValueError: an unknown letter.

    Device: CPU and CUDA.

    Example:
        >>> block = HybridBlock(HybridConfig(hidden_size=32, num_heads=2), "K")
        >>> y, state = block(torch.randn(2, 10, 32))
        >>> y.shape, state.S.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 2, 16, 16]))
    """

    def __init__(self, config: HybridConfig, letter: str) -> None:
        super().__init__()
        mlp_size = -(-8 * config.hidden_size // 96) * 32 if config.mlp_size is None else config.mlp_size
        self.hidden_size, self.letter = config.hidden_size, letter
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        # Any: which state belongs to which mixer is known by the letter, not by the type checker.
        self.mixer: Any = build_mixer(config, letter)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, mlp_size)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """Transform ``x [B, T, D]`` and return it with the mixer's new state; ``indices`` are for letter R."""
        y, new_state, _, _ = self.run(x, state, cu_seqlens, indices)
        return y, new_state

    def run(
        self,
        x: Tensor,
        state: LayerState | None,
        cu_seqlens: Tensor | None,
        indices: Tensor | None,
        stage: str | None = None,
    ) -> tuple[Tensor, LayerState | None, Tensor | None, Tensor]:
        """Do what `forward` does and pass the selection on.

        Args:
            x: ``[B, T, D]``.
            state: of the mixer, or None.
            cu_seqlens: boundaries of packed sequences, or None.
            indices: selection of the last S block, or None.
            stage: stage of indexer training, or None.

        Returns:
            ``y``, the new state, the selection for the blocks after this one, and the indexer's loss (or zero).
        """
        h = self.mixer_norm(x)
        loss = torch.zeros((), device=x.device)
        if self.letter in "SR":
            reused = indices if self.mixer.indexer is None else None
            mixed, new_state, indices, loss = self.mixer.attend(h, state, cu_seqlens, indices=reused, stage=stage)
        else:
            mixed, new_state = self.mixer(h, state, cu_seqlens)
        h = x + mixed
        return h + self.mlp(self.mlp_norm(h)), new_state, indices, loss

    def step(
        self, x_t: Tensor, state: LayerState, indices: Tensor | None = None
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """Transform one token per sequence, ``[B, D] -> [B, D]``; passes the selection on like `run`.

        A cache of fixed size in the place of a state is written into, and is itself the new state.
        """
        h = self.mixer_norm(x_t)
        if self.letter in "SR":
            reused = indices if self.mixer.indexer is None else None
            if isinstance(state, DSACache):
                mixed, indices = self.mixer.decode_and_select(h.unsqueeze(1), state, indices=reused)
                new_state: LayerState = state
            else:
                mixed, new_state, indices, _ = self.mixer.attend(h.unsqueeze(1), state, indices=reused)
            mixed = mixed.squeeze(1)
        else:
            mixed, new_state = self.mixer.step(h, state)
        h = x_t + mixed
        return h + self.mlp(self.mlp_norm(h)), new_state, indices

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LayerState:
        """Make the mixer's state of ``batch_size`` sequences without a past."""
        state: LayerState = self.mixer.init_state(batch_size, device=device, dtype=dtype)
        return state

    def reserve(self, state: LayerState, max_length: int) -> LayerState:
        """Turn a cache that grows into one of fixed size, with room for ``max_length`` tokens; KDA states stay.

        Raises:
            ValueError: the state holds more tokens than that.
        """
        if isinstance(state, DSAState | KVState):
            reserved: LayerState = self.mixer.reserve(state, max_length)
            return reserved
        return state


class LayerWiseHybrid(nn.Module):
    """Stack blocks after a pattern: "KKKS" is three KDA blocks, then one sparse block, and so on.

    Args:
        config: widths and pattern.

    Device: CPU and CUDA.

    Example:
        >>> stack = LayerWiseHybrid(HybridConfig(hidden_size=32, num_heads=2, pattern="KS", topk=4))
        >>> y, states = stack(torch.randn(2, 10, 32))
        >>> y.shape, len(states), states[1].kv.shape
        (torch.Size([2, 10, 32]), 2, torch.Size([2, 10, 2, 32]))
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        # A ModuleList yields plain modules to the type checker.
        self.blocks: Any = nn.ModuleList(HybridBlock(config, letter) for letter in config.letters)

    def forward(
        self, x: Tensor, state: Sequence[LayerState] | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[LayerState | None, ...]]:
        """Run every block.

        Args:
            x: hidden states ``[B, T, D]``.
            state: one state per block; None to begin.
            cu_seqlens: int32 or int64 ``[N + 1]`` boundaries of sequences packed along T, with B = 1.

        Returns:
            ``y [B, T, D]`` and one state per block (None for attention blocks when sequences are packed).

        Raises:
            ValueError: a shape does not fit, or a state is of another batch size or number of blocks.
        """
        y, states, _ = self.run(x, state, cu_seqlens)
        return y, states

    def forward_with_indexer_loss(
        self,
        x: Tensor,
        state: Sequence[LayerState] | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        stage: str = "sparse",
    ) -> tuple[Tensor, tuple[LayerState | None, ...], Tensor]:
        """Run every block and return the sum of the indexers' losses too; ``stage`` is "dense" or "sparse"."""
        return self.run(x, state, cu_seqlens, stage)

    def run(
        self,
        x: Tensor,
        state: Sequence[LayerState] | None = None,
        cu_seqlens: Tensor | None = None,
        stage: str | None = None,
    ) -> tuple[Tensor, tuple[LayerState | None, ...], Tensor]:
        """Run every block; ``stage`` None leaves the loss at zero."""
        self._check_state(state)
        states: list[LayerState | None] = []
        indices, loss = None, torch.zeros((), device=x.device)
        # An exported program has no way to say "recompute"; it keeps what its own training loop decides.
        wanted = self.config.checkpoint_activations and not is_exporting()
        recompute = wanted and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            arguments = (x, None if state is None else state[i], cu_seqlens, indices, stage)
            if recompute:
                x, new_state, indices, block_loss = checkpoint(block.run, *arguments, use_reentrant=False)
            else:
                x, new_state, indices, block_loss = block.run(*arguments)
            states.append(new_state)
            loss = loss + block_loss
        return x, tuple(states), loss

    def step(self, x_t: Tensor, state: Sequence[LayerState]) -> tuple[Tensor, tuple[LayerState, ...]]:
        """Run every block on one token per sequence, ``[B, D] -> [B, D]``."""
        self._check_state(state)
        states: list[LayerState] = []
        indices = None
        for block, block_state in zip(self.blocks, state, strict=True):
            x_t, new_state, indices = block.step(x_t, block_state, indices)
            states.append(new_state)
        return x_t, tuple(states)

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[LayerState, ...]:
        """Make the states of ``batch_size`` sequences without a past."""
        return tuple(block.init_state(batch_size, device=device, dtype=dtype) for block in self.blocks)

    def reserve(self, state: Sequence[LayerState], max_length: int) -> tuple[LayerState, ...]:
        """Turn the caches of attention blocks, which grow, into caches of fixed size, for `step`; KDA states stay.

        Args:
            state: one state per block, as `forward` returned them.
            max_length: tokens that every sequence may reach.

        Raises:
            ValueError: a state holds more tokens than that.
        """
        self._check_state(state)
        pairs = zip(self.blocks, state, strict=True)
        return tuple(block.reserve(block_state, max_length) for block, block_state in pairs)

    def _check_state(self, state: Sequence[LayerState] | None) -> None:
        if state is not None:
            count = len(self.blocks)
            check(len(state) == count, "LayerWiseHybrid", "state", f"hold {count} states, one per block", len(state))
