"""Images with class labels: scikit-learn's digits, the shapes world by composition, Fashion-MNIST, the user's own.

In: 'digits', 'shapes', 'fashion', or what data.py reads. Out: `Classes`, images in [0, 1] with one label each.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fieldsmith import data
from fieldsmith.data import Data
from fieldsmith.errors import InputError
from fieldsmith.pictures import Frame, Images
from fieldsmith.worlds import fashion
from fieldsmith.worlds.shapes import SHAPES, ShapesWorld, concepts

NAMED = ("digits", "shapes", "fashion")
HELD_OUT = 297  # of the 1,797 digits; the first in a fixed random order
POOL = 20_000  # shapes drawn for training


@dataclass(frozen=True)
class Classes:
    """images (n, channels, size, size) in [0, 1], labels (n,) into `names`, and held-out ones of the same kind.

    The user's own are `pictures.Images`, which are read when rows of them are asked for. `read` names the class of
    images (n, ...) from their pixels alone, (n,), where such a judge is known; no valid class is read as one outside
    the names. `classifier` is the folder of a trained one (measure/classifier.py), where the data have such a judge.
    """

    name: str
    names: tuple[str, ...]
    images: Tensor | Images
    labels: Tensor
    held_images: Tensor | Images
    held_labels: Tensor
    read: Callable[[Tensor], Tensor] | None = None  # labels (n,) from pixels alone, where that can be done
    classifier: pathlib.Path | None = None
    free: bool = False  # captions are sentences of their own, some of one image alone: nobody can learn to name them

    def in_order(self, names: tuple[str, ...]) -> Classes:
        """The same data with labels into these names. Raises InputError where they are not the same classes."""
        lacking, odd = sorted(set(names) - set(self.names)), sorted(set(self.names) - set(names))
        if lacking and not odd:
            raise InputError(
                f"data '{self.name}' has {len(self.names)} classes, the model {len(names)}: '{lacking[0]}' is missing; "
                "add images of it"
            )
        if odd:
            raise InputError(
                f"data '{self.name}' has {len(self.names)} classes, other classes than the model's {len(names)}: "
                f"'{odd[0]}' is not among {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}; call them so"
            )
        if self.free:
            sizes = self.labels.bincount(minlength=len(names)) + self.held_labels.bincount(minlength=len(names))
            raise InputError(_few(self.names[int(sizes.argmin())], self.name, int(sizes.min())))
        places = torch.tensor([names.index(name) for name in self.names])
        return replace(self, names=names, labels=places[self.labels], held_labels=places[self.held_labels])


def load(source: Any, size: int, channels: int, seed: int = 0, fit: str = "crop", background: str = "white") -> Classes:
    """Data by name, a folder, a dataset or pairs (image, class), at the size and channels that a model wants.

    `fit` and `background` as in config.DataConfig. Raises InputError where there is no such folder, data.py cannot
    read it, a class has fewer than 2 images, or the world cannot be drawn at that size.
    """
    if source == "digits":
        return digits(size, channels)
    if source == "shapes":
        return shapes(size, channels, seed)
    if source == "fashion" or fashion.is_there(source):
        return fashion_mnist(fashion.DEBIAN if source == "fashion" else source, size, channels)
    if isinstance(source, (str, os.PathLike)) and not os.path.isdir(source):
        raise InputError(f"data '{source}' is no folder; give {', '.join(NAMED)}, or a folder of images with classes")
    return of_data(data.load(source, Frame(size, channels, fit, background), captioned=True))


def digits(size: int = 8, channels: int = 1) -> Classes:
    """scikit-learn's 8-pixel handwritten digits, 1,500 to train on and 297 held out."""
    if (size, channels) != (8, 1):
        raise InputError(f"the digits are 8 x 8 with 1 channel; this model takes {size} x {size} with {channels}")
    from sklearn.datasets import load_digits  # slow to import, and of no use to other data

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


def fashion_mnist(folder: str | pathlib.Path = fashion.DEBIAN, size: int = fashion.SIZE, channels: int = 1) -> Classes:
    """Fashion-MNIST from the folder of its four .gz files: 60,000 to train on, 10,000 held out."""
    frame = Frame(size, channels)
    as_they_are = frame.shape == (1, fashion.SIZE, fashion.SIZE)
    parts: list[Any] = []
    for pixels, labels in fashion.read(pathlib.Path(folder)):
        source = pixels[:, None] if as_they_are else pixels
        parts += [Images(source.__getitem__, len(source), frame), labels]
    read = fashion.CLASSIFIER if as_they_are else None
    return Classes("fashion", fashion.NAMES, *parts, classifier=read)  # type: ignore[misc]


def of_data(found: Data) -> Classes:
    """Every sixth image of a class is held out, at least one; where captions are free, every sixth of all.

    Raises InputError where there is one class alone, and where a class that a folder or a dataset names has fewer than
    2 images.
    """
    names = found.classes or tuple(dict.fromkeys(found.captions))
    if len(names) < 2:
        raise InputError(
            f"data '{found.name}' has one class only, '{names[0]}', and guidance is between classes; add another one"
        )
    place = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([place[caption] for caption in found.captions])
    sizes = labels.bincount(minlength=len(names))
    least = int(sizes.argmin())
    free = not found.classes and int(sizes[least]) < 2
    if int(sizes[least]) < 2 and not free:
        raise InputError(_few(names[least], found.name, int(sizes[least])))
    rows = torch.arange(len(labels)) if free else labels.argsort(stable=True)  # class by class
    of = torch.zeros_like(labels) if free else labels[rows]
    sizes = of.bincount()
    within = torch.arange(len(of)) - (sizes.cumsum(0) - sizes)[of]  # the number of an image in its class
    # of each class: a random split could take all of a small one
    held = within % 6 == sizes[of].clamp(max=6) - 1
    parts = [(found.images.part(some), labels[some]) for some in (rows[~held], rows[held])]
    return Classes(found.name, names, *parts[0], *parts[1], free=free)


def _few(name: str, source: str, n: int) -> str:
    return f"class '{name}' in '{source}' has {n} images; it needs at least 2"


def _split(name: str, names: tuple[str, ...], images: Tensor, labels: Tensor, held: int) -> Classes:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    out, kept = order[:held], order[held:]
    return Classes(name, names, images[kept], labels[kept], images[out], labels[out])
