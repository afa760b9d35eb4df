"""The Ray example from its command to its end: the whole model's answers, in order, and no process left behind."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("ray")
from ivl_kernels.imaging import tile_image
from tests.engines import checkpoints
from tests.engines.checkpoints import FAMILIES, ROOT, model_of, pictures

needs_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="an actor has a core")


def expected(folder, image, tokens):
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), model_of(folder)
    tiles = tile_image(image, tile=64).pixel_values()
    marks = "<IMG_CONTEXT>" * checkpoints.tokens_a_tile(model) * len(tiles)
    ids = tokenizer(
        f"<|im_start|>user\n<img>{marks}</img>\nw3 w4<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt"
    )["input_ids"]
    made = model.generate(
        input_ids=ids, pixel_values=tiles, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )[0]
    return tokenizer.decode(checkpoints.new_tokens(model, made, ids), skip_special_tokens=True)


def left_running(session):
    """Processes of the session of one that has ended."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, _, _, of = file.read().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found.append(int(pid))
    return found


@needs_cores
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads Linux's /proc")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_script(family, tmp_path):
    folder = checkpoints.save(tmp_path / "checkpoint", family)
    paths = []
    for i, picture in enumerate([*pictures(), pictures()[0]]):
        paths.append(str(tmp_path / f"{i}.png"))
        picture.save(paths[-1])
    options = ["--question", "w3 w4", "--tokens", "8", "--credits", "2", "--trust-remote-code"]
    process = subprocess.Popen(
        [sys.executable, "docs/examples/dvd_ray.py", str(folder), *paths, *options], cwd=ROOT,
        env=checkpoints.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    wanted = [f"{i}.png: {expected(folder, image, 8)}" for i, image in enumerate([*pictures(), pictures()[0]])]
    assert output.splitlines() == wanted
    assert left_running(process.pid) == []


def test_more_than_the_machine_has(tmp_path):
    done = subprocess.run(
        [sys.executable, "docs/examples/dvd_ray.py", str(tmp_path), "a.png", "--encoders", "4096"], cwd=ROOT,
        env=checkpoints.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "--encoders, --threads: they need 4097 cores" in done.stderr
