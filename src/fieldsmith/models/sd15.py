"""SD15: Stable Diffusion 1.x and 2.x, over diffusers' StableDiffusionPipeline and its own parts.

States are latents (batch, channels, height, width) on a variance-preserving path. Samplers here are DDIM's, so a saved
PNDM, DPM-Solver or Euler scheduler is read for its betas alone, as the DDIMScheduler of its config; where it spaces
its steps as 'linspace' they are 'leading'. The pipeline keeps its own scheduler when it is saved again. Images are
decoded without the safety checker.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.core import Condition
from fieldsmith.models.export import SAME_NAMES
from fieldsmith.models.prompted import Prompted
from fieldsmith.models.schedulers import KINDS, check_discrete, network_index, path_of, scheduled_grid
from fieldsmith.paths import Kind, VariancePreserving


class SD15(Prompted):
    family = "sd15"
    PART = "unet"
    SUBSETS: ClassVar[dict[str, str]] = {
        "attention": r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
        "attention-kv": r".*\.attn[12]\.(to_k|to_v)",
        "cross-attention": r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)",
        "qk_cross": r".*\.attn2\.(to_q|to_k)",
        "text-inputs": r".*\.attn2\.(to_k|to_v)",
        "all-linear": r".*",  # attention, feed-forward and time; convolutions train only as full weights
    }
    ORIGINAL_NAMES = SAME_NAMES
    ERASE_SUBSET = "qk_cross"
    path: VariancePreserving
    kind: Kind

    def __init__(self, pipeline: Any, name: str, resolution: int | None = None):
        shape, scale = pipeline.unet.config, pipeline.vae_scale_factor
        if shape.in_channels != pipeline.vae.config.latent_channels:
            raise InputError(
                f"the UNet of {name} takes {shape.in_channels} channels where its autoencoder gives "
                f"{pipeline.vae.config.latent_channels}, as inpainting models do; load one that draws from words alone"
            )
        if shape.time_cond_proj_dim is not None:
            raise InputError(f"{name} is a latent consistency model, which no sampler here draws from; load its base")
        native = shape.sample_size if isinstance(shape.sample_size, int) else shape.sample_size[0]
        super().__init__(pipeline, name, resolution, native * scale, scale)
        self.text_length = pipeline.tokenizer.model_max_length
        self.text_parts = ((pipeline.tokenizer, 0),)
        check_discrete(pipeline.scheduler, name)
        self.scheduler = _ddim(pipeline.scheduler)
        self.path = path_of(self.scheduler, name)
        self.kind = KINDS[self.scheduler.config.prediction_type]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.resolution // self.multiple
        return self.network.config.in_channels, side, side

    def grid(self, steps: int) -> Tensor:
        """DDIM's times in the scheduler's own spacing, (steps + 1,).

        They end at clean data, t = 0, or at t = 1/T where `set_alpha_to_one` is off, as SD 1.5 ships: there the
        pipeline decodes states that keep the noise of the first training time. Raises InputError at as many steps as
        an offset leaves no room for. 'trailing' is the pipeline's own where the steps divide the training times.
        """
        config = self.scheduler.config
        grid = scheduled_grid(self.path, config, steps, self.name)
        if grid[0] > 1:
            raise InputError(f"steps={steps} do not fit {self.name}, whose scheduler counts from {config.steps_offset}")
        stride = self.path.length // steps
        if not config.set_alpha_to_one or (config.timestep_spacing == "leading" and stride <= config.steps_offset):
            grid[-1] = 1 / self.path.length
        return grid.to(self.device)

    def _encode(self, prompts: list[str]) -> Condition:
        embeds, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return Condition({"embeds": embeds})

    def dummy_condition(self) -> Condition:
        return Condition({"embeds": torch.zeros(1, self.text_length, self.network.config.cross_attention_dim)})

    def _forward(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
        dtype = self.dtype  # states stay in theirs: a half-precision network under exact float32 steps
        index = network_index(self.path, t)
        embeds = condition.parts["embeds"].to(dtype)
        output: Tensor = self.network(x_t.to(dtype), index, encoder_hidden_states=embeds, return_dict=False)[0]
        return output.to(x_t.dtype)


def _ddim(scheduler: Any) -> Any:
    """DDIM on the betas of any scheduler; its own spacing where DDIM's steps can follow it."""
    spacing = scheduler.config.get("timestep_spacing", "leading")
    if not isinstance(scheduler, DDIMScheduler) and spacing == "linspace":
        spacing = "leading"
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, timestep_spacing=spacing)
