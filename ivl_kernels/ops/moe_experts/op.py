"""Records, fakes, backends, gradients and argument checks of the mixture-of-experts feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _env, _gpu
from ..._checks import (
    FLOATS,
    KERNEL_DTYPES,
    KERNEL_FLOATS,
    autocast_dtype,
    check_dtype,
    check_same,
    check_shape,
    check_tensor,
    describe,
)
from ..._dispatch import Implementation
from ..._library import Op, differentiable, needs_grad
from ..._plan import planned
from ..moe_routing.op import Sorting, moe_dispatch
from . import formats

ACTIVATIONS = ("silu", "gpt_oss")
LAYOUTS = ("concatenated", "interleaved")
# Up to so many tokens and slots, and without gradients, GPUs run kernels that nobody sorts for.
FEW_TOKENS, FEW_SLOTS = 8, 64


class Experts(NamedTuple):
    """The tokens, their slots sorted by expert (`Dispatch`), and the experts' matrices."""

    hidden: Tensor
    weights: Tensor
    permutation: Tensor
    inverse: Tensor
    offsets: Tensor
    tiles: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gate_up_scales: Tensor | None  # of matrices in few bits
    down_scales: Tensor | None
    activation: str
    alpha: float
    limit: float
    layout: str
    keep: bool = False

    @property
    def interleaved(self) -> bool:
        """Gates and ups alternate; plain matrices are transposed too, those in few bits are not."""
        return self.layout == "interleaved"

    @property
    def format(self) -> str:
        """That of the matrices (`formats`), "" where they are not quantised."""
        return formats.format_of(self.gate_up)

    @property
    def mixed(self) -> bool:
        """float32 matrices beside 16-bit tokens, to whose dtype they are rounded as they are read."""
        return self.gate_up.dtype == torch.float32 != self.hidden.dtype

    @property
    def in_rows(self) -> bool:
        """The matrices are [E, 2I, H] and [E, H, I], not their transposes."""
        return bool(self.format) or not self.interleaved

    @property
    def inner(self) -> int:
        """I, the width between the two matrices."""
        return self.gate_up.shape[1 if self.in_rows else 2] // 2


