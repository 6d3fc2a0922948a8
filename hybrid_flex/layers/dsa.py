"""DeepSeek Sparse Attention with ordinary keys and values (MHA, GQA, MQA).

x -> q, k, v projections -> RoPE -> cache
x -> indexer q, k, w -> lightning_topk -> indices -> sparse_attention -> output projection
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybrid_flex.checks import check, check_choice, check_cu_seqlens, check_shape
from hybrid_flex.layers.dense import dense_attention
from hybrid_flex.layers.indexer import LightningIndexer
from hybrid_flex.layers.positions import token_positions
from hybrid_flex.layers.state import DSAState, check_state
from hybrid_flex.ops.dsa import RopeLayout, apply_rope, rope_cos_sin, sparse_attention

STAGES = ("dense", "sparse")


class DeepSeekSparseAttention(nn.Module):
    """Attend to the ``topk`` past tokens that a `LightningIndexer` selects, the same ones for every head.

    ``o_t = softmax_{s in S_t}(D^-0.5 q_t . k_s) v_s`` with ``S_t`` the selection of query t.  While a sequence is no
    longer than ``topk`` this is dense causal attention.

    Args:
        hidden_size: model width.
        num_heads: query heads H.
        num_kv_heads: key and value heads Hkv, a divisor of H: H (default) is MHA, 1 is MQA.
        head_dim: width D of a head; ``hidden_size // num_heads`` by default.
        topk: tokens a query attends to; a multiple of ``index_kpool``.
        index_heads: heads of the indexer.
        index_head_dim: width of an indexer head.
        index_kpool: tokens per pooled index key; see `LightningIndexer`.
        rope_dim: rotated channels of q and k, the first ones of each head; 0 (default) for none.
        rope_layout: `RopeLayout` of q and k.
        rope_theta: base of the rotation frequencies, the indexer's too.
        index_rope_dim: rotated channels of the indexer; ``min(rope_dim, index_head_dim)`` by default.
        index_rope_layout: `RopeLayout` of the indexer, which need not be that of q and k.
        share_indices: True for a layer without an indexer, which attends to the ``indices`` it is given.
        backend: of `sparse_attention`: "auto", "gather", "flex" or "reference".

    Raises:
        ValueError: a count or width is not positive, Hkv does not divide H, ``topk`` is no multiple of ``index_kpool``.

    Note:
        `forward` never trains the indexer; `forward_with_indexer_loss` gives the loss that does.

    Device: CPU and CUDA.

    Source: DeepSeek-V3.2 report, section 2.

    Example:
        >>> layer = DeepSeekSparseAttention(32, num_heads=4, num_kv_heads=2, topk=4, index_heads=2, index_head_dim=8)
        >>> y, state = layer(torch.randn(2, 10, 32))
        >>> y_t, state = layer.step(torch.randn(2, 32), state)
        >>> y.shape, y_t.shape, state.kv.shape, state.index_keys.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 32]), torch.Size([2, 11, 2, 16]), torch.Size([2, 11, 8]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        topk: int = 2048,
        index_heads: int = 4,
        index_head_dim: int = 64,
        index_kpool: int = 1,
        rope_dim: int = 0,
        rope_layout: RopeLayout | str = RopeLayout.HALF,
        rope_theta: float = 10000.0,
        index_rope_dim: int | None = None,
        index_rope_layout: RopeLayout | str = RopeLayout.HALF,
        share_indices: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        name = "DeepSeekSparseAttention"
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for argument, value in (
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
            ("topk", topk),
        ):
            check(value > 0, name, argument, "be positive", value)
        check(num_heads % num_kv_heads == 0, name, "num_kv_heads", f"divide num_heads = {num_heads}", num_kv_heads)
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        check(head_dim > 0, name, "head_dim", "be positive", head_dim)
        check(
            0 <= rope_dim <= head_dim and rope_dim % 2 == 0,
            name,
            "rope_dim",
            f"be even and between 0 and head_dim = {head_dim}",
            rope_dim,
        )
        check_choice(name, "rope_layout", rope_layout, tuple(layout.value for layout in RopeLayout))
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim, self.backend, self.scale = head_dim, backend, head_dim**-0.5
        self.rope_dim, self.rope_layout, self.rope_theta = rope_dim, RopeLayout(rope_layout), rope_theta

        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.indexer: LightningIndexer | None = None
        if not share_indices:
            self.indexer = LightningIndexer(
                hidden_size,
                num_heads=index_heads,
                head_dim=index_head_dim,
                topk=topk,
                rope_dim=min(rope_dim, index_head_dim) if index_rope_dim is None else index_rope_dim,
                rope_layout=index_rope_layout,
                rope_theta=rope_theta,
                kpool=index_kpool,
            )

    def forward(
        self,
        x: Tensor,
        state: DSAState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, DSAState | None]:
        """Mix a stretch of tokens.

        Args:
            x: hidden states ``[B, T, D]``.
            state: cache of the tokens before ``x``; None to begin.
            cu_seqlens: int32 or int64 ``[N + 1]`` boundaries of sequences packed along T, with B = 1, no state and no
                pooled index keys (pools would straddle the boundaries).
            indices: a selection to attend to instead of this layer's own, int32 ``[B, T, J]``, -1 unused.

        Returns:
            ``y [B, T, D]`` and the grown cache; None instead of a cache for packed sequences.

        Raises:
            ValueError: a shape does not fit, the state is of another batch size, a state or pooled index keys come with
                ``cu_seqlens``, or a layer without an indexer gets no ``indices``.
        """
        y, state, _, _ = self.attend(x, state, cu_seqlens, indices=indices)
        return y, state

    def forward_with_indexer_loss(
        self, x: Tensor, state: DSAState | None = None, cu_seqlens: Tensor | None = None, *, stage: str = "sparse"
    ) -> tuple[Tensor, DSAState | None, Tensor]:
        """Mix tokens and measure how far the indexer is from this layer's attention.

        Args:
            x: hidden states ``[B, T, D]``.
            state: cache of the tokens before ``x``; None to begin.
            cu_seqlens: boundaries of packed sequences.
            stage: "dense" for the warm-up (every visible key is attended and compared), "sparse" for training on the
                selection.

        Returns:
            ``y``, the state, and the loss, a float32 scalar whose gradient reaches the indexer only; ``y`` sends none
            there.
        """
        y, state, _, loss = self.attend(x, state, cu_seqlens, stage=stage)
        return y, state, loss

    def attend(
        self,
        x: Tensor,
        state: DSAState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        stage: str | None = None,
    ) -> tuple[Tensor, DSAState | None, Tensor | None, Tensor]:
        """Do what `forward` does and also return the selection, for layers that reuse it, and the indexer's loss.

        Returns:
            ``y``; the state; the indices attended to, int32 ``[B, T, J]`` (what was given in the dense stage); and the
            loss, zero unless ``stage`` is "dense" or "sparse" and the layer has an indexer.
        """
        self._check_inputs(x, state, cu_seqlens, stage)
        start = 0 if state is None else state.kv.shape[1]
        positions = token_positions(x.shape[1], start, cu_seqlens, x.device)

        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.rope_dim > 0:
            cos, sin = rope_cos_sin(positions, self.rope_dim, self.rope_theta)
            q, k = apply_rope(q, cos, sin, self.rope_layout), apply_rope(k, cos, sin, self.rope_layout)
        kv = torch.cat((k, v), dim=-1)
        if state is not None:
            kv = torch.cat((state.kv, kv), dim=1)
        k, v = kv.split(self.head_dim, dim=-1)

        selection = None
        index_keys = x.new_zeros(x.shape[0], kv.shape[1], 0)
        if self.indexer is not None:
            # Detached: the indexer learns from its own loss only, and its loss moves nothing else.
            q_idx, w, index_keys = self.indexer.project(x.detach(), positions)
            if state is not None:
                index_keys = torch.cat((state.index_keys, index_keys), dim=1)
            if stage == "sparse" or (stage is None and indices is None):
                selection = self.indexer.select(q_idx, w, index_keys, query_start=start, cu_seqlens=cu_seqlens)
                if indices is None:
                    indices = self.indexer.tokens(selection, query_start=start)

        if stage == "dense":
            o = dense_attention(q, k, v, scale=self.scale, has_past=state is not None, cu_seqlens=cu_seqlens)
        else:
            if indices is None:
                raise ValueError("DeepSeekSparseAttention: indices must come from an earlier layer, got None")
            o, _ = sparse_attention(q, k, v, indices, scale=self.scale, backend=self.backend)
        y = self.o_proj(o.flatten(-2))

        loss = torch.zeros((), device=x.device)
        if stage is not None and self.indexer is not None:
            loss = self.indexer.kl_loss(
                q_idx, w, index_keys, q, k, selection, scale=self.scale, query_start=start, cu_seqlens=cu_seqlens
            )
        return y, DSAState(kv, index_keys.detach()) if cu_seqlens is None else None, indices, loss

    def step(self, x_t: Tensor, state: DSAState, *, indices: Tensor | None = None) -> tuple[Tensor, DSAState]:
        """Mix one token per sequence, ``x_t [B, D] -> y_t [B, D]``; ``indices [B, 1, J]`` as in `forward`."""
        y, grown, _, _ = self.attend(x_t.unsqueeze(1), state, indices=indices)
        assert grown is not None
        return y.squeeze(1), grown

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> DSAState:
        """Make the empty cache of ``batch_size`` sequences, on the weights' device and in their dtype unless given."""
        device = self.k_proj.weight.device if device is None else device
        dtype = self.k_proj.weight.dtype if dtype is None else dtype
        index_width = 0 if self.indexer is None else self.indexer.cache_width
        return DSAState(
            torch.zeros(batch_size, 0, self.num_kv_heads, 2 * self.head_dim, device=device, dtype=dtype),
            torch.zeros(batch_size, 0, index_width, device=device, dtype=dtype),
        )

    def _check_inputs(self, x: Tensor, state: DSAState | None, cu_seqlens: Tensor | None, stage: str | None) -> None:
        name = "DeepSeekSparseAttention"
        check_shape(name, "x", x, (None, None, self.hidden_size), "[B, T, D]")
        check_choice(name, "stage", stage, (None, *STAGES))
        if state is not None:
            check_state(name, "state.kv", state.kv, (None, None, self.num_kv_heads, 2 * self.head_dim), x.shape[0])
            index_width = 0 if self.indexer is None else self.indexer.cache_width
            check_state(name, "state.index_keys", state.index_keys, (None, None, index_width), x.shape[0])
        if cu_seqlens is not None:
            check_cu_seqlens(name, cu_seqlens, x.shape[0], x.shape[1])
            check(state is None, name, "state", "be None with cu_seqlens (packed sequences have no cache)", "a state")
