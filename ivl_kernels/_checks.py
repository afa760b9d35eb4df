"""Argument checks of the ops: each raises an exception that names the argument, what it was and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# What kernels serve that compute in float32, and all that ops take.
KERNEL_DTYPES = ("float32", "bfloat16", "float16")
FLOAT_NAMES = (*KERNEL_DTYPES, "float64")
KERNEL_FLOATS = tuple(getattr(torch, name) for name in KERNEL_DTYPES)
FLOATS = (*KERNEL_FLOATS, torch.float64)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """What `torch.autocast` makes of this operand of a linear layer; None where it leaves it as it is."""
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return None
    return torch.get_autocast_dtype(tensor.device.type)


def describe(tensor: torch.Tensor) -> str:
    """ "float32 [2, 3] on cpu" """
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")


def check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int | str]) -> None:
    """`expected` holds a size, or a name for a free dimension."""
    check_tensor(name, tensor)
    shape = tensor.shape
    fits = len(shape) == len(expected)
    if fits:
        for size, wanted in zip(shape, expected):
            if not isinstance(wanted, str) and size != wanted:
                fits = False
    if not fits:
        raise ValueError(f"{name}: got {describe(tensor)}, expected shape [{', '.join(map(str, expected))}]")


def check_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in allowed:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name}: got {describe(tensor)}, expected dtype {wanted}")


def check_same(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor, *, dtype: bool = True) -> None:
    """Same device, and unless `dtype=False` the same dtype, as another argument."""
    check_tensor(name, tensor)
    if tensor.device != other.device:
        raise ValueError(f"{name}: got {describe(tensor)}, expected the device of {other_name} ({other.device})")
    if dtype and tensor.dtype != other.dtype:
        raise TypeError(f"{name}: got {describe(tensor)}, expected the dtype of {other_name} ({other.dtype})")
