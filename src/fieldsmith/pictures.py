"""One image as users have it, made upright, opaque, square and 8-bit; and many of them, read when they are asked for.

In: a path, a PIL image, an array or a tensor, and the `Frame` that it should fill. Out: tensors (channels, size, size);
`Images`, whose memory does not grow with their number. What cannot be read is refused by its name.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from fieldsmith.errors import InputError

LARGEST = 89_478_485  # pixels of an image, from which on Pillow itself warns
LEAST = 2  # pixels a side
KEPT = 2**28  # bytes of pixels that stay in memory once they were read
BLOCK = 2**24  # bytes of pixels that are allocated together
TOGETHER = 64  # images that are encoded at a time


@dataclass(frozen=True)
class Frame:
    """What images become: (channels, size, size); `fit` and `background` as in config.DataConfig.

    Raises InputError at a size below 1 and at a colour that has no such name.
    """

    size: int
    channels: int = 3
    fit: str = "crop"
    background: str = "white"
    resampling: Image.Resampling = Image.Resampling.BOX

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"size={self.size}: images need at least 1 pixel a side")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            words = f"background '{self.background}' is no colour; give a name such as black, or #rrggbb"
            raise InputError(words) from error

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size


# one image


def read(image: Any, frame: Frame, what: str | None = None) -> Tensor:
    """An image as (channels, size, size): bytes, or floats in [0, 1] where it is a tensor or array of that shape.

    Else `image` is a path, a PIL image, a file's bytes, or an array (height, width) or (height, width, channels) of
    bytes, 16-bit numbers or floats. `what` names it in messages. Raises InputError where it cannot be read, and at more
    than LARGEST pixels or fewer than LEAST a side.
    """
    if isinstance(image, Tensor) or getattr(image, "shape", None) == frame.shape:
        return _as_it_is(torch.as_tensor(image), frame)
    with _opened(image, what) as picture:
        if picture is not image:
            picture.draft(None, (3 * frame.size, 3 * frame.size))  # decodes a far larger JPEG at a part of its size
        return levels(square(picture, frame))


def look(image: Any, what: str | None = None, decode: bool = False) -> bool:
    """Whether an image is animated. Raises InputError as `read` does, but from the header, unless told to decode."""
    with _opened(image, what) as picture:
        # MPO: a camera's JPEG with a second picture inside
        animated = picture.format != "MPO" and bool(getattr(picture, "is_animated", False))
        if decode:
            picture.load()
        return animated


def square(picture: Image.Image, frame: Frame) -> Image.Image:
    """A PIL image upright, on the background, in 8 bits a channel, and as large as the frame."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] in "IF":  # 16 and 32 bits; convert() would cut them off at 255
        picture = Image.fromarray(_eight_bits(numpy.asarray(picture)))
    if picture.has_transparency_data:
        behind = Image.new("RGBA", picture.size, frame.background)
        picture = Image.alpha_composite(behind, picture.convert("RGBA"))
    picture = picture.convert("L" if frame.channels == 1 else "RGB")
    size = (frame.size, frame.size)
    if frame.fit == "pad":
        return ImageOps.pad(picture, size, frame.resampling, frame.background)
    if frame.fit == "crop":
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    return picture.resize(size, frame.resampling)


def levels(picture: Image.Image) -> Tensor:
    """A greyscale or RGB picture as bytes (channels, height, width)."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.reshape(picture.height, picture.width, -1).permute(2, 0, 1)


def pixels(picture: Image.Image) -> Tensor:
    """A greyscale or RGB picture as (channels, height, width) in [0, 1]."""
    return floats(levels(picture))


def floats(image: Tensor) -> Tensor:
    """Bytes as floats in [0, 1]; floats as they are."""
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def _eight_bits(numbers: numpy.ndarray) -> numpy.ndarray:
    """Numbers over the top of their range (1, 255 or 65,535), or over the range that they have where they leave these.

    Raises ValueError at NaN and infinity.
    """
    if numbers.dtype == numpy.uint8:
        return numbers
    if not numpy.isfinite(numbers).all():
        raise ValueError("it holds NaN or infinity")
    tops: tuple[int, ...] = (255, 65_535)
    if numbers.dtype.kind in "fb":
        tops = (1, *tops)
    if numbers.dtype.kind == "u" and numbers.dtype.itemsize == 2:
        tops = (65_535,)
    low, high = float(numbers.min()), float(numbers.max())
    top = next((top for top in tops if low >= 0 and high <= top), None)
    bottom, spread = (0.0, float(top)) if top else (low, high - low or 1.0)
    return ((numbers.astype(numpy.float64) - bottom) / spread * 255).round().astype(numpy.uint8)


def _as_it_is(image: Tensor, frame: Frame) -> Tensor:
    if image.dtype == torch.uint8 and tuple(image.shape) == frame.shape:
        return image
    image = image.float()
    if tuple(image.shape) != frame.shape or not 0 <= float(image.min()) <= float(image.max()) <= 1:
        between = f" from {float(image.min()):g} to {float(image.max()):g}" if image.numel() else ""
        raise InputError(
            f"an image of shape {tuple(image.shape)}{between}; give tensors ({', '.join(map(str, frame.shape))}) in "
            "[0, 1], PIL images or paths"
        )
    return image


@contextlib.contextmanager
def _opened(image: Any, what: str | None) -> Iterator[Image.Image]:
    """An image as PIL's. Whatever goes wrong with it inside `with` is an InputError that names it."""
    what = what or (f"image '{image}'" if isinstance(image, (str, os.PathLike)) else "an image")
    try:
        with contextlib.ExitStack() as stack:
            picture = _picture(image, stack)
            size = f"{picture.width:,} x {picture.height:,} pixels"
            if picture.width * picture.height > LARGEST:
                raise InputError(f"{what} has {size}; scale it to at most {LARGEST:,} in all")
            if min(picture.size) < LEAST:
                raise InputError(f"{what} has {size}; remove it, or give one of at least {LEAST} a side")
            yield picture
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # Pillow's own, at twice LARGEST
        raise InputError(f"{what} is too large ({error}); scale it to at most {LARGEST:,} pixels in all") from error
    except Exception as error:  # Pillow raises errors of every kind on damaged files
        why = "it is no image" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", "") or error
        raise InputError(f"{what} cannot be read ({why}); remove it or save it again") from error


