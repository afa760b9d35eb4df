"""The launches through the CUDA driver, against a driver library that decodes what it is given and simulates it."""

import contextlib
import ctypes
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from ivl_kernels import _cuda, _dispatch, _gpu, _library
from ivl_kernels.ops import embed_text, moe_dispatch, moe_routing, pack_tokens, place_rows
from tests.simulator import ptxsim
from tests.simulator.gpu import CUDA_SOURCES, cuda_ptx
from tests.simulator.ptxsim.sim import load_program

DRIVER = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef int (*Launch)(const char*, unsigned*, void*, void**);
static _Thread_local void* current;
static _Thread_local int mode;
static Launch launch;
int loads;
long launched_in;
typedef struct { void* context; const char* name; } Loaded;  // a module, or one of its functions
void on_launch(Launch f) { launch = f; }
static void* load(void* context, const char* name) {
  Loaded* it = malloc(sizeof *it);
  it->context = context, it->name = name;
  return it;
}
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)(long)(1000 + device); return 0; }
int cuCtxGetCurrent(void** context) { *context = current; return 0; }
int cuCtxSetCurrent(void* context) { current = context; return 0; }
int cuThreadExchangeStreamCaptureMode(int* other) { int old = mode; mode = *other; *other = old; return 0; }
int cuModuleLoadData(void** module, const unsigned* image) {
  if (!current) return 201;
  if (mode != 2) return 900;
  if (*image != 0xBA55ED50) return 209;
  ++loads;
  *module = load(current, strdup((char*)(image + 1)));
  return 0;
}
int cuModuleGetFunction(void** f, Loaded* module, const char* name) {
  char both[256];
  snprintf(both, sizeof both, "%s:%s", module->name, name);
  *f = load(module->context, strdup(both));
  return module->context == current ? 0 : 400;
}
int cuGetErrorString(int status, const char** text) { *text = status == 209 ? "no kernel image" : "other"; return 0; }
int cuLaunchKernel(Loaded* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
  unsigned size[] = {gx, gy, gz, bx, by, bz, shared};
  if (f->context != current) return current ? 400 : 201;
  launched_in = (long)current;
  return mode || extra || !(gx && gy && gz && bx && by && bz) ? 1 : launch(f->name, size, stream, params);
}
"""
PROBLEM = _cuda._problem
STREAM = 0x7F00DEADBEEF  # needs all of its bits


def fatbin(source):
    return struct.pack("<I", 0xBA55ED50) + source.encode() + bytes(1)


@contextlib.contextmanager
def on_device(fake, index):
    """As torch.cuda.device: a thread may have no context while the device is the current one."""
    before = ctypes.c_void_p()
    fake.cuCtxGetCurrent(ctypes.byref(before))
    if index != fake.device:
        fake.cuCtxSetCurrent(ctypes.c_void_p(1000 + index))
    yield
    if index != fake.device:
        fake.cuCtxSetCurrent(before)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Launches go through `_cuda.launch` to the library above; yields it."""
    source, library = tmp_path / "driver.c", tmp_path / "driver.so"
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", source, "-o", library], check=True)
    fake, addresses = ctypes.CDLL(str(library)), {}
    fake.device = 0  # the current one

    @ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    )
    def launch(name, size, stream, params):
        source, kernel = name.decode().split(":")
        text = cuda_ptx(source)
        values = []
        for place, (_, _, _, width) in zip(params, load_program(text, kernel).kparams):
            value = int.from_bytes(ctypes.string_at(place, width), "little", signed=True)
            values.append(addresses.get(value, value))
        ptxsim.run(text, kernel, tuple(size[:3]), tuple(size[3:6]), values, size[6])
        return 0 if stream == STREAM else 400

    def address(tensor):
        if tensor.numel():
            addresses[tensor.data_ptr()] = tensor
        return tensor.data_ptr()

    for name in CUDA_SOURCES:
        (tmp_path / f"{name}.fatbin").write_bytes(fatbin(name))
    for name, value in dict(
        problem=lambda device=None: None, _driver=lambda: fake, _address=address, FATBINS=tmp_path,
        _current=lambda device: device == fake.device, _stream=lambda device: STREAM,
    ).items():  # fmt: skip
        monkeypatch.setattr(_cuda, name, value)
    fake.cuLaunchKernel.argtypes = _cuda.LAUNCH
    monkeypatch.setattr(torch.cuda, "device", lambda device: on_device(fake, getattr(device, "index", device) or 0))
    caches = (_cuda._context, _cuda._loaded, _cuda._function)
    fake.on_launch(launch)
    with _gpu.stand_in("simulator"):
        yield fake
    for cache in caches:
        cache.cache_clear()


