"""Packed sequences: several sequences of different lengths in one row, without padding.

python examples/packed_sequences.py
"""

import torch

from hybrid_flex import HybridConfig, HybridLanguageModel


def main() -> None:
    torch.manual_seed(0)
    model = HybridLanguageModel(HybridConfig(hidden_size=64, pattern="KKS", num_heads=2, topk=8, index_head_dim=16))
    sequences = [torch.randint(256, (length,)) for length in (37, 5, 64, 1)]
    packed = torch.cat(sequences)[None]
    cu_seqlens = torch.tensor([0, 37, 42, 106, 107], dtype=torch.int32)  # where each begins, and the end

    logits, states = model(packed, cu_seqlens=cu_seqlens)
    print(f"ids {tuple(packed.shape)}, boundaries {cu_seqlens.tolist()} -> logits {tuple(logits.shape)}")
    for i, sequence in enumerate(sequences):
        alone, _ = model(sequence[None])
        mine = logits[:, cu_seqlens[i] : cu_seqlens[i + 1]]
        error = (mine - alone).abs().max().item()
        print(f"sequence {i}, {len(sequence)} tokens: packed and alone differ by {error:.1e}")
        assert error < 1e-4

    # KDA layers return one state per sequence; sparse layers keep no cache of packed sequences.
    print(f"KDA states {tuple(states[0].S.shape)}; sparse layer's state: {states[2]}")
    assert states[0].S.shape[0] == len(sequences) and states[2] is None

    # A loss over packed sequences must not predict a sequence's first token from the one before it.
    is_last = torch.zeros(packed.shape[1], dtype=torch.bool)
    is_last[cu_seqlens[1:].long() - 1] = True
    targets = packed.roll(-1, dims=1).masked_fill(is_last, -100)  # cross_entropy ignores -100
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    print(f"loss {loss.item():.3f} over {(targets >= 0).sum().item()} predictions")
    assert (targets >= 0).sum() == packed.numel() - len(sequences)


if __name__ == "__main__":
    main()
