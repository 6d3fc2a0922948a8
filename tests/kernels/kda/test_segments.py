"""Where sequences are cut into segments, and when."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(("num_chunks", "count"), [(16, 4), (1, 3), (129, 7), (3, 2), (5, 4), (0, 1), (9, 1)])
def test_segments_cover_every_sequence_and_none_is_empty(num_chunks: int, count: int) -> None:
    from hybrid_flex.kernels.kda.segments import cut

    segments = cut(num_chunks, count)
    assert 1 <= segments.count <= count
    lengths = [min(segments.chunks, num_chunks - i * segments.chunks) for i in range(segments.count)]
    assert sum(lengths) == num_chunks and (min(lengths) > 0 or num_chunks == 0)


def test_only_long_sequences_of_few_heads_are_cut() -> None:
    from hybrid_flex.kernels.kda.segments import num_segments

    assert num_segments(blocks=192, num_chunks=128, num_processors=132) == 1  # T 8192, 96 heads
    assert num_segments(blocks=64, num_chunks=512, num_processors=132) == 1  # T 32768, 32 heads
    assert num_segments(blocks=8, num_chunks=128, num_processors=132) == 1  # T 8192, 4 heads
    assert num_segments(blocks=32, num_chunks=512, num_processors=132) == 4  # T 32768, 16 heads
    assert num_segments(blocks=8, num_chunks=512, num_processors=132) == 16
    assert num_segments(blocks=16, num_chunks=4096, num_processors=132) == 8
    assert num_segments(blocks=0, num_chunks=0, num_processors=132) == 1
