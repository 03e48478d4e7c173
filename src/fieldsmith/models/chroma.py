"""Chroma, FLUX.1 with its modulations pruned, over diffusers' ChromaPipeline and its own parts.

States are FLUX.1's. One small network makes the modulations of all blocks from the time alone; T5 is the only encoder,
guidance leads away from the empty prompt. The mask of a prompt is given on as the pipeline gives it: as numbers that
diffusers adds to the attention's logits, 1 for words and 0 for padding, so that prompts are padded to the full length.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fieldsmith.models.core import Condition
from fieldsmith.models.export import Rules
from fieldsmith.models.flux import NAMES, Flux
from fieldsmith.models.prompted import DUAL_STREAM_SUBSETS
from fieldsmith.models.schedulers import dynamic_shift, flow_times

MODULATIONS: Rules = (
    (r"distilled_guidance_layer\.(in_proj|out_proj)", r"\g<0>"),
    (r"distilled_guidance_layer\.layers\.(\d+)\.linear_1", r"distilled_guidance_layer.layers.\1.in_layer"),
    (r"distilled_guidance_layer\.layers\.(\d+)\.linear_2", r"distilled_guidance_layer.layers.\1.out_layer"),
)


class Chroma(Flux):
    family = "chroma"
    SUBSETS: ClassVar[dict[str, str]] = {**DUAL_STREAM_SUBSETS, "text-inputs": r"context_embedder"}
    ORIGINAL_NAMES = (*NAMES, *MODULATIONS)
    TOKENIZER = "tokenizer"
    embedded_guidance = False

    def grid(self, steps: int) -> Tensor:
        """The pipeline's own times for `steps` Euler steps, from 1 down to 0; (steps + 1,)."""
        scheduler = self.pipeline.scheduler  # Chroma1-HD's spaces its times by a beta distribution
        return flow_times(scheduler, steps, dynamic_shift(scheduler.config, self.tokens)).to(self.device)

    def _encode(self, prompts: list[str]) -> Condition:
        embeds, _, mask, *_ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return Condition({"embeds": embeds, "mask": mask})

    def dummy_condition(self) -> Condition:
        embeds = torch.zeros(1, self.text_length, self.network.config.joint_attention_dim, dtype=self.network.dtype)
        return Condition({"embeds": embeds, "mask": torch.ones_like(embeds[..., 0])})

    def _forward(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
        dtype = self.dtype  # states stay in theirs: a bf16 network under exact float32 steps
        embeds, mask = condition.parts["embeds"].to(dtype), condition.parts["mask"].to(dtype)
        output: Tensor = self.network(
            hidden_states=x_t.to(dtype),
            timestep=t.to(dtype),
            encoder_hidden_states=embeds,
            attention_mask=self.pipeline._prepare_attention_mask(len(x_t), self.tokens, dtype, mask),
            txt_ids=x_t.new_zeros(embeds.shape[1], 3),
            img_ids=self.image_ids.to(x_t.device),
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)
