"""Time sparse attention on one GPU: selection, attention, block masks, losses, decoding, layers, against dense peers.

    pip install -e . && python profiles/dsa.py

Inputs are bfloat16, standard normal, batch 1, made on the device.  A row's name begins with its work,
  select  lightning_topk, causal, T = S; `kpool4` on T / 4 pooled keys, 512 pools; `packed` six sequences.
          Peer: einsum and torch.topk over chunks of 4096 queries (1024 at T = 131072, whose products would not fit).
  attend  sparse_attention of 4096 queries on 2048 random ones of 32768 keys, no causality; one key/value head unless
          `kv` says otherwise, values the first columns of the keys where D > 128.  `bwd` is the backward alone.
  dense   causal attention by cuDNN (torch.nn.attention) and FlexAttention, the lines to beat; `train` is forward and
          backward, here and below.
  block_flex  FlexAttention over 16 blocks of 128 keys per block of queries, block_topk_mask inside the time; afterwards
          100 other masks, whose recompilations are counted.
  forms   sparse_attention over 2048 past keys per query, drawn independently or (`agree90`) by scores whose correlation
          among neighbouring queries is 0.9: as it chooses (auto), in the gather and the masked form, and, at T = 4096,
          FlexAttention over their exact mask, topk_block_mask inside the time.
  density  share of blocks that such a mask touches, by how far neighbouring queries and keys agree; not timed.
  loss    indexer_kl_loss and its gradients, over the selection or, `dense`, over all visible keys; `given`: with the
          log-sum-exps that the attention has left, as layers call it.
  decode  one token on a cache of S: selection and attention against attention to all of it; `_graph` rows replay a
          CUDA graph.  Pooled keys are ready.  Where the head is 512 wide dense attention is two products and a softmax.
  layer   a whole attention layer, projections included, not compiled, against the same weights with causal fused
          attention, under MLA in the expanded form: `glm` is GLM-5.3-Flash's shape (64 heads, latent 512, no rotated
          part, heads of 256, indexer 32 x 128 on pools of 4, top-2048; hidden 4096 and query rank 2048 are ours), `gqa`
          32 heads of 128 on 8, indexer 8 x 64, top-2048, hidden 4096.  Random weights select independently for each
          token; in `agree90` rows they select, and the layer attends to a selection drawn as in `forms`.

What is measured, for every row:
  Correctness, before anything is timed, NOTE [Bounds].  Selections: every row's form; at 64 queries every selected
    score against every other one in float64; and exact equality on a smaller problem of whole numbers, ties included.
    Attention: o, log-sum-exp and dq of 64 queries (16 where all keys count) against float64 on the same keys; dk and dv
    of 512 queries on 2048 keys.  Layers: y of 8 tokens; gradients at 512 tokens, where sparse is dense.  Losses:
    gradients of 16 tokens; value and every gradient at 384 tokens.  Whoever is beyond a bound shows FAIL and no time.
  Time: CUDA events, contenders taking turns in one process; median, 20th and 80th percentile; the L2 is cold.  What
    takes longer than 15 s is timed once.  Decoding without a graph starts on an idle device: launches count.
  Rate: 2 * (heads) * (widths of its products) per pair of a query and a key that counts; not of layers and losses.
  Memory: torch.cuda.max_memory_allocated over one call; the workspace is what is neither input nor output.
  First call: seconds of a contender's very first call, compilation included; in no other number.

The tables go to profiles/results/dsa_<gpu>_<yyyymmdd>.md, everything measured to the .json beside it, after every row;
rows already there, from the same device and versions, stay unless they are measured again (with --no-peer the peer's
part of them stays, and is marked).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from dsa_flex import BlockWork, DenseWork, DensityWork, FormsWork
from dsa_gates import BOUNDS
from dsa_layers import LayerWork
from dsa_report import cells, main_table, markdown
from dsa_rows import OURS, ROWS, BlockRow, DecodeRow, DenseRow, DensityRow, FormsRow, LayerRow, Row
from dsa_work import WORKS, Call, Contender, Tensors, Work
from harness import (
    Clock,
    Plan,
    chosen_rows,
    describe_error,
    free_memory,
    in_order,
    report_stem,
    spread,
    synchronize,
    take_turns,
    total_memory,
    write_report,
)
from row_runs import begin_report, end_report, keep_earlier, row_parser, run_rows

MAKERS: dict[type[Row], Callable[..., Work]] = WORKS | {
    DenseRow: DenseWork,
    BlockRow: BlockWork,
    FormsRow: FormsWork,
    DensityRow: DensityWork,
    LayerRow: LayerWork,
}
SLOW_S = 15.0
"""Calls that take longer are timed once."""
GIVE_UP_S = 60.0
"""A first call that takes longer is the only one, whatever it compiled."""


@dataclass
class Entrant:
    """A contender that has passed and is ready for its turns on a row."""

    call: Call
    facts: dict[str, Any]


class Inputs:
    """The inputs of the last row, which the next one may want too."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.seed = device, seed
        self.key: tuple[Any, ...] = ()
        self.work: Work | None = None

    def of(self, row: Row) -> Work:
        if self.work is None or self.key != row.inputs_key:
            self.work = None  # makes room first
            free_memory(self.device)
            self.work = MAKERS[type(row)](row, self.device, self.seed)
            self.key = row.inputs_key
        return self.work


