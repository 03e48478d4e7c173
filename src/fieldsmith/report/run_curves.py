"""How training went, on a verb's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldsmith.report.page import Page, Panel


def curves(page: Page, outcome: Any, panels: Mapping[str, tuple[str, ...]]) -> None:
    """A section with the training curves: panel title -> keys of metrics.jsonl; what was never logged is left out."""
    drawn = []
    for title, keys in panels.items():
        series = {}
        for key in keys:
            rows = [row for row in outcome.history if key in row]
            if rows:
                series[key] = ([row["step"] for row in rows], [row[key] for row in rows])
        if series:
            drawn.append(Panel(title, series, "step"))
    done = outcome.metrics
    calls = int(sum(row.get("reward calls", 0) for row in outcome.run.rows())) if outcome.run else 0
    judged = f", {calls:,} reward calls" if calls else ""
    cost = f"{done['nfe']:,.0f} network evaluations (a forward of one state is 1, its backward 2)"
    if drawn:
        page.curves("The run", drawn, note=f"{done['steps']} steps, {done['seconds']:.0f} s, {cost}{judged}.")
