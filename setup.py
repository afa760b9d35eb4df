"""Build the compiled parts: ivl_kernels/_C (CPU, torch's stable ABI) and ivl_kernels/_C_cuda/*.fatbin (CUDA).

Both are optional: without a C++ compiler or torch's headers the install is pure Python (Triton and reference
backends), without nvcc there are no CUDA C++ kernels. Either way the build says so.

IVL_BUILD_CPU=0|1 and IVL_BUILD_CUDA=0|1 force a part off or on; forced on, what is missing is an error.
"""

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STABLE_ABI_TARGET = "0x020a000000000000"  # torch 2.10


def say(message):
    print(f"ivl_kernels build: {message}", file=sys.stderr, flush=True)


def cuda_archs():
    """The compute capabilities of the package's table of GPUs."""
    spec = importlib.util.spec_from_file_location("_targets", ROOT / "ivl_kernels" / "_targets.py")
    targets = sys.modules["_targets"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(targets)
    return targets.NVIDIA


def torch_root():
    """The installed torch package, also from inside pip's isolated build environment, which hides site-packages."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    for key in ("platlib", "purelib"):
        path = Path(sysconfig.get_path(key)) / "torch"
        if (path / "include").is_dir():
            return path
    return None


def nvcc_path():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidate = Path(home, "bin", "nvcc") if home else None
    return str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")


def sources():
    return sorted(glob.glob("csrc/cpu/*.cpp") + glob.glob("python/*.cpp"))


def other_sources():
    """What the sources include and what nvcc compiles: a source distribution needs it too."""
    return sorted(glob.glob("csrc/include/**/*.h", recursive=True) + glob.glob("csrc/cuda/*") + glob.glob("python/*.h"))


class Build(build_ext):
    """Compile with ninja, so that two cores are used and an unchanged file is not compiled again."""

    def run(self):
        self.build_cpu()
        self.build_cuda()

    def package_dir(self):
        return ROOT / "ivl_kernels" if self.inplace else Path(self.build_lib).resolve() / "ivl_kernels"

    def build_cpu(self):
        forced = os.environ.get("IVL_BUILD_CPU")
        torch = torch_root()
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        for problem, missing in (
            ("IVL_BUILD_CPU=0", forced == "0"),
            ("torch's headers were not found", torch is None),
            ("no C++ compiler was found", compiler is None),
        ):
            if missing:
                if forced == "1":
                    raise SystemExit(f"IVL_BUILD_CPU=1 but {problem}")
                say(f"WITHOUT the C++ kernels ({problem}): pure Python install, Triton and reference backends only")
                return
        import pybind11

        out = self.package_dir() / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        out.parent.mkdir(parents=True, exist_ok=True)
        # Not setuptools' build_temp: an editable install makes a new one each time and would compile everything again.
        work = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
        work.mkdir(parents=True, exist_ok=True)
        flags = [
            "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math",
            "-Wall -Wno-psabi -Wno-unknown-pragmas -Wno-unused-function",
            f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}",
            f"-I{ROOT}/csrc/include -isystem {torch}/include -isystem {pybind11.get_include()}",
            f"-isystem {sysconfig.get_path('include')}",
        ]
        objects = []
        lines = [
            "ninja_required_version = 1.3",
            f"cxx = {compiler}",
            f"flags = {' '.join(flags)}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  description = c++ $in",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  description = link $out",
            f"  command = $cxx -shared $in -o $out -L{torch}/lib -Wl,--as-needed -ltorch_cpu",
        ]
        for source in sources():
            objects.append(source.replace("/", "_") + ".o")
            lines.append(f"build {objects[-1]}: compile {ROOT / source}")
        lines += [f"build {out}: link {' '.join(objects)}", f"default {out}", ""]
        (work / "build.ninja").write_text("\n".join(lines))
        import ninja

        ninja_bin = Path(ninja.BIN_DIR) / "ninja"
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))
        try:
            subprocess.check_call([str(ninja_bin), "-C", str(work), "-j", jobs])
        except subprocess.CalledProcessError:
            if forced == "1":
                raise
            say("WITHOUT the C++ kernels: the compiler failed (see above); IVL_BUILD_CPU=1 makes this an error")
            return
        say(f"C++ kernels: {out.name}")

    def build_cuda(self):
        forced = os.environ.get("IVL_BUILD_CUDA")
        nvcc = nvcc_path()
        if forced == "1" and nvcc is None:
            raise SystemExit("IVL_BUILD_CUDA=1 but nvcc is neither on PATH nor under CUDA_HOME")
        if forced == "0" or nvcc is None:
            say(f"without the CUDA C++ kernels ({'IVL_BUILD_CUDA=0' if forced == '0' else 'no nvcc'})")
            return
        out = self.package_dir() / "_C_cuda"
        out.mkdir(parents=True, exist_ok=True)
        known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
        archs = [a for a in cuda_archs() if f"sm_{a}" in known]
        headers = max((os.path.getmtime(f) for f in glob.glob("csrc/include/ivl/**/*", recursive=True)), default=0)

        def compile_one(source):
            target = out / (Path(source).stem + ".fatbin")
            if target.exists() and target.stat().st_mtime > max(os.path.getmtime(source), headers):
                return
            # PTX of the oldest and the newest, for chips between and after them.
            gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            gencode += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in (archs[0], archs[-1])]
            flags = ["-std=c++17", "-O3", "-lineinfo", "--fmad=true", f"-I{ROOT}/csrc/include"]
            subprocess.check_call([nvcc, "-fatbin", *flags, *gencode, source, "-o", str(target)])

        try:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(compile_one, sorted(glob.glob("csrc/cuda/*.cu"))))
        except subprocess.CalledProcessError:
            if forced == "1":
                raise
            shutil.rmtree(out)
            say("WITHOUT the CUDA C++ kernels: nvcc failed (see above); IVL_BUILD_CUDA=1 makes this an error")
            return
        say(f"CUDA C++ kernels: {', '.join(sorted(f.stem for f in out.glob('*.fatbin'))) or 'none'}")

    def get_outputs(self):
        return [str(f) for f in self.package_dir().glob("_C*") if f.is_file()]


# An optional extension: a compiler that fails leaves the pure-Python install.
setup(
    ext_modules=[Extension("ivl_kernels._C", sources=sources(), depends=other_sources(), optional=True)],
    cmdclass={"build_ext": Build},
)
