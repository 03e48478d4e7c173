"""A study: runs of arms by seeds, each a JSON file that is made once; then claims, summary.json, figures, README.md.

A study says which runs there are (`stages`, in arms.py) and what their files say (`tables`). Everything else is here:
which runs are missing, a process's share of them (`--part`), waiting for what others make, intervals, the page.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from matplotlib.figure import Figure

from fieldsmith.errors import InputError, check_word
from fieldsmith.measure.intervals import Interval, mean_interval
from fieldsmith.run import plain, write_atomically

Record = dict[str, Any]
Records = Mapping[str, Record]  # a run's file, without .json -> what it holds
Verdict = Literal["reproduced", "partly", "not"]
Reached = tuple[float, bool]  # what a run spent until it got where it should, and whether it got there
SINGLE = torch.float32  # in which some of the committed summaries were made


@dataclass(frozen=True)
class StudyConfig:
    """What every study can be asked."""

    out: Path = Path("results")
    """Where runs/, summary.json, plots and README.md go; finished runs are not repeated."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; evaluation noise follows them."""
    arms: tuple[str, ...] = ()
    """Which arms to run; none named: all. The summary needs all of them."""
    part: tuple[int, int] = (0, 1)
    """This process takes runs K, K + N, ... of the list: `--part 0 2` and `--part 1 2` share the work."""
    partial: bool = False
    """Run nothing: summarise the arms of which every seed is there, and name the others."""


@dataclass(frozen=True)
class Run:
    """One arm at one seed: the file that it makes, what that file must hold to count as done, and the work."""

    arm: str
    path: Path
    work: Callable[[], Record]
    settings: Record = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.path.exists() and _holds(json.loads(self.path.read_text()), plain(self.settings))


Stage = Sequence[Sequence[Run]]  # groups of runs that share what is costly: one process does all of a group


@dataclass(frozen=True)
class Claim:
    """A published (or our own) statement beside what was measured; `cost` in forward-equivalents."""

    id: str
    statement: str
    interval: Interval
    unit: str
    verdict: Verdict
    cost: float | None


@dataclass(frozen=True)
class Tables:
    """What a study says: its claims, what else summary.json holds, the values of its page, its figures by file."""

    claims: list[Claim]
    summary: Record
    page: Record
    figures: dict[str, Figure]


@dataclass(frozen=True)
class Study:
    """`stages`: every run, where a stage needs the files of the one before. `tables`: config, records -> Tables."""

    name: str
    paper: str
    config: type[StudyConfig]
    stages: Callable[[Any], Sequence[Stage]]
    tables: Callable[[Any, Records], Tables]


def run(study: Study, config: StudyConfig) -> None:
    """Do what is missing of this process's part, then write the summary if all is there."""
    check_numbers(config)
    mine, parts = config.part
    if not 0 <= mine < parts:
        raise InputError(f"part={mine} {parts} is no share of the runs; use 0 1 for all, or 0 2 and 1 2 for halves")
    if len(set(config.seeds)) < 2:
        raise InputError(f"seeds={config.seeds}: intervals need at least 2 different seeds")
    stages = study.stages(config)
    runs = [one for stage in stages for group in stage for one in group]
    for arm in config.arms:
        check_word(arm, tuple({one.arm for one in runs}), "the arms of this study")
    torch.set_num_threads(1)
    if config.partial:
        summarise(study, config, *_complete(runs))
        return
    for stage in stages:
        asked = [[one for one in group if not config.arms or one.arm in config.arms] for group in stage]
        for one in (one for group in asked[mine::parts] for one in group if not one.done):
            write_atomically(one.path, json.dumps({**plain(one.settings), **one.work()}, indent=1) + "\n")
            print(f"{one.path.stem}: done", flush=True)
        while stage is not stages[-1] and not all(one.done for group in asked for one in group):
            time.sleep(5)  # another process is still at its part of what the next stage needs
    missing = sum(not one.done for one in runs)
    if missing:
        print(f"{missing} runs are still missing; the summary is written when all are there")
        return
    summarise(study, config, runs, [])


