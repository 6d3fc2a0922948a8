"""Triton kernels and their launchers; the only room that imports Triton, itself imported inside functions only."""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise RuntimeError(
        "hybrid_flex: operators on a CUDA device must have Triton, which is not installed; "
        "install it with `pip install triton`, or move the tensors to the CPU"
    ) from error
