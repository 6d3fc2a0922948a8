"""export_prefill, save and load: dynamic sizes, a fresh process, gradients, and one sentence for each bad file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hybrid_flex.checks import is_exporting
from hybrid_flex.export import export_prefill, load, save
from hybrid_flex.layers import (
    CausalAttention,
    DeepSeekSparseAttention,
    DeepSeekSparseMLA,
    KimiDeltaAttention,
    ParallelHybrid,
    SequentialHybrid,
)
from hybrid_flex.models import HybridBlock, HybridConfig, HybridLanguageModel, LayerWiseHybrid

SIZES = [(1, 1), (1, 5), (3, 64), (2, 131)]


def language_model(pattern: str = "KSRD", **options: Any) -> HybridLanguageModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_heads": 2, "topk": 8, "index_heads": 2, "index_head_dim": 8}
    return HybridLanguageModel(HybridConfig(pattern=pattern, **sizes, **options))


def ids_of(batch_size: int, length: int) -> Tensor:
    return (torch.arange(batch_size * length) * 7 % 50).view(batch_size, length)


def assert_same(got: object, want: object) -> None:
    got_leaves, got_form = pytree.tree_flatten(got)
    want_leaves, want_form = pytree.tree_flatten(want)
    assert got_form == want_form
    for a, b in zip(got_leaves, want_leaves, strict=True):
        torch.testing.assert_close(a, b)


def test_only_an_export_counts_as_one() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (1 if is_exporting() else 0)

    zero, asks = torch.zeros(2), Asks()
    assert asks(zero).sum() == torch.compile(asks, fullgraph=True, backend="eager")(zero).sum() == 0
    for strict in (True, False):
        assert torch.export.export(asks, (zero,), strict=strict).module()(zero).sum() == 2


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
def test_model_program_equals_the_model_at_other_sizes(strict: bool) -> None:
    model = language_model()
    module = export_prefill(model, strict=strict).module()
    for batch_size, length in SIZES:
        ids = ids_of(batch_size, length)
        assert_same(module(ids), model(ids))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "kda": lambda: KimiDeltaAttention(32, num_heads=2, head_dim=16),
    "dsa": lambda: DeepSeekSparseAttention(32, num_heads=2, topk=4, index_heads=2, index_head_dim=8),
    "mla": lambda: DeepSeekSparseMLA(
        32, 2, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=8, rope_dim=4, topk=4, index_heads=2, index_head_dim=8
    ),
    "sequential": lambda: SequentialHybrid(LAYERS["kda"](), LAYERS["mla"]()),  # type: ignore[arg-type]
    "parallel": lambda: ParallelHybrid(LAYERS["kda"](), LAYERS["dsa"]()),  # type: ignore[arg-type]
    "block": lambda: HybridBlock(language_model("KS").config, "S"),
    "stack": lambda: LayerWiseHybrid(language_model("KS").config),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_program_equals_the_layer_at_other_sizes(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    module = export_prefill(layer).module()
    for batch_size, length in SIZES:
        x = torch.randn(batch_size, length, 32)
        assert_same(module(x), layer(x))


def test_hybrid_program_keeps_the_gradients() -> None:
    torch.manual_seed(0)
    layer = SequentialHybrid(LAYERS["kda"](), LAYERS["dsa"]())  # type: ignore[arg-type]
    module = export_prefill(layer).module()
    x = torch.randn(2, 9, 32, requires_grad=True)

    def gradients(function: nn.Module) -> dict[str, Tensor | None]:
        parameters = dict(function.named_parameters())
        found = torch.autograd.grad(function(x)[0].square().sum(), [x, *parameters.values()], allow_unused=True)
        return dict(zip(["x", *parameters], found, strict=True))

    got, want = gradients(module), gradients(layer)
    assert sum(value is not None for value in want.values()) > len(want) // 2
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_dtype_follows_the_parameters() -> None:
    layer = LAYERS["kda"]().to(torch.bfloat16)
    y, state = export_prefill(layer).module()(torch.randn(2, 7, 32, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and state.S.dtype == torch.float32


def test_fixed_sizes_then_open_ones_in_one_process() -> None:
    model = language_model("KS")
    fixed = export_prefill(model, batch_size=1, seq_len=6, dynamic=False)
    assert_same(fixed.module()(ids_of(1, 6)), model(ids_of(1, 6)))
    with pytest.raises(AssertionError):
        fixed.module()(ids_of(2, 6))
    # An example of size 1 must not fix the size.
    opened = export_prefill(model, batch_size=1, seq_len=1)
    assert_same(opened.module()(ids_of(2, 9)), model(ids_of(2, 9)))


FRESH_LOAD = """
import sys, torch
from hybrid_flex.export import load
module = load(sys.argv[1]).module()
from torch.utils import _pytree as pytree
for (batch_size, length), want in torch.load(sys.argv[2]).items():
    ids = (torch.arange(batch_size * length) * 7 % 50).view(batch_size, length)
    logits, states = module(ids)
    for got, expected in zip(pytree.tree_leaves((logits, states)), want, strict=True):
        torch.testing.assert_close(got, expected)