def bytes_of(result: Tensors) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in result.values()}
    return sum(storages.values())


def prepare(contender: Contender, work: Work) -> tuple[Call, Tensors, dict[str, Any]]:
    """Run a contender for the first time, and again for its memory; capture it if the row asks."""
    device = work.device
    facts: dict[str, Any] = {}
    begin = time.perf_counter()
    call = contender.prepare()
    result = call()
    synchronize(device)
    facts["first_call_s"] = once = time.perf_counter() - begin
    if contender.graph:
        call, result = capture(call, device)
        once = 0.0
    elif once <= GIVE_UP_S:
        del result
        if device.type == "cuda":
            free_memory(device)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        result = call()
        synchronize(device)
        once = time.perf_counter() - begin
        if device.type == "cuda":
            above = torch.cuda.max_memory_allocated() - before
            facts |= {"peak_bytes": above + work.input_bytes(), "workspace_bytes": max(above - bytes_of(result), 0)}
    if once > SLOW_S:
        facts["slow_s"] = once
    return call, result, facts


def capture(call: Call, device: torch.device) -> tuple[Call, Tensors]:
    """Capture a call in a CUDA graph; return the replay and what it writes."""
    if device.type != "cuda":
        return call, call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for tensor in result.values():  # what the replay does not write fails the comparison
        tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    graph.replay()
    torch.cuda.synchronize()

    def replay() -> Tensors:
        graph.replay()
        return result

    return replay, result


def finite(result: Tensors) -> bool:
    """Check everything that is not compared: it must at least hold numbers."""
    return all(bool(x.sum(dtype=torch.float32).isfinite()) for x in result.values() if x.is_floating_point())


def enter(contender: Contender, work: Work) -> Entrant:
    """Prepare and judge a contender; what it raises ends up in its cell."""
    facts: dict[str, Any] = {"role": contender.role, "flops": contender.flops}
    call: Call = dict
    try:
        call, result, measured = prepare(contender, work)
        facts |= measured
        errors = contender.judge(result)
        # Written so that NaN fails.
        within = all(error <= BOUNDS[name] for name, error in errors.items())
        facts |= {"errors": errors, "passed": within and finite(result)}
        if "slow_s" in facts and facts["passed"]:
            facts |= dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), facts["slow_s"] * 1e3) | {"repeats": 1}
    except Exception as error:
        traceback.print_exc(limit=-2)
        facts["error"] = describe_error(error)
    facts["remark"] = contender.remark
    if work.device.type == "cuda":
        free_memory(work.device)
    return Entrant(call, facts)


