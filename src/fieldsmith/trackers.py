"""Where a run's numbers go while it trains, beside metrics.jsonl: the trackers of accelerate."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator

from fieldsmith.run import plain


@contextlib.contextmanager
def tracked(name: str, config: Any, folder: pathlib.Path) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """What sends each step's log to the trackers that the config names, of accelerate."""
    if config.log_with is None:
        yield lambda step, log: None
        return
    accelerator = Accelerator(log_with=config.log_with, project_dir=folder)
    settings = {
        key: value if isinstance(value, (int, float, bool)) else str(value) for key, value in plain(config).items()
    }
    accelerator.init_trackers(f"fieldsmith-{name}", config=settings)
    try:
        yield lambda step, log: accelerator.log(log, step=step)
    finally:
        accelerator.end_training()
