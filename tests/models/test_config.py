"""The configuration: what it spells out, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_flex.models import HybridConfig


@pytest.mark.parametrize(
    ("pattern", "num_layers", "letters"),
    [("KKKS", None, "KKKS"), ("KKKS", 6, "KKKSKK"), ("KS", 1, "K"), ("SRRD", 5, "SRRDS"), ("D", 3, "DDD")],
)
def test_the_pattern_is_repeated(pattern: str, num_layers: int | None, letters: str) -> None:
    assert HybridConfig(pattern=pattern, num_layers=num_layers).letters == letters


def test_three_to_one_is_the_default() -> None:
    assert HybridConfig().letters == "KKKS"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(pattern=st.text("KSRD", min_size=1, max_size=8), num_layers=st.none() | st.integers(1, 10))
def test_r_needs_an_s_before_it(pattern: str, num_layers: int | None) -> None:
    letters = (pattern * 10)[: num_layers or len(pattern)]
    if "R" in letters.split("S")[0]:
        with pytest.raises(
            ValueError, match="pattern must have an S before the first R, whose selection R reuses, got"
        ):
            HybridConfig(pattern=pattern, num_layers=num_layers)
    else:
        assert HybridConfig(pattern=pattern, num_layers=num_layers).letters == letters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "KKXS"}, "pattern letter must be one of 'K', 'S', 'R', 'D', got 'X'"),
        ({"pattern": ""}, "pattern must name at least one layer, got ''"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"num_heads": 3}, "num_heads must divide hidden_size = 256 unless head_dim is given, got 3"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads = 4, got 3"),
        ({"kda_num_heads": 2, "kda_num_v_heads": 3}, "kda_num_v_heads must be a multiple of kda_num_heads = 2, got 3"),
        ({"topk": 0}, "topk must be positive, got 0"),
        ({"topk": 30, "index_kpool": 4}, "topk must be a multiple of 4, got 30"),
        ({"sparse_attention": "mha"}, "sparse_attention must be one of 'gqa', 'mla', got 'mha'"),
        ({"rope_layout": "x"}, "rope_layout must be one of 'half', 'interleaved', 'none', got 'x'"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"HybridConfig: {message}"):
        HybridConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": "256"}, "hidden_size must be int, got '256'"),
        ({"num_heads": True}, "num_heads must be int, got True"),
        ({"lower_bound": "-5"}, r"lower_bound must be float \| None, got '-5'"),
        ({"tie_embeddings": 1}, "tie_embeddings must be bool, got 1"),
    ],
)
def test_wrong_types_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"HybridConfig: {message}"):
        HybridConfig(**options)


def test_a_dictionary_makes_the_round_trip() -> None:
    config = HybridConfig(hidden_size=64, lower_bound=-5, pattern="KSRD", q_lora_rank=24)
    assert HybridConfig.from_dict(config.to_dict()) == config
    assert HybridConfig.from_dict({}) == HybridConfig()


def test_unknown_keywords_are_refused() -> None:
    with pytest.raises(TypeError, match=r"HybridConfig: keyword must be one of .*, got 'hidden_dim'"):
        HybridConfig.from_dict({"hidden_dim": 64})
    with pytest.raises(TypeError, match="hidden_dim"):
        HybridConfig(hidden_dim=64)
