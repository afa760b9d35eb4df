"""Rows of all views as JSON, Markdown and a plot; what got worse than the committed ones or is over the limits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ivl_kernels._targets import limits
from ivl_kernels.testing.cases import Shape

from .machine import blocks
from .subjects import SUBJECTS, Job

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "bench" / "results" / "inspect.json"
HOST = ROOT / "bench" / "results" / "host_path.json"
# GB/s, dense bf16 tensor-core TFLOP/s; NVIDIA's data sheets: A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024),
# HGX B200 (2024; the sparse figure halved).
GPUS = {"A100": (2039, 312), "H100": (3350, 989), "H200": (4800, 989), "B200": (8000, 2250)}
# What a memory-bound op may move, over what is planned for its launches: distinct bytes, and sectors requested.
UNIQUE_LIMIT, SECTOR_LIMIT = 1.05, 1.15


def roofline_row(name: str, shape: Shape) -> dict[str, Any]:
    """Least microseconds on each GPU in bf16: bytes over bandwidth or FLOPs over the tensor cores' peak."""
    cost = Job(name, shape, "bf16").cost("forward")
    times = {gpu: max(cost.least / rate / 1e3, cost.flops / peak / 1e6) for gpu, (rate, peak) in GPUS.items()}
    return {
        "op": name, "shape": shape.name if "tokens" in shape.name else f"{shape.name}, tokens {shape.tokens}",
        "bytes": cost.least, "flops": cost.flops, "microseconds": times,
    }  # fmt: skip


# What names a row of each table: rows of an earlier run with the same name are replaced.
KEYS = {
    "counters": ("op", "shape", "dtype", "direction", "who"),
    "machine": ("op", "models", "tokens", "dtype", "direction", "backend", "target"),
    "roofline": ("op", "shape"),
}
Tables = dict[str, list[dict[str, Any]]]


def merge(old: Tables, new: Tables) -> Tables:
    """The rows of both; where a name is in both, the new ones."""
    result: Tables = {}
    for table, key in KEYS.items():
        names = [str([row[k] for k in key]) for row in new.get(table, [])]
        kept = [row for row in old.get(table, []) if str([row[k] for k in key]) not in names]
        order = list(SUBJECTS)
        result[table] = sorted(
            (row for row in [*kept, *new.get(table, [])] if row["op"] in order), key=lambda row: order.index(row["op"])
        )
    return result


# Counters that must not grow by more than the margin; spills and lost tensor-core instructions never.
GUARDED = ("requested_bytes", "sector_bytes", "unique_bytes", "instructions", "bank_conflicts", "launches")


