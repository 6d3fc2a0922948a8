"""Where sequences are cut into segments, and when."""

from __future__ import annotations

import itertools

import pytest
import torch


@pytest.mark.parametrize(("T", "C", "count"), [(1000, 64, 4), (64, 64, 3), (4097, 32, 7), (130, 64, 2)])
def test_segments_cover_every_sequence(T: int, C: int, count: int, device: str) -> None:
    from hybrid_flex.kernels.kda.segments import cut

    B, num_chunks = 3, -(-T // C)
    segments = cut(B, T, C, count, torch.device(device))
    bounds, first = segments.bounds.tolist(), segments.first.tolist()
    assert segments.per_sequence <= count and len(first) == B * segments.per_sequence == len(bounds) - 1
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    assert min(lengths) > 0 and bounds[-1] == B * T
    for i, (begin, length, chunk) in enumerate(zip(bounds, lengths, first, strict=False)):
        b, offset = divmod(begin, T)
        assert b == i // segments.per_sequence and offset % C == 0 and offset + length <= T
        assert chunk == b * num_chunks + offset // C
        assert length % C == 0 or offset + length == T


def test_only_long_sequences_of_few_heads_are_cut() -> None:
    from hybrid_flex.kernels.kda.segments import num_segments

    assert num_segments(blocks=192, num_chunks=128, num_processors=132) == 1  # T 8192, 96 heads
    assert num_segments(blocks=64, num_chunks=512, num_processors=132) == 1  # T 32768, 32 heads
    assert num_segments(blocks=8, num_chunks=16, num_processors=132) == 1  # T 1024, 4 heads
    assert num_segments(blocks=8, num_chunks=512, num_processors=132) == 16
    assert num_segments(blocks=16, num_chunks=4096, num_processors=132) == 8
