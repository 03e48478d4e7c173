"""All malformed inputs, group by group."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.malformed import files, settings
from benchmarks.malformed.case import Case

GROUPS = (*files.GROUPS, settings.huge, settings.cases)


def cases() -> Iterator[Case]:
    for group in GROUPS:
        yield from group()
