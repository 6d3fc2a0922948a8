"""The profile of how far queries select alike: its numbers on selections that are known, and a run on a tiny model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hybrid_flex import HybridConfig, HybridLanguageModel

ROOT = Path(__file__).parents[1]
T, TOPK = 512, 64


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "profiles"))
    return importlib.import_module("agreement")


def test_queries_that_all_select_the_same(profile: ModuleType) -> None:
    found = profile.agreement(torch.arange(TOPK, dtype=torch.int32).expand(T, TOPK), TOPK)
    assert found["shared"] == found["union 8"] == found["union 32"] == found["union 128"] == 1.0
    # One block of keys, of those that the last of 32 queries sees: 2 of 160 or more of 288 and so on, up to 4 of 512.
    tiles = range(128, T, 32)
    blocks = [sum(-(-(t + 32) // 128) for t in tiles if t // 128 == i) for i in (1, 2, 3)]
    assert found["blocks"] == pytest.approx(sum(4 / n for n in blocks) / 3)
    assert found["recent"] == 0.0


def test_queries_that_share_nothing(profile: ModuleType) -> None:
    """Query t selects what is congruent to t modulo 8."""
    indices = torch.arange(T)[:, None] % 8 + 8 * torch.arange(16)
    found = profile.agreement(torch.nn.functional.pad(indices.int(), (0, 4), value=-1), 16)
    assert found["shared"] == 0.0 and found["union 8"] == found["union 32"] == found["union 128"] == 8.0


def test_queries_that_select_the_last_ones(profile: ModuleType) -> None:
    found = profile.agreement((torch.arange(T)[:, None] - torch.arange(TOPK)).clamp_min(-1).int(), TOPK)
    assert found["recent"] == 1.0 and found["shared"] == pytest.approx(63 / 64)
    assert found["union 32"] == pytest.approx((64 + 31) / 64)


def test_queries_that_select_independently(profile: ModuleType) -> None:
    scores = torch.rand(2048, 2048, generator=torch.Generator().manual_seed(0))
    scores = scores.masked_fill(torch.ones(2048, 2048).triu(1) == 1, -1)
    found = profile.agreement(scores.topk(TOPK).indices.int(), TOPK)
    for name in ("shared", "recent", "union 8", "union 32", "union 128", "blocks"):
        assert found[name] == pytest.approx(found[f"{name} if independent"], rel=0.03), name


def test_a_model_and_its_text(profile: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = HybridConfig(vocab_size=256, hidden_size=64, pattern="SDS", num_heads=2, topk=16)
    model = HybridLanguageModel(config)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_bytes(bytes(range(256)) * 40)
    arguments = ["--text", str(tmp_path / "text"), "--model", str(tmp_path / "model"), "--length", "300"]
    arguments += ["--texts", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["agreement.py", *arguments])
    profile.main()
    (path,) = (tmp_path / "out").glob("agreement_*.json")
    report = json.loads(path.read_text())
    assert set(report["layers"]) == {"stack.blocks.0.mixer", "stack.blocks.2.mixer"} and report["bits_per_byte"] > 7
    for own in report["layers"].values():
        assert 0 < own["shared"] <= 1 and 1 <= own["union 8"] <= own["union 32"] <= own["union 128"] <= 300 / 16
    text = path.with_suffix(".md").read_text()
    assert all(f"| {name} |" in text for name in (*report["layers"], "independent"))

    monkeypatch.setattr(sys, "argv", ["agreement.py", *arguments[:5], "100", *arguments[6:]])
    with pytest.raises(SystemExit, match="256 tokens are the least with topk = 16"):
        profile.main()


def test_listening_leaves_the_model_as_it_was(profile: ModuleType) -> None:
    model = HybridLanguageModel(HybridConfig(vocab_size=256, hidden_size=64, pattern="S", num_heads=2, topk=16))
    ids = torch.randint(256, (1, 40))
    logits, found = profile.selections(model, ids)
    assert torch.equal(logits, model(ids)[0])
    (indices,) = found.values()
    assert indices.shape == (40, 16) and "select" not in vars(model.stack.blocks[0].mixer.indexer)
