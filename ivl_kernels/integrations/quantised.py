"""Experts in few bits in whole models: checkpoints loaded as they are stored, and models converted in place."""

from __future__ import annotations

import functools
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.upstream import class_of, forward_name, named_instances, replaced_before
from ..nn.quantised_experts import QuantisedExperts
from ..ops.moe_experts import formats
from ._edit import attachment
from ._expert_forms import WEIGHTS, Form, form_of
from .experts import _STACKED, _stacked_problem

__all__ = ["QuantisationReport", "load_quantised", "quantise_experts"]

METHOD = "ivl_experts"  # quant_method of configs for what upstream's own names do not cover


@dataclass(frozen=True)
class Converted:
    """Experts of one layer.

    Attributes:
        path: of the module.
        errors: by matrix, root of the summed squared error over the root of the summed squared weights.
        bytes_before, bytes_after: of the weights, biases aside.
    """

    path: str
    errors: dict[str, float]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        errors = ", ".join(f"{name} {error:.4f}" for name, error in self.errors.items())
        size = f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB"
        return f"{self.path}: relative error {errors}; {size}"


@dataclass
class QuantisationReport:
    """What `quantise_experts` did: `str()` of it has a line a layer.

    Attributes:
        to: the format.
        converted: the experts that are in it now.
        left: path and reason of those that are as they were.
    """

    to: str
    converted: list[Converted] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"experts in {self.to}: {len(self.converted)} layers converted, {len(self.left)} left as they were"]
        return "\n  ".join([*lines, *map(str, self.converted), *(f"{path}: {why}" for path, why in self.left)])


def _empty(experts: Any, form: Form, quantisation: str, backend: str, device: Any = None) -> QuantisedExperts:
    """A module for experts of the shape of these, its weights not yet written."""
    gate_up = experts.gate_up_proj
    transposed = form.layout == "interleaved"
    count, width = gate_up.shape[0], gate_up.shape[1 if transposed else 2]
    bias = form.gpt_oss
    return QuantisedExperts(
        count, width, gate_up.shape[2 if transposed else 1] // 2, quantisation=quantisation,
        activation=form.activation, interleaved=transposed, bias=bias,
        alpha=experts.alpha if form.gpt_oss else 1.702, limit=experts.limit if form.gpt_oss else 7.0,
        backend=backend, device=device or gate_up.device, dtype=gate_up.dtype, prefix="" if form.gpt_oss else "stored_",
    )  # fmt: skip


def _width_problem(experts: Any, form: Form) -> str:
    sizes = {*experts.gate_up_proj.shape[1:], *experts.down_proj.shape[1:]}
    odd = sorted(size for size in sizes if size % formats.MXFP4_BLOCK)
    return f"a width of {odd[0]} is no multiple of {formats.MXFP4_BLOCK}" if odd else ""


def _problem(experts: Any, to: str) -> str:
    """Why these stacked experts cannot be converted, or ""."""
    if getattr(attachment(experts), "edits", {}):
        return "patched: convert before `patch`, or undo that"
    why = _stacked_problem(experts)
    form = form_of(class_of(experts))
    if why or isinstance(form, str):
        return why or str(form)
    for name in form.tensors:
        if type(getattr(experts, name)) is not nn.Parameter:
            return f"{name} is a {type(getattr(experts, name)).__name__}, not a plain parameter"
        if getattr(experts, name).device.type == "meta":
            return f"{name} is on the meta device (offloaded)"
    if to == "fp8" and form.layout == "interleaved":
        return "blocks of 128 rows would hold gates and ups with one scale"
    return _width_problem(experts, form)


