"""Train a byte-level hybrid language model (KDA and DSA layers) on real text, in a few minutes on a CPU.

    python examples/train_text.py                      # the documentation that every Python carries
    python examples/train_text.py --text book.txt      # your own text
    python examples/train_text.py --resume             # go on after Ctrl-C

Everything is written into one folder (--out): checkpoint, exported program, samples, loss curve, trace, results.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import hybrid_flex
from hybrid_flex import HybridConfig, HybridLanguageModel

HELD_OUT = 0.1  # the last tenth of the text is never trained on
DENSE_SHARE = 0.2  # of the training in which the indexer warms up on dense attention


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file; by default pydoc_data.topics")
    parser.add_argument("--out", type=Path, default=Path("runs/train_text"), help="folder of everything written")
    parser.add_argument("--seconds", type=float, default=200, help="training time; the schedule follows the clock")
    parser.add_argument("--steps", type=int, help="train this many steps instead, whatever they take (reproducible)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=192, help="a multiple of 64")
    parser.add_argument("--pattern", default="KKKS", help="one letter per layer: K KDA, S DSA, R DSA reusing, D dense")
    parser.add_argument("--topk", type=int, default=64, help="tokens that a DSA layer attends to; below --seq-len")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.01, help="of the matrices (Muon)")
    parser.add_argument("--adam-lr", type=float, default=0.005, help="of embeddings, gates, norms and the indexer")
    parser.add_argument("--eval-every", type=float, default=30, help="seconds between looks at the held-out text")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints")
    parser.add_argument("--sample-bytes", type=int, default=300, help="length of each sample")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def read_text(path: Path | None) -> bytes:
    """Read the user's file, or the topics of Python's help() without the paragraphs that several topics share."""
    if path is not None:
        return path.read_bytes()
    from pydoc_data.topics import topics

    paragraphs = (paragraph for topic in topics.values() for paragraph in topic.split("\n\n"))
    # A section stands again in its chapter; left in, the held-out text would be known by heart.
    return "\n\n".join({" ".join(p.split()): p for p in paragraphs if p.strip()}.values()).encode()


def compressed_size(text: bytes) -> int:
    return len(gzip.compress(text, 9, mtime=0))


def measure_text(train: bytes, held_out: bytes) -> dict[str, float]:
    """Measure the yardsticks, in bits per held-out byte.  gzip may look back too: 32 KiB into the training text."""
    shares = [held_out.count(bytes([b])) / len(held_out) for b in set(held_out)]
    after = compressed_size(train + held_out) - compressed_size(train)
    return {
        "order-0 entropy of the held-out text": -sum(p * math.log2(p) for p in shares),
        "gzip -9 of the held-out text alone": 8 * compressed_size(held_out) / len(held_out),
        "gzip -9 of all text, less that of the training text": 8 * after / len(held_out),
    }


class Run(NamedTuple):
    """What training changes, and what a checkpoint holds."""

    model: HybridLanguageModel
    optimizers: list[torch.optim.Optimizer]
    log: dict[str, Any]


def make_model(args: argparse.Namespace) -> HybridLanguageModel:
    config = HybridConfig(
        vocab_size=256,
        hidden_size=args.hidden_size,
        pattern=args.pattern,
        num_heads=args.hidden_size // 64,
        kda_head_dim=32,
        kda_v_head_dim=64,
        chunk_size=32,
        topk=args.topk,
        index_heads=2,
        index_head_dim=32,
    )
    return HybridLanguageModel(config).to(args.device)


def make_optimizers(model: HybridLanguageModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks; AdamW for the rest, and for the indexers, whose loss is another one."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and name.endswith("proj.weight") and "indexer" not in name
        (matrices if is_matrix else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01)
    adam = torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    for group in muon.param_groups + adam.param_groups:
        group["peak"] = group["lr"]
    return [muon, adam]


def batch_of_step(text: Tensor, step: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Cut the windows of a step; every epoch has its own offset and order, so a resumed run sees the same ones."""
    count = (len(text) - 1) // args.seq_len - 1
    rows = []
    for number in range(step * args.batch_size, (step + 1) * args.batch_size):
        epoch, i = divmod(number, count)
        generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
        offset = int(torch.randint(args.seq_len, (1,), generator=generator))
        start = offset + args.seq_len * int(torch.randperm(count, generator=generator)[i])
        rows.append(text[start : start + args.seq_len + 1])
    windows = torch.stack(rows).to(args.device, torch.int64)
    return windows[:, :-1], windows[:, 1:]


