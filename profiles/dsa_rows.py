"""The rows of dsa.py: what each one measures, at which sizes, and what it is to reach."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

OURS = "hybrid_flex"
SDPA, FLEX, EAGER = "cuDNN SDPA", "FlexAttention", "eager einsum + topk"
GATHER, MASKED = "gather form", "masked form"
DENSE_LAYER, DENSE_DECODE = "dense layer", "dense decode"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; a subclass holds the sizes of one kind of work.

    The targets are for an H100 80GB and bfloat16.
    """

    name: str
    target_ms: float | None = None
    target_tflops: float | None = None
    """Arithmetic of the formula in dsa.py's help per second, in 10^12."""
    target_times: float | None = None
    """How many times faster than the first peer."""
    target_workspace_mib: float | None = None
    target_mask_share: float | None = None
    """Largest share of the time that building the mask may take."""
    quoted: tuple[str, float] | None = None
    """A peer's published name and milliseconds on the same work, not measured here."""

    @property
    def inputs_key(self) -> tuple[Any, ...]:
        """Whatever decides the inputs: rows with the same key use the same tensors."""
        own = {field.name for field in fields(Row)} | {"backward", "graph"}
        return type(self), *(getattr(self, field.name) for field in fields(self) if field.name not in own)

    def quick(self) -> Row:
        """Return the row with the same features and hardly any work."""
        nothing = {field.name: None for field in fields(Row) if field.name.startswith("target")}
        return replace(self, **nothing, quoted=None, **self.quick_sizes())  # type: ignore[arg-type]

    def quick_sizes(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SelectRow(Row):
    """`lightning_topk`, causal, T = S tokens, of which ``S / kpool`` pooled keys."""

    T: int
    heads: int = 64
    width: int = 128
    topk: int = 2048
    kpool: int = 1
    lengths: tuple[int, ...] = ()

    def quick_sizes(self) -> dict[str, Any]:
        lengths = tuple(n // 64 for n in self.lengths)
        T = sum(lengths) or self.T // 128
        return {"T": T, "heads": self.heads // 8, "width": 16, "topk": max(self.topk // 64, 4), "lengths": lengths}


@dataclass(frozen=True, kw_only=True)
class AttendRow(Row):
    """`sparse_attention` of T queries on ``topk`` of S keys each, no causality."""

    H: int
    D: int
    Dv: int
    T: int = 4096
    S: int = 32768
    kv_heads: int = 1
    topk: int = 2048
    latent: bool = False
    """Whether the values are the first columns of the keys."""
    scale: float = 128**-0.5
    """Under MLA that of the expanded heads."""
    backward: bool = False

    def quick_sizes(self) -> dict[str, Any]:
        H = max(self.H // 16, self.kv_heads)
        return {"T": 24, "S": 96, "H": H, "D": self.D // 8, "Dv": self.Dv // 8, "topk": 20}


@dataclass(frozen=True, kw_only=True)
class DenseRow(Row):
    """Dense causal attention, T = S."""

    T: int
    H: int = 32
    D: int = 128
    backward: bool = False
    flex: bool = True

    def quick_sizes(self) -> dict[str, Any]:
        return {"T": self.T // 128, "H": 4, "D": 16}


@dataclass(frozen=True, kw_only=True)
class BlockRow(Row):
    """FlexAttention over ``blocks`` blocks of keys per block of queries, the diagonal among them."""

    T: int
    H: int = 32
    D: int = 128
    blocks: int = 16
    block_size: int = 128
    backward: bool = False

    def quick_sizes(self) -> dict[str, Any]:
        return {"T": self.T // 128, "H": 4, "D": 16, "blocks": 3, "block_size": 16}


@dataclass(frozen=True, kw_only=True)
class FormsRow(Row):
    """The forms of sparse_attention on one selection, causal."""

    T: int
    H: int = 32
    kv_heads: int = 8
    D: int = 128
    topk: int = 2048
    backward: bool = False
    flex: bool = True
    """Whether FlexAttention runs; where it is known to be slower by far it would only take time."""
    agreement: float = 0.0
    """Correlation of the scores that neighbouring queries give a key."""

    def quick_sizes(self) -> dict[str, Any]:
        return {"T": self.T // 32, "H": 4, "kv_heads": 2, "D": 16, "topk": 32}


@dataclass(frozen=True, kw_only=True)
class DensityRow(Row):
    """Share of the visible blocks that `topk_block_mask` touches; nothing is timed."""

    T: int
    topk: int = 2048
    agreements: tuple[float, ...] = (0.0, 0.5, 0.9, 0.99, 1.0)
    runs: tuple[int, ...] = (1, 16, 128)
    block_size: int = 128

    def quick_sizes(self) -> dict[str, Any]:
        return {"T": self.T // 32, "topk": 32, "runs": (1, 16), "block_size": 16}


@dataclass(frozen=True, kw_only=True)
class LayerRow(Row):
    """A whole attention layer against the same layer with dense attention."""

    shape: str
    T: int
    backward: bool = False
    small: bool = False
    agreement: float | None = None
    """None: what the layer selects, with random weights of random inputs.  Else it selects, and attends to a selection
    whose neighbours agree so far."""

    def quick_sizes(self) -> dict[str, Any]:
        return {"T": self.T // 128, "small": True}


@dataclass(frozen=True, kw_only=True)
class LossRow(Row):
    """`indexer_kl_loss`, forward and backward; ``topk`` = 0 is the dense stage.

    ``given``: with the log-sum-exps that the attention has left, as layers call it.
    """

    T: int
    topk: int
    given: bool = False
    H: int = 64
    D: int = 128
    heads: int = 64
    width: int = 128

    def quick_sizes(self) -> dict[str, Any]:
        return {"T": self.T // 128, "topk": self.topk // 128, "H": 4, "D": 16, "heads": 4, "width": 16}


@dataclass(frozen=True, kw_only=True)
class DecodeRow(Row):
    """One token: selection and attention over a cache of S tokens."""

    shape: str
    S: int
    graph: bool = False
    small: bool = False

    def quick_sizes(self) -> dict[str, Any]:
        return {"S": self.S // 128, "small": True}


@dataclass(frozen=True)
class Shape:
    """Sizes of one model's attention layer."""

    hidden: int
    H: int
    kv_heads: int
    D: int
    """Width of a key as the operator sees it, and of a value."""
    index_heads: int
    index_width: int
    topk: int
    kpool: int
    q_rank: int = 0
    """Width of the queries' latent; 0 without MLA."""
    head_dim: int = 0
    """Width of an expanded head under MLA."""


# GLM-5.3-Flash's attention: latent 512 without a rotated part, heads of 256 / 256.  Its hidden size and the rank of its
# queries are not published with the rest: 4096 and 2048 are this table's own.
SHAPES = {
    "glm": Shape(4096, 64, 1, 512, 32, 128, topk=2048, kpool=4, q_rank=2048, head_dim=256),
    "gqa": Shape(4096, 32, 8, 128, 8, 64, topk=2048, kpool=1),
}
SMALL_SHAPES = {
    "glm": Shape(64, 4, 1, 32, 4, 16, topk=16, kpool=4, q_rank=32, head_dim=16),
    "gqa": Shape(64, 4, 2, 16, 2, 16, topk=16, kpool=1),
}


def shape_of(row: LayerRow | DecodeRow) -> Shape:
    return (SMALL_SHAPES if row.small else SHAPES)[row.shape]


PACKED = (9137, 513, 2048, 14000, 70, 7000)
FLASH_MLA = {128: ("FlashMLA", 4.14), 64: ("FlashMLA", 2.10)}
LAYER_TARGETS = {32768: 2.0, 65536: 3.0, 131072: 5.0}
LENGTHS = (8192, 32768, 65536, 131072)
# H, D, Dv, key/value heads, forward target in ms, published peer
ATTENDED = (
    (128, 576, 512, 1, 7.0, FLASH_MLA[128]),
    (64, 576, 512, 1, 3.5, FLASH_MLA[64]),
    (64, 512, 512, 1, 2.8, None),
    (64, 128, 128, 1, 0.55, None),
    (32, 128, 128, 8, None, None),
)


def attend_name(way: str, H: int, D: int, Dv: int, kv_heads: int) -> str:
    heads = f"h{H}" if kv_heads == 1 else f"h{H}_kv{kv_heads}"
    return f"attend_{way}_q4096_s32768_{heads}_d{D}_v{Dv}"


def attend_rows() -> list[Row]:
    rows: list[Row] = []
    for H, D, Dv, kv_heads, ms, quoted in ATTENDED:
        sizes: dict[str, Any] = {"H": H, "D": D, "Dv": Dv, "kv_heads": kv_heads, "latent": D > 128}
        sizes["scale"] = {576: 192, 512: 256}.get(D, D) ** -0.5
        name = attend_name("fwd", H, D, Dv, kv_heads)
        rows.append(AttendRow(name=name, target_ms=ms, quoted=quoted, **sizes))
        target = 150.0 if kv_heads == 1 else None
        name = attend_name("bwd", H, D, Dv, kv_heads)
        rows.append(AttendRow(name=name, backward=True, target_tflops=target, **sizes))
    return rows


def layer_rows() -> list[Row]:
    rows: list[Row] = []
    for shape in SHAPES:
        for T in LENGTHS:
            target = LAYER_TARGETS.get(T) if shape == "glm" else None
            rows.append(LayerRow(name=f"layer_{shape}_fwd_t{T}", shape=shape, T=T, target_times=target))
            rows.append(LayerRow(name=f"layer_{shape}_train_t{T}", shape=shape, T=T, backward=True))
    for T in LENGTHS:
        for way in ("fwd", "train"):
            name = f"layer_gqa_{way}_t{T}_agree90"
            rows.append(LayerRow(name=name, shape="gqa", T=T, backward=way == "train", agreement=0.9))
    return rows


def decode_rows() -> list[Row]:
    return [
        DecodeRow(name=f"decode_{shape}_s{S}" + "_graph" * graph, shape=shape, S=S, graph=graph)
        for shape in SHAPES
        for S in (8192, 32768, 131072, 524288)
        for graph in (False, True)
    ]


# Heads, key heads, tokens and agreement: on both sides of where forms change places.
FORMS = (
    *((32, 8, T, 0.0) for T in (4096, 8192, 16384, 32768, 65536)),
    *((32, 8, T, 0.9) for T in (8192, 32768, 131072)),
    *((16, 2, T, 0.0) for T in (8192, 32768)),
)

# Rows that use the same inputs stand together.
ROWS: tuple[Row, ...] = (
    SelectRow(name="select_t8192_h64_d128_k2048", T=8192),
    SelectRow(name="select_t32768_h64_d128_k2048", T=32768, target_ms=22.0, target_workspace_mib=512.0),
    SelectRow(name="select_t32768_h32_kpool4", T=32768, heads=32, topk=512, kpool=4, target_ms=6.0),
    SelectRow(name="select_packed_t32768_h64_d128_k2048", T=sum(PACKED), lengths=PACKED),
    SelectRow(name="select_t131072_h64_d128_k2048", T=131072, target_workspace_mib=512.0),
    *attend_rows(),
    DenseRow(name="dense_fwd_t32768_h32_d128", T=32768),
    DenseRow(name="dense_train_t32768_h32_d128", T=32768, backward=True),
    DenseRow(name="dense_fwd_t131072_h32_d128", T=131072, flex=False),
    BlockRow(name="block_flex_fwd_t32768_16x128", T=32768, target_ms=2.95, target_mask_share=0.1),
    BlockRow(name="block_flex_train_t32768_16x128", T=32768, backward=True, target_ms=10.97, target_mask_share=0.1),
    *(
        FormsRow(
            name=f"forms_{way}_t{T}_h{H}_kv{kv_heads}_d128_k2048"
            + (f"_agree{agreement * 100:.0f}" if agreement else ""),
            T=T,
            H=H,
            kv_heads=kv_heads,
            backward=way == "train",
            flex=T == 4096,
            agreement=agreement,
        )
        for H, kv_heads, T, agreement in FORMS
        for way in ("fwd", "train")
    ),
    DensityRow(name="density_t8192_k2048", T=8192),
    DensityRow(name="density_t32768_k2048", T=32768),
    *(
        LossRow(name=f"loss_{stage}_t{T}_h64_k2048", T=T, topk=topk)
        for T in (8192, 32768)
        for stage, topk in (("sparse", 2048), ("dense", 0))
    ),
    *(LossRow(name=f"loss_given_t{T}_h64_d576_k2048", T=T, topk=2048, D=576, given=True) for T in (8192, 32768)),
    *decode_rows(),
    *layer_rows(),
)
assert sum(PACKED) == 32768
