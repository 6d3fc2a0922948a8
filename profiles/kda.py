"""Time the operators `chunk_kda` and `fused_recurrent_kda` on one GPU against flash-linear-attention's.

    pip install -e . flash-linear-attention==0.6.0 && python profiles/kda.py

Inputs are bfloat16 with K = V = 128 unless a row says otherwise; L2 norm, gate and sigmoid happen inside the operators;
A_log = log U(1, 16), dt_bias = softplus^-1(exp U(log 1e-3, log 1e-1)), raw gate ~ N(0, 1).

A row's name begins with its work,
  fwd     chunk_kda without gradients, final state out.
  train   chunk_kda, forward and the gradients of q, k, v, g, beta, A_log and dt_bias for a fixed random gradient of o;
          `state` rows also have an initial state and its gradient, and one of the final state.
  decode  fused_recurrent_kda, one token, float32 state in and out.
and goes on with its gate: `lb` is the lower-bound gate (-5, safe_gate), `softplus` the unbounded one.

What is measured, for every row:
  Correctness, before anything is timed: output, final state and every gradient of two query heads (with their value
    heads, over the whole length) against float64 on the same inputs, NOTE [Float64 reference].  A contender beyond a
    bound of NOTE [Bounds] shows FAIL; ours then has no time, fla's stands beside it, to be compared with.
  Time: CUDA events, contenders taking turns in one process; median, 20th and 80th percentile; the L2 is cold.
    Rows of few tokens start on an idle device, so that launches count; `_graph` rows replay a CUDA graph of several
    calls, each on inputs of its own.
  Memory: torch.cuda.max_memory_allocated over one call, inputs and gradients included; not of `_graph` rows.
  First call: seconds of a row's very first call, compilation and tile search included; in no other number.  fla's
    candidates are compiled beforehand, side by side (peer_search.py); NOTE [First call] is measured without.

The tables go to profiles/results/kda_<gpu>_<yyyymmdd>.md, everything measured to the .json beside it, after every row;
rows already there, from the same device and versions, stay unless they are measured again (with --no-peer fla's part of
them stays, and is marked).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import (
    Clock,
    Plan,
    chosen_rows,
    describe_error,
    free_memory,
    in_order,
    progress,
    report_stem,
    spread,
    synchronize,
    take_turns,
    total_memory,
    write_report,
)
from kda_report import cell, main_table, markdown
from kda_rows import (
    BOUNDS,
    OURS,
    PEER,
    ROWS,
    Inputs,
    Operator,
    Row,
    Tensors,
    check_reference,
    judge,
    make_inputs,
    of_head,
    run,
)
from peer_search import fill_cache, share_search
from row_runs import begin_report, end_report, keep_earlier, row_parser, run_rows

from hybrid_flex.ops import chunk_kda, fused_recurrent_kda


@dataclass
class Entrant:
    """A contender that is ready for its turns on a row."""

    call: Callable[[], Any]
    num_calls: int
    """Calls of the operator that one ``call`` makes."""
    facts: dict[str, Any]
    kept: dict[int, Tensors]
    """Results of the heads that are compared."""


def prepare(operator: Operator, row: Row, copies: list[Inputs], device: torch.device) -> Entrant:
    """Run a contender for the first time, for its memory and for its results, and capture it if the row asks."""
    begin = time.perf_counter()
    run(operator, row, copies[0])
    synchronize(device)
    facts: dict[str, Any] = {"first_call_s": time.perf_counter() - begin}
    if row.graph:
        call, result = capture(operator, row, copies, device)
    else:

        def call() -> None:
            run(operator, row, copies[0])

        free_memory(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - bytes_of(copies[0])
        result = run(operator, row, copies[0])
        synchronize(device)
        if device.type == "cuda":
            facts["peak_bytes"] = torch.cuda.max_memory_allocated() - others
    # Heads that are not compared must at least hold numbers; a sum says so without a mask as large as the tensor.
    facts["finite"] = all(bool(tensor.sum(dtype=torch.float32).isfinite()) for tensor in result.values())
    kept = {
        head: {name: of_head(name, tensor, head, row).clone() for name, tensor in result.items()}
        for head in row.judged_heads
    }
    return Entrant(call, len(copies), facts, kept)


def capture(
    operator: Operator, row: Row, copies: list[Inputs], device: torch.device
) -> tuple[Callable[[], None], Tensors]:
    """Capture one call per copy of the inputs; return the replay and what it wrote for the first copy."""

    def call_all() -> list[Tensors]:
        # All results at once, so that each call writes to memory of its own.
        return [run(operator, row, x) for x in copies]

    if device.type != "cuda":
        return lambda: call_all().clear(), call_all()[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(operator, row, copies[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call_all()
    for tensor in results[0].values():
        tensor.fill_(float("nan"))  # what the replay does not write fails the comparison
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, results[0]


def bytes_of(x: Inputs) -> int:
    return sum(tensor.nbytes for tensor in x.values() if tensor is not None)


def copies_of_inputs(row: Row, device: torch.device, seed: int) -> list[Inputs]:
    """Draw one set of inputs, or for a graph as many as two L2 caches cannot hold."""
    copies = [make_inputs(row, device, seed)]
    if row.graph:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        num_copies = min(max(2 * cache_bytes // bytes_of(copies[0]) + 1, 4), 64)
        copies += [make_inputs(row, device, seed + i) for i in range(1, num_copies)]
    return copies


def measure(row: Row, operators: dict[str, Operator], device: torch.device, plan: Plan, seed: int) -> dict[str, Any]:
    """Judge every contender and time those that pass."""
    free_memory(device)
    copies = copies_of_inputs(row, device, seed)
    entrants: dict[str, Entrant] = {}
    found: dict[str, dict[str, Any]] = {}
    for contender, operator in operators.items():
        try:
            entrants[contender] = prepare(operator, row, copies, device)
            found[contender] = entrants[contender].facts
        except Exception as error:  # whatever a contender raises belongs into its cell
            traceback.print_exc(limit=-2)
            found[contender] = {"error": describe_error(error)}
        free_memory(device)
    begin = time.perf_counter()
    errors = judge(row, copies[0], {contender: entrant.kept for contender, entrant in entrants.items()})
    reference_s = time.perf_counter() - begin
    for contender, entrant in entrants.items():
        # Written so that NaN fails.
        within = all(error <= BOUNDS[name] for name, error in errors[contender].items())
        found[contender] |= {"errors": errors[contender], "passed": within and found[contender]["finite"]}
        entrant.kept.clear()
    ready = {contender: x for contender, x in entrants.items() if contender == PEER or found[contender]["passed"]}
    apart = sum(found[contender].get("peak_bytes", 0) for contender in ready) > 0.8 * total_memory(device)
    if ready and not apart:
        try:
            time_together(ready, found, device, row, plan)
        except torch.OutOfMemoryError:
            apart = True
    if apart:  # each alone, or the time of the allocator that makes room for the next would be measured
        for contender, entrant in ready.items():
            time_together({contender: entrant}, found, device, row, plan)
    return {"contenders": found, "reference_s": reference_s, "interleaved": not apart}


def time_together(
    ready: dict[str, Entrant], found: dict[str, dict[str, Any]], device: torch.device, row: Row, plan: Plan
) -> None:
    """Time contenders turn by turn and add what was found; one that fails on its own gets its error."""
    free_memory(device)
    try:
        clock = Clock(device, from_idle=row.few_tokens)
        seconds = take_turns({contender: entrant.call for contender, entrant in ready.items()}, clock, plan)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) and len(ready) > 1:
            raise
        traceback.print_exc(limit=-2)
        for contender in ready:
            found[contender]["error"] = describe_error(error)
        return
    for contender, entrant in ready.items():
        times = [s / entrant.num_calls for s in seconds[contender]]
        found[contender] |= {**spread(times), "repeats": len(times), "calls_per_repeat": entrant.num_calls}


def operator_of(contender: str, row: Row) -> Operator:
    """Find the operator that does the work of a row; raises ImportError where the peer is not installed."""
    if contender == OURS:
        return fused_recurrent_kda if row.decode else chunk_kda
    from fla.ops import kda

    return kda.fused_recurrent_kda if row.decode else kda.chunk_kda


# NOTE [First call]: a new process whose Triton and Inductor caches are empty folders; from the moment it is started
# to the end of one forward and backward: interpreter, imports, compilation, tile search, the call.


def first_call(contender: str, device: torch.device, quick: bool, timeout_s: float) -> dict[str, Any]:
    """Measure the first forward and backward of a contender in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure-first-call", contender]
    command += ["--device", device.type, *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder) / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        begin = time.monotonic()
        try:
            done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {timeout_s:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:120]}
    moments = json.loads(lines[-1])
    return {"seconds": moments["finished"] - begin, "until_imported_s": moments["imported"] - begin}


