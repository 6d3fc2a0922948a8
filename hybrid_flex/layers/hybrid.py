"""One KDA layer and one DSA layer as a single mixer: one after the other, or side by side.

sequential   x -> norm -> KDA -> (+ x) -> norm -> DSA -> (+)
parallel     x -> norm -> KDA, DSA -> gate * KDA + (1 - gate) * DSA -> (+ x)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybrid_flex.layers.cache import DSACache
from hybrid_flex.layers.dsa import DeepSeekSparseAttention
from hybrid_flex.layers.kda import KimiDeltaAttention
from hybrid_flex.layers.mla import DeepSeekSparseMLA
from hybrid_flex.layers.state import DSAState, KDAState

SparseLayer = DeepSeekSparseAttention | DeepSeekSparseMLA
HybridState = tuple[KDAState, DSAState | DSACache | None]


class _KDAWithDSA(nn.Module):
    """Hold the two mixers; the subclasses say how they are joined."""

    def __init__(self, kda: KimiDeltaAttention, dsa: SparseLayer) -> None:
        super().__init__()
        name = type(self).__name__
        if kda.hidden_size != dsa.hidden_size:
            raise ValueError(
                f"{name}: dsa must have the hidden_size of kda, {kda.hidden_size}, got hidden_size {dsa.hidden_size}"
            )
        if dsa.indexer is None:
            raise ValueError(f"{name}: dsa must have its own indexer, got a layer with share_indices=True")
        self.hidden_size = kda.hidden_size
        self.kda, self.dsa = kda, dsa

    def forward(
        self, x: Tensor, state: HybridState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, HybridState]:
        """Mix a stretch of tokens.

        Args:
            x: hidden states ``[B, T, D]``.
            state: ``(KDAState, DSAState)`` of an earlier call; None to begin.
            cu_seqlens: int32 or int64 ``[N + 1]`` boundaries of sequences packed along T, with B = 1 and no state.

        Returns:
            ``y [B, T, D]``, residual included, and the new pair of states; its second is None for packed sequences.

        Raises:
            ValueError: a shape does not fit, or the state is of another batch size.
        """
        y, state, _ = self._mix(x, state, cu_seqlens, None)
        return y, state

    def forward_with_indexer_loss(
        self, x: Tensor, state: HybridState | None = None, cu_seqlens: Tensor | None = None, *, stage: str = "sparse"
    ) -> tuple[Tensor, HybridState, Tensor]:
        """Mix tokens and return the indexer's loss too; see `DeepSeekSparseAttention.forward_with_indexer_loss`."""
        return self._mix(x, state, cu_seqlens, stage)

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> HybridState:
        """Make the states of ``batch_size`` sequences without a past."""
        return (
            self.kda.init_state(batch_size, device=device, dtype=dtype),
            self.dsa.init_state(batch_size, device=device, dtype=dtype),
        )

    def reserve(self, state: HybridState, max_length: int) -> HybridState:
        """Turn the sparse layer's state into a cache of fixed size, for `step`; KDA's does not grow and stays.

        Args:
            state: what `forward` or `init_state` returned.
            max_length: tokens that every sequence may reach.

        Raises:
            ValueError: the state is of packed sequences, is a cache already, or holds more tokens than that.
        """
        cache = _cache(state, "reserve")
        if isinstance(cache, DSACache):
            raise ValueError("reserve: state must hold a DSAState, which grows, got a DSACache")
        return state[0], self.dsa.reserve(cache, max_length)

    def _mix(
        self, x: Tensor, state: HybridState | None, cu_seqlens: Tensor | None, stage: str | None
    ) -> tuple[Tensor, HybridState, Tensor]:
        raise NotImplementedError


