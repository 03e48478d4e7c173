"""Images with class labels: scikit-learn's digits, the shapes world by composition, or a folder a class.

In: 'digits', 'shapes' or a folder whose subfolders hold images. Out: `Classes`, images in [0, 1] with one label each.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.worlds.shapes import SHAPES, ShapesWorld, concepts

HELD_OUT = 297  # of the 1,797 digits; the first in a fixed random order
POOL = 20_000  # shapes drawn for training
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Classes:
    """images (n, channels, size, size) in [0, 1], labels (n,) into `names`, and held-out ones of the same kind.

    `read` names the class of images (n, ...) from their pixels alone, (n,), where such a judge is known; no valid class
    is read as one outside the names.
    """

    name: str
    names: tuple[str, ...]
    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor
    read: Callable[[Tensor], Tensor] | None = None


def load(source: str, size: int, channels: int, seed: int = 0) -> Classes:
    """The named data at the size and channels that a model wants.

    Raises InputError where there is no such folder, a class is empty, or the world cannot be drawn at that size.
    """
    if source == "digits":
        return digits(size, channels)
    if source == "shapes":
        return shapes(size, channels, seed)
    return folder(pathlib.Path(source), size, channels)


def digits(size: int = 8, channels: int = 1) -> Classes:
    """scikit-learn's 8-pixel handwritten digits, 1,500 to train on and 297 held out."""
    if (size, channels) != (8, 1):
        raise InputError(f"the digits are 8 x 8 with 1 channel; this model takes {size} x {size} with {channels}")
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    return _split("digits", tuple(str(i) for i in range(10)), images, labels, HELD_OUT)


def shapes(size: int = 16, channels: int = 3, seed: int = 0) -> Classes:
    """The shapes world: a class is a composition such as 'red star', all 24 of them."""
    if channels != 3:
        raise InputError(f"the shapes world has 3 channels; this model takes {channels}")
    world = ShapesWorld(size)
    parts = [world.sample(n, 2 * seed + i, hold_out=False) for i, n in enumerate((POOL, POOL // 5))]
    labels = [part.colour * len(SHAPES) + part.shape for part in parts]
    names = tuple(str(concept) for concept in concepts())

    def read(images: Tensor) -> Tensor:
        seen = world.judge(images)
        return seen.colour * len(SHAPES) + seen.shape

    return Classes("shapes", names, parts[0].images, labels[0], parts[1].images, labels[1], read)


def folder(path: pathlib.Path, size: int, channels: int) -> Classes:
    """One subfolder a class; images are resized to size x size, every sixth of a class is held out and at least one."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_dir():
        raise InputError(
            f"data '{path}' is no folder; give digits, shapes, or a folder with a subfolder of images a class"
        )
    names = tuple(sorted(part.name for part in path.iterdir() if part.is_dir()))
    if not names:
        raise InputError(f"data folder '{path}' has no subfolders; put the images of each class into one of their own")
    images, labels, out = [], [], []
    for label, name in enumerate(names):
        files = sorted(file for file in (path / name).iterdir() if file.suffix.lower() in SUFFIXES)
        if len(files) < 2:
            raise InputError(f"class '{name}' in '{path}' has {len(files)} images; it needs at least 2")
        for i, file in enumerate(files):
            try:
                with Image.open(file) as image:
                    small = image.convert("L" if channels == 1 else "RGB").resize((size, size), Image.Resampling.BOX)
            except (UnidentifiedImageError, OSError) as error:
                raise InputError(f"'{file}' cannot be read as an image; remove it or save it again") from error
            pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).float() / 255
            images.append(pixels.reshape(size, size, channels).permute(2, 0, 1))
            labels.append(label)
            out.append(i % 6 == min(len(files), 6) - 1)  # of each class: a random split could take all of a small one
    together, known, held = torch.stack(images), torch.tensor(labels), torch.tensor(out)
    return Classes(str(path), names, together[~held], known[~held], together[held], known[held])


def _split(name: str, names: tuple[str, ...], images: Tensor, labels: Tensor, held: int) -> Classes:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    out, kept = order[:held], order[held:]
    return Classes(name, names, images[kept], labels[kept], images[out], labels[out])