def _picture(image: Any, stack: contextlib.ExitStack) -> Image.Image:
    """PIL's image, its file open until the stack ends."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Mapping):  # as `datasets` holds an image that it was told not to decode
        image = image.get("bytes") or image.get("path")
    if isinstance(image, numpy.ndarray):
        grey = image.ndim == 3 and image.shape[2] == 1
        return Image.fromarray(_eight_bits(image[..., 0] if grey else image))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the caller refuses it
        return stack.enter_context(Image.open(io.BytesIO(image) if isinstance(image, bytes) else image))


# many images


class Bytes:
    """Images' bytes, in blocks of many: allocated one by one, between the far larger pictures that they are made from,
    each would leave a hole in the process's memory that is as large as such a picture."""

    def __init__(self, shape: tuple[int, int, int]):
        self._shape, self._each = shape, max(1, BLOCK // math.prod(shape))
        self._blocks: list[Tensor] = []
        self._n = 0

    def keep(self, image: Tensor) -> Tensor:
        """The same bytes, from now on in a block."""
        if self._n % self._each == 0:
            self._blocks.append(torch.empty(self._each, *self._shape, dtype=torch.uint8))
        place = self._blocks[-1][self._n % self._each]
        self._n += 1
        return place.copy_(image)


class Images:
    """n images that are read when they are asked for: images[rows] is (len(rows), channels, size, size) in [0, 1].

    What was decoded stays in memory until KEPT bytes do; the others are read again each time.
    """

    def __init__(self, get: Callable[[int], Any], n: int, frame: Frame):
        self.frame = frame
        self._get, self._rows = get, torch.arange(n)
        self._kept: dict[int, Tensor] = {}
        self._bytes = Bytes(frame.shape)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.frame.shape))

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        images = [self._read(i) for i in self._rows[rows].tolist()]
        if len({image.dtype for image in images}) > 1:
            images = [floats(image) for image in images]
        return floats(torch.stack(images)) if images else torch.zeros(0, *self.frame.shape)

    def split(self, n: int) -> Iterator[Tensor]:
        """All of them, n at a time."""
        for first in range(0, len(self), n):
            yield self[first : first + n]

    def part(self, rows: Tensor) -> Images:
        """Those at `rows` (indices or a mask); nothing is read."""
        some = Images(self._get, 0, self.frame)
        some._rows, some._kept, some._bytes = self._rows[rows], self._kept, self._bytes
        return some

    def _read(self, i: int) -> Tensor:
        if i in self._kept:
            return self._kept[i]
        source = self._get(i)
        image = read(source, self.frame)
        if getattr(source, "shape", None) == self.frame.shape or (len(self._kept) + 1) * image.numel() > KEPT:
            return image
        self._kept[i] = self._bytes.keep(image)
        return self._kept[i]


class Encoded:
    """What a function, such as Model.encode_images, makes of images when it is asked for: encoded[rows] is a tensor."""

    def __init__(self, images: Images, function: Callable[[Tensor], Tensor]):
        self.images, self._function = images, function
        self.shape = torch.Size((len(images), *function(images[:1]).shape[1:]))
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        picked = torch.arange(len(self))[rows]
        return torch.cat([self._function(self.images[some]) for some in picked.split(TOGETHER)])


def encoded(images: Tensor | Images, function: Callable[[Tensor], Tensor]) -> Tensor | Encoded:
    """function(images) of all images; of those that are asked for, where images are read only then."""
    return function(images) if isinstance(images, Tensor) else Encoded(images, function)
