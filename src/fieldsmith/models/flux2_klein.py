"""FLUX.2 klein, from words and from source images, over diffusers' Flux2KleinPipeline and its own parts.

States are packed latents (batch, tokens, 4 * latent channels), normalised by the autoencoder's batch statistics. A
step-distilled klein takes no guidance at all: the scale is passed over, as its pipeline passes it over. The pipeline
itself takes the same source images for all its prompts, and sides from 64 pixels on.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from fieldsmith.models.core import Condition
from fieldsmith.models.export import Rules
from fieldsmith.models.flux import STREAMS
from fieldsmith.models.prompted import DUAL_STREAM_SUBSETS
from fieldsmith.models.schedulers import check_flow, flow_times
from fieldsmith.models.sources import Editor, Size, shared, tokens_of
from fieldsmith.paths import Kind, RectifiedFlow

NAMES: Rules = (
    *STREAMS,
    (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    (r"(double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation)\.linear", r"\1.lin"),
    (r"time_guidance_embed\.timestep_embedder\.linear_1", r"time_in.in_layer"),
    (r"time_guidance_embed\.timestep_embedder\.linear_2", r"time_in.out_layer"),
    (r"time_guidance_embed\.guidance_embedder\.linear_1", r"guidance_in.in_layer"),
    (r"time_guidance_embed\.guidance_embedder\.linear_2", r"guidance_in.out_layer"),
)


class Flux2Klein(Editor):
    family = "flux2-klein"
    SUBSETS: ClassVar[dict[str, str]] = {
        **DUAL_STREAM_SUBSETS,
        # single blocks have one layer into, and one out of, both attention and feed-forward
        "attention": rf"{DUAL_STREAM_SUBSETS['attention']}|.*\.attn\.(to_qkv_mlp_proj|to_out)",
        "text-inputs": r"context_embedder",
    }
    ORIGINAL_NAMES = NAMES
    ERASE_SUBSET = "qk_dual"
    TEMPLATE = 3  # <|im_start|>, user, line end
    LARGEST = 1024 * 1024  # the pipeline shrinks larger ones
    path = RectifiedFlow()
    kind: Kind = "velocity"

    def __init__(self, pipeline: Any, name: str, resolution: int | None = None):
        native, multiple = min(512, pipeline.vae.config.sample_size), 2 * pipeline.vae_scale_factor
        super().__init__(pipeline, name, resolution, native, multiple)
        check_flow(pipeline.scheduler, name)
        self.side = self.resolution // multiple
        self.tokens = self.side**2
        self.image_ids = pipeline._prepare_latent_ids(torch.zeros(1, 1, self.side, self.side))[0].to(self.device)
        self.text_length = min(512, self._tokenizer().model_max_length)

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.tokens, self.network.config.in_channels

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        latents = torch.randn(n, self.network.config.in_channels, self.side, self.side, generator=generator)
        packed: Tensor = self.pipeline._pack_latents(latents).to(self.device)
        return packed

    def grid(self, steps: int) -> Tensor:
        """The pipeline's own times for `steps` Euler steps: shifted by tokens and steps, from 1 to 0; (steps + 1,)."""
        mu = compute_empirical_mu(self.tokens, steps)
        return flow_times(self.pipeline.scheduler, steps, mu).to(self.device)

    def _encode(self, prompts: list[str]) -> Condition:
        embeds, _ = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self.text_length)
        return Condition({"embeds": embeds})

    def dummy_condition(self) -> Condition:
        return Condition({"embeds": torch.zeros(1, self.text_length, self.network.config.joint_attention_dim)})

    @property
    def embedded_guidance(self) -> bool:
        return bool(self.pipeline.config.is_distilled)

    def _places(self, sizes: list[Size]) -> dict[str, Tensor]:
        """Gives "source_ids" (1, source tokens, 4)."""
        grids = [torch.zeros(1, 1, *size) for size in sizes]
        return {"source_ids": self.pipeline._prepare_image_ids(grids).to(self.device)}

    def _scale(self, t: Tensor, guidance: float) -> Tensor | None:
        """What the network is told of the guidance scale, (batch,)."""
        return None

    def _forward(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
        dtype = self.dtype  # states stay in theirs: a bf16 network under exact float32 steps
        ids, embeds = self.image_ids, condition.parts["embeds"]
        if "source" in condition.parts:
            ids = torch.cat((ids, shared(condition.parts["source_ids"])))
        output: Tensor = self.network(
            hidden_states=tokens_of(x_t, condition).to(dtype),
            timestep=t.to(dtype),
            guidance=self._scale(t, guidance),
            encoder_hidden_states=embeds.to(dtype),
            txt_ids=self.pipeline._prepare_text_ids(embeds[:1])[0].to(x_t.device),
            img_ids=ids.to(x_t.device),
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]].to(x_t.dtype)

    def _decode(self, latents: Tensor) -> Tensor:
        vae: Any = self.pipeline.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
        deviation = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt().to(latents)
        unpacked = latents.mT.unflatten(2, (self.side, self.side))
        patches = self.pipeline._unpatchify_latents(unpacked * deviation + mean)
        images: Tensor = vae.decode(patches.to(vae.dtype), return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1).to(latents.dtype)

    def _encode_images(self, images: Tensor) -> Tensor:
        pixels = (images * 2 - 1).to(self.pipeline.vae.dtype)
        latents = self.pipeline._encode_vae_image(pixels, generator=None)
        packed: Tensor = self.pipeline._pack_latents(latents)
        return packed
