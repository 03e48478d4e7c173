"""SD3: Stable Diffusion 3 and 3.5, over diffusers' StableDiffusion3Pipeline and its own parts.

States are latents (batch, channels, height, width) on rectified flow. A pipeline may lack its T5 (`text_encoder_3`),
whose tokens then are zeros; its two CLIP encoders diffusers cannot do without.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.core import Condition
from fieldsmith.models.export import Rules
from fieldsmith.models.prompted import DUAL_STREAM_SUBSETS, Prompted
from fieldsmith.models.schedulers import check_flow, dynamic_shift, euler_of
from fieldsmith.paths import Kind, RectifiedFlow

TEXT_LENGTH = 256  # T5 tokens, as the pipeline has them by default
TRAIN_TIMES = 1000  # the network's clock runs to this at t = 1


NAMES: Rules = (
    (r"transformer_blocks\.(\d+)\.(attn|attn2)\.to_[qkv]", r"joint_blocks.\1.x_block.\2.qkv"),
    (r"transformer_blocks\.(\d+)\.(attn|attn2)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"joint_blocks.\1.context_block.attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
    (r"context_embedder", r"context_embedder"),
    (r"time_text_embed\.timestep_embedder\.linear_1", r"t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", r"t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", r"y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", r"y_embedder.mlp.2"),
    (r"norm_out\.linear", r"final_layer.adaLN_modulation.1"),
    (r"proj_out", r"final_layer.linear"),
    (r"pos_embed\.proj", r"x_embedder.proj"),
)


class SD3(Prompted):
    family = "sd3"
    SUBSETS: ClassVar[dict[str, str]] = {
        **DUAL_STREAM_SUBSETS,
        "text-inputs": r"context_embedder|time_text_embed\.text_embedder\.linear_1",
    }
    ORIGINAL_NAMES = NAMES
    ERASE_SUBSET = "qk_dual"
    # in the last block, queries from words, which nothing reads
    UNREAD = r"transformer_blocks\.LAST\.attn\.(add_q_proj|norm_added_q)\b.*"
    path = RectifiedFlow()
    kind: Kind = "velocity"

    def __init__(self, pipeline: Any, name: str, resolution: int | None = None):
        for part in ("text_encoder", "text_encoder_2"):
            if getattr(pipeline, part) is None:
                raise InputError(f"{name} lacks its {part}, without which diffusers encodes no prompt; put it back")
        shape, factor = pipeline.transformer.config, pipeline.vae_scale_factor
        scale = factor * shape.patch_size  # pixels per token side
        most = factor * shape.pos_embed_max_size * shape.patch_size
        super().__init__(pipeline, name, resolution, min(512, shape.sample_size * factor), scale, most)
        check_flow(pipeline.scheduler, name)
        self.tokens = (self.resolution // scale) ** 2
        t5 = pipeline.tokenizer_3 if pipeline.text_encoder_3 is not None else None
        self.text_length = TEXT_LENGTH if t5 is None else min(TEXT_LENGTH, t5.model_max_length)
        clip = (pipeline.tokenizer, 0)
        self.text_parts = (clip,) if t5 is None else (clip, (t5, pipeline.tokenizer_max_length))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.resolution // self.pipeline.vae_scale_factor
        return self.network.config.in_channels, side, side

    def grid(self, steps: int) -> Tensor:
        """The pipeline's own times for `steps` Euler steps, from 1 down to 0; (steps + 1,).

        They are asked from its scheduler, which shifts its smallest time and then all of them: for SD3's shift of 3
        the last step but one ends near t = 0.009, whatever their number.
        """
        scheduler = euler_of(self.pipeline.scheduler)
        config = scheduler.config
        shift = dynamic_shift(config, self.tokens, 1.16)
        scheduler.set_timesteps(steps, mu=shift if config.use_dynamic_shifting else None)
        grid: Tensor = scheduler.sigmas
        return grid.to(self.device)

    def _encode(self, prompts: list[str]) -> Condition:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, self.device, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return Condition({"embeds": embeds, "pooled": pooled})

    def dummy_condition(self) -> Condition:
        shape, tokens = self.network.config, self.pipeline.tokenizer_max_length + self.text_length
        embeds = torch.zeros(1, tokens, shape.joint_attention_dim)
        return Condition({"embeds": embeds, "pooled": torch.zeros(1, shape.pooled_projection_dim)})

    def _forward(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
        dtype = self.dtype  # states stay in theirs: a bf16 network under exact float32 steps
        output: Tensor = self.network(
            hidden_states=x_t.to(dtype),
            timestep=t * TRAIN_TIMES,
            encoder_hidden_states=condition.parts["embeds"].to(dtype),
            pooled_projections=condition.parts["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)
