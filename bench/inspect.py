"""What the compiled GPU kernels cost, without a GPU: `python -m bench.inspect` (or `make inspect`).

Two views of every kernel that an op launches:

* counters of the PTX simulator at a scaled-down shape: bytes requested, sectors, distinct bytes against the least
  possible, instructions an element, tensor-core FLOPs, bank conflicts. The same for Liger-Kernel's kernels, and for
  transformers' eager chain the PyTorch kernels with the bytes of their shapes.
* machine code for each target at the real shape: registers, spills, shared memory, occupancy, access widths.

And the roofline time of the op at the real shape on known GPUs. `--check` compares with the committed baseline.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "bench" / "results" / "inspect.json"
sys.path.insert(0, str(ROOT / "tests"))  # the simulator is a tool of the tests

# GB/s, dense bf16 tensor-core TFLOP/s; NVIDIA's data sheets: A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024),
# HGX B200 (2024; the sparse figure halved).
GPUS = {"A100": (2039, 312), "H100": (3350, 989), "H200": (4800, 989), "B200": (8000, 2250)}
# Multiprocessor limits by target: threads, shared memory in KiB, blocks; 65536 registers everywhere. CUDA C++
# programming guide, table of technical specifications per compute capability.
SM_LIMITS = {80: (2048, 164, 32), 90: (2048, 228, 32), 100: (2048, 228, 32), 120: (1536, 100, 24)}


@dataclass
class Job:
    """One call: the function, the least bytes it must move, its FLOPs, its elements, and how eager does the same."""

    call: Callable[[], Any]
    bytes: int
    flops: int = 0
    elements: int = 1
    eager: Callable[[], Any] | None = None
    peers: dict[str, Callable[[], Any]] | None = None


def fill(*shape: int, real: bool, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random numbers at the scaled shape; at the real one, memory that is reserved and never touched."""
    return torch.randn(*shape).to(dtype) if not real else torch.empty(*shape, dtype=dtype)


def _place_rows(real: bool) -> Job:
    from bench.bench_token_packing import TOKEN
    from ivl_kernels.ops import place_rows

    tokens, rows, width = (3392, 3328, 4096) if real else (96, 64, 1024)
    ids = torch.full((1, tokens), TOKEN)
    ids[:, rows:] = 1
    embeds, values = fill(1, tokens, width, real=real), fill(rows, width, real=real)

    def eager() -> torch.Tensor:
        mask = (ids == TOKEN).unsqueeze(-1).expand_as(embeds)
        return embeds.masked_scatter(mask, values)

    least = 2 * rows * width * 2 + tokens * 8
    return Job(lambda: place_rows(embeds, ids, values, TOKEN, inplace=True), least, 0, rows * width, eager)


def _pack_tokens(real: bool) -> Job:
    from bench.bench_token_packing import TOKEN
    from ivl_kernels.ops import pack_tokens

    batch, tiles, text = (8, 13, 64) if real else (2, 3, 16)
    ids = torch.full((batch, text + 256 * tiles), TOKEN)
    ids[:, :8] = ids[:, -(text - 8) :] = 1
    compress = torch.arange(batch * tiles) % 2 == 0
    kept = batch * text + int(torch.where(compress, 64, 256).sum())
    # ids in; ids, mask, position ids and origin out, and a byte a token for what stayed.
    least = ids.numel() * 8 + 4 * 8 * kept + ids.numel()
    return Job(lambda: pack_tokens(ids, compress, TOKEN, capacity=True), least, 0, ids.numel())


