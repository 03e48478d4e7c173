"""What a command tells a program, `fieldsmith --json`: the run directory, the verdict, the numbers, the files."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from fieldsmith.run import plain

Answer = dict[str, Any]


def answer(
    out: pathlib.Path | str | None = None,
    verdict: Mapping[str, str] | None = None,
    metrics: Mapping[str, Any] | None = None,
    files: Iterable[pathlib.Path | str] | None = None,
) -> Answer:
    """`out` is a run directory, whose files are named unless others are; `verdict` has a tone (good, bad, mixed), a
    word and a sentence."""
    if files is None:
        files = _written(pathlib.Path(out)) if out else ()
    return {
        "out": str(out) if out else None, "verdict": dict(verdict) if verdict else None,
        "metrics": plain(dict(metrics or {})), "files": [str(file) for file in files],
    }  # fmt: skip


def _written(out: pathlib.Path) -> list[pathlib.Path]:
    """The files of a run directory, without its checkpoints."""
    inside = ((file, file.relative_to(out).parts) for file in sorted(out.rglob("*")) if file.is_file())
    return [file for file, parts in inside if parts[0] != "checkpoints" and not any(part[0] == "." for part in parts)]
