"""Time one model in every form that it can be run in: eager, compiled, exported, and packaged by AOTInductor.

    python profiles/export.py

Prefill of a prompt and single decoding steps of a `HybridLanguageModel`, by
  eager      the model itself; a step goes on from caches of fixed size.
  compiled   torch.compile(fullgraph=True, dynamic=True), at its first call for as long as that takes.
  opaque     the program of export_prefill or export_decode, saved and loaded: our operators are single nodes.
  portable   its portable form: PyTorch's operators only, run one by one.
  package    the AOTInductor package of both steps.
  graph, package-graph   the eager step, and the package's, in a CUDA graph (decoding on a GPU).
How long each took to make, and what its file holds against the bytes of the parameters, stands in a second table.

Correctness comes first: a form whose logits are further than rounding from those of the eager model, in float32 where
the model is in 16 bits, shows FAIL and no time (NOTE [Bounds]).  The contenders then take turns in one process; the
median, 20th and 80th percentile of their times.  The tables go to profiles/results/export_<device>_<yyyymmdd>.md,
everything measured to the .json beside it, after each of the two steps.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import (
    RESULTS,
    Clock,
    Plan,
    progress,
    relative_error,
    report_stem,
    spread,
    table,
    take_turns,
    write_report,
)
from machine import facts_of_run, heading
from model_options import add_model_options, make_model
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from hybrid_flex import HybridLanguageModel, export
from hybrid_flex.export.portable import to_tuples

FORMS = ("eager", "compiled", "opaque", "portable", "package", "graph", "package-graph")
STEPS = ("prefill", "decode")
# NOTE [Bounds]
# Errors are relative L2 errors of logits.  In float32 and float64 a form may be this far from the eager model: rounding
# does not explain it in the logits themselves, where float32 loses 1e-6, but in the scores of indexers, which then
# select another key in a few rows of a hundred (1e-3 with three indexers).
TOLERANCE = {torch.float32: 5e-3, torch.float64: 1e-3}
# In 16 bits the eager model is itself several hundredths from its float32 copy after twelve layers, so another order of
# rounding can be as far from it: a form's error against that copy may be this many times the eager model's.
TIMES_EAGER = 1.25

Logits = Callable[[], Tensor]


class Forms:
    """Make the forms of a model, noting the seconds and bytes that each takes."""

    def __init__(
        self, model: HybridLanguageModel, ids: Tensor, max_length: int, folder: Path, package_path: Path | None = None
    ) -> None:
        self.model, self.ids, self.max_length, self.folder = model, ids, max_length, folder
        self.package_path = package_path or folder / "package.pt2"
        self.made: dict[str, dict[str, float]] = {}
        self.loaded: export.Package | None = None
        with torch.no_grad():
            self.states = model(ids)[1]

    def reference(self, step: str) -> Tensor:
        """Compute the logits that all forms are compared with."""
        if next(self.model.parameters()).dtype in TOLERANCE:
            return self.eager(step)()
        model = copy.deepcopy(self.model).float()
        return Forms(model, self.ids, self.max_length, self.folder).eager(step)()

    def make(self, form: str, step: str) -> Logits:
        """Return what computes the logits of a step in a form."""
        calls: dict[str, Callable[[str], Logits]] = {
            "eager": self.eager,
            "compiled": self.compiled,
            "opaque": lambda step: self.program(step, portable=False),
            "portable": lambda step: self.program(step, portable=True),
            "package": self.package,
            "graph": lambda step: self.graph(self.eager(step)),
            "package-graph": lambda step: self.graph(self.package(step)),
        }
        begin = time.perf_counter()
        call = calls[form](step)
        call()
        # One file serves both steps of a package, and is made with the first.
        known = self.made.setdefault(form if form == "package" else f"{form} {step}", {"seconds": 0.0})
        if "seconds" in known:
            known["seconds"] += time.perf_counter() - begin
        return call

    def eager(self, step: str) -> Logits:
        return self._run(self.model if step == "prefill" else self.model.step, step)

    def compiled(self, step: str) -> Logits:
        function = self.model.forward if step == "prefill" else self.model.step
        return self._run(torch.compile(function, fullgraph=True, dynamic=True), step)

    def program(self, step: str, portable: bool) -> Logits:
        begin = time.perf_counter()
        if step == "prefill":
            program = export.export_prefill(self.model)
        else:
            program = export.export_decode(self.model, max_length=self.max_length)
        program = export.portable(program) if portable else program
        export_seconds = time.perf_counter() - begin
        path = self.folder / "program.pt2"
        export.save(program, path)
        name = f"{'portable' if portable else 'opaque'} {step}"
        self.made[name] = {"seconds": 0.0, "export_seconds": export_seconds, "bytes": path.stat().st_size}
        return self._run(export.load(path).module(), step, to_tuples(self.reserved()) if portable else None)

    def package(self, step: str) -> Logits:
        if self.loaded is None:
            path, made = self.package_path, {"seconds": 0.0}
            if path.exists():
                made = {}  # elsewhere
            else:
                export.package(self.model, path, max_length=self.max_length)
            self.made["package"] = {**made, "bytes": path.stat().st_size}
            self.loaded = export.load_package(path, run_single_threaded=True)
        loaded = self.loaded
        return self._run(loaded if step == "prefill" else loaded.step, step, loaded(self.ids)[1])

    def graph(self, call: Logits) -> Logits:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = call()

        def replay(states_of: Logits = call) -> Tensor:  # the graph reads them, and does not keep them alive
            graph.replay()
            return logits

        return replay

    def reserved(self) -> Any:
        """Make caches with room, behind the prompt."""
        return self.model.reserve(self.states, self.max_length)

    def _run(self, function: Callable[..., Any], step: str, states: Any = None) -> Logits:
        if step == "prefill":

            @torch.no_grad()
            def prefill() -> Tensor:
                return function(self.ids)[0]

            return prefill
        states = self.reserved() if states is None else states
        token, length = self.ids[:, -1], self.ids.shape[1]
        # Every call is the first step behind the prompt.
        lengths = [x for x in pytree.tree_leaves(states) if x.dtype == torch.int32]

        @torch.no_grad()
        def decode() -> Tensor:
            for held in lengths:
                held.fill_(length)
            return function(token, states)[0]

        return decode


def measure(
    model: HybridLanguageModel, options: argparse.Namespace, show: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Make and time every form that was asked for; yield what is known after each step."""
    device = next(model.parameters()).device
    ids = torch.randint(model.config.vocab_size, (options.batch_size, options.length), device=device)
    plan = Plan(min_rounds=5, min_seconds=options.seconds, max_seconds=4 * options.seconds, warm_up_rounds=1)
    found: dict[str, Any] = {"steps": {}}
    with tempfile.TemporaryDirectory() as folder:
        forms = Forms(model, ids, options.length + options.room, Path(folder), options.package)
        for step in options.steps:
            calls: dict[str, Logits] = {}
            errors: dict[str, float] = {}
            reference = forms.reference(step)
            for form in options.forms:
                if "graph" in form and (step == "prefill" or device.type != "cuda"):
                    continue
                show(f"{step}: {form}")
                calls[form] = forms.make(form, step)
                errors[form] = relative_error(calls[form](), reference)
                bound = TOLERANCE.get(model.embedding.weight.dtype, TIMES_EAGER * errors["eager"])
                if not errors[form] <= bound:
                    progress(f"{step}: {form} has an error of {errors[form]:.1e}, more than {bound:.1e}: not timed")
                    del calls[form]
            show(f"{step}: timing")
            seconds = take_turns(calls, Clock(device), plan)
            found["steps"][step] = {form: {"error": error} for form, error in errors.items()}
            for form, own in seconds.items():
                found["steps"][step][form] |= spread(own) | {"repeats": len(own)}
            found["made"] = forms.made
            yield found


