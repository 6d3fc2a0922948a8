"""Dense causal attention: the layer a hybrid compares itself with, and the first stage of training an indexer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybrid_flex.checks import check, check_choice, check_cu_seqlens, check_shape
from hybrid_flex.layers.cache import KVCache
from hybrid_flex.layers.positions import sequence_of_token, token_positions
from hybrid_flex.layers.state import KVState, check_state
from hybrid_flex.ops.dsa import RopeLayout, apply_rope, rope_cos_sin


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, has_past: bool = False, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Attend to every visible key: ``o_t = softmax_{s <= t}(scale q_t . k_s) v_s``, by torch's fused attention.

    Args:
        q: queries ``[B, T, H, K]``, the last T tokens of the sequence.
        k: keys ``[B, S, Hkv, K]``; Hkv divides H.
        v: values ``[B, S, Hkv, V]``.
        scale: factor of the logits.
        has_past: whether keys stand before the first query (S > T); the caller says so, and the lengths
            stay dynamic.
        cu_seqlens: boundaries of packed sequences ``[N + 1]``: tokens see only their own sequence.

    Returns:
        ``[B, T, H, V]``.  With a past or packing a boolean ``[T, S]`` mask is made.
    """
    mask = None
    if has_past or cu_seqlens is not None:
        query = torch.arange(q.shape[1], device=q.device) + (k.shape[1] - q.shape[1])
        key = torch.arange(k.shape[1], device=q.device)
        mask = key <= query[:, None]
        if cu_seqlens is not None:
            mask = mask & (sequence_of_token(key, cu_seqlens) == sequence_of_token(query, cu_seqlens)[:, None])
    o = nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, scale: float) -> Tensor:
    """Attend to a cache of fixed size: ``o_t = softmax_{s <= positions_t}(scale q_t . k_s) v_s``.

    Args:
        q: queries ``[B, T, H, K]``.
        k: keys ``[B, S, Hkv, K]``; Hkv divides H.
        v: values ``[B, S, Hkv, V]``, finite everywhere: what is masked is multiplied by zero.
        positions: where the queries stand in their sequences, int64 ``[B, T]``.
        scale: factor of the logits.

    Returns:
        ``[B, T, H, V]``.  A boolean mask ``[B, 1, H / Hkv * T, S]`` is made.
    """
    groups, T = q.shape[2] // k.shape[2], q.shape[1]
    mask = torch.arange(k.shape[1], device=k.device) <= positions[..., None]
    # Query heads that share a key head become rows of it: the fused kernels then read the cache once, and none copies
    # it for every query head.
    rows = q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = mask[:, None].expand(-1, groups, -1, -1).flatten(1, 2)
    o = nn.functional.scaled_dot_product_attention(
        rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None], scale=scale
    )
    return o.unflatten(2, (groups, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class CausalAttention(nn.Module):
    """Mix tokens with dense causal attention (MHA, GQA or MQA).

    Args:
        hidden_size: model width D.
        num_heads: query heads H.
        num_kv_heads: key and value heads Hkv, a divisor of H; H by default.
        head_dim: width K of a head; ``hidden_size // num_heads`` by default.
        rope_dim: rotated channels, the first ones of each head; 0 for none.
        rope_layout: `RopeLayout` of those channels.
        rope_theta: base of the rotation frequencies.

    Raises:
        ValueError: a count or width is not positive, or Hkv does not divide H.

    Device: CPU and CUDA.

    Example:
        >>> layer = CausalAttention(32, num_heads=4, num_kv_heads=2)
        >>> y, state = layer(torch.randn(2, 10, 32))
        >>> y.shape, state.kv.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 10, 2, 16]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_dim: int = 0,
        rope_layout: RopeLayout | str = RopeLayout.HALF,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        name = "CausalAttention"
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check(num_heads > 0, name, "num_heads", "be positive", num_heads)
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        check(head_dim > 0, name, "head_dim", "be positive", head_dim)
        check(
            num_kv_heads > 0 and num_heads % num_kv_heads == 0,
            name,
            "num_kv_heads",
            f"divide num_heads = {num_heads}",
            num_kv_heads,
        )
        check(
            0 <= rope_dim <= head_dim and rope_dim % 2 == 0,
            name,
            "rope_dim",
            f"be even and between 0 and head_dim = {head_dim}",
            rope_dim,
        )
        check_choice(name, "rope_layout", rope_layout, tuple(layout.value for layout in RopeLayout))
        self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim = (
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
        )
        self.rope_dim, self.rope_theta, self.rope_layout = rope_dim, rope_theta, RopeLayout(rope_layout)
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self, x: Tensor, state: KVState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, KVState | None]:
        """Mix ``x [B, T, D]``; returns ``y [B, T, D]`` and the grown cache (None for packed sequences).

        Raises:
            ValueError: a shape does not fit, the state is of another batch size, or a state comes with ``cu_seqlens``.
        """
        name = "CausalAttention"
        check_shape(name, "x", x, (None, None, self.hidden_size), "[B, T, D]")
        if state is not None:
            self._check_state(state, x.shape[0])
        if cu_seqlens is not None:
            check_cu_seqlens(name, cu_seqlens, x.shape[0], x.shape[1])
            check(state is None, name, "state", "be None with cu_seqlens (packed sequences have no cache)", "a state")
        start = 0 if state is None else state.kv.shape[1]
        q, kv = self._project(x, token_positions(x.shape[1], start, cu_seqlens, x.device))
        if state is not None:
            kv = torch.cat((state.kv, kv), dim=1)
        k, v = kv.split(self.head_dim, dim=-1)
        o = dense_attention(q, k, v, scale=self.head_dim**-0.5, has_past=state is not None, cu_seqlens=cu_seqlens)
        return self.o_proj(o.flatten(-2)), KVState(kv) if cu_seqlens is None else None

    def step(self, x_t: Tensor, state: KVState | KVCache) -> tuple[Tensor, KVState | KVCache]:
        """Mix one token per sequence, ``x_t [B, D] -> y_t [B, D]``.

        A `KVCache` is written into, as by `decode`, and is itself the new state.
        """
        if isinstance(state, KVCache):
            return self.decode(x_t.unsqueeze(1), state).squeeze(1), state
        y, grown = self(x_t.unsqueeze(1), state)
        return y.squeeze(1), grown

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """Make an empty cache of fixed size, for `decode`.

        Args:
            batch_size: B.
            max_length: tokens that a sequence can hold.
            device: where the cache lies; by default beside the weights.
            dtype: of keys and values; by default that of the weights.

        Raises:
            ValueError: a size is not positive.
        """
        for argument, size in (("batch_size", batch_size), ("max_length", max_length)):
            check(size >= 1, "CausalAttention", argument, "be at least 1", size)
        device = self.k_proj.weight.device if device is None else device
        dtype = self.k_proj.weight.dtype if dtype is None else dtype
        return KVCache(
            torch.zeros(batch_size, max_length, self.num_kv_heads, 2 * self.head_dim, device=device, dtype=dtype),
            torch.zeros(batch_size, dtype=torch.int32, device=device),
        )

    @torch.no_grad()
    def fill_cache(self, cache: KVCache, entry: int, state: KVState) -> None:
        """Let sequence ``entry`` of a cache begin with the state that a prefill of this one sequence has left.

        Raises:
            ValueError: the state is not of this layer, of more sequences than one, or longer than the cache.
        """
        self._check_state(state, 1)
        length, room = state.kv.shape[1], cache.kv.shape[1]
        check(length <= room, "CausalAttention", "state", f"hold at most {room} tokens, the cache's length", length)
        cache.fill(slice(entry, entry + 1), state.kv)

    @torch.no_grad()
    def reserve(self, state: KVState, max_length: int) -> KVCache:
        """Copy a state that grows into a cache with room for ``max_length`` tokens of every sequence.

        Raises:
            ValueError: the state is not of this layer, or holds more tokens than that.
        """
        batch_size, length = state.kv.shape[:2]
        self._check_state(state, batch_size)
        rule = f"be at least {length}, the tokens held"
        check(max_length >= length, "CausalAttention", "max_length", rule, max_length)
        cache = self.init_cache(batch_size, max(max_length, 1), device=state.kv.device, dtype=state.kv.dtype)
        cache.fill(slice(None), state.kv)
        return cache

    @torch.no_grad()
    def decode(self, x: Tensor, cache: KVCache) -> Tensor:
        """Mix the next tokens of every sequence and append them to its cache, in place.

        What is computed has fixed shapes and the lengths stay on the device, so a call can be captured in a CUDA graph;
        its time is that of a full cache.  No gradient.

        Args:
            x: hidden states ``[B, T, D]``, a few tokens.
            cache: from `init_cache`; its rows and lengths change.

        Returns:
            ``y [B, T, D]``.

        Raises:
            ValueError: a shape does not fit.
        """
        check_shape("CausalAttention", "x", x, (cache.lengths.shape[0], None, self.hidden_size), "[B, T, D]")
        width = (None, None, self.num_kv_heads, 2 * self.head_dim)
        check_state("CausalAttention", "cache.kv", cache.kv, width, x.shape[0])
        positions = cache.lengths.to(torch.int64)[:, None] + torch.arange(x.shape[1], device=x.device)
        q, kv = self._project(x, positions)
        cache.append(kv, positions)
        cache.lengths += x.shape[1]
        k, v = cache.kv.split(self.head_dim, dim=-1)
        o = cached_attention(q, k, v, positions, scale=self.head_dim**-0.5)
        return self.o_proj(o.flatten(-2))

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> KVState:
        """Make the empty cache of ``batch_size`` sequences."""
        device = self.k_proj.weight.device if device is None else device
        dtype = self.k_proj.weight.dtype if dtype is None else dtype
        return KVState(torch.zeros(batch_size, 0, self.num_kv_heads, 2 * self.head_dim, device=device, dtype=dtype))

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Make queries ``[B, T, H, K]`` and rows of the cache of tokens that stand at ``positions``, [T] or [B, T]."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.rope_dim > 0:
            cos, sin = rope_cos_sin(positions, self.rope_dim, self.rope_theta)
            q, k = apply_rope(q, cos, sin, self.rope_layout), apply_rope(k, cos, sin, self.rope_layout)
        return q, torch.cat((k, v), dim=-1)

    def _check_state(self, state: KVState | KVCache, batch_size: int) -> None:
        name = "CausalAttention"
        grows = isinstance(state, KVState)
        check(grows, name, "state", "be a state that grows, which `decode` does not need", type(state).__name__)
        check_state(name, "state.kv", state.kv, (None, None, self.num_kv_heads, 2 * self.head_dim), batch_size)
