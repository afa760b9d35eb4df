"""A side of a checkpoint takes the memory of its own weights, and of nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ivl_kernels.testing import tiny

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import gc, os, sys
import torch, transformers
from ivl_kernels import LanguageSide, VisionSide
from ivl_kernels.testing import tiny

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

small = sys.argv[1]
for side in (VisionSide, LanguageSide):  # what the libraries load on first use
    side.from_pretrained(small)
before = resident()
side = {"vision": VisionSide, "language": LanguageSide}[sys.argv[3]].from_pretrained(sys.argv[2])
own = sum(p.nbytes for p in side.model.parameters())
for p in side.model.parameters():  # tensors of a file are read when they are touched
    p.detach().view(-1).sum()
print(own, resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
@pytest.mark.parametrize("which", ["vision", "language"])
def test_resident(which, tmp_path):
    large = tiny.native_model(
        vision=tiny.vision_config(hidden_size=512, num_hidden_layers=16, intermediate_size=2048),
        text=tiny.text_config(hidden_size=512, num_hidden_layers=16, intermediate_size=2048, vocab_size=20_000),
    )
    large.save_pretrained(tmp_path / "large")
    whole = sum(p.nbytes for p in large.parameters())
    tiny.native_model().save_pretrained(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "small"), str(tmp_path / "large"), which],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    own, resident = map(int, done.stdout.split())
    print(f"{which}: {own / 1e6:.0f} MB of weights of {whole / 1e6:.0f}, {resident / 1e6:.0f} MB resident")
    assert 0.3 * whole < own < 0.7 * whole and resident <= 1.15 * own
