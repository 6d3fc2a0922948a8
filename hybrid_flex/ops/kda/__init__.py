"""Kimi Delta Attention operators."""

from . import training as training  # registers an operator
from .chunk import chunk_kda
from .gate import kda_gate
from .gated_norm import gated_rms_norm
from .recurrent import fused_recurrent_kda, kda_decode, kda_step
from .reference import kda_reference
from .short_conv import short_conv

__all__ = [
    "chunk_kda",
    "fused_recurrent_kda",
    "gated_rms_norm",
    "kda_decode",
    "kda_gate",
    "kda_reference",
    "kda_step",
    "short_conv",
]
