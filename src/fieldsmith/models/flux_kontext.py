"""FLUX.1 Kontext: Flux that also sees source images, over diffusers' FluxKontextPipeline and its own parts.

A source image is more tokens after the state's own, told apart by the first of their ids; without one it is Flux.
"""

from __future__ import annotations

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.core import Condition
from fieldsmith.models.flux import Flux


class FluxKontext(Flux):
    family = "flux-kontext"

    def with_images(self, condition: Condition, images: Tensor, grad: bool = False) -> Condition:
        """The condition with source images (n, 3, height, width) in [0, 1], of any size that the model takes.

        Adds the parts "source" (n, source tokens, channels), the packed latents, and "source_ids" (n, source tokens,
        3), their places, which the number of tokens alone does not tell. One row or one image serves all of the other.
        Raises InputError where neither is one and they differ, and at images of a wrong shape or size.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise InputError(f"source images have the shape {tuple(images.shape)}; give (n, 3, height, width)")
        height, width = images.shape[2:]
        multiple = 2 * self.pipeline.vae_scale_factor  # pixels per token side
        if height % multiple or width % multiple or not height * width:
            raise InputError(
                f"source images of {height} x {width} pixels do not fit {self.name}: "
                f"resize them so that both sides are multiples of {multiple}"
            )
        self._check_rows(condition, images)  # before the work
        return self._with_source(
            condition, self.encode_images(images.to(self.device), grad), height // multiple, width // multiple
        )

    def with_latents(self, condition: Condition, source: Tensor) -> Condition:
        """As `with_images`, from latents that `encode_images` or a rollout gave: (n, tokens, channels), the states'."""
        if tuple(source.shape[1:]) != self.latent_shape:
            raise InputError(
                f"sources of {' x '.join(map(str, source.shape[1:]))} tokens and channels do not fit {self.name}, "
                f"whose states have {' x '.join(map(str, self.latent_shape))}; give images of another size whole"
            )
        self._check_rows(condition, source)
        side = int(self.tokens**0.5)
        return self._with_source(condition, source.to(self.device), side, side)

    def _check_rows(self, condition: Condition, sources: Tensor) -> None:
        if len(sources) != len(condition) and 1 not in (len(sources), len(condition)):
            raise InputError(
                f"{len(sources)} source images do not go with {len(condition)} prompts; "
                "give one image, one prompt, or as many of each"
            )

    def _with_source(self, condition: Condition, latents: Tensor, height: int, width: int) -> Condition:
        ids = FluxPipeline._prepare_latent_image_ids(1, height, width, self.device, torch.float32)
        ids[:, 0] = 1  # as the pipeline marks them; the state's own are 0
        source = Condition({"source": latents, "source_ids": ids.expand(len(latents), -1, -1)})
        rows = max(len(condition), len(latents))
        return Condition({**condition.repeat(rows).parts, **source.repeat(rows).parts})

    def _image_tokens(self, x_t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        if "source" not in condition.parts:
            return super()._image_tokens(x_t, condition)
        ids = condition.parts["source_ids"]
        if not torch.equal(ids, ids[:1].expand_as(ids)):  # the network takes one set of ids for the whole batch
            raise InputError("source images of different shapes cannot share a batch; predict them apart")
        tokens = torch.cat((x_t, condition.parts["source"].to(x_t)), dim=1)
        return tokens, torch.cat((self.image_ids.to(ids), ids[0]))
