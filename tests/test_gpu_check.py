"""The GPU check, rehearsed on the CPU: the same code path, and it must be able to fail."""

import json

import pytest
import torch

from ivl_kernels import _library, cli, gpu_check
from ivl_kernels.testing.samples import samples


def test_rehearsal(tmp_path, capsys):
    assert cli.main(["gpu-check", "--device", "cpu", "--no-bench", "--out", str(tmp_path)]) == 0, (
        capsys.readouterr().out
    )
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    statuses = {r["status"] for r in found["results"]}
    assert statuses == {"ok", "skipped"}
    assert {r["check"] for r in found["results"]} == {"correctness", "CUDA graph", "huge offsets", "sanitizer", "model"}
    report = (tmp_path / "gpu_check.md").read_text()
    assert "CPU (a rehearsal, no GPU)" in report and "| ok | correctness | pixel_shuffle_mlp" in report


def test_a_wrong_kernel_fails(tmp_path, monkeypatch, capsys):
    op = _library.OPS["pixel_shuffle_mlp"]
    native = next(i for i in op.implementations if i.backend == "native")
    right = op.function(native)

    def wrong(*args):
        out, *saved = right(*args)
        return out * 1.01, *saved

    monkeypatch.setitem(op._functions, native.function, wrong)
    status = cli.main(["gpu-check", "--device", "cpu", "--no-bench", "-k", "ratio 1/4", "--out", str(tmp_path)])
    assert status == 1 and "TOO FAR" in capsys.readouterr().out


def test_every_op_has_a_sample():
    """An op without a sample of its own is reached through the public function of another."""
    reached = set()

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == _library.NAMESPACE:
                reached.add(function._schema.name.removeprefix("ivl::"))
            return function(*args, **(kwargs or {}))

    for sample in samples():
        inputs = gpu_check._cast(sample.make(torch.Generator().manual_seed(0)), torch.float32, "cpu")
        with Spy():
            gpu_check._forward_backward(sample, inputs, "")
    missing = set(_library.OPS) - reached
    assert not missing, f"ops that no sample reaches: {sorted(missing)}"


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["gpu-check"]) == 2
    assert "no CUDA device is available" in capsys.readouterr().err


def test_a_pattern_that_matches_nothing(tmp_path, capsys):
    assert cli.main(["gpu-check", "--device", "cpu", "--no-bench", "-k", "nothing", "--out", str(tmp_path)]) == 2
    assert "no sample's title contains 'nothing'" in capsys.readouterr().err
