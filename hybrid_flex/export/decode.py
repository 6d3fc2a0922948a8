"""A decoding step as one program: a token and states of fixed size in, logits and the same states out."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from hybrid_flex.checks import check
from hybrid_flex.export.programs import asking_no_size, example_input, open_dimension, with_forward
from hybrid_flex.models import HybridLanguageModel


def export_decode(
    model: nn.Module,
    *,
    max_length: int,
    batch_size: int = 2,
    dynamic: bool = True,
    max_batch_size: int | None = None,
    strict: bool = False,
) -> ExportedProgram:
    """Export a decoding step as one program: ``(ids_t [B], states) -> (logits [B, vocab_size], states)``.

    A layer's program is ``(x_t [B, D], state) -> (y_t [B, D], state)``.  States go in and come out as the dataclasses
    that `step` takes: a `DSACache` in one piece and a `KVCache`, which the program writes in place and hands back, and
    a `KDAState`, which is returned anew.  A prefill's states enter through ``reserve``::

        step = export_decode(model, max_length=4096).module()
        logits, states = model(ids)                          # or the program of export_prefill
        states = model.reserve(states, 4096)                 # from nothing: model.reserve(model.init_state(B), 4096)
        for _ in range(100):
            logits, states = step(token, states)

    Args:
        model: a `HybridLanguageModel`, or a layer, hybrid, stack or block of this library.
        max_length: tokens that a sequence's caches hold, positive. The program takes caches of this length only.
        batch_size: B of the traced example, positive.
        dynamic: leave B open, the default: the example's then means nothing, and the program accepts any from 1 up to
            ``max_batch_size``. False fixes it to the example's.
        max_batch_size: largest B that the program accepts; None for any.
        strict: trace through Dynamo; False (faster) runs the module as it is.

    Returns:
        The program. It holds the model's weights under their names, frozen: it computes no gradient. Writing behind the
        end of a full cache raises IndexError on a CPU; on CUDA nothing is checked that would wait for the device.

    Raises:
        ValueError: a size is not positive, the model has no ``step`` and ``init_state``, or its layer cannot decode
            alone (one that shares the selection of another, or an MLA layer in its expanded form).

    Device:
        The model's: CPU or CUDA. A program runs on the kind of device it was exported on.

    Source:
        https://docs.pytorch.org/docs/stable/export.html

    Example:
        >>> from hybrid_flex.models import HybridConfig
        >>> model = HybridLanguageModel(HybridConfig(vocab_size=50, hidden_size=32, num_heads=2, pattern="KS", topk=4))
        >>> step = export_decode(model, max_length=64).module()
        >>> states = model.reserve(model(torch.randint(50, (3, 20)))[1], 64)
        >>> logits, states = step(torch.randint(50, (3,)), states)
        >>> logits.shape, states[1].lengths.tolist()
        (torch.Size([3, 50]), [21, 21, 21])
    """
    op = "export_decode"
    batch_size, B = open_dimension(op, "batch_size", batch_size, max_batch_size, dynamic)
    check(max_length > 0, op, "max_length", "be positive", max_length)
    if not (callable(getattr(model, "step", None)) and callable(getattr(model, "init_state", None))):
        raise ValueError(
            f"{op}: model must have step and init_state, as models and layers do, got {type(model).__name__}"
        )
    token, states = example_input(op, model, batch_size), empty_states(model, batch_size, max_length)
    # Without gradients no node of the graph switches them off and on again.
    with torch.no_grad(), asking_no_size(max_batch_size == 2):
        return torch.export.export(
            _stepping(model), (token, states), dynamic_shapes=({0: B}, _dynamic(states, B)), strict=strict
        )


@torch.no_grad()
def empty_states(model: nn.Module, batch_size: int, max_length: int) -> Any:
    """Make the states of ``batch_size`` sequences without a past, with room for ``max_length`` tokens of each."""
    any_model: Any = model
    states = any_model.init_state(batch_size)
    return any_model.reserve(states, max_length) if hasattr(model, "reserve") else states


def _stepping(model: nn.Module) -> nn.Module:
    """Let ``forward`` be ``step``.

    Its weights are frozen: written into a cache, what depends on a weight that learns would chain step to step.
    """
    return with_forward(model, _model_step if isinstance(model, HybridLanguageModel) else _layer_step)


def _model_step(self: Any, ids_t: Tensor, states: Any) -> tuple[Tensor, Any]:
    _check_batch(ids_t, states)
    logits, new_states = self.step(ids_t, states)
    return logits, new_states


def _layer_step(self: Any, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
    _check_batch(x_t, state)
    # A block also passes its selection on, to a block that does not stand here.
    y_t, new_state = self.step(x_t, state)[:2]
    return y_t, new_state


def _check_batch(token: Tensor, states: Any) -> None:
    """Tell the tracer that all batch sizes are one: not every tensor of a state meets the token in the graph."""
    for leaf in pytree.tree_leaves(states):
        torch._check(leaf.shape[0] == token.shape[0])


def _dynamic(states: Any, B: Dim) -> Any:
    """Describe states to `torch.export`: every tensor's first dimension is the batch, nothing else is open."""
    if isinstance(states, Tensor):
        return {0: B}
    if is_dataclass(states):
        # None, as the block table of a cache in one piece, is no leaf of a registered dataclass.
        values = (getattr(states, field.name) for field in fields(states))
        return [_dynamic(value, B) for value in values if value is not None]
    return tuple(_dynamic(state, B) for state in states)