def test_every_op(driver):
    ids = torch.tensor([[3, 7, 7, 7, 7, 4], [5, 3, 4, 7, 7, 6]])
    rows, embeds, table = torch.randn(6, 5), torch.randn(2, 6, 5), torch.randn(8, 5)
    compress, logits = torch.tensor([True, False, True]), torch.randn(5, 40)

    def run(backend):
        packed = pack_tokens(ids, compress, 7, tokens_per_tile=2, compressed_tokens=1, backend=backend)
        leaf = logits.clone().requires_grad_()
        experts, weights = moe_routing(leaf, 3, renormalize=True, backend=backend)
        with ThreadPoolExecutor(1) as pool:  # as autograd does: a thread without a context
            pool.submit(weights.square().sum().backward).result()
        embedded = embed_text(ids, table, 7, backend=backend)[ids != 7]
        placed = place_rows(embeds, ids, rows, 7, backend=backend)
        dispatched = moe_dispatch(experts, 40, tile=4, backend=backend)
        return packed.ids, packed.tile_rows, embedded, placed, *dispatched, weights, leaf.grad

    for got, expected in zip(run("cuda"), run("reference")):
        torch.testing.assert_close(got, expected)
    assert ctypes.c_int.in_dll(driver, "loads").value == len(CUDA_SOURCES)  # once a file


def test_errors_say_what_failed(driver, monkeypatch, tmp_path):
    (tmp_path / "moe_routing.fatbin").write_bytes(bytes(4))
    with pytest.raises(RuntimeError, match=r"loading moe_routing.fatbin on device .*CUDA error 209 \(no kernel image"):
        moe_routing(torch.randn(2, 4), 1, backend="cuda")
    (tmp_path / "moe_routing.fatbin").write_bytes(fatbin("moe_routing"))
    assert moe_routing(torch.randn(2, 4), 1, backend="cuda")[0].shape == (2, 1)  # nothing of the failure is kept
    with pytest.raises(ValueError, match="got 50000 bytes of dynamic shared memory"):
        _cuda.launch("moe_routing", "moe_routing_float32_1", (1,), 32, [], 50000)


class OnGpu(torch.Tensor):
    device = property(lambda self: torch.device("cuda", self.index))


def count_sevens(device=0, grid=(1,)):
    ids, counts = torch.tensor([7, 3, 7]).as_subclass(OnGpu), torch.zeros(1, dtype=torch.int64)
    ids.index = device
    _cuda.launch("token_packing", "count_tokens", grid, 512, [ids, counts, 3, 3, 7])
    return counts.item()


@pytest.mark.parametrize("current", [0, 1])
def test_every_device_has_its_own_kernels(driver, current):
    def launched_on(device):
        assert count_sevens(device) == 2
        return ctypes.c_long.in_dll(driver, "launched_in").value - 1000

    driver.device = current
    for devices in ([0, 1, 0], [1, 0, 1]):
        with ThreadPoolExecutor(1) as pool:  # a thread without a context
            assert [pool.submit(launched_on, device).result() for device in devices] == devices
    assert ctypes.c_int.in_dll(driver, "loads").value == 2  # once a device


def test_a_launch_that_fails_or_has_no_blocks(driver, monkeypatch):
    assert count_sevens(grid=(1, 0)) == 0
    monkeypatch.setattr(_cuda, "_stream", lambda device: 1)
    with pytest.raises(RuntimeError, match=r"launching count_tokens with grid \(1, 1, 1\), block 512: CUDA error 400"):
        count_sevens()


def test_arguments_have_the_width_of_their_parameters():
    args = (-5, True, 2**40, False, 1.5, torch.zeros(1), None, True)
    layout, offsets = _cuda._parameters(tuple(map(type, args)))
    packed = layout.pack(*args[:5], 2**48 + 7, 0, True)
    for offset, kind, value in zip(offsets, "q?q?fPP?", (*args[:5], 2**48 + 7, 0, True), strict=True):
        assert offset % struct.calcsize(kind) == 0 and struct.unpack_from(kind, packed, offset) == (value,)


