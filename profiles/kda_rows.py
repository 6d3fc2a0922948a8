"""The rows of kda.py: their inputs, one call of an operator on them, and the proof that the call is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import relative_error
from torch import Tensor

from hybrid_flex.ops import chunk_kda, kda_reference

OURS, PEER = "hybrid_flex", "fla"
Operator = Callable[..., Any]
Tensors = dict[str, Tensor]
Inputs = dict[str, Tensor | None]

# NOTE [Bounds]: fla's own tests allow these ratios ||x - ref|| / ||ref||; bfloat16 outputs alone cost 0.0017.  A_log
# and dt_bias are leaves of g's gradient and share its bound.
BOUNDS = {"o": 0.005, "state": 0.005, "dq": 0.008, "dk": 0.008, "dv": 0.008, "dS0": 0.008}
BOUNDS |= dict.fromkeys(("dg", "dbeta", "dA_log", "d_dt_bias"), 0.02)
GRADIENTS = {"q": "dq", "k": "dk", "v": "dv", "g": "dg", "beta": "dbeta"}
GRADIENTS |= {"A_log": "dA_log", "dt_bias": "d_dt_bias", "initial_state": "dS0"}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    T: int
    H: int
    B: int = 1
    HV: int = 0
    """Value heads; 0 means H."""
    head_dim: int = 128
    lower_bound: float | None = -5.0
    state: bool = False
    """Whether a state goes in, and its gradient and that of the final state count."""
    lengths: tuple[int, ...] = ()
    few_tokens: bool = False
    """Whether launching takes longer than the work, so that calls start on an idle device."""
    target_ms: float | None = None
    target_gib: float | None = None

    @property
    def backward(self) -> bool:
        return self.name.startswith("train")

    @property
    def decode(self) -> bool:
        return self.name.startswith("decode")

    @property
    def graph(self) -> bool:
        return self.name.endswith("_graph")

    @property
    def value_heads(self) -> int:
        return self.HV or self.H

    @property
    def num_states(self) -> int:
        return len(self.lengths) or self.B

    @property
    def state_bytes(self) -> int:
        """Bytes of float32 state read and written by a decoding step."""
        return 2 * 4 * self.num_states * self.value_heads * self.head_dim**2

    @property
    def judged_heads(self) -> list[int]:
        """Query heads that are compared; not the first one alone, whose offsets are zero."""
        return sorted({self.H // 3, self.H - 1})

    def quick(self) -> Row:
        """Return the row with the same features and hardly any work."""
        lengths = tuple(n // 16 for n in self.lengths)
        T = sum(lengths) or max(self.T // 128, 1)
        shrink = max(self.H // 4, 1)
        sizes = {"B": min(self.B, 2), "T": T, "H": self.H // shrink, "HV": self.HV // shrink, "lengths": lengths}
        return replace(self, **sizes, target_ms=None, target_gib=None)  # type: ignore[arg-type]


PACKED = (1300, 547, 2048, 963, 271, 3063)
DECODE_TARGET_MS = 2 * 4 * 256 * 32 * 128**2 / 2.8e12 * 1e3
"""2.8 TB/s of state, read and written."""
# The targets are for an H100 80GB and come from fla 0.6 and FlashKDA measured there.
ROWS = (
    Row("fwd_lb_t8192_h96", 8192, 96, target_ms=1.3),
    Row("fwd_softplus_t8192_h96", 8192, 96, lower_bound=None, target_ms=1.5),
    Row("train_lb_t8192_h96", 8192, 96, target_ms=7.3, target_gib=4.0),
    Row("train_softplus_t8192_h96", 8192, 96, lower_bound=None, target_ms=8.5),
    Row("fwd_lb_t8192_h64", 8192, 64, target_ms=0.95),
    Row("fwd_lb_t32768_h32", 32768, 32, target_ms=2.0),
    Row("train_lb_t32768_h32", 32768, 32, target_ms=9.6),
    Row("fwd_lb_b4_t4096_h32", 4096, 32, B=4, target_ms=0.8),
    Row("train_lb_b4_t4096_h32", 4096, 32, B=4, target_ms=4.8),
    Row("decode_b256_h32", 1, 32, B=256, state=True, target_ms=DECODE_TARGET_MS),
    Row("decode_b256_h32_graph", 1, 32, B=256, state=True, target_ms=DECODE_TARGET_MS),
    Row("decode_b1_h32", 1, 32, state=True, few_tokens=True),
    Row("decode_b1_h32_graph", 1, 32, state=True, target_ms=0.02),
    Row("fwd_lb_t1024_h4", 1024, 4, few_tokens=True),
    Row("fwd_lb_t1024_h4_graph", 1024, 4),
    Row("train_lb_t1024_h4", 1024, 4, few_tokens=True),
    Row("train_lb_t1024_h4_graph", 1024, 4),
    Row("fwd_lb_packed_h64", sum(PACKED), 64, lengths=PACKED),
    Row("fwd_lb_packed_h96", sum(PACKED), 96, lengths=PACKED),
    Row("train_lb_packed_h64", sum(PACKED), 64, lengths=PACKED),
    Row("train_lb_packed_h96", sum(PACKED), 96, lengths=PACKED),
    Row("fwd_lb_d64_t8192_h96", 8192, 96, head_dim=64),
    Row("train_lb_d64_t8192_h96", 8192, 96, head_dim=64),
    Row("fwd_lb_t8192_h16_hv32", 8192, 16, HV=32),
    Row("train_lb_t8192_h16_hv32", 8192, 16, HV=32),
    Row("train_lb_state_b4_t4096_h32", 4096, 32, B=4, state=True),
    *(Row(f"{work}_lb_t{T}_h32", T, 32) for T in (2048, 8192, 131072, 262144) for work in ("fwd", "train")),
)


def make_inputs(row: Row, device: torch.device, seed: int) -> Inputs:
    """Draw everything a call reads; ``d_o`` and ``d_final`` are the gradients handed to the backward."""
    B, T, H, HV, D = row.B, row.T, row.H, row.value_heads, row.head_dim
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def uniform(low: float, high: float, size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator, device=device)

    q, k, v, g = (normal(B, T, heads, D) for heads in (H, H, HV, HV))
    time_step = uniform(-6.907755, -2.302585, HV * D).exp()  # log 1e-3 to log 1e-1
    bounds = torch.tensor((0, *row.lengths), device=device).cumsum(0) if row.lengths else None
    with_gradient = {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "beta": normal(B, T, HV),
        "A_log": uniform(1, 16, HV).log(),
        "dt_bias": time_step + torch.log(-torch.expm1(-time_step)),
        "initial_state": normal(row.num_states, HV, D, D, dtype=torch.float32) if row.state else None,
    }
    for tensor in with_gradient.values():
        if tensor is not None and row.backward:
            tensor.requires_grad_()
    d_o = normal(B, T, HV, D) if row.backward else None
    d_final = normal(row.num_states, HV, D, D, dtype=torch.float32) if row.backward and row.state else None
    return {**with_gradient, "cu_seqlens": bounds, "d_o": d_o, "d_final": d_final}


def run(operator: Operator, row: Row, x: Inputs) -> Tensors:
    """Do the work of a row once: ``o``, ``state`` and, with a backward, every gradient by its name."""
    arguments = {name: tensor for name, tensor in x.items() if name not in ("d_o", "d_final")}
    options: dict[str, Any] = {"lower_bound": row.lower_bound}
    if not row.decode:
        options["safe_gate"] = row.lower_bound is not None
    inside = {f"use_{part}_in_kernel": True for part in ("qk_l2norm", "gate", "beta_sigmoid")}
    with torch.set_grad_enabled(row.backward):
        o, state = operator(**arguments, **options, **inside, output_final_state=True)
    if not row.backward:
        return {"o": o, "state": state}
    wanted = {name: tensor for name in GRADIENTS if (tensor := x[name]) is not None}
    outputs, d_outputs = ((o, state), (x["d_o"], x["d_final"])) if row.state else ((o,), (x["d_o"],))
    grads = torch.autograd.grad(outputs, list(wanted.values()), d_outputs)
    return {"o": o.detach(), "state": state.detach()} | {
        GRADIENTS[name]: grad for name, grad in zip(wanted, grads, strict=True)
    }


def of_head(name: str, tensor: Tensor, head: int, row: Row) -> Tensor:
    """Slice out what belongs to query head ``head`` and its group of value heads."""
    group = row.value_heads // row.H
    values = slice(head * group, (head + 1) * group)
    if name in ("q", "k", "dq", "dk"):
        return tensor[:, :, head : head + 1]
    if name in ("v", "g", "beta", "o", "d_o", "dv", "dg", "dbeta"):
        return tensor[:, :, values]
    if name in ("initial_state", "d_final", "state", "dS0"):
        return tensor[:, values]
    if name in ("A_log", "dA_log", "dt_bias", "d_dt_bias"):
        return tensor.reshape(row.value_heads, -1)[values].flatten()
    return tensor


# NOTE [Float64 reference]: `chunk_kda` in float64 takes its plain torch form on every device, which `check_reference`
# compares with the recurrence token by token before the first row.  Heads do not mix, so single heads cut out of the
# same inputs are exact; they go one at a time, whole length, which bounds the memory at a quarter million tokens.


def judge(row: Row, x: Inputs, kept: dict[str, dict[int, Tensors]]) -> dict[str, dict[str, float]]:
    """Return the relative errors of every contender's ``kept[contender][head]``, by the tensor's name."""
    squares: dict[str, dict[str, list[float]]] = {contender: {} for contender in kept}
    for head in row.judged_heads:
        exact_x: Inputs = dict(x)
        for name, tensor in x.items():
            if tensor is not None and name != "cu_seqlens":
                part = of_head(name, tensor.detach(), head, row).double()
                exact_x[name] = part.requires_grad_(tensor.requires_grad)
        exact = run(chunk_kda, row, exact_x)
        for contender, heads in kept.items():
            for name, value in exact.items():
                sums = squares[contender].setdefault(name, [0.0, 0.0])
                sums[0] += float((heads[head][name].double() - value).square().sum())
                sums[1] += float(value.square().sum())
    return {
        contender: {name: (difference / whole) ** 0.5 for name, (difference, whole) in sums.items()}
        for contender, sums in squares.items()
    }


def check_reference(device: torch.device) -> float:
    """Compare float64 `chunk_kda` with the recurrence, gradients included; return the largest relative error."""
    worst = 0.0
    for lower_bound in (-5.0, None):
        row = Row("train", 150, 2, HV=4, head_dim=16, lower_bound=lower_bound, state=True, lengths=(70, 0, 80))
        x = make_inputs(row, device, seed=1)
        for name, tensor in x.items():
            if tensor is not None and name != "cu_seqlens":
                x[name] = tensor.detach().double().requires_grad_(tensor.requires_grad)

        def recurrence(*, safe_gate: bool, **arguments: Any) -> tuple[Tensor, Tensor | None]:
            return kda_reference(**arguments)

        expected = run(recurrence, row, x)
        for name, tensor in run(chunk_kda, row, x).items():
            worst = max(worst, relative_error(tensor, expected[name]))
    if not worst < 1e-10:
        raise RuntimeError(f"chunk_kda in float64 must agree with kda_reference to 1e-10, got {worst:.1e}")
    return worst
