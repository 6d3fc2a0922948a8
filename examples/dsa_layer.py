"""A sparse attention layer: which keys its indexer selects, drawn as a picture.

python examples/dsa_layer.py [folder of the picture, runs/dsa_layer by default]
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from hybrid_flex import DeepSeekSparseAttention


def main(folder: str = "runs/dsa_layer") -> None:
    torch.manual_seed(0)
    layer = DeepSeekSparseAttention(64, num_heads=4, num_kv_heads=2, topk=16, index_heads=4, index_head_dim=32).eval()
    # Eight topics, repeated: tokens of one topic are alike, and random projections already keep likeness.
    topics = torch.randn(8, 64)
    x = topics[torch.arange(128) // 4 % 8][None] + 0.3 * torch.randn(1, 128, 64)

    with torch.no_grad():
        y, state, indices, _ = layer.attend(x)
        dense = DeepSeekSparseAttention(64, 4, num_kv_heads=2, topk=128, index_heads=4, index_head_dim=32).eval()
        dense.load_state_dict(layer.state_dict())
        y_dense, _ = dense(x)
    print(f"y {tuple(y.shape)}, cache {tuple(state.kv.shape)}, indices {tuple(indices.shape)}, {indices.dtype}")

    used = indices[0] >= 0
    query = torch.arange(128)[:, None].expand_as(indices[0])
    assert (used.sum(-1) == torch.arange(1, 129).clamp(max=16)).all(), "min(t + 1, topk) keys per query"
    assert (indices[0][used] <= query[used]).all(), "no key after its query"
    error = (y - y_dense)[:, :16].abs().max().item()
    print(f"the first topk queries see everything: they differ from dense attention by {error:.1e}")
    assert error < 1e-5

    selected = torch.zeros(128, 128)
    selected[query[used], indices[0][used].long()] = 1
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(selected.numpy(), cmap="Blues", interpolation="nearest")
    axes.set(xlabel="key", ylabel="query", title="selected keys, 16 of each query's past")
    path = Path(folder) / "selected_keys.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"picture: {path}")
    assert path.stat().st_size > 0


if __name__ == "__main__":
    main(*sys.argv[1:])
