"""`fieldsmith diagnose --exposure`: what an editor loses turn by turn because it edits its own results.

In: a DiagnoseConfig; the model's card names the world whose sessions are known. Out: a run directory with metrics.json
and report.html.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from fieldsmith.commands import arguments
from fieldsmith.errors import InputError

if TYPE_CHECKING:
    from fieldsmith.commands.diagnose import DiagnoseConfig
    from fieldsmith.diagnose.exposure import Exposure
    from fieldsmith.models.core import Model
    from fieldsmith.report.page import Page
    from fieldsmith.run import Run
    from fieldsmith.worlds.scenes import SceneSessions, ScenesWorld

SHOWN = 6  # sessions on the page
WEAK = 0.1  # success on planned sources below which there is hardly anything to lose
SMALL, MANY = 0.05, 50  # a loss that stays below SMALL is none, once at least MANY sessions say so
RATES = {
    "following": "prefix",
    "marginal": "marginal",
    "conditional": "conditional",
    "teacher_forced": "planned source",
}
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


def run(config: DiagnoseConfig) -> Run:
    """The whole instrument; the finished run directory. Raises InputError before anything is written."""
    from rich.console import Console

    from fieldsmith.commands.edit import HELD_OUT
    from fieldsmith.diagnose.exposure import exposure
    from fieldsmith.metrics import editing
    from fieldsmith.metrics.intervals import mean_interval
    from fieldsmith.worlds.scenes_judge import Channel

    console = Console(stderr=True)
    directory = arguments.directory_of(config, "diagnose")
    if directory.finished:
        console.print(f"this run is complete: {directory.folder / 'report.html'}")
        return directory
    began = time.monotonic()
    world = world_of(str(config.model))
    seed = HELD_OUT + config.seed  # the sessions that `fieldsmith edit` measures on
    sessions = world.sessions(config.samples, config.turns, seed, config.dependency)
    model = _editor(config, world)
    channel = Channel(config.contrast, config.blur, config.noise)
    with console.status("running sessions"):
        found = exposure(model, sessions, config.steps, seed, channel=channel, still=config.still)
    scores = editing.scores(found.sessions)
    directory.begin()
    metrics: dict[str, Any] = {
        "method": "diagnose", "instrument": "exposure", "seconds": time.monotonic() - began,
        "forward_equivalents": config.samples * config.steps * (2 * config.turns + config.still),
        **{name: [dataclasses.asdict(one) for one in turns] for name, turns in vars(scores).items()},
        "operations": by_operation(found, sessions),
    }  # fmt: skip
    for name, turns in (("drift", found.drift), ("artefacts", found.artefacts)):
        if turns is not None:
            metrics[name] = [dataclasses.asdict(mean_interval(one)) for one in turns]
    metrics["words"] = words_of(metrics)
    _page(config, metrics, found, sessions, directory).write(directory.folder / "report.html")
    directory.finish(metrics)
    console.print(metrics["words"])
    console.print(f"page: {directory.folder / 'report.html'}")
    return directory


def world_of(name: str) -> ScenesWorld:
    """The world of sessions that the model's card names. Raises InputError where it names none."""
    from fieldsmith.models import pipeline_folder
    from fieldsmith.worlds.model_cards import card_of
    from fieldsmith.worlds.scenes import ScenesWorld

    pipeline_folder(name)  # a name that is no model at all is refused in its own words
    card = card_of(name)
    if card.get("world") != "scenes" or not isinstance(card.get("size"), int):
        raise InputError(
            f"'{name}' names no world whose planned images are known; --exposure needs an editor with a card.json like "
            '{"world": "scenes", "size": 24}, such as zoo:scenes-kontext'
        )
    return ScenesWorld(card["size"])


def _editor(config: DiagnoseConfig, world: ScenesWorld) -> Model:
    """The model with its adapter. Raises InputError where it is no editor, or draws images of another size."""
    from fieldsmith.models import load, load_adapter
    from fieldsmith.models.editing import check_editor

    if config.resolution not in (None, world.size):
        raise InputError(
            f"resolution={config.resolution}: {config.model} edits scenes of {world.size} pixels; leave it out"
        )
    model = load(str(config.model), world.size)
    check_editor(model)
    if config.adapter is not None:
        load_adapter(model, config.adapter)
    return model


