"""Does a smooth score hallucinate, and what helps? On mixtures with exact scores and on images whose rules are known.

A group of runs is one seed of one world, whose arms share data, a start, batches and noise. Beside them: what the exact
score does when it is smoothed, and whether the judges see what they should.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from experiments.oracles.chess import ChessWorld
from experiments.oracles.corruptions import corruptions_of
from experiments.sharpen import images, mixture
from experiments.sharpen.tables import tables
from experiments.study import Record, Run, Stage, Study, StudyConfig, slug
from fieldsmith.errors import check_word
from fieldsmith.worlds.catalogue import load

# the judges' worlds and sizes: the published one, and the one that networks are trained at here
JUDGES = (("columns", 64), ("cards", 128), ("cards", 32), ("chess", 128), ("chess", 64))
CLEAN, CORRUPTED, PART = 10_000, 1_000, 500  # images that a judge is shown, and how many at once


@dataclass(frozen=True)
class SharpenStudy(StudyConfig):
    """Repeat the hallucination claims on mixtures, columns and cards."""

    out: Path = Path("results/sharpen")
    """Where runs/, summary.json, plots and README.md go; finished runs are not repeated."""
    worlds: tuple[str, ...] = ("line", "lattice", "columns", "cards")
    """Which worlds to run; chess can be added, openings at 64 pixels, and is not among the results yet."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; the line has two more."""
    judges: bool = True
    """Whether to count the judges' false alarms and misses too."""
    cache: Path = Path("runs/sharpen-bases")
    """Where the bases of the image worlds lie, for runs that are taken up again."""


def stages(config: SharpenStudy) -> list[Stage]:
    """Every run. Raises InputError at an unknown world."""
    runs = config.out / "runs"
    groups: list[list[Run]] = []
    for world in config.worlds:
        check_word(world, (*mixture.STUDIES, *images.STUDIES), "the worlds of this study")
        seeds = config.seeds
        if world == "line":
            seeds = (*seeds, max(seeds) + 1, max(seeds) + 2)
        for number in seeds:
            groups.append(group(config, world, number))
        if world == "line":
            groups.append([Run("oracle", runs / "line_oracle.json", mixture.oracle_record, {"told": {}})])
    for name, size in JUDGES if config.judges else ():
        path = runs / f"judge_{name}_{size}.json"
        groups.append([Run("judge", path, partial(judge_record, name, size), {"told": {"clean": CLEAN}})])
    return [groups]


def group(config: SharpenStudy, world: str, number: int) -> list[Run]:
    """All arms of one seed of one world."""
    if world in mixture.STUDIES:
        of_mixture = mixture.Seed(mixture.STUDIES[world], number)
        study, record = asdict(of_mixture.study), of_mixture.record
        arms = {arm: s for arm, s in mixture.ARMS.items() if world == "line" or arm in mixture.PLANE}
    else:
        of_images = images.Seed(images.bench(world), number, config.cache)
        study, record = asdict(of_images.study), of_images.record
        arms = {arm: s for arm, s in images.ARMS.items() if world == "columns" or arm not in images.FIRST_ONLY}
    return [
        Run(arm, config.out / "runs" / f"{world}_{slug(arm)}_{number}.json", partial(record, arm),
            {"told": {"study": study, "arm": settings}})
        for arm, settings in arms.items()
    ]  # fmt: skip


def judge_record(name: str, size: int) -> Record:
    """False alarms on clean images, and how many of each corruption a judge finds."""
    began, world = time.monotonic(), ChessWorld(size) if name == "chess" else load(name, size)
    alarms = 0
    for part in range(CLEAN // PART):
        alarms += int((~world.judge(world.sample(PART, 1_000 + part)).valid).sum())
    shares = {}
    for word, corrupt in corruptions_of(world).items():
        seen = [world.judge(corrupt(PART // 2, 2_000 + part)).valid for part in range(2 * CORRUPTED // PART)]
        shares[word] = float((~torch.cat(seen)).double().mean())
    return {
        "world": name, "size": size, "clean": CLEAN, "false alarms": alarms, "corrupted": CORRUPTED,
        "detection": shares, "seconds": time.monotonic() - began,
    }  # fmt: skip


STUDY = Study("sharpen", "VSM, arXiv 2606.00377", SharpenStudy, stages, tables)
