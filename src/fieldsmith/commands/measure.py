"""`fieldsmith measure RUN [--judge J ...]`: a finished run measured again, without training."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Sequence

from fieldsmith.commands import arguments
from fieldsmith.commands.answers import Answer, answer
from fieldsmith.commands.verbs import CONFIGS, finish
from fieldsmith.config import from_file
from fieldsmith.errors import InputError, check_word
from fieldsmith.read import read_toml

USAGE = """usage: fieldsmith measure RUN [--field value ...]

Measure a finished run again, without training, or complete what a judge that failed left out: metrics.json and
report.html are written anew. Of a run's own settings those can be changed that only say how it is measured:
--evaluate, an erasure's --judge, --neighbours, --synonyms, --attacks and --attack-steps, -images and -prompts,
--held-out-rewards of align, --judge of edit and sharpen, --samples of sharpen."""


def measure(words: Sequence[str]) -> Answer:
    """Raises InputError before anything is written, RunError where a judge fails again."""
    rest = list(words)
    if rest and rest[0] in ("-h", "--help"):
        print(USAGE)
        return answer()
    if not rest or rest[0].startswith("-"):
        raise InputError(
            "no run given; name its folder first, such as `fieldsmith measure runs/no-cat --judge nudenet`"
        )
    folder = pathlib.Path(rest.pop(0))
    verb = read_toml(folder / "config.toml").get("verb", "")
    check_word(str(verb), tuple(CONFIGS), f"verbs that train (in '{folder / 'config.toml'}')")
    kind = getattr(importlib.import_module(f"fieldsmith.methods.{verb}.config"), CONFIGS[verb])
    began = kind(**from_file(folder / "config.toml", kind, verb))
    asked = arguments.parse(began, rest, f"measure (a run of {verb})")
    changes = {
        field.name: getattr(asked, field.name)
        for field in dataclasses.fields(asked)
        if getattr(asked, field.name) != getattr(began, field.name)
    }
    return finish(importlib.import_module("fieldsmith.api").measure(folder, **changes))  # imports torch
