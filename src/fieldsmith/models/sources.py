"""Editors: families of prompts that also see source images, as more tokens after those of the state.

In: a condition, images (n, 3, height, width) in [0, 1] or latents. Out: a condition of as many rows as the longer has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.core import Condition
from fieldsmith.models.prompted import Prompted

Size = tuple[int, int]  # height and width of a source, in tokens


class Editor(Prompted):
    """A family adds `_places`, how its network is told where the tokens of sources lie."""

    LARGEST: ClassVar[int | None] = None  # pixels of a source at most
    tokens: int  # of a state
    several_sources = True  # whether one prompt may have more than one source image

    def with_images(self, condition: Condition, images: Tensor | Sequence[Tensor], grad: bool = False) -> Condition:
        """The condition with source images (n, 3, height, width) in [0, 1], or with several of them in a sequence.

        Adds the part "source" (n, source tokens, channels), the packed latents, and the family's own parts for their
        places. One row or one image serves all of the other. `grad` lets a gradient through the latents. Raises
        InputError where neither is one and they differ, and at images of a wrong number, shape or size.
        """
        sources = [images] if isinstance(images, Tensor) else list(images)
        if len(sources) > 1 and not self.several_sources:
            raise InputError(f"{self.name} takes one source image for each prompt, not {len(sources)}; give one tensor")
        for source in sources:
            self._check_image(source)
        check_rows(condition, *sources)  # before the work
        latents = [self.encode_images(source.to(self.device), grad) for source in sources]
        sizes = [(source.shape[2] // self.multiple, source.shape[3] // self.multiple) for source in sources]
        return self._with_sources(condition, latents, sizes, sources)

    def with_latents(self, condition: Condition, source: Tensor) -> Condition:
        """As `with_images`, from latents that `encode_images` or a rollout gave: (n, tokens, channels), the states'."""
        if tuple(source.shape[1:]) != self.latent_shape:
            raise InputError(
                f"sources of {' x '.join(map(str, source.shape[1:]))} tokens and channels do not fit {self.name}, "
                f"whose states have {' x '.join(map(str, self.latent_shape))}; give images of another size whole"
            )
        check_rows(condition, source)
        side = int(self.tokens**0.5)
        return self._with_sources(condition, [source.to(self.device)], [(side, side)], None)

    def _with_sources(
        self, condition: Condition, latents: list[Tensor], sizes: list[Size], images: list[Tensor] | None
    ) -> Condition:
        rows = max(map(len, latents))
        source = torch.cat([Condition({"": part}).repeat(rows).parts[""] for part in latents], dim=1)
        return joined(condition, Condition({"source": source}), Condition(self._places(sizes)))

    def _places(self, sizes: list[Size]) -> dict[str, Tensor]:
        """Parts of one row that say where the tokens of sources lie, which their number alone does not tell."""
        raise NotImplementedError

    def _check_image(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise InputError(f"source images have the shape {tuple(images.shape)}; give (n, 3, height, width)")
        height, width = images.shape[2:]
        if height % self.multiple or width % self.multiple or not height * width:
            raise InputError(
                f"source images of {height} x {width} pixels do not fit {self.name}: "
                f"resize them so that both sides are multiples of {self.multiple}"
            )
        if self.LARGEST and height * width > self.LARGEST:
            raise InputError(
                f"source images of {height} x {width} pixels are larger than the {self.LARGEST} of family "
                f"{self.family}; resize them"
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
    """All the parts in one condition; one row serves all of the others' rows. Later names replace earlier ones."""
    rows = max(len(one) for one in (condition, *parts))
    every = {name: part for one in (condition, *parts) for name, part in one.repeat(rows).parts.items()}
    return Condition(every, condition.repeat(rows).words)


def tokens_of(x_t: Tensor, condition: Condition) -> Tensor:
    """The image tokens that a network sees, x_t first and then those of sources: (batch, tokens, channels)."""
    source = condition.parts.get("source")
    return x_t if source is None else torch.cat((x_t, source.to(x_t)), dim=1)


def shared(part: Tensor) -> Tensor:
    """The one row that all rows of a part are: (n, ...) -> (...). A network has one place for each token of a batch.

    Raises InputError where rows differ.
    """
    if not torch.equal(part, part[:1].expand_as(part)):
        raise InputError("source images of different shapes cannot share a batch; predict them apart")
    return part[0]
