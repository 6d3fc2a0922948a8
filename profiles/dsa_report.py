"""The tables of dsa.py, from what it measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsa_gates import BOUNDS
from harness import GIB, below_the_table, table

MIB = 2**20


def of_role(row: dict[str, Any], role: str) -> dict[str, dict[str, Any]]:
    return {name: own for name, own in row["contenders"].items() if own["role"] == role}


def cell(own: dict[str, Any]) -> str:
    """Write what a contender did on a row: its time, or why there is none."""
    if "error" in own:
        return own["error"]
    if not own["passed"]:
        beyond = [f"{name} {error:.1e}" for name, error in own["errors"].items() if not error <= BOUNDS[name]]
        return "FAIL " + (", ".join(beyond) or "not finite everywhere")
    if "median_ms" not in own:
        return ""
    if own["repeats"] == 1:
        return f"{own['median_ms']:.0f} (once)"
    return f"{own['median_ms']:.3f} ({own['p20_ms']:.3f}-{own['p80_ms']:.3f})"


def cells(row: dict[str, Any]) -> str:
    """Write what everybody did on a row, for one line of progress."""
    texts = [f"{name} {cell(own)}" for name, own in row["contenders"].items()]
    return ", ".join([*texts, *remarks(row)]) or row.get("error", "no contender")


def compare(row: dict[str, Any]) -> dict[str, Any]:
    """Work out what the table says about a row beyond the measurements."""
    own = next(iter(of_role(row, "ours").values()), {})
    peers = list(of_role(row, "peer").values())
    found: dict[str, Any] = {"targets": []}
    if "median_ms" in own:
        if peers and "median_ms" in peers[0]:
            found["times_faster"] = peers[0]["median_ms"] / own["median_ms"]
        elif row["quoted"] is not None:
            found["times_faster_than_quoted"] = row["quoted"][1] / own["median_ms"]
        part = next(iter(of_role(row, "part").values()), {})
        if "median_ms" in part:
            found["mask_share"] = part["median_ms"] / own["median_ms"]
        if own["flops"]:
            found["tflops"] = own["flops"] / own["median_ms"] / 1e9
    if peers and peers[0].get("flops") and "median_ms" in peers[0]:
        found["peer_tflops"] = peers[0]["flops"] / peers[0]["median_ms"] / 1e9
    workspace = own.get("workspace_bytes", 0) / MIB if own.get("passed") and "workspace_bytes" in own else None
    aims = (
        ("target_ms", "<= {:.3g} ms", own.get("median_ms"), -1),
        ("target_tflops", ">= {:.0f} TFLOP/s", found.get("tflops"), 1),
        ("target_times", ">= {:.0f}x", found.get("times_faster"), 1),
        ("target_workspace_mib", "workspace <= {:.0f} MiB", workspace, -1),
        ("target_mask_share", "mask <= {:.0%} of the time", found.get("mask_share"), -1),
    )
    for name, text, value, sign in aims:
        if row[name] is not None:
            met = None if value is None else sign * value >= sign * row[name]
            found["targets"].append((text.format(row[name]), met))
    return found


def closest(own: dict[str, Any]) -> str:
    """Name the error that is closest to its bound."""
    errors = own.get("errors")
    if not errors:
        return ""
    name = max(errors, key=lambda name: errors[name] / (BOUNDS[name] or 1e-9))
    return f"{name} {errors[name]:.1e}"


def remarks(row: dict[str, Any]) -> list[str]:
    compared, extras = compare(row), row["extras"]
    texts = [f"{name} alone {cell(own)} ms" for name, own in of_role(row, "part").items()]
    if "mask_share" in compared:
        texts.append(f"{compared['mask_share']:.1%} of the time")
    if "recompiled" in extras:
        texts.append(f"{extras['masks']} other masks: {extras['recompiled']} recompilations")
    if "density" in extras:
        wrong = sum(not point["right"] for point in extras["density"])
        texts.append(f"{len(extras['density'])} densities below" + (f", {wrong} WRONG" if wrong else ""))
    texts += [own["remark"] for own in row["contenders"].values() if own.get("remark")]
    own = next(iter(of_role(row, "ours").values()), {})
    if "workspace_bytes" in own:
        texts.append(f"workspace {own['workspace_bytes'] / MIB:.0f} MiB")
    texts += [] if row["interleaved"] else ["timed one after the other"]
    texts += ["peer in an earlier process"] if row.get("peer_earlier") else []
    texts += [extras["error"]] if "error" in extras else []
    return texts


def main_table(rows: list[dict[str, Any]]) -> list[str]:
    header = {"row": "---", "hybrid_flex ms": "---:", "peer ms": "---:", "times faster": "---:", "target": "---"}
    header |= dict.fromkeys(("TFLOP/s", "peer TFLOP/s", "GiB", "peer GiB", "error"), "---:") | {"": "---"}

    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            compared = compare(row)
            own, peers = next(iter(of_role(row, "ours").values()), {}), of_role(row, "peer")
            times = [f"{name} {cell(peer)}" for name, peer in peers.items()]
            faster = f"{compared['times_faster']:.2f}" if "times_faster" in compared else ""
            if row["quoted"] is not None:
                times.append("{} {:.2f} (quoted)".format(*row["quoted"]))
                if "times_faster_than_quoted" in compared:
                    faster = f"{compared['times_faster_than_quoted']:.2f} (than quoted)"
            marks = {True: " met", False: " MISSED", None: ""}
            targets = ", ".join(text + marks[met] for text, met in compared["targets"])
            rates = [f"{compared[name]:.3g}" if name in compared else "" for name in ("tflops", "peer_tflops")]
            peer = next(iter(peers.values()), {})
            peaks = [f"{c['peak_bytes'] / GIB:.2f}" if "peak_bytes" in c else "" for c in (own, peer)]
            first = row.get("error") or (cell(own) if own else "")
            error = closest(own or peer)
            yield row["name"], first, "; ".join(times), faster, targets, *rates, *peaks, error, "; ".join(remarks(row))

    return table(header, lines())


def error_table(rows: list[dict[str, Any]]) -> list[str]:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            for name, own in row["contenders"].items():
                if own.get("errors"):
                    yield row["name"], name, ", ".join(f"{key} {error:.1e}" for key, error in own["errors"].items())
        yield "bound", "", ", ".join(f"{name} {bound:g}" for name, bound in BOUNDS.items())

    return table({"row": "---", "": "---", "errors": "---"}, lines())


def density_tables(rows: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for row in rows:
        points = row["extras"].get("density")
        if not points:
            continue
        runs = sorted({point["run"] for point in points})
        share = {(point["agreement"], point["run"]): f"{point['density']:.1%}" for point in points}
        agreements = sorted({point["agreement"] for point in points})
        header = {f"{row['name']}: agreement": "---:"} | {f"keys alike in runs of {run}": "---:" for run in runs}
        lines += ["", *table(header, ([f"{a:g}", *(share[a, run] for run in runs)] for a in agreements))]
    if lines:
        text = (
            "Share of the causally visible blocks that `topk_block_mask` touches. Agreement: correlation of the "
            "scores that two queries of one block give a key; keys of one run share what is agreed upon."
        )
        lines = ["", "## Density of exact masks", "", text, *lines]
    return lines


def first_call_table(rows: list[dict[str, Any]]) -> list[str]:
    seconds = [
        (row["name"], name, f"{own['first_call_s']:.1f}")
        for row in rows
        for name, own in row["contenders"].items()
        if "first_call_s" in own
    ]
    return table({"row": "---", "": "---", "seconds": "---:"}, seconds)


def markdown(report: dict[str, Any]) -> str:
    where, what = report["device"], report["versions"]
    facts = ", ".join(f"{name} {value}" for name, value in what.items())
    lines = [
        "# Sparse attention on one device, against dense attention",
        "",
        f"{where['name']}, {facts}, {report['date']}.",
        f"Made by `{report['command']}`.",
        "",
        "Milliseconds: median (20th to 80th percentile). GiB: highest memory allocated during a call, inputs and "
        "outputs included; workspace: without both. Error: the one closest to its bound. Quoted times are the peer's "
        "own, published for an H100, and were not measured here. What the rows are: `python profiles/dsa.py --help`.",
        "",
        *main_table(report["rows"]),
    ]
    lines += below_the_table(report)
    lines += density_tables(report["rows"])
    lines += ["", "## Errors", "", *error_table(report["rows"])]
    lines += ["", "## First calls", "", "Seconds, compilation included.", "", *first_call_table(report["rows"])]
    return "\n".join(lines) + "\n"
