"""The decode kernel against the specification in float64, at sizes on and off its tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_flex.kernels.kda.decode import MIN_PROGRAMS, launch_decode, tile_sizes
from hybrid_flex.ops.kda import kda_reference

# name: (use the gate, lower bound, with A_log, with dt_bias)
GATES = {
    "log-decay": (False, None, False, False),
    "softplus": (True, None, True, True),
    "softplus-no-bias": (True, None, True, False),
    "lower-bound": (True, -5.0, True, True),
    "lower-bound-slope-1": (True, -5.0, False, False),
}
NAN = float("nan")


def make(
    B: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    gate: str = "softplus",
    num_states: int | None = None,
    *,
    sigmoid: bool = True,
    norm: bool = True,
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the tensors of a call and its flags, both named as in `kda_reference`."""
    generator = torch.Generator().manual_seed(B * 1000 + T * 100 + K + V)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    use_gate, lower_bound, with_A_log, with_dt_bias = GATES[gate]
    x = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V)}
    if not norm:
        x = {name: t if name == "v" else torch.nn.functional.normalize(t, dim=-1) for name, t in x.items()}
    g, beta = normal(B, T, HV, K), normal(B, T, HV)
    x |= {"g": g if use_gate else -g.abs(), "beta": beta if sigmoid else beta.sigmoid()}
    x = {name: t.to(dtype) for name, t in x.items()}
    if with_A_log:
        x["A_log"] = normal(1, 1, HV, 1)
    if with_dt_bias:
        x["dt_bias"] = normal(HV, K)
    x["initial_state"] = normal(B if num_states is None else num_states, HV, K, V)
    flags = {
        "use_qk_l2norm_in_kernel": norm,
        "use_gate_in_kernel": use_gate,
        "use_beta_sigmoid_in_kernel": sigmoid,
        "allow_neg_eigval": False,
        "lower_bound": lower_bound,
    }
    return x, flags


