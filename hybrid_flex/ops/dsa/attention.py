"""Attention over a selection: every query attends the keys its row of ``indices`` names, and no others.

    s_tj = scale q_t . k_{i_tj}        p_t = softmax_j(s_t)        lse_t = log sum_j exp s_tj
    o_t  = sum_j p_tj v_{i_tj}

and backward, with delta_t = do_t . o_t - dlse_t:

    ds_tj = p_tj (do_t . v_{i_tj} - delta_t)        dq_t = scale sum_j ds_tj k_{i_tj}
    dk_s  = scale sum_{t, j: i_tj = s} ds_tj q_t    dv_s = sum_{t, j: i_tj = s} p_tj do_t

The gather form fetches the selected rows of k and v and forgets them: its workspace does not grow with T or S.  On CUDA
it is Triton kernels (kernels/dsa/gather.py); on a CPU and in float64 it walks over blocks of queries.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from hybrid_flex.ops.dispatch import has_kernels, in_its_own_precision
from hybrid_flex.ops.dsa.indexer import accumulate_dtype
from hybrid_flex.ops.dsa.reference import reference_attention

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
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
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
def _fake_backward(
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
    """Compute the gradient of an operator that returns (o, lse) in the plain form."""
    q, k, v, indices, o, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    arguments = (do, dlse, q, k, v, indices, o, lse, ctx.scale)  # type: ignore[attr-defined]
    return *torch.ops.hybrid_flex.sparse_attention_backward(*arguments), None, None


_gather_forward.register_autograd(backward, setup_context=setup_context)


def _check_kernels(op: str, q: Tensor) -> None:
    if not has_kernels(q):
        raise RuntimeError(f"{op}: q must be on CUDA and not float64, got {q.device}, {q.dtype}")


def _values(k: Tensor, v: Tensor, value_dim: int) -> Tensor:
    """Return v, or the first columns of k that stand for it."""
    return k[..., :value_dim] if value_dim > 0 else v


@torch.library.triton_op("hybrid_flex::sparse_attention_cuda", mutates_args=())
@in_its_own_precision
def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, value_dim: int
) -> tuple[Tensor, Tensor]:
    from hybrid_flex.kernels.dsa.gather import launch_gather

    _check_kernels("sparse_attention_cuda", q)
    o, lse = _fake_cuda_forward(q, k, v, indices, scale, value_dim)
    launch_gather(q, k, _values(k, v, value_dim), indices, scale, o=o, lse=lse)
    return o, lse


# Not a triton_op: how many launches there are depends on the number of tokens, which a graph of any T leaves open.
@torch.library.custom_op("hybrid_flex::sparse_attention_cuda_backward", mutates_args=())
@in_its_own_precision
def _cuda_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    value_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from hybrid_flex.kernels.dsa.gather_backward import launch_gather_backward

    _check_kernels("sparse_attention_cuda_backward", q)
    arguments = (do, dlse, q, k, _values(k, v, value_dim), indices, o, lse, scale)
    if torch.are_deterministic_algorithms_enabled():
        # The kernels add to rows in whatever order they come; the sums of the plain form keep theirs.
        dq, dk, dv = torch.ops.hybrid_flex.sparse_attention_backward(*arguments)
        if value_dim > 0:
            dk[..., :value_dim] += dv
            dv = v.new_empty(v.shape)
        return dq, dk, dv
    dq = q.new_empty(q.shape)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    launch_gather_backward(*arguments, dq=dq, dk=dk, dv=dv if value_dim == 0 else None)
    # In float32 these are the sums themselves, which nobody else holds.
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_cuda_forward.register_fake
def _fake_cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, value_dim: int
) -> tuple[Tensor, Tensor]:
    return _fake_forward(q, k, _values(k, v, value_dim), indices, scale)


@_cuda_backward.register_fake
def _fake_cuda_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    value_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_backward(do, dlse, q, k, v, indices, o, lse, scale)


def _save_for_cuda(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *shared, value_dim = inputs
    setup_context(ctx, tuple(shared), output)
    ctx.value_dim = value_dim  # type: ignore[attr-defined]


def _gradient_on_cuda(ctx: object, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, indices, o, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    options = (ctx.scale, ctx.value_dim)  # type: ignore[attr-defined]
    dq, dk, dv = torch.ops.hybrid_flex.sparse_attention_cuda_backward(do, dlse, q, k, v, indices, o, lse, *options)
    return dq, dk, dv, None, None, None


_cuda_forward.register_autograd(_gradient_on_cuda, setup_context=_save_for_cuda)


# Not a triton_op: torch cannot carry a Gluon kernel in a graph.
@torch.library.custom_op("hybrid_flex::sparse_attention_hopper", mutates_args=())
@in_its_own_precision
def _hopper_forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, value_dim: int
) -> tuple[Tensor, Tensor]:
    """Do what sparse_attention_cuda does, for the latent rows that `_in_hopper_kernel` names."""
    from hybrid_flex.kernels.dsa.gather_hopper import launch_gather_hopper

    _check_kernels("sparse_attention_hopper", q)
    o, lse = _fake_cuda_forward(q, k, v, indices, scale, value_dim)
    launch_gather_hopper(q, k, indices, scale, o=o, lse=lse)
    return o, lse


_hopper_forward.register_fake(_fake_cuda_forward)
_hopper_forward.register_autograd(_gradient_on_cuda, setup_context=_save_for_cuda)


def is_in_kernels(q: Tensor, v: Tensor) -> bool:
    """Tell whether the kernels serve these tensors."""
    if not has_kernels(q):
        return False
    from hybrid_flex.kernels.dsa.gather import is_served

    return is_served(int(q.shape[-1]), int(v.shape[-1]))


def _in_hopper_kernel(q: Tensor, k: Tensor, value_dim: int) -> bool:
    """Tell whether the kernel for latent rows on Hopper serves these tensors, here and now.

    A program that is exported takes the form that it can carry.  Gluon is an experiment of Triton's: a version without
    what the kernel needs does without the kernel.
    """
    if value_dim == 0 or torch.compiler.is_exporting():
        return False
    try:
        from hybrid_flex.kernels.dsa.gather_hopper import is_served
    except (ImportError, AttributeError):
        return False
    return is_served(q, k, value_dim)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    indices: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from every query over the keys its row of ``indices`` names.

    ``o_t = sum_j softmax_j(scale q_t . k_{i_tj}) v_{i_tj}``; ``lse_t = log sum_j exp(scale q_t . k_{i_tj})``.  The
    indices carry everything: causality, packing, position of the queries.

    Args:
        q: ``[B, T, H, D]``; bfloat16, float16, float32 or float64.
        k: ``[B, S, Hkv, D]``, q's dtype, any strides; query head h reads key head ``h // (H // Hkv)``.
        v: ``[B, S, Hkv, Dv]``, q's dtype, any strides; or None where the values are the first ``value_dim`` columns of
            the keys, the latent of MLA: rows are then fetched once, and k's gradient is that of both.  On CUDA this
            is the faster form, and for 33 heads or more of 512 or 576 columns on compute capability 9.0 one with a
            kernel of its own.
        indices: int32 or int64 ``[B, T, J]``: positions in [0, S), each at most once in a row, -1 in unused slots at
            the END (unused slots between used ones cost time on CUDA); of more than S columns the first S are read.
        scale: factor of the logits; default ``D ** -0.5``.
        backend: ``"gather"`` (exact and differentiable, workspace independent of T; on CUDA Triton kernels, in every
            dtype but float64, for D up to 768 and Dv up to 512; else it streams over blocks of queries), ``"flex"``
            (FlexAttention over a BlockMask: of blocks of queries, or, where T * Hkv is at most 128, of single tokens;
            not float64; gradients are those of ``"gather"``), ``"reference"`` (dense, for tests), or ``"auto"``, which
            is ``"gather"``.
        value_dim: Dv, in [1, D], where v is None.

    Returns:
        ``o [B, T, H, Dv]`` in q's dtype, and ``lse [B, T, H]``, natural logarithm, float32 (float64 for float64
        inputs).  A row without keys has o = 0 and lse = -inf.  Both are differentiable in q, k and v.

    Raises:
        ValueError: shapes or devices that do not fit, H not a multiple of Hkv, unknown backend.
        TypeError: dtypes that do not fit.

    Device: any; sums run in float32 (float64 for float64 inputs).  On CUDA the gradients of k and v are added up by
    atomics, in an order that changes from run to run; with ``torch.use_deterministic_algorithms(True)`` the backward
    takes the slower form whose bits repeat.
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
    check_shape(op, "indices", indices, (q.shape[0], q.shape[1], None), "[B, T, J]")
    check_dtype(op, "indices", indices, INTEGER)
    check_device(op, "indices", indices, q.device)
    if v is None:
        rule = f"be in [1, {k.shape[3]}] where v is None"
        check(value_dim is not None and 1 <= value_dim <= k.shape[3], op, "value_dim", rule, value_dim)
        values = k[..., :value_dim]
    else:
        check(value_dim is None, op, "value_dim", "be None where v is given", value_dim)
        check_shape(op, "v", v, (k.shape[0], k.shape[1], k.shape[2], None), "[B, S, Hkv, Dv]")
        check_dtype(op, "v", v, (q.dtype,))
        check_device(op, "v", v, q.device)
        values = v
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        return reference_attention(q, k, values, indices, scale)
    if backend == "flex":
        check_dtype(op, "q", q, (torch.bfloat16, torch.float16, torch.float32))
        return torch.ops.hybrid_flex.sparse_attention_flex(q, k, values, indices, scale)
    if not is_in_kernels(q, values):
        return torch.ops.hybrid_flex.sparse_attention_gather(q, k, values, indices, scale)
    arguments = (q, k, k.new_empty(0) if v is None else v, indices, scale, value_dim or 0)
    if _in_hopper_kernel(q, k, value_dim or 0):
        return torch.ops.hybrid_flex.sparse_attention_hopper(*arguments)
    return torch.ops.hybrid_flex.sparse_attention_cuda(*arguments)


def check_attention(op: str, q: Tensor, k: Tensor) -> None:
    """Check queries and keys of an attention with grouped heads."""
    check_rank(op, "q", q, "[B, T, H, D]")
    batch_size, _, num_heads, width = q.shape
    check_shape(op, "k", k, (batch_size, None, None, width), "[B, S, Hkv, D]")
    num_kv_heads = k.shape[2]
    check(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        op,
        "q and k",
        "have H a multiple of Hkv",
        (num_heads, num_kv_heads),
    )
    check_dtype(op, "q", q, FLOATING)
    check_dtype(op, "k", k, (q.dtype,))
    check_device(op, "k", k, q.device)
