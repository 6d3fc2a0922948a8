"""TensorBoard shows a trace: the profiler plugin's data, TensorBoard's own tabs, and the page in a real browser.

Needs what ``pip install -e '.[profile]'`` installs; the page also a Chromium.  Nothing here reaches the internet.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_flex import HybridConfig, HybridLanguageModel, profiling

NEEDED = ("tensorboard", "torch_tb_profiler")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"needs pip install -e '.[profile]', without {', '.join(missing)}"
)

RUN, PLUGIN = "train", "/data/plugin/pytorch_profiler"
QUERY = {"run": RUN, "worker": "step", "span": "1", "group_by": "Operation"}
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the trace of one training step and its report."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_heads": 2, "topk": 4, "index_head_dim": 16, "chunk_size": 16}
    model = HybridLanguageModel(HybridConfig(vocab_size=40, pattern="KS", **sizes))
    ids = torch.randint(40, (2, 20))
    folder = tmp_path_factory.mktemp("runs")
    with profiling.trace(folder / RUN, name="step", model=model) as profiler:
        model(ids)[0].sum().backward()
    limits = profiling.Roofline("cpu", "float32", 1e11, 1e10)
    profiling.report(profiler, roofline=limits).write_tensorboard(folder / RUN)
    return folder


@pytest.fixture(scope="module")
def board(logdir: Path) -> Iterator[str]:
    """Start TensorBoard on a free port of the loopback device and wait until it has read the run."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    log = logdir.parent / f"{logdir.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
            found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
            if found is None:
                continue
            try:
                runs = json.loads(get(found[0], f"{PLUGIN}/runs"))
                tags = json.loads(get(found[0], "/data/plugin/text/tags"))
            except (urllib.error.URLError, ConnectionError):
                continue
            if runs == {"runs": [RUN], "loading": False} and tags:
                break
        yield found[0]
    finally:
        process.terminate()
        process.wait(30)


def get(url: str, path: str, **query: str) -> bytes:
    full = url + path + ("?" + urllib.parse.urlencode(query) if query else "")
    with DIRECT.open(full, timeout=60) as answer:
        assert answer.status == 200
        content: bytes = answer.read()
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


def test_the_plugin_lists_runs_and_views(board: str) -> None:
    assert json.loads(get(board, f"{PLUGIN}/views", run=RUN)) == ["Overview", "Operator", "Trace", "Memory"]
    assert json.loads(get(board, f"{PLUGIN}/workers", run=RUN, view="Overview")) == ["step"]
    assert json.loads(get(board, f"{PLUGIN}/spans", run=RUN, worker="step")) == ["1"]
    plugins = json.loads(get(board, "/data/plugins_listing"))
    assert plugins["pytorch_profiler"]["enabled"] and plugins["text"]["enabled"]


def test_the_overview_has_the_time_of_the_step(board: str, logdir: Path) -> None:
    overview = json.loads(get(board, f"{PLUGIN}/overview", view="Overview", **QUERY))
    wall_us = profiling.report(logdir / RUN, roofline=False).wall_ms * 1e3
    (step,) = overview["performance"]
    assert step["name"] == "Average Step Time" and step["value"] == pytest.approx(wall_us, rel=0.05)
    assert {"title": "Device Type", "value": "CPU"} in overview["environments"]


def test_the_operator_table_has_our_operators_with_their_times(board: str, logdir: Path) -> None:
    table = json.loads(get(board, f"{PLUGIN}/operation/table", view="Operator", **QUERY))["data"]
    rows = {row["name"]: row for row in table}
    ours = profiling.report(logdir / RUN, by="operator", roofline=False)
    for name in ("chunk_kda", "chunk_kda_backward", "short_conv", "lightning_topk", "sparse_attention_gather"):
        row = rows[f"hybrid_flex::{name}"]
        own = ours.row(f"hybrid_flex::{name}")
        assert row["calls"] == own.calls
        assert row["host_self_duration"] == pytest.approx(own.time_ms * 1e3, rel=0.05, abs=2)
    assert rows["aten::mm"]["calls"] == ours.row("aten::mm").calls


def test_the_timeline_is_the_trace_and_the_memory_view_has_a_curve(board: str) -> None:
    names = {event["name"] for event in json.loads(get(board, f"{PLUGIN}/trace", **QUERY))["traceEvents"]}
    assert {"block 0/mixer/projections", "block 1/mixer/topk", "hybrid_flex::chunk_kda", "logits"} <= names
    curve = json.loads(get(board, f"{PLUGIN}/memory_curve", **QUERY))
    assert max(row[1] for row in curve["rows"]["CPU"]) > 0


def test_own_tabs_hold_table_chart_and_numbers(board: str, logdir: Path) -> None:
    limits = profiling.Roofline("cpu", "float32", 1e11, 1e10)
    found = profiling.report(logdir / RUN, roofline=limits)
    (text,) = json.loads(get(board, "/data/plugin/text/text", run=RUN, tag="step/table/text_summary"))
    row = found.row("kda_chunk")
    assert "<table>" in text["text"] and "<td>kda_chunk</td>" in text["text"] and f"{row.time_ms:.3f}" in text["text"]
    (image,) = json.loads(get(board, "/data/plugin/images/images", run=RUN, tag="step/chart", sample="0"))
    assert get(board, f"/data/plugin/images/individualImage?{image['query']}").startswith(b"\x89PNG")
    scalars = json.loads(get(board, "/data/plugin/scalars/tags"))[RUN]
    assert {f"step/{kind}/kda_chunk" for kind in ("time_ms", "gflop_per_s", "roofline_share")} <= set(scalars)
    ((_, step, value),) = json.loads(get(board, "/data/plugin/scalars/scalars", run=RUN, tag="step/time_ms/kda_chunk"))
    assert step == 0 and value == pytest.approx(row.time_ms, rel=1e-4)


# The page, in a browser.  Its charts are drawn by a script of Google's, which no test may fetch: a stand-in with the
# same names writes what it is given to draw into the page, as text.

STAND_IN = """
(() => {
  class DataTable {
    constructor() { this.columns = []; this.rows = []; }
    addColumn(column, name) { this.columns.push(column.name || column.label || name || column); }
    addRow(row) { this.rows.push(row); }
    addRows(rows) { this.rows.push(...rows); }
    getValue(row, column) { return cell(this.rows[row][column]); }
    setProperty() {}
  }
  const cell = x => (x !== null && typeof x === 'object' ? (x.f !== undefined ? x.f : x.v) : x);
  class Chart {
    constructor(element) { this.element = element; }
    draw(data) {
      const lines = data.rows.map(row => row.map(cell).join(' | '));
      this.element.textContent = [data.columns.join(' | '), ...lines].join('\\n');
    }
    clearChart() { this.element.textContent = ''; }
    getSelection() { return []; }
    setSelection() {}
    getChartLayoutInterface() { return { getChartAreaBoundingBox: () => ({}), getHAxisValue: () => 0 }; }
  }
  const names = ['ColumnChart', 'ComboChart', 'LineChart', 'PieChart', 'SteppedAreaChart', 'Table', 'Timeline'];
  const visualization = {
    DataTable,
    arrayToDataTable: ([columns, ...rows]) => Object.assign(new DataTable(), { columns: columns.map(cell), rows }),
    events: { addListener: () => ({}), removeListener: () => {} },
  };
  for (const name of names) visualization[name] = Chart;
  window.google = { charts: { load: () => Promise.resolve(), setOnLoadCallback: f => f() }, visualization };
})();
"""
LOADER = "https://www.gstatic.com/charts/loader.js"


@pytest.fixture
def page(board: str) -> Iterator[tuple[str, list[str]]]:
    """Stand between browser and TensorBoard: pass everything on, but put the stand-in where Google's script was."""
    asked: list[str] = []

    class Between(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path == "/stand_in.js":
                content, kind = STAND_IN.encode(), "text/javascript"
            else:
                try:
                    with DIRECT.open(board + self.path, timeout=60) as answer:
                        content, kind = answer.read(), answer.headers.get("Content-Type", "")
                        encoding = answer.headers.get("Content-Encoding")
                except urllib.error.HTTPError as error:
                    self.send_error(error.code)
                    return
                if self.path.startswith(f"{PLUGIN}/index.html"):
                    assert LOADER in content.decode()
                    content = content.replace(LOADER.encode(), b"/stand_in.js")
            self.send_response(200)
            self.send_header("Content-Type", kind)
            if self.path != "/stand_in.js" and encoding:
                self.send_header("Content-Encoding", encoding)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Between)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}{PLUGIN}/index.html", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_a_browser_shows_real_numbers(page: tuple[str, list[str]], board: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    url, asked = page
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--no-proxy-server", "--window-size=1600,1200"]
    command += ["--virtual-time-budget=20000", "--enable-logging=stderr", "--dump-dom", url]
    # A home of its own: crash reports and caches are written there.
    environment = os.environ | {
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    text = re.sub(r"<script.*?</script>|<style.*?</style>", "", done.stdout, flags=re.DOTALL)
    overview = json.loads(get(board, f"{PLUGIN}/overview", view="Overview", **QUERY))
    (step,) = overview["performance"]
    assert "Average Step Time" in text and "CPU Exec" in text, (text[-3000:], done.stderr[-5000:])
    # With or without thousands separators.
    plain = text.replace(",", "")
    assert str(step["value"]) in plain, text[-3000:]
    assert str(step["children"][1]["extra"]) in plain
    assert any(path.startswith(f"{PLUGIN}/overview") for path in asked)
