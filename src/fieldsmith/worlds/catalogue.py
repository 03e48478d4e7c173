"""The worlds with a judge, by name; or a folder of images with the user's own.

In: 'columns', 'cards', 'shapes', or a folder. Out: a `JudgedWorld`.
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Callable, Hashable

from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.pictures import Frame
from fieldsmith.worlds import own
from fieldsmith.worlds.cards import CardsWorld
from fieldsmith.worlds.columns import ColumnsWorld
from fieldsmith.worlds.judged import JudgedWorld, Verdicts, generator_of, readable
from fieldsmith.worlds.own import Judge
from fieldsmith.worlds.shapes import HELD_OUT, Concept, ShapesWorld, concepts


class CaptionedShapes:
    """The shapes world, with a caption an image, as one of valid images: those that show one of its shapes."""

    name, channels, support = "shapes", 3, len(concepts()) - 1

    def __init__(self, size: int = 32):
        self.size, self._shapes = size, ShapesWorld(size)

    def captioned(self, n: int, seed: int) -> tuple[Tensor, list[str]]:
        """Images to train on, and the caption of each."""
        drawn = self._shapes.sample(n, seed)
        return drawn.images, drawn.captions

    def sample(self, n: int, seed: int, held_out: bool = False) -> Tensor:
        if held_out:
            return self._shapes.render([Concept(*HELD_OUT)] * n, generator_of(seed, held_out))
        return self.captioned(n, seed)[0]

    def judge(self, images: Tensor) -> Verdicts:
        images, finite = readable(images, self)
        seen = self._shapes.judge(images)
        valid, names = seen.valid & finite, seen.names()
        good = valid.tolist()
        reasons = tuple(() if one else ("no shape of one colour",) for one in good)
        return Verdicts(valid, finite, reasons, tuple(n if one else None for n, one in zip(names, good, strict=True)))

    def novel(self, content: Hashable) -> bool:
        return content == " ".join(HELD_OUT)


WORLDS: dict[str, Callable[..., JudgedWorld]] = {
    "columns": ColumnsWorld, "cards": CardsWorld, "shapes": CaptionedShapes,
}  # fmt: skip


def load(
    source: str,
    size: int | None = None,
    judge: Judge | None = None,
    channels: int = 3,
    fit: str = "crop",
    background: str = "white",
    words: bool = False,
    judged: bool = False,
) -> JudgedWorld:
    """The named world at a size (None: its own), or a folder of images (None: at 64) with the user's judge.

    `fit` and `background` of its images as in config.DataConfig; `words`: their captions are of use. Raises InputError
    where there is no such world or folder, and where a judge is too much, or missing where it must be `judged`.
    """
    if source in WORLDS:
        if judge is not None:
            raise InputError(f"world '{source}' has a judge of its own; leave out '{judge}'")
        return WORLDS[source](**({} if size is None else {"size": size}))
    if not pathlib.Path(source).is_dir():
        near = difflib.get_close_matches(source, list(WORLDS), n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known worlds: {', '.join(WORLDS)}; or name a folder"
        raise InputError(f"'{source}' is neither a world with a judge nor a folder of images; {hint}")
    if judged and judge is None:
        raise InputError(f"folder '{source}' needs a judge; name one: file.py:name, package.module:name or http://")
    return own.of(source, judge, Frame(64 if size is None else size, channels, fit, background), words)
