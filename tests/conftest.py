import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test processes share the cores: a thread that waits must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Liger-Kernel reads it once, at its import: its own single configuration.
os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
# The results of the BLAS, bit by bit, unless a test asks for the package's own product.
os.environ.setdefault("IVL_CPU_LINEAR", "blas")

import hypothesis
import pytest
import torch

from ivl_kernels import _cpu
from tests.simulator import gpu
from tests.simulator.gpu import simulated_gpu
from tests.simulator.ptxsim import SimError

hypothesis.settings.register_profile(
    "ivl", deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("ivl")


def pytest_addoption(parser):
    parser.addoption("--target", type=int, default=80, help="compute capability of the simulated GPU")


def pytest_configure(config):
    gpu.TARGET = config.getoption("--target")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[90, 100], ids=["wgmma", "tcgen05"])
def newer_gpu(request, monkeypatch):
    """The simulated GPU has the products of Hopper or of Blackwell, and gets their configurations."""
    why = "Triton before 3.8 leaves out the fence between stores to shared memory and tensor cores that read them"
    request.applymarker(pytest.mark.xfail(gpu.TRITON < (3, 8), reason=why, raises=SimError, strict=False))
    monkeypatch.setattr(gpu, "TARGET", request.param)
    return request.param


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def isa(request):
    """The instruction set that the C++ kernels use during the test; skipped where the processor lacks it."""
    module = _cpu.module()
    before = module.cpu_features()["isa"]
    try:
        module.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    module.set_isa(before)


@pytest.fixture
def tf32_setting():
    """Restores, after the test, whether torch may use tf32, however the test allowed it."""
    before = torch.backends.fp32_precision, torch.get_float32_matmul_precision()
    yield
    torch.backends.fp32_precision = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.fixture
def backend(request):
    """The name of a backend; for `triton` and `cuda` the simulator stands in for the GPU during the test."""
    if request.param in ("triton", "cuda"):
        with simulated_gpu():
            yield request.param
    else:
        yield request.param
