"""Files of editing sessions: an image and the instructions that edit it, turn after turn.

In: JSON lines, {"image": path relative to the file, "instructions": [...], "id": optional}, or the CSV file of EdiVal
(github.com/TianyuCodings/EdiVal, oai_instruction_generation_output.csv). Out: `Session`s, and their images as a tensor.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldsmith.errors import InputError
from fieldsmith.run import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

LINE = '{"image": "cat.png", "instructions": ["make the cat red"]}'
EDIVAL_COLUMNS = ("image_index", "turns", "instructions")
EDIVAL_IMAGES = "input_images_resize_512"  # EdiVal's archive of images, unpacked beside the CSV file


@dataclass(frozen=True)
class Session:
    id: str
    image: Path  # absolute
    instructions: tuple[str, ...]  # one a turn


def read_sessions(path: str | Path) -> list[Session]:
    """The sessions of a file, in its order; '.csv' is read as EdiVal's, all else as JSON lines.

    All have the same number of turns and different ids (without one, the line's number). Of EdiVal's rows, which repeat
    an image's instructions up to each turn, the longest counts; its images lie beside the file or in
    'input_images_resize_512' there. Raises InputError, with the line's number, at anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"sessions file '{path}' does not exist; name a file of lines such as {LINE}")
    rows = _edival(path) if path.suffix.lower() == ".csv" else _json_lines(path)
    try:
        found = list(rows)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"sessions file '{path}' is no text ({error}); save it as UTF-8") from error
    if not found:
        raise InputError(f"sessions file '{path}' is empty; write a line for each session, such as {LINE}")
    lines: dict[str, int] = {}
    first_line, first = found[0]
    for line, session in found:
        if session.id in lines:
            raise InputError(
                f"id '{session.id}' is at line {lines[session.id]} and line {line} of '{path}'; give each its own"
            )
        lines[session.id] = line
        if len(session.instructions) != len(first.instructions):
            raise InputError(
                f"session '{first.id}' (line {first_line}) has {len(first.instructions)} turns, '{session.id}' (line "
                f"{line}) has {len(session.instructions)} in '{path}'; give all the same number"
            )
    return [session for _, session in found]


def write_sessions(path: str | Path, sessions: Sequence[Session]) -> None:
    """JSON lines that `read_sessions` reads back; image paths become relative to the file's folder."""
    path = Path(path)
    folder = path.resolve().parent
    lines = [
        {"id": one.id, "image": Path(os.path.relpath(one.image, folder)).as_posix(), "instructions": one.instructions}
        for one in sessions
    ]
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def load_images(sessions: Sequence[Session], size: int) -> Tensor:
    """The sessions' images (n, 3, size, size) in [0, 1], as RGB without alpha, turned upright by their EXIF.

    An image of another size is cut to its central square and resized by Lanczos. Raises InputError at a size below 1
    and an image that cannot be read.
    """
    import numpy
    import torch
    from PIL import Image, ImageOps

    if size < 1:
        raise InputError(f"size={size}: images need at least 1 pixel a side")
    images = torch.zeros(len(sessions), 3, size, size)
    for row, session in enumerate(sessions):
        try:
            with Image.open(session.image) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
        # pillow raises all of these on files that are cut short, damaged or far too large
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise InputError(
                f"image '{session.image}' of session '{session.id}' cannot be read ({error}); replace it"
            ) from error
        if image.size != (size, size):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        images[row] = torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255
    return images


@dataclass(frozen=True)
class Listed:
    """Sessions of a file as a training task sees them, cut to `turns` of their turns; images at `size` pixels."""

    sessions: tuple[Session, ...]
    size: int
    turns: int

    @staticmethod
    def read(path: str | Path, size: int) -> Listed:
        """Every session of the file. Raises InputError as `read_sessions` does."""
        found = read_sessions(path)
        load_images(found[:1], size)  # a folder of images that was moved is refused before anything runs
        return Listed(tuple(found), size, len(found[0].instructions))

    def drawn(self, n: int, seed: int, turns: int) -> Listed:
        """n of them in random order, each once before any comes again."""
        draw = random.Random(seed)
        rows: list[Session] = []
        while len(rows) < n:
            rows += draw.sample(self.sessions, min(n - len(rows), len(self.sessions)))
        return Listed(tuple(rows), self.size, turns)

    def __len__(self) -> int:
        return len(self.sessions)

    def __getitem__(self, rows: Sequence[int]) -> Listed:
        return Listed(tuple(self.sessions[i] for i in rows), self.size, self.turns)

    def prompts(self, turn: int) -> list[str]:
        return [one.instructions[turn - 1] for one in self.sessions]

    def clean(self, turn: int) -> Tensor:
        """The start; what later turns should give is not in a file."""
        assert turn == 0, "session files hold no planned images"
        different = list(dict.fromkeys(self.sessions))
        images = load_images(different, self.size)
        return images[[different.index(one) for one in self.sessions]]


