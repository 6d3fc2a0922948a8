"""FLOP formulas of every operator of ours, for `torch.utils.flop_counter`.

`torch.utils.flop_counter.FlopCounterMode` adds up formulas of the operators that a model calls and looks into none of
them; importing this module registers one for each ``hybrid_flex::`` operator, and with it the counter counts a hybrid
model, forward and backward.

# NOTE [What counts]
As in torch's own formulas a product of an ``[m, k]`` by a ``[k, n]`` matrix is ``2 m n k``, what is masked inside a
tile counts, and elementwise work (norms, gates, softmax, decay) counts nothing.  An operator counts what its algorithm
needs, whichever device runs it: the products of the equations in its file, not the tiles that one of its forms pads.
A formula sees shapes and plain numbers, never contents; where contents decide, the formula says what it takes for
granted (packed sequences: N of equal length).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

import hybrid_flex.ops  # noqa: F401  registers the operators

Shape = Sequence[int]


def _formula(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a formula for the operators of ours that ``names`` name."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        _register(formula, *(getattr(torch.ops.hybrid_flex, name) for name in names))
        return formula

    return register


def _register(formula: Callable[..., int], *operators: Any) -> None:
    # Whoever registered one before, a user or a newer torch, is right.
    for operator in operators:
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)


# KDA


@_formula("chunk_kda", "chunk_kda_training")
def chunk_kda_flop(q: Shape, k: Shape, v: Shape, *others: Any, out_shape: Any = None) -> int:
    """Count chunked KDA: per chunk of C tokens and value head ``5 C^2 K + 3 C^2 V + 6 C K V``.

    Its products are Aqk and L (``2 C^2 K`` each), the solve for u and w by substitution (``C^2 (K + V)``), ``w S``,
    ``(P q) S`` and ``(E k)^T v_new`` (``2 C K V`` each) and ``Aqk v_new`` (``2 C^2 V``).  The last chunk counts the
    tokens that it has; a sequence shorter than a chunk is one of T tokens.
    """
    C, tokens, K, V = _chunks(k, v, others[13])
    return tokens * (5 * C * K + 3 * C * V + 6 * K * V)


@_formula("chunk_kda_backward")
def chunk_kda_backward_flop(
    d_o: Shape, d_final: Shape | None, o: Shape, q: Shape, k: Shape, v: Shape, *others: Any, out_shape: Any = None
) -> int:
    """Count its backward: per chunk and value head ``16 C^2 K + 8 C^2 V + 16 C K V``.

    ``5 C^2 K + C^2 V + 4 C K V`` of them make the chunk's quantities and states again (``4 C^2 K`` fewer where the
    forward kept the triangle's inverse and Aqk).  The others are the gradients: of v_new (``2 C^2 V + 2 C K V``), of
    the states (``4 C K V``), of u and w (``2 C K V + C^2 (K + V)``), of L (``2 C^2 (K + V)``), of Aqk (``2 C^2 V``), of
    the decayed queries and keys (``4 C K V``), and of q and k inside a chunk (``8 C^2 K``).
    """
    C, tokens, K, V = _chunks(k, v, others[13])
    kept = len(others) > 15 and others[15] is not None
    return tokens * ((12 if kept else 16) * C * K + 8 * C * V + 16 * K * V)


def _chunks(k: Shape, v: Shape, chunk_size: int) -> tuple[int, int, int, int]:
    """Return the tokens of a chunk, those of all value heads together, K and V."""
    batch_size, num_tokens, num_v_heads, value_width = v
    return min(chunk_size, num_tokens), batch_size * num_tokens * num_v_heads, k[-1], value_width


@_formula("fused_recurrent_kda", "kda_decode")
def recurrent_kda_flop(q: Shape, k: Shape, v: Shape, *others: Any, out_shape: Any = None) -> int:
    """Count the recurrence: ``S^T k``, the update and ``S^T q`` are ``2 K V`` each per token and value head."""
    batch_size, num_tokens, num_v_heads, value_width = v
    return batch_size * num_tokens * num_v_heads * 6 * k[-1] * value_width


@_formula("short_conv")
def short_conv_flop(x: Shape, weight: Shape, *others: Any, out_shape: Any = None) -> int:
    """Count the convolution as torch counts one: 2 per tap, token and channel."""
    batch_size, num_tokens, num_channels = x
    return 2 * batch_size * num_tokens * num_channels * weight[-1]


@_formula("short_conv_backward")
def short_conv_backward_flop(
    dy: Shape, d_final_state: Shape | None, x: Shape, weight: Shape, *others: Any, **_: Any
) -> int:
    """Count both gradients, and the convolution once more where the SiLU's derivative needs its result."""
    silu = bool(others[3])
    return (3 if silu else 2) * short_conv_flop(x, weight)


