"""Runs of a study, each a JSON file: done once, in parts that share the work, and again where their settings changed.

In: jobs in order. Out: their files; `main` modules make the summary once all are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldsmith.errors import InputError
from fieldsmith.run import plain, write_atomically


@dataclass(frozen=True)
class Job:
    """A run, the file that it makes, and what that file must say of its settings."""

    path: Path
    told: dict[str, Any]
    work: Callable[[], dict[str, Any]]

    @property
    def done(self) -> bool:
        """Whether the file is there and was made with the settings that are asked for now."""
        return self.path.exists() and json.loads(self.path.read_text()).get("told") == plain(self.told)


def slug(words: str) -> str:
    """A part of a file's name: 'VSM 0.1' is VSM-0.1."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in words).split())


def check_part(part: tuple[int, int]) -> None:
    """Raises InputError where K N names no share."""
    mine, parts = part
    if not 0 <= mine < parts:
        raise InputError(f"part={mine} {parts} is no share of the runs; use 0 1 for all, or 0 2 and 1 2 for halves")


def work_through(groups: Sequence[Sequence[Job]], part: tuple[int, int]) -> int:
    """Do what is missing of this part's groups, whose jobs share what is costly; how many are missing in all."""
    mine, parts = part
    for group in groups[mine::parts]:
        for job in group:
            if not job.done:
                write_atomically(job.path, json.dumps({"told": plain(job.told), **job.work()}, indent=1) + "\n")
                print(f"{job.path.stem}: done", flush=True)
    return sum(not job.done for group in groups for job in group)