class SequentialHybrid(_KDAWithDSA):
    """Apply KDA, then DSA, each on a normed input and with its own residual.

    ``h = x + KDA(RMSNorm(x))`` and ``y = h + DSA(RMSNorm(h))``.

    Args:
        kda: a `KimiDeltaAttention`.
        dsa: a `DeepSeekSparseAttention` or `DeepSeekSparseMLA` of the same ``hidden_size``.
        norm_eps: eps of the RMS norms.

    Raises:
        ValueError: the widths differ, or ``dsa`` has no indexer.

    Device: CPU and CUDA.

    Example:
        >>> kda = KimiDeltaAttention(32, num_heads=2, head_dim=16)
        >>> dsa = DeepSeekSparseAttention(32, num_heads=2, topk=4, index_heads=2, index_head_dim=8)
        >>> y, (kda_state, dsa_state) = SequentialHybrid(kda, dsa)(torch.randn(2, 10, 32))
        >>> y.shape, kda_state.S.shape, dsa_state.kv.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 2, 16, 16]), torch.Size([2, 10, 2, 32]))
    """

    def __init__(self, kda: KimiDeltaAttention, dsa: SparseLayer, *, norm_eps: float = 1e-5) -> None:
        super().__init__(kda, dsa)
        self.kda_norm = nn.RMSNorm(self.hidden_size, eps=norm_eps)
        self.dsa_norm = nn.RMSNorm(self.hidden_size, eps=norm_eps)

    def step(self, x_t: Tensor, state: HybridState) -> tuple[Tensor, HybridState]:
        """Mix one token per sequence, ``x_t [B, D] -> y_t [B, D]``."""
        mixed, kda_state = self.kda.step(self.kda_norm(x_t), state[0])
        h = x_t + mixed
        mixed, dsa_state = self.dsa.step(self.dsa_norm(h), _cache(state, "step"))
        return h + mixed, (kda_state, dsa_state)

    def _mix(
        self, x: Tensor, state: HybridState | None, cu_seqlens: Tensor | None, stage: str | None
    ) -> tuple[Tensor, HybridState, Tensor]:
        kda_state, dsa_state = (None, None) if state is None else state
        mixed, kda_state = self.kda(self.kda_norm(x), kda_state, cu_seqlens)
        h = x + mixed
        mixed, dsa_state, _, loss = self.dsa.attend(self.dsa_norm(h), dsa_state, cu_seqlens, stage=stage)
        return h + mixed, (kda_state, dsa_state), loss


class ParallelHybrid(_KDAWithDSA):
    """Apply KDA and DSA to the same normed input and merge them by a learned gate per channel.

    ``h = RMSNorm(x)``, ``a = sigmoid(W h + b)`` and ``y = x + a * KDA(h) + (1 - a) * DSA(h)``.  W and b begin at zero,
    so the branches begin with equal shares.

    Args:
        kda: a `KimiDeltaAttention`.
        dsa: a `DeepSeekSparseAttention` or `DeepSeekSparseMLA` of the same ``hidden_size``.
        norm_eps: eps of the RMS norm.

    Raises:
        ValueError: the widths differ, or ``dsa`` has no indexer.

    Device: CPU and CUDA.

    Example:
        >>> kda = KimiDeltaAttention(32, num_heads=2, head_dim=16)
        >>> dsa = DeepSeekSparseAttention(32, num_heads=2, topk=4, index_heads=2, index_head_dim=8)
        >>> y, state = ParallelHybrid(kda, dsa)(torch.randn(2, 10, 32))
        >>> y.shape
        torch.Size([2, 10, 32])
    """

    def __init__(self, kda: KimiDeltaAttention, dsa: SparseLayer, *, norm_eps: float = 1e-5) -> None:
        super().__init__(kda, dsa)
        self.norm = nn.RMSNorm(self.hidden_size, eps=norm_eps)
        self.gate_proj = nn.Linear(self.hidden_size, self.hidden_size)
        nn.init.zeros_(self.gate_proj.weight)
        nn.init.zeros_(self.gate_proj.bias)

    def step(self, x_t: Tensor, state: HybridState) -> tuple[Tensor, HybridState]:
        """Mix one token per sequence, ``x_t [B, D] -> y_t [B, D]``."""
        h = self.norm(x_t)
        from_kda, kda_state = self.kda.step(h, state[0])
        from_dsa, dsa_state = self.dsa.step(h, _cache(state, "step"))
        return x_t + self._merge(h, from_kda, from_dsa), (kda_state, dsa_state)

    def _mix(
        self, x: Tensor, state: HybridState | None, cu_seqlens: Tensor | None, stage: str | None
    ) -> tuple[Tensor, HybridState, Tensor]:
        kda_state, dsa_state = (None, None) if state is None else state
        h = self.norm(x)
        from_kda, kda_state = self.kda(h, kda_state, cu_seqlens)
        from_dsa, dsa_state, _, loss = self.dsa.attend(h, dsa_state, cu_seqlens, stage=stage)
        return x + self._merge(h, from_kda, from_dsa), (kda_state, dsa_state), loss

    def _merge(self, h: Tensor, from_kda: Tensor, from_dsa: Tensor) -> Tensor:
        return torch.lerp(from_dsa, from_kda, self.gate_proj(h).sigmoid())


def _cache(state: HybridState, op: str) -> DSAState | DSACache:
    if state[1] is None:
        raise ValueError(f"{op}: state must hold a cache, got the state of packed sequences")
    return state[1]
