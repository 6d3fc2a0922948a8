"""The measured limits: of the right size, never in less time than the work that they stand for."""

from __future__ import annotations

import time

import pytest
import torch

from hybrid_flex import profiling


def test_the_limits_of_this_machine() -> None:
    begin = time.perf_counter()
    found = profiling.measure_roofline(seconds=0.2)
    assert time.perf_counter() - begin < 5
    assert (found.device, found.dtype) == ("cpu", "float32")
    # Of any machine that runs this: more than a calculator, less than a cluster.
    assert 1e8 < found.flop_per_s < 1e14 and 1e8 < found.bytes_per_s < 1e13

    x = torch.randn(1024, 1024)
    torch.mm(x, x)
    begin = time.perf_counter()
    torch.mm(x, x)
    took = time.perf_counter() - begin
    assert found.seconds(2 * 1024**3, 3 * x.numel() * 4) < 3 * took, "the limit is no slower than one product"


def test_least_time_is_the_longer_of_the_two() -> None:
    limits = profiling.Roofline("cpu", "float32", 100.0, 10.0)
    assert limits.seconds(200, 5) == 2 and limits.seconds(10, 50) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    found = profiling.measure_roofline("cpu", dtype, seconds=0.02)
    assert found.dtype == str(dtype).removeprefix("torch.") and found.flop_per_s > 0


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("meta",), ValueError, "measure_roofline: device must be one of 'cpu', 'cuda', got 'meta'"),
        (("cpu", torch.int8), TypeError, "measure_roofline: dtype must be one of torch.bfloat16, torch.float16, "),
    ],
)
def test_messages(arguments: tuple, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        profiling.measure_roofline(*arguments)
    assert str(caught.value).startswith(message)
    with pytest.raises(ValueError, match=r"seconds must be positive, got 0"):
        profiling.measure_roofline(seconds=0)


@pytest.mark.gpu
def test_a_gpu_is_faster_than_its_memory() -> None:
    found = profiling.measure_roofline("cuda", torch.bfloat16)
    assert found.device == "cuda" and found.flop_per_s > 10 * found.bytes_per_s > 1e11
