"""Time the two layers on a CPU against transformers' own modules that hold the same weights.

    pip install -e '.[transformers]' && python profiles/cpu_layers.py

Contests, at batch 1, hidden 512, float32, all cores:
  kda      KimiDeltaAttention, forward + backward, against KimiLinearDeltaAttention of transformers' kimi_linear.
           Without fla that module takes its torch form of the chunked algorithm, which is what a CPU user gets.
  dsa      DeepSeekSparseMLA, forward without gradients, against DeepseekV32Attention of transformers' deepseek_v32 with
           eager attention: the widths of DeepSeek-V3.2's heads and latents halved.
  dsa_full The same with DeepSeek-V3.2's own widths, at the target length only.

What is measured, for every length T:
  Correctness, before T is timed: the outputs, every gradient (kda) and every selected key (dsa) of our layer, eager and
    compiled, against the peer's.  A difference that rounding does not explain ends the run.
  Time: the contenders take turns in one process; median, 20th and 80th percentile of the wall time.
  Memory: each contender runs alone in a process of its own (NOTE [Peak memory]).

T is marked dynamic for the compiled layer; how many graphs that made, and how long one took, stands below each table.
The tables go to profiles/results/cpu_layers_<cpu>_<yyyymmdd>.md, everything measured to the .json beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import RESULTS, report_stem, spread, versions, write_report
from tqdm import tqdm
from transformers_peers import COMPILED, CONTENDERS, CONTESTS, EAGER, HIDDEN, PEER, TOLERANCE, Contest, gate

MAX_SECONDS, MAX_BYTES = 8.0, 12 * 2**30
"""The peer is left out at a length where a call is foreseen to take more than this."""
ROUND_SECONDS, MIN_ROUNDS, MAX_ROUNDS = 12.0, 5, 25
MIB = 2**20


def take_turns(
    contest: Contest, num_tokens: int, contenders: list[str], show: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Time every contender once per round.  The gate has just warmed all of them up at this length."""
    inputs = contest.inputs(num_tokens, for_peer=PEER in contenders)
    wall: dict[str, list[float]] = {c: [] for c in contenders}
    cpu: dict[str, list[float]] = {c: [] for c in contenders}
    gc.collect()
    gc.disable()
    begin = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - begin > ROUND_SECONDS:
            break
        show(f"T {num_tokens}: timing, round {done + 1}")
        for contender in contenders:
            contest.clear(inputs)
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            contest.call(contender, inputs)
            wall[contender].append(time.perf_counter() - wall_start)
            cpu[contender].append(time.process_time() - cpu_start)
    gc.enable()
    contest.clear(inputs)
    table = {}
    for contender in contenders:
        table[contender] = {
            **spread(wall[contender]),
            "cpu_median_ms": statistics.median(cpu[contender]) * 1e3,
            "rounds": len(wall[contender]),
        }
    return table


# NOTE [Peak memory]: a process that only ever runs one contender, first once unmeasured (compilation, lazy set-up);
# then per length: freed heap given back to the kernel (malloc_trim), the kernel's high-water mark of the resident set
# brought down to the present level (5 into /proc/self/clear_refs), one call, and the mark (VmHWM) minus the level
# before the call.  It counts everything the call needs beyond weights and inputs: workspace, saved activations, output,
# gradients, fragmentation of the heap.  The peer's mask and rotation tables are inputs.  A call that compiles
# is measured again.


def measure_memory(contest: Contest, contender: str, lengths: list[int]) -> None:
    """Print one JSON line per length; the body of the measuring process."""
    contest.start()
    libc = ctypes.CDLL("libc.so.6")
    begin = time.perf_counter()
    contest.call(contender, contest.inputs(lengths[0], for_peer=contender == PEER))
    first = time.perf_counter() - begin
    seconds = peak = 0.0
    for i, num_tokens in enumerate(lengths):
        growth = (num_tokens / lengths[i - 1]) ** (1 if contest.backward else 2) if i else 0.0
        if contender == PEER and (seconds * growth > MAX_SECONDS or peak * growth > MAX_BYTES):
            foreseen = f"about {seconds * growth:.0f} s and {peak * growth / 2**30:.0f} GiB foreseen"
            print(json.dumps({"T": num_tokens, "skipped": foreseen}), flush=True)
            continue
        inputs = contest.inputs(num_tokens, for_peer=contender == PEER)
        num_graphs = -1
        while num_graphs != graphs_compiled():
            num_graphs = graphs_compiled()
            contest.clear(inputs)
            gc.collect()
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = resident_bytes("VmRSS")
            begin = time.perf_counter()
            result = contest.call(contender, inputs)
            seconds = time.perf_counter() - begin
            peak = resident_bytes("VmHWM") - before
            del result
        line = {"T": num_tokens, "peak_extra_bytes": peak, "first_call_s": first, "call_s": seconds}
        print(json.dumps(line), flush=True)


