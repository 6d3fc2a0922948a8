"""Measure how far neighbouring queries of a trained model select alike: what the forms of attention can share.

    python examples/train_text.py --text book.txt && python profiles/agreement.py --text book.txt

For every DSA layer of a model that reads bytes, on the end of a text that it was not trained on, over the queries that
see more than twice ``topk`` keys:
  shared   share of a query's keys that the query before it selects as well.
  recent   share of a query's keys that are among its last ``topk`` ones.
  union n  distinct keys of n consecutive queries, over ``topk``: 1 where they agree, n where they share nothing.
  blocks   share of the visible blocks of 128 keys that any of 32 consecutive queries selects from.
Below each, what queries would give that select independently of each other: n of them leave a key that all of them see
with the probability (1 - topk / t)^n.

The table goes to profiles/results/agreement_<device>_<yyyymmdd>.md, everything measured to the .json beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, progress, report_stem, table, write_report
from machine import facts_of_run, heading
from torch import Tensor
from tqdm import tqdm

from hybrid_flex import HybridLanguageModel
from hybrid_flex.layers import LightningIndexer

TILES = (8, 32, 128)
"""Numbers of consecutive queries, each a divisor of the largest."""
BLOCK_QUERIES, BLOCK_KEYS = 32, 128


def selections(model: HybridLanguageModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the model on ``ids [1, T]``; its logits, and what each indexer selects, int32 ``[T, J]``, -1 where unused."""
    found: dict[str, Tensor] = {}

    def listen(name: str, indexer: LightningIndexer) -> None:
        select: Callable[..., Tensor] = indexer.select

        def heard(*args: Any, **kwargs: Any) -> Tensor:
            pools = select(*args, **kwargs)
            found[name] = indexer.tokens(pools)[0]
            return pools

        indexer.select = heard  # type: ignore[method-assign]

    indexers = {name: module for name, module in model.named_modules() if isinstance(module, LightningIndexer)}
    for name, indexer in indexers.items():
        listen(name, indexer)
    try:
        with torch.no_grad():
            logits = model(ids)[0]
    finally:
        for indexer in indexers.values():
            del indexer.select
    return logits, found


def agreement(indices: Tensor, topk: int) -> dict[str, float]:
    """Measure what stands in the module's help, of the queries that see more than twice ``topk`` keys."""
    T, most = indices.shape[0], max(TILES)
    sums: dict[str, float] = {}
    first = -(-2 * topk // most) * most
    tiles = range(first, T - most + 1, most)
    if not tiles:
        raise SystemExit(f"--length {T} is too short: {first + most} tokens are the least with topk = {topk}")
    before = members(indices[first - 1 : first], T)
    for start in tiles:
        slots = indices[start : start + most]
        here = members(slots, T)
        seen = torch.arange(start + 1, start + most + 1, device=indices.device, dtype=torch.float64)
        shared = (here & torch.cat((before, here[:-1]))).sum(1) / here.sum(1)
        before = here[-1:]
        # All of these queries see more than topk keys, so that no unused slot, -1, is among the last ones.
        recent = slots > torch.arange(start, start + most, device=indices.device)[:, None] - topk
        values = {"shared": shared.mean(), "recent": (recent.sum(1) / here.sum(1)).mean()}
        values |= dict.fromkeys(("shared if independent", "recent if independent"), (topk / seen).mean())
        for n in TILES:
            union = here.unflatten(0, (-1, n)).any(1).sum(1)
            values[f"union {n}"] = union.double().mean() / topk
            values[f"union {n} if independent"] = independent_union(start, most, n, topk) / topk
        touched = here.unflatten(0, (-1, BLOCK_QUERIES)).any(1)
        padded = torch.nn.functional.pad(touched, (0, -T % BLOCK_KEYS)).unflatten(1, (-1, BLOCK_KEYS))
        visible = torch.arange(start + BLOCK_QUERIES, start + most + 1, BLOCK_QUERIES) / BLOCK_KEYS
        values["blocks"] = padded.any(2).sum() / visible.ceil().sum()
        values["blocks if independent"] = (1 - (1 - topk / seen) ** (BLOCK_QUERIES * BLOCK_KEYS)).mean()
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value) / len(tiles)
    return sums


