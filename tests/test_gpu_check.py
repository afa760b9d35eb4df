"""The GPU check, rehearsed on the CPU: the same code path, and it must be able to fail."""

import contextlib
import importlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ivl_kernels import _gpu, _library, cli
from ivl_kernels._dispatch import BackendError
from ivl_kernels.commands import _gpu_checks, gpu_check
from ivl_kernels.testing.cases import Numbers, all_cases, cast, forward_backward
from tests.simulator import aot
from tests.simulator.gpu import simulated_gpu
from tests.simulator.idle import idle_gpu


def test_rehearsal(tmp_path, capsys):
    assert cli.main(["gpu-check", "--device", "cpu", "--no-bench", "--out", str(tmp_path)]) == 0, (
        capsys.readouterr().out
    )
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    statuses = {r["status"] for r in found["results"]}
    assert statuses == {"ok", "skipped"}
    expected = {"compilation", "correctness", "CUDA graph", "second GPU", "huge offsets", "sanitizer", "model"}
    assert {r["check"] for r in found["results"]} == expected
    report = (tmp_path / "gpu_check.md").read_text()
    assert "CPU (a rehearsal, no GPU)" in report and "| ok | correctness | pixel_shuffle_mlp" in report


def test_a_wrong_kernel_fails(tmp_path, monkeypatch, capsys):
    op = _library.OPS["pixel_shuffle_mlp"]
    cpu = next(i for i in op.implementations if i.backend == "cpu")
    right = op.function(cpu)

    def wrong(arguments):
        out, *saved = right(arguments)
        return out * 1.01, *saved

    monkeypatch.setitem(op._functions, "cpu", wrong)
    status = cli.main(["gpu-check", "--device", "cpu", "--no-bench", "-k", "ratio 1/4", "--out", str(tmp_path)])
    assert status == 1 and "TOO FAR" in capsys.readouterr().out


def test_every_op_has_a_case():
    """An op without a case of its own is reached through the public function of another."""
    reached = set()

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == _library.NAMESPACE:
                reached.add(function._schema.name.removeprefix("ivl::"))
            return function(*args, **(kwargs or {}))

    for case in all_cases():
        inputs = cast(case.inputs(Numbers()), torch.float32, "cpu")
        with Spy():
            forward_backward(case, inputs, "")
    with idle_gpu():  # what serves on GPUs only, without gradients
        for case in all_cases():
            if case.graph:
                inputs = cast(case.inputs(Numbers()), torch.bfloat16, "cpu")
                with Spy():
                    case.call(inputs, "")
    missing = set(_library.OPS) - reached
    assert not missing, f"ops that no case reaches: {sorted(missing)}"


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["gpu-check"]) == 2
    assert "no CUDA device is available" in capsys.readouterr().err


def test_a_pattern_that_matches_nothing(tmp_path, capsys):
    assert cli.main(["gpu-check", "--device", "cpu", "--no-bench", "-k", "nothing", "--out", str(tmp_path)]) == 2
    assert "no case's title contains 'nothing'" in capsys.readouterr().err


CAPTURED = [case for case in all_cases() if case.graph]


@pytest.mark.parametrize("case", CAPTURED, ids=lambda case: case.title)
def test_what_graphs_promise_touches_the_host_only_once(case, monkeypatch):
    """After a first call: no value is read from the device, and nothing is copied to it. Kernels in the simulator."""
    inputs = cast(case.inputs(Numbers()), torch.bfloat16, "cpu")
    projector = importlib.import_module("ivl_kernels.ops.pixel_shuffle_mlp.op")
    monkeypatch.setattr(projector, "_check_indices", lambda *_: None)  # it is for the CPU

    def refuse(what):
        return lambda *args, **kwargs: pytest.fail(f"{what} cannot be captured in a CUDA graph")

    def to(tensor, *args, _to=torch.Tensor.to, **kwargs):
        if "device" in kwargs or any(isinstance(a, str | torch.device) for a in args):
            refuse("a copy")()
        return _to(tensor, *args, **kwargs)

    with simulated_gpu(preferred=True) as log, torch.no_grad():
        expected = case.call(inputs, "")
        launches = len(log)
        with monkeypatch.context() as patch:
            for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "cuda", "nonzero"):
                patch.setattr(torch.Tensor, name, refuse(f"Tensor.{name}"))
            for name in ("tensor", "as_tensor", "nonzero"):
                patch.setattr(torch, name, refuse(f"torch.{name}"))
            patch.setattr(torch.Tensor, "to", to)
            got = case.call(inputs, "")
    assert len(log) == 2 * launches > 0
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected)):
        assert torch.equal(a, b)


def test_ops_that_wait_for_the_device_say_so():
    """Inductor leaves them out of the graphs that it captures. Some wait only for what they are not given."""
    waits = {n for n, op in _library.OPS.items() if torch.Tag.cudagraph_unsafe in op._overload.tags}
    packing = {"place_rows_", "take_rows", "pack_tokens"}
    lists = {"moe_experts_list", "moe_experts_list_backward"}
    assert waits == packing | lists | {"attention", "attention_backward"}
    assert not waits - {"pack_tokens"} & {case.op for case in CAPTURED}


def test_huge_checks_run_small():
    """The same code on the CPU with few elements."""
    small = dict(elements=2**16)
    _gpu_checks._huge_rows("cpu", width=64, **small)
    _gpu_checks._huge_tiles("cpu", width=8, **small)
    _gpu_checks._huge_rope("cpu", heads=2, **small)
    _gpu_checks._huge_experts("cpu", width=32, inner=16, **small)


