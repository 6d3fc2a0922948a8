"""Profiling: traces that TensorBoard shows, and names for the ranges in them."""

from hybrid_flex.profiling.trace import range, trace

__all__ = ["range", "trace"]
