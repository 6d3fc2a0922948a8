"""Every kernel compiles, on any machine, for each family of GPUs that Triton serves, and fits its shared memory."""

from __future__ import annotations

import importlib
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

# What one block may use (CUDA programming guide, compute capabilities); what 8.0 runs, 8.6 and 8.9 run with less.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
TYPES |= {torch.float8_e4m3fn: "fp8e4nv", torch.uint8: "u8"}
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def launches(architecture: int) -> list[Launch]:
    """Collect what every_kernel.py launches on an architecture; nothing runs, so the results are garbage."""
    found: dict[str, Launch] = {}

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        from every_kernel import chunked, others, sparse

        from hybrid_flex.kernels import launch

        kda = ("chunk", "training", "recurrent", "short_conv", "gated_norm")
        dsa = ("indexer", "attention", "indexer_loss", "pooling", "block_mask")
        for name in (*(f"kda.{name}" for name in kda), *(f"dsa.{name}" for name in dsa)):
            patch.setattr(importlib.import_module(f"hybrid_flex.ops.{name}"), "has_kernels", lambda x: True)
        chunk = importlib.import_module("hybrid_flex.kernels.kda.chunk")
        halves = lambda plan: chunk.cut(plan.chunks_per_sequence, 2 if plan.map is None else 1)  # noqa: E731
        patch.setattr(chunk, "_segments", halves)
        limits = lambda device: (SHARED_BYTES[architecture], architecture // 10)  # noqa: E731
        for name in ("topk", "gather", "gather_backward", "masked", "loss"):
            patch.setattr(importlib.import_module(f"hybrid_flex.kernels.dsa.{name}"), "device_limits", limits)
        every = [found for run in (chunked, others, sparse) for found in launch.compilations(lambda: run("cpu"))]  # noqa: B023
    for compilation in every:
        kernel, args, kwargs = compilation.func.__self__, compilation.args, dict(compilation.keywords)
        del kwargs["grid"]
        if architecture < 89 and any(isinstance(x, Tensor) and x.dtype == torch.float8_e4m3fn for x in args):
            continue  # the operator refuses eight bits there
        types = [(x.dtype,) if isinstance(x, Tensor) else type(x) for x in args]
        name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
        found[f"{name} {types} {sorted(kwargs.items())}"] = (kernel, args, kwargs)
    return list(found.values())


def compiled(launch: Launch, architecture: int) -> tuple[str, int]:
    """Compile one launch; return the kernel's name and the bytes of shared memory it takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, args, kwargs = launch
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in options}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], attributes[(i,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return kernel.fn.__name__, binary.metadata.shared


GATHER = {"H": 64, "HKV": 1, "V": 512}
MASKED = {"D": 128, "H": 32, "HKV": 8, "BG": 4, "BM": 128, "BN": 64}
# Kernels in Gluon, and constants.
HOPPER = [
    ("gather_hopper", {"D": 512, **GATHER}),
    ("gather_hopper", {"D": 576, **GATHER}),
    ("masked_hopper", MASKED),
    ("masked_hopper", {**MASKED, "D": 64}),
    ("masked_hopper", {**MASKED, "HKV": 16, "BG": 2}),
    ("masked_hopper", {**MASKED, "H": 100, "HKV": 1, "BG": 128}),
    ("masked_backward_hopper", MASKED),
    ("masked_backward_hopper", {**MASKED, "D": 64}),
    ("masked_backward_hopper", {**MASKED, "H": 100, "HKV": 1, "BG": 128}),
]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_every_kernel_compiles(architecture: int, kernel_names: set[str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        sizes = list(pool.map(lambda launch: compiled(launch, architecture), launches(architecture)))
    assert not [(name, size) for name, size in sizes if size > SHARED_BYTES[architecture]]
    assert kernel_names - {f"{kernel}_kernel" for kernel, _ in HOPPER} == {name for name, _ in sizes}


def compiled_for_hopper(kernel: str, sizes: dict[str, int]) -> Any:
    """Compile a kernel in Gluon."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    function = getattr(importlib.import_module(f"hybrid_flex.kernels.dsa.{kernel}"), f"{kernel}_kernel")
    given = {"scale": "fp32", **{f"p_{name}": "*bf16" for name in ("q", "k", "v", "o", "do", "dq")}}
    given |= {f"p_{name}": "*fp32" for name in ("lse", "dlse", "dk", "dv")}
    given |= {f"p_{name}": "*i32" for name in ("slots", "bits", "number", "keys")}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        name = parameter.name
        signature[name] = "constexpr" if parameter.is_constexpr else given.get(name, "i32")
        if parameter.is_constexpr:
            constants[(i,)] = sizes[name]
        elif name.startswith(("p_", "q_", "k_", "v_", "do_")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.parametrize(("kernel", "sizes"), HOPPER, ids=str)
def test_the_hopper_kernels_compile(kernel: str, sizes: dict[str, int]) -> None:
    """Gluon is an experiment of Triton's, so these are compiled every time.

    What partitions are given may lie where the threads have just handed something around: between the two they meet.
    """
    binary = compiled_for_hopper(kernel, sizes)
    assert binary.metadata.shared <= SHARED_BYTES[90]
    read: set[str] = set()
    begun = binary.asm["ptx"].index("mbarrier.init")
    for line in binary.asm["ptx"][begun : binary.asm["ptx"].index("barrier.sync", begun)].splitlines():
        place = re.search(r"\[\s*(global_smem\+?\d*)", line)
        if "bar.sync" in line:
            read.clear()
        elif place and "ld.shared" in line:
            read.add(place[1])
        elif place and "st.shared" in line:
            assert place[1] not in read, line


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 128])
def test_weights_do_not_wait_for_products(D: int, tmp_path: Path) -> None:
    """In the masked kernel's loops exponentials stand before the wait for products, and nothing is spilled."""
    (tmp_path / "kernel.cubin").write_bytes(compiled_for_hopper("masked_hopper", {**MASKED, "D": D}).asm["cubin"])
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    listing = subprocess.run((program, "-c", tmp_path / "kernel.cubin"), capture_output=True, text=True, check=True)
    lines, labels, loops = [], {}, []
    for line in listing.stdout.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif operation := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?(\S+)", line):
            lines.append(operation[1])
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if target and target[1] in labels:
                loops.append(lines[labels[target[1]] :])
    # A loop over tiles has one product of logits and one of sums, and waits once for both.
    loops = [x for x in loops if sum(op.startswith("WARPGROUP.DEPBAR") for op in x) == 1 and "SHFL.BFLY" in x]
    assert len(loops) == 2
    for loop in loops:
        wait = next(i for i, op in enumerate(loop) if op.startswith("WARPGROUP.DEPBAR"))
        assert sum(op == "MUFU.EX2" for op in loop[:wait]) >= 32
        assert not [op for op in loop if op.startswith(("LDL", "STL"))]