def measure_first_call(contender: str, device: torch.device, quick: bool) -> None:
    """Print when things were done, as one JSON line; the body of the process that `first_call` starts."""
    row = next(row for row in ROWS if row.backward)
    row = row.quick() if quick else row
    operator = operator_of(contender, row)
    imported = time.monotonic()
    run(operator, row, make_inputs(row, device, seed=0))
    synchronize(device)
    print(json.dumps({"imported": imported, "finished": time.monotonic()}))


def search(rows: list[Row], device: torch.device, share: int, num_shares: int) -> None:
    """Compile a share of the peer's candidates for the rows; the body of the processes that `fill_cache` starts."""
    share_search(share, num_shares)
    for row in rows:
        # The length decides nothing, and many processes share the device's memory.
        short = row if row.lengths else replace(row, T=min(row.T, 1024))
        try:
            run(operator_of(PEER, short), short, make_inputs(short, device, seed=0))
        except Exception:  # the search meets it again, and its cell says so
            traceback.print_exc(limit=-2)


def add_row(report: dict[str, Any], entry: dict[str, Any]) -> None:
    """Put a row in its place; where the peer was left out, what it did on the row earlier stays beside it."""
    earlier = next((row for row in report["rows"] if row["name"] == entry["name"]), {"contenders": {}})
    if PEER in earlier["contenders"] and PEER not in entry["contenders"]:
        entry = entry | {"contenders": entry["contenders"] | {PEER: earlier["contenders"][PEER]}, "peer_earlier": True}
    report["rows"] = in_order(report["rows"], entry, [row.name for row in ROWS])


