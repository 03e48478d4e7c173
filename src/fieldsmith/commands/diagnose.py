"""`fieldsmith diagnose KIND`: what a model kept, and what is broken, measured on a finished one; nothing is trained."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from fieldsmith.commands import arguments
from fieldsmith.config import from_file
from fieldsmith.diagnoses import config_of
from fieldsmith.diagnoses.config import KINDS
from fieldsmith.errors import InputError, check_word

NOTES = "Also: --config FILE.toml (such as a run's config.toml) sets fields; flags come last."


def diagnose(words: Sequence[str]) -> None:
    """fieldsmith diagnose KIND [--config FILE.toml] [--field value ...] --out DIR."""
    if not words or words[0].startswith("-"):
        if {"-h", "--help"} & set(words):
            listed = "\n".join(f"  {kind:<11}{what}" for kind, what in KINDS.items())
            print(f"usage: fieldsmith diagnose KIND [--field value ...] --out DIR; kinds:\n{listed}")
            return
        raise InputError(f"no kind named after `fieldsmith diagnose`; use one of {', '.join(KINDS)}")
    kind, rest = words[0], list(words[1:])
    check_word(kind, tuple(KINDS), "diagnose's kinds")
    config = settings(kind, rest)
    if config.out is None:
        raise InputError(f"no out folder given; add --out DIR, e.g. --out runs/{kind}")
    config.check()
    # imports torch: only once the words are known to be good
    importlib.import_module("fieldsmith.diagnoses.run").diagnose(None, kind, config=config)


def settings(kind: str, words: list[str]) -> Any:
    """The config of a command line: file, then flags."""
    verb = f"diagnose {kind}"
    path = arguments.take(words, "--config")
    file = from_file(path, config_of(kind), verb) if path else {}
    return arguments.parse(config_of(kind)(**file), words, verb, NOTES)
