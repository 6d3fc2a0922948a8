"""torch.export programs: made from a model or layer, saved, loaded."""

from __future__ import annotations

import copy
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes

# Importing the models registers the operators and the state dataclasses, without which no program of theirs loads.
from hybrid_flex.checks import check
from hybrid_flex.models import HybridLanguageModel
from hybrid_flex.ops.dispatch import lengths_up_to

SUFFIX = ".pt2"
# A zip file ends in this record of 22 bytes, when it has no comment, and torch writes none.
_END = b"PK\5\6"
_GRAPH = re.compile(r"[^/]+/models/[^/]+\.json")
_OPERATOR = re.compile(r'"torch\.ops\.(\w+)\.(\w+)\.\w+"')


def export_prefill(
    model: nn.Module,
    *,
    batch_size: int = 2,
    seq_len: int = 128,
    dynamic: bool = True,
    max_batch_size: int | None = None,
    max_seq_len: int | None = None,
    max_length: int | None = None,
    strict: bool = False,
) -> ExportedProgram:
    """Export the pass over a whole prompt as one program: ``ids [B, T] -> (logits, states)``, or ``x -> (y, state)``.

    The program begins without a past and returns the states from which decoding continues.  Our operators stay single
    nodes of its graph and keep their gradients, so a loaded program can be trained.

    Args:
        model: a `HybridLanguageModel`, whose program takes ids ``[B, T]`` (int64), or a layer, hybrid or block with a
            ``hidden_size``, whose program takes ``x [B, T, D]`` in the dtype of the layer's first parameter. Exported
            as it is: in training or evaluation mode, on its device.
        batch_size: B of the traced example, positive.
        seq_len: T of the traced example, positive.
        dynamic: leave B and T open, the default: the example's sizes then mean nothing, and the program accepts any
            from 1 up to the bounds below. False fixes them to the example's.
        max_batch_size: largest B that the program accepts; None for any.
        max_seq_len: largest T that the program accepts; None for any.
        max_length: tokens that a sequence may reach, prompt included: the states then come out as `export_decode` of
            the same ``max_length`` takes them, with caches of this size, and the program computes no gradient. None for
            states that grow.
        strict: trace through Dynamo, which also rejects Python side effects; False (faster) runs the module as it is.

    Returns:
        The program. ``program.module()`` is callable, and `runner` says in one sentence why an input does not fit;
        `save` writes it to a file.

    Raises:
        ValueError: a size is not positive, a bound comes with ``dynamic=False``, or the model is neither a language
            model nor has a ``hidden_size``.

    Device:
        The model's: CPU or CUDA. A program runs on the kind of device it was exported on.

    Source:
        https://docs.pytorch.org/docs/stable/export.html

    Example:
        >>> from hybrid_flex.models import HybridConfig
        >>> model = HybridLanguageModel(HybridConfig(vocab_size=50, hidden_size=32, num_heads=2, pattern="KS", topk=4))
        >>> program = export_prefill(model)
        >>> logits, states = program.module()(torch.randint(50, (3, 20)))
        >>> logits.shape, states[0].S.shape
        (torch.Size([3, 20, 50]), torch.Size([3, 2, 16, 16]))
    """
    op = "export_prefill"
    if max_length is not None:
        check(max_length > 0, op, "max_length", "be positive", max_length)
        check(dynamic or seq_len <= max_length, op, "seq_len", f"be at most max_length = {max_length}", seq_len)
        if dynamic:
            max_seq_len = max_length if max_seq_len is None else min(max_seq_len, max_length)
        model = _reserving(model, max_length)
    batch_size, B = open_dimension(op, "batch_size", batch_size, max_batch_size, dynamic)
    seq_len, T = open_dimension(op, "seq_len", seq_len, max_seq_len, dynamic)
    example = example_input(op, model, batch_size, seq_len)
    gradients = torch.is_grad_enabled() and max_length is None
    with torch.set_grad_enabled(gradients), asking_no_size(), lengths_up_to(max_seq_len):
        return torch.export.export(model, (example,), dynamic_shapes=({0: B, 1: T},), strict=strict)