def train_step(run: Run, ids: Tensor, targets: Tensor, progress: float) -> tuple[float, float]:
    """Take one step at ``progress`` (0 to 1) of the training; returns bits per byte and the indexers' loss (nats)."""
    factor = min(1.0, progress / 0.02 + 0.05) * min(1.0, (1.0 - progress) / 0.6 + 0.01)
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak"] * factor
    # One backward pass serves both losses: the indexer's reaches the indexers and nothing else, the other the rest.
    stage = "dense" if progress < DENSE_SHARE else "sparse"
    logits, _, indexer_loss = run.model.forward_with_indexer_loss(ids, stage=stage)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    (loss + indexer_loss).backward()
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item() / math.log(2), indexer_loss.item()


@torch.no_grad()
def held_out_bits(model: HybridLanguageModel, text: Tensor, window: int, stride: int) -> float:
    """Measure bits per byte: every byte once, predicted from at least ``window - stride`` bytes (all, at the start)."""
    model.eval()
    ids = text.to(model.embedding.weight.device, torch.int64)
    total, done = 0.0, 1
    while done < len(ids):
        stop = min(done + (window if done == 1 else stride), len(ids))
        start = max(0, stop - 1 - window)
        logits, _ = model(ids[None, start : stop - 1])
        total += F.cross_entropy(logits[0, done - 1 - start :].float(), ids[done:stop], reduction="sum").item()
        done = stop
    model.train()
    return total / math.log(2) / (len(ids) - 1)


def save_checkpoint(folder: Path, run: Run) -> None:
    """Write a checkpoint that appears whole or not at all, then remove the ones before it."""
    final, partial = folder / f"checkpoint-{run.log['step']:06d}", folder / "checkpoint.partial"
    if final.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    run.model.save_pretrained(partial)
    torch.save({"optimizers": [o.state_dict() for o in run.optimizers], "log": run.log}, partial / "training.pt")
    partial.rename(final)
    for older in folder.glob("checkpoint-*"):
        if older != final:
            shutil.rmtree(older)


def load_checkpoint(folder: Path, args: argparse.Namespace) -> Run:
    found = sorted(folder.glob("checkpoint-*"))
    if not found:
        raise SystemExit(f"--resume: no checkpoint in {folder}; start without it")
    model = HybridLanguageModel.from_pretrained(found[-1], device=args.device)
    optimizers = make_optimizers(model, args)
    saved = torch.load(found[-1] / "training.pt", map_location=args.device, weights_only=True)
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return Run(model, optimizers, saved["log"])


def train(run: Run, train_text: Tensor, held_out: Tensor, args: argparse.Namespace) -> bool:
    """Train until the time or the steps are over (True) or until Ctrl-C (False)."""
    interrupted = False

    def stop_after_this_step(signum: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, before)  # a second Ctrl-C ends at once

    before = signal.signal(signal.SIGINT, stop_after_this_step)
    log = run.log
    some_held_out = torch.cat(held_out.split(1024)[::4])  # a quarter is enough to look at, and spread over the text
    start = time.monotonic() - log["seconds"]
    saved = evaluated = log["seconds"]
    total = args.steps or args.seconds
    unit = "steps" if args.steps else "s"
    bar = tqdm(total=total, bar_format=f"{{l_bar}}{{bar}}| {{n:.0f}}/{{total:.0f}} {unit}{{postfix}}")
    while not interrupted:
        done = min(total, log["step"] if args.steps else log["seconds"])
        bar.update(done - bar.n)
        if done == total:
            break
        step_start = time.monotonic()
        ids, targets = batch_of_step(train_text, log["step"], args)
        bits, indexer_loss = train_step(run, ids, targets, done / total)
        log["step"] += 1
        log["train"].append(bits)
        log["indexer"].append(indexer_loss)
        recent, speed = log["train"][-20:], ids.numel() / (time.monotonic() - step_start)
        shown = f"{sum(recent) / len(recent):.3f} bits/byte, {speed:.0f} tokens/s, indexer's KL {indexer_loss:.3f}"
        bar.set_postfix_str(shown, refresh=False)
        if time.monotonic() - start - evaluated > args.eval_every:
            log["held_out"].append((log["step"], held_out_bits(run.model, some_held_out, args.seq_len, args.seq_len)))
            evaluated = time.monotonic() - start
        log["seconds"] = time.monotonic() - start
        if log["seconds"] - saved > args.save_every:
            save_checkpoint(args.out, run)
            saved = log["seconds"]
    bar.close()
    save_checkpoint(args.out, run)
    signal.signal(signal.SIGINT, before)
    return not interrupted


