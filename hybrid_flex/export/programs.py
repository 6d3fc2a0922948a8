"""torch.export programs: made from a model or layer, saved, loaded."""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

# Importing the models registers the operators and the state dataclasses, without which no program of theirs loads.
from hybrid_flex.checks import check
from hybrid_flex.models import HybridLanguageModel

SUFFIX = ".pt2"
# A zip file ends in this record of 22 bytes, when it has no comment, and torch writes none.
_END = b"PK\5\6"
_GRAPH = re.compile(r"[^/]+/models/[^/]+\.json")
_OPERATOR = re.compile(r'"torch\.ops\.(\w+)\.(\w+)\.\w+"')


def export_prefill(
    model: nn.Module, *, batch_size: int = 2, seq_len: int = 128, dynamic: bool = True, strict: bool = False
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
            from 1. False fixes them to the example's.
        strict: trace through Dynamo, which also rejects Python side effects; False (faster) runs the module as it is.

    Returns:
        The program. ``program.module()`` is callable; `save` writes it to a file.

    Raises:
        ValueError: a size is not positive, or the model is neither a language model nor has a ``hidden_size``.

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
    check(batch_size > 0, op, "batch_size", "be positive", batch_size)
    check(seq_len > 0, op, "seq_len", "be positive", seq_len)
    if dynamic:
        # A dimension of size 1 is taken for a constant, whatever is declared.
        batch_size, seq_len = max(batch_size, 2), max(seq_len, 2)
    example = _example(model, batch_size, seq_len)
    # No named ranges: where a kernel needs a multiple they fail, an undeclared dimension does not.
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},) if dynamic else None
    return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=strict)


def _example(model: nn.Module, batch_size: int, seq_len: int) -> Tensor:
    """Make an input of ``model``: zeros, because only its shape and dtype are traced."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if isinstance(model, HybridLanguageModel):
        return torch.zeros(batch_size, seq_len, dtype=torch.int64, device=device)
    width = getattr(model, "hidden_size", getattr(getattr(model, "config", None), "hidden_size", None))
    if not isinstance(width, int):
        raise ValueError(
            "export_prefill: model must be a HybridLanguageModel, or a layer with a hidden_size, "
            f"got {type(model).__name__}"
        )
    dtype = torch.float32 if parameter is None else parameter.dtype
    return torch.zeros(batch_size, seq_len, width, dtype=dtype, device=device)


def save(program: ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Write a program to ``path``, weights included; the file appears whole or not at all.

    Args:
        program: what `export_prefill` or `torch.export.export` made.
        path: a file name ending in ``.pt2``; missing folders are made, an older file is replaced.

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
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"save: program must be a torch.export.ExportedProgram, got {type(program).__name__}")
    path = Path(path)
    check(path.suffix == SUFFIX, "save", "path", f"end in {SUFFIX}", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as beside:
        # The same name, because the archive carries it inside.
        written = Path(beside) / path.name
        torch.export.save(program, written)
        os.replace(written, path)


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
    if not path.is_file():
        raise FileNotFoundError(f"load: path must name an existing file, got {path}")
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
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_END) - 18))
        # Not zipfile.is_zipfile: in a truncated file it finds the end of an archive that is stored inside.
        whole = file.read().startswith(_END)
    check(whole, "load", "path", "hold a whole exported program", f"a truncated or foreign file in {path}")
    with zipfile.ZipFile(path) as archive:
        # <archive>/models/<name>.json is a graph; torch.save writes zip files too, without one.
        graphs = [name for name in archive.namelist() if _GRAPH.fullmatch(name)]
        check(bool(graphs), "load", "path", "hold an exported program", f"another kind of archive in {path}")
        # Torch does not compare checksums: a flipped bit would become a weight.
        damaged = archive.testzip()
        check(damaged is None, "load", "path", "hold a whole exported program", f"damaged {damaged} in {path}")
        targets = {target for name in graphs for target in _OPERATOR.findall(archive.read(name).decode())}
    missing = sorted(f"{space}::{name}" for space, name in targets if not hasattr(getattr(torch.ops, space), name))
    check(
        not missing,
        "load",
        "path",
        "hold a program of registered operators (first import the package that registers them)",
        f"one that needs {', '.join(missing)} in {path}",
    )
