"""`fieldsmith diagnose MODEL` and `fieldsmith diagnose KIND`: what is undetermined in a model; nothing is trained."""

from __future__ import annotations

import difflib
import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

from fieldsmith.commands import arguments
from fieldsmith.commands.answers import Answer, answer
from fieldsmith.config import from_file
from fieldsmith.diagnoses import config_of
from fieldsmith.diagnoses.config import KINDS
from fieldsmith.errors import InputError

NOTES = "Also: --config FILE.toml (such as a run's config.toml) sets fields; flags come last."
ALL = "overview"


def diagnose(words: Sequence[str]) -> Answer:
    """fieldsmith diagnose MODEL|KIND [--config FILE.toml] [--field value ...] --out DIR."""
    kind, rest = kind_of(list(words))
    config = settings(kind, rest)
    if config.out is None:
        raise InputError(f"no out folder given; add --out DIR, e.g. --out runs/{'diagnosis' if kind == ALL else kind}")
    config.check()
    # imports torch: only once the words are known to be good
    found = importlib.import_module("fieldsmith.diagnoses.overview").diagnose(None, kind, config=config)
    verdict = found.numbers.get("answer")
    return answer(config.out, verdict and {**verdict, "sentence": found.words}, found.numbers)


def kind_of(words: list[str]) -> tuple[str, list[str]]:
    """The kind that is named, and the other words; a model in its place is what all kinds are made of.

    Raises InputError at a word that is neither, or none.
    """
    listed = ", ".join(KINDS)
    if not words:
        raise InputError(f"nothing named after `fieldsmith diagnose`; give a model, or one of {listed}")
    first, rest = words[0], words[1:]
    if first in KINDS:
        return first, rest
    if first.startswith("-"):
        return ALL, words
    near = difflib.get_close_matches(first, KINDS, n=1, cutoff=0.6)
    if not (":" in first or "/" in first or pathlib.Path(first).exists()):
        hint = f"did you mean '{near[0]}'?" if near else f"its kinds: {listed}; or name a model, e.g. zoo:shapes-flux"
        raise InputError(f"'{first}' is neither a model nor one of diagnose's kinds; {hint}")
    return ALL, ["--model", first, *rest]


def settings(kind: str, words: list[str]) -> Any:
    """The config of a command line: file, then flags."""
    verb = "diagnose" if kind == ALL else f"diagnose {kind}"
    words = arguments.of_runs(words)
    path = arguments.take(words, "--config")
    file = from_file(path, config_of(kind), verb) if path else {}
    kinds = "Or `fieldsmith diagnose KIND`, one of them:\n" + "\n".join(f"  {k:<11}{what}" for k, what in KINDS.items())
    return arguments.parse(config_of(kind)(**file), words, verb, f"{NOTES}\n\n{kinds}" if kind == ALL else NOTES)
