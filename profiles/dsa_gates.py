"""Whether what dsa.py is about to time is right: selections, attention, gradients and losses against float64.

Nothing here calls the operators that are judged; the functions hold what a few queries, or a small problem, need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import relative_error
from torch import Tensor

# NOTE [Bounds]: "order" is by how much a key that was left out beats one that was selected, in units of the row's
# largest sum of the absolute values of everything its scores are sums of.  Float32 sums of 64 heads times 128 products
# stay below 2^-22; a score rounded to bfloat16 shows 5e-5.  "order_bf16" is the same for a peer whose products are
# bfloat16.  "form" and "exact" are shares of rows: none may be wrong.  The rest are relative errors
# ||x - ref|| / ||ref||, of the worst sampled query where a query has its own; lse is the largest difference.  Outputs
# in bfloat16 alone cost 0.0017, and a layer is a chain of five such roundings.
BOUNDS = {"order": 1e-6, "order_bf16": 1e-3, "form": 0.0, "exact": 0.0, "lse": 1e-3, "loss": 1e-3}
BOUNDS |= dict.fromkeys(("o", "dq", "dk", "dv", "dq_idx", "dk_idx", "dw"), 1e-2)
BOUNDS |= {"y": 2e-2, "dx": 3e-2, "d_weights": 3e-2}
Errors = dict[str, float]
NUM_SAMPLES = 64


def sampled(num_queries: int, num_samples: int = NUM_SAMPLES) -> list[int]:
    """Spread queries over a sequence; the last one is always among them, the first one rarely matters."""
    num_samples = min(num_samples, num_queries)
    return sorted({(i + 1) * num_queries // num_samples - 1 for i in range(num_samples)})


def worst(values: list[float]) -> float:
    """Return the largest value, or NaN if one is NaN, which `max` may hide."""
    return float(torch.tensor(values, dtype=torch.float64).max())


@dataclass
class Selection:
    """A problem that `lightning_topk` answers, batch 1."""

    q_idx: Tensor
    k_idx: Tensor
    w: Tensor
    topk: int
    query_start: int = 0
    cu_seqlens: Tensor | None = None
    kpool: int = 1

    def options(self) -> dict[str, Any]:
        return {"query_start": self.query_start, "cu_seqlens": self.cu_seqlens, "kpool": self.kpool}

    def visible(self) -> tuple[Tensor, Tensor]:
        """Give each query its visible keys ``first <= s < last``."""
        t = torch.arange(self.q_idx.shape[1], device=self.q_idx.device)
        first, last = torch.zeros_like(t), (t + self.query_start + 1) // self.kpool
        if self.cu_seqlens is not None:
            for begin, end in zip(self.cu_seqlens.tolist(), self.cu_seqlens.tolist()[1:], strict=False):
                first[begin:end] = begin
        return first, last.clamp_max(self.k_idx.shape[1])

    def scores(self, t: int, first: int, last: int) -> tuple[Tensor, float]:
        """Score one query in float64, and sum the absolute values of the key for which that is largest."""
        q, w, k = self.q_idx[0, t].double(), self.w[0, t].double(), self.k_idx[0, first:last].double()
        return w @ (q @ k.T).relu(), float((w.abs() @ (q.abs() @ k.abs().T)).max())


def whole_numbers(like: Selection, seed: int) -> Selection:
    """Draw a smaller problem of the same widths whose sums are exact in float32, with many equal scores."""
    device, heads, width = like.q_idx.device, like.q_idx.shape[2], like.q_idx.shape[3]
    generator = torch.Generator(device).manual_seed(seed + 1)
    num_keys = 2 * like.topk + 397
    bounds = None
    if like.cu_seqlens is not None:
        edges = [0, 3, like.topk // 2, like.topk // 2, num_keys]
        bounds = torch.tensor(edges, device=device, dtype=like.cu_seqlens.dtype)
    num_queries = num_keys if bounds is not None else min(like.q_idx.shape[1], 200)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator, device=device).to(dtype)

    return Selection(
        draw(1, num_queries, heads, width, dtype=like.q_idx.dtype),
        draw(1, num_keys, width, dtype=like.k_idx.dtype),
        draw(1, num_queries, heads, dtype=like.w.dtype),
        like.topk,
        # The last query sees everything, and none but it an incomplete pool.
        0 if bounds is not None else num_keys * like.kpool - num_queries,
        bounds,
        like.kpool,
    )


def exact_selection(problem: Selection) -> Tensor:
    """Select by a stable sort of float64 scores: int32 ``[T, topk]``, ascending, -1 at the end."""
    first, last = problem.visible()
    num_keys = problem.k_idx.shape[1]
    column = torch.arange(num_keys, device=first.device)
    keys, parts = problem.k_idx[0].double(), []
    for start in range(0, problem.q_idx.shape[1], 64):
        rows = slice(start, start + 64)
        products = torch.einsum("thd,sd->ths", problem.q_idx[0, rows].double(), keys)
        scores = (problem.w[0, rows].double()[..., None] * products.relu_()).sum(1)
        hidden = (column < first[rows, None]) | (column >= last[rows, None])
        order = scores.masked_fill_(hidden, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
        chosen = order[:, : problem.topk]
        unseen = (chosen < first[rows, None]) | (chosen >= last[rows, None])
        chosen = chosen.masked_fill(unseen, num_keys).sort(dim=-1).values
        parts.append(chosen.masked_fill_(chosen == num_keys, -1).int())
    return torch.cat(parts)


def wrong_rows(indices: Tensor, first: Tensor, last: Tensor, count: Tensor, *, ordered: bool = True) -> float:
    """Return the share of rows that are not ``count`` ascending keys in ``first <= s < last`` with -1 after them."""
    wrong = 0
    for start in range(0, indices.shape[1], 8192):
        rows = slice(start, start + 8192)
        chosen = indices[0, rows].long()
        if not ordered:
            chosen = chosen.masked_fill(chosen < 0, 2**40).sort(dim=-1).values
            chosen = chosen.masked_fill_(chosen == 2**40, -1)
        used = chosen >= 0
        good = used.sum(-1) == count[rows]
        good &= (~used | ((chosen >= first[rows, None]) & (chosen < last[rows, None]))).all(-1)
        good &= (~used[:, 1:] | (used[:, :-1] & (chosen[:, 1:] > chosen[:, :-1]))).all(-1)
        wrong += int((~good).sum())
    return wrong / indices.shape[1]


def judge_selection(problem: Selection, indices: Tensor, *, ordered: bool = True) -> Errors:
    """Compare a selection ``[1, T, topk]`` by score, and its form; a peer's order inside a row is its own business."""
    first, last = problem.visible()
    form = wrong_rows(indices, first, last, (last - first).clamp(0, problem.topk), ordered=ordered)
    excess = [0.0]
    for t in sampled(indices.shape[1]):
        low, high = int(first[t]), int(last[t])
        chosen = indices[0, t][(indices[0, t] >= low) & (indices[0, t] < high)].long() - low
        if chosen.numel() in (0, high - low):
            continue
        scores, largest = problem.scores(t, low, high)
        taken = torch.zeros(high - low, dtype=torch.bool, device=scores.device)
        taken[chosen] = True
        if not bool(taken.all()):
            excess.append(max(float(scores[~taken].max() - scores[taken].min()) / largest, 0.0))
    return {"order" if ordered else "order_bf16": worst(excess), "form": form}


