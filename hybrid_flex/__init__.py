"""hybrid_flex: attention layers that mix Kimi Delta Attention and DeepSeek Sparse Attention, native to torch.compile.

Letters of the shapes in every docstring: B batch, T query tokens, S key tokens, D model width, H heads, HV value
heads, Hkv key/value heads, K and V head widths, C chunk, N packed sequences, HI and DI indexer heads and width, J
selected tokens.  Tensors are token-major, ``[B, T, H, K]``.  Importing this package registers every
``hybrid_flex::`` operator.
"""

from hybrid_flex import export, ops, profiling
from hybrid_flex.layers import (
    CausalAttention,
    DeepSeekSparseAttention,
    DeepSeekSparseMLA,
    DSACache,
    DSAState,
    KDAState,
    KimiDeltaAttention,
    KVCache,
    KVState,
    LightningIndexer,
    ParallelHybrid,
    SequentialHybrid,
)
from hybrid_flex.models import HybridBlock, HybridConfig, HybridLanguageModel, LayerWiseHybrid

__all__ = [
    "CausalAttention",
    "DSACache",
    "DSAState",
    "DeepSeekSparseAttention",
    "DeepSeekSparseMLA",
    "HybridBlock",
    "HybridConfig",
    "HybridLanguageModel",
    "KDAState",
    "KVCache",
    "KVState",
    "KimiDeltaAttention",
    "LayerWiseHybrid",
    "LightningIndexer",
    "ParallelHybrid",
    "SequentialHybrid",
    "export",
    "ops",
    "profiling",
]
