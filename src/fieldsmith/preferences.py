"""Preference pairs of the user's own: a prompt, the image that people chose, the one that they rejected.

In: JSON lines {"prompt": ..., "chosen": path, "rejected": path} with paths relative to the file, or with Pick-a-Pic's
columns (caption, jpg_0, jpg_1, label_0, label_1); or such dicts in Python, or a `datasets` dataset, whose images may be
PIL's or a file's bytes. Out: `Preferences`, whose images are read when they are asked for. Ties are skipped.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from PIL import Image
from rich.console import Console
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.pictures import Frame, Images, look
from fieldsmith.read import PAIR, read_json_lines

# of Pick-a-Pic's labels the chosen and the rejected column; None: a tie
LABELS: dict[Any, tuple[str, str] | None] = {(1, 0): ("jpg_0", "jpg_1"), (0, 1): ("jpg_1", "jpg_0"), (0.5, 0.5): None}


@dataclass(frozen=True)
class Preferences:
    """n pairs. `chosen` and `rejected` give the image of pair i, or are the model's images (n, ...) in [0, 1]."""

    prompts: tuple[str, ...]
    chosen: Callable[[int], Any] | Tensor
    rejected: Callable[[int], Any] | Tensor

    def images(self, frame: Frame) -> tuple[Tensor | Images, Tensor | Images]:
        """The chosen and the rejected ones, as large as the frame."""
        both = (self.chosen, self.rejected)
        first, second = (one if isinstance(one, Tensor) else Images(one, len(self.prompts), frame) for one in both)
        return first, second


def load(source: str | os.PathLike[str] | Iterable[Any]) -> Preferences:
    """The pairs of a file, of dicts or of a dataset; prints how many ties are skipped.

    Raises InputError, with the line's or pair's number, where an image is missing, no image or the other one again,
    where labels are none of Pick-a-Pic's, and where nothing is left. Of a dataset, whose images lie in its own files,
    only the first pair's images are looked at.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        rows = read_json_lines(path, "pairs file", PAIR)
        return _listed([(f"line {n} of '{path}'", entry) for n, entry in rows], f"pairs file '{path}'", path.parent)
    columns = getattr(source, "column_names", None)
    if isinstance(columns, Mapping):
        first = next(iter(columns), "")
        raise InputError(f"this dataset has the splits {', '.join(columns)}; give one of them, as dataset['{first}']")
    if columns:
        return _dataset(source, columns)
    if isinstance(source, Mapping):
        raise InputError(f"these pairs are one dict; give a list of dicts such as {PAIR}")
    return _listed([(f"pair {n}", entry) for n, entry in enumerate(source, 1)], "these pairs", Path())


def _listed(entries: Sequence[tuple[str, Any]], source: str, folder: Path) -> Preferences:
    """Pairs that are at hand, each with where it stands; image paths start from the folder."""
    prompts, chosen, rejected = [], [], []
    for where, entry in entries:
        if not isinstance(entry, Mapping):
            raise InputError(f"{where} is a {type(entry).__name__}; give a dict such as {PAIR}")
        columns = _choice(entry, where)
        if columns is None:
            continue
        better, worse = (_image(entry.get(column), column, where, folder) for column in columns)
        _check_different(better, worse, where)
        prompts.append(_prompt(entry, where))
        chosen.append(better)
        rejected.append(worse)
    _check_some(len(prompts), len(entries), source)
    return Preferences(tuple(prompts), chosen.__getitem__, rejected.__getitem__)


def _dataset(dataset: Any, columns: Sequence[str]) -> Preferences:
    """Of the `datasets` library: labels and prompts are read now, by column, images one by one later."""
    if not hasattr(dataset, "__len__"):
        raise InputError("a dataset that streams cannot be drawn from at random; load it without streaming=True")
    known = [name for name in columns if name in ("prompt", "caption", "label_0", "label_1")]
    pick_a_pic = "label_0" in known
    values = zip(*(list(dataset[name]) for name in known), strict=True)
    entries = [dict(zip(known, row, strict=True)) for row in values]
    choices = [
        _choice(entry, f"pair {n}") if pick_a_pic else ("chosen", "rejected") for n, entry in enumerate(entries, 1)
    ]
    rows = [(i, columns) for i, columns in enumerate(choices) if columns]
    _check_some(len(rows), len(dataset), "this dataset")
    first, names = rows[0]
    better, worse = (_image(dataset[first].get(name), name, f"pair {first + 1}", Path()) for name in names)
    _check_different(better, worse, f"pair {first + 1}")
    return Preferences(
        tuple(_prompt(entries[i], f"pair {i + 1}") for i, _ in rows),
        lambda n: dataset[rows[n][0]][rows[n][1][0]],
        lambda n: dataset[rows[n][0]][rows[n][1][1]],
    )


def _choice(entry: Mapping[str, Any], where: str) -> tuple[str, str] | None:
    """What the chosen and the rejected image are called in an entry; None at a tie."""
    if "label_0" not in entry:
        return "chosen", "rejected"
    labels = entry["label_0"], entry.get("label_1")
    try:
        return LABELS[labels]
    except (KeyError, TypeError):
        raise InputError(
            f"{where} has label_0={labels[0]!r} and label_1={labels[1]!r}; write 1 for the image that was chosen and 0 "
            "for the other one, or 0.5 for both at a tie"
        ) from None


def _prompt(entry: Mapping[str, Any], where: str) -> str:
    prompt = entry.get("prompt", entry.get("caption"))
    if not isinstance(prompt, str):
        raise InputError(f"{where} has no prompt; write {PAIR}")
    return prompt.strip()


def _image(image: Any, column: str, where: str, folder: Path) -> Any:
    """An entry's image, a path from the folder made absolute. Raises InputError where it is not there or is none."""
    if image is None or image == "":
        raise InputError(f"{where} has no image '{column}'; write {PAIR}")
    what = f"the {column} image of {where}"
    if isinstance(image, (str, os.PathLike)):
        path = (folder / image).resolve()
        what = f"image '{str(image)[:200]}' of {where}"
        if not _is_file(path):
            raise InputError(f"{what} does not exist; put it into '{folder}' or fix the path")
        image = path
    if not isinstance(image, Tensor):  # whose shape is asked once the model is known
        look(image, what)
    return image


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or with a zero in it
        return False


def _check_different(better: Any, worse: Any, where: str) -> None:
    """Raises InputError where both images of a pair are one: there is nothing to learn from it."""
    if isinstance(better, Path) and isinstance(worse, Path):
        same = better == worse or filecmp.cmp(better, worse, shallow=False)
    elif isinstance(better, Image.Image) and isinstance(worse, Image.Image):
        same = better.size == worse.size and better.tobytes() == worse.tobytes()
    elif hasattr(better, "shape") and hasattr(worse, "shape"):
        same = numpy.array_equal(better, worse)
    else:
        same = type(better) is type(worse) and better == worse
    if same:
        raise InputError(f"the two images of {where} are the same; remove the pair")


def _check_some(kept: int, n: int, source: str) -> None:
    """Raises InputError where no pair is left; says how many were ties."""
    if not n:
        raise InputError(f"{source}: no pair is there (the file or list is empty); give some such as {PAIR}")
    if not kept:
        raise InputError(
            f"{source}: all {n} pairs are ties, from which nothing can be learned; give some with a choice"
        )
    if kept < n:
        said = f"{source}: {n - kept:,} of {n:,} pairs are ties, which are skipped"
        Console(stderr=True).print(said, markup=False, soft_wrap=True)
