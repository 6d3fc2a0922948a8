"""Triton kernels of Kimi Delta Attention."""
