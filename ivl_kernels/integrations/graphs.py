"""A decode step of a static cache as a CUDA graph: recorded at the second token, replayed for every one that follows.

Upstream's forward is what is recorded, with all that is patched below it. A graph belongs to the cache whose memory it
writes, and is kept on it. What a step is made of (modules, hooks, the parameters' memory) is compared at every prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import _cuda_graph
from .._library import recorded
from ..models.families import families_in, text_stacks
from ..models.upstream import cache_of, forward_name
from ._edit import Editor, note
from ._patch import Adapter, Feature, PatchWarning, Site
from ._report import failure

MOST = 8  # kinds of step of a cache; beam search gives it other memory at every token
_GRAPHS = "_ivl_graphs"  # of a cache
_PLAIN = (bool, int, float, str)
_ITS_PARTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_CACHE, _TENSOR = object(), object()  # stand among arguments and results for theirs


class _Graphs:
    """What is known of a cache: its recorded steps by the shapes of their inputs, None for one that ran once."""

    def __init__(self) -> None:
        self.steps: dict[Any, _Step | None] = {}
        self.model: Any = None
        self.why = ""

    def __reduce__(self) -> Any:  # copies of a cache have memory of their own
        return _Graphs, ()

    def of(self, model: Any) -> None:
        """At a prompt: steps of a model that was another one then are forgotten."""
        now = _described(model)
        if now != self.model:
            self.__init__()  # type: ignore[misc]
            self.model = now


class _Step:
    """A recorded step; holds no cache, which holds it."""

    def __init__(self, run: Callable[[Any], Any], tensors: list[Tensor], rest: Any, cache: Any) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        result, self.replay = capture(lambda: run(_joined(rest, self.inputs, cache)))
        leaves, self.shape = pytree.tree_flatten(result)
        self.leaves = [_CACHE if leaf is cache else leaf for leaf in leaves]

    def __call__(self, tensors: list[Tensor], cache: Any) -> Any:
        for mine, given in zip(self.inputs, tensors):
            mine.copy_(given)
        self.replay()
        # Whoever keeps a step's logits or hidden states keeps them when the next step overwrites these.
        leaves = [
            leaf.clone() if isinstance(leaf, Tensor) else cache if leaf is _CACHE else leaf for leaf in self.leaves
        ]
        return pytree.tree_unflatten(leaves, self.shape)


def capture(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """The result that `function` will have written, and what makes it write it: nothing runs yet."""
    result, graph = _cuda_graph.recorded(function)
    return result, graph.replay


def _plain(value: Any) -> Any:
    """What of an attribute can be compared later: numbers, names, and dicts and lists of them."""
    if isinstance(value, dict):
        return [(key, _plain(each)) for key, each in value.items() if type(key) in _PLAIN]
    if isinstance(value, (list, tuple, set)):
        return [_plain(each) for each in value]
    return value if type(value) in _PLAIN else id(type(value))


def _attributes(thing: Any) -> list[tuple[str, Any]]:
    """Those that say yes: most are empty."""
    found = ((k, v) for k, v in vars(thing).items() if isinstance(v, (*_PLAIN, dict, list, tuple, set)) and v)
    return [(name, _plain(value)) for name, value in found if name not in _ITS_PARTS]


def _described(model: Any) -> Any:
    """What a recorded step depends on besides its inputs; that an adapter is on is an attribute of a module."""
    modules = list(model.modules())
    configs = {id(config): config for m in modules if hasattr(config := m.__dict__.get("config"), "__dict__")}
    parts = [(id(m), id(m.__dict__.get("forward")), _attributes(m)) for m in modules]
    parts += [(key, 0, _attributes(config)) for key, config in configs.items()]
    return parts, [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


def _seen(model: nn.Module) -> str:
    """Whose Python a replay would leave out: hooks of the modules below, or "".

    transformers' own collect what the step returns.
    """
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values()) if name else ()
        if any(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in hooks):
            return f"{name} has hooks"
    forward_hooks = torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks
    return "there are global module hooks" if any(forward_hooks) else ""


def problem(model: nn.Module) -> str:
    """Why no step of this model is recorded, or ""."""
    devices = {str(tensor.device) for tensor in model.parameters()}
    if len(devices) > 1:
        return f"its parameters are on {' and '.join(sorted(devices))}"
    if torch.version.hip or not next(iter(devices), "").startswith("cuda"):
        return "CUDA graphs are of NVIDIA GPUs"
    return "it is in training mode" if model.training else ""


def _static(cache: Any) -> bool:
    """Whether the cache keeps its memory as it is filled."""
    return getattr(cache, "is_compileable", False) is True and type(cache).__name__ != "DynamicCache"


def _filled(cache: Any) -> bool:
    return all(isinstance(getattr(layer, "keys", None), Tensor) for layer in cache.layers)


def _numbers(cache: Any) -> list[dict[str, Any]]:
    """What a cache counts in Python, where a replay does not count."""
    return [{k: v for k, v in vars(layer).items() if type(v) in (int, bool, float)} for layer in cache.layers]


def _split(kwargs: Mapping[str, Any], cache: Any) -> tuple[Any, list[Tensor], Any]:
    """What has to be the same, the tensors, and the rest of a call's arguments; (None, ...) for unknown ones."""
    leaves, shape = pytree.tree_flatten({name: _CACHE if value is cache else value for name, value in kwargs.items()})
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    plain = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    where = cache.layers[0].keys.device  # the host may look at what lies elsewhere
    if any(type(leaf) not in (*_PLAIN, type(None), object) for leaf in plain) or any(
        t.device != where for t in tensors
    ):
        return None, tensors, None
    like = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
    memory = tuple(t.data_ptr() for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor))
    return (shape, plain, like, memory, torch.is_inference_mode_enabled()), tensors, (plain, shape)


