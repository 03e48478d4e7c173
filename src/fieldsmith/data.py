"""Data as users have them: a folder of images, a `datasets` dataset, images or pairs (image, caption) in Python.

In: what a user names or hands over; docs/data.md says what is taken. Out: `Data`: `Images`, which are read when a batch
asks for them, and their captions by Hugging Face's imagefolder convention. Everything is looked at before it is used.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console

from fieldsmith.errors import InputError
from fieldsmith.pictures import Bytes, Frame, Images, look, read
from fieldsmith.read import read_json_lines, read_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
METADATA, LINE = "metadata.jsonl", '{"file_name": "cat.png", "text": "a cat"}'
IMAGE = ("image", "img")  # what a column is called; the first that is there counts
CAPTION = ("text", "caption", "label")
SPLITS = {"train", "test", "val", "valid", "validation"}  # folders that hold folders of classes
ENDINGS = (b"IEND\xaeB`\x82", b"\xff\xd9")  # of whole PNG and JPEG files
SUSPECTS = 100  # files with another ending that are decoded to see whether they are whole


@dataclass(frozen=True)
class Data:
    """Images; the caption of each where captions were asked for, and all classes where folders or labels name them."""

    images: Images
    name: str
    captions: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


def load(source: Any, frame: Frame, captioned: bool | None = False, name: str = "data") -> Data:
    """A folder, a dataset, or an iterable of images or of pairs (image, caption), which are called `name` in messages.

    `captioned` None asks for captions where the first look finds one. Prints what of a folder is skipped. Raises
    InputError where an image cannot be used (`pictures.read`), there is none, or captions are asked for and some image
    has none or some caption no image.
    """
    if isinstance(source, (str, os.PathLike)):
        return _folder(pathlib.Path(source), frame, captioned)
    columns = getattr(source, "column_names", None)
    if isinstance(columns, Mapping):
        first = next(iter(columns), "")
        raise InputError(f"this dataset has the splits {', '.join(columns)}; give one of them, as dataset['{first}']")
    if isinstance(source, Mapping):
        raise InputError(
            f"{name} is a dict; give a folder, a dataset, or a list of images or of pairs (image, caption)"
        )
    if columns:
        captioned = any(word in columns for word in CAPTION) if captioned is None else captioned
        return _dataset(source, list(columns), frame, captioned, name)
    return _items(source, frame, captioned, name)


# folders


def _folder(folder: pathlib.Path, frame: Frame, captioned: bool | None) -> Data:
    """All images under a folder, by name; hidden files and folders are left out."""
    if not folder.is_dir():
        raise InputError(f"data '{folder}' is no folder; name one that holds images")
    walked = (os.path.join(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    paths = sorted(walked, key=lambda path: path.split(os.sep))
    shown = [path for path in paths if f"{os.sep}." not in path[len(str(folder)) :]]
    files = [path for path in shown if path.lower().endswith(SUFFIXES)]
    others = [path for path in shown if not path.lower().endswith(SUFFIXES)]
    if not files:
        lone = f" (but {len(others)} other files, such as '{os.path.basename(others[0])}')" if others else ""
        raise InputError(f"folder '{folder}' holds no images{lone}; put some there: {', '.join(SUFFIXES)}")
    found = Data(Images(files.__getitem__, len(files), frame), str(folder))
    used: set[str] = set()
    if captioned is None:
        stems = {os.path.splitext(path)[0] for path in files}
        told = any(os.path.basename(path) == METADATA or os.path.splitext(path)[0] in stems for path in others)
        captioned = told or all(pathlib.Path(path).parent != folder for path in files)
    if captioned:
        captions, used, classes = _captions(
            folder, *([pathlib.Path(path) for path in some] for some in (files, others))
        )
        found = replace(found, captions=captions, classes=classes)
    moving = _look_at(files)
    _tell(folder, sorted({*paths} - {*files} - used), "skipped, being hidden or no images")
    _tell(folder, moving, "animated, of which the first frame is taken")
    return found


def _look_at(files: Sequence[str]) -> list[str]:
    """The animated ones. Raises InputError at a file that is no image, by its header, or was cut short, by its end."""
    moving, suspects = [], 0
    for file in files:
        what = f"image '{file}'"
        try:
            with open(file, "rb") as content:
                content.seek(max(0, content.seek(0, os.SEEK_END) - 16))
                suspect = not content.read().rstrip(b"\0").endswith(ENDINGS)
                suspects += suspect
                if look(content, what, decode=suspect and suspects <= SUSPECTS):
                    moving.append(file)
        except OSError as error:
            raise InputError(f"{what} cannot be read ({error.strerror}); remove it or save it again") from error
    return moving


def _tell(folder: pathlib.Path, files: Sequence[str], what: str) -> None:
    if files:
        some = ", ".join(os.path.relpath(file, folder) for file in files[:3]) + (", ..." if len(files) > 3 else "")
        Console(stderr=True).print(f"{folder}: {len(files)} files {what} ({some})", markup=False, soft_wrap=True)


def _captions(
    folder: pathlib.Path, files: Sequence[pathlib.Path], others: Sequence[pathlib.Path]
) -> tuple[tuple[str, ...], set[str], tuple[str, ...]]:
    """A caption an image, the files that hold them, and the classes where they are folders.

    In this order: metadata.jsonl, a .txt file beside each image, the folder inside `folder` that an image lies in.
    """
    tables = [path for path in others if path.name == METADATA]
    texts = {path.with_suffix(""): path for path in others if path.suffix.lower() == ".txt"}
    beside = {file: texts[file.with_suffix("")] for file in files if file.with_suffix("") in texts}
    if tables:
        of_file = {file: caption for table in tables for file, caption in _table(table)}
        rows = {file: of_file[place] for file in files if (place := os.path.normpath(file)) in of_file}
        _all_captioned(files, rows, f"a line of {METADATA} such as {LINE}")
        return tuple(rows.values()), {str(table) for table in tables}, ()
    if beside:
        lone = sorted({*texts.values()} - {*beside.values()})
        if lone:
            raise InputError(f"caption '{lone[0]}' has no image beside it; add the image or remove the caption")
        _all_captioned(files, beside, "a .txt file with the image's name beside it")
        words = {text: read_text(text, "caption").strip() for text in beside.values()}
        empty = next((text for text, caption in words.items() if not caption), None)
        if empty:
            raise InputError(f"caption '{empty}' is empty; write what the image shows")
        return tuple(words[beside[file]] for file in files), {str(text) for text in words}, ()
    classes = tuple(sorted(part.name for part in folder.iterdir() if part.is_dir() and part.name[0] != "."))
    if not classes:
        raise InputError(
            f"data folder '{folder}' has no subfolders; put the images of each class into one of their own, or a .txt "
            f"file with its caption beside each image, or captions into {METADATA}"
        )
    if SPLITS.issuperset(classes):
        raise InputError(f"data folder '{folder}' has the splits {', '.join(classes)}; give '{folder / classes[-1]}'")
    loose = next((file for file in files if file.parent == folder), None)
    if loose:
        raise InputError(f"image '{loose}' lies in no class's folder; move it into one, or away")
    return tuple(file.relative_to(folder).parts[0] for file in files), set(), classes


def _table(table: pathlib.Path) -> Iterable[tuple[str, str]]:
    """The images and captions of a metadata.jsonl, whose file names start from its own folder."""
    for number, entry in read_json_lines(table, "captions file", LINE):
        name, caption = entry.get("file_name"), next((entry[key] for key in CAPTION if key in entry), None)
        if not isinstance(name, str) or caption is None:
            raise InputError(f"line {number} of '{table}' lacks a file_name or a {' or '.join(CAPTION)}; write {LINE}")
        if not (table.parent / name).is_file():
            raise InputError(f"image '{name}' of line {number} of '{table}' does not exist; add it or remove the line")
        yield os.path.normpath(table.parent / name), str(caption)


def _all_captioned(files: Sequence[pathlib.Path], captions: Collection[pathlib.Path], fix: str) -> None:
    lacking = [file for file in files if file not in captions]
    if lacking:
        raise InputError(f"{len(lacking)} of {len(files)} images have no caption, such as '{lacking[0]}'; add {fix}")


# in Python


def _dataset(dataset: Any, columns: list[str], frame: Frame, captioned: bool, name: str) -> Data:
    """Of the `datasets` library, whose labels know their names; images are decoded one by one when they are read."""
    if not hasattr(dataset, "__len__"):
        raise InputError("a dataset that streams cannot be drawn from at random; load it without streaming=True")
    image = _column(columns, IMAGE, "images")
    if not len(dataset):
        raise InputError(f"{name} holds no images; give some")
    images = Images(lambda i: dataset[i][image], len(dataset), frame)
    _check(dataset[0][image], frame, 1, name)
    if not captioned:
        return Data(images, name)
    column = _column(columns, CAPTION, "captions")
    feature = (getattr(dataset, "features", None) or {}).get(column)
    names: tuple[str, ...] = tuple(getattr(feature, "names", None) or ())
    values = list(dataset[column])
    lacking = next((i for i, value in enumerate(values, 1) if value is None or (names and value < 0)), None)
    if lacking:
        raise InputError(f"image {lacking} of {name} has no {column}; leave it out of the dataset")
    return Data(images, name, tuple(names[value] if names else str(value) for value in values), names)


def _column(columns: list[str], known: tuple[str, ...], what: str) -> str:
    column = next((name for name in known if name in columns), None)
    if column is None:
        raise InputError(f"this dataset has no {what} among its columns {', '.join(columns)}; name one '{known[0]}'")
    return column


def _items(source: Iterable[Any], frame: Frame, captioned: bool | None, name: str) -> Data:
    """Images or pairs. What can be asked for its n-th item is asked when that is read; all else is read now."""
    items: Any = source
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        items, kept = [], Bytes(frame.shape)
        for number, item in enumerate(source, 1):
            image, caption = _parts(item, number)
            pixels = read(image, frame, _what(image, number, name))
            items.append((kept.keep(pixels) if pixels.dtype == torch.uint8 else pixels, caption))
    if not len(items):
        raise InputError(f"{name} holds no images; give some")
    if captioned is None:
        captioned = _parts(items[0], 1)[1] is not None
    captions = []
    for number in range(1, len(items) + 1):
        image, caption = _parts(items[number - 1], number)
        _check(image, frame, number, name)
        if captioned and caption is None:
            raise InputError(f"image {number} of {name} has no caption; give pairs (image, caption)")
        captions.append(str(caption))
    images = Images(lambda i: _parts(items[i], i + 1)[0], len(items), frame)
    return Data(images, name, tuple(captions) if captioned else ())


def _check(image: Any, frame: Frame, number: int, name: str) -> None:
    """Raises InputError at an image that cannot be used, as far as that is told without decoding a file."""
    if hasattr(image, "shape"):  # an array or a tensor
        read(image, frame, _what(image, number, name))
    else:
        look(image, _what(image, number, name))


def _what(image: Any, number: int, name: str) -> str:
    return f"image '{image}'" if isinstance(image, (str, os.PathLike)) else f"image {number} of {name}"


def _parts(item: Any, number: int) -> tuple[Any, Any]:
    """An item's image and its caption, None where it has none."""
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    if isinstance(item, Mapping) and not {"bytes", "path"} & set(item):
        image = next((item[key] for key in IMAGE if key in item), None)
        if image is None:
            raise InputError(f"image {number} has only {', '.join(map(str, item))}; give one under 'image'")
        return image, next((item[key] for key in CAPTION if key in item), None)
    return item, None
