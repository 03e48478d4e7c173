"""`fieldsmith reproduce edit`: does training on own sessions cure exposure bias, against every control at equal cost.

A run is one arm at one seed: train zoo:scenes-kontext for a budget of forward-equivalents, then run held-out sessions
that all arms of a seed share. `--part 0 2` and `--part 1 2` share the runs between two processes.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.jobs import Job, check_part, slug, work_through
from fieldsmith.commands.edit import HELD_OUT, task_of
from fieldsmith.diagnose.exposure import exposure
from fieldsmith.errors import InputError, check_word
from fieldsmith.methods.edit import loop
from fieldsmith.methods.edit.config import EditConfig, preset
from fieldsmith.methods.edit.rollouts import Task
from fieldsmith.metrics import editing
from fieldsmith.metrics.judges import coarse, lenient
from fieldsmith.models import load
from fieldsmith.rewards.edits import EditScores
from fieldsmith.rewards.sessions import Exact
from fieldsmith.run import Run, plain
from fieldsmith.worlds.scenes import ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel


@dataclass(frozen=True)
class ReproduceEdit:
    """Repeat the multi-turn editing claims on the scenes world."""

    out: Path = Path("results/edit")
    """Where runs/, summary.json, plots and README.md go; finished runs are not repeated."""
    model: str = "zoo:scenes-kontext"
    """The base."""
    arms: tuple[str, ...] = ()
    """Which arms to run; none named: all. The summary needs all of them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
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
    part: tuple[int, int] = (0, 1)
    """This process takes runs K, K + N, ...: `--part 0 2` and `--part 1 2` share the work."""
    partial: bool = False
    """Run nothing: summarise the arms of which every seed is there, and name the others."""


@dataclass(frozen=True)
class Setting:
    """How often turns refer to earlier ones, the noise that an image takes up between two turns, and how many times
    the command's budget a run has."""

    dependency: float = 0.7
    noise: float = 0.0
    budgets: int = 1


MAIN, SHORT = "long", "short"
SETTINGS = {
    MAIN: Setting(budgets=3),
    "independent": Setting(dependency=0.0),
    SHORT: Setting(),
}


@dataclass(frozen=True)
class Arm:
    """A preset, what it changes of it, how it is judged, and in which settings it runs."""

    preset: str = "mt-nft"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    judge: str = "exact"
    settings: tuple[str, ...] = (SHORT,)


