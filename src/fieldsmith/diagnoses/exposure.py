"""Diagnosis 'exposure': what an editor loses turn by turn because it edits its own results.

In: an editor, sessions whose planned images are known, their judge. Out: success by turn on its own and on planned
sources, by what is asked, drift where nothing is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fieldsmith.diagnoses import Diagnosis
from fieldsmith.diagnoses.config import ExposureConfig
from fieldsmith.measure import editing
from fieldsmith.measure.exposure import Channel, Drift, Exposure, Judge, Likeness, exposure, identity_drift
from fieldsmith.measure.intervals import Interval, mean_interval, share
from fieldsmith.models.core import Model
from fieldsmith.report.page import Caption, Page, Pair, Panel
from fieldsmith.worlds.scenes import SceneSessions

SHOWN = 6  # sessions on the page
WEAK = 0.1  # success on planned sources below which there is hardly anything to lose
SMALL, MANY = 0.05, 50  # a loss that stays below SMALL is none, once at least MANY sessions say so
RATES = {"following": "prefix", "marginal": "marginal", "conditional": "conditional",
         "teacher_forced": "planned source"}  # fmt: skip
HOW = (
    "Every session runs twice at equal noise: each turn on what the last one made, and each turn on the planned image, "
    "as training sees it (teacher forcing). Marginal: a turn is done, whatever came before. Conditional: it is done "
    "after all before it were. Prefix: it and all before it are done. The exposure gap is planned source less own "
    "source: what the editor's own results cost it, and not how hard the turn is.",
    "Consistency is how like the first image the cells are that no turn names, 1 for a perfect copy; overall is the "
    "root of prefix x consistency.",
    "Asked for nothing, an editor should give its source back. Drift is 1 - consistency of the whole image, artefacts "
    "the root mean squared distance of its pixels in [0, 1]: what stays when no instruction can be misread.",
)


@dataclass(frozen=True)
class Operation:
    """The share of turns done of those that ask one thing, on planned and on the editor's own sources."""

    teacher_forced: Interval
    own: Interval


def diagnosis(
    model: Model,
    config: ExposureConfig,
    sessions: SceneSessions,
    judge: Judge,
    likeness: Likeness,
    channel: Channel,
    operations: Sequence[str],
    nothing: str,
    sampling_seed: int,
) -> Diagnosis:
    """`operations` are the kinds of turns there are, `nothing` the instruction that asks for none.

    Raises InputError where the model is no editor.
    """
    run = exposure(model, sessions, judge, channel, config.steps, sampling_seed)
    drift = None
    if config.still:
        first = sessions.clean(0)
        drift = identity_drift(model, first, nothing, likeness, channel, config.still, config.steps, sampling_seed)
    scores = editing.scores(run.verdicts)
    by_kind = by_operation(run, sessions, operations)
    drifts = [] if drift is None else [mean_interval(turn) for turn in drift.away]
    numbers: dict[str, Any] = {
        "nfe": config.samples * config.steps * (2 * config.turns + config.still),
        **{name: [one.to_json() for one in turns] for name, turns in vars(scores).items()},
        "operations": {
            name: {"teacher_forced": one.teacher_forced.to_json(), "own": one.own.to_json()}
            for name, one in by_kind.items()
        },
    }
    if drift is not None:
        numbers["drift"] = [one.to_json() for one in drifts]
        numbers["artefacts"] = [mean_interval(turn).to_json() for turn in drift.artefacts]
    words = words_of(scores, by_kind, drifts)
    page = Page(
        f"Exposure bias of {model.name}",
        f"{config.samples} sessions of {config.turns} turns, {config.steps} steps{_between(config)}; "
        f"seed {config.seed}",
    )
    page.verdict(words, *verdict_of(scores))
    page.numbers(_cards(scores, drifts))
    _images(page, run, sessions)
    _tables(page, scores, by_kind, drift, nothing)
    page.text("How to read it", HOW)
    return Diagnosis(numbers, words, page)


def by_operation(run: Exposure, sessions: SceneSessions, operations: Sequence[str]) -> dict[str, Operation]:
    """Shares of turns done by what they ask, of the operations that some turn asks; hardest first."""
    asked = [[turn.operation for turn in plan.turns] for plan in sessions.plans]
    done, clean = run.verdicts.done, run.verdicts.clean
    assert clean is not None
    rows = {}
    for operation in operations:
        where = torch.tensor([[one == operation for one in turns] for turns in asked])
        if where.any():
            rows[operation] = Operation(share(clean[where]), share(done[where]))
    return dict(sorted(rows.items(), key=lambda row: row[1].teacher_forced.value))


# the verdict


def verdict_of(scores: editing.Scores) -> tuple[bool | None, str]:
    """Whether the editor bears its own results (None: it cannot be told), and that in two or three words."""
    gap, forced = scores.gap[-1], scores.teacher_forced[-1]
    if gap.low > 0:
        return False, "Exposure bias"
    if forced.value < WEAK:
        return None, "Too weak to tell"
    if gap.high <= SMALL and gap.n >= MANY:
        return True, "Bears its own results"
    return None, "Not shown"