def by_operation(found: Exposure, sessions: SceneSessions) -> dict[str, Any]:
    """Shares of turns done by what they ask, on planned and on own sources, {} where nothing asks it; hardest first."""
    import torch

    from fieldsmith.metrics.intervals import share
    from fieldsmith.worlds.scenes import OPERATIONS

    asked = [[turn.operation for turn in plan.turns] for plan in sessions.plans]
    done, clean = found.sessions.done, found.sessions.clean
    assert clean is not None
    rows = {}
    for operation in OPERATIONS:
        where = torch.tensor([[one == operation for one in turns] for turns in asked])
        if where.any():
            sides = {"teacher_forced": clean, "own": done}
            rows[operation] = {name: dataclasses.asdict(share(part[where])) for name, part in sides.items()}
    return dict(sorted(rows.items(), key=lambda row: row[1]["teacher_forced"]["value"]))


def verdict_of(metrics: dict[str, Any]) -> tuple[bool | None, str]:
    """Whether the editor bears its own results (None: it cannot be told), and that in two or three words."""
    gap, forced = metrics["gap"][-1], metrics["teacher_forced"][-1]
    if gap["low"] > 0:
        return False, "Exposure bias"
    if forced["value"] < WEAK:
        return None, "Too weak to tell"
    if gap["high"] <= SMALL and gap["n"] >= MANY:
        return True, "Bears its own results"
    return None, "Not shown"


def words_of(metrics: dict[str, Any]) -> str:
    """The verdict in a few sentences."""
    gap, forced, own = (metrics[name][-1] for name in ("gap", "teacher_forced", "marginal"))
    turn = len(metrics["gap"])
    lost = f"{100 * gap['value']:.1f} points [{100 * gap['low']:.1f}, {100 * gap['high']:.1f}]"
    said = [
        f"Turn {turn} is done in {100 * forced['value']:.1f}% of {gap['n']} sessions on its planned source and in "
        f"{100 * own['value']:.1f}% on the editor's own: it loses {lost} to its own sources"
    ]
    if gap["low"] > 0:
        said[0] += ", and the interval excludes 0."
    elif forced["value"] < WEAK:
        said[0] += ", but hardly does a turn even on a clean source, so that there is little to lose."
    else:
        said[0] += ", and the interval holds 0" + ("." if verdict_of(metrics)[0] else "; more --samples narrow it.")
    rows = list(metrics["operations"].items())
    worst = rows[0]
    said.append(f"Worst operation on planned sources: {worst[0]} ({_share(worst[1]['teacher_forced'])})")
    said[-1] += f"; best: {rows[-1][0]} ({_share(rows[-1][1]['teacher_forced'])})." if len(rows) > 1 else "."
    if "drift" in metrics:
        drift = metrics["drift"]
        times = "once" if len(drift) == 1 else f"{len(drift)} times in a row"
        said.append(f"Asked for nothing {times}, it loses {_share(drift[-1])} of its likeness to the first image.")
    return " ".join(said)


def _share(one: dict[str, Any]) -> str:
    return f"{100 * one['value']:.0f}%"


def _interval(one: dict[str, Any], scale: float = 100, form: str = ".1f") -> str:
    return f"{scale * one['value']:{form}} [{scale * one['low']:{form}}, {scale * one['high']:{form}}]"


