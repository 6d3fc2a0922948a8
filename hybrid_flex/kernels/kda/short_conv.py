"""Short causal depthwise convolution with SiLU, forward and backward, in one pass over the tokens each.

    z_t  = bias + sum_i w_i x_{t-W+1+i}          y_t = silu(z_t)          i = 0 .. W - 1, a tap per channel
    dz_t = dy_t silu'(z_t)                       dx_s = sum_i w_i dz_{s+W-1-i}
    dw_i = sum_t dz_t x_{t-W+1+i}                d_bias = sum_t dz_t

A program owns a block of channels and walks down its tokens with the last W - 1 rows in registers, so a row is read
once and a row of z is made once.  Rows are loaded BU at a time before the first of them is used: nothing may be loaded
before an earlier store otherwise, because the two could alias, and the bytes in flight are what the speed depends on.

# NOTE [Extended row]
Row e of a sequence with its state in front: row e of the state below W - 1, token e - (W - 1) from there on.  The
window of a token that stands at ``place`` in its sequence is the rows place .. place + W - 1, and the final state is
the rows length .. length + W - 2, however short the sequence is.

# NOTE [Channel blocks]
Two warps stand side by side.  In the forward pass a thread holds the channels of 16 bytes: at most 130 registers for
four taps (compiled for sm_90).  The backward pass holds 4 W numbers a channel (taps, window, dz and sums): for four
taps in bfloat16, 96 to 128 registers with four channels a thread (8 bytes), 224 to 255 with eight.  Four therefore put
twice as many warps on a multiprocessor, with more bytes in flight; and eight taps do not spill.
"""

# Triton's language has no `(*rows, row)`.
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_flex.kernels.launch import computed_once, launchable, next_power_of_2, on_its_device
from hybrid_flex.kernels.masks import mask_if

NUM_WARPS = 2
# Tokens of a program: the more, the fewer rows are read by two programs (W - 1 in each) and the fewer partial sums of
# parameter gradients are written (W + 1 float32 rows in each); the fewer, the more programs share the chip.
FORWARD_TOKENS, BACKWARD_TOKENS = 64, 128
# The most channels of a thread, see NOTE [Channel blocks].
FORWARD_CHANNELS, BACKWARD_CHANNELS = 8, 4
PLACES_TOKENS = 256


