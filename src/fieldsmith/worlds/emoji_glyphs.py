"""The emoji world's pictures: objects cut from the Noto colour emoji font (SIL Open Font License, emoji-OFL.txt).

In: an object and how large it is. Out: its colours and its transparency. emoji.png is made by experiments/zoo.
"""

from __future__ import annotations

import pathlib
from functools import cache

import numpy
from PIL import Image

from fieldsmith.worlds.emoji_captions import BACKGROUNDS, OBJECTS

SIDE = 48  # pixels of a picture
LARGE, MIDDLE, SMALL = (34, 36, 38), (20, 21, 22), (15, 16)  # sides that the judge reads, in pixels; LARGE only alone
USUAL = {LARGE: 36, MIDDLE: 20, SMALL: 16}  # the side that pictures have
ATLAS = pathlib.Path(__file__).parent / "emoji.png"
CELL, COLUMNS = 64, 8  # of the atlas


@cache
def glyph(name: str, side: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """An object's colours (side, side, 3) and how far they cover what is behind, (side, side, 1); in [0, 1]."""
    row, column = divmod(OBJECTS.index(name), COLUMNS)
    cell = _atlas().crop((column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
    drawn = numpy.asarray(cell.resize((side, side), Image.Resampling.LANCZOS), numpy.float32) / 255
    return drawn[..., :3], drawn[..., 3:]


@cache
def _atlas() -> Image.Image:
    return Image.open(ATLAS).convert("RGBA")


def ground(background: str) -> numpy.ndarray:
    """A background's colour, (3,) in [0, 1]."""
    return numpy.asarray(BACKGROUNDS[background], numpy.float32) / 255
