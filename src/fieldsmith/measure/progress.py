"""How far a measurement is: one line on stderr where that is a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
CONSOLE = Console(stderr=True)  # one for all, so that a line within a line is drawn under it


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A line 'what ---- 3/40 0:00:12', gone at the end; call what it gives once for each of `total` parts."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal) as line:
        task = line.add_task(what, total=total)
        yield lambda: line.advance(task)


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one after another, with a line that says how many are done."""
    with progress(what, len(items)) as advance:
        for item in items:
            yield item
            advance()
