"""Short causal depthwise convolution with a tail state: the token mixer in front of q, k and v.

# NOTE [Extended sequence]
Forward, backward and state all work on the extended sequence, every sequence with its W - 1 state rows in front::

    [state of 0 | tokens of 0 | state of 1 | tokens of 1 | ...]        T + N (W - 1) rows

A window of W rows that ends at a token never leaves the token's own segment, and the last W - 1 rows of a segment are
its final state, whether the sequence is long, shorter than W - 1, or empty.  The length is static, so nothing waits for
the device; extending is a permutation of rows, so its gradient is a gather as well and no sum depends on an order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_flex.checks import (
    FLOATING,
    check,
    check_choice,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_rank,
    check_shape,
)
from hybrid_flex.ops.dispatch import has_kernels, in_its_own_precision, plain_form
from hybrid_flex.ops.sums import sum_over_tokens

MIN_TAPS, MAX_TAPS = 2, 8


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Rows(NamedTuple):
    """Where packed tokens and states stand in the extended sequence of E = T + N * tail rows, tail = W - 1."""

    source: Tensor
    """The row of ``cat([tokens, states])`` that each extended row holds, [E]."""
    tokens: Tensor
    """The extended row of each token, [T]."""
    states: Tensor
    """The extended rows of each initial state, [N, tail]."""
    final_states: Tensor
    """The extended rows of each final state, [N, tail]."""


def _extended_rows(cu_seqlens: Tensor, num_tokens: int, tail: int) -> _Rows:
    """Place packed tokens and states in the extended sequence, see NOTE [Extended sequence].

    Boundaries that do not end at T cannot be seen on a GPU without waiting for it.  The clamps matter only then: the
    result is wrong, but no memory outside the tensors is touched.
    """
    boundaries = cu_seqlens.to(torch.int64)
    num_sequences, device = boundaries.shape[0] - 1, boundaries.device
    num_rows = num_tokens + num_sequences * tail
    numbers = torch.arange(num_sequences, device=device)
    starts = boundaries[:-1] + numbers * tail
    # These increase strictly, even past empty sequences.
    ends = boundaries[1:] + (numbers + 1) * tail

    rows = torch.arange(num_rows, device=device)
    sequence = torch.searchsorted(ends, rows, right=True).clamp(max=num_sequences - 1)
    offset = rows - starts[sequence]
    source = torch.where(offset < tail, num_tokens + sequence * tail + offset, rows - (sequence + 1) * tail)
    tokens = torch.arange(num_tokens, device=device)
    of_token = torch.searchsorted(boundaries[1:], tokens, right=True).clamp(max=num_sequences - 1)
    steps = torch.arange(tail, device=device)
    return _Rows(
        source.clamp(0, num_rows - 1),
        tokens + (of_token + 1) * tail,
        (starts[:, None] + steps).clamp(0, num_rows - 1),
        (ends[:, None] - tail + steps).clamp(0, num_rows - 1),
    )


def _extend(x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, tail: int) -> Tensor:
    """Put every sequence's state (or zeros) in front of it: ``[B, T + tail, D]``, packed ``[1, T + N * tail, D]``."""
    if cu_seqlens is None:
        return F.pad(x, (0, 0, tail, 0)) if initial_state is None else torch.cat([initial_state, x], 1)
    num_sequences, width = cu_seqlens.shape[0] - 1, x.shape[2]
    if initial_state is None:
        initial_state = x.new_zeros(num_sequences, tail, width)
    rows = _extended_rows(cu_seqlens, x.shape[1], tail)
    return torch.cat([x[0], initial_state.reshape(num_sequences * tail, width)])[rows.source].unsqueeze(0)


