"""Train a lightning indexer in its two stages: dense warm-up, then on its own selection.

python examples/train_indexer.py
"""

import torch

from hybrid_flex import DeepSeekSparseAttention


def selected_share(layer: DeepSeekSparseAttention, x: torch.Tensor) -> float:
    """Measure which part of the dense attention's probability the selected keys hold."""
    with torch.no_grad():
        q = layer.q_proj(x).unflatten(-1, (layer.num_heads, layer.head_dim))
        k = layer.k_proj(x).unflatten(-1, (layer.num_kv_heads, layer.head_dim))
        logits = torch.einsum("bthd,bsgd->bthgs", q, k).squeeze(3) * layer.scale  # one key head
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        p = logits.masked_fill(future[:, None], float("-inf")).softmax(-1).mean(2)
        indices = layer.attend(x)[2]
        return (
            p.gather(-1, indices.long().clamp(min=0)).mul(indices >= 0)[:, layer.indexer.topk :].sum(-1).mean().item()
        )


def main() -> None:
    torch.manual_seed(0)
    layer = DeepSeekSparseAttention(32, num_heads=4, num_kv_heads=1, topk=8, index_heads=4, index_head_dim=16)
    with torch.no_grad():
        layer.q_proj.weight.mul_(6)  # an attention with something to find: peaked, like a trained one
    x = torch.randn(4, 96, 32)
    print(f"before: the {layer.indexer.topk} selected keys hold {selected_share(layer, x):.0%} of the attention")

    optimizer = torch.optim.AdamW(layer.indexer.parameters(), lr=1e-2)
    shares = [selected_share(layer, x)]
    for stage, steps in (("dense", 120), ("sparse", 60)):
        losses = []
        for _ in range(steps):
            _, _, loss = layer.forward_with_indexer_loss(x, stage=stage)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        shares.append(selected_share(layer, x))
        shown = " ".join(f"{loss:.3f}" for loss in (*losses[:: steps // 4], losses[-1]))
        print(f"{stage:>6} stage, KL loss {shown}; the selected keys hold {shares[-1]:.0%}")
        assert losses[-1] < losses[0]
    assert shares[-1] > shares[0]
    assert layer.q_proj.weight.grad is None, "the indexer's loss reaches the indexer and nothing else"


if __name__ == "__main__":
    main()
