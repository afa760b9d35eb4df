"""A second opinion on the Triton kernels: Triton's own interpreter runs their source, forward and backward."""

import os
import subprocess
import sys

import pytest
import triton

from ivl_kernels import _library
from ivl_kernels.testing.samples import samples
from tests.simulator.gpu import ROOT

if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9):
    pytest.skip("the interpreter of older versions does not work with NumPy 2.4", allow_module_level=True)
SUBJECTS = [s.title for s in samples() if any(i.backend == "triton" for i in _library.OPS[s.op].implementations)]
# The interpreter is chosen when Triton is imported, so in a process of its own.
CODE = """
import sys, traceback, torch
from ivl_kernels.commands.gpu_check import _cast, _Subject
from ivl_kernels.testing.samples import samples
for sample in samples():
    if sample.title in sys.argv:
        inputs = _cast(sample.make(torch.Generator().manual_seed(0)), torch.float32, "cpu")
        try:
            print(sample.title, "->", _Subject(sample, inputs, "cpu").check("triton"))
        except Exception:
            traceback.print_exc()
"""


@pytest.fixture(scope="module")
def output():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CODE, *SUBJECTS]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    return done.stdout + done.stderr


@pytest.mark.parametrize("title", SUBJECTS)
def test_as_accurate_as_plain_torch(title, output):
    assert f"{title} -> " in output, output[-3000:]