def words_of(scores: editing.Scores, by_kind: dict[str, Operation], drifts: Sequence[Interval]) -> str:
    """The verdict in a few sentences."""
    gap, forced, own = scores.gap[-1], scores.teacher_forced[-1], scores.marginal[-1]
    sentence = (
        f"Turn {len(scores.gap)} is done in {100 * forced.value:.1f}% of {gap.n} sessions on its planned source and in "
        f"{100 * own.value:.1f}% on the editor's own: it loses {100 * gap.value:.1f} points{gap.bounds('.1f', 100)} to "
        "its own sources"
    )
    if gap.n < 2:
        sentence += "; one session has no interval, so give more --samples."
    elif gap.low > 0:
        sentence += ", and the interval excludes 0."
    elif forced.value < WEAK:
        sentence += ", but hardly does a turn even on a clean source, so that there is little to lose."
    else:
        sentence += ", and the interval holds 0" + ("." if verdict_of(scores)[0] else "; more --samples narrow it.")
    sentences, rows = [sentence], list(by_kind.items())
    (worst, least), (best, most) = rows[0], rows[-1]
    sentences.append(f"Worst operation on planned sources: {worst} ({_percent(least.teacher_forced)})")
    sentences[-1] += f"; best: {best} ({_percent(most.teacher_forced)})." if len(rows) > 1 else "."
    if drifts:
        times = "once" if len(drifts) == 1 else f"{len(drifts)} times in a row"
        sentences.append(
            f"Asked for nothing {times}, it loses {_percent(drifts[-1])} of its likeness to the first image."
        )
    return " ".join(sentences)


# the page


def _percent(one: Interval) -> str:
    return f"{100 * one.value:.0f}%"


def _cell(one: Interval) -> str:
    """In percent, without the sign."""
    return f"{100 * one.value:.1f}{one.bounds('.1f', 100)}"


def _between(config: ExposureConfig) -> str:
    """What happens to an image between turns, as part of a sentence."""
    parts = [("contrast", config.contrast, 1), ("blur", config.blur, 0), ("noise", config.noise, 0)]
    changes = ", ".join(f"{name} {value:g}" for name, value, off in parts if value != off)
    return f", between turns {changes}" if changes else ""


def _cards(scores: editing.Scores, drifts: Sequence[Interval]) -> list[tuple[str, str, str]]:
    gap, turn = scores.gap[-1], len(scores.gap)
    cards = [
        ("exposure gap", f"{100 * gap.value:+.1f}", f"points at turn {turn}{gap.bounds('.1f', 100)}"),
        ("whole sessions", _percent(scores.following[-1]), f"all {turn} turns done"),
        ("consistency", _percent(scores.consistency[-1]), f"with the first image after turn {turn}"),
    ]
    if drifts:
        cards.append(("drift", _percent(drifts[-1]), f"after {len(drifts)} turns of nothing"))
    return cards


def _images(page: Page, run: Exposure, sessions: SceneSessions) -> None:
    """A few sessions, each turn's image under the planned one."""
    shown = sessions[:SHOWN]
    planned = torch.stack([shown.clean(turn) for turn in range(shown.turns + 1)], 1)
    pairs = []
    for row, plan in enumerate(shown.plans):
        asked = [Caption("start"), *(Caption(f"{t}. {turn.words}") for t, turn in enumerate(plan.turns, 1))]
        marks = [Caption("start"), *(Caption("", bool(one.done[row])) for one in run.own)]
        pairs.append(Pair(f"Session {row + 1}", planned[row], run.images[row], asked, marks))
    note = "✓ where the judge reads from the pixels that the turn's own objects are as planned."
    page.before_after("Sessions: each turn on what the last one made", pairs, note, ("planned", "made"))


def _tables(
    page: Page, scores: editing.Scores, by_kind: dict[str, Operation], drift: Drift | None, nothing: str
) -> None:
    turns = list(range(1, len(scores.gap) + 1))
    page.table(
        "Turn by turn, in percent with 95% intervals",
        ("measure", *(f"turn {turn}" for turn in turns)),
        [(words, *map(_cell, getattr(scores, name))) for name, words in editing.MEASURES.items()],
    )
    rates = {label: (turns, [one.value for one in getattr(scores, name)]) for name, label in RATES.items()}
    panels = [Panel("Share of turns done", rates, "turn")]
    if drift is not None:
        by_turn: dict[str, list[Interval]] = {
            name: [mean_interval(turn) for turn in of_turns]
            for name, of_turns in (("drift", drift.away), ("artefacts", drift.artefacts))
        }
        at = list(range(1, len(drift.away) + 1))
        series = {name: (at, [one.value for one in of_turns]) for name, of_turns in by_turn.items()}
        panels.append(Panel("Asked for nothing", series, f"turns of '{nothing}'"))
    page.curves("Success by turn, and drift where nothing is asked", panels)
    rows = [(kind, one.own.n, _cell(one.teacher_forced), _cell(one.own)) for kind, one in by_kind.items()]
    headers = ("operation", "turns", "done on the planned source, %", "done on its own, %")
    page.table("By what is asked, hardest first", headers, rows, note="Turns of all places in a session together.")
    if drift is not None:
        lines = [
            (turn, _cell(away), f"{artefacts.value:.3f}{artefacts.bounds('.3f')}")
            for turn, away, artefacts in zip(at, by_turn["drift"], by_turn["artefacts"], strict=True)
        ]
        page.table(f"Asked '{nothing}', turn after turn", ("turn", "drift, %", "artefacts"), lines)