@torch.no_grad()
def quantise_experts(model: nn.Module, to: str = "mxfp4", *, backend: str = "") -> QuantisationReport:
    """Convert the stacked experts of a Qwen3-MoE or GPT-OSS model in place, an expert at a time.

    The experts modules are replaced by `nn.QuantisedExperts`, which `moe_experts` serves; answers change, and the
    report says by how much each layer's weights did. The expanded weights are dropped: there is no way back. Convert
    before `patch`. What is saved afterwards loads with `load_quantised`.

    Args:
        model: on any device, in float32, bfloat16 or float16.
        to: "mxfp4", or "fp8" for experts with gates before ups (Qwen3-MoE).
        backend: as of `moe_experts`.

    Returns:
        The report; experts that cannot be converted are left with their reason.

    Raises:
        ValueError: another format; weights that are not finite.
    """
    if to not in formats.FORMATS:
        raise ValueError(f"to: got {to!r}, expected one of {', '.join(formats.FORMATS)}")
    if any(not path for path, _ in named_instances(model, *_STACKED)):
        raise ValueError("model: got the experts alone, expected a model that holds them")
    report = QuantisationReport(to)
    for path, experts in list(named_instances(model, *_STACKED)):
        why = _problem(experts, to)
        if why:
            report.left.append((path, why))
            continue
        form = form_of(class_of(experts))
        assert isinstance(form, Form)
        new = _empty(experts, form, to, backend)
        before = sum(getattr(experts, name).nbytes for name in WEIGHTS)
        errors = {name: _convert(getattr(experts, name), form.layout == "interleaved", new, name) for name in WEIGHTS}
        for name in WEIGHTS:
            if form.gpt_oss:
                new._parameters[f"{name}_bias"] = experts._parameters[f"{name}_bias"]
        after = sum(tensor.nbytes for name in WEIGHTS for tensor in new.tensors(name))
        new.train(experts.training)
        model.set_submodule(path, new)
        report.converted.append(Converted(path, errors, before, after))
    for path, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), nn.ModuleList):
            report.left.append((f"{path}.experts", "a list of experts: transformers 5 stacks them"))
    if report.converted and hasattr(model, "config"):
        _name_format(model, to)
    return report


def _convert(weight: torch.Tensor, transposed: bool, to: QuantisedExperts, name: str) -> float:
    """Quantise an expert at a time; the relative error."""
    values, scales = to.tensors(name)
    error = total = 0.0
    for e, matrix in enumerate(weight):
        rows = (matrix.mT if transposed else matrix).float()
        stored_values, stored_scales = formats.quantise(rows, to.quantisation)
        values[e], scales[e] = stored_values, stored_scales
        difference = formats.dequantise(stored_values, stored_scales).sub_(rows)
        error += float(difference.square().sum(dtype=torch.float64))
        total += float(rows.square().sum(dtype=torch.float64))
    return (error / total) ** 0.5 if total else 0.0


def _name_format(model: Any, to: str) -> None:
    """Say in the config how the experts are stored, so that what is saved can be loaded."""
    all_gpt_oss = all(m.interleaved and m.activation == "gpt_oss" for m in _quantised(model))
    upstream = to == "mxfp4" and all_gpt_oss
    model.config.quantization_config = {"quant_method": "mxfp4"} if upstream else {"quant_method": METHOD, "format": to}


def _quantised(model: nn.Module) -> Iterator[QuantisedExperts]:
    return (module for module in model.modules() if isinstance(module, QuantisedExperts))


# ---- loading ----


def load_quantised(path: str | os.PathLike[str], *, model_class: Any = None, backend: str = "", **options: Any) -> Any:
    """`from_pretrained` of a checkpoint whose experts are in few bits, without expanding them.

    For GPT-OSS as it is released (`quant_method: mxfp4`), alone or inside InternVL, and for what `quantise_experts`
    made and `save_pretrained` saved. Blocks and scales become the parameters of `nn.QuantisedExperts` as they are
    stored; `state_dict` and `save_pretrained` give them back. transformers' own kernels are not needed.

    Args:
        path: folder of the checkpoint, with safetensors files.
        model_class: of the model; None: the one that the config names, of transformers.
        backend: as of `moe_experts`.
        options: for `from_pretrained`; `dtype` is that of everything but the experts' matrices, by default the
            checkpoint's.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError: no folder or no safetensors files there.
        ValueError: the checkpoint is not quantised in a known way; a tensor is missing or has another dtype, number of
            blocks or shape of scales than the config asks for (found from the files' headers, before anything is
            loaded); a scale that is NaN.
    """
    import transformers

    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path: got {str(path)!r}, expected the folder of a checkpoint")
    config = transformers.AutoConfig.from_pretrained(folder)
    asked, quantisation = _asked(config)
    kind = model_class or getattr(transformers, (config.architectures or ["?"])[0], None)
    if kind is None:
        raise ValueError(f"model_class: got None, and transformers has no {config.architectures} that the config names")
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    with torch.device("meta"):
        skeleton = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        _replace(skeleton, quantisation, backend)
    _check_files(folder, skeleton)
    _register()
    config.quantization_config = {"quant_method": METHOD, "format": quantisation, "backend": backend}
    options.setdefault("dtype", "auto")
    model = kind.from_pretrained(folder, config=config, **options)
    for name, module in model.named_modules():
        if isinstance(module, QuantisedExperts):
            _check_scales(name, module)
    model.config.quantization_config = asked
    return model.eval()


