"""runner: one sentence for each input that does not fit, and what torch itself says of the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hybrid_flex.export import export_decode, export_prefill, load, runner, save
from hybrid_flex.layers import KimiDeltaAttention
from hybrid_flex.models import HybridConfig, HybridLanguageModel


@pytest.fixture(scope="module")
def model() -> HybridLanguageModel:
    torch.manual_seed(0)
    return HybridLanguageModel(
        HybridConfig(vocab_size=50, hidden_size=32, num_heads=2, pattern="KSD", topk=8, index_heads=2, index_head_dim=8)
    )


@pytest.fixture(scope="module", params=["made", "loaded"])
def prefill(
    request: pytest.FixtureRequest, model: HybridLanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> ExportedProgram:
    return made_or_loaded(export_prefill(model, max_batch_size=4, max_seq_len=100), request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=["made", "loaded"])
def decode(
    request: pytest.FixtureRequest, model: HybridLanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> ExportedProgram:
    program = export_decode(model, max_length=40, max_batch_size=6)
    return made_or_loaded(program, request.param, tmp_path_factory)


def made_or_loaded(program: ExportedProgram, which: str, folders: pytest.TempPathFactory) -> ExportedProgram:
    if which == "made":
        return program
    path = folders.mktemp("programs") / "program.pt2"
    save(program, path)
    return load(path)


def ids(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.ones(size, dtype=dtype)


def test_what_fits_runs(model: HybridLanguageModel, prefill: ExportedProgram, decode: ExportedProgram) -> None:
    run, step = runner(prefill), runner(decode)
    for size in ((1, 1), (4, 100), (3, 7)):
        logits, states = run(ids(*size))
        torch.testing.assert_close(logits, model(ids(*size))[0])
    reserved, expected = model.reserve(states, 40), model.reserve(states, 40)
    torch.testing.assert_close(step(ids(3), reserved)[0], model.step(ids(3), expected)[0])


PROMPTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "batch": (lambda: ids(5, 10), ValueError, "ids must have at most 4 in dimension 0, got shape (5, 10)"),
    "length": (lambda: ids(2, 101), ValueError, "ids must have at most 100 in dimension 1, got shape (2, 101)"),
    "no-sequence": (lambda: ids(0, 10), ValueError, "ids must have at least 1 in dimension 0, got shape (0, 10)"),
    "no-token": (lambda: ids(2, 0), ValueError, "ids must have at least 1 in dimension 1, got shape (2, 0)"),
    "rank": (lambda: ids(5), ValueError, "ids must be a tensor of rank 2, got shape (5,)"),
    "float": (lambda: torch.ones(2, 5), TypeError, "ids must have dtype int64, got float32"),
    "int32": (lambda: ids(2, 5, dtype=torch.int32), TypeError, "ids must have dtype int64, got int32"),
    "device": (lambda: ids(2, 5).to("meta"), ValueError, "ids must be on cpu, like the other tensors, got meta"),
    "number": (lambda: 3, TypeError, "ids must be a tensor, got int"),
    "none": (lambda: None, TypeError, "ids must be a tensor, got NoneType"),
    "list": (lambda: [ids(5)], ValueError, "ids must be a tensor, got a list of 1"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prefill_message(prefill: ExportedProgram, name: str) -> None:
    make, kind, message = PROMPTS[name]
    with pytest.raises(kind) as caught:
        runner(prefill)(make())
    assert str(caught.value) == f"program: {message}"


def states_of(model: HybridLanguageModel, batch_size: int = 5, length: int = 40, **options: Any) -> Any:
    return model.reserve(model.init_state(batch_size, **options), length)


def paged(model: HybridLanguageModel) -> Any:
    states = states_of(model)
    sparse: Any = model.stack.blocks[1].mixer
    return (states[0], sparse.init_cache(5, 40, page_size=8), states[2])


STEPS: dict[str, tuple[Callable[[HybridLanguageModel], Any], type[Exception], str]] = {
    "batch": (
        lambda m: (ids(3), states_of(m)),
        ValueError,
        "states[0].S must have 3 in dimension 0, like dimension 0 of ids_t, got shape (5, 2, 16, 16)",
    ),
    "large-batch": (
        lambda m: (ids(7), states_of(m, 7)),
        ValueError,
        "ids_t must have at most 6 in dimension 0, got shape (7,)",
    ),
    "rank": (lambda m: (ids(5, 1), states_of(m)), ValueError, "ids_t must be a tensor of rank 1, got shape (5, 1)"),
    "cache-length": (
        lambda m: (ids(5), states_of(m, 5, 41)),
        ValueError,
        "states[1].kv must have size 40 in dimension 1, got shape (5, 41, 2, 32)",
    ),
    "growing": (
        lambda m: (ids(5), m.init_state(5)),
        ValueError,
        "states[1] must be a DSACache of kv, index_keys, index_tail, lengths, got a DSAState of kv, index_keys",
    ),
    "pages": (
        lambda m: (ids(5), paged(m)),
        ValueError,
        "states[1] must be a DSACache of kv, index_keys, index_tail, lengths, "
        "got a DSACache of kv, index_keys, index_tail, lengths, block_table",
    ),
    "one-less": (
        lambda m: (ids(5), states_of(m)[:2]),
        ValueError,
        "states must be a tuple of 3, got a tuple of 2",
    ),
    "none": (lambda m: (ids(5), None), ValueError, "states must be a tuple of 3, got None"),
    "no-states": (lambda m: (ids(5),), ValueError, "inputs must be a tuple of 2, got a tuple of 1"),
    "dtype": (
        lambda m: (ids(5), states_of(m, dtype=torch.bfloat16)),
        TypeError,
        "states[0].conv_q must have dtype float32, got bfloat16",
    ),
    "device": (
        lambda m: (ids(5), states_of(m, device=torch.device("meta"))),
        ValueError,
        "states[0].S must be on cpu, like the other tensors, got meta",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_decode_message(model: HybridLanguageModel, decode: ExportedProgram, name: str) -> None:
    make, kind, message = STEPS[name]
    with pytest.raises(kind) as caught:
        runner(decode)(*make(model))
    assert str(caught.value) == f"program: {message}"


def test_inputs_by_name(prefill: ExportedProgram) -> None:
    with pytest.raises(ValueError) as caught:
        runner(prefill)(ids=ids(2, 5))
    assert str(caught.value) == "program: inputs must be given by position, got the keywords ids"


def test_what_torch_says_of_a_size(prefill: ExportedProgram) -> None:
    """Short, with input and bound but not the size; the bound holds without `runner` too."""
    for size, guard in (((5, 10), r"ids.size\(\)\[0\] <= 4"), ((2, 101), r"ids.size\(\)\[1\] <= 100")):
        with pytest.raises((AssertionError, RuntimeError), match=guard):
            prefill.module()(ids(*size))


def test_a_program_of_somebody_else() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor, pair: dict[str, Tensor], factor: int) -> Tensor:
            return x * factor + pair["y"].sum(0)

    example = (torch.ones(4), {"y": torch.ones(6, 4)}, 3)
    shapes = ({0: Dim.DYNAMIC}, {"y": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}, None)
    run = runner(torch.export.export(Other(), example, dynamic_shapes=shapes))
    assert run(torch.ones(5), {"y": torch.ones(2, 5)}, 3).tolist() == [5.0] * 5
    with pytest.raises(ValueError) as caught:
        run(torch.ones(5), {"y": torch.ones(2, 6)}, 3)
    assert str(caught.value) == (
        "program: pair['y'] must have 5 in dimension 1, like dimension 0 of x, got shape (2, 6)"
    )


def test_weights_learn_through_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = KimiDeltaAttention(32, 2, 16)
    save(export_prefill(layer), tmp_path / "layer.pt2")
    run, x = runner(load(tmp_path / "layer.pt2")), torch.randn(2, 9, 32)
    run(x)[0].square().sum().backward()
    layer(x)[0].square().sum().backward()
    got, want = dict(run.named_parameters()), dict(layer.named_parameters())
    assert got.keys() == want.keys()
    for name, p in want.items():
        torch.testing.assert_close(got[name].grad, p.grad, msg=name)


def test_no_program() -> None:
    with pytest.raises(TypeError) as caught:
        runner(nn.Linear(3, 3))  # type: ignore[arg-type]
    assert str(caught.value) == "runner: program must be a torch.export.ExportedProgram, got Linear"


@pytest.mark.gpu
def test_cuda_device_message(model: HybridLanguageModel) -> None:
    program = export_prefill(KimiDeltaAttention(32, 2, 16).cuda())
    with pytest.raises(ValueError, match="program: x must be on cuda:0, like the other tensors, got cpu"):
        runner(program)(torch.randn(2, 9, 32))
