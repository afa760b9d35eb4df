"""What is installed, built and found, and which backend serves each op. Works when any of it is broken or missing.

Only the standard library is imported at the top; every probe is guarded, so that a probe that fails is a line of the
report.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "pillow", "flash-attn", "peft")
DEVICES = ("cpu", "cuda")


def collect() -> dict[str, Any]:
    """Everything the doctor knows, as plain data.

    Returns:
        A dict with `package`, `versions`, `system`, `cpu`, `gpus`, `tools`, `built`, `environment`, and `backends`: for
        each op, device and dtype the backend that will serve it and why not a better one. A probe that fails leaves
        `{"error": text}` in its place.
    """
    return {name: _guarded(probe) for name, probe in _PROBES.items()}


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _package() -> dict[str, Any]:
    from . import __version__

    return {"version": __version__, "folder": os.path.dirname(os.path.abspath(__file__))}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _system() -> dict[str, Any]:
    return {"platform": platform.platform(), "machine": platform.machine(), "cores": os.cpu_count()}


def _cpu() -> dict[str, Any]:
    from . import _cpu

    features = dict(_cpu.module().cpu_features())
    torch = importlib.import_module("torch")
    return {**features, "torch_capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def _gpus() -> list[dict[str, Any]]:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return found


def _tools() -> dict[str, str]:
    found = {}
    for name in ("c++", "nvcc", "ninja", "compute-sanitizer"):
        path = shutil.which(name)
        if path is None:
            found[name] = "not found"
            continue
        try:
            output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout.strip()
            lines = [line for line in output.splitlines() if "release" in line] or output.splitlines()[:1]
            found[name] = lines[0].strip() if lines else path
        except (OSError, subprocess.TimeoutExpired) as error:
            found[name] = f"{path}: {error}"
    return found


def _built() -> dict[str, Any]:
    from . import _cpu, _cuda

    why = _cpu.problem()
    return {
        "C++ kernels": why or dict(_cpu.module().build_info()),
        "CUDA C++ kernels": _cuda.built() or "not built (install with nvcc present)",
    }


def _environment() -> dict[str, str]:
    from . import _env

    return {v.name: v.get() or "(default)" for v in _env.VARIABLES}


def _backends() -> dict[str, Any]:
    importlib.import_module("ivl_kernels.ops")
    from . import _dispatch, _library
    from ._checks import FLOAT_NAMES

    table: dict[str, Any] = {}
    for name, op in _library.OPS.items():
        rows = table[name] = {}
        served = {dtype for implementation in op.implementations for dtype in implementation.dtypes}
        dtypes = FLOAT_NAMES if not served or served & set(FLOAT_NAMES) else sorted(served)
        for device in DEVICES:
            for dtype in dtypes:
                try:
                    choice = op.explain(device, dtype)
                except _dispatch.BackendError as error:
                    rows[f"{device} {dtype}"] = {"backend": None, "why": str(error)}
                else:
                    why = "; ".join(f"not {better}: {reason}" for better, reason in choice.passed_over)
                    if device == "cuda" and choice.backend == "reference" and not why:
                        why = "the op has no GPU kernel: plain torch"
                    rows[f"{device} {dtype}"] = {"backend": choice.backend, "why": why}
    return table


_PROBES: dict[str, Callable[[], Any]] = {
    "package": _package,
    "versions": _versions,
    "system": _system,
    "cpu": _cpu,
    "gpus": _gpus,
    "tools": _tools,
    "built": _built,
    "environment": _environment,
    "backends": _backends,
}


def render(found: dict[str, Any]) -> str:
    """The report as text."""
    lines = []
    for section, content in found.items():
        lines.append(f"{section}:")
        if section == "backends" and "error" not in content:
            lines += _render_backends(content)
        elif isinstance(content, dict):
            lines += [f"  {key}: {value}" for key, value in content.items()]
        else:
            lines += [f"  {item}" for item in content] or ["  none"]
    return "\n".join(lines)


def _render_backends(table: dict[str, Any]) -> list[str]:
    """One line an op and device, dtypes with the same answer together."""
    lines = []
    for op, rows in table.items():
        for device in DEVICES:
            answers: dict[tuple[str, str], list[str]] = {}
            for key, row in rows.items():
                kind, dtype = key.split()
                if kind == device:
                    answers.setdefault((row["backend"] or "none", row["why"]), []).append(dtype)
            for (backend, why), dtypes in answers.items():
                named = ", ".join(dtypes) if len(answers) > 1 else "all dtypes"
                lines.append(f"  {op}, {device}, {named}: {backend}{f' ({why})' if why else ''}")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=1, default=str) if args.json else render(found))
    return 0


if __name__ == "__main__":
    sys.exit(run(argparse.Namespace(json="--json" in sys.argv)))
