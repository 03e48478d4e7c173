"""Flux: FLUX.1 dev, schnell and our zoo, over diffusers' FluxPipeline and its own parts.

States are packed latents (batch, tokens, 4 * latent channels). `guidance` is the embedded scale where the transformer
was distilled with one (dev), classifier-free guidance against the empty prompt elsewhere.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.autoencoder import decoded, encoded
from fieldsmith.models.core import Condition
from fieldsmith.models.export import Rules
from fieldsmith.models.prompted import DUAL_STREAM_SUBSETS, Prompted
from fieldsmith.models.schedulers import check_flow, dynamic_shift, euler_of
from fieldsmith.models.sources import shared, tokens_of
from fieldsmith.paths import Kind, RectifiedFlow
from fieldsmith.samplers import flow_grid

# a checkpoint's own names of layers, which kohya and ComfyUI use; FLUX.2 shares these
STREAMS: Rules = (
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"double_blocks.\1.img_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"x_embedder", r"img_in"),
    (r"context_embedder", r"txt_in"),
    (r"norm_out\.linear", r"final_layer.adaLN_modulation.1"),
    (r"proj_out", r"final_layer.linear"),
)
NAMES: Rules = (
    *STREAMS,
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (r"single_transformer_blocks\.(\d+)\.(?:attn\.to_[qkv]|proj_mlp)", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    (r"time_text_embed\.timestep_embedder\.linear_1", r"time_in.in_layer"),
    (r"time_text_embed\.timestep_embedder\.linear_2", r"time_in.out_layer"),
    (r"time_text_embed\.text_embedder\.linear_1", r"vector_in.in_layer"),
    (r"time_text_embed\.text_embedder\.linear_2", r"vector_in.out_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_1", r"guidance_in.in_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_2", r"guidance_in.out_layer"),
)


class Flux(Prompted):
    family = "flux"
    SUBSETS: ClassVar[dict[str, str]] = {
        **DUAL_STREAM_SUBSETS,
        "text-inputs": r"context_embedder|time_text_embed\.text_embedder\.linear_1",
    }
    ORIGINAL_NAMES = NAMES
    ERASE_SUBSET = "qk_dual"
    TOKENIZER = "tokenizer_2"
    path = RectifiedFlow()
    kind: Kind = "velocity"

    def __init__(self, pipeline: Any, name: str, resolution: int | None = None):
        native, multiple = min(512, pipeline.vae.config.sample_size), 2 * pipeline.vae_scale_factor
        super().__init__(pipeline, name, resolution, native, multiple)
        check_flow(pipeline.scheduler, name)
        shape = pipeline.transformer.config
        if sum(shape.axes_dims_rope) != shape.attention_head_dim:
            raise InputError(
                f"axes_dims_rope = {list(shape.axes_dims_rope)} in the transformer's config of {name} must sum to "
                f"attention_head_dim, {shape.attention_head_dim}; save the pipeline again"
            )
        side = self.resolution // multiple
        self.tokens = side * side
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, self.device, torch.float32)
        tokenizer = self._tokenizer()
        self.text_length = min(512, tokenizer.model_max_length)
        self.text_parts = ((tokenizer, 0),)

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.tokens, self.network.config.in_channels

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        side, channels = 2 * math.isqrt(self.tokens), self.network.config.in_channels // 4
        latents = torch.randn(n, channels, side, side, generator=generator)
        packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape).to(self.device)
        return packed

    def grid(self, steps: int) -> Tensor:
        """The pipeline's own times for `steps` Euler steps: shifted, from 1 down to 0; (steps + 1,)."""
        config = euler_of(self.pipeline.scheduler).config
        shift = math.exp(dynamic_shift(config, self.tokens)) if config.use_dynamic_shifting else config.shift
        return flow_grid(steps, shift).to(self.device)

    def _encode(self, prompts: list[str]) -> Condition:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.text_length
        )
        return Condition({"embeds": embeds, "pooled": pooled})

    def dummy_condition(self) -> Condition:
        shape, dtype = self.network.config, self.network.dtype
        embeds = torch.zeros(1, self.text_length, shape.joint_attention_dim, dtype=dtype)
        return Condition({"embeds": embeds, "pooled": torch.zeros(1, shape.pooled_projection_dim, dtype=dtype)})

    @property
    def embedded_guidance(self) -> bool:
        return bool(self.network.config.guidance_embeds)

    def _forward(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
        dtype = self.dtype  # states stay in theirs: a bf16 network under exact float32 steps
        ids = self.image_ids
        if "source" in condition.parts:
            places = shared(condition.parts["source_ids"])
            ids = torch.cat((ids.to(places), places))
        output: Tensor = self.network(
            hidden_states=tokens_of(x_t, condition).to(dtype),
            timestep=t.to(dtype),
            guidance=torch.full_like(t, guidance) if self.embedded_guidance else None,
            pooled_projections=condition.parts["pooled"].to(dtype),
            encoder_hidden_states=condition.parts["embeds"].to(dtype),
            txt_ids=x_t.new_zeros(condition.parts["embeds"].shape[1], 3),
            img_ids=ids.to(x_t.device),
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]].to(x_t.dtype)

    def _decode(self, latents: Tensor) -> Tensor:
        size = self.resolution
        return decoded(
            self.pipeline.vae, FluxPipeline._unpack_latents(latents, size, size, self.pipeline.vae_scale_factor)
        )

    def _encode_images(self, images: Tensor) -> Tensor:
        latents = encoded(self.pipeline.vae, images)
        packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
        return packed
