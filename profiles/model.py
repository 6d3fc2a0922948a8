"""Profile a hybrid language model where it spends its life: prefill, a training step, decoding.

    pip install -e '.[profile]' && python profiles/model.py && tensorboard --logdir profiles/runs

Each phase is timed without a profiler first (median, 20th and 80th percentile, peak memory), then traced once:
  prefill   logits of a whole prompt, no gradients.
  train     logits, indexer loss, backward and AdamW on one batch.
  decode    single tokens after a prompt, into caches of fixed size.
The trace goes to profiles/runs/<phase>, for TensorBoard's profiler tab and https://ui.perfetto.dev; a table of its
parts (time, share, FLOP/s, bytes/s, share of the measured roofline), a chart and numbers go beside it, for
TensorBoard's own text, images and scalars tabs, which need no internet.  What an earlier run left in these folders is
replaced.  Without tensorboard installed the traces are written all the same.

All tables go to profiles/results/model_<device>_<yyyymmdd>.md, everything measured to the .json beside it, and the
chart of the training step to the .png.  Traced times include the profiler's own cost, timed ones do not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import (
    RESULTS,
    Clock,
    Plan,
    progress,
    report_stem,
    spread,
    table,
    take_turns,
    write_report,
)
from machine import facts_of_run, heading, peak_bytes, with_cpu_seconds
from model_options import add_model_options, make_model
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from hybrid_flex import HybridLanguageModel, profiling

PHASES = ("prefill", "train", "decode")
RUNS = Path(__file__).parent / "runs"
WRITTEN = ("*.pt.trace.json", "*.pt.trace.json.gz", "events.out.tfevents.*")
"""What this program leaves in the folder of a phase."""


def make_phase(model: HybridLanguageModel, name: str, options: argparse.Namespace) -> tuple[Callable[[], Any], int]:
    """Return one turn of a phase, and the tokens that it works on."""
    vocab_size = model.config.vocab_size
    shape, device = (options.batch_size, options.length + 1), model.embedding.weight.device
    ids = torch.randint(vocab_size, shape, device=device)
    if name == "prefill":

        def prefill() -> None:
            with torch.no_grad():
                model(ids[:, :-1])

        return prefill, ids[:, :-1].numel()
    if name == "train":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def train() -> None:
            logits, _, indexer_loss = model.forward_with_indexer_loss(ids[:, :-1])
            with profiling.range("cross_entropy"):
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            (loss + indexer_loss).backward()
            optimizer.step()
            optimizer.zero_grad()

        return train, ids[:, :-1].numel()
    with torch.no_grad():
        _, states = model(ids[:, :-1])
    # Every turn begins from the same caches, one token longer than the prompt.
    reserved = model.reserve(states, options.length + 1)

    def decode() -> None:
        with torch.no_grad():
            for state in reserved:
                if hasattr(state, "lengths"):
                    state.lengths.fill_(options.length)
            model.step(ids[:, -1], reserved)

    return decode, options.batch_size


def profile_phase(
    model: HybridLanguageModel, name: str, options: argparse.Namespace, plan: Plan, show: Callable[[str], None]
) -> tuple[dict[str, Any], profiling.Report]:
    """Time a phase, then trace it and report on the trace."""
    turn, num_tokens = make_phase(model, name, options)
    device = model.embedding.weight.device
    show(f"{name}: timing")
    begin = time.perf_counter()
    turn()
    found: dict[str, Any] = {"tokens": num_tokens, "first_call_s": time.perf_counter() - begin}
    found["peak_bytes"] = peak_bytes(turn, device)
    counted, cpu_seconds = with_cpu_seconds(turn)
    seconds = take_turns({name: counted}, Clock(device), plan)[name]
    found |= spread(seconds) | {"repeats": len(seconds)}
    if device.type == "cpu":
        found["cpu_median_ms"] = statistics.median(cpu_seconds[-len(seconds) :]) * 1e3
    with FlopCounterMode(display=False) as counter:
        turn()
    found["flop"] = counter.get_total_flops()
    found["flop_per_s"] = found["flop"] / found["median_ms"] * 1e3

    show(f"{name}: tracing")
    folder = options.runs / name
    for pattern in WRITTEN:
        for file in folder.glob(pattern):
            file.unlink()
    active = options.decode_steps if name == "decode" else 1
    with profiling.trace(folder, name=name, model=model, warmup=1, active=active) as profiler:
        for _ in range(1 + active):
            turn()
            if device.type == "cuda":
                torch.cuda.synchronize()
            profiler.step()
    show(f"{name}: report")
    report = profiling.report(profiler)
    try:
        report.write_tensorboard(folder)
    except RuntimeError as error:
        progress(f"{error}; the trace is written, the tables are in the results")
    return found | {"report": report.to_dict()}, report


HEADER = {"phase": "---", "tokens": "---:", "ms": "---:", "CPU ms": "---:", "tokens/s": "---:"}
HEADER |= {"GFLOP": "---:", "GFLOP/s": "---:", "peak MiB": "---:"}


def markdown(result: dict[str, Any], reports: dict[str, profiling.Report]) -> str:
    """Write the results as a Markdown document."""
    lines = [
        *heading("A hybrid language model, phase by phase", result),
        ", ".join(f"{key} {value}" for key, value in result["model"].items()) + ".",
        "Without a profiler: median (20th to 80th percentile); CPU ms: median of the processor's time, without waiting "
        "for a core that another program has. Peak: what a turn holds beyond what lives before it.",
        "",
    ]
    rows = []
    for name, own in result["phases"].items():
        peak = own["peak_bytes"]
        rows.append(
            [
                name,
                str(own["tokens"]),
                f"{own['median_ms']:.2f} ({own['p20_ms']:.2f}-{own['p80_ms']:.2f})",
                f"{own['cpu_median_ms']:.2f}" if "cpu_median_ms" in own else "",
                f"{own['tokens'] / own['median_ms'] * 1e3:.0f}",
                f"{own['flop'] / 1e9:.3f}",
                f"{own['flop_per_s'] / 1e9:.1f}",
                "" if peak is None else f"{peak / 2**20:.1f}",
            ]
        )
    lines += [*table(HEADER, rows), "", "Traced, with the profiler's cost in every time:", ""]
    return "\n".join(lines) + "\n" + "\n".join(report.markdown() for report in reports.values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="default: all")
    add_model_options(parser, hidden_size=256, num_heads=4, vocab_size=4096, topk=64, length=512)
    parser.add_argument("--decode-steps", type=int, default=8, help="tokens traced (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend per time, at least (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="TensorBoard's folder (default: profiles/runs)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables (default: profiles/results)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    begin = time.perf_counter()
    model, shape = make_model(options)
    device = model.embedding.weight.device
    plan = Plan(min_rounds=5, min_seconds=options.seconds, max_seconds=4 * options.seconds, warm_up_rounds=1)
    result: dict[str, Any] = {
        **facts_of_run("model.py", device),
        "model": shape,
        "phases": {},
    }
    reports = {}
    with tqdm(total=3 * len(options.phases), file=sys.stderr) as bar:
        for name in options.phases:

            def show(text: str) -> None:
                bar.set_description(text)
                bar.update()

            result["phases"][name], reports[name] = profile_phase(model, name, options, plan, show)
    result["seconds"] = time.perf_counter() - begin
    stem = report_stem(options.out, "model", result["machine"]["name"])
    write_report(stem, result, markdown(result, reports))
    chart = reports.get("train") or next(iter(reports.values()))
    chart.write_png(stem.with_suffix(".png"))
    print(markdown(result, reports))
    progress(f"written to {stem}.md, .json and .png; show the traces: tensorboard --logdir {options.runs}")


if __name__ == "__main__":
    main()
