"""Writing out the tokens of selected pools: `expand_pools`, one pass instead of ten.

column c < kpool n        token  kpool pool[c // kpool] + c % kpool        n pools are in use
column c >= kpool n       token  tail + c - kpool n                        while it is visible, else -1
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybrid_flex.kernels.launch import launchable, on_its_device

COLUMNS = 1024


@triton.jit(do_not_specialize=["query_start", "T", "J", "WIDTH"])
def expand_kernel(
    p_pools, p_start, p_tokens, query_start, T, J, WIDTH, KPOOL: tl.constexpr, EACH: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Write the tokens of one query; EACH says that every batch entry has a start of its own, in ``p_start``."""
    i_query = tl.program_id(0).to(tl.int64)
    start = tl.load(p_start + i_query // T).to(tl.int32) if EACH else query_start
    visible = i_query % T + start + 1
    p_pools += i_query * J
    p_tokens += i_query * WIDTH
    b_used = tl.zeros([BC], tl.int32)
    for j in range(0, J, BC):
        i_slot = j + tl.arange(0, BC)
        b_used += (tl.load(p_pools + i_slot, mask=i_slot < J, other=-1) >= 0).to(tl.int32)
    used = tl.sum(b_used, 0) * KPOOL
    tail = visible // KPOOL * KPOOL - used
    for c in range(0, WIDTH, BC):
        i_column = c + tl.arange(0, BC)
        b_pool = tl.load(p_pools + i_column // KPOOL, mask=i_column < used, other=0).to(tl.int32)
        b_tail = tl.where(tail + i_column < visible, tail + i_column, -1)
        b_token = tl.where(i_column < used, b_pool * KPOOL + i_column % KPOOL, b_tail)
        tl.store(p_tokens + i_column, b_token.to(tl.int32), mask=i_column < WIDTH)


@on_its_device
def launch_expand(pools: Tensor, kpool: int, query_start: int | Tensor, tokens: Tensor) -> None:
    """Write the tokens of ``pools [B, T, J]`` to ``tokens [B, T, J * kpool + kpool - 1]``, int32 and contiguous."""
    B, T, J = pools.shape
    each = isinstance(query_start, Tensor)
    starts, start = (query_start, 0) if each else (pools, query_start)
    launchable(expand_kernel, pools)[(B * T,)](
        pools.contiguous(), starts, tokens, start, T, J, tokens.shape[2], KPOOL=kpool, EACH=each, BC=COLUMNS,
        num_warps=4,
    )  # fmt: skip