def _json_lines(path: Path) -> Iterator[tuple[int, Session]]:
    """Line numbers (from 1) and sessions."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"line {number} of '{path}'"
            entry = _parsed(json.loads, line, f"{where} is no JSON; write {LINE}")
            if not isinstance(entry, dict):
                raise InputError(f"{where} is no JSON object but {line.strip()[:80]}; write {LINE}")
            image, name = entry.get("image"), entry.get("id", number)
            if not isinstance(image, str) or not image:
                raise InputError(f"{where} names no image; write {LINE}")
            if not isinstance(name, (str, int)) or isinstance(name, bool):
                raise InputError(f"id {name} at {where} is no text; write it in quotes or leave it out")
            file_of = path.parent / image
            if not file_of.is_file():
                raise InputError(
                    f"image '{image}' of {where} does not exist; put it into '{path.parent}' or fix the path"
                )
            yield number, Session(str(name), file_of.resolve(), _instructions(entry.get("instructions"), where))


def _edival(path: Path) -> Iterator[tuple[int, Session]]:
    """The row with the most turns of each image, and its line's number."""
    longest: dict[str, tuple[int, int, str]] = {}  # image index -> turns, line, instructions
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        lacking = [column for column in EDIVAL_COLUMNS if column not in (rows.fieldnames or ())]
        if lacking:
            raise InputError(
                f"'{path}' lacks EdiVal's column {', '.join(lacking)}; a .csv file is read in that format, else write "
                f"JSON lines such as {LINE}"
            )
        for row in rows:
            where = f"line {rows.line_num} of '{path}'"
            turns = _parsed(int, row["turns"], f"turns '{row['turns']}' at {where} is no number; write 1, 2 or 3")
            if turns > longest.get(row["image_index"], (0,))[0]:
                longest[row["image_index"]] = (turns, rows.line_num, row["instructions"])
    for index, (_, line, text) in longest.items():
        where = f"line {line} of '{path}'"
        given = _parsed(ast.literal_eval, text, f"instructions at {where} are no list; write \"['first', 'second']\"")
        names = [f"{folder}{index}_input_raw.{kind}" for folder in ("", f"{EDIVAL_IMAGES}/") for kind in ("jpg", "png")]
        images = [path.parent / name for name in names if (path.parent / name).is_file()]
        if not images:
            raise InputError(
                f"image '{index}_input_raw.jpg' (or .png) of {where} does not exist; unpack EdiVal's "
                f"{EDIVAL_IMAGES}.zip into '{path.parent / EDIVAL_IMAGES}'"
            )
        # some of EdiVal's instructions come in a second pair of quotes
        unquoted = [
            one[1:-1] if isinstance(one, str) and len(one) > 2 and one[0] == one[-1] == '"' else one
            for one in (given if isinstance(given, list) else [given])
        ]
        yield line, Session(index, images[0].resolve(), _instructions(unquoted, where))


def _parsed(parse: Callable[[Any], Any], text: Any, otherwise: str) -> Any:
    try:
        return parse(text)
    except (ValueError, SyntaxError, TypeError, RecursionError) as error:
        raise InputError(otherwise) from error


def _instructions(given: Any, where: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not given:
        raise InputError(f"{where} has no list of instructions; write {LINE}")
    for turn, instruction in enumerate(given, 1):
        if not isinstance(instruction, str) or not instruction.strip():
            raise InputError(f"instruction {turn} at {where} is {instruction!r}; write it as text, in quotes")
    return tuple(instruction.strip() for instruction in given)