@triton.jit
def _places_kernel(p_bounds, p_places, T, N, BT: tl.constexpr):
    """Write for each packed token its sequence, the tokens before it there, and those left there with it: [3, T]."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = t < T
    low = tl.zeros([BT], tl.int32)
    high = low + tl.cast(N, tl.int32)  # of a graph that leaves sizes open an int64
    # Bisection for the number of sequences that end at or before t; 31 halvings empty any range of int32.
    for _ in range(31):
        middle = (low + high) // 2
        m_open = low < high
        ends_before = tl.load(p_bounds + 1 + middle, mask=m_t & m_open, other=0).to(tl.int32) <= t
        high = tl.where(m_open & (ends_before == 0), middle, high)
        low = tl.where(m_open & ends_before, middle + 1, low)
    # The clamps matter only when the boundaries are wrong: then no memory outside the tensors is touched.
    sequence = tl.minimum(low, N - 1)
    start = tl.load(p_bounds + sequence, mask=m_t, other=0).to(tl.int32)
    end = tl.load(p_bounds + sequence + 1, mask=m_t, other=0).to(tl.int32)
    tl.store(p_places + t, sequence, mask=m_t)
    tl.store(p_places + T + t, t - tl.minimum(tl.maximum(start, 0), t), mask=m_t)
    tl.store(p_places + 2 * T + t, tl.minimum(tl.maximum(end, t + 1), T) - t, mask=m_t)


@triton.jit
def _bounds(p_bounds, n, T, PACKED: tl.constexpr):
    """Return the first token of sequence n and the one after its last."""
    start, end = n * 0, n * 0 + T
    if PACKED:
        end = tl.minimum(tl.maximum(tl.load(p_bounds + n + 1).to(tl.int32), 0), T)
        start = tl.minimum(tl.maximum(tl.load(p_bounds + n).to(tl.int32), 0), end)
    return start, end


@triton.jit
def _parameters(
    p_weight, p_bias, d, m_d, W: tl.constexpr, WP: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Load [D, W] as W float32 rows, each channel's taps at once and then apart, and the bias or zeros."""
    i = tl.arange(0, WP)
    tile = tl.load(p_weight + d[:, None] * W + i[None, :], mask=m_d[:, None] & (i < W)[None, :], other=0.0)
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.sum(tl.where((i == j)[None, :], tile.to(tl.float32), 0.0), 1),)
    bias = tl.zeros([BD], tl.float32)
    if HAS_BIAS:
        bias = tl.load(p_bias + d, mask=m_d, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit
def _extended_row(p_x, p_state, start, e, D, d, m_d, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """Load row e of the sequence that starts at token ``start``, see NOTE [Extended row]."""
    row = tl.load(p_x + (start + e - (W - 1)).to(tl.int64) * D + d, mask=mask_if(m_d, e >= W - 1), other=0.0)
    if HAS_STATE:
        row = tl.where(e >= W - 1, row, tl.load(p_state + e * D + d, mask=mask_if(m_d, e < W - 1), other=0.0))
    return row


@triton.jit
def _window(p_x, p_state, start, e, D, d, m_d, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """Load the W - 1 extended rows from e on, in float32."""
    window = ()
    for k in tl.static_range(W - 1):
        row = _extended_row(p_x, p_state, start, e + k, D, d, m_d, W, HAS_STATE)
        window = window + (row.to(tl.float32),)
    return window


@triton.jit
def _first_window(
    p_x, p_state, p_places, i_b, t, T, D, d, m_d, W: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Load the rows before token t, wherever t stands in its sequence."""
    n, place = i_b, t
    if PACKED:
        n = tl.load(p_places + t, mask=t < T, other=0)
        place = tl.load(p_places + T + t, mask=t < T, other=0)
    return _window(p_x, p_state + n.to(tl.int64) * (W - 1) * D, t - place, place, D, d, m_d, W, HAS_STATE)


@triton.jit
def _start_sequence(window, p_x, p_state, p_places, t, T, D, d, m_d, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """Put the state (or zeros) into the window where token t is the first of a packed sequence."""
    if tl.load(p_places + T + t, mask=t < T, other=1) == 0:
        n = tl.load(p_places + t)
        window = _window(p_x, p_state + n.to(tl.int64) * (W - 1) * D, t, 0, D, d, m_d, W, HAS_STATE)
    return window


@triton.jit
def _convolve(window, taps, bias, W: tl.constexpr):
    """Compute z of the newest of W rows."""
    z = bias
    for i in tl.static_range(W):
        z += window[i] * taps[i]
    return z


@triton.jit
def _slope(z, dy, SILU: tl.constexpr):
    """Compute dz."""
    dz = dy.to(tl.float32)
    if SILU:
        sigmoid = 1 / (1 + tl.exp(-z))
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    return dz


@triton.jit
def _forward_kernel(
    p_x, p_weight, p_bias, p_state, p_bounds, p_places, p_y, p_final, T, D,
    W: tl.constexpr, WP: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    num_blocks, num_tiles = tl.cdiv(D, BD), tl.maximum(tl.cdiv(T, BT), 1)
    # Channels are fastest, so that the rows two tiles share are read close in time, the second time from the cache.
    i_d, i_t = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    i_b = i_t * 0
    if not PACKED:
        i_b, i_t = i_t // num_tiles, i_t % num_tiles
    d = i_d * BD + tl.arange(0, BD)
    m_d = d < D
    p_x += i_b.to(tl.int64) * T * D
    p_y += i_b.to(tl.int64) * T * D
    # Packed, the programs past the last tile have no token; they write final states, one sequence each.
    first = i_t * BT
    taps, bias = _parameters(p_weight, p_bias, d, m_d, W, WP, BD, HAS_BIAS)
    window = _first_window(p_x, p_state, p_places, i_b, first, T, D, d, m_d, W, HAS_STATE, PACKED)
    for i_s in range(tl.cdiv(tl.minimum(T - first, BT), BU)):
        t = first + i_s * BU
        offsets = t.to(tl.int64) * D + d
        rows = ()
        for u in tl.static_range(BU):
            rows = rows + (tl.load(p_x + offsets + u * D, mask=mask_if(m_d, t + u < T), other=0.0),)
        for u in tl.static_range(BU):
            if PACKED:
                window = _start_sequence(window, p_x, p_state, p_places, t + u, T, D, d, m_d, W, HAS_STATE)
            window = window + (rows[u].to(tl.float32),)
            z = _convolve(window, taps, bias, W)
            if SILU:
                z = z / (1 + tl.exp(-z))
            tl.store(p_y + offsets + u * D, z.to(p_y.dtype.element_ty), mask=mask_if(m_d, t + u < T))
            window = window[1:]

    if HAS_FINAL:
        i_n = i_b
        is_last = i_t == num_tiles - 1
        if PACKED:
            i_n = i_t - num_tiles
            is_last = i_n >= 0
        if is_last:
            start, end = _bounds(p_bounds, i_n, T, PACKED)
            offset = i_n.to(tl.int64) * (W - 1) * D
            for k in tl.static_range(W - 1):
                row = _extended_row(p_x, p_state + offset, start, end - start + k, D, d, m_d, W, HAS_STATE)
                tl.store(p_final + offset + k * D + d, row, mask=m_d)


@triton.jit
def _backward_kernel(
    p_dy, p_d_final, p_x, p_weight, p_bias, p_state, p_places, p_dx, p_partial, T, D,
    W: tl.constexpr, WP: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_D_FINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    num_blocks, num_tiles = tl.cdiv(D, BD), tl.maximum(tl.cdiv(T, BT), 1)
    i_d, i_p = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    i_b, first = i_p // num_tiles, (i_p % num_tiles) * BT
    d = i_d * BD + tl.arange(0, BD)
    m_d = d < D
    p_x += i_b.to(tl.int64) * T * D
    p_dy += i_b.to(tl.int64) * T * D
    p_dx += i_b.to(tl.int64) * T * D
    taps, bias = _parameters(p_weight, p_bias, d, m_d, W, WP, BD, HAS_BIAS)
    window = _first_window(p_x, p_state, p_places, i_b, first, T, D, d, m_d, W, HAS_STATE, PACKED)
    slopes, sums = (), ()
    for _ in tl.static_range(W - 1):
        slopes = slopes + (tl.zeros([BD], tl.float32),)
    for _ in tl.static_range(W + HAS_BIAS):
        sums = sums + (tl.zeros([BD], tl.float32),)
    # dz of the W - 1 tokens after the tile reaches dx inside it; their part of the sums is the next program's.
    for i_s in range(tl.cdiv(tl.minimum(T - first, BT) + W - 1, BU)):
        t = first + i_s * BU
        offsets = t.to(tl.int64) * D + d
        rows, gradients = (), ()
        for u in tl.static_range(BU):
            m_u = mask_if(m_d, t + u < T)
            rows = rows + (tl.load(p_x + offsets + u * D, mask=m_u, other=0.0),)
            gradients = gradients + (tl.load(p_dy + offsets + u * D, mask=m_u, other=0.0),)
        for u in tl.static_range(BU):
            if PACKED:
                window = _start_sequence(window, p_x, p_state, p_places, t + u, T, D, d, m_d, W, HAS_STATE)
            window = window + (rows[u].to(tl.float32),)
            slope = _slope(_convolve(window, taps, bias, W), gradients[u], SILU)
            slopes = slopes + (slope,)
            own, added = tl.where(t + u < first + BT, slope, 0.0), ()
            for i in tl.static_range(W):
                added = added + (sums[i] + own * window[i],)
            if HAS_BIAS:
                added = added + (sums[W] + own,)
            sums = added

            s = t + u - (W - 1)
            m_s = (s >= first) & (s < T)
            left = T - s
            if PACKED:
                left = tl.load(p_places + 2 * T + s, mask=m_s, other=W)
            dx = tl.zeros([BD], tl.float32)
            for j in tl.static_range(W):
                slope = slopes[j]
                # Past T every dz is zero; what has to be kept out is the next packed sequence.
                if PACKED and j > 0:
                    slope = tl.where(j < left, slope, 0.0)
                dx += taps[W - 1 - j] * slope
            if HAS_D_FINAL:  # noqa: SIM102  (the outer condition is known when the kernel is compiled)
                # The last W - 1 tokens of a sequence are rows of its final state too.
                if m_s & (left < W):
                    n = i_b
                    if PACKED:
                        n = tl.load(p_places + s)
                    k = n.to(tl.int64) * (W - 1) + (W - 1 - left)
                    dx += tl.load(p_d_final + k * D + d, mask=m_d, other=0.0).to(tl.float32)
            tl.store(p_dx + offsets + (u - (W - 1)) * D, dx.to(p_dx.dtype.element_ty), mask=mask_if(m_d, m_s))
            window, slopes = window[1:], slopes[1:]
    m_last = mask_if(m_d, tl.program_id(0) + num_blocks >= tl.num_programs(0))
    for i in tl.static_range(W + HAS_BIAS):
        p_sum = p_partial + (i_p.to(tl.int64) * (W + HAS_BIAS) + i) * D + d
        tl.store(p_sum, sums[i], mask=m_d)
        tl.store(p_sum + (W + HAS_BIAS) * D, tl.zeros([BD], tl.float32), mask=m_last)


@triton.jit
def _state_backward_kernel(
    p_dy, p_d_final, p_x, p_weight, p_bias, p_state, p_bounds, p_d_state, T, D,
    W: tl.constexpr, WP: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_D_FINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """d_state_m = sum_{p <= m} w_{m-p} dz_{start+p}, and the final state's gradient where the two share a row."""
    num_blocks = tl.cdiv(D, BD)
    i_d, i_n = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    d = i_d * BD + tl.arange(0, BD)
    m_d = d < D
    offset = i_n.to(tl.int64) * (W - 1) * D
    if not PACKED:
        p_x += i_n.to(tl.int64) * T * D
        p_dy += i_n.to(tl.int64) * T * D
    taps, bias = _parameters(p_weight, p_bias, d, m_d, W, WP, BD, HAS_BIAS)
    start, end = _bounds(p_bounds, i_n, T, PACKED)
    window = _window(p_x, p_state + offset, start, 0, D, d, m_d, W, True)
    slopes = ()
    for m in tl.static_range(W - 1):
        m_m = mask_if(m_d, start + m < end)
        offsets = (start + m).to(tl.int64) * D + d
        window = window + (tl.load(p_x + offsets, mask=m_m, other=0.0).to(tl.float32),)
        gradient = tl.load(p_dy + offsets, mask=m_m, other=0.0)
        slopes = slopes + (_slope(_convolve(window, taps, bias, W), gradient, SILU),)
        window = window[1:]
        d_row = tl.zeros([BD], tl.float32)
        for p in tl.static_range(m + 1):
            d_row += taps[m - p] * slopes[p]
        if HAS_D_FINAL:
            k = start + m - end
            row = tl.load(p_d_final + offset + k * D + d, mask=mask_if(m_d, k >= 0), other=0.0)
            d_row += row.to(tl.float32)
        tl.store(p_d_state + offset + m * D + d, d_row.to(p_d_state.dtype.element_ty), mask=m_d)


def _cdiv(number, divisor: int):
    return (number + divisor - 1) // divisor


def _is(number, value: int) -> bool:
    # A symbolic size is neither 0 nor 1; asking it would bind the traced program to the answer.
    return isinstance(number, int) and number == value


def _num_tiles(num_tokens, size: int):
    return 1 if _is(num_tokens, 0) else _cdiv(num_tokens, size)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _places(cu_seqlens: Tensor, num_tokens) -> Tensor:
    places = cu_seqlens.new_empty(3, num_tokens, dtype=torch.int32)
    grid = (_cdiv(num_tokens, PLACES_TOKENS),)
    launchable(_places_kernel)[grid](cu_seqlens, places, num_tokens, cu_seqlens.shape[0] - 1, BT=PLACES_TOKENS)
    return places


def _constants(x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool, silu: bool, channels: int) -> dict:
    num_taps = int(weight.shape[1])
    # See NOTE [Channel blocks].
    width = 32 * NUM_WARPS * min(16 // x.element_size(), channels)
    return {
        "W": num_taps, "WP": next_power_of_2(num_taps), "BD": width, "SILU": silu, "HAS_BIAS": bias is not None,
        "PACKED": packed, "num_warps": NUM_WARPS,
    }  # fmt: skip


@on_its_device
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """Compute y [B, T, D] and the final state [N, W - 1, D], or an empty tensor in its place."""
    x = computed_once(x.contiguous())
    weight, bias, initial_state, cu_seqlens = _contiguous(weight, bias, initial_state, cu_seqlens)
    (batch_size, num_tokens, width), packed = x.shape, cu_seqlens is not None
    constants = _constants(x, weight, bias, packed, silu, FORWARD_CHANNELS)
    num_sequences = cu_seqlens.shape[0] - 1 if packed else batch_size
    # A decoding step has one row; only then is the number of tokens looked at.
    one = _is(num_tokens, 1)
    size, rows = (1, 1) if one else (FORWARD_TOKENS, 8 if constants["W"] <= 4 else 4)
    num_programs = batch_size * _num_tiles(num_tokens, size)
    y = x.new_empty(x.shape)
    final_state = x.new_empty(0)
    if output_final_state:
        final_state = x.new_empty(num_sequences, constants["W"] - 1, width)
        if packed:
            num_programs = num_programs + num_sequences
    launchable(_forward_kernel)[(num_programs * _cdiv(width, constants["BD"]),)](
        x, weight, x if bias is None else bias, x if initial_state is None else initial_state,
        cu_seqlens if packed else x, _places(cu_seqlens, num_tokens) if packed else x, y, final_state,
        num_tokens, width, BT=size, BU=rows, HAS_STATE=initial_state is not None, HAS_FINAL=output_final_state,
        **constants,
    )  # fmt: skip
    return y, final_state


@on_its_device
def short_conv_backward(
    dy: Tensor,
    d_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, d_weight, d_bias and d_initial_state; the last two are empty where there is no such argument."""
    dy, x = computed_once(dy.contiguous()), computed_once(x.contiguous())
    d_final_state, weight, bias, initial_state, cu_seqlens = _contiguous(
        d_final_state, weight, bias, initial_state, cu_seqlens
    )
    (batch_size, num_tokens, width), packed = x.shape, cu_seqlens is not None
    constants = _constants(x, weight, bias, packed, silu, BACKWARD_CHANNELS)
    constants["HAS_D_FINAL"] = d_final_state is not None
    num_taps, num_blocks = constants["W"], _cdiv(width, constants["BD"])
    num_programs = batch_size * _num_tiles(num_tokens, BACKWARD_TOKENS)
    rows = 4 if num_taps <= 4 and (x.element_size() == 2 or not packed) else 2
    bounds, d_final = cu_seqlens if packed else x, x if d_final_state is None else d_final_state
    parameters = weight, x if bias is None else bias, x if initial_state is None else initial_state
    dx = x.new_empty(x.shape)
    # A workspace of a symbolic number of rows, which might be one, would bind a traced program to the answer; the last
    # program writes one row more, of zeros.
    new_partial = x.new_zeros if _is(num_programs, 0) else x.new_empty
    partial = new_partial(num_programs + 1, num_taps + (bias is not None), width, dtype=torch.float32)
    launchable(_backward_kernel)[(num_programs * num_blocks,)](
        dy, d_final, x, *parameters, _places(cu_seqlens, num_tokens) if packed else x, dx, partial,
        num_tokens, width, BT=BACKWARD_TOKENS, BU=rows, HAS_STATE=initial_state is not None, **constants,
    )  # fmt: skip
    sums = partial.sum(0, dtype=torch.float64)
    d_weight = sums[:num_taps].to(weight.dtype).t().contiguous()
    d_bias = x.new_empty(0) if bias is None else sums[num_taps].to(bias.dtype)
    d_initial_state = x.new_empty(0)
    if initial_state is not None:
        d_initial_state = x.new_empty(initial_state.shape)
        launchable(_state_backward_kernel)[(initial_state.shape[0] * num_blocks,)](
            dy, d_final, x, *parameters, bounds, d_initial_state, num_tokens, width, **constants
        )
    return dx, d_weight, d_bias, d_initial_state
