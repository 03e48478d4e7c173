"""Measurements as claims of a summary.json, which the studies' have too."""

from __future__ import annotations

from typing import Any

from fieldsmith.measure.intervals import wilson


def claim(name: str, statement: str, value: float, unit: str, good: bool, command: str) -> dict[str, Any]:
    """A measurement has no seeds; its interval is itself."""
    return {
        "id": name, "statement": statement, "paper": "", "value": value, "low": value, "high": value, "unit": unit,
        "verdict": "reproduced" if good else "not", "seeds": [], "command": command, "forward_equivalents": 0,
    }  # fmt: skip


def share_claim(name: str, statement: str, successes: int, n: int, command: str) -> dict[str, Any]:
    """A share that should be 1, with Wilson's interval."""
    ends = wilson(successes, n)
    made = claim(name, statement, successes / n, "share", successes == n, command)
    return {**made, "low": ends.low, "high": ends.high}
