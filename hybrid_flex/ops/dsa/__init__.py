"""DeepSeek Sparse Attention: lightning indexer, block masks, attention over a selection, indexer loss."""

from hybrid_flex.ops.dsa import flex as _flex  # noqa: F401  (registers its operator)
from hybrid_flex.ops.dsa import masked as _masked  # noqa: F401  (registers its operator)
from hybrid_flex.ops.dsa import traced as _traced  # noqa: F401  (registers plain forms)
from hybrid_flex.ops.dsa.attention import sparse_attention
from hybrid_flex.ops.dsa.block_mask import block_topk_mask, topk_block_mask
from hybrid_flex.ops.dsa.indexer import lightning_scores, lightning_topk
from hybrid_flex.ops.dsa.indexer_loss import indexer_kl_loss
from hybrid_flex.ops.dsa.pages import paged_rows
from hybrid_flex.ops.dsa.pooling import expand_pools, pool_index_keys
from hybrid_flex.ops.dsa.rope import RopeLayout, apply_rope, rope_cos_sin

__all__ = [
    "RopeLayout",
    "apply_rope",
    "block_topk_mask",
    "expand_pools",
    "indexer_kl_loss",
    "lightning_scores",
    "lightning_topk",
    "paged_rows",
    "pool_index_keys",
    "rope_cos_sin",
    "sparse_attention",
    "topk_block_mask",
]
