"""Selection and attention in a form that a graph can hold: for programs that run without this library.

The operators walk over blocks of queries in Python and look at the indices while they do.  Here the same blocks are the
steps of one ``scan`` node, all of one shape, and nothing is read: sizes stay open, memory is bounded by a block.

    I_ts = sum_j w_tj ReLU(q'_tj . k'_s)    S_t = the topk visible s with the largest I_ts, among equals the lower s
    o_t  = sum_{s in S_t} softmax_s(scale q_t . k_s) v_s
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hybrid_flex.ops.chunk_scan import chunk_scan
from hybrid_flex.ops.dispatch import in_its_own_precision, plain_form
from hybrid_flex.ops.dsa.indexer import accumulate_dtype, cached_ranges, mark_topk, visible_ranges
from hybrid_flex.ops.dsa.quantize import rounded

# NOTE [Blocks of a scan]: rows of products (queries times indexer heads) that one step scores, bytes of keys and values
# that one step fetches, and queries at most, since the last block is filled up.  A step costs some 30 us whatever it
# does, so blocks are larger than in the loops of the operators (NOTE [Score workspace], NOTE [Gather workspace]).
SCORED_ROWS = 256
FETCHED_BYTES = 16 * 2**20
MOST_QUERIES = 64

# NOTE [Dense blocks]: up to how many keys a block of queries is multiplied with all of them, under a mask, instead of
# with fetched rows: DENSE_KEYS * J * Hkv / H, where that is known of a length when it is traced.  On a CPU a fetched
# row of keys and values costs as much as the products of H / Hkv heads with 90 keys that lie in order.
DENSE_KEYS = 90

Step = Callable[..., tuple[Tensor, ...]]


def _over_blocks(
    step: Step, xs: Sequence[tuple[Tensor, int]], block: int, shared: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Apply a step to ``block`` queries at a time of tensors ``[B, T, ...]``, and join its results along T.

    Args:
        step: function of a block of every tensor and of the tensors in ``shared``; returns tensors ``[B, block, ...]``.
        xs: tensors, each with what fills up its last block.
        block: queries that one step takes.
        shared: tensors that every step reads whole.
    """
    num_queries = xs[0][0].shape[1]
    if isinstance(num_queries, int) and num_queries <= block:  # decoding: one step, nothing to loop over
        return step(*(x for x, _ in xs), *shared)
    number = (num_queries + block - 1) // block

    def cut(x: Tensor, fill: int) -> Tensor:
        pad = (0, 0) * (x.dim() - 2) + (0, number * block - num_queries)
        return torch.nn.functional.pad(x, pad, value=fill).unflatten(1, (number, block)).transpose(0, 1)

    def combine(carry: Tensor, blocks: tuple[Tensor, ...], *shared: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return carry, step(*blocks, *shared)

    sources = (*(x for x, _ in xs), *shared)
    shared = tuple(map(_copy, shared))  # the inputs of a scan may not alias, as k and v of one cache do
    _, results = chunk_scan(combine, shared[0].new_zeros(1), tuple(cut(*x) for x in xs), sources, shared)
    # Always copied before they are joined: whether blocks lie side by side already would depend on how many there are,
    # and a question about that number would fix it in the graph.
    whole = (_copy(x.transpose(0, 1)) for x in results)
    return tuple(_copy(x.view(x.shape[0], number * block, *x.shape[3:]).narrow(1, 0, num_queries)) for x in whole)


def _block_size(wanted: int) -> int:
    return min(MOST_QUERIES, max(1, wanted))


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@plain_form("lightning_topk", "lightning_topk_cuda")
@in_its_own_precision
def traced_topk(
    q_idx: Tensor,
    k_idx: Tensor,
    w: Tensor,
    topk: int,
    causal: bool,
    query_start: int,
    cu_seqlens: Tensor | None,
    kpool: int,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    fp8: bool = False,
) -> Tensor:
    """Select as `lightning_topk` does, with the same arguments: int32 ``[B, T, topk]``."""
    batch_size, num_queries, num_heads, _ = q_idx.shape
    keys = k_idx if block_table is None else k_idx[block_table.clamp_min(0).long()].flatten(1, 2)
    if fp8:
        q_idx, keys = rounded(q_idx), rounded(keys)
    num_keys = keys.shape[1]
    if lengths is None:
        first, last = visible_ranges(num_queries, num_keys, causal, query_start, cu_seqlens, kpool, q_idx.device)
    else:
        first, last = cached_ranges(lengths, num_queries, num_keys, kpool)
    dtype = accumulate_dtype(q_idx)
    # As many columns as slots at least; what is added is visible to nobody.
    more: Any = torch.sym_max(topk - num_keys, 0)
    keys = torch.nn.functional.pad(keys.to(dtype), (0, 0, 0, more))

    def step(q: Tensor, w: Tensor, first: Tensor, last: Tensor, keys: Tensor) -> tuple[Tensor]:
        products = torch.bmm(q.flatten(1, 2), keys.transpose(1, 2)).unflatten(1, (-1, num_heads))
        scores = (products.relu() * w[..., None]).sum(2).flatten(0, 1)
        keep = mark_topk(scores, first.flatten(), last.flatten(), topk)
        # A chosen column goes to the slot that its rank among the chosen ones names, all others to one slot too many.
        slot = torch.where(keep, keep.cumsum(-1) - 1, topk)
        column = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device).expand_as(slot)
        chosen = torch.full((scores.shape[0], topk + 1), -1, dtype=torch.int32, device=scores.device)
        return (chosen.scatter(1, slot, column)[:, :topk].unflatten(0, (q.shape[0], -1)).contiguous(),)

    xs = (q_idx.to(dtype), w.to(dtype), first.expand(batch_size, -1), last.expand(batch_size, -1))
    return _over_blocks(step, [(x, 0) for x in xs], _block_size(SCORED_ROWS // num_heads), (keys,))[0]


@plain_form(
    *("sparse_attention_gather", "sparse_attention_flex"),
    *("sparse_attention_masked", "sparse_attention_masked_hopper"),
)
@in_its_own_precision
def traced_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend as `sparse_attention` does, with the operator's arguments: ``o [B, T, H, Dv]`` and ``lse [B, T, H]``."""
    most = DENSE_KEYS * indices.shape[2] * k.shape[2] // q.shape[2]
    if not (isinstance(q.shape[1], int) and q.shape[1] == 1) and statically_known_true(k.shape[1] <= most):
        return _attend_under_mask(q, k, v, indices, scale)
    return _attend_to_rows(q, k, v, indices, scale)


@plain_form("sparse_attention_cuda", "sparse_attention_hopper")
def traced_cuda_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, value_dim: int
) -> tuple[Tensor, Tensor]:
    """Attend as `traced_attention` does; with ``value_dim > 0`` to values that are the keys' first columns."""
    return traced_attention(q, k, k[..., :value_dim] if value_dim > 0 else v, indices, scale)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights not yet divided, what divides them, and log-sum-exps of logits, -inf where a row has no key."""
    # A row without keys: its largest logit is -inf, which must not meet another -inf; its total is 0.
    largest = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    weights = (logits - largest).exp()
    total = weights.sum(-1, keepdim=True)
    return weights, total.clamp_min(1.0), total.log() + largest


def _attend_under_mask(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Multiply blocks of queries with every key: NOTE [Dense blocks]."""
    num_keys, num_kv_heads, dtype = k.shape[1], k.shape[2], accumulate_dtype(q)

    def step(q: Tensor, slots: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        batch_size, num_queries = q.shape[:2]
        column = torch.where(slots >= 0, slots, num_keys).long()  # unused slots mark one column too many
        marked = torch.zeros(batch_size, num_queries, num_keys + 1, dtype=torch.bool, device=q.device)
        selected = marked.scatter(2, column, True)[:, None, :, :num_keys]
        # [B * Hkv, G * b, D]
        queries = (q.to(dtype) * scale).unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
        logits = torch.bmm(queries.flatten(2, 3).flatten(0, 1), k_BHSD.flatten(0, 1).transpose(1, 2))
        logits = logits.view(batch_size, -1, num_queries, num_keys).masked_fill(~selected, float("-inf"))
        weights, total, lse = _softmax(logits)
        rows = weights.view(batch_size * num_kv_heads, -1, num_keys)
        o = torch.bmm(rows, v_BHSD.flatten(0, 1)).view(batch_size, -1, num_queries, v_BHSD.shape[3]) / total
        return o.transpose(1, 2).to(q.dtype).contiguous(), lse[..., 0].transpose(1, 2).contiguous()

    shared = tuple(x.transpose(1, 2).to(dtype) for x in (k, v))
    o, lse = _over_blocks(step, [(q, 0), (indices, -1)], MOST_QUERIES, shared)
    return o, lse


def _attend_to_rows(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Fetch the rows that blocks of queries have selected."""
    num_kv_heads, dtype = k.shape[2], accumulate_dtype(q)

    def step(q: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # [B, b, Hkv, J]: the heads stand before the slots, as the products want them.
        row = slots.clamp_min(0).long()[:, :, None]
        entry = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        head = torch.arange(num_kv_heads, device=q.device)[:, None]
        keys, values = (x[entry, row, head].flatten(0, 2).to(dtype) for x in (k, v))
        queries = (q.to(dtype) * scale).unflatten(2, (num_kv_heads, -1)).flatten(0, 2)
        logits = torch.bmm(queries, keys.transpose(1, 2)).unflatten(0, (*q.shape[:2], num_kv_heads))
        logits = logits.masked_fill((slots < 0)[:, :, None, None], float("-inf"))
        weights, total, lse = _softmax(logits)
        o = torch.bmm(weights.flatten(0, 2), values).unflatten(0, (*q.shape[:2], num_kv_heads)) / total
        return o.flatten(2, 3).to(q.dtype), lse.flatten(2)

    row_bytes = indices.shape[2] * num_kv_heads * (k.shape[3] + v.shape[3]) * dtype.itemsize
    block = _block_size(FETCHED_BYTES // max(1, row_bytes))
    o, lse = _over_blocks(step, [(q, 0), (indices, -1)], block, (k, v))
    return o, lse
