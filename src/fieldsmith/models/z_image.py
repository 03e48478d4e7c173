"""Z-Image, from words, over diffusers' ZImagePipeline and its own parts.

States are latents (batch, channels, height, width). Its network's time runs from noise at 0 to data at 1 and it says
the negative velocity; here both are turned. Prompts have as many rows of embeddings as tokens, with a mask. Guidance w
is the convention of all families, v_uncond + w (v_cond - v_uncond): the pipeline's own `guidance_scale` is w - 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fieldsmith.models.core import Condition, stack
from fieldsmith.models.export import SAME_NAMES, Rules
from fieldsmith.models.prompted import Prompted
from fieldsmith.models.qwen_image import masked
from fieldsmith.models.schedulers import check_flow, dynamic_shift, flow_times
from fieldsmith.paths import Kind, RectifiedFlow

NAMES: Rules = (
    (r"(.*\.attention)\.to_[qkv]", r"\1.qkv"),
    (r"(.*\.attention)\.to_out\.0", r"\1.out"),
    (r"all_(x_embedder|final_layer)\.2-1(.*)", r"\1\2"),
    *SAME_NAMES,
)


class ZImage(Prompted):
    family = "z-image"
    SUBSETS: ClassVar[dict[str, str]] = {
        "attention": r".*\.attention\.(to_q|to_k|to_v|to_out\.0)",
        "attention-kv": r".*\.attention\.(to_k|to_v)",
        "qk": r".*\.attention\.(to_q|to_k)",
        "text-inputs": r"cap_embedder\.1",
        "all-linear": r".*",
    }
    ORIGINAL_NAMES = NAMES
    ERASE_SUBSET = "qk"
    TEMPLATE = 3  # <|im_start|>, user, line end
    path = RectifiedFlow()
    kind: Kind = "velocity"

    def __init__(self, pipeline: Any, name: str, resolution: int | None = None):
        native, multiple = min(512, pipeline.vae.config.sample_size), 2 * pipeline.vae_scale_factor
        super().__init__(pipeline, name, resolution, native, multiple)
        check_flow(pipeline.scheduler, name)
        self.side = self.resolution // pipeline.vae_scale_factor
        self.text_length = min(512, pipeline.tokenizer.model_max_length)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.network.config.in_channels, self.side, self.side

    def grid(self, steps: int) -> Tensor:
        """The pipeline's own times for `steps` Euler steps, from 1 down to 0; (steps + 1,)."""
        scheduler = self.pipeline.scheduler
        return flow_times(scheduler, steps, dynamic_shift(scheduler.config, self.side**2 // 4)).to(self.device)

    def _encode(self, prompts: list[str]) -> Condition:
        """One row a prompt, as long as the longest."""
        rows, _ = self.pipeline.encode_prompt(
            prompts, self.device, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return stack([masked(row[None], None) for row in rows])

    def dummy_condition(self) -> Condition:
        """As long as a prompt may be."""
        return masked(torch.zeros(1, self.text_length, self.network.config.cap_feat_dim), None)

    def _forward(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
        dtype = self.dtype  # states stay in theirs: a bf16 network under exact float32 steps
        lengths = condition.parts["mask"].sum(1).tolist()
        words = [row[:length] for row, length in zip(condition.parts["embeds"].to(dtype), lengths, strict=True)]
        frames = list(x_t.to(dtype).unsqueeze(2).unbind())  # one frame each
        time = (1000 - 1000 * t) / 1000  # rounded as the pipeline's, whose network reads it in thousandths
        output = self.network(frames, time, words, return_dict=False)[0]
        return -torch.stack(output).squeeze(2).to(x_t.dtype)
