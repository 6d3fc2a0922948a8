"""RoPE layouts: rotation against complex numbers, and the selection that a wrong layout changes."""

from __future__ import annotations

import cmath

import pytest
import torch

from hybrid_flex.ops.dsa import RopeLayout, apply_rope, lightning_topk, rope_cos_sin


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_against_complex_numbers(layout: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 10, dtype=torch.float64)
    positions = torch.tensor([3, 0, 100, 7, 12345])
    cos, sin = rope_cos_sin(positions.double(), 8, theta=1000.0)
    y = apply_rope(x, cos, sin, layout)
    pairs = [(i, i + 4) for i in range(4)] if layout == "half" else [(2 * i, 2 * i + 1) for i in range(4)]
    for t, position in enumerate(positions.tolist()):
        for i, (a, b) in enumerate(pairs):
            turn = cmath.exp(1j * position * 1000.0 ** (-2 * i / 8))
            z = complex(x[1, t, 2, a], x[1, t, 2, b]) * turn
            assert y[1, t, 2, a].item() == pytest.approx(z.real, abs=1e-9)
            assert y[1, t, 2, b].item() == pytest.approx(z.imag, abs=1e-9)
    assert torch.equal(y[..., 8:], x[..., 8:])


def test_layouts_are_permutations_of_each_other() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    cos, sin = rope_cos_sin(torch.arange(5), 8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    torch.testing.assert_close(
        apply_rope(x, cos, sin, "interleaved")[..., order], apply_rope(x[..., order], cos, sin, "half")
    )


def test_products_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)
    for layout in (RopeLayout.HALF, RopeLayout.INTERLEAVED):
        products = []
        for shift in (0, 900):
            turned = [
                apply_rope(x, *rope_cos_sin(torch.tensor([p + shift]).double(), 8), layout) for x, p in ((q, 9), (k, 4))
            ]
            products.append((turned[0] * turned[1]).sum())
        torch.testing.assert_close(products[0], products[1], rtol=1e-10, atol=1e-10)


def test_none_returns_the_input_itself() -> None:
    x = torch.randn(1, 2, 4)
    assert apply_rope(x, *rope_cos_sin(torch.arange(2), 4), RopeLayout.NONE) is x


def test_wrong_layout_changes_the_selection() -> None:
    torch.manual_seed(0)
    length, topk = 256, 32
    q_idx, k_idx, w = torch.randn(1, length, 4, 32), torch.randn(1, length, 32), torch.rand(1, length, 4)
    table = rope_cos_sin(torch.arange(length), 16)
    chosen = {}
    for layout in RopeLayout:
        indices = lightning_topk(apply_rope(q_idx, *table, layout), apply_rope(k_idx, *table, layout), w, topk)
        member = torch.zeros(length, length + 1, dtype=torch.bool)
        chosen[layout] = member.scatter_(1, indices[0].long().remainder(length + 1), True)[topk:, :length]
    for wrong in (RopeLayout.INTERLEAVED, RopeLayout.NONE):
        changed = (chosen[RopeLayout.HALF] & ~chosen[wrong]).sum() / chosen[RopeLayout.HALF].sum()
        assert changed > 0.1


@pytest.mark.parametrize("layout", list(RopeLayout))
def test_batched_positions_and_dtypes(layout: RopeLayout) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8)
    cos, sin = rope_cos_sin(torch.arange(5).expand(2, 5) + torch.tensor([[0], [3]]), 8)
    y = apply_rope(x, cos, sin, layout)
    for b in range(2):
        torch.testing.assert_close(y[b : b + 1], apply_rope(x[b : b + 1], cos[b], sin[b], layout))
    low = apply_rope(x.bfloat16(), cos, sin, layout)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, apply_rope(x.bfloat16().float(), cos, sin, layout).bfloat16(), rtol=0, atol=0)


def test_fullgraph_takes_enum_and_string(fresh_dynamo: None) -> None:
    def turn(x: torch.Tensor, positions: torch.Tensor, layout: RopeLayout | str) -> torch.Tensor:
        return apply_rope(x, *rope_cos_sin(positions, 4), layout)

    compiled = torch.compile(turn, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(2, 6, 8)
    for layout in ("half", RopeLayout.INTERLEAVED, RopeLayout.NONE):
        torch.testing.assert_close(compiled(x, torch.arange(6), layout), turn(x, torch.arange(6), layout))


def test_errors() -> None:
    cos, sin = rope_cos_sin(torch.arange(2), 8)
    with pytest.raises(ValueError, match=r"rope_cos_sin: dim must be even and positive, got 7"):
        rope_cos_sin(torch.arange(2), 7)
    with pytest.raises(ValueError, match=r"apply_rope: layout must be one of .*, got 'neox'"):
        apply_rope(torch.randn(1, 2, 8), cos, sin, "neox")
    with pytest.raises(
        ValueError, match=r"apply_rope: x must have at least R channels, \(channels, R\) given, got \(6, 8\)"
    ):
        apply_rope(torch.randn(1, 2, 6), cos, sin)
    with pytest.raises(ValueError, match=r"apply_rope: x must have shape \[B, T, E\] or"):
        apply_rope(torch.randn(2, 8), cos, sin)
