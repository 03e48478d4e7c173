"""Text that users hand over, read in one way: UTF-8 with or without a byte-order mark, any line ends, blank lines free.

`kind` says in messages what the file is for, e.g. "prompt file". Importing this costs no torch.
"""

from __future__ import annotations

import csv
import io
import json
import pathlib
import tomllib
from collections.abc import Sequence
from typing import Any

from fieldsmith.errors import InputError

LARGEST = 2**28  # bytes of a text file
PAIR = '{"prompt": "a cat", "chosen": "1.png", "rejected": "2.png"}'  # a line of preference pairs


def read_text(path: str | pathlib.Path, kind: str) -> str:
    """A file's text, with '\\n' at the end of each line. Raises InputError where it is not there or is not UTF-8."""
    try:
        size = pathlib.Path(path).stat().st_size
        content = b"" if size > LARGEST else pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{kind} '{path}' cannot be read: {error.strerror}; fix its name") from error
    if size > LARGEST:
        raise InputError(f"{kind} '{path}' has {size:,} bytes, and {LARGEST:,} are read at most; split it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"line {line} of {kind} '{path}' is not UTF-8 (byte 0x{content[error.start]:02x}); save the file as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | pathlib.Path, kind: str) -> list[tuple[int, str]]:
    """The lines with words in them, without the spaces around, each with its number from 1. Raises as `read_text`."""
    # not splitlines, which also cuts at characters that JSON strings and prompts may hold, such as U+2028
    numbered = enumerate(read_text(path, kind).split("\n"), 1)
    return [(number, line.strip()) for number, line in numbered if line.strip()]


def read_toml(path: str | pathlib.Path, kind: str = "config file") -> dict[str, Any]:
    """A TOML file's settings. Raises InputError where it cannot be read or is no TOML."""
    text = read_text(path, kind)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{kind} '{path}' is not TOML: {error}") from error


def read_json(path: str | pathlib.Path, kind: str) -> Any:
    """What a JSON file holds. Raises InputError where it cannot be read or is no JSON."""
    text = read_text(path, kind)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{kind} '{path}' is not JSON: {error}") from error


def read_json_lines(path: str | pathlib.Path, kind: str, example: str) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file with one a line, each with its line's number. Raises InputError with that number.

    `example` is a line as it should be.
    """
    entries = []
    for number, line in read_lines(path, kind):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of '{path}' is no JSON; write {example}") from error
        if not isinstance(entry, dict):
            raise InputError(f"line {number} of '{path}' is no JSON object but {line[:80]}; write {example}")
        entries.append((number, entry))
    return entries


def read_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Prompts as they are, or the lines of the one text file that they name. Raises InputError where it has none."""
    if len(prompts) != 1 or not (_is_file(prompts[0]) or prompts[0].endswith(".txt")):
        return tuple(prompts)
    lines = tuple(line for _, line in read_lines(prompts[0], "prompt file"))
    if not lines:
        raise InputError(f"prompt file '{prompts[0]}' has no line with words in it; write a prompt a line")
    return lines


# the columns in which attackers publish prompts: MMA-Diffusion's, Ring-A-Bell's, P4D's and I2P's; and their seeds
ATTACKS, SEEDS = ("adv_prompt", "sensitive prompt", "prompt"), ("evaluation_seed", "sd_seed", "seed")


def read_attacks(path: str | pathlib.Path, seed: int) -> list[tuple[str, int]]:
    """Attackers' prompts and the seed of each, from a .csv with such columns, or a file with a prompt a line.

    Seeds that the file does not have count up from `seed`. Raises InputError where it has no prompt, or a seed that is
    none.
    """
    kind = "file of attackers' prompts"
    table = csv.DictReader(io.StringIO(read_text(path, kind)), skipinitialspace=True)
    names = list(table.fieldnames or ()) if str(path).endswith(".csv") else []
    column = next((name for name in ATTACKS if name in names), None)
    if column is None and len(names) > 1 and not any(" " in str(name) for name in names):
        raise InputError(f"{kind} '{path}' has the columns {', '.join(names)}; name one of them '{ATTACKS[-1]}'")
    if column is None:  # Ring-A-Bell's own file: no header
        found: list[tuple[str, str | None]] = [(line.strip('"'), None) for _, line in read_lines(path, kind)]
    else:
        of = next((name for name in SEEDS if name in names), None)
        found = [(str(row[column] or "").strip(), row[of] if of else None) for row in table]
    prompts = [(words, number) for words, number in found if words]
    if not prompts:
        raise InputError(f"{kind} '{path}' has no prompt; write one a line, or a column '{ATTACKS[-1]}'")
    return [(words, seed + k if number in (None, "") else _seed(number, path)) for k, (words, number) in
            enumerate(prompts)]  # fmt: skip


def _seed(number: Any, path: str | pathlib.Path) -> int:
    try:
        value = int(float(number))
    except (ValueError, OverflowError):
        value = -1
    if not 0 <= value < 2**63:
        raise InputError(f"seed '{number}' in '{path}' is none; write a whole number from 0 on, or nothing")
    return value


def _is_file(name: str) -> bool:
    try:
        return pathlib.Path(name).is_file()
    except (OSError, ValueError):  # a prompt longer than a file's name may be
        return False
