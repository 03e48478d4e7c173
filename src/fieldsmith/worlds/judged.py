"""What worlds share whose judge says of each image whether it could be in the data (VSM notes, 4 and 8.4).

In: images. Out: `Verdicts` with reasons. catalogue.py names the worlds, own.py is a user's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fieldsmith.errors import InputError

UNREADABLE = "unreadable"
GRAIN = 0.08  # largest RMS distance from what was read, over a whole image, card or square


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of n images."""

    valid: Tensor  # (n,) bool
    readable: Tensor  # (n,) bool; what cannot be read counts as invalid and is reported apart
    reasons: tuple[tuple[str, ...], ...]  # per image, () where valid
    contents: tuple[Hashable | None, ...]  # per image what it shows, None where invalid


class JudgedWorld(Protocol):
    """Data that can be drawn without end and a judge that reads pixels alone."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def support(self) -> int | None:
        """How many different contents training data can show, None where they are countless or unknown."""

    def sample(self, n: int, seed: int, held_out: bool = False) -> Tensor:
        """(n, channels, size, size) in [0, 1]; held_out=True: only contents that training data never show."""

    def judge(self, images: Tensor) -> Verdicts:
        """Raises InputError on images of another shape; NaN makes an image unreadable."""

    def novel(self, content: Hashable) -> bool:
        """Whether valid content is never in training data."""


def readable(images: Tensor, world: JudgedWorld) -> tuple[Tensor, Tensor]:
    """The images in [0, 1] with those that hold NaN or infinities black, and which ones are finite, (n,)."""
    expected = (world.channels, world.size, world.size)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected or not images.is_floating_point():
        raise InputError(
            f"images of shape {tuple(images.shape)} and type {str(images.dtype).removeprefix('torch.')}; the judge of "
            f"{world.name} reads floats (n, {', '.join(map(str, expected))}) in [0, 1]"
        )
    images = images.detach().to("cpu", torch.float32)
    finite = images.flatten(1).isfinite().all(1)
    return images.where(finite[:, None, None, None], torch.zeros(())).clamp(0, 1), finite


def residual(images: Tensor, drawn: Tensor, window: int) -> Tensor:
    """RMS difference between images and what was read in them, in each window around a pixel; (n, height, width)."""
    square = (images - drawn).square().mean(1, keepdim=True)
    for shape in ((window, 1), (1, window)):
        padding = (shape[0] // 2, shape[1] // 2)
        square = torch.nn.functional.avg_pool2d(square, shape, 1, padding, count_include_pad=False)
    return square[:, 0].sqrt()


def nearest(x: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Which of bank (m, d) is nearest to each x (..., d), and how far x leans from it towards another, (...).

    0 is not at all, 0.5 half-way to another: a blend shows here even where its two parts hardly differ.
    """
    centre = bank.mean(0)
    bank = bank - centre
    products, gram = (x - centre) @ bank.T, bank @ bank.T
    norms = gram.diag()
    best = (2 * products - norms).argmax(-1)
    towards = products - products.gather(-1, best[..., None]) - gram[best] + norms[best][..., None]
    apart = (norms + norms[:, None] - 2 * gram)[best]
    return best, torch.where(apart > 1e-3, towards / apart, torch.zeros(())).amax(-1)


def place(key: str) -> float:
    """A fixed place in [0, 1) for a content; those below the held-out share are never drawn for training."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) / 2**32


def generator_of(seed: int, held_out: bool = False) -> torch.Generator:
    """Streams of the same seed for training and for held-out images do not overlap."""
    return torch.Generator().manual_seed(2 * seed + held_out)
