"""Operators: importing this package registers every ``hybrid_flex::`` operator with torch.library."""

from .dsa import (
    RopeLayout,
    apply_rope,
    block_topk_mask,
    expand_pools,
    indexer_kl_loss,
    lightning_scores,
    lightning_topk,
    paged_rows,
    pool_index_keys,
    rope_cos_sin,
    sparse_attention,
    topk_block_mask,
)
from .kda import (
    chunk_kda,
    fused_recurrent_kda,
    gated_rms_norm,
    kda_decode,
    kda_gate,
    kda_reference,
    kda_step,
    short_conv,
)

__all__ = [
    "RopeLayout",
    "apply_rope",
    "block_topk_mask",
    "chunk_kda",
    "expand_pools",
    "fused_recurrent_kda",
    "gated_rms_norm",
    "indexer_kl_loss",
    "kda_decode",
    "kda_gate",
    "kda_reference",
    "kda_step",
    "lightning_scores",
    "lightning_topk",
    "paged_rows",
    "pool_index_keys",
    "rope_cos_sin",
    "short_conv",
    "sparse_attention",
    "topk_block_mask",
]
