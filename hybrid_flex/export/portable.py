"""Programs that run with torch alone: our operators written out, our states as plain tuples.

A program that `export_prefill` or `export_decode` makes is *opaque*: each operator of ours is one node, which whoever
loads it must have registered by importing this library.  Its *portable* form holds PyTorch's own operators only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils import _pytree as pytree

from hybrid_flex.checks import check
from hybrid_flex.export.programs import check_program, traced_inputs
from hybrid_flex.ops.dispatch import PLAIN_FORMS, without_kernels

NAMESPACE = "hybrid_flex::"
# NOTE [Uneven sizes]
UNEVEN_BATCH, UNEVEN_LENGTH = 3, 131
LONG_LENGTH = 4099
"""The length for which AOTInductor on CUDA chooses among the tiles of its own kernels."""


def portable(program: ExportedProgram, *, flat: bool = False) -> ExportedProgram:
    """Write the operators of a program out, so that it runs where this library is not installed.

    Every ``hybrid_flex::`` node becomes the PyTorch operators of its plain form, one loop (a ``scan``) for each walk
    over chunks or blocks of queries, and every state a tuple of its tensors, in the order of the dataclass's fields:
    ``(S, conv_q, conv_k, conv_v)``, ``(kv, index_keys)``.  Whoever gets the file needs torch and nothing else::

        module = torch.export.load("model.pt2").module()
        logits, states = module(ids)

    Args:
        program: what `export_prefill` or `export_decode` made, in memory or from `load`.
        flat: take and return the tensors of all states in a row, ``(ids_t, *tensors) -> (logits, *tensors)``, as
            packages do.

    Returns:
        A program with the same parameters, sizes and results, for inference: its loops have no backward.

    Raises:
        TypeError: ``program`` is no exported program.
        ValueError: it holds an operator without a plain form (those of losses and of backward passes).

    Device:
        That of the program. On CUDA the plain forms run instead of Triton kernels: `package` carries those.

    Example:
        >>> from hybrid_flex.export import export_prefill
        >>> from hybrid_flex.layers import KimiDeltaAttention
        >>> layer = KimiDeltaAttention(32, num_heads=2, head_dim=16)
        >>> y, (S, *conv) = portable(export_prefill(layer)).module()(torch.randn(3, 20, 32))
        >>> y.shape, S.shape
        (torch.Size([3, 20, 32]), torch.Size([3, 2, 16, 16]))
    """
    check_program("portable", program)
    missing = sorted(operators_of(program) - PLAIN_FORMS.keys())
    rule = "hold operators that have a plain form"
    check(not missing, "portable", "program", rule, ", ".join(NAMESPACE + name for name in missing))
    with without_kernels():
        return decomposed(with_plain_states(program, flat=flat), PLAIN_FORMS)


def operators_of(program: ExportedProgram) -> set[str]:
    """Name the operators of this library in a program, without their namespace."""
    targets = (node.target for node in program.graph.nodes)
    names = (target._schema.name for target in targets if isinstance(target, torch._ops.OpOverload))
    return {name.removeprefix(NAMESPACE) for name in names if name.startswith(NAMESPACE)}


def decomposed(program: ExportedProgram, names: Iterable[str]) -> ExportedProgram:
    """Write the operators ``names`` out in their plain forms; all others stay (torch's default table would turn fused
    attention into a softmax over T x S scores).
    """
    table = {getattr(torch.ops.hybrid_flex, name).default: PLAIN_FORMS[name] for name in names}
    # A tensor cut off after T rows of whole chunks is contiguous for some T; asked about it, an open size would answer
    # for the length of the example.  Oblivious of the example, it answers for all.
    with symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return program.run_decompositions(table)


def with_plain_states(program: ExportedProgram, *, flat: bool = False, length: int = UNEVEN_LENGTH) -> ExportedProgram:
    """Trace a program again, without gradients, so that no state goes in or comes out as a dataclass.

    Each is the tuple of its tensors instead, or with ``flat`` their tensors are inputs and outputs themselves.  The
    example has ``length`` tokens, if the program takes so many.
    """
    model = program.module(check_guards=False)
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            # A scan that runs where a gradient is wanted would trace its backward, and the loops here have none.
            setattr(part, name, nn.Parameter(parameter.detach(), requires_grad=False))
    arguments, sizes = _uneven_example(program, flat, length)
    example = tuple(pytree.tree_leaves(arguments)) if flat else to_tuples(arguments)
    with torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(_PlainStates(model, arguments, flat), example, dynamic_shapes=sizes)


class _PlainStates(nn.Module):
    """Call a program whose states are dataclasses with tuples, or with all their tensors in a row."""

    def __init__(self, model: nn.Module, example: tuple[Any, ...], flat: bool) -> None:
        super().__init__()
        self.model = model
        self._states, self._flat = example[1:], flat

    def forward(self, inputs: Tensor, *states: Any) -> Any:
        leaves = pytree.tree_leaves(states)
        y, *rest = self.model(inputs, *pytree.tree_unflatten(leaves, pytree.tree_structure(self._states)))
        return (y, *pytree.tree_leaves(rest)) if self._flat else to_tuples((y, *rest))


def to_tuples(x: Any) -> Any:
    """Turn every dataclass in nested tuples and lists into the tuple of its fields, those that are None left out."""
    if is_dataclass(x) and not isinstance(x, type):
        values = (getattr(x, field.name) for field in fields(x))
        return tuple(to_tuples(value) for value in values if value is not None)
    return tuple(map(to_tuples, x)) if isinstance(x, (tuple, list)) else x


def _uneven_example(program: ExportedProgram, flat: bool, length: int) -> tuple[tuple[Any, ...], Any]:
    """Make inputs to trace a program with, and say which of their sizes are open and how far.

    NOTE [Uneven sizes]
    Open sizes get odd numbers here, no multiple of a chunk or block.  Whatever still looks at the example then takes
    the general way: AOTInductor, shown 128 tokens, leaves out the padding to whole chunks of 64, and its package reads
    wild memory at T = 65.
    """
    values = traced_inputs(program)
    opened = [_uneven(program, value.shape, length) for value in values]
    shapes = ((sizes, x) for x, (sizes, _) in zip(values, opened, strict=True))
    leaves = [torch.zeros(sizes, dtype=x.dtype, device=x.device) for sizes, x in shapes]
    arguments: tuple[Any, ...] = pytree.tree_unflatten(leaves, program.call_spec.in_spec)[0]
    form = tuple(leaves) if flat else to_tuples(arguments)
    first, *states = pytree.tree_unflatten([dims for _, dims in opened], pytree.tree_structure(form))
    # as `_PlainStates.forward` binds them
    return arguments, (first, tuple(states)) if states else (first,)


def _uneven(program: ExportedProgram, shape: torch.Size, length: int) -> tuple[list[int], dict[int, Any]]:
    """Choose sizes for one input, and name the dimensions of it that are open: NOTE [Uneven sizes]."""
    sizes: list[int] = []
    dims: dict[int, Any] = {}
    for i, size in enumerate(shape):
        if isinstance(size, int):
            sizes.append(size)
            continue
        known = program.range_constraints.get(size.node.expr)
        bounds = {} if known is None or not known.upper.is_Integer else {"max": int(known.upper)}
        wanted = UNEVEN_BATCH if i == 0 else length
        sizes.append(min(wanted, max(bounds["max"] - 1, 2)) if bounds else wanted)  # as `open_dimension` does
        dims[i] = Dim.DYNAMIC(min=1, **bounds)
    return sizes, dims
