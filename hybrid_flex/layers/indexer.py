"""The lightning indexer as a module: a light scorer that picks the keys a query may attend to.

x' -> q_idx      x -> k_idx (LayerNorm), w      ->  lightning_topk  ->  indices
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybrid_flex.checks import check, check_choice
from hybrid_flex.layers.cache import DSACache
from hybrid_flex.layers.float32 import Float32LayerNorm
from hybrid_flex.ops.dsa import (
    RopeLayout,
    apply_rope,
    expand_pools,
    indexer_kl_loss,
    lightning_topk,
    pool_index_keys,
    rope_cos_sin,
)


class LightningIndexer(nn.Module):
    """Score past tokens and select the ``topk`` best of every query.

    With ``q_j = W_q x'`` for the HI index heads, ``k = LayerNorm(W_k x)`` shared by them and
    ``w = W_w x * HI^-0.5 * DI^-0.5``::

        I_ts = sum_j w_tj ReLU(q_tj . k_s)        s <= t
        S_t  = the topk positions with the largest I_ts, all of them while t < topk

    The selection is made of integers, so no gradient flows through it: the weights here learn from `kl_loss` alone.

    Args:
        hidden_size: model width D.
        num_heads: index heads HI.
        head_dim: index width DI.
        topk: tokens selected per query; a multiple of ``kpool``.
        query_dim: width of x', the input of W_q: D by default, the q-LoRA rank under MLA.
        rope_dim: rotated channels, the FIRST ones of each head; 0 for none.
        rope_layout: `RopeLayout` of those channels: half (DeepSeek-V3.2), interleaved (GLM-5) or none (GLM-5.3-Flash).
        rope_theta: base of the rotation frequencies.
        kpool: tokens per pooled key.  Above 1, ``topk // kpool`` complete pools are selected and the tokens after the
            last complete pool are always attended, so a selection is ``topk + kpool - 1`` wide.
        quantization: "fp8" to select by scores in eight bits (`lightning_topk`), None by those of the layer's dtype.
            May be changed on a layer that exists, ``layer.indexer.quantization = "fp8"``; the loss does not use it.

    Raises:
        ValueError: a width or count is not positive, ``topk`` no multiple of ``kpool``, ``rope_dim`` odd or too wide.

    Device: CPU and CUDA.

    Source: DeepSeek-V3.2 report, section 2; pooled keys from GLM-5.3-Flash.

    Example:
        >>> indexer = LightningIndexer(32, num_heads=4, head_dim=16, topk=8)
        >>> indices, index_keys = indexer(torch.randn(2, 20, 32))
        >>> indices.shape, index_keys.shape
        (torch.Size([2, 20, 8]), torch.Size([2, 20, 16]))
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int = 128,
        topk: int = 2048,
        query_dim: int | None = None,
        rope_dim: int = 0,
        rope_layout: RopeLayout | str = RopeLayout.HALF,
        rope_theta: float = 10000.0,
        kpool: int = 1,
        quantization: str | None = None,
    ) -> None:
        super().__init__()
        query_dim = hidden_size if query_dim is None else query_dim
        name = "LightningIndexer"
        for argument, value in (
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("head_dim", head_dim),
            ("topk", topk),
            ("query_dim", query_dim),
            ("kpool", kpool),
        ):
            check(value > 0, name, argument, "be positive", value)
        check(topk % kpool == 0, name, "topk", f"be a multiple of kpool = {kpool}", topk)
        check(0 <= rope_dim <= head_dim, name, "rope_dim", f"be between 0 and head_dim = {head_dim}", rope_dim)
        check(rope_dim % 2 == 0, name, "rope_dim", "be even", rope_dim)
        check_choice(name, "quantization", quantization, (None, "fp8"))
        check_choice(name, "rope_layout", rope_layout, tuple(layout.value for layout in RopeLayout))
        self.num_heads, self.head_dim, self.topk, self.kpool = num_heads, head_dim, topk, kpool
        self.rope_dim, self.rope_theta, self.quantization = rope_dim, rope_theta, quantization
        self.rope_layout = RopeLayout(rope_layout) if rope_dim else RopeLayout.NONE

        self.wq = nn.Linear(query_dim, num_heads * head_dim, bias=False)
        self.wk = nn.Linear(hidden_size, head_dim, bias=False)
        self.k_norm = Float32LayerNorm(head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(hidden_size, num_heads, bias=False)
        if kpool > 1:
            self.pool_gate = nn.Linear(hidden_size, head_dim, bias=False)
            self.pool_ape = nn.Parameter(torch.zeros(kpool, head_dim))

    @property
    def cache_width(self) -> int:
        """Width of one row of the index key cache: DI, or 2 * DI (key and pooling gate) with pooled keys."""
        return self.head_dim if self.kpool == 1 else 2 * self.head_dim

    def forward(
        self, x: Tensor, index_keys: Tensor | None = None, *, query_input: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Select keys for every token of ``x``.

        Args:
            x: hidden states ``[B, T, D]``.
            index_keys: cache of the past, ``[B, S, cache_width]``; None to begin.
            query_input: x' ``[B, T, query_dim]``; ``x`` by default.

        Returns:
            indices int32 ``[B, T, topk]`` (``topk + kpool - 1`` with pools), ascending, -1 in unused slots at the end;
            and the cache with the rows of ``x`` appended.
        """
        start = 0 if index_keys is None else index_keys.shape[1]
        positions = torch.arange(x.shape[1], device=x.device) + start
        q_idx, w, new_keys = self.project(x, positions, query_input=query_input)
        index_keys = new_keys if index_keys is None else torch.cat((index_keys, new_keys), dim=1)
        pools = self.select(q_idx, w, index_keys, query_start=start)
        return self.tokens(pools, query_start=start), index_keys

    def project(
        self, x: Tensor, positions: Tensor, *, query_input: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make the indexer's own queries ``[B, T, HI, DI]``, head weights ``[B, T, HI]`` and cache rows ``[B, T, *]``.

        ``positions`` are the tokens' places in their sequences, ``[T]``.
        """
        q_idx, w = self.project_queries(x, positions, query_input=query_input)
        return q_idx, w, self.project_keys(x, positions)

    def project_queries(
        self, x: Tensor, positions: Tensor, *, query_input: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Make the queries ``[B, T, HI, DI]`` and head weights ``[B, T, HI]`` of `project`."""
        q_idx = self.wq(x if query_input is None else query_input).unflatten(-1, (self.num_heads, self.head_dim))
        if self.rope_dim > 0:
            cos, sin = rope_cos_sin(positions, self.rope_dim, self.rope_theta)
            q_idx = apply_rope(q_idx, cos, sin, self.rope_layout)
        return q_idx, self.weights_proj(x) * (self.num_heads**-0.5 * self.head_dim**-0.5)

    def project_keys(self, x: Tensor, positions: Tensor) -> Tensor:
        """Make the cache rows ``[B, T, cache_width]`` of `project`."""
        k_idx = self.k_norm(self.wk(x))
        if self.rope_dim > 0:
            cos, sin = rope_cos_sin(positions, self.rope_dim, self.rope_theta)
            k_idx = apply_rope(k_idx, cos, sin, self.rope_layout)
        return k_idx if self.kpool == 1 else torch.cat((k_idx, self.pool_gate(x)), dim=-1)

    def select(
        self, q_idx: Tensor, w: Tensor, index_keys: Tensor, *, query_start: int = 0, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Choose among the cached keys: tokens, or pools with pooled keys, int32 ``[B, T, topk // kpool]``.

        Raises:
            ValueError: ``cu_seqlens`` with pooled keys, whose pools would cross the sequences' boundaries.
        """
        if cu_seqlens is not None and self.kpool > 1:
            raise ValueError(f"LightningIndexer: cu_seqlens must be None with pooled keys, got kpool = {self.kpool}")
        return lightning_topk(
            q_idx.detach(),
            self.scored_keys(index_keys).detach(),
            w.detach(),
            self.topk // self.kpool,
            query_start=query_start,
            cu_seqlens=cu_seqlens,
            kpool=self.kpool,
            quantization=self.quantization,
        )

    def append(self, index_keys: Tensor, cache: DSACache, positions: Tensor) -> None:
        """Write the rows ``[B, T, cache_width]`` of new tokens at ``positions [B, T]`` into a cache of fixed size.

        With pooled keys the rows of the incomplete pool wait in ``cache.index_tail``; the pool is written again with
        every token, and nobody sees it before its last.
        """
        if self.kpool == 1:
            cache.append_index(index_keys, positions)
            return
        entry = torch.arange(index_keys.shape[0], device=index_keys.device)
        for t in range(index_keys.shape[1]):
            cache.index_tail.index_put_((entry, positions[:, t] % self.kpool), index_keys[:, t])
            cache.append_index(self.scored_keys(cache.index_tail), positions[:, t : t + 1] // self.kpool)

    def select_cached(self, q_idx: Tensor, w: Tensor, cache: DSACache, lengths: Tensor) -> Tensor:
        """Choose tokens for the last queries ``[B, T, HI, DI]`` of caches that hold ``lengths [B]`` tokens."""
        selection = lightning_topk(
            q_idx.detach(),
            cache.index_keys,
            w.detach(),
            self.topk // self.kpool,
            kpool=self.kpool,
            lengths=lengths,
            block_table=cache.block_table,
            quantization=self.quantization,
        )
        return self.tokens(selection, query_start=lengths - q_idx.shape[1])

    def tokens(self, selection: Tensor, *, query_start: int | Tensor = 0) -> Tensor:
        """Turn what `select` chose into token indices: pools are written out and their visible tail added."""
        return selection if self.kpool == 1 else expand_pools(selection, self.kpool, query_start=query_start)

    def every_token(self, batch_size: int, num_tokens: int, device: torch.device) -> Tensor:
        """Write out what `tokens` gives of a whole sequence of at most ``topk`` tokens, which selects all it sees."""
        token = torch.arange(self.topk + self.kpool - 1, dtype=torch.int32, device=device)
        query = torch.arange(num_tokens, dtype=torch.int32, device=device)[:, None]
        return torch.where(token <= query, token, -1).expand(batch_size, -1, -1)

    def kl_loss(
        self,
        q_idx: Tensor,
        w: Tensor,
        index_keys: Tensor,
        q: Tensor,
        k: Tensor,
        selection: Tensor | None,
        *,
        scale: float,
        lse: Tensor | None = None,
        query_start: int = 0,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Measure ``KL(p_t || softmax(I_t))``, averaged over tokens, against the main attention of ``q`` and ``k``.

        Args:
            q_idx: ``[B, T, HI, DI]`` from `project`, made of detached inputs.
            w: ``[B, T, HI]`` from `project`.
            index_keys: the whole cache ``[B, S, cache_width]``.
            q: main queries ``[B, T, H, K]``; no gradient reaches them.
            k: main keys ``[B, S, Hkv, K]``; no gradient reaches them.
            selection: what `select` chose (sparse stage), or None for all visible keys (dense warm-up stage).
            scale: scale of the main attention.
            lse: log-sum-exps of the main attention over the selection, ``[B, T, H]``; None: computed anew.
            query_start: tokens in the cache before the first query.
            cu_seqlens: boundaries of packed sequences ``[N + 1]``.

        Returns:
            A float32 scalar.
        """
        if cu_seqlens is not None and self.kpool > 1:
            raise ValueError(f"LightningIndexer: cu_seqlens must be None with pooled keys, got kpool = {self.kpool}")
        return indexer_kl_loss(
            q_idx,
            self.scored_keys(index_keys),
            w,
            q.detach(),
            k.detach(),
            indices=selection,
            lse=lse,
            scale=scale,
            query_start=query_start,
            cu_seqlens=cu_seqlens,
            kpool=self.kpool,
        )

    def scored_keys(self, index_keys: Tensor) -> Tensor:
        """Turn cache rows ``[B, S, cache_width]`` into the keys that are scored: themselves, or complete pools."""
        if self.kpool == 1:
            return index_keys
        k_idx, gate = index_keys.split(self.head_dim, dim=-1)
        return pool_index_keys(k_idx, gate, self.pool_ape, self.kpool)

    def extra_repr(self) -> str:
        """Name the widths in ``print(layer)``."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, topk={self.topk}, kpool={self.kpool}, "
            f"rope_dim={self.rope_dim}, rope_layout={self.rope_layout.value}"
            + (f", quantization={self.quantization}" if self.quantization else "")
        )
