"""Reports: who gets which time, FLOP and bytes, of traces written by hand and of real ones; Markdown, PNG, events."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybrid_flex import DeepSeekSparseAttention, HybridConfig, HybridLanguageModel, profiling
from hybrid_flex.ops import sparse_attention
from hybrid_flex.profiling.events import read_trace
from hybrid_flex.profiling.outputs import si

LIMITS = profiling.Roofline("cpu", "float32", 1e11, 1e10)


class Written:
    """A trace written by hand: host events, kernels and links, in microseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def host(self, name: str, start: float, dur: float, tid: int = 1, cat: str = "cpu_op", **args: Any) -> None:
        self.events.append(
            {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": start, "dur": dur, "args": args}
        )

    def range(self, name: str, start: float, dur: float, tid: int = 1) -> None:
        self.host(name, start, dur, tid, "user_annotation")

    def op(self, name: str, start: float, dur: float, dims: list[Any], tid: int = 1, **args: Any) -> None:
        given = {"Input Dims": dims, "Input type": ["float" if d else "Scalar" for d in dims]}
        self.host(name, start, dur, tid, **given, **{"Concrete Inputs": [""] * len(dims)} | args)

    def kernel(self, dur: float, correlation: int, start: float = 0.0) -> None:
        args = {"correlation": correlation}
        self.events.append(
            {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": start, "dur": dur, "args": args}
        )

    def launch(self, start: float, correlation: int, tid: int = 1) -> None:
        self.host("cudaLaunchKernel", start, 1.0, tid, "cuda_runtime", correlation=correlation)

    def link(self, number: int, forward: tuple[int, float], backward: tuple[int, float]) -> None:
        for ph, (tid, ts) in (("s", forward), ("f", backward)):
            self.events.append(
                {"ph": ph, "cat": "fwdbwd", "id": number, "pid": 1, "tid": tid, "ts": ts, "name": "fwdbwd"}
            )

    def memory(self, ts: float, num_bytes: int, total: int, device: int = -1) -> None:
        args = {"Bytes": num_bytes, "Total Allocated": total, "Device Id": device, "Device Type": int(device >= 0)}
        self.events.append(
            {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 1, "tid": 1, "ts": ts, "args": args}
        )

    def save(self, path: Path) -> Path:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt") as file:
            json.dump({"traceEvents": self.events}, file)
        return path


def backward_node(trace: Written, start: float, tid: int) -> None:
    """Write a node of the autograd engine: 30 us, of which 20 are a product of gradients."""
    trace.host("autograd::engine::evaluate_function: MmBackward0", start, 30.0, tid)
    trace.host("MmBackward0", start + 2, 26.0, tid)
    trace.op("aten::mm", start + 4, 20.0, [[8, 4], [4, 16]], tid)


def on_cpu() -> Written:
    trace = Written()
    trace.range("ProfilerStep#2", 0, 200)
    trace.range("block 0/mixer", 10, 60)
    trace.range("block 0/mixer/projections", 12, 20)
    trace.op("aten::linear", 14, 16, [[8, 16], [4, 16], []])
    trace.op("aten::mm", 16, 10, [[8, 16], [16, 4]])
    trace.op("hybrid_flex::short_conv", 40, 20, [[2, 9, 4], [4, 4], [], [], [], [], []])
    trace.op("aten::mul", 45, 5, [[2, 9, 4], [4]])
    trace.range("block 1/mixer/projections", 80, 10)
    trace.op("aten::mm", 82, 6, [[8, 16], [16, 4]])
    backward_node(trace, 100, 1)
    trace.link(1, (1, 16), (1, 102))
    trace.host("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 140, 6)
    trace.range("Optimizer.step#AdamW.step", 150, 20)
    return trace


def test_every_moment_belongs_to_the_innermost_part(tmp_path: Path) -> None:
    found = profiling.report(on_cpu().save(tmp_path / "by_hand.pt.trace.json"), roofline=LIMITS)
    times = {row.name: (row.calls, row.time_ms * 1e3, row.backward_ms * 1e3) for row in found.rows}
    assert times == {
        "projections": (2, pytest.approx(20 + 10 + 30), pytest.approx(30)),
        "mixer": (1, pytest.approx(60 - 20 - 20), 0),
        "short_conv": (1, pytest.approx(20), 0),
        "accumulate_grad": (1, pytest.approx(6), pytest.approx(6)),
        "optimizer": (1, pytest.approx(20), 0),
        "others": (1, pytest.approx(200 - 60 - 10 - 30 - 6 - 20), 0),
    }
    assert found.total_ms == pytest.approx(0.2) == found.wall_ms
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert (found.title, found.device, found.num_steps) == ("by_hand", "cpu", 1)


def test_flop_and_bytes_once_each(tmp_path: Path) -> None:
    found = profiling.report(on_cpu().save(tmp_path / "x.pt.trace.json"), roofline=LIMITS)
    row = found.row("projections")
    forward, backward = 2 * 8 * 16 * 4, 2 * 8 * 4 * 16
    assert row.flop == 2 * forward + backward
    one, other = 4 * (8 * 16 + 16 * 4 + 8 * 4), 4 * (8 * 4 + 4 * 16 + 8 * 16)
    assert row.bytes == 2 * one + other, "inputs and output of the products, not again of aten::linear"
    assert row.flop_per_s == pytest.approx(row.flop / 60e-6) and row.bytes_per_s == pytest.approx(row.bytes / 60e-6)
    least = (2 * max(forward / 1e11, one / 1e10) + max(backward / 1e11, other / 1e10)) / 60e-6
    assert row.roofline_share == pytest.approx(least)
    conv = found.row("short_conv")
    assert conv.flop == 2 * 2 * 9 * 4 * 4
    assert conv.bytes == 4 * (2 * (2 * 9 * 4) + 4 * 4), "x, taps and y; not the parts inside, nor an absent state"
    assert found.row("mixer").roofline_share is None and found.row("mixer").bytes == 0


@pytest.mark.parametrize("by", ["path", "operator"])
def test_other_groupings(by: str, tmp_path: Path) -> None:
    found = profiling.report(on_cpu().save(tmp_path / "x.pt.trace.json"), by=by, roofline=False)
    assert found.total_ms == pytest.approx(0.2) and found.roofline is None
    if by == "operator":
        assert (found.row("aten::mm").calls, found.row("aten::mm").time_ms) == (3, pytest.approx(0.036))
        assert found.row("aten::linear").time_ms == pytest.approx(0.006)
        assert found.row("hybrid_flex::short_conv").time_ms == pytest.approx(0.015)
    else:
        assert found.row("block 0/mixer/projections").time_ms == pytest.approx(0.050)
        assert found.row("block 1/mixer/projections").time_ms == pytest.approx(0.010)
        assert found.row("block 0/mixer/short_conv").calls == 1
        with pytest.raises(KeyError, match="projections"):
            found.row("projections")


def test_on_a_gpu_the_time_is_that_of_the_kernels(tmp_path: Path) -> None:
    trace = Written()
    trace.range("block 0/mlp", 0, 50)
    trace.op("aten::mm", 5, 20, [[8, 16], [16, 4]])
    trace.launch(8, 1)
    trace.launch(12, 2)
    trace.op("hybrid_flex::chunk_kda", 60, 20, [])
    trace.launch(65, 3)
    # The backward runs on a thread of its own, without the ranges around the call.
    backward_node(trace, 100, 2)
    trace.launch(110, 4, tid=2)
    trace.link(5, (1, 5), (2, 102))
    for correlation, dur in ((1, 100), (2, 50), (3, 300), (4, 200), (99, 7)):
        trace.kernel(dur, correlation)
    trace.memory(1, 100, 5000, device=0)
    trace.memory(2, 400, 5400, device=0)
    trace.memory(3, -400, 5000, device=0)
    found = profiling.report(trace.save(tmp_path / "x.pt.trace.json.gz"), roofline=LIMITS)
    assert found.device == "cuda" and found.peak_bytes == {"cuda:0": 5400}
    times = {row.name: (row.time_ms * 1e3, row.backward_ms * 1e3) for row in found.rows}
    assert times == {"mlp": (350, 200), "kda_chunk": (300, 0), "others": (7, 0)}
    mlp = found.row("mlp")
    assert mlp.host_ms * 1e3 == pytest.approx(50 + 30)
    assert mlp.flop == 2 * 2 * 8 * 16 * 4 and mlp.flop_per_s == pytest.approx(mlp.flop / 350e-6)
    assert "host ms" in found.markdown() and "kernels on the GPU" in found.markdown()
    found = profiling.report(tmp_path, by="operator", roofline=False)
    times = {row.name: row.time_ms * 1e3 for row in found.rows if row.time_ms}
    assert times == {"aten::mm": 350, "hybrid_flex::chunk_kda": 300, "others": 7}
    assert "cudaLaunchKernel" not in {row.name for row in found.rows}


def test_a_gpu_trace_is_read_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trace = Written()
    trace.op("aten::mm", 5, 20, [[8, 16], [16, 4]])
    trace.launch(8, 1)
    trace.kernel(10, 1)
    found = profiling.report(trace.save(tmp_path / "x.pt.trace.json"))
    assert found.roofline is None and found.row("others").roofline_share is None and found.row("others").flop > 0


def test_what_runs_inside_an_operator_of_ours_is_part_of_it(tmp_path: Path) -> None:
    trace = Written()
    trace.range("block 3/mixer", 0, 100)
    trace.op("hybrid_flex::sparse_attention_flex", 10, 80, [[1, 2, 4, 8], [1, 9, 1, 8], [1, 9, 1, 8], [1, 2, 5], []])
    trace.op("hybrid_flex::pack_selection", 20, 10, [])
    trace.range("a range inside", 40, 30)
    trace.op("aten::mm", 45, 10, [[8, 16], [16, 4]])
    found = profiling.report(trace.save(tmp_path / "x.pt.trace.json"), roofline=False)
    assert {row.name: row.time_ms * 1e3 for row in found.rows} == {"attention": pytest.approx(80), "mixer": 20}
    assert found.row("attention").flop == 2 * (2 * 4 * 5) * (8 + 8), "its own formula, once"


def test_rounded_times_and_neighbours_do_not_nest(tmp_path: Path) -> None:
    trace = Written()
    trace.host("a", 0.0, 10.001)
    trace.host("b", 10.0, 5.0)  # a's end is rounded up past its start
    trace.host("c", 15.0, 0.0)
    trace.range("whole", 20.0, 5.0)
    trace.host("d", 20.0, 5.0)  # as long as the range around it
    events = {e.name: e for e in read_trace(trace.save(tmp_path / "x.pt.trace.json")).events}
    assert [events[name].parent for name in "abc"] == [None] * 3
    assert events["d"].parent is events["whole"] and events["d"].label.path == "whole"


def test_memory_of_a_cpu_begins_with_the_trace(tmp_path: Path) -> None:
    trace = on_cpu()
    for ts, num_bytes in ((1, 100), (2, 50), (3, -120), (4, 60)):
        trace.memory(ts, num_bytes, 0)
    found = profiling.report(trace.save(tmp_path / "x.pt.trace.json"), roofline=False)
    assert found.peak_bytes == {"cpu": 150} and "Most bytes on cpu" in found.markdown()


def test_an_unknown_operator_and_a_trace_without_shapes(tmp_path: Path) -> None:
    trace = Written()
    trace.op("nobody::knows", 0, 5, [[3, 3]])
    trace.op("aten::mm", 6, 5, [[3, 3], [4, 4]])  # shapes that do not fit: an operator of another version
    trace.op("aten::no_such_operator", 12, 5, [[3, 3]])
    found = profiling.report(trace.save(tmp_path / "x.pt.trace.json"), roofline=False)
    assert found.row("others").time_ms == pytest.approx(0.015)
    with profiling.trace(tmp_path / "real", record_shapes=False):
        torch.ones(8, 8) @ torch.ones(8, 8)
    found = profiling.report(tmp_path / "real", roofline=False)
    assert not found.has_shapes and found.rows[0].flop == 0 and "has no shapes" in found.markdown()


def test_python_functions_of_a_trace_with_sources_are_no_parts(tmp_path: Path) -> None:
    with profiling.trace(tmp_path, with_stack=True), profiling.range("outside"):
        torch.ones(8, 8) @ torch.ones(8, 8)
    found = profiling.report(tmp_path, by="operator", roofline=False)
    assert found.row("aten::mm").flop == 2 * 8 * 8 * 8
    assert not [row.name for row in found.rows if ".py(" in row.name or row.name.startswith("<built-in")]
    assert {row.name for row in profiling.report(tmp_path, roofline=False).rows} == {"outside"}


def test_a_table_counts_the_rows_that_are_looked_up(tmp_path: Path) -> None:
    table, ids = torch.randn(1000, 16), torch.arange(6)
    cache, row = torch.zeros(2, 50, 4), torch.ones(2, 1, 4)
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 300, 1, 8)
    indices = torch.arange(5, dtype=torch.int32).expand(1, 2, 5).contiguous()
    with profiling.trace(tmp_path):
        torch.nn.functional.embedding(ids, table)
        cache.index_put_((torch.tensor([[0], [1]]), torch.tensor([[7], [9]])), row)
        sparse_attention(q, k, k, indices)
        sparse_attention(q[:, :1], k[:, :3], k[:, :3], indices[:, :1, :3])
    found = profiling.report(tmp_path, by="operator", roofline=False)
    looked_up = sum(row.bytes for row in found.rows if row.name in ("aten::embedding", "aten::index_select"))
    assert looked_up == 6 * 8 + 2 * 4 * 6 * 16, "numbers, rows, result"
    moved = sum(row.bytes for row in found.rows if "index_put" in row.name)
    assert moved == 4 * 2 * 8, "values and rows; a trace does not hold the places"
    o, lse = 4 * 2 * 4 * 8, 4 * 2 * 4
    first = 2 * (4 * 10 * 8) + o + o + lse + 4 * 10
    second = 2 * (4 * 3 * 8) + (o + o + lse) // 2 + 4 * 3
    assert found.row("hybrid_flex::sparse_attention_gather").bytes == first + second


SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_heads": 2, "topk": 4, "index_head_dim": 16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, Any]:
    """Trace one training step of a tiny model; also give its FLOP by torch's counter, and the profiler."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model = HybridLanguageModel(HybridConfig(pattern="KSD", chunk_size=16, **SIZES))
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(40, (2, 34))

    def step() -> None:
        logits, _, loss = model.forward_with_indexer_loss(ids)
        (logits.square().mean() + loss).backward()

    with FlopCounterMode(display=False) as counter:
        step()
    with profiling.trace(folder, name="step", model=model, warmup=1, active=1) as profiler:
        for _ in range(2):
            with profiling.range("training"):
                step()
                optimizer.step()
                optimizer.zero_grad()
            profiler.step()
    return folder, counter.get_total_flops(), profiler


def test_a_real_step_has_every_part_forward_and_backward(trained: tuple[Path, int, Any]) -> None:
    found = profiling.report(trained[0], roofline=LIMITS)
    both = {
        "projections",
        "short_conv",
        "kda_chunk",
        "gated_norm",
        "attention",
        "indexer",
        "indexer_loss",
        "mlp",
        "norm",
    }
    for name in (*both, "logits", "embedding"):
        row = found.row(name)
        assert 0 < row.backward_ms < row.time_ms, row
    for name in ("topk", "optimizer"):
        assert found.row(name).backward_ms == 0 < found.row(name).time_ms
    assert found.row("kda_chunk").calls == 1 and found.row("mlp").calls == 3 and found.row("attention").calls == 2
    assert found.total_ms == pytest.approx(found.wall_ms, rel=0.05)
    rest = sum(row.share for row in found.rows if row.name in ("others", "training", "accumulate_grad"))
    assert rest < 0.3, found.markdown()
    assert found.peak_bytes["cpu"] > 0 and found.num_steps == 1


def test_a_report_counts_the_flop_that_torch_counts(trained: tuple[Path, int, Any]) -> None:
    folder, flop, profiler = trained
    for by in ("name", "path", "operator"):
        assert sum(row.flop for row in profiling.report(folder, by=by, roofline=False).rows) == flop
    found = profiling.report(profiler, roofline=False)
    assert found.title == "step" and sum(row.flop for row in found.rows) == flop


def test_a_compiled_layer_is_one_part_with_our_operators_beside_it(tmp_path: Path, fresh_dynamo: None) -> None:
    layer = DeepSeekSparseAttention(32, 2, topk=4, index_heads=2, index_head_dim=16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 9, 32)
    compiled(x)[0].sum().backward()
    with profiling.trace(tmp_path, model=compiled), profiling.range("training"):
        compiled(x)[0].sum().backward()
    found = profiling.report(tmp_path, roofline=False)
    graph = found.row("compiled_graph")
    assert 0 < graph.backward_ms < graph.time_ms and graph.flop > 0
    assert found.row("topk").calls == 1 and found.row("attention").backward_ms > 0


def test_a_profiler_of_torch_itself() -> None:
    with torch.profiler.profile(record_shapes=True) as profiler:
        torch.ones(8, 4) @ torch.ones(4, 8)
    found = profiling.report(profiler, roofline=False)
    assert sum(row.flop for row in found.rows) == 2 * 8 * 4 * 8
    with pytest.raises(RuntimeError, match="call report after the body of trace"):
        profiling.report(torch.profiler.profile())


def test_the_newest_trace_of_a_folder(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with profiling.trace(tmp_path / name, name=name):
            torch.ones(3).cos()
    assert profiling.report(tmp_path, roofline=False).title == "second"
    assert profiling.report(tmp_path / "first", roofline=False).title == "first"


def test_the_measured_roofline_is_the_default(trained: tuple[Path, int, Any]) -> None:
    found = profiling.report(trained[0])
    assert found.roofline is not None and found.roofline.dtype == "float32"
    shares = [row.roofline_share for row in found.rows if row.roofline_share is not None]
    # A tiny model is far from what the machine can do.
    assert shares and all(0 < share < 1 for share in shares)


def test_markdown_and_png(trained: tuple[Path, int, Any], tmp_path: Path) -> None:
    found = profiling.report(trained[0], roofline=LIMITS, title="one | step")
    lines = found.write_markdown(tmp_path / "new" / "report.md").read_text().splitlines()
    assert lines[0] == "## one | step" and "Roofline, measured (cpu, float32): 100 GFLOP/s, 10.0 GB/s." in lines
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) == len(found.rows) + 2 and len({line.count("|") for line in table}) == 1
    assert f"| kda_chunk | 1 | {found.row('kda_chunk').time_ms:.3f} |" in "\n".join(table)
    short = found.markdown(max_rows=3)
    assert f"| {len(found.rows) - 2} shorter ones |" in short and short.count("\n| ") == 5
    picture = found.write_png(tmp_path / "pictures" / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and 8_000 < len(picture) < 150_000
    axes = found.figure(max_rows=5).axes
    assert len(axes) == 2 and [t.get_text() for t in axes[0].get_yticklabels()][-1] == found.rows[0].name
    assert sum(bar.get_width() for bar in axes[0].patches) == pytest.approx(found.total_ms)
    plain = profiling.report(trained[0], roofline=False).figure()
    assert len(plain.axes) == 1


def test_a_report_as_json(trained: tuple[Path, int, Any]) -> None:
    found = profiling.report(trained[0], roofline=LIMITS)
    again = json.loads(json.dumps(found.to_dict()))
    assert again["roofline"]["flop_per_s"] == 1e11 and again["peak_bytes"] == found.peak_bytes
    assert [row["name"] for row in again["rows"]] == [row.name for row in found.rows]
    assert again["rows"][0]["flop_per_s"] == found.rows[0].flop_per_s


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (7, "7"), (999, "999"), (1234, "1.23 k"), (99.96e9, "100 G")])
def test_numbers_with_prefixes(value: float, text: str) -> None:
    assert si(value) == text


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        profiling.report(tmp_path)
    message = f"report: source must be a trace or a folder that holds one (*.pt.trace.json), got {tmp_path}"
    assert str(caught.value) == message
    with pytest.raises(ValueError, match="must be a trace or a folder"):
        profiling.report(tmp_path / "absent.json")
    for content in ("no json", "[1, 2]", '{"rows": 1}'):
        (tmp_path / "bad.pt.trace.json").write_text(content)
        with pytest.raises(ValueError, match=r"source must be a trace of torch\.profiler"):
            profiling.report(tmp_path)
    with pytest.raises(ValueError) as caught:
        profiling.report(tmp_path, by="colour")
    assert str(caught.value) == "report: by must be one of 'name', 'path', 'operator', got 'colour'"


def test_without_tensorboard_the_cure_is_named(fresh_process: Callable[..., str], tmp_path: Path) -> None:
    source = """
import sys
sys.modules["tensorboard"] = None
import torch
from hybrid_flex import profiling
with profiling.trace(sys.argv[1]):
    torch.ones(3).cos()
found = profiling.report(sys.argv[1], roofline=False)
found.write_markdown(sys.argv[1] + "/report.md")
try:
    found.write_tensorboard(sys.argv[1])
except RuntimeError as error:
    print(error)
"""
    said = fresh_process(source, tmp_path).strip().splitlines()[-1]
    assert said == "write_tensorboard: tensorboard must be installed, got none: pip install -e '.[profile]'"
    assert "others" in (tmp_path / "report.md").read_text()


@pytest.mark.gpu
def test_a_gpu_trace(tmp_path: Path) -> None:
    model = HybridLanguageModel(HybridConfig(pattern="KS", **SIZES)).cuda()
    ids = torch.randint(40, (2, 200), device="cuda")

    def step() -> None:
        logits, _, loss = model.forward_with_indexer_loss(ids)
        (logits.square().mean() + loss).backward()

    step()
    with profiling.trace(tmp_path, model=model) as profiler:
        step()
        torch.cuda.synchronize()
    found = profiling.report(profiler)
    assert found.device == "cuda" and found.roofline is not None and found.roofline.device == "cuda"
    for name in ("kda_chunk", "projections", "attention", "short_conv", "mlp"):
        row = found.row(name)
        assert 0 < row.backward_ms < row.time_ms and row.flop > 0, row
        assert row.roofline_share is not None and 0 < row.roofline_share < 1.5
    assert found.row("others").share < 0.3 and found.peak_bytes["cuda:0"] > 0