def _router(real: bool) -> Job:
    from ivl_kernels.nn import TileRouter

    tiles, tokens, width, heads = (13, 1024, 1024, 16) if real else (2, 64, 256, 4)
    router = TileRouter(width, heads, dtype=torch.bfloat16).eval()
    z = fill(tiles, tokens + 1, width, real=real)
    # Two attentions read z once each, one of them for three rounds; weights of 2 attentions and 4 blocks once.
    weights = (2 * 4 * width * width + 4 * 8 * width * width + 2 * width) * 2
    least = 4 * tiles * tokens * width * 2 + weights

    def eager() -> Any:
        from ivl_kernels.testing.shipped import ShippedRouter

        shipped = ShippedRouter(width, heads).eval().to(torch.bfloat16)
        return shipped(z)

    return Job(
        torch.no_grad()(lambda: router(z, skip=1)), least, 4 * 4 * tiles * tokens * width * heads,
        tiles * tokens * width, torch.no_grad()(eager),
    )  # fmt: skip


def _moe_shape(real: bool) -> tuple[int, int, int, int, int]:
    """Tokens, width, inner width, experts, experts a token: Qwen3-30B-A3B, or a small one."""
    return (1024, 2048, 768, 128, 8) if real else (64, 256, 128, 8, 2)


def _moe_routing(real: bool) -> Job:
    from ivl_kernels.ops import moe_routing

    tokens, _, _, experts, top_k = _moe_shape(real)
    logits = fill(tokens, experts, real=real)

    def eager() -> Any:
        values, ids = logits.float().softmax(-1).topk(top_k, dim=-1)
        return (values / values.sum(-1, keepdim=True)).to(logits.dtype), ids

    least = tokens * experts * 2 + tokens * top_k * (8 + 2)
    return Job(lambda: moe_routing(logits, top_k, renormalize=True), least, 0, tokens * experts, eager)


def _moe_dispatch(real: bool) -> Job:
    from ivl_kernels.ops import moe_dispatch

    tokens, _, _, experts, top_k = _moe_shape(real)
    ids = torch.rand(tokens, experts).topk(top_k).indices
    least = tokens * top_k * 8 * 3
    return Job(lambda: moe_dispatch(ids, experts), least, 0, tokens * top_k)


def _moe_experts(real: bool) -> Job:
    from ivl_kernels.ops import moe_experts

    tokens, width, inner, experts, top_k = _moe_shape(real)
    ids = torch.rand(tokens, experts).topk(top_k).indices
    hidden, weights = fill(tokens, width, real=real), fill(tokens, top_k, real=real)
    gate_up, down = fill(experts, 2 * inner, width, real=real), fill(experts, width, inner, real=real)
    slots = tokens * top_k
    least = (3 * experts * inner * width + slots * (2 * inner + 2 * width) + 2 * tokens * width) * 2

    def eager() -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for e in range(experts):
            token, slot = torch.where(ids == e)
            gate, up = torch.nn.functional.linear(hidden[token], gate_up[e]).chunk(2, dim=-1)
            value = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[e])
            out.index_add_(0, token, (value * weights[token, slot, None]).to(out.dtype))
        return out

    def liger() -> Any:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        return LigerFusedMoEFunction.apply(hidden, gate_up, down, ids.int(), weights.float())

    return Job(
        lambda: moe_experts(hidden, ids, weights, gate_up, down), least, 6 * slots * inner * width, tokens * width,
        eager, {"liger": liger},
    )  # fmt: skip


