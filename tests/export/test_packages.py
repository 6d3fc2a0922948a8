"""AOTInductor packages: what they compute, with this library and without, and a sentence for each bad file or input."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_flex.export import Package, export_decode, export_prefill, load_package, package, packages, save
from hybrid_flex.export.portable import operators_of
from hybrid_flex.export.programs import traced_inputs
from hybrid_flex.models import HybridConfig, HybridLanguageModel
from hybrid_flex.ops.dsa import attention

MAX_LENGTH = 160
# Around chunks and blocks of 64, where the code that was compiled pads.
SIZES = [(1, 1), (2, 63), (1, 64), (3, 65), (2, 131), (1, MAX_LENGTH)]


def language_model(pattern: str = "KS", **options: object) -> HybridLanguageModel:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=50, hidden_size=32, num_heads=2, pattern=pattern, topk=8, index_heads=2, index_head_dim=8, **options
    )
    model = HybridLanguageModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # or every step would predict the same token
    return model


def ids_of(batch_size: int, length: int) -> Tensor:
    return (torch.arange(batch_size * length) * 7 % 50).view(batch_size, length)


@pytest.fixture(scope="session")  # a module's tests need not run in a row
def packaged(loops_compile: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[HybridLanguageModel, Path]:
    """Compile one package, which takes most of a minute, for all tests of a worker."""
    model = language_model()
    path = tmp_path_factory.mktemp("package") / "new folder" / "model.pt2"
    assert package(model, path, "cpu", max_length=MAX_LENGTH, max_batch_size=4) == path
    assert [file.name for file in path.parent.iterdir()] == ["model.pt2"]
    return model, path


TORCH_ALONE = """
import sys
sys.modules["hybrid_flex"] = None
import torch
from torch._inductor.package import load_package
prefill, decode = load_package(sys.argv[1], "prefill"), load_package(sys.argv[1], "decode")
for ids, want, generated in torch.load(sys.argv[2]):
    logits, *states = prefill(ids)
    torch.testing.assert_close(logits, want)
    tokens = [ids, logits[:, -1:].argmax(-1)]
    while sum(x.shape[1] for x in tokens) < generated.shape[1]:
        logits, *states = decode(tokens[-1][:, 0], *states)
        tokens.append(logits.argmax(-1)[:, None])
    assert torch.equal(torch.cat(tokens, 1)[:, :generated.shape[1]], generated)
