"""What the operators of a trace did: FLOP by torch's formulas and ours, and the bytes that they had to move.

A trace holds shapes, dtypes and plain numbers of an operator's inputs, but not its outputs.  So each operator is called
once more on tensors of those shapes without data (device "meta"): that gives the outputs, and the arguments of its FLOP
formula.

# NOTE [Bytes]
Bytes are what an operator has to move at least: every tensor that it reads or writes, once; of a table whose rows it
looks up or replaces, as many rows as it names, and never more than there are.  Views move nothing.  What an operator
fetches again (a row that many queries select, the tiles of a product) is not counted again, and what stays in caches
between two operators is not left out: a share of the roofline above 1 says that caches did better than memory.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import hybrid_flex.profiling.flops  # noqa: F401  registers the formulas
from hybrid_flex.profiling.events import Event

# As the profiler writes them: C++ names.
_DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "c10::BFloat16": torch.bfloat16,
    "c10::Half": torch.float16,
    "c10::Float8_e4m3fn": torch.float8_e4m3fn,
    "c10::Float8_e5m2": torch.float8_e5m2,
    "bool": torch.bool,
    "unsigned char": torch.uint8,
    "signed char": torch.int8,
    "short": torch.int16,
    "short int": torch.int16,
    "int": torch.int32,
    "long": torch.int64,
    "long int": torch.int64,
    "long long": torch.int64,
    "c10::complex<float>": torch.complex64,
    "c10::complex<double>": torch.complex128,
}
# They make memory and leave it as it is, read one number, or are views that their schema does not call so.
_MOVE_NOTHING = {
    "aten::_local_scalar_dense",
    "aten::_unsafe_view",
    "aten::detach_",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::resize_",
    "aten::result_type",
    "aten::set_",
}

# Operators that read, or replace, rows of a table: the argument that is the table, and the one whose elements (True:
# whose elements times the width of a row) say how much of it.  "" is the result.
_TABLES = {
    "aten::embedding": ("weight", "", False),
    "aten::index_select": ("self", "", False),
    "aten::gather": ("self", "", False),
    "aten::index": ("self", "", False),
    "aten::index_put_": ("self", "values", False),
    "aten::_index_put_impl_": ("self", "values", False),
    "aten::index_copy_": ("self", "source", False),
    "aten::index_add_": ("self", "source", False),
    "aten::scatter_": ("self", "src", False),
    "aten::scatter_add_": ("self", "src", False),
    "hybrid_flex::kda_decode": ("state", "state_indices", True),
    "hybrid_flex::sparse_attention_gather": ("k v", "indices", True),
    "hybrid_flex::sparse_attention_flex": ("k v", "indices", True),
    "hybrid_flex::sparse_attention_masked": ("k v", "indices", True),
    "hybrid_flex::sparse_attention_masked_hopper": ("k v", "indices", True),
    "hybrid_flex::sparse_attention_cuda": ("k v", "indices", True),
    "hybrid_flex::sparse_attention_hopper": ("k v", "indices", True),
}


@dataclass(frozen=True)
class Work:
    """What one operator did."""

    flop: int = 0
    bytes: int = 0
    dtype: str = ""
    """Dtype of its first tensor."""


def work_of(events: Iterable[Event]) -> dict[Event, Work]:
    """Find the work of a trace's events, each FLOP and byte at one of them.

    FLOP belong to the outermost operator that has a formula, as `FlopCounterMode` counts them.  Bytes belong to that
    operator too, and where there is none to the innermost operators that move any.

    Args:
        events: of one trace, parents before children.

    Returns:
        The events that did some.
    """
    ordered = list(events)
    counted: dict[Event, Work] = {}
    inside_counted: set[Event] = set()
    below: dict[Event, int] = defaultdict(int)
    cache: dict[str, Work] = {}
    for event in ordered:
        if event.parent is not None and event.parent in inside_counted:
            inside_counted.add(event)
        elif event.category == "cpu_op" and (packet := _packet(event.name)) in flop_registry:
            inside_counted.add(event)
            counted[event] = _cached(event, packet, cache)
    for event in reversed(ordered):
        work = counted.get(event)
        if work is None and event not in inside_counted and event.category == "cpu_op" and not below[event]:
            packet = _packet(event.name)
            if packet is not None and event.name not in _MOVE_NOTHING:
                work = _cached(event, packet, cache)
                if work.bytes:
                    counted[event] = work
        if event.parent is not None:
            below[event.parent] += below[event] + (work.bytes if work is not None else 0)
    return counted


def _cached(event: Event, packet: Any, cache: dict[str, Work]) -> Work:
    arguments = event.arguments
    key = json.dumps([event.name, *(arguments.get(name) for name in ("Input Dims", "Input type", "Concrete Inputs"))])
    if key not in cache:
        cache[key] = _work(event, packet)
    return cache[key]


def _packet(name: str) -> Any:
    """Return the operator of an event's name, or None: ranges, autograd nodes and C++ helpers are no operators."""
    namespace, _, operator = name.partition("::")
    if not operator.isidentifier():
        return None
    try:
        return getattr(getattr(torch.ops, namespace), operator)
    except AttributeError:
        return None


