"""The language side of an InternVL: a prompt and visual tokens to an answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..flash import language_parts, pack
from ..integrations.flash import PromptStreamer, default_mask, new_tokens
from ..integrations.v2pe import prompt
from ..models.families import Family, RemoteCode, family_of
from ..models.halves import family_class, language_half
from .features import Limits, MessageError, VisualFeatures
from .weights import fingerprint_of, held, rules_of, stored

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class LanguageInputs:
    """What a generation starts from, packed: placeholders that no tile has tokens for are gone.

    Attributes:
        input_ids: [B, N'].
        inputs_embeds: [B, N', H], visual rows in place.
        attention_mask: [B, N'].
        compress: [T] bool, which tiles have a quarter of the tokens.
    """

    input_ids: Tensor
    inputs_embeds: Tensor
    attention_mask: Tensor
    compress: Tensor


class LanguageSide:
    """Answers prompts about images that a `VisionSide` has encoded, with an InternVL of either family.

    Args:
        model: an `InternVLForConditionalGeneration` or an `InternVLChatModel` (that has been told its
            `img_context_token_id`). Nothing of it is changed; patch it as you like, V2PE included. Its vision tower is
            not used, and need not be there.
        fingerprint: of the weights and rules whose features are taken (`VisionSide.fingerprint`); "" computes it from
            the model, None takes those of any.

    Raises:
        TypeError: no InternVL.
        ValueError: the fingerprint is to be computed, and the model has no vision side.
    """

    def __init__(self, model: nn.Module, *, fingerprint: str | None = "") -> None:
        family = family_of(model)
        if family is None:
            raise TypeError(f"model: got {type(model).__name__}, expected an InternVL model")
        self.model = model
        self._family: Family = family
        if fingerprint == "":
            if (
                getattr(family.core, "vision_tower", None) is None
                and getattr(family.core, "vision_model", None) is None
            ):
                raise ValueError("fingerprint: got '' and a model without a vision side, expected the one to accept")
            parts = held(family)
            fingerprint = fingerprint_of(parts, rules_of(family, "mlp2" in parts))
        self.fingerprint = fingerprint

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        fingerprint: str | None = "",
        token_id: int | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> LanguageSide:
        """The language side of a checkpoint folder (safetensors); the layers of its vision tower are never read.

        Args:
            fingerprint: "": computed from the folder's vision tensors, one at a time; give it or None to read none.
            token_id: the placeholder's id of an `internvl_chat` checkpoint (of `<IMG_CONTEXT>`).
            trust_remote_code: needed for an `internvl_chat` checkpoint, whose own code is executed.
            options: of transformers' `from_pretrained`, such as dtype and device_map.

        Raises:
            ValueError: no InternVL checkpoint, or code that is not trusted.
        """
        folder = os.fspath(folder)
        kind = family_class(folder)
        model = language_half(folder, kind, trust_remote_code, **options)
        if token_id is not None and kind is RemoteCode:
            model.img_context_token_id = token_id
        if fingerprint == "":
            found = stored(folder, kind)
            fingerprint = fingerprint_of(found, rules_of(kind(model), "mlp2" in found))
        return cls(model.eval(), fingerprint=fingerprint)

    @property
    def tokens_a_tile(self) -> int:
        """Placeholders that a prompt has for each tile."""
        return self._family.tokens_a_tile

    @property
    def limits(self) -> Limits:
        """What messages this model takes: for `VisualFeatures.from_bytes`."""
        family, embedding = self._family, self._family.embedding.weight
        tokens = (family.tokens_a_tile, family.tokens_a_tile // 4)
        return Limits(width=embedding.shape[1], tokens=tokens, dtypes=_DTYPES, fingerprint=self.fingerprint)

    def inputs(
        self,
        input_ids: Tensor,
        features: VisualFeatures | Sequence[VisualFeatures | None] | None = None,
        attention_mask: Tensor | None = None,
    ) -> LanguageInputs:
        """Embeddings of a batch of prompts with the visual rows in place: for any generate, and any engine.

        Args:
            input_ids: [B, N], with `tokens_a_tile` placeholders for each tile, as for the whole model.
            features: of each row; None for a row, or at all, where there are no images. One alone is of a batch of
                one.
            attention_mask: [B, N]; None: no padding.

        Raises:
            MessageError: features of other weights or rules, of another width, or with a tile of other tokens than
                this model's.
            ValueError: they do not fit the placeholders.
        """
        with torch.no_grad():
            return self._inputs(input_ids, self._given(input_ids, features), attention_mask)

    def _given(self, input_ids: Tensor, features: Any) -> list[VisualFeatures]:
        given = [features] if isinstance(features, VisualFeatures) else list(features or [])
        if given and len(given) != len(input_ids):
            raise ValueError(f"features: got {len(given)}, expected {len(input_ids)}: one a row of input_ids")
        found = [one for one in given if one is not None and one.tokens]
        limits = self.limits
        for one in found:
            if limits.fingerprint is not None and one.fingerprint != limits.fingerprint:
                raise MessageError(
                    "fingerprint",
                    f"got features of weights and rules {one.fingerprint!r:.80}, expected {limits.fingerprint!r}",
                )
            if one.rows.shape[1] != limits.width:
                raise MessageError("width", f"rows: got {one.rows.shape[1]} wide, expected {limits.width}")
            wrong = [n for n in one.tokens if n not in (limits.tokens or ())]
            if wrong:
                raise MessageError("tokens", f"tokens: got a tile of {wrong[0]}, expected one of {limits.tokens}")
        self._check_places(input_ids, given)
        return found

    def _check_places(self, input_ids: Tensor, given: Sequence[VisualFeatures | None]) -> None:
        """Each row has the placeholders of its own tiles: a batch could fit as a whole and be wrong."""
        places = (input_ids == self._family.token_id).sum(1).tolist()
        for i, found in enumerate(places):
            one = given[i] if given else None
            expected = self._family.tokens_a_tile * len(one.tokens) if one is not None else 0
            if found != expected:
                raise ValueError(
                    f"input_ids: got {found} placeholders in row {i}, expected {expected} for its features"
                )

    def _inputs(self, ids: Tensor, features: list[VisualFeatures], mask: Tensor | None) -> LanguageInputs:
        family = self._family
        tokens = [n for one in features for n in one.tokens]
        compress = torch.tensor([n != family.tokens_a_tile for n in tokens], dtype=torch.bool, device=ids.device)
        if any(n != family.tokens_a_tile for n in tokens):
            packed = pack(ids, compress, language_parts(family), attention_mask=mask)
            assert packed.embeds is not None
            ids, mask, embeds = packed.ids, packed.attention_mask, packed.embeds
        else:
            mask = torch.ones_like(ids) if mask is None else mask
            embeds = family.embedding(ids)
        if features:
            rows = torch.cat([one.rows.to(embeds.device, embeds.dtype) for one in features])
            embeds = ops.place_rows(embeds, ids, rows, family.token_id)  # type: ignore[arg-type]
        return LanguageInputs(ids, embeds, mask, compress)

    def generate(
        self,
        input_ids: Tensor,
        features: VisualFeatures | Sequence[VisualFeatures | None] | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """What the whole model's `generate` returns for these prompts and images: the same tokens.

        Args:
            input_ids, features, attention_mask: as in `inputs`.
            options: of the model's generate; `v2pe_delta` where it is patched so.

        Raises:
            MessageError, ValueError: as `inputs`.
        """
        if isinstance(self._family, RemoteCode):
            return self._chat(input_ids, features, attention_mask, options)
        model: Any = self.model
        config = options.get("generation_config")
        if attention_mask is None:
            attention_mask = default_mask(model, input_ids, config, options)
        given = self.inputs(input_ids, features, attention_mask)
        options.update(new_tokens(model, input_ids.shape[1], config, options))
        if options.get("streamer") is not None:
            options["streamer"] = PromptStreamer(options["streamer"], input_ids.cpu())
        with torch.no_grad(), prompt(model, given.input_ids, given.compress, options.pop("v2pe_delta", None)):
            output = model.generate(
                input_ids=given.input_ids,
                inputs_embeds=given.inputs_embeds,
                attention_mask=given.attention_mask,
                **options,
            )
        sequences = output if isinstance(output, Tensor) else output.sequences
        before = input_ids.repeat_interleave(len(sequences) // len(input_ids), 0).to(sequences.device)
        sequences = torch.cat([before, sequences[:, given.input_ids.shape[1] :]], 1)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _chat(self, input_ids: Tensor, features: Any, attention_mask: Tensor | None, options: dict[str, Any]) -> Any:
        """As the remote code does it: the language model gets embeddings alone, and returns new tokens alone."""
        given = self.inputs(input_ids, features, attention_mask)
        with torch.no_grad(), prompt(self.model, given.input_ids, given.compress, options.pop("v2pe_delta", None)):
            return self._family.language.generate(
                inputs_embeds=given.inputs_embeds, attention_mask=given.attention_mask, use_cache=True, **options
            )
