"""What the dense, block and mask rows of dsa.py do: torch's fused attention and FlexAttention, as peers and as ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dsa_gates import BOUNDS, Errors, judge_attention
from dsa_rows import FLEX, GATHER, MASKED, OURS, SDPA, BlockRow, DenseRow, DensityRow, FormsRow
from dsa_work import Call, Contender, Tensors, Work, causal_indices, leaves, used_keys
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from hybrid_flex.ops import block_topk_mask, sparse_attention, topk_block_mask

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
NUM_MASKS = 100
NUM_QUERIES = 16
"""Queries that are compared where each has a whole sequence of keys."""


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend densely and causally, head-major; on a CPU by whatever torch has there."""
    if not q.is_cuda:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Call FlexAttention; on a CPU, where it has no backward, the same mask through plain attention instead."""
    if not q.is_cuda and q.requires_grad:
        dense = create_mask(mask.mask_mod, 1, 1, q.shape[2], k.shape[2], device=q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


def compiled(function: Callable[..., Any], backward: bool, device: torch.device) -> Callable[..., Any]:
    """Compile one graph; on a CPU trace it only, which takes no compiler, and leave alone what has a backward."""
    if device.type == "cuda":
        return torch.compile(function, fullgraph=True)
    return function if backward else torch.compile(function, fullgraph=True, backend="eager")


# NOTE [One graph per row]: what one source line compiled for another row would make the compiler take lengths for
# dynamic, and count towards its limit.  Each row therefore starts with an empty cache.


def causal_block_mask(num_tokens: int, block_size: int, device: torch.device) -> BlockMask:
    """List the blocks of causal attention; `create_block_mask` would evaluate every pair of tokens."""
    num_blocks = -(-num_tokens // block_size)
    row = torch.arange(num_blocks, device=device, dtype=torch.int32)
    order = row.expand(num_blocks, num_blocks)
    diagonal = order.clone()
    diagonal[:, 0], diagonal[row.long(), row.long()] = row, 0
    return BlockMask.from_kv_blocks(
        torch.ones_like(row)[None, None],
        diagonal[None, None],
        row[None, None],
        order.contiguous()[None, None],
        BLOCK_SIZE=block_size,
        mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
        seq_lengths=(num_tokens, num_tokens),
    )


def lists_of(mask: BlockMask) -> tuple[Tensor | None, ...]:
    """Return all that building a mask makes, so that a compiler leaves nothing out."""
    forward = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    return *forward, mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices


class HeadMajorWork(Work):
    """Queries, keys and values as torch's fused attention wants them, ``[1, H, T, D]``."""

    def __init__(self, row: Any, device: torch.device, seed: int) -> None:
        super().__init__(device, seed)
        kv_heads = getattr(row, "kv_heads", row.H)
        sizes = {"q": row.H, "k": kv_heads, "v": kv_heads, "do": row.H}
        self.x = {name: self.normal(1, heads, row.T, row.D) for name, heads in sizes.items()}

    def run(self, attend: Attend, backward: bool) -> Tensors:
        """Attend, and work out the gradients of q, k and v if the row asks."""
        tensors = [self.x[name] for name in ("q", "k", "v")]
        if not backward:
            with torch.no_grad():
                return {"o": attend(*tensors)}
        inputs = leaves(*tensors)
        o = attend(*inputs)
        grads = torch.autograd.grad(o, inputs, self.x["do"])
        return {"o": o.detach()} | dict(zip(("dq", "dk", "dv"), grads, strict=True))

    def judge(self, found: Tensors, keys_of: Callable[[int], Tensor]) -> Errors:
        """Compare o, and dq if there is one; the keys' gradients must at least hold numbers."""
        x = {name: self.x[name].transpose(1, 2) for name in ("q", "k", "v", "do")}
        outputs = {name: found[name].transpose(1, 2) for name in ("o", "dq") if name in found}
        return judge_attention(x, outputs, keys_of, x["q"].shape[-1] ** -0.5, NUM_QUERIES)

    def visible(self, t: int) -> Tensor:
        return torch.arange(t + 1, device=self.device)

    def flops(self, pairs: float, row: Any) -> float:
        """Count two products forward and five backward over ``pairs`` of a query and a key."""
        return (7 if row.backward else 2) * 2.0 * pairs * row.H * row.D

    def dense(self, row: Any) -> Contender:
        def judge(found: Tensors) -> Errors:
            return self.judge(found, self.visible)

        pairs = row.T * (row.T + 1) / 2
        return Contender(lambda: lambda: self.run(cudnn_attention, row.backward), judge, flops=self.flops(pairs, row))


class DenseWork(HeadMajorWork):
    def contenders(self, row: DenseRow) -> dict[str, Contender]:
        torch._dynamo.reset()  # NOTE [One graph per row]
        sdpa = self.dense(row)

        def prepare() -> Call:
            mask = causal_block_mask(row.T, 128, self.device)
            attend = compiled(lambda q, k, v: flex(q, k, v, mask), row.backward, self.device)
            return lambda: self.run(attend, row.backward)

        return {SDPA: sdpa} | ({FLEX: Contender(prepare, sdpa.judge, flops=sdpa.flops)} if row.flex else {})


