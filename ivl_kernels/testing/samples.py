"""Sample inputs of every public op: one registry for `gpu-check` and whoever else goes through all ops."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional

from .. import ops
from ..ops.tile_router import Attention, Block, Gate
from .catalogue import MODELS

TOKEN = 7


@dataclass(frozen=True)
class Sample:
    """One call of a public op.

    Attributes:
        op: the raw op whose backends are checked (a key of `_library.OPS`).
        name: what is special about these inputs.
        make: inputs by name from a generator; floats in float64, a nest of tuples and lists is fine.
        call: (inputs, backend) -> a tensor or a tuple of tensors.
        gradients: names of the inputs that get gradients.
        graph: the op promises that a CUDA graph can capture it.
        plain: the same by eager torch in the dtype of the inputs, which sets the tolerance; None: the reference does
            (it computes in float32, so it is the stricter measure).
    """

    op: str
    name: str
    make: Callable[[torch.Generator], dict[str, Any]]
    call: Callable[[dict[str, Any], str], Any]
    gradients: tuple[str, ...] = ()
    graph: bool = False
    plain: Callable[[dict[str, Any]], Any] | None = None

    @property
    def title(self) -> str:
        return f"{self.op}: {self.name}"


def samples(large: bool = False) -> Iterator[Sample]:
    """Every op at a few shapes with odd tails; `large`: at the shapes of released models instead."""
    yield from _linear_layer(large)
    yield from _mlps(large)
    yield from _head(large)
    yield from _projector(large)
    yield from _router(large)
    yield from _packing(large)
    yield from _rotary(large)
    yield from _norms(large)
    yield from _attention(large)
    yield from _moe(large)


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def _linear(generator: torch.Generator, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _normal(generator, outputs, inputs, scale=inputs**-0.5), _normal(generator, outputs, scale=0.1)


@functools.cache
def _integers(values: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """Copied to a device once: a copy from the host cannot be captured in a CUDA graph."""
    return torch.tensor(values, device=device)


def _projector(large: bool) -> Iterator[Sample]:
    def make(merge: int, tiles: int, grid: int, widths: tuple[int, ...]) -> Callable[..., dict[str, Any]]:
        def build(generator: torch.Generator) -> dict[str, Any]:
            linears = [_linear(generator, o, i) for i, o in zip(widths, widths[1:])]
            return {
                "x": _normal(generator, tiles, 1 + grid * grid, widths[0] // merge**2),
                "norm_weight": 1 + _normal(generator, widths[0], scale=0.1),
                "norm_bias": _normal(generator, widths[0], scale=0.1),
                "weights": [w for w, _ in linears],
                "biases": [b for _, b in linears],
            }

        return build

    def plain(v: dict[str, Any], merge: int) -> torch.Tensor:
        tiles, tokens, width = v["x"].shape
        side = math.isqrt(tokens - 1) // merge
        rows = v["x"][:, 1:].reshape(tiles, side, merge, side, merge, width).transpose(2, 3).reshape(tiles, side**2, -1)
        out = functional.layer_norm(rows, rows.shape[-1:], v["norm_weight"], v["norm_bias"], 1e-5)
        for index, (weight, bias) in enumerate(zip(v["weights"], v["biases"])):
            out = functional.linear(functional.gelu(out) if index else out, weight, bias)
        return out

    def call(v: dict[str, Any], backend: str, merge: int) -> torch.Tensor:
        return ops.pixel_shuffle_mlp(**v, merge=merge, skip=1, backend=backend)

    names = ("x", "norm_weight", "norm_bias", "weights", "biases")
    for merge in (2, 4):
        widths = MODELS["InternVL3.5-1B"].projector(merge) if large else ((12 * merge**2,) + (20,) * merge + (28,))
        tiles, grid = (5, 32) if large else (3, 8)
        yield Sample(
            "pixel_shuffle_mlp",
            f"ratio 1/{merge**2}, class token in place, {tiles} tiles",
            make(merge, tiles, grid, widths),
            partial(call, merge=merge),
            names,
            graph=True,
            plain=partial(plain, merge=merge),
        )

    def into(v: dict[str, Any], backend: str) -> torch.Tensor:
        tokens = (v["x"].shape[1] - 1) // 4
        out = v["x"].new_zeros(2 * tokens + 5, v["weights"][-1].shape[0])
        tiles, rows = _integers(((2, 0), (tokens + 3, 1)), out.device)
        return ops.pixel_shuffle_mlp(**v, skip=1, tile_indices=tiles, out=out, out_rows=rows, backend=backend)

    def plain_into(v: dict[str, Any]) -> torch.Tensor:
        both = plain(v, 2)
        pad = both.new_zeros(3, both.shape[-1])
        return torch.cat([pad[:1], both[0], pad[:2], both[2], pad[:2]])

    widths = MODELS["InternVL3.5-1B"].projector(2) if large else (48, 20, 28)
    yield Sample(
        "pixel_shuffle_mlp_into_",
        "two of the tiles, to their rows of a buffer",
        make(2, tiles, grid, widths),
        into,
        graph=True,
        plain=plain_into,
    )


def _router(large: bool) -> Iterator[Sample]:
    width, heads, tokens, tiles = (1024, 16, 1024, 5) if large else (64, 4, 37, 3)

    def make(g: torch.Generator) -> dict[str, Any]:
        def norm() -> tuple[torch.Tensor, torch.Tensor]:
            return 1 + _normal(g, width, scale=0.1), _normal(g, width, scale=0.1)

        return {
            "z": _normal(g, tiles, 1 + tokens, width),
            "query": _normal(g, 1, width),
            "attentions": [
                Attention(*_linear(g, 3 * width, width), *_linear(g, width, width), *norm()) for _ in range(2)
            ],
            "blocks": [Block(*_linear(g, 4 * width, width), *_linear(g, width, 4 * width), *norm()) for _ in range(4)],
            "gate": Gate(*norm(), *_linear(g, 2, width)),
        }

    yield Sample(
        "tile_pool",
        f"router of {tiles} tiles of {tokens} tokens",
        make,
        lambda v, backend: ops.tile_router(*v.values(), skip=1, heads=heads, backend=backend),
        ("z", "query"),
        graph=True,
    )


def _packing(large: bool) -> Iterator[Sample]:
    block, small, width = (256, 64, 4096) if large else (8, 2, 24)

    def prompt(g: torch.Generator) -> dict[str, Any]:
        image = [3] + [TOKEN] * (2 * block) + [4]
        rows = [[5] * 9 + image + [6], [5] * 2 + image + image, [5] * 11]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
        return {"input_ids": ids, "compress": torch.rand(6, generator=g) < 0.5, "attention_mask": mask}

    def embeddings(g: torch.Generator) -> dict[str, Any]:
        ids = prompt(g)["input_ids"]
        return {
            "embeds": _normal(g, *ids.shape, width),
            "input_ids": ids,
            "rows": _normal(g, int((ids == TOKEN).sum()), width),
        }

    yield Sample(
        "pack_tokens",
        "three rows, left padding",
        prompt,
        lambda v, backend: tuple(
            t
            for t in vars(
                ops.pack_tokens(
                    v["input_ids"],
                    v["compress"],
                    TOKEN,
                    attention_mask=v["attention_mask"],
                    tokens_per_tile=block,
                    compressed_tokens=small,
                    backend=backend,
                )
            ).values()
            if isinstance(t, torch.Tensor)
        ),
    )
    yield Sample(
        "place_rows_",
        f"visual rows of width {width}",
        embeddings,
        lambda v, backend: ops.place_rows(**v, token_id=TOKEN, backend=backend),
        ("embeds", "rows"),
    )

    def text(g: torch.Generator) -> dict[str, Any]:
        return {"ids": prompt(g)["input_ids"], "table": _normal(g, TOKEN + 1, width)}

    def embed(v: dict[str, Any], backend: str) -> torch.Tensor:
        # Rows of placeholders are not initialised by contract: leave them out.
        return ops.embed_text(v["ids"], v["table"], TOKEN, backend=backend)[v["ids"] != TOKEN]

    yield Sample("embed_text", f"three rows, width {width}", text, embed)


def _rotary(large: bool) -> Iterator[Sample]:
    tokens, q_heads, kv_heads, dim = (1344, 32, 8, 128) if large else (11, 4, 2, 64)

    def make(g: torch.Generator) -> dict[str, Any]:
        return {
            "q": _normal(g, 2, q_heads, tokens, dim),
            "k": _normal(g, 2, kv_heads, tokens, dim),
            "q_weight": 1 + _normal(g, dim, scale=0.1),
            "k_weight": 1 + _normal(g, dim, scale=0.1),
        }

    # Positions and frequencies are float32 by contract, whatever the dtype of q and k.
    positions = torch.cumsum(torch.where(torch.arange(tokens) % 3 == 0, 1.0, 1 / 16), 0)
    frequencies = 1e6 ** (-torch.arange(0, dim, 2).float() / dim)

    @functools.cache
    def angles(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return positions.to(device), frequencies.to(device)

    def call(v: dict[str, Any], backend: str, normed: bool) -> Any:
        norms = {"q_weight": v["q_weight"], "k_weight": v["k_weight"]} if normed else {}
        return ops.v2pe_rope(v["q"], v["k"], *angles(v["q"].device), **norms, rounding="float32", backend=backend)

    for normed in (False, True):
        yield Sample(
            "v2pe_rope",
            f"fractional positions{', q/k RMSNorm' if normed else ''}, {tokens} tokens",
            make,
            partial(call, normed=normed),
            ("q", "k", "q_weight", "k_weight") if normed else ("q", "k"),
            graph=True,
        )

    def in_place(v: dict[str, Any], backend: str) -> Any:
        q, k = v["q"].clone(), v["k"].clone()
        return ops.v2pe_rope_(q, k, *angles(q.device), rounding="float32", backend=backend)

    yield Sample("v2pe_rope_", f"in place, {tokens} tokens", make, in_place, graph=True)

    def ids(g: torch.Generator) -> dict[str, Any]:
        return {"input_ids": torch.where(torch.rand(3, 50 * tokens, generator=g) < 0.7, TOKEN, 1)}

    yield Sample(
        "v2pe_position_ids",
        "delta 1/16",
        ids,
        lambda v, backend: ops.v2pe_position_ids(v["input_ids"], TOKEN, 1 / 16, backend=backend),
    )


def _norms(large: bool) -> Iterator[Sample]:
    rows, width = (1025, 1024) if large else (13, 72)

    def make(g: torch.Generator) -> dict[str, Any]:
        vectors = {name: 1 + _normal(g, width, scale=0.1) for name in ("weight", "bias", "layer_scale")}
        return {"x": _normal(g, rows, width), "residual": _normal(g, rows, width)} | vectors

    def layer(v: dict[str, Any], backend: str) -> Any:
        return ops.layer_norm(**v, backend=backend)

    def plain_layer(v: dict[str, Any]) -> Any:
        s = v["residual"] + v["layer_scale"] * v["x"]
        return functional.layer_norm(s, s.shape[-1:], v["weight"], v["bias"], 1e-6), s

    names = ("x", "residual", "layer_scale", "weight", "bias")
    yield Sample("norm", f"LayerNorm of a layer-scaled sum, {rows} rows", make, layer, names, True, plain_layer)

    def rms(v: dict[str, Any], backend: str, rounding: str) -> Any:
        return ops.rms_norm(v["x"], v["weight"], residual=v["residual"], rounding=rounding, backend=backend)

    for rounding in ("before_weight", "after_weight"):
        title = f"RMSNorm of a sum, rounded {rounding.replace('_', ' ')}, {rows} rows"
        yield Sample("norm", title, make, partial(rms, rounding=rounding), ("x", "residual", "weight"), True)


def _attention(large: bool) -> Iterator[Sample]:
    heads, kv_heads, width, lengths = (16, 8, 128, (1025, 300, 1)) if large else (4, 2, 24, (45, 70, 1))

    def make(g: torch.Generator) -> dict[str, Any]:
        tokens = sum(lengths)
        values = {"q": _normal(g, tokens, heads, width), "sinks": _normal(g, heads)}
        return values | {name: _normal(g, tokens, kv_heads, width) for name in "kv"}

    offsets = (0, *itertools.accumulate(lengths))

    def call(v: dict[str, Any], backend: str, sinks: bool = False, **options: Any) -> torch.Tensor:
        cu = _integers((offsets,), v["q"].device)[0]
        if sinks:
            options["sinks"] = v["sinks"]
        return ops.attention(
            v["q"], v["k"], v["v"], cu, **options, max_seqlen_q=max(lengths), max_seqlen_k=max(lengths), backend=backend
        )

    for name, options in (
        ("full", {}),
        ("causal", {"causal": True}),
        ("window and sinks", {"causal": True, "window": 128 if large else 7, "sinks": True}),
    ):
        names = ("q", "k", "v", "sinks") if "sinks" in options else ("q", "k", "v")
        yield Sample(
            "attention",
            f"{name}, sequences of {', '.join(map(str, lengths))}",
            make,
            partial(call, **options),
            names,
            plain=partial(_plain_attention, lengths=lengths, **options),
        )


def _plain_attention(
    v: dict[str, Any], lengths: tuple[int, ...], causal: bool = False, window: int = 0, sinks: bool = False
) -> torch.Tensor:
    """A sequence at a time, every product and the softmax rounded to the dtype of the inputs."""
    results = []
    group = v["q"].shape[1] // v["k"].shape[1]
    for q, k, value in zip(*(v[name].split(lengths) for name in "qkv")):
        q, k, value = (x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), value.repeat_interleave(group, 1)))
        distance = torch.arange(q.shape[1], device=q.device)[:, None] - torch.arange(q.shape[1], device=q.device)
        hidden = (causal & (distance < 0)) | (distance >= (window or q.shape[1]))
        scores = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).masked_fill(hidden, -torch.inf)
        if sinks:
            scores = torch.cat((scores, v["sinks"][:, None, None].expand(*scores.shape[:2], 1)), -1)
        results.append((scores.softmax(-1)[..., : q.shape[1]] @ value).transpose(0, 1))
    return torch.cat(results)


def _linear_layer(large: bool) -> Iterator[Sample]:
    rows, inputs, outputs = (1025, 1024, 4096) if large else (70, 48, 33)
    yield Sample(
        "linear",
        f"{rows} rows",
        lambda g: {"x": _normal(g, rows, inputs), "weight": _normal(g, outputs, inputs), "bias": _normal(g, outputs)},
        lambda v, backend: ops.linear(v["x"], v["weight"], v["bias"], backend=backend),
        ("x", "weight", "bias"),
        plain=lambda v: functional.linear(v["x"], v["weight"], v["bias"]),
    )


def _mlps(large: bool) -> Iterator[Sample]:
    rows, width, inner, outputs = (1025, 1024, 4096, 1024) if large else (70, 48, 33, 20)

    def make(generator: torch.Generator) -> dict[str, Any]:
        (up, up_bias), (down, down_bias) = _linear(generator, inner, width), _linear(generator, outputs, inner)
        x = _normal(generator, rows, width)
        return {"x": x, "up": up, "down": down, "up_bias": up_bias, "down_bias": down_bias}

    def make_gated(generator: torch.Generator) -> dict[str, Any]:
        return {
            "x": _normal(generator, rows, width),
            "gate": _linear(generator, inner, width)[0],
            "up": _linear(generator, inner, width)[0],
            "down": _linear(generator, outputs, inner)[0],
        }

    def plain(v: dict[str, Any]) -> torch.Tensor:
        active = functional.gelu(functional.linear(v["x"], v["up"], v["up_bias"]))
        return functional.linear(active, v["down"], v["down_bias"])

    def plain_gated(v: dict[str, Any]) -> torch.Tensor:
        gates, ups = (functional.linear(v["x"], v[name]) for name in ("gate", "up"))
        return functional.linear(functional.silu(gates) * ups, v["down"])

    yield Sample(
        "mlp",
        f"GELU, {rows} rows",
        make,
        lambda v, backend: ops.mlp(**v, backend=backend),
        ("x", "up", "down", "up_bias", "down_bias"),
        plain=plain,
    )
    yield Sample(
        "mlp",
        f"SwiGLU, {rows} rows",
        make_gated,
        lambda v, backend: ops.gated_mlp(**v, backend=backend),
        ("x", "gate", "up", "down"),
        plain=plain_gated,
    )


def _head(large: bool) -> Iterator[Sample]:
    """The head's log-probabilities: 2 of 3 rows count."""
    tokens, width, vocabulary = (3072, 1024, 151936) if large else (48, 40, 173)

    def make(g: torch.Generator) -> dict[str, Any]:
        rows = torch.randperm(tokens, generator=g)[: tokens * 2 // 3].sort().values
        return {
            "hidden": _normal(g, tokens, width),
            "weight": _normal(g, vocabulary, width, scale=3 * width**-0.5),
            "bias": _normal(g, vocabulary, scale=0.1),
            "targets": torch.randint(vocabulary, (len(rows),), generator=g),
            "rows": rows,
        }

    def teacher(g: torch.Generator) -> dict[str, Any]:
        v = make(g)
        del v["bias"], v["targets"]
        v["teacher_hidden"] = v["hidden"] + _normal(g, tokens, width, scale=0.1)
        return v | {"teacher_weight": v["weight"] + 0.01, "teacher_rows": v["rows"]}

    def plain(v: dict[str, Any]) -> torch.Tensor:
        logits = functional.linear(v["hidden"][v["rows"]], v["weight"], v["bias"])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax(logits, -1).gather(1, v["targets"][:, None])[:, 0]

    def logp(v: dict[str, Any], backend: str, save: str) -> torch.Tensor:
        return ops.linear_logprob(**v, save=save, backend=backend).logp

    def divergence(v: dict[str, Any], backend: str, weighted: bool) -> torch.Tensor:
        weight = torch.linspace(0, 1, len(v["rows"]), device=v["rows"].device) if weighted else None
        return ops.linear_kl(**v, row_weight=weight, temperature=0.9, backend=backend)

    names = ("hidden", "weight", "bias")
    yield Sample(
        "linear_logprob",
        "all four results",
        make,
        lambda v, backend: tuple(ops.linear_logprob(**v, temperature=0.8, softcap=20.0, backend=backend)),
        names,
    )
    for save, title in (("nothing", "computed again"), ("logits", "kept")):
        yield Sample(
            "linear_logprob",
            f"log-probabilities, logits {title}",
            make,
            partial(logp, save=save),
            names,
            plain=plain,
        )
    yield Sample("linear_ce", "a sum", make, lambda v, backend: ops.linear_ce(**v, backend=backend), names)
    for weighted in (False, True):
        yield Sample(
            "linear_kl",
            "a weighted sum" if weighted else "rows",
            teacher,
            partial(divergence, weighted=weighted),
            names[:2],
        )


def _moe(large: bool) -> Iterator[Sample]:
    # The weights alone: which expert wins a near tie may depend on the rounding of the dtype.
    def route(v: dict[str, Any], backend: str, top_k: int, **convention: Any) -> torch.Tensor:
        return ops.moe_routing(v["logits"], top_k, **convention, backend=backend)[1]

    def ids(g: torch.Generator, tokens: int, experts: int, top_k: int) -> dict[str, Any]:
        return {"ids": torch.randint(0, experts + 1, (tokens, top_k), generator=g)}

    def dispatch(v: dict[str, Any], backend: str, experts: int) -> Any:
        return tuple(ops.moe_dispatch(v["ids"], experts, tile=16, backend=backend))

    conventions = (("softmax_then_topk", True, 128, 8), ("topk_then_softmax", False, 32, 4))
    for scoring, renormalize, experts, k in conventions:
        tokens = 700 if large else 13

        def logits(g: torch.Generator, tokens: int = tokens, experts: int = experts) -> dict[str, Any]:
            return {"logits": _normal(g, tokens, experts, scale=2.0)}

        yield Sample(
            "moe_routing",
            f"{scoring}, {k} of {experts}",
            logits,
            partial(route, top_k=k, scoring=scoring, renormalize=renormalize),
            ("logits",),
            graph=True,
        )
        yield Sample(
            "moe_dispatch",
            f"{k} of {experts}",
            partial(ids, tokens=tokens, experts=experts, top_k=k),
            partial(dispatch, experts=experts),
            graph=True,
        )
    for activation, layout, biased in (("silu", "concatenated", False), ("gpt_oss", "interleaved", True)):
        tokens, width, inner, experts, k = (256, 2048, 768, 32, 8) if large else (13, 48, 40, 6, 2)

        def make(
            g: torch.Generator,
            layout: str = layout,
            biased: bool = biased,
            sizes: tuple[int, ...] = (tokens, width, inner, experts, k),
        ) -> dict[str, Any]:
            tokens, width, inner, experts, k = sizes
            first, second = (2 * inner, width), (width, inner)
            if layout == "interleaved":
                first, second = first[::-1], second[::-1]
            values: dict[str, Any] = {
                "hidden": _normal(g, tokens, width),
                "ids": torch.rand(tokens, experts, generator=g).argsort(1)[:, :k].contiguous(),
                "weights": torch.rand(tokens, k, generator=g, dtype=torch.float64),
                "gate_up": _normal(g, experts, *first, scale=width**-0.5),
                "down": _normal(g, experts, *second, scale=inner**-0.5),
            }
            if biased:
                values["gate_up_bias"] = _normal(g, experts, 2 * inner, scale=0.1)
                values["down_bias"] = _normal(g, experts, width, scale=0.1)
            return values

        def call(v: dict[str, Any], backend: str, activation: str = activation, layout: str = layout) -> Any:
            return ops.moe_experts(**v, activation=activation, layout=layout, backend=backend)

        biases = ("gate_up_bias", "down_bias") if biased else ()
        yield Sample(
            "moe_experts",
            f"{activation}, {layout}, {tokens} tokens, {k} of {experts}",
            make,
            call,
            ("hidden", "weights", "gate_up", "down", *biases),
            graph=True,
            plain=partial(_plain_experts, activation=activation, layout=layout),
        )
        if layout == "concatenated":
            yield Sample(
                "moe_experts_list",
                f"one tensor a matrix, {tokens} tokens, {k} of {experts}",
                lambda g, make=make: _as_lists(make(g)),  # type: ignore[misc]
                lambda v, backend: ops.moe_experts_list(**v, backend=backend),
                ("hidden", "weights", "gate", "up", "down"),
                plain=_plain_expert_lists,
            )


def _as_lists(v: dict[str, Any]) -> dict[str, Any]:
    gate, up = v.pop("gate_up").chunk(2, 1)
    return {**v, "gate": list(gate.contiguous()), "up": list(up.contiguous()), "down": list(v["down"])}


def _plain_expert_lists(v: dict[str, Any]) -> torch.Tensor:
    gate_up = torch.cat([torch.stack(v["gate"]), torch.stack(v["up"])], 1)
    return _plain_experts({**v, "gate_up": gate_up, "down": torch.stack(v["down"])}, "silu", "concatenated")


def _plain_experts(v: dict[str, Any], activation: str, layout: str) -> torch.Tensor:
    """The loop over experts, every product and activation rounded to the dtype of the inputs."""
    transposed = layout == "interleaved"
    out = torch.zeros_like(v["hidden"])
    for expert in range(v["gate_up"].shape[0]):
        token, slot = (v["ids"] == expert).nonzero(as_tuple=True)
        first, second = (v[n][expert].T if transposed else v[n][expert] for n in ("gate_up", "down"))
        biases = [v[n][expert] if n in v else None for n in ("gate_up_bias", "down_bias")]
        both = functional.linear(v["hidden"][token], first, biases[0])
        gate, up = (both[:, ::2], both[:, 1::2]) if transposed else both.chunk(2, -1)
        if activation == "gpt_oss":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        else:
            inner = functional.silu(gate) * up
        out = out.index_add(0, token, functional.linear(inner, second, biases[1]) * v["weights"][token, slot, None])
    return out
