"""Where the time of a training step of chunk_kda goes, kernel by kernel, and what the step's errors are.

    python profiles/kda_kernels.py                      T 8192, 96 heads of 128, bfloat16, both gates
    python profiles/kda_kernels.py --device cpu --quick    tiny, to see that it runs

Gate, norms and sigmoid are inside.  Times: median of whole steps by CUDA events (wall clock on a CPU), and the mean of
each kernel over three steps by torch.profiler.  Errors: against `chunk_kda` in float64, ||x - ref|| / ||ref||.
"""

from __future__ import annotations

import argparse

import torch
from harness import Clock, Plan, take_turns
from kda_rows import OURS, Row, judge, make_inputs, of_head, run

from hybrid_flex.ops import chunk_kda


def report(row: Row, device: torch.device, plan: Plan) -> list[str]:
    """Measure one row and return its lines."""
    x = make_inputs(row, device, seed=0)
    result = run(chunk_kda, row, x)
    kept = {h: {name: of_head(name, t, h, row).clone() for name, t in result.items()} for h in row.judged_heads}
    errors = judge(row, x, {OURS: kept})[OURS]
    seconds = sorted(take_turns({OURS: lambda: run(chunk_kda, row, x)}, Clock(device), plan)[OURS])
    activity = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(3):
            run(chunk_kda, row, x)
    times = [
        (e.device_time_total if device.type == "cuda" else e.self_cpu_time_total, e) for e in profile.key_averages()
    ]
    longest = sorted(times, key=lambda item: -item[0])[:8]
    lines = [f"{row.name}: {seconds[len(seconds) // 2] * 1e3:.3f} ms a step"]
    lines += [f"  {time / 3e3:9.3f} ms  {event.count / 3:4.1f} calls  {event.key[:60]}" for time, event in longest]
    return [*lines, "  errors " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three repeats")
    options = parser.parse_args()
    device = torch.device(options.device)
    plan = Plan(min_rounds=3, min_seconds=0.0, warm_up_rounds=1) if options.quick else Plan()
    for name, lower_bound in (("train_lower_bound", -5.0), ("train_softplus", None)):
        row = Row(name, 8192, 96, lower_bound=lower_bound)
        print("\n".join(report(row.quick() if options.quick else row, device, plan)), flush=True)


if __name__ == "__main__":
    main()