def package_versions() -> dict[str, str]:
    """Name what the timings depend on besides torch; flash_kda and tilelang are what fla calls where it finds them."""
    found = {}
    for name, package in (("triton", "triton"), (PEER, "fla-core"), ("flash_kda", "flash-kda"), ("tilelang",) * 2):
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_options() -> argparse.Namespace:
    parser = row_parser(__doc__, ROWS, peer="fla", or_none=", or none")
    parser.add_argument("--searched", action="store_true", help="fla's search is in Triton's cache already")
    parser.add_argument(
        "--first-call", nargs="?", choices=(OURS, PEER, "both"), const=OURS, help="see NOTE [First call]; default: ours"
    )
    parser.add_argument("--measure-first-call", choices=(OURS, PEER), help=argparse.SUPPRESS)
    parser.add_argument("--search-share", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    begin = time.perf_counter()
    options = read_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("kda.py: --device cuda needs a GPU; `--device cpu --quick --no-peer` only shows that it runs")
    device = torch.device(options.device)
    if options.measure_first_call is not None:
        measure_first_call(options.measure_first_call, device, options.quick)
        return
    rows = [] if options.rows == "none" else chosen_rows("kda.py", ROWS, options.rows)
    if options.search_share is not None:
        search(rows, device, *options.search_share)
        return
    contenders = [OURS]
    if not options.no_peer:
        try:
            operator_of(PEER, ROWS[0])
            contenders.append(PEER)
        except Exception as error:  # importing it may already fail for want of a driver
            progress(f"fla is left out, {describe_error(error)}")
    report = begin_report("kda.py", options, BOUNDS, package_versions(), first_call={})
    stem = report_stem(options.out, "kda_quick" if options.quick else "kda", report["device"]["name"])
    keep_earlier(report, stem.with_suffix(".json"), ("torch", "triton", PEER), ("rows", "first_call"))
    report["reference_error"] = check_reference(device)
    progress(f"the float64 reference agrees with the recurrence to {report['reference_error']:.1e}")
    end = begin + options.budget_s
    for contender in () if options.first_call is None else (OURS, PEER):
        if options.first_call in (contender, "both"):
            found = first_call(contender, device, options.quick, min(max(end - time.perf_counter(), 1.0), 1800.0))
            report["first_call"][contender] = found
            progress(f"first call of {contender}: {found.get('error') or format(found['seconds'], '.1f') + ' s'}")
    if PEER in contenders and rows and device.type == "cuda" and not options.searched:
        fill_cache(__file__, ["--rows", ",".join(row.name for row in rows)])
        progress(f"the peer's candidates are compiled after {time.perf_counter() - begin:.0f} s")
    plan = Plan(min_rounds=3, min_seconds=0.0, max_seconds=0.2, warm_up_rounds=1) if options.quick else Plan()

    def state_bytes(row: Row) -> dict[str, Any]:
        return {"state_bytes": row.state_bytes if row.decode else 0}

    def measured(row: Row) -> dict[str, Any]:
        operators = {contender: operator_of(contender, row) for contender in contenders}
        return state_bytes(row) | measure(row, operators, device, plan, options.seed)

    def failed(row: Row, why: str) -> dict[str, Any]:
        return state_bytes(row) | {"contenders": {contender: {"error": why} for contender in contenders}}

    def add(entry: dict[str, Any]) -> str:
        add_row(report, entry)
        write_report(stem, report, markdown(report))
        return ", ".join(f"{contender} {cell(entry, contender)}" for contender in contenders)

    run_rows(rows, options, report, end, measured, failed, add)
    end_report(report, stem, begin, markdown, main_table(report["rows"]))


if __name__ == "__main__":
    main()
