"""Operators: importing this package registers every ``hybrid_flex::`` operator with torch.library."""

from .kda import (
    chunk_kda,
    fused_recurrent_kda,
    gated_rms_norm,
    kda_gate,
    kda_reference,
    kda_step,
    short_conv,
)

__all__ = [
    "chunk_kda",
    "fused_recurrent_kda",
    "gated_rms_norm",
    "kda_gate",
    "kda_reference",
    "kda_step",
    "short_conv",
]
