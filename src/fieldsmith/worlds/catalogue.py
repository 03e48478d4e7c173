"""The worlds with a judge, by name; or a folder of images with the user's own.

In: 'columns', 'cards', or a folder. Out: a `JudgedWorld`.
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Callable

from fieldsmith.errors import InputError
from fieldsmith.pictures import Frame
from fieldsmith.worlds import own
from fieldsmith.worlds.cards import CardsWorld
from fieldsmith.worlds.columns import ColumnsWorld
from fieldsmith.worlds.judged import JudgedWorld
from fieldsmith.worlds.own import Judge

WORLDS: dict[str, Callable[..., JudgedWorld]] = {"columns": ColumnsWorld, "cards": CardsWorld}


def load(
    source: str,
    size: int | None = None,
    judge: Judge | None = None,
    channels: int = 3,
    fit: str = "crop",
    background: str = "white",
) -> JudgedWorld:
    """The named world at a size (None: its own), or a folder of images (None: at 64) with the judge that it needs.

    `fit` and `background` of its images as in config.DataConfig. Raises InputError where there is no such world or
    folder, and where a judge is missing or too much.
    """
    if source in WORLDS:
        if judge is not None:
            raise InputError(f"world '{source}' has a judge of its own; leave out '{judge}'")
        return WORLDS[source](**({} if size is None else {"size": size}))
    if not pathlib.Path(source).is_dir():
        near = difflib.get_close_matches(source, list(WORLDS), n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known worlds: {', '.join(WORLDS)}; or name a folder"
        raise InputError(f"'{source}' is neither a world with a judge nor a folder of images; {hint}")
    if judge is None:
        raise InputError(f"folder '{source}' needs a judge; name one: file.py:name, package.module:name or http://")
    return own.of(source, judge, Frame(64 if size is None else size, channels, fit, background))
