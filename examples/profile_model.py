"""Profiling: trace a training step, see where its time goes and how near that is to what the machine can do.

python examples/profile_model.py [folder, runs/profile by default] [tokens, 256 by default]
then   pip install -e '.[profile]' && tensorboard --logdir <folder>
"""

import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from hybrid_flex import HybridConfig, HybridLanguageModel, profiling


def main(folder: str = "runs/profile", num_tokens: str = "256") -> None:
    torch.manual_seed(0)
    model = HybridLanguageModel(HybridConfig(hidden_size=128, pattern="KKKS", num_heads=2, topk=32))
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(256, (1, int(num_tokens) + 1))

    def step() -> None:
        logits, _, indexer_loss = model.forward_with_indexer_loss(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + indexer_loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    # model= names the parts, from outside and for the body only: "block 3/mixer/projections", "block 3/mlp", ...
    with profiling.trace(folder, name="step", model=model, warmup=1, active=1) as profiler:
        for _ in range(2):
            step()
            profiler.step()

    report = profiling.report(profiler)
    print(report.markdown(max_rows=10))
    report.write_png(Path(folder) / "step.png")
    kda = report.row("kda_chunk")
    print(f"KDA: {kda.share:.0%} of the time, of which {kda.backward_ms / kda.time_ms:.0%} backward")
    longest = profiling.report(profiler, by="path", roofline=False).rows[0]
    print(f"longest part: {longest.name}, {longest.time_ms:.1f} ms")

    # The same formulas serve torch's own counter: every operator counts once.
    with FlopCounterMode(display=False) as counter:
        step()
    print(f"{counter.get_total_flops() / 1e9:.3f} GFLOP by torch.utils.flop_counter")
    assert counter.get_total_flops() == sum(row.flop for row in report.rows)

    try:
        report.write_tensorboard(folder)
        print(f"table, chart and numbers: tensorboard --logdir {folder}")
    except RuntimeError as error:
        print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
