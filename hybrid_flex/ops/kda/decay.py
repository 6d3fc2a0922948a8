"""Decay factors inside a chunk, as a binary tree of products that are all at most one.

The factor between a row i and an earlier row j of a chunk is ``D_ij = exp(g_{j+1} + ... + g_i)`` per key channel.  Splitting
it as ``exp(G_i) * exp(-G_j)`` overflows, because the cumulative sum G is unbounded below with the softplus gate.

# NOTE [Decay tree]
Cut the chunk into blocks of m = 1, 2, 4, ... rows and look at neighbouring blocks (left, right).  For i in the right block
and j in the left one, the boundary between them lies inside the sum, so

    D_ij = exp(prefix_i) * exp(suffix_j),   prefix_i = sum of g from the start of the right block to i,
                                            suffix_j = sum of g after j to the end of the left block,

and with g <= 0 both factors lie in [0, 1]: no overflow, no clamping, and underflow only where D_ij itself underflows.  Every
pair i > j meets at exactly one level, the log2(C) levels cover the strict lower triangle, and each level is one batched
matrix product.  The sums are built level by level from g itself, never as a difference of two long cumulative sums, so a
reset (g = -1000) costs its neighbours no digits.  Nothing looks past row i: causality holds bit for bit.
The triangular inverse of the WY form merges along the same tree, see NOTE [Inverse by merging] in chunk.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Decay(NamedTuple):
    """Decay factors of chunks ``[M, C, K]``."""

    levels: list[tuple[Tensor, Tensor]]
    """For m = 1, 2, ..., C / 2: (exp(prefix) of the right blocks, exp(suffix) of the left blocks), each [M, C/2m, m, K]."""
    from_start: Tensor
    """exp(g_1 + ... + g_i): from the chunk's start up to and with row i, [M, C, K]."""
    to_end: Tensor
    """exp(g_{i+1} + ... + g_C): from row i to the chunk's end, [M, C, K]."""


def pairs(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Split rows ``[M, C, ...]`` into left and right neighbours of m rows, each ``[M, C/2m, m, ...]``."""
    blocks = x.unflatten(1, (x.shape[1] // (2 * m), 2, m))
    return blocks[:, :, 0], blocks[:, :, 1]


def join(left: Tensor, right: Tensor) -> Tensor:
    """Undo `pairs`."""
    return torch.stack((left, right), 2).flatten(1, 3)


def decay_tree(g: Tensor) -> Decay:
    """Compute every decay factor of chunks of log decays ``g [M, C, K]``, C a power of two."""
    chunk_size = g.shape[1]
    prefix, suffix = g, torch.zeros_like(g)
    levels = []
    m = 1
    while m < chunk_size:
        prefix_left, prefix_right = pairs(prefix, m)
        suffix_left, suffix_right = pairs(suffix, m)
        levels.append((prefix_right.exp(), suffix_left.exp()))
        left_total, right_total = prefix_left[:, :, -1:], prefix_right[:, :, -1:]
        prefix = join(prefix_left, prefix_right + left_total)
        suffix = join(suffix_left + right_total, suffix_right)
        m *= 2
    return Decay(levels, prefix.exp(), suffix.exp())


def decay_tree_backward(d_levels: list[tuple[Tensor, Tensor]], d_prefix: Tensor, d_suffix: Tensor) -> Tensor:
    """Gather the gradients of all prefix and suffix sums into the gradient of g, by walking the tree from the top.

    Args:
        d_levels: for m = 1, 2, ...: gradients of (prefix of the right blocks, suffix of the left blocks).
        d_prefix: gradient of the chunk-wide prefix sums ``[M, C, K]``.
        d_suffix: gradient of the chunk-wide suffix sums ``[M, C, K]``.
    """
    m = d_prefix.shape[1] // 2
    for d_right, d_left in reversed(d_levels):
        prefix_left, prefix_right = pairs(d_prefix, m)
        suffix_left, suffix_right = pairs(d_suffix, m)
        # prefix of the right half contains the left block's total, which is the left prefix's last row; mirrored for suffix.
        d_left_total = prefix_right.sum(2, keepdim=True)
        d_right_total = suffix_left.sum(2, keepdim=True)
        prefix_left = torch.cat((prefix_left[:, :, :-1], prefix_left[:, :, -1:] + d_left_total), 2)
        prefix_right = prefix_right + d_right
        prefix_right = torch.cat((prefix_right[:, :, :-1], prefix_right[:, :, -1:] + d_right_total), 2)
        d_prefix = join(prefix_left, prefix_right)
        d_suffix = join(suffix_left + d_left, suffix_right)
        m //= 2
    return d_prefix
