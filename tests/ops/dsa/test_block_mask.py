"""Block masks: every (query, key) pair against the selection, block lists, eager FlexAttention, the compiler,
errors."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hybrid_flex.ops.dsa import block_topk_mask, lightning_topk, topk_block_mask
from hybrid_flex.ops.dsa.reference import reference_attention, reference_membership


def dense(mask: BlockMask, num_queries: int, num_keys: int) -> Tensor:
    """Evaluate ``mask_mod`` everywhere: bool [B, H, T, S]."""
    b, h = (torch.arange(n)[(slice(None), *(None,) * (3 - i))] for i, n in enumerate(mask.shape[:2]))
    return mask.mask_mod(b, h, torch.arange(num_queries)[:, None], torch.arange(num_keys)[None, :])


def listed(number: Tensor, order: Tensor) -> Tensor:
    """Turn ``num_blocks`` and ``indices`` of a BlockMask into a bool map of blocks."""
    first = torch.arange(order.shape[-1]) < number[..., None]
    return torch.zeros(order.shape, dtype=torch.bool).scatter(-1, order.long(), first)


def check_lists(mask: BlockMask, pairs: Tensor, block: int) -> None:
    """Require: touched = partial + full, disjoint; full blocks are wholly selected and wholly inside."""
    rows, columns = -(-pairs.shape[2] // block), -(-pairs.shape[3] // block)
    assert mask.kv_indices.shape[-1] == columns
    padded = torch.nn.functional.pad(pairs, (0, columns * block - pairs.shape[3], 0, rows * block - pairs.shape[2]))
    tiles = padded.unflatten(3, (columns, block)).unflatten(2, (rows, block))
    any_, all_ = tiles.any(5).any(3), tiles.all(5).all(3)
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(full, all_)
    assert torch.equal(partial, any_ & ~all_)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 100), st.integers(1, 110), st.integers(0, 9))
def test_property_mask_is_the_selection(num_queries: int, num_keys: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q_idx = torch.randint(-2, 3, (2, num_queries, 2, 3), generator=generator).float()
    k_idx = torch.randint(-2, 3, (2, num_keys, 3), generator=generator).float()
    start = max(0, num_keys - num_queries)
    indices = lightning_topk(q_idx, k_idx, torch.ones(2, num_queries, 2), width, query_start=start)
    mask = topk_block_mask(indices, num_keys, 16)
    pairs = dense(mask, num_queries, num_keys)
    assert torch.equal(pairs[:, 0], reference_membership(indices, num_keys))
    check_lists(mask, pairs, 16)


def test_every_bit_of_a_word_including_the_sign() -> None:
    indices = torch.arange(64, dtype=torch.int32)[None, :, None].contiguous()
    assert torch.equal(dense(topk_block_mask(indices, 64, 16), 64, 64)[0, 0], torch.eye(64, dtype=torch.bool))
    everything = torch.arange(64, dtype=torch.int32).expand(1, 3, 64)
    assert dense(topk_block_mask(everything, 64, 16), 3, 64).all()


def test_rows_that_see_everything_are_full_blocks() -> None:
    q_idx, k_idx, w = torch.randn(1, 64, 2, 4), torch.randn(1, 64, 4), torch.randn(1, 64, 2)
    mask = topk_block_mask(lightning_topk(q_idx, k_idx, w, 64), 64, 16)
    assert mask.full_kv_num_blocks.tolist() == [[[0, 1, 2, 3]]]
    assert mask.kv_num_blocks.tolist() == [[[1, 1, 1, 1]]]


def test_eager_flex_needs_nothing_but_the_mask_mod(selection: Callable[..., Tensor]) -> None:
    # Eager FlexAttention ignores the block lists: emptied lists must not change its result.
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 40, 4, 16), torch.randn(2, 70, 2, 16), torch.randn(2, 70, 2, 8)
    indices = selection(2, 40, 70, 12)
    mask = topk_block_mask(indices, 70, 16)
    empty = BlockMask.from_kv_blocks(
        torch.zeros_like(mask.kv_num_blocks),
        mask.kv_indices,
        BLOCK_SIZE=16,
        mask_mod=mask.mask_mod,
        seq_lengths=(40, 70),
    )
    expected, _ = reference_attention(q, k, v, indices)
    for form in (mask, empty):
        o = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=form, enable_gqa=True)
        torch.testing.assert_close(o.transpose(1, 2), expected)
    assert expected.abs().max() > 0.5


@pytest.mark.parametrize("heads", [None, 3], ids=["shared", "per-head"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("num_queries", "num_keys", "start"), [(64, 64, 0), (50, 90, 40), (20, 33, 5)])
def test_block_selection_against_loop(
    heads: int | None, causal: bool, num_queries: int, num_keys: int, start: int
) -> None:
    block, topk = 16, 2
    rows, columns = -(-num_queries // block), -(-num_keys // block)
    shape = (2, rows, columns) if heads is None else (2, heads, rows, columns)
    scores = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0)).float()
    mask = block_topk_mask(scores, topk, num_queries, num_keys, block_size=block, causal=causal, query_start=start)
    pairs = dense(mask, num_queries, num_keys)
    by_head = scores[:, None] if heads is None else scores
    for b in range(2):
        for h in range(by_head.shape[1]):
            for t in range(num_queries):
                row = t // block
                last_position = start + min((row + 1) * block, num_queries) - 1
                candidates = [c for c in range(columns) if not causal or c * block <= last_position]
                best = sorted(candidates, key=lambda c: (-by_head[b, h, row, c].item(), c))[:topk]
                expected = [s for s in range(num_keys) if s // block in best and (not causal or s <= start + t)]
                assert pairs[b, h, t].nonzero()[:, 0].tolist() == expected
    # Lists may name a block no row of which sees a key (behind the diagonal of a ragged row); they never miss one.
    partial, full = (
        listed(n, i)
        for n, i in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    )
    padded = torch.nn.functional.pad(pairs, (0, columns * block - num_keys, 0, rows * block - num_queries))
    tiles = padded.unflatten(3, (columns, block)).unflatten(2, (rows, block))
    assert torch.equal(full, tiles.all(5).all(3))
    assert not (partial & full).any() and (~tiles.any(5).any(3) | partial | full).all()


def test_opcheck(selection: Callable[..., Tensor]) -> None:
    torch.library.opcheck(torch.ops.hybrid_flex.pack_selection.default, (selection(2, 20, 40, 7), 40, 16, 16))
    torch.library.opcheck(
        torch.ops.hybrid_flex.select_blocks.default, (torch.randn(2, 1, 3, 4), 2, 40, 60, 16, True, 20)
    )


def test_compiled_flex_with_the_mask_of_its_own_region(fresh_dynamo: None) -> None:
    # The trap: compiled CPU FlexAttention returns the fully masked result when its mask_mod captures the output of a
    # scatter made in the same region.  Here selection, mask and attention share one region.
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 2, 16), torch.randn(1, 64, 2, 16)
    q_idx, k_idx, w = torch.randn(1, 64, 2, 4), torch.randn(1, 64, 4), torch.randn(1, 64, 2)

    def region(q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, k_idx: Tensor, w: Tensor) -> Tensor:
        mask = topk_block_mask(lightning_topk(q_idx, k_idx, w, 8), k.shape[1], 32)
        return flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)

    got = torch.compile(region, fullgraph=True)(q, k, v, q_idx, k_idx, w)
    expected, _ = reference_attention(q, k, v, lightning_topk(q_idx, k_idx, w, 8))
    torch.testing.assert_close(got, expected)


def test_outputs_are_written_everywhere(nan_memory: None, selection: Callable[..., Tensor]) -> None:
    indices = selection(2, 20, 40, 7)
    assert torch.equal(dense(topk_block_mask(indices, 40, 16), 20, 40)[:, 0], reference_membership(indices, 40))


def test_errors() -> None:
    indices = torch.zeros(1, 4, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"topk_block_mask: block_size must be a positive multiple of 16, got 100"):
        topk_block_mask(indices, 8, 100)
    with pytest.raises(ValueError, match=r"topk_block_mask: kv_len must be at least 1, got 0"):
        topk_block_mask(indices, 0)
    with pytest.raises(ValueError, match=r"topk_block_mask: indices must be \[B, T, J\]"):
        topk_block_mask(indices[0], 8)
    with pytest.raises(TypeError, match=r"topk_block_mask: indices must have dtype int32, int64, got int16"):
        topk_block_mask(indices.short(), 8)
    scores = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match=r"block_topk_mask: topk_blocks must be at least 1, got 0"):
        block_topk_mask(scores, 0, 32, 32, block_size=16)
    with pytest.raises(ValueError, match=r"block_topk_mask: scores must have ceil.* columns, got \(2, 2\)"):
        block_topk_mask(scores, 1, 32, 48, block_size=16)
    with pytest.raises(ValueError, match=r"block_topk_mask: scores must have shape \[B, nQ, nKV\] or"):
        block_topk_mask(scores[0], 1, 32, 32, block_size=16)
    with pytest.raises(TypeError, match=r"block_topk_mask: scores must have dtype"):
        block_topk_mask(scores.int(), 1, 32, 32, block_size=16)
