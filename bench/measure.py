"""How one benchmark case is measured: correctness first, interleaved variants, spread, peak memory, floor, ratios.

Every variant of a case is timed in one process, one call each in turn, in a new random order each round. A ratio is the
median over rounds of (time of the other variant / time of `ours`) within the same round, so that drift of the machine
cancels. A variant whose result is wrong gets no ratio. On a GPU each variant is timed twice (`gpu_time`).
"""

from __future__ import annotations

import functools
import gc
import math
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ivl_kernels.testing import error_report
from ivl_kernels.testing.cases import Cost

from . import gpu_time

OURS = "ours"


@dataclass
class Work:
    """What one case runs.

    Attributes:
        variants: name -> function without arguments that returns a tensor or a nest of tensors. `ours` is the kernel
            under test, `eager` what the model does today, `compile` torch.compile of the same; other names are peers.
        truth: the float64 result, in the same nest; every checked variant may be at most twice as far from it as
            `same_dtype` is. None: results must equal those of `same_dtype` bit for bit.
        same_dtype: the variant whose error sets the tolerance.
        select: the part of a variant's result that is checked, in the nest of `truth`; everything by default.
        unchecked: variants that compute something else, such as a GEMM-only floor.
        reset: called before every call, untimed; for variants that change their inputs.
        cost: of a case that knows it only with its inputs.
    """

    variants: dict[str, Callable[[], Any]]
    truth: Callable[[], Any] | None = None
    same_dtype: str = "eager"
    select: Callable[[Any], Any] = lambda result: result
    unchecked: Sequence[str] = ()
    reset: Callable[[], None] | None = None
    cost: Cost | None = None


@dataclass
class Case:
    """One shape of one op.

    Attributes:
        op: the op's name; `--op` selects by it.
        name: unique within the op; a row of the table.
        params: what was varied, for the JSON.
        make: builds inputs and variants when the case's turn comes.
        bytes: the least, as `ivl_kernels.testing.cases.Cost` defines it; part of the floor.
        flops: of the matrix products; part of the floor.
        dtype: whose GEMM rate the floor uses.
        seconds: measuring time, all variants together.
    """

    op: str
    name: str
    params: dict[str, Any]
    make: Callable[[], Work]
    bytes: float = 0
    flops: float = 0
    dtype: torch.dtype = torch.float32
    seconds: float = 6.0


@dataclass
class Timing:
    """Times of one variant in milliseconds, one a round, and what else is known of it.

    Attributes:
        times: of a call; on a GPU of a replay of its CUDA graph, none where `waits`.
        wall: on a GPU of a call that finds it idle.
        waits: why it has no CUDA graph.
    """

    times: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    waits: str = ""
    peak_bytes: int | None = None
    error: str = ""
    failed: str = ""
    checked: bool = True


