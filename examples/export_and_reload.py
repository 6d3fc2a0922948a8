"""torch.export: a model as one program with open batch and length, saved, and loaded without its Python source.

python examples/export_and_reload.py
"""

import tempfile
from pathlib import Path

import torch

from hybrid_flex import HybridConfig, HybridLanguageModel, export


def main() -> None:
    torch.manual_seed(0)
    model = HybridLanguageModel(
        HybridConfig(hidden_size=32, pattern="KS", num_heads=2, topk=8, index_head_dim=16)
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        export.save(export.export_prefill(model), path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")
        program = export.load(path)

    ours = sorted({str(n.target) for n in program.graph.nodes if str(n.target).startswith("hybrid_flex")})
    print("operators that stay whole in the program:", ", ".join(ours))
    assert ours

    run = program.module()
    for shape in ((1, 17), (3, 100)):
        ids = torch.randint(256, shape)
        with torch.no_grad():
            logits, states = run(ids)
            expected, _ = model(ids)
        error = (logits - expected).abs().max().item()
        print(f"ids {shape} -> logits {tuple(logits.shape)}, differ from eager by {error:.1e}")
        assert error < 1e-4

    # The program returns the states: the model goes on from where the program stopped.
    with torch.no_grad():
        next_logits, _ = model.step(ids[:, 0], states)
        expected, _ = model(torch.cat((ids, ids[:, :1]), dim=1))
    torch.testing.assert_close(next_logits, expected[:, -1], rtol=1e-3, atol=1e-4)
    print("decoding goes on from the program's states")


if __name__ == "__main__":
    main()
