"""Attention over a selection: every query attends the keys its row of ``indices`` names, and no others.

    o_t = sum_j softmax_j(scale q_t . k_{i_tj}) v_{i_tj}        lse_t = log sum_j exp(scale q_t . k_{i_tj})

The gather form fetches the selected rows of k and v and forgets them: its workspace does not grow with T or S.  On CUDA
it is Triton kernels (kernels/dsa/gather.py), elsewhere and in float64 plain torch (gather.py).  The masked form
(masked.py), on CUDA only, multiplies a tile of queries with all keys that any of them has selected, and leaves tiles
that share too little to the gather form; flex.py holds the form that goes through FlexAttention.

# NOTE [Masked or gathered]
A gathered row serves the heads of one query on its key head only.  Where these are few, fetching bounds the gather
form: 63 ps for a token, key and key head of 128 columns, 290 ps backward.  The masked form fetches a row for 128
queries and heads, and takes 195 ps and 570 ps for a key of a tile's union, tile and key head, 131 and 365 in its
kernels for Hopper.  With G heads on a key head a tile has 128 / G queries, so that masking is faster up to unions of
FORWARD / (G + 1/2) times as many keys as a query selects, TRAINING / (G + 1/2) times backward, and *_ON_HOPPER (all in
masked.py).  Each tile decides for itself; where whole sequences are shorter than that, nothing is left to decide.
Measured on an H200, bfloat16, 2048 keys, 32 heads of 128 on 8, milliseconds gathered and as it chooses, of dense causal
attention at the end (profiles/results/dsa_nvidia-h200_20261130.md, rows forms_*).  Agreement is the correlation of the
scores that neighbours give a key:

    agreement                     none                0.9                dense
    T                      32768   65536 *     32768   131072       32768   131072
    forward                 35 17   69 62       35 6    149 34         13      243
    forward and backward  194  65  436 316     194 20  788 123         53      928
                            * timed while the kernels were chosen, before those for Hopper
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
    is_exporting,
)
from hybrid_flex.ops.dispatch import has_kernels, in_its_own_precision, longest
from hybrid_flex.ops.dsa.gather import fake_backward, fake_forward, setup_context
from hybrid_flex.ops.dsa.reference import reference_attention

# NOTE [Masked or gathered]: most heads on a key head that gain (32 on 2 take 7.4 and not 8.7 ms forward at T 32768
# where neighbours agree by 0.9, 9.2 and not 8.9 where they do not); fewest queries, and rows that they would gather
# (half a millisecond), below which five launches cost more (8192 queries, 12 heads and 256 keys of 64 columns 0.9
# instead of 1.3 ms, 2048, 2 and 64 0.4 instead of 0.2); most bytes of a batch entry's unions.
MOST_GROUPED = 16
FEWEST_QUERIES = 2048
FEWEST_ROWS = 2**23
UNION_BYTES = 512 * 2**20


def check_kernels(op: str, q: Tensor) -> None:
    """Raise RuntimeError unless there are kernels for q's device and dtype."""
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

    check_kernels("sparse_attention_cuda", q)
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

    check_kernels("sparse_attention_cuda_backward", q)
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
    return fake_forward(q, k, _values(k, v, value_dim), indices, scale)


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
    return fake_backward(do, dlse, q, k, v, indices, o, lse, scale)


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

    check_kernels("sparse_attention_hopper", q)
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
    if value_dim == 0 or is_exporting():
        return False
    try:
        from hybrid_flex.kernels.dsa.gather_hopper import is_served
    except (ImportError, AttributeError):
        return False
    return is_served(q, k, value_dim)


def _is_in_masked_kernels(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether the masked form serves these tensors."""
    if not has_kernels(q):
        return False
    from hybrid_flex.kernels.dsa.masked import is_served

    return is_served(q.shape[2] // k.shape[2], int(q.shape[3]), int(v.shape[3]), q.element_size())


def _in_masked_hopper_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether the masked form's kernel for Hopper serves these tensors, here and now: `_in_hopper_kernel`."""
    if is_exporting():
        return False
    try:
        from hybrid_flex.kernels.dsa.masked_hopper import is_served
    except (ImportError, AttributeError):
        return False
    return is_served(q, k, v)


def _is_masked_faster(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> bool:
    """Tell whether the masked form is the faster one: NOTE [Masked or gathered].

    An exported program has one graph for all lengths, and takes the form that is faster for the longest.
    """
    group, T, S = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    if group > MOST_GROUPED or not _is_in_masked_kernels(q, k, v):
        return False
    if is_exporting():
        T, S = longest(T), longest(S)
    from hybrid_flex.kernels.dsa.masked import queries_of_tile

    most = 4 * UNION_BYTES * queries_of_tile(group)
    rows = T * k.shape[2] * indices.shape[2]
    return bool(T >= FEWEST_QUERIES and rows >= FEWEST_ROWS and most >= T * S)


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
            dtype but float64, for D up to 768 and Dv up to 512; else it streams over blocks of queries), ``"masked"``
            (consecutive queries are multiplied with all keys that any of them has selected, under a mask, or gather
            where these are too many; CUDA only, 16 bits only, D and Dv up to 128, up to 128 heads on a key head; keys
            and values that a neighbour selects must be finite), ``"flex"`` (FlexAttention over a BlockMask: of blocks
            of queries, or of single tokens where they are few; not float64; gradients are those of ``"gather"``),
            ``"reference"`` (dense, for tests), or ``"auto"``: ``"gather"``, but ``"masked"`` where that was measured
            to be faster, which is with up to 16 heads on a key head and thousands of queries (in an exported program:
            where the longest sequences have so many).
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
    check_choice(op, "backend", backend, ("auto", "flex", "gather", "masked", "reference"))
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
    if backend == "masked" and not _is_in_masked_kernels(q, k, values):
        rule = 'be on CUDA, of 16 bits, with D and Dv up to 128 and H / Hkv up to 128 for backend="masked"'
        check(False, op, "q", rule, f"{q.device}, {q.dtype}, {tuple(q.shape)}, {tuple(values.shape)}")
    if backend == "masked" or (backend == "auto" and _is_masked_faster(q, k, values, indices)):
        if _in_masked_hopper_kernel(q, k, values):
            return torch.ops.hybrid_flex.sparse_attention_masked_hopper(q, k, values, indices, scale)
        return torch.ops.hybrid_flex.sparse_attention_masked(q, k, values, indices, scale)
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
