"""DeepSeek Sparse Attention: lightning indexer, block masks, attention over a selection, indexer loss."""

from hybrid_flex.ops.dsa.attention import sparse_attention
from hybrid_flex.ops.dsa.indexer import lightning_scores, lightning_topk
from hybrid_flex.ops.dsa.pooling import expand_pools, pool_index_keys
from hybrid_flex.ops.dsa.rope import RopeLayout, apply_rope, rope_cos_sin

__all__ = [
    "RopeLayout",
    "apply_rope",
    "expand_pools",
    "lightning_scores",
    "lightning_topk",
    "pool_index_keys",
    "rope_cos_sin",
    "sparse_attention",
]
