"""Settings that no run can have: of every field of every command, as flags, in files and as keyword arguments.

The wrong values follow from each field's type and bounds, so that a new field is tried as soon as it is there.
"""

from __future__ import annotations

import functools
import pathlib
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import tomli_w

import fieldsmith as fs
from benchmarks.malformed.case import Case, Words
from benchmarks.malformed.pipelines import Bases
from fieldsmith.commands.sample import SampleConfig
from fieldsmith.diagnoses import config as diagnoses
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.sharpen.config import SharpenConfig

KINDS: dict[str, type[Any]] = {
    "erase": EraseConfig, "align": AlignConfig, "edit": EditConfig, "distill": DistillConfig, "sharpen": SharpenConfig,
    "sample": SampleConfig,
    **{f"diagnose {kind}": getattr(diagnoses, f"{kind.capitalize()}Config") for kind in diagnoses.KINDS},
}  # fmt: skip
SHORT = {"distill": {"preset": "dash-uniform", "shrink": 2.0}, "sharpen": {"preset": "plain"}}
VERBS = ("erase", "align", "edit", "distill", "sharpen")  # whose functions take settings as keywords
TOO_MANY = 10**30
# from a bound to the nearest value that it forbids
OVER = {annotated_types.Ge: -1, annotated_types.Gt: 0, annotated_types.Le: 1, annotated_types.Lt: 0}


def valid(command: str, bases: Bases) -> dict[str, Any]:
    """The settings of a run that could begin."""
    match command:
        case "erase":
            return {"model": str(bases.flux), "targets": ["red circle"], "anchors": ["blue circle"]}
        case "align":
            return {"model": str(bases.flux), "reward": "brightness", "prompts": ["red circle", "blue square"]}
        case "edit":
            file = str(bases.sessions / "sessions.jsonl")
            judge = f"{pathlib.Path(__file__).with_name('judges.py')}:edits"
            return {
                "model": str(bases.kontext),
                "sessions": file,
                "judge": judge,
                "turns": 2,
                "identity_prompt": "red circle",
            }
        case "distill":
            return {"teacher": str(bases.unet), "data": str(bases.images)}
        case "sharpen":
            judge = f"{pathlib.Path(__file__).with_name('judges.py')}:dark"
            return {"model": str(bases.unet), "data": str(bases.images), "judge": judge}
        case "sample":
            return {"model": str(bases.flux), "prompts": ["red circle"]}
        case "diagnose guidance":
            return {"model": str(bases.unet), "teacher": str(bases.unet), "data": str(bases.images)}
        case "diagnose judge":
            return {"judge": "remote:http://127.0.0.1:9/v1"}
        case "diagnose smoothness":
            judge = f"{pathlib.Path(__file__).with_name('judges.py')}:dark"
            return {"model": str(bases.unet), "data": str(bases.images), "judge": judge}
        case "diagnose exposure":
            return {"model": str(bases.kontext)}
    return {"model": str(bases.flux)}


def flags(settings: dict[str, Any]) -> Words:
    """Settings as words of a command line."""
    words: Words = []
    for name, value in settings.items():
        words += [
            f"--{name.replace('_', '-')}",
            *([str(v) for v in value] if isinstance(value, list) else [str(value)]),
        ]
    return words


def command_of(command: str, settings: dict[str, Any], out: str) -> Words:
    return [*command.split(), *flags(settings), "--out", out + (".png" if command == "sample" else "")]


