"""One answer about a finished model: numbers, a verdict in words, a page. Nothing is trained.

Each kind has a file with a function `diagnosis(model, config, ...)`, its settings in config.py, and what its names
stand for (a teacher, a judge, a reward) in inputs.py; run.py is the whole of one, overview.py
of all that a model allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fieldsmith.diagnoses import config as settings_of
from fieldsmith.errors import check_word

if TYPE_CHECKING:  # torch, which parsing the command line has no use for
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
    check_word(kind, ("overview", *settings_of.KINDS), "diagnose's kinds")
    found: type[Any] = getattr(settings_of, f"{kind.capitalize()}Config")
    return found