def _work(event: Event, packet: Any) -> Work:
    shapes, types = event.arguments.get("Input Dims"), event.arguments.get("Input type")
    if not shapes or not types:
        return Work()
    values = event.arguments.get("Concrete Inputs") or [""] * len(shapes)
    for name in packet.overloads():
        overload = getattr(packet, name)
        schema = overload._schema
        if len(schema.arguments) != len(shapes):
            continue
        try:
            arguments = [_argument(*given) for given in zip(schema.arguments, shapes, types, values, strict=True)]
        except (ValueError, KeyError, TypeError):
            continue
        return _measure(overload, arguments)
    return Work()


def _argument(argument: Any, shape: Any, kind: str, value: str) -> Any:
    """Make an argument again: a tensor without data, a list of them, a number, None."""
    if kind in _DTYPES:
        if "Tensor" not in str(argument.type):
            raise TypeError("a tensor where the schema has none")
        return torch.empty(shape, dtype=_DTYPES[kind], device="meta")
    if kind in ("TensorList", "GenericList") and shape and isinstance(shape[0], list):
        # The dtypes of a list's tensors are not written down; float32 is a guess for the bytes.
        return [torch.empty(one, device="meta") for one in shape]
    name = str(argument.type)
    if name.startswith("Tensor"):
        raise TypeError("no tensor where the schema has one")
    if value == "":
        if argument.has_default_value():
            return argument.default_value
        # Strings are not written down, and no shape hangs on one.
        return "" if name == "str" else None
    if value.startswith("["):
        return json.loads(value.replace("True", "true").replace("False", "false"))
    if value in ("True", "False"):
        return value == "True"
    number = float(value)
    return int(number) if number.is_integer() and "float" not in name else number


def _measure(overload: Any, arguments: list[Any]) -> Work:
    schema = overload._schema
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    # An operator made of others leaves the work to them.
    is_view |= overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    if is_view:
        return Work(dtype=dtype)
    positional = [x for x, a in zip(arguments, schema.arguments, strict=True) if not a.kwarg_only]
    keywords = {a.name: x for x, a in zip(arguments, schema.arguments, strict=True) if a.kwarg_only}
    try:
        out = overload(*positional, **keywords)
    except Exception:  # what a kernel without data cannot do has many names
        out = None
    moved = {id(x): x.numel() * x.element_size() for x in (*tensors, *tree_leaves(out)) if isinstance(x, Tensor)}
    for table, rows in _looked_up(schema, arguments, out):
        moved[id(table)] = min(moved[id(table)], rows)
    flop = 0
    formula = flop_registry.get(overload._overloadpacket)
    if formula is not None:
        try:
            flop = int(formula(*positional, **keywords, out_val=out))
        except (AssertionError, TypeError, ValueError, IndexError, AttributeError, RuntimeError):
            flop = 0  # a formula for other arguments than these
    return Work(flop if math.isfinite(flop) else 0, sum(moved.values()), dtype)


def _looked_up(schema: Any, arguments: list[Any], out: Any) -> Iterator[tuple[Tensor, int]]:
    """Yield the tables of a call and the bytes of theirs that it names."""
    rule = _TABLES.get(schema.name)
    if rule is None:
        return
    given = {a.name: x for a, x in zip(schema.arguments, arguments, strict=True)}
    tables, key, by_row = rule
    named = out if key == "" else given.get(key)
    if not isinstance(named, Tensor):
        return
    for name in tables.split():
        table = given[name]
        leading = 2 if name in ("k", "v") else 1
        width = table.shape[leading:].numel() if by_row else 1
        yield table, named.numel() * width * table.element_size()
