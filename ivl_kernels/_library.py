"""How an op is declared: a record of its arguments, one of its results, a fake, backends and gradients.

A record is a NamedTuple. Its annotations are the op's schema, and fakes, backends and gradients take it whole, so that
an argument's name, type and default are written once. An op is registered once, for every device, with one Python
function that picks the backend and calls it; the schema ends in `str backend`, so a forced backend is part of a
compiled graph. The raw `torch.ops.ivl.*` have no gradients (`differentiable` adds them): the public functions are the
entry.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import _dispatch, _env, _gpu, _plan, _recording
from ._dispatch import Implementation

NAMESPACE = "ivl"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

# Every op that has been defined, by name: `doctor` and the tests go through it.
OPS: dict[str, Op[Any, Any]] = {}

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[bool]: "bool[]",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
}

A = TypeVar("A", bound=tuple[Any, ...])
R = TypeVar("R")


@functools.cache
def _fields(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _is_record(kind: Any) -> bool:
    return hasattr(kind, "_fields")


def _flat_fields(record: type) -> list[tuple[str, Any]]:
    """Names and types, those of nested records in their place."""
    nested = ((_flat_fields(kind) if _is_record(kind) else [(name, kind)]) for name, kind in _fields(record).items())
    return [field for fields in nested for field in fields]


def _flat(record: tuple[Any, ...]) -> list[Any]:
    values: list[Any] = []
    for value in record:
        values += _flat(value) if isinstance(value, tuple) else [value]
    return values


def _record(kind: Any, values: Iterator[Any]) -> Any:
    """The record whose `_flat` is the next of `values`."""
    return kind(*(_record(k, values) if _is_record(k) else next(values) for k in _fields(kind).values()))


def _schema(name: str, arguments: type, results: Any, written: Sequence[str]) -> str:
    aliases = dict(zip(written, ("Tensor(a!)", "Tensor(b!)")))
    parts = [f"{aliases.get(field, _TYPES[kind])} {field}" for field, kind in _flat_fields(arguments)]
    if _is_record(results):
        returned = f"({', '.join(f'{_TYPES[kind]} {field}' for field, kind in _fields(results).items())})"
    else:
        returned = "()" if results is types.NoneType else _TYPES[results]
    return f"{name}({', '.join(parts)}, str backend) -> {returned}"


def transformed() -> bool:
    """Whether `torch.func` (grad, jvp, vmap, ...) or forward-mode autograd is at work: ops have gradients for neither.

    Who can run upstream's code instead asks this first.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def recorded() -> bool:
    """Whether a call is compiled, traced or transformed: it is upstream's code that is wanted then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed()


def _plain(values: Iterable[Any]) -> bool:
    """Whether the tensors are in memory, of no class of their own and without a gradient to be followed."""
    graded = torch.is_grad_enabled()
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            if graded and value.requires_grad or value.is_meta:
                return False
        elif kind not in _plan.VALUES:
            return False
    return True


def _check_no_tangent(name: str, args: Sequence[Any]) -> None:
    """An op that torch knows no forward derivative of would give zeros without a word."""
    for value in args:
        if isinstance(value, (list, tuple)):
            _check_no_tangent(name, value)
        elif isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"{name}: got an input with a tangent, and there is no forward-mode derivative")


class Op(Generic[A, R]):
    """One operator `torch.ops.ivl.<name>` with its backends: called with a record and a backend's name (empty: best).

    Args:
        name: of the operator.
        arguments: NamedTuple class: types Tensor, Tensor | None, list[Tensor], int, float, bool, str, list[bool], or
            another record, whose fields stand in its place in the schema.
        results: Tensor, list[Tensor], NoneType, or a NamedTuple class of Tensors and lists of them.
        key: name of the tensor argument whose device and dtype decide the backend.
        implementations: best first; the last one is the reference. Each is called with the record, and its results
            may be a plain tuple.
        fake: shapes and dtypes of the results, from a record of fake tensors.
        written: names of the arguments that the op writes to.
        reads_host: a GPU backend waits for a number from the device, so that no CUDA graph can capture it.
    """

    def __init__(
        self,
        name: str,
        arguments: type[A],
        results: type[R],
        *,
        key: str,
        implementations: Sequence[Implementation],
        fake: Callable[[A], Any],
        written: Sequence[str] = (),
        reads_host: bool = False,
    ) -> None:
        self.name = name
        self.arguments, self.results = arguments, results
        self.schema = _schema(name, arguments, results, written)
        self.implementations = tuple(implementations)
        self.written, self.reads_host = tuple(written), reads_host
        self._functions: dict[str, Callable[[A], Any]] = {}
        # What serves when nothing is forced, whatever the shapes: choosing again costs more than a small kernel.
        self._usual: dict[Any, Callable[[A], Any]] = {}
        self._nested = any(_is_record(kind) for kind in _fields(arguments).values())
        self._several = _is_record(results)
        self._key = [field for field, _ in _flat_fields(arguments)].index(key)
        _library.define(self.schema, tags=(torch.Tag.cudagraph_unsafe,) if reads_host else ())
        _library.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: fake(self._made(args[:-1])), lib=_library)
        self._overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        OPS[name] = self

    def __call__(self, arguments: A, backend: str = "") -> R:
        values = _flat(arguments) if self._nested else arguments
        if torch.compiler.is_compiling():
            found = self._overload(*values, backend)
            return self.results(*found) if self._several else found
        if forward_ad._current_level >= 0:
            _check_no_tangent(self.name, arguments)
        if _recording.thread.recorder is None and (self.written or _plan.watched() or not _plain(values)):
            found = self._overload(*values, backend)
        else:  # the dispatcher would only come to the same, some microseconds later
            found = self._serve(arguments, values[self._key], backend)
        return tuple.__new__(cast(Any, self.results), found) if self._several else found

    def _made(self, values: tuple[Any, ...]) -> A:
        if self._nested:
            return _record(self.arguments, iter(values))
        return tuple.__new__(self.arguments, values)

    def _run(self, *values: Any) -> Any:
        return self._serve(self._made(values[:-1]), values[self._key], values[-1])

    def _serve(self, arguments: A, tensor: Tensor, forced: str) -> Any:
        device = tensor.device
        cpu = device.type == "cpu"
        free = not (forced or _env.BACKEND.get() or _dispatch.preference())
        usual = (tensor.dtype, device, _gpu.standing()) if free else None
        function = self._usual.get(usual)
        if function is None:
            function = self._chosen(tensor, forced, arguments, usual)
        recorder = _recording.thread.recorder
        if recorder is not None and (self.reads_host or function is self.function(self.implementations[-1])):
            recorder.refuse(f"{self.name} reads from the device, or its reference may")
        for name in self.written:
            _plan.written(getattr(arguments, name))
        elsewhere = not cpu and tensor.is_cuda and device.index != torch.cuda.current_device()
        if not elsewhere and not torch.is_autocast_enabled(device.type):
            return function(arguments)
        with contextlib.ExitStack() as stack:
            if elsewhere:  # Triton launches on the current device
                stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.autocast(device.type, enabled=False))  # an op chooses its dtypes itself
            return function(arguments)

    def _chosen(self, tensor: Tensor, forced: str, arguments: A, usual: Any) -> Callable[[A], Any]:
        dtype = str(tensor.dtype).removeprefix("torch.")
        choice = _dispatch.choose(self.name, self.implementations, tensor.device, dtype, forced, arguments)
        function = self.function(choice.implementation)
        if usual is not None and not choice.passed_over and choice.implementation.unless is None:
            self._usual[usual] = function
        return function

    def function(self, implementation: Implementation) -> Callable[[A], Any]:
        """The Python function behind an implementation; imports its module on first use."""
        if implementation.function is not None:
            return implementation.function
        if implementation.backend not in self._functions:
            package = self.arguments.__module__.rpartition(".")[0]
            module = importlib.import_module(f"{package}.{implementation.module}")
            self._functions[implementation.backend] = getattr(module, self.name)
        return self._functions[implementation.backend]

    def explain(self, device: str, dtype: str) -> _dispatch.Choice:
        """Which backend would serve tensors of this device ("cpu", "cuda", "cuda:1") and dtype, shapes aside."""
        return _dispatch.choose(self.name, self.implementations, torch.device(device), dtype, warn=False)


def _like(value: Any, made: list[Any]) -> Any:
    if type(value) is list:
        return made
    return type(value)(*made) if _is_record(value) else tuple(made)


def _split(value: Any, tensors: list[Tensor]) -> Any:
    """A record or a part of one with `...` for each tensor, which is appended to `tensors`."""
    made: list[Any] = []
    for item in value:
        if type(item) not in _plan.VALUES:
            if isinstance(item, Tensor):
                tensors.append(item)
                item = ...
            elif isinstance(item, (list, tuple)):
                item = _split(item, tensors)
        made.append(item)
    return _like(value, made)


def _join(value: Any, found: Iterator[Any]) -> Any:
    """The reverse of `_split`."""
    made: list[Any] = []
    for item in value:
        if item is ...:
            item = next(found)
        elif type(item) not in _plan.VALUES and isinstance(item, (list, tuple)):
            item = _join(item, found)
        made.append(item)
    return _like(value, made)


def _in_order(record: Any, found: Mapping[str, Any]) -> list[Tensor | None]:
    """What is found under the names of a record's tensors, which are `...`."""
    each: list[Tensor | None] = []
    for name, value in zip(record._fields, record):
        if value is ...:
            each.append(found.get(name))
        elif isinstance(value, tuple):
            each += _in_order(value, found)
        elif isinstance(value, list):
            each += found.get(name) or [None] * sum(v is ... for v in value)
    return each


