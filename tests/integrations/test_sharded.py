"""Models whose parameters are spread over processes: FSDP2, FSDP1, DDP, tensor-parallel plans. Two processes, gloo.

The file is its own worker: `python test_sharded.py RANK FOLDER [WORD...]` runs every scenario, or those with these
words in their name, and leaves what it saw in FOLDER.
"""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

RANKS = 2
TILES = ((2, 1), ())
SERVED = {"pixel_shuffle_mlp": 1, "place_rows": 1, "rope": 2}
SCENARIOS = {}


def scenario(name, **changes):
    """Registers a scenario: a function that returns what the test compares. `changes`: of the expected calls of ops."""

    def register(function):
        SCENARIOS[name] = (function, {**SERVED, **changes})
        return function

    return register


# What the worker does.


def make(name):
    from tests.models import chat_inputs, chat_model, inputs, native_model

    if name == "hub":
        model = chat_model(name)
        batch = chat_inputs(model, TILES, flags=True)
    else:
        model, batch = native_model(name), inputs(TILES)
    return model, {**batch, "labels": batch["input_ids"]}


def parts(model):
    """(projector, embedding, decoder layers)"""
    if hasattr(model, "mlp1"):
        return model.mlp1, model.language_model.get_input_embeddings(), model.language_model.model.layers
    return model.model.multi_modal_projector, model.get_input_embeddings(), model.model.language_model.layers


class Calls(dict):
    """How often each op of ours ran; rope counts only with the q/k norms in it."""

    def __init__(self):
        from ivl_kernels import ops
        from ivl_kernels.integrations import rope

        for name in ("pixel_shuffle_mlp", "place_rows"):
            setattr(ops, name, self._counted(getattr(ops, name), name))
        rope.v2pe_rope = self._counted(rope.v2pe_rope, "rope", "q_weight")

    def _counted(self, function, name, keyword=None):
        def call(*args, **kwargs):
            if keyword is None or keyword in kwargs:
                self[name] = self.get(name, 0) + 1
            return function(*args, **kwargs)

        return call


CALLS = None