def decode(
    device: str,
    x: dict[str, Tensor],
    flags: dict[str, object],
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the kernel out of place into memory that is NaN before."""
    x = {name: t.to(device) for name, t in x.items()}
    (HV, V), K = x["v"].shape[2:], x["q"].shape[-1]
    N = x["v"].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    o = torch.full_like(x["v"], NAN)
    state = torch.full((N, HV, V, K) if state_v_first else (N, HV, K, V), NAN, device=device)
    launch_decode(
        *(x[name] for name in ("q", "k", "v", "g", "beta")),
        x.get("A_log"),
        x.get("dt_bias"),
        *flags.values(),
        None if cu_seqlens is None else cu_seqlens.to(device),
        K**-0.5 if scale is None else scale,
        state_v_first,
        o=o,
        state=state,
        initial_state=x.get("initial_state"),
    )
    return o.cpu(), state.cpu()


def assert_as_good_as_plain(
    got: tuple[Tensor, Tensor], x: dict[str, Tensor], flags: dict[str, object], **options: object
) -> None:
    """Allow twice the error of the specification run in the low precision itself, against it in float64."""
    options = {**flags, **options, "output_final_state": True}
    exact = kda_reference(**{name: t.double() for name, t in x.items()}, **options)
    plain = kda_reference(**x, **options)
    for name, a, b, want in zip(("o", "state"), got, plain, exact, strict=True):
        assert a.dtype == b.dtype
        error, budget = ((t.double() - want).norm() / want.norm() for t in (a, b))
        assert error <= max(2 * budget, 16 * torch.finfo(torch.float32).eps), f"{name}: {error:.1e}, plain {budget:.1e}"


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])


@DTYPES
@pytest.mark.parametrize(
    ("B", "T", "H", "HV", "K", "V"),
    [
        (2, 1, 1, 2, 16, 16),
        (1, 3, 2, 2, 1, 1),
        (1, 2, 1, 3, 5, 3),
        (2, 4, 1, 1, 72, 40),
        (1, 1, 1, 1, 128, 128),
        (1, 2, 1, 1, 256, 130),
        (132, 1, 1, 2, 8, 32),
    ],
    ids=lambda n: str(n),
)
def test_equals_the_reference(device: str, B: int, T: int, H: int, HV: int, K: int, V: int, dtype: torch.dtype) -> None:
    x, flags = make(B, T, H, HV, K, V, dtype)
    assert_as_good_as_plain(decode(device, x, flags), x, flags)


@DTYPES
@pytest.mark.parametrize("gate", GATES)
def test_every_gate(device: str, gate: str, dtype: torch.dtype) -> None:
    x, flags = make(2, 3, 1, 2, 24, 20, dtype, gate)
    assert_as_good_as_plain(decode(device, x, flags), x, flags)


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "norm"])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["beta", "sigmoid"])
def test_flags_and_scale(device: str, norm: bool, sigmoid: bool) -> None:
    x, flags = make(1, 3, 2, 4, 16, 24, torch.float32, "log-decay", sigmoid=sigmoid, norm=norm)
    flags["allow_neg_eigval"] = sigmoid
    assert_as_good_as_plain(decode(device, x, flags, scale=0.3), x, flags, scale=0.3)


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("v_first", [False, True], ids=["state-KV", "state-VK"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["i32", "i64"])
def test_packed(device: str, index: torch.dtype, v_first: bool, initial: bool) -> None:
    cu_seqlens = torch.tensor([0, 0, 3, 4, 4, 8, 8], dtype=index)
    x, flags = make(1, 8, 1, 2, 20, 36, torch.float32, num_states=6)
    if not initial:
        del x["initial_state"]
    elif v_first:
        x["initial_state"] = x["initial_state"].mT.contiguous()
    options = {"cu_seqlens": cu_seqlens, "state_v_first": v_first}
    o, state = decode(device, x, flags, **options)
    assert_as_good_as_plain((o, state), x, flags, **options)
    for n in (0, 3, 5):  # no tokens
        assert torch.equal(state[n], x["initial_state"][n] if initial else torch.zeros_like(state[n]))


def test_parameters_of_other_dtypes(device: str) -> None:
    x, flags = make(2, 2, 1, 2, 16, 16, torch.float16)
    x |= {"g": x["g"].float(), "beta": x["beta"].double(), "A_log": x["A_log"].half(), "dt_bias": x["dt_bias"].double()}
    assert_as_good_as_plain(decode(device, x, flags), x, flags)


def decode_in_place(
    device: str,
    x: dict[str, Tensor],
    flags: dict[str, object],
    pool: Tensor,
    indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_v_first: bool = False,
) -> Tensor:
    """Run the kernel on the slots of a pool that lies on the device."""
    inputs = {
        name: x[name].to(device) if name in x else None for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
    }
    o = torch.full_like(x["v"], NAN, device=device)
    options = (None if cu_seqlens is None else cu_seqlens.to(device), x["q"].shape[-1] ** -0.5, state_v_first)
    slots = None if indices is None else indices.to(device)
    launch_decode(*inputs.values(), *flags.values(), *options, o=o, state=pool, in_place=True, state_indices=slots)
    return o.cpu()


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["i32", "i64"])
@pytest.mark.parametrize("v_first", [False, True], ids=["state-KV", "state-VK"])
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_slots_of_a_pool(device: str, packed: bool, v_first: bool, index: torch.dtype) -> None:
    indices = torch.tensor([4, -1, 0, 6], dtype=index)
    cu_seqlens = torch.tensor([0, 2, 5, 5, 6]) if packed else None
    x, flags = make(*((1, 6) if packed else (4, 2)), 1, 2, 20, 12, torch.float32, num_states=4)
    if v_first:
        x["initial_state"] = x["initial_state"].mT.contiguous()
    # A slice of a larger buffer: slots are dense, with gaps between them.
    pool = torch.full((7, 3, *x["initial_state"].shape[1:]), NAN, device=device)[:, 1]
    live = indices >= 0
    pool[indices[live].to(device).long()] = x["initial_state"][live].to(device)
    o = decode_in_place(device, x, flags, pool, indices, cu_seqlens, v_first)

    options = {**flags, "cu_seqlens": cu_seqlens, "state_v_first": v_first, "output_final_state": True}
    exact_o, exact_state = kda_reference(**{name: t.double() for name, t in x.items()}, **options)
    skipped = (slice(0, 1), slice(2, 5)) if packed else (slice(1, 2), slice(None))
    assert (o[skipped] == 0).all()
    exact_o[skipped] = 0
    torch.testing.assert_close(o, exact_o.float(), rtol=1e-5, atol=1e-6)
    pool = pool.cpu()
    torch.testing.assert_close(pool[indices[live].long()], exact_state[live].float(), rtol=1e-5, atol=1e-6)
    if packed:
        assert torch.equal(pool[0], x["initial_state"][2])  # no tokens
    assert pool[[1, 2, 3, 5]].isnan().all(), "a slot of nobody was written"


def test_in_place_equals_out_of_place(device: str) -> None:
    x, flags = make(3, 2, 1, 2, 16, 40, torch.float32, "lower-bound")
    o, state = decode(device, x, flags)
    pool = x["initial_state"].to(device)
    torch.testing.assert_close(decode_in_place(device, x, flags, pool), o)
    torch.testing.assert_close(pool.cpu(), state)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_split_equals_whole(device: str, cut: int) -> None:
    x, flags = make(2, 5, 1, 2, 16, 24, torch.float32)
    o, state = decode(device, x, flags)
    carried, parts = x["initial_state"], []
    for span in (slice(0, cut), slice(cut, None)):
        tokens = {name: x[name][:, span] for name in ("q", "k", "v", "g", "beta")}
        part, carried = decode(device, {**x, **tokens, "initial_state": carried}, flags)
        parts.append(part)
    # One token alone has machine code of its own, which may round differently; for the other lengths it is the same.
    tolerance = {} if cut == 1 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(torch.cat(parts, 1), o, **tolerance)
    torch.testing.assert_close(carried, state, **tolerance)


def test_causality_is_bit_exact(device: str) -> None:
    x, flags = make(1, 6, 1, 2, 16, 24, torch.float32)
    before, _ = decode(device, x, flags)
    for name in ("q", "k", "v", "g", "beta"):
        x[name][:, 3] = 17.0
    after, _ = decode(device, x, flags)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before[:, 3:], after[:, 3:])


def test_extreme_decay_and_strength(device: str) -> None:
    x, flags = make(1, 4, 1, 2, 16, 24, torch.float32, "log-decay", sigmoid=False, norm=False)
    x["g"][:, 0], x["g"][:, 1], x["g"][:, 2, :, ::2] = 0.0, -1000.0, -1000.0
    x["beta"][:, 0], x["beta"][:, 1] = 1.0, 0.0
    x["k"][:, 2] = 0.0
    o, state = decode(device, x, flags)
    assert (o[:, 1] == 0).all(), "the second token erases all and writes nothing"
    assert_as_good_as_plain((o, state), x, flags)


@pytest.mark.parametrize("gate", ["softplus", "lower-bound"])
def test_extreme_gates(device: str, gate: str) -> None:
    x, flags = make(1, 4, 1, 2, 16, 24, torch.float32, gate)
    x["A_log"] += torch.tensor(16.0).log()
    x["dt_bias"] *= 30
    x["g"][:, 0], x["g"][:, 1] = 1000.0, -1000.0
    x["beta"][:, 2], x["beta"][:, 3] = 200.0, -200.0
    x["q"][:, 3] = x["k"][:, 3] = 0.0
    o, state = decode(device, x, flags)
    assert o.isfinite().all() and state.isfinite().all() and (o[:, 3] == 0).all()
    assert_as_good_as_plain((o, state), x, flags)


def test_tiles_cover_the_heads_and_fill_the_chip() -> None:
    for K, V in ((1, 1), (64, 64), (72, 40), (128, 128), (256, 256)):
        for num_states in (1, 32, 64, 8192):
            BK, BV, num_warps = tile_sizes(num_states, K, V)
            assert BK >= K and BK & (BK - 1) == 0 and BV in (8, 16, 32) and num_warps in (1, 2, 4, 8)
            assert BK * BV // num_warps <= 32 * 32, "no more than 32 elements a thread"
            assert BV == 8 or num_states * -(-V // BV) >= MIN_PROGRAMS or V <= BV // 2
    assert tile_sizes(8192, 128, 128) == (128, 32, 4)
    assert tile_sizes(32, 128, 128) == (128, 8, 1)