def measure(row: Row, work: Work, plan: Plan, with_peers: bool) -> dict[str, Any]:
    """Judge every contender and time those that pass."""
    device, ready, found = work.device, {}, {}
    for name, contender in work.contenders(row).items():
        if with_peers or contender.role != "peer":
            entrant = enter(contender, work)
            found[name] = entrant.facts
            if entrant.facts.get("passed") and "median_ms" not in entrant.facts:
                ready[name] = entrant
    apart = sum(entrant.facts.get("peak_bytes", 0) for entrant in ready.values()) > 0.8 * total_memory(device)
    idle = isinstance(row, DecodeRow) and not row.graph
    if ready and not apart:
        try:
            time_together(ready, device, plan, idle)
        except torch.OutOfMemoryError:
            apart = True
    if apart:  # each alone, or the time of the allocator that makes room for the next would be measured
        for name, entrant in ready.items():
            time_together({name: entrant}, device, plan, idle)
    extras: dict[str, Any] = {}
    try:
        if all(own.get("passed") for own in found.values() if own["role"] == "ours"):
            extras = work.extras(row)
    except Exception as error:
        traceback.print_exc(limit=-2)
        extras = {"error": describe_error(error)}
    return {"contenders": found, "extras": extras, "interleaved": not apart}


def time_together(ready: dict[str, Entrant], device: torch.device, plan: Plan, idle: bool) -> None:
    """Time contenders turn by turn and add what was found; one that fails on its own gets its error."""
    free_memory(device)
    try:
        seconds = take_turns({name: entrant.call for name, entrant in ready.items()}, Clock(device, idle), plan)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) and len(ready) > 1:
            raise
        traceback.print_exc(limit=-2)
        for entrant in ready.values():
            entrant.facts["error"] = describe_error(error)
        return
    for name, entrant in ready.items():
        entrant.facts.update(spread(seconds[name]), repeats=len(seconds[name]))


def add_row(report: dict[str, Any], entry: dict[str, Any], with_peers: bool) -> None:
    """Put a row in its place; where peers were left out, what they did on the row earlier stays beside it."""
    earlier = next((row for row in report["rows"] if row["name"] == entry["name"]), {"contenders": {}})
    peers = {name: own for name, own in earlier["contenders"].items() if own["role"] == "peer"}
    if peers and not with_peers:
        entry = entry | {"contenders": entry["contenders"] | peers, "peer_earlier": True}
    report["rows"] = in_order(report["rows"], entry, [row.name for row in ROWS])


def package_versions() -> dict[str, str]:
    """Name what the timings depend on besides torch."""
    found = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def main() -> None:
    begin = time.perf_counter()
    options = row_parser(__doc__, ROWS, peer="the peers").parse_args()
    rows = chosen_rows("dsa.py", ROWS, options.rows)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("dsa.py: --device cuda needs a GPU; `--device cpu --quick` only shows that everything runs")
    device, with_peers = torch.device(options.device), not options.no_peer
    plan = Plan(min_rounds=10, min_seconds=0.3, max_seconds=1.5, warm_up_rounds=2)
    if options.quick:
        plan = Plan(min_rounds=3, min_seconds=0.0, max_seconds=0.05, warm_up_rounds=1)
        if device.type == "cpu":
            torch.set_num_threads(1)  # at these sizes threads only wait for each other
    report = begin_report("dsa.py", options, BOUNDS, package_versions())
    stem = report_stem(options.out, "dsa_quick" if options.quick else "dsa", report["device"]["name"])
    keep_earlier(report, stem.with_suffix(".json"), ("torch", "triton"))
    inputs = Inputs(device, options.seed)

    def failed(_: Row, why: str) -> dict[str, Any]:
        return {"contenders": {OURS: {"role": "ours", "error": why}}, "extras": {}}

    def add(entry: dict[str, Any]) -> str:
        add_row(report, entry, with_peers)
        write_report(stem, report, markdown(report))
        return cells(entry)

    end = begin + options.budget_s
    run_rows(rows, options, report, end, lambda row: measure(row, inputs.of(row), plan, with_peers), failed, add)
    end_report(report, stem, begin, markdown, main_table(report["rows"]))


if __name__ == "__main__":
    main()