def graphs_compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def resident_bytes(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def memory_in_own_process(contest: Contest, contender: str, lengths: list[int]) -> dict[int, dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).resolve()), "--measure-memory", contest.name, contender]
    command += ["--lengths", *map(str, lengths)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{contest.name} {contender}: the memory process failed\n{run.stderr[-3000:]}")
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {line.pop("T"): line for line in lines}


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = {
        key: match[1]
        for key in ("model name", "cpu family", "model")
        if (match := re.search(rf"^{key}\s*: (.*)$", info, re.MULTILINE))
    }
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "avx512": "avx512f" in info,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
    }


def check_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the measured ratios with what the project set out to reach."""
    targets = []

    def add(text: str, value: float, wanted: float, at_least: bool) -> None:
        met = value >= wanted if at_least else value <= wanted
        targets.append({"target": text, "value": value, "wanted": wanted, "met": met})

    for row in rows:
        own, peer = row["contenders"], row["contenders"].get(PEER, {})
        if row["T"] != CONTESTS[row["contest"]].target_length or "median_ms" not in peer:
            continue
        label = f"{CONTESTS[row['contest']].title}, T {row['T']}"
        wanted = {COMPILED: 5.0, EAGER: 3.0} if row["contest"] == "kda" else {COMPILED: 2.0}
        for contender, ratio in wanted.items():
            add(f"{label}: times faster, {contender}", peer["median_ms"] / own[contender]["median_ms"], ratio, True)
        if row["contest"] != "kda" and "peak_extra_bytes" in peer:
            share = own[COMPILED]["peak_extra_bytes"] / peer["peak_extra_bytes"]
            add(f"{label}: share of the peer's peak memory, compiled", share, 1 / 3, False)
    kda = [r["contenders"][COMPILED]["median_ms"] / r["T"] for r in rows if r["contest"] == "kda"]
    if len(kda) > 1:
        add(
            "KDA layer, compiled: largest over smallest time per token across T (linear: 1)",
            max(kda) / min(kda),
            1.5,
            False,
        )
    return targets


def markdown(report: dict[str, Any]) -> str:
    where, what = report["machine"], report["versions"]
    lines = [
        "# Layers on a CPU, against transformers with the same weights",
        "",
        f"{where['cpu']} (family/model {where['family_model']}), {where['threads']} threads, torch {what['torch']}, "
        f"transformers {what['transformers']}, commit {what['commit']}, {report['date']}.",
        f"Made by `{report['command']}`.",
        "",
        f"Batch 1, hidden {HIDDEN}, float32. Wall time per call: median (20th to 80th percentile); the contenders take "
        "turns in one process. Extra memory: highest resident set during a call minus the level before it, each "
        "contender in its own process. Error: largest relative L2 difference from transformers over the output and, "
        "for kda, every gradient; for dsa, over the rows with the same selected keys.",
        f"Load of the machine at the start: {where['load_at_start']:.1f}.",
    ]
    for name in dict.fromkeys(row["contest"] for row in report["rows"]):
        contest = CONTESTS[name]
        lines += ["", f"## {contest.title}", "", ", ".join(f"{k} {v}" for k, v in contest.widths.items()) + ".", ""]
        lines += [
            "| T | contender | ms | us per token | speed-up | extra MiB | share | error |",
            "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        rows = [row for row in report["rows"] if row["contest"] == name]
        for row in rows:
            lines += [table_row(row, contender) for contender in CONTENDERS if contender in row["contenders"]]
        graphs = rows[-1]["graphs_so_far"]
        first = next((s for r in rows if (s := r["contenders"][COMPILED].get("first_call_s"))), None)
        took = "" if first is None else f"; a first call, which compiles one, took {first:.0f} s"
        lines += ["", f"Graphs compiled for all {len(rows)} lengths: {graphs}{took}."]
        swapped = {row["T"]: row["contenders"][EAGER].get("rows_with_swapped_ties") for row in rows}
        if any(swapped.values()):
            gap = max(row["contenders"][EAGER]["largest_score_gap"] for row in rows)
            lines += [
                "",
                "Queries whose selection differs by keys of equal score up to rounding "
                f"(largest relative gap {gap:.0e}): " + ", ".join(f"{n} at T {t}" for t, n in swapped.items()) + ".",
            ]
    lines += ["", "## Targets", "", "| target | measured | wanted | |", "| --- | ---: | ---: | --- |"]
    for t in report["targets"]:
        lines.append(f"| {t['target']} | {t['value']:.2f} | {t['wanted']:.2f} | {'met' if t['met'] else 'MISSED'} |")
    return "\n".join(lines) + "\n"


def table_row(row: dict[str, Any], contender: str) -> str:
    own, peer = row["contenders"][contender], row["contenders"].get(PEER, {})
    name = "transformers" if contender == PEER else f"hybrid_flex {contender}"
    if "skipped" in own:
        return f"| {row['T']} | {name} | skipped: {own['skipped']} | | | | | |"
    time_ = per_token = speed_up = memory = share = error = ""
    if "median_ms" in own:
        time_ = f"{own['median_ms']:.0f} ({own['p20_ms']:.0f}-{own['p80_ms']:.0f})"
        per_token = f"{own['median_ms'] / row['T'] * 1e3:.0f}"
        speed_up = f"{peer['median_ms'] / own['median_ms']:.1f}" if "median_ms" in peer else ""
    if "peak_extra_bytes" in own:
        memory = f"{own['peak_extra_bytes'] / MIB:.0f}"
        share = f"{own['peak_extra_bytes'] / peer['peak_extra_bytes']:.2f}" if "peak_extra_bytes" in peer else ""
    if "worst_error" in own:
        error = f"{own['worst_error']:.1e}" + (f" ({own['worst']})" if own["worst"] != "y" else "")
        error += "" if own["against"] == PEER else " (compiled against eager)"
    return f"| {row['T']} | {name} | {time_} | {per_token} | {speed_up} | {memory} | {share} | {error} |"


def run_contest(contest: Contest, lengths: list[int], with_memory: bool, gate_only: bool) -> list[dict[str, Any]]:
    contest.start()
    num_steps = len(lengths) * (1 if gate_only else 2) + (len(CONTENDERS) if with_memory else 0)
    bar = tqdm(total=num_steps, desc=contest.name, file=sys.stderr)

    def show(text: str) -> None:
        bar.set_postfix_str(text)

    memory: dict[str, dict[int, dict[str, Any]]] = {c: {} for c in CONTENDERS}
    rows = []
    for num_tokens in lengths:
        contenders = [c for c in CONTENDERS if "skipped" not in memory[c].get(num_tokens, {})]
        against_peer = PEER in contenders
        show(f"T {num_tokens}: correctness (compiles at the first T)")
        found = gate(contest, num_tokens, against_peer)
        bar.update()
        if num_tokens == lengths[0] and with_memory:
            for contender in CONTENDERS:
                show(f"memory of {contender}, all T")
                few = contest.compiled_memory_lengths if contender == COMPILED else None
                measured = [T for T in lengths if few is None or T in few] or lengths[:1]
                memory[contender] = memory_in_own_process(contest, contender, measured)
                bar.update()
        row: dict[str, Any] = {c: memory[c].get(num_tokens, {}) | found.get(c, {}) for c in CONTENDERS}
        for contender in found:
            row[contender]["against"] = PEER if against_peer else EAGER
        if not gate_only:
            for contender, times in take_turns(contest, num_tokens, contenders, show).items():
                row[contender] |= times
            bar.update()
        entry = {"contest": contest.name, "T": num_tokens, "graphs_so_far": graphs_compiled(), "contenders": row}
        rows.append(entry)
        for contender in CONTENDERS:
            bar.write(table_row(rows[-1], contender), file=sys.stderr)
    bar.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contests", nargs="+", choices=tuple(CONTESTS), default=list(CONTESTS), help="default: all")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192], help="T, ascending")
    parser.add_argument("--gate-only", action="store_true", help="check correctness, print the errors, write nothing")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory processes out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--measure-memory", nargs=2, metavar=("CONTEST", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()  # it says that it falls back to its torch form, which is the point
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    lengths = sorted(options.lengths)
    if options.measure_memory is not None:
        name, contender = options.measure_memory
        measure_memory(CONTESTS[name], contender, lengths)
        return

    begin = time.perf_counter()
    where = machine()
    if where["load_at_start"] > 0.5:
        print(f"the machine is busy (load {where['load_at_start']:.1f}): the timings will mean little", file=sys.stderr)
    rows = []
    for name in options.contests:
        contest = CONTESTS[name]
        own = lengths if contest.lengths is None or options.gate_only else list(contest.lengths)
        with_memory = not options.no_memory and not options.gate_only
        rows += run_contest(contest, own, with_memory, options.gate_only)
    if options.gate_only:
        return
    report = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "profiles/cpu_layers.py", *sys.argv[1:]]),
        "machine": where,
        "versions": versions(transformers=transformers.__version__),
        "tolerance": TOLERANCE,
        "widths": {name: {"hidden": HIDDEN} | CONTESTS[name].widths for name in options.contests},
        "rows": rows,
        "targets": check_targets(rows),
        "seconds": time.perf_counter() - begin,
    }
    stem = report_stem(options.results, "cpu_layers", where["cpu"])
    write_report(stem, report, markdown(report))
    print(markdown(report))
    print(f"written to {stem}.md and .json after {report['seconds']:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