def _rope(norm: bool) -> Callable[[bool], Job]:
    def make(real: bool) -> Job:
        v2pe_rope = importlib.import_module("ivl_kernels.ops").v2pe_rope
        tokens, q_heads, kv_heads, dim = (3392, 32, 8, 128) if real else (48, 8, 2, 128)
        q, k = fill(1, q_heads, tokens, dim, real=real), fill(1, kv_heads, tokens, dim, real=real)
        w = fill(dim, real=real)
        inv_freq = 1e6 ** (-torch.arange(0, dim, 2) / dim)
        positions = torch.arange(tokens, dtype=torch.float32)[None]
        angles = torch.outer(positions[0], inv_freq).repeat(1, 2)[None]
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

        def rms(x: torch.Tensor) -> torch.Tensor:
            y = x.float()
            return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

        def rotate(x: torch.Tensor) -> torch.Tensor:
            a, b = x.chunk(2, dim=-1)
            return x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]

        def eager() -> Any:
            x, y = (rms(q), rms(k)) if norm else (q, k)
            return rotate(x), rotate(y)

        def liger() -> Any:
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction
            from liger_kernel.ops.rope import LigerRopeFunction

            x, y = q, k
            if norm:
                x, y = (LigerRMSNormFunction.apply(t, w, 1e-6, 0.0, "llama", False) for t in (q, k))
            return LigerRopeFunction.apply(x.clone(), y.clone(), cos, sin)

        weights = {"q_weight": w, "k_weight": w} if norm else {}
        count = (q_heads + kv_heads) * tokens * dim
        return Job(
            lambda: v2pe_rope(q, k, positions, inv_freq, **weights), 2 * count * 2 + tokens * 4, 0, count, eager,
            {"liger": liger},
        )  # fmt: skip

    return make


