"""Stand-in of the InternViT of remote-code checkpoints: same module names and arithmetic, naive attention."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

from .configuration import InternVisionConfig


class InternRMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(x.dtype)


NORMS = {"rms_norm": InternRMSNorm, "layer_norm": nn.LayerNorm}


class InternVisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.num_patches = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Parameter(torch.randn(1, self.num_patches + 1, config.hidden_size))

    def forward(self, pixel_values):
        dtype = self.patch_embedding.weight.dtype
        patches = self.patch_embedding(pixel_values)
        height, width = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1).to(dtype), patches], dim=1)
        side = int(self.num_patches**0.5)
        grid = self.position_embedding[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        grid = grid.reshape(1, -1, height * width).permute(0, 2, 1).to(dtype)
        return x + torch.cat([self.position_embedding[:, :1], grid], dim=1).to(dtype)


class InternAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (width // self.num_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.qk_normalization = config.qk_normalization
        if self.qk_normalization:
            self.q_norm = InternRMSNorm(width, config.layer_norm_eps)
            self.k_norm = InternRMSNorm(width, config.layer_norm_eps)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.qk_normalization:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class InternMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Drops a whole sample's branch in training, as timm's."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.empty(len(x), 1, 1, dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class InternVisionEncoderLayer(nn.Module):
    def __init__(self, config, drop_path):
        super().__init__()
        width, norm = config.hidden_size, NORMS[config.norm_type]
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = norm(width, eps=config.layer_norm_eps)
        self.norm2 = norm(width, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(width))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(width))
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x):
        x = x + self.drop_path1(self.attn(self.norm1(x).to(x.dtype)) * self.ls1)
        return x + self.drop_path2(self.mlp(self.norm2(x).to(x.dtype)) * self.ls2)


class InternVisionEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.layers = nn.ModuleList([InternVisionEncoderLayer(config, rate) for rate in rates])
        self.gradient_checkpointing = True

    def forward(self, inputs_embeds, output_hidden_states=None, return_dict=None):
        states = () if output_hidden_states else None
        x = inputs_embeds
        for layer in self.layers:
            if output_hidden_states:
                states = (*states, x)
            x = checkpoint(layer, x, use_reentrant=True) if self.gradient_checkpointing and self.training else layer(x)
        if output_hidden_states:
            states = (*states, x)
        return BaseModelOutput(last_hidden_state=x, hidden_states=states)


class InternVisionModel(PreTrainedModel):
    main_input_name = "pixel_values"
    config_class = InternVisionConfig
    _no_split_modules = ["InternVisionEncoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, pixel_values=None, output_hidden_states=None, return_dict=None, pixel_embeds=None):
        if pixel_values is None and pixel_embeds is None:
            raise ValueError("pixel_values or pixel_embeds is needed")
        x = pixel_embeds if pixel_embeds is not None else self.embeddings(pixel_values)
        outputs = self.encoder(x, output_hidden_states=output_hidden_states, return_dict=True)
        last = outputs.last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=last[:, 0, :], hidden_states=outputs.hidden_states
        )
