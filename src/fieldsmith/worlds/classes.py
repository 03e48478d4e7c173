"""Images with class labels: scikit-learn's digits, the shapes world by composition, or a folder a class.

In: 'digits', 'shapes' or a folder whose subfolders hold images. Out: `Classes`, images in [0, 1] with one label each.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.worlds import pictures
from fieldsmith.worlds.shapes import SHAPES, ShapesWorld, concepts

HELD_OUT = 297  # of the 1,797 digits; the first in a fixed random order
POOL = 20_000  # shapes drawn for training


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
    read: Callable[[Tensor], Tensor] | None = None  # labels (n,) from pixels alone, where that can be done

    def in_order(self, names: tuple[str, ...]) -> Classes:
        """The same data with labels into these names. Raises InputError where they are not the same classes."""
        if set(names) != set(self.names):
            odd = sorted(set(names) ^ set(self.names))[0]
            raise InputError(
                f"data '{self.name}' has other classes than the model ('{odd}' is in one only); name the folders as "
                "the classes are"
            )
        places = torch.tensor([names.index(name) for name in self.names])
        return replace(self, names=names, labels=places[self.labels], held_labels=places[self.held_labels])


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


def folder(path: pathlib.Path, size: int, channels: int) -> Classes:
    """One subfolder a class; images are resized to size x size. Raises InputError where one has fewer than 2."""
    if not path.is_dir():
        raise InputError(
            f"data '{path}' is no folder; give digits, shapes, or a folder with a subfolder of images a class"
        )
    names = tuple(sorted(part.name for part in path.iterdir() if part.is_dir()))
    if not names:
        raise InputError(f"data folder '{path}' has no subfolders; put the images of each class into one of their own")
    return of_pairs(
        ((file, name) for name in names for file in pictures.files_in(path / name)), size, channels, str(path), names
    )


def of_pairs(
    pairs: Iterable[tuple[Any, str]], size: int, channels: int, name: str = "data", names: Sequence[str] = ()
) -> Classes:
    """Pairs (image, class): tensors, PIL images, arrays or paths; every sixth of a class is held out, at least one.

    `names` are the classes, None: those that appear. Raises InputError where a class has fewer than 2 images.
    """
    by_class: dict[str, list[Tensor]] = {one: [] for one in names}
    for image, label in pairs:
        by_class.setdefault(str(label), []).append(pictures.convert(image, size, channels))
    images, labels, out = [], [], []
    for place, (label, some) in enumerate(by_class.items()):
        if len(some) < 2:
            raise InputError(f"class '{label}' in '{name}' has {len(some)} images; it needs at least 2")
        images += some
        labels += [place] * len(some)
        # of each class: a random split could take all of a small one
        out += [i % 6 == min(len(some), 6) - 1 for i in range(len(some))]
    together, known, held = torch.stack(images), torch.tensor(labels), torch.tensor(out)
    return Classes(name, tuple(by_class), together[~held], known[~held], together[held], known[held])


def _split(name: str, names: tuple[str, ...], images: Tensor, labels: Tensor, held: int) -> Classes:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    out, kept = order[:held], order[held:]
    return Classes(name, names, images[kept], labels[kept], images[out], labels[out])
