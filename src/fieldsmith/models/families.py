"""The families of pipelines that fieldsmith reads, as a table that imports nothing heavy.

A family is one kind of denoiser with its text encoders, autoencoder and scheduler; its file says the rest.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A name, the diffusers pipelines that it reads, and 'module:class' inside fieldsmith.models."""

    name: str
    pipelines: tuple[str, ...]
    made_by: str


FAMILIES = (
    Family("flux", ("FluxPipeline",), "flux:Flux"),
    Family("flux-kontext", ("FluxKontextPipeline",), "flux_kontext:FluxKontext"),
    Family("flux2-klein", ("Flux2KleinPipeline",), "flux2_klein:Flux2Klein"),
    Family("qwen-image", ("QwenImagePipeline",), "qwen_image:QwenImage"),
    Family("qwen-image-edit", ("QwenImageEditPipeline", "QwenImageEditPlusPipeline"), "qwen_image_edit:QwenImageEdit"),
    Family("dit", ("DiTPipeline",), "dit:DiT"),
    Family("unet", ("DDPMPipeline", "DDIMPipeline"), "unet:UNet"),
)
