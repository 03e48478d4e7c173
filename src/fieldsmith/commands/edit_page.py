"""What `fieldsmith edit` shows: sessions turn by turn before and after, success by turn, drift, the run's curves.

In: the config, the metrics, sessions run before and after. Out: a Page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fieldsmith.commands import arguments
from fieldsmith.measure import editing
from fieldsmith.measure.intervals import from_json
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.report.page import Caption, Page, Pair, Panel
from fieldsmith.run import Run

if TYPE_CHECKING:
    from fieldsmith.commands.edit import Measured

MEASURES = editing.MEASURES | {
    "score of following": "the judge's score of following",
    "score of consistency": "the judge's score of consistency",
}


def page_of(config: EditConfig, metrics: dict[str, Any], before: Measured, after: Measured, directory: Run) -> Page:
    """The report."""
    old, new = metrics["before"], metrics["after"]
    page = Page(f"{config.model}: sessions of {config.turns} turns", f"{metrics['method']}; seed {config.seed}")
    key = "overall" if "overall" in new else "score of following"
    was, now = old[key][-1], new[key][-1]
    apart = now["low"] > was["high"] or now["high"] < was["low"]
    grew = now["value"] > was["value"]
    turns = len(new[key])
    page.verdict(
        f"At turn {turns}, {MEASURES[key]} is {_percent(now)}, before it was {_percent(was)}, over {now['n']} held-out "
        "sessions.",
        grew if apart else None,
        ("Better" if grew else "Worse") if apart else "No clear change",
    )
    cards = [(f"turn {turns}", f"{100 * now['value']:.1f}", f"{key}, of 100; before {100 * was['value']:.1f}")]
    cards.append(("turn 1", f"{100 * new[key][0]['value']:.1f}", f"before {100 * old[key][0]['value']:.1f}"))
    if "gap" in new:
        gap, gap_before = new["gap"][-1]["value"], old["gap"][-1]["value"]
        cards.append(("exposure gap", f"{100 * gap:+.1f}", f"points at turn {turns}; before {100 * gap_before:+.1f}"))
    cards.append(("cost", f"{metrics['forward_equivalents']:,}", "forwards; a backward counts two"))
    page.numbers(cards)
    if metrics["stopped"] not in ("steps", "budget"):
        page.text("", f"The run stopped early: {metrics['stopped']}.")
    pairs = []
    for row in range(len(before.images)):
        sides = [
            [Caption("start"), *(Caption(f"{t + 1}", one.marks[t][row]) for t in range(len(one.words)))]
            for one in (before, after)
        ]
        words = "; ".join(f"{t + 1}. {one[row]}" for t, one in enumerate(after.words))
        pairs.append(Pair(words, before.images[row], after.images[row], *sides))
    page.before_after("Sessions, each turn on what the last one made; equal noise", pairs)
    headers = ("measure", "", *(f"turn {t + 1}" for t in range(turns)))
    rows: list[tuple[str, ...]] = []
    for name, words in MEASURES.items():
        if name in new:
            for side, numbers in (("before", old), ("after", new)):
                rows.append((words, side, *(_percent(one) for one in numbers[name])))
    page.table("Turn by turn, in percent with 95% intervals", headers, rows)
    if "drift" in new:
        steps = list(range(1, len(new["drift"]) + 1))
        panels = [
            Panel(title, {"before": (steps, old[name]), "after": (steps, new[name])}, "turns that ask for nothing")
            for title, name in (("1 - consistency", "drift"), ("distance to the first image", "artefacts"))
        ]
        page.curves("Asked for nothing, turn after turn", panels)
    history = directory.history()
    names = ("following", "following, last turn", "session", "consistency", "groups with a signal", "identity", "loss")
    panels = [
        Panel(name, {name: ([row["step"] for row in logged], [row[name] for row in logged])})
        for name in names
        if (logged := [row for row in history if name in row])
    ]
    page.curves("The run", panels)
    page.command(
        "Repeat it, load it", arguments.repeat_and_load("edit", config, directory, metrics["adapter"] == "adapter")
    )
    return page


def _percent(one: dict[str, Any]) -> str:
    return f"{100 * one['value']:.1f}{from_json(one).bounds('.1f', 100)}"
