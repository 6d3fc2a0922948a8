"""Kimi Delta Attention: the layer is the published composition, begins as published, and keeps its decay in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.layers import KDAState, KimiDeltaAttention


def by_hand(layer: KimiDeltaAttention, x: Tensor) -> Tensor:
    """Run the layer token by token in float64, from the equations of the paper."""
    p = {name: value.double() for name, value in layer.state_dict().items()}
    H, HV, K, V, W = layer.num_heads, layer.num_v_heads, layer.head_dim, layer.v_head_dim, layer.conv_size
    x = x.double()
    B, T, _ = x.shape
    mixed = {}
    for which in "qkv":
        raw = F.pad(x @ p[f"{which}_proj.weight"].T, (0, 0, W - 1, 0))
        taps = p[f"{which}_conv"]
        mixed[which] = F.silu(sum(raw[:, i : i + T] * taps[:, i] for i in range(W)))
    raw_gate = x @ p["f_a_proj.weight"].T @ p["f_b_proj.weight"].T + p["dt_bias"]
    raw_gate, rate = raw_gate.view(B, T, HV, K), p["A_log"].exp()[:, None]
    if layer.lower_bound is None:
        g = -rate * F.softplus(raw_gate, threshold=100.0)
    else:
        g = layer.lower_bound * torch.sigmoid(rate * raw_gate)
    beta = torch.sigmoid(x @ p["b_proj.weight"].T) * (2.0 if layer.allow_neg_eigval else 1.0)
    out_gate = torch.sigmoid(x @ p["g_a_proj.weight"].T @ p["g_b_proj.weight"].T).view(B, T, HV, V)
    S = torch.zeros(B, HV, K, V, dtype=torch.float64)
    outputs = []
    for t in range(T):
        q, k = (mixed[w][:, t].view(B, H, K).repeat_interleave(HV // H, 1) for w in "qk")
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        v = mixed["v"][:, t].view(B, HV, V)
        S = S * g[:, t, :, :, None].exp()
        error = beta[:, t, :, None] * (v - (S * k[..., None]).sum(-2))
        S = S + k[..., None] * error[:, :, None]
        o = (S * q[..., None]).sum(-2) * K**-0.5
        o = o / (o.square().mean(-1, keepdim=True) + layer.norm_eps).sqrt() * p["o_norm"] * out_gate[:, t]
        outputs.append(o.flatten(1) @ p["o_proj.weight"].T)
    return torch.stack(outputs, 1)


@torch.no_grad()
@pytest.mark.parametrize("lower_bound", [None, -5.0], ids=["softplus", "lower_bound"])
@pytest.mark.parametrize("heads", [(2, 2, 16, 16), (2, 4, 16, 24)], ids=["H2-HV2-K16-V16", "H2-HV4-K16-V24"])
def test_equals_the_equations(heads: tuple[int, int, int, int], lower_bound: float | None) -> None:
    torch.manual_seed(0)
    H, HV, K, V = heads
    layer = KimiDeltaAttention(
        24, H, K, num_v_heads=HV, v_head_dim=V, lower_bound=lower_bound, allow_neg_eigval=HV == 4, gate_rank=5
    )
    torch.nn.init.normal_(layer.o_norm)
    x = torch.randn(2, 70, 24)
    torch.testing.assert_close(layer(x)[0].double(), by_hand(layer, x), rtol=1e-4, atol=2e-6)
    assert (layer.double()(x.double())[0] - by_hand(layer, x)).abs().max() < 1e-6


def test_begins_as_published() -> None:
    torch.manual_seed(0)
    layer = KimiDeltaAttention(32, 64, 16)
    rate, step = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 1 <= rate.min() < 2 and 15 < rate.max() <= 16
    assert rate.mean().item() == pytest.approx(8.5, abs=1.5)
    assert step.min() >= 1e-3 * 0.99 and step.max() <= 1e-1 * 1.01
    # log-uniform: the mean of the logarithm is halfway between the ends
    assert step.log().mean().item() == pytest.approx((torch.tensor([1e-3, 1e-1]).log().mean()).item(), abs=0.15)
    assert all(parameter.abs().max() <= 0.5 for parameter in (layer.q_conv, layer.k_conv, layer.v_conv))
    assert not any(name.endswith("bias") and name != "dt_bias" for name, _ in layer.named_parameters())


def test_decay_parameters_stay_in_float32() -> None:
    layer = KimiDeltaAttention(32, 2, 16)
    before = layer.A_log.detach().clone()
    layer.to(torch.bfloat16)
    assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32
    assert layer.q_proj.weight.dtype == layer.o_norm.dtype == torch.bfloat16
    assert torch.equal(layer.A_log, before) and layer.A_log.requires_grad
    layer.half()
    assert layer.A_log.dtype == torch.float32
    layer.to("meta")
    assert layer.A_log.is_meta


def test_every_parameter_and_the_state_get_gradients() -> None:
    torch.manual_seed(0)
    layer = KimiDeltaAttention(32, 2, 16)
    state = layer.init_state(2)
    state.S.requires_grad_()
    y, new_state = layer(torch.randn(2, 20, 32), state)
    (y.square().mean() + new_state.S.square().mean()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert state.S.grad is not None and state.S.grad.abs().max() > 0


def test_training_through_steps_equals_training_through_the_whole() -> None:
    torch.manual_seed(0)
    layer, x = KimiDeltaAttention(32, 2, 16), torch.randn(1, 6, 32)
    layer(x)[0].square().sum().backward()
    want = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    state, loss = layer.init_state(1), torch.zeros(())
    for x_t in x.unbind(1):
        y_t, state = layer.step(x_t, state)
        loss = loss + y_t.square().sum()
    loss.backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads must be positive, got 0"),
        ({"num_v_heads": 3}, "num_v_heads must be a multiple of num_heads = 2, got 3"),
        ({"conv_size": 9}, "conv_size must be between 2 and 8, got 9"),
        ({"chunk_size": 48}, "chunk_size must be 16, 32 or 64, got 48"),
        ({"lower_bound": 1.0}, "lower_bound must be None or negative, got 1.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, int | float], message: str) -> None:
    with pytest.raises(ValueError, match=f"KimiDeltaAttention: {message}"):
        KimiDeltaAttention(32, **{"num_heads": 2, "head_dim": 16, **options})


def test_unknown_keyword_is_refused() -> None:
    with pytest.raises(TypeError, match="num_value_heads"):
        KimiDeltaAttention(32, 2, num_value_heads=2)


def test_state_of_another_layer_is_refused() -> None:
    state: KDAState = KimiDeltaAttention(32, 4, 8).init_state(2)
    with pytest.raises(ValueError, match=r"state.S must be \[N, 2, 16, 16\], got shape \(2, 4, 8, 8\)"):
        KimiDeltaAttention(32, 2, 16)(torch.randn(2, 3, 32), state)


def test_state_of_a_float64_layer_is_float64() -> None:
    layer = KimiDeltaAttention(16, num_heads=2, head_dim=8).double()
    state = layer.init_state(2)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x, state)[0], layer(x)[0], rtol=0, atol=0)
    assert state.S.dtype == torch.float64 and layer.bfloat16().init_state(2).S.dtype == torch.float32


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "lengths", [(100, 64 * 18, 4200), pytest.param((64, 40, 5), marks=pytest.mark.slow)], ids=["chunks", "one-chunk"]
)
def test_inductor_trains_all_lengths_in_one_graph(lengths: tuple[int, ...]) -> None:
    """Inductor chooses another order for long float32 sums, and asks whether a slice is dense: no guard may come of it.

    Lengths of several chunks share a graph, and so do those of one chunk (torch gives the size 1 a graph of its own).
    """
    torch.manual_seed(0)
    layer = KimiDeltaAttention(24, 2, 16)
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for length in lengths:
        x = torch.randn(1, length, 24)
        torch._dynamo.mark_dynamic(x, 1)
        grads = []
        for forward in (compiled, layer):
            layer.zero_grad()
            forward(x)[0].square().mean().backward()
            grads.append({name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None})
        for name, want in grads[1].items():
            error = (grads[0][name] - want).norm() / want.norm()
            assert error < 1e-5, f"{name}: {error:.1e}"
    assert backend.frame_count == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@torch.no_grad()
def test_step_in_a_cuda_graph_equals_eager(dtype: torch.dtype) -> None:
    """The whole step is one graph, captured and replayed by `mode="reduce-overhead"`."""
    torch.manual_seed(0)
    layer = KimiDeltaAttention(256, 4, 128).cuda().to(dtype)
    step = torch.compile(layer.step, fullgraph=True, mode="reduce-overhead")
    eager_state, state = layer.init_state(3), layer.init_state(3)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for x_t in torch.randn(6, 3, 256, device="cuda", dtype=dtype):
        want, eager_state = layer.step(x_t, eager_state)
        torch.compiler.cudagraph_mark_step_begin()
        got, graph_state = step(x_t, state)
        # The next replay writes to the same memory.
        state = KDAState(
            *(t.clone() for t in (graph_state.S, graph_state.conv_q, graph_state.conv_k, graph_state.conv_v))
        )
        torch.testing.assert_close(got, want, **tolerance)
        torch.testing.assert_close(state.S, eager_state.S, **tolerance)
