"""Images as users hand them over, files, PIL images, arrays or tensors, as (channels, size, size) in [0, 1]."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fieldsmith.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The images under a folder, by name."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def read(path: pathlib.Path, size: int, channels: int) -> Tensor:
    """An image file. Raises InputError where it cannot be read."""
    try:
        with Image.open(path) as image:
            return resized(image, size, channels)
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"'{path}' cannot be read as an image; remove it or save it again") from error


def convert(image: Any, size: int, channels: int) -> Tensor:
    """A path, a PIL image, a tensor (channels, size, size) in [0, 1], or an array (height, width, 3) of bytes.

    Raises InputError at anything else.
    """
    if isinstance(image, (str, pathlib.Path)):
        return read(pathlib.Path(image), size, channels)
    if isinstance(image, numpy.ndarray) and image.dtype == numpy.uint8:
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return resized(image, size, channels)
    tensor = torch.as_tensor(image).float()
    if tuple(tensor.shape) != (channels, size, size) or not 0 <= float(tensor.min()) <= float(tensor.max()) <= 1:
        raise InputError(
            f"an image of shape {tuple(tensor.shape)} from {float(tensor.min()):g} to {float(tensor.max()):g}; give "
            f"tensors ({channels}, {size}, {size}) in [0, 1], PIL images or paths"
        )
    return tensor


def resized(image: Image.Image, size: int, channels: int) -> Tensor:
    """A PIL image of any size and mode."""
    return pixels(image.convert("L" if channels == 1 else "RGB").resize((size, size), Image.Resampling.BOX))


def pixels(image: Image.Image) -> Tensor:
    """A greyscale or RGB image as (channels, height, width) in [0, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255
    return flat.reshape(image.height, image.width, -1).permute(2, 0, 1)