def _reserving(model: nn.Module, max_length: int) -> nn.Module:
    """Copy a model, but not its weights, and let ``forward`` give its caches room; parameters keep their names."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Any]:
        y, states = type(model).forward(self, x)
        return y, self.reserve(states, max_length)

    return with_forward(model, forward) if hasattr(model, "reserve") else model


def with_forward(model: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Copy a model with another ``forward``; the copy's weights are the model's, frozen, under their names."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    other = copy.deepcopy(model, shared)
    other.__class__ = type(type(model).__name__, (type(model),), {"forward": forward})
    return other


def open_dimension(op: str, name: str, size: int, largest: int | None, dynamic: bool) -> tuple[int, Any]:
    """Say what size an example has along a dimension, and what `torch.export` is told about it.

    No named dimensions: where a kernel needs a multiple they fail, an undeclared one with a range does not.
    """
    check(size > 0, op, name, "be positive", size)
    check(largest is None or largest > 0, op, f"max_{name}", "be positive", largest)
    check(largest is None or dynamic, op, f"max_{name}", "be None with dynamic=False", largest)
    if not dynamic:
        return size, Dim.STATIC
    if largest == 1:
        return 1, Dim.STATIC
    # An example of size 1 would be taken for a constant, whatever is declared, and one as large as a cache that it is
    # copied to for a copy of all of it.
    size = max(size, 2)
    if largest is None:
        return size, Dim.DYNAMIC(min=1)
    return min(size, max(largest - 1, 2)), Dim.DYNAMIC(min=1, max=largest)


def asking_no_size(wanted: bool = True) -> AbstractContextManager[None]:
    """Trace without asking what an open size is in the example, if ``wanted``.

    NOTE [Sizes that are asked about]
    A graph is traced with an example, and "is there one pool of 4 tokens?" is answered for its length: the program is
    bound to lengths of the same answer, with ``index_kpool = 4`` to T >= 8.  Likewise a size of at most 2 is taken for
    a constant, because 0 and 1 are.  Oblivious of the example, torch answers for all sizes.
    It then also forgets that an open size is no 1, which torch 2.11 asks where dense attention decodes under a mask: a
    decoding step, which has no open length, is traced so only for a bound of 2.
    """
    patch: AbstractContextManager[None] = symbolic_shapes.patch(backed_size_oblivious=wanted)  # type: ignore[attr-defined]
    return patch


def example_input(op: str, model: nn.Module, *sizes: int) -> Tensor:
    """Make an input of ``model``, ids or hidden states: zeros, because only its shape and dtype are traced."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if isinstance(model, HybridLanguageModel):
        return torch.zeros(sizes, dtype=torch.int64, device=device)
    width = getattr(model, "hidden_size", getattr(getattr(model, "config", None), "hidden_size", None))
    if not isinstance(width, int):
        raise ValueError(
            f"{op}: model must be a HybridLanguageModel, or a layer with a hidden_size, got {type(model).__name__}"
        )
    dtype = torch.float32 if parameter is None else parameter.dtype
    return torch.zeros(*sizes, width, dtype=dtype, device=device)


