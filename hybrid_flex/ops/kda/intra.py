"""Products between the rows of one chunk, with decay: the lower triangles Aqk and L, and their backward.

    Aqk_ij = <q_i, D_ij k_j>   i >= j          L_ij = beta_i <k_i, D_ij k_j>   i > j

Each level of the decay tree (NOTE [Decay tree] in decay.py) contributes the products of right rows ``[q; beta k]``
with left columns ``k``, both decayed to the boundary between their blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .decay import TILE_SIZE, Decay, join, pairs, tile_masks, tiles


def intra_chunk(q: Tensor, k: Tensor, k_beta: Tensor, decay: Decay) -> tuple[Tensor, Tensor]:
    """Compute Aqk and L, each ``[M, C, C]``, from scaled q, k and ``beta * k``, each ``[M, C, K]``."""
    rows, columns = _tile_operands(q, k, k_beta, decay)
    masks = tile_masks(q).repeat(1, 2, 1)
    blocks = ((rows @ columns.mT) * masks).sum(1)  # [M', 2 * 16, 16]: Aqk above L
    diagonal = torch.diag_embed(tiles((q * k).sum(-1, keepdim=True)).squeeze(-1))
    blocks = blocks + F.pad(diagonal, (0, 0, 0, TILE_SIZE))
    blocks = blocks.unflatten(1, (2, TILE_SIZE)).unflatten(0, (q.shape[0], -1))  # [M, n, 2, m, m]
    m = TILE_SIZE
    for row_decay, column_decay in decay.levels:
        rows, columns = _level_operands(q, k, k_beta, row_decay, column_decay, m)
        cross = (rows @ columns.mT).unflatten(2, (2, m))
        upper, lower = blocks[:, 0::2], blocks[:, 1::2]
        blocks = torch.cat((F.pad(upper, (0, m)), torch.cat((cross, lower), -1)), -2)
        m *= 2
    return blocks[:, 0, 0], blocks[:, 0, 1]


def intra_chunk_backward(
    q: Tensor, k: Tensor, k_beta: Tensor, decay: Decay, d_Aqk: Tensor, d_L: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Compute the gradients of q, k and ``beta * k``, and those of the decay exponents of the tiles and of the levels.

    Only the lower triangle of ``d_Aqk`` and the strict lower triangle of ``d_L`` are read.
    """
    n = q.shape[1] // TILE_SIZE
    rows, columns = _tile_operands(q, k, k_beta, decay)
    d_blocks = torch.cat((_diagonal_blocks(d_Aqk, n), _diagonal_blocks(d_L, n)), 1)
    d_cross = d_blocks[:, None] * tile_masks(q).repeat(1, 2, 1)
    d_rows, d_columns = d_cross @ columns, d_cross.mT @ rows
    by_row = d_rows * rows
    d_tile = by_row[:, :, :TILE_SIZE] + by_row[:, :, TILE_SIZE:] + d_columns * columns
    d_q_rows, d_k_rows = (d_rows.unflatten(2, (2, TILE_SIZE)) * decay.tile[:, :, None]).sum(1).unbind(1)
    diagonal = d_Aqk.diagonal(dim1=-2, dim2=-1)[..., None]
    dq = d_q_rows.reshape(q.shape) + diagonal * k
    dk = (d_columns * decay.tile).sum(1).reshape(k.shape) + diagonal * q
    dk_beta = d_k_rows.reshape(k.shape)

    d_levels = []
    m = TILE_SIZE
    for row_decay, column_decay in decay.levels:
        rows, columns = _level_operands(q, k, k_beta, row_decay, column_decay, m)
        d_cross = torch.cat((_cross_blocks(d_Aqk, m), _cross_blocks(d_L, m)), 2)
        d_rows, d_columns = d_cross @ columns, d_cross.mT @ rows
        d_q_right, d_k_right = d_rows[:, :, :m] * row_decay, d_rows[:, :, m:] * row_decay
        zeros = torch.zeros_like(d_q_right)
        dq = dq + join(zeros, d_q_right)
        dk = dk + join(d_columns * column_decay, zeros)
        dk_beta = dk_beta + join(zeros, d_k_right)
        by_row = d_rows * rows
        d_levels.append((by_row[:, :, :m] + by_row[:, :, m:], d_columns * columns))
        m *= 2
    return dq, dk, dk_beta, d_tile, d_levels


def _tile_operands(q: Tensor, k: Tensor, k_beta: Tensor, decay: Decay) -> tuple[Tensor, Tensor]:
    """Return decayed ``[q; beta k]`` ``[M', 4, 32, K]`` and decayed k ``[M', 4, 16, K]`` of every tile and level."""
    tile = decay.tile
    rows = torch.cat((tiles(q)[:, None] * tile, tiles(k_beta)[:, None] * tile), 2)
    return rows, tiles(k)[:, None] * tile


def _level_operands(
    q: Tensor, k: Tensor, k_beta: Tensor, row_decay: Tensor, column_decay: Tensor, m: int
) -> tuple[Tensor, Tensor]:
    """Return decayed ``[q; beta k] [M, n, 2m, K]`` of right blocks and decayed ``k [M, n, m, K]`` of left ones."""
    rows = torch.cat((pairs(q, m)[1] * row_decay, pairs(k_beta, m)[1] * row_decay), 2)
    return rows, pairs(k, m)[0] * column_decay


def _diagonal_blocks(x: Tensor, n: int) -> Tensor:
    """Return the n diagonal blocks of 16 rows of ``[M, C, C]`` as ``[M * n, 16, 16]``."""
    blocks = x.unflatten(1, (n, TILE_SIZE)).unflatten(-1, (n, TILE_SIZE))
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)


def _cross_blocks(x: Tensor, m: int) -> Tensor:
    """Return the blocks of ``[M, C, C]`` that cross from left columns to right rows, ``[M, n, m, m]``."""
    n = x.shape[-1] // (2 * m)
    blocks = x.unflatten(1, (n, 2, m))[:, :, 1].unflatten(-1, (n, 2, m))[..., 0, :]
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
