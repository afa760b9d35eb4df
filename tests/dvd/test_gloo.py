"""The two sides as two ranks of torch.distributed over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dvd.halves import inputs_of, model_of, whole

ROOT = Path(__file__).resolve().parents[2]
TILES = [((2,),), ((3, 4),), ((),), ((7,),)]
CODE = """
import json, sys
import torch
import torch.distributed as dist
from ivl_kernels.dvd import MessageError
from ivl_kernels.dvd.distributed import receive, send
from tests.dvd.halves import GREEDY, inputs_of, model_of, requests_of, sides

kind, store, rank, tiles = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
kind = kind.removesuffix(" bf16")
vision, language = sides(kind, dtype)
for row in tiles:
    batch = inputs_of(vision.model, row, dtype=dtype)
    if rank == 0:
        send(vision.encode(requests_of(batch, row))[0], 1)
    else:
        features = receive(0, language.limits)
        print(json.dumps(language.generate(batch["input_ids"], features, **GREEDY)[0].tolist()), flush=True)
if rank == 0:
    dist.send(torch.tensor([1 << 60]), 1)  # a size that nobody may take memory for
else:
    try:
        receive(0, language.limits)
    except MessageError as error:
        print(json.dumps(error.reason), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["native", "native flash", "hub flash", "native flash bf16"])
def test_two_ranks(kind, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, kind, str(tmp_path / "store"), str(rank), json.dumps(TILES)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], [text for _, text in outputs]
    *got, reason = map(json.loads, outputs[1][0].splitlines())
    import torch

    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    for tiles, tokens in zip(TILES, got):
        model = model_of(kind.removesuffix(" bf16")).to(dtype)
        assert tokens == whole(model, inputs_of(model, tiles, dtype=dtype))[0].tolist()
    assert reason == "size" and len(got) == len(TILES)
