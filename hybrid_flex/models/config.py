"""The shape of a hybrid model: widths, heads, and a string that says which layer stands where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hybrid_flex.checks import check, check_choice
from hybrid_flex.ops.dsa import RopeLayout

LETTERS = {
    "K": "Kimi Delta Attention",
    "S": "sparse attention with its own indexer",
    "R": "sparse attention that reuses the selection of the S layer before it",
    "D": "dense causal attention",
}
_NAME = "HybridConfig"


@dataclass(frozen=True)
class HybridConfig:
    """Describe a hybrid language model.

    Args:
        vocab_size: number of tokens.
        hidden_size: model width.
        pattern: one letter per layer, repeated until ``num_layers`` are named: K Kimi Delta Attention, S sparse
            attention with its own indexer, R sparse attention that reuses the last S layer's selection, D dense causal
            attention.
        num_layers: number of layers; ``len(pattern)`` by default.
        num_heads: query heads of S, R and D layers.
        head_dim: width of their heads (of the unrotated part under MLA); ``hidden_size // num_heads`` by default.
        num_kv_heads: their key and value heads, a divisor of ``num_heads``; unused under MLA.
        kda_num_heads: query and key heads of K layers; ``num_heads`` by default.
        kda_head_dim: key width of K layers; ``head_dim`` by default.
        kda_num_v_heads: value heads of K layers, a multiple of ``kda_num_heads``.
        kda_v_head_dim: value width of K layers.
        conv_size: taps of their short convolutions.
        gate_rank: inner width of their low-rank gates.
        lower_bound: None for the softplus gate, or the lower bound (negative) of the other one.
        allow_neg_eigval: double beta.
        chunk_size: tokens per chunk of K layers.
        sparse_attention: "gqa" for `DeepSeekSparseAttention`, "mla" for `DeepSeekSparseMLA` in S and R layers.
        q_lora_rank: MLA: width of the queries' latent; None for none.
        kv_lora_rank: MLA: width of the keys' and values' latent.
        v_head_dim: MLA: value width of a head; ``head_dim`` by default.
        topk: tokens a query attends to in S and R layers.
        index_heads: heads of the indexers.
        index_head_dim: width of an indexer head.
        index_kpool: tokens per pooled index key; divides ``topk``.
        rope_dim: rotated channels in S, R and D layers; 0 (default): K layers carry the positions.
        rope_theta: base of the rotation frequencies.
        rope_layout: "half", "interleaved" or "none" for the attention.
        index_rope_layout: the same for the indexer.
        mlp_size: inner width of the feed-forward layers; ``8 / 3 * hidden_size`` rounded up to a multiple of 32 by
            default.
        norm_eps: eps of every RMS norm.
        tie_embeddings: one matrix for the embedding and the output layer.
        init_std: standard deviation of the weights at the start; those that write into the residual stream get
            ``init_std / sqrt(2 * num_layers)``.
        checkpoint_activations: recompute each block in the backward pass instead of keeping its activations.
        backend: of `sparse_attention`.

    Raises:
        ValueError: an unknown letter, an R before any S, a count that is not positive, heads that do not divide.

    Example:
        >>> HybridConfig(hidden_size=64, pattern="KKKS", num_layers=8).letters
        'KKKSKKKS'
    """

    vocab_size: int = 256
    hidden_size: int = 256
    pattern: str = "KKKS"
    num_layers: int | None = None
    num_heads: int = 4
    head_dim: int | None = None
    num_kv_heads: int | None = None
    kda_num_heads: int | None = None
    kda_head_dim: int | None = None
    kda_num_v_heads: int | None = None
    kda_v_head_dim: int | None = None
    conv_size: int = 4
    gate_rank: int | None = None
    lower_bound: float | None = None
    allow_neg_eigval: bool = False
    chunk_size: int = 64
    sparse_attention: str = "gqa"
    q_lora_rank: int | None = None
    kv_lora_rank: int = 128
    v_head_dim: int | None = None
    topk: int = 64
    index_heads: int = 4
    index_head_dim: int = 32
    index_kpool: int = 1
    rope_dim: int = 0
    rope_theta: float = 10000.0
    rope_layout: str = "half"
    index_rope_layout: str = "half"
    mlp_size: int | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float = 0.02
    checkpoint_activations: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Check what the layers themselves cannot: the pattern, and types that JSON may have changed."""
        for field in fields(self):
            self._check_type(field.name, str(field.type), getattr(self, field.name))
        check(len(self.pattern) > 0, _NAME, "pattern", "name at least one layer", repr(self.pattern))
        for letter in self.pattern:
            check_choice(_NAME, "pattern letter", letter, tuple(LETTERS))
        check(self.num_layers is None or self.num_layers > 0, _NAME, "num_layers", "be positive", self.num_layers)
        first_reuse, first_select = self.letters.find("R"), self.letters.find("S")
        check(
            first_reuse < 0 or 0 <= first_select < first_reuse,
            _NAME,
            "pattern",
            "have an S before the first R, whose selection R reuses",
            repr(self.letters),
        )
        for name in ("vocab_size", "hidden_size", "num_heads", "topk", "index_heads", "index_head_dim", "index_kpool"):
            check(getattr(self, name) > 0, _NAME, name, "be positive", getattr(self, name))
        check(
            self.head_dim is not None or self.hidden_size % self.num_heads == 0,
            _NAME,
            "num_heads",
            f"divide hidden_size = {self.hidden_size} unless head_dim is given",
            self.num_heads,
        )
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        divides = kv_heads > 0 and self.num_heads % kv_heads == 0
        check(divides, _NAME, "num_kv_heads", f"divide num_heads = {self.num_heads}", kv_heads)
        kda_heads = self.num_heads if self.kda_num_heads is None else self.kda_num_heads
        check(kda_heads > 0, _NAME, "kda_num_heads", "be positive", kda_heads)
        v_heads = kda_heads if self.kda_num_v_heads is None else self.kda_num_v_heads
        multiple = v_heads > 0 and v_heads % kda_heads == 0
        check(multiple, _NAME, "kda_num_v_heads", f"be a multiple of kda_num_heads = {kda_heads}", v_heads)
        check(self.topk % self.index_kpool == 0, _NAME, "topk", f"be a multiple of {self.index_kpool}", self.topk)
        check_choice(_NAME, "sparse_attention", self.sparse_attention, ("gqa", "mla"))
        layouts = tuple(layout.value for layout in RopeLayout)
        check_choice(_NAME, "rope_layout", self.rope_layout, layouts)
        check_choice(_NAME, "index_rope_layout", self.index_rope_layout, layouts)

    @property
    def letters(self) -> str:
        """Spell the pattern out: one letter per layer."""
        count = len(self.pattern) if self.num_layers is None else self.num_layers
        return (self.pattern * count)[:count]

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HybridConfig:
        """Make a configuration of ``values``; absent fields take their defaults.

        Raises:
            TypeError: a key names no field, or a value has the wrong type.
            ValueError: the values do not fit together.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise TypeError(f"{_NAME}: keyword must be one of {', '.join(known)}, got {key!r}")
        return cls(**values)

    @staticmethod
    def _check_type(name: str, annotation: str, value: object) -> None:
        """Refuse a value of another type than the field's: a string from a hand-written file, True for a count."""
        types = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}
        accepted: list[type] = [types[kind.strip()] for kind in annotation.split("|")]
        if float in accepted:
            accepted.append(int)
        if not isinstance(value, tuple(accepted)) or (isinstance(value, bool) and bool not in accepted):
            raise TypeError(f"{_NAME}: {name} must be {annotation}, got {value!r}")