def _projector(merge: int) -> Callable[[bool], Job]:
    def make(real: bool) -> Job:
        from ivl_kernels.ops import pixel_shuffle_mlp
        from ivl_kernels.testing import MODELS

        tiles, side, vision = (13, 32, 1024) if real else (1, 8, 64)
        widths = MODELS["InternVL3.5-8B"].projector(merge) if real else (vision * merge * merge, 64, 64)
        x = fill(tiles, side * side + 1, vision, real=real)
        norm, bias = fill(widths[0], real=real), fill(widths[0], real=real)
        weights = [fill(o, i, real=real) for i, o in zip(widths, widths[1:])]
        biases = [fill(o, real=real) for o in widths[1:]]
        rows = tiles * (side // merge) ** 2
        products = sum(i * o for i, o in zip(widths, widths[1:]))
        least = 2 * (rows * widths[0] + products + rows * sum(2 * w for w in widths[1:-1]) + rows * widths[-1])

        def eager() -> torch.Tensor:
            y = x[:, 1:].reshape(tiles, side, side // merge, vision * merge).permute(0, 2, 1, 3).contiguous()
            y = y.view(tiles, side // merge, side // merge, -1).permute(0, 2, 1, 3).contiguous().flatten(0, 2)
            y = torch.nn.functional.layer_norm(y, y.shape[-1:], norm, bias)
            for i, (w, b) in enumerate(zip(weights, biases)):
                y = torch.nn.functional.linear(torch.nn.functional.gelu(y) if i else y, w, b)
            return y

        return Job(
            lambda: pixel_shuffle_mlp(x, norm, bias, weights, biases, merge=merge, skip=1), least, 2 * rows * products,
            rows * widths[-1], eager,
        )  # fmt: skip

    return make


def _swiglu(real: bool) -> Job:
    """Liger's SwiGLU alone, whose work our experts do in the epilogue of the first product."""
    tokens, _, inner, _, top_k = _moe_shape(real)
    gate, up = (fill(tokens * top_k, inner, real=real) for _ in range(2))

    def liger() -> Any:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)

    def eager() -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up

    return Job(liger, 3 * gate.numel() * 2, 0, gate.numel(), eager)


# name -> (job, backends that launch GPU kernels). The name's first word is the op.
SUBJECTS: dict[str, tuple[Callable[[bool], Job], tuple[str, ...]]] = {
    "pixel_shuffle_mlp 1/4": (_projector(2), ("triton",)),
    "pixel_shuffle_mlp 1/16": (_projector(4), ("triton",)),
    "tile_router": (_router, ("triton",)),
    "pack_tokens": (_pack_tokens, ("cuda",)),
    "place_rows": (_place_rows, ("cuda", "triton")),
    "v2pe_rope": (_rope(False), ("triton",)),
    "v2pe_rope with norm": (_rope(True), ("triton",)),
    "moe_routing": (_moe_routing, ("cuda", "triton")),
    "moe_dispatch": (_moe_dispatch, ("cuda", "triton")),
    "moe_experts": (_moe_experts, ("triton",)),
    "liger swiglu": (_swiglu, ("liger",)),
}


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """`backend` for the ops that have it, else the best GPU backend."""
    from ivl_kernels import _dispatch

    choose = _dispatch.choose

    def prefer(op: str, implementations: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        ranked = sorted(implementations, key=lambda i: i.backend != backend)
        return choose(op, ranked, *args, **kwargs)

    with mock.patch.object(_dispatch, "choose", prefer):
        yield


def counters(job: Job, backend: str) -> list[dict[str, Any]]:
    """One row a launch, from the simulator."""
    from gpu import simulated_gpu

    with simulated_gpu(preferred=True) as log, forced(backend):
        job.call()
    return [_counted(report) for report in log]


def _counted(report: Any) -> dict[str, Any]:
    return {
        "kernel": report.kernel,
        "grid": list(report.grid),
        "load_bytes": report.global_load_bytes,
        "store_bytes": report.global_store_bytes,
        "sectors": report.global_load_sectors + report.global_store_sectors,
        "unique_bytes": report.unique_load_bytes + report.unique_store_bytes,
        "unique_sectors": report.unique_load_sectors + report.unique_store_sectors,
        "load_efficiency": report.load_efficiency,
        "store_efficiency": report.store_efficiency,
        "instructions": report.warp_instructions,
        "thread_instructions": sum(report.thread_instructions.values()),
        "mma_flops": report.mma_flops,
        "bank_conflicts": report.bank_conflicts,
        "shared_races": report.shared_races,
    }


def totals(rows: list[dict[str, Any]], job: Job) -> dict[str, Any]:
    """Sums over an op's launches."""

    def add(key: str) -> int:
        return sum(row[key] for row in rows)

    return {
        "launches": len(rows),
        "requested_bytes": add("load_bytes") + add("store_bytes"),
        "sectors": add("sectors"),
        "unique_bytes": add("unique_bytes"),
        "unique_over_least": add("unique_bytes") / job.bytes,
        "sector_bytes_over_least": 32 * add("sectors") / job.bytes,
        "instructions": add("instructions"),
        "thread_instructions_per_element": add("thread_instructions") / job.elements,
        "mma_flops": add("mma_flops"),
        "bank_conflicts": add("bank_conflicts"),
    }


def eager_chain(function: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels that PyTorch launches, each with the bytes of its distinct inputs and outputs; views are free."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from bench.runner import tensors

    rows: list[dict[str, Any]] = []
    free = ("empty", "detach", "alias", "new_empty", "_reshape_alias", "lift_fresh")

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.removeprefix("aten::")
            if not func.is_view and not name.startswith(free):
                touched = {id(t): t.numel() * t.element_size() for t in tensors([args, kwargs or {}, out])}
                rows.append({"kernel": name, "bytes": sum(touched.values())})
            return out

    with Recorder():
        function()
    return rows


ACCESS = re.compile(r"\b(ld|st)\.global((?:\.[\w:]+)*?)(?:\.v(\d+))?\.[bfus](\d+)\b")


def access_widths(ptx: str) -> dict[str, int]:
    """How many global loads and stores of each width, in bytes, the PTX holds; cp.async counts as a load."""
    found: Counter[str] = Counter()
    for kind, _, vector, bits in ACCESS.findall(ptx):
        found[f"{kind}{int(vector or 1) * int(bits) // 8}"] += 1
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*\[[^]]*\],\s*(?:0x)?([0-9a-f]+)", ptx):
        found[f"ld{int(size, 16)}"] += 1
    return dict(sorted(found.items()))


def occupancy(target: int, threads: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's threads that can be resident."""
    most, shared_kib, blocks = SM_LIMITS[target]
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps) if registers else blocks
    by_shared = shared_kib * 1024 // (shared + 1024) if shared else blocks
    return min(most // threads, by_registers, by_shared, blocks) * threads / most


@contextlib.contextmanager
def as_target(target: Any) -> Iterator[None]:
    """Launchers that ask for the GPU's capability are told this one (0 for AMD); nothing checks counts, as none ran."""
    number = 0 if isinstance(target, str) else target
    answers = {"capability": lambda *_: number, "check_counts": lambda *_: None}
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            for function, answer in answers.items():
                if name.startswith("ivl_kernels.ops.") and hasattr(module, function):
                    stack.enter_context(mock.patch.object(module, function, answer))
        yield


def machine_code(job: Job, backend: str, target: Any) -> list[dict[str, Any]]:
    """One row a launch: what the compiler made of it for this target. CUDA C++ launches are read from the build."""
    import aot

    from ivl_kernels import _dispatch

    cuda: list[dict[str, Any]] = []

    def launch(source: str, kernel: str, grid: Any, block: int, args: Any, shared: int) -> None:
        usage = cuda_resources(source).get((target, kernel), {})
        if usage:
            cuda.append({"kernel": kernel, "target": target, "threads": block, **usage})

    with (
        as_target(target),
        aot.compiling(target) as log,
        _dispatch.stand_in("simulator", launch, preferred=True),
        forced(backend),
    ):
        job.call()
    rows = [_described(entry, target) for entry in log] + cuda
    for row in rows:
        if target in SM_LIMITS and row.get("threads"):
            row["occupancy"] = occupancy(target, row["threads"], row["registers"], row["shared"])
    counts = Counter(json.dumps(row) for row in rows)
    return [{**json.loads(row), "launches": count} for row, count in counts.items()]


def _described(entry: Any, target: Any) -> dict[str, Any]:
    mma = entry.count(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)")
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry.asm)
    return {
        "kernel": entry.kernel,
        "target": target,
        "threads": int(threads.group(1)) if threads else 0,
        "registers": entry.registers,
        "spills": entry.spills,
        "shared": entry.shared,
        "tensor_core_instructions": mma,
        "widths": access_widths(entry.asm),
    }


def cuda_resources(source: str) -> dict[tuple[int, str], dict[str, int]]:
    """(target, kernel) -> registers, spills and shared bytes of csrc/cuda/<source>.cu as built."""
    from ivl_kernels import _cuda

    tool = shutil.which("cuobjdump")
    if tool is None:
        import triton

        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    image = _cuda.FATBINS / f"{source}.fatbin"
    if not image.exists():
        return {}
    text = subprocess.run([tool, "-res-usage", str(image)], capture_output=True, text=True, check=True).stdout
    found, arch, name = {}, 0, ""
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match.group(1))
        elif match := re.search(r"Function (\w+):", line):
            name = match.group(1)
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found[arch, name] = {"registers": registers, "spills": local, "stack": stack, "shared": shared}
    return found


def roofline(job: Job) -> dict[str, float]:
    """Least microseconds on each GPU: bytes over bandwidth or FLOPs over the tensor cores' peak."""
    return {gpu: max(job.bytes / rate / 1e3, job.flops / peak / 1e6) for gpu, (rate, peak) in GPUS.items()}


def inspect_subject(name: str, targets: Sequence[Any]) -> dict[str, Any]:
    make, backends = SUBJECTS[name]
    small = make(False)
    result: dict[str, Any] = {"name": name, "least_bytes": small.bytes, "who": {}, "machine": {}}
    for backend in backends:
        rows = counters(small, backend)
        result["who"][backend] = {"total": totals(rows, small), "launches": rows}
    for peer, call in (small.peers or {}).items():
        rows = counters(Job(call, small.bytes, small.flops, small.elements), "")
        result["who"][peer] = {"total": totals(rows, small), "launches": rows}
    if small.eager:
        chain = eager_chain(small.eager)
        result["eager"] = {"launches": len(chain), "bytes": sum(row["bytes"] for row in chain), "kernels": chain}
    real = make(True)
    result["roofline_us"] = roofline(real)
    result["real"] = {"bytes": real.bytes, "flops": real.flops}
    for target in targets:
        for backend in backends:
            if backend != "liger" and not (isinstance(target, str) and backend == "cuda"):
                result["machine"].setdefault(backend, []).extend(machine_code(real, backend, target))
    return result


def available() -> list[str]:
    """Subjects whose GPU backend is there."""
    import ivl_kernels.ops as ops
    from ivl_kernels._library import OPS

    names = []
    for name in SUBJECTS:
        op = name.split()[0]
        modules = [ROOT / "ivl_kernels" / "ops" / folder for folder in (op, "token_packing")]
        present = hasattr(ops, op) or op in OPS or op == "liger"
        if op == "pixel_shuffle_mlp":
            present = (modules[0] / "triton.py").exists()
        if present:
            names.append(name)
    return names


# Counters that must not grow by more than the margin; those of the machine code are exact.
GUARDED = ("requested_bytes", "sectors", "unique_bytes", "instructions", "bank_conflicts", "launches")


def check(new: list[dict[str, Any]], old: list[dict[str, Any]], margin: float) -> list[str]:
    """What got worse by more than `margin` (a share), or spills now and did not."""
    before = {row["name"]: row for row in old}
    worse = []
    for row in new:
        earlier = before.get(row["name"])
        if earlier is None:
            continue
        for who, entry in row["who"].items():
            was = earlier["who"].get(who, {}).get("total")
            if was is None or who == "liger":
                continue
            for key in GUARDED:
                if entry["total"][key] > was[key] * (1 + margin) + 0.5:
                    worse.append(f"{row['name']}, {who}: {key} {was[key]} -> {entry['total'][key]}")
        for who, entries in row["machine"].items():
            spilled = sum(e["spills"] for e in earlier["machine"].get(who, []))
            if sum(e["spills"] for e in entries) > spilled and earlier["machine"].get(who):
                worse.append(f"{row['name']}, {who}: spills")
    return worse


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# What the GPU kernels cost",
        "",
        "Counters of the PTX simulator at a scaled-down shape, bfloat16. `least` is the bytes that any implementation",
        "must move; sectors are before any cache. Eager: the kernels that PyTorch launches, bytes from their shapes.",
        "",
        "| op | who | launches | requested / least | sectors / least | distinct / least | instructions an element |"
        " tensor-core FLOPs | bank conflicts |",
        "|" + " --- |" * 9,
    ]
    for row in rows:
        for who, entry in row["who"].items():
            t = entry["total"]
            lines.append(
                f"| {row['name']} | {who} | {t['launches']} | {t['requested_bytes'] / row['least_bytes']:.2f} | "
                f"{t['sector_bytes_over_least']:.2f} | {t['unique_over_least']:.2f} | "
                f"{t['thread_instructions_per_element']:.1f} | {t['mma_flops']:,} | {t['bank_conflicts']:,} |"
            )
        if "eager" in row:
            e = row["eager"]
            lines.append(
                f"| {row['name']} | eager | {e['launches']} | {e['bytes'] / row['least_bytes']:.2f} | | | | | |"
            )
    lines += [
        "",
        "## Roofline at the real shape (microseconds, not measured)",
        "",
        f"| op | bytes | FLOPs | {' | '.join(GPUS)} |",
        "|" + " --- |" * (3 + len(GPUS)),
    ]
    for row in rows:
        times = " | ".join(f"{row['roofline_us'][gpu]:.1f}" for gpu in GPUS)
        lines.append(f"| {row['name']} | {row['real']['bytes']:,} | {row['real']['flops']:,} | {times} |")
    lines += [
        "",
        "## Machine code at the real shape",
        "",
        "| op | kernel | launches | target | registers | spills | shared | occupancy | tensor-core instr. | accesses |",
        "|" + " --- |" * 10,
    ]
    for row in rows:
        for who, entries in row["machine"].items():
            for e in entries:
                target = f"sm_{e['target']}" if isinstance(e["target"], int) else e["target"]
                widths = " ".join(f"{k}:{v}" for k, v in e.get("widths", {}).items())
                share = f"{e['occupancy']:.0%}" if "occupancy" in e else ""
                lines.append(
                    f"| {row['name']} ({who}) | {e['kernel']} | {e['launches']} | {target} | {e['registers']} | "
                    f"{e['spills']} | {e['shared']} | {share} | {e.get('tensor_core_instructions', '')} | {widths} |"
                )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Rooflines of the GPUs with the ops at their least intensity, and traffic against the least, ours and others'."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (roof, bars) = plt.subplots(1, 2, figsize=(16, 0.4 * len(rows) + 4))
    for gpu, (rate, peak) in GPUS.items():
        xs = [0.1, 1e3 * peak / rate, 1e4]
        roof.loglog(xs, [min(peak, x * rate / 1e3) for x in xs], label=gpu)
    rate, peak = GPUS["H100"]
    products = [row for row in rows if row["real"]["flops"]]
    for i, row in enumerate(products):
        x = row["real"]["flops"] / row["real"]["bytes"]
        y = min(peak, x * rate / 1e3)
        roof.loglog(x, y, "o", color="black")
        roof.annotate(row["name"], (x, y), xytext=(6, -10 * (i % 3) - 8), textcoords="offset points", fontsize=8)
    roof.set_xlabel("FLOP a byte, at the least traffic")
    roof.set_ylabel("TFLOP/s bf16 (dots: ceiling on H100)")
    roof.legend()
    names, values, colors = [], [], []
    for row in rows:
        for who, entry in row["who"].items():
            names.append(f"{row['name']}: {who}")
            values.append(entry["total"]["requested_bytes"] / row["least_bytes"])
            colors.append("C1" if who == "liger" else "C0")
        if "eager" in row:
            names.append(f"{row['name']}: eager")
            values.append(row["eager"]["bytes"] / row["least_bytes"])
            colors.append("C3")
    bars.barh(range(len(names)), values, color=colors)
    bars.axvline(1, color="black", linewidth=1)
    bars.set_xscale("log")
    bars.set_yticks(range(len(names)), names, fontsize=7)
    bars.invert_yaxis()
    bars.set_xlabel("bytes requested over the least possible")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.inspect", description="What the compiled GPU kernels cost, without a GPU.")
    parser.add_argument("--op", action="append", default=[], help=f"first word of: {', '.join(SUBJECTS)}")
    parser.add_argument("--arch", action="append", default=[], help="80, 90, 100, 120 or gfx942; default all")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "inspect", help="folder of the reports")
    parser.add_argument("--check", action="store_true", help="exit 1 if worse than the committed baseline")
    parser.add_argument("--margin", type=float, default=0.05, help="what --check tolerates, as a share")
    parser.add_argument("--update", action="store_true", help="write the baseline")
    args = parser.parse_args(argv)
    targets = [int(a) if a.isdigit() else a for a in args.arch] or [80, 90, 100, 120, "gfx942"]
    names = [n for n in available() if not args.op or n.split()[0] in args.op]
    rows = []
    for name in names:
        print(name, flush=True)
        rows.append(inspect_subject(name, targets))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "inspect.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "inspect.md").write_text(markdown(rows))
    plot(rows, args.out / "inspect.png")
    print(markdown(rows))
    worse = check(rows, json.loads(BASELINE.read_text()), args.margin) if args.check else []
    for line in worse:
        print(f"WORSE: {line}")
    if args.update:
        BASELINE.parent.mkdir(parents=True, exist_ok=True)
        BASELINE.write_text(json.dumps(rows, indent=1) + "\n")
        (BASELINE.parent / "inspect.md").write_text(markdown(rows))
        shutil.copy(args.out / "inspect.png", BASELINE.parent / "inspect.png")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
