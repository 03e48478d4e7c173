"""Pictures while a run trains: from the model as it stands, at equal seeds, a few times a run.

samples/step-N.png each, a strip; the page shows them one below the other. No draw of training depends on them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fieldsmith import processes
from fieldsmith.result import read_strip, write_strip
from fieldsmith.run import Run

FOLDER = "samples"
FEW = 4  # pictures in a strip


@dataclass(frozen=True)
class Preview:
    """What a verb shows: what each picture is, and the pictures (n, 3 or 1, h, w) in [0, 1] of a model."""

    labels: list[str]
    draw: Callable[[Any], Tensor]


def times(most: int, steps: int) -> set[int]:
    """The steps done at which to look: before the first, after the last, and evenly between."""
    return {round(i * steps / most) for i in range(most + 1)} if most else set()


def save(images: Tensor, folder: pathlib.Path, done: int) -> None:
    if processes.is_main():
        write_strip(images, folder / FOLDER / f"step-{done:08d}.png")


def looking(preview: Preview | None, run: Run | None, most: int, job: Any) -> Callable[[int], None]:
    """What is told the steps done, and draws a strip at some of them from what `job` (verb.py) trains."""
    when = times(most, job.optimisation.steps)

    def look(done: int) -> None:
        if run and preview and done in when:
            with job.model.uncounted():
                images = preview.draw(job.trained if job.trained is not None else job.model)
            save(images, run.folder, done)

    return look


def found(folder: pathlib.Path, n: int) -> list[tuple[str, Tensor]]:
    """What was drawn so far, in order: 'step 40' and its n pictures (n, 3, h, w)."""
    strips = sorted((folder / FOLDER).glob("step-*.png"))
    return [(f"step {int(path.stem.removeprefix('step-')):,}", read_strip(path, n)) for path in strips]
