"""Attention of few tokens over their selected rows: slots cut into spans, a program each, whose results are combined.

With o_n and lse_n the attention over span n alone::

    lse = log sum_n exp(lse_n)          o = sum_n exp(lse_n - lse) o_n

# NOTE [Few tokens]
One token with up to 64 heads on a key head is one program of `gather_kernel`, which takes its tiles of rows one after
the other: decoding one sequence would keep one multiprocessor of a hundred busy.  So as long as there are programs to
spare, a token's slots are cut into spans of at least LEAST_TILES tiles, below which a program mostly begins and ends.
Results of spans are float32, so that nothing is rounded twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hybrid_flex.kernels.launch import next_power_of_2

TILE = 64
"""Slots that spans are measured in: the largest tile of `gather_kernel`."""
LEAST_TILES = 2
MOST_SPANS = 32
ENOUGH_PROGRAMS = 128
"""About one for each multiprocessor of an H100."""
FEW_TOKENS = 16
"""Tokens of a sequence from which on a graph that leaves their number open is not cut."""
PIECE = 128
"""Columns that a program combines."""
LOG2_E = tl.constexpr(1.4426950408889634)


def cut(B: int, T: int, J: int, programs: int) -> tuple[int, int]:
    """Return into how many spans to cut the J slots of each token, and how many slots a span has.

    A graph may leave B open: then the numbers are open, too.  With T or J open nothing is cut.

    Args:
        B: sequences.
        T: tokens of each.
        J: slots of each token.
        programs: of a token, for its heads.
    """
    if not (isinstance(T, int) and isinstance(J, int)) or not (isinstance(B, int) or T < FEW_TOKENS):
        return 1, J
    tiles = max(1, -(-J // TILE))
    most = torch.sym_max(1, ENOUGH_PROGRAMS // torch.sym_max(1, B * T * programs))
    least_tiles = max(LEAST_TILES, -(-tiles // MOST_SPANS))
    span_tiles = torch.sym_max(least_tiles, (tiles + most - 1) // most)
    return (tiles + span_tiles - 1) // span_tiles, span_tiles * TILE


def is_cut(spans: Any) -> bool:
    """Tell whether there is more than one span, or may be where the number is open."""
    return not isinstance(spans, int) or spans > 1


def most_spans(spans: Any) -> int:
    """Return a power of two that is no smaller than any number of spans."""
    return next_power_of_2(spans) if isinstance(spans, int) else MOST_SPANS


@triton.jit(do_not_specialize=["spans"])
def combine_kernel(p_o_spans, p_lse_spans, p_o, p_lse, spans, V: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr):
    """Combine BV columns of the attention of one head of one token over its spans ``[spans, V]``."""
    i_row, i_n = tl.program_id(0).to(tl.int64), tl.arange(0, BS)
    i_v = tl.program_id(1) * BV + tl.arange(0, BV)
    b_lse = tl.load(p_lse_spans + i_row * spans + i_n, mask=i_n < spans, other=float("-inf"))
    largest = tl.max(b_lse, 0)
    base = tl.where(largest > float("-inf"), largest, 0.0)
    b_w = tl.exp2((b_lse - base) * LOG2_E)
    p_rows = p_o_spans + (i_row * spans + i_n)[:, None] * V + i_v[None, :]
    # A span without a key has written nothing.
    b_o = tl.load(p_rows, mask=(b_w > 0.0)[:, None] & (i_v < V)[None, :], other=0.0)
    weight = tl.sum(b_w, 0)
    b_o = tl.sum(b_o * b_w[:, None], 0) / tl.maximum(weight, 1.0)  # at least 1, the largest one's, with any key
    tl.store(p_o + i_row * V + i_v, b_o.to(p_o.dtype.element_ty), mask=i_v < V)
    b_lse = tl.where(weight > 0.0, base + tl.log(tl.maximum(weight, 1.0)), float("-inf"))
    tl.store(p_lse + i_row, b_lse, mask=tl.program_id(1) == 0)
