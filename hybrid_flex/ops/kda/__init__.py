"""Kimi Delta Attention operators."""

from .chunk import chunk_kda
from .gate import kda_gate
from .recurrent import fused_recurrent_kda, kda_step
from .reference import kda_reference

__all__ = ["chunk_kda", "fused_recurrent_kda", "kda_gate", "kda_reference", "kda_step"]
