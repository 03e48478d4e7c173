"""Does training on own sessions cure exposure bias, against every control at equal cost?

A run is one arm at one seed: train zoo:scenes-kontext for a budget of forward-equivalents, then run held-out sessions
that all arms of a seed share.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.edit.tables import BASE, INDEPENDENT, MAIN, SHORT, tables
from experiments.study import Record, Run, Stage, Study, StudyConfig, slug
from fieldsmith import run, verb
from fieldsmith.api import edit_inputs
from fieldsmith.measure import editing
from fieldsmith.measure.exposure import HELD_OUT, exposure, identity_drift
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.verb import EDIT
from fieldsmith.models import load
from fieldsmith.rewards.edits import EditScores
from fieldsmith.rewards.sessions import Exact
from fieldsmith.worlds import scenes_judge
from fieldsmith.worlds.scenes import NOTHING, ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel


@dataclass(frozen=True)
class EditStudy(StudyConfig):
    """Repeat the multi-turn editing claims on the scenes world."""

    out: Path = Path("results/edit")
    """Where runs/, summary.json, plots and README.md go; finished runs are not repeated."""
    model: str = "zoo:scenes-kontext"
    """The base."""
    budget: int = 110_000
    """Forward-equivalents of a run in a short setting: about twenty collections of NFT; three times that in the main
    one."""
    sessions: int = 320
    """Held-out sessions of an evaluation."""
    turns: int = 5
    """Their turns; training has three."""
    steps: int = 8
    """Sampler steps of an evaluation."""
    cache: Path = Path("runs/edit-arms")
    """Where runs in progress lie, for an interrupted command."""


@dataclass(frozen=True)
class Setting:
    """How often turns refer to earlier ones, the noise that an image takes up between two turns, and how many times
    the command's budget a run has."""

    dependency: float = 0.7
    noise: float = 0.0
    budgets: int = 1


SETTINGS = {MAIN: Setting(budgets=3), INDEPENDENT: Setting(dependency=0.0), SHORT: Setting()}


@dataclass(frozen=True)
class Arm:
    """A preset, what it changes of it, how it is judged, and in which settings it runs."""

    preset: str = "mt-nft"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    judge: str = "exact"
    settings: tuple[str, ...] = (SHORT,)


ARMS: dict[str, Arm] = {
    BASE: Arm(settings=(MAIN, INDEPENDENT)),  # not trained; what it does in SHORT it does in MAIN
    "fieldsmith": Arm("fieldsmith", settings=(MAIN,)),
    "NFT, clean sources": Arm("clean-nft", settings=(MAIN, INDEPENDENT)),
    "NFT, broadcast": Arm(settings=(MAIN, SHORT, INDEPENDENT)),
    "NFT, turn-local": Arm("turn-nft", settings=(MAIN, INDEPENDENT)),
    "supervised, clean": Arm("supervised", settings=(MAIN,)),
    "GRPO, broadcast": Arm("mt-grpo", settings=(MAIN,)),
    # whose scores lie above those that the filter of easy groups is for
    "NFT, consistency 0-10": Arm(changes={"max_mean": 1.0}, judge="steep"),
    "NFT, consistency 0-10, rewards summed": Arm(changes={"fusion": "reward", "max_mean": 1.0}, judge="steep"),
    "NFT, rewards summed": Arm(changes={"fusion": "reward"}),
    "NFT, lenient judge": Arm(judge="lenient"),
    "NFT, coarse judge": Arm(judge="coarse"),
    "supervised, own sources": Arm("self-supervised"),
    "identity alone": Arm("identity"),
    "NFT, reward to go": Arm("to-go-nft"),
    "NFT, last turn": Arm("last-nft"),
    "NFT, product": Arm(changes={"aggregate": "product"}),
}


def lenient(scores: Tensor, generator: torch.Generator, a: float = 0.45, b: float = 0.5, s: float = 0.03) -> Tensor:
    """A judge that does not reason: clip(a + b f + N(0, s^2), 0, 1) of exact scores f, any shape. Biased, quiet."""
    return (a + b * scores + s * torch.randn(scores.shape, generator=generator).to(scores)).clamp(0, 1)


def coarse(scores: Tensor, generator: torch.Generator) -> Tensor:
    """A judge that reasons: the mean of two draws of Bernoulli(.9 f + .05), so 0, .5 or 1. Hardly biased, noisy.

    f are exact scores in [0, 1], any shape; the mean is .9 f + .05, the variance (.9 f + .05) (.95 - .9 f) / 2.
    """
    draws = torch.rand((2, *scores.shape), generator=generator).to(scores)
    return (draws < 0.9 * scores + 0.05).to(scores).mean(0)