def print_samples(model: HybridLanguageModel, args: argparse.Namespace) -> None:
    """Continue two prompts; the recurrent forms make one byte after another."""
    samples = []
    for prompt in ("The for statement ", "If the argument is "):
        ids = torch.tensor([list(prompt.encode())], device=args.device)
        made = model.generate(ids, args.sample_bytes, temperature=0.8, top_p=0.95, seed=args.seed)
        samples.append(f"--- {bytes(made[0].tolist()).decode(errors='replace')}\n")
    (args.out / "samples.txt").write_text("".join(samples))
    print("".join(samples))


def export_and_check(model: HybridLanguageModel, held_out: Tensor, path: Path) -> float:
    """Export, save, load, and compare the loaded program with the model on a length it was not traced with."""
    hybrid_flex.export.save(hybrid_flex.export.export_prefill(model), path)
    program = hybrid_flex.export.load(path).module()
    ids = held_out[:300].to(model.embedding.weight.device, torch.int64)[None]
    with torch.no_grad():
        error = (program(ids)[0] - model(ids)[0]).abs().max().item()
    assert error < 1e-3, f"the exported program differs from the model by {error}"
    return error


def write_trace(run: Run, text: Tensor, args: argparse.Namespace) -> None:
    ids, targets = (batch[:1, :128] for batch in batch_of_step(text, 0, args))
    shutil.rmtree(args.out / "trace", ignore_errors=True)
    with hybrid_flex.profiling.trace(args.out / "trace", warmup=1, active=1, name="train_step") as profiler:
        for _ in range(2):
            with hybrid_flex.profiling.range("train step"):
                train_step(run, ids, targets, 1.0)
            profiler.step()


def draw_loss(log: dict[str, Any], yardsticks: dict[str, float], path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(log["train"]) + 1), log["train"], linewidth=0.6, label="training batch")
    axes.plot(*zip(*log["held_out"], strict=True), marker="o", label="held-out text, a quarter of it; at the end all")
    for (name, bits), style in zip(yardsticks.items(), (":", "-.", "--"), strict=True):
        axes.axhline(bits, color="gray", linestyle=style, label=name)
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(1, 6))
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TensorFloat-32
    args.out.mkdir(parents=True, exist_ok=True)
    text = read_text(args.text)
    split = int(len(text) * (1 - HELD_OUT))
    if split < 4 * args.seq_len:
        raise SystemExit(f"the text is too short: {len(text)} bytes for sequences of {args.seq_len}")
    yardsticks = measure_text(text[:split], text[split:])
    train_text, held_out = (
        torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (text[:split], text[split:])
    )
    if args.resume:
        run = load_checkpoint(args.out, args)
    else:
        for old in args.out.glob("checkpoint-*"):
            shutil.rmtree(old)
        model = make_model(args)
        log = {"step": 0, "seconds": 0.0, "train": [], "indexer": [], "held_out": []}
        run = Run(model, make_optimizers(model, args), log)
    model, log = run.model, run.log
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(text):,} bytes of text, {len(held_out):,} held out; {parameters:,} parameters on {args.device}")
    if not train(run, train_text, held_out, args):
        raise SystemExit("interrupted; the checkpoint is written, go on with --resume")

    bits = held_out_bits(model, held_out, 2 * args.seq_len, args.seq_len)
    print(f"bits per byte of the held-out text\n  {bits:.3f}  this model")
    for name, value in sorted(yardsticks.items(), key=lambda item: item[1]):
        print(f"  {value:.3f}  {name}")
    log["held_out"].append((log["step"], bits))
    draw_loss(log, yardsticks, args.out / "loss.png")
    model.eval()
    print_samples(model, args)
    error = export_and_check(model, held_out, args.out / "model.pt2")
    print(f"exported to model.pt2, loaded back: largest difference from eager {error:.1e}")
    write_trace(run, train_text, args)
    results = {"this model": bits, **yardsticks, "parameters": parameters}
    results |= {"steps": log["step"], "seconds": log["seconds"]}
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {args.out}: " + ", ".join(sorted(p.name for p in args.out.iterdir())))


if __name__ == "__main__":
    main()