class FewTokens(NamedTuple):
    """As `Experts` of at most FEW_TOKENS tokens, which nobody sorted."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gate_up_scales: Tensor | None
    down_scales: Tensor | None
    activation: str
    alpha: float
    limit: float
    layout: str

    def placed(self, permutation: Tensor, inverse: Tensor, offsets: Tensor, tiles: Tensor) -> Experts:
        """The same with the slots sorted."""
        fields = self._asdict()
        del fields["ids"]
        return Experts(permutation=permutation, inverse=inverse, offsets=offsets, tiles=tiles, **fields)


class ExpertsList(NamedTuple):
    """The same with a tensor a matrix, concatenated, with SiLU and without biases."""

    hidden: Tensor
    weights: Tensor
    permutation: Tensor
    inverse: Tensor
    offsets: Tensor
    gate: list[Tensor]
    up: list[Tensor]
    down: list[Tensor]
    keep: bool = False

    @property
    def inner(self) -> int:
        return self.down[0].shape[1]


class Output(NamedTuple):
    out: Tensor
    pre: Tensor  # [S * k, 2I], what goes into the activation, when `keep`; else [0, 2I]


class ExpertsBackward(NamedTuple):
    grad: Tensor
    forward: Experts
    pre: Tensor
    needs: list[bool]  # which of the gradients; the others are empty

    @property
    def need(self) -> Any:
        """`needs` by name."""
        return Gradients._make(self.needs)


class Gradients(NamedTuple):
    hidden: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor
    down_bias: Tensor


class ListBackward(NamedTuple):
    grad: Tensor
    forward: ExpertsList
    pre: Tensor
    needs: list[bool]  # of hidden, weights, gate and up, down


class ListGradients(NamedTuple):
    hidden: Tensor
    weights: Tensor
    gate: list[Tensor]
    up: list[Tensor]
    down: list[Tensor]


def tile_rows(slots: int, experts: int) -> int:
    """Rows of a tall tile of the GPU kernels, which run at a half or a quarter of them where an expert has so few."""
    return 64 if slots <= 48 * experts else 128


def empty_output(a: Experts | ExpertsList) -> Output:
    """The results of the forward, to be written."""
    rows = a.permutation.shape[0] if a.keep else 0
    return Output(a.hidden.new_empty(a.hidden.shape), a.hidden.new_empty(rows, 2 * a.inner))


def _empty_like(tensor: Tensor | None, needed: bool, hidden: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape) if needed and tensor is not None else hidden.new_empty(0)


def empty_gradients(b: ExpertsBackward) -> Gradients:
    """The results of the backward, to be written."""
    inputs = (getattr(b.forward, name) for name in Gradients._fields)
    return Gradients(*(_empty_like(t, need, b.forward.hidden) for t, need in zip(inputs, b.needs)))


def empty_list_gradients(b: ListBackward) -> ListGradients:
    a = b.forward
    hidden, weights = (_empty_like(t, need, a.hidden) for t, need in zip((a.hidden, a.weights), b.needs))
    lists = ((a.gate, b.needs[2]), (a.up, b.needs[2]), (a.down, b.needs[3]))
    return ListGradients(hidden, weights, *([t.new_empty(t.shape) for t in each] if n else [] for each, n in lists))


def _few_on_triton(a: FewTokens) -> Tensor:
    from .triton_few import moe_experts_few

    return moe_experts_few(a)


_BACKENDS = (
    Implementation("cpu", KERNEL_DTYPES),
    Implementation("triton", KERNEL_DTYPES),
    Implementation("reference"),
)
_LIST_BACKENDS = (_BACKENDS[0], _BACKENDS[-1])

_experts = Op("moe_experts", Experts, Output, key="hidden", implementations=_BACKENDS, fake=empty_output)

_experts_backward = Op(
    "moe_experts_backward",
    ExpertsBackward,
    Gradients,
    key="hidden",
    implementations=_BACKENDS,
    fake=empty_gradients,
)

_few = Op(
    "moe_experts_few",
    FewTokens,
    Tensor,
    key="hidden",
    implementations=(Implementation("triton", KERNEL_DTYPES, function=_few_on_triton), Implementation("reference")),
    fake=lambda a: a.hidden.new_empty(a.hidden.shape),
)

_list = Op(
    "moe_experts_list",
    ExpertsList,
    Output,
    key="hidden",
    reads_host=True,  # the reference does, which alone serves GPUs
    implementations=_LIST_BACKENDS,
    fake=empty_output,
)

_list_backward = Op(
    "moe_experts_list_backward",
    ListBackward,
    ListGradients,
    key="hidden",
    reads_host=True,
    implementations=_LIST_BACKENDS,
    fake=empty_list_gradients,
)


def _gradients(saved: tuple[Experts, Tensor], needs: Any, backend: str, grad: Tensor, _: None) -> dict[str, Any]:
    wanted = [bool(getattr(needs, name)) for name in Gradients._fields]
    return _experts_backward(ExpertsBackward(grad, *saved, wanted), backend)._asdict()


def _list_gradients(
    saved: tuple[ExpertsList, Tensor], needs: Any, backend: str, grad: Tensor, _: None
) -> dict[str, Any]:
    wanted = [needs.hidden, needs.weights, any(needs.gate + needs.up), any(needs.down)]
    found = _list_backward(ListBackward(grad, *saved, wanted), backend)._asdict()
    if torch.compiler.is_compiling():
        return found
    # An expert without a token took no part: None, as of a loop over those that did. A graph has no such branch.
    bounds = saved[0].offsets.tolist()
    taken = [end > first for first, end in zip(bounds, bounds[1:])]
    lists = {name: [g if part else None for g, part in zip(found[name], taken)] for name in ("gate", "up", "down")}
    return found | lists


def _save(a: Experts | ExpertsList, output: Output) -> tuple[Experts | ExpertsList, Tensor]:
    return a, output.pre


_differentiable = differentiable(_experts, _save, _gradients, prepare=lambda a: a._replace(keep=True))
_differentiable_list = differentiable(_list, _save, _list_gradients, prepare=lambda a: a._replace(keep=True))


def _check_tokens(hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
    check_shape("hidden", hidden, ("S", "H"))
    check_dtype("hidden", hidden, FLOATS)
    check_shape("ids", ids, (hidden.shape[0], "k"))
    check_same("ids", ids, "hidden", hidden, dtype=False)
    check_shape("weights", weights, ids.shape)
    check_dtype("weights", weights, FLOATS)
    check_same("weights", weights, "hidden", hidden, dtype=False)


def _check_weights(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    layout: str,
) -> int:
    """The number of experts."""
    width = hidden.shape[1]
    check_tensor("gate_up", gate_up)
    check_tensor("down", down)
    quantised = formats.format_of(gate_up)
    if formats.format_of(down) != quantised:
        raise TypeError(f"down: got {describe(down)}, expected the dtype of gate_up ({gate_up.dtype})")
    rows = bool(quantised) or layout == "concatenated"
    if quantised:
        _check_scales("gate_up", gate_up, gate_up_scales, ("E", "2I", width))
    elif gate_up_scales is not None or down_scales is not None:
        raise TypeError(f"gate_up: got {describe(gate_up)} with scales, expected uint8 or float8_e4m3fn")
    else:
        check_shape("gate_up", gate_up, ("E", "2I", width) if rows else ("E", width, "2I"))
    experts, double = gate_up.shape[0], gate_up.shape[1 if rows else 2]
    if double % 2:
        raise ValueError(f"gate_up: got {list(gate_up.shape)}, expected an even number of gate and up rows")
    inner = double // 2
    named = [("gate_up", gate_up), ("down", down)]
    if quantised:
        if quantised == "fp8" and layout == "interleaved":
            raise ValueError("layout: got 'interleaved', but blocks of fp8 would hold gates and ups with one scale")
        _check_scales("down", down, down_scales, (experts, width, inner))
        for name, tensor in named:
            check_same(name, tensor, "hidden", hidden, dtype=False)
        named = []
    else:
        check_shape("down", down, (experts, width, inner) if rows else (experts, inner, width))
        for name, tensor in named:
            _check_in_order(name, tensor)
        if gate_up.dtype == down.dtype == torch.float32 and hidden.element_size() == 2:
            for name, tensor in named:
                check_same(name, tensor, "hidden", hidden, dtype=False)
            named = []
    if gate_up_bias is not None:
        check_shape("gate_up_bias", gate_up_bias, (experts, double))
        named.append(("gate_up_bias", gate_up_bias))
    if down_bias is not None:
        check_shape("down_bias", down_bias, (experts, width))
        named.append(("down_bias", down_bias))
    for name, tensor in named:
        check_same(name, tensor, "hidden", hidden)
    return experts


def _check_in_order(name: str, matrices: Tensor) -> None:
    if not matrices.is_contiguous():
        raise ValueError(
            f"{name}: got {describe(matrices)} with strides {list(matrices.stride())}, expected contiguous memory: a "
            "copy at every call would cost more than the experts do; call .contiguous() once"
        )


def _check_scales(name: str, values: Tensor, scales: Tensor | None, shape: tuple[int | str, int | str, int]) -> None:
    formats.check(name, values, scales, shape)
    assert scales is not None
    for part, tensor in ((name, values), (f"{name}_scales", scales)):
        if tensor.requires_grad:
            raise ValueError(f"{part}: got a tensor that requires gradients, and quantised weights have none")


def _are_few(hidden: Tensor, ids: Tensor, backend: str) -> bool:
    """Whether a GPU's kernels for few tokens serve the call, or are forced to."""
    forced = backend or _env.BACKEND.get()
    on_gpu = forced == "triton" if forced else hidden.is_cuda or _gpu.preferred()
    few = 0 < hidden.shape[0] <= FEW_TOKENS and 0 < ids.numel() <= FEW_SLOTS
    return on_gpu and few and hidden.dtype in KERNEL_FLOATS


