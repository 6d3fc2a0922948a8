"""The language model: every way through it gives the same logits, and what it generates follows from them."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid_flex.layers import DSACache, KVCache
from hybrid_flex.models import HybridBlock, HybridConfig, HybridLanguageModel, LayerWiseHybrid

SMALL = HybridConfig(
    vocab_size=50, hidden_size=32, num_heads=2, pattern="KSRD", topk=8, index_heads=3, index_head_dim=8, rope_dim=8,
    chunk_size=16,
)  # fmt: skip
CONFIGS = {
    "KSRD-gqa": SMALL,
    "KKKS-gqa-kpool4": dataclasses.replace(SMALL, pattern="KKKS", index_kpool=4, num_kv_heads=1),
    "KSR-mla": dataclasses.replace(
        SMALL,
        pattern="KSR",
        sparse_attention="mla",
        kv_lora_rank=16,
        q_lora_rank=12,
        rope_dim=4,
        tie_embeddings=False,
        rope_layout="interleaved",
    ),
    "K-HV4-lower_bound": dataclasses.replace(
        SMALL, pattern="K", num_layers=2, kda_num_v_heads=4, kda_v_head_dim=8, lower_bound=-5.0
    ),
}
every_config = pytest.mark.parametrize("name", CONFIGS)
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


def build(name: str = "KSRD-gqa", **changes: Any) -> HybridLanguageModel:
    torch.manual_seed(0)
    # Larger weights than at the start of training: logits that differ, and few near-ties in what is selected.
    return HybridLanguageModel(dataclasses.replace(CONFIGS[name], **{"init_std": 0.15, **changes}))


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@every_config
def test_split_and_steps_equal_the_whole(name: str) -> None:
    model, ids = build(name), tokens(2, 61)
    whole, _ = model(ids)
    first, states = model(ids[:, :23])
    second, states = model(ids[:, 23:55], states)
    out = [first, second]
    for ids_t in ids[:, 55:].unbind(1):
        logits, states = model.step(ids_t, states)
        out.append(logits[:, None])
    torch.testing.assert_close(torch.cat(out, 1), whole, **CLOSE)
    states = model.init_state(2)
    for t in range(12):
        logits, states = model.step(ids[:, t], states)
        torch.testing.assert_close(logits, whole[:, t], **CLOSE)


@torch.no_grad()
@every_config
def test_steps_into_reserved_caches_equal_the_whole(name: str) -> None:
    model, ids = build(name), tokens(2, 40)
    whole, _ = model(ids)
    states = model.reserve(model(ids[:, :25])[1], 40)
    places = [state.kv.data_ptr() for state in states if isinstance(state, DSACache | KVCache)]
    assert len(places) == sum(letter in "SRD" for letter in model.config.letters)
    for t in range(25, 40):
        logits, states = model.step(ids[:, t], states)
        torch.testing.assert_close(logits, whole[:, t], **CLOSE)
    assert places == [state.kv.data_ptr() for state in states if isinstance(state, DSACache | KVCache)]


def test_reserving_too_little_is_refused() -> None:
    model = build()
    states = model(tokens(2, 9))[1]
    with pytest.raises(ValueError, match="max_length must be at least 9, the tokens held, got 8"):
        model.reserve(states, 8)
    with pytest.raises(ValueError, match=r"state must be a state that grows.*, got DSACache"):
        model(tokens(2, 1), model.reserve(states, 20))


@torch.no_grad()
@every_config
def test_the_future_changes_no_bit_of_the_past(name: str) -> None:
    model, ids = build(name), tokens(2, 60)
    changed = torch.cat([ids[:, :35], tokens(2, 25, seed=2)], 1)
    assert torch.equal(model(ids)[0][:, :35], model(changed)[0][:, :35])


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in CONFIGS if "kpool" not in name])
def test_packed_equals_separate(name: str) -> None:
    model, ids = build(name), tokens(1, 60)
    packed, states = model(ids, cu_seqlens=torch.tensor([0, 20, 20, 60]))
    torch.testing.assert_close(packed[:, :20], model(ids[:, :20])[0], **CLOSE)
    torch.testing.assert_close(packed[:, 20:], model(ids[:, 20:])[0], **CLOSE)
    assert [state is None for state in states] == [letter != "K" for letter in model.config.letters]


@torch.no_grad()
@every_config
def test_greedy_tokens_follow_from_the_full_pass(name: str) -> None:
    model, prompt = build(name), tokens(2, 9)
    ids = model.generate(prompt, 15, greedy=True)
    assert ids.shape == (2, 24) and ids.dtype == prompt.dtype and torch.equal(ids[:, :9], prompt)
    logits, _ = model(ids)
    assert torch.equal(logits[:, 8:-1].argmax(-1), ids[:, 9:])
    streamed = torch.stack(list(model.generate_stream(prompt, 15, greedy=True)), 1)
    assert torch.equal(streamed, ids[:, 9:])


@torch.no_grad()
def test_a_block_and_a_stack_are_their_equations() -> None:
    torch.manual_seed(0)
    block, x = HybridBlock(SMALL, "K"), torch.randn(2, 20, 32)
    h = x + block.mixer(F.rms_norm(x, (32,), eps=1e-5))[0]
    y = h + block.mlp(F.rms_norm(h, (32,), eps=1e-5))
    torch.testing.assert_close(block(x)[0], y, rtol=1e-5, atol=1e-6)
    stack = LayerWiseHybrid(SMALL)
    h, indices = x, None
    for one in stack.blocks:
        if one.letter == "S":
            indices = one.mixer.attend(one.mixer_norm(h))[2]
        h, _ = one(h, indices=indices if one.letter == "R" else None)
    y, states = stack(x)
    torch.testing.assert_close(y, h, rtol=1e-5, atol=1e-6)
    y_t, _ = stack.step(x[:, 0], stack.init_state(2))
    torch.testing.assert_close(y_t, y[:, 0], **CLOSE)
    assert len(states) == 4
    with pytest.raises(ValueError, match="letter must be one of 'K', 'S', 'R', 'D', got 'Q'"):
        HybridBlock(SMALL, "Q")


def test_it_begins_scaled() -> None:
    model = build(init_std=0.02, hidden_size=64, mlp_size=512)
    residual = 0.02 / 8**0.5
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert parameter.std().item() == pytest.approx(residual, rel=0.1), name
        elif "_proj.weight" in name and parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    kda = model.stack.blocks[0].mixer
    assert (kda.A_log.exp() >= 1).all() and F.softplus(kda.dt_bias).max() <= 0.1001


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embeddings_are_tied_or_not(tied: bool) -> None:
    model = build(tie_embeddings=tied)
    assert (model.output is None) == tied
    weight = model.embedding.weight if tied else model.output.weight
    x, _ = model.stack(model.embedding(tokens(1, 5)))
    torch.testing.assert_close(model(tokens(1, 5))[0], model.norm(x) @ weight.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_indexers_learn_from_their_loss_only(stage: str) -> None:
    model, ids = build(pattern="KSRS"), tokens(2, 40)
    logits, _, kl = model.forward_with_indexer_loss(ids, stage=stage)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    parameters = dict(model.named_parameters())
    main = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), retain_graph=True,
                                                    allow_unused=True), strict=True))  # fmt: skip
    from_kl = dict(zip(parameters, torch.autograd.grad(kl, list(parameters.values()), allow_unused=True), strict=True))
    for name in parameters:
        learns, rests = (from_kl, main) if "indexer" in name else (main, from_kl)
        assert learns[name] is not None, name
        assert rests[name] is None or not rests[name].any(), name
    # One term per S layer; the R layer has no indexer.
    h, total, indices = model.embedding(ids), 0.0, None
    for block in model.stack.blocks:
        h, _, indices, term = block.run(h, None, None, indices, stage)
        total += term.item()
        assert (term.item() > 0) == (block.letter == "S")
    assert kl.item() == pytest.approx(total, rel=1e-5)


def test_checkpointing_changes_no_gradient() -> None:
    ids, results = tokens(2, 30), []
    for wanted in (False, True):
        model = build(checkpoint_activations=wanted)
        logits, _, kl = model.forward_with_indexer_loss(ids)
        saved_bytes = _bytes_saved_by(lambda model=model: model(ids)[0])
        (logits.square().mean() + kl).backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters()}, saved_bytes))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, msg=name)
    assert results[1][2] < 0.5 * results[0][2]


def _bytes_saved_by(forward: Any) -> int:
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        keep = forward()
    del keep
    return sum(saved.values())


def test_it_learns_to_copy_a_repeated_string() -> None:
    torch.manual_seed(0)
    model = HybridLanguageModel(dataclasses.replace(SMALL, pattern="KS", init_std=0.05))
    ids = tokens(1, 16).repeat(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        logits, _, kl = model.forward_with_indexer_loss(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + kl).backward()
        optimizer.step()
    assert loss.item() < 0.5
    assert torch.equal(model.generate(ids[:1, :20], 12, greedy=True), ids[:1, :32])


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpointed"])
def test_one_graph_for_all_lengths_forward_and_backward(recompute: bool) -> None:
    model = build(checkpoint_activations=recompute)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for length in (130, 70, 41):
        ids = tokens(2, length)
        torch._dynamo.mark_dynamic(ids, 1)
        gradients = []
        for logits in (compiled(ids)[0], model(ids)[0]):
            model.zero_grad()
            logits.square().mean().backward()
            gradients.append((logits, {n: p.grad for n, p in model.named_parameters()}))
        torch.testing.assert_close(gradients[0][0], gradients[1][0], **CLOSE)
        for name, gradient in gradients[1][1].items():
            torch.testing.assert_close(gradients[0][1][name], gradient, **CLOSE, msg=name)
    assert backend.frame_count == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_gives_the_eager_gradients() -> None:
    """With the default backend; a minute of C++ compilation, so not in a plain run."""
    model, ids = build(pattern="KS"), tokens(2, 70)
    compiled = torch.compile(model, fullgraph=True)
    gradients = []
    for logits in (compiled(ids)[0], model(ids)[0]):
        model.zero_grad()
        logits.square().mean().backward()
        gradients.append((logits, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], **CLOSE)
    for name, gradient in gradients[1][1].items():
        torch.testing.assert_close(gradients[0][1][name], gradient, **CLOSE, msg=name)


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
def test_decoding_stays_in_two_graphs() -> None:
    model, ids, backend = build(), tokens(2, 18), CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.step, backend=backend, fullgraph=True)
    whole, _ = model(ids)
    _, states = model(ids[:, :10])
    for t in range(10, 18):
        logits, states = step(ids[:, t], states)
        torch.testing.assert_close(logits, whole[:, t], **CLOSE)
    assert backend.frame_count <= 2


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
def test_export_with_dynamic_batch_and_length(strict: bool) -> None:
    model = build(checkpoint_activations=True)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (tokens(2, 33),), dynamic_shapes=(sizes,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, length in ((2, 33), (3, 70), (1, 129)):
        ids = tokens(batch, length)
        torch.testing.assert_close(loaded(ids)[0], model(ids)[0], **CLOSE)


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
def test_export_of_one_decoding_step() -> None:
    model, ids = build(), tokens(2, 20)
    whole, _ = model(ids)
    dynamic = torch.export.Dim.DYNAMIC
    _, states = model(ids[:, :10])
    grows = [[{0: dynamic}] * 4 if letter == "K" else [{0: dynamic, 1: dynamic}] * len(vars(state))
             for letter, state in zip(model.config.letters, states, strict=True)]  # fmt: skip

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids_t: Tensor, states: Any) -> Any:
            return self.model.step(ids_t, states)

    shapes = ({0: dynamic}, tuple(grows))
    program = torch.export.export(Step(), (ids[:, 10], states), dynamic_shapes=shapes, strict=False).module()
    for t in range(10, 20):
        logits, states = program(ids[:, t], states)
        torch.testing.assert_close(logits, whole[:, t], **CLOSE)


def test_bad_input_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"ids must be \[B, T\], a tensor of rank 2, got shape \(5,\)"):
        model(torch.arange(5))
    with pytest.raises(TypeError, match="ids must have dtype int32, int64, got float32"):
        model(torch.randn(1, 5))
    _, states = model(tokens(2, 5))
    with pytest.raises(ValueError, match="state must hold 3 sequences, as many as the input, got 2"):
        model.step(tokens(3, 1)[:, 0], states)
    with pytest.raises(ValueError, match="state must hold 4 states, one per block, got 3"):
        model(tokens(2, 5), states[:3])
