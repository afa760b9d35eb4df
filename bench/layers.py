"""What one layer costs a GPU: launches and bytes of a vision and a language layer, plain, Liger-Kernel's and patched.

    python -m bench.layers [--tokens 320] [--out FILE]

No GPU is needed: Triton's kernels run on the simulator, which counts what they request; everything else is counted by
what torch is asked for: an operator that makes no view is a launch, and reads its arguments and writes its results
once. A layer is the difference between a model of two layers and one of one. Forward, bfloat16, InternVL3.5-1B's
widths. **Least**: the products, attention and rotation of the patched layer, and no byte for what could be computed
inside them. Of the vision layer a GPU is served nothing: torch's LayerNorm and GELU are one pass each already.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ivl_kernels
from bench.whole_model import SHAPE, VISION
from ivl_kernels import _plan
from ivl_kernels.integrations import attention, linear, mlp
from ivl_kernels.testing import tiny
from tests.simulator.gpu import simulated_gpu

NEEDED = ("mm", "bmm", "addmm", "_scaled_dot_product", "v2pe_rope")
NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "set_")  # launches nothing
Cost = dict[str, tuple[int, int]]  # launches and bytes by operator or kernel


class Counted(TorchDispatchMode):
    """Counts operators that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        inputs = {k: v for k, v in (kwargs or {}).items() if k != "out"}
        read, written = ([t for t in tree_leaves(v) if isinstance(t, torch.Tensor)] for v in ((args, inputs), out))
        places = {t.untyped_storage().data_ptr() for t in read}
        view = not function._schema.is_mutable and any(t.untyped_storage().data_ptr() in places for t in written)
        if written and not view and name not in NOTHING:
            self.launches[name] += 1
            self.bytes[name] += sum(t.numel() * t.element_size() for t in read + written)
        return out


@contextlib.contextmanager
def _as_nobody_watched() -> Iterator[None]:
    """Patched layers run upstream's code for who counts operators; here it is they that are counted."""
    with contextlib.ExitStack() as stack:
        for module in (attention, linear, mlp):
            stack.enter_context(mock.patch.object(module, "counted", lambda: False))
        stack.enter_context(mock.patch.object(_plan, "watched", lambda: False))
        stack.enter_context(_plan.unplanned())
        yield


def _models(family: str = "qwen3") -> Iterator[Any]:
    """One of two layers, one of one."""
    from transformers import InternVLForConditionalGeneration

    for layers in (2, 1):
        text = tiny.text_config(
            family, hidden_size=SHAPE.hidden, num_hidden_layers=layers, num_attention_heads=SHAPE.q_heads,
            num_key_value_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim, intermediate_size=SHAPE.intermediate,
        )  # fmt: skip
        vision = tiny.vision_config(**VISION | {"num_hidden_layers": layers})
        model = InternVLForConditionalGeneration(tiny.native_config(family, vision=vision, text=text))
        yield tiny.randomize(model).to(torch.bfloat16).eval().requires_grad_(False)


def _cost(run: Callable[[], Any], simulated: list[Any]) -> Cost:
    with _as_nobody_watched():
        run()  # what is looked up once
        simulated.clear()
        with Counted() as counted:
            run()
    found = {name: (n, counted.bytes[name]) for name, n in counted.launches.items()}
    for report in simulated:
        launches, moved = found.get(report.kernel, (0, 0))
        found[report.kernel] = launches + 1, moved + report.global_load_bytes + report.global_store_bytes
    return found


def _minus(two: Cost, one: Cost) -> Cost:
    return {k: tuple(a - b for a, b in zip(v, one.get(k, (0, 0)))) for k, v in two.items()}  # type: ignore[misc]


@torch.no_grad()
def layers(variant: str, tokens: int) -> dict[str, Cost]:
    """{vision layer, language layer, that of a batch of single tokens: its cost}."""
    pixels = torch.randn(1, 3, 448, 448, dtype=torch.bfloat16)
    found: dict[str, list[Cost]] = {}
    for model in _models():
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(simulated_gpu(preferred=True))
            if variant == "patched":
                # What a GPU's tensors are not served by.
                stack.enter_context(ivl_kernels.patched(model, flash=False, linear=False, attention=False, cache=False))
            elif variant == "Liger-Kernel":
                from liger_kernel.transformers import apply_liger_kernel_to_internvl

                apply_liger_kernel_to_internvl(model=model)
            runs: dict[str, Callable[[], Any]] = {
                "vision layer, 1 x 1025 tokens": lambda model=model: model.model.vision_tower(pixels)
            }
            for size in ((1, tokens), (32, 1)):
                embeds = torch.randn(*size, SHAPE.hidden, dtype=torch.bfloat16)
                runs[f"language layer, {size[0]} x {size[1]} tokens"] = lambda model=model, embeds=embeds: (
                    model.model.language_model(inputs_embeds=embeds, use_cache=False)
                )
            for name, run in runs.items():
                found.setdefault(name, []).append(_cost(run, log))
    return {name: _minus(*costs) for name, costs in found.items()}


def _least(patched: Cost) -> Cost:
    return {k: v for k, v in patched.items() if k.removeprefix("_").startswith(tuple(n.strip("_") for n in NEEDED))}


def table(found: dict[str, dict[str, Cost]]) -> Iterator[str]:
    yield "| | " + " | ".join(found) + " |"
    yield "| --- " * (len(found) + 1) + "|"
    for name in next(iter(found.values())):
        for what, index, scale, form in (("launches", 0, 1, "{:.0f}"), ("MB", 1, 1e6, "{:.1f}")):
            cells = [form.format(sum(c[index] for c in cost[name].values()) / scale) for cost in found.values()]
            yield f"| {name}: {what} | " + " | ".join(cells) + " |"


def details(found: dict[str, dict[str, Cost]]) -> Iterator[str]:
    for name in next(iter(found.values())):
        for variant, cost in found.items():
            parts = (f"{k} {n} ({moved / 1e6:.2f} MB)" for k, (n, moved) in sorted(cost[name].items()) if n)
            yield f"- {name}, {variant}: " + ", ".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=320, help="of the language layer")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    args = parser.parse_args(argv)
    found = {variant: layers(variant, args.tokens) for variant in ("eager", "patched", "Liger-Kernel")}
    found = {k: found[k] for k in ("eager", "Liger-Kernel", "patched")}
    found["least"] = {name: _least(cost) for name, cost in found["patched"].items()}
    text = "\n".join([*table(found), "", *details(found)]) + "\n"
    print(text)
    if args.out:
        args.out.write_text(f"# One layer on a GPU\n\n{__doc__}\n{text}")


if __name__ == "__main__":
    main()
