"""DeepSeek Sparse Attention over latent keys and values (multi-head latent attention, MLA).

x -> (q latent) -> q        x -> [latent | rotated key] -> cache, one row of kv_lora_rank + rope_dim per token
x, q latent -> indexer q, k, w -> lightning_topk -> indices -> sparse_attention -> output projection
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybrid_flex.checks import check, check_choice, is_plain
from hybrid_flex.layers.indexer import LightningIndexer
from hybrid_flex.layers.sparse import Projected, SparseLayer
from hybrid_flex.ops.dsa import RopeLayout, apply_rope, rope_cos_sin

FORMS = ("absorbed", "expanded")


class DeepSeekSparseMLA(SparseLayer):
    """Attend to selected tokens whose keys and values are one shared latent ``c_s = RMSNorm(W_kva x_s)``.

    With ``W_kvb`` split into ``W_k`` and ``W_v`` and the optional rotated parts ``q_r, k_r``::

        expanded:  k_s = [W_k c_s | k_r_s], v_s = W_v c_s           o_t = softmax_{s in S_t}(scale q_t . k_s) v_s
        absorbed:  q'_t = [W_k^T q_t | q_r_t], k'_s = [c_s | k_r_s]  o_t = W_v softmax_{s in S_t}(scale q'_t . k'_s) c_s

    Both are the same function; the absorbed form has one key/value head, reads the cache as it is, and is what
    the sparse operator likes best.  ``scale = (qk_nope_head_dim + rope_dim)^-0.5`` in both.

    Args:
        hidden_size: model width D.
        num_heads: query heads H.
        kv_lora_rank: width R of the latent.
        qk_nope_head_dim: unrotated width of a query and key head.
        v_head_dim: width of a value head.
        rope_dim: rotated width of a query head and of the one shared key; 0 for none (GLM-5.3-Flash).
        q_lora_rank: width of the queries' own latent (RMS-normalised), also the indexer's query input; None to project
            from the hidden state.
        topk: tokens a query attends to; a multiple of ``index_kpool``.
        index_heads: heads of the indexer.
        index_head_dim: width of an indexer head.
        index_kpool: tokens per pooled index key; see `LightningIndexer`.
        rope_layout: `RopeLayout` of the main attention (DeepSeek-V3.2: interleaved).
        rope_theta: base of the rotation frequencies, the indexer's too.
        index_rope_dim: rotated channels of the indexer; ``min(rope_dim, index_head_dim)`` by default.
        index_rope_layout: `RopeLayout` of the indexer (DeepSeek-V3.2: half).
        norm_eps: eps of the two RMS norms.
        share_indices: True for a layer without an indexer, which attends to the ``indices`` it is given.
        form: "absorbed" or "expanded", for attention over a selection; dense attention (the warm-up stage, sequences of
            at most ``topk`` tokens) has its heads written out in either.
        backend: of `sparse_attention`: "auto", "gather", "masked", "flex" or "reference".

    Raises:
        ValueError: a count or width is not positive, an unknown form, ``topk`` no multiple of ``index_kpool``.

    Note:
        `forward` never trains the indexer; `forward_with_indexer_loss` gives the loss that does.

    Device: CPU and CUDA.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; DeepSeek-V3.2 report, section 2.

    Example:
        >>> layer = DeepSeekSparseMLA(32, 4, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=8, rope_dim=4, topk=4,
        ...                           index_heads=2, index_head_dim=8)
        >>> y, state = layer(torch.randn(2, 10, 32))
        >>> y.shape, state.kv.shape, state.index_keys.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 10, 1, 20]), torch.Size([2, 10, 8]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        v_head_dim: int = 128,
        rope_dim: int = 0,
        q_lora_rank: int | None = None,
        topk: int = 2048,
        index_heads: int = 4,
        index_head_dim: int = 64,
        index_kpool: int = 1,
        rope_layout: RopeLayout | str = RopeLayout.INTERLEAVED,
        rope_theta: float = 10000.0,
        index_rope_dim: int | None = None,
        index_rope_layout: RopeLayout | str = RopeLayout.HALF,
        norm_eps: float = 1e-6,
        share_indices: bool = False,
        form: str = "absorbed",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        name = "DeepSeekSparseMLA"
        for argument, value in (
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("kv_lora_rank", kv_lora_rank),
            ("qk_nope_head_dim", qk_nope_head_dim),
            ("v_head_dim", v_head_dim),
            ("q_lora_rank", 1 if q_lora_rank is None else q_lora_rank),
            ("topk", topk),
        ):
            check(value > 0, name, argument, "be positive", value)
        check(rope_dim >= 0 and rope_dim % 2 == 0, name, "rope_dim", "be even and not negative", rope_dim)
        check_choice(name, "rope_layout", rope_layout, tuple(layout.value for layout in RopeLayout))
        check_choice(name, "form", form, FORMS)
        self.hidden_size, self.num_heads, self.kv_lora_rank = hidden_size, num_heads, kv_lora_rank
        self.qk_nope_head_dim, self.v_head_dim, self.rope_dim = qk_nope_head_dim, v_head_dim, rope_dim
        self.rope_layout, self.rope_theta = RopeLayout(rope_layout), rope_theta
        self.form, self.backend, self.scale = form, backend, (qk_nope_head_dim + rope_dim) ** -0.5
        self.cache_shape = (1, kv_lora_rank + rope_dim)
        self.value_dim = kv_lora_rank

        query_size = num_heads * (qk_nope_head_dim + rope_dim)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=False)
            self.q_a_norm = nn.RMSNorm(q_lora_rank, eps=norm_eps)
            self.q_b_proj = nn.Linear(q_lora_rank, query_size, bias=False)
        self.q_lora_rank = q_lora_rank
        self.kv_a_proj = nn.Linear(hidden_size, kv_lora_rank + rope_dim, bias=False)
        self.kv_a_norm = nn.RMSNorm(kv_lora_rank, eps=norm_eps)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=False)
        self.indexer: LightningIndexer | None = None
        if not share_indices:
            self.indexer = LightningIndexer(
                hidden_size,
                num_heads=index_heads,
                head_dim=index_head_dim,
                topk=topk,
                query_dim=q_lora_rank,
                rope_dim=min(rope_dim, index_head_dim) if index_rope_dim is None else index_rope_dim,
                rope_layout=index_rope_layout,
                rope_theta=rope_theta,
                kpool=index_kpool,
            )

    def _project(self, x: Tensor, positions: Tensor) -> Projected:
        q, query_input = self._queries(x)
        latent, k_rot = self.kv_a_proj(x).split((self.kv_lora_rank, self.rope_dim), dim=-1)
        latent = self.kv_a_norm(latent)
        if self.rope_dim > 0:
            cos, sin = rope_cos_sin(positions, self.rope_dim, self.rope_theta)
            q_nope, q_rot = q.split((self.qk_nope_head_dim, self.rope_dim), dim=-1)
            q = torch.cat((q_nope, apply_rope(q_rot, cos, sin, self.rope_layout)), dim=-1)
            k_rot = apply_rope(k_rot, cos, sin, self.rope_layout)
            latent = torch.cat((latent, k_rot), dim=-1)
        return Projected(q, latent.unsqueeze(2), query_input)

    def _attended(self, q: Tensor, kv: Tensor, *, dense: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        if not dense:
            return self._expand(q, kv) if self.form == "expanded" else self._absorb(q, kv)
        # NOTE [One width]: the fused kernels behind dense attention want values as wide as keys, on a CPU all of them;
        # what they do with others is four times slower there, and holds T x T logits.
        q, k, v = self._expand(q, kv)
        return q, k, torch.nn.functional.pad(v, (0, max(0, q.shape[-1] - v.shape[-1])))

    def _output(self, o: Tensor, *, dense: bool = False) -> Tensor:
        if dense:
            o = o[..., : self.v_head_dim]  # NOTE [One width]
        elif self.form == "absorbed":
            o = _multiply_heads(o, self._expansion()[1].mT, side_by_side=True)
        return self.o_proj(o.flatten(-2))

    def _queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Make the queries ``[B, T, H, qk_nope_head_dim + rope_dim]`` and the indexer's query input."""
        if self.q_lora_rank is None:
            q, query_input = self.q_proj(x), x
        else:
            query_input = self.q_a_norm(self.q_a_proj(x))
            q = self.q_b_proj(query_input)
        return q.unflatten(-1, (self.num_heads, self.qk_nope_head_dim + self.rope_dim)), query_input

    def _expansion(self) -> tuple[Tensor, Tensor]:
        """Give ``W_k [H, qk_nope_head_dim, R]`` and ``W_v [H, v_head_dim, R]``, the two halves of ``kv_b_proj``."""
        weight = self.kv_b_proj.weight.unflatten(0, (self.num_heads, self.qk_nope_head_dim + self.v_head_dim))
        w_k, w_v = weight.split((self.qk_nope_head_dim, self.v_head_dim), dim=1)
        return w_k, w_v

    def _absorb(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, None]:
        """Move ``W_k`` into the queries: one key head ``[latent | rotated]``, whose latent is the values too."""
        q_nope, q_rot = q.split((self.qk_nope_head_dim, self.rope_dim), dim=-1)
        absorbed = _multiply_heads(q_nope, self._expansion()[0])
        # Without a rotated part there is nothing to join, and queries as wide as latents are not copied.
        return absorbed if self.rope_dim == 0 else torch.cat((absorbed, q_rot), dim=-1), kv, None

    def _expand(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write out the keys and values of every head."""
        latent, k_rot = kv.split((self.kv_lora_rank, self.rope_dim), dim=-1)
        expanded = self.kv_b_proj(latent.squeeze(2)).unflatten(-1, (self.num_heads, -1))
        k_nope, v = expanded.split((self.qk_nope_head_dim, self.v_head_dim), dim=-1)
        return q, torch.cat((k_nope, k_rot.expand(-1, -1, self.num_heads, -1)), dim=-1), v


def _multiply_heads(x: Tensor, weight: Tensor, *, side_by_side: bool = False) -> Tensor:
    """Multiply ``x [B, T, H, A]`` with a matrix of each head, ``weight [H, A, C]``: ``[B, T, H, C]``.

    In memory the heads are outermost, or ``side_by_side``.  Written as one batched product: `torch.einsum` asks whether
    sizes are 1, and a graph with open sizes answers no.
    """
    heads = x.flatten(0, 1).transpose(0, 1)
    if side_by_side and is_plain(x) and not torch.is_grad_enabled():
        # Where nothing records it, the product is written to its place at once.
        product = x.new_empty(heads.shape[1], heads.shape[0], weight.shape[2])
        torch.bmm(heads, weight, out=product.transpose(0, 1))
    else:
        product = torch.bmm(heads, weight).transpose(0, 1)
        if side_by_side:
            # Always by a copy: whether one is needed depends on B and T.
            product = product.clone(memory_format=torch.contiguous_format)
    return product.unflatten(0, (x.shape[0], x.shape[1]))
