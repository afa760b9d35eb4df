"""What `train-demo` trains: a small random InternVL3.5-Flash on parts of one photograph, in InternVL's five ways.

A `Phase` has its batches made before it begins, and a loss in two writings: plain torch over logits, and this
package's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import imaging
from ..flash import Decisions, FlashVision, ViCO, flash_inputs, parts_of, route, score_images
from ..flash.tiles import image_of_tile, row_of_tile
from ..nn.losses import GSPOLoss, MPOLoss, RatioWindow, RouterLoss, group_advantages, per_sequence
from ..ops import RowPlan, row_plan
from ..packing import Limits, Mixture, PackedStream, Sample, collate
from ..testing import tiny
from .subject import random_tokenizer

TILE, PATCH, VOCABULARY = 112, 14, 16384
LIMITS = Limits(tokens=1024, tiles=48)
COLOURS = {
    "black": (25, 20, 20),
    "white": (240, 240, 235),
    "grey": (130, 130, 130),
    "brown": (100, 65, 40),
    "beige": (205, 180, 145),
    "red": (175, 45, 40),
    "orange": (225, 130, 40),
    "green": (75, 120, 65),
    "blue": (65, 95, 150),
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")


def small_model(seed: int = 0) -> tuple[Any, Any]:
    """A random transformers-native InternVL3.5 with Flash attached, and its tokenizer."""
    from transformers import InternVLForConditionalGeneration

    tokenizer = random_tokenizer()
    vision = tiny.vision_config(
        hidden_size=64, num_attention_heads=4, intermediate_size=192, image_size=(TILE, TILE), patch_size=(PATCH, PATCH)
    )
    text = tiny.text_config(
        "qwen3", hidden_size=128, num_hidden_layers=3, head_dim=32, intermediate_size=320, vocab_size=VOCABULARY
    )
    token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    model = InternVLForConditionalGeneration(tiny.native_config(text=text, vision=vision, image_token_id=token))
    tiny.randomize(model, seed)
    flash = FlashVision(64, 128, relative_threshold=0.5, absolute_threshold=0.0, dropout=0.0)
    tiny.randomize(flash, seed + 1)
    flash.attach(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
    return model.train(), tokenizer


@dataclass(frozen=True)
class Scene:
    """A part of the photograph with its caption by rule, tokenized."""

    prompt: list[int]
    answer: list[int]
    wrong: list[int]
    words: tuple[str, str, str]
    pixels: Tensor

    def sample(self, answer: list[int] | None = None) -> Sample:
        answer = self.answer if answer is None else answer
        ids = torch.tensor(self.prompt + answer)
        labels = ids.clone()
        labels[: len(self.prompt)] = -100
        return Sample(ids, labels, self.pixels)


class Scenes(Sequence[Scene]):
    """Random parts of a photograph, compressed again as JPEG (quality 75 to 100); number i is the same every time."""

    def __init__(self, photo: Any, tokenizer: Any, tokens_a_tile: int, count: int, first: int = 0) -> None:
        self.photo, self.tokenizer, self.tokens = photo, tokenizer, tokens_a_tile
        self.size, self.first = count, first

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        if not 0 <= index < self.size:
            raise IndexError(index)
        draw = torch.Generator().manual_seed(self.first + index)

        def between(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=draw))

        width, height = self.photo.size
        w, h = int(width * between(0.15, 0.5)), int(height * between(0.15, 0.5))
        x, y = int(between(0, width - w)), int(between(0, height - h))
        buffer = BytesIO()
        self.photo.crop((x, y, x + w, y + h)).save(buffer, "JPEG", quality=int(between(75, 101)))
        part = Image.open(buffer).convert("RGB")
        tiling = imaging.tile_image(part, max_tiles=4, tile=TILE)
        words = (_colour(part), _place((x + w / 2) / width, (y + h / 2) / height), NUMBERS[len(tiling.tiles)])
        other = (_other(list(COLOURS), words[0], draw), words[1], _other(list(NUMBERS[1:6]), words[2], draw))
        image = "<img>" + "<IMG_CONTEXT>" * (self.tokens * len(tiling.tiles)) + "</img>\n"
        prompt = f"<|im_start|>user\n{image}Describe it.<|im_end|>\n<|im_start|>assistant\n"
        ids = [self.tokenizer(text)["input_ids"] for text in (prompt, _caption(words), _caption(other))]
        return Scene(ids[0], ids[1], ids[2], words, tiling.pixel_values())


def _caption(words: tuple[str, str, str]) -> str:
    return f"A {words[0]} part at the {words[1]}, {words[2]} tiles.<|im_end|>"


def _colour(part: Any) -> str:
    mean = part.resize((1, 1)).getpixel((0, 0))
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(mean, COLOURS[name])))


def _place(x: float, y: float) -> str:
    row, column = ("top", "", "bottom")[int(y * 3)], ("left", "", "right")[int(x * 3)]
    return f"{row} {column}".strip() or "centre"


def _other(words: list[str], not_this: str, draw: torch.Generator) -> str:
    words = [word for word in words if word != not_this]
    return words[int(torch.randint(len(words), (), generator=draw))]


@dataclass
class Phase:
    """One way of training.

    Attributes:
        name: as in the table and the picture.
        batches: one a step.
        loss: (batch, fused) -> scalar with gradients.
        fresh: called before the first step of either writing: puts back what the phase itself remembers.
        models: that the package's writing patches.
        rate: learning rate of AdamW.
    """

    name: str
    batches: list[Any]
    loss: Callable[[Any, bool], Tensor]
    fresh: Callable[[], None] = lambda: None
    models: list[Any] = field(default_factory=list)
    rate: float = 1e-3


def _inputs(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("labels", "row_plan")}


def _plain_logp(model: Any, row: dict[str, Any]) -> Tensor:
    """Log-probabilities of the plan's rows, from logits of every position."""
    plan, logits = RowPlan(**row["row_plan"]), model(**_inputs(row)).logits
    return logits[0].float().log_softmax(-1)[plan.rows, plan.targets]


