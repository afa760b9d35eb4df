"""A second opinion on the Triton kernels: Triton's own interpreter runs their source, forward and backward."""

import os
import subprocess
import sys

import pytest
import triton

from ivl_kernels import _library
from ivl_kernels.testing.cases import all_cases
from tests.simulator.gpu import ROOT

if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9):
    pytest.skip("the interpreter of older versions does not work with NumPy 2.4", allow_module_level=True)
SUBJECTS = [c.title for c in all_cases() if any(i.backend == "triton" for i in _library.OPS[c.op].implementations)]
# The interpreter is chosen when Triton is imported, so in a process of its own.
CODE = """
import sys, traceback, torch
from ivl_kernels.testing.cases import Checked, Numbers, all_cases, cast
for case in all_cases():
    if case.title in sys.argv:
        inputs = cast(case.inputs(Numbers()), torch.float32, "cpu")
        try:
            print(case.title, "->", Checked(case, inputs).check("triton"))
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