print("same")
"""


def write_expected(model: HybridLanguageModel, path: Path, new_tokens: int = 20) -> None:
    expected = []
    for size in SIZES:
        ids = ids_of(*size).to(next(model.parameters()).device)
        room = min(new_tokens, MAX_LENGTH - ids.shape[1])
        with torch.no_grad():
            expected.append((ids, model(ids)[0], model.generate(ids, room, greedy=True)))
    torch.save(expected, path)


def test_a_process_with_torch_alone_generates(
    packaged: tuple[HybridLanguageModel, Path], tmp_path: Path, fresh_process: Callable[..., str]
) -> None:
    model, path = packaged
    write_expected(model, tmp_path / "expected.pt")
    assert fresh_process(TORCH_ALONE, path, tmp_path / "expected.pt") == "same\n"


def test_package_equals_the_model(packaged: tuple[HybridLanguageModel, Path]) -> None:
    model, path = packaged
    loaded = load_package(path)
    assert (loaded.device, loaded.max_length, loaded.max_batch_size) == ("cpu", MAX_LENGTH, 4)
    for size in SIZES:
        ids = ids_of(*size)
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids)[0], model(ids)[0])
    ids = ids_of(3, 5)
    want = model.generate(ids, 30, greedy=True)
    assert torch.equal(loaded.generate(ids, 30, greedy=True), want)
    assert len(set(want[0, 5:].tolist())) > 3
    sampled = [generator.generate(ids, 30, temperature=0.8, seed=1) for generator in (loaded, model)]
    assert torch.equal(*sampled)


def test_package_messages(packaged: tuple[HybridLanguageModel, Path]) -> None:
    loaded = load_package(packaged[1])
    step, (_, states) = loaded.step, loaded(ids_of(2, 5))
    long = "hold at most max_length = 160 tokens per sequence"
    wrong: list[tuple[type[Exception], Callable[[], object], str]] = [
        (ValueError, lambda: loaded(ids_of(1, 5)[0]), "ids must be [B, T], a tensor of rank 2, got shape (5,)"),
        (TypeError, lambda: loaded(ids_of(1, 5).int()), "ids must have dtype int64, got int32"),
        (ValueError, lambda: loaded(ids_of(5, 2)), "ids must hold at most 4 sequences, got 5"),
        (ValueError, lambda: loaded(ids_of(1, 161)), f"ids must {long}, got 161"),
        (ValueError, lambda: loaded(ids_of(1, 0)), "ids must hold at least one token per sequence, got 0"),
        (ValueError, lambda: loaded(ids_of(1, 5).to("meta")), "ids must be on cpu, got meta"),
        (ValueError, lambda: step(ids_of(1, 2), states), "ids_t must be [B], a tensor of rank 1, got shape (1, 2)"),
        (ValueError, lambda: step(ids_of(1, 3)[0], states), "states must hold 3 sequences, as many as ids_t, got 2"),
        (ValueError, lambda: step(ids_of(1, 2)[0], states[1:]), "states must be 8 tensors, got 7"),
        (ValueError, lambda: loaded.generate(ids_of(1, 150), 11), "max_length must be at most 160, got 161"),
    ]
    for error, call, message in wrong:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == f"package: {message}"
    assert torch.equal(loaded(ids_of(2, 5))[1][0], states[0])


def with_metadata(path: Path, to: Path, **changes: str) -> Path:
    """Copy a package, with other things written about its compilation."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("wrapper_metadata.json"):
                content = json.dumps({**json.loads(content), **changes}).encode()
            new.writestr(name, content)
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hybrid_flex.torch": "2.9.0"},
            f"path must be run by the torch 2.9.0 that compiled it, got torch {torch.__version__}",
        ),
        ({"hybrid_flex.device": "cuda"}, "path must be run where there is a CUDA device, got none"),
        ({"AOTI_CPU_ISA": "AVX1024"}, "path must be run on a CPU with AVX1024, got "),
    ],
    ids=["torch", "device", "cpu"],
)
def test_a_package_for_another_machine(
    changes: dict[str, str],
    message: str,
    packaged: tuple[HybridLanguageModel, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = with_metadata(packaged[1], tmp_path / "other.pt2", **changes)
    with pytest.raises(RuntimeError) as caught:
        load_package(path)
    assert str(caught.value).startswith(f"load_package: {message}")
    assert str(caught.value).endswith("; make the package anew, here")


def truncated(package_path: Path, path: Path) -> None:
    path.write_bytes(package_path.read_bytes()[:-200])


def text(package_path: Path, path: Path) -> None:
    path.write_text("no package at all")


def damaged(package_path: Path, path: Path) -> None:
    content = bytearray(package_path.read_bytes())
    with zipfile.ZipFile(package_path) as archive:
        code = next(info for info in archive.infolist() if info.filename.endswith(".so"))
    content[code.header_offset + 1000] ^= 0xFF
    path.write_bytes(content)


def program(package_path: Path, path: Path) -> None:
    save(export_prefill(language_model("K")), path)


def other_package(package_path: Path, path: Path) -> None:
    with_metadata(package_path, path, **{"hybrid_flex.format": "0"})


BAD_FILES = {
    truncated: "hold a whole package, got a truncated or foreign file in {path}",
    text: "hold a whole package, got a truncated or foreign file in {path}",
    damaged: "hold a whole package, got damaged ",
    program: "hold a package of prefill and decode, got another kind of archive in {path}",
    other_package: "hold a package of prefill and decode, got another kind of archive in {path}",
}


@pytest.mark.parametrize("spoil", BAD_FILES, ids=lambda f: f.__name__)
def test_load_of_a_bad_file(
    spoil: Callable[[Path, Path], None], packaged: tuple[HybridLanguageModel, Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.pt2"
    spoil(packaged[1], path)
    with pytest.raises(ValueError) as caught:
        load_package(path)
    assert str(caught.value).startswith("load_package: path must " + BAD_FILES[spoil].format(path=path))


def test_messages(tmp_path: Path) -> None:
    model = language_model("K")
    with pytest.raises(TypeError) as wrong_type:
        package(torch.nn.Linear(2, 2), tmp_path / "model.pt2")  # type: ignore[arg-type]
    assert str(wrong_type.value) == "package: model must be a HybridLanguageModel, got Linear"
    with pytest.raises(ValueError) as wrong_name:
        package(model, tmp_path / "model.so")
    assert str(wrong_name.value) == f"package: path must end in .pt2, got {tmp_path / 'model.so'}"
    with pytest.raises(ValueError) as wrong_device:
        package(model, tmp_path / "model.pt2", "cuda")
    assert str(wrong_device.value) == "package: device must be cpu, where the model is, got cuda"
    with pytest.raises(FileNotFoundError) as absent:
        load_package(tmp_path / "absent.pt2")
    assert str(absent.value) == f"load_package: path must name an existing file, got {tmp_path / 'absent.pt2'}"
    assert not list(tmp_path.iterdir())


def test_a_failed_package_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"an older package")

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch._inductor, "aot_compile", fail)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        package(language_model("K"), path)
    assert path.read_bytes() == b"an older package" and len(list(tmp_path.iterdir())) == 1


OTHERS = {
    "KSRD": {"pattern": "KSRD"},
    "mla": {"pattern": "KS", "sparse_attention": "mla", "kv_lora_rank": 16, "rope_dim": 4},
    "pooled": {"pattern": "SD", "index_kpool": 4, "num_kv_heads": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name: str, loops_compile: None, tmp_path: Path) -> None:
    model = language_model(**OTHERS[name])  # type: ignore[arg-type]
    loaded = load_package(package(model, tmp_path / "model.pt2", max_length=MAX_LENGTH))
    assert isinstance(loaded, Package)
    for size in SIZES:
        ids = ids_of(*size)
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids)[0], model(ids)[0])
        room = min(20, MAX_LENGTH - ids.shape[1])
        assert torch.equal(loaded.generate(ids, room, greedy=True), model.generate(ids, room, greedy=True))


SERVED = {"chunk_kda", "fused_recurrent_kda", "gated_rms_norm", "lightning_topk_cuda", "short_conv"}


@pytest.mark.parametrize("name", OTHERS)
def test_on_cuda_kernels_travel_inside_and_no_loop(name: str, as_on_cuda: None) -> None:
    model = language_model(**OTHERS[name])  # type: ignore[arg-type]
    held: set[str] = set()
    programs = (
        export_prefill(model, max_length=MAX_LENGTH),
        export_decode(model, max_length=MAX_LENGTH, max_batch_size=4),
    )
    for program in programs:
        carrying = packages._carrying_kernels(program)
        held |= operators_of(carrying)
        for graph in (m for m in carrying.graph_module.modules() if isinstance(m, torch.fx.GraphModule)):
            assert not graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan)
        (ids,) = (x for x in traced_inputs(carrying)[:1])
        open_sizes = [carrying.range_constraints[n.node.expr] for n in ids.shape]
        assert all(bounds.lower == 1 for bounds in open_sizes), "no size is ruled out"
    wanted = {"lightning_topk_cuda", "sparse_attention_cuda"} | (SERVED if "K" in model.config.pattern else set())
    assert held == wanted