def wrong(annotation: Any, metadata: list[Any]) -> Iterator[tuple[str | None, Any]]:
    """(text for a flag, value for a file) of what a field cannot be; either may be None, where it has no such form."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        yield from wrong(kinds[0], metadata)
        return
    if hasattr(annotation, "__metadata__"):
        metadata = [*metadata, *annotation.__metadata__]
        yield from wrong(annotation.__origin__, metadata)
        return
    metadata = [bound for part in metadata for bound in getattr(part, "metadata", [part])]
    if annotation in (int, float):
        yield from _numbers(annotation, metadata)
    elif annotation is bool:
        yield "maybe", "maybe"
        yield None, 2
    elif origin is Literal:
        yield "nonsense", "nonsense"
        yield "", 3
    elif annotation in (str, pathlib.Path):
        yield None, 3
        yield None, {"a": 1}
    elif origin is tuple:
        item = get_args(annotation)[0]
        for text, value in wrong(item, []):
            yield text, None if value is None else [value]
        if Ellipsis not in get_args(annotation):
            yield "1", [1]
        yield None, 3.5


def _numbers(kind: type, metadata: list[Any]) -> Iterator[tuple[str | None, Any]]:
    yield "many", "3"
    yield "nan", float("inf")
    if kind is int:
        yield "1.5", None
        yield str(TOO_MANY), None
    else:
        yield "1e999", None
    for bound in metadata:
        over = OVER.get(type(bound))
        if over is not None:
            value = kind(getattr(bound, type(bound).__name__.lower()) + over)
            yield str(value), value if abs(value) < 2**63 else None


def cases() -> Iterator[Case]:
    """Of every command, every field, every wrong value, by flag, by file and from Python."""
    for command, kind in KINDS.items():
        for name, field in kind.__pydantic_fields__.items():
            if name in ("out", "preset"):
                continue
            says = f"{name}|--{name.replace('_', '-')}|maybe|folder"
            for place, (text, value) in enumerate(wrong(field.annotation, list(field.metadata))):
                if text is not None:
                    make: Any = functools.partial(_by_flag, command, name, text)
                    yield Case(f"settings/{command}/--{name} {text!r}", make, says)
                if value is not None and command != "sample" and place % 2 == 0:
                    make = functools.partial(_by_file, command, name, value)
                    yield Case(f"settings/{command}/file {name} = {value!r}", make, says)
                if value is not None and command in VERBS and place % 2:
                    make = functools.partial(_by_keyword, command, name, value)
                    yield Case(f"settings/{command}/keyword {name} = {value!r}", make, says)


# whole numbers inside their bounds that no machine holds, or that no sampler takes
HUGE = {
    "erase": ("batch", "evaluate", "rank"), "align": ("rollouts", "prompts_per_epoch", "evaluate", "rank"),
    "edit": ("groups", "rollouts", "rank", "evaluate"), "distill": ("batch", "evaluate"),
    "sharpen": ("batch", "samples"), "sample": ("each",), "diagnose guidance": ("tuples", "samples"),
    "diagnose smoothness": ("samples",), "diagnose audit": ("states",),
}  # fmt: skip


def huge() -> Iterator[Case]:
    """What takes all memory where it is not estimated before."""
    for command, names in HUGE.items():
        for name in names:
            yield Case(f"huge/{command}/{name}", functools.partial(_huge, command, name, 10**11), name)
    for command in KINDS:
        fields = KINDS[command].__pydantic_fields__
        for name, value in {"resolution": 100_000, "steps": 10**9, "evaluate_steps": 10**9, "sampler_steps": 10**9,
                            "threads": 10**9, "lookahead": 10**9}.items():  # fmt: skip
            if name in fields and (name, command) not in {("steps", "distill"), ("steps", "sharpen")}:
                yield Case(f"huge/{command}/{name}", functools.partial(_huge, command, name, value), name)


def _huge(command: str, name: str, value: int, place: pathlib.Path, bases: Bases) -> Words:
    return command_of(command, {**valid(command, bases), **SHORT.get(command, {}), name: value}, "run")


def _by_flag(command: str, name: str, text: str, place: pathlib.Path, bases: Bases) -> Words:
    # a value with a minus before it is a word of its own only behind '='
    settings = {key: value for key, value in valid(command, bases).items() if key != name}
    return [*command_of(command, settings, "run"), f"--{name.replace('_', '-')}={text}"]


def _by_file(command: str, name: str, value: Any, place: pathlib.Path, bases: Bases) -> Words:
    (place / "a.toml").write_text(tomli_w.dumps({**valid(command, bases), name: value}))
    return [*command.split(), "--config", "a.toml", "--out", "run"]


def _by_keyword(command: str, name: str, value: Any, place: pathlib.Path, bases: Bases) -> Any:
    return lambda: getattr(fs, command)(**{**valid(command, bases), name: value}, out="run")
