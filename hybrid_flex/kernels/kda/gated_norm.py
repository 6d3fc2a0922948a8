"""RMS norm with an output gate, forward and backward, in one pass over the rows each.

    r = rsqrt(mean(x^2) + eps)      n = r x      y = n w act(a)        act = sigmoid, or silu(a) = a sigmoid(a)
    d_n = dy w act(a)               dx = r (d_n - n mean(d_n n))
    d_a = dy n w act'(a)            dw = sum over rows of dy n act(a)

# NOTE [Row tiles]
A program holds whole rows, as many as make every thread load each tensor in pieces of 16 bytes, some of them at once:
the bytes in flight are what the speed depends on.  The backward pass walks down a few tiles to write one partial sum of
d_weight for all of them (float32, in an order that does not change from run to run), and holds half as much of each
tensor, because it holds three and the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_flex.kernels.launch import launchable, next_power_of_2, on_its_device
from hybrid_flex.kernels.masks import mask_if

# Elements of a tile and of a thread, see NOTE [Row tiles].  Rows longer than a tile get more threads.
FORWARD_TILE, BACKWARD_TILE = 4096, 1024
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 32, 8
# Tiles of a program in the backward pass: for rows of 128, partial sums add 0.3 % to the bytes moved in bfloat16.
TILES = 16
WARP = 32
MAX_WARPS = 32


@triton.jit
def _forward_kernel(
    p_x, p_gate, p_weight, p_y, R, D, eps, BR: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    i_r = tl.program_id(0) * BR
    r, d = tl.arange(0, BR), tl.arange(0, BD)
    mask = (i_r + r < R)[:, None] & (d < D)[None, :]
    base = i_r.to(tl.int64) * D
    offsets = r[:, None] * D + d[None, :]
    b_x = tl.load(p_x + base + offsets, mask=mask, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + base + offsets, mask=mask, other=0.0).to(tl.float32)
    b_weight = tl.load(p_weight + d, mask=d < D, other=0.0).to(tl.float32)
    reciprocal = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + tl.cast(eps, tl.float32))  # Inductor passes numbers as float64
    factor = 1 / (1 + tl.exp(-b_gate))
    if SILU:
        factor = b_gate * factor
    b_y = b_x * reciprocal[:, None] * b_weight[None, :] * factor
    tl.store(p_y + base + offsets, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    p_dy, p_x, p_gate, p_weight, p_dx, p_d_gate, p_partial, R, D, eps,
    BR: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    r, d = tl.arange(0, BR), tl.arange(0, BD)
    offsets = r[:, None] * D + d[None, :]
    b_weight = tl.load(p_weight + d, mask=d < D, other=0.0).to(tl.float32)
    b_sum = tl.zeros([BR, BD], tl.float32)
    for i_t in range(TILES):
        i_r = (i_p * TILES + i_t) * BR
        mask = (i_r + r < R)[:, None] & (d < D)[None, :]
        base = i_r.to(tl.int64) * D
        b_x = tl.load(p_x + base + offsets, mask=mask, other=0.0).to(tl.float32)
        b_gate = tl.load(p_gate + base + offsets, mask=mask, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + base + offsets, mask=mask, other=0.0).to(tl.float32)
        reciprocal = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + tl.cast(eps, tl.float32))[:, None]
        b_normed = b_x * reciprocal
        sigmoid = 1 / (1 + tl.exp(-b_gate))
        factor, slope = sigmoid, sigmoid * (1 - sigmoid)
        if SILU:
            factor, slope = b_gate * sigmoid, sigmoid * (1 + b_gate * (1 - sigmoid))
        b_sum += b_dy * b_normed * factor
        b_dy = b_dy * b_weight[None, :]
        b_d_gate = b_dy * b_normed * slope
        tl.store(p_d_gate + base + offsets, b_d_gate.to(p_d_gate.dtype.element_ty), mask=mask)
        b_d_normed = b_dy * factor
        # The norm removes the component along x, because y does not change when x is scaled.
        along = tl.sum(b_d_normed * b_normed, 1)[:, None] / D
        b_dx = reciprocal * (b_d_normed - b_normed * along)
        tl.store(p_dx + base + offsets, b_dx.to(p_dx.dtype.element_ty), mask=mask)
    p_sum = p_partial + i_p.to(tl.int64) * D + d
    tl.store(p_sum, tl.sum(b_sum, 0), mask=d < D)
    tl.store(p_sum + D, tl.zeros([BD], tl.float32), mask=mask_if(d < D, i_p + 1 == tl.num_programs(0)))


def _tile(width: int, elements: int, per_thread: int) -> dict[str, int]:
    """Choose the rows of a tile and its warps, see NOTE [Row tiles]."""
    padded = next_power_of_2(max(width, 1))
    rows = max(elements // padded, 1)
    return {"BR": rows, "BD": padded, "num_warps": min(rows * padded // (per_thread * WARP), MAX_WARPS)}


def _rows(x: Tensor):
    """Return the number of rows of [..., D]."""
    number = 1
    for size in x.shape[:-1]:
        number = number * size
    return number


@on_its_device
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """Compute y [..., D]."""
    x, gate, weight = x.contiguous(), gate.contiguous(), weight.contiguous()
    num_rows, width = _rows(x), int(x.shape[-1])
    tile = _tile(width, FORWARD_TILE, FORWARD_ELEMENTS)
    y = x.new_empty(x.shape)
    grid = ((num_rows + tile["BR"] - 1) // tile["BR"],)
    launchable(_forward_kernel)[grid](x, gate, weight, y, num_rows, width, eps, SILU=activation == "silu", **tile)
    return y


@on_its_device
def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dx, d_gate [..., D] and d_weight [D]."""
    dy, x, gate, weight = dy.contiguous(), x.contiguous(), gate.contiguous(), weight.contiguous()
    num_rows, width = _rows(x), int(x.shape[-1])
    tile = _tile(width, BACKWARD_TILE, BACKWARD_ELEMENTS)
    dx, d_gate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    num_programs = (num_rows + TILES * tile["BR"] - 1) // (TILES * tile["BR"])
    # A workspace of a symbolic number of rows, which might be one, would bind a traced program to the answer; the last
    # program writes one row more, of zeros.
    is_empty = isinstance(num_programs, int) and num_programs == 0
    partial = (x.new_zeros if is_empty else x.new_empty)(num_programs + 1, width, dtype=torch.float32)
    launchable(_backward_kernel)[(num_programs,)](
        dy, x, gate, weight, dx, d_gate, partial, num_rows, width, eps, TILES=TILES, SILU=activation == "silu", **tile
    )
    return dx, d_gate, partial.sum(0, dtype=torch.float64).to(weight.dtype)
