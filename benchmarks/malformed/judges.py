"""Judges of one's own, as a command names them (`judges.py:dark`)."""

from __future__ import annotations

from typing import Any


def dark(images: Any) -> Any:
    """Which images are valid: those darker than mid grey, (n,) bools."""
    return images.flatten(1).mean(1) < 0.5


def edits(before: Any, after: Any, instructions: Any) -> Any:
    """(following, consistency), n numbers in [0, 1] each."""
    return after.flatten(1).mean(1), before.flatten(1).mean(1)