BASE = "base"  # not trained; what it does in SHORT it does in MAIN
ARMS: dict[str, Arm] = {
    BASE: Arm(settings=(MAIN, "independent")),
    "fieldsmith": Arm("fieldsmith", settings=(MAIN,)),
    "NFT, clean sources": Arm("clean-nft", settings=(MAIN, "independent")),
    "NFT, broadcast": Arm(settings=(MAIN, SHORT, "independent")),
    "NFT, turn-local": Arm("turn-nft", settings=(MAIN, "independent")),
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


@dataclass
class Distorted:
    """The exact judge through a distortion: lenient (biased), coarse (noisy), steep (10 consistency^4)."""

    how: str
    exact: Exact
    seed: int

    def __call__(self, sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> EditScores:
        found = self.exact(sessions, turn, before, after, first)
        if self.how == "steep":
            return dataclasses.replace(found, consistency=10 * found.consistency**4)
        through = lenient if self.how == "lenient" else coarse
        # from the images, so that a run that is taken up again draws the same
        generator = torch.Generator().manual_seed(int(after.double().sum() * 255) + self.seed)
        following, consistency = (through(part, generator) for part in (found.following, found.consistency))
        return dataclasses.replace(found, following=following, consistency=consistency)


def configured(arm: Arm, setting: str, config: ReproduceEdit, seed: int) -> EditConfig:
    """The arm's settings: its preset's own, what all share (the budget ends a run), then its changes."""
    chosen = SETTINGS[setting]
    shared = {
        "epochs": 10_000, "seed": seed, "budget": chosen.budgets * config.budget, "model": config.model,
        "dependency": chosen.dependency, "noise": chosen.noise,
    }  # fmt: skip
    return dataclasses.replace(preset(arm.preset), **{**shared, **arm.changes})


def record(name: str, arm: Arm, setting: str, config: ReproduceEdit, seed: int) -> dict[str, Any]:
    """Train (unless it is the base) and run held-out sessions."""
    model = load(config.model)
    found: dict[str, Any] = {"arm": name, "seed": seed, "setting": setting, **asdict(SETTINGS[setting])}
    channel = Channel(noise=SETTINGS[setting].noise)
    if name != BASE:
        settings = configured(arm, setting, config, seed)
        task = task_of(settings)
        if arm.judge != "exact":
            task = Task(task.draw, Distorted(arm.judge, Exact(settings.against), seed), task.planned)
        run = Run(config.cache / f"{setting}_{slug(name)}_{seed}", "edit", settings)
        began = time.monotonic()
        result = loop.edit(model, settings, task, channel, run)
        found |= {"seconds": time.monotonic() - began, "training": plain(result)}
        keys = ("forwards", "following", "consistency", "session", "identity", "steady")
        found["history"] = [{key: row[key] for key in keys if key in row} for row in run.history() if "session" in row]
    return found | measured(model, config, seed, SETTINGS[setting].dependency, channel)


def measured(model: Any, config: ReproduceEdit, seed: int, dependency: float, channel: Channel) -> dict[str, Any]:
    """Held-out sessions, the same for every arm of a seed: verdicts as strings of 0 and 1, numbers by turn."""
    world = ScenesWorld(model.resolution)
    sessions = world.sessions(config.sessions, config.turns, HELD_OUT + seed, dependency)
    ran = exposure(
        model, sessions, config.steps, HELD_OUT + seed, channel=channel, forced=True, still=5, still_sessions=96
    )
    table = ran.sessions
    assert table.clean is not None and ran.drift is not None and ran.artefacts is not None
    return {
        "following": editing.instruction_following(table.done).tolist(),
        "marginal": editing.marginal(table.done).tolist(),
        "conditional": editing.conditional(table.done).tolist(),
        "teacher_forced": editing.marginal(table.clean).tolist(),
        "gap": editing.exposure_gap(table.done, table.clean).tolist(),
        "consistency": table.consistency.mean(0).tolist(),
        "overall": editing.overall(table.done, table.consistency).tolist(),
        "kept": [float(one.kept.mean()) for one in ran.own],
        "drift": ran.drift.mean(1).tolist(),
        "artefacts": ran.artefacts.mean(1).tolist(),
        "done": ["".join("01"[int(x)] for x in row) for row in table.done],
        "done on clean": ["".join("01"[int(x)] for x in row) for row in table.clean],
        "sessions": config.sessions,
        "operations": by_operation(sessions, table.clean),
    }


def by_operation(sessions: Any, done: Tensor) -> dict[str, float]:
    """Share of turns done, by what they ask."""
    found: dict[str, list[bool]] = {}
    for plan, row in zip(sessions.plans, done.tolist(), strict=True):
        for turn, good in zip(plan.turns, row, strict=True):
            found.setdefault(turn.operation, []).append(good)
    return {name: sum(marks) / len(marks) for name, marks in sorted(found.items())}


def jobs(config: ReproduceEdit) -> list[list[Job]]:
    """Every run, setting by setting, the arms that decide a claim first."""
    found = []
    shared = {"budget": config.budget, "sessions": config.sessions, "turns": config.turns, "steps": config.steps}
    for setting in SETTINGS:
        for name, arm in ARMS.items():
            if setting not in arm.settings or (config.arms and name not in config.arms):
                continue
            for seed in config.seeds:
                path = config.out / "runs" / f"{setting}_{slug(name)}_{seed}.json"
                mine = {"arm": asdict(configured(arm, setting, config, seed)), "judge": arm.judge}
                told = {**shared, "setting": asdict(SETTINGS[setting]), **(mine if name != BASE else {})}
                found.append([Job(path, told, partial(record, name, arm, setting, config, seed))])
    return found


def main(config: ReproduceEdit) -> None:
    """Run what is missing, then write the summary once all of it is there."""
    if len(set(config.seeds)) < 2:
        raise InputError(f"seeds={config.seeds}: intervals need at least 2 different seeds")
    check_part(config.part)
    torch.set_num_threads(1)
    for name in config.arms:
        check_word(name, tuple(ARMS), "the arms of this study")
    missing = 0 if config.partial else work_through(jobs(config), config.part)
    if missing or config.arms:
        print(f"{missing} runs are still missing; the summary is written when all are there")
        return
    from experiments.edit_summary import summarise

    paths = [job.path for group in jobs(config) for job in group]
    arms = [paths[i : i + len(config.seeds)] for i in range(0, len(paths), len(config.seeds))]
    whole = [path for arm in arms if all(one.is_file() for one in arm) for path in arm]
    left = [arm[0].stem.rpartition("_")[0] for arm in arms if not all(one.is_file() for one in arm)]
    summarise(whole, config.out, config.seeds, "fieldsmith reproduce edit", left)
