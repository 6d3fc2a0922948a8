"""Models on disk: the round trip, and one clear error for whatever is not such a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_flex.models import HybridConfig, HybridLanguageModel

SMALL = HybridConfig(vocab_size=20, hidden_size=32, num_heads=2, pattern="KSR", topk=4, index_kpool=2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    HybridLanguageModel(SMALL).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = HybridLanguageModel(dataclasses.replace(SMALL, tie_embeddings=tied)).to(dtype)
    model.save_pretrained(tmp_path / "a" / "model")
    loaded = HybridLanguageModel.from_pretrained(tmp_path / "a" / "model")
    assert loaded.config == model.config
    assert sorted(path.name for path in (tmp_path / "a" / "model").iterdir()) == ["config.json", "model.safetensors"]
    for (name, want), (other, got) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and got.dtype == want.dtype and torch.equal(got, want)
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    assert not any(b.is_meta for b in loaded.buffers())
    ids = torch.randint(20, (1, 9))
    assert torch.equal(loaded(ids)[0], model(ids)[0])


def test_a_loaded_model_trains(saved: Path) -> None:
    model = HybridLanguageModel.from_pretrained(saved)
    logits, _, kl = model.forward_with_indexer_loss(torch.randint(20, (1, 9)))
    (logits.square().mean() + kl).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_saving_over_an_older_model_replaces_it(saved: Path) -> None:
    other = HybridLanguageModel(dataclasses.replace(SMALL, pattern="K"))
    other.save_pretrained(saved)
    assert HybridLanguageModel.from_pretrained(saved).config.pattern == "K"


def test_missing_files_are_named(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold config.json and model.safetensors .*got no directory"):
        HybridLanguageModel.from_pretrained(tmp_path / "absent")
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only safetensors are read.*pytorch_model.bin"):
        HybridLanguageModel.from_pretrained(saved)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(saved: Path, keep: float) -> None:
    weights = saved / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=r"from_pretrained: .*model.safetensors must be a whole safetensors file"):
        HybridLanguageModel.from_pretrained(saved)


def test_a_pickle_under_another_name_is_never_opened(saved: Path) -> None:
    torch.save({"weights": torch.ones(3)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        HybridLanguageModel.from_pretrained(saved)


def test_foreign_weights_are_refused(saved: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.ones(3, 4)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"must hold the tensors of its config.json, got \d+ missing .* and 1 foreign"):
        HybridLanguageModel.from_pretrained(saved)


def test_wrong_shapes_and_dtypes_are_refused(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    save_file({**weights, "norm.weight": torch.ones(31)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm.weight in .* must be \(32,\), got shape \(31,\)"):
        HybridLanguageModel.from_pretrained(saved)
    save_file({**weights, "norm.weight": torch.ones(32, dtype=torch.int64)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm.weight in .* must be floating point, got torch.int64"):
        HybridLanguageModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "hybrid_fl', "must be a whole JSON file"),
        ('{"model_type": "llama", "hidden_size": 32}', "must have model_type 'hybrid_flex', got 'llama'"),
        ("[1, 2]", "must have model_type 'hybrid_flex', got None"),
        ('{"model_type": "hybrid_flex", "hidden_dim": 3}', "must describe a HybridConfig.*got 'hidden_dim'"),
        ('{"model_type": "hybrid_flex", "pattern": "RS"}', "must describe a HybridConfig.*S before the first R"),
        ('{"model_type": "hybrid_flex", "topk": "4"}', "must describe a HybridConfig.*topk must be int"),
    ],
)
def test_foreign_configurations_are_refused(saved: Path, text: str, message: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"from_pretrained: .*config.json {message}"):
        HybridLanguageModel.from_pretrained(saved)


def test_the_file_says_what_it_is(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    assert values.pop("model_type") == "hybrid_flex"
    assert HybridConfig.from_dict(values) == SMALL
