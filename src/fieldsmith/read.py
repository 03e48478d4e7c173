"""Text that users hand over, read in one way: UTF-8 with or without a byte-order mark, any line ends."""

from __future__ import annotations

import json
import pathlib
import tomllib
from typing import Any

from fieldsmith.errors import InputError


def read_toml(path: str | pathlib.Path) -> dict[str, Any]:
    """A TOML file's settings. Raises InputError where it cannot be read or is no TOML."""
    try:
        return tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"config file '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"config file '{path}' is not TOML: {error}") from error


def read_json(path: str | pathlib.Path, what: str) -> dict[str, Any]:
    """A JSON file's mapping; `what` names it in messages. Raises InputError where it cannot be read or is none."""
    try:
        found = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{what} '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{what} '{path}' is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{what} '{path}' is no mapping of names to values")
    return found
