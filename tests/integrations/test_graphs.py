"""Decoding with a static cache, and recorded steps: what a CUDA graph does is stood in for by a run of the step."""

import copy
import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers

import ivl_kernels
from ivl_kernels import _cuda_graph, _library
from ivl_kernels.integrations import _patch, graphs
from ivl_kernels.testing.cases import Numbers, all_cases, cast, forward_backward
from tests.models import chat_inputs, chat_model, inputs, native_model
from tests.simulator.idle import idle_gpu, no_host_reads

V5 = int(transformers.__version__.split(".")[0]) >= 5
pytestmark = pytest.mark.skipif(not V5, reason="static caches of transformers 4.57 are made in another way")
STATIC = dict(cache_implementation="static", disable_compile=True)
GRAPHS = dict(graphs=True, attention=False)  # which is of the CPU, and looks at masks
NEW = 7
ARGUMENTS = inspect.signature(transformers.Qwen3Model.forward).parameters
CACHE = "cache" if "cache" in ARGUMENTS else "past_key_values"


def build(name):
    if name in ("repo", "hub"):
        model = chat_model(name)
        return model, chat_inputs(model, ((2, 1), ()))
    return native_model(name), inputs(((2, 1), ()))


def generated(model, batch, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.generate(**batch, max_new_tokens=NEW, do_sample=False, **options)


class Recorder:
    """Stands for `graphs.capture`: recording leaves no trace but in the result's memory, and a replay is a run."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, function):
        self.recorded += 1
        before = [(tensor, tensor.clone()) for tensor in self.cached()]
        with no_host_reads():
            result = function()
        for tensor, value in before:
            tensor.copy_(value)
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for leaf in leaves:
            leaf.fill_(float("nan"))

        def replay():
            self.replayed += 1
            again = torch.utils._pytree.tree_leaves(function())
            for leaf, value in zip(leaves, [v for v in again if isinstance(v, torch.Tensor)], strict=True):
                leaf.copy_(value)

        return result, replay

    def cached(self):
        return [t for layer in self.cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    split = graphs._split
    monkeypatch.setattr(
        graphs, "_split", lambda kwargs, cache: (setattr(found, "cache", cache), split(kwargs, cache))[1]
    )
    monkeypatch.setattr(graphs, "capture", found)
    monkeypatch.setattr(graphs, "problem", lambda model: "")
    return found


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe", "gpt_oss", "repo", "hub"])
def test_a_static_cache_gives_the_same_tokens(name):
    model, batch = build(name)
    plain = generated(model, batch)
    ivl_kernels.patch(model)
    assert torch.equal(generated(model, batch), plain)
    assert torch.equal(generated(model, batch, **STATIC), plain)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe", "repo", "hub"])
def test_recorded_steps_give_the_same_tokens(name, recorder):
    """And nothing in them reads from the device."""
    model, batch = build(name)
    plain = generated(model, batch)
    handle = ivl_kernels.patch(model, **GRAPHS)
    assert torch.equal(generated(model, batch, **STATIC), plain)
    assert (recorder.recorded, recorder.replayed) == (1, NEW - 2), handle.note(
        "graphs"
    )  # the prompt gives the first, the second ran as it is
    assert "is recorded" in str(handle.report())
    assert torch.equal(generated(model, batch), plain) and recorder.recorded == 1  # a dynamic cache
    handle.undo()
    assert torch.equal(generated(model, batch, **STATIC), plain) and recorder.recorded == 1


def test_beams_move_the_cache(recorder):
    model, batch = build("qwen3")
    plain = generated(model, batch, num_beams=2)
    ivl_kernels.patch(model, **GRAPHS)
    assert torch.equal(generated(model, batch, num_beams=2, **STATIC), plain)
    assert recorder.recorded <= graphs.MOST


def test_windows_that_slide_are_counted_in_python(recorder):
    model, batch = build("gpt_oss")
    plain = generated(model, batch)
    handle = ivl_kernels.patch(model, **GRAPHS)
    assert torch.equal(generated(model, batch, **STATIC), plain)
    assert recorder.recorded == 0 and "counts in Python what a replay would not count" in handle.note("graphs")


def test_what_is_kept_of_a_step_stays(recorder):
    model, batch = build("qwen3")
    asked = dict(output_logits=True, output_hidden_states=True, return_dict_in_generate=True, **STATIC)
    plain = generated(model, batch, **asked)
    ivl_kernels.patch(model, **GRAPHS)
    got = generated(model, batch, **asked)
    assert recorder.replayed == NEW - 2
    for mine, theirs in zip(got.logits, plain.logits, strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(got.hidden_states, plain.hidden_states, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


@torch.no_grad()
def test_a_changed_model_is_recorded_again(recorder):
    """Steps are of the model as it was at the prompt: other weights, an adapter that is on; none with hooks."""
    model, batch = build("qwen3")
    handle = ivl_kernels.patch(model, **GRAPHS)
    cache = transformers.StaticCache(config=model.config, max_cache_len=80)

    def steps():
        cache.reset()
        out = [model(input_ids=batch["input_ids"][:1, :5], use_cache=True, **{CACHE: cache}).logits[:, -1:]]
        for position in range(5, 9):
            given = dict(position_ids=torch.tensor([[position]]), attention_mask=torch.arange(80)[None] <= position)
            given["attention_mask"] = given["attention_mask"][None, None]
            if "cache_position" in ARGUMENTS:
                given["cache_position"] = torch.tensor([position])
            ids = out[-1].argmax(-1)
            out.append(model(input_ids=ids, use_cache=True, logits_to_keep=1, **given, **{CACHE: cache}).logits)
        return torch.cat(out, 1)

    first = steps()
    assert recorder.recorded == 1
    assert torch.equal(steps(), first) and recorder.recorded == 1  # the same cache again: nothing is recorded
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight)
    torch.testing.assert_close(steps(), 2 * first)
    assert recorder.recorded == 2
    model.lm_head = Adapted(model.lm_head)
    torch.testing.assert_close(steps(), 2 * first)
    model.lm_head.factors["default"] = 0.5
    torch.testing.assert_close(steps(), first)
    model.lm_head.disabled = True
    torch.testing.assert_close(steps(), 2 * first)
    model.config.get_text_config().changed = "by hand"
    torch.testing.assert_close(steps(), 2 * first)
    assert recorder.recorded == 6
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(steps(), 2 * first)
    assert recorder.recorded == 6 and len(seen) == 5 and handle.note("graphs") == "lm_head has hooks"
    assert copy.deepcopy(cache).__dict__[graphs._GRAPHS].steps == {}
    handle.undo()
    torch.testing.assert_close(steps(), 2 * first)
    assert recorder.recorded == 6


class Adapted(torch.nn.Module):
    """As adapters have it: what is on is told by attributes."""

    def __init__(self, base):
        super().__init__()
        self.base, self.disabled, self.factors = base, False, {"default": 1.0}

    def forward(self, hidden):
        return self.base(hidden) * (1.0 if self.disabled else self.factors["default"])


def test_a_step_that_waits_for_the_device_is_not_recorded(recorder, monkeypatch):
    """Recording it would break off, and torch does not get over that."""
    model, batch = build("qwen3")
    plain = generated(model, batch)
    handle = ivl_kernels.patch(model, **GRAPHS)
    monkeypatch.setattr(_cuda_graph, "waits", lambda function: (function(), "it waits for the device (here)"))
    with pytest.warns(_patch.PatchWarning, match="cannot be recorded: it waits for the device"):
        assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False, **STATIC), plain)
    assert recorder.recorded == 0 and "it waits for the device (here)" in handle.note("graphs")


def test_what_the_host_may_look_at_is_not_an_input():
    keys = torch.zeros(1, device="meta")
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=keys)])
    assert graphs._split(dict(input_ids=keys), cache)[0] is not None
    assert graphs._split(dict(input_ids=keys, position=torch.tensor([3])), cache)[0] is None


def test_what_cannot_be_recorded_runs_as_it_is(recorder, monkeypatch):
    model, batch = build("qwen3")
    plain = generated(model, batch)
    handle = ivl_kernels.patch(model, **GRAPHS)

    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", refuse)
    with pytest.warns(_patch.PatchWarning, match="cannot be recorded: RuntimeError: operation not permitted"):
        assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False, **STATIC), plain)
    assert "not permitted" in handle.note("graphs")


def test_where_there_are_no_graphs():
    model, batch = build("qwen3")
    handle = ivl_kernels.patch(model, **GRAPHS)
    (row,) = [row for row in handle.report().rows if row.feature == "graphs"]
    assert row.state == "patched" and row.detail.startswith("upstream's own steps: CUDA graphs are of NVIDIA GPUs")
    plain = generated(model, batch)
    assert torch.equal(generated(model, batch, **STATIC), plain)
    handle.undo()
    assert "_ivl" not in vars(model)
    assert "graphs" not in {row.feature for row in ivl_kernels.patch(model).report().rows}


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_a_compiled_step_is_one_graph(name):
    """What `torch.compile(mode="reduce-overhead")` would capture has no break, and gives the same."""
    model, batch = build(name)
    ivl_kernels.patch(model)
    text = model.model.language_model
    compiled = torch.compile(text, fullgraph=True, backend="aot_eager")
    results = []
    for step in (text, compiled):
        cache = {CACHE: transformers.StaticCache(config=model.config, max_cache_len=40)}
        text(input_ids=batch["input_ids"][:, :5], use_cache=True, **cache)
        mask = torch.arange(40)[None, None, None] < 6
        ids, positions = batch["input_ids"][:, 5:6], torch.full((2, 1), 5)
        cache |= {"cache_position": torch.tensor([5])} if "cache_position" in ARGUMENTS else {}
        out = step(input_ids=ids, attention_mask=mask.expand(2, 1, 1, 40), position_ids=positions, **cache)
        results.append(out.last_hidden_state)
    torch.testing.assert_close(results[1], results[0])


def test_ops_that_do_not_say_so_never_wait_for_the_device(monkeypatch):
    """Every op, forward and backward, that `torch.compile` may put into a CUDA graph."""
    reached, serve = set(), _library.Op._serve

    def serving(op, arguments, tensor, forced):
        if op.reads_host:
            return serve(op, arguments, tensor, forced)
        reached.add(op.name)
        with no_host_reads():
            return serve(op, arguments, tensor, forced)

    monkeypatch.setattr(_library.Op, "_serve", serving)
    with idle_gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in all_cases():
            if case.op == "moe_experts_list":  # the reference follows numbers that nobody has written
                continue
            for dtype in (torch.bfloat16, torch.float32):
                given = cast(case.inputs(Numbers()), dtype, "cpu")
                case.call(given, "")
                if case.gradients:
                    with torch.enable_grad():
                        forward_backward(case, given, "")
    assert reached == {name for name, op in _library.OPS.items() if not op.reads_host}
