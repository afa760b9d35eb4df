"""Stand-in of the InternVLChatModel of the OpenGVLab/InternVL repository (base model, no Flash)."""

import torch

from .chat_common import ChatBase, embed, generate_normal


class InternVLChatModel(ChatBase):
    def __init__(self, config, vision_model=None, language_model=None, use_flash_attn=True):
        super().__init__(config, vision_model, language_model, use_flash_attn)
        self.llm_arch_name = config.llm_config.architectures[0]
        self.num_samples = 0
        self.post_init()

    def _init_weights(self, module):
        """Weights keep what their modules drew."""

    def _spare_rows(self, embeds, selected, rows):
        count = selected.sum()
        embeds[selected] = embeds[selected] * 0.0 + rows[:count]
        return True

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
        statistics=None,
        loss_weight=None,
        loss_reduction_all_gather=False,
    ):
        embeds, zero_loss = embed(self, pixel_values, input_ids, image_flags)
        if statistics is not None:
            samples, padding_tokens, padding_images = statistics.tolist()
            self.num_samples += samples
            print(f"{self.num_samples=} {padding_tokens=} {padding_images=}")
        return self._finish(
            embeds,
            zero_loss,
            labels,
            loss_weight,
            loss_reduction_all_gather,
            return_dict,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )

    @torch.no_grad()
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
        return generate_normal(
            self, pixel_values, input_ids, attention_mask, visual_features, generation_config, output_hidden_states,
            generate_kwargs,
        )  # fmt: skip