print(*[type(state).__name__ for state in states])
"""


def test_saved_program_runs_in_a_fresh_process(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    model = language_model()
    save(export_prefill(model), tmp_path / "new folder" / "model.pt2")
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["model.pt2"]
    with torch.no_grad():
        expected = {size: pytree.tree_leaves(model(ids_of(*size))) for size in SIZES}
    torch.save(expected, tmp_path / "expected.pt")
    printed = fresh_process(FRESH_LOAD, tmp_path / "new folder" / "model.pt2", tmp_path / "expected.pt")
    assert printed.split() == ["KDAState", "DSAState", "DSAState", "KVState"]


FRESH_LOAD_LAYERS = """
import sys, torch
from pathlib import Path
from hybrid_flex.export import load
from torch.utils import _pytree as pytree
for path in sorted(Path(sys.argv[1]).glob("*.pt2")):
    module = load(path).module()
    for x, want in torch.load(path.with_suffix(".pt")):
        for got, expected in zip(pytree.tree_leaves(module(x)), want, strict=True):
            torch.testing.assert_close(got, expected)
    print(path.stem)
"""


def test_every_layer_runs_in_a_fresh_process(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    for name, make in LAYERS.items():
        torch.manual_seed(0)
        layer = make()
        save(export_prefill(layer), tmp_path / f"{name}.pt2")
        inputs = [torch.randn(batch_size, length, 32) for batch_size, length in SIZES]
        with torch.no_grad():
            torch.save([(x, pytree.tree_leaves(layer(x))) for x in inputs], tmp_path / f"{name}.pt")
    assert fresh_process(FRESH_LOAD_LAYERS, tmp_path).split() == sorted(LAYERS)


FRESH_GRADIENTS = """
import sys, torch
from pathlib import Path
from hybrid_flex.export import load
for path in sorted(Path(sys.argv[1]).glob("*.pt2")):
    module = load(path).module()
    x, output_gradient, wanted = torch.load(path.with_suffix(".pt"))
    y, _ = module(x)
    parameters = dict(module.named_parameters())
    assert parameters.keys() == wanted.keys(), path.stem
    found = torch.autograd.grad(y, list(parameters.values()), output_gradient, allow_unused=True)
    for (name, want), got in zip(wanted.items(), found, strict=True):
        if want is None:
            assert got is None, name
        else:
            torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{path.stem} {name}: {m}")
    print(path.stem, sum(got is not None for got in found))
"""


def test_gradients_of_loaded_programs_in_a_fresh_process(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    """By name: whoever gets the file can fine-tune the weights in it."""
    learning: dict[str, int] = {}
    for name, make in {**LAYERS, "model": language_model}.items():
        torch.manual_seed(0)
        module: nn.Module = make()
        save(export_prefill(module), tmp_path / f"{name}.pt2")
        x = ids_of(2, 75) if name == "model" else torch.randn(2, 75, 32)
        y = module(x)[0]
        output_gradient, parameters = torch.randn_like(y), dict(module.named_parameters())
        gradients = torch.autograd.grad(y, list(parameters.values()), output_gradient, allow_unused=True)
        wanted = dict(zip(parameters, gradients, strict=True))
        # The indexers learn from their own loss, which a prefill does not compute; everything else does here.
        assert all((want is None) == ("indexer" in n) for n, want in wanted.items()), name
        learning[name] = sum(want is not None for want in wanted.values())
        torch.save((x, output_gradient, wanted), tmp_path / f"{name}.pt")
    printed = fresh_process(FRESH_GRADIENTS, tmp_path).splitlines()
    assert dict(line.split() for line in printed) == {name: str(count) for name, count in learning.items()}


BOUNDED = ["kda", "dsa", "mla", "parallel", "stack"]


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize(("max_batch_size", "max_seq_len"), [(4, 100), (None, 65), (1, None), (3, 1)])
def test_bounds_hold(name: str, max_batch_size: int | None, max_seq_len: int | None) -> None:
    """Bounds that are no multiple of a chunk or block, and those of one."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    module = export_prefill(layer, max_batch_size=max_batch_size, max_seq_len=max_seq_len).module()
    for batch_size in {1, max_batch_size or 5}:
        for length in {1, max_seq_len or 131}:
            x = torch.randn(batch_size, length, 32)
            assert_same(module(x), layer(x))
    if max_batch_size is not None:
        with pytest.raises((AssertionError, RuntimeError), match=rf"x.size\(\)\[0\] [<=]= {max_batch_size}"):
            module(torch.randn(max_batch_size + 1, 1, 32))
    if max_seq_len is not None:
        with pytest.raises((AssertionError, RuntimeError), match=rf"x.size\(\)\[1\] [<=]= {max_seq_len}"):
            module(torch.randn(1, max_seq_len + 1, 32))


