"""What `gpu-check` proves: each check yields results; `device` "cpu" rehearses the same code."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .._checks import FLOAT_NAMES


@dataclass
class Result:
    """One line of the report. `status`: "ok", "FAILED" or "skipped"."""

    check: str
    subject: str
    status: str
    detail: str = ""
    seconds: float = 0.0


def guard(check: str, subject: str, function: Callable[[], str]) -> Result:
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


COMPILERS = 16  # processes at most
COMPILE_SECONDS = 150


def compilation(device: str, pattern: str) -> Iterator[Result]:
    """Triton's kernels compiled by several processes into its cache on disk, where the other checks find them.

    One after the other they would take most of the time that there is. Whatever fails here fails again in its check.
    """
    from ..testing.cases import all_cases

    subject = "Triton kernels"
    if not any(pattern in case.title for case in all_cases(large=device == "cuda")):
        return
    if device == "cpu":
        yield Result("compilation", subject, "skipped", "no GPU")
        return
    count = min(COMPILERS, os.cpu_count() or 1)
    arguments = [f"{i}, {count}, {device!r}, {pattern!r}" for i in range(count)]
    code = "from ivl_kernels.commands._gpu_checks import compile_share; compile_share({})"
    start = time.perf_counter()
    ended = _pythons([([], code.format(a)) for a in arguments], COMPILE_SECONDS)
    late, broken = (sum(kind(status) for status, _, _ in ended) for kind in (lambda s: s is None, bool))
    detail = f"{count} processes" + (f", {late} not done in {COMPILE_SECONDS} s" if late else "")
    if broken:
        detail += f", {broken} broke off: {next(output for status, output, _ in ended if status)[-300:]}"
    yield Result("compilation", subject, "ok", detail, time.perf_counter() - start)


def compile_share(index: int, count: int, device: str, pattern: str) -> None:
    """Run every count-th case from `index` on, in each dtype; what it raises is the checks' to tell."""
    import torch

    from ..testing.cases import Numbers, all_cases, cast, forward_backward

    large = device == "cuda"
    chosen = [(c, d) for c in all_cases(large=large) for d in FLOAT_NAMES if d != "float64" and pattern in c.title]
    for case, dtype in chosen[index::count]:
        with contextlib.suppress(Exception):
            inputs = cast(case.inputs(Numbers()), getattr(torch, dtype), device)
            with contextlib.suppress(Exception):
                forward_backward(case, inputs, "triton")
            with torch.no_grad():
                case.call(inputs, "")  # few tokens have kernels of their own where no gradient is wanted


def _pythons(
    commands: Sequence[tuple[list[str], str]], seconds: float, **settings: str
) -> list[tuple[int | None, str, float]]:
    """Processes of this Python with this package, all at once: each what stands before Python, and its code.

    Returns:
        Exit status, output and time of each; None for what was not done in these seconds. Those are ended, with what
        they started, and all of them where this raises.
    """
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)}
    start, found = time.perf_counter(), []
    with contextlib.ExitStack() as stack:
        running = []
        for before, code in commands:
            output = stack.enter_context(tempfile.TemporaryFile("w+"))  # a full pipe would hold its writer up
            command = [*before, sys.executable, "-c", code]
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            stack.callback(_end, process)
            running.append((process, output))
        for process, output in running:
            try:
                status: int | None = process.wait(max(0.1, start + seconds - time.perf_counter()))
            except subprocess.TimeoutExpired:
                status = None
            output.seek(0)
            found.append((status, output.read(), time.perf_counter() - start))
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def correctness(device: str, pattern: str) -> Iterator[Result]:
    import torch

    from .. import _gpu, _library
    from ..testing.cases import Checked, Numbers, all_cases, cast, has_floats

    kind = _gpu.device_kind(device)
    for case in all_cases(large=device == "cuda"):
        if pattern not in case.title:
            continue
        master = case.inputs(Numbers())
        floats = has_floats(master)
        backends = [i.backend for i in _library.OPS[case.op].implementations if not i.devices or kind in i.devices]
        for dtype in FLOAT_NAMES if floats else FLOAT_NAMES[:1]:
            subject = Checked(case, cast(master, getattr(torch, dtype), device), device)
            for backend in backends:
                title = f"{case.title}, {backend}, {dtype}"
                why = _unserved(case.op, dtype if floats else "int64", device, backend)
                if not why:
                    yield guard("correctness", title, lambda: subject.check(backend))  # noqa: B023
                elif any(text in why for text in ("not load", "not built", "not installed")):
                    yield Result("correctness", title, "skipped", why)
        gc.collect()


def _unserved(op: str, dtype: str, device: str, backend: str) -> str:
    import torch

    from .. import _dispatch, _library

    try:
        _dispatch.choose(op, _library.OPS[op].implementations, torch.device(device), dtype, forced=backend, warn=False)
    except _dispatch.BackendError as error:
        return str(error)
    return ""


