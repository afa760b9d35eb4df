"""Ahead-of-time compilation: inside `compiling(target)`, launches of Triton kernels compile for a GPU that is not here.

Launchers may be given meta tensors of any size; nothing runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ivl_kernels._targets import TARGETS as LIMITS
from tests.simulator.gpu import OLD_TRITON
from tests.simulator.ptxsim.frontend import OPTION_KEYS, TRITON_DTYPES, resources

TARGETS = (80, 90, 100, 120, "gfx942")
# Shared memory a block can have, in bytes.
SHARED_LIMIT = {capability or "gfx942": target.shared_block for capability, target in LIMITS.items()}
# Bytes that a float32 kernel may spill: none with the Triton it was tuned on; older ones spill up to 24 registers.
SPILL_LIMIT = 96 if OLD_TRITON else 0


@dataclass
class Compiled:
    """One compiled launch; `asm` is PTX or AMD assembly, `spills` in bytes (AMD: registers)."""

    kernel: str
    asm: str
    shared: int
    registers: int
    spills: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.asm))

    def machine_code(self, target: int) -> str:
        """SASS of an NVIDIA GPU, by Triton's assembler and disassembler."""
        from triton import knobs
        from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

        with tempfile.TemporaryDirectory() as folder:
            ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
            ptx.write_text(self.asm)
            arch = sm_arch_from_capability(target)
            subprocess.run([get_ptxas(target).path, f"-arch={arch}", ptx, "-o", cubin], check=True)
            command = [knobs.nvidia.nvdisasm.path, "-c", cubin]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _pointer(tensor, amd):
    """What Triton's launcher says of an aligned tensor: on AMD buffer instructions serve one of at most 2 GB."""
    small = amd and tensor.numel() * tensor.element_size() <= 2**31 - 1
    return [["tt.divisibility", 16], *([["tt.pointer_range", 32]] if small else [])]


def _signature(fn, bound, amd):
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(fn.params):
        value = bound[parameter.name]
        specialize = not getattr(parameter, "do_not_specialize", False)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            dtype = TRITON_DTYPES[str(value.base.dtype).removeprefix("torch.")]
            signature[parameter.name] = f"tensordesc<{dtype}{[*value.block_shape]}>"
        elif hasattr(value, "dtype"):
            signature[parameter.name] = "*" + TRITON_DTYPES[str(value.dtype).removeprefix("torch.")]
            if specialize:
                attributes[(index,)] = _pointer(value, amd)
        elif isinstance(value, bool | float):
            signature[parameter.name] = "u1" if isinstance(value, bool) else "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialize and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


@dataclass(frozen=True)
class Launch:
    """A launch that is not made: the kernel, all that its machine code depends on, and the grid, if that is known."""

    fn: Any
    target: int | str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    grid: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Alike for launches that share their machine code."""
        return f"{self.fn.__module__}.{self.fn.__name__} {list(vars(self).values())[1:-1]}"

    def compile(self) -> Compiled:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        amd = isinstance(self.target, str)
        gpu = GPUTarget("hip", self.target, 64) if amd else GPUTarget("cuda", self.target, 32)
        source = ASTSource(self.fn, signature=self.signature, constexprs=self.constants, attrs=self.attributes)
        compiled = compile(source, target=gpu, options=self.options)
        name, shared = self.fn.__name__, compiled.metadata.shared
        if amd:
            asm = compiled.asm["amdgcn"]
            counts = r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)"
            found = {k: int(v) for k, v in re.findall(counts, asm)}
            spills = found["vgpr_spill_count"] + found["sgpr_spill_count"]
            return Compiled(name, asm, shared, found["vgpr_count"], spills)
        asm = compiled.asm["ptx"]
        from triton.backends.nvidia.compiler import get_ptxas

        (used,) = resources(asm, ptxas=get_ptxas(self.target).path).values()
        return Compiled(name, asm, shared, used["registers"], used["spill_stores"] + used["spill_loads"])


def launch(fn, target, *args, **kwargs) -> Launch:
    """`fn[grid](*args, **kwargs)` for a compute capability or a gfx name."""
    names = [p.name for p in fn.params]
    options = {k: v for k, v in kwargs.items() if k in OPTION_KEYS and k not in names}
    bound = dict(zip(names, args)) | {k: v for k, v in kwargs.items() if k in names}
    return Launch(fn, target, *_signature(fn, bound, isinstance(target, str)), options)


@contextlib.contextmanager
def compiling(target, log=None, make=Launch.compile):
    """Yields the list of what `make` makes of each launch; `log`: the list to append to."""
    from triton.runtime.jit import JITFunction

    log = [] if log is None else log

    def run(self, *args, grid, warmup=False, **kwargs):
        log.append(make(dataclasses.replace(launch(self, target, *args, **kwargs), grid=tuple(grid))))

    hip = "stands in" if isinstance(target, str) else torch.version.hip
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(torch.version, "hip", hip):
        yield log