def test_what_breaks_off_is_a_failure(tmp_path, monkeypatch, capsys):
    def broken(device, pattern):
        yield _gpu_checks.Result("first", "one", "ok")
        raise MemoryError("no memory")

    monkeypatch.setattr(_gpu_checks, "CHECKS", (broken,))
    monkeypatch.setattr(gpu_check, "_bench", lambda args, seconds: 1 / 0)
    assert cli.main(["gpu-check", "--device", "cpu", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAILED   broken: broke off MemoryError" in out and "ZeroDivisionError" in out
    assert "1 ok, 2 failed" in out and "MemoryError" in (tmp_path / "gpu_check.md").read_text()


def test_sanitizer(tmp_path, monkeypatch):
    """With a tool that checks its arguments and imports what the command would run."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        """#!/bin/sh
        [ "$1 $2 $3 $4 $6" = "--tool racecheck --error-exitcode 3 -c" ] && [ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] &&
        cd / && exec "$5" -c "${7%%;*}"
        """
    )
    tool.chmod(0o755)
    monkeypatch.setattr("ivl_kernels._cuda.problem", lambda: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = list(_gpu_checks.sanitizer("cuda", "racecheck"))
    assert [r.status for r in found] == ["ok"], found[0].detail
    assert [r.status for r in _gpu_checks.sanitizer("cuda", "memcheck")] == ["FAILED"]  # the arguments are others


def test_a_sanitizer_that_is_late_is_ended_with_what_it_started(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {tmp_path}/child; wait\n")
    tool.chmod(0o755)
    monkeypatch.setattr("ivl_kernels._cuda.problem", lambda: None)
    monkeypatch.setattr(_gpu_checks, "SANITIZER_SECONDS", 1)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (found,) = _gpu_checks.sanitizer("cuda", "racecheck")
    assert found.status == "skipped" and "not done in 1 s" in found.detail
    state = Path(f"/proc/{int((tmp_path / 'child').read_text())}/status")

    def ended():
        try:
            return "Z (zombie)" in state.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True

    until = time.monotonic() + 20  # a signal takes its time to arrive, but not the child's 60 s
    while not ended():
        assert time.monotonic() < until, state.read_text()
        time.sleep(0.05)


def test_kernels_are_compiled_by_processes_that_share_the_cases(monkeypatch):
    """Each case in each dtype by one of them, whatever the others raise."""
    from ivl_kernels.testing import cases

    seen = []

    def spy(case, inputs, backend):
        seen.append((case.title, next((t.dtype for t in tree_leaves(inputs) if t.is_floating_point()), None)))
        raise RuntimeError("a kernel does not compile")

    monkeypatch.setattr(cases, "forward_backward", spy)
    for i in range(3):
        _gpu_checks.compile_share(i, 3, "cpu", "rows")
    titles = {case.title for case in all_cases() if "rows" in case.title}
    assert {title for title, _ in seen} == titles and len(seen) == 3 * len(titles)
    (found,) = _gpu_checks.compilation("cpu", "")
    assert found.status == "skipped"


def test_compilers_at_work():
    """The command that the processes run, on what needs no GPU."""
    code = "from ivl_kernels.commands._gpu_checks import compile_share; compile_share(0, 1, 'cpu', 'three rows, width')"
    ((status, output, _),) = _gpu_checks._pythons([([], code)], 120)
    assert status == 0, output


def test_who_writes_much_is_not_held_up_by_who_is_late():
    slow, much = "import time; time.sleep(60)", "print('x' * 2**20)"
    (first, _, _), (second, output, _) = _gpu_checks._pythons([([], slow), ([], much)], 2)
    assert first is None and second == 0 and len(output) == 2**20 + 1


def test_processes_end_with_who_started_them(monkeypatch):
    begun, popen = [], subprocess.Popen

    def spy(*args, **kwargs):
        begun.append(popen(*args, **kwargs))
        begun[-1].wait = interrupted
        return begun[-1]

    def interrupted(*args):
        del begun[-1].wait  # once
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", spy)
    with pytest.raises(KeyboardInterrupt):
        _gpu_checks._pythons([([], "import time; time.sleep(60)")], 60)
    assert begun[0].returncode == -9


def test_what_a_late_sanitizer_found_is_told(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '========= Invalid __global__ read of size 4 bytes'; exec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr("ivl_kernels._cuda.problem", lambda: None)
    monkeypatch.setattr(_gpu_checks, "SANITIZER_SECONDS", 1)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (found,) = _gpu_checks.sanitizer("cuda", "memcheck")
    assert found.status == "FAILED" and "Invalid __global__ read" in found.detail


def test_compilers_that_break_off_are_told(monkeypatch):
    monkeypatch.setattr(_gpu_checks, "_pythons", lambda commands, seconds: [(0, "", 1.0), (1, "no ivl_kernels", 1.0)])
    (found,) = _gpu_checks.compilation("cuda", "rows")
    assert "1 broke off: no ivl_kernels" in found.detail


def test_compiling_fits_the_time():
    """Distinct kernels of all cases, at 2 s each by 8 processes."""
    keys = set()
    machine = importlib.import_module("bench.inspect.machine")
    with (
        _gpu.stand_in("compiler", lambda *args: None, preferred=True, capability=90),
        aot.compiling(90, make=lambda launch: keys.add(launch.key)),
        machine.no_products(),
    ):
        for case in all_cases():
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                inputs = cast(case.inputs(Numbers()), dtype, "cpu")
                for run in (lambda: forward_backward(case, inputs, "triton"), lambda: case.call(inputs, "")):  # noqa: B023
                    with contextlib.suppress(BackendError, IndexError, ValueError):  # what is compiled computes nothing
                        run()
    assert 200 < len(keys) < 100 * 8 / 2, len(keys)
