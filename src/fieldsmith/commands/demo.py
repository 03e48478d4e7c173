"""`fieldsmith demo`: each verb once on the zoo's small models, and the gallery that leads to what they made.

In: --out DIR. Out: a complete run directory for each verb with what its command said beside it (VERB.log), and
DIR/index.html with a card for each. Every chapter is its command in a process of its own, a core each.
"""

from __future__ import annotations

import datetime
import importlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from subprocess import STDOUT, Popen
from typing import TYPE_CHECKING, Any

from fieldsmith.commands import arguments
from fieldsmith.commands.answers import Answer, answer
from fieldsmith.config import Count, config
from fieldsmith.errors import InputError, RunError
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
    at_once: Count = os.cpu_count() or 1
    """Chapters that run at the same time; as many as there are cores."""


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
    config = arguments.parse(DemoConfig(), list(words), "demo")
    check_out(config.out, folder=True)
    config.out.mkdir(parents=True, exist_ok=True)
    run_all(CHAPTERS, config.out, min(config.at_once, len(CHAPTERS)))
    api = importlib.import_module("fieldsmith.api")  # imports torch: once there is something to show
    from fieldsmith.report.page import Page  # for the same reason

    results = {chapter.verb: api.open_run(config.out / chapter.verb) for chapter in CHAPTERS}
    page = Page(
        "fieldsmith, tried out", "Five complaints about image models, and what one command each does about them."
    )
    page.cards("", [card(chapter, results[chapter.verb]) for chapter in CHAPTERS])
    page.write(config.out / "index.html")
    print(f"open {(config.out / 'index.html').resolve()}")
    pages = [config.out / "index.html", *(config.out / chapter.verb / "report.html" for chapter in CHAPTERS)]
    return answer(config.out, None, {verb: result.metrics for verb, result in results.items()}, pages)


@dataclass
class Running:
    """A chapter's process."""

    chapter: Chapter
    process: Popen[bytes]
    log: pathlib.Path
    began: float


def run_all(chapters: Sequence[Chapter], out: pathlib.Path, at_once: int) -> None:
    """Every chapter's command, `at_once` at a time, the longest first.

    Raises what stopped a chapter, InputError or RunError; the others are told to end, and the same command resumes all.
    """
    waiting = sorted(chapters, key=lambda chapter: -chapter.share)
    running: list[Running] = []
    done: list[tuple[float, float]] = []  # share and seconds of those that ended
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_start(waiting.pop(0), out, threads))
            ended = [one for one in running if one.process.poll() is not None]
            for one in ended:
                running.remove(one)
                _check(one)
                done.append((one.chapter.share, time.monotonic() - one.began))
                print(f"{one.chapter.verb} is done{_left(done, running, waiting, at_once)}", file=sys.stderr)
            if not ended:
                time.sleep(0.2)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()


def _start(chapter: Chapter, out: pathlib.Path, threads: str) -> Running:
    print(f"{chapter.verb}: {chapter.title}\n  {chapter.command}", file=sys.stderr)
    command = [sys.executable, "-m", "fieldsmith", chapter.verb, *chapter.words.split()]
    log = out / f"{chapter.verb}.log"
    with log.open("wb") as file:
        process = Popen(
            [*command, "--out", str(out / chapter.verb)], stdout=file, stderr=STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": threads},
            start_new_session=True,  # Ctrl-C reaches it through `run_all` alone, once
        )  # fmt: skip
    return Running(chapter, process, log, time.monotonic())


def _check(one: Running) -> None:
    """Raises what the command of a chapter ended with."""
    code = one.process.returncode
    if code:
        said = one.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        sentence = f"the chapter {one.chapter.verb} stopped (exit code {code}): {said[-1]}"
        raise (InputError if code == 2 else RunError)(sentence)


def _left(
    done: Sequence[tuple[float, float]], running: Sequence[Running], waiting: Sequence[Chapter], at_once: int
) -> str:
    """What is left, from what this machine took so far."""
    if not running and not waiting:
        return ""
    pace = sum(seconds for _, seconds in done) / sum(share for share, _ in done)  # seconds for a share of 1
    now = time.monotonic()
    lanes = [max(0.0, one.chapter.share * pace - (now - one.began)) for one in running]
    lanes += [0.0] * (at_once - len(lanes))
    for chapter in waiting:  # each begins where one ends first
        lanes[lanes.index(min(lanes))] += chapter.share * pace
    return f"; about {datetime.timedelta(seconds=10 * round(max(lanes) / 10))} left"


def card(chapter: Chapter, result: Result) -> Card:
    """A chapter's card: the complaint, the verdict, pictures before and after at equal seeds, numbers, the command."""
    from fieldsmith.report.page import Card  # late, as in `demo`

    return Card(
        chapter.title, f"{chapter.verb}/report.html", chapter.complaint, result.metrics["verdict"], result.pairs[0],
        chapter.numbers(result.metrics), chapter.command,
    )  # fmt: skip
