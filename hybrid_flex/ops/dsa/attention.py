"""Attention over a selection: every query attends the keys its row of ``indices`` names, and no others.

    s_tj = scale q_t . k_{i_tj}        p_t = softmax_j(s_t)        o_t = sum_j p_tj v_{i_tj}        lse_t = log sum_j exp s_tj

and backward, with delta_t = do_t . o_t - dlse_t:

    ds_tj = p_tj (do_t . v_{i_tj} - delta_t)    dq_t = scale sum_j ds_tj k_{i_tj}    dk_s, dv_s = sums over all t, j: i_tj = s

The gather form walks over blocks of queries, fetches the selected rows of k and v, and forgets them: its workspace does not
grow with T or S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_flex.checks import (
    FLOATING,
    INTEGER,
    check,
    check_choice,
    check_device,
    check_dtype,
    check_rank,
    check_shape,
)
from hybrid_flex.ops.dsa.indexer import accumulate_dtype
from hybrid_flex.ops.dsa.reference import reference_attention

# NOTE [Gather workspace]: bytes of gathered keys and values that one block of queries may hold.
WORKSPACE_BYTES = 16 * 2**20


def _block_size(num_slots: int, row_width: int, itemsize: int) -> int:
    return max(1, WORKSPACE_BYTES // max(1, num_slots * row_width * itemsize))


def _is_prefix(v: Tensor, k: Tensor) -> bool:
    """Say whether ``v`` is a view of the first columns of ``k`` (MLA), so that one gather serves both."""
    return (
        v.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        and v.storage_offset() == k.storage_offset()
        and v.stride() == k.stride()
        and v.dtype == k.dtype
        and v.shape[-1] <= k.shape[-1]
    )


def gather_rows(x: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Fetch rows of ``x [S, D]`` for ``slots [b, J]`` (-1 fetches row 0): ``[b, J, D]`` in ``dtype``."""
    return x.index_select(0, slots.clamp_min(0).flatten()).view(*slots.shape, x.shape[-1]).to(dtype)