def _logp(model: Any, row: dict[str, Any], fused: bool) -> Tensor:
    return model(**row, return_logprobs=True).log_probs.logp if fused else _plain_logp(model, row)


def next_token(model: Any, scenes: Scenes, steps: int) -> Phase:
    """Packed rows, square averaging."""
    stream = PackedStream(
        Mixture([scenes], repeat=True), LIMITS, rows=4, size=lambda s: (len(s.sample().ids), len(s.pixels))
    )
    rows = (collate([scene.sample() for scene in row], reduction="square") for row in stream)
    batches = [row for row, _ in zip(rows, range(steps))]

    def loss(row: dict[str, Any], fused: bool) -> Tensor:
        if fused:
            return model(**row).loss
        plan = RowPlan(**row["row_plan"])
        logits = model(**_inputs(row)).logits[0].float()
        weights = torch.zeros(len(logits)).index_copy(0, plan.rows, plan.weight)
        shifted = F.pad(row["labels"][0, 1:], (0, 1), value=-100)
        return (F.cross_entropy(logits, shifted, reduction="none") * weights).sum() / plan.denominator

    return Phase("next token", batches, loss, models=[model], rate=3e-3)


def mpo(model: Any, scenes: Scenes, steps: int, pairs: int = 4) -> Phase:
    """Right captions against wrong ones, both of a batch in one row; the reference in the call."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    batches = []
    for step in range(steps):
        chosen = [scenes[(step * pairs + i) % len(scenes)] for i in range(pairs)]
        batches.append(collate([s.sample() for s in chosen] + [s.sample(s.wrong) for s in chosen]))
    criterion = MPOLoss()

    def loss(row: dict[str, Any], fused: bool) -> Tensor:
        offsets = row["row_plan"]["offsets"]
        with torch.no_grad():
            sums = per_sequence(_logp(reference, row, fused), offsets)
        return criterion(_logp(model, row, fused), offsets, sums).loss

    def fresh() -> None:
        criterion.load_state_dict(MPOLoss().state_dict())

    return Phase("MPO", batches, loss, fresh, [model, reference])


def _padded(scenes: list[Scene]) -> dict[str, Tensor]:
    samples = [scene.sample() for scene in scenes]
    width = max(sample.tokens for sample in samples)

    def rows(name: str, value: int) -> Tensor:
        return torch.stack([F.pad(getattr(s, name), (0, width - s.tokens), value=value) for s in samples])

    ids, labels = rows("ids", 0), rows("labels", -100)
    mask = torch.stack([(torch.arange(width) < s.tokens).long() for s in samples])
    pixels = torch.cat([s.pixels for s in samples if s.pixels is not None])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}


def _plain_flash(model: Any, vit: Tensor, batch: dict[str, Tensor], compress: Tensor) -> tuple[Tensor, RowPlan]:
    """Logits [rows, V] of a Flash forward at given ratios."""
    parts, given = parts_of(model), {"labels": batch["labels"], "attention_mask": batch["attention_mask"]}
    inputs = flash_inputs(parts, batch["input_ids"], vit, decisions=Decisions(compress), padding="right", **given)
    packed = inputs.packed
    logits = model(
        inputs_embeds=inputs.embeds,
        attention_mask=packed.attention_mask,
        position_ids=packed.position_ids,
        use_cache=False,
    ).logits
    plan = row_plan(packed.labels)  # type: ignore[arg-type]
    return logits.float().log_softmax(-1).flatten(0, 1)[plan.rows], plan


def _plain_divergence(model: Any, reference: Any, batch: dict[str, Tensor], vit: Tensor, compress: Tensor) -> Tensor:
    """[B]"""
    with torch.no_grad():
        theirs = parts_of(reference).vision.tokens_of(batch["pixel_values"])
        q, _ = _plain_flash(reference, theirs, batch, torch.zeros_like(compress))
    p, plan = _plain_flash(model, vit, batch, compress)
    return per_sequence((q.exp() * (q - p)).sum(-1), plan.offsets) / plan.offsets.diff().clamp(min=1)


def consistency(model: Any, scenes: Scenes, steps: int, size: int = 4) -> Phase:
    """ViCO, stage 1: a ratio an image, the divergence from the model as it was, at 1/4."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    vico = ViCO(model, 1, reference=reference, generator=torch.Generator().manual_seed(1))
    batches = []
    for step in range(steps):
        batch = _padded([scenes[(step * size + i) % len(scenes)] for i in range(size)])
        batches.append((batch, vico.sample(batch["input_ids"], batch["attention_mask"])))

    def loss(given: tuple[dict[str, Tensor], Tensor], fused: bool) -> Tensor:
        batch, compress = given
        if fused:
            return vico.loss(**batch, compress=compress).loss
        vit = parts_of(model).vision.tokens_of(batch["pixel_values"])
        return _plain_divergence(model, reference, batch, vit, compress).mean()

    return Phase("ViCO 1", batches, loss)