def summarise(study: Study, config: StudyConfig, runs: Sequence[Run], left_out: Sequence[str]) -> None:
    """Write summary.json, the figures and README.md from the files of `runs`, and from nothing else."""
    made = study.tables(config, {one.path.stem: json.loads(one.path.read_text()) for one in runs})
    command = f"python -m experiments {study.name}"
    if config.seeds != study.config.seeds:
        command += f" --seeds {' '.join(map(str, config.seeds))}"
    claims = [
        {
            "id": one.id, "statement": one.statement, "paper": study.paper, "value": one.interval.value,
            "low": one.interval.low, "high": one.interval.high, "unit": one.unit, "verdict": one.verdict,
            "seeds": list(config.seeds), "command": command, "forward_equivalents": one.cost,
        }
        for one in made.claims
    ]  # fmt: skip
    write_atomically(config.out / "summary.json", json.dumps({"claims": claims, **made.summary}, indent=1) + "\n")
    for file, figure in made.figures.items():
        figure.savefig(config.out / file, dpi=110)
    page = render(f"{study.name}.md.jinja", command=command, claims=claims, left_out=left_out, **made.page)
    write_atomically(config.out / "README.md", page)


def _complete(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs of arms whose every file is there, and the others' names."""
    arms: dict[str, list[Run]] = {}
    for one in runs:
        arms.setdefault(one.path.stem.rpartition("_")[0], []).append(one)
    there = {name: all(one.path.is_file() for one in arm) for name, arm in arms.items()}
    whole = [one for name, arm in arms.items() if there[name] for one in arm]
    return whole, [name for name in arms if not there[name]]


def _holds(record: Any, settings: Any) -> bool:
    """Whether a record says all that the settings say; it may say more."""
    if isinstance(settings, dict):
        return isinstance(record, dict) and all(
            key in record and _holds(record[key], value) for key, value in settings.items()
        )
    return bool(record == settings)


def slug(words: str) -> str:
    """A part of a file's name: 'VSM 0.1' is VSM-0.1."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in words).split())


def in_words(setting: Mapping[str, float], between: str = ", ", assign: str = " ") -> str:
    """A swept setting: 'lr 0.001, batch 8'."""
    return between.join(f"{key}{assign}{value:g}" for key, value in setting.items())


def check_numbers(config: Any) -> None:
    """Raises InputError where a count is below 1, or another number below 0."""
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        least = 1 if isinstance(value, int) and one.name != "seed" else 0
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= least:
            raise InputError(f"{one.name}={value} must be at least {least}")


# numbers


def mean(values: Iterable[float], dtype: torch.dtype = torch.float64) -> Interval:
    """Of one number a seed, with Student's t interval."""
    return mean_interval(torch.tensor(list(values), dtype=dtype))


def geometric(ratios: Iterable[float], dtype: torch.dtype = torch.float64) -> Interval:
    """The geometric mean of one ratio a seed, with Student's t interval of its logarithm."""
    logs = mean([math.log(ratio) for ratio in ratios], dtype)
    return Interval(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high), logs.n)


def cost_ratio(theirs: Sequence[Reached], ours: Sequence[Reached], whose: str) -> tuple[Interval, str, int]:
    """Geometric mean of their costs over ours, run by run; who never got there, in words that a statement ends with;
    how many of ours never did."""
    ratio = geometric([cost / base for (cost, _), (base, _) in zip(theirs, ours, strict=True)], SINGLE)
    missed, our_missed = (sum(not got for _, got in some) for some in (theirs, ours))
    words = f"; {missed} of its {ratio.n} runs never got there and count with all they spent" if missed else ""
    words += f"; {our_missed} of {whose}'s never did and count likewise" if our_missed else ""
    return ratio, words, our_missed


def average(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def exactly(value: float, n: int) -> Interval:
    """A number that was counted, not estimated."""
    return Interval(value, value, value, n)


def verdict(reproduced: bool, partly: bool = False) -> Verdict:
    return "reproduced" if reproduced else "partly" if partly else "not"


def at_most(found: Interval, aim: float) -> Verdict:
    """Reproduced where the whole interval meets the aim, partly where the value does."""
    return verdict(found.high <= aim, found.value <= aim)


# the page


def table(headers: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def render(template: str, **values: Any) -> str:
    """A page from experiments/templates. Raises jinja2.UndefinedError at a value that the study does not give."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, autoescape=False,
    )  # fmt: skip
    environment.globals["table"] = table
    return environment.get_template(template).render(values).rstrip() + "\n"
