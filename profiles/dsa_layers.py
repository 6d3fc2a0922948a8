"""What the layer rows of dsa.py do: a sparse attention layer against the same weights with dense attention."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from dsa_gates import Errors, exact_attention, sampled, worst, wrong_rows
from dsa_rows import DENSE_LAYER, OURS, LayerRow, shape_of
from dsa_work import Call, Contender, Tensors, Work, causal_indices
from harness import relative_error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hybrid_flex.layers.dsa import DeepSeekSparseAttention
from hybrid_flex.layers.mla import DeepSeekSparseMLA

Layer = DeepSeekSparseMLA | DeepSeekSparseAttention
NUM_QUERIES = 8
SMALL_TOKENS = 512
"""Tokens of the problem whose gradients are compared; no more than topk, so that sparse and dense are the same."""


def projections(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make q, k and v of every head, token-major; under MLA the expanded form."""
    if isinstance(layer, DeepSeekSparseMLA):
        q = layer.q_b_proj(layer.q_a_norm(layer.q_a_proj(x))).unflatten(-1, (layer.num_heads, -1))
        expanded = layer.kv_b_proj(layer.kv_a_norm(layer.kv_a_proj(x))).unflatten(-1, (layer.num_heads, -1))
        return q, *expanded.split((layer.qk_nope_head_dim, layer.v_head_dim), dim=-1)
    linears = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (linear(x).unflatten(-1, (-1, layer.head_dim)) for linear in linears)
    return q, k, v


def dense_layer(layer: Layer, x: Tensor) -> Tensor:
    """Do what the layer does, with causal attention to every token."""
    q, k, v = (tensor.transpose(1, 2) for tensor in projections(layer, x))
    o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale, enable_gqa=q.shape[1] != k.shape[1])
    return layer.o_proj(o.transpose(1, 2).flatten(-2))


