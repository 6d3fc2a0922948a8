"""Our layers and transformers' modules with the same weights, and the proof that they compute the same.

A `Contest` holds both; `gate` raises where they differ.  Used by cpu_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import relative_error
from torch import Tensor, nn

import hybrid_flex
from hybrid_flex.ops import lightning_scores

HIDDEN = 512
KDA_WIDTHS = {"num_heads": 4, "head_dim": 128}
DSA_WIDTHS = {
    "num_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "rope_dim": 32,
    "v_head_dim": 64,
    "index_heads": 8,
    "index_head_dim": 64,
    "topk": 256,
}
DSA_FULL_WIDTHS = DSA_WIDTHS | {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "rope_dim": 64, "v_head_dim": 128}

# NOTE [Tolerance]: relative L2 error of each tensor against the peer's.  Both sides sum in float32 in different orders;
# the KDA gradients of A_log and dt_bias are sums over all tokens of terms that cancel, and lose the most.
TOLERANCE = 1e-4
# NOTE [Score tolerance]: two keys may swap places in a selection when their scores, relative to the row's largest,
# differ by rounding only.  The largest part comes from the rotation: a frequency that is off by half a unit in the
# last place (6e-8) turns position 8192 by 5e-4 too much.  A wrong indexer changes about a quarter of all keys.
SCORE_TOLERANCE = 3e-4
MAX_SWAPPED_ROWS = 0.02

PEER, EAGER, COMPILED = "transformers", "eager", "compiled"
CONTENDERS = (PEER, EAGER, COMPILED)


@dataclass
class Inputs:
    """What one call reads: hidden states, the gradient of the output, and what the DSA peer wants from its model."""

    x: Tensor
    dy: Tensor
    peer_extras: tuple[Any, ...] = ()


@dataclass
class Contest:
    """Our layer and the peer with the same weights, and how to call and compare them."""

    name: str
    title: str
    backward: bool
    target_length: int
    widths: dict[str, int]
    build: Callable[[dict[str, int]], tuple[nn.Module, nn.Module, list[tuple[str, Tensor, Tensor]], Any]]
    lengths: tuple[int, ...] | None = None
    compiled_memory_lengths: tuple[int, ...] | None = None
    """Where the compiled layer's memory is measured, if not everywhere: each graph takes a minute to compile again."""
    ours: nn.Module = field(init=False)
    peer: nn.Module = field(init=False)

    def start(self) -> None:
        """Make the modules; the weights are drawn from a fixed seed and copied into the peer."""
        torch.manual_seed(0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.ours, self.peer, self.pairs, self.rope = self.build(self.widths)
        # `attend` is the sparse layer's forward with the selection among its results, which the gate compares.
        forward = self.ours if self.backward else self.ours.attend
        self.forward = {EAGER: forward, COMPILED: torch.compile(forward, fullgraph=True)}

    def inputs(self, num_tokens: int, for_peer: bool = True) -> Inputs:
        generator = torch.Generator().manual_seed(num_tokens)
        x, dy = (torch.randn(1, num_tokens, HIDDEN, generator=generator) for _ in range(2))
        extras: tuple[Any, ...] = ()
        if self.rope is not None and for_peer:
            # A model makes both once for all its layers, so neither is counted against the peer.
            mask = torch.full((num_tokens, num_tokens), torch.finfo(torch.float32).min).triu(1)
            extras = (self.rope(x, torch.arange(num_tokens)[None]), mask[None, None])
        torch._dynamo.mark_dynamic(x, 1)
        return Inputs(x.requires_grad_(self.backward), dy, extras)

    def call(self, contender: str, inputs: Inputs) -> tuple[Any, ...]:
        """Run one forward (and backward); the result begins with y, gradients lie on ``inputs.x`` and the weights."""
        with torch.set_grad_enabled(self.backward):
            if contender == PEER:
                result = self.peer(inputs.x, *inputs.peer_extras)
                result = (result,) if isinstance(result, Tensor) else result
            else:
                result = self.forward[contender](inputs.x)
        if self.backward:
            result[0].backward(inputs.dy)
        return result

    def clear(self, inputs: Inputs) -> None:
        inputs.x.grad = None
        for module in (self.ours, self.peer):
            module.zero_grad(set_to_none=True)


def copy_to_peer(pairs: list[tuple[str, Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for _, ours, peer in pairs:
            peer.copy_(ours.reshape(peer.shape))


def randomise_norms(module: nn.Module, *names: str) -> None:
    """Move norm weights and biases off 1 and 0, where a missing one would not show."""
    with torch.no_grad():
        for name in names:
            parameter = module.get_parameter(name)
            parameter.add_(0.2 * torch.randn_like(parameter))


def build_kda(widths: dict[str, int]) -> tuple[nn.Module, nn.Module, list[tuple[str, Tensor, Tensor]], Any]:
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    ours = hybrid_flex.KimiDeltaAttention(HIDDEN, **widths)
    randomise_norms(ours, "o_norm")
    config = KimiLinearConfig(
        hidden_size=HIDDEN,
        linear_num_heads=widths["num_heads"],
        linear_head_dim=widths["head_dim"],
        num_hidden_layers=1,
        rms_norm_eps=ours.norm_eps,
    )
    peer = KimiLinearDeltaAttention(config, 0)
    pairs = [
        (name, ours.get_parameter(name), peer.get_parameter(peer_name))
        for name, peer_name in {
            **{f"{x}_proj.weight": f"{x}_proj.weight" for x in ("q", "k", "v", "b", "g_a", "g_b", "o")},
            **{f"{x}_proj.weight": f"forget_gate.{x}_proj.weight" for x in ("f_a", "f_b")},
            "A_log": "forget_gate.A_log",
            "dt_bias": "forget_gate.dt_bias",
            "o_norm": "o_norm.weight",
        }.items()
    ]
    # The peer runs the three convolutions as one over the concatenated channels.
    taps = torch.cat((ours.q_conv, ours.k_conv, ours.v_conv)).detach()
    with torch.no_grad():
        peer.conv1d.weight.copy_(taps[:, None])
    copy_to_peer(pairs)
    return ours, peer, pairs, None


def build_dsa(widths: dict[str, int]) -> tuple[nn.Module, nn.Module, list[tuple[str, Tensor, Tensor]], Any]:
    from transformers import DeepseekV32Config
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
        DeepseekV32Attention,
        DeepseekV32RotaryEmbedding,
    )

    ours = hybrid_flex.DeepSeekSparseMLA(HIDDEN, **widths)
    randomise_norms(ours, "q_a_norm.weight", "kv_a_norm.weight", "indexer.k_norm.weight", "indexer.k_norm.bias")
    config = DeepseekV32Config(
        hidden_size=HIDDEN,
        num_attention_heads=widths["num_heads"],
        num_key_value_heads=widths["num_heads"],
        q_lora_rank=widths["q_lora_rank"],
        kv_lora_rank=widths["kv_lora_rank"],
        qk_nope_head_dim=widths["qk_nope_head_dim"],
        qk_rope_head_dim=widths["rope_dim"],
        v_head_dim=widths["v_head_dim"],
        index_n_heads=widths["index_heads"],
        index_head_dim=widths["index_head_dim"],
        index_topk=widths["topk"],
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    peer = DeepseekV32Attention(config, 0).eval()
    renamed = {
        "q_a_norm": "q_a_layernorm",
        "kv_a_norm": "kv_a_layernorm",
        "kv_a_proj": "kv_a_proj_with_mqa",
        "indexer.wq": "indexer.wq_b",
    }
    pairs = []
    for name, parameter in ours.named_parameters():
        stem, leaf = name.rsplit(".", 1)
        pairs.append((name, parameter, peer.get_parameter(f"{renamed.get(stem, stem)}.{leaf}")))
    copy_to_peer(pairs)
    assert len(pairs) == len(list(peer.parameters()))
    return ours, peer, pairs, DeepseekV32RotaryEmbedding(config)


CONTESTS = {
    "kda": Contest("kda", "KDA layer, forward + backward", True, 2048, KDA_WIDTHS, build_kda, None, (2048, 4096)),
    "dsa": Contest("dsa", "DSA (MLA) layer, forward", False, 4096, DSA_WIDTHS, build_dsa),
    "dsa_full": Contest(
        "dsa_full", "DSA (MLA) layer, DeepSeek-V3.2's widths", False, 4096, DSA_FULL_WIDTHS, build_dsa, (4096,)
    ),
}


class WrongResultError(RuntimeError):
    """A contender does not compute what the peer computes."""


def gradients(contest: Contest, contender: str, inputs: Inputs) -> dict[str, Tensor]:
    """Collect the gradients of the last call under our names."""
    found = {"x": inputs.x.grad}
    for name, ours, peer in contest.pairs:
        grad = peer.grad if contender == PEER else ours.grad
        found[name] = None if grad is None else grad.reshape(ours.shape)
    if contest.name == "kda":
        taps = ("q_conv", "k_conv", "v_conv")
        if contender == PEER:
            parts = contest.peer.conv1d.weight.grad[:, 0].chunk(3)  # type: ignore[union-attr,index]
        else:
            parts = [contest.ours.get_parameter(name).grad for name in taps]
        found.update(zip(taps, parts, strict=True))
    return found


def gate(contest: Contest, num_tokens: int, against_peer: bool) -> dict[str, dict[str, Any]]:
    """Hold eager and compiled against the peer (against each other without it) and raise where they differ."""
    inputs = contest.inputs(num_tokens, for_peer=against_peer)
    if not contest.backward:
        return gate_sparse(contest, inputs, against_peer)
    results = {}
    for contender in CONTENDERS if against_peer else (EAGER, COMPILED):
        contest.clear(inputs)
        y = contest.call(contender, inputs)[0].detach()
        results[contender] = {"y": y} | {f"d{k}": g.clone() for k, g in gradients(contest, contender, inputs).items()}
    contest.clear(inputs)
    want = results[PEER if against_peer else EAGER]
    report = {}
    for contender in (EAGER, COMPILED):
        errors = {name: relative_error(results[contender][name], want[name]) for name in want}
        worst = max(errors, key=errors.__getitem__)
        report[contender] = {"output_error": errors["y"], "worst_error": errors[worst], "worst": worst}
        if not errors[worst] <= TOLERANCE:
            raise WrongResultError(
                f"{contest.name}, T {num_tokens}, {contender}: {worst} is off by {errors[worst]:.1e}"
            )
    return report


@torch.no_grad()
def gate_sparse(contest: Contest, inputs: Inputs, against_peer: bool) -> dict[str, dict[str, Any]]:
    """Compare selections first; then outputs, where the selections are the same set.

    A swap of two keys whose scores differ by rounding is no error, but changes that row's output by a visible amount.
    """
    num_tokens = inputs.x.shape[1]
    if against_peer:
        chosen: list[Tensor] = []
        indexer: Any = contest.peer.indexer
        hook = indexer.register_forward_hook(lambda module, args, out: chosen.append(out))
        want = contest.call(PEER, inputs)[0]
        hook.remove()
    else:
        want, _, *chosen = contest.call(EAGER, inputs)
    theirs = membership(chosen[0][0], num_tokens)
    report = {}
    for contender in (EAGER, COMPILED):
        y, _, indices, _ = contest.call(contender, inputs)
        mine = membership(indices[0], num_tokens)
        same = (theirs == mine).all(-1)
        gap = score_gap(contest, inputs.x, theirs, mine, (~same).nonzero()[:, 0])
        error = relative_error(y[0, same], want[0, same])
        report[contender] = {
            "output_error": error,
            "worst_error": error,
            "worst": "y",
            "rows_with_swapped_ties": int((~same).sum()),
            "largest_score_gap": gap,
        }
        few = int((~same).sum()) <= MAX_SWAPPED_ROWS * num_tokens
        if not (error <= TOLERANCE and gap <= SCORE_TOLERANCE and few):
            raise WrongResultError(f"{contest.name}, T {num_tokens}, {contender}: output {error:.1e}, scores {gap:.1e}")
    return report


def membership(indices: Tensor, num_tokens: int) -> Tensor:
    """Mark the visible keys a selection ``[T, J]`` names: bool ``[T, T]``.  The peer also lists invisible ones."""
    marks = torch.zeros(num_tokens, num_tokens + 1, dtype=torch.bool)
    marks.scatter_(1, indices.long() % (num_tokens + 1), True)  # -1 goes to the extra column
    return marks[:, :num_tokens].tril_()


def score_gap(contest: Contest, x: Tensor, theirs: Tensor, mine: Tensor, rows: Tensor) -> float:
    """Return the largest difference of score between swapped keys, relative to the row's largest score."""
    if rows.numel() == 0:
        return 0.0
    layer: Any = contest.ours
    _, query_input = layer._queries(x)
    q_idx, w, keys = layer.indexer.project(x, torch.arange(x.shape[1]), query_input=query_input)
    scores = lightning_scores(q_idx[:, rows], keys, w[:, rows])[0]
    differs = theirs[rows] != mine[rows]
    high = scores.masked_fill(~differs, float("-inf")).amax(-1)
    low = scores.masked_fill(~differs, float("inf")).amin(-1)
    return float(((high - low) / scores.abs().amax(-1)).max())
