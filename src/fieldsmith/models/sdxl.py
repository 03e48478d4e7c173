"""SDXL: Stable Diffusion XL, over diffusers' StableDiffusionXLPipeline and its own parts.

As sd15.py, with two text encoders side by side, the second one's pooled prompt, and an image's size and crop as numbers
that the network is told: here the size that is drawn, uncropped. Where the pipeline says so, as SDXL's does, guidance
leads away from zeros and not from the empty prompt. The refiner, which has one encoder, is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.core import Condition
from fieldsmith.models.export import Rules
from fieldsmith.models.schedulers import network_index
from fieldsmith.models.sd15 import SD15

_INNER = (
    ("resnets", r"\.conv1", ".0.in_layers.2"), ("resnets", r"\.conv2", ".0.out_layers.3"),
    ("resnets", r"\.time_emb_proj", ".0.emb_layers.1"), ("resnets", r"\.conv_shortcut", ".0.skip_connection"),
    ("attentions", r"(\..*)", r".1\1"),
)  # fmt: skip
# its release's own names, which sd-scripts and ComfyUI have: three levels of two layers down and three up
NAMES: Rules = (
    *((rf"down_blocks\.{level}\.{kind}\.{i}{layer}", f"input_blocks.{1 + 3 * level + i}{name}")
      for level in range(3) for i in range(2) for kind, layer, name in _INNER),
    *((rf"down_blocks\.{level}\.downsamplers\.0\.conv", f"input_blocks.{3 + 3 * level}.0.op") for level in range(2)),
    *((rf"up_blocks\.{level}\.{kind}\.{i}{layer}", f"output_blocks.{3 * level + i}{name}")
      for level in range(3) for i in range(3) for kind, layer, name in _INNER),
    *((rf"up_blocks\.{level}\.upsamplers\.0\.conv", f"output_blocks.{3 * level + 2}.2.conv") for level in range(2)),
    *((rf"mid_block\.resnets\.{i}{layer}", f"middle_block.{2 * i}{name[2:]}")
      for i in range(2) for kind, layer, name in _INNER if kind == "resnets"),
    (r"mid_block\.attentions\.0\.(.*)", r"middle_block.1.\1"),
    (r"time_embedding\.linear_1", "time_embed.0"),
    (r"time_embedding\.linear_2", "time_embed.2"),
    (r"add_embedding\.linear_1", "label_emb.0.0"),
    (r"add_embedding\.linear_2", "label_emb.0.2"),
    (r"conv_in", "input_blocks.0.0"),
    (r"conv_out", "out.2"),
)  # fmt: skip


class SDXL(SD15):
    family = "sdxl"
    ORIGINAL_NAMES = NAMES

    def __init__(self, pipeline: Any, name: str, resolution: int | None = None):
        if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
            raise InputError(f"{name} lacks one of SDXL's two text encoders, as its refiner does; load the base model")
        super().__init__(pipeline, name, resolution)

    def _encode(self, prompts: list[str]) -> Condition:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Condition({"embeds": embeds, "pooled": pooled})

    @property
    def null(self) -> Condition:
        if self._null is None and not self.negative and self.pipeline.config.force_zeros_for_empty_prompt:
            self._null = Condition({name: torch.zeros_like(part) for name, part in self.encode([""]).parts.items()})
        return super().null

    def dummy_condition(self) -> Condition:
        pooled = torch.zeros(1, self.pipeline.text_encoder_2.config.projection_dim)
        return Condition({**super().dummy_condition().parts, "pooled": pooled})

    def _forward(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
        dtype, side = self.dtype, self.resolution
        # height and width of the image, top and left of its crop, height and width of what is drawn
        size = torch.tensor([side, side, 0, 0, side, side], dtype=dtype, device=x_t.device).expand(len(x_t), -1)
        output: Tensor = self.network(
            x_t.to(dtype),
            network_index(self.path, t),
            encoder_hidden_states=condition.parts["embeds"].to(dtype),
            added_cond_kwargs={"text_embeds": condition.parts["pooled"].to(dtype), "time_ids": size},
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)
