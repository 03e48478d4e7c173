"""Words of the command line -> a config, by tyro, with one sentence at what is no flag or no value."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from fieldsmith.errors import InputError, check_word
from fieldsmith.run import base_of

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


def of_runs(words: Sequence[str]) -> list[str]:
    """The words, with a finished run's base and adapters in the place of a run directory that is given as a model."""
    words = list(words)
    for flag in ("--model", "--teacher"):
        source = peek(words, flag)
        found = base_of(source) if source else None
        if found:
            take(words, flag)
            more = ["--config-from", found.config_from] if found.config_from else []
            adapters = [word for one in found.adapter for word in ("--adapter", one)]
            words = [flag, found.model, *more, *adapters, *words]
    return words


def parse(default: C, words: Sequence[str], verb: str, notes: str = "") -> C:
    """The config with the flags applied; --help and --help-all print and exit.

    Raises InputError at what is no flag or no value.
    """
    words = _repeated(["--continue-from" + w[10:] if w.partition("=")[0] == "--continue" else w for w in words])
    fields = [field.name.replace("_", "-") for field in dataclasses.fields(default)]  # type: ignore[arg-type]
    asked = next((word for word in words if word in ("-h", "--help", "--help-all")), None)
    if asked:
        print(_help(default, verb, notes, everything=asked == "--help-all"))
        raise SystemExit(0)
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag[2:].removeprefix("no-") not in fields:
            check_word(flag, [f"--{name}" for name in fields], f"`fieldsmith {verb}`'s flags")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _read(default, words, verb, notes)
    except SystemExit as end:
        raise InputError(f"{_first_of_box(said.getvalue())}; see `fieldsmith {verb} --help`") from end


def _read(default: C, words: Sequence[str], verb: str, notes: str) -> C:
    return tyro.cli(
        type(default), default=default, args=list(words), prog=f"fieldsmith {verb}",
        description=f"{(type(default).__doc__ or '').strip()}\n\n{notes}".strip(),
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )  # fmt: skip


def _help(default: Any, verb: str, notes: str, everything: bool) -> str:
    """What tyro says of the settings: of those that matter, which a config lists as FIRST, or of all, by group."""
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # for which tyro draws boxes
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        _read(default, ["--help"], verb, notes)
    said.seek(0)
    above, lines = [], said.read().splitlines()
    while not lines[0].startswith("╭"):
        above.append(lines.pop(0))
    entries: dict[str, list[str]] = {}
    name = ""
    for line in lines[1:-1]:
        if match := re.match(r"│ (?:-\w, )?--([\w-]+)", line):
            name = match[1].replace("-", "_")
        entries.setdefault(name, []).append(line)
    every = [field.name for field in dataclasses.fields(default)]
    first = getattr(default, "FIRST", ()) or every
    groups = {"settings that matter" if len(first) < len(every) else "settings": first}
    if everything:
        left, found = [name for name in every if name not in first], []
        for part in type(default).__mro__:  # a setting belongs where it is said last
            if own := [name for name in left if name in vars(part).get("__annotations__", {})]:
                title = (part.__doc__ or "").partition("\n")[0].partition(":")[0].rstrip(".")
                found.append((f"more of {verb}" if part is type(default) else title, own))
                left = [name for name in left if name not in own]
        groups |= dict(reversed(found))
    width = len(lines[0])
    boxes = [_boxed(title, [line for one in names for line in entries[one]], width) for title, names in groups.items()]
    more = [] if everything or len(first) == len(every) else [
        f"`fieldsmith {verb} --help-all` has {len(every) - len(first)} more settings."
    ]  # fmt: skip
    text = "\n".join([*above, *boxes, *more])
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return text if utf8 else text.translate(str.maketrans("╭╮╰╯─│", "++++-|"))


def _boxed(title: str, lines: list[str], width: int) -> str:
    return "\n".join([f"╭─ {title} ".ljust(width - 1, "─") + "╮", *lines, f"╰{'─' * (width - 2)}╯"])


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
