"""The gather form of attention over a selection in plain torch: on a CPU, in float64, and where bits must repeat.

    s_tj = scale q_t . k_{i_tj}        p_t = softmax_j(s_t)        lse_t = log sum_j exp s_tj
    o_t  = sum_j p_tj v_{i_tj}

and backward, with delta_t = do_t . o_t - dlse_t:

    ds_tj = p_tj (do_t . v_{i_tj} - delta_t)        dq_t = scale sum_j ds_tj k_{i_tj}
    dk_s  = scale sum_{t, j: i_tj = s} ds_tj q_t    dv_s = sum_{t, j: i_tj = s} p_tj do_t

Blocks of queries fetch the selected rows of k and v and forget them: the workspace does not grow with T or S.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hybrid_flex.ops.dispatch import in_its_own_precision
from hybrid_flex.ops.dsa.indexer import accumulate_dtype

# NOTE [Gather workspace]: bytes of fetched rows that one block of queries may hold.  4 MiB stay in the caches of a
# core: at J = 256 and 576 float32 columns 8 queries cost 85 us each on one Zen 5 core, 16 queries 130 us, 32 queries
# 160 us.  The buffer is made once: fresh memory of this size costs more in page faults than the fetch itself.
WORKSPACE_BYTES = 4 * 2**20


class _Rows:
    """Rows of a cache ``[S, Hkv, D]`` as contiguous runs of memory, so that one fetch brings all heads.

    ``table [S, span]`` is a view; head h of a fetched row lies at ``offset + h * head_stride``.
    """

    def __init__(self, table: Tensor, offset: int, head_stride: int, num_heads: int, width: int):
        self.table, self.offset = table, offset
        self.head_stride, self.num_heads, self.width = head_stride, num_heads, width
        self._buffers: dict[torch.dtype, Tensor] = {}

    def _buffer(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        """Lend a buffer ``[num_rows, span]``; the next fetch overwrites it."""
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.shape[0] < num_rows:
            buffer = self._buffers[dtype] = self.table.new_empty(num_rows, self.table.shape[1], dtype=dtype)
        return buffer[:num_rows]

    def fetch(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """Fetch the rows named by ``slots [b, J]`` (-1 fetches row 0) into a buffer: ``[b, J, span]`` in ``dtype``."""
        rows = self._buffer(slots.numel(), self.table.dtype)
        torch.index_select(self.table, 0, slots.clamp_min(0).flatten(), out=rows)
        if dtype != self.table.dtype:
            rows = self._buffer(slots.numel(), dtype).copy_(rows)
        return rows.view(*slots.shape, self.table.shape[1])

    def split(self, rows: Tensor) -> Tensor:
        """View the heads of fetched rows: ``[b, J, span] -> [b, Hkv, J, D]``."""
        stride = (rows.stride(0), self.head_stride, rows.stride(1), 1)
        shape = (rows.shape[0], self.num_heads, rows.shape[1], self.width)
        return rows.as_strided(shape, stride, rows.storage_offset() + self.offset)


def _span(x: Tensor) -> int:
    """Count the elements from the first to the last one of a row of ``x [S, Hkv, D]``."""
    return (x.shape[1] - 1) * x.stride(1) + x.shape[2]


def _as_rows(x: Tensor) -> _Rows:
    if x.stride(2) != 1 or x.stride(0) < _span(x) or x.stride(1) < x.shape[2]:
        x = x.contiguous()
    table = x.as_strided((x.shape[0], _span(x)), (x.stride(0), 1), x.storage_offset())
    return _Rows(table, 0, x.stride(1), x.shape[1], x.shape[2])


def _cache_rows(k: Tensor, v: Tensor) -> tuple[_Rows, _Rows, bool]:
    """Lay out ``k [S, Hkv, D]`` and ``v [S, Hkv, Dv]``; True when one fetch serves both.

    It does when both are views of the same rows: v the first columns of k (MLA), or keys and values side by side (GQA).
    """
    same = k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() and k.dtype == v.dtype
    if same and k.stride(2) == v.stride(2) == 1 and k.stride(0) == v.stride(0):
        begin = min(k.storage_offset(), v.storage_offset())
        end = max(k.storage_offset() + _span(k), v.storage_offset() + _span(v))
        if end - begin <= k.stride(0):
            table = k.as_strided((k.shape[0], end - begin), (k.stride(0), 1), begin)
            rows = [_Rows(table, int(x.storage_offset() - begin), x.stride(1), x.shape[1], x.shape[2]) for x in (k, v)]
            return rows[0], rows[1], True
    return _as_rows(k), _as_rows(v), False


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Multiply ``[b, Hkv, M, K] @ [b, Hkv, K, N]`` without copying strided operands.

    A batched product takes one batch stride, but queries and heads have two: loop over the smaller of them.
    """
    result = left.new_empty(left.shape[0], left.shape[1], left.shape[2], right.shape[3])
    if left.shape[1] <= left.shape[0]:
        for h in range(left.shape[1]):
            torch.bmm(left[:, h], right[:, h], out=result[:, h])
    else:
        for i in range(left.shape[0]):
            torch.bmm(left[i], right[i], out=result[i])
    return result