def independent_union(start: int, count: int, n: int, topk: int) -> float:
    """Return how many keys n of ``count`` queries from ``start`` on select on average, if each draws its own."""
    total = 0.0
    for first in range(start, start + count, n):
        seen = torch.arange(first + 1, first + n + 1, dtype=torch.float64)
        # Logarithms of how likely a key is left by all queries from one on, which are those that see a key of the tile.
        left = torch.log1p(-topk / seen).flip(0).cumsum(0).flip(0)
        total -= float(first * torch.expm1(left[0]) + torch.expm1(left).sum())
    return total / (count // n)


def members(indices: Tensor, num_keys: int) -> Tensor:
    """Write out selections ``[n, J]`` as memberships, bool ``[n, S]``."""
    # Unused slots name a column of their own, which is left out.
    slots = torch.where(indices >= 0, indices, num_keys).long()
    found = torch.zeros(len(indices), num_keys + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(1, slots, True)[:, :num_keys]


HEADER = (
    {"layer": "---", "shared": "---:", "recent": "---:"} | {f"union {n}": "---:" for n in TILES} | {"blocks": "---:"}
)


def markdown(result: dict[str, Any]) -> str:
    """Write the results as a Markdown document."""

    def cells(title: str, values: dict[str, float], suffix: str) -> list[str]:
        shares = {"shared", "recent", "blocks"}
        numbers = [(name, values[name + suffix]) for name in list(HEADER)[1:]]
        return [title, *(f"{value:.1%}" if name in shares else f"{value:.2f}" for name, value in numbers)]

    rows = [cells(name, values, "") for name, values in result["layers"].items()]
    rows.append(cells("independent", next(iter(result["layers"].values())), " if independent"))
    lines = [
        *heading("How far neighbouring queries select alike", result),
        f"A model of {result['parameters']:,} parameters, pattern {result['pattern']}, top-{result['topk']}, "
        f"{result['bits_per_byte']:.3f} bits per byte on the {result['texts']} sequences of {result['length']} bytes "
        "that it reads here.",
        "Columns: `python profiles/agreement.py --help`.",
        "",
        *table(HEADER, rows),
    ]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a file, whose last tenth is read")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint (default: the one in runs/train_text)")
    parser.add_argument("--length", type=int, default=4096, help="bytes of a sequence (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=4, help="sequences, spread over the text (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table (default: profiles/results)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    begin, facts = time.perf_counter(), facts_of_run("agreement.py", torch.device(options.device))
    folders = [options.model] if options.model else sorted(Path("runs/train_text").glob("checkpoint-*"))
    if not folders:
        raise SystemExit(
            "no checkpoint in runs/train_text: train one by examples/train_text.py, or name its folder by --model"
        )
    model = HybridLanguageModel.from_pretrained(folders[-1], device=options.device).eval()
    text = options.text.read_bytes()
    text = text[len(text) - len(text) // 10 :]
    if len(text) <= options.length:
        raise SystemExit(f"the text is too short: a tenth of it is {len(text)} bytes, --length {options.length}")
    step = max(1, (len(text) - options.length - 1) // max(1, options.texts - 1))
    layers: dict[str, dict[str, float]] = {}
    loss = 0.0
    for i in tqdm(range(options.texts), file=sys.stderr):
        ids = torch.frombuffer(bytearray(text[i * step : i * step + options.length + 1]), dtype=torch.uint8)
        ids = ids.to(options.device, torch.int64)[None]
        logits, found = selections(model, ids[:, :-1])
        loss += torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:]).item() / math.log(2) / options.texts
        for name, indices in found.items():
            own = layers.setdefault(name.removesuffix(".indexer"), {})
            for key, value in agreement(indices, model.config.topk).items():
                own[key] = own.get(key, 0.0) + value / options.texts
    result = {
        **facts,
        "seconds": time.perf_counter() - begin,
        "parameters": sum(p.numel() for p in model.parameters()),
        "pattern": model.config.letters,
        "topk": model.config.topk,
        "length": options.length,
        "texts": options.texts,
        "bits_per_byte": loss,
        "layers": layers,
    }
    stem = report_stem(options.out, "agreement", result["machine"]["name"])
    write_report(stem, result, markdown(result))
    print(markdown(result))
    progress(f"written to {stem}.md and .json")


if __name__ == "__main__":
    main()