def judge_exactly(problem: Selection, select: Callable[[Selection], Tensor], seed: int) -> Errors:
    """Compare the selection of whole numbers with the exact one, equal scores included: share of rows that differ."""
    small = whole_numbers(problem, seed)
    differs = select(small)[0] != exact_selection(small)
    return {"exact": float(differs.any(-1).double().mean())}


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, keys_of: list[Tensor], scale: float, do: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attend from a few queries in float64, each to the keys it is given.

    Args:
        q: ``[n, H, D]``.
        k: ``[S, Hkv, D]``.
        v: ``[S, Hkv, Dv]``.
        keys_of: positions of each query's keys.
        scale: factor of the logits.
        do: gradient of o, ``[n, H, Dv]``.

    Returns:
        ``o [n, H, Dv]``, ``lse [n, H]`` and, given ``do``, ``dq [n, H, D]``.
    """
    group = q.shape[1] // k.shape[1]
    o = q.new_zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    lse, dq = o.new_full(q.shape[:2], float("-inf")), o.new_zeros(q.shape)
    for h in range(k.shape[1]):
        heads = slice(h * group, (h + 1) * group)
        for i, chosen in enumerate(keys_of):
            if chosen.numel() == 0:
                continue
            keys, values = k[chosen, h].double(), v[chosen, h].double()
            logits = q[i, heads].double() @ keys.T * scale
            p = logits.softmax(-1)
            o[i, heads], lse[i, heads] = p @ values, logits.logsumexp(-1)
            if do is not None:
                d_o = do[i, heads].double()
                delta = (d_o * o[i, heads]).sum(-1, keepdim=True)
                dq[i, heads] = scale * (p * (d_o @ values.T - delta)) @ keys
    return o, lse, None if do is None else dq


def judge_attention(
    x: dict[str, Tensor],
    found: dict[str, Tensor],
    keys_of: Callable[[int], Tensor],
    scale: float,
    num_samples: int = NUM_SAMPLES,
) -> Errors:
    """Compare o, lse and dq, as far as ``found`` has them, at sampled queries; all token-major with batch 1."""
    queries = sampled(x["q"].shape[1], num_samples)
    do = x["do"][0, queries] if "dq" in found else None
    chosen = [keys_of(t) for t in queries]
    exact = exact_attention(*(x["q"].detach()[0, queries], x["k"].detach()[0], x["v"].detach()[0]), chosen, scale, do)
    errors: Errors = {}
    for name, value in zip(("o", "lse", "dq"), exact, strict=True):
        if name in found and value is not None:
            own = found[name][0, queries].double()
            if name == "lse":
                errors[name] = worst([float((own - value).abs().max())])
            else:
                errors[name] = worst([relative_error(own[i], value[i]) for i in range(len(queries))])
    return errors


def exact_gradients(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, do: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Work out dq, dk and dv of a small problem in float64, head by head over a dense mask; batch 1."""
    num_keys, group = k.shape[1], q.shape[2] // k.shape[2]
    slots = indices[0].long().masked_fill(indices[0] < 0, num_keys)
    member = torch.zeros(q.shape[1], num_keys + 1, dtype=torch.bool, device=q.device).scatter_(1, slots, True)
    hidden = ~member[:, :num_keys]
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v))
    for head in range(q.shape[2]):
        h = head // group
        q_h, k_h, v_h, do_h = q[0, :, head].double(), k[0, :, h].double(), v[0, :, h].double(), do[0, :, head].double()
        p = (q_h @ k_h.T * scale).masked_fill_(hidden, float("-inf")).softmax(-1)
        d_p = do_h @ v_h.T
        ds = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
        dq[0, :, head] = ds @ k_h
        dk[0, :, h] += ds.T @ q_h
        dv[0, :, h] += p.T @ do_h
    return dq, dk, dv


