"""Stand-in of the remote code in InternVL3.5 and InternVL3.5-Flash checkpoints; `flash_mode` decides which it is."""

import random

import torch
from torch import nn

from ivl_kernels.testing.shipped import ShippedGating, ShippedPooling, shipped_decision

from .chat_common import ChatBase, embed, generate_normal

# transformers 4 copies only what the main file of a checkpoint's code imports itself.
from .configuration import InternVLChatConfig  # noqa: F401
from .intern_vit import InternVisionModel  # noqa: F401

FULL, COMPRESSED = 256, 64


class InternVLChatModel(ChatBase):
    def __init__(self, config, vision_model=None, language_model=None, use_flash_attn=True):
        config.llm_config._attn_implementation = "eager"
        super().__init__(config, vision_model, language_model, use_flash_attn)
        width, hidden = config.vision_config.hidden_size, config.llm_config.hidden_size
        wide = width * int(1 / self.downsample_ratio) ** 4
        self.mlp2 = nn.Sequential(
            nn.LayerNorm(wide),
            nn.Linear(wide, 2 * hidden),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(2 * hidden, 2 * hidden),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(2 * hidden, hidden),
        )
        self.pooling_before_gating = ShippedPooling(width)
        self.gating = ShippedGating(width)
        self.flash_mode = getattr(config, "flash_mode", False)
        if self.flash_mode:
            self.flash_relative_threshold = config.flash_relative_threshold
            self.flash_absolute_threshold = config.flash_absolute_threshold
        # post_init() is not called, as upstream.

    def _spare_rows(self, embeds, selected, rows):
        count = min(selected.sum(), rows.size(0))
        embeds[selected][:count] = embeds[selected][:count] * 0.0 + rows[:count]  # writes into a copy: no effect
        return False

    def forward(
        self,
        pixel_values,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        image_flags=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        embeds, zero_loss = embed(self, pixel_values, input_ids, image_flags)
        return self._finish(
            embeds,
            zero_loss,
            labels,
            None,
            False,
            return_dict,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )

    def split_and_merge(self, features, split_sizes):
        """[T, tokens, C] to one [tiles * tokens, C] tensor for each group of tiles."""
        flat = features.reshape(-1, features.shape[-1])
        tokens = features.shape[1]
        return list(torch.split(flat, [int(n) * tokens for n in split_sizes], dim=0))

    def extract_feature_flash(self, pixel_values, lengths):
        """(features of 64 tokens, features of 256 tokens, gate), both kinds for every tile."""
        with torch.no_grad():
            vit = self.vision_model(pixel_values=pixel_values, output_hidden_states=False, return_dict=True)
            vit = vit.last_hidden_state[:, 1:, :]
        gate = self.gating(self.pooling_before_gating(self.split_and_merge(vit, lengths)))
        with torch.no_grad():
            side = int(vit.shape[1] ** 0.5)
            vit = vit.reshape(vit.shape[0], side, side, -1)
            small = self.pixel_shuffle(vit, scale_factor=self.downsample_ratio**2)
            small = self.mlp2(small.reshape(small.shape[0], -1, small.shape[-1]))
            full = self.pixel_shuffle(vit, scale_factor=self.downsample_ratio)
            full = self.mlp1(full.reshape(full.shape[0], -1, full.shape[-1]))
        return small, full, gate

    def get_image_num_per_sample(self, input_ids):
        """Lengths of the runs of placeholders, in tiles."""
        is_image = (input_ids.squeeze(0) == self.img_context_token_id).int()
        edge = torch.zeros(1, dtype=is_image.dtype, device=is_image.device)
        steps = torch.diff(torch.cat([edge, is_image, edge]))
        lengths = (steps == -1).nonzero().squeeze(1) - (steps == 1).nonzero().squeeze(1)
        if (lengths % FULL != 0).any():
            raise ValueError(f"runs of placeholders must be multiples of {FULL}, got {lengths.tolist()}")
        return lengths // FULL

    def compress_visual_tokens_in_sentence(self, input_embeds, input_ids, mask_idx, img_context_token_id, gate_result):
        """Drop all but the first 64 placeholders of every tile that `gate_result` marks."""
        random.uniform(0, 1)  # drawn and not used, as upstream
        keep = torch.ones_like(input_ids, dtype=torch.bool)
        positions = (input_ids == img_context_token_id).nonzero().squeeze(1).tolist()
        for tile, compress in enumerate(gate_result):
            if compress:
                start = positions[tile * FULL]
                keep[start + COMPRESSED : start + FULL] = False
        return input_embeds[keep], input_ids[keep], torch.cumsum(keep.int(), 0)[mask_idx.long()], keep

    @torch.no_grad()
    def generate_flash(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        visual_features=None,
        generation_config=None,
        output_hidden_states=None,
        **generate_kwargs,
    ):
        assert self.img_context_token_id is not None
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if visual_features is not None:
                full = visual_features
            else:
                tiles = self.get_image_num_per_sample(input_ids)
                lengths = torch.ones(int(tiles.sum()), dtype=torch.int64)
                small, full, gate = self.extract_feature_flash(pixel_values, lengths)
            compress = shipped_decision(gate, self.flash_relative_threshold, self.flash_absolute_threshold)
            selected_features = [small[i] if compress[i] else full[i] for i in range(len(compress))]
            batch, length, width = embeds.shape
            embeds, ids = embeds.reshape(batch * length, width), input_ids.reshape(batch * length)
            assert (ids == self.img_context_token_id).sum() != 0
            embeds, ids, _, keep = self.compress_visual_tokens_in_sentence(
                embeds, ids, attention_mask.reshape(-1), self.img_context_token_id, compress
            )
            assert attention_mask.min() == 1, "a mask with zeros cannot be compressed"
            embeds[ids == self.img_context_token_id] = torch.cat(selected_features, dim=0)
            embeds = embeds.reshape(batch, -1, width)
            attention_mask = torch.ones(embeds.shape[:2], device=embeds.device)
        return self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            use_cache=True,
            **generate_kwargs,
        )

    @torch.no_grad()
    def generate_normal(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        visual_features=None,
        generation_config=None,
        output_hidden_states=None,
        **generate_kwargs,
    ):
        return generate_normal(
            self, pixel_values, input_ids, attention_mask, visual_features, generation_config, output_hidden_states,
            generate_kwargs,
        )  # fmt: skip

    def generate(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        visual_features=None,
        generation_config=None,
        output_hidden_states=None,
        **generate_kwargs,
    ):
        run = self.generate_flash if self.flash_mode else self.generate_normal
        return run(
            pixel_values=pixel_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            visual_features=visual_features,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            **generate_kwargs,
        )
