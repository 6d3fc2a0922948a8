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

from hybrid_flex.ops.dispatch import PLAIN_FORMS, without_kernels

NAMESPACE = "hybrid_flex::"


def portable(program: ExportedProgram) -> ExportedProgram:
    """Write the operators of a program out, so that it runs where this library is not installed.

    Every ``hybrid_flex::`` node becomes the PyTorch operators of its plain form, one loop (a ``scan``) for each walk
    over chunks or blocks of queries, and every state a tuple of its tensors, in the order of the dataclass's fields:
    ``(S, conv_q, conv_k, conv_v)``, ``(kv, index_keys)``.  Whoever gets the file needs torch and nothing else::

        module = torch.export.load("model.pt2").module()
        logits, states = module(ids)

    Args:
        program: what `export_prefill` or `export_decode` made, in memory or from `load`.

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
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"portable: program must be a torch.export.ExportedProgram, got {type(program).__name__}")
    missing = sorted(operators_of(program) - PLAIN_FORMS.keys())
    if missing:
        raise ValueError(
            "portable: program must hold operators that have a plain form, "
            f"got {', '.join(NAMESPACE + name for name in missing)}"
        )
    with without_kernels():
        return decomposed(with_plain_states(program), PLAIN_FORMS)


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
    with symbolic_shapes.patch(backed_size_oblivious=True):
        return program.run_decompositions(table)


def with_plain_states(program: ExportedProgram) -> ExportedProgram:
    """Trace a program again, without gradients, so that the states that go in and come out are tuples of tensors."""
    assert program.example_inputs is not None  # export keeps them, and so does a file
    arguments, keywords = program.example_inputs
    plain = tuple(to_tuples(x) for x in arguments)
    model = program.module(check_guards=False)
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            # A scan that runs where a gradient is wanted would trace its backward, and the loops here have none.
            setattr(part, name, nn.Parameter(parameter.detach(), requires_grad=False))
    module = _PlainStates(model, arguments)
    with symbolic_shapes.patch(backed_size_oblivious=True):
        return torch.export.export(module, plain, keywords, dynamic_shapes=_open_sizes(program, plain))


class _PlainStates(nn.Module):
    """Call a program whose states are dataclasses with tuples."""

    def __init__(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        super().__init__()
        self.model = model
        self._example = example

    def forward(self, inputs: Tensor, *states: Any) -> Any:
        _, *old = self._example
        return to_tuples(self.model(inputs, *map(like, old, states)))


def to_tuples(x: Any) -> Any:
    """Turn every dataclass in nested tuples and lists into the tuple of its fields."""
    if is_dataclass(x) and not isinstance(x, type):
        return tuple(to_tuples(getattr(x, field.name)) for field in fields(x))
    return tuple(map(to_tuples, x)) if isinstance(x, (tuple, list)) else x


def like(example: Any, x: Any) -> Any:
    """Undo `to_tuples`, given what it was applied to."""
    if is_dataclass(example) and not isinstance(example, type):
        parts = (like(getattr(example, field.name), part) for field, part in zip(fields(example), x, strict=True))
        return type(example)(*parts)
    if isinstance(example, (tuple, list)):
        return type(example)(like(old, new) for old, new in zip(example, x, strict=True))
    return x


def _open_sizes(program: ExportedProgram, arguments: tuple[Any, ...]) -> Any:
    """Say which sizes of the inputs a program leaves open, and within which bounds, for tracing it again."""
    signature = program.graph_signature
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    inputs = iter([values[name] for name in signature.user_inputs])

    def open_size(size: int | torch.SymInt) -> Any:
        if isinstance(size, int):
            return Dim.STATIC
        bounds = program.range_constraints.get(size.node.expr)
        lower, upper = (None, None) if bounds is None else (bounds.lower, bounds.upper)
        limits = {"min": lower, "max": upper}
        return Dim.DYNAMIC(**{name: int(n) for name, n in limits.items() if n is not None and n.is_Integer})

    def sizes(x: object) -> Any:
        value = next(inputs)
        return {i: open_size(n) for i, n in enumerate(value.shape)} if isinstance(x, Tensor) else None

    first, *states = pytree.tree_map(sizes, arguments)
    return (first, tuple(states)) if states else (first,)  # as `_PlainStates.forward` binds them