@pytest.mark.parametrize(("max_length", "form"), [(300, "masked"), (500, "cuda")])
def test_on_cuda_prefill_takes_the_form_of_its_longest_prompt(
    max_length: int, form: str, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "FEWEST_QUERIES", 16)
    monkeypatch.setattr(attention, "FEWEST_ROWS", 0)
    monkeypatch.setattr(attention, "UNION_BYTES", 400 * 400 // 512)
    model = language_model("S").to(torch.bfloat16)
    prefill = packages._carrying_kernels(export_prefill(model, max_length=max_length))
    assert operators_of(prefill) == {"lightning_topk_cuda", f"sparse_attention_{form}"}
    decode = packages._carrying_kernels(export_decode(model, max_length=max_length))
    assert operators_of(decode) == {"lightning_topk_cuda", "sparse_attention_cuda"}


@pytest.mark.gpu
def test_cuda_package_generates_without_this_library(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    """The kernels travel inside.  A compiler that links no libstdc++ makes packages that crash: CXX names another."""
    model = language_model("KSRD").cuda()
    package(model, tmp_path / "model.pt2", "cuda", max_length=MAX_LENGTH)
    write_expected(model, tmp_path / "expected.pt")
    assert fresh_process(TORCH_ALONE, tmp_path / "model.pt2", tmp_path / "expected.pt") == "same\n"

    loaded = load_package(tmp_path / "model.pt2", run_single_threaded=True)
    ids = ids_of(2, 9).cuda()
    logits, states = loaded(ids)
    token = logits[:, -1].argmax(-1)
    loaded.step(token, [x.clone() for x in states])
    graph, tokens = torch.cuda.CUDAGraph(), [ids, token[:, None].clone()]
    with torch.cuda.graph(graph):
        logits, states_out = loaded.step(token, states)
        for old, new in zip(states, states_out, strict=True):
            old.copy_(new)
    for _ in range(11):
        graph.replay()
        token.copy_(logits.argmax(-1))
        tokens.append(token[:, None].clone())
    assert torch.equal(torch.cat(tokens, 1), model.generate(ids, 12, greedy=True))
