"""A KDA layer: the chunked scan over a whole sequence and one-token steps are the same function.

python examples/kda_layer.py
"""

import torch

from hybrid_flex import KimiDeltaAttention
from hybrid_flex.ops import chunk_kda, kda_reference


def main() -> None:
    torch.manual_seed(0)
    layer = KimiDeltaAttention(64, num_heads=2, head_dim=32).eval()
    x = torch.randn(2, 100, 64)

    with torch.no_grad():
        y, state = layer(x)  # all tokens at once, chunk by chunk
        steps, stepped = [], layer.init_state(2)
        for t in range(x.shape[1]):  # one token after another, with a state that does not grow
            y_t, stepped = layer.step(x[:, t], stepped)
            steps.append(y_t)
    error = (y - torch.stack(steps, dim=1)).abs().max().item()
    print(f"layer: y {tuple(y.shape)}, state {tuple(state.S.shape)}, scan and steps differ by {error:.1e}")
    assert error < 1e-4
    torch.testing.assert_close(state.S, stepped.S, rtol=1e-3, atol=1e-4)

    with torch.no_grad():  # a sequence may be cut anywhere: the state carries the past
        first, middle = layer(x[:, :37])
        second, _ = layer(x[:, 37:], middle)
    error = (y - torch.cat((first, second), dim=1)).abs().max().item()
    print(f"layer: whole and in two parts differ by {error:.1e}")
    assert error < 1e-4

    # The operator below the layer, against the recurrence written token by token.
    q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    g, beta = -torch.rand(1, 100, 2, 32), torch.rand(1, 100, 2)
    o, final = chunk_kda(q, k, v, g, beta, output_final_state=True)
    o_reference, final_reference = kda_reference(q, k, v, g, beta, output_final_state=True)
    error = max((o - o_reference).abs().max().item(), (final - final_reference).abs().max().item())
    print(f"operator: chunks and recurrence differ by {error:.1e}")
    assert error < 1e-4


if __name__ == "__main__":
    main()
