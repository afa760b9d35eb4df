"""What the two InternVLChatModel stand-ins share."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration import InternVLChatConfig
from .intern_vit import InternVisionModel

LANGUAGE_MODELS = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
}


def embed(self, pixel_values, input_ids, image_flags):
    """Step one of `forward`: embeddings with the visual rows in place, and whether the loss is zeroed."""
    image_flags = image_flags.squeeze(-1)
    embeds = self.language_model.get_input_embeddings()(input_ids).clone()
    vit = self.extract_feature(pixel_values)
    vit = vit[image_flags == 1]
    batch, length, width = embeds.shape
    embeds = embeds.reshape(batch * length, width)
    ids = input_ids.reshape(batch * length)
    selected = ids == self.img_context_token_id
    zero_loss = False
    try:
        embeds[selected] = embeds[selected] * 0.0 + vit.reshape(-1, width)
    except Exception as error:
        vit = vit.reshape(-1, width)
        print(f"warning: {error}, embeds[selected].shape={embeds[selected].shape}, vit.shape={vit.shape}")
        zero_loss = self._spare_rows(embeds, selected, vit)
    return embeds.reshape(batch, length, width), zero_loss


def generate_normal(
    self, pixel_values, input_ids, attention_mask, visual_features, generation_config, output_hidden_states,
    generate_kwargs,
):  # fmt: skip
    assert self.img_context_token_id is not None
    if pixel_values is not None:
        vit = visual_features if visual_features is not None else self.extract_feature(pixel_values)
        embeds = self.language_model.get_input_embeddings()(input_ids)
        batch, length, width = embeds.shape
        embeds = embeds.reshape(batch * length, width)
        ids = input_ids.reshape(batch * length)
        selected = ids == self.img_context_token_id
        assert selected.sum() != 0
        embeds[selected] = vit.reshape(-1, width).to(embeds.device)
        embeds = embeds.reshape(batch, length, width)
    else:
        embeds = self.language_model.get_input_embeddings()(input_ids)
    return self.language_model.generate(
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        generation_config=generation_config,
        output_hidden_states=output_hidden_states,
        use_cache=True,
        **generate_kwargs,
    )


class ChatBase(PreTrainedModel):
    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _supports_flash_attn_2 = True
    _no_split_modules = ["InternVisionModel", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer"]

    def __init__(self, config, vision_model=None, language_model=None, use_flash_attn=True):
        super().__init__(config)
        size = config.force_image_size or config.vision_config.image_size
        self.patch_size = config.vision_config.patch_size
        self.select_layer = config.select_layer
        self.template = config.template
        self.num_image_token = int((size // self.patch_size) ** 2 * (config.downsample_ratio**2))
        self.downsample_ratio = config.downsample_ratio
        self.ps_version = config.ps_version
        self.vision_model = vision_model if vision_model is not None else InternVisionModel(config.vision_config)
        architecture = config.llm_config.architectures[0]
        if language_model is None:
            language_model = LANGUAGE_MODELS[architecture](config.llm_config)
        self.language_model = language_model
        width, hidden = config.vision_config.hidden_size, config.llm_config.hidden_size
        wide = width * int(1 / self.downsample_ratio) ** 2
        self.mlp1 = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.img_context_token_id = None
        self.conv_template = None
        self.system_message = "You are a tiny model."

    @property
    def lm_head(self):
        return self.language_model.get_output_embeddings()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def pixel_shuffle(self, x, scale_factor=0.5):
        tiles, rows, columns, width = x.size()
        x = x.view(tiles, rows, int(columns * scale_factor), int(width / scale_factor))
        x = x.permute(0, 2, 1, 3).contiguous()
        x = x.view(tiles, int(columns * scale_factor), int(rows * scale_factor), int(width / scale_factor**2))
        if self.ps_version == "v1":
            warnings.warn("ps_version 'v1' leaves the two grid axes swapped", stacklevel=2)
            return x
        return x.permute(0, 2, 1, 3).contiguous()

    def extract_feature(self, pixel_values):
        if self.select_layer == -1:
            vit = self.vision_model(pixel_values=pixel_values, output_hidden_states=False, return_dict=True)
            vit = vit.last_hidden_state
        else:
            vit = self.vision_model(pixel_values=pixel_values, output_hidden_states=True, return_dict=True)
            vit = vit.hidden_states[self.select_layer]
        vit = vit[:, 1:, :]
        side = int(vit.shape[1] ** 0.5)
        vit = vit.reshape(vit.shape[0], side, side, -1)
        vit = self.pixel_shuffle(vit, scale_factor=self.downsample_ratio)
        vit = vit.reshape(vit.shape[0], -1, vit.shape[-1])
        return self.mlp1(vit)

    def _spare_rows(self, embeds, selected, rows):
        """What forward does after the counts did not match; returns whether the loss is to be zeroed."""
        raise NotImplementedError

    def _finish(self, embeds, zero_loss, labels, loss_weight, loss_reduction_all_gather, return_dict, **arguments):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        outputs = self.language_model(inputs_embeds=embeds, return_dict=return_dict, **arguments)
        logits = outputs.logits
        loss = None
        if labels is not None:
            vocabulary = self.language_model.config.vocab_size
            shifted = logits[..., :-1, :].contiguous().view(-1, vocabulary)
            targets = labels[..., 1:].contiguous().view(-1).to(shifted.device)
            if loss_weight is not None:
                weights = torch.tensor(loss_weight, dtype=torch.float32, device=labels.device)
                weights = weights[..., 1:].contiguous().view(-1).to(shifted.device)
                total = weights.sum()
                if loss_reduction_all_gather:
                    torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.AVG)
                loss = (F.cross_entropy(shifted, targets, reduction="none") * weights).sum() / total
            else:
                loss = F.cross_entropy(shifted, targets)
            if zero_loss:
                loss = loss * 0.0
        if not return_dict:
            return (loss, logits, *outputs[1:]) if loss is not None else (logits, *outputs[1:])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _query(self, tokenizer, question, tiles):
        image = "<img>" + "<IMG_CONTEXT>" * (self.num_image_token * tiles) + "</img>"
        question = question if "<image>" in question or not tiles else "<image>\n" + question
        return f"<|im_start|>user\n{question.replace('<image>', image, 1)}<|im_end|>\n<|im_start|>assistant\n"

    def chat(self, tokenizer, pixel_values, question, generation_config, **kwargs):
        """One question about one image; upstream's further arguments are left out."""
        self.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        tiles = 0 if pixel_values is None else len(pixel_values)
        batch = tokenizer(self._query(tokenizer, question, tiles), return_tensors="pt")
        out = self.generate(
            pixel_values=pixel_values,
            input_ids=batch["input_ids"].to(self.device),
            attention_mask=batch["attention_mask"].to(self.device),
            **generation_config,
        )
        return tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip()
