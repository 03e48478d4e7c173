"""One answer about a finished model: numbers, a verdict in words, a page. Nothing is trained.

In: a model, one of `KINDS`, its settings and what it is measured with (a teacher, a judge, a reward), all as objects.
Out: a `Diagnosis`. Each kind has a file with a function `diagnosis(model, config, ...)`, and its settings in config.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fieldsmith.errors import check_word
from fieldsmith.measure.diagnose import config as settings_of

if TYPE_CHECKING:  # torch, which parsing the command line has no use for
    from fieldsmith.models.core import Model
    from fieldsmith.report.page import Page


@dataclass(frozen=True)
class Diagnosis:
    """numbers: what metrics.json holds; words: the verdict in a sentence or a few; page: the report of both, None
    where it was written before."""

    numbers: dict[str, Any]
    words: str
    page: Page | None


def config_of(kind: str) -> type[Any]:
    """The class of a kind's settings. Raises InputError at an unknown kind."""
    check_word(kind, tuple(settings_of.KINDS), "diagnose's kinds")
    config: type[Any] = getattr(settings_of, f"{kind.capitalize()}Config")
    return config


def diagnose(model: Model | None, kind: str, **settings: Any) -> Diagnosis:
    """Measure one thing of a model (None for 'judge', which needs none).

    `settings` are fields of the kind's config and what its `diagnosis` asks for by name: `teacher`, `prompts` and
    `data` for guidance, `reward` and `prompts` for audit, and so on. Raises InputError at an unknown kind, a bad value,
    or inputs that do not fit each other.
    """
    kind_of_config = config_of(kind)
    names = {field.name for field in dataclasses.fields(kind_of_config)}
    config = kind_of_config(**{name: value for name, value in settings.items() if name in names})
    config.check()
    inputs = {name: value for name, value in settings.items() if name not in names}
    module = importlib.import_module(f"fieldsmith.measure.diagnose.{kind}")  # imports torch, which --help does without
    began = time.monotonic()
    diagnosis: Diagnosis = module.diagnosis(model, config, **inputs)
    shared = {"method": "diagnose", "instrument": kind, "seconds": time.monotonic() - began, "words": diagnosis.words}
    return dataclasses.replace(diagnosis, numbers={**shared, **diagnosis.numbers})