TIMES = {"form": "---", "ms": "---:", "against eager": "---:", "error": "---:"}
MADE = {"made": "---", "exporting, s": "---:", "all, s": "---:", "MB": "---:", "of the parameters": "---:"}


def markdown(result: dict[str, Any]) -> str:
    """Write the results as a Markdown document."""
    lines = [
        *heading("One model in every form that it can be run in", result),
        ", ".join(f"{key} {value}" for key, value in result["model"].items()) + ".",
        "Median (20th to 80th percentile) of calls that take turns. Error: relative L2 of the logits, against "
        "eager, in float32 where the model is in 16 bits.",
    ]
    for step, forms in result["steps"].items():
        rows = [
            [
                form,
                f"{own['median_ms']:.2f} ({own['p20_ms']:.2f}-{own['p80_ms']:.2f})",
                f"{forms['eager']['median_ms'] / own['median_ms']:.2f}x",
                f"{own['error']:.1e}",
            ]
            if "median_ms" in own
            else [form, "FAIL", "", f"{own['error']:.1e}"]
            for form, own in forms.items()
        ]
        lines += ["", f"## {step}", "", *table(TIMES, rows)]
    rows = []
    for name, own in result["made"].items():
        size = own.get("bytes")
        share = "" if size is None else f"{size / result['model']['parameter_bytes']:.3f}"
        export_seconds = f"{own['export_seconds']:.1f}" if "export_seconds" in own else ""
        seconds = f"{own['seconds']:.1f}" if "seconds" in own else "made before"
        rows.append([name, export_seconds, seconds, "" if size is None else f"{size / 1e6:.1f}", share])
    lines += [
        "",
        "## What they cost",
        "",
        "Seconds until the program was there, and until the first call had ended; size of the file.",
        "",
    ]
    return "\n".join([*lines, *table(MADE, rows)]) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="besides eager; default: all")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: both")
    model_size = {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "vocab_size": 8192, "topk": 256}
    add_model_options(parser, **model_size, length=2048)
    parser.add_argument("--room", type=int, default=2048, help="tokens that may follow it (default: %(default)s)")
    parser.add_argument(
        "--package", type=Path, help="a package of this model, to be measured; made there if there is none"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="to spend per time, at least (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables (default: profiles/results)")
    options = parser.parse_args()
    options.forms = ["eager", *(form for form in FORMS[1:] if form in options.forms)]
    return options


def main() -> None:
    options = parse()
    begin = time.perf_counter()
    model, shape = make_model(options)
    model = model.eval().requires_grad_(False)
    result: dict[str, Any] = {
        **facts_of_run("export.py", model.embedding.weight.device),
        "model": shape,
    }
    with tqdm(total=len(options.steps) * (len(options.forms) + 1), file=sys.stderr) as bar:

        def show(text: str) -> None:
            bar.set_description(text)
            bar.update()

        stem = report_stem(options.out, "export", result["machine"]["name"])
        for found in measure(model, options, show):
            result |= found
            result["seconds"] = time.perf_counter() - begin
            write_report(stem, result, markdown(result))
    print(markdown(result))
    progress(f"written to {stem}.md and .json")
    failed = [f"{step} {form}" for step, own in result["steps"].items() for form in own if "median_ms" not in own[form]]
    if failed:
        raise SystemExit(f"more than rounding: {', '.join(failed)}")


if __name__ == "__main__":
    main()