def _joined(rest: Any, tensors: list[Tensor], cache: Any) -> dict[str, Any]:
    (plain, shape), found = rest, iter(tensors)
    leaves = [next(found) if leaf is _TENSOR else cache if leaf is _CACHE else leaf for leaf in plain]
    return pytree.tree_unflatten(leaves, shape)


def _one_token(kwargs: Mapping[str, Any]) -> bool:
    given = [kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None]
    return len(given) == 1 and given[0].dim() > 1 and given[0].shape[1] == 1


def _forward(inner: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    cache = None if args or recorded() or torch.is_grad_enabled() else cache_of(kwargs)
    if cache is None or not hasattr(cache, "layers") or not _static(cache) or torch.is_autocast_enabled("cuda"):
        return inner(self, *args, **kwargs)
    graphs = cache.__dict__.setdefault(_GRAPHS, _Graphs())
    if not _one_token(kwargs) or graphs.model is None:
        graphs.of(self)
        graphs.why = problem(self) or _seen(self)
        if graphs.why:
            note(self, "graphs", graphs.why)
        return inner(self, **kwargs)
    if graphs.why or not _filled(cache):
        return inner(self, **kwargs)
    key, tensors, rest = _split(kwargs, cache)
    if key is None:
        return inner(self, **kwargs)
    if key not in graphs.steps and len(graphs.steps) >= MOST:
        return inner(self, **kwargs)
    if key not in graphs.steps:  # runs once as it is: compiles, loads, and shows what it counts
        before = _numbers(cache)
        result, waits = _cuda_graph.waits(lambda: inner(self, **kwargs))
        graphs.steps[key] = None
        if waits:
            _refuse(self, graphs, waits)
            return result
        if _numbers(cache) != before:
            graphs.why = f"{type(cache).__name__} counts in Python what a replay would not count (sliding windows)"
        note(self, "graphs", graphs.why or "a step was run, to be recorded")
        return result
    step = graphs.steps[key]
    if step is None:
        try:
            step = graphs.steps[key] = _Step(lambda given: inner(self, **given), tensors, rest, cache)
        except RuntimeError as error:
            _refuse(self, graphs, failure(error))
            return inner(self, **kwargs)
        note(self, "graphs", f"a step of {tuple(tensors[0].shape)} is recorded")
    return step(tensors, cache)


def _refuse(model: Any, graphs: _Graphs, why: str) -> None:
    graphs.why = f"a step cannot be recorded: {why}"
    note(model, "graphs", graphs.why)
    warnings.warn(f"patch(graphs=True): {graphs.why}; it runs as it is", PatchWarning, stacklevel=3)


class GraphsAdapter(Adapter):
    features = {
        "graphs": Feature(False, "decode steps of a static cache recorded as CUDA graphs and replayed (NVIDIA GPUs)")
    }

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        families = [(path, family.causal) for path, family in families_in(model)]
        if not families and any(True for _ in text_stacks(model)) and callable(getattr(model, "generate", None)):
            families = [("", model)]
        for path, causal in families:
            yield Site("graphs", path, causal, "forward: one token after a static cache")

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        edit.method(site.module, forward_name(site.module), _forward)

    def serving(self, site: Site) -> str:
        why = problem(site.module)
        return f"upstream's own steps: {why}" if why else "CUDA graphs, from the second token of a static cache on"


ADAPTER = GraphsAdapter()