def full(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def step(model, batch, wrapped=None):
    """(loss, logits, gradients) of one training step."""
    model.zero_grad(set_to_none=True)
    out = (wrapped or model)(**batch)
    out.loss.backward()
    gradients = {name: p.grad if p.grad is None else full(p.grad).float() for name, p in model.named_parameters()}
    return out.loss.detach().float(), out.logits.detach().float(), gradients


def distance(got, expected):
    """The largest difference of logits, and of gradients relative to each one's largest value."""
    none = [name for name in expected[2] if (expected[2][name] is None) != (got[2][name] is None)]
    assert not none, f"None differs: {none}"
    pairs = [(got[2][name], gradient) for name, gradient in expected[2].items() if gradient is not None]
    worst = max(float((ours - theirs).abs().max() / (theirs.abs().max() + 1e-3)) for ours, theirs in pairs)
    return {"logits": float((got[1] - expected[1]).abs().max()), "gradients": worst}


def served(handle):
    """The rows of the report, and the calls of one more forward."""
    return [(row.feature, row.state, row.detail) for row in handle.report().rows if row.state != "not found"]


def sharded(name, units, order, **options):
    from torch.distributed.fsdp import fully_shard

    from ivl_kernels import patch

    plain, batch = make(name)
    expected = step(plain, batch)
    model, _ = make(name)
    projector, embedding, layers = parts(model)

    def shard():
        choice = {
            "root": [*layers, model],
            "each": [projector, embedding, *layers, model],
            "projector": [projector],
            "embedding": [embedding],
            "linear": [parts(model)[0][1] if hasattr(model, "mlp1") else projector.linear_1, model],
            "group": [[projector, embedding], *layers, model],
            "attention": [layer.self_attn for layer in layers],
        }
        for unit in choice[units]:
            fully_shard(unit, **options)

    if order == "after":
        shard()
    handle = patch(model)
    if order == "before":
        shard()
    rows = served(handle)
    CALLS.clear()
    got = step(model, batch)
    result = {"rows": rows, "calls": dict(CALLS), **distance(got, expected)}
    result["again"] = max(distance(step(model, batch), expected).values())
    with torch.no_grad():
        model(**batch)
        again = model(**batch).logits  # with what the last forward left gathered
    result["again"] = max(result["again"], float((again - expected[1]).abs().max()))
    assert served(handle) == rows, "the report depends on what is gathered"
    handle.undo()
    CALLS.clear()
    with torch.no_grad():
        result["undone"] = float((model(**batch).logits - expected[1]).abs().max())
    assert not CALLS and not any("_ivl" in module.__dict__ for module in model.modules())
    return result


for _order in ("before", "after"):
    for _name, _units, _reshard in (
        ("qwen3", "root", True),
        ("qwen3", "root", False),
        ("qwen3", "each", True),
        ("qwen3", "each", False),
        ("qwen3", "projector", True),
        ("qwen3", "embedding", False),
        ("qwen3", "group", True),
        ("qwen3", "attention", True),
        ("hub", "root", True),
        ("hub", "each", True),
        ("hub", "projector", False),
    ):
        scenario(f"fully_shard {_name} {_units} {'reshard' if _reshard else 'keep'} {_order}")(
            lambda n=_name, u=_units, o=_order, r=_reshard: sharded(n, u, o, reshard_after_forward=r)
        )
    scenario(f"fully_shard qwen3 linear reshard {_order}", pixel_shuffle_mlp=0)(
        lambda o=_order: sharded("qwen3", "linear", o)
    )


def mixed(name, order):
    """bfloat16 parameters in every unit: as near to float32 as the plain sharded model is."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from ivl_kernels import patch

    truth, batch = make(name)
    expected = step(truth, batch)

    def run(patched):
        model, _ = make(name)
        projector, embedding, layers = parts(model)
        handle = patch(model) if patched and order == "before" else None
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for unit in (projector, embedding, *layers, model):
            fully_shard(unit, mp_policy=policy)
        handle = patch(model) if patched and order == "after" else handle
        CALLS.clear()
        return distance(step(model, batch), expected), handle and served(handle), dict(CALLS)

    plain, (ours, rows, calls) = run(False)[0], run(True)
    return {"rows": rows, "calls": calls, **{key: ours[key] / (plain[key] + 1e-3) for key in ours}}


for _order in ("before", "after"):
    scenario(f"bfloat16 parameters {_order}")(lambda o=_order: mixed("qwen3", o))


@scenario("fully_shard with checkpointing", rope=4)
def checkpointing():
    from torch.distributed.fsdp import fully_shard

    from ivl_kernels import patch

    plain, batch = make("qwen3")
    expected = step(plain, batch)
    model, _ = make("qwen3")
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():  # the vision tower has no dropout, but its layers would be counted
        if hasattr(module, "gradient_checkpointing") and "Vision" in type(module).__name__:
            module.gradient_checkpointing = False
    projector, embedding, layers = parts(model)
    for unit in (projector, *layers, model):
        fully_shard(unit)
    handle = patch(model)
    CALLS.clear()
    got = step(model, batch)
    return {"rows": served(handle), "calls": dict(CALLS), **distance(got, expected)}


def wrapped(wrap, order, gather=None):
    from ivl_kernels import patch

    plain, batch = make("qwen3")
    expected = step(plain, batch)
    model, _ = make("qwen3")
    if order == "before":
        handle = patch(model)
        around = wrap(model)
    else:
        around = wrap(model)
        handle = patch(around)
    CALLS.clear()
    out = around(**batch)
    out.loss.backward()
    calls = dict(CALLS)
    result = {"rows": served(handle), "calls": calls, "logits": float((out.logits - expected[1]).abs().max())}
    result["gradients"] = gather(around, expected[2]) if gather else 0.0
    return result


def ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def ddp_gradients(around, expected):
    trained = [(name, p.grad) for name, p in around.module.named_parameters() if p.grad is not None]
    return max(float((gradient - expected[name]).abs().max()) for name, gradient in trained)


def fsdp1(model, units=()):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    kinds = {type(parts(model)[0])} if units else set()
    policy = ModuleWrapPolicy(kinds) if kinds else None
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=policy)


def fsdp1_gradients(around, expected):
    from torch.distributed.fsdp import FullyShardedDataParallel

    worst = 0.0
    with FullyShardedDataParallel.summon_full_params(around, with_grads=True):
        for name, p in around.named_parameters():
            name = name.replace("_fsdp_wrapped_module.", "")
            if expected[name] is not None:
                worst = max(worst, float((p.grad - expected[name]).abs().max()))
    return worst


for _order in ("before", "after"):
    scenario(f"DDP {_order}")(lambda o=_order: wrapped(ddp, o, ddp_gradients))
    scenario(f"FSDP1 {_order}")(lambda o=_order: wrapped(fsdp1, o, fsdp1_gradients))
    scenario(f"FSDP1 projector alone {_order}", pixel_shuffle_mlp=0)(
        lambda o=_order: wrapped(lambda model: fsdp1(model, ["projector"]), o, fsdp1_gradients)
    )


def tensor_parallel(name):
    """`from_pretrained(tp_plan="auto")`: every rank has some of the heads."""
    from ivl_kernels import patch

    plain, batch = make(name)
    folder = str(FOLDER / f"checkpoint {name}")
    if torch.distributed.get_rank() == 0:
        plain.save_pretrained(folder)
    torch.distributed.barrier()
    try:
        model = type(plain).from_pretrained(folder, tp_plan="auto").eval()
        expected = step(model, batch)
        assert float((expected[1] - step(plain, batch)[1]).abs().max()) < 1e-3
    except Exception as error:
        return {"skip": f"this transformers does not serve it here by itself: {type(error).__name__}: {error}"[:200]}
    handle = patch(model)
    CALLS.clear()
    got = step(model, batch)
    result = {"rows": served(handle), "calls": dict(CALLS), **distance(got, expected)}
    whole = {name: p.numel() for name, p in plain.named_parameters()}
    local = {name: getattr(p, "to_local", lambda p=p: p)().numel() for name, p in model.named_parameters()}
    result["sharded"] = sum(local[name] < count for name, count in whole.items())
    return result


# Newer releases sum the gradients of q/k norms over ranks: called there, not fused.
for _name in ("qwen2", "qwen3", "qwen3_moe"):
    scenario(f"tensor parallel {_name}", rope=None)(lambda n=_name: tensor_parallel(n))


def work(rank, folder, *words):
    global CALLS, FOLDER
    import warnings

    from tests.ranks import group

    warnings.simplefilter("ignore")
    FOLDER = Path(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    with group(rank, RANKS, f"{folder}/store"):
        CALLS = Calls()
        seen = {}
        for name, (function, _) in SCENARIOS.items():
            if not all(word in name for word in words):
                continue
            try:
                seen[name] = function()
            except Exception:
                seen[name] = {"error": traceback.format_exc()}
            torch.save(seen, FOLDER / f"{rank}.pt")


# What the tests ask.


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch without gloo")
    folder = tmp_path_factory.mktemp("sharded")
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        output = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all((folder / f"{rank}.pt").exists() for rank in range(RANKS)), output[0][-3000:]
    results = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    assert len(results[0]) == len(SCENARIOS), output[0][-3000:]
    return results


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name, seen):
    """Right on every rank, forward and backward, and served by our ops or refused by name."""
    for rank in range(RANKS):
        result = seen[rank][name]
        assert "error" not in result, result["error"]
        if "skip" in result:
            pytest.skip(result["skip"])
        limit = 2 if "bfloat16" in name else 1e-3
        assert result["logits"] <= limit and result["gradients"] <= limit, result
        assert result.get("again", 0) <= 1e-3 and result.get("undone", 0) <= 1e-3, result
        assert result.get("sharded", 1) > 0
        expected = {op: count for op, count in SCENARIOS[name][1].items() if count is not None}
        assert {op: result["calls"].get(op, 0) for op in expected} == expected, result
        rows = {feature: (state, detail) for feature, state, detail in result["rows"]}
        assert rows["packing"][0] == rows["rope"][0] == "patched", rows
        if expected["pixel_shuffle_mlp"]:
            assert rows["projector"][0] == "patched" and "upstream" not in rows["projector"][1], rows
        else:
            assert "FSDPLinear" in rows["projector"][1] or "FullyShardedDataParallel" in rows["projector"][1], rows


if __name__ == "__main__":
    work(int(sys.argv[1]), *sys.argv[2:])
