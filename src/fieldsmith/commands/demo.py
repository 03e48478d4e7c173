"""`fieldsmith demo`: each verb once on the zoo's small models, and the gallery that leads to what they made.

In: --out DIR. Out: a complete run directory for each verb, and DIR/index.html with a card for each.
"""

from __future__ import annotations

import datetime
import importlib
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fieldsmith.commands import arguments, verbs
from fieldsmith.commands.answers import Answer, answer
from fieldsmith.config import config
from fieldsmith.run import check_out

if TYPE_CHECKING:
    from fieldsmith.report.page import Card
    from fieldsmith.result import Result


@config
class DemoConfig:
    """Erase the triangle from zoo:shapes-flux, raise a reward on zoo:shapes-flux-small, make a student of
    zoo:digits-unet, steer zoo:columns-ddpm away from hallucination, train zoo:scenes-kontext on its own sessions: each
    verb once, some minutes on one core."""

    out: pathlib.Path = pathlib.Path("demo")
    """The folder to write."""


@dataclass(frozen=True)
class Chapter:
    """A verb's command, and what its card says."""

    verb: str
    words: str  # of the command, without --out
    title: str
    complaint: str
    numbers: Callable[[dict[str, Any]], list[tuple[str, str, str]]]  # of metrics: label, value, note
    share: float  # of the demo's time, as measured

    @property
    def command(self) -> str:
        return f"fieldsmith {self.verb} {self.words}".strip()


def _percent(number: dict[str, Any]) -> str:
    return f"{100 * number['value']:.0f}%"


def _erased(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    one = next(iter(metrics["concepts"].values()))
    return [
        (
            "images that still show it",
            _percent(one["target detected"]),
            f"before: {_percent(one['target detected before'])}",
        ),
        (
            "unrelated prompts right",
            _percent(one["unrelated right"]),
            f"before: {_percent(one['unrelated right before'])}",
        ),
    ]


def _risen(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    right, held_out = metrics["rewards"]["right"], metrics["rewards"]["classifier-heldout"]
    return [
        ("images as asked", _percent(right["after"]), f"before: {_percent(right['before'])}"),
        (
            "a judge it was not trained on",
            f"{held_out['after']['value']:.2f}",
            f"before: {held_out['before']['value']:.2f}",
        ),
    ]


def _kept(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    sizes, curve = metrics["parameters"], metrics["curves"]["student"]
    best = min(curve, key=lambda w: float(curve[w]["distance"]))
    return [
        ("parameters", f"{sizes['student']:,}", f"its teacher has {sizes['teacher']:,}"),
        (
            "read as asked, guided",
            f"{100 * curve[best]['accuracy']:.0f}%",
            f"w = {best}; without guidance {100 * curve['1.0']['accuracy']:.0f}%",
        ),
    ]


def _fewer(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    was, now = (metrics[when]["hallucinated"] for when in ("before", "after"))
    return [
        ("images that break the rules", _percent(now), f"before: {_percent(was)}, {metrics['after']['images']} images")
    ]


def _steadier(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    before, after = (metrics[when]["following"][-1] for when in ("before", "after"))
    return [("sessions with every turn done", _percent(after), f"before: {_percent(before)}, {after['n']} sessions")]


CHAPTERS = (
    Chapter(
        "erase", "--targets triangle --anchors circle",
        "The triangle leaves, the rest stays",
        "“I took one concept out, and its neighbours broke.”", _erased, 0.13,
    ),
    Chapter(
        "align",
        "--model zoo:shapes-flux-small --reward right --held-out-rewards classifier-heldout --preset rsm-branch-sd35",
        "A half-trained model learns from a judge that says yes or no",
        "“My judge has no gradient, and I have no labels.”", _risen, 0.25,
    ),
    Chapter(
        "distill", "--preset fieldsmith --steps 600 --evaluate 300",
        "A student six times smaller that can still be guided",
        "“My small model no longer listens to guidance.”", _kept, 0.25,
    ),
    Chapter(
        "sharpen", "--preset guide",
        "Fewer images that break the rules of their data",
        "“It draws things that cannot be.”", _fewer, 0.15,
    ),
    Chapter(
        "edit", "--epochs 15 --evaluate 120 --evaluate-steps 8",
        "An editor that learns from its own sessions",
        "“After three edits nothing is as it was.”", _steadier, 0.22,
    ),
)  # fmt: skip


def demo(words: Sequence[str]) -> Answer:
    """All five chapters, then the gallery. Raises InputError where the folder cannot be written."""
    out = arguments.parse(DemoConfig(), list(words), "demo").out
    check_out(out, folder=True)
    api = importlib.import_module("fieldsmith.api")  # imports torch: once the words are known to be good
    from fieldsmith.report.page import Page  # for the same reason

    metrics: dict[str, Any] = {}
    cards, began, done = [], time.monotonic(), 0.0
    for place, chapter in enumerate(CHAPTERS, 1):
        left = _left(time.monotonic() - began, done)
        print(f"\nchapter {place} of {len(CHAPTERS)}{left}: {chapter.title}\n  {chapter.command}", file=sys.stderr)
        settings = verbs.settings(chapter.verb, chapter.words.split()).replace(out=out / chapter.verb)
        result = getattr(api, chapter.verb)(config=settings)
        metrics[chapter.verb] = result.metrics
        cards.append(card(chapter, result))
        done += chapter.share
    page = Page(
        "fieldsmith, tried out", "Five complaints about image models, and what one command each does about them."
    )
    page.cards("", cards)
    page.write(out / "index.html")
    print(f"open {(out / 'index.html').resolve()}")
    pages = [out / "index.html", *(out / chapter.verb / "report.html" for chapter in CHAPTERS)]
    return answer(out, None, metrics, pages)


def _left(seconds: float, done: float) -> str:
    """What is left, from what this machine took so far."""
    if not done:
        return ""
    left = datetime.timedelta(seconds=10 * round(seconds / done * (1 - done) / 10))
    return f", about {left} left"


def card(chapter: Chapter, result: Result) -> Card:
    """A chapter's card: the complaint, the verdict, pictures before and after at equal seeds, numbers, the command."""
    from fieldsmith.report.page import Card  # late, as in `demo`

    return Card(
        chapter.title, f"{chapter.verb}/report.html", chapter.complaint, result.metrics["verdict"], result.pairs[0],
        chapter.numbers(result.metrics), chapter.command,
    )  # fmt: skip
