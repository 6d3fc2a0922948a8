"""The options of profiles that take a whole model, and the model that they describe."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from machine import DTYPES

from hybrid_flex import HybridConfig, HybridLanguageModel


def add_model_options(parser: argparse.ArgumentParser, **defaults: int | None) -> None:
    """Add what decides on the model, its inputs and where it runs; profiles do not share all ``defaults``."""
    parser.add_argument("--pattern", default="KKKS", help="layers, see HybridConfig (default: %(default)s)")
    parser.add_argument("--num-layers", type=int, help="default: %(default)s (None: one round of the pattern)")
    parser.add_argument("--hidden-size", type=int, help="model width (default: %(default)s)")
    parser.add_argument("--num-heads", type=int, help="default: %(default)s")
    parser.add_argument("--vocab-size", type=int, help="default: %(default)s")
    parser.add_argument("--topk", type=int, help="keys that a query selects (default: %(default)s)")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="default: float32, bfloat16 on a GPU")
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, default=None, help="of torch on a CPU; 1 where others use the cores too")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)


def make_model(options: argparse.Namespace) -> tuple[HybridLanguageModel, dict[str, Any]]:
    """Make the model that the options describe, on its device, and the facts about it for a report."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    torch.manual_seed(options.seed)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    config = HybridConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        pattern=options.pattern,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        topk=options.topk,
    )
    model = HybridLanguageModel(config).to(device=device, dtype=DTYPES[dtype])
    weights = list(model.parameters())
    return model, {
        "pattern": config.letters,
        "hidden": config.hidden_size,
        "heads": config.num_heads,
        "vocabulary": config.vocab_size,
        "topk": config.topk,
        "parameters": sum(weight.numel() for weight in weights),
        "parameter_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "length": options.length,
        "batch": options.batch_size,
        "dtype": dtype,
    }
