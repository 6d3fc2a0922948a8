"""The C++ example: built with cmake against the installed libtorch, it generates what Python does."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from hybrid_flex import HybridConfig, HybridLanguageModel, export

SOURCE = Path(__file__).resolve().parent.parent.parent / "examples" / "cpp"
PROMPT, COUNT = [3, 14, 15, 9, 2, 6], 20

pytestmark = pytest.mark.slow


def cpp_compiler() -> str | None:
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the example as the comment at its top says."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    if cpp_compiler() is None:
        pytest.skip("needs a C++ compiler")
    build = tmp_path_factory.mktemp("build")
    for command in (
        ["cmake", "-S", SOURCE, "-B", build, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"],
        ["cmake", "--build", build],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return build / "generate"


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=600)


def generated(program: Path, package: Path, prompt: Sequence[int] = PROMPT, count: int = COUNT) -> list[int]:
    done = run(program, package, count, *prompt)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [int(token) for token in done.stdout.split()]


class ToyPrefill(nn.Module):
    """Two states: a running sum, and a cache of fixed size with its lengths."""

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.embedding = nn.Embedding(50, 16)
        self.output = nn.Parameter(4 * torch.randn(16, 50))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.embedding(ids)
        cache = nn.functional.pad(x, (0, 0, 0, self.max_length - ids.shape[1]))
        lengths = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device) + ids.shape[1]
        return self._logits(x, x.cumsum(1)), x.sum(1), cache, lengths

    def _logits(self, x: Tensor, total: Tensor) -> Tensor:
        return torch.tanh(total) * x.flip(-1) @ self.output


class ToyDecode(ToyPrefill):
    def forward(  # type: ignore[override]
        self, token: Tensor, total: Tensor, cache: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.embedding(token)
        cache.index_put_((torch.arange(token.shape[0], device=token.device), lengths.long()), x)
        lengths += 1
        held = (torch.arange(self.max_length, device=token.device) < lengths[:, None])[..., None]
        # The sum is kept twice: in the state that is returned anew, and in the cache that is written in place.
        total = total + x
        return self._logits(x, 0.5 * total + 0.5 * (cache * held).sum(1)), total, cache, lengths


def compile_package(path: Path, programs: dict[str, torch.export.ExportedProgram]) -> None:
    from torch._inductor.package import package_aoti

    options = {"aot_inductor.package": True}
    files: Any = {
        name: torch._inductor.aot_compile(program.module(), program.example_inputs[0], options=options)  # type: ignore[arg-type]
        for name, program in programs.items()
    }
    package_aoti(str(path), files)


@torch.no_grad()
def test_it_keeps_to_the_order_of_states(program: Path, tmp_path: Path) -> None:
    """A model of the same form that is compiled in seconds, against a loop in Python."""
    torch.manual_seed(0)
    prefill, decode = ToyPrefill(64), ToyDecode(64)
    decode.load_state_dict(prefill.state_dict())
    any_size, ids = {0: Dim.DYNAMIC}, torch.arange(10).view(2, 5)
    example = (torch.zeros(2, dtype=torch.int64), *prefill(ids)[1:])
    compile_package(
        tmp_path / "toy.pt2",
        {
            "prefill": torch.export.export(prefill, (ids,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC(max=64)},)),
            "decode": torch.export.export(decode, example, dynamic_shapes=(any_size,) * 4),
        },
    )
    for prompt in (PROMPT, [7], list(range(40))):
        logits, *states = prefill(torch.tensor([prompt]))
        expected = [int(logits[0, -1].argmax())]
        while len(expected) < COUNT:
            logits, *states = decode(torch.tensor(expected[-1:]), *states)
            expected.append(int(logits.argmax()))
        assert len(set(expected)) > 5, "tokens that do not depend on the states would prove nothing"
        assert generated(program, tmp_path / "toy.pt2", prompt) == expected
    assert generated(program, tmp_path / "toy.pt2", count=1) == generated(program, tmp_path / "toy.pt2")[:1]


@torch.no_grad()
def test_it_generates_what_the_model_does(program: Path, loops_compile: None, tmp_path: Path) -> None:
    """All kinds of layers: states of fixed size, caches written in place, a shared selection, dense attention."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_heads": 2, "topk": 8, "index_heads": 2, "index_head_dim": 8}
    model = HybridLanguageModel(HybridConfig(pattern="KSRD", init_std=0.3, **sizes)).eval()
    export.package(model, tmp_path / "model.pt2", max_length=64)
    for prompt in (PROMPT, [7], list(range(40))):
        expected = model.generate(torch.tensor([prompt]), COUNT, greedy=True)[0, len(prompt) :].tolist()
        assert len(set(expected)) > 5, "tokens that do not depend on the states would prove nothing"
        assert generated(program, tmp_path / "model.pt2", prompt) == expected
    for arguments, message in (
        ((25, *range(40)), "generate: prompt and NUM_TOKENS must be at most 64 tokens together, got 65"),
        ((5, 3, 50), "generate: PROMPT_TOKEN must be below 50, got 50"),
    ):
        done = run(program, tmp_path / "model.pt2", *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", message + "\n")
    assert len(generated(program, tmp_path / "model.pt2", list(range(40)), 24)) == 24, "a full cache"


def test_it_says_what_is_wrong(program: Path, tmp_path: Path) -> None:
    model, absent, text = tmp_path / "model.pt2", tmp_path / "absent.pt2", tmp_path / "text.pt2"
    model.touch()
    text.write_text("no package at all")
    for arguments, message in (
        ((), "usage: generate PACKAGE NUM_TOKENS PROMPT_TOKEN"),
        ((model, 3), "usage: generate PACKAGE"),
        ((model, "x", 1), "generate: NUM_TOKENS must be a number from 0, got x"),
        ((model, 3, 1, -1), "generate: PROMPT_TOKEN must be a number from 0, got -1"),
        ((absent, 3, 1), f"generate: PACKAGE must name an existing file, got {absent}"),
        ((text, 3, 1), "zip archive"),
    ):
        done = run(program, *arguments)
        assert done.returncode == 1 and message in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not done.stdout
