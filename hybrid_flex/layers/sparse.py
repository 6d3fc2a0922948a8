"""What both layers of DeepSeek Sparse Attention share: selection, attention to it, the indexer's loss, the cache.

x -> q, k, v, cache (the layer's own `_project`)
x -> indexer q, k, w -> lightning_topk -> indices -> sparse_attention -> the layer's own `_output`

# NOTE [Short sequences]
A query with at most topk visible tokens selects all of them, so a whole sequence of at most topk tokens is plain causal
attention, and its selection is known without a score.  With ``backend="auto"`` it is computed so: two graphs of a
compiled layer serve all lengths, one on either side of topk (more on CUDA, where `sparse_attention` changes its form).
An exported program has only one, for any length, and always selects.  Dense attention has other costs than sparse
attention: MLA attends to heads that it has written out, which are narrower than the latent (192 and 128 columns for 576
and 512 in DeepSeek-V3.2) and cost as much to make as absorbed queries and outputs do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hybrid_flex.checks import check, check_choice, check_cu_seqlens, check_shape, is_exporting
from hybrid_flex.layers.cache import DSACache, make_cache
from hybrid_flex.layers.dense import dense_attention
from hybrid_flex.layers.indexer import LightningIndexer
from hybrid_flex.layers.positions import token_positions
from hybrid_flex.layers.state import DSAState, check_state
from hybrid_flex.ops.dsa import sparse_attention

STAGES = ("dense", "sparse")


class Projected(NamedTuple):
    """What a layer makes of its input before it attends."""

    q: Tensor
    """Queries [B, T, H, D], as `_attended` takes them."""
    kv: Tensor
    """Rows of the cache, [B, T, Hkv, X], which keys and values are made from."""
    query_input: Tensor
    """What the indexer makes its queries from, [B, T, DQ]."""


class SparseLayer(nn.Module):
    """Attend to tokens that an indexer selects, whatever keys and values are; the base of both DSA layers."""

    hidden_size: int
    cache_shape: tuple[int, int]
    """Heads and width of a row of the cache."""
    scale: float
    o_proj: nn.Linear
    backend: str
    indexer: LightningIndexer | None
    value_dim: int | None = None

    def _project(self, x: Tensor, positions: Tensor) -> Projected:
        """Make queries and rows of the cache of x ``[B, T, D]``, whose tokens stand at ``positions [T]`` or [B, T]."""
        raise NotImplementedError

    def _attended(self, q: Tensor, kv: Tensor, *, dense: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Turn queries and a cache ``[B, S, Hkv, X]`` into ``q [B, T, H, D]``, ``k [B, S, Hkv, D]`` and v, Dv wide.

        No v where the values are the first ``value_dim`` columns of k, which they are not for ``dense`` attention.
        """
        raise NotImplementedError

    def _output(self, o: Tensor, *, dense: bool = False) -> Tensor:
        """Turn what was attended to, ``[B, T, H, DV]``, into ``y [B, T, D]``; ``dense`` as in `_attended`."""
        raise NotImplementedError

    def _selects_everything(self, num_tokens: int) -> bool:
        """Tell whether a whole sequence of so many tokens is attended densely: NOTE [Short sequences]."""
        if self.indexer is None or self.backend != "auto" or is_exporting():
            return False
        return num_tokens <= self.indexer.topk

    def _attend_to(self, q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor) -> tuple[Tensor, Tensor]:
        value_dim = self.value_dim if v is None else None
        return sparse_attention(q, k, v, indices, scale=self.scale, backend=self.backend, value_dim=value_dim)

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
        state: DSAState | DSACache | None = None,
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
        q, kv, query_input = self._project(x, positions)
        if state is not None:
            kv = torch.cat((state.kv, kv), dim=1)
        whole = state is None and cu_seqlens is None and indices is None and stage != "dense"
        short = whole and self._selects_everything(x.shape[1])
        dense = short or stage == "dense"
        q, k, v = self._attended(q, kv, dense=dense)

        selection = lse = None
        given = indices is not None
        index_keys = x.new_zeros(x.shape[0], kv.shape[1], 0)
        if self.indexer is not None:
            # Detached: the indexer learns from its own loss only, and its loss moves nothing else.
            index_keys = self.indexer.project_keys(x.detach(), positions)
            if state is not None:
                index_keys = torch.cat((state.index_keys, index_keys), dim=1)
            selects = not short and (stage == "sparse" or (stage is None and indices is None))
            if selects or stage is not None:
                q_idx, w = self.indexer.project_queries(x.detach(), positions, query_input=query_input.detach())
            if selects:
                selection = self.indexer.select(q_idx, w, index_keys, query_start=start, cu_seqlens=cu_seqlens)
                if indices is None:
                    indices = self.indexer.tokens(selection, query_start=start)
            elif short:
                indices = self.indexer.every_token(x.shape[0], x.shape[1], x.device)

        if dense:
            assert v is not None
            o = dense_attention(q, k, v, scale=self.scale, has_past=state is not None, cu_seqlens=cu_seqlens)
        else:
            if indices is None:
                raise ValueError(f"{type(self).__name__}: indices must come from an earlier layer, got None")
            o, lse = self._attend_to(q, k, v, indices)
        y = self._output(o, dense=dense)

        loss = torch.zeros((), device=x.device)
        if stage is not None and self.indexer is not None:
            # Where everything is selected the two stages compare the same keys.  The attention over a selection has
            # left the log-sum-exps that the loss needs, if it was over this one.
            loss = self.indexer.kl_loss(
                q_idx,
                w,
                index_keys,
                q,
                k,
                selection,
                scale=self.scale,
                lse=None if given else lse,
                query_start=start,
                cu_seqlens=cu_seqlens,
            )
        return y, DSAState(kv, index_keys.detach()) if cu_seqlens is None else None, indices, loss

    def step(
        self, x_t: Tensor, state: DSAState | DSACache, *, indices: Tensor | None = None
    ) -> tuple[Tensor, DSAState | DSACache]:
        """Mix one token per sequence, ``x_t [B, D] -> y_t [B, D]``; ``indices [B, 1, J]`` as in `forward`.

        A `DSACache` is written into, as by `decode`, and is itself the new state.
        """
        if isinstance(state, DSACache):
            return self.decode(x_t.unsqueeze(1), state, indices=indices).squeeze(1), state
        y, grown, _, _ = self.attend(x_t.unsqueeze(1), state, indices=indices)
        assert grown is not None
        return y.squeeze(1), grown

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        page_size: int | None = None,
        num_pages: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> DSACache:
        """Make an empty cache of fixed size, for `decode`: in one piece, or in pages that sequences share.

        Args:
            batch_size: B.
            max_length: tokens that a sequence can hold.
            page_size: tokens in a page, a multiple of the indexer's kpool; None for a cache in one piece.
            num_pages: pages in the pool; by default as many as B sequences of ``max_length`` need, and then the table
                gives each sequence its own. With fewer the table is -1 everywhere: whoever serves requests fills it in.
            device: where the cache lies; by default beside the weights.
            dtype: of keys and values; by default that of the weights.

        Raises:
            ValueError: a size is not positive, or ``page_size`` no multiple of kpool.
        """
        device = self.o_proj.weight.device if device is None else device
        dtype = self.o_proj.weight.dtype if dtype is None else dtype
        kpool, width = (1, 0) if self.indexer is None else (self.indexer.kpool, self.indexer.head_dim)
        return make_cache(
            type(self).__name__,
            batch_size,
            max_length,
            page_size,
            num_pages,
            kv_shape=self.cache_shape,
            index_width=width,
            kpool=kpool,
            device=device,
            dtype=dtype,
        )

    @torch.no_grad()
    def fill_cache(self, cache: DSACache, entry: int, state: DSAState) -> None:
        """Let sequence ``entry`` of a cache begin with the state that a prefill of this one sequence has left.

        Raises:
            ValueError: the state is not of this layer, or of more sequences than one.
        """
        self._check_state(type(self).__name__, state, 1)
        cache.fill(slice(entry, entry + 1), state.kv, *self._index_rows(state))

    @torch.no_grad()
    def reserve(self, state: DSAState, max_length: int) -> DSACache:
        """Copy a state that grows into a cache in one piece, with room for ``max_length`` tokens of every sequence.

        Raises:
            ValueError: the state is not of this layer, or holds more tokens than that.
        """
        name, (batch_size, length) = type(self).__name__, state.kv.shape[:2]
        self._check_state(name, state, batch_size)
        check(max_length >= length, name, "max_length", f"be at least {length}, the tokens held", max_length)
        cache = self.init_cache(batch_size, max(max_length, 1), device=state.kv.device, dtype=state.kv.dtype)
        cache.fill(slice(None), state.kv, *self._index_rows(state))
        return cache

    def _index_rows(self, state: DSAState) -> tuple[Tensor, Tensor]:
        """Return a state's index keys as they are scored, and the rows of its incomplete pool."""
        if self.indexer is None or self.indexer.kpool == 1:
            return state.index_keys, state.index_keys[:, :0, :0]
        complete = state.index_keys.shape[1] // self.indexer.kpool * self.indexer.kpool
        return self.indexer.scored_keys(state.index_keys), state.index_keys[:, complete:]

    def decode(self, x: Tensor, cache: DSACache, *, indices: Tensor | None = None) -> Tensor:
        """Mix the next tokens of every sequence and append them to its cache, in place.

        What is computed has fixed shapes and the lengths stay on the device, so a call can be captured in a CUDA graph.
        No gradient.

        Args:
            x: hidden states ``[B, T, D]``, a few tokens (they are appended to the cache one by one with pooled keys).
            cache: from `init_cache`; its rows, its lengths and its incomplete pools change.
            indices: a selection to attend to instead of this layer's own, int32 ``[B, T, J]``, -1 unused.

        Returns:
            ``y [B, T, D]``.

        Raises:
            ValueError: a shape does not fit, a layer without an indexer gets no ``indices``, or an MLA layer is in its
                expanded form, which would write out every key.
        """
        return self.decode_and_select(x, cache, indices=indices)[0]

    @torch.no_grad()
    def decode_and_select(self, x: Tensor, cache: DSACache, *, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Do what `decode` does and also return the indices attended to, for layers that reuse them."""
        name = type(self).__name__
        check_shape(name, "x", x, (cache.lengths.shape[0], None, self.hidden_size), "[B, T, D]")
        check(getattr(self, "form", "absorbed") == "absorbed", name, "form", "be 'absorbed' to decode", "'expanded'")
        before = cache.lengths.to(torch.int64)
        positions = before[:, None] + torch.arange(x.shape[1], device=x.device)
        q, kv, query_input = self._project(x, positions)
        cache.append(kv, positions)
        if self.indexer is not None:
            q_idx, w, index_keys = self.indexer.project(x, positions, query_input=query_input)
            self.indexer.append(index_keys, cache, positions)
            if indices is None:
                indices = self.indexer.select_cached(q_idx, w, cache, before + x.shape[1])
        if indices is None:
            raise ValueError(f"{name}: indices must come from an earlier layer, got None")
        cache.lengths += x.shape[1]
        rows, kv = cache.attended(indices)
        q, k, v = self._attended(q, kv)
        return self._output(self._attend_to(q, k, v, rows)[0]), indices

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> DSAState:
        """Make the empty cache of ``batch_size`` sequences, on the weights' device and in their dtype unless given."""
        device = self.o_proj.weight.device if device is None else device
        dtype = self.o_proj.weight.dtype if dtype is None else dtype
        index_width = 0 if self.indexer is None else self.indexer.cache_width
        return DSAState(
            torch.zeros(batch_size, 0, *self.cache_shape, device=device, dtype=dtype),
            torch.zeros(batch_size, 0, index_width, device=device, dtype=dtype),
        )

    def _check_inputs(
        self, x: Tensor, state: DSAState | DSACache | None, cu_seqlens: Tensor | None, stage: str | None
    ) -> None:
        name = type(self).__name__
        check_shape(name, "x", x, (None, None, self.hidden_size), "[B, T, D]")
        check_choice(name, "stage", stage, (None, *STAGES))
        if state is not None:
            wanted = "a state that grows, which `decode` does not need"
            check(isinstance(state, DSAState), name, "state", f"be {wanted}", type(state).__name__)
            self._check_state(name, state, x.shape[0])
        if cu_seqlens is not None:
            check_cu_seqlens(name, cu_seqlens, x.shape[0], x.shape[1])
            check(state is None, name, "state", "be None with cu_seqlens (packed sequences have no cache)", "a state")

    def _check_state(self, name: str, state: DSAState | DSACache, batch_size: int) -> None:
        check_state(name, "state.kv", state.kv, (None, None, *self.cache_shape), batch_size)
        index_width = 0 if self.indexer is None else self.indexer.cache_width
        check_state(name, "state.index_keys", state.index_keys, (None, None, index_width), batch_size)
