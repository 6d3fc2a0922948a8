"""AOTInductor packages: a model compiled ahead of time into one file, which Python or C++ runs without this library.

    model.pt2:  prefill  ids [B, T]            -> logits [B, T, vocab], state_0, state_1, ...
                decode   ids_t [B], state_0, … -> logits [B, vocab],    state_0, state_1, ...

What goes in and comes out are plain tensors.  The states are those of `HybridLanguageModel.step` with caches of fixed
size, flattened in the order of their fields; decode writes into caches in place and returns them as well.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from hybrid_flex.checks import check, check_device, check_dtype, check_shape
from hybrid_flex.export.decode import export_decode
from hybrid_flex.export.portable import LONG_LENGTH, decomposed, operators_of, portable, with_plain_states
from hybrid_flex.export.programs import check_whole, export_prefill, traced_inputs, whole_file
from hybrid_flex.models import HybridLanguageModel, sampling

STEPS = ("prefill", "decode")
# What a package on CUDA carries as Triton kernels; what else a program holds goes in its plain form.
CARRIED = {
    "chunk_kda",
    "fused_recurrent_kda",
    "gated_rms_norm",
    "lightning_topk_cuda",
    "short_conv",
    "sparse_attention_cuda",
    "sparse_attention_masked",
}
FORMAT = "1"
_PREFIX = "hybrid_flex."


def package(
    model: HybridLanguageModel,
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    *,
    max_length: int = 4096,
    max_batch_size: int | None = None,
) -> Path:
    """Compile a language model's prefill and decoding step into one AOTInductor package.

    `load_package` runs it; so does torch alone, in Python and in C++ (`examples/cpp`)::

        from torch._inductor.package import load_package
        prefill, decode = load_package("model.pt2", "prefill"), load_package("model.pt2", "decode")
        logits, *states = prefill(ids)
        logits, *states = decode(token, *states)

    Args:
        model: the model, in evaluation mode; its weights are compiled in.
        path: a file name ending in ``.pt2``; missing folders are made, an older file is replaced.
        device: where the package will run: the model's own device, which is the default.
        max_length: tokens that every sequence may reach, prompt included: the size of the caches.
        max_batch_size: largest B; None for any.

    Returns:
        The path.

    Raises:
        TypeError: ``model`` is no `HybridLanguageModel`.
        ValueError: ``device`` is not the model's, the name does not end in ``.pt2``, or a size is not positive.
        RuntimeError: there is no C++ compiler, it fails, or torch cannot compile the loops of plain forms, which every
            package for a CPU holds: 2.13 can, 2.11 cannot.

    Device:
        CPU, for machines with the same vector instructions; CUDA, where all kernels travel inside, and only what no
        kernel serves (float64, selections of more than 8192, heads that are too wide) takes its plain form.

    Note:
        Compiling takes minutes: about half a minute for a layer, on two cores. On a CPU the weights of linear maps are
        packed for oneDNN, and each step has weights of its own: the file is two to three times the size of the model.

    Source:
        https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
    """
    op = "package"
    if not isinstance(model, HybridLanguageModel):
        raise TypeError(f"{op}: model must be a HybridLanguageModel, got {type(model).__name__}")
    own = next(model.parameters()).device
    device = own if device is None else torch.device(device)
    same = device.type == own.type and device.index in (None, own.index)
    check(same, op, "device", f"be {own.type}, where the model is", device)
    from torch._inductor.package import package_aoti

    with whole_file(op, path) as written:
        programs = {
            "prefill": export_prefill(model, max_length=max_length, max_batch_size=max_batch_size),
            "decode": export_decode(model, max_length=max_length, max_batch_size=max_batch_size),
        }
        about = {
            "format": FORMAT,
            "torch": torch.__version__,
            "device": device.type,
            "max_length": max_length,
            "max_batch_size": max_batch_size,
            "vocab_size": model.config.vocab_size,
            "num_states": len(traced_inputs(programs["decode"])) - 1,
        }
        files: dict[str, Any] = {name: _compiled(program, device.type, about) for name, program in programs.items()}
        package_aoti(str(written), files)
    return Path(path)


def _compiled(program: ExportedProgram, device: str, about: dict[str, Any]) -> list[str]:
    """Compile one program to the files of a package."""
    program = portable(program, flat=True) if device == "cpu" else _carrying_kernels(program)
    options: dict[str, Any] = {
        "aot_inductor.package": True,
        "aot_inductor.metadata": {_PREFIX + key: str(value) for key, value in about.items()},
        # Where a loop's result is overwritten in place, the C++ that torch 2.13 writes declares a name twice.
        "inplace_buffers": False,
        # Constants are folded, and on a CPU the weights of linear maps packed for oneDNN.
        "freezing": device == "cpu",
    }
    assert program.example_inputs is not None
    with torch.no_grad():
        module: Any = program.module(check_guards=False)
        files: Any = torch._inductor.aot_compile(module, program.example_inputs[0], options=options)
    return list(files)


def _carrying_kernels(program: ExportedProgram) -> ExportedProgram:
    """Write out what is no kernel, and flatten the states."""
    plain = with_plain_states(program, flat=True, length=LONG_LENGTH)
    return decomposed(plain, operators_of(plain) - CARRIED)


class Package:
    """A language model in an AOTInductor package, as `load_package` returns it.

    Attributes:
        max_length: tokens that a sequence may reach.
        max_batch_size: largest B, or None.
        device: "cpu" or "cuda".
        num_states: tensors that the states consist of.

    Called with ids ``[B, T]`` it gives ``logits [B, T, vocab_size]`` and the states, a tuple of tensors; `step` goes on
    from there, and `generate` does both.
    """

    def __init__(self, path: Path, about: dict[str, str], run_single_threaded: bool) -> None:
        # Torch's load_package would load both steps, weights included, to return one.
        from torch.export.pt2_archive._package import load_pt2

        self.device = about["device"]
        self.max_length = int(about["max_length"])
        self.max_batch_size = None if about["max_batch_size"] == "None" else int(about["max_batch_size"])
        self.num_states = int(about["num_states"])
        steps = load_pt2(str(path), run_single_threaded=run_single_threaded).aoti_runners
        self._prefill, self._decode = (steps[name] for name in STEPS)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Predict the token after each of ``ids``, int64 ``[B, T]``, from an empty past.

        Raises:
            ValueError: a shape or device does not fit, or T is larger than ``max_length``.
            TypeError: ``ids`` are not int64.
        """
        self._check("ids", ids, (None, None), "[B, T]")
        check(ids.shape[1] >= 1, "package", "ids", "hold at least one token per sequence", ids.shape[1])
        rule = f"hold at most max_length = {self.max_length} tokens per sequence"
        check(ids.shape[1] <= self.max_length, "package", "ids", rule, ids.shape[1])
        logits, *states = self._prefill(ids)
        return logits, tuple(states)

    @torch.no_grad()
    def step(self, ids_t: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Predict from one token per sequence, int64 ``[B] -> logits [B, vocab_size]``; caches are written in place.

        In a CUDA graph (``load_package(path, run_single_threaded=True)``), after one step outside of it, whose result
        is of no use but to load the kernels::

            token, states = torch.empty(B, dtype=torch.int64, device="cuda"), [x.clone() for x in states]
            with torch.cuda.graph(graph):
                logits, states_out = loaded.step(token, states)
                for old, new in zip(states, states_out, strict=True):
                    old.copy_(new)

        Then ``token.copy_(...)`` and ``graph.replay()`` advance ``states`` and write ``logits``.

        Raises:
            ValueError: a shape or device does not fit, or the states are of another batch size.
            TypeError: ``ids_t`` are not int64.
        """
        self._check("ids_t", ids_t, (None,), "[B]")
        check(len(states) == self.num_states, "package", "states", f"be {self.num_states} tensors", len(states))
        for state in states:
            same = state.shape[0] == ids_t.shape[0]
            check(same, "package", "states", f"hold {ids_t.shape[0]} sequences, as many as ids_t", state.shape[0])
            check_device("package", "states", state, ids_t.device)
        logits, *states_out = self._decode(ids_t, *states)
        return logits, tuple(states_out)

    def reserve(self, states: Sequence[Tensor], max_length: int) -> Sequence[Tensor]:
        """Check that the caches, whose size is fixed, hold ``max_length`` tokens; the states are what came in."""
        check(max_length <= self.max_length, "package", "max_length", f"be at most {self.max_length}", max_length)
        return states

    def generate(self, ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continue prompts ``[B, T]`` to ``[B, T + n]``; the options are those of `HybridLanguageModel.generate`.

        Raises:
            ValueError: an option is out of its range, or T + max_new_tokens is larger than ``max_length``.
        """
        chosen = sampling.SamplingOptions(**options)
        tokens = sampling.generate_stream(self, ids, max_new_tokens, chosen)
        return torch.cat([ids, *(token.unsqueeze(1) for token in tokens)], dim=1)

    def _check(self, name: str, ids: Tensor, shape: tuple[None, ...], legend: str) -> None:
        check_shape("package", name, ids, shape, legend)
        check_dtype("package", name, ids, (torch.int64,))
        check(ids.device.type == self.device, "package", name, f"be on {self.device}", ids.device)
        most = self.max_batch_size
        check(most is None or ids.shape[0] <= most, "package", name, f"hold at most {most} sequences", ids.shape[0])


def load_package(path: str | os.PathLike[str], *, run_single_threaded: bool = False) -> Package:
    """Load what `package` made, after a look at what it was made for.

    A package is machine code: load only what you would run.

    Args:
        path: a ``.pt2`` file.
        run_single_threaded: calls come from one thread at a time; on CUDA, `Package.step` can then be captured in a
            CUDA graph, which spares a step its launches. Elsewhere it says nothing.

    Returns:
        The model, callable.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or holds something else.
        RuntimeError: it was made with another version of torch, for a GPU where there is none, or for vector
            instructions that this CPU does not have.

    Device:
        That for which it was compiled.
    """
    op = "load_package"
    path = Path(path)
    check_whole(op, path, "package")
    about = _read_metadata(path)
    whole = set(about) == set(STEPS) and all(part.get(_PREFIX + "format") == FORMAT for part in about.values())
    check(whole, op, "path", "hold a package of prefill and decode", f"another kind of archive in {path}")
    ours = {key.removeprefix(_PREFIX): value for key, value in about["decode"].items() if key.startswith(_PREFIX)}
    same = ours["torch"] == torch.__version__
    _need(same, f"be run by the torch {ours['torch']} that compiled it", f"torch {torch.__version__}")
    if ours["device"] == "cuda":
        _need(torch.cuda.is_available(), "be run where there is a CUDA device", "none")
        major, minor = torch.cuda.get_device_capability()
        wanted = about["decode"].get("AOTI_COMPUTE_CAPABILITY", "")
        _need(wanted in ("", f"{major}{minor}"), f"be run on compute capability {wanted}", f"{major}{minor}")
    else:
        compiled = about["decode"].get("AOTI_CPU_ISA", "")
        here = str(torch._inductor.cpu_vec_isa.pick_vec_isa()).upper()
        _need(set(compiled.split()) <= set(here.split()), f"be run on a CPU with {compiled}", here)
    return Package(path, ours, run_single_threaded)


def _need(ok: bool, rule: str, value: str) -> None:
    if not ok:
        raise RuntimeError(f"load_package: path must {rule}, got {value}; make the package anew, here")


def _read_metadata(path: Path) -> dict[str, dict[str, str]]:
    """Read what the compiler and `package` wrote about each step, without loading machine code."""
    about: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            parts = name.split("/")
            if len(parts) == 5 and parts[1:3] == ["data", "aotinductor"] and name.endswith("wrapper_metadata.json"):
                about.setdefault(parts[3], {}).update(json.loads(archive.read(name)))
    return about
