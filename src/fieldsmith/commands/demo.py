"""`fieldsmith demo`: the triangle erased from the zoo's small Flux, and the page that shows it.

In: --out DIR. Out: DIR/erase, a complete run directory, and DIR/index.html, which is its page.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fieldsmith.commands import arguments
from fieldsmith.commands.erase import configure, run


@dataclass(frozen=True)
class DemoConfig:
    """Erase the triangle from zoo:shapes-flux; some minutes on one core."""

    out: Path = Path("demo")
    """The folder to write."""


def demo(words: Sequence[str]) -> None:
    config = arguments.parse(DemoConfig(), list(words), "demo")
    arguments.check_out(config.out, folder=True)
    flags = ["--targets", "triangle", "--anchors", "circle", "--out", str(config.out / "erase")]
    done = run(configure([*flags, "--preset", "demo"]))
    page = config.out / "index.html"
    shutil.copyfile(done.folder / "report.html", page)
    print(f"open {page.resolve()}")