def graphs(device: str, pattern: str) -> Iterator[Result]:
    """Capture in a CUDA graph, replay on new inputs, compare with a plain call."""
    import torch

    from .. import _cuda_graph
    from ..testing.cases import Case, Numbers, all_cases, cast

    for case in all_cases(large=device == "cuda"):
        if not case.graph or pattern not in case.title:
            continue
        if device == "cpu":
            yield Result("CUDA graph", case.title, "skipped", "no GPU")
            continue

        def check(case: Case = case) -> str:
            from torch.utils._pytree import tree_leaves

            inputs, fresh = (cast(case.inputs(Numbers(seed=s)), torch.bfloat16, device) for s in (0, 1))
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    case.call(inputs, "")
            torch.cuda.current_stream().wait_stream(side)
            results, graph = _cuda_graph.recorded(lambda: case.call(inputs, ""))
            captured = tree_leaves(results)
            for old, new in zip(tree_leaves(inputs), tree_leaves(fresh)):
                old.copy_(new)
            for out in captured:
                out.fill_(0)
            graph.replay()
            torch.cuda.synchronize()
            for got, expected in zip(captured, tree_leaves(case.call(fresh, ""))):
                torch.testing.assert_close(got, expected, msg=lambda text: f"the replay differs: {text}")
            return "captured and replayed on other inputs"

        yield guard("CUDA graph", case.title, check)


def devices(device: str, pattern: str) -> Iterator[Result]:
    """Tensors on a GPU that is not the current one, forward and backward."""
    import torch

    from ..testing.cases import Case, Numbers, all_cases, cast, forward_backward

    for case in all_cases():
        if pattern not in case.title:
            continue
        if device == "cpu" or torch.cuda.device_count() < 2:
            yield Result("second GPU", case.title, "skipped", "no second GPU")
            return

        def check(case: Case = case) -> str:
            master = cast(case.inputs(Numbers()), torch.bfloat16, "cpu")
            first, second = (forward_backward(case, cast(master, torch.bfloat16, f"cuda:{i}"), "") for i in (0, 1))
            for a, b in zip(first, second):
                torch.testing.assert_close(a.cpu(), b.cpu())
            return "the same as on the first"

        yield guard("second GPU", case.title, check)


def _free_bytes(device: str) -> int:
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def huge(device: str, pattern: str) -> Iterator[Result]:
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
            yield guard("huge offsets", subject, functools.partial(check, device))


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


SANITIZER_SECONDS = 150  # importing torch under the tool takes most of it
FOUND = ("Invalid", "Error", "Uninitialized")  # begin what the tools report


def sanitizer(device: str, pattern: str) -> Iterator[Result]:
    """The CUDA C++ kernels under compute-sanitizer, its tools at the same time.

    Without torch's caching allocator, which would hide an access past a tensor's end.
    """
    from .. import _cuda

    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    why = "no GPU" if device == "cpu" else _cuda.problem() or (None if tool else "compute-sanitizer is not on PATH")
    code = "from ivl_kernels.commands._gpu_checks import run_cuda_kernels; run_cuda_kernels()"
    modes = [mode for mode in ("memcheck", "racecheck", "initcheck") if pattern in f"compute-sanitizer {mode}"]
    if why or tool is None:
        yield from (Result("sanitizer", f"compute-sanitizer {mode}", "skipped", why or "") for mode in modes)
        return
    commands = [([tool, "--tool", mode, "--error-exitcode", "3"], code) for mode in modes]
    ended = _pythons(commands, SANITIZER_SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    for mode, (status, output, took) in zip(modes, ended):
        subject = f"compute-sanitizer {mode}"
        if status == 0:
            yield Result("sanitizer", subject, "ok", "clean", took)
        elif status is None and not any(f"========= {word}" in output for word in FOUND):
            yield Result("sanitizer", subject, "skipped", f"not done in {SANITIZER_SECONDS} s", took)
        else:
            yield Result("sanitizer", subject, "FAILED", f"exit status {status}: {output[-2000:]}", took)


def run_cuda_kernels() -> None:
    """Every op that has a CUDA C++ backend, once, on small inputs; run under compute-sanitizer."""
    import torch

    from .. import _library
    from ..testing.cases import Numbers, all_cases, cast, forward_backward

    for case in all_cases():
        if any(i.backend == "cuda" for i in _library.OPS[case.op].implementations):
            forward_backward(case, cast(case.inputs(Numbers()), torch.float32, "cuda"), "cuda")
    torch.cuda.synchronize()


def model(device: str, pattern: str) -> Iterator[Result]:
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

        yield guard("model", f"{subject}, {family} language model", check)


CHECKS = (compilation, correctness, graphs, devices, huge, model, sanitizer)
