"""Source images in a Condition: the checks of every editor, and how their parts join those of the words.

In: a condition, images (n, 3, height, width) in [0, 1] or latents. Out: a condition of as many rows as the longer has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.core import Condition


def check_images(images: Tensor, multiple: int, name: str) -> None:
    """Raises InputError where images are not (n, 3, height, width) with sides that are multiples of `multiple`."""
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise InputError(f"source images have the shape {tuple(images.shape)}; give (n, 3, height, width)")
    height, width = images.shape[2:]
    if height % multiple or width % multiple or not height * width:
        raise InputError(
            f"source images of {height} x {width} pixels do not fit {name}: "
            f"resize them so that both sides are multiples of {multiple}"
        )


def check_latents(source: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raises InputError where latents (n, ...) have not the shape of the model's states."""
    if tuple(source.shape[1:]) != shape:
        raise InputError(
            f"sources of {' x '.join(map(str, source.shape[1:]))} tokens and channels do not fit {name}, "
            f"whose states have {' x '.join(map(str, shape))}; give images of another size whole"
        )


def check_rows(condition: Condition, *sources: Tensor) -> None:
    """Raises InputError where prompts and sources are neither as many nor one."""
    counts = {len(condition), *map(len, sources)} - {1}
    if len(counts) > 1:
        raise InputError(
            f"{' and '.join(str(len(one)) for one in sources)} source images do not go with {len(condition)} prompts; "
            "give one image, one prompt, or as many of each"
        )


def joined(condition: Condition, *parts: Condition) -> Condition:
    """All the parts in one condition; one row serves all of the others' rows. Later names take earlier ones' place."""
    rows = max(len(one) for one in (condition, *parts))
    return Condition({name: part for one in (condition, *parts) for name, part in one.repeat(rows).parts.items()})


def shared(part: Tensor) -> Tensor:
    """The one row that all rows of a part are: (n, ...) -> (...). A network has one place for each token of a batch.

    Raises InputError where rows differ.
    """
    if not torch.equal(part, part[:1].expand_as(part)):
        raise InputError("source images of different shapes cannot share a batch; predict them apart")
    return part[0]


def several(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The first sources, the second ones and so on, each (n, 3, height, width)."""
    return [images] if isinstance(images, Tensor) else list(images)
