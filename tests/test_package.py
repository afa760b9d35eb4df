"""The package as installed: imports, the compiled library's ABI, the doctor, the command line."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import ivl_kernels
from ivl_kernels import _cpu, _env, cli, doctor

ROOT = Path(__file__).resolve().parent.parent


def fresh(code: str, *options: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    code = """
import sys, time
import torch
start = time.perf_counter()
import ivl_kernels
print(1e3 * (time.perf_counter() - start))
print([m for m in ("triton", "transformers", "ivl_kernels._C") if m in sys.modules])
print(torch.cuda.is_initialized())
"""
    times = []
    for _ in range(3):
        milliseconds, loaded, initialized = fresh(code).split("\n")[:3]
        times.append(float(milliseconds))
        assert loaded == "[]" and initialized == "False"
    assert min(times) < 50


def test_import_of_the_ops_is_light():
    code = "import sys, ivl_kernels.ops, ivl_kernels.nn; print({'triton', 'transformers'} & set(sys.modules))"
    assert fresh(code).strip() == "set()"


def test_the_first_plan_loads_nothing_of_weight():
    """torch's compiler takes seconds, of whoever is served then."""
    code = """
import sys, torch
from ivl_kernels import _plan, ops
from tests.simulator.idle import idle_gpu
with idle_gpu():
    for _ in range(2):
        ops.rms_norm(torch.zeros(3, 48), torch.ones(48))
print(*(type(p).__name__ for plans in _plan.PLANS.values() for p in plans.values()))
print({"torch._dynamo", "sympy"} & set(sys.modules))
"""
    assert fresh(code).split("\n")[:2] == ["function", "set()"]


