"""Image tensors as Pillow pictures, files of them, and contact sheets (`fieldsmith sample`); a suffix is a format."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

DESCRIPTION = 0x010E  # EXIF's tag of what an image shows


def picture(image: Tensor) -> Image.Image:
    """An image (3 or 1, h, w) in [0, 1] at its own size, 8 bits a channel; NaN, as failed runs give, turns black."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image is (3, height, width) or (1, height, width); got {tuple(image.shape)}")
    image = image.expand(3, -1, -1)
    bytes_ = (image.detach().float().cpu().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())


def save_grid(images: Tensor, path: str | pathlib.Path, columns: int = 8, scale: int = 1, gap: int = 2) -> None:
    """Write images (n, 3, h, w) in [0, 1] as one sheet, row by row, each pixel `scale` wide, on white."""
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"a grid needs images (n, 3, height, width) with n >= 1; got {tuple(images.shape)}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns={columns}, scale={scale}: both are at least 1")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height, width = (side * scale for side in images.shape[-2:])
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        place = (gap + i % columns * (width + gap), gap + i // columns * (height + gap))
        sheet.paste(picture(image).resize((width, height), Image.Resampling.NEAREST), place)
    save_picture(sheet, pathlib.Path(path), {})


def save_picture(image: Image.Image, path: pathlib.Path, about: Mapping[str, str]) -> None:
    """Write a picture in the format of the path's suffix, with words about it in PNG text or EXIF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    if path.suffix.lower() == ".png":
        text = PngInfo()
        for name, words in about.items():
            text.add_itxt(name, words)
        image.save(beside, pnginfo=text)
    else:
        exif = Image.Exif()
        if about:
            exif[DESCRIPTION] = "\n".join(f"{name}: {words}" for name, words in about.items())
        image.save(beside, exif=exif, quality=95)
    os.replace(beside, path)
