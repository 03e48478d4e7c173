"""Images and latents (batch, channels, height, width) through a pipeline's AutoencoderKL, scaled as its config says."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Images (batch, 3, height, width) in [0, 1]."""
    shift = vae.config.shift_factor or 0.0
    images: Tensor = vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype), return_dict=False)[0]
    return (images / 2 + 0.5).clamp(0, 1).to(latents.dtype)


def encoded(vae: Any, images: Tensor) -> Tensor:
    """Latents (posterior modes) of images (batch, 3, height, width) in [0, 1]."""
    shift = vae.config.shift_factor or 0.0
    latents: Tensor = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode()
    return (latents.to(images.dtype) - shift) * vae.config.scaling_factor