def needs_grad(values: Iterable[Any]) -> bool:
    """Whether autograd wants to hear of a call with these arguments, tensors in lists and records among them."""
    return torch.is_grad_enabled() and _requires_grad(values)


def _requires_grad(record: Iterable[Any]) -> bool:
    for value in record:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (list, tuple)) and _requires_grad(value):
            return True
    return False


def differentiable(
    op: Op[A, R],
    save: Callable[[A, R], Any],
    gradients: Callable[..., Mapping[str, Any]],
    *,
    prepare: Callable[[A], A] | None = None,
    zeros: bool = False,
) -> Callable[[A, str], R]:
    """`op`, with gradients where they are needed, once (no double backward).

    Args:
        op: the forward.
        save: what the backward needs, from the arguments and the results: a tuple or a record, of records if need be.
        gradients: called with that; `needs`, the arguments with a bool in place of each tensor; the backend; and
            the gradient, or None, of every written argument and then every result. Returns gradients of the arguments
            by name, which autograd casts to their dtypes; one that is missing or None is no gradient.
        prepare: the arguments of a forward that will have a backward, from those of one that will not.
        zeros: a gradient that is not there comes as zeros instead of None.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rest: A, backend: str, *tensors: Tensor) -> Any:
            arguments = _join(rest, iter(tensors))
            result = op(arguments, backend)
            kept: list[Tensor] = []
            ctx.saved = _split(save(arguments, result), kept)
            ctx.save_for_backward(*kept)
            ctx.rest, ctx.backend = rest, backend
            ctx.set_materialize_grads(zeros)
            if not op.written:
                return result
            written = [getattr(arguments, name) for name in op.written]
            ctx.mark_dirty(*written)
            return *written, *(result if isinstance(result, tuple) else () if result is None else (result,))

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            wanted = ctx.needs_input_grad[2:]
            found: Mapping[str, Any] = {}
            if any(grad is not None for grad in grads):
                saved = _join(ctx.saved, iter(ctx.saved_tensors))
                found = gradients(saved, _join(ctx.rest, iter(wanted)), ctx.backend, *grads)
            each = _in_order(ctx.rest, found)
            return None, None, *(grad if want else None for grad, want in zip(each, wanted))

    def call(arguments: A, backend: str) -> R:
        if not needs_grad(arguments):
            return op(arguments, backend)
        tensors: list[Tensor] = []
        rest = _split(arguments if prepare is None else prepare(arguments), tensors)
        found: Any = Function.apply(rest, backend, *tensors)
        if op.written:
            found = found[len(op.written) :]
            found = found if op._several else found[0] if found else None
        return op.results(*found) if op._several else found

    return call
