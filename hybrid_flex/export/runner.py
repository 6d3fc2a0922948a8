"""Running a program: what it was exported for is compared with what it is given, before anything is computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from hybrid_flex.checks import check, check_device, check_dtype
from hybrid_flex.export.programs import check_program, traced_inputs

_OP = "program"


def runner(program: ExportedProgram) -> nn.Module:
    """Make ``program.module()`` say in one sentence why an input does not fit.

    What a program accepts is written in it: the form of its inputs, and of each tensor the sizes, their bounds, the
    dtype and the device.  torch itself refuses a size with ``Guard failed: ids.size()[0] <= 4``, and other mismatches
    somewhere inside the graph, or not at all.

    Args:
        program: what `export_prefill`, `export_decode` or `load` returned, or any other exported program.

    Returns:
        A callable module with the program's weights as parameters. Calling it with inputs that do not fit raises, e.g.,
        ``program: ids must have at most 4 in dimension 0, got shape (5, 10)``: TypeError for a dtype, ValueError
        otherwise.

    Raises:
        TypeError: ``program`` is no exported program.

    Device:
        The program's. Shapes are compared on the host; nothing waits for a GPU.

    Example:
        >>> import torch
        >>> from hybrid_flex.export import export_prefill
        >>> from hybrid_flex.layers import KimiDeltaAttention
        >>> run = runner(export_prefill(KimiDeltaAttention(32, num_heads=2, head_dim=16), max_seq_len=64))
        >>> run(torch.randn(3, 20, 32))[0].shape
        torch.Size([3, 20, 32])
        >>> run(torch.randn(3, 65, 32))
        Traceback (most recent call last):
        ValueError: program: x must have at most 64 in dimension 1, got shape (3, 65, 32)
    """
    check_program("runner", program)
    accepted = _Accepted(program)

    def check_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        accepted.check(args, kwargs)

    module = program.module()
    # Before torch's own checks, which are hooks and nodes of the same module.
    module.register_forward_pre_hook(check_inputs, prepend=True, with_kwargs=True)
    return module


class _Accepted:
    """What a program accepts: the form of its inputs and, for each tensor, what stood there when it was traced."""

    def __init__(self, program: ExportedProgram) -> None:
        self.form = program.call_spec.in_spec
        self.examples = traced_inputs(program)
        self.bounds = {str(symbol): (bound.lower, bound.upper) for symbol, bound in program.range_constraints.items()}
        signature = program.module_call_graph[0].signature
        self.names = list(getattr(signature, "forward_arg_names", None) or [])

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise unless the inputs of a call fit."""
        leaves, form = pytree.tree_flatten_with_path((args, kwargs))
        if form != self.form:
            by_position = not kwargs or self.form.children()[1].num_children > 0
            check(by_position, _OP, "inputs", "be given by position", f"the keywords {', '.join(kwargs)}")
            place, wanted, found = _first_difference(self.form, form, (), [leaf for _, leaf in leaves])
            raise ValueError(f"{_OP}: {self._name(place)} must be {wanted}, got {found}")
        # Symbol -> size, and where it was seen first.
        seen: dict[str, tuple[int, str]] = {}
        for (path, leaf), example in zip(leaves, self.examples, strict=True):
            if isinstance(example, Tensor):
                self._check_tensor(self._name(path), leaf, example, seen)

    def _check_tensor(self, name: str, leaf: object, example: Tensor, seen: dict[str, tuple[int, str]]) -> None:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{_OP}: {name} must be a tensor, got {type(leaf).__name__}")
        got = f"shape {tuple(leaf.shape)}"
        check(leaf.dim() == example.dim(), _OP, name, f"be a tensor of rank {example.dim()}", got)
        check_dtype(_OP, name, leaf, (example.dtype,))
        check_device(_OP, name, leaf, example.device)
        for i, (size, traced) in enumerate(zip(leaf.shape, example.shape, strict=True)):
            if isinstance(traced, int):
                check(size == traced, _OP, name, f"have size {traced} in dimension {i}", got)
                continue
            symbol = str(traced.node.expr)
            if symbol in self.bounds:  # and not an expression of other sizes, which nobody promised anything about
                lower, upper = self.bounds[symbol]
                # torch writes 2 where it means "not a constant": it accepts 1 too.
                smallest = 1 if lower == 2 else lower
                check(size >= smallest, _OP, name, f"have at least {smallest} in dimension {i}", got)
                check(size <= upper, _OP, name, f"have at most {upper} in dimension {i}", got)
            first, where = seen.setdefault(symbol, (size, f"dimension {i} of {name}"))
            check(size == first, _OP, name, f"have {first} in dimension {i}, like {where}", got)

    def _name(self, path: tuple[Any, ...]) -> str:
        """Write a path through ``(args, kwargs)`` as the caller would: ``states[1].kv``."""
        if len(path) < 2:
            return "inputs"
        place, rest = getattr(path[1], "idx", getattr(path[1], "key", None)), pytree.keystr(path[2:])
        if not isinstance(place, int):
            return f"{place}{rest}"
        return (self.names[place] if place < len(self.names) else f"input {place}") + rest


def _first_difference(
    wanted: Any, found: Any, path: tuple[Any, ...], leaves: list[Any]
) -> tuple[tuple[Any, ...], str, str]:
    """Find where two forms part, and write what stands there in each; ``leaves`` are those of ``found``."""
    same = (wanted.type, wanted.context, wanted.num_children) == (found.type, found.context, found.num_children)
    if same:
        begin = 0
        for i, (a, b) in enumerate(zip(wanted.children(), found.children(), strict=True)):
            if a != b:
                return _first_difference(a, b, (*path, pytree.SequenceKey(i)), leaves[begin:])
            begin += b.num_leaves
    return path, _form(wanted), _form(found, leaves)


def _form(spec: Any, leaves: list[Any] | None = None) -> str:
    if spec.is_leaf():
        if leaves is None or isinstance(leaves[0], Tensor):
            return "a tensor"
        return "None" if leaves[0] is None else f"a value of type {type(leaves[0]).__name__}"
    kind = spec.type.__name__
    if kind in ("tuple", "list", "dict"):
        return f"a {kind} of {spec.num_children}"
    # The context of a registered dataclass begins with the names of its fields that are not None.
    return f"a {kind} of {', '.join(spec.context[0])}" if spec.context else f"a {kind}"
