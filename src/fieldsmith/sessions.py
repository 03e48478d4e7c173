"""Editing sessions of the user's own: an image and the instructions that edit it, turn after turn.

In: JSON lines, {"image": path relative to the file, "instructions": [...], "id": optional}, the CSV file of EdiVal
(github.com/TianyuCodings/EdiVal, oai_instruction_generation_output.csv), or such dicts in Python, whose images may be
PIL's. Out: `Session`s, and `UserSessions`, from which a training run draws.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.pictures import Frame, floats, look, read
from fieldsmith.read import read_json_lines, read_text
from fieldsmith.run import write_atomically

LINE = '{"image": "cat.png", "instructions": ["make the cat red"]}'
EDIVAL_COLUMNS = ("image_index", "turns", "instructions")
EDIVAL_IMAGES = "input_images_resize_512"  # EdiVal's archive of images, unpacked beside the CSV file


class Sessions(Protocol):
    """n sessions of equally many turns, as training, judges and measures need them: the user's own, or a world's."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any) -> Any: ...
    @property
    def turns(self) -> int: ...
    def prompts(self, turn: int) -> list[str]:
        """What turn 1, 2, ... asks of each session."""
        ...

    def clean(self, turn: int) -> Tensor:
        """Images (n, 3, size, size) in [0, 1]: the start at turn 0, then what turns should give, where it is known."""
        ...


@dataclass(frozen=True)
class Session:
    id: str
    image: Path | Image.Image  # an absolute path, or the image itself
    instructions: tuple[str, ...]  # one a turn


def sessions_of(entries: Iterable[Any]) -> list[Session]:
    """Sessions, dicts such as a line of a file holds, or pairs (image, instructions); an image may also be PIL's, and
    paths start from here.

    Raises InputError as `read_sessions` does.
    """
    rows = []
    for number, entry in enumerate(entries, 1):
        where = f"session {number}"
        if isinstance(entry, (tuple, list)) and len(entry) == 2:
            entry = {"image": entry[0], "instructions": entry[1]}
        if not isinstance(entry, (Session, Mapping)):
            raise InputError(f"{where} is a {type(entry).__name__}; give a dict such as {LINE}")
        rows.append((number, entry if isinstance(entry, Session) else _session(entry, number, where, Path())))
    return _checked(rows, "these sessions", "session")


def read_sessions(path: str | Path, outside: bool = False) -> list[Session]:
    """The sessions of a file, in its order; '.csv' is read as EdiVal's, all else as JSON lines.

    All have the same number of turns and different ids (without one, the line's number). Of EdiVal's rows, which repeat
    an image's instructions up to each turn, the longest counts; its images lie beside the file or in
    'input_images_resize_512' there. Images lie in the file's folder or below, links resolved, unless `outside` allows
    others. Raises InputError, with the line's number, at anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"sessions file '{path}' does not exist; name a file of lines such as {LINE}")
    rows = list(_edival(path) if path.suffix.lower() == ".csv" else _json_lines(path))
    folder = path.resolve().parent
    for number, one in rows:
        if not outside and isinstance(one.image, Path) and not one.image.is_relative_to(folder):
            raise InputError(
                f"image '{one.image}' at line {number} of '{path}' lies outside of '{folder}'; move it there or, if "
                "you trust the file, allow that with --outside-images (outside_images=True)"
            )
    return _checked(rows, f"sessions file '{path}'", "line")


def _checked(rows: list[tuple[int, Session]], source: str, unit: str) -> list[Session]:
    """The sessions, if their ids differ and their numbers of turns do not; each comes with its line's number."""
    if not rows:
        raise InputError(f"{source}: no session is there (the file or list is empty); give some such as {LINE}")
    lines: dict[str, int] = {}
    first_line, first = rows[0]
    for line, session in rows:
        if session.id in lines:
            raise InputError(
                f"id '{session.id}' is at {unit} {lines[session.id]} and {unit} {line} of {source}; give each its own"
            )
        lines[session.id] = line
        if len(session.instructions) != len(first.instructions):
            raise InputError(
                f"session '{first.id}' ({unit} {first_line}) has {len(first.instructions)} turns, '{session.id}' "
                f"({unit} {line}) has {len(session.instructions)} in {source}; give all the same number"
            )
    return [session for _, session in rows]


def write_sessions(path: str | Path, sessions: Sequence[Session]) -> None:
    """JSON lines that `read_sessions` reads back, those of images outside of the file's folder with `outside`; image
    paths become relative to that folder."""
    path = Path(path)
    folder = path.resolve().parent
    lines = []
    for one in sessions:
        if not isinstance(one.image, Path):
            raise InputError(f"the image of session '{one.id}' is in no file; save it and give its path")
        image = Path(os.path.relpath(one.image, folder)).as_posix()
        lines.append({"id": one.id, "image": image, "instructions": one.instructions})
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def frame_of(size: int, fit: str = "crop", background: str = "white") -> Frame:
    """What an editor's source images become, resampled as diffusers' own processor does it."""
    return Frame(size, 3, fit, background, Image.Resampling.LANCZOS)


