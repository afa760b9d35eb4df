"""Tables, plots and comparisons of the runner's results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ivl_kernels._cuda_graph import WAITS

OURS = "ours"
CSV_COLUMNS = [
    "op", "name", "variant", "dtype", "median_ms", "q20_ms", "q80_ms", "min_ms", "rounds", "ratio", "ratio_q20",
    "ratio_q80", "wall_ms", "wall_ratio", "waits", "peak_bytes", "floor_ms", "bytes", "flops", "failed", "device",
    "threads", "allocator", "torch", "commit", "date",
]  # fmt: skip


def time_text(ms: float) -> str:
    return f"{ms:.3g} ms" if ms < 999.5 else f"{ms / 1e3:.3g} s"


def size_text(count: float | None) -> str:
    if count is None:
        return "?"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def waits_text(why: str) -> str:
    """Why a variant has no graph, in short: recording may fail of other things, such as memory."""
    return "waits for the GPU" if why.startswith(WAITS) else f"no CUDA graph ({why.split(':')[0]})"


def ratio_text(variant: dict[str, Any]) -> str:
    if variant.get("failed"):
        return "failed"
    parts = []
    if "ratio" in variant:
        parts.append(f"{variant['ratio']:.2f} ({variant['ratio_q20']:.2f}-{variant['ratio_q80']:.2f})")
    elif variant.get("waits"):
        parts.append(waits_text(variant["waits"]))
    if "wall_ratio" in variant:
        parts.append(f"a call {variant['wall_ratio']:.2f}")
    return ", ".join(parts)


def ours_text(ours: dict[str, Any]) -> str:
    text = f"{time_text(ours['median_ms'])} ({ours['q20_ms']:.3g}-{ours['q80_ms']:.3g})"
    if "wall_ms" not in ours:
        return text
    return (
        f"a call {text}, {waits_text(ours['waits'])}"
        if ours["waits"]
        else f"{text}, a call {time_text(ours['wall_ms'])}"
    )


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    ours = row["variants"].get(OURS, {"failed": "no variant 'ours'"})
    head = f"{row['op']}: {row['name']}"
    if ours["failed"]:
        return f"{head}: WRONG OR FAILED: {ours['failed']}"
    parts = [f"{time_text(ours['median_ms'])}"]
    if row["floor_ms"]:
        parts.append(f"{ours['median_ms'] / row['floor_ms']:.2f}x the floor")
    parts += [f"vs {name} {ratio_text(v)}" for name, v in row["variants"].items() if name != OURS]
    return f"{head}: " + ", ".join(parts)


def _others(rows: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row["variants"] if name != OURS)
    return list(names)


def _by_op(result: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        yield op, [row for row in result["rows"] if row["op"] == op]


def setup(result: dict[str, Any]) -> str:
    """Processor, threads, torch and allocator of a run: runs that agree in them may share a table."""
    env = result["environment"]
    isa = f", ONEDNN_MAX_CPU_ISA={env['onednn_max_cpu_isa']}" if env.get("onednn_max_cpu_isa") else ""
    return f"{env['device']}, {env['threads']} threads{isa}, torch {env['torch']}, {env['allocator']} allocator"


def machine(result: dict[str, Any]) -> str:
    """The setup of a run, its commit and date, and the rates measured in it."""
    env, limits = result["environment"], result["limits"]
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in limits["gemm_flops_per_s"].items())
    return (
        f"{setup(result)}, commit {env['commit']}, {env['date']}. "
        f"Copy {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s; GEMM {rates}."
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of one op's rows: our time, distance to the floor, speed-ups (20-80 % spread), peak memory."""
    others = _others(rows)
    head = ["case", "ours", "x floor", *(f"vs {name}" for name in others), "peak ours", "peak eager"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        ours, eager = row["variants"].get(OURS, {}), row["variants"].get("eager", {})
        if "median_ms" not in ours:
            lines.append(f"| {row['name']} | **failed**: {ours.get('failed', 'not run')} |" + " |" * (len(head) - 2))
            continue
        cells = [
            row["name"],
            ours_text(ours),
            f"{ours['median_ms'] / row['floor_ms']:.2f}" if row["floor_ms"] else "",
            *(ratio_text(row["variants"].get(name, {})) for name in others),
            size_text(ours.get("peak_bytes")),
            size_text(eager.get("peak_bytes")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    parts = ["# Benchmark", "", machine(result), ""]
    parts += [
        "Speed-ups are medians of within-round ratios of interleaved runs, with the 20 to 80 % range in brackets;",
        "above 1 means ours is faster. No speed-up is given for a variant whose result failed its check.",
        "",
    ]
    if any("wall_ms" in v for row in result["rows"] for v in row["variants"].values()):
        parts += [
            "On a GPU the first time is of a CUDA graph's replay, what the GPU works; 'a call' is the wall time of one",
            "that finds the GPU idle, Python and launches with it. Who waits for the GPU in a call has only that.",
            "",
        ]
    for op, rows in _by_op(result):
        parts += [f"## {op}", "", table(rows), ""]
    failures = [
        f"* {row['op']}: {row['name']}: {name}: {v['failed']}"
        for row in result["rows"]
        for name, v in row["variants"].items()
        if v["failed"]
    ]
    if failures:
        parts += ["## Failed", "", *failures, ""]
    return "\n".join(parts)


def csv_rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    env = result["environment"]
    for row in result["rows"]:
        for name, variant in row["variants"].items():
            values = {**env, **row, **variant, "variant": name}
            yield {column: values.get(column, "") for column in CSV_COLUMNS}


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed-up bars with spread, distance to the roof, peak memory; a case is a line through all three."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["ok"]]
    if not rows:
        return
    several = len({row["op"] for row in rows}) > 1
    labels = [f"{row['op']}: {row['name']}" if several else row["name"] for row in rows]
    height = max(4.5, 0.38 * len(rows) + 2)
    figure, (bars, roof, memory) = plt.subplots(
        1, 3, figsize=(17, height), width_ratios=[4, 4, 3], layout="constrained"
    )
    _speedup_bars(bars, rows, labels)
    _roofline(roof, rows, result["limits"])
    _memory_bars(memory, rows)
    title = f"{result['rows'][0]['op']}, " if not several else ""
    figure.suptitle(title + machine(result), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _case_axis(axes: Any, labels: list[str] | None, count: int) -> None:
    axes.set_yticks(range(count), labels if labels is not None else [""] * count, fontsize=8)
    axes.set_ylim(count - 0.4, -0.6)
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)


def _speedup_bars(axes: Any, rows: list[dict[str, Any]], labels: list[str]) -> None:
    others = _others(rows)
    thick = 0.8 / max(1, len(others))
    for i, name in enumerate(others):
        known = [(y, r["variants"][name]) for y, r in enumerate(rows) if "ratio" in r["variants"].get(name, {})]
        ratio = [v["ratio"] for _, v in known]
        spread = [[v["ratio"] - v["ratio_q20"] for _, v in known], [v["ratio_q80"] - v["ratio"] for _, v in known]]
        at = [y - 0.4 + (i + 0.5) * thick for y, _ in known]
        axes.barh(at, [r - 1 for r in ratio], thick, left=1, label=f"vs {name}")
        axes.errorbar(ratio, at, xerr=spread, fmt="none", ecolor="black", capsize=2, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(1, color="black", linewidth=1)
    _case_axis(axes, [f"{label}  [{n}]" for n, label in enumerate(labels, 1)], len(rows))
    axes.set_xlabel("speed-up (median, 20-80 % spread); right of the line ours is faster")
    axes.legend(fontsize=8)


def _roofline(axes: Any, rows: list[dict[str, Any]], limits: dict[str, Any]) -> None:
    # Kernels with no matrix product have no place on a FLOP axis: they are drawn at their share of the copy rate.
    bandwidth = limits["copy_bytes_per_s"]
    known = [(n, row) for n, row in enumerate(rows, 1) if row["flops"] and row["bytes"]]
    if not known:
        _copy_rates(axes, rows, bandwidth)
        return
    intensity = [row["flops"] / row["bytes"] for _, row in known]
    span = [min(intensity) / 4, max(intensity) * 4]
    for dtype, rate in limits["gemm_flops_per_s"].items():
        xs = sorted({span[0], rate / bandwidth, span[1]})
        axes.loglog(xs, [min(rate, x * bandwidth) / 1e9 for x in xs], label=f"roof {dtype}")
    for (n, row), x in zip(known, intensity):
        for name, marker, color in ((OURS, "o", "C0"), ("eager", "x", "C3")):
            ms = row["variants"].get(name, {}).get("median_ms")
            if ms:
                axes.loglog(x, row["flops"] / ms / 1e6, marker, color=color)
            if ms and name == OURS:
                axes.annotate(f"{n}", (x, row["flops"] / ms / 1e6), (4, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel("FLOP a byte")
    axes.set_ylabel("GFLOP/s (o ours, x eager)")
    axes.legend(fontsize=8)


def _copy_rates(axes: Any, rows: list[dict[str, Any]], bandwidth: float) -> None:
    for y, row in enumerate(rows):
        for name, marker, color in ((OURS, "o", "C0"), ("eager", "x", "C3")):
            ms = row["variants"].get(name, {}).get("median_ms")
            if ms and row["bytes"]:
                axes.plot(row["bytes"] / ms / 1e6, y, marker, color=color)
    axes.axvline(bandwidth / 1e9, color="black", linewidth=1, label="copy rate")
    _case_axis(axes, None, len(rows))
    axes.set_xlabel("useful GB/s (o ours, x eager)")
    axes.legend(fontsize=8)


def _memory_bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    names = [OURS, *_others(rows)]
    thick = 0.8 / len(names)
    for i, name in enumerate(names):
        known = [(y, row["variants"].get(name, {}).get("peak_bytes")) for y, row in enumerate(rows)]
        known = [(y, size) for y, size in known if size is not None]
        at = [y - 0.4 + (i + 0.5) * thick for y, _ in known]
        axes.barh(at, [size / 1e6 for _, size in known], thick, label=name)
    _case_axis(axes, [f"[{n}]" for n in range(1, len(rows) + 1)], len(rows))
    axes.set_xlabel("peak memory of one call, MB (result included)")
    axes.legend(fontsize=8)


def compare(old: dict[str, Any], new: dict[str, Any], margin: float) -> tuple[str, list[str]]:
    """Speed-ups of two runs. A regression: the speed-up fell by more than `margin`, and the spreads do not overlap."""
    before = {(row["op"], row["name"]): row for row in old["rows"]}
    lines = [f"old: {machine(old)}", f"new: {machine(new)}", ""]
    regressions = []
    for row in new["rows"]:
        earlier = before.get((row["op"], row["name"]))
        label = f"{row['op']}: {row['name']}"
        if earlier is None:
            lines.append(f"{label}: new case")
            continue
        if earlier["ok"] and not row["ok"]:
            regressions.append(label)
            lines.append(f"{label}: REGRESSION: fails its check now")
        for name, variant in row["variants"].items():
            was = earlier["variants"].get(name, {})
            if "ratio" not in variant or "ratio" not in was:
                continue
            change = variant["ratio"] / was["ratio"] - 1
            worse = change < -margin and variant["ratio_q80"] < was["ratio_q20"]
            if worse:
                regressions.append(f"{label} vs {name}")
            lines.append(
                f"{label} vs {name}: {ratio_text(was)} -> {ratio_text(variant)} ({change:+.0%})"
                + (" REGRESSION" if worse else "")
            )
    missing = set(before) - {(row["op"], row["name"]) for row in new["rows"]}
    lines += [f"{op}: {name}: not in the new run" for op, name in sorted(missing)]
    lines.append(f"{len(regressions)} regression(s) beyond {margin:.0%}")
    return "\n".join(lines), regressions
