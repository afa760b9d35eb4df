"""Plans: what a call of an op on a GPU did, done again without deciding it again.

What an op checks, chooses, allocates and launches depends on its arguments' shapes, strides, dtypes, alignment and
options, and on a few settings; never on numbers in tensors. The second call with the same of all these is recorded: its
allocations, views, calls of torch and launches become a straight-line function, and later calls run only that. What is
only launched upon is one piece of memory, addressed by offsets.

Whatever is not known to be safe is no plan: a call of torch that is not listed here, a read from the device, a tensor
of unknown origin, an op on the reference. And whoever is to see the ops themselves (autograd, compilers, transforms,
dispatch modes, profilers, autocast) gets the call as it is written.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, NoneType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import _dispatch, _env, _gpu, _recording

F = TypeVar("F", bound=Callable[..., Any])

MOST = 512  # plans of a function; the oldest goes
ALIGNMENT = 512  # bytes, as torch's allocator has it on GPUs
VALUES = frozenset((NoneType, int, float, bool, str))
STREAM = object()  # stands among a launch's arguments for the current stream
_SEEN = "called once"

# What is known of every planned function's calls, by its name and then by what a call depends on: a function, or why
# there is none.
PLANS: dict[str, dict[Any, Any]] = {}


def counted() -> bool:
    """Whether somebody counts or changes what torch is asked for, as profilers of operations do."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._len_torch_function_stack() == 0:
        return torch._C._len_torch_dispatch_stack() > 0
    # A default device is of no concern to who makes tensors like those he was given.
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def watched() -> bool:
    """Whether anybody but autograd sees the calls of operators: modes, transforms, traces, profilers."""
    return (
        counted()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def planned(function: F) -> F:
    """`function`, whose repeated calls on GPU tensors run a plan.

    It takes positional arguments: tensors, None, numbers, strings, and lists and records of them. What it does may
    depend on all of these but not on what tensors hold; it returns tensors, or tuples and records of them.
    """
    plans = PLANS[f"{function.__module__}.{function.__qualname__}"] = {}

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        stand_in = _gpu.standing()
        if stand_in is None and not torch.cuda.is_initialized():
            return function(*args)
        device = _device(stand_in)
        if device is None or watched() or forward_ad._current_level >= 0 or torch.is_autocast_enabled(device.type):
            return function(*args)
        tensors: list[Tensor] = []
        pointers: list[int] = []
        settings = (
            _env.BACKEND.raw(),
            _dispatch.preference(),
            _gpu.float32_precision(),
            torch.is_inference_mode_enabled(),
        )
        key: list[Any] = [device, stand_in, *settings]
        try:
            same = _describe(args, device, torch.is_grad_enabled(), key, tensors, pointers)
        except RuntimeError:  # no strides, no memory
            same = False
        # Of two names for one memory only one would be followed.
        if not same or len(set(pointers)) < len(pointers) or not _recording.thread.plans:
            return function(*args)
        found = tuple(key)
        plan = plans.get(found)
        if type(plan) is FunctionType:
            result = plan(tensors, pointers)
            if result is not NotImplemented:
                return result
        elif plan is _SEEN:
            result, plans[found] = _recorded(function, args, tensors, device)
            return result
        result = function(*args)
        if plan is None:
            if len(plans) >= MOST:  # more, where it went while another thread recorded it
                for old in [*plans][: 1 - MOST]:
                    plans.pop(old, None)
            plans[found] = _SEEN
        return result

    return cast(F, call)


@contextlib.contextmanager
def unplanned() -> Iterator[None]:
    """Inside, this thread's calls run as they are written; to compare with them, or to look for an error."""
    before, _recording.thread.plans = _recording.thread.plans, False
    try:
        yield
    finally:
        _recording.thread.plans = before


_CPU = torch.device("cpu")


@functools.cache
def _cuda_device(index: int) -> torch.device:
    return torch.device("cuda", index)


def _device(stand_in: _gpu.StandIn | None) -> torch.device | None:
    """The current device, on which all tensors of a plan are."""
    if stand_in is not None:
        return _CPU if stand_in.kind in ("idle", "simulator") else None
    return None if torch.version.hip or _gpu.interpreting() else _cuda_device(torch._C._cuda_getDevice())


def _describe(
    values: Iterable[Any],
    device: torch.device,
    graded: bool,
    key: list[Any],
    tensors: list[Tensor],
    pointers: list[int],
) -> bool:
    """Into `key` what a call depends on; False: it is not to be planned."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            follows = value.requires_grad
            if follows and graded or value.device != device or value.is_neg():
                return False
            pointer = value.data_ptr()
            key += (value.dtype, value.shape, value.stride(), pointer & 15, follows, value.is_inference())
            tensors.append(value)
            pointers.append(pointer)
        elif kind in VALUES and value == value:  # no key finds a NaN again
            key += (kind, value or kind is float and repr(value))  # 0.0 is not -0.0
        elif isinstance(value, (list, tuple)):
            key += (kind, len(value))
            if not _describe(value, device, graded, key, tensors, pointers):
                return False
        else:
            return False
    return True


class _Unplannable(Exception): ...


def _recorded(function: Callable[..., Any], args: Any, tensors: list[Tensor], device: torch.device) -> tuple[Any, Any]:
    """The result of a call, and its plan or why there is none."""
    _recording.thread.recorder = recording = Recorder(tensors, device)
    try:
        with recording:
            result = function(*args)
    finally:
        _recording.thread.recorder = None
    try:
        return result, recording.plan(result)
    except _Unplannable as why:
        return result, str(why)


def written(tensor: Tensor) -> None:
    """An op writes to `tensor`: autograd must know that what it saved of it is gone."""
    torch.autograd.graph.increment_version(tensor)
    recorder = _recording.thread.recorder
    if recorder is not None:
        recorder.launch(torch.autograd.graph.increment_version, (), (tensor,), {}, False)


class _Value(NamedTuple):
    """A tensor: its memory begins `offset` bytes after that of `root`, which is a value too."""

    tensor: Tensor
    root: int
    offset: int


class _Ref(NamedTuple):
    value: int


class _Step(NamedTuple):
    """A call. Views are made when somebody needs them, and launches may take addresses instead of tensors."""

    function: Any
    arguments: Any
    keywords: dict[str, Any]
    outputs: Any = None  # as the call returns them
    view: bool = False
    addresses: bool = False


_aten = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_FACTORIES = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.full.default, _aten.zeros.default}
# All but `as_strided`, which counts from where the storage begins.
_VIEWS = {
    _aten._unsafe_view.default: _aten._unsafe_view.default,
    _aten.detach.default: Tensor.detach,
    _aten.expand.default: Tensor.expand,
    _aten.permute.default: torch.permute,
    _aten.select.int: torch.select,
    _aten.slice.Tensor: _aten.slice.Tensor,
    _aten.split.Tensor: _aten.split.Tensor,
    _aten.split_with_sizes.default: _aten.split_with_sizes.default,
    _aten.squeeze.dim: torch.squeeze,
    _aten.t.default: torch.t,
    _aten.transpose.int: torch.transpose,
    _aten.unbind.int: torch.unbind,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.view.default: Tensor.view,
    _aten.view.dtype: Tensor.view,
}
# Neither random nor reading from the device; what computes is torch's, which looks at its own settings every time.
_CALLS = {
    _aten._to_copy.default: _aten._to_copy.default,
    _aten.addmm.default: torch.addmm,
    _aten.addmm.out: torch.addmm,
    _aten.clone.default: torch.clone,
    _aten.copy_.default: Tensor.copy_,
    _aten.fill_.Scalar: Tensor.fill_,
    _aten.full.default: _aten.full.default,
    _aten.mm.default: torch.mm,
    _aten.mm.out: torch.mm,
    _aten.ne.Scalar: torch.ne,
    _aten.new_full.default: _aten.new_full.default,
    _aten.new_zeros.default: _aten.new_zeros.default,
    _aten.sum.dim_IntList: torch.sum,
    _aten.zero_.default: Tensor.zero_,
    _aten.zeros.default: _aten.zeros.default,
}
_KNOWN = {*_EMPTY, *_VIEWS, *_CALLS}
_CONSTANTS = {torch.Size, torch.device, torch.dtype, torch.layout, torch.memory_format}


class Recorder(TorchDispatchMode):
    """Follows one call of a function of `tensors`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else torch imports its compiler, for seconds, at the first call
        return False

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        super().__init__()
        self.inputs, self.device = len(tensors), device
        # What executes kernels without a GPU wants the tensors.
        self.addresses = not _gpu.executing()
        self.values = [_Value(tensor, i, 0) for i, tensor in enumerate(tensors)]
        self.names = {id(tensor): i for i, tensor in enumerate(tensors)}
        self.empty: set[int] = set()
        self.steps: list[_Step] = []
        self.why = ""

    def refuse(self, why: str) -> None:
        self.why = self.why or why

    def launch(self, function: Any, fixed: Any, args: Any, keywords: dict[str, Any], addresses: bool) -> None:
        """`function(*fixed, *args, **keywords)` was called, and is to be called again.

        Args:
            fixed: goes into the plan as it is, and so may hold no tensor.
            args: tensors, plain values and lists of them.
            addresses: the function takes addresses where it takes tensors.
        """
        try:
            arguments = (*fixed, *self._refs(args))
            self.steps.append(_Step(function, arguments, self._refs(keywords), addresses=addresses))
        except _Unplannable as why:
            self.refuse(str(why))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, nothing is followed: what executes kernels without a GPU may use torch."""
        _recording.thread.recorder = None
        try:
            with _disable_current_modes():
                yield
        finally:
            _recording.thread.recorder = self

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in _KNOWN:  # in inference mode, what is made of others comes whole
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = function(*args, **kwargs)
        try:
            self._follow(function, args, kwargs, result)
        except _Unplannable as why:
            self.refuse(str(why))
        return result

    def _follow(self, function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if function in _FACTORIES and kwargs.get("dtype") is None:
            raise _Unplannable(f"{function} has torch's default dtype")
        if function in _EMPTY:
            self.empty.add(self._add(result))
        elif function is _aten.detach.default and self._ref(args[0]).value >= self.inputs:
            self._alias(result, self._ref(args[0]).value)  # autograd's, of every view
        elif function in _VIEWS:
            root = self.values[self._ref(args[0]).value].root
            outputs = (
                [self._add(t, root) for t in result] if isinstance(result, (list, tuple)) else self._add(result, root)
            )
            self.steps.append(_Step(_VIEWS[function], self._refs(args), self._refs(kwargs), outputs, view=True))
        elif function in _CALLS:
            arguments, keywords = self._refs(args), self._refs(kwargs)
            known = self.names.get(id(result))
            self.steps.append(
                _Step(_CALLS[function], arguments, keywords, self._add(result) if known is None else None)
            )
        else:
            raise _Unplannable(f"{function} is called")

    def _add(self, tensor: Tensor, root: int | None = None) -> int:
        number = len(self.values)
        if tensor.device != self.device:
            raise _Unplannable(f"a tensor is on {tensor.device}")
        if root is None:
            if tensor.data_ptr() & 15:
                raise _Unplannable("memory is not aligned")
            value = _Value(tensor, number, 0)
        else:
            value = _Value(tensor, root, tensor.data_ptr() - self.values[root].tensor.data_ptr())
        self.values.append(value)
        self.names[id(tensor)] = number
        return number

    def _alias(self, tensor: Tensor, number: int) -> None:
        self.values.append(_Value(tensor, number, 0))  # kept, so that its id stays its own
        self.names[id(tensor)] = number

    def _ref(self, tensor: Tensor) -> _Ref:
        found = self.names.get(id(tensor))
        if found is None:
            raise _Unplannable("a tensor is neither an argument nor made of them")
        return _Ref(found)

    def _refs(self, value: Any) -> Any:
        """A nest with a `_Ref` for each tensor."""
        if isinstance(value, Tensor):
            return self._ref(value)
        if isinstance(value, dict):
            return {name: self._refs(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)) and type(value) is not torch.Size:
            items = [self._refs(item) for item in value]
            return items if isinstance(value, list) else tuple.__new__(type(value), items)
        if type(value) in VALUES or type(value) in _CONSTANTS:
            return value
        raise _Unplannable(f"an argument or result is a {type(value).__name__}")

    def plan(self, result: Any) -> FunctionType:
        if self.why:
            raise _Unplannable(self.why)
        return _compiled(self, self._refs(result))


def _references(nest: Any) -> list[int]:
    if type(nest) is _Ref:
        return [nest.value]
    if isinstance(nest, dict):
        nest = nest.values()
    elif not isinstance(nest, (list, tuple)):
        return []
    return [value for item in nest for value in _references(item)]


class _Text:
    """Python's source, with what has no literal in a namespace."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {}
        self.address: Callable[[int], str] | None = None

    def of(self, value: Any) -> str:
        kind = type(value)
        if kind is _Ref:
            return f"v{value.value}" if self.address is None else self.address(value.value)
        if value is STREAM:
            return "stream"
        if kind in (NoneType, bool, int, str):
            return repr(value)
        if kind is list:
            return f"[{', '.join(map(self.of, value))}]"
        if kind is tuple:
            return f"({''.join(self.of(item) + ', ' for item in value)})"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"record({self.of(kind)}, {self.of(tuple(value))})"
        if isinstance(value, (Tensor, dict)):
            raise _Unplannable(f"a launch has a {kind.__name__} among its constants")
        name = f"c{len(self.namespace)}"
        self.namespace[name] = value
        return name


def _compiled(recorder: Recorder, result: Any) -> FunctionType:
    """The function (tensors, their addresses) -> result, from the steps."""
    values = recorder.values
    tensors = set(_references(result))  # needed as tensors
    addressed: set[int] = set()  # roots whose addresses are needed
    kept = []
    for step in reversed(recorder.steps):
        outputs = step.outputs if isinstance(step.outputs, list) else [step.outputs]
        if step.view and not tensors.intersection(outputs):
            continue
        kept.append(step)
        used = _references(step.arguments) + _references(step.keywords)
        if step.addresses:
            addressed.update(values[n].root for n in used if values[n].tensor.numel())
        else:
            tensors.update(used)
    text, lines, scratch = _Text(), [], {}
    size = 0
    for n in recorder.empty:
        if n in addressed and n not in tensors:
            scratch[n] = size
            size += -(-values[n].tensor.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT

    def address(n: int) -> str:
        tensor, root, offset = values[n]
        if not tensor.numel():
            return "0"
        if root in scratch:
            return f"scratch + {scratch[root] + offset}"
        name = f"pointers[{root}]" if root < recorder.inputs else f"p{root}"
        return f"{name} + {offset}" if offset else name

    def pointed(n: int) -> None:
        if n in addressed:
            lines.append(f"p{n} = v{n}.data_ptr()")

    device = text.of(recorder.device)
    text.namespace |= dict(empty=torch.empty, strided=torch.empty_strided, uint8=torch.uint8, record=tuple.__new__)
    if any(STREAM in step.arguments for step in kept):
        from . import _triton

        text.namespace |= dict(hooked=_triton.hooked, current_stream=_triton.current_stream)
        lines += ["if hooked():", "    return NotImplemented", "stream = current_stream()"]
    lines += [f"v{n} = tensors[{n}]" for n in sorted(tensors) if n < recorder.inputs]
    if size:
        lines += [f"memory = empty(({size},), dtype=uint8, device={device})", "scratch = memory.data_ptr()"]
    for n in sorted(recorder.empty & tensors):
        tensor = values[n].tensor
        shape, options = tuple(tensor.shape), f"dtype={text.of(tensor.dtype)}, device={device}"
        if tensor.stride() == torch.empty(shape, device="meta").stride():  # also where a size is 1
            lines.append(f"v{n} = empty({shape}, {options})")
        else:
            lines.append(f"v{n} = strided({shape}, {tensor.stride()}, {options})")
        pointed(n)
    for step in reversed(kept):
        text.address = address if step.addresses else None
        keywords = [f"{name}={text.of(value)}" for name, value in step.keywords.items()]
        call = f"{text.of(step.function)}({', '.join([*map(text.of, step.arguments), *keywords])})"
        made = step.outputs if isinstance(step.outputs, list) else [step.outputs]
        if step.outputs is not None:
            call = f"{''.join(f'v{n}, ' for n in made) if made is step.outputs else f'v{made[0]}'} = {call}"
        lines.append(call)
        if step.outputs is not None and not step.view:
            pointed(made[0])
    text.address = None
    lines.append(f"return {text.of(result)}")
    source = "\n    ".join(["def plan(tensors, pointers):", *lines])
    exec(source, text.namespace)
    plan = cast(FunctionType, text.namespace["plan"])
    plan.__doc__ = source
    return plan
