"""`fieldsmith reproduce sharpen`: does a smooth score hallucinate, and what helps, on mixtures and image worlds.

A group of runs is one seed of one world, whose arms share data, a start, batches and noise. `--part 0 2` and
`--part 1 2` share the groups between two processes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from experiments import sharpen_images as images
from experiments import sharpen_judges as judges
from experiments import sharpen_mixture as mixture
from experiments.jobs import Job, check_part, slug, work_through
from fieldsmith.errors import InputError, check_word


@dataclass(frozen=True)
class ReproduceSharpen:
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
    part: tuple[int, int] = (0, 1)
    """This process takes groups K, K + N, ...: `--part 0 2` and `--part 1 2` share the work."""


def groups(config: ReproduceSharpen) -> list[list[Job]]:
    """Every run; a group is a seed of a world."""
    runs = config.out / "runs"
    found: list[list[Job]] = []
    for world in config.worlds:
        if world in mixture.STUDIES:
            study = mixture.STUDIES[world]
            arms = mixture.ARMS if world == "line" else {arm: mixture.ARMS[arm] for arm in mixture.PLANE}
            for number in (*config.seeds, *((max(config.seeds) + 1, max(config.seeds) + 2) if world == "line" else ())):
                seed = mixture.Seed(study, number)
                found.append([
                    Job(runs / f"{world}_{slug(arm)}_{number}.json", {"study": asdict(study), "arm": settings},
                        partial(seed.record, arm))
                    for arm, settings in arms.items()
                ])  # fmt: skip
            if world == "line":
                found.append([Job(runs / "line_oracle.json", {}, mixture.oracle_record)])
            continue
        bench = images.Bench(images.STUDIES[world])
        for number in config.seeds:
            of_images = images.Seed(bench, number, config.cache)
            found.append([
                Job(runs / f"{world}_{slug(arm)}_{number}.json", {"study": asdict(bench.study), "arm": settings},
                    partial(of_images.record, arm))
                for arm, settings in images.ARMS.items()
                if world == "columns" or arm not in images.FIRST_ONLY
            ])  # fmt: skip
    if config.judges:
        for name, size in judges.SIZES:
            path = runs / f"judge_{name}_{size}.json"
            found.append([Job(path, {"clean": judges.CLEAN}, partial(judges.record, name, size))])
    return found


def main(config: ReproduceSharpen) -> None:
    """Run what is missing, then write the summary once all of it is there."""
    if len(set(config.seeds)) < 2:
        raise InputError(f"seeds={config.seeds}: intervals need at least 2 different seeds")
    for world in config.worlds:
        check_word(world, (*mixture.STUDIES, *images.STUDIES), "the worlds of this study")
    check_part(config.part)
    torch.set_num_threads(1)
    missing = work_through(groups(config), config.part)
    if missing:
        print(f"{missing} runs are still missing; the summary is written when all are there")
        return
    from experiments.sharpen_summary import summarise

    files = [job.path for group in groups(config) for job in group]
    summarise(files, config.out, config.seeds, "fieldsmith reproduce sharpen")
