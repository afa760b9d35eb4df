"""Shapes of the released InternVL3, InternVL3.5 and InternVL3.5-Flash models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one released model.

    Attributes:
        vision: hidden size C of the vision transformer (1024: InternViT-300M, 3200: InternViT-6B).
        hidden: hidden size H of the language model.
        layers, q_heads, kv_heads, head_dim: of the language model.
        intermediate: width of the MLP, or of one expert.
        family: "qwen2", "qwen3", "qwen3_moe", "gpt_oss" or "internlm3".
        experts, top_k: 0 for dense models.
        rope_theta: base of the rotary embedding.
        flash: a Flash checkpoint exists, with its router and second projector.
    """

    vision: int
    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    family: str
    experts: int = 0
    top_k: int = 0
    rope_theta: float = 1e6
    flash: bool = False

    @property
    def qk_norm(self) -> bool:
        return self.family in ("qwen3", "qwen3_moe")

    def projector(self, ratio: int) -> tuple[int, ...]:
        """Widths of the projector at merge factor `ratio` (2: 256 tokens a tile, 4: 64): input, hidden..., output."""
        inside = (self.hidden,) if ratio == 2 else (2 * self.hidden, 2 * self.hidden)
        return (self.vision * ratio * ratio, *inside, self.hidden)


MODELS = {
    "InternVL3-1B": ModelShape(1024, 896, 24, 14, 2, 64, 4864, "qwen2"),
    "InternVL3-2B": ModelShape(1024, 1536, 28, 12, 2, 128, 8960, "qwen2"),
    "InternVL3-8B": ModelShape(1024, 3584, 28, 28, 4, 128, 18944, "qwen2"),
    "InternVL3-9B": ModelShape(1024, 4096, 48, 32, 2, 128, 10240, "internlm3", rope_theta=5e7),
    "InternVL3-14B": ModelShape(1024, 5120, 48, 40, 8, 128, 13824, "qwen2"),
    "InternVL3-38B": ModelShape(3200, 5120, 64, 40, 8, 128, 27648, "qwen2"),
    "InternVL3-78B": ModelShape(3200, 8192, 80, 64, 8, 128, 29568, "qwen2"),
    "InternVL3.5-1B": ModelShape(1024, 1024, 28, 16, 8, 128, 3072, "qwen3", flash=True),
    "InternVL3.5-2B": ModelShape(1024, 2048, 28, 16, 8, 128, 6144, "qwen3", flash=True),
    "InternVL3.5-4B": ModelShape(1024, 2560, 36, 32, 8, 128, 9728, "qwen3", flash=True),
    "InternVL3.5-8B": ModelShape(1024, 4096, 36, 32, 8, 128, 12288, "qwen3", flash=True),
    "InternVL3.5-14B": ModelShape(1024, 5120, 40, 40, 8, 128, 17408, "qwen3", flash=True),
    "InternVL3.5-38B": ModelShape(3200, 5120, 64, 64, 8, 128, 25600, "qwen3", flash=True),
    "InternVL3.5-30B-A3B": ModelShape(1024, 2048, 48, 32, 4, 128, 768, "qwen3_moe", 128, 8, flash=True),
    "InternVL3.5-241B-A28B": ModelShape(3200, 4096, 94, 64, 4, 128, 1536, "qwen3_moe", 128, 8, flash=True),
    "InternVL3.5-GPT-OSS-20B-A4B": ModelShape(1024, 2880, 24, 64, 8, 64, 2880, "gpt_oss", 32, 4, rope_theta=1.5e5),
}
