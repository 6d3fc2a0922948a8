"""torch.compile: a hybrid layer is one graph, forward and backward, for every length.

python examples/compile_layer.py [backend, inductor by default; its first compilation takes a minute on a CPU]
"""

import sys

import torch

from hybrid_flex import DeepSeekSparseAttention, KimiDeltaAttention, SequentialHybrid


def main(backend: str = "inductor") -> None:
    torch.manual_seed(0)
    kda = KimiDeltaAttention(32, num_heads=1, head_dim=32, chunk_size=16)
    dsa = DeepSeekSparseAttention(32, num_heads=2, topk=8, index_heads=2, index_head_dim=16)
    layer = SequentialHybrid(kda, dsa)
    # fullgraph=True: a graph break would be an error.  dynamic=True: B and T are symbols from the first call on.
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)

    def run(function: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layer.zero_grad()
        y, _ = function(x)
        y.square().mean().backward()
        return y.detach(), kda.q_proj.weight.grad.clone()

    run(compiled, torch.randn(2, 50, 32))
    print(f"compiled with {backend}")
    with torch.compiler.set_stance("fail_on_recompile"):  # from here on a second graph would be an error, too
        for shape in ((2, 65, 32), (3, 130, 32)):
            x = torch.randn(shape)
            y, gradient = run(layer, x)
            y_compiled, gradient_compiled = run(compiled, x)
            error, error_gradient = (y - y_compiled).abs().max(), (gradient - gradient_compiled).abs().max()
            print(f"x {shape}: output differs by {error:.1e}, gradient by {error_gradient:.1e}")
            assert error < 1e-4 and error_gradient < 1e-4
    print("one graph served every shape")


if __name__ == "__main__":
    main(*sys.argv[1:])
