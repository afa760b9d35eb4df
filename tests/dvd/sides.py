"""What makes a side in a process of its own."""

import functools
import time

import torch

import ivl_kernels
from ivl_kernels.dvd import LanguageSide, VisionSide
from tests.dvd.halves import model_of


def vision(kind="native flash", pause=0.0, patched=True):
    model = model_of(kind)
    if patched:
        ivl_kernels.patch(model)
    side = VisionSide(model)
    if pause:
        encode = side.encode

        @functools.wraps(encode)
        def slow(*args, **kwargs):
            time.sleep(pause)
            return encode(*args, **kwargs)

        side.encode = slow
    return side


def language(kind="native flash", pause=0.0, first=0.0):
    """pause: before each token; first: before the first one, on top."""
    model = model_of(kind)
    ivl_kernels.patch(model)
    side = LanguageSide(model)
    if pause or first:

        def wait(module, args, kwargs):
            given = kwargs.get("inputs_embeds")
            time.sleep(pause + (first if given is not None and given.shape[1] > 1 else 0.0))

        model.register_forward_pre_hook(wait, with_kwargs=True)
    torch.set_grad_enabled(False)
    return side
