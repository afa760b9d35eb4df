"""Experts under FSDP2 on two gloo processes, patched before and after sharding, against the same model unpatched."""

import copy
import datetime
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from ivl_kernels.integrations import PatchError, experts, patch
from tests.models import randomize, text_config
from tests.ranks import group

MOE = dict(projector=False, packing=False, flash=False, rope=False, moe=True)
# What is a unit of its own (each layer; its experts too; each expert of a list too), and whether the patch comes first.
CASES = (("layer", True), ("layer", False), ("experts", True), ("experts", False), ("expert", False))


def language_model(family):
    import transformers

    kind = transformers.Qwen3MoeForCausalLM if family == "qwen3_moe" else transformers.GptOssForCausalLM
    return randomize(kind(text_config(family))).train()


def shard(model, units):
    for layer in model.model.layers:
        inside = layer.mlp.experts
        if units == "expert" and isinstance(inside, nn.ModuleList):
            for expert in inside:
                fully_shard(expert)
        elif units != "layer":
            fully_shard(layer.mlp if isinstance(inside, nn.ModuleList) else inside)
        fully_shard(layer)
    fully_shard(model)


def step(model, ids):
    out = model(ids, labels=ids)
    out.loss.backward()
    grads = {name: None if p.grad is None else p.grad.full_tensor() for name, p in model.named_parameters()}
    return out.loss.detach(), grads


def compare(rank, family, units, before):
    ids = torch.randint(1, 290, (2, 13), generator=torch.Generator().manual_seed(rank))
    plain = language_model(family)
    lists = isinstance(plain.model.layers[0].mlp.experts, nn.ModuleList)
    model = copy.deepcopy(plain)
    shard(plain, units)
    expected = step(plain, ids)
    calls = []
    names = ("moe_experts", "moe_experts_list")
    ops = [getattr(experts, name) for name in names]
    alone = lists and units == "expert"  # its hooks make the weights whole: only its own call can be served
    if before:
        handle = patch(model, **MOE)
    shard(model, units)
    if not before:
        handle = patch(model, **MOE)
    try:
        for name, op in zip(names, ops):
            setattr(experts, name, lambda *args, op=op, **kwargs: (calls.append(op), op(*args, **kwargs))[1])
        got = step(model, ids)
    finally:
        for name, op in zip(names, ops):
            setattr(experts, name, op)
    assert len(calls) == (0 if alone else 2), (family, units, before, len(calls))
    details = [row.detail for row in handle.report().rows if row.what == "experts"]
    words = "cpu (float32 on cpu) where its FSDP unit"
    assert len(details) == 2 and all(words in detail for detail in details), details
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    assert {n for n, g in got[1].items() if g is None} == {n for n, g in expected[1].items() if g is None}
    for name, grad in expected[1].items():
        if grad is not None:
            torch.testing.assert_close(got[1][name], grad, rtol=2e-4, atol=2e-5)


def planned(folder):
    """A tensor-parallel plan of transformers: refused by name, or the same numbers."""
    import transformers

    try:
        model = transformers.Qwen3MoeForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
        ids = torch.arange(1, 20).view(1, -1)
        with torch.no_grad():
            plain = model(ids).logits
    except Exception:  # the installed version cannot do this on the CPU
        return
    handle = patch(model, **MOE)
    for row in handle.report().rows:
        fine = row.state in ("patched", "upstream", "not found")
        assert fine or "DTensor" in row.detail or "tensor_parallel" in row.detail, row
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain, rtol=2e-4, atol=2e-5)


def environment(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")


def run_planned(rank, path):
    environment(rank)
    # 5.0 fails on one rank, and the other waits for it.
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2, timeout=timeout)
    planned(path / "model")


def run(rank, path):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    environment(rank)
    with group(rank, 2, path / "store"):
        for family in ("qwen3_moe", "gpt_oss"):
            for units, before in CASES:
                if units != "expert" or family == "qwen3_moe":
                    compare(rank, family, units, before)
        # Sharded by anything else: nobody makes the weights whole for ours.
        model = language_model("gpt_oss")
        inside = model.model.layers[0].mlp.experts
        mesh = init_device_mesh("cpu", (2,))
        inside.down_proj = nn.Parameter(distribute_tensor(inside.down_proj.detach(), mesh, [Shard(0)]))
        with pytest.raises(PatchError, match="down_proj is a DTensor: sharded"):
            patch(model, strict=True, **MOE)


def test_a_plan_of_transformers(tmp_path):
    language_model("qwen3_moe").save_pretrained(tmp_path / "model")
    torch.multiprocessing.spawn(run_planned, (tmp_path,), nprocs=2)


def test_fsdp(tmp_path):
    torch.multiprocessing.spawn(run, (tmp_path,), nprocs=2)
