"""DeepSeek Sparse Attention with ordinary keys and values (MHA, GQA, MQA).

x -> q, k, v projections -> RoPE -> cache
x -> indexer q, k, w -> lightning_topk -> indices -> sparse_attention -> output projection
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybrid_flex.checks import check, check_choice
from hybrid_flex.layers.indexer import LightningIndexer
from hybrid_flex.layers.sparse import Projected, SparseLayer
from hybrid_flex.ops.dsa import RopeLayout, apply_rope, rope_cos_sin


class DeepSeekSparseAttention(SparseLayer):
    """Attend to the ``topk`` past tokens that a `LightningIndexer` selects, the same ones for every head.

    ``o_t = softmax_{s in S_t}(D^-0.5 q_t . k_s) v_s`` with ``S_t`` the selection of query t.  While a sequence is no
    longer than ``topk`` this is dense causal attention, and is computed so with ``backend="auto"``.

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
        backend: of `sparse_attention`: "auto", "gather", "masked", "flex" or "reference".

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
        self.cache_shape = (num_kv_heads, 2 * head_dim)

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

    def _project(self, x: Tensor, positions: Tensor) -> Projected:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.rope_dim > 0:
            cos, sin = rope_cos_sin(positions, self.rope_dim, self.rope_theta)
            q, k = apply_rope(q, cos, sin, self.rope_layout), apply_rope(k, cos, sin, self.rope_layout)
        return Projected(q, torch.cat((k, v), dim=-1), query_input=x)

    def _attended(self, q: Tensor, kv: Tensor, *, dense: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        k, v = kv.split(self.head_dim, dim=-1)
        return q, k, v

    def _output(self, o: Tensor, *, dense: bool = False) -> Tensor:
        return self.o_proj(o.flatten(-2))
