"""FLUX.2 klein, from words and from source images, over diffusers' Flux2KleinPipeline and its own parts.

States are packed latents (batch, tokens, 4 * latent channels), normalised by the autoencoder's batch statistics. A
step-distilled klein takes no guidance at all: the scale is passed over, as its pipeline passes it over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.core import Condition
from fieldsmith.models.parts import by_rows
from fieldsmith.models.prompted import Prompted, flow_times
from fieldsmith.models.sources import check_images, check_latents, check_rows, joined, several, shared
from fieldsmith.paths import Kind, RectifiedFlow

LARGEST = 1024 * 1024  # pixels of a source; the pipeline shrinks larger ones


class Flux2Klein(Prompted):
    family = "flux2-klein"
    SUBSETS: ClassVar[dict[str, str]] = {
        "qk_dual": r"transformer_blocks\.\d+\.attn\.(to_q|to_k|add_q_proj|add_k_proj)",
        "add_qk": r"transformer_blocks\.\d+\.attn\.(add_q_proj|add_k_proj)",
        # single blocks have one layer into, and one out of, both attention and feed-forward
        "attention": r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out"
        r"|to_qkv_mlp_proj|to_out)",
        "attention-kv": r"transformer_blocks\.\d+\.attn\.(to_k|to_v)",
        "text-inputs": r"context_embedder",
        "all-linear": r".*",
    }
    path = RectifiedFlow()
    kind: Kind = "velocity"

    def __init__(self, pipeline: Any, name: str, resolution: int | None = None):
        super().__init__(pipeline, pipeline.transformer, name)
        self.multiple = 2 * pipeline.vae_scale_factor  # pixels per token side
        self.resolution = resolution or min(512, pipeline.vae.config.sample_size)
        if self.resolution % self.multiple:
            raise InputError(f"resolution {self.resolution} is not a multiple of {self.multiple} for {name}")
        self.side = self.resolution // self.multiple
        self.tokens = self.side**2
        self.image_ids = pipeline._prepare_latent_ids(torch.zeros(1, 1, self.side, self.side))[0].to(self.device)
        self.text_length = min(512, pipeline.tokenizer.model_max_length)

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.tokens, self.network.config.in_channels

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of x_1, drawn as Flux2KleinPipeline draws them so that equal seeds give equal images."""
        latents = torch.randn(n, self.network.config.in_channels, self.side, self.side, generator=generator)
        packed: Tensor = self.pipeline._pack_latents(latents).to(self.device)
        return packed

    def grid(self, steps: int) -> Tensor:
        """The pipeline's own times for `steps` Euler steps: shifted by tokens and steps, from 1 to 0; (steps + 1,)."""
        mu = compute_empirical_mu(self.tokens, steps)
        return flow_times(self.pipeline.scheduler, steps, mu).to(self.device)

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
        """One row a prompt. Raises InputError at a word outside a closed vocabulary."""
        self._check_words(self.pipeline.tokenizer, prompts)
        with torch.set_grad_enabled(grad):
            embeds, _ = self.pipeline.encode_prompt(
                list(prompts), device=self.device, max_sequence_length=self.text_length
            )
        return Condition({"embeds": embeds})

    def blank(self) -> Condition:
        return Condition({"embeds": torch.zeros(1, self.text_length, self.network.config.joint_attention_dim)})

    @property
    def embedded_guidance(self) -> bool:
        return bool(self.pipeline.config.is_distilled)

    def with_images(self, condition: Condition, images: Tensor | Sequence[Tensor], grad: bool = False) -> Condition:
        """The condition with source images (n, 3, height, width) in [0, 1], or with several of them, one after another.

        Adds the parts "source" (n, source tokens, channels), the packed latents, and "source_ids" (n, source tokens,
        4), their places. One row or one image serves all of the other. The pipeline itself takes the same images for
        all its prompts, and sides from 64 pixels on. Raises InputError where rows differ, and at wrong shapes or sizes.
        """
        sources = several(images)
        for source in sources:
            check_images(source, self.multiple, self.name)
            if source.shape[2] * source.shape[3] > LARGEST:
                raise InputError(
                    f"source images of {source.shape[2]} x {source.shape[3]} pixels are larger than FLUX.2's "
                    f"{LARGEST}; resize them"
                )
        check_rows(condition, *sources)  # before the work
        with torch.set_grad_enabled(grad):
            latents = [by_rows(self._encoded, source.to(self.device)) for source in sources]
        return self._with_source(condition, latents)

    def with_latents(self, condition: Condition, source: Tensor) -> Condition:
        """As `with_images`, from latents that `encode_images` or a rollout gave: (n, tokens, channels), the states'."""
        check_latents(source, self.latent_shape, self.name)
        check_rows(condition, source)
        return self._with_source(condition, [self._unpacked(source.to(self.device))])

    def _with_source(self, condition: Condition, latents: list[Tensor]) -> Condition:
        ids = self.pipeline._prepare_image_ids([part[:1] for part in latents]).to(self.device)
        packed = [Condition({"source": self.pipeline._pack_latents(part)}) for part in latents]
        rows = max(map(len, packed))
        source = torch.cat([part.repeat(rows).parts["source"] for part in packed], dim=1)
        return joined(condition, Condition({"source": source}), Condition({"source_ids": ids}))

    def _forward(self, x_t: Tensor, t: Tensor, condition: Condition, embedded: float) -> Tensor:
        dtype = self.dtype  # states stay in theirs: a bf16 network under exact float32 steps
        tokens, ids, embeds = x_t, self.image_ids, condition.parts["embeds"]
        if "source" in condition.parts:
            tokens = torch.cat((x_t, condition.parts["source"].to(x_t)), dim=1)
            ids = torch.cat((ids, shared(condition.parts["source_ids"])))
        output: Tensor = self.network(
            hidden_states=tokens.to(dtype),
            timestep=t.to(dtype),
            guidance=None,
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
        patches = self.pipeline._unpatchify_latents(self._unpacked(latents) * deviation + mean)
        images: Tensor = vae.decode(patches.to(vae.dtype), return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1).to(latents.dtype)

    def _unpacked(self, latents: Tensor) -> Tensor:
        return latents.mT.unflatten(2, (self.side, self.side))

    def _encode_images(self, images: Tensor) -> Tensor:
        packed: Tensor = self.pipeline._pack_latents(self._encoded(images))
        return packed

    def _encoded(self, images: Tensor) -> Tensor:
        pixels = (images * 2 - 1).to(self.pipeline.vae.dtype)
        latents: Tensor = self.pipeline._encode_vae_image(pixels, generator=None)
        return latents
