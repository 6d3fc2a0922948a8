"""Triton kernels of DeepSeek Sparse Attention."""