def router(model: Any, scenes: Scenes, steps: int, start: Any, size: int = 4) -> Phase:
    """ViCO, stage 2: labels from what compressing an image does to the consistency loss; only the router learns."""
    reference = copy.deepcopy(model)
    reference.load_state_dict(start)
    reference.eval().requires_grad_(False)
    batches = [_padded([scenes[(step * size + i) % len(scenes)] for i in range(size)]) for step in range(steps)]
    window, criterion = RatioWindow(128, min_count=8), RouterLoss()
    vico = ViCO(model, 2, reference=reference, window=window)
    vico.restore()

    def loss(batch: dict[str, Tensor], fused: bool) -> Tensor:
        if fused:
            return vico.loss(**batch).loss
        vision, language = parts_of(model)
        with torch.no_grad():
            vit = vision.tokens_of(batch["pixel_values"])
            ids, mask = batch["input_ids"], batch["attention_mask"]
            row = row_of_tile(ids, mask, language.token_id, language.tokens, len(vit))
            image = image_of_tile(ids, mask, language.token_id, language.tokens)
            ratios = score_images(vico, lambda c: _plain_divergence(model, reference, batch, vit, c), image, row)
        return criterion(route(vit, vision, groups=row).router_logits, window(ratios))  # type: ignore[arg-type]

    def fresh() -> None:
        window.set_extra_state(torch.empty(0))

    return Phase("ViCO 2", batches, loss, fresh, rate=5e-4)


def reward(text: str, words: tuple[str, str, str]) -> float:
    """By rule: a third for each right word of the caption, and it must be one."""
    return sum(word in text for word in words) / 3 if text.startswith("A ") and "tiles." in text else 0.0


def gspo(model: Any, tokenizer: Any, scenes: Scenes, steps: int, groups: int = 4, size: int = 8) -> Phase:
    """Groups of responses of the model as it is now, and a reward by rule; two rows, over and over."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows, rewards = [], []
    training = model.training
    model.eval()
    for half in range(2):
        samples, marks = [], []
        for i in range(groups // 2):
            scene = scenes[half * groups // 2 + i]
            ids = torch.tensor([scene.prompt])
            torch.manual_seed(half * 100 + i)
            with torch.no_grad():
                made = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=scene.pixels,
                    max_new_tokens=16,
                    do_sample=True,
                    num_return_sequences=size,
                    eos_token_id=end,
                    pad_token_id=0,
                )
            for answer in made[:, ids.shape[1] :].tolist():
                answer = answer[: answer.index(end) + 1] if end in answer else answer
                samples.append(scene.sample(answer))
                marks.append(reward(tokenizer.decode(answer, skip_special_tokens=True), scene.words))
        row = collate(samples)
        with torch.no_grad():
            old = _plain_logp(model, row)
        rewards += marks
        rows.append((row, old, group_advantages(torch.tensor(marks), size)))
    model.train(training)
    criterion = GSPOLoss(low=0.2, high=0.2)

    def loss(given: tuple[dict[str, Any], Tensor, Tensor], fused: bool) -> Tensor:
        row, old, advantages = given
        return criterion(_logp(model, row, fused), old, row["row_plan"]["offsets"], advantages).loss

    return Phase("GSPO", [rows[i % 2] for i in range(steps)], loss, models=[model], rate=3e-4)
