"""Words of the command line -> a config dataclass: preset, then config file, then flags."""

from __future__ import annotations

import dataclasses
import pathlib
import tomllib
from collections.abc import Sequence
from typing import Any, TypeVar

from fieldsmith.errors import InputError, check_word

C = TypeVar("C")


def take(words: list[str], flag: str) -> str | None:
    """Remove `--flag value` or `--flag=value` from the words; its value, None where it is absent."""
    for place, word in enumerate(words):
        if word == flag:
            if place + 1 >= len(words):
                raise InputError(f"{flag} needs a value")
            value = words[place + 1]
            del words[place : place + 2]
            return value
        if word.startswith(flag + "="):
            del words[place]
            return word.partition("=")[2]
    return None


def peek(words: Sequence[str], flag: str) -> str | None:
    """The value of a flag, which stays where it is."""
    return take(list(words), flag)


def parse(default: C, words: Sequence[str], verb: str, notes: str = "") -> C:
    """The config with the flags applied; prints help or usage errors and exits (0 or 2) by itself."""
    import tyro

    return tyro.cli(
        type(default), default=default, args=list(words), prog=f"fieldsmith {verb}",
        description=f"{(type(default).__doc__ or '').strip()}\n\n{notes}".strip(),
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )  # fmt: skip


def from_file(path: str, kind: type[Any], verb: str) -> dict[str, Any]:
    """Fields of a TOML file, e.g. a run's config.toml. Raises InputError at unknown keys, another verb, bad TOML."""
    try:
        settings = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config file '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"config file '{path}' is not TOML: {error}") from error
    if settings.pop("verb", verb) != verb:
        raise InputError(f"config file '{path}' is of another verb; this is `fieldsmith {verb}`")
    settings.pop("versions", None)
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in settings.items():
        check_word(key, tuple(known), f"{verb}'s settings (in '{path}')")
        _check_type(path, key, value, str(known[key].type))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def _check_type(path: str, key: str, value: Any, expected: str) -> None:
    kinds: dict[str, Any] = {
        "int": int,
        "float": (int, float),
        "str": str,
        "bool": bool,
        "tuple": list,
        "Path": str,
        "Literal": str,
    }
    fits = [kind for name, kind in kinds.items() if name in expected]
    if fits and (not any(isinstance(value, k) for k in fits) or (isinstance(value, bool) and "bool" not in expected)):
        raise InputError(f"config file '{path}': {key} = {value!r} should be of type {expected}")
