"""What the operator rows of dsa.py do: their inputs, the contenders, and how each contender is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from dsa_gates import (
    Errors,
    Selection,
    exact_gradients,
    exact_loss,
    judge_attention,
    judge_exactly,
    judge_selection,
    sampled,
    worst,
)
from dsa_rows import DENSE_DECODE, EAGER, OURS, AttendRow, DecodeRow, LossRow, Row, SelectRow, shape_of
from harness import relative_error
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hybrid_flex.ops import expand_pools, indexer_kl_loss, lightning_topk, sparse_attention

Tensors = dict[str, Tensor]
Call = Callable[[], Tensors]


@dataclass
class Contender:
    """One way to do the work of a row."""

    prepare: Callable[[], Call]
    """Does what stays outside the time, and returns what is timed."""
    judge: Callable[[Tensors], Errors]
    role: str = "peer"
    """``ours``, ``peer``, or ``part`` for a part of ours that is also timed alone."""
    flops: float = 0.0
    graph: bool = False
    """Whether the call is replayed inside a CUDA graph."""
    remark: str = ""


class Work:
    """Inputs of a row, and who works on them."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.seed = device, seed
        self.generator = torch.Generator(device).manual_seed(seed)
        self.x: Tensors = {}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.bfloat16)

    def input_bytes(self) -> int:
        # Keys and values may be views of the same memory.
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.x.values()}
        return sum(storages.values())

    def contenders(self, row: Any) -> dict[str, Contender]:
        raise NotImplementedError

    def extras(self, row: Any) -> dict[str, Any]:
        """Find out what is no time, after the contenders were timed."""
        return {}


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Return the same memory as leaves of a graph of their own."""
    return [x.detach().requires_grad_() for x in tensors]


def random_indices(num_queries: int, num_keys: int, topk: int, generator: torch.Generator) -> Tensor:
    """Draw ``topk`` different keys per query, ascending: int32 ``[1, T, topk]``."""
    parts, size = [], max(1, 2**23 // num_keys)
    for start in range(0, num_queries, size):
        rows = min(size, num_queries - start)
        scores = torch.rand(rows, num_keys, generator=generator, device=generator.device)
        parts.append(scores.topk(topk, sorted=False).indices.sort(dim=-1).values.int())
    return torch.cat(parts)[None]


def causal_indices(
    num_tokens: int,
    topk: int,
    generator: torch.Generator,
    agreement: float = 0.0,
    run: int = 1,
    group: int = 128,
) -> Tensor:
    """Draw ``topk`` past tokens per token, all while there are no more: int32 ``[1, T, topk]``, -1 at the end.

    A key's score is Gaussian; ``agreement`` is the correlation of the scores that two tokens of the same ``group`` give
    it, and ``run`` consecutive keys share what is agreed upon.
    """
    device = generator.device
    column = torch.arange(num_tokens, device=device)
    parts = []
    for start in range(0, num_tokens, group):
        t = column[start : start + group, None]
        stop = min(start + group, num_tokens)
        own = torch.randn(stop - start, stop, generator=generator, device=device)
        common = torch.randn(-(-stop // run), generator=generator, device=device).repeat_interleave(run)[:stop]
        # A trace of their own keeps equal scores apart.
        scores = common * agreement**0.5 + own * max((1 - agreement) ** 0.5, 1e-3)
        chosen = scores.masked_fill_(column[:stop] > t, float("-inf")).topk(min(topk, stop), sorted=False).indices
        chosen = chosen.masked_fill(chosen > t, num_tokens).sort(dim=-1).values
        chosen = torch.nn.functional.pad(chosen, (0, topk - chosen.shape[1]), value=num_tokens)
        parts.append(chosen.masked_fill_(chosen == num_tokens, -1).int())
    return torch.cat(parts)[None]


def used_keys(indices: Tensor) -> Callable[[int], Tensor]:
    """Name the keys of a query from indices ``[1, T, J]``."""
    return lambda t: indices[0, t][indices[0, t] >= 0].long()


class SelectWork(Work):
    def __init__(self, row: SelectRow, device: torch.device, seed: int) -> None:
        super().__init__(device, seed)
        q_idx, k_idx = self.normal(1, row.T, row.heads, row.width), self.normal(1, row.T // row.kpool, row.width)
        w = self.normal(1, row.T, row.heads) * (row.heads * row.width) ** -0.5
        bounds = torch.tensor((0, *row.lengths), device=device).cumsum(0) if row.lengths else None
        self.problem = Selection(q_idx, k_idx, w, row.topk, 0, bounds, row.kpool)
        self.x = {"q_idx": q_idx, "k_idx": k_idx, "w": w}

    def contenders(self, row: SelectRow) -> dict[str, Contender]:
        first, last = self.problem.visible()
        flops = 2.0 * row.heads * row.width * int((last - first).sum())

        def judge(found: Tensors) -> Errors:
            return judge_selection(self.problem, found["indices"]) | judge_exactly(self.problem, select, self.seed)

        def judge_eager(found: Tensors) -> Errors:
            return judge_selection(self.problem, found["indices"], ordered=False)

        ours = Contender(lambda: lambda: {"indices": select(self.problem)}, judge, "ours", flops)
        eager = Contender(lambda: lambda: {"indices": eager_select(self.problem, first, last)}, judge_eager)
        return {OURS: ours, EAGER: eager}


def select(problem: Selection) -> Tensor:
    return lightning_topk(problem.q_idx, problem.k_idx, problem.w, problem.topk, **problem.options())


def eager_select(problem: Selection, first: Tensor, last: Tensor) -> Tensor:
    """Select as plain PyTorch does: bfloat16 products of 4096 queries, or of fewer where those pass 2^33."""
    q, k, w = problem.q_idx[0], problem.k_idx[0], problem.w[0]
    num_queries, num_keys = q.shape[0], k.shape[0]
    size = max(1, min(4096, 2**33 // (q.shape[1] * num_keys)))
    indices = torch.full((1, num_queries, problem.topk), -1, dtype=torch.int32, device=q.device)
    column = torch.arange(num_keys, device=q.device)
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        width = min(num_keys, (problem.query_start + stop) // problem.kpool)
        if width == 0:
            continue
        rows, keys = slice(start, stop), column[:width]
        products = torch.einsum("thd,sd->ths", q[rows], k[:width]).relu_()
        scores = torch.bmm(w[rows][:, None], products)[:, 0]  # leaves the products where they are
        del products
        low, high = first[rows, None], last[rows, None]
        scores.masked_fill_((keys < low) | (keys >= high), float("-inf"))
        chosen = scores.topk(min(problem.topk, width)).indices
        indices[0, rows, : chosen.shape[1]] = chosen.masked_fill((chosen < low) | (chosen >= high), -1).int()
    return indices


class AttendWork(Work):
    def __init__(self, row: AttendRow, device: torch.device, seed: int) -> None:
        super().__init__(device, seed)
        self.x = self.draw(row, row.T, row.S, row.topk)
        self.scale = row.scale

    def draw(self, row: AttendRow, num_queries: int, num_keys: int, topk: int) -> Tensors:
        q, k = self.normal(1, num_queries, row.H, row.D), self.normal(1, num_keys, row.kv_heads, row.D)
        v = k[..., : row.Dv] if row.latent else self.normal(1, num_keys, row.kv_heads, row.Dv)
        do = self.normal(1, num_queries, row.H, row.Dv)
        return {
            "q": q,
            "k": k,
            "v": v,
            "do": do,
            "indices": random_indices(num_queries, num_keys, topk, self.generator),
        }

    def inputs(self, row: AttendRow, x: Tensors) -> list[Tensor]:
        """Return the tensors that get gradients: latent values are part of the keys."""
        return [x[name] for name in (("q", "k") if row.latent else ("q", "k", "v"))]

    def attend(self, row: AttendRow, x: Tensors, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        v, value_dim = (None, row.Dv) if row.latent else (inputs[2], None)
        return sparse_attention(*inputs[:2], v, x["indices"], scale=self.scale, value_dim=value_dim)

    def contenders(self, row: AttendRow) -> dict[str, Contender]:
        x, pairs = self.x, 2.0 * row.T * row.topk * row.H
        if not row.backward:

            def forward() -> Tensors:
                with torch.no_grad():
                    o, lse = self.attend(row, x, self.inputs(row, x))
                return {"o": o, "lse": lse}

            def judge(found: Tensors) -> Errors:
                return judge_attention(x, found, used_keys(x["indices"]), self.scale)

            return {OURS: Contender(lambda: forward, judge, "ours", pairs * (row.D + row.Dv))}

        outputs: Tensors = {}

        def prepare() -> Call:
            inputs = leaves(*self.inputs(row, x))
            o, lse = self.attend(row, x, inputs)
            outputs.update(o=o.detach(), lse=lse.detach())
            return lambda: dict(
                zip(("dq", "dk", "dv"), torch.autograd.grad(o, inputs, x["do"], retain_graph=True), strict=False)
            )

        def judge_backward(found: Tensors) -> Errors:
            errors = judge_attention(x, found | outputs, used_keys(x["indices"]), self.scale)
            small = self.judge_small(row)
            return errors | small | {"dq": worst([errors["dq"], small["dq"]])}

        # Five products: logits and dp once more, dq, dk and dv.
        flops = pairs * (3 * row.D + 2 * row.Dv)
        return {OURS: Contender(prepare, judge_backward, "ours", flops)}

    def judge_small(self, row: AttendRow) -> Errors:
        """Compare all gradients of 512 queries on 2048 keys, of which each selects half."""
        num_keys = min(2048, row.S)
        x = self.draw(row, min(512, row.T), num_keys, min(row.topk, num_keys // 2))
        inputs = leaves(*self.inputs(row, x))
        found = torch.autograd.grad(self.attend(row, x, inputs)[0], inputs, x["do"])
        exact = list(exact_gradients(x["q"], x["k"], x["v"], x["indices"], x["do"], self.scale))
        if row.latent:
            exact[1][..., : row.Dv] += exact.pop()
        names = ("dq", "dk", "dv")
        return {name: relative_error(own, value) for name, own, value in zip(names, found, exact, strict=False)}


class LossWork(Work):
    def __init__(self, row: LossRow, device: torch.device, seed: int) -> None:
        super().__init__(device, seed)
        self.x = self.draw(row, row.T, row.topk)

    def draw(self, row: LossRow, T: int, topk: int) -> Tensors:
        x = {"q_idx": self.normal(1, T, row.heads, row.width), "k_idx": self.normal(1, T, row.width)}
        x["w"] = self.normal(1, T, row.heads) * (row.heads * row.width) ** -0.5
        x |= {"q": self.normal(1, T, row.H, row.D), "k": self.normal(1, T, 1, row.D)}
        if topk:
            x["indices"] = causal_indices(T, topk, self.generator)
        if row.given:
            value_dim = min(512, row.D)
            x["lse"] = sparse_attention(x["q"], x["k"], None, x["indices"], value_dim=value_dim)[1]
        return x

    def run(self, x: Tensors) -> Tensors:
        inputs = leaves(x["q_idx"], x["k_idx"], x["w"])
        loss = indexer_kl_loss(*inputs, x["q"], x["k"], indices=x.get("indices"), lse=x.get("lse"))
        grads = torch.autograd.grad(loss, inputs)
        return {"loss": loss.detach(), "dq_idx": grads[0], "dk_idx": grads[1], "dw": grads[2]}

    def contenders(self, row: LossRow) -> dict[str, Contender]:
        def judge(found: Tensors) -> Errors:
            # A token's gradient depends on that token alone, so a few of them are exact at full length.
            queries = sampled(row.T, 16)
            _, exact = self.exact(self.x, queries)
            errors = {name: relative_error(found[name][0, queries], exact[name] / row.T) for name in ("dq_idx", "dw")}
            T = min(row.T, 384)
            x = self.draw(row, T, min(row.topk, T // 2))
            total, exact = self.exact(x, list(range(T)))
            small = self.run(x)
            errors |= {"loss": relative_error(small["loss"], total / T)}
            errors |= {"dk_idx": relative_error(small["dk_idx"][0], exact["dk_idx"] / T)}
            for name in ("dq_idx", "dw"):
                errors[name] = worst([errors[name], relative_error(small[name][0], exact[name] / T)])
            return errors

        return {OURS: Contender(lambda: lambda: self.run(self.x), judge, "ours")}

    def exact(self, x: Tensors, queries: list[int]) -> tuple[Tensor, Tensors]:
        keys_of = used_keys(x["indices"]) if "indices" in x else lambda t: torch.arange(t + 1, device=self.device)
        rows = [x[name][0, queries] for name in ("q_idx", "w", "q")]
        scale = x["q"].shape[-1] ** -0.5
        seen = [keys_of(t) for t in queries]
        return exact_loss(rows[0], x["k_idx"][0], rows[1], rows[2], x["k"][0], seen, scale)


class DecodeWork(Work):
    def __init__(self, row: DecodeRow, device: torch.device, seed: int) -> None:
        super().__init__(device, seed)
        shape = self.shape = shape_of(row)
        self.scale = (shape.head_dim or shape.D) ** -0.5
        q_idx, w = self.normal(1, 1, shape.index_heads, shape.index_width), self.normal(1, 1, shape.index_heads)
        k_idx = self.normal(1, row.S // shape.kpool, shape.index_width)
        # Keys and values as the layers cache them: the latent is both, ordinary ones lie side by side.
        cache = self.normal(1, row.S, shape.kv_heads, shape.D * (1 if shape.q_rank else 2))
        k, v = (cache, cache) if shape.q_rank else cache.split(shape.D, dim=-1)
        self.x = {"q": self.normal(1, 1, shape.H, shape.D), "k": k, "v": v, "q_idx": q_idx, "k_idx": k_idx, "w": w}
        self.problem = Selection(q_idx, k_idx, w, shape.topk // shape.kpool, row.S - 1, None, shape.kpool)

    def sparse(self) -> Tensors:
        x = self.x
        selection = indices = select(self.problem)
        if self.shape.kpool > 1:
            indices = expand_pools(selection, self.shape.kpool, query_start=self.problem.query_start)
        v, value_dim = (None, self.shape.D) if self.shape.q_rank else (x["v"], None)
        o, lse = sparse_attention(x["q"], x["k"], v, indices, scale=self.scale, value_dim=value_dim)
        return {"selection": selection, "indices": indices, "o": o, "lse": lse}

    def dense(self) -> Tensors:
        """Attend to the whole cache; the heads of a group are the query rows of one key head."""
        k, v = (self.x[name].transpose(1, 2) for name in ("k", "v"))
        q = self.x["q"].transpose(1, 2).unflatten(1, (self.shape.kv_heads, -1)).squeeze(3)
        if self.shape.q_rank:  # no fused kernel takes a head of 512
            p = torch.matmul(q * self.scale, k.transpose(2, 3)).softmax(-1)
            o = torch.matmul(p, v)
        else:
            o = scaled_dot_product_attention(q, k, v, scale=self.scale)
        return {"o": o.flatten(1, 2)[:, None]}

    def contenders(self, row: DecodeRow) -> dict[str, Contender]:
        def judge(found: Tensors) -> Errors:
            outputs = {name: found[name] for name in ("o", "lse")}
            chosen = used_keys(found["indices"])
            tail = torch.arange(row.S // self.shape.kpool * self.shape.kpool, row.S, device=self.device)
            pools = used_keys(found["selection"])(0)
            slots = torch.arange(self.shape.kpool, device=self.device)
            tokens = torch.cat(((pools[:, None] * self.shape.kpool + slots).flatten(), tail))
            form = float(not torch.equal(chosen(0), tokens))
            errors = judge_selection(self.problem, found["selection"])
            return errors | {"form": max(errors["form"], form)} | judge_attention(self.x, outputs, chosen, self.scale)

        def judge_dense(found: Tensors) -> Errors:
            return judge_attention(self.x, found, lambda t: torch.arange(row.S, device=self.device), self.scale)

        ours = Contender(lambda: no_grad(self.sparse), judge, "ours", graph=row.graph)
        return {OURS: ours, DENSE_DECODE: Contender(lambda: no_grad(self.dense), judge_dense, graph=row.graph)}


def no_grad(call: Call) -> Call:
    def run() -> Tensors:
        with torch.no_grad():
            return call()

    return run


WORKS: dict[type[Row], type[Work]] = {
    SelectRow: SelectWork,
    AttendRow: AttendWork,
    LossRow: LossWork,
    DecodeRow: DecodeWork,
}