def load_images(sessions: Sequence[Session], frame: Frame) -> Tensor:
    """The sessions' images (n, 3, size, size) in [0, 1]. Raises InputError as `pictures.read` does."""
    images = torch.zeros(len(sessions), *frame.shape)
    for row, session in enumerate(sessions):
        images[row] = floats(read(session.image, frame, _what(session)))
    return images


def _what(session: Session) -> str:
    named = f"image '{session.image}'" if isinstance(session.image, Path) else "the image"
    return f"{named} of session '{session.id}'"


@dataclass(frozen=True)
class UserSessions:
    """Sessions without planned images as a training task sees them, cut to `turns` of their turns."""

    sessions: tuple[Session, ...]
    frame: Frame
    turns: int

    @staticmethod
    def of(source: str | Path | Iterable[Any], frame: Frame, outside: bool = False) -> UserSessions:
        """Every session of a file or of an iterable. Raises InputError as `read_sessions` and `pictures.look` do."""
        sessions = read_sessions(source, outside) if isinstance(source, (str, Path)) else sessions_of(source)
        for session in sessions:
            look(session.image, _what(session))
        load_images(sessions[:1], frame)
        return UserSessions(tuple(sessions), frame, len(sessions[0].instructions))

    def sample(self, n: int, seed: int, turns: int) -> UserSessions:
        """n of them in random order, each once before any comes again."""
        draw = random.Random(seed)
        rows: list[Session] = []
        while len(rows) < n:
            rows += draw.sample(self.sessions, min(n - len(rows), len(self.sessions)))
        return UserSessions(tuple(rows), self.frame, turns)

    def __len__(self) -> int:
        return len(self.sessions)

    def __getitem__(self, rows: Sequence[int]) -> UserSessions:
        return UserSessions(tuple(self.sessions[i] for i in rows), self.frame, self.turns)

    def prompts(self, turn: int) -> list[str]:
        return [one.instructions[turn - 1] for one in self.sessions]

    def clean(self, turn: int) -> Tensor:
        """The start (n, 3, size, size) in [0, 1]; what later turns should give is not known."""
        assert turn == 0, "the user's sessions hold no planned images"
        different = {one.id: one for one in self.sessions}
        images = load_images(list(different.values()), self.frame)
        places = {name: row for row, name in enumerate(different)}
        return images[[places[one.id] for one in self.sessions]]


def _json_lines(path: Path) -> Iterator[tuple[int, Session]]:
    """Line numbers (from 1) and sessions."""
    for number, entry in read_json_lines(path, "sessions file", LINE):
        yield number, _session(entry, number, f"line {number} of '{path}'", path.parent)


def _session(entry: Mapping[str, Any], number: int, where: str, folder: Path) -> Session:
    """One entry; image paths start from the folder. Raises InputError that says `where`."""
    image, name = entry.get("image"), entry.get("id", number)
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise InputError(f"id {name} at {where} is no text; write it in quotes or leave it out")
    if not isinstance(image, Image.Image):
        if not isinstance(image, (str, Path)) or not str(image):
            raise InputError(f"{where} names no image; write {LINE}")
        path = folder / image
        try:
            there = path.is_file()
        except (OSError, ValueError):  # a name that is too long, or with a zero in it
            there = False
        if not there:
            raise InputError(
                f"image '{str(image)[:200]}' of {where} does not exist; put it into '{folder}' or fix the path"
            )
        image = path.resolve()
    return Session(str(name), image, _instructions(entry.get("instructions"), where))


def _edival(path: Path) -> Iterator[tuple[int, Session]]:
    """The row with the most turns of each image, and its line's number."""
    longest: dict[str, tuple[int, int, str]] = {}  # image index -> turns, line, instructions
    rows = csv.DictReader(io.StringIO(read_text(path, "sessions file"), newline=""))
    try:
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
    except csv.Error as error:
        raise InputError(f"line {rows.line_num} of '{path}' is no CSV ({error}); save it again as CSV") from error
    for index, (_, line, text) in longest.items():
        where = f"line {line} of '{path}'"
        listed = _parsed(ast.literal_eval, text, f"instructions at {where} are no list; write \"['first', 'second']\"")
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
            for one in (listed if isinstance(listed, list) else [listed])
        ]
        yield line, Session(index, images[0].resolve(), _instructions(unquoted, where))


def _parsed(parse: Callable[[Any], Any], text: Any, otherwise: str) -> Any:
    try:
        return parse(text)
    except (ValueError, SyntaxError, TypeError, RecursionError) as error:
        raise InputError(otherwise) from error


def _instructions(instructions: Any, where: str) -> tuple[str, ...]:
    if not isinstance(instructions, (list, tuple)) or not instructions:
        raise InputError(f"{where} has no list of instructions; write {LINE}")
    for turn, instruction in enumerate(instructions, 1):
        if not isinstance(instruction, str) or not instruction.strip():
            raise InputError(f"instruction {turn} at {where} is {instruction!r}; write it as text, in quotes")
    return tuple(instruction.strip() for instruction in instructions)
