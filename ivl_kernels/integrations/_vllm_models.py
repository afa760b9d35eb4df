"""vLLM's InternVL models with the pixel shuffle and the projector in one op. Imported by vLLM alone.

They load Flash checkpoints too, as language models of a router's rows: vLLM's own refuse tensors that they do not know.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from vllm.model_executor.models import interns1, internvl

from .. import ops
from ..models.families import FLASH
from ..models.plain import linear_stack
from ..models.upstream import code_of
from .vision import shuffle_refused

_log = logging.getLogger("vllm.ivl_kernels")
_said: set[str] = set()
# As FlashVision reads them: released, and of a native model that was saved with them.
_FLASH = re.compile(rf"(?:model\.)?(?:flash\.)?(?:{'|'.join(FLASH)})\.")


def _say(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _log.warning("ivl_kernels: %s", text)


def _refused(model: Any, projector: Any, merge: int, order: str) -> str:
    """Why vLLM's own method must run, or ""."""
    stack = linear_stack(projector)
    if isinstance(stack, str):
        return stack
    return shuffle_refused(SimpleNamespace(core=model, order=order), merge)  # type: ignore[arg-type]


class _Projecting:
    """extract_feature with one op after the tower. `_tower`, `_projector`: their names in vLLM's class."""

    _tower: str
    _projector: str
    _ivl_checked: str | None = None

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        me: Any = self
        base: Any = super()
        projector, ratio = getattr(me, self._projector), me.downsample_ratio
        merge = round(1 / ratio) if round(1 / ratio) * ratio == 1 else 0
        order = "v1" if getattr(me, "ps_version", "v2") == "v1" else "v2"
        if self._ivl_checked is None:
            self._ivl_checked = _refused(me, projector, merge, order)
        stack = linear_stack(projector)
        if self._ivl_checked or isinstance(stack, str):
            _say(f"vLLM's own projector serves: {self._ivl_checked or stack}")
            return base.extract_feature(pixel_values)
        vit = getattr(me, self._tower)(pixel_values=pixel_values)
        return ops.pixel_shuffle_mlp(
            vit,
            stack.norm.weight,
            stack.norm.bias,
            [linear.weight for linear in stack.linears],
            [linear.bias for linear in stack.linears],
            merge=merge,
            skip=1,
            order=order,
            eps=stack.norm.eps,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        base: Any = super()
        return base.load_weights(_without_flash(weights))


def _without_flash(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        if _FLASH.match(name):
            _say("the Flash tensors are left out: pictures that vLLM itself encodes keep all of their tokens")
        else:
            yield name, tensor


def _layout_known(kind: Any, *names: str) -> bool:
    """Whether vLLM's method is the one that ours takes the place of: tower, pixel shuffle, projector."""
    missing = {"pixel_shuffle", *names} - set(code_of(kind.extract_feature).co_names)
    if missing:
        _say(
            f"vLLM's own projector serves: extract_feature of {kind.__name__} does not use {', '.join(sorted(missing))}"
        )
    return not missing


class InternVLChatModel(_Projecting, internvl.InternVLChatModel):  # type: ignore[misc]
    _tower, _projector = "vision_model", "mlp1"


class InternS1ForConditionalGeneration(_Projecting, interns1.InternS1ForConditionalGeneration):  # type: ignore[misc]
    _tower, _projector = "vision_tower", "multi_modal_projector"


for _kind in (InternVLChatModel, InternS1ForConditionalGeneration):
    if not _layout_known(_kind.__mro__[2], _kind._tower, _kind._projector):
        _kind.extract_feature = _kind.__mro__[2].extract_feature  # type: ignore[method-assign]
