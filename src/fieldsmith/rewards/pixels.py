"""Judges that are formulas of the pixels, whatever the prompt: brightness and hue with gradients, JPEG size without.

The JPEG rewards are DDPO's (Black et al., 2023, section 5): kilobytes (1000 bytes) at quality 95, and minus that.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from fieldsmith.errors import check_word
from fieldsmith.rewards.reward import Reward
from fieldsmith.worlds.shapes import COLOURS, PALETTE

LUMA = (0.299, 0.587, 0.114)
FAINT = 0.02  # chroma below which a pixel's hue is noise


def reward(name: str, argument: str | None = None) -> Reward:
    """brightness, darkness, saturation, colour:NAME (differentiable), jpeg-size, (in)compressibility (black box).

    Raises InputError at a colour that is not in the palette.
    """
    if name == "colour":
        check_word(argument or "", COLOURS, "colours")
        return Reward(f"colour:{argument}", True, lambda images, _: hue_closeness(images, argument or ""))
    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "brightness": brightness,
        "darkness": lambda images: 1 - brightness(images),
        "saturation": saturation,
        "jpeg-size": jpeg_kilobytes,
        "incompressibility": jpeg_kilobytes,  # DDPO's word for the size
        "compressibility": lambda images: -jpeg_kilobytes(images),
    }
    formula = formulas[name]

    def judge(images: Tensor, _: Sequence[str]) -> Tensor:
        return formula(images)

    return Reward(name, name in ("brightness", "darkness", "saturation"), judge)


def brightness(images: Tensor) -> Tensor:
    """Mean luma (ITU-R 601), in [0, 1]; (n,)."""
    return (images.float() * torch.tensor(LUMA, device=images.device)[:, None, None]).sum(1).mean((1, 2))


def saturation(images: Tensor) -> Tensor:
    """Mean chroma, the largest minus the smallest of a pixel's channels: 0 grey, 1 pure colours; (n,)."""
    images = images.float()
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def hue_closeness(images: Tensor, colour: str) -> Tensor:
    """(1 + cos) / 2, cos the chroma-weighted mean cosine between the pixels' hues and the palette colour's; (n,).

    Chroma is what is left of RGB without its mean. 1 where all that has a hue has that one, 1/2 on grey, 0 opposite.
    """
    images = images.float()
    chroma = images - images.mean(1, keepdim=True)
    aim = torch.tensor(PALETTE[colour], device=images.device)
    aim = aim - aim.mean()
    along = (chroma * (aim / aim.norm())[:, None, None]).sum(1)  # (n, h, w)
    size = (chroma.square().sum(1) + FAINT**2).sqrt()
    return (1 + along.sum((1, 2)) / size.sum((1, 2))) / 2


@torch.no_grad()
def jpeg_kilobytes(images: Tensor) -> Tensor:
    """The size of each image as a JPEG of quality 95, in units of 1000 bytes; (n,)."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, device=images.device)
