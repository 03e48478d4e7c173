"""Qwen-Image over diffusers' QwenImagePipeline and its own parts.

States are packed latents (batch, tokens, 4 * latent channels). Prompts have as many rows of embeddings as tokens, with
a mask; guidance gives each token's velocity the norm that it has under the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline, calculate_shift
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.core import Condition
from fieldsmith.models.prompted import Prompted, flow_times
from fieldsmith.models.sources import shared
from fieldsmith.paths import Kind, RectifiedFlow, guide


class QwenImage(Prompted):
    family = "qwen-image"
    SUBSETS: ClassVar[dict[str, str]] = {
        "qk_dual": r"transformer_blocks\.\d+\.attn\.(to_q|to_k|add_q_proj|add_k_proj)",
        "add_qk": r"transformer_blocks\.\d+\.attn\.(add_q_proj|add_k_proj)",
        "attention": r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
        "attention-kv": r".*\.attn\.(to_k|to_v)",
        "text-inputs": r"txt_in",
        "all-linear": r".*",
    }
    path = RectifiedFlow()
    kind: Kind = "velocity"

    def __init__(self, pipeline: Any, name: str, resolution: int | None = None):
        super().__init__(pipeline, pipeline.transformer, name)
        self.multiple = 2 * pipeline.vae_scale_factor  # pixels per token side
        self.resolution = resolution or 512  # no part of the pipeline says
        if self.resolution % self.multiple:
            raise InputError(f"resolution {self.resolution} is not a multiple of {self.multiple} for {name}")
        self.side = self.resolution // self.multiple
        self.tokens = self.side**2
        self.text_length = 512  # the pipeline's own limit

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.tokens, self.network.config.in_channels

    def _unread(self, name: str) -> bool:
        """In the last block, what only makes new words."""
        last = self.network.config.num_layers - 1
        pattern = rf"transformer_blocks\.{last}\.(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp)\b.*"
        return re.fullmatch(pattern, name) is not None

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of x_1, drawn as QwenImagePipeline draws them so that equal seeds give equal images."""
        channels, size = self.network.config.in_channels // 4, 2 * self.side
        latents = torch.randn(n, 1, channels, size, size, generator=generator)
        packed: Tensor = QwenImagePipeline._pack_latents(latents, n, channels, size, size).to(self.device)
        return packed

    def grid(self, steps: int) -> Tensor:
        """The pipeline's own times for `steps` Euler steps: shifted, stretched, from 1 down to 0; (steps + 1,)."""
        config = self.pipeline.scheduler.config
        mu = calculate_shift(
            self.tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5), config.get("max_shift", 1.15),
        )  # fmt: skip
        return flow_times(self.pipeline.scheduler, steps, mu).to(self.device)

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
        """One row a prompt, as long as the longest. Raises InputError at a word outside a closed vocabulary."""
        self._check_words(self.pipeline.tokenizer, prompts)
        with torch.set_grad_enabled(grad):
            embeds, mask = self.pipeline.encode_prompt(
                list(prompts), device=self.device, max_sequence_length=self.text_length
            )
        return masked(embeds, mask)

    def blank(self) -> Condition:
        """As long as a prompt may be."""
        return masked(torch.zeros(1, self.text_length, self.network.config.joint_attention_dim), None)

    def _guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        guided = guide(conditional, unconditional, scale)
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def _forward(self, x_t: Tensor, t: Tensor, condition: Condition, embedded: float) -> Tensor:
        dtype = self.dtype  # states stay in theirs: a bf16 network under exact float32 steps
        tokens, sizes, mask = x_t, [(1, self.side, self.side)], condition.parts["mask"]
        if "source" in condition.parts:
            tokens = torch.cat((x_t, condition.parts["source"].to(x_t)), dim=1)
            sizes += [(1, height, width) for height, width in shared(condition.parts["source_size"]).tolist()]
        output: Tensor = self.network(
            hidden_states=tokens.to(dtype),
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
        film: Tensor = vae.decode((unpacked * deviation + mean).to(vae.dtype), return_dict=False)[0]
        return (film[:, :, 0] / 2 + 0.5).clamp(0, 1).to(latents.dtype)

    def _encode_images(self, images: Tensor) -> Tensor:
        vae: Any = self.pipeline.vae
        film = (images * 2 - 1).to(vae.dtype).unsqueeze(2)
        latents = vae.encode(film).latent_dist.mode()
        mean, deviation = self._statistics(latents)
        n, channels, _, height, width = latents.shape
        packed: Tensor = QwenImagePipeline._pack_latents(
            ((latents - mean) / deviation).contiguous(), n, channels, height, width
        )
        return packed


def masked(embeds: Tensor, mask: Tensor | None) -> Condition:
    """Embeddings (n, tokens, width) and which of them are words, (n, tokens) bool; no mask is all of them."""
    if mask is None:
        mask = torch.ones(embeds.shape[:2], device=embeds.device)
    return Condition({"embeds": embeds, "mask": mask.bool()})
