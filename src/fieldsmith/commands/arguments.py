"""Words of the command line -> a config, by tyro, with one sentence at what is no flag or no value."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

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
    """The config with the flags applied; --help prints and exits. Raises InputError at what is no flag or no value."""
    words = _repeated(["--continue-from" + w[10:] if w.partition("=")[0] == "--continue" else w for w in words])
    fields = [field.name.replace("_", "-") for field in dataclasses.fields(default)]  # type: ignore[arg-type]
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag != "--help" and flag[2:].removeprefix("no-") not in fields:
            check_word(flag, [f"--{name}" for name in fields], f"`fieldsmith {verb}`'s flags")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                type(default), default=default, args=list(words), prog=f"fieldsmith {verb}",
                description=f"{(type(default).__doc__ or '').strip()}\n\n{notes}".strip(),
                config=(tyro.conf.OmitSubcommandPrefixes,),
            )  # fmt: skip
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError(f"{_first_of_box(said.getvalue())}; see `fieldsmith {verb} --help`") from end


def _repeated(words: list[str]) -> list[str]:
    """`--adapter A --adapter B` as `--adapter A B`, as tyro reads lists."""
    given = []
    while (value := take(words, "--adapter")) is not None:
        given.append(value)
    return [*words, "--adapter", *given] if given else words


def _first_of_box(text: str) -> str:
    """tyro's own sentence, out of the box that it draws: what stands between the title and the next rule."""
    lines = [line.strip("│| ") for line in text.strip().splitlines()[1:]]
    rules = [not line.strip("─-+╭╮╰╯ ") for line in lines]
    parts = itertools.groupby(zip(rules, lines, strict=True), key=lambda pair: pair[0])
    said = next((" ".join(line for _, line in part) for rule, part in parts if not rule), "these words are no settings")
    said = re.sub(r"^Error parsing \w+: ", "", said)  # what our own bounds say stands behind it
    return said.rstrip(".").replace(". ", ", ")