def _blocks(indices: Tensor, span: int, itemsize: int) -> Iterator[tuple[slice, Tensor]]:
    """Cut ``indices [T, J]`` into blocks whose fetched rows of ``span`` elements fit the workspace.

    On a CPU the columns that no query of a block uses are left out, and blocks without any key.
    """
    num_queries, num_slots = indices.shape
    size = max(1, WORKSPACE_BYTES // max(1, num_slots * span * itemsize))
    column = torch.arange(1, num_slots + 1, dtype=indices.dtype, device=indices.device)
    for start in range(0, num_queries, size):
        block = slice(start, min(start + size, num_queries))
        slots = indices[block]
        if slots.device.type == "cpu":
            slots = slots[:, : int((column * (slots >= 0)).max())]
        if slots.shape[1] > 0:
            yield block, slots


@torch.library.custom_op("hybrid_flex::sparse_attention_gather", mutates_args=())
@in_its_own_precision
def _gather_forward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch_size, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads, value_width = v.shape[1:]
    heads = (num_kv_heads, num_heads // num_kv_heads)
    dtype = accumulate_dtype(q)
    o = q.new_zeros(batch_size, num_queries, num_heads, value_width)
    lse = q.new_full((batch_size, num_queries, num_heads), float("-inf"), dtype=dtype)
    if num_keys == 0 or indices.numel() == 0:
        return o, lse
    indices = indices[..., : min(indices.shape[-1], num_keys)]
    for b in range(batch_size):
        rows_k, rows_v, shared = _cache_rows(k[b], v[b])
        span = rows_k.table.shape[1] + (0 if shared else rows_v.table.shape[1])
        for block, slots in _blocks(indices[b], span, dtype.itemsize):
            fetched = rows_k.fetch(slots, dtype)
            q_b = (q[b, block].to(dtype) * scale).unflatten(1, heads)
            logits = _multiply(q_b, rows_k.split(fetched).transpose(2, 3))
            logits.masked_fill_((slots < 0)[:, None, None], float("-inf"))
            # A row without keys: its largest logit is -inf, which must not meet another -inf; its total is 0.
            largest = logits.amax(-1, keepdim=True).clamp_min_(torch.finfo(dtype).min)
            weights = logits.sub_(largest).exp_()
            total = weights.sum(-1, keepdim=True)
            lse[b, block] = total.log().add_(largest).flatten(1)
            fetched = fetched if shared else rows_v.fetch(slots, dtype)
            # Every other row's total is at least 1, the weight of its largest logit.
            o[b, block] = _multiply(weights, rows_v.split(fetched)).div_(total.clamp_min_(1.0)).flatten(1, 2)
    return o, lse


@_gather_forward.register_fake
def fake_forward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Make the outputs of every form, without values."""
    o = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[-1])
    return o, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q))


def gather_lse(q: Tensor, k: Tensor, indices: Tensor, scale: float) -> Tensor:
    """Compute the log-sum-exps ``[B, T, H]`` alone, for a form of attention that does not return them."""
    no_values = k[..., :0]
    lse: Tensor = torch.ops.hybrid_flex.sparse_attention_gather(q, k, no_values, indices, scale)[1]
    return lse


@torch.library.custom_op("hybrid_flex::sparse_attention_backward", mutates_args=())
@in_its_own_precision
def _backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, _, num_heads, width = q.shape
    num_keys, num_kv_heads, value_width = v.shape[1:]
    heads = (num_kv_heads, num_heads // num_kv_heads)
    dtype = accumulate_dtype(q)
    dq = q.new_zeros(q.shape)
    dk = k.new_zeros(batch_size, num_keys, num_kv_heads * width, dtype=dtype)
    dv = v.new_zeros(batch_size, num_keys, num_kv_heads * value_width, dtype=dtype)
    if num_keys > 0 and indices.numel() > 0:
        indices = indices[..., : min(indices.shape[-1], num_keys)]
        delta = (do.to(dtype) * o.to(dtype)).sum(-1) - dlse.to(dtype)
        lse = lse.to(dtype).masked_fill(lse == float("-inf"), 0.0)
        for b in range(batch_size):
            rows_k, rows_v, shared = _cache_rows(k[b], v[b])
            span = rows_k.table.shape[1] + (0 if shared else rows_v.table.shape[1])
            for block, slots in _blocks(indices[b], 2 * span, dtype.itemsize):
                fetched = rows_k.fetch(slots, dtype)
                keys = rows_k.split(fetched)
                values = rows_v.split(fetched if shared else rows_v.fetch(slots, dtype))
                q_b, do_b = (x[b, block].to(dtype).unflatten(1, heads) for x in (q, do))
                lse_b, delta_b = (x[b, block].unflatten(1, heads)[..., None] for x in (lse, delta))
                p = _multiply(q_b * scale, keys.transpose(2, 3)).sub_(lse_b).exp_()
                p.masked_fill_((slots < 0)[:, None, None], 0.0)
                ds = _multiply(do_b, values.transpose(2, 3)).sub_(delta_b).mul_(p).mul_(scale)
                dq[b, block] = _multiply(ds, keys).flatten(1, 2)
                _scatter_rows(dk[b], slots, ds, q_b)
                _scatter_rows(dv[b], slots, p, do_b)
    return dq, dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape)


def _scatter_rows(grad: Tensor, slots: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right``, from ``[b, Hkv, G, J]`` and ``[b, Hkv, G, D]``, to the rows ``slots`` of ``grad``."""
    rows = _multiply(left.transpose(2, 3), right).transpose(1, 2).flatten(2).flatten(0, 1)
    # Unused slots carry zeros, so it does not matter that they name row 0.
    grad.scatter_add_(0, slots.clamp_min(0).flatten().long()[:, None].expand_as(rows), rows)


@_backward.register_fake
def fake_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the gradients of every form, without values."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def setup_context(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Save what the backward operator needs; shared by the operators that return (o, lse)."""
    q, k, v, indices, scale = inputs
    ctx.save_for_backward(q, k, v, indices, *output)  # type: ignore[attr-defined]
    ctx.scale = scale  # type: ignore[attr-defined]


def backward(ctx: object, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradient of an operator that returns (o, lse) in the plain form."""
    q, k, v, indices, o, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    arguments = (do, dlse, q, k, v, indices, o, lse, ctx.scale)  # type: ignore[attr-defined]
    return *torch.ops.hybrid_flex.sparse_attention_backward(*arguments), None, None


_gather_forward.register_autograd(backward, setup_context=setup_context)
