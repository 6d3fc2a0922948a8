"""What a layer remembers between calls: one small dataclass per kind of layer, registered with torch.export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KDAState:
    """Hold everything a KDA layer knows about the past, in a size that does not grow with it.

    Attributes:
        S: recurrent matrix ``[N, HV, K, V]``, float32 whatever the layer's dtype.
        conv_q: last ``W - 1`` inputs of the query convolution, oldest first, ``[N, W - 1, H * K]``.
        conv_k: the same of the keys, ``[N, W - 1, H * K]``.
        conv_v: the same of the values, ``[N, W - 1, HV * V]``.

    Example:
        >>> import hybrid_flex
        >>> state = hybrid_flex.KimiDeltaAttention(32, num_heads=2, head_dim=16).init_state(3)
        >>> state.S.shape, state.conv_q.shape
        (torch.Size([3, 2, 16, 16]), torch.Size([3, 3, 32]))
    """

    S: Tensor
    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor


@dataclass
class DSAState:
    """Hold the cache of a sparse attention layer; it grows by one row per token.

    Attributes:
        kv: keys and values of the past, ``[B, S, Hkv, D + Dv]`` (keys first), or latent and rotated part
            ``[B, S, 1, kv_lora_rank + rope_dim]`` (latent first) under MLA.
        index_keys: the indexer's keys, ``[B, S, DI]``; with pooled keys ``[B, S, 2 * DI]``, key then pooling gate of
            every token, so that the incomplete last pool can be finished later; ``[B, S, 0]`` in a layer without an
            indexer.

    Example:
        >>> import hybrid_flex
        >>> layer = hybrid_flex.DeepSeekSparseAttention(32, num_heads=2, topk=4, index_heads=2, index_head_dim=8)
        >>> state = layer.init_state(3)
        >>> state.kv.shape, state.index_keys.shape
        (torch.Size([3, 0, 2, 32]), torch.Size([3, 0, 8]))
    """

    kv: Tensor
    index_keys: Tensor


@dataclass
class KVState:
    """Hold the cache of a dense attention layer: ``kv`` is ``[B, S, Hkv, 2 * D]``, keys then values."""

    kv: Tensor


for _state in (KDAState, DSAState, KVState):
    torch.export.register_dataclass(_state, serialized_type_name=f"hybrid_flex.{_state.__name__}")
    # Tensors and nothing else: `torch.load` reads saved states without being told to trust the file.
    torch.serialization.add_safe_globals([_state])


def check_state(op: str, field: str, tensor: Tensor, shape: Sequence[int | None], num_sequences: int) -> None:
    """Raise ValueError unless a state's ``tensor`` belongs to ``num_sequences`` sequences and this layer's ``shape``.

    The sizes are formatted only on failure: formatting a symbolic size would fix it in a compiled graph.
    """
    if tensor.dim() != len(shape):
        raise ValueError(f"{op}: {field} must be a tensor of rank {len(shape)}, got shape {tuple(tensor.shape)}")
    if tensor.shape[0] != num_sequences:
        raise ValueError(
            f"{op}: state must hold {num_sequences} sequences, as many as the input, got {tensor.shape[0]} in {field}"
        )
    for size, want in zip(tensor.shape[1:], shape[1:], strict=True):
        if want is not None and size != want:
            wanted = ", ".join("*" if s is None else str(s) for s in shape[1:])
            raise ValueError(f"{op}: {field} must be [N, {wanted}], got shape {tuple(tensor.shape)}")
