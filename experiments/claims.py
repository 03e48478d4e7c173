"""What every summary shares: a claim as summary.json holds it, how it is graded, Markdown tables.

In: a measured Interval and words. Out: plain mappings and lines of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fieldsmith.metrics.intervals import Interval


def entry(
    paper: str, name: str, statement: str, found: Interval, unit: str, verdict: str, extra: dict[str, Any]
) -> dict[str, Any]:
    """One entry of summary.json; `extra` holds seeds, command and forward_equivalents."""
    spread = {"value": found.value, "low": found.low, "high": found.high, "unit": unit}
    return {"id": name, "statement": statement, "paper": paper, **spread, "verdict": verdict, **extra}


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table and the blank line after it."""
    return [row(*headers), row(*("---" for _ in headers)), *(row(*cells) for cells in rows), ""]


def opening(verb: str, listed: Sequence[dict[str, Any]], command: str) -> list[str]:
    """How a results page begins: what made it, and all its claims."""
    rows = [
        (c["id"], f"{c['value']:.3g} [{c['low']:.3g}, {c['high']:.3g}] {c['unit']}", c["verdict"], c["statement"])
        for c in listed
    ]
    return [
        f"# What `{verb}` does, measured",
        "",
        f"Made by `{command}`; every number comes from `runs/`. Intervals are 95%, Student's t over the seeds.",
        "",
        "## Claims",
        "",
        *table(("id", "value", "verdict", "statement"), rows),
    ]
