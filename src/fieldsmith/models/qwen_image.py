"""Qwen-Image over diffusers' QwenImagePipeline and its own parts.

States are packed latents (batch, tokens, 4 * latent channels). Prompts have as many rows of embeddings as tokens, with
a mask; guidance gives each token's velocity the norm that it has under the prompt.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from torch import Tensor

from fieldsmith.models.core import Condition
from fieldsmith.models.export import SAME_NAMES
from fieldsmith.models.prompted import DUAL_STREAM_SUBSETS, Prompted
from fieldsmith.models.schedulers import check_flow, dynamic_shift, flow_times
from fieldsmith.models.sources import shared, tokens_of
from fieldsmith.paths import Kind, RectifiedFlow, guide


class QwenImage(Prompted):
    family = "qwen-image"
    SUBSETS: ClassVar[dict[str, str]] = {**DUAL_STREAM_SUBSETS, "text-inputs": r"txt_in"}
    ORIGINAL_NAMES = SAME_NAMES
    ERASE_SUBSET = "qk_dual"
    # in the last block, what only makes new text tokens, which nothing reads
    UNREAD = r"transformer_blocks\.LAST\.(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp)\b.*"
    path = RectifiedFlow()
    kind: Kind = "velocity"
    text_length = 512  # the pipeline's own limit

    def __init__(self, pipeline: Any, name: str, resolution: int | None = None):
        # no part of the pipeline names its resolution
        super().__init__(pipeline, name, resolution, 512, 2 * pipeline.vae_scale_factor)
        check_flow(pipeline.scheduler, name)
        self.side = self.resolution // self.multiple
        self.tokens = self.side**2

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.tokens, self.network.config.in_channels

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        channels, size = self.network.config.in_channels // 4, 2 * self.side
        return _packed(torch.randn(n, channels, 1, size, size, generator=generator)).to(self.device)

    def grid(self, steps: int) -> Tensor:
        """The pipeline's own times for `steps` Euler steps: shifted, stretched, from 1 down to 0; (steps + 1,)."""
        scheduler = self.pipeline.scheduler
        return flow_times(scheduler, steps, dynamic_shift(scheduler.config, self.tokens)).to(self.device)

    def _encode(self, prompts: list[str]) -> Condition:
        """One row a prompt, as long as the longest."""
        return masked(*self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self.text_length))

    def dummy_condition(self) -> Condition:
        """As long as a prompt may be."""
        return masked(torch.zeros(1, self.text_length, self.network.config.joint_attention_dim), None)

    def _guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        guided = guide(conditional, unconditional, scale)
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def _forward(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
        dtype = self.dtype  # states stay in theirs: a bf16 network under exact float32 steps
        sizes, mask = [(1, self.side, self.side)], condition.parts["mask"]
        if "source" in condition.parts:
            sizes += [(1, height, width) for height, width in shared(condition.parts["source_size"]).tolist()]
        output: Tensor = self.network(
            hidden_states=tokens_of(x_t, condition).to(dtype),
            timestep=t.to(dtype),
            encoder_hidden_states=condition.parts["embeds"].to(dtype),
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[sizes] * len(x_t),
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]].to(x_t.dtype)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's latents, (1, channels, 1, 1, 1)."""
        config: Any = self.pipeline.vae.config
        mean, deviation = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        return mean.view(1, -1, 1, 1, 1).to(like), deviation.view(1, -1, 1, 1, 1).to(like)

    def _decode(self, latents: Tensor) -> Tensor:
        vae, size = self.pipeline.vae, self.resolution
        unpacked = QwenImagePipeline._unpack_latents(latents, size, size, self.pipeline.vae_scale_factor)
        mean, deviation = self._statistics(unpacked)
        frames: Tensor = vae.decode((unpacked * deviation + mean).to(vae.dtype), return_dict=False)[0]
        return (frames[:, :, 0] / 2 + 0.5).clamp(0, 1).to(latents.dtype)

    def _encode_images(self, images: Tensor) -> Tensor:
        vae: Any = self.pipeline.vae
        latents = vae.encode((images * 2 - 1).to(vae.dtype).unsqueeze(2)).latent_dist.mode()
        mean, deviation = self._statistics(latents)
        return _packed(((latents - mean) / deviation).contiguous())


def _packed(latents: Tensor) -> Tensor:
    """(n, channels, 1 frame, height, width) -> (n, tokens, 4 * channels)."""
    n, channels, _, height, width = latents.shape
    packed: Tensor = QwenImagePipeline._pack_latents(latents, n, channels, height, width)
    return packed


def masked(embeds: Tensor, mask: Tensor | None) -> Condition:
    """Embeddings (n, tokens, width) and which of them are words, (n, tokens) bool; no mask is all of them."""
    if mask is None:
        mask = torch.ones(embeds.shape[:2], device=embeds.device)
    return Condition({"embeds": embeds, "mask": mask.bool()})
