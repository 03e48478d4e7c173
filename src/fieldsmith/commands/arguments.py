"""Words of the command line -> a config dataclass: preset, then config file, then flags."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import os
import pathlib
import tomllib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fieldsmith.commands.memory import DEFAULT, Memory, said
from fieldsmith.errors import InputError, check_word

if TYPE_CHECKING:
    from fieldsmith.runs import Run

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
    import tyro

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


def parse_with(config: C, memory: Memory, words: Sequence[str], verb: str, notes: str = "") -> tuple[C, Memory]:
    """As `parse`, for a verb's settings and those of its memory, which share one command line."""
    kinds = (Memory, type(config))
    names = {"__doc__": type(config).__doc__}
    both = dataclasses.make_dataclass(type(config).__name__, [], bases=kinds, namespace=names, frozen=True)
    given = parse(both(**vars(config), **vars(memory)), words, verb, notes)
    found = [kind(**{f.name: getattr(given, f.name) for f in dataclasses.fields(kind)}) for kind in kinds]  # type: ignore[arg-type]
    return found[1], found[0]  # type: ignore[return-value]


def _first_of_box(text: str) -> str:
    """tyro's own sentence, out of the box that it draws: what stands between the title and the next rule."""
    lines = [line.strip("│| ") for line in text.strip().splitlines()[1:]]
    rules = [not line.strip("─-+╭╮╰╯ ") for line in lines]
    parts = itertools.groupby(zip(rules, lines, strict=True), key=lambda pair: pair[0])
    said = next((" ".join(line for _, line in part) for rule, part in parts if not rule), "these words are no settings")
    return said.rstrip(".").replace(". ", ", ")


def at_least(config: Any, least: float, *names: str) -> None:
    """Raises InputError where one of the fields is set and below `least`, or not a number."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (math.isnan(value) or value < least):
            raise InputError(f"{name}={value} must be at least {least}")


def check_out(out: pathlib.Path, folder: bool) -> None:
    """Raises InputError where `out` cannot become a folder (or a file): it is the other one, or cannot be made."""
    if folder and out.is_file():
        raise InputError(f"out '{out}' is a file; name a folder")
    if not folder and out.is_dir():
        raise InputError(f"out '{out}' is a folder; name a file")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"out '{out}' cannot be made, '{above}' is not a folder that you may write to; name another")


def directory_of(config: Any, verb: str, memory: Memory = DEFAULT) -> Run:
    """The run directory that `config.out` names, nothing written yet. Raises InputError where it cannot be one."""
    from fieldsmith.runs import Run

    if config.out is None:
        raise InputError(f"no out folder given; add --out DIR, e.g. --out runs/{verb}")
    check_out(config.out, folder=True)
    return Run(config.out, verb, {**vars(config), **said(memory)})


def repeat_and_load(verb: str, config: Any, directory: Run, adapter: bool) -> list[str]:
    """How to repeat a run and, where it made an adapter, how plain diffusers loads it: lines of a page."""
    lines = [f"fieldsmith {verb} --config {directory.folder / 'config.toml'} --out ANOTHER-FOLDER"]
    if adapter:
        lines += [
            "",
            "# in Python, with diffusers alone",
            f'pipe = DiffusionPipeline.from_pretrained("{config.model}")',
            f'pipe.load_lora_weights("{directory.folder / "adapter"}")',
        ]
    return lines


def from_file(path: str, kind: type[Any], verb: str, beside: type[Any] | None = None) -> dict[str, Any]:
    """Fields of a TOML file, e.g. a run's config.toml, of `kind` and of what stands `beside` it.

    Raises InputError at unknown keys, another verb, bad TOML.
    """
    try:
        settings = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config file '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"config file '{path}' is not TOML: {error}") from error
    if settings.pop("verb", verb) != verb:
        raise InputError(f"config file '{path}' is of another verb; this is `fieldsmith {verb}`")
    kinds = [kind] if beside is None else [kind, beside]
    known = {field.name: field for each in kinds for field in dataclasses.fields(each)}
    if settings.pop("versions", None):  # a run's own record, which leaves out what was None
        settings = {name: None for name, field in known.items() if field.default is None} | settings
    hints = {name: hint for each in kinds for name, hint in get_type_hints(each).items()}
    for key, value in settings.items():
        check_word(key, tuple(known), f"{verb}'s settings (in '{path}')")
        if value is not None and not _fits(value, hints[key]):
            raise InputError(f"config file '{path}': {key} = {value!r} should be of type {known[key].type}")
        if isinstance(value, str) and "Path" in str(known[key].type):
            settings[key] = pathlib.Path(value)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value can fill a field of this type."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inside
    if origin is tuple:
        many = inside[-1] is Ellipsis
        each = inside[:1] * len(value) if many and isinstance(value, list) else inside
        return isinstance(value, list) and len(value) == len(each) and all(map(_fits, value, each))
    if inside:  # X | None
        return any(_fits(value, option) for option in inside)
    stored = {float: (int, float), pathlib.Path: (str,)}
    return type(value) in stored.get(hint, (hint,))