def exact_loss(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, q: Tensor, k: Tensor, seen: list[Tensor], scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum ``KL(p_t || softmax(I_t))`` over a few queries in float64, with its gradients.

    ``q_idx [n, HI, DI]``, ``k_idx [S, DI]``, ``w [n, HI]``, ``q [n, H, D]``, ``k [S, Hkv, D]``; ``seen`` are the keys
    each query compares.
    """
    # The gradients come from autograd, which is another way than the operator's own backward.
    leaves = [x.detach().double().requires_grad_() for x in (q_idx, k_idx, w)]
    total = torch.zeros((), dtype=torch.float64, device=q.device)
    grads = [torch.zeros_like(x) for x in leaves]
    group = q.shape[1] // k.shape[1]
    for i, chosen in enumerate(seen):
        grouped = q[i].detach().double().unflatten(0, (-1, group))
        p = (torch.einsum("hgd,shd->hgs", grouped, k[chosen].detach().double()) * scale).softmax(-1).sum((0, 1))
        p = p / p.sum()
        scores = leaves[2][i] @ (leaves[0][i] @ leaves[1][chosen].T).relu()
        loss = (torch.special.xlogy(p, p) - p * scores.log_softmax(-1)).sum()
        total += loss.detach()
        for grad, own in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
            grad += own
    return total, dict(zip(("dq_idx", "dk_idx", "dw"), grads, strict=True))
