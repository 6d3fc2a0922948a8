"""Sequences cut into segments that are scanned side by side: NOTE [Segments] in scan.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .scan import load_state, store_state

# Chunks that a segment should have at least, and chunks in turn that cutting should save: two more scans over the
# workspace, of K and of V columns, and the launches of a join cost about as much as a hundred chunks.
MIN_CHUNKS, MIN_SAVED = 32, 128


class Segments(NamedTuple):
    """How each sequence of equal length is cut; ``count`` is 1 where it is left whole, and for packed sequences."""

    count: int
    """Segments of a sequence."""
    chunks: Any
    """Chunks of a segment (an int, or a symbol of one); the last may have fewer, but at least one."""


def num_segments(blocks: int, num_chunks: int, num_processors: int) -> int:
    """Choose how many segments to cut sequences of ``num_chunks`` into whose scans fill ``blocks`` multiprocessors.

    On one H100 a chunk takes the scan 1.8 us.  At T 32768, 8 segments of each of 8 heads take 1.05 ms instead of 1.55
    forward and 4.3 instead of 4.9 with the backward; 4 of 16 heads 1.9 either way, and 5.9 instead of 7.0.
    """
    count = max(min(num_processors // max(blocks, 1), num_chunks // MIN_CHUNKS), 1)
    return count if num_chunks - 3 * -(-num_chunks // count) >= MIN_SAVED else 1


def cut(num_chunks: int, count: int) -> Segments:
    """Cut sequences of ``num_chunks`` chunks into at most ``count`` segments, none of them empty."""
    if count == 1:
        return Segments(1, num_chunks)
    chunks = -(-num_chunks // count)
    return Segments(-(-num_chunks // chunks), chunks)


@triton.jit(do_not_specialize=["NS"])
def join_kernel(
    p_M, p_N, p_edge, p_states, NS, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    WV: tl.constexpr, SK: tl.constexpr, BV: tl.constexpr, V_FIRST: tl.constexpr, HAS_EDGE: tl.constexpr,
    BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Join the maps of NS segments of one sequence and value head, ``[K, BV]`` of the state.

    Forward it leaves the state that each segment begins with, from that of the first; back, with R in the place of N,
    the gradient of the state that each segment ends with, from that of the last.  Without an edge those are zero.
    """
    i_v, i_nh = tl.program_id(0) % (WV // BV), tl.program_id(0) // (WV // BV)
    i_n, i_head = i_nh // HV, i_nh % HV
    if HAS_EDGE:
        b_S = load_state(p_edge, i_nh, i_v, K, V, BK, BV, V_FIRST)
    else:
        b_S = tl.zeros((BK, BV), dtype=tl.float32)
    for step in range(NS):
        i_segment = NS - 1 - step if BACK else step
        i_state = (i_n * NS + i_segment) * HV + i_head
        store_state(p_states, b_S, i_state, i_v, K, V, BK, BV, V_FIRST)
        if step < NS - 1:
            tl.debug_barrier()  # the state is read again, by rows
            b_S = load_state(p_N, i_state, i_v, K, V, BK, BV, V_FIRST)
            for i_s in range(BK // SK):
                b_M = load_state(p_M, i_state, i_s, K, K, BK, SK, BACK)  # back, M's transpose
                b_rows = load_state(p_states, i_state, i_v, K, V, SK, BV, V_FIRST, i_s * SK)
                b_S = tl.dot(b_M, b_rows, b_S, input_precision=PRECISION)
