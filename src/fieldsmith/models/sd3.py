"""SD3: Stable Diffusion 3 and 3.5, over diffusers' StableDiffusion3Pipeline and its own parts.

States are latents (batch, channels, height, width) on rectified flow. A pipeline may lack its T5 (`text_encoder_3`),
whose tokens then are zeros; its two CLIP encoders diffusers cannot do without.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.autoencoder import decoded, encoded
from fieldsmith.models.core import Condition
from fieldsmith.models.prompted import Prompted
from fieldsmith.paths import Kind, RectifiedFlow

TEXT_LENGTH = 256  # T5 tokens, as the pipeline has them unless told otherwise
TRAIN_TIMES = 1000  # the network's clock runs to this at t = 1


class SD3(Prompted):
    family = "sd3"
    SUBSETS: ClassVar[dict[str, str]] = {
        "qk_dual": r"transformer_blocks\.\d+\.attn\.(to_q|to_k|add_q_proj|add_k_proj)",
        "add_qk": r"transformer_blocks\.\d+\.attn\.(add_q_proj|add_k_proj)",
        "attention": r".*\.attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
        "attention-kv": r".*\.attn2?\.(to_k|to_v)",
        "text-inputs": r"context_embedder|time_text_embed\.text_embedder\.linear_1",
        "all-linear": r".*",
    }
    path = RectifiedFlow()
    kind: Kind = "velocity"

    def __init__(self, pipeline: Any, name: str, resolution: int | None = None):
        super().__init__(pipeline, pipeline.transformer, name)
        for part in ("text_encoder", "text_encoder_2"):
            if getattr(pipeline, part) is None:
                raise InputError(f"{name} lacks its {part}, without which diffusers encodes no prompt; put it back")
        shape, factor = self.network.config, pipeline.vae_scale_factor
        scale = factor * shape.patch_size  # pixels per token side
        most = factor * shape.pos_embed_max_size * shape.patch_size
        self.resolution = resolution or min(512, shape.sample_size * factor)
        if self.resolution % scale or self.resolution > most:
            raise InputError(f"resolution {self.resolution} is not a multiple of {scale} up to {most} for {name}")
        self.tokens = (self.resolution // scale) ** 2
        t5 = pipeline.tokenizer_3 if pipeline.text_encoder_3 is not None else None
        self.text_length = TEXT_LENGTH if t5 is None else min(TEXT_LENGTH, t5.model_max_length)
        clip = (pipeline.tokenizer, 0)
        self.text_parts = (clip,) if t5 is None else (clip, (t5, pipeline.tokenizer_max_length))

    def _unread(self, name: str) -> bool:
        """In the last block, who asks for new words, which nothing reads."""
        last = len(self.network.transformer_blocks) - 1
        return re.fullmatch(rf"transformer_blocks\.{last}\.attn\.(add_q_proj|norm_added_q)\b.*", name) is not None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.resolution // self.pipeline.vae_scale_factor
        return self.network.config.in_channels, side, side

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of x_1, drawn as the pipeline draws them so that equal seeds give equal images."""
        return torch.randn(n, *self.latent_shape, generator=generator).to(self.device)

    def grid(self, steps: int) -> Tensor:
        """The pipeline's own times for `steps` Euler steps, from 1 down to 0; (steps + 1,).

        They are asked from its scheduler, which shifts its smallest time and then all of them: for SD3's shift of 3
        the last step but one ends near t = 0.009, whatever their number.
        """
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        config = scheduler.config
        shift = calculate_shift(
            self.tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5), config.get("max_shift", 1.16),
        )  # fmt: skip
        scheduler.set_timesteps(steps, mu=shift if config.use_dynamic_shifting else None)
        grid: Tensor = scheduler.sigmas
        return grid.to(self.device)

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
        """One row a prompt. Raises InputError at a word outside a closed vocabulary."""
        self._check_words(self.pipeline.tokenizer, prompts)
        with torch.set_grad_enabled(grad):
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                list(prompts), None, None, self.device, do_classifier_free_guidance=False,
                max_sequence_length=self.text_length,
            )  # fmt: skip
        return Condition({"embeds": embeds, "pooled": pooled})

    def blank(self) -> Condition:
        shape, tokens = self.network.config, self.pipeline.tokenizer_max_length + self.text_length
        embeds = torch.zeros(1, tokens, shape.joint_attention_dim)
        return Condition({"embeds": embeds, "pooled": torch.zeros(1, shape.pooled_projection_dim)})

    def _forward(self, x_t: Tensor, t: Tensor, condition: Condition, embedded: float) -> Tensor:
        dtype = self.dtype  # states stay in theirs: a bf16 network under exact float32 steps
        output: Tensor = self.network(
            hidden_states=x_t.to(dtype),
            timestep=t * TRAIN_TIMES,
            encoder_hidden_states=condition.parts["embeds"].to(dtype),
            pooled_projections=condition.parts["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)

    def _decode(self, latents: Tensor) -> Tensor:
        return decoded(self.pipeline.vae, latents)

    def _encode_images(self, images: Tensor) -> Tensor:
        return encoded(self.pipeline.vae, images)