def _convolve(extended: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``bias + sum_i weight[:, i] * extended[:, t + i]`` for the windows that fit: ``[B, E - W + 1, D]``."""
    num_taps = weight.shape[1]
    length = extended.shape[1] - num_taps + 1
    z = extended[:, :length] * weight[:, 0]
    for i in range(1, num_taps):
        z = torch.addcmul(z, extended[:, i : i + length], weight[:, i])
    return z if bias is None else z + bias


@torch.library.triton_op("hybrid_flex::short_conv", mutates_args=())
@plain_form("short_conv")
@in_its_own_precision
def _short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    if has_kernels(x):
        from hybrid_flex.kernels.kda.short_conv import short_conv as launch

        return launch(x, weight, bias, initial_state, cu_seqlens, silu, output_final_state)

    dtype, tail = _accumulator(x), weight.shape[1] - 1
    extended = _extend(x, initial_state, cu_seqlens, tail)
    z = _convolve(extended.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    rows = None if cu_seqlens is None else _extended_rows(cu_seqlens, x.shape[1], tail)
    if rows is not None:
        z = z[:, rows.tokens - tail]
    y = (F.silu(z) if silu else z).to(x.dtype)
    if not output_final_state:
        final_state = x.new_empty(0)
    elif rows is None:
        # A copy, not a view that would keep the extended sequence alive.
        final_state = extended[:, x.shape[1] :].clone(memory_format=torch.contiguous_format)
    else:
        final_state = extended[0][rows.final_states]
    return y, final_state


@torch.library.triton_op("hybrid_flex::short_conv_backward", mutates_args=())
@in_its_own_precision
def _short_conv_backward(
    dy: Tensor,
    d_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if has_kernels(x):
        from hybrid_flex.kernels.kda.short_conv import short_conv_backward as launch

        return launch(dy, d_final_state, x, weight, bias, initial_state, cu_seqlens, silu)

    dtype, num_taps, num_tokens = _accumulator(x), weight.shape[1], x.shape[1]
    tail = num_taps - 1
    extended = _extend(x, initial_state, cu_seqlens, tail).to(dtype)
    taps, dz = weight.to(dtype), dy.to(dtype)
    rows = None if cu_seqlens is None else _extended_rows(cu_seqlens, num_tokens, tail)
    if silu:
        z = _convolve(extended, taps, None if bias is None else bias.to(dtype))
        if rows is not None:
            z = z[:, rows.tokens - tail]
        sigmoid = torch.sigmoid(z)
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    d_bias = x.new_empty(0) if bias is None else sum_over_tokens(dz, (0, 1)).to(bias.dtype)
    if rows is not None:
        # One gradient per window; the windows that end in a state row made no output.
        states = dz.new_zeros(rows.states.numel(), dz.shape[2])
        dz = torch.cat([dz[0], states])[rows.source[tail:]].unsqueeze(0)

    length = dz.shape[1]
    d_weight = torch.stack([sum_over_tokens(dz * extended[:, i : i + length], (0, 1)) for i in range(num_taps)], 1)
    # Row e of the extended sequence is tap i of the window that starts at e - i.
    padded = F.pad(dz, (0, 0, tail, tail))
    d_extended = padded[:, tail:] * taps[:, 0]
    for i in range(1, num_taps):
        d_extended = torch.addcmul(d_extended, padded[:, tail - i : tail - i + length + tail], taps[:, i])

    if rows is None:
        if d_final_state is not None:
            # The final state may hold rows of the initial one (T < W - 1), so this is added before the two part.
            d_extended = d_extended + F.pad(d_final_state.to(dtype), (0, 0, num_tokens, 0))
        dx, d_state = d_extended[:, tail:], d_extended[:, :tail]
    else:
        d_rows = d_extended[0]
        if d_final_state is not None:
            d_rows = d_rows.index_add(0, rows.final_states.flatten(), d_final_state.to(dtype).flatten(0, 1))
        dx, d_state = d_rows[rows.tokens].unsqueeze(0), d_rows[rows.states]
    dx = dx.to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    if initial_state is None:
        d_initial_state = x.new_empty(0)
    else:
        d_initial_state = d_state.to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    return dx, d_weight.to(weight.dtype), d_bias, d_initial_state


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, initial_state, cu_seqlens, silu, output_final_state = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
    ctx.silu, ctx.output_final_state = silu, output_final_state


def _backward(ctx, dy: Tensor, d_final_state: Tensor):  # type: ignore[no-untyped-def]
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dx, d_weight, d_bias, d_initial_state = _short_conv_backward(
        dy, d_final_state if ctx.output_final_state else None, x, weight, bias, initial_state, cu_seqlens, ctx.silu
    )
    d_bias = None if bias is None else d_bias
    d_initial_state = None if initial_state is None else d_initial_state
    return dx, d_weight, d_bias, d_initial_state, None, None, None


_short_conv.register_autograd(_backward, setup_context=_setup_context)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve every channel with its own few causal taps, then apply SiLU.

    .. code-block:: text

        y_t = act(bias + sum_i weight[:, i] * x_{t - W + 1 + i})        i = 0 .. W - 1

    Inputs before the first token come from ``initial_state``, or are zero.  Products are summed in float32 (float64 for
    float64 inputs); no output depends on a later token, bit for bit.

    Args:
        x: tokens [B, T, D]; bfloat16, float16, float32 or float64.
        weight: taps [D, W], oldest first, 2 <= W <= 8; the dtype of ``x`` or float32.
        bias: [D], the dtype of ``x`` or float32; None for none.
        activation: ``"silu"`` or None.
        initial_state: the last W - 1 inputs before the first token [N, W - 1, D], oldest first, in the dtype of ``x``;
            N is B, or the number of packed sequences. None for zeros.
        output_final_state: return the last W - 1 inputs, from which a later call continues.
        cu_seqlens: boundaries of packed sequences [N + 1], int32 or int64, from 0 to T, never decreasing, B = 1. An
            empty sequence passes its state through. Values are checked on CPU tensors outside compiled graphs;
            elsewhere wrong boundaries give an undefined result.

    Returns:
        ``(y, final_state)``: y [B, T, D] and final_state [N, W - 1, D] (or None) in the dtype of ``x``.
        Gradients reach x, weight, bias and initial_state, from both results.

    Raises:
        ValueError: a shape, a device, the number of taps, the activation or the boundaries are wrong.
        TypeError: a dtype is wrong.

    Device:
        CPU, in plain torch that the compiler fuses; CUDA, in kernels that read and write each row once (float64: the
        plain form). Each gives the same bits for the same input.

    Source:
        Kimi Linear (arXiv:2510.26692), section 4, "ShortConv"; the form is that of Mamba (arXiv:2312.00752).

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 5, 8), torch.randn(8, 4)
        >>> y, state = short_conv(x, weight, output_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 3, 8]))
        >>> y, state = short_conv(x[:1], weight, output_final_state=True, cu_seqlens=torch.tensor([0, 2, 2, 5]))
        >>> y.shape, state.shape
        (torch.Size([1, 5, 8]), torch.Size([3, 3, 8]))
    """
    op = "short_conv"
    check_rank(op, "x", x, "[B, T, D]")
    check_dtype(op, "x", x, FLOATING)
    batch_size, num_tokens, width = x.shape
    check_shape(op, "weight", weight, (width, None), "[D, W]")
    num_taps = weight.shape[1]
    check(MIN_TAPS <= num_taps <= MAX_TAPS, op, "weight", f"have {MIN_TAPS} to {MAX_TAPS} taps", num_taps)
    check_choice(op, "activation", activation, ("silu", None))
    parameter_dtypes = tuple(dict.fromkeys((x.dtype, torch.float32)))
    check_dtype(op, "weight", weight, parameter_dtypes)
    check_device(op, "weight", weight, x.device)
    if bias is not None:
        check_shape(op, "bias", bias, (width,), "[D]")
        check_dtype(op, "bias", bias, parameter_dtypes)
        check_device(op, "bias", bias, x.device)
    num_sequences = batch_size
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, batch_size, num_tokens)
        check_device(op, "cu_seqlens", cu_seqlens, x.device)
        num_sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        shape = (num_sequences, num_taps - 1, width)
        check_shape(op, "initial_state", initial_state, shape, "[N, W - 1, D]")
        check_dtype(op, "initial_state", initial_state, (x.dtype,))
        check_device(op, "initial_state", initial_state, x.device)
    y, final_state = _short_conv(x, weight, bias, initial_state, cu_seqlens, activation == "silu", output_final_state)
    return y, final_state if output_final_state else None
