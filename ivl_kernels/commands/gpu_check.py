"""`ivl-kernels gpu-check`: one command that proves the ops on this machine's GPU and prints the honest table.

Correctness of every op, backend and dtype, forward and backward, against float64; determinism; CUDA graphs; sizes past
2^31; compute-sanitizer; an end-to-end patched model; and the benchmark table. `--device cpu` rehearses the same code
on the CPU. No network. One JSON and one Markdown report; exit code 1 when anything fails.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import CommandError
from . import bench as bench_command

SECONDS = 400  # after this no benchmark case is started, so that everything ends within 8 minutes
DTYPES = ("float32", "bfloat16", "float16", "float64")
FLOAT64_BOUND = 1e-12


@dataclass
class Result:
    """One line of the report. `status`: "ok", "FAILED" or "skipped"."""

    check: str
    subject: str
    status: str
    detail: str = ""
    seconds: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder of the reports")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the same code path")
    parser.add_argument("--no-bench", action="store_true", help="leave the benchmark table out")
    parser.add_argument("-k", default="", metavar="TEXT", help="only samples whose title contains this")


def run(args: argparse.Namespace) -> int:
    import torch

    start = time.monotonic()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("no CUDA device is available; --device cpu rehearses the check on the CPU")
    results: list[Result] = []
    for check in (_correctness, _graphs, _devices, _huge, _model, _sanitizer):
        for result in _all(check, args.device, args.k):
            results.append(result)
            print(f"{result.status:8} {result.check}: {result.subject} {result.detail}".rstrip(), flush=True)
    if not results:
        raise CommandError(f"-k: no sample's title contains '{args.k}'")
    environment = _environment(args.device)
    _write(args.out, environment, results, {})  # the benchmark cannot take this away
    if not args.no_bench:
        bench: dict[str, Any] = {}
        outcome = _guard("benchmark", "the quick table", lambda: bench.update(_bench(args.device, start)) or "")
        rows = [r for r in bench.get("rows", []) if not r["ok"]]
        results += [outcome] + [
            Result("benchmark", f"{r['op']}: {r['name']}", "FAILED", r["variants"]["ours"]["failed"]) for r in rows
        ]
        _write(args.out, environment, results, bench)
    failed = [r for r in results if r.status == "FAILED"]
    for result in failed:
        print(f"FAILED   {result.check}: {result.subject} {result.detail}"[:300])
    counts = {s: sum(r.status == s for r in results) for s in ("ok", "FAILED", "skipped")}
    print(
        f"{counts['ok']} ok, {counts['FAILED']} failed, {counts['skipped']} skipped in "
        f"{time.monotonic() - start:.0f} s; reports in {args.out}"
    )
    return 1 if failed else 0


def _all(check: Callable[[str, str], Iterator[Result]], device: str, pattern: str) -> Iterator[Result]:
    """The results of one check; one that breaks off is a failure, not the end of the others."""
    try:
        yield from check(device, pattern)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        yield Result(check.__name__.strip("_"), "broke off", "FAILED", f"{type(error).__name__}: {error}")


def _write(folder: Path, environment: dict[str, Any], results: list[Result], bench: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "results": [asdict(r) for r in results], "bench": bench}
    (folder / "gpu_check.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    (folder / "gpu_check.md").write_text(_markdown(environment, results, bench))


def _guard(check: str, subject: str, function: Callable[[], str]) -> Result:
    """Run one check; what it returns is the detail, what it raises the failure."""
    from .. import _dispatch

    start = time.perf_counter()
    try:
        status, detail = "ok", function()
    except _dispatch.BackendError as error:  # the backend serves the dtype, but not these options
        status, detail = "skipped", str(error)
    except AssertionError as error:
        status, detail = "FAILED", str(error)
    except Exception as error:
        status, detail = "FAILED", f"{type(error).__name__}: {error}"
        traceback.print_exc(file=sys.stderr)
    return Result(check, subject, status, detail, time.perf_counter() - start)


def _cast(values: Any, dtype: Any, device: str) -> Any:
    """A nest with its float tensors in `dtype` and everything on `device`."""
    from torch.utils._pytree import tree_map

    return tree_map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype).detach(), values)


def _forward_backward(sample: Any, inputs: dict[str, Any], backend: str) -> list[Any]:
    """Outputs, then the gradients of a fixed weighting of them. Backend "plain": eager torch if the sample has it."""
    import torch
    from torch.utils._pytree import tree_leaves

    leaves = [leaf for name in sample.gradients for leaf in tree_leaves(inputs[name])]
    for leaf in leaves:
        leaf.requires_grad_()
    if backend == "plain":
        out = sample.plain(inputs) if sample.plain else sample.call(inputs, "reference")
    else:
        out = sample.call(inputs, backend)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    grads: tuple[Any, ...] = ()
    if leaves:
        weights = [torch.linspace(-1, 1, o.numel(), device=o.device).to(o.dtype).view_as(o) for o in outputs]
        grads = torch.autograd.grad(outputs, leaves, weights)
        for leaf in leaves:
            leaf.requires_grad_(False)
    return [t.detach() for t in (*outputs, *grads)]


def _correctness(device: str, pattern: str) -> Iterator[Result]:
    import torch

    from .. import _gpu, _library
    from ..testing.samples import samples

    kind = _gpu.device_kind(device)
    for sample in samples(large=device == "cuda"):
        if pattern not in sample.title:
            continue
        master = sample.make(torch.Generator().manual_seed(0))
        backends = [i.backend for i in _library.OPS[sample.op].implementations if not i.devices or kind in i.devices]
        for dtype in DTYPES if _has_floats(master) else DTYPES[:1]:
            subject = _Subject(sample, _cast(master, getattr(torch, dtype), device), device)
            for backend in backends:
                title = f"{sample.title}, {backend}, {dtype}"
                why = _unserved(sample.op, subject.key_dtype(dtype), device, backend)
                if not why:
                    yield _guard("correctness", title, lambda: subject.check(backend))  # noqa: B023
                elif any(text in why for text in ("not load", "not built", "not installed")):
                    yield Result("correctness", title, "skipped", why)
        gc.collect()


class _Subject:
    """A sample in one dtype; the truth and plain torch are computed once, for all backends."""

    def __init__(self, sample: Any, inputs: dict[str, Any], device: str) -> None:
        self.sample, self.inputs, self.device = sample, inputs, device

    def key_dtype(self, dtype: str) -> str:
        return dtype if _has_floats(self.inputs) else "int64"

    @functools.cached_property
    def truth(self) -> list[Any]:
        import torch

        return _forward_backward(self.sample, _cast(self.inputs, torch.float64, self.device), "reference")

    @functools.cached_property
    def plain(self) -> list[Any]:
        return _forward_backward(self.sample, self.inputs, "plain")

    def check(self, backend: str) -> str:
        import torch

        from ..testing import assert_accurate, poisoned

        with poisoned():
            got = _forward_backward(self.sample, self.inputs, backend)
        for index, (mine, true, base) in enumerate(zip(got, self.truth, self.plain)):
            if mine.dtype == torch.float64:
                # The truth itself is rounded to float64: a fixed, stated bound instead of a ratio.
                error, scale = (mine - true).abs().amax(), true.abs().amax()
                assert error <= FLOAT64_BOUND * scale, f"tensor {index}: error {error:.1e} of {scale:.1e}"
            elif mine.is_floating_point():
                assert_accurate(mine, true, base, f"tensor {index}")
            else:
                assert torch.equal(mine, base), f"tensor {index}: integers differ"
        passes = f"{len(got)} tensors, forward{' and backward' if self.sample.gradients else ''}"
        if backend in ("reference", "torch"):  # torch's own kernels, which on a GPU may add with atomics
            return passes
        again = _forward_backward(self.sample, self.inputs, backend)
        assert all(torch.equal(a, b) for a, b in zip(got, again)), "a second run gives other bits"
        return f"{passes}, deterministic"


def _has_floats(values: Any) -> bool:
    from torch.utils._pytree import tree_leaves

    return any(leaf.is_floating_point() for leaf in tree_leaves(values))


def _unserved(op: str, dtype: str, device: str, backend: str) -> str:
    import torch

    from .. import _dispatch, _library

    try:
        _dispatch.choose(op, _library.OPS[op].implementations, torch.device(device), dtype, forced=backend, warn=False)
    except _dispatch.BackendError as error:
        return str(error)
    return ""


def _graphs(device: str, pattern: str) -> Iterator[Result]:
    """Capture in a CUDA graph, replay on new inputs, compare with a plain call."""
    import torch

    from ..testing.samples import samples

    for sample in samples(large=device == "cuda"):
        if not sample.graph or pattern not in sample.title:
            continue
        if device == "cpu":
            yield Result("CUDA graph", sample.title, "skipped", "no GPU")
            continue

        def check(sample: Any = sample) -> str:
            from torch.utils._pytree import tree_leaves

            inputs, fresh = (
                _cast(sample.make(torch.Generator().manual_seed(s)), torch.bfloat16, device) for s in (0, 1)
            )
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    sample.call(inputs, "")
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = tree_leaves(sample.call(inputs, ""))
            for old, new in zip(tree_leaves(inputs), tree_leaves(fresh)):
                old.copy_(new)
            for out in captured:
                out.fill_(0)
            graph.replay()
            torch.cuda.synchronize()
            for got, expected in zip(captured, tree_leaves(sample.call(fresh, ""))):
                torch.testing.assert_close(got, expected, msg=lambda text: f"the replay differs: {text}")
            return "captured and replayed on other inputs"

        yield _guard("CUDA graph", sample.title, check)


def _devices(device: str, pattern: str) -> Iterator[Result]:
    """Tensors on a GPU that is not the current one, forward and backward."""
    import torch

    from ..testing.samples import samples

    for sample in samples():
        if pattern not in sample.title:
            continue
        if device == "cpu" or torch.cuda.device_count() < 2:
            yield Result("second GPU", sample.title, "skipped", "no second GPU")
            return

        def check(sample: Any = sample) -> str:
            master = _cast(sample.make(torch.Generator().manual_seed(0)), torch.bfloat16, "cpu")
            first, second = (_forward_backward(sample, _cast(master, torch.bfloat16, f"cuda:{i}"), "") for i in (0, 1))
            for a, b in zip(first, second):
                torch.testing.assert_close(a.cpu(), b.cpu())
            return "the same as on the first"

        yield _guard("second GPU", sample.title, check)


def _free_bytes(device: str) -> int:
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def _huge(device: str, pattern: str) -> Iterator[Result]:
    """Element offsets past 2^31, where a 32-bit product of index and stride wraps around."""
    import torch

    for subject, gigabytes, check in (
        ("place_rows past 2^31 elements", 13, _huge_rows),
        ("pixel_shuffle_mlp past 2^31 elements", 6, _huge_tiles),
        ("v2pe_rope_ past 2^31 elements", 6, _huge_rope),
        ("moe_experts past 2^31 elements", 9, _huge_experts),
    ):
        if pattern not in subject:
            continue
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        if device == "cpu":
            yield Result("huge offsets", subject, "skipped", "the rehearsal does not touch 4 GB")
        elif _free_bytes(device) < gigabytes * 10**9:
            yield Result("huge offsets", subject, "skipped", f"needs {gigabytes} GB of free memory")
        else:
            yield _guard("huge offsets", subject, functools.partial(check, device))


# Each takes the number of elements, so that a test can run it small.
def _huge_rows(device: str, elements: int = 2**31, width: int = 4096) -> str:
    import torch

    from .. import ops

    length = elements // width + 64
    embeds = torch.zeros(1, length, width, dtype=torch.float16, device=device)
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    ids[0, -3:] = 7
    rows = torch.arange(3 * width, device=device).remainder(97).to(torch.float16).view(3, width)
    ops.place_rows(embeds, ids, rows, 7, inplace=True)
    assert torch.equal(embeds[0, -3:], rows), "rows past 2^31 elements are wrong"
    assert not embeds[0, :-3].any(), "rows that have no placeholder were written"
    return f"{embeds.numel()} elements"


def _huge_tiles(device: str, elements: int = 2**31, width: int = 1024) -> str:
    import torch

    from .. import ops

    tiles = elements // (1025 * width) + 2
    x = torch.zeros(tiles, 1025, width, dtype=torch.bfloat16, device=device)
    x[-1].normal_()
    one = torch.ones(4 * width, dtype=torch.bfloat16, device=device)
    weight = torch.randn(64, 4 * width, device=device).to(torch.bfloat16)
    weights, biases = [weight, torch.eye(64, device=device).to(weight)], [weight[:, 0].contiguous()] * 2
    last = torch.tensor([tiles - 1], device=device)
    got = ops.pixel_shuffle_mlp(x, one, one, weights, biases, skip=1, tile_indices=last)
    expected = ops.pixel_shuffle_mlp(x[-1:].clone(), one, one, weights, biases, skip=1)
    torch.testing.assert_close(got, expected)
    return f"{x.numel()} elements"


def _huge_rope(device: str, elements: int = 2**31, heads: int = 32) -> str:
    import torch

    from .. import ops

    tokens = elements // (heads * 128) + 64
    q = torch.zeros(1, tokens, heads, 128, dtype=torch.bfloat16, device=device)
    q[:, -64:].normal_()
    k = q[:, :, :1].clone()
    positions = torch.arange(tokens, device=device).remainder(1000).float()
    frequencies = ops.rope_frequencies(128, 1e6)[0].to(device)
    tail = q[:, -64:].clone(), k[:, -64:].clone()
    expected = ops.v2pe_rope(*tail, positions[-64:], frequencies, heads_dim=2, backend="reference")
    ops.v2pe_rope_(q, k, positions, frequencies, heads_dim=2)
    for got, want in zip((q, k), expected):
        torch.testing.assert_close(got[:, -64:], want, rtol=0.02, atol=0.02)
        assert not got[:, :-64].any(), "zeros were not rotated to zeros"
    return f"{q.numel()} elements"


def _huge_experts(device: str, elements: int = 2**31, width: int = 4096, inner: int = 2048) -> str:
    import torch

    from .. import ops

    experts = elements // (2 * inner * width) + 2
    gate_up = torch.zeros(experts, 2 * inner, width, dtype=torch.bfloat16, device=device)
    down = torch.zeros(experts, width, inner, dtype=torch.bfloat16, device=device)
    gate_up[-1].normal_().mul_(width**-0.5)
    down[-1].normal_().mul_(inner**-0.5)
    hidden = torch.randn(4, width, device=device).to(torch.bfloat16)
    ids, weights = torch.full((4, 1), experts - 1, device=device), torch.ones_like(hidden[:, :1])
    got = ops.moe_experts(hidden, ids, weights, gate_up, down)
    expected = ops.moe_experts(hidden, ids * 0, weights, gate_up[-1:].clone(), down[-1:].clone())
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    return f"{gate_up.numel()} elements"


def _sanitizer(device: str, pattern: str) -> Iterator[Result]:
    """The CUDA C++ kernels under compute-sanitizer."""
    from .. import _cuda

    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    for mode in ("memcheck", "racecheck", "initcheck"):
        subject = f"compute-sanitizer {mode}"
        if pattern not in subject:
            continue
        why = "no GPU" if device == "cpu" else _cuda.problem() or (None if tool else "compute-sanitizer is not on PATH")
        if why or tool is None:
            yield Result("sanitizer", subject, "skipped", why or "")
            continue
        start = time.perf_counter()
        try:
            status, detail = _sanitize(tool, mode)
        except subprocess.TimeoutExpired as error:
            status, detail = "skipped", f"not done in {error.timeout:.0f} s"
        yield Result("sanitizer", subject, status, detail, time.perf_counter() - start)


def _sanitize(tool: str, mode: str) -> tuple[str, str]:
    """Status and detail. Without torch's caching allocator, which would hide an access past a tensor's end."""
    code = "from ivl_kernels.commands.gpu_check import run_cuda_kernels; run_cuda_kernels()"
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [tool, "--tool", mode, "--error-exitcode", "3", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=settings)
    if done.returncode == 0:
        return "ok", "clean"
    return "FAILED", f"exit status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"


def run_cuda_kernels() -> None:
    """Every op that has a CUDA C++ backend, once, on small inputs; run under compute-sanitizer."""
    import torch

    from .. import _library
    from ..testing.samples import samples

    for sample in samples():
        if any(i.backend == "cuda" for i in _library.OPS[sample.op].implementations):
            inputs = _cast(sample.make(torch.Generator().manual_seed(0)), torch.float32, "cuda")
            _forward_backward(sample, inputs, "cuda")
    torch.cuda.synchronize()


def _model(device: str, pattern: str) -> Iterator[Result]:
    """Tiny InternVL models, plain and patched: the same tokens, layer by layer the same values."""
    subject = "patched model"
    if pattern not in subject:
        return
    try:
        import transformers  # noqa: F401
    except ImportError:
        yield Result("model", subject, "skipped", "transformers is not installed")
        return
    import torch

    from .. import verify
    from ..testing import tiny

    for family in tiny.FAMILIES:

        def check(family: str = family) -> str:
            torch.manual_seed(0)
            model = tiny.native_model(family).to(device)
            inputs = {k: v.to(device) for k, v in tiny.inputs().items()}
            report = verify(model, inputs, max_new_tokens=8, rounds=1, memory=False)
            assert report.passed, str(report)
            return "same tokens"

        yield _guard("model", f"{subject}, {family} language model", check)


def _bench(device: str, start: float) -> dict[str, Any]:
    """The quick benchmark table, from the repository's runner; the first case of each op, then the second, in time."""
    try:
        runner = bench_command.runner()
    except CommandError as missing:
        return {"skipped": str(missing)}
    os.environ["IVL_BENCH_DEVICE"] = device
    left = [runner.load_cases([op], quick=True) for op in runner.find_ops()]

    def cases() -> Iterator[Any]:
        for turn in itertools.zip_longest(*left):
            for case in filter(None, turn):
                if time.monotonic() - start > SECONDS:
                    print("no time for the other benchmark cases")
                    return
                yield case

    return runner.run(cases(), quick=True)


def _environment(device: str) -> dict[str, Any]:
    import datetime

    import torch

    from .. import doctor

    found = doctor.collect()
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else "CPU (a rehearsal, no GPU)",
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        **{name: found[name] for name in ("package", "versions", "cpu", "gpus", "built")},
    }


def _markdown(environment: dict[str, Any], results: list[Result], bench: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v != "not installed")
    lines = ["# GPU check", "", f"{environment['name']}; {environment['date']}; {versions}.", ""]
    lines += ["| status | check | subject | detail | s |", "| --- | --- | --- | --- | --- |"]
    for r in sorted(results, key=lambda r: r.status != "FAILED"):
        detail = " ".join(r.detail.split())[:300].replace("|", "\\|")
        lines.append(f"| {r.status} | {r.check} | {r.subject} | {detail} | {r.seconds:.1f} |")
    text = "\n".join(lines) + "\n"
    if "rows" in bench:
        import importlib

        text += "\n" + importlib.import_module("bench.report").markdown(bench)
    else:
        text += f"\nNo benchmark: {bench.get('skipped', 'left out')}.\n"
    return text
