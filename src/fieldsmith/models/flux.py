"""Flux: FLUX.1 dev, schnell and our zoo, over diffusers' FluxPipeline and its own parts.

States are packed latents (batch, tokens, 4 * latent channels). `guidance` is the embedded scale where the transformer
was distilled with one (dev), classifier-free guidance against the empty prompt elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.core import Condition
from fieldsmith.models.prompted import Prompted
from fieldsmith.paths import Kind, RectifiedFlow
from fieldsmith.samplers import flow_grid


class Flux(Prompted):
    family = "flux"
    SUBSETS: ClassVar[dict[str, str]] = {
        "qk_dual": r"transformer_blocks\.\d+\.attn\.(to_q|to_k|add_q_proj|add_k_proj)",
        "add_qk": r"transformer_blocks\.\d+\.attn\.(add_q_proj|add_k_proj)",
        "attention": r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
        "attention-kv": r".*\.attn\.(to_k|to_v)",
        "text-inputs": r"context_embedder|time_text_embed\.text_embedder\.linear_1",
        "all-linear": r".*",
    }
    ERASE_SUBSET = "qk_dual"
    path = RectifiedFlow()
    kind: Kind = "velocity"

    def __init__(self, pipeline: Any, name: str, resolution: int | None = None):
        super().__init__(pipeline, pipeline.transformer, name)
        scale = 2 * pipeline.vae_scale_factor  # pixels per token side
        self.resolution = resolution or min(512, pipeline.vae.config.sample_size)
        if self.resolution % scale:
            raise InputError(f"resolution {self.resolution} is not a multiple of {scale} for {name}")
        side = self.resolution // scale
        self.tokens = side * side
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, self.device, torch.float32)
        self.text_length = min(512, pipeline.tokenizer_2.model_max_length)
        self.text_parts = ((pipeline.tokenizer_2, 0),)

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.tokens, self.network.config.in_channels

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of x_1, drawn as FluxPipeline draws them so that equal seeds give equal images."""
        side = int(self.tokens**0.5) * 2
        channels = self.network.config.in_channels // 4
        latents = torch.randn(n, channels, side, side, generator=generator)
        packed: Tensor = FluxPipeline._pack_latents(latents, n, channels, side, side).to(self.device)
        return packed

    def grid(self, steps: int) -> Tensor:
        """The pipeline's own times for `steps` Euler steps: shifted, from 1 down to 0; (steps + 1,)."""
        config = self.pipeline.scheduler.config
        mu = calculate_shift(
            self.tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5), config.get("max_shift", 1.15),
        )  # fmt: skip
        shift = float(np.exp(mu)) if config.use_dynamic_shifting else config.shift
        return flow_grid(steps, shift).to(self.device)

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
        """One row a prompt. Raises InputError at a word outside a closed vocabulary."""
        self._check_words(self.pipeline.tokenizer_2, prompts)
        with torch.set_grad_enabled(grad):
            embeds, pooled, _ = self.pipeline.encode_prompt(
                list(prompts), device=self.device, max_sequence_length=self.text_length
            )
        return Condition({"embeds": embeds, "pooled": pooled})

    def blank(self) -> Condition:
        shape, dtype = self.network.config, self.network.dtype
        embeds = torch.zeros(1, self.text_length, shape.joint_attention_dim, dtype=dtype)
        return Condition({"embeds": embeds, "pooled": torch.zeros(1, shape.pooled_projection_dim, dtype=dtype)})

    @property
    def embedded_guidance(self) -> bool:
        return bool(self.network.config.guidance_embeds)

    def _image_tokens(self, x_t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """What the network sees beside the text, x_t first: (batch, tokens, channels), and its ids (tokens, 3)."""
        return x_t, self.image_ids

    def _forward(self, x_t: Tensor, t: Tensor, condition: Condition, embedded: float) -> Tensor:
        dtype = self.dtype  # states stay in theirs: a bf16 network under exact float32 steps
        tokens, ids = self._image_tokens(x_t, condition)
        output: Tensor = self.network(
            hidden_states=tokens.to(dtype),
            timestep=t.to(dtype),
            guidance=torch.full_like(t, embedded) if self.embedded_guidance else None,
            pooled_projections=condition.parts["pooled"].to(dtype),
            encoder_hidden_states=condition.parts["embeds"].to(dtype),
            txt_ids=x_t.new_zeros(condition.parts["embeds"].shape[1], 3),
            img_ids=ids.to(x_t.device),
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]].to(x_t.dtype)

    def _decode(self, latents: Tensor) -> Tensor:
        vae: Any = self.pipeline.vae
        size = self.resolution
        unpacked = FluxPipeline._unpack_latents(latents, size, size, self.pipeline.vae_scale_factor)
        unpacked = unpacked / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(unpacked.to(vae.dtype), return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1).to(latents.dtype)

    def _encode_images(self, images: Tensor) -> Tensor:
        vae: Any = self.pipeline.vae
        latents = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
        return packed
