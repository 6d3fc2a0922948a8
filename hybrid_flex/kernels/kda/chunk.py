"""Launchers of the chunked form of Kimi Delta Attention: workspace, tile sizes, the order of the kernels.

forward:   prepare, near and far -> scan
backward:  prepare, near and far -> scan, which leaves the states -> scan back -> triangle -> inputs, near and far

The backward begins from the raw inputs and the output, and from A and Aqk of every chunk where the forward kept them:
256 bytes per token and value head with chunks of 64 rows in 16 bits.  Without them it computes them again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_flex.checks import is_plain
from hybrid_flex.kernels.launch import (
    NARROWEST,
    compile_ahead,
    computed_once,
    launchable,
    next_power_of_2,
    on_its_device,
    product_precision,
)

from .decay import exponent_table
from .far import far_inputs_kernel
from .gradients import near_inputs_kernel, triangle_kernel
from .packing import ChunkMap, chunk_map
from .prepare import prepare_far_kernel, prepare_kernel
from .scan import scan_backward_kernel, scan_kernel
from .segments import Segments, cut, join_kernel, num_segments

# NOTE [Slices of 64]
# Kernels of 4 warps and 64 rows work on 64 columns of K or V at a time: with more, registers spill.  Not fewer either:
# NOTE [Narrow products] in launch.py.
SLICE = NARROWEST
FAR_GROUP = 4
"""Chunks that a block looks through for far rows: 12,288 blocks with nothing to do take 0.03 ms on one H100."""


class _Plan(NamedTuple):
    """Sizes that every kernel of a call shares, and the arguments that say which gate and norms are inside, and how
    decays are anchored."""

    raw: Any
    """The operator's tensors q, k, v, g, beta, A_log, dt_bias, contiguous, and its flags."""
    cu_seqlens: Tensor | None
    map: ChunkMap | None
    table: Tensor
    num_sequences: int
    num_chunks: int
    chunks_per_sequence: int
    sizes: dict[str, int]
    gate: dict[str, Any]


def _most_rows(width: int, element_size: int) -> int:
    """Return how many rows of a chunk one block of threads can hold in shared memory and registers."""
    row_bytes = width * element_size
    return 16 if row_bytes > 512 else 32 if row_bytes > 256 or element_size > 2 else 64


def _padded(width: int) -> int:
    """Return the width that K or V is padded to."""
    return max(SLICE, next_power_of_2(width))


def _chunk_rows(raw: Any, chunk_size: int) -> int:
    width = _padded(max(int(raw.k.shape[-1]), int(raw.v.shape[-1])))
    return min(chunk_size, _most_rows(width, raw.q.element_size()))


