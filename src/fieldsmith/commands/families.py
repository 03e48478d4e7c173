"""`fieldsmith families`: which verb trains which family of pipelines, and what each family is.

In: nothing, or --markdown. Out: the tables of models/families.py on a terminal, or docs/families.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fieldsmith.commands import arguments
from fieldsmith.commands.answers import Answer, answer
from fieldsmith.models.families import FAMILIES, PUBLISHED, VERBS, supports

INTRODUCTION = """# Families

What each family of diffusers pipelines is, and which verb trains it: by a LoRA, or as full weights (all of them or a
subset). Printed by `fieldsmith families --markdown` from src/fieldsmith/models/families.py; a test runs every cell.

A model is a folder as diffusers saves it, a hub id, or one .safetensors file in the layout of its first release (SD1.5,
SDXL, SD3, FLUX.1) with `--config-from FOLDER_OR_ID`, in Python `load(file, config_from=...)`: a pipeline of the same
family, from which config, scheduler, tokenizers and what the file lacks come, such as encoders of words."""


@dataclass(frozen=True)
class FamiliesConfig:
    """Print which verb trains which family of pipelines, by LoRA or as full weights."""

    markdown: bool = False
    """As docs/families.md."""


def families(words: Sequence[str]) -> Answer:
    config = arguments.parse(FamiliesConfig(), list(words), "families")
    headers, rows = matrix()
    told = answer(metrics={row[0]: dict(zip(headers[1:], row[1:], strict=True)) for row in rows})
    if config.markdown:
        print(markdown())
        return told
    from rich.console import Console  # slow to import, and only for people
    from rich.table import Table

    console = Console()
    for headers, rows in (matrix(), traits()):
        table = Table()
        for header in headers:
            table.add_column(header, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in notes():
        console.print(line, markup=False, highlight=False)
    return told


def markdown() -> str:
    """The page docs/families.md, without its last line break."""
    parts = [INTRODUCTION, _table(*matrix()), "\n".join(f"- {line}" for line in notes()), _table(*traits())]
    return "\n\n".join(parts)


def matrix() -> tuple[list[str], list[list[str]]]:
    """Headers, and a row a family: the ways in which each verb trains it."""
    rows = [[family.name, *(", ".join(supports(family, verb).ways) or "no" for verb in VERBS)] for family in FAMILIES]
    return ["family", *VERBS], rows


def notes() -> list[str]:
    """Why not, and under what condition, each clause once for all families that it is said of."""
    said: dict[tuple[str, bool, str], list[str]] = {}
    for verb in VERBS:
        for family in FAMILIES:
            found = supports(family, verb)
            if found.note:
                said.setdefault((verb, bool(found.ways), found.note), []).append(family.name)
    return [f"{verb}, {', '.join(names)}: {'' if trains else 'no: such a model '}{note}"
            for (verb, trains, note), names in said.items()]  # fmt: skip


def traits() -> tuple[list[str], list[list[str]]]:
    """Headers, and a row a family: what it is asked for by, its path, what a run ships."""
    headers = [
        "family", "pipelines", "asked by", "source images", "path", "a LoRA ships as", "other tools' keys",
        "on the hub",
    ]  # fmt: skip
    rows = [
        [
            family.name, ", ".join(family.pipelines), " or ".join(family.condition), family.sources, family.path,
            "adapter file" if family.adapters else "whole pipeline", ", ".join(family.exports) or "none",
            ", ".join(PUBLISHED[family.name]),
        ]
        for family in FAMILIES
    ]  # fmt: skip
    return headers, rows


def _table(headers: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, ["---"] * len(headers), *rows))
