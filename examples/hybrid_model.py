"""A hybrid language model: a pattern of layers, one training step, generation, saving and loading.

python examples/hybrid_model.py
"""

import tempfile

import torch
import torch.nn.functional as F

from hybrid_flex import HybridConfig, HybridLanguageModel


def main() -> None:
    torch.manual_seed(0)
    # Three KDA layers and a sparse one, twice; the second sparse layer reuses the first one's selection.
    config = HybridConfig(vocab_size=256, hidden_size=64, pattern="KKKSKKKR", num_heads=2, topk=16, index_head_dim=16)
    model = HybridLanguageModel(config)
    print(f"layers {config.letters}, {sum(p.numel() for p in model.parameters()):,} parameters")

    ids = torch.randint(256, (2, 65))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        logits, _, indexer_loss = model.forward_with_indexer_loss(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + indexer_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print("loss", " ".join(f"{loss:.3f}" for loss in losses))
    assert losses[-1] < losses[0]

    model.eval()
    made = model.generate(ids[:, :20], max_new_tokens=12, greedy=True)
    with torch.no_grad():
        logits, _ = model(made[:, :-1])  # what generation did step by step, in one pass
    print(f"generated {tuple(made.shape)}; the full pass predicts the same bytes")
    assert torch.equal(logits[:, 19:].argmax(-1), made[:, 20:])

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = HybridLanguageModel.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model(ids)[0])
    print("saved, loaded: the same logits")


if __name__ == "__main__":
    main()
