"""Decay factors inside a chunk, as a binary tree of products that are all at most one.

The factor between a row i and an earlier row j of a chunk is ``D_ij = exp(g_{j+1} + ... + g_i)`` per key channel.
Splitting it as ``exp(G_i) * exp(-G_j)`` overflows, because the cumulative sum G is unbounded below with the softplus
gate.

# NOTE [Decay tree]
Cut the chunk into blocks of m = 1, 2, 4, ... rows and look at neighbouring blocks (left, right).  For i in the right
block and j in the left one, the boundary between them lies inside the sum, so

    D_ij = exp(prefix_i) * exp(suffix_j),   prefix_i = sum of g from the start of the right block to i,
                                            suffix_j = sum of g after j to the end of the left block,

and with g <= 0 both factors lie in [0, 1]: no overflow, no clamping, and underflow only where D_ij itself underflows.
 Every pair i > j meets at exactly one level, and the log2(C) levels cover the strict lower triangle.  The sums are
 built from g
itself, never as a difference of two long cumulative sums, so a reset (g = -1000) costs its neighbours no digits.
Nothing looks past row i: causality holds bit for bit.

The levels m = 1, 2, 4, 8 lie inside tiles of 16 rows and are taken together: one product of a constant 0/1 matrix
with g makes their sums, one batched product per side makes their pairs, a mask keeps each pair at its level.  Taken
one by one they would be products too small to be fast and, compiled, three times as many kernels.  The levels m = 16
and 32 above them are taken one after another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE_SIZE = 16
TILE_LEVELS = 4
"""Number of levels m = 1, 2, 4, 8 inside a tile."""


class Decay(NamedTuple):
    """Decay factors of M chunks of C rows, which are M * C / 16 tiles."""

    tile: Tensor
    """exp(prefix) in right blocks, exp(suffix) in left ones, at m = 1, 2, 4, 8: [M', 4, 16, K] for M' tiles."""
    levels: list[tuple[Tensor, Tensor]]
    """exp(prefix) of the right blocks and exp(suffix) of the left ones, at m = 16, 32: each [M, C/2m, m, K]."""
    from_start: Tensor
    """exp(g_1 + ... + g_i): from the chunk's start up to and with row i, [M, C, K]."""
    to_end: Tensor
    """exp(g_{i+1} + ... + g_C): from row i to the chunk's end, [M, C, K]."""


class DecayGrads(NamedTuple):
    """Gradients of the exponents of a `Decay`, in its shapes."""

    tile: Tensor
    levels: list[tuple[Tensor, Tensor]]
    prefix: Tensor
    suffix: Tensor


def pairs(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Split rows ``[M, C, ...]`` into left and right neighbours of m rows, each ``[M, C/2m, m, ...]``."""
    blocks = x.unflatten(1, (x.shape[1] // (2 * m), 2, m))
    return blocks[:, :, 0], blocks[:, :, 1]


def join(left: Tensor, right: Tensor) -> Tensor:
    """Undo `pairs`."""
    return torch.stack((left, right), 2).flatten(1, 3)


def tiles(x: Tensor) -> Tensor:
    """Cut chunks ``[M, C, X]`` into tiles ``[M * C / 16, 16, X]``."""
    return x.reshape(-1, TILE_SIZE, x.shape[-1])


def tile_masks(like: Tensor) -> Tensor:
    """Return which pairs (i, j) of a tile meet at each level, i right and j left of a boundary: [4, 16, 16]."""
    level, i, j = _levels_rows_columns(like)
    # Two rows meet where their numbers differ in bit ``level`` and in no higher one.
    return (((i ^ j) >> level == 1) & (i > j)).to(like.dtype)


def decay_tree(g: Tensor) -> Decay:
    """Compute every decay factor of chunks of log decays ``g [M, C, K]``, with C 16, 32 or 64."""
    chunk_size = g.shape[1]
    sums = (_tile_sums(g) @ tiles(g)).unflatten(1, (TILE_LEVELS + 2, TILE_SIZE))
    prefix, suffix = sums[:, TILE_LEVELS].reshape(g.shape), sums[:, TILE_LEVELS + 1].reshape(g.shape)
    levels = []
    m = TILE_SIZE
    while m < chunk_size:
        prefix_left, prefix_right = pairs(prefix, m)
        suffix_left, suffix_right = pairs(suffix, m)
        levels.append((prefix_right.exp(), suffix_left.exp()))
        left_total, right_total = prefix_left[:, :, -1:], prefix_right[:, :, -1:]
        prefix = join(prefix_left, prefix_right + left_total)
        suffix = join(suffix_left + right_total, suffix_right)
        m *= 2
    return Decay(sums[:, :TILE_LEVELS].exp(), levels, prefix.exp(), suffix.exp())


def decay_tree_backward(grads: DecayGrads) -> Tensor:
    """Gather the gradients of all prefix and suffix sums into the gradient of g, by walking the tree from the top."""
    d_prefix, d_suffix = grads.prefix, grads.suffix
    shape, m = d_prefix.shape, d_prefix.shape[1] // 2
    for d_right, d_left in reversed(grads.levels):
        prefix_left, prefix_right = pairs(d_prefix, m)
        suffix_left, suffix_right = pairs(d_suffix, m)
        # The right half's prefix contains the left block's total, its prefix's last row; mirrored for the left half's
        # suffix.
        prefix_left = _add_to_last_row(prefix_left, prefix_right.sum(2, keepdim=True))
        prefix_right = _add_to_last_row(prefix_right + d_right, suffix_left.sum(2, keepdim=True))
        d_prefix = join(prefix_left, prefix_right)
        d_suffix = join(suffix_left + d_left, suffix_right)
        m //= 2
    d_sums = torch.cat((grads.tile, tiles(d_prefix)[:, None], tiles(d_suffix)[:, None]), 1).flatten(1, 2)
    return (_tile_sums(d_prefix).mT @ d_sums).reshape(shape)


def _add_to_last_row(x: Tensor, row: Tensor) -> Tensor:
    return torch.cat((x[:, :, :-1], x[:, :, -1:] + row), 2)


def _tile_sums(like: Tensor) -> Tensor:
    """Return the 0/1 matrix ``[(4 + 2) * 16, 16]`` that sums a tile's g per level, then to its prefix and suffix."""
    level, i, j = _levels_rows_columns(like)
    same_block, is_right = (i ^ j) >> level == 0, (i >> level) & 1 == 1
    per_level = same_block & torch.where(is_right, j <= i, j > i)
    return torch.cat((per_level, (j <= i)[None], (j > i)[None])).to(like.dtype).flatten(0, 1)


def _levels_rows_columns(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(TILE_SIZE, device=like.device)
    return torch.arange(TILE_LEVELS, device=like.device)[:, None, None], rows[:, None], rows
