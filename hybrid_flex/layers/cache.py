"""Caches of fixed size for decoding: of sparse attention, in one piece or in pages, and of dense attention.

A sequence of length L holds rows 0 to L - 1 of ``kv`` and the index keys (or complete pools of them) beside them; what
lies behind does not count.  Lengths stay on the device, so that a step can be captured in a CUDA graph and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_flex.checks import check
from hybrid_flex.ops.dsa import paged_rows


@dataclass
class DSACache:
    """Hold the caches of a batch of sequences; `SparseLayer.decode` writes into it.

    Attributes:
        kv: rows as in `DSAState`, ``[B, max_length, Hkv, X]``, or pages ``[num_pages + 1, page_size, Hkv, X]``; the
            last page takes what sequences without a page write.
        index_keys: keys as the indexer scores them, ``[B, max_length / kpool, DI]``, or pages of ``page_size / kpool``.
        index_tail: with pooled keys, key and pooling gate of the tokens of the incomplete pool, ``[B, kpool, 2 * DI]``;
            ``[B, 0, 0]`` without.
        lengths: tokens held, int32 ``[B]``. Set it to 0 to begin a new sequence.
        block_table: pages of each sequence in order, int32 ``[B, pages]``, -1 for none; None for a cache in one piece.

    Example:
        >>> import hybrid_flex
        >>> layer = hybrid_flex.DeepSeekSparseAttention(32, num_heads=2, topk=4, index_heads=2, index_head_dim=8)
        >>> cache = layer.init_cache(3, 100, page_size=16)
        >>> layer.decode(torch.randn(3, 1, 32), cache).shape, cache.kv.shape, cache.lengths.tolist()
        (torch.Size([3, 1, 32]), torch.Size([22, 16, 2, 32]), [1, 1, 1])
    """

    kv: Tensor
    index_keys: Tensor
    index_tail: Tensor
    lengths: Tensor
    block_table: Tensor | None

    def append(self, kv: Tensor, positions: Tensor) -> None:
        """Write rows ``[B, T, Hkv, X]`` at ``positions [B, T]`` of their sequences."""
        self.kv.index_put_(self._place(positions, self.kv.shape[1]), kv.to(self.kv.dtype))

    def append_index(self, index_keys: Tensor, places: Tensor) -> None:
        """Write index keys ``[B, T, DI]``, or pools, at ``places [B, T]`` of their sequences."""
        self.index_keys.index_put_(self._place(places, self.index_keys.shape[1]), index_keys.to(self.index_keys.dtype))

    def attended(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return where selected tokens lie and the rows they lie in, ``[B, S, Hkv, X]``, as `sparse_attention` asks."""
        if self.block_table is None:
            return indices, self.kv
        rows = self.kv.flatten(0, 1).expand(indices.shape[0], -1, -1, -1)
        return paged_rows(indices, self.block_table, self.kv.shape[1]), rows

    def fill(self, own: slice, kv: Tensor, index_keys: Tensor, index_tail: Tensor) -> None:
        """Let sequences ``own`` begin with rows ``[b, S, Hkv, X]``, their index keys and the incomplete pool."""
        paged = self.block_table is not None
        part = DSACache(
            self.kv if paged else self.kv[own],
            self.index_keys if paged else self.index_keys[own],
            self.index_tail[own],
            self.lengths[own],
            None if self.block_table is None else self.block_table[own],
        )
        place = torch.arange(kv.shape[1], device=kv.device).expand(kv.shape[0], -1)
        part.append(kv, place)
        part.append_index(index_keys, place[:, : index_keys.shape[1]])
        kpool = part.index_tail.shape[1]
        if kpool > 0:
            # Chosen by number and not by slice, rows that there are not as zeros: the graph of a prefill that ends here
            # asks for no tail of a certain length.
            rows = torch.nn.functional.pad(index_tail, (0, 0, 0, kpool))
            part.index_tail.copy_(rows.index_select(1, torch.arange(kpool, device=kv.device)))
        part.lengths.fill_(kv.shape[1])

    def _place(self, positions: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
        if self.block_table is None:
            entry = torch.arange(positions.shape[0], device=positions.device)
            return entry[:, None].expand_as(positions), positions
        page = self.block_table.to(torch.int64).gather(1, positions // page_size)
        return page, positions % page_size


@dataclass
class KVCache:
    """Hold the caches of a batch of sequences for dense attention; `CausalAttention.decode` writes into it.

    Attributes:
        kv: keys then values as in `KVState`, ``[B, max_length, Hkv, 2 * D]``.  Rows behind a sequence's last token are
            weighed with zero, so they may hold anything finite.
        lengths: tokens held, int32 ``[B]``. Set it to 0 to begin a new sequence.

    Example:
        >>> import hybrid_flex
        >>> layer = hybrid_flex.CausalAttention(32, num_heads=4, num_kv_heads=2)
        >>> cache = layer.init_cache(3, 100)
        >>> layer.decode(torch.randn(3, 1, 32), cache).shape, cache.kv.shape, cache.lengths.tolist()
        (torch.Size([3, 1, 32]), torch.Size([3, 100, 2, 16]), [1, 1, 1])
    """

    kv: Tensor
    lengths: Tensor

    def append(self, kv: Tensor, positions: Tensor) -> None:
        """Write rows ``[B, T, Hkv, 2 * D]`` at ``positions [B, T]`` of their sequences."""
        entry = torch.arange(positions.shape[0], device=positions.device)
        self.kv.index_put_((entry[:, None].expand_as(positions), positions), kv.to(self.kv.dtype))

    def fill(self, own: slice, kv: Tensor) -> None:
        """Let sequences ``own`` begin with rows ``[b, S, Hkv, 2 * D]``."""
        part = KVCache(self.kv[own], self.lengths[own])
        # By place and not by slice: whether a slice is the whole cache would bind a graph to a length.
        part.append(kv, torch.arange(kv.shape[1], device=kv.device).expand(kv.shape[0], -1))
        part.lengths.fill_(kv.shape[1])


for _cache in (DSACache, KVCache):
    torch.export.register_dataclass(_cache, serialized_type_name=f"hybrid_flex.{_cache.__name__}")
    torch.serialization.add_safe_globals([_cache])


def make_cache(
    op: str,
    batch_size: int,
    max_length: int,
    page_size: int | None,
    num_pages: int | None,
    *,
    kv_shape: tuple[int, int],
    index_width: int,
    kpool: int,
    device: torch.device,
    dtype: torch.dtype,
) -> DSACache:
    """Allocate what `SparseLayer.init_cache` promises."""
    for name, size in (("batch_size", batch_size), ("max_length", max_length)):
        check(size >= 1, op, name, "be at least 1", size)
    check(page_size is not None or num_pages is None, op, "num_pages", "come with page_size", num_pages)
    table = None
    if page_size is None:
        rows, width = batch_size, max_length
    else:
        rule = f"be a positive multiple of kpool = {kpool}"
        check(page_size > 0 and page_size % kpool == 0, op, "page_size", rule, page_size)
        check(num_pages is None or num_pages >= 1, op, "num_pages", "be at least 1", num_pages)
        per_sequence = -(-max_length // page_size)
        table = torch.full((batch_size, per_sequence), -1, dtype=torch.int32, device=device)
        if num_pages is None:
            num_pages = batch_size * per_sequence
            table = torch.arange(num_pages, dtype=torch.int32, device=device).view(batch_size, per_sequence)
        rows, width = num_pages + 1, page_size
    pools = -(-width // kpool)
    return DSACache(
        torch.zeros(rows, width, *kv_shape, device=device, dtype=dtype),
        torch.zeros(rows, pools, index_width, device=device, dtype=dtype),
        torch.zeros(batch_size, *((kpool, 2 * index_width) if kpool > 1 else (0, 0)), device=device, dtype=dtype),
        torch.zeros(batch_size, dtype=torch.int32, device=device),
        table,
    )
