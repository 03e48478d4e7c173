"""FLUX.1 Kontext: Flux that also sees a source image, over diffusers' FluxKontextPipeline and its own parts.

A source image is more tokens after the state's own, told apart by the first of their ids; without one it is Flux.
"""

from __future__ import annotations

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor

from fieldsmith.models.flux import Flux
from fieldsmith.models.sources import Editor, Size


class FluxKontext(Flux, Editor):
    family = "flux-kontext"
    several_sources = False

    def _places(self, sizes: list[Size]) -> dict[str, Tensor]:
        """Gives "source_ids" (1, source tokens, 3)."""
        ids = FluxPipeline._prepare_latent_image_ids(1, *sizes[0], self.device, torch.float32)
        ids[:, 0] = 1  # as the pipeline marks them; the state's own are 0
        return {"source_ids": ids.unsqueeze(0)}