@pytest.mark.parametrize("sparse_attention", ["gqa", "mla"])
def test_bounds_of_two(sparse_attention: str) -> None:
    """The smallest range that is no constant."""
    model = language_model(sparse_attention=sparse_attention, rope_dim=4)
    module = export_prefill(model, max_batch_size=2, max_seq_len=2).module()
    for size in ((1, 1), (1, 2), (2, 1), (2, 2)):
        assert_same(module(ids_of(*size)), model(ids_of(*size)))
    with pytest.raises((AssertionError, RuntimeError), match=r"ids.size\(\)\[0\] <= 2"):
        module(ids_of(3, 2))


@pytest.mark.parametrize("sparse_attention", ["gqa", "mla"])
def test_pooled_keys_take_prompts_shorter_than_a_pool(sparse_attention: str) -> None:
    model = language_model("KS", sparse_attention=sparse_attention, index_kpool=4)
    module = export_prefill(model).module()
    for length in (1, 2, 3, 4, 5, 7, 8, 9, 30, 131):
        for batch_size in (1, 3):
            assert_same(module(ids_of(batch_size, length)), model(ids_of(batch_size, length)))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def program() -> torch.export.ExportedProgram:
    return torch.export.export(Twice(), (torch.ones(3),))


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "twice.pt2"
    save(program(), path)
    before = path.read_bytes()

    def fail(program: object, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        save(program(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["twice.pt2"]


def test_save_messages(tmp_path: Path) -> None:
    with pytest.raises(TypeError) as wrong_type:
        save(Twice(), tmp_path / "model.pt2")  # type: ignore[arg-type]
    assert str(wrong_type.value) == "save: program must be a torch.export.ExportedProgram, got Twice"
    with pytest.raises(ValueError) as wrong_name:
        save(program(), tmp_path / "model.pt")
    assert str(wrong_name.value) == f"save: path must end in .pt2, got {tmp_path / 'model.pt'}"


def test_load_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path / "absent.pt2")
    assert str(caught.value) == f"load: path must name an existing file, got {tmp_path / 'absent.pt2'}"


def truncated(path: Path) -> None:
    save(program(), path)
    path.write_bytes(path.read_bytes()[:-200])


def text(path: Path) -> None:
    path.write_text("no program at all")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def checkpoint(path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, path)


def damaged(path: Path) -> None:
    save(export_prefill(LAYERS["kda"]()), path)
    with zipfile.ZipFile(path) as archive:
        weights = max(archive.infolist(), key=lambda i: i.file_size if "data/weights" in i.filename else 0)
    content = bytearray(path.read_bytes())
    # The data of a member starts behind its header of 30 bytes, its name, and padding to 64 bytes.
    content[weights.header_offset + 30 + len(weights.filename) + 64 + weights.file_size // 2] ^= 0xFF
    path.write_bytes(content)


def other_version(path: Path) -> None:
    change(path, program(), b'"graph_module"', b'"graph_of_9.9"')


def other_states(path: Path) -> None:
    change(path, export_prefill(LAYERS["kda"]()), b"hybrid_flex.KDAState", b"hybrid_flex.KDAStuff")


def change(path: Path, program: torch.export.ExportedProgram, before: bytes, after: bytes) -> None:
    """Save a program with other words in the description of its graph."""
    save(program, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(before, after))


BAD_FILES = {
    truncated: "path must hold a whole exported program, got a truncated or foreign file in {path}",
    text: "path must hold a whole exported program, got a truncated or foreign file in {path}",
    empty: "path must hold a whole exported program, got a truncated or foreign file in {path}",
    checkpoint: "path must hold an exported program, got another kind of archive in {path}",
    damaged: "path must hold a whole exported program, got damaged",
    other_states: f"path must hold a program that torch {torch.__version__} can read, got a damaged file, or one of "
    "another version of torch or hybrid_flex, in {path}",
    other_version: f"path must hold a program that torch {torch.__version__} can read, got a damaged file, or one of "
    "another version of torch or hybrid_flex, in {path}",
}


@pytest.mark.parametrize("spoil", BAD_FILES, ids=lambda f: f.__name__)
def test_load_of_a_bad_file(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    spoil(path)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).startswith("load: " + BAD_FILES[spoil].format(path=path))
    assert "\n" not in str(caught.value)


def test_load_with_an_unknown_operator(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    source = """
import sys, torch
from hybrid_flex.export import save
@torch.library.custom_op("stranger::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
twice.register_fake(torch.empty_like)
class Module(torch.nn.Module):
    def forward(self, x):
        return twice(x)
save(torch.export.export(Module(), (torch.ones(3),)), sys.argv[1])
"""
    path = tmp_path / "stranger.pt2"
    fresh_process(source, path)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value) == (
        "load: path must hold a program of registered operators (first import the package that registers them), "
        f"got one that needs stranger::twice in {path}"
    )


PLAIN_LOAD = """
import sys, torch
try:
    torch.export.load(sys.argv[1])
except Exception as error:
    assert not any(name.startswith("hybrid_flex") for name in sys.modules)
    print(type(error).__name__)
"""


@pytest.mark.parametrize("name", ["kda", "dsa", "model", "dense"])
def test_a_process_without_this_library_gets_an_error(
    name: str, tmp_path: Path, fresh_process: Callable[..., str]
) -> None:
    """Operators or states are unknown there: no program comes out that could compute something else."""
    makers: dict[str, Callable[[], nn.Module]] = {**LAYERS, "model": language_model}
    module = makers[name]() if name in makers else CausalAttention(32, 4)
    save(export_prefill(module), tmp_path / "program.pt2")
    assert fresh_process(PLAIN_LOAD, tmp_path / "program.pt2").split() in (["RuntimeError"], ["ValueError"])


def test_export_messages() -> None:
    for keyword in ("batch_size", "seq_len", "max_batch_size", "max_seq_len"):
        with pytest.raises(ValueError) as size:
            export_prefill(language_model("K"), **{keyword: 0})  # type: ignore[arg-type]
        assert str(size.value) == f"export_prefill: {keyword} must be positive, got 0"
    with pytest.raises(ValueError) as bound:
        export_prefill(language_model("K"), dynamic=False, max_seq_len=9)
    assert str(bound.value) == "export_prefill: max_seq_len must be None with dynamic=False, got 9"
    with pytest.raises(ValueError) as foreign:
        export_prefill(nn.Linear(3, 3))
    assert str(foreign.value) == (
        "export_prefill: model must be a HybridLanguageModel, or a layer with a hidden_size, got Linear"
    )
    with pytest.raises(TypeError, match="unexpected keyword"):
        export_prefill(language_model("K"), length=3)  # type: ignore[call-arg]


def test_poisoned_memory(nan_memory: None) -> None:
    logits, states = export_prefill(language_model()).module()(ids_of(2, 70))
    assert all(leaf.isfinite().all() for leaf in pytree.tree_leaves((logits, states)))


@pytest.mark.gpu
def test_cuda_program(tmp_path: Path) -> None:
    model = language_model().cuda()
    save(export_prefill(model), tmp_path / "model.pt2")
    ids = ids_of(3, 40).cuda()
    assert_same(load(tmp_path / "model.pt2").module()(ids), model(ids))


@pytest.mark.gpu
def test_cuda_package_runs_without_our_code(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    """AOTInductor's package holds the kernels; a process that knows nothing of this library runs it."""
    torch.manual_seed(0)
    run = """
import sys
import torch
x, want = torch.load(sys.argv[2])
y = torch._inductor.aoti_load_package(sys.argv[1])(x)
assert not any(name.startswith("hybrid_flex") for name in sys.modules)
print(((y - want).float().norm() / want.float().norm()).item())
"""

    def error(module: nn.Module, program: torch.export.ExportedProgram, x: Tensor) -> float:
        package, expected = tmp_path / "package.pt2", tmp_path / "expected.pt"
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        torch.save((x, module(x)), expected)
        return float(fresh_process(run, package, expected))

    # A compiler that links no libstdc++ makes packages that crash a fresh process while it loads them, a softmax's too;
    # the environment variable CXX names another.
    x = torch.randn(3, 100, 128, device="cuda", dtype=torch.bfloat16)
    softmax = nn.Softmax(-1)
    try:
        error(softmax, torch.export.export(softmax, (x,)), x)
    except AssertionError:
        pytest.skip("this machine's C++ compiler makes no package that a fresh process can load: set CXX to another")
    layer = OutputAlone(KimiDeltaAttention(128, 2, 64)).cuda().to(torch.bfloat16).requires_grad_(False)
    assert error(layer, torch.export.export(layer, (x,)), x) < 1e-2


class OutputAlone(nn.Module):
    """A layer without its state, whose class a process that knows nothing of this library cannot make."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y