class BlockWork(HeadMajorWork):
    def __init__(self, row: BlockRow, device: torch.device, seed: int) -> None:
        super().__init__(row, device, seed)
        self.x["scores"] = self.draw_scores(row)
        self.attend: Callable[..., Tensor] | None = None

    def draw_scores(self, row: BlockRow) -> Tensor:
        num_blocks = -(-row.T // row.block_size)
        scores = torch.randn(1, num_blocks, num_blocks, generator=self.generator, device=self.device)
        scores.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
        return scores

    def mask(self, row: BlockRow, scores: Tensor) -> BlockMask:
        return block_topk_mask(scores, row.blocks, row.T, row.T, block_size=row.block_size)

    def keys_of(self, row: BlockRow, scores: Tensor, t: int) -> Tensor:
        block = t // row.block_size
        chosen = scores[0, block, : block + 1].topk(min(row.blocks, block + 1)).indices
        tokens = chosen[:, None] * row.block_size + torch.arange(row.block_size, device=self.device)
        return tokens[tokens <= t]

    def contenders(self, row: BlockRow) -> dict[str, Contender]:
        torch._dynamo.reset()  # NOTE [One graph per row]
        scores = self.x["scores"]

        def prepare() -> Call:
            def attend(q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
                return flex(q, k, v, self.mask(row, scores))

            self.attend = compiled(attend, row.backward, self.device)
            return lambda: self.run_masked(row, scores)

        def judge(found: Tensors) -> Errors:
            return self.judge(found, lambda t: self.keys_of(row, scores, t))

        def prepare_mask() -> Call:
            build = compiled(lambda scores: lists_of(self.mask(row, scores)), False, self.device)
            return lambda: dict(enumerate_lists(build(scores)))

        per_row = [min(row.blocks, i + 1) for i in range(scores.shape[1])]
        ours = Contender(prepare, judge, "ours", self.flops(sum(per_row) * row.block_size**2, row))
        mask = Contender(prepare_mask, lambda found: {}, "part")
        return {OURS: ours, "mask": mask, SDPA: self.dense(row)}

    def run_masked(self, row: BlockRow, scores: Tensor) -> Tensors:
        assert self.attend is not None
        attend = self.attend
        return self.run(lambda q, k, v: attend(q, k, v, scores), row.backward)

    def extras(self, row: BlockRow) -> dict[str, Any]:
        """Count the graphs that other masks of the same size ask for, and judge the last of them."""
        if self.attend is None:
            return {}
        before = counters["stats"]["unique_graphs"]
        for _ in range(NUM_MASKS):
            scores = self.draw_scores(row)
            found = self.run_masked(row, scores)
        recompiled = counters["stats"]["unique_graphs"] - before
        error = self.judge(found, lambda t: self.keys_of(row, scores, t))["o"]
        if not error <= BOUNDS["o"]:
            raise RuntimeError(f"mask {NUM_MASKS} must give the error of the first, got {error:.1e}")
        return {"masks": NUM_MASKS, "recompiled": recompiled, "error_of_last_mask": error}


def enumerate_lists(tensors: tuple[Tensor | None, ...]) -> list[tuple[str, Tensor]]:
    return [(f"list {i}", x) for i, x in enumerate(tensors) if x is not None]


class FormsWork(HeadMajorWork):
    def __init__(self, row: FormsRow, device: torch.device, seed: int) -> None:
        super().__init__(row, device, seed)
        self.x["indices"] = causal_indices(row.T, row.topk, self.generator, row.agreement)

    def contenders(self, row: FormsRow) -> dict[str, Contender]:
        torch._dynamo.reset()  # NOTE [One graph per row]
        indices = self.x["indices"]

        def prepare_flex() -> Call:
            def attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
                return flex(q, k, v, topk_block_mask(indices, row.T))

            once = compiled(attend, row.backward, self.device)
            return lambda: self.run(lambda q, k, v: once(q, k, v, indices), row.backward)

        def by(backend: str) -> Callable[[], Call]:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return sparse_attention(q, k, v, indices, backend=backend)[0].transpose(1, 2)

            return lambda: lambda: self.run(attend, row.backward)

        def judge(found: Tensors) -> Errors:
            return self.judge(found, used_keys(indices))

        flops = self.flops(float((indices >= 0).sum()), row)
        forms = {OURS: Contender(by("auto"), judge, "ours", flops), SDPA: self.dense(row)}
        forms |= {GATHER: Contender(by("gather"), judge, flops=flops)}
        if self.device.type == "cuda":
            forms |= {MASKED: Contender(by("masked"), judge, flops=flops)}
        if row.flex:
            forms |= {FLEX: Contender(prepare_flex, judge, flops=flops)}
        return forms


class DensityWork(Work):
    def __init__(self, row: DensityRow, device: torch.device, seed: int) -> None:
        super().__init__(device, seed)

    def contenders(self, row: DensityRow) -> dict[str, Contender]:
        return {}

    def extras(self, row: DensityRow) -> dict[str, Any]:
        """Measure the share of visible blocks touched, per agreement of neighbours and per run of alike keys."""
        size = row.block_size
        num_blocks = -(-row.T // size)
        table: list[dict[str, float]] = []
        for agreement in row.agreements:
            for run in row.runs:
                indices = causal_indices(row.T, row.topk, self.generator, agreement, run, size)
                mask = topk_block_mask(indices, row.T, size)
                assert mask.full_kv_num_blocks is not None
                listed = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
                counted = 0
                for i in range(num_blocks):
                    slots = indices[0, i * size : (i + 1) * size]
                    counted += torch.unique(slots[slots >= 0] // size).numel()
                density = listed / (num_blocks * (num_blocks + 1) / 2)
                table.append({"agreement": agreement, "run": run, "density": density, "right": listed == counted})
        return {"density": table}
