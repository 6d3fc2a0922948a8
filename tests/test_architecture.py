"""Enforce the import line, by reading the imports of every module with ast:

checks <- kernels <- ops <- layers <- models <- export, profiling, distributed, integrations
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "hybrid_flex"
MODULES = sorted(PACKAGE.rglob("*.py"))
LADDER = ["checks", "kernels", "ops", "layers", "models"]
TOP_ROOMS = ["export", "profiling", "distributed", "integrations"]
ALLOWED = {room: set(LADDER[: i + 1]) for i, room in enumerate(LADDER)} | {room: {*LADDER, room} for room in TOP_ROOMS}
MAX_LINES = 500


@dataclass(frozen=True)
class Import:
    """One imported module: its absolute dotted name, the line, and whether the import runs inside a function."""

    name: str
    line: int
    inside_function: bool
    type_checking: bool


def dotted(path: Path) -> str:
    """Name the module that ``path`` holds."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """Name the room of a module of the package; the package itself is the room ""."""
    return [*module.split("."), ""][1]


NAMES = {dotted(path) for path in MODULES}


def imports_of(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Yield every import of ``source``; ``from a import b`` names ``a.b`` where that is a module of the package."""

    def visit(node: ast.AST, inside: bool, checking: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, inside, checking)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # `from hybrid_flex import ops` names the room also where the room is only planned.
                known = full in NAMES or (base == "hybrid_flex" and alias.name in {*LADDER, *TOP_ROOMS})
                yield Import(full if known else base, node.lineno, inside, checking)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(argument.value, node.lineno, inside, checking)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, checking or (is_checking and child in node.body))

    yield from visit(ast.parse(source), False, False)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """List what the imports of ``source`` break of the house rules."""
    here = room(module)
    found = []

    def complain(imported: Import, why: str) -> None:
        found.append(f"{module}:{imported.line} imports {imported.name}: {why}")

    for imported in imports_of(source, module, is_package):
        top = imported.name.split(".")[0]
        if top == "triton" and here != "kernels":
            complain(imported, "Triton belongs in kernels/ only")
        if top == "transformers" and module != "hybrid_flex.integrations.transformers":
            complain(imported, "transformers belongs in integrations/transformers.py only")
        if top in ("fla", "flash_linear_attention", "attn_gym"):
            complain(imported, "the package depends on no other attention library")
        if top in ("matplotlib", "tqdm", "tensorboard") and not imported.inside_function:
            complain(imported, "import hybrid_flex must not load it")
        if top != "hybrid_flex":
            continue
        there = room(imported.name)
        if here == "":
            continue  # hybrid_flex/__init__.py gathers the public names of all rooms
        if there == "":
            complain(imported, "import from the room, not from the package that gathers the rooms")
        elif there not in ALLOWED[here]:
            complain(imported, f"{here} stands left of {there} or beside it")
        elif there == "kernels" and here != "kernels" and not (imported.inside_function or imported.type_checking):
            complain(imported, "kernels are imported inside functions, so that Triton stays optional")
        if module.endswith(".reference") and there == here:
            complain(imported, "a reference imports no sibling")
    return found


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_keep_the_line(path: Path) -> None:
    assert not violations(path.read_text(), dotted(path), path.name == "__init__.py")


def test_every_module_stands_in_a_known_room() -> None:
    assert {room(name) for name in NAMES} <= {"", *ALLOWED}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_module_is_neither_a_drawer_nor_empty_nor_too_long(path: Path) -> None:
    assert path.stem not in ("utils", "util", "common", "helpers", "misc")
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_LINES
    body = ast.parse(source).body
    if path.name == "__init__.py":
        siblings = [
            p for p in path.parent.iterdir() if p != path and (p.suffix == ".py" or (p / "__init__.py").exists())
        ]
        assert body or siblings, "an empty placeholder package"
    else:
        assert any(not isinstance(n, ast.Expr | ast.Import | ast.ImportFrom) for n in body), "an empty placeholder"


def test_tests_mirror_the_package() -> None:
    tests = Path(__file__).parent
    for path in tests.rglob("test_*.py"):
        folder = path.parent.relative_to(tests)
        # Tests of the whole (examples, README) stand at the top; below it every folder is a folder of the package.
        assert folder == Path() or (PACKAGE / folder).is_dir(), f"{folder} is no room of the package"


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("hybrid_flex.checks", "from hybrid_flex.ops import kda", "stands left of ops"),
        ("hybrid_flex.ops.kda.chunk", "from hybrid_flex import layers", "stands left of layers"),
        ("hybrid_flex.ops.kda.chunk", "from ...models import HybridConfig", "stands left of models"),
        ("hybrid_flex.ops.kda.chunk", "from hybrid_flex.kernels.kda import launch", "inside functions"),
        ("hybrid_flex.ops.kda.chunk", "def f():\n    import triton", "Triton belongs"),
        ("hybrid_flex.ops.kda.chunk", "import torch\nfrom triton.language import exp", "Triton belongs"),
        ("hybrid_flex.ops.kda.reference", "from .gate import kda_gate", "imports no sibling"),
        ("hybrid_flex.ops.kda.reference", "from . import gate", "imports no sibling"),
        ("hybrid_flex.export.programs", "from hybrid_flex.profiling import trace", "beside it"),
        ("hybrid_flex.models.language_model", "import hybrid_flex", "gathers the rooms"),
        ("hybrid_flex.layers.kda", "def f():\n    from transformers import AutoModel", "integrations/transformers.py"),
        ("hybrid_flex.integrations.transformers", "import fla", "no other attention library"),
        ("hybrid_flex.profiling.trace", "import matplotlib.pyplot as plt", "must not load it"),
    ],
)
def test_the_walker_sees_a_violation(module: str, source: str, complaint: str) -> None:
    assert any(complaint in line for line in violations(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hybrid_flex.ops.kda.chunk", "def f():\n    from hybrid_flex.kernels.kda.chunk import launch"),
        ("hybrid_flex.ops.kda.chunk", "from hybrid_flex.checks import check\nfrom .gate import kda_gate"),
        ("hybrid_flex.ops.kda.reference", "import torch\nfrom hybrid_flex.checks import check"),
        ("hybrid_flex.kernels.kda.chunk", "import triton\nimport triton.language as tl"),
        ("hybrid_flex.export.programs", "from hybrid_flex.models import HybridLanguageModel"),
        ("hybrid_flex.integrations.transformers", "import transformers"),
        ("hybrid_flex", "from hybrid_flex import export, layers, ops"),
    ],
)
def test_the_walker_lets_the_rest_pass(module: str, source: str) -> None:
    assert not violations(source, module, is_package=module == "hybrid_flex")


def test_what_is_silently_wrong_in_torch_and_triton_is_not_used() -> None:
    # Gradients through torch's while_loop are wrong unless every carry requires one; a scan has a backward of our own.
    # Triton's interpreter computes garbage in bfloat16: what runs under it must be float32 or float16.
    root = Path(__file__).resolve().parent.parent
    for path in sorted((root / "hybrid_flex").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {node.id for node in nodes if isinstance(node, ast.Name)}
        assert "while_loop" not in names, path
    for path in sorted((root / "tests").rglob("*.py")):
        source = path.read_text()
        if path != Path(__file__).resolve() and "TRITON_INTERPRET" in source:
            assert "bfloat16" not in source, path
