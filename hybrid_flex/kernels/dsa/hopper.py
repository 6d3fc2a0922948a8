"""What the kernels in Gluon for Hopper share: how they copy, hand over and convert, and what they can read.

Gluon is the lower level of Triton: layouts, copies and waits are placed by hand.  Torch has no way to take a Gluon
kernel along, so graphs that leave the process carry the kernels in Triton instead.

# NOTE [Zero rows]
An unused slot is copied as a row of zeros, which reads nothing: a row that nobody selects may hold NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from hybrid_flex.kernels.launch import device_limits

# Names of Triton 3.7 and 3.9, and what they were before.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def signal(b, pred=True):
    """Arrive at a barrier for the whole partition, if ``pred``."""
    barrier()
    mbarrier.arrive(b, count=1, pred=pred)


@gluon.jit
def load_slots(p_slots, j, J, BN: gl.constexpr, layout: gl.constexpr):
    """Load the slots of a tile, -1 behind the last one."""
    i_slot = j + gl.arange(0, BN, layout)
    return gl.load(p_slots + i_slot, mask=i_slot < J, other=-1)


@gluon.jit
def copy_rows(s_x, p_rows, m_rows, layout: gl.constexpr):
    """Start copying the first columns of rows ``[N]``, zeros where ``m_rows`` is false."""
    i_column = gl.arange(0, s_x.shape[1], gl.SliceLayout(0, layout))
    async_load(s_x, p_rows[:, None] + i_column[None, :], mask=m_rows[:, None])


@gluon.jit
def selected_rows(p_x, b_slot, x_row):
    """Return pointers to the selected rows, and which of them are to be copied: NOTE [Zero rows]."""
    return p_x + gl.maximum(b_slot, 0).to(gl.int64) * x_row, b_slot >= 0


@gluon.jit
def as_rows(b_x, layout: gl.constexpr):
    """Return what belongs to the rows of the logits in the layout of the sums."""
    return gl.convert_layout(b_x, gl.SliceLayout(1, layout), assert_trivial=True)[:, None]


@gluon.jit
def as_operand(b_p, layout: gl.constexpr, dtype: gl.constexpr):
    """Return weights as the next product reads them, out of registers."""
    return gl.convert_layout(b_p.to(dtype), layout, assert_trivial=True)


def is_on_hopper(x: Tensor) -> bool:
    """Tell whether kernels in Gluon take tensors of this dtype, on this device."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16) and device_limits(x.device)[1] == 9


def strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of x but the last, 0 along what there is one of, whose stride may be anything."""
    return tuple(n if size > 1 else 0 for n, size in zip(x.stride()[:3], x.shape[:3], strict=True))


def lies_on_lines(x: Tensor) -> bool:
    """Tell whether every row begins at a multiple of the 16 bytes that are copied at once, its columns side by side.

    Of a stride Triton knows whether it is a multiple of 16 elements, not of 8.
    """
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in strides(x))


def on_lines(x: Tensor) -> Tensor:
    """Return x, or a copy that lies on lines."""
    return x if lies_on_lines(x) else x.clone(memory_format=torch.contiguous_format)