def _page(
    config: DiagnoseConfig, metrics: dict[str, Any], found: Exposure, sessions: SceneSessions, directory: Run
) -> Page:
    from fieldsmith.commands.edit_page import MEASURES
    from fieldsmith.report.page import Page, Panel

    turns = list(range(1, config.turns + 1))
    title = f"{config.model}" + (f" with {config.adapter}" if config.adapter else "")
    how = f"{config.samples} sessions of {config.turns} turns, {config.steps} steps{_between(config)}"
    page = Page(f"Exposure bias of {title}", f"{how}; seed {config.seed}")
    page.verdict(metrics["words"], *verdict_of(metrics))
    page.numbers(_cards(metrics))
    _sessions(page, found, sessions)
    page.table(
        "Turn by turn, in percent with 95% intervals",
        ("measure", *(f"turn {turn}" for turn in turns)),
        [(words, *(_interval(one) for one in metrics[name])) for name, words in MEASURES.items() if name in metrics],
    )
    rates = {label: (turns, [one["value"] for one in metrics[name]]) for name, label in RATES.items()}
    panels = [Panel("Share of turns done", rates, "turn")]
    if "drift" in metrics:
        at = list(range(1, len(metrics["drift"]) + 1))
        probed = {name: (at, [one["value"] for one in metrics[name]]) for name in ("drift", "artefacts")}
        panels.append(Panel("Asked for nothing", probed, f"turns of '{_nothing()}'"))
    page.curves("Success by turn, and drift where nothing is asked", panels)
    by_kind = [
        (operation, one["own"]["n"], _interval(one["teacher_forced"]), _interval(one["own"]))
        for operation, one in metrics["operations"].items()
    ]
    headers = ("operation", "turns", "done on the planned source, %", "done on its own, %")
    page.table("By what is asked, hardest first", headers, by_kind, note="Turns of all places in a session together.")
    if "drift" in metrics:
        rows = [
            (turn, _interval(drift), _interval(artefacts, 1, ".3f"))
            for turn, (drift, artefacts) in enumerate(zip(metrics["drift"], metrics["artefacts"], strict=True), 1)
        ]
        page.table(f"Asked '{_nothing()}', turn after turn", ("turn", "drift, %", "artefacts"), rows)
    page.text("How to read it", HOW)
    cost = f"{metrics['forward_equivalents']:,} forwards, {metrics['seconds']:.0f} s."
    page.command("Repeat it", f"fieldsmith diagnose --config {directory.folder}/config.toml --out ANOTHER-FOLDER", cost)
    return page


def _nothing() -> str:
    from fieldsmith.worlds.scenes import NOTHING

    return NOTHING


def _between(config: DiagnoseConfig) -> str:
    """What happens to an image between turns, as part of a sentence."""
    parts = [("contrast", config.contrast, 1), ("blur", config.blur, 0), ("noise", config.noise, 0)]
    said = ", ".join(f"{name} {value:g}" for name, value, none in parts if value != none)
    return f", between turns {said}" if said else ""


def _cards(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    gap, turn = metrics["gap"][-1], len(metrics["gap"])
    cards = [
        ("exposure gap", f"{100 * gap['value']:+.1f}", f"points at turn {turn}, {_interval(gap).partition(' ')[2]}"),
        ("whole sessions", _share(metrics["following"][-1]), f"all {turn} turns done"),
        ("consistency", _share(metrics["consistency"][-1]), f"with the first image after turn {turn}"),
    ]
    if "drift" in metrics:
        cards.append(("drift", _share(metrics["drift"][-1]), f"after {len(metrics['drift'])} turns of nothing"))
    return cards


def _sessions(page: Page, found: Exposure, sessions: SceneSessions) -> None:
    """A few sessions, each turn's image under the planned one."""
    import torch

    from fieldsmith.report.page import Caption, Pair

    shown = sessions[:SHOWN]
    planned = torch.stack([shown.clean(turn) for turn in range(shown.turns + 1)], 1)
    pairs = []
    for row, plan in enumerate(shown.plans):
        asked = [Caption("start"), *(Caption(f"{t}. {turn.words}") for t, turn in enumerate(plan.turns, 1))]
        marks = [Caption("start"), *(Caption("", bool(one.done[row])) for one in found.own)]
        pairs.append(Pair(f"Session {row + 1}", planned[row], found.images[row], asked, marks))
    note = "✓ where the judge reads from the pixels that the turn's own objects are as planned."
    page.before_after("Sessions: each turn on what the last one made", pairs, note, ("planned", "made"))
