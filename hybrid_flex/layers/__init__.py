"""Layers: parameters, initialisation and state around the operators; a mixer is ``forward(x, state) -> (y, state)``."""

from hybrid_flex.layers.cache import DSACache, KVCache
from hybrid_flex.layers.dense import CausalAttention
from hybrid_flex.layers.dsa import DeepSeekSparseAttention
from hybrid_flex.layers.hybrid import HybridState, ParallelHybrid, SequentialHybrid
from hybrid_flex.layers.indexer import LightningIndexer
from hybrid_flex.layers.kda import KimiDeltaAttention
from hybrid_flex.layers.mla import DeepSeekSparseMLA
from hybrid_flex.layers.mlp import SwiGLU
from hybrid_flex.layers.state import DSAState, KDAState, KVState

__all__ = [
    "CausalAttention",
    "DSACache",
    "DSAState",
    "DeepSeekSparseAttention",
    "DeepSeekSparseMLA",
    "HybridState",
    "KDAState",
    "KVCache",
    "KVState",
    "KimiDeltaAttention",
    "LightningIndexer",
    "ParallelHybrid",
    "SequentialHybrid",
    "SwiGLU",
]