@_formula("gated_rms_norm", "gated_rms_norm_backward", "pack_selection", "select_blocks")
def no_flop(*arguments: Any, **_: Any) -> int:
    """Count nothing: norms are elementwise, and block lists are made of integers."""
    return 0


# DSA


def _floor_sum(stop: int, kpool: int, limit: int) -> int:
    """Sum ``min(limit, i // kpool)`` over ``0 <= i < stop``."""
    rising = min(stop, kpool * limit)
    quotient, rest = divmod(rising, kpool)
    return kpool * quotient * (quotient - 1) // 2 + rest * quotient + (stop - rising) * limit


def visible_pairs(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool = True,
    query_start: int = 0,
    kpool: int = 1,
    num_sequences: int | None = None,
    beyond: int = 0,
) -> int:
    """Count pairs of a query and a key (a pool of ``kpool`` tokens) that it sees.

    Query t sees ``min(num_keys, (query_start + t + 1) // kpool)`` keys, or all of them without ``causal``.

    Args:
        num_queries: T.
        num_keys: S, tokens or pools.
        causal: whether a query sees only what is complete when its token comes.
        query_start: position of the first query.
        kpool: tokens per key.
        num_sequences: sequences packed along T, taken to be of equal length; None for one.
        beyond: leave out queries that see no more keys than this.

    Returns:
        The number of pairs of one batch entry.

    Example:
        >>> visible_pairs(3, 3), visible_pairs(3, 3, causal=False), visible_pairs(3, 3, beyond=1)
        (6, 9, 5)
    """
    if num_sequences is not None:
        length, longer = divmod(num_queries, max(1, num_sequences))
        counts = ((length, num_sequences - longer), (length + 1, longer))
        return sum(n * visible_pairs(T, T, causal=causal, kpool=kpool, beyond=beyond) for T, n in counts)
    if not causal:
        return num_queries * num_keys if num_keys > beyond else 0
    if num_keys <= beyond:
        return 0
    first = kpool * (beyond + 1) if beyond else 0
    start, stop = max(query_start + 1, first), max(query_start + num_queries + 1, first)
    return _floor_sum(stop, kpool, num_keys) - _floor_sum(start, kpool, num_keys)


@_formula("lightning_topk", "lightning_topk_cuda")
def lightning_topk_flop(
    q_idx: Shape,
    k_idx: Shape,
    w: Shape,
    topk: int,
    causal: bool,
    query_start: int,
    cu_seqlens: Shape | None,
    kpool: int,
    lengths: Shape | None = None,
    block_table: Shape | None = None,
    *others: Any,
    out_shape: Any = None,
) -> int:
    """Count the scores of visible pairs: ``2 HI DI`` for the products and ``2 HI`` for their weighted sum.

    A query that sees no more than ``topk`` keys gets all of them, unscored.  Caches with ``lengths`` count as full.
    """
    batch_size, num_queries, num_heads, width = q_idx
    num_keys = k_idx[1] if block_table is None else k_idx[1] * block_table[1]
    if lengths is not None:
        pairs = num_queries * num_keys if num_keys > topk else 0
    else:
        pairs = visible_pairs(
            num_queries,
            num_keys,
            causal=causal,
            query_start=query_start,
            kpool=kpool,
            num_sequences=None if cu_seqlens is None else cu_seqlens[0] - 1,
            beyond=topk,
        )
    return batch_size * pairs * 2 * num_heads * (width + 1)


@_formula(
    *("sparse_attention_gather", "sparse_attention_flex", "sparse_attention_masked"),
    *("sparse_attention_cuda", "sparse_attention_hopper", "sparse_attention_masked_hopper"),
)
def sparse_attention_flop(
    q: Shape, k: Shape, v: Shape, indices: Shape, scale: float, value_dim: int = 0, *, out_shape: Any = None
) -> int:
    """Count logits and outputs over the J slots of the selection: ``2 T J H (D + Dv)``, unused slots included."""
    pairs, width, value_width = _slots(q, k, v, indices, value_dim)
    return 2 * pairs * (width + value_width)


@_formula("sparse_attention_backward", "sparse_attention_masked_backward", "sparse_attention_cuda_backward")
def sparse_attention_backward_flop(
    do: Shape,
    dlse: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    indices: Shape,
    o: Shape,
    lse: Shape,
    scale: float,
    value_dim: int = 0,
    *,
    out_shape: Any = None,
) -> int:
    """Count five products over the slots: logits once more, dp, dq, dk and dv, ``2 T J H (3 D + 2 Dv)``."""
    pairs, width, value_width = _slots(q, k, v, indices, value_dim)
    return 2 * pairs * (3 * width + 2 * value_width)