def _probabilities(q: Tensor, keys: Tensor, unused: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax over the selection: ``q [b, G, D], keys [b, J, D], unused [b, J] -> p [b, G, J], lse [b, G]``."""
    logits = torch.bmm(q * scale, keys.transpose(1, 2))
    logits.masked_fill_(unused[:, None], float("-inf"))
    lse = logits.logsumexp(-1)
    p = logits.sub_(lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp_()
    return p, lse


@torch.library.custom_op("hybrid_flex::sparse_attention_gather", mutates_args=())
def _gather_forward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch_size, num_queries, num_heads, width = q.shape
    num_keys, num_kv_heads, value_width = v.shape[1:]
    group = num_heads // num_kv_heads
    dtype = accumulate_dtype(q)
    o = q.new_zeros(batch_size, num_queries, num_heads, value_width)
    lse = q.new_full((batch_size, num_queries, num_heads), float("-inf"), dtype=dtype)
    if num_keys == 0 or indices.numel() == 0:
        return o, lse
    shared = _is_prefix(v, k)
    indices = indices[..., : min(indices.shape[-1], num_keys)]
    block = _block_size(indices.shape[-1], width + value_width, dtype.itemsize)
    for b in range(batch_size):
        for start in range(0, num_queries, block):
            rows = slice(start, min(start + block, num_queries))
            slots = indices[b, rows]
            for h in range(num_kv_heads):
                heads = slice(h * group, (h + 1) * group)
                keys = gather_rows(k[b, :, h], slots, dtype)
                values = keys[..., :value_width] if shared else gather_rows(v[b, :, h], slots, dtype)
                p, lse[b, rows, heads] = _probabilities(q[b, rows, heads].to(dtype), keys, slots < 0, scale)
                o[b, rows, heads] = torch.bmm(p, values).to(o.dtype)
    return o, lse


@_gather_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[-1])
    return o, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q))


def gather_lse(q: Tensor, k: Tensor, indices: Tensor, scale: float) -> Tensor:
    """Compute the log-sum-exps ``[B, T, H]`` alone, for a form of attention that does not return them."""
    no_values = k[..., :0]
    lse: Tensor = torch.ops.hybrid_flex.sparse_attention_gather(q, k, no_values, indices, scale)[1]
    return lse


@torch.library.custom_op("hybrid_flex::sparse_attention_backward", mutates_args=())
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
    batch_size, num_queries, num_heads, width = q.shape
    num_keys, num_kv_heads, value_width = v.shape[1:]
    group = num_heads // num_kv_heads
    dtype = accumulate_dtype(q)
    dq = q.new_zeros(q.shape)
    dk = k.new_zeros(k.shape, dtype=dtype)
    dv = v.new_zeros(v.shape, dtype=dtype)
    if num_keys == 0 or indices.numel() == 0:
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    shared = _is_prefix(v, k)
    indices = indices[..., : min(indices.shape[-1], num_keys)]
    block = _block_size(indices.shape[-1], 2 * (width + value_width), dtype.itemsize)
    delta = (do.to(dtype) * o.to(dtype)).sum(-1) - dlse.to(dtype)
    lse = lse.to(dtype).masked_fill(lse == float("-inf"), 0.0)
    for b in range(batch_size):
        for start in range(0, num_queries, block):
            rows = slice(start, min(start + block, num_queries))
            slots = indices[b, rows]
            unused = (slots < 0)[:, None]
            target = slots.clamp_min(0).flatten().long()[:, None]
            for h in range(num_kv_heads):
                heads = slice(h * group, (h + 1) * group)
                keys = gather_rows(k[b, :, h], slots, dtype)
                values = keys[..., :value_width] if shared else gather_rows(v[b, :, h], slots, dtype)
                q_b, do_b = q[b, rows, heads].to(dtype), do[b, rows, heads].to(dtype)
                logits = torch.bmm(q_b * scale, keys.transpose(1, 2))
                p = logits.sub_(lse[b, rows, heads, None]).exp_().masked_fill_(unused, 0.0)
                ds = torch.bmm(do_b, values.transpose(1, 2)).sub_(delta[b, rows, heads, None]).mul_(p).mul_(scale)
                dq[b, rows, heads] = torch.bmm(ds, keys).to(dq.dtype)
                for grad, left, right in ((dk, ds, q_b), (dv, p, do_b)):
                    rows_of_grad = torch.bmm(left.transpose(1, 2), right).flatten(0, 1)
                    grad[b, :, h].scatter_add_(0, target.expand_as(rows_of_grad), rows_of_grad)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_backward.register_fake
def _(
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
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def setup_context(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Save what the backward operator needs; shared by the operators that return (o, lse)."""
    q, k, v, indices, scale = inputs
    ctx.save_for_backward(q, k, v, indices, *output)  # type: ignore[attr-defined]
    ctx.scale = scale  # type: ignore[attr-defined]


def backward(ctx: object, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    """Call the backward operator; shared by the operators that return (o, lse)."""
    q, k, v, indices, o, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = torch.ops.hybrid_flex.sparse_attention_backward(
        do, dlse, q, k, v, indices, o, lse, ctx.scale  # type: ignore[attr-defined]
    )
    return *grads, None, None


_gather_forward.register_autograd(backward, setup_context=setup_context)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from every query over the keys its row of ``indices`` names.

    ``o_t = sum_j softmax_j(scale q_t . k_{i_tj}) v_{i_tj}``; ``lse_t = log sum_j exp(scale q_t . k_{i_tj})``.  The indices
    carry everything: causality, packing, position of the queries.

    Args:
        q: ``[B, T, H, D]``; bfloat16, float16, float32 or float64.
        k: ``[B, S, Hkv, D]``, q's dtype, any strides; query head h reads key head ``h // (H // Hkv)``.
        v: ``[B, S, Hkv, Dv]``, q's dtype, any strides; a view of k's first columns (MLA) is fetched only once.
        indices: int32 or int64 ``[B, T, J]``: positions in [0, S), each at most once in a row, -1 in unused slots at the
            END; of more than S columns only the first S are read.
        scale: factor of the logits; default ``D ** -0.5``.
        backend: ``"gather"`` (streams over blocks of queries; workspace independent of T; exact and differentiable),
            ``"flex"`` (FlexAttention over a BlockMask; not float64), ``"reference"`` (dense, for tests), or ``"auto"``,
            which is ``"gather"``.

    Returns:
        ``o [B, T, H, Dv]`` in q's dtype, and ``lse [B, T, H]``, natural logarithm, float32 (float64 for float64 inputs).  A
        row without keys has o = 0 and lse = -inf.  Both are differentiable in q, k and v.

    Raises:
        ValueError: shapes or devices that do not fit, H not a multiple of Hkv, unknown backend.
        TypeError: dtypes that do not fit.

    Device: any; sums run in float32 (float64 for float64 inputs).
    Source: DeepSeek-V3.2 report, equation 2.

    Example:
        >>> q, k, v = torch.ones(2, 3, 4, 8), torch.ones(2, 5, 2, 8), torch.ones(2, 5, 2, 6)
        >>> o, lse = sparse_attention(q, k, v, torch.zeros(2, 3, 1, dtype=torch.int32))
        >>> o.shape, lse.shape
        (torch.Size([2, 3, 4, 6]), torch.Size([2, 3, 4]))
    """
    op = "sparse_attention"
    check_choice(op, "backend", backend, ("auto", "flex", "gather", "reference"))
    check_attention(op, q, k)
    check_shape(op, "v", v, (k.shape[0], k.shape[1], k.shape[2], None), "[B, S, Hkv, Dv]")
    check_dtype(op, "v", v, (q.dtype,))
    check_shape(op, "indices", indices, (q.shape[0], q.shape[1], None), "[B, T, J]")
    check_dtype(op, "indices", indices, INTEGER)
    for name, tensor in (("v", v), ("indices", indices)):
        check_device(op, name, tensor, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        return reference_attention(q, k, v, indices, scale)
    if backend == "flex":
        check_dtype(op, "q", q, (torch.bfloat16, torch.float16, torch.float32))
        return torch.ops.hybrid_flex.sparse_attention_flex(q, k, v, indices, scale)
    return torch.ops.hybrid_flex.sparse_attention_gather(q, k, v, indices, scale)


def check_attention(op: str, q: Tensor, k: Tensor) -> None:
    """Check queries and keys of an attention with grouped heads."""
    check_rank(op, "q", q, "[B, T, H, D]")
    batch_size, _, num_heads, width = q.shape
    check_shape(op, "k", k, (batch_size, None, None, width), "[B, S, Hkv, D]")
    num_kv_heads = k.shape[2]
    check(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        op,
        "q",
        f"have a number of heads H that is a multiple of Hkv = {num_kv_heads}",
        num_heads,
    )
    check_dtype(op, "q", q, FLOATING)
    check_dtype(op, "k", k, (q.dtype,))
    check_device(op, "k", k, q.device)