def _num_chunks(raw: Any, cu_seqlens: Tensor | None, C: int) -> int:
    """Return how many chunks there are, or places for them where sequences are packed."""
    B, T = raw.q.shape[:2]
    return B * ((T + C - 1) // C) if cu_seqlens is None else T // C + cu_seqlens.shape[0] - 1


def _plan(raw: Any, cu_seqlens: Tensor | None, chunk_size: int) -> _Plan:
    (B, T), (H, K, HV, V) = raw.q.shape[:2], (int(n) for n in (*raw.q.shape[2:], *raw.v.shape[2:]))
    BK, WV, C = _padded(K), _padded(V), _chunk_rows(raw, chunk_size)
    raw = raw._replace(
        **{name: computed_once(getattr(raw, name).contiguous()) for name in ("q", "k", "v", "g", "beta")},
        A_log=None if raw.A_log is None else raw.A_log.contiguous(),
        dt_bias=None if raw.dt_bias is None else raw.dt_bias.contiguous(),
    )
    if cu_seqlens is None:
        N, NT, places = B, (T + C - 1) // C, None
    else:
        cu_seqlens = cu_seqlens.contiguous()
        N, NT, places = cu_seqlens.shape[0] - 1, 0, chunk_map(cu_seqlens, T, C)
    lower = raw.gate and raw.lower_bound is not None
    gate = {
        "GATE": raw.gate,
        "LOWER": lower,
        "HAS_SLOPE": raw.A_log is not None,
        "HAS_BIAS": raw.dt_bias is not None,
        "L2NORM": raw.l2norm,
        "SIGMOID": raw.sigmoid,
        "FACTOR": 2.0 if raw.neg_eigval else 1.0,
        "PACKED": cu_seqlens is not None,
        "PRECISION": product_precision(raw.q),
    }
    sizes = {"H": H, "HV": HV, "K": K, "V": V, "C": C, "BK": BK, "WV": WV}
    gate |= _anchor(raw, C)
    table = exponent_table(C, gate["TILE"], raw.q)
    return _Plan(raw, cu_seqlens, places, table, N, _num_chunks(raw, cu_seqlens, C), NT, sizes, gate)


def _anchor(raw: Any, C: int) -> dict[str, Any]:
    """Tell whether chunks and tiles may take one anchor, whether tiles always do, their rows: NOTE [Tile anchor]."""
    anchor = raw.q.dtype == torch.bfloat16
    safe = anchor and raw.gate and raw.lower_bound is not None and raw.lower_bound >= -7
    tile_rows = min(C, 32) if anchor and not safe else 16
    shift, reach = (104, 220) if raw.l2norm else (80, 180)
    return {"ANCHOR": anchor, "SHIFT": shift, "RANGE": reach, "SAFE": safe, "TILE": tile_rows}


class _Workspace(NamedTuple):
    """What prepare.py writes, in blocks numbered ``chunk * HV + head``."""

    qg: Tensor
    kg: Tensor
    w: Tensor
    u: Tensor
    Aqk: Tensor
    total: Tensor
    strength: Tensor
    A: Tensor
    kk: Tensor
    norms: Tensor
    far: Tensor
    kc: Tensor


def _prepare(
    plan: _Plan, scale: float, *, for_backward: bool = False, keep: bool = False,
    kept: tuple[Tensor, Tensor] | None = None,
) -> _Workspace:  # fmt: skip
    """Run the first kernel.  ``keep`` asks for A; ``kept`` are A and Aqk of an earlier run."""
    raw, sizes = plan.raw, plan.sizes
    HV, C, BK, WV = sizes["HV"], sizes["C"], sizes["BK"], sizes["WV"]
    blocks = plan.num_chunks * HV

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=raw.q.dtype, device=raw.q.device)

    work = _Workspace(
        qg=empty(blocks, C, BK),
        kg=empty(blocks, C, BK),
        w=empty(blocks, C, BK),
        u=empty(blocks, C, WV),
        Aqk=empty(blocks, C, C) if kept is None else kept[1],
        total=torch.empty((blocks, BK), dtype=torch.float32, device=raw.q.device),
        strength=torch.empty((blocks, C), dtype=torch.float32, device=raw.q.device),
        A=empty(blocks if keep else 0, C, C) if kept is None else kept[0],
        kk=empty(blocks if for_backward and not raw.sigmoid else 0, C, C),
        norms=torch.empty((blocks, 2, C), dtype=torch.float32, device=raw.q.device),
        far=torch.empty((blocks, BK // SLICE), dtype=torch.int32, device=raw.q.device),
        kc=empty(blocks if BK > WV else 0, C, BK),
    )
    parameters, numbers = _or_q(plan, raw.A_log, raw.dt_bias), (scale, raw.lower_bound or 0.0, *_lengths(plan))
    keywords = {**sizes, **plan.gate, "SK": SLICE, "FOR_BACKWARD": for_backward, "KEEP": keep}
    keywords["KEPT"] = kept is not None
    launchable(prepare_kernel)[(blocks,)](
        raw.q, raw.k, raw.v, raw.g, raw.beta, *parameters, *_places(plan), plan.table, *work, *numbers,
        **_only(prepare_kernel, keywords), num_warps=4, num_stages=1,
    )  # fmt: skip
    qg, kg, w, u, Aqk, _, *others = work
    group = FAR_GROUP if plan.gate["ANCHOR"] else 1
    launchable(prepare_far_kernel)[((blocks + group - 1) // group,)](
        raw.q, raw.k, raw.v, raw.g, *parameters, *_places(plan), plan.table, qg, kg, w, u, Aqk, *others, *numbers,
        blocks, **_only(prepare_far_kernel, keywords), GROUP=group, num_warps=4, num_stages=1,
    )  # fmt: skip
    return work


@functools.cache
def _parameters(kernel: Any) -> frozenset[str]:
    return frozenset(kernel.arg_names)


def _only(kernel: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Return those of the keywords that a kernel takes."""
    parameters = _parameters(kernel)
    return {name: value for name, value in keywords.items() if name in parameters}


def _or_q(plan: _Plan, *tensors: Tensor | None) -> list[Tensor]:
    """Put q where a tensor is absent: a pointer that the kernel never reads."""
    return [plan.raw.q if t is None else t for t in tensors]


def _places(plan: _Plan) -> list[Tensor]:
    return _or_q(plan, *((None, None) if plan.map is None else plan.map[:2]))


def _lengths(plan: _Plan) -> tuple[int, int]:
    """Return T and the chunks of a sequence, which kernels find a chunk's rows by."""
    return plan.raw.q.shape[1], plan.chunks_per_sequence


def _stages(plan: _Plan) -> int:
    """Choose how many chunks ahead the scans load: as many, up to 3, as fit the device's shared memory.

    On one H100 at T 8192, H 96 three take 0.45 ms forward and 0.57 ms back, one takes 0.62 and 0.83.  The size is an
    upper bound read off compiled kernels of 16-bit inputs; float32 is bound by its arithmetic and takes one.
    """
    device, size = plan.raw.q.device, plan.raw.q.element_size()
    if device.type != "cuda" or size > 2:
        return 1
    C, BK = plan.sizes["C"], plan.sizes["BK"]
    stage_bytes = (3 * C * BK + C * SLICE + C * C) * size
    fixed_bytes = (BK + C) * SLICE * size + 4096
    limit_bytes = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return next((n for n in (3, 2) if n * stage_bytes + fixed_bytes <= limit_bytes), 1)


def _segments(plan: _Plan) -> Segments:
    """Cut sequences into segments where scans of whole ones would leave most of the device idle."""
    device, shape, NT = plan.raw.q.device, plan.raw.q.shape, plan.chunks_per_sequence
    # A graph of any length cannot choose by it.
    if plan.map is not None or device.type != "cuda" or not all(isinstance(n, int) for n in shape[:2]):
        return Segments(1, NT)
    blocks = plan.num_sequences * plan.sizes["HV"] * (plan.sizes["WV"] // SLICE)
    return cut(NT, num_segments(blocks, NT, torch.cuda.get_device_properties(device).multi_processor_count))


def _scan_arguments(plan: _Plan, segments: Segments) -> tuple[list[Any], dict[str, Any], int]:
    """Return trailing positional arguments and keywords that both scans take, and how many states there are."""
    sizes = {name: plan.sizes[name] for name in ("HV", "K", "V", "C", "BK", "WV")}
    stages = _stages(plan)
    tensors = _or_q(plan, plan.cu_seqlens, None if plan.map is None else plan.map.first)
    positional = [*tensors, *_lengths(plan), *segments]
    keywords = {**sizes, "BV": SLICE, **{name: plan.gate[name] for name in ("PACKED", "PRECISION")}}
    keywords |= {"UNIT": 2.0 ** -plan.gate["SHIFT"] if plan.gate["ANCHOR"] else 1.0}
    keywords |= {"STAGES": stages, "num_warps": 4, "num_stages": stages}
    return positional, keywords, plan.num_sequences * segments.count * sizes["HV"]


def _scan(
    plan: _Plan, work: _Workspace, segments: Segments, initial: Tensor | None, v_first: bool, *,
    o: Tensor | None = None, final: Tensor | None = None, states: Tensor | None = None, y: Tensor | None = None,
    transition: bool = False,
) -> None:  # fmt: skip
    """Run the scan forward, and leave its results where there is room for them."""
    positional, keywords, num_states = _scan_arguments(plan, segments)
    if transition:
        keywords |= {"V": keywords["K"], "WV": keywords["BK"]}
    launchable(scan_kernel)[(keywords["WV"] // SLICE * num_states,)](
        work.qg, work.kg, work.w, work.u, work.Aqk, work.total, work.strength,
        *_or_q(plan, initial, o, final, states, y), *positional, **keywords, HAS_INITIAL=initial is not None,
        V_FIRST=v_first, TRANSITION=transition, WRITE_O=o is not None, WRITE_FINAL=final is not None,
        WRITE_STATES=states is not None,
    )  # fmt: skip


def _scan_backward(
    plan: _Plan, work: _Workspace, segments: Segments, d_o: Tensor, d_final: Tensor | None, v_first: bool, *,
    d_states: Tensor | None = None, dv_new: Tensor | None = None, d_initial: Tensor | None = None,
) -> None:  # fmt: skip
    """Run the scan back, and leave its results where there is room for them."""
    positional, keywords, num_states = _scan_arguments(plan, segments)
    launchable(scan_backward_kernel)[(keywords["WV"] // SLICE * num_states,)](
        d_o, *_or_q(plan, d_final), work.qg, work.kg, work.w, work.Aqk, work.total, work.strength,
        *_or_q(plan, d_states, dv_new, d_initial), *positional, **keywords, HAS_FINAL=d_final is not None,
        HAS_INITIAL=d_initial is not None, V_FIRST=v_first, WRITE_STATES=d_states is not None,
    )  # fmt: skip


def _room(plan: _Plan, segments: Segments, v_first: bool, square: bool = False) -> Tensor:
    """Return memory for a state of each segment of each sequence, ``[N, segments, HV, K, V]`` (or V, K; or K, K)."""
    HV, K, V = (plan.sizes[name] for name in ("HV", "K", "V"))
    dims = (K, K) if square else (V, K) if v_first else (K, V)
    shape = (plan.num_sequences, segments.count, HV, *dims)
    return torch.empty(shape, dtype=torch.float32, device=plan.raw.q.device)


def _join(plan: _Plan, M: Tensor, N: Tensor, edge: Tensor | None, v_first: bool, back: bool) -> Tensor:
    """Return the states that segments begin with; back, the gradients of those they end with."""
    sizes, joined = plan.sizes, torch.empty_like(N)
    launchable(join_kernel)[(N.shape[0] * sizes["HV"] * (sizes["WV"] // SLICE),)](
        M, N, *_or_q(plan, edge), joined, N.shape[1], **_only(join_kernel, sizes), SK=SLICE, BV=SLICE, V_FIRST=v_first,
        HAS_EDGE=edge is not None, BACK=back, PRECISION="tf32x3", num_warps=4, num_stages=1,
    )  # fmt: skip
    return joined


def _beginnings(
    plan: _Plan, work: _Workspace, segments: Segments, initial: Tensor | None, v_first: bool
) -> tuple[Tensor, Tensor]:
    """Return M of every segment, and the state that it begins with: NOTE [Segments] in scan.py."""
    M, N = _room(plan, segments, False, square=True), _room(plan, segments, v_first)
    _scan(plan, work, segments, None, False, final=M, transition=True)
    _scan(plan, work, segments, None, v_first, final=N)
    return M, _join(plan, M, N, initial, v_first, back=False)


_compiled: set[tuple[Any, ...]] = set()


def _compile_first(
    raw: Any, initial_state: Tensor | None, cu_seqlens: Tensor | None, v_first: bool, chunk_size: int, keep: bool,
    *, only_backward: bool = False,
) -> None:  # fmt: skip
    """Before the first call of its kind compile all that it launches, and with ``keep`` its backward, side by side."""
    q, states = raw.q, initial_state is not None
    if not (q.is_cuda and is_plain(q)):
        return
    kind = (q.shape[2:], raw.v.shape[2:], *(x if x is None else x.dtype for x in raw[:7]), raw[7:], states)
    kind += (cu_seqlens is not None, v_first, chunk_size, keep, only_backward, q.device)
    if kind in _compiled:
        return
    _compiled.add(kind)
    raw = raw._replace(**{name: getattr(raw, name)[:1, :1] for name in ("q", "k", "v", "g", "beta")})
    initial_state = None if initial_state is None or cu_seqlens is not None else initial_state[:1]

    def call() -> None:  # a token is enough
        o, kept = raw.v, None
        if not only_backward:
            o, _, *kept = forward(raw, initial_state, cu_seqlens, 1.0, v_first, chunk_size, keep)
        if keep or only_backward:
            backward(o, None, o, raw, initial_state, cu_seqlens, 1.0, v_first, chunk_size, kept or None)

    compile_ahead(call, q.device)


def shape_of_kept(raw: Any, cu_seqlens: Tensor | None, chunk_size: int) -> tuple[int, int, int]:
    """Return the shape of A and of Aqk that `forward` keeps."""
    C = _chunk_rows(raw, chunk_size)
    return _num_chunks(raw, cu_seqlens, C) * raw.v.shape[2], C, C


@on_its_device
def forward(
    raw: Any, initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, state_v_first: bool,
    chunk_size: int, keep: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute o ``[B, T, HV, V]`` and the final state; arguments as those of the operator ``chunk_kda``.

    With ``keep`` also A and Aqk of every chunk and value head, ``[blocks, C, C]``.
    """
    _compile_first(raw, initial_state, cu_seqlens, state_v_first, chunk_size, keep)
    plan = _plan(raw, cu_seqlens, chunk_size)
    o = raw.v.new_empty(raw.v.shape)
    initial_state = None if initial_state is None else initial_state.contiguous()
    segments = _segments(plan)
    final = _room(plan, segments, state_v_first)
    work = _prepare(plan, scale, keep=keep)
    if segments.count > 1:
        _, initial_state = _beginnings(plan, work, segments, initial_state, state_v_first)
    _scan(plan, work, segments, initial_state, state_v_first, o=o, final=final)
    return (o, final[:, -1].contiguous(), *((work.A, work.Aqk) if keep else ()))


@on_its_device
def backward(
    d_o: Tensor, d_final: Tensor | None, o: Tensor, raw: Any, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, state_v_first: bool, chunk_size: int, kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the gradients of q, k, v, g, beta, A_log, dt_bias and the initial state; empty where one is absent."""
    if kept is None:
        _compile_first(raw, initial_state, cu_seqlens, state_v_first, chunk_size, False, only_backward=True)
    plan = _plan(raw, cu_seqlens, chunk_size)
    shapes, raw = raw, plan.raw
    sizes, device = plan.sizes, raw.q.device
    H, HV, K, C, BK, WV = (sizes[name] for name in ("H", "HV", "K", "C", "BK", "WV"))
    blocks = plan.num_chunks * HV
    d_o, o = computed_once(d_o.contiguous()), o.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()

    work = _prepare(plan, scale, for_backward=True, keep=kept is None, kept=kept)
    segments, begin = _segments(plan), initial_state
    if segments.count > 1:
        M, begin = _beginnings(plan, work, segments, initial_state, state_v_first)
        R = _room(plan, segments, state_v_first)
        _scan_backward(plan, work, segments, d_o, None, state_v_first, d_initial=R)
        d_final = _join(plan, M, R, d_final, state_v_first, back=True)
    states = torch.empty((blocks, BK, WV), dtype=raw.q.dtype, device=device)
    y = torch.empty_like(work.u)
    _scan(plan, work, segments, begin, state_v_first, states=states, y=y)
    work = work._replace(u=y)  # u's memory serves what follows

    d_states, dv_new = torch.empty_like(states), torch.empty_like(y)
    d_initial = None if initial_state is None else _room(plan, segments, state_v_first)
    _scan_backward(
        plan, work, segments, d_o, d_final, state_v_first, d_states=d_states, dv_new=dv_new, d_initial=d_initial
    )
    d_initial = raw.q.new_empty(0) if d_initial is None else d_initial[:, 0].contiguous()
    A, kk, total, strength, norms, far = work.A, work.kk, work.total, work.strength, work.norms, work.far
    high, low = work.qg, work.kg  # what stood there has been read
    del work  # its memory serves the gradients

    dAqk, dKK = torch.empty_like(A), torch.empty_like(A)
    along = torch.empty((blocks, 2, C), dtype=torch.float32, device=device)
    dv, dg, d_beta = torch.empty_like(raw.v), torch.empty_like(raw.g), torch.empty_like(raw.beta)
    T, NT = _lengths(plan)
    keywords = {**sizes, **plan.gate, "SK": SLICE, "BV": SLICE}
    launchable(triangle_kernel)[(blocks,)](
        d_o, o, raw.v, *_places(plan), strength, A, kk, y, dv_new, dv, d_beta, dAqk, dKK, along, T, NT,
        **_only(triangle_kernel, keywords), STAGES=2, num_warps=4, num_stages=2,
    )  # fmt: skip
    # Heads that share a query and key are summed in float32 before they are rounded.
    per_head = (*raw.q.shape[:2], HV, K)
    dq, dk = (torch.empty(per_head, dtype=raw.q.dtype if H == HV else torch.float32, device=device) for _ in "qk")
    d_slope = torch.empty((blocks, BK // SLICE), dtype=torch.float32, device=device)
    d_bias = torch.empty((blocks, BK), dtype=torch.float32, device=device)
    tensors = [d_o, raw.q, raw.k, raw.g, dv, *_or_q(plan, raw.A_log, raw.dt_bias), *_places(plan), plan.table]
    chunk_tensors, gradients = (states, d_states, y, dAqk, dKK, along), (dq, dk, dg, d_slope, d_bias)
    numbers, grid = (scale, raw.lower_bound or 0.0, T, NT), (blocks * (BK // SLICE),)
    if keywords["ANCHOR"]:
        launchable(near_inputs_kernel)[grid](
            *tensors, total, strength, norms, far, *chunk_tensors, *gradients, *numbers,
            **_only(near_inputs_kernel, keywords), STAGES=1, num_warps=4, num_stages=1,
        )  # fmt: skip
    launchable(far_inputs_kernel)[grid](
        *tensors, total, strength, norms, far, high, low, *chunk_tensors, *gradients, *numbers,
        **_only(far_inputs_kernel, keywords), num_warps=4, num_stages=1,
    )  # fmt: skip
    if H != HV:
        dq, dk = (x.unflatten(2, (H, HV // H)).sum(3).to(raw.q.dtype) for x in (dq, dk))
    dA_log, d_dt_bias = raw.q.new_empty(0), raw.q.new_empty(0)  # two: outputs of an operator may not alias
    if shapes.A_log is not None:
        dA_log = d_slope.view(-1, HV, BK // SLICE).sum((0, 2)).reshape(shapes.A_log.shape).to(shapes.A_log.dtype)
    if shapes.dt_bias is not None:
        d_dt_bias = d_bias.view(-1, HV, BK).sum(0)[:, :K].reshape(shapes.dt_bias.shape).to(shapes.dt_bias.dtype)
    return dq, dk, dv, dg, d_beta, dA_log, d_dt_bias, d_initial
