"""The page of an editing run: sessions turn by turn before and after, success by turn, drift, the run's curves."""

from __future__ import annotations

from typing import Any

from fieldsmith.measure.editing import MEASURES, overall_change
from fieldsmith.measure.intervals import Interval, mean_interval
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.measure import Measured
from fieldsmith.report.page import Caption, Page, Pair, Panel
from fieldsmith.report.run_curves import curves
from fieldsmith.verb import Outcome

NAMES = {
    **MEASURES,
    "score of following": "the judge's score of following",
    "score of consistency": "the judge's score of consistency",
}
CURVES = {
    name: (name,)
    for name in (
        "following", "following, last turn", "session", "consistency", "groups with a signal", "identity", "loss",
    )
}  # fmt: skip


def report(page: Page, outcome: Outcome) -> dict[str, Any]:
    """Numbers by turn before and after, on the page and for metrics.json."""
    config: EditConfig = outcome.config
    old, new = outcome.before.numbers, outcome.after.numbers
    page.title = f"{config.model}: sessions of {config.turns} turns"
    page.subtitle = f"{config.preset or config.objective}; seed {config.seed}"
    key = "overall" if "overall" in new else "score of following"
    change = _change(outcome.before, outcome.after)
    _verdict(page, key, old[key], new[key], change)
    _cards(page, key, old, new, outcome.metrics["nfe"])
    if outcome.metrics["stopped"] not in ("steps", "budget"):
        page.text("", f"The run stopped early: {outcome.metrics['stopped']}.")
    page.before_after(
        "Sessions, each turn on what the last one made; equal noise", _pairs(outcome.before, outcome.after)
    )
    turns = range(1, len(new[key]) + 1)
    rows = [
        (words, side, *(_percent(one) for one in numbers[name]))
        for name, words in NAMES.items()
        if name in new
        for side, numbers in (("before", old), ("after", new))
    ]
    page.table(
        "Turn by turn, in percent with 95% intervals", ("measure", "", *(f"turn {turn}" for turn in turns)), rows
    )
    if "drift" in new:
        still = list(range(1, len(new["drift"]) + 1))
        panels = [
            Panel(title, {"before": (still, old[name]), "after": (still, new[name])}, "turns that ask for nothing")
            for title, name in (("1 - consistency", "drift"), ("distance to the first image", "artefacts"))
        ]
        page.curves("Asked for nothing, turn after turn", panels)
    curves(page, outcome, CURVES)
    return {"before": old, "after": new, "change": change.to_json()}


def _change(before: Measured, after: Measured) -> Interval:
    """What the last turn gained, in points; both sides have the same sessions and noise."""
    if before.verdicts is not None and after.verdicts is not None:
        return overall_change(before.verdicts, after.verdicts)
    assert before.last is not None and after.last is not None
    return mean_interval(100 * (after.last - before.last), unit="points")


def _verdict(page: Page, key: str, old: list[dict[str, Any]], new: list[dict[str, Any]], change: Interval) -> None:
    before, after = old[-1], new[-1]
    page.verdict(
        f"At turn {len(new)}, {NAMES[key]} is {_percent(after)}, before it was {_percent(before)}: {change.short()}, "
        f"over the same {after['n']} held-out sessions.",
        change.value > 0 if change.excludes_zero else None,
        ("Better" if change.value > 0 else "Worse") if change.excludes_zero else "No clear change",
    )


def _cards(page: Page, key: str, old: dict[str, Any], new: dict[str, Any], nfe: int) -> None:
    turns = len(new[key])
    first, last = (f"{100 * new[key][turn]['value']:.1f}" for turn in (0, -1))
    first_before, last_before = (f"{100 * old[key][turn]['value']:.1f}" for turn in (0, -1))
    cards = [
        (f"turn {turns}", last, f"{key}, of 100; before {last_before}"),
        ("turn 1", first, f"before {first_before}"),
    ]
    if "gap" in new:
        gap, before = (100 * side["gap"][-1]["value"] for side in (new, old))
        cards.append(("exposure gap", f"{gap:+.1f}", f"points at turn {turns}; before {before:+.1f}"))
    cards.append(("cost", f"{nfe:,}", "network evaluations; a backward counts two"))
    page.numbers(cards)


def _pairs(before: Measured, after: Measured) -> list[Pair]:
    """A row of images a session: its start, then what each turn made, marked where it was done."""
    pairs = []
    for row in range(len(before.images)):
        captions = [
            [Caption("start"), *(Caption(f"{turn}", done[row]) for turn, done in enumerate(side.done, 1))]
            for side in (before, after)
        ]
        label = "; ".join(f"{turn}. {one[row]}" for turn, one in enumerate(after.instructions, 1))
        pairs.append(Pair(label, before.images[row], after.images[row], *captions))
    return pairs


def _percent(one: dict[str, Any]) -> str:
    ends = "" if one["low"] is None else f" [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"
    return f"{100 * one['value']:.1f}{ends}"
