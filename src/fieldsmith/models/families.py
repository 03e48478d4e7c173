"""The families of pipelines that fieldsmith reads, as a table that imports nothing heavy.

A family is one kind of denoiser with its text encoders, autoencoder and scheduler; its file says the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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
    Family("sd15", ("StableDiffusionPipeline",), "sd15:SD15"),
    Family("sd3", ("StableDiffusion3Pipeline",), "sd3:SD3"),
    Family("dit", ("DiTPipeline",), "dit:DiT"),
    Family("unet", ("DDPMPipeline", "DDIMPipeline"), "unet:UNet"),
)

# words in the keys of LoRA files that only one family's layers have, most telling first; diffusers' and kohya's names
MARKS = (
    ("sd15", r"(unet\.|lora_unet_)(down_block|up_block|mid_block|input_block|output_block|middle_block)"),
    ("qwen-image", r"(img|txt)_(mlp|mod)\b"),
    (
        "flux2-klein",
        r"to_qkv_mlp_proj|(double|single)_stream_modulation|transformer_blocks\.\d+\.ff(_context)?\.linear_in",
    ),
    ("flux", r"single_transformer_blocks|(double|single)_blocks"),
    ("sd3", r"transformer_blocks\.\d+\.attn2\.|joint_blocks"),
    ("flux, flux2-klein, sd3 or qwen-image", r"transformer_blocks\.\d+\.attn\.add_[qkv]_proj"),
)


def family_of_lora(keys: Iterable[str]) -> str | None:
    """The family, or families, whose layers the keys of a LoRA file name; None where they do not tell."""
    words = "\n".join(keys)
    return next((name for name, mark in MARKS if re.search(mark, words)), None)