def _slots(q: Shape, k: Shape, v: Shape, indices: Shape, value_dim: int) -> tuple[int, int, int]:
    """Return pairs of a query head and a slot, D and Dv; of more slots than keys the first S are read."""
    batch_size, num_queries, num_heads, width = q
    num_slots = min(indices[-1], k[1])
    return batch_size * num_queries * num_heads * num_slots, width, value_dim or v[-1]


@_formula("indexer_kl_loss")
def indexer_kl_loss_flop(
    q_idx: Shape,
    k_idx: Shape,
    w: Shape,
    q: Shape,
    k: Shape,
    indices: Shape | None,
    lse: Shape | None,
    scale: float,
    causal: bool,
    query_start: int,
    cu_seqlens: Shape | None,
    kpool: int,
    *,
    out_shape: Any = None,
) -> int:
    """Count the attention's logits, ``2 H D`` per pair of tokens, and the indexer's scores, ``2 HI (DI + 1)``."""
    tokens, classes = _compared(q_idx, k_idx, k, indices, causal, query_start, cu_seqlens, kpool)
    return tokens * 2 * q[2] * q[3] + classes * 2 * q_idx[2] * (q_idx[3] + 1)


@_formula("indexer_kl_loss_backward")
def indexer_kl_loss_backward_flop(
    grad: Shape,
    q_idx: Shape,
    k_idx: Shape,
    w: Shape,
    q: Shape,
    k: Shape,
    indices: Shape | None,
    lse: Shape,
    lse_idx: Shape,
    ds: Shape,
    scale: float,
    causal: bool,
    query_start: int,
    cu_seqlens: Shape | None,
    kpool: int,
    *,
    out_shape: Any = None,
) -> int:
    """Count the indexer's products once more, the gradients of q_idx and k_idx (``2 HI DI`` each) and of w (``2 HI``).

    Without a selection the rest of scores and logits is counted once more, too.
    """
    tokens, classes = _compared(q_idx, k_idx, k, indices, causal, query_start, cu_seqlens, kpool)
    again = 0 if indices is not None else tokens * 2 * q[2] * q[3] + classes * 2 * q_idx[2]
    return again + classes * 2 * q_idx[2] * (3 * q_idx[3] + 1)


def _compared(
    q_idx: Shape,
    k_idx: Shape,
    k: Shape,
    indices: Shape | None,
    causal: bool,
    query_start: int,
    cu_seqlens: Shape | None,
    kpool: int,
) -> tuple[int, int]:
    """Return pairs of a query with tokens that the attention covers, and with classes that are compared."""
    batch_size, num_queries = q_idx[:2]
    if indices is not None:
        # Pools are written out, and the tail of the incomplete one is attended to besides.
        num_classes = indices[-1]
        num_tokens = num_classes if kpool == 1 else num_classes * kpool + kpool - 1
        return batch_size * num_queries * num_tokens, batch_size * num_queries * num_classes
    sequences = None if cu_seqlens is None else cu_seqlens[0] - 1
    options: dict[str, Any] = {"causal": causal, "query_start": query_start, "num_sequences": sequences}
    tokens = visible_pairs(num_queries, k[1], **options)
    return batch_size * tokens, batch_size * visible_pairs(num_queries, k_idx[1], kpool=kpool, **options)


# Dense attention, where torch does not count it: on a CPU up to 2.14, and up to 2.12 with fewer key heads than heads.


def _fused_attention_flop(q: Shape, k: Shape, v: Shape, *others: Any, **_: Any) -> int:
    batch_size, num_heads, num_queries, width = q
    return 2 * batch_size * num_heads * num_queries * k[2] * (width + v[3])


def _fused_attention_backward_flop(d_o: Shape, q: Shape, k: Shape, v: Shape, *others: Any, **_: Any) -> int:
    batch_size, num_heads, num_queries, width = q
    return 2 * batch_size * num_heads * num_queries * k[2] * (3 * width + 2 * v[3])


_KINDS = ["flash_attention_for_cpu"]
try:
    sdpa_flop_count((1, 2, 4, 8), (1, 1, 4, 8), (1, 1, 4, 8))
except AssertionError:
    _REFUSING = ["flash_attention", "efficient_attention", "cudnn_attention"]
    for _kind in _REFUSING:
        for _way in ("", "_backward"):
            flop_registry.pop(getattr(torch.ops.aten, f"_scaled_dot_product_{_kind}{_way}"), None)
    _KINDS += _REFUSING
for _kind in _KINDS:
    _register(_fused_attention_flop, getattr(torch.ops.aten, f"_scaled_dot_product_{_kind}"))
    _register(_fused_attention_backward_flop, getattr(torch.ops.aten, f"_scaled_dot_product_{_kind}_backward"))