def check(new: Tables, old: Tables, margin: float) -> list[str]:
    """What got worse by more than `margin` (a share), or spills now and did not."""
    worse = []

    def pairs(table: str, extra: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        key = (*KEYS[table], *extra)
        before = {str([row[k] for k in key]): row for row in old[table]}
        for row in new.get(table, []):
            name = str([row[k] for k in key])
            if name in before:
                yield ", ".join(str(row[k]) for k in key), row, before[name]

    for name, row, was in pairs("counters"):
        if row["who"] not in ("liger", "eager"):
            for key in GUARDED:
                if row[key] > was[key] * (1 + margin) + 0.5:
                    worse.append(f"{name}: {key} {was[key]} -> {row[key]}")
    for name, row, was in pairs("machine", ("kernel",)):
        if row["spills"] > was["spills"]:
            worse.append(f"{name}: spills {was['spills']} -> {row['spills']} bytes")
        if bool(row["tensor_core_instructions"]) < bool(was["tensor_core_instructions"]):
            worse.append(f"{name}: no tensor-core instructions")
    return worse


def over_the_limits(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(op, who, limit, where) of memory-bound ops of ours that move more than they may; a plan that is not kept."""
    found = []
    for row in rows:
        if row["who"] in ("liger", "eager"):
            continue
        unique, sectors = row["unique_bytes"] / row["planned"], row["sector_bytes"] / row["planned"]
        limits = [("planned", 0.995 / unique, 1.0)]
        if SUBJECTS[row["op"]].memory_bound:
            limits += [("distinct", unique, UNIQUE_LIMIT), ("sectors", sectors, SECTOR_LIMIT)]
        where = f"{row['shape']}, {row['dtype']}, {row['direction']}"
        found += [(row["op"], row["who"], name, f"{where}: {got:.3f}") for name, got, limit in limits if got > limit]
    return found


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def _target_name(target: Any) -> str:
    return f"sm_{target}" if isinstance(target, int) else target


def _span(values: Sequence[float], form: str = "{:g}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def markdown(tables: Tables) -> str:
    counted = []
    for row in tables["counters"]:
        name = [row["op"], row["shape"], row["dtype"], row["direction"], row["who"], row["launches"]]
        bytes_of = ("requested_bytes", "sector_bytes", "unique_bytes", "planned")
        ratios = [f"{row[key] / row['least']:.2f}" for key in bytes_of if key in row]
        if row["who"] == "eager":
            counted.append([*name, *ratios, "", "", "", "", "", ""])
        else:
            each = f"{row['thread_instructions'] / row['elements']:.1f}"
            counted.append([*name, *ratios, each, f"{row['mma_flops']:,}", f"{row['bank_conflicts']:,}"])
    rooflines = [
        [row["op"], row["shape"], f"{row['bytes']:,}", f"{row['flops']:,}",
         *(f"{row['microseconds'][gpu]:.1f}" for gpu in GPUS)]
        for row in tables["roofline"]
    ]  # fmt: skip
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in tables["machine"]:
        name = (row["op"], row["backend"], row["kernel"], row["dtype"], _target_name(row["target"]))
        groups.setdefault(name, []).append(row)
    machine = []
    for name, rows in groups.items():
        widths = sorted({width for row in rows for width in row["widths"]}, key=lambda w: (w[:2], len(w), w))
        shares = [100 * row["occupancy"] for row in rows if "occupancy" in row]
        resident = [
            blocks(*(row[k] for k in ("target", "threads", "registers", "shared")))
            for row in rows
            if "occupancy" in row
        ]
        launched = [row["warps"] / limits(row["target"]).multiprocessors for row in rows if "warps" in row]
        flying = [row["in_flight"] for row in rows if "in_flight" in row]
        machine.append(
            [f"{name[0]} ({name[1]})", *name[2:], len(rows), _span([row["registers"] for row in rows]),
             max(row["spills"] for row in rows), _span([row["shared"] for row in rows]),
             _span(shares, "{:.0f} %") if shares else "", _span(resident) if resident else "",
             _span(launched, "{:.3g}") if launched else "", _span(flying) if flying else "",
             _span([row["tensor_core_instructions"] for row in rows]), max(row.get("mbarriers", 0) for row in rows),
             " ".join(widths)]
        )  # fmt: skip
    return "\n".join(
        [
            "# What the GPU kernels cost",
            "",
            "Counters of the PTX simulator at scaled-down shapes: widths of the model named (unless said), few tokens.",
            "`least`: each byte that the result depends on read once, each byte of the result written once; `planned`:",
            "what our launches must move, with what one leaves for the next and without the vendor's products (`Cost`",
            "in `ivl_kernels/testing/cases`). Sectors are before any cache. Eager: the kernels that PyTorch launches,",
            "bytes from their shapes.",
            "",
            *_table(
                ("op", "shape", "dtype", "direction", "who", "launches", "requested / least", "sectors / least",
                 "distinct / least", "planned / least", "instructions an element", "tensor-core FLOPs",
                 "bank conflicts"), counted
            ),
            "## Roofline at the real shape (microseconds, not measured)",
            "",
            *_table(("op", "shape", "bytes", "FLOPs", *GPUS), rooflines),
            "## Machine code at the catalogue's shapes",
            "",
            "A row: all shapes and launches of a kernel, forward or backward; spills are the most of any, in bytes.",
            "Warps launched: over all multiprocessors of the largest chip of the kind, those that leave at once too.",
            "Bytes in flight: asked of global memory before any of them is used, in the order of the PTX.",
            "",
            *_table(
                ("op", "kernel", "dtype", "target", "variants", "registers", "spills", "shared", "occupancy",
                 "blocks an SM", "warps launched an SM", "bytes in flight a warp", "tensor-core instr.",
                 "mbarrier waits", "access widths"), machine
            ),
            *_host(),
        ]
    )  # fmt: skip


def _host() -> list[str]:
    """What `python -m bench.host_path --json bench/results/host_path.json` kept."""
    if not HOST.exists():
        return []
    found = json.loads(HOST.read_text())
    rows = [[row["name"], row["launches"], f"{row['us']:.1f}", f"{row['first us']:.1f}"] for row in found["calls"]]
    return [
        "## Host microseconds a call",
        "",
        f"On a driver that returns at once (`python -m bench.host_path`): {found['machine']}, torch {found['torch']}.",
        "`first`: a call that no plan is found for.",
        "",
        *_table(("call", "launches", "repeated", "first"), rows),
    ]


def plot(tables: Tables, path: Path) -> None:
    """Rooflines of the GPUs with the ops at their least intensity, and traffic against the least, ours and others'."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = {name: subject.small[0].name for name, subject in SUBJECTS.items()}
    bars = [row for row in tables["counters"] if row["dtype"] == "bf16" and row["shape"] == first[row["op"]]]
    height = max(1, 0.2 * len(bars))
    figure, (roof, traffic) = plt.subplots(2, 1, figsize=(11, 7 + height), height_ratios=(6, height))
    for gpu, (rate, peak) in GPUS.items():
        xs = [0.1, 1e3 * peak / rate, 1e4]
        roof.loglog(xs, [min(peak, x * rate / 1e3) for x in xs], label=gpu)
    rate, peak = GPUS["H100"]
    points: dict[tuple[float, float], list[str]] = {}
    for row in tables["roofline"]:
        if row["flops"]:
            x = row["flops"] / row["bytes"]
            points.setdefault((x, min(peak, x * rate / 1e3)), []).append(f"{row['op']}, {row['shape']}")
    for number, ((x, y), names) in enumerate(sorted(points.items()), 1):
        roof.loglog(x, y, "o", color="black", markersize=4)
        below = (0, -12 - 9 * (number % 2))
        roof.annotate(str(number), (x, y), xytext=below, textcoords="offset points", fontsize=8, ha="center")
        roof.plot([], [], " ", label=f"{number}  {'; '.join(names)}")
    roof.set_xlabel("FLOP a byte, at the least traffic")
    roof.set_ylabel("TFLOP/s bf16 (dots: ceiling on H100)")
    roof.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.01, 1.02), handlelength=1.5)
    colors = {"liger": "C1", "eager": "C3"}
    names = [f"{row['op']}, {row['direction']}: {row['who']}" for row in bars]
    values = [row["requested_bytes"] / row["least"] for row in bars]
    traffic.barh(range(len(bars)), values, color=[colors.get(row["who"], "C0") for row in bars])
    traffic.axvline(1, color="black", linewidth=1)
    traffic.set_xscale("log")
    traffic.set_yticks(range(len(bars)), names, fontsize=7)
    traffic.set_ylim(max(1, len(bars)) - 0.5, -0.5)
    traffic.set_xlim(left=0.5)
    traffic.set_xlabel("bytes requested over the least possible (bf16, the first shape of each op)")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def write(tables: Tables, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = (f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]" for name, rows in tables.items())
    (folder / "inspect.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    (folder / "inspect.md").write_text(markdown(tables))
    plot(tables, folder / "inspect.png")