@planned
def moe_experts(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    backend: str,
) -> Tensor:
    _check_tokens(hidden, ids, weights)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    dtype = autocast_dtype(hidden)
    if dtype is not None and ids.numel() >= 2 * gate_up.shape[0]:  # fewer slots would not read what a cast does
        hidden = hidden.to(dtype)
        # float32 ones are rounded by the tile: copies of all experts would be kept for the backward.
        if not formats.format_of(gate_up) and gate_up.dtype != torch.float32:
            gate_up, down = gate_up.to(dtype), down.to(dtype)
        gate_up_bias, down_bias = (b if b is None else b.to(dtype) for b in (gate_up_bias, down_bias))
    experts = _check_weights(hidden, gate_up, down, gate_up_bias, down_bias, gate_up_scales, down_scales, layout)
    tensors = (gate_up, down, gate_up_bias, down_bias, gate_up_scales, down_scales)
    options = (activation, float(alpha), float(limit), layout)
    same = gate_up.dtype == hidden.dtype or bool(formats.format_of(gate_up))
    if same and _are_few(hidden, ids, backend) and not needs_grad((hidden, weights, *tensors)):
        return _few(FewTokens(hidden, ids, weights, *tensors, *options), backend)
    tile = tile_rows(ids.numel(), experts)
    permutation, inverse, _, offsets, tiles = moe_dispatch(Sorting(ids, experts, tile), backend)
    a = Experts(hidden, weights, permutation, inverse, offsets, tiles, *tensors, *options)
    return _differentiable(a, backend).out


def moe_experts_list(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    backend: str,
) -> Tensor:
    _check_tokens(hidden, ids, weights)
    gate, up, down = list(gate), list(up), list(down)
    if not gate or not len(gate) == len(up) == len(down):
        counts = f"{len(gate)}, {len(up)} and {len(down)}"
        raise ValueError(f"gate, up, down: got {counts} matrices, expected one each for every expert")
    check_shape("gate[0]", gate[0], ("I", hidden.shape[1]))
    inner = gate[0].shape[0]
    for name, tensors, shape in (
        ("gate", gate, (inner, hidden.shape[1])),
        ("up", up, (inner, hidden.shape[1])),
        ("down", down, (hidden.shape[1], inner)),
    ):
        for e, tensor in enumerate(tensors):
            if tensor.shape != shape or tensor.dtype != hidden.dtype or tensor.device != hidden.device:
                check_shape(f"{name}[{e}]", tensor, shape)
                check_same(f"{name}[{e}]", tensor, "hidden", hidden)
            if not tensor.is_contiguous():
                _check_in_order(f"{name}[{e}]", tensor)
    permutation, inverse, _, offsets, _ = moe_dispatch(Sorting(ids, len(gate), 0), backend)
    a = ExpertsList(hidden, weights, permutation, inverse, offsets, gate, up, down)
    return _differentiable_list(a, backend).out
