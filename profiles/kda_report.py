"""The tables of kda.py, from what it measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness import GIB, below_the_table, table
from kda_rows import BOUNDS, OURS, PEER

# NOTE [As accurate]: beside its bounds, a contender is to be no less accurate than the peer on the same inputs.  Two
# kernels that round alike differ by up to ACCURACY_SLACK on one draw; below ROUNDING both are float32 at its best; and
# dA_log, one number per head compared, is more accurate on one side by luck.
ACCURACY_SLACK = 1.05
ROUNDING = 1e-5


def cell(row: dict[str, Any], contender: str) -> str:
    """Write what a contender did on a row: its time, or why there is none."""
    own = row["contenders"].get(contender)
    if own is None:
        return ""
    if "error" in own:
        return own["error"]
    texts = []
    if "median_ms" in own:
        texts.append(f"{own['median_ms']:.3f} ({own['p20_ms']:.3f}-{own['p80_ms']:.3f})")
    if not own["passed"]:
        beyond = [f"{name} {error:.1e}" for name, error in own["errors"].items() if not error <= BOUNDS[name]]
        texts.append("FAIL " + (", ".join(beyond) or "not finite everywhere"))
    return " ".join(texts)


def compare(row: dict[str, Any]) -> dict[str, Any]:
    """Work out what the table says about a row beyond the measurements."""
    own, peer = (row["contenders"].get(contender, {}) for contender in (OURS, PEER))
    found: dict[str, Any] = {}
    if "median_ms" in own:
        if "median_ms" in peer:
            found["times_faster"] = peer["median_ms"] / own["median_ms"]
        for contender, measured in ((OURS, own), (PEER, peer)):
            if row["state_bytes"] and "median_ms" in measured:
                found[f"{contender}_tb_per_s"] = row["state_bytes"] / measured["median_ms"] / 1e9
        if row["target_ms"] is not None:
            found["ms_met"] = own["median_ms"] <= row["target_ms"]
        if row["target_gib"] is not None and "peak_bytes" in own:
            found["gib_met"] = own["peak_bytes"] / GIB <= row["target_gib"]
    if own.get("passed") and "errors" in peer:
        ratios = {
            name: max(error, ROUNDING) / max(peer["errors"][name], ROUNDING)
            for name, error in own["errors"].items()
            if name != "dA_log"
        }
        found["worst_error_name"] = max(ratios, key=ratios.__getitem__)
        found["worst_error_ratio"] = ratios[found["worst_error_name"]]
        found["as_accurate"] = found["worst_error_ratio"] <= ACCURACY_SLACK
    return found


def main_table(rows: list[dict[str, Any]]) -> list[str]:
    header = {"row": "---"} | dict.fromkeys(("hybrid_flex ms", "fla ms", "times faster", "target"), "---:")
    header |= dict.fromkeys(("GiB", "fla GiB", "error of o", "of fla", "worst error over fla's"), "---:") | {"": "---"}

    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            compared, contenders = compare(row), [row["contenders"].get(c, {}) for c in (OURS, PEER)]
            peaks = [f"{c['peak_bytes'] / GIB:.2f}" if "peak_bytes" in c else "" for c in contenders]
            errors = [f"{c['errors']['o']:.2e}" if "errors" in c else "" for c in contenders]
            targets = []
            for unit in ("ms", "gib"):
                if (target := row[f"target_{unit}"]) is not None:
                    met = {True: " met", False: " MISSED", None: ""}[compared.get(f"{unit}_met")]
                    targets.append(f"{target:.3g} {unit.replace('gib', 'GiB')}{met}")
            accuracy = ""
            if "worst_error_ratio" in compared:
                accuracy = f"{compared['worst_error_ratio']:.2f} ({compared['worst_error_name']})"
                accuracy += "" if compared["as_accurate"] else " LESS ACCURATE"
            remarks = [f"{c} {compared[f'{c}_tb_per_s']:.2f} TB/s" for c in (OURS, PEER) if f"{c}_tb_per_s" in compared]
            remarks += [] if row["interleaved"] else ["timed one after the other"]
            remarks += [f"{PEER} in an earlier process"] if row.get("peer_earlier") else []
            faster = f"{compared['times_faster']:.2f}" if "times_faster" in compared else ""
            times = [cell(row, contender) for contender in (OURS, PEER)]
            yield row["name"], *times, faster, ", ".join(targets), *peaks, *errors, accuracy, ", ".join(remarks)

    return table(header, lines())


def error_table(rows: list[dict[str, Any]]) -> list[str]:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            for contender, own in row["contenders"].items():
                if "errors" in own:
                    errors = (f"{own['errors'][name]:.1e}" if name in own["errors"] else "" for name in BOUNDS)
                    yield row["name"], contender, *errors
        yield "bound", "", *map(str, BOUNDS.values())

    return table({"row": "---", "": "---"} | dict.fromkeys(BOUNDS, "---:"), lines())


def first_call_tables(report: dict[str, Any]) -> list[str]:
    def seconds(own: dict[str, Any]) -> str:
        return f"{own['first_call_s']:.1f}" if "first_call_s" in own else ""

    lines = [
        "",
        "Seconds of each row's first call in this process: compilation and tile search where the row is the first to "
        "need them.",
        "",
        *table(
            {"row": "---", OURS: "---:", PEER: "---:"},
            ((r["name"], *(seconds(r["contenders"].get(c, {})) for c in (OURS, PEER))) for r in report["rows"]),
        ),
    ]
    for contender, found in report["first_call"].items():
        text = found.get("error") or (
            f"{found['seconds']:.1f} s from the start of the process to the end of the first forward and backward, "
            f"{found['until_imported_s']:.1f} s of it until everything is imported"
        )
        lines += ["", f"Fresh process with empty caches, {contender}: {text}."]
    return lines


def markdown(report: dict[str, Any]) -> str:
    where, what = report["device"], report["versions"]
    facts = ", ".join(f"{name} {value}" for name, value in what.items())
    lines = [
        "# KDA operators on one device, against flash-linear-attention",
        "",
        f"{where['name']}, {facts}, {report['date']}.",
        f"Made by `{report['command']}`.",
        "",
        "Milliseconds: median (20th to 80th percentile). GiB: highest memory allocated during a call, inputs and "
        "gradients included. Errors: relative L2 error against float64 on the same inputs. What the rows are: "
        "`python profiles/kda.py --help`.",
        "",
        *main_table(report["rows"]),
    ]
    lines += below_the_table(report)
    lines += ["", "## Errors", "", *error_table(report["rows"]), "", "## First calls", *first_call_tables(report)]
    return "\n".join(lines) + "\n"