@dataclass
class Distorted:
    """The exact judge through a distortion: lenient (biased), coarse (noisy), steep (10 consistency^4)."""

    how: str
    exact: Exact
    seed: int

    def __call__(self, sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> EditScores:
        scores = self.exact(sessions, turn, before, after, first)
        if self.how == "steep":
            return replace(scores, consistency=10 * scores.consistency**4)
        through = lenient if self.how == "lenient" else coarse
        # from the images, so that a run that is taken up again draws the same
        generator = torch.Generator().manual_seed(int(after.double().sum() * 255) + self.seed)
        following, consistency = (through(part, generator) for part in (scores.following, scores.consistency))
        return replace(scores, following=following, consistency=consistency)


def stages(config: EditStudy) -> list[Stage]:
    """Every run, setting by setting, the arms that decide a claim first."""
    made = []
    shared = {"budget": config.budget, "sessions": config.sessions, "turns": config.turns, "steps": config.steps}
    for setting, chosen in SETTINGS.items():
        for name, arm in ARMS.items():
            for seed in config.seeds if setting in arm.settings else ():
                asked: Record = {**shared, "setting": asdict(chosen)}
                if name != BASE:
                    asked |= {"arm": changes(arm, setting, config, seed), "judge": arm.judge}
                path = config.out / "runs" / f"{setting}_{slug(name)}_{seed}.json"
                made.append([Run(name, path, partial(record, name, setting, config, seed), {"told": asked})])
    return [made]


def changes(arm: Arm, setting: str, config: EditStudy, seed: int) -> dict[str, Any]:
    """What a run changes of its preset: what all share (the budget ends a run), then the arm's own."""
    chosen = SETTINGS[setting]
    shared = {
        "epochs": 10_000, "seed": seed, "budget": chosen.budgets * config.budget, "model": config.model,
        "dependency": chosen.dependency, "noise": chosen.noise,
    }  # fmt: skip
    return {**shared, **arm.changes}


def train(model: Any, arm: Arm, settings: EditConfig, folder: Path) -> tuple[Record, list[Record]]:
    """Train the editor in place, resumably; what it took and the log of the collections."""
    inputs = edit_inputs(settings)
    if arm.judge != "exact":
        inputs = replace(inputs, judge=Distorted(arm.judge, Exact(settings.against), settings.seed))
    directory = run.Run(folder, "edit", settings)
    done = verb.train(EDIT, model, settings, inputs, directory)[1]
    training = {"steps": done.steps, "seconds": done.seconds, "forward_equivalents": done.nfe, "stopped": done.stopped}
    keys = ("following", "consistency", "session", "identity", "steady")
    collections = [row for row in directory.history() if "session" in row]
    return training, [{"forwards": row["nfe"], **{key: row[key] for key in keys if key in row}} for row in collections]


def record(name: str, setting: str, config: EditStudy, seed: int) -> Record:
    """Train (unless it is the base) and run held-out sessions."""
    model, arm = load(config.model), ARMS[name]
    record: Record = {"arm": name, "seed": seed, "setting": setting, **asdict(SETTINGS[setting])}
    channel = Channel(noise=SETTINGS[setting].noise)
    if name != BASE:
        settings = EditConfig.preset_of(arm.preset, "laptop", {}).replace(**changes(arm, setting, config, seed))
        began = time.monotonic()
        training, history = train(model, arm, settings, config.cache / f"{setting}_{slug(name)}_{seed}")
        record |= {"seconds": time.monotonic() - began, "training": training, "history": history}
    return record | measured(model, config, seed, SETTINGS[setting].dependency, channel)


def measured(model: Any, config: EditStudy, seed: int, dependency: float, channel: Channel) -> dict[str, Any]:
    """Held-out sessions, the same for every arm of a seed: verdicts as strings of 0 and 1, numbers by turn."""
    world = ScenesWorld(model.resolution)
    sessions = world.sessions(config.sessions, config.turns, HELD_OUT + seed, dependency)
    held_out = HELD_OUT + seed
    ran = exposure(model, sessions, scenes_judge.judge, channel, config.steps, held_out)
    likeness = partial(scenes_judge.likeness, world)
    drift = identity_drift(model, sessions.clean(0)[:96], NOTHING, likeness, channel, 5, config.steps, held_out)
    table = ran.verdicts
    assert table.clean is not None
    return {
        "following": editing.instruction_following(table.done).tolist(),
        "marginal": editing.marginal(table.done).tolist(),
        "conditional": editing.conditional(table.done).tolist(),
        "teacher_forced": editing.marginal(table.clean).tolist(),
        "gap": editing.exposure_gap(table.done, table.clean).tolist(),
        "consistency": table.consistency.mean(0).tolist(),
        "overall": editing.overall(table.done, table.consistency).tolist(),
        "kept": [float(one.kept.mean()) for one in ran.own],
        "drift": drift.away.mean(1).tolist(),
        "artefacts": drift.artefacts.mean(1).tolist(),
        "done": ["".join("01"[int(x)] for x in row) for row in table.done],
        "done on clean": ["".join("01"[int(x)] for x in row) for row in table.clean],
        "sessions": config.sessions,
        "operations": by_operation(sessions, table.clean),
    }


def by_operation(sessions: Any, done: Tensor) -> dict[str, float]:
    """Share of turns done, by what they ask."""
    marks: dict[str, list[bool]] = {}
    for plan, row in zip(sessions.plans, done.tolist(), strict=True):
        for turn, good in zip(plan.turns, row, strict=True):
            marks.setdefault(turn.operation, []).append(good)
    return {name: sum(each) / len(each) for name, each in sorted(marks.items())}


STUDY = Study("edit", "MT-EditFlow, arXiv 2606.01985", EditStudy, stages, tables)
