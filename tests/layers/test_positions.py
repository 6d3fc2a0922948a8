"""Positions of tokens in packed sequences."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_flex.layers.positions import sequence_of_token, token_positions


@settings(max_examples=30, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_counts_from_zero_in_every_sequence(lengths: list[int]) -> None:
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    total = sum(lengths)
    want_positions = [i for length in lengths for i in range(length)]
    want_sequences = [n for n, length in enumerate(lengths) for _ in range(length)]
    assert token_positions(total, 0, cu_seqlens, torch.device("cpu")).tolist() == want_positions
    assert sequence_of_token(torch.arange(total), cu_seqlens).tolist() == want_sequences


def test_counts_on_after_a_cache() -> None:
    assert token_positions(3, 7, None, torch.device("cpu")).tolist() == [7, 8, 9]