def test_tensors_on_a_gpu_that_is_not_current(monkeypatch):
    """Triton launches on the current device: an op must make it the tensors' own."""
    op, log = _library.OPS["tile_pool"], []
    implementation = op.implementations[-1]

    @contextlib.contextmanager
    def enter(device):
        log.append(f"enter {device}")
        yield
        log.append("leave")

    monkeypatch.setattr(_dispatch, "choose", lambda *args: _dispatch.Choice(implementation, ()))
    monkeypatch.setitem(op._functions, implementation.backend, lambda *args: log.append("run"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)
    for index in (0, 1):
        op._run(SimpleNamespace(is_cuda=True, device=torch.device("cuda", index), dtype=torch.float32), "")
    assert log == ["run", "enter cuda:1", "run", "leave"]


@pytest.fixture
def two_gpus(monkeypatch):
    """A newer and an older GPU, as far as the choice of a backend asks."""
    capabilities = [(12, 0), (7, 5)]
    monkeypatch.setattr(_cuda, "built", lambda: ["token_packing"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(_cuda, "_loaded", lambda source, device: None)
    probes = (_cuda.too_old, _cuda._problem, _dispatch._triton_problem)
    for probe in probes:
        probe.cache_clear()
    yield capabilities
    for probe in probes:
        probe.cache_clear()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_an_old_gpu_is_left_to_the_reference_and_no_other(two_gpus, backend):
    op = _library.OPS["place_rows_" if backend == "cuda" else "pixel_shuffle_mlp"]
    for device, served in (("cuda", True), ("cuda:0", True), ("cuda:1", False)):
        choice = op.explain(device, "float32")
        assert choice.backend == (backend if served else "reference")
        assert served or "GPU 1 has compute capability 7.5, less than 8.0" in str(choice)


def test_what_a_device_can_do_is_asked_once(two_gpus, monkeypatch):
    """An op whose backend depends on its arguments chooses at every call."""
    asked = []
    monkeypatch.setattr(_cuda, "built", lambda: asked.append("built") or ["moe_routing"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append("available") or True)
    for _ in range(3):
        assert _library.OPS["moe_dispatch"].explain("cuda:0", "float32").backend == "cuda"
        assert _library.OPS["moe_experts"].explain("cuda:0", "float32").backend == "triton"
    assert sorted(asked) == ["available", "available", "built", "built"]


def test_kernels_that_the_driver_does_not_load_are_passed_over(two_gpus, monkeypatch):
    def refuse(source, device):
        raise RuntimeError(f"loading {source}.fatbin: CUDA error 209")

    monkeypatch.setattr(_cuda, "_loaded", refuse)
    choice = _library.OPS["place_rows_"].explain("cuda", "float32")
    assert choice.backend == "triton" and "CUDA error 209" in dict(choice.passed_over)["cuda"]


def test_modules_are_loaded_on_their_device(driver, monkeypatch):
    """The probe enters the device's context, and what it loads is what launches use."""
    monkeypatch.setattr(_cuda, "too_old", lambda device: None)
    monkeypatch.setattr(_cuda, "built", lambda: ["token_packing"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with ThreadPoolExecutor(1) as pool:  # a thread without a context
        assert pool.submit(PROBLEM.__wrapped__, 0).result() is None
    assert count_sevens() == 2 and ctypes.c_int.in_dll(driver, "loads").value == 1


@pytest.mark.parametrize(
    "built, available, why", [([], True, "not built"), (["token_packing"], False, "no CUDA device")]
)
def test_why_kernels_cannot_be_launched(monkeypatch, built, available, why):
    monkeypatch.setattr(_cuda, "built", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert why in PROBLEM.__wrapped__(None)


def test_the_reference_on_a_gpu_is_said_once(recwarn):
    device, op = torch.device("cuda"), _library.OPS["moe_experts_list"]
    for _ in range(2):
        assert _dispatch.choose("listed", op.implementations, device, "float32").backend == "reference"
    (warning,) = recwarn.list
    assert "ivl::listed runs on the reference backend (it has no kernel for NVIDIA GPUs)" in str(warning.message)


@pytest.mark.parametrize("columns", [128_000, 128_001])
def test_longest_row_to_pack_fits_shared_memory(columns):
    launched = []
    ids = torch.zeros(1, columns, dtype=torch.int64)
    with _gpu.stand_in("simulator", lambda source, kernel, *rest: launched.append(rest[-1])):
        refused = pytest.raises(_dispatch.BackendError, match="up to 128,000 tokens")
        with refused if columns > 128_000 else contextlib.nullcontext():
            pack_tokens(ids, torch.zeros(0, dtype=torch.bool), 7, capacity=True, backend="cuda")
    assert max(launched, default=0) <= 48 * 1024 - 1024


@pytest.mark.parametrize("experts", [512, 513])
def test_most_experts_to_dispatch_fit_shared_memory(experts):
    launched = []
    ids = torch.zeros(8191, 1, dtype=torch.int64)  # nearly two blocks
    with _gpu.stand_in("simulator", lambda source, kernel, *rest: launched.append(rest[-1])):
        refused = pytest.raises(_dispatch.BackendError, match="counts 512 experts")
        with refused if experts > 512 else contextlib.nullcontext():
            moe_dispatch(ids, experts, backend="cuda")
    assert len(launched) == (2 if experts <= 512 else 0) and max(launched, default=0) <= 48 * 1024