def test_public_names():
    for name in ivl_kernels.__all__:
        assert getattr(ivl_kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ivl_kernels.nothing


def test_stable_abi():
    """No symbol of torch's unstable C++ interface, so the build loads under other torch versions."""
    library = _cpu.module().__file__
    undefined = subprocess.run(["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True)
    unstable = [line for line in undefined.stdout.splitlines() if re.search(r"\b(at|c10|torch)::", line)]
    assert unstable == []
    assert _cpu.module().build_info()["torch_stable_abi"] == "2.10"


def test_isa_can_be_lowered_only():
    module = _cpu.module()
    best = module.cpu_features()["best_isa"]
    try:
        module.set_isa("portable")
        assert module.cpu_features()["isa"] == "portable"
    finally:
        module.set_isa(best)
    with pytest.raises(ValueError, match="isa: got 'sse9'"):
        module.set_isa("sse9")
    assert fresh("from ivl_kernels import _cpu as n; print(n.module().cpu_features()['isa'])",
                 IVL_CPU_ISA="portable").strip() == "portable"  # fmt: skip


class TestDoctor:
    def test_collects_everything(self):
        found = doctor.collect()
        assert not [name for name, part in found.items() if isinstance(part, dict) and "error" in part]
        rows = found["backends"]["pixel_shuffle_mlp"]
        assert rows["cpu float32"]["backend"] == "cpu" and rows["cuda bfloat16"]["backend"] == "triton"
        assert found["built"]["C++ kernels"]["torch_stable_abi"] == "2.10"
        json.dumps(found, default=str)
        assert "pixel_shuffle_mlp, cpu" in doctor.render(found)

    def test_command(self, capsys):
        assert cli.main(["doctor", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["package"]["version"] == ivl_kernels.__version__

    def test_without_torch(self, tmp_path):
        """-S hides site-packages: no torch, no numpy."""
        out = fresh("import sys; from ivl_kernels import cli; sys.exit(cli.main(['doctor', '--json']))", "-S")
        found = json.loads(out)
        assert "torch" in found["backends"]["error"] and found["package"]["version"]
        assert found["versions"]["python"]

    def test_with_a_broken_library(self, tmp_path):
        shutil.copytree(ROOT / "ivl_kernels", tmp_path / "ivl_kernels", ignore=shutil.ignore_patterns("_C.*", "*.pyc"))
        suffix = Path(_cpu.module().__file__).name.removeprefix("_C")
        (tmp_path / "ivl_kernels" / f"_C{suffix}").write_bytes(b"not a library")
        code = "import json; from ivl_kernels import doctor; print(json.dumps(doctor.collect(), default=str))"
        found = json.loads(fresh(code, PYTHONPATH=str(tmp_path)))
        assert "do not load" in found["built"]["C++ kernels"]
        row = found["backends"]["pixel_shuffle_mlp"]["cpu float32"]
        assert row["backend"] == "reference" and "do not load" in row["why"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository without what was built in it."""
    copy = tmp_path_factory.mktemp("package") / "source"
    ignore = shutil.ignore_patterns(".git", ".venv*", "build", "out", "_C*", "*.egg-info", ".hypothesis", "__pycache__")
    return shutil.copytree(ROOT, copy, ignore=ignore)


def test_source_distribution_can_be_compiled(source, tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    files = {str(f.relative_to(source)) for part in ("csrc", "python") for f in (source / part).rglob("*.*")}
    assert files and files <= held


@pytest.fixture(scope="module")
def wheel(source):
    out = source.parent
    env = {**os.environ, "CXX": "/nowhere/c++", "IVL_BUILD_CUDA": "0"}
    env.pop("IVL_BUILD_CPU", None)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=source)
    assert done.returncode == 0, done.stderr
    assert "WITHOUT the C++ kernels (no C++ compiler was found)" in done.stdout + done.stderr
    return next(out.glob("*.whl"))


class TestPurePython:
    """A machine without a compiler: the install succeeds, says so, and the reference serves, with a warning."""

    def test_holds_no_compiled_file(self, wheel):
        names = zipfile.ZipFile(wheel).namelist()
        assert not [n for n in names if n.endswith((".so", ".fatbin"))]
        assert "ivl_kernels/ops/tile_router/triton.py" in names
        assert not [n for n in names if n.startswith(("tests", "bench"))]

    def test_the_reference_serves_and_says_so(self, wheel, tmp_path):
        zipfile.ZipFile(wheel).extractall(tmp_path)
        code = """
import warnings, torch
from ivl_kernels.ops import place_rows
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        out = place_rows(torch.zeros(1, 3, 2), torch.tensor([[5, 7, 7]]), torch.ones(2, 2), 7)
print(out.tolist())
print([str(w.message) for w in caught if "reference" in str(w.message)])
try:
    place_rows(torch.zeros(1, 3, 2), torch.tensor([[5, 7, 7]]), torch.ones(2, 2), 7, backend="cpu")
except RuntimeError as error:
    print(error)
"""
        # -S: an editable install of the package would offer its own compiled library.
        site = [path for path in sys.path if path.endswith("site-packages")]
        lines = fresh(code, "-S", PYTHONPATH=os.pathsep.join([str(tmp_path), *site])).splitlines()
        assert lines[0] == "[[[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]]"
        warnings = eval(lines[1])
        assert len(warnings) == len(set(warnings)) > 0 and "not built" in warnings[0]
        assert "backend 'cpu' was forced but cannot serve this call" in lines[2]


class TestCommandLine:
    def test_help(self, capsys):
        assert cli.main([]) == 2
        assert "gpu-check" in capsys.readouterr().out

    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out.strip() == ivl_kernels.__version__

    def test_unknown_command(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["nothing"])
        assert stopped.value.code == 2

    @pytest.mark.parametrize("op", ["token_packing", "moe"])
    def test_bench_lists_its_cases(self, op, capfd):
        assert cli.main(["bench", "--list", "--quick", "--op", op]) == 0
        assert f"{op}" in capfd.readouterr().out


def test_every_variable_that_is_read_is_listed():
    read = set()
    for path in [*(ROOT / "ivl_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py"]:
        read |= set(re.findall(r"[\"'](IVL_[A-Z_]+)[\"']", path.read_text()))
    assert read - {"IVL_BENCH_DEVICE"} == {v.name for v in _env.VARIABLES if v.name.startswith("IVL_")}
    assert all(f"`{v.name}`" in _env.markdown_table() for v in _env.VARIABLES)