def _asked(config: Any) -> tuple[dict[str, Any], str]:
    """What the config says of quantisation, and the format."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    asked = found if isinstance(found, dict) else found.to_dict() if found is not None else {}
    method = str(getattr(asked.get("quant_method"), "value", asked.get("quant_method")))
    quantisation = asked.get("format", "") if method == METHOD else method
    if quantisation not in formats.FORMATS or (quantisation == "fp8" and method != METHOD):
        raise ValueError(
            f"config.quantization_config: got quant_method {method!r}, expected 'mxfp4' or '{METHOD}' with the format "
            f"{' or '.join(formats.FORMATS)}"
        )
    return asked, quantisation


def _replace(model: nn.Module, quantisation: str, backend: str) -> None:
    """Put `QuantisedExperts`, on the meta device, where the model has stacked experts."""
    found = list(named_instances(model, *_STACKED))
    if not found:
        raise ValueError(f"model: got a {type(model).__name__} without stacked experts of {' or '.join(_STACKED)}")
    for path, experts in found:
        form = form_of(class_of(experts))
        why = form if isinstance(form, str) else replaced_before(experts, forward_name(experts))
        why = why or _width_problem(experts, form)  # type: ignore[arg-type]
        if why:
            raise ValueError(f"{path}: {why}")
        assert isinstance(form, Form)
        model.set_submodule(path, _empty(experts, form, quantisation, backend, "meta"))


_DTYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}


def _headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Dtype, shape and file of every tensor of a checkpoint, from the files' headers."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"path: got {str(folder)!r}, expected safetensors files there")
    found = {}
    for file in files:
        with open(file, "rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = entry["dtype"], tuple(entry["shape"]), file.name
    return found


def _check_files(folder: Path, skeleton: nn.Module) -> None:
    """Raise unless the files hold every tensor of the experts, with the dtype and shape that the skeleton has."""
    headers = _headers(folder)
    by_tail = {_tail(name): name for name in headers}  # models nest their layers under other names than checkpoints
    for path, module in skeleton.named_modules():
        if not isinstance(module, QuantisedExperts):
            continue
        for matrix in WEIGHTS:
            for part in module.parts(matrix):
                expected = getattr(module, part)
                name = by_tail.get(_tail(f"{path}.{part}"), "")
                if not name:
                    raise ValueError(f"{path}.{part}: got no such tensor in {folder}, expected {_described(expected)}")
                kind, shape, file = headers[name]
                if _DTYPES.get(kind) != expected.dtype or shape != tuple(expected.shape):
                    raise ValueError(f"{name} in {file}: got {kind} {list(shape)}, expected {_described(expected)}")


def _tail(name: str) -> str:
    """A tensor's name from the number of its layer on."""
    found = re.search(r"layers\.\d+\..*$", name)
    return found.group() if found else name


def _described(tensor: torch.Tensor) -> str:
    kind = next(name for name, dtype in _DTYPES.items() if dtype == tensor.dtype)
    return f"{kind} {list(tensor.shape)}"


def _check_scales(path: str, module: QuantisedExperts) -> None:
    for name in WEIGHTS:
        scales = module.tensors(name)[1]
        bad = scales == 255 if scales.dtype == torch.uint8 else ~torch.isfinite(scales)
        if bool(bad.any()):
            raise ValueError(f"{path}.{name}: got {int(bad.sum())} scales that are NaN or infinite")


@functools.cache
def _register() -> None:
    """Tell transformers how a model with experts in few bits is built: nothing is converted while loading."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class ExpertsConfig(QuantizationConfigMixin):
        def __init__(self, format: str = "mxfp4", backend: str = "", **kwargs: Any) -> None:
            self.quant_method = METHOD
            self.format, self.backend = format, backend

    @register_quantizer(METHOD)
    class ExpertsQuantizer(HfQuantizer):
        requires_calibration = False

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            with torch.device("meta"):
                _replace(model, self.quantization_config.format, self.quantization_config.backend)
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            return model

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True