def device() -> str:
    """ "cuda" when there is a GPU, else "cpu"."""
    return os.environ.get("IVL_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def on_gpu() -> bool:
    return device() != "cpu"


def compiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """A variant that calls torch.compile(function) with these arguments; compiles on its first (untimed) call."""
    torch._dynamo.reset()
    target = torch.compile(function, dynamic=False)
    return lambda: target(*args, **kwargs)


def backward(output: Any, inputs: Sequence[torch.Tensor], grads: Any) -> tuple[torch.Tensor, ...]:
    """Gradients of `output` with respect to `inputs`; for forward + backward variants."""
    return torch.autograd.grad(output, inputs, grads)


def tensors(nest: Any) -> list[torch.Tensor]:
    """All tensors of a nest of tuples, lists, dicts and dataclasses, in order."""
    if isinstance(nest, torch.Tensor):
        return [nest]
    if isinstance(nest, dict):
        return [t for value in nest.values() for t in tensors(value)]
    if isinstance(nest, (list, tuple)):
        return [t for value in nest for t in tensors(value)]
    if hasattr(nest, "__dataclass_fields__"):
        return [t for name in nest.__dataclass_fields__ for t in tensors(getattr(nest, name))]
    return []


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def sync() -> None:
    if on_gpu():
        torch.cuda.synchronize()


@functools.cache
def copy_rate() -> float:
    """Bytes a second of a large warm copy, read and written bytes both counted."""
    size = (1 << 30) if on_gpu() else (128 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device())
    target = torch.ones_like(source)
    return 2 * size / _best_time(lambda: target.copy_(source))


@functools.cache
def gemm_rate(dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product."""
    n = 8192 if on_gpu() else 2048
    a, b = (torch.randn(n, n, device=device()).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _best_time(lambda: torch.mm(a, b, out=out), rounds=5)


def _best_time(function: Callable[[], Any], rounds: int = 7) -> float:
    function()
    times = []
    for _ in range(rounds):
        sync()
        start = time.perf_counter()
        function()
        sync()
        times.append(time.perf_counter() - start)
    return quantile(times, 0.5)


def floor_ms(cost: Cost, dtype: torch.dtype) -> float:
    """Least possible time: bytes over the copy rate or FLOPs over the GEMM rate, whichever is longer."""
    memory = cost.least / copy_rate() if cost.least else 0.0
    compute = cost.flops / gemm_rate(dtype) if cost.flops else 0.0
    return 1e3 * max(memory, compute)


def _status_kib(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match.group(1)) if match else 0


def _trim() -> None:
    import ctypes

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_bytes(function: Callable[[], Any]) -> int | None:
    """Memory one call needs at its worst, result included: CUDA allocator, or growth of the resident set."""
    gc.collect()
    if on_gpu():
        sync()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        sync()
        return torch.cuda.max_memory_allocated() - before
    try:
        _trim()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_kib("VmRSS")
        result = function()
        peak = _status_kib("VmHWM")
        del result
        return max(0, peak - before) * 1024
    except OSError:
        return None


def check(work: Work, timings: dict[str, Timing]) -> None:
    """Fill `error` or `failed` of every variant. A variant that raises has failed; the others still run."""
    results: dict[str, list[torch.Tensor]] = {}
    for name, function in work.variants.items():
        try:
            if work.reset:
                work.reset()
            result = function()
            result = result if name in work.unchecked else work.select(result)
            results[name] = [t.detach().clone() for t in tensors(result)]
            sync()
        except Exception as error:  # a peer that cannot run is a row of the table, not the end of it
            timings[
                name
            ].failed = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
            )
    base = results.get(work.same_dtype)
    truth = None
    if work.truth is not None:
        if work.reset:
            work.reset()
        truth = [t.detach() for t in tensors(work.truth())]
    for name, got in results.items():
        timing = timings[name]
        if name in work.unchecked:
            timing.checked = False
        elif base is None:
            timing.failed = f"the variant it is compared with ({work.same_dtype}) failed"
        elif len(got) != len(base) or any(a.shape != b.shape for a, b in zip(got, base)):
            timing.failed = f"shapes {[list(t.shape) for t in got]}, {work.same_dtype}: {[list(t.shape) for t in base]}"
        else:
            _compare(timing, got, base, truth)


def _compare(
    timing: Timing, got: list[torch.Tensor], base: list[torch.Tensor], truth: list[torch.Tensor] | None
) -> None:
    for i, (mine, other) in enumerate(zip(got, base)):
        if truth is None or not mine.is_floating_point():
            if not torch.equal(mine, other):
                timing.failed = f"result {i} differs"
                return
            timing.error = timing.error or "equal"
        else:
            report = error_report(mine, truth[i], other)
            if not report.passed:
                timing.failed = f"result {i}: {report}"
                return
            timing.error = str(report)


def measure(work: Work, timings: dict[str, Timing], seconds: float, rounds: tuple[int, int]) -> None:
    """One call of every working variant in each round, order shuffled; between `rounds` and until `seconds` passed."""
    names = [name for name in work.variants if not timings[name].failed]
    shuffle = random.Random(0)
    for name in names:  # warm-up
        _reset(work)
        work.variants[name]()
    one = _on_gpu(work, timings, names) if on_gpu() else _on_cpu(work, timings)
    names = [name for name in names if not timings[name].failed]
    gc.collect()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while done < rounds[0] or (done < rounds[1] and time.perf_counter() - start < seconds):
            shuffle.shuffle(names)
            for name in names:
                one(name)
            done += 1
    finally:
        gc.enable()


def _reset(work: Work) -> None:
    if work.reset:
        work.reset()


def _on_cpu(work: Work, timings: dict[str, Timing]) -> Callable[[str], None]:
    def one(name: str) -> None:
        _reset(work)
        function = work.variants[name]
        start = time.perf_counter()
        result = function()
        timings[name].times.append(1e3 * (time.perf_counter() - start))
        del result

    return one


def _on_gpu(
    work: Work, timings: dict[str, Timing], names: Sequence[str], cuda: Any = torch.cuda,
    flush: Callable[[], None] = gpu_time.flush_l2,
) -> Callable[[str], None]:  # fmt: skip
    reset = functools.partial(_reset, work)
    graphs = {}
    for name in names:
        graphs[name], timings[name].waits = gpu_time.capture(work.variants[name], reset, cuda)
        if graphs[name] is not None and name not in work.unchecked:
            timings[name].failed = _replay_problem(work, name, graphs[name])

    def one(name: str) -> None:
        if graphs[name] is not None:
            timings[name].times.append(gpu_time.replay_ms(graphs[name], reset, flush, cuda))
        timings[name].wall.append(gpu_time.wall_ms(work.variants[name], reset, flush, cuda))

    return one


def _replay_problem(work: Work, name: str, graph: Any) -> str:
    """Whether a replay does not do what a call does, or "". Roughly: sums by atomics differ from run to run."""
    call = work.variants[name]
    _reset(work)
    result = call()
    inputs = {t.untyped_storage().data_ptr() for t in tensors(result)}
    expected = [t.detach().clone() for t in tensors(work.select(result))]
    for tensor in tensors(graph.kept):
        if tensor.untyped_storage().data_ptr() not in inputs:
            tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 0)
    _reset(work)
    graph.replay()
    for mine, want in zip(tensors(work.select(graph.kept)), expected, strict=True):
        near = 0.05 * want.abs().nan_to_num().amax().item() if want.is_floating_point() and want.numel() else 0
        if not torch.allclose(mine.detach(), want, rtol=0, atol=near, equal_nan=True):
            return "a replay of its CUDA graph gives something else than a call"
    return ""


def run_case(case: Case, quick: bool = False) -> dict[str, Any]:
    """Check, measure and summarise one case; a row of the JSON."""
    work = case.make()
    timings = {name: Timing() for name in work.variants}
    check(work, timings)
    for name, timing in timings.items():
        if not timing.failed:
            if work.reset:
                work.reset()
            timing.peak_bytes = peak_bytes(work.variants[name])
    measure(work, timings, min(case.seconds, 1.5) if quick else case.seconds, (3, 20) if quick else (7, 400))
    ours = timings.get(OURS)
    cost = work.cost or Cost(int(case.bytes), int(case.flops))
    return {
        "op": case.op,
        "name": case.name,
        "params": case.params,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": cost.least,
        "flops": cost.flops,
        "floor_ms": floor_ms(cost, case.dtype),
        "ok": ours is not None and not ours.failed,
        "variants": {name: _summary(timing, ours) for name, timing in timings.items()},
    }


def _summary(timing: Timing, ours: Timing | None) -> dict[str, Any]:
    row: dict[str, Any] = {"failed": timing.failed, "error": timing.error, "checked": timing.checked}
    times = timing.times or timing.wall
    if timing.failed or not times:
        return row
    row |= {
        "rounds": len(times),
        "median_ms": quantile(times, 0.5),
        "q20_ms": quantile(times, 0.2),
        "q80_ms": quantile(times, 0.8),
        "min_ms": min(times),
        "peak_bytes": timing.peak_bytes,
    }
    if timing.wall:
        row |= {"wall_ms": quantile(timing.wall, 0.5), "waits": timing.waits}
    if ours is not None and not ours.failed and ours is not timing:
        if timing.times and ours.times:
            row |= _ratios("ratio", timing.times, ours.times)
        if timing.wall and ours.wall:
            row |= _ratios("wall_ratio", timing.wall, ours.wall)
    return row


def _ratios(name: str, others: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    ratios = [other / mine for other, mine in zip(others, ours)]
    return {f"{name}{suffix}": quantile(ratios, q) for suffix, q in (("", 0.5), ("_q20", 0.2), ("_q80", 0.8))}