class LayerWork(Work):
    def __init__(self, row: LayerRow, device: torch.device, seed: int) -> None:
        super().__init__(device, seed)
        shape = shape_of(row)
        torch.manual_seed(seed)
        with torch.device(device):
            indexer = {
                "topk": shape.topk,
                "index_heads": shape.index_heads,
                "index_head_dim": shape.index_width,
                "index_kpool": shape.kpool,
            }
            if shape.q_rank:
                layer: Layer = DeepSeekSparseMLA(
                    shape.hidden,
                    shape.H,
                    kv_lora_rank=shape.D,
                    qk_nope_head_dim=shape.head_dim,
                    v_head_dim=shape.head_dim,
                    q_lora_rank=shape.q_rank,
                    **indexer,
                )
            else:
                layer = DeepSeekSparseAttention(
                    shape.hidden, shape.H, num_kv_heads=shape.kv_heads, head_dim=shape.D, **indexer
                )
        self.layer, self.shape = layer.to(torch.bfloat16), shape
        if row.agreement is not None:
            self.replace_selection(causal_indices(row.T, shape.topk, self.generator, row.agreement))
        self.x = {"x": self.normal(1, row.T, shape.hidden), "dy": self.normal(1, row.T, shape.hidden)}
        self.x |= dict(self.layer.named_parameters())

    def replace_selection(self, indices: Tensor) -> None:
        """Let the layer attend to ``indices`` instead of what it has selected, which it still does."""
        indexer = self.layer.indexer
        assert indexer is not None
        select: Callable[..., Tensor] = indexer.select

        def selected(*args: Any, **kwargs: Any) -> Tensor:
            own = select(*args, **kwargs)
            assert own.shape == indices.shape
            return indices

        indexer.select = selected  # type: ignore[method-assign]

    def run(self, forward: Callable[[Tensor], Tensor], backward: bool, num_tokens: int | None = None) -> Tensors:
        x, dy = (self.x[name][:, :num_tokens] for name in ("x", "dy"))
        if not backward:
            with torch.no_grad():
                return {"y": forward(x)}
        x = x.detach().requires_grad_()
        y = forward(x)
        return {"y": y.detach()} | gradients(self.layer, y, x, dy)

    def contenders(self, row: LayerRow) -> dict[str, Contender]:
        def sparse(x: Tensor) -> Tensor:
            return self.layer(x)[0]

        def judge(found: Tensors) -> Errors:
            with torch.no_grad():
                indices = self.layer.attend(self.x["x"])[2]
            errors = {"form": self.judge_form(indices)}
            errors["y"] = self.judge_output(found["y"], lambda t: indices[0, t][indices[0, t] >= 0].long())
            return errors | (self.judge_gradients() if row.backward else {})

        def judge_dense(found: Tensors) -> Errors:
            return {"y": self.judge_output(found["y"], lambda t: torch.arange(t + 1, device=self.device))}

        dense = Contender(lambda: self.prepare_dense(row, dense), judge_dense)
        ours = Contender(lambda: lambda: self.run(sparse, row.backward), judge, "ours")
        return {OURS: ours, DENSE_LAYER: dense}

    def prepare_dense(self, row: LayerRow, contender: Contender) -> Call:
        """Take the first of torch's fused kernels that works for these widths, and write down which."""

        def run(num_tokens: int | None = None) -> Tensors:
            return self.run(lambda x: dense_layer(self.layer, x), row.backward, num_tokens)

        def run_with(backend: SDPBackend, num_tokens: int | None = None) -> Tensors:
            with sdpa_kernel(backend):
                return run(num_tokens)

        if self.device.type != "cuda":
            return run
        kernels = {
            "cuDNN": SDPBackend.CUDNN_ATTENTION,
            "flash": SDPBackend.FLASH_ATTENTION,
            "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
        for name, backend in kernels.items():
            try:
                run_with(backend, 256)
                torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                continue
            contender.remark = f"dense by {name}"
            return functools.partial(run_with, backend)
        raise RuntimeError("no fused attention takes these widths")

    def judge_form(self, indices: Tensor) -> float:
        """Check that every token attends to past tokens, as many as its complete pools and the tail make."""
        T, kpool = indices.shape[1], self.shape.kpool
        length = torch.arange(1, T + 1, device=self.device)
        pools = (length // kpool).clamp_max(self.shape.topk // kpool)
        return wrong_rows(indices, torch.zeros_like(length), length, pools * kpool + length % kpool)

    def judge_output(self, y: Tensor, keys_of: Callable[[int], Tensor]) -> float:
        """Compare y at a few tokens with the layer in float64 on the same selection; the largest relative error."""
        layer, x = self.layer, self.x["x"][0]
        queries = sampled(x.shape[0], NUM_QUERIES)
        scale, chosen = layer.scale, [keys_of(t) for t in queries]
        with torch.no_grad():
            if isinstance(layer, DeepSeekSparseMLA):
                q_norm, kv_norm = (norm.weight.double() for norm in (layer.q_a_norm, layer.kv_a_norm))
                q_rank = rms_norm(linear(x[queries], layer.q_a_proj.weight), q_norm, layer.q_a_norm.eps)
                latent = rms_norm(linear(x, layer.kv_a_proj.weight), kv_norm, layer.kv_a_norm.eps)
                q = linear(q_rank, layer.q_b_proj.weight).unflatten(-1, (layer.num_heads, -1))
                weights = layer.kv_b_proj.weight.unflatten(0, (layer.num_heads, -1))
                parts = []
                for head in range(layer.num_heads):  # one head at a time: expanded keys are large in float64
                    expanded = linear(latent, weights[head])[:, None]
                    k, v = expanded.split((layer.qk_nope_head_dim, layer.v_head_dim), dim=-1)
                    parts.append(exact_attention(q[:, head : head + 1], k, v, chosen, scale)[0])
                o = torch.cat(parts, dim=1)
            else:
                q = linear(x[queries], layer.q_proj.weight).unflatten(-1, (-1, layer.head_dim))
                keys, values = (linear(x, w.weight) for w in (layer.k_proj, layer.v_proj))
                k, v = (tensor.unflatten(-1, (-1, layer.head_dim)) for tensor in (keys, values))
                o = exact_attention(q, k, v, chosen, scale)[0]
            exact = linear(o.flatten(1), layer.o_proj.weight)
            return worst([relative_error(y[0, t], exact[i]) for i, t in enumerate(queries)])

    def judge_gradients(self) -> Errors:
        """Compare the gradients of a sequence so short that everything is selected with the dense layer in float64."""
        T = min(SMALL_TOKENS, self.shape.topk, self.x["x"].shape[1])
        x, dy = (self.x[name][:, :T].detach() for name in ("x", "dy"))
        own_x, exact_x = x.clone().requires_grad_(), x.double().requires_grad_()
        found = gradients(self.layer, self.layer(own_x)[0], own_x, dy)
        layer = copy.deepcopy(self.layer).double()
        exact = gradients(layer, dense_layer(layer, exact_x), exact_x, dy.double())
        errors = {name: relative_error(found[name], exact[name]) for name in exact}
        return {"dx": errors.pop("dx"), "d_weights": worst(list(errors.values()))}


def gradients(layer: Layer, y: Tensor, x: Tensor, dy: Tensor) -> Tensors:
    """Work out the gradients of x and of every weight that ``y`` trains; the indexer has its own loss."""
    trained = {name: weight for name, weight in layer.named_parameters() if not name.startswith("indexer.")}
    grads = torch.autograd.grad(y, [x, *trained.values()], dy)
    return dict(zip(("dx", *(f"d {name}" for name in trained)), grads, strict=True))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply in float64, a stretch of tokens at a time: a whole sequence of inputs is large in float64."""
    return torch.cat([part.double() @ weight.double().T for part in x.split(16384)])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
