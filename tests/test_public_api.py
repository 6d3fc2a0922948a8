"""Freeze the public names: names are added here, never renamed and never removed."""

from __future__ import annotations

import inspect

import pytest

import hybrid_flex
from hybrid_flex import export, ops, profiling

TOP_LEVEL = [
    "DSACache",
    "DSAState",
    "DeepSeekSparseAttention",
    "DeepSeekSparseMLA",
    "HybridConfig",
    "HybridLanguageModel",
    "KDAState",
    "KVCache",
    "KimiDeltaAttention",
    "LayerWiseHybrid",
    "LightningIndexer",
    "ParallelHybrid",
    "SequentialHybrid",
    "export",
    "ops",
    "profiling",
]

OPERATORS = [
    "block_topk_mask",
    "chunk_kda",
    "expand_pools",
    "fused_recurrent_kda",
    "gated_rms_norm",
    "indexer_kl_loss",
    "kda_decode",
    "kda_gate",
    "kda_reference",
    "kda_step",
    "lightning_scores",
    "lightning_topk",
    "paged_rows",
    "pool_index_keys",
    "short_conv",
    "sparse_attention",
    "topk_block_mask",
]

# The keywords are flash-linear-attention's, so that one import line moves a user over.
KDA_PARAMETERS = (
    "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, *, use_qk_l2norm_in_kernel=False, "
    "use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False, "
    "lower_bound=None, A_log=None, dt_bias=None, cu_seqlens=None, state_v_first=False, chunk_size=64"
)
SIGNATURES = {
    "chunk_kda": KDA_PARAMETERS,
    "fused_recurrent_kda": KDA_PARAMETERS,
    "gated_rms_norm": "x, gate, weight, *, eps=1e-06, activation='sigmoid'",
    "kda_decode": "q, k, v, g, beta, state, *, state_indices=None, scale=None, use_qk_l2norm_in_kernel=False, "
    "use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False, "
    "lower_bound=None, A_log=None, dt_bias=None, cu_seqlens=None, state_v_first=False",
    "lightning_scores": "q_idx, k_idx, w",
    "short_conv": "x, weight, bias=None, *, activation='silu', initial_state=None, output_final_state=False, "
    "cu_seqlens=None",
    "sparse_attention": "q, k, v, indices, *, scale=None, backend='auto', value_dim=None",
}

EXPORT = {
    "export_decode": "model, *, max_length, batch_size=2, dynamic=True, max_batch_size=None, strict=False",
    "export_prefill": "model, *, batch_size=2, seq_len=128, dynamic=True, max_batch_size=None, max_seq_len=None, "
    "max_length=None, strict=False",
    "load": "path",
    "load_package": "path, *, run_single_threaded=False",
    "package": "model, path, device=None, *, max_length=4096, max_batch_size=None",
    "portable": "program, *, flat=False",
    "runner": "program",
    "save": "program, path",
}
PROFILING = {
    "measure_roofline": "device='cpu', dtype=torch.float32, *, seconds=0.4",
    "named": "*models",
    "range": "name",
    "report": "source, *, by='name', roofline=True, title=None",
    "trace": "logdir, *, skip=0, warmup=0, active=None, name=None, model=None, record_shapes=True, "
    "profile_memory=True, with_stack=False",
}
REPORT = ["figure", "markdown", "row", "to_dict", "write_markdown", "write_png", "write_tensorboard"]
ROW = ["backward_ms", "bytes", "calls", "flop", "host_ms", "name", "roofline_share", "share", "time_ms"]


def parameters(function: object) -> str:
    """Write the parameters of ``function`` without their annotations."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))[1:-1]


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_top_level_name(name: str) -> None:
    assert hasattr(hybrid_flex, name)
    assert name in hybrid_flex.__all__


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_name(name: str) -> None:
    assert callable(getattr(ops, name))
    assert name in ops.__all__


@pytest.mark.parametrize("package", [hybrid_flex, ops], ids=lambda p: p.__name__)
def test_all_is_sorted_and_complete(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert len(set(names)) == len(names)
    assert all(hasattr(package, name) for name in names)


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signature_is_frozen(name: str) -> None:
    assert parameters(getattr(ops, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_has_no_catch_all(name: str) -> None:
    kinds = {p.kind for p in inspect.signature(getattr(ops, name)).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_documented(name: str) -> None:
    doc = inspect.getdoc(getattr(ops, name)) or ""
    for section in ("Args:", "Returns:", "Raises:", "Device:", "Source:", ">>> "):
        assert section in doc, f"{name} lacks {section}"


@pytest.mark.parametrize("name", sorted(EXPORT))
def test_export_signature_is_frozen(name: str) -> None:
    assert parameters(getattr(export, name)) == EXPORT[name]
    assert set(export.__all__) == {*EXPORT, "Package"}


@pytest.mark.parametrize("name", sorted(PROFILING))
def test_profiling_signature_is_frozen(name: str) -> None:
    assert parameters(getattr(profiling, name)) == PROFILING[name]
    assert name in profiling.__all__


def test_reports_have_their_names() -> None:
    assert all(callable(getattr(profiling.Report, name)) for name in REPORT)
    assert sorted(profiling.Row.__dataclass_fields__) == ROW
    assert set(profiling.Roofline.__dataclass_fields__) == {"device", "dtype", "flop_per_s", "bytes_per_s"}
    assert all(name in profiling.__all__ for name in ("Report", "Roofline", "Row"))
