"""FLUX.1 Kontext: Flux that also sees source images, over diffusers' FluxKontextPipeline and its own parts.

A source image is more tokens after the state's own, told apart by the first of their ids; without one it is Flux.
"""

from __future__ import annotations

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor

from fieldsmith.models.core import Condition
from fieldsmith.models.flux import Flux
from fieldsmith.models.sources import check_images, check_latents, check_rows, joined, shared


class FluxKontext(Flux):
    family = "flux-kontext"

    def with_images(self, condition: Condition, images: Tensor, grad: bool = False) -> Condition:
        """The condition with source images (n, 3, height, width) in [0, 1], of any size that the model takes.

        Adds the parts "source" (n, source tokens, channels), the packed latents, and "source_ids" (n, source tokens,
        3), their places, which the number of tokens alone does not tell. One row or one image serves all of the other.
        Raises InputError where neither is one and they differ, and at images of a wrong shape or size.
        """
        multiple = 2 * self.pipeline.vae_scale_factor  # pixels per token side
        check_images(images, multiple, self.name)
        check_rows(condition, images)  # before the work
        height, width = images.shape[2:]
        return self._with_source(
            condition, self.encode_images(images.to(self.device), grad), height // multiple, width // multiple
        )

    def with_latents(self, condition: Condition, source: Tensor) -> Condition:
        """As `with_images`, from latents that `encode_images` or a rollout gave: (n, tokens, channels), the states'."""
        check_latents(source, self.latent_shape, self.name)
        check_rows(condition, source)
        side = int(self.tokens**0.5)
        return self._with_source(condition, source.to(self.device), side, side)

    def _with_source(self, condition: Condition, latents: Tensor, height: int, width: int) -> Condition:
        ids = FluxPipeline._prepare_latent_image_ids(1, height, width, self.device, torch.float32)
        ids[:, 0] = 1  # as the pipeline marks them; the state's own are 0
        return joined(condition, Condition({"source": latents}), Condition({"source_ids": ids.unsqueeze(0)}))

    def _image_tokens(self, x_t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        if "source" not in condition.parts:
            return super()._image_tokens(x_t, condition)
        ids = shared(condition.parts["source_ids"])
        tokens = torch.cat((x_t, condition.parts["source"].to(x_t)), dim=1)
        return tokens, torch.cat((self.image_ids.to(ids), ids))