def save(program: ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Write a program to ``path``, weights included; the file appears whole or not at all.

    Args:
        program: what `export_prefill`, `export_decode` or `torch.export.export` made.
        path: a file name ending in ``.pt2``; missing folders are made, an older file is replaced. The example of a
            decoding step, whose caches may be large, is left out.

    Raises:
        TypeError: ``program`` is no exported program.
        ValueError: the name does not end in ``.pt2``.

    Device:
        Any; the file remembers the device.

    Example:
        >>> import tempfile
        >>> program = torch.export.export(nn.Linear(4, 2), (torch.randn(3, 4),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(program, f"{folder}/linear.pt2")
        ...     load(f"{folder}/linear.pt2").module()(torch.randn(3, 4)).shape
        torch.Size([3, 2])
    """
    check_program("save", program)
    with whole_file("save", path) as written:
        torch.export.save(_without_states(program), written)


def check_program(op: str, program: object) -> None:
    """Raise TypeError unless ``program`` is an exported program."""
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"{op}: program must be a torch.export.ExportedProgram, got {type(program).__name__}")


@contextmanager
def whole_file(op: str, path: str | os.PathLike[str]) -> Iterator[Path]:
    """Lend a place to write an archive to, which becomes ``path`` when the body has ended, or never."""
    path = Path(path)
    check(path.suffix == SUFFIX, op, "path", f"end in {SUFFIX}", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as beside:
        # The same name, because the archive carries it inside.
        written = Path(beside) / path.name
        yield written
        os.replace(written, path)


def traced_inputs(program: ExportedProgram) -> list[Any]:
    """List what stands in a program's graph for the tensors that are its inputs, in order."""
    traced = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return [traced.get(name) for name in program.graph_signature.user_inputs]


def _without_states(program: ExportedProgram) -> ExportedProgram:
    """Drop the example if it holds states: caches, megabytes of zeros, would go into the file."""
    if all(isinstance(leaf, Tensor) for leaf in _arguments(program)):
        return program
    program = copy.copy(program)
    program.example_inputs = None
    return program


def _arguments(program: ExportedProgram) -> list[object]:
    """List the example's arguments, none of them opened."""
    arguments, options = program.example_inputs or ((), {})
    return [*arguments, *options.values()]


def load(path: str | os.PathLike[str]) -> ExportedProgram:
    """Read a program that `save` wrote.

    Importing `hybrid_flex` is all it needs: operators and states are registered, no model code runs.  The file is
    PyTorch's own format; as with any program, load only what you would run.

    Args:
        path: a ``.pt2`` file.

    Returns:
        The program; ``load(path).module()`` is callable and holds the weights as parameters.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, holds something else, or names an operator that is not registered here.

    Device:
        That on which the program was exported.

    Example:
        See `save`.
    """
    path = Path(path)
    _check_archive(path)
    try:
        return torch.export.load(path)
    except Exception as error:
        raise ValueError(
            f"load: path must hold a program that torch {torch.__version__} can read, got a damaged file, or one of "
            f"another version of torch or hybrid_flex, in {path}"
        ) from error


def _check_archive(path: Path) -> None:
    """Look before torch loads: it logs pages and hides the reason when an operator is missing."""
    check_whole("load", path, "exported program")
    with zipfile.ZipFile(path) as archive:
        # <archive>/models/<name>.json is a graph; torch.save writes zip files too, without one.
        graphs = [name for name in archive.namelist() if _GRAPH.fullmatch(name)]
        check(bool(graphs), "load", "path", "hold an exported program", f"another kind of archive in {path}")
        targets = {target for name in graphs for target in _OPERATOR.findall(archive.read(name).decode())}
    missing = sorted(f"{space}::{name}" for space, name in targets if not hasattr(getattr(torch.ops, space), name))
    check(
        not missing,
        "load",
        "path",
        "hold a program of registered operators (first import the package that registers them)",
        f"one that needs {', '.join(missing)} in {path}",
    )


def check_whole(op: str, path: Path, what: str) -> None:
    """Raise unless ``path`` is an archive whose members are all as they were written: FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{op}: path must name an existing file, got {path}")
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_END) - 18))
        # Not zipfile.is_zipfile: in a truncated file it finds the end of an archive that is stored inside.
        whole = file.read().startswith(_END)
    check(whole, op, "path", f"hold a whole {what}", f"a truncated or foreign file in {path}")
    with zipfile.ZipFile(path) as archive:
        # Torch does not compare checksums: a flipped bit would become a weight.
        damaged = archive.testzip()
    check(damaged is None, op, "path", f"hold a whole {what}", f"damaged {damaged} in {path}")
