"""A mask that also depends on a scalar."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mask_if(m_block, condition):
    """Return ``m_block`` where the scalar condition holds, and no element elsewhere.

    The same as ``m_block & condition``, whose result Triton's interpreter keeps as int32, which the one of Triton 3.9
    refuses as a mask.
    """
    return tl.where(m_block, condition, False)
