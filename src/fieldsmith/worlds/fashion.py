"""Fashion-MNIST: 70,000 photographs of clothes in ten classes, grey, 28 pixels (Xiao, Rasul and Vollgraf, 2017; MIT).

In: the folder that holds its four .gz files, as github.com/zalandoresearch/fashion-mnist has them and Debian's package
dataset-fashion-mnist installs them. Out: bytes (n, 28, 28) and labels (n,) to train on and to test on.
"""

from __future__ import annotations

import gzip
import os
import pathlib
import zlib
from typing import Any

import numpy
import torch
from torch import Tensor

from fieldsmith.errors import InputError

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
CLASSIFIER = pathlib.Path(__file__).parent.parent / "zoo" / "fashion-classifier"
SIZE = 28
NAMES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PARTS = ("train", "t10k")
FIRST = [9, 0, 0, 3, 0, 2, 7, 2]  # labels, by which it is told from MNIST, whose files have the same names


def is_there(source: Any) -> bool:
    """Whether it is a folder that holds such files."""
    return isinstance(source, (str, os.PathLike)) and _file(pathlib.Path(source), "train", "images").is_file()


def read(folder: pathlib.Path) -> tuple[tuple[numpy.ndarray, Tensor], tuple[numpy.ndarray, Tensor]]:
    """Images and labels to train on, then those to test on. Raises InputError where a file is not there or damaged."""
    parts = []
    for part in PARTS:
        images = _idx(_file(folder, part, "images"), (-1, SIZE, SIZE))
        labels = _idx(_file(folder, part, "labels"), (len(images),))
        parts.append((images, torch.from_numpy(labels.astype(numpy.int64))))
    if parts[0][1][: len(FIRST)].tolist() != FIRST:
        raise InputError(f"'{folder}' holds another data set than Fashion-MNIST; convert it to a folder a class")
    return parts[0], parts[1]


def _file(folder: pathlib.Path, part: str, what: str) -> pathlib.Path:
    return folder / f"{part}-{what}-idx{3 if what == 'images' else 1}-ubyte.gz"


def _idx(file: pathlib.Path, shape: tuple[int, ...]) -> numpy.ndarray:
    """The bytes of a file in MNIST's format: two zeros, 8 for bytes, the number of sides, each side, the numbers."""
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"'{file}' cannot be read ({getattr(error, 'strerror', None) or error}); install Debian's "
            "dataset-fashion-mnist, or give the folder of Fashion-MNIST's four .gz files as data"
        ) from error
    start = 4 + 4 * len(shape)
    sides = numpy.frombuffer(content[4:start], ">u4").tolist()
    known = [side if asked < 0 else asked for side, asked in zip(sides, shape, strict=False)]
    if content[:4] != bytes((0, 0, 8, len(shape))) or sides != known or len(content) - start != numpy.prod(sides):
        raise InputError(f"'{file}' is not Fashion-MNIST's; fetch it again")
    return numpy.frombuffer(bytearray(content[start:]), numpy.uint8).reshape(sides)
