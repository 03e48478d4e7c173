"""`fieldsmith reproduce distill`: students of zoo:digits-unet and zoo:shapes-unet by every objective, three seeds.

Protocol: every arm trains the same student, 5.9 times smaller than its teacher, on the same data, at equal student
compute (64 evaluations a step) and from fresh weights, unless its name says otherwise; ours starts from the teacher's.
Sampling: DDIM without clipping, equal noise and labels for teacher and all students, so that drift is paired. Distances
are Frechet distances on the features of a classifier that was trained on the data alone, against all the data.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from fieldsmith.diagnose.guidance import Guidance, ask, measure, noised_tuples, path_tuples
from fieldsmith.diagnose.sweep import Sweep
from fieldsmith.errors import InputError
from fieldsmith.methods.distill.bank import Source
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.distill.loop import Result, distill
from fieldsmith.metrics.distances import frechet_distance
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.models.ddpm import ClassDDPM
from fieldsmith.models.shrink import shrink
from fieldsmith.run import plain, write_atomically
from fieldsmith.worlds.classes import Classes
from fieldsmith.worlds.classes import load as load_data

Settings = dict[str, Any]
SCALES = (1.0, 1.5, 2.0)
FINE = (1.0, 1.25, 1.5, 2.0)  # for the teacher, for ours, and for what the costs of ours are held against
HELD = ("dash, no TIRT, equal steps", "ours", *(f"ours x {share}" for share in (0.25, 0.5, 1.6, 4)))
RATIO = 5.9
IMAGES = {"digits": 1_000, "shapes": 500}
STEPS = 20  # of the sampler
TUPLES = 2_000
ONLINE: Settings = {"bank": 0, "stratify": False}
PLAIN: Settings = {"bank": 8_192, "reuse": 16.0, "stratify": False}
CACHED: Settings = {"bank": 4_096, "reuse": 16.0}
DROPOUT: Settings = {"layout": "split", "natural": True}
TIRT: Settings = {"curriculum": "tirt", "normalise": "batch"}
OURS: Settings = {"objective": "matched-dropout", **DROPOUT, "null_share": 0.2, "init": "copied", **CACHED}

# What differs from the base settings; `cost` multiplies the number of steps. To save time every arm reads one cache of
# the teacher, but for one that shows that asking at every step, which is what all but ours are charged, ends the same.
ARMS: dict[str, Settings] = {
    "scratch": {"objective": "scratch", **DROPOUT, **PLAIN},
    "conditional": {"objective": "conditional", **PLAIN},
    "anchor only": {"objective": "conditional", "anchor": 0.1, **PLAIN},
    "TIRT only": {"objective": "conditional", **TIRT, **PLAIN},
    "dash w/o unconditional": {"objective": "conditional", "anchor": 0.1, **TIRT, **PLAIN},
    "unconditional only": {"objective": "dash", "anchor": 0.0, **PLAIN},
    "dash, no TIRT": {"objective": "dash", **PLAIN},
    "dash, no TIRT, asked at every step": {"objective": "dash", **ONLINE},
    "dash w/o anchor": {"objective": "dash", "anchor": 0.0, **TIRT, **PLAIN},
    "dash": {"objective": "dash", **TIRT, **PLAIN},
    "dash, no TIRT, equal steps": {"objective": "dash", "batch": 128, **PLAIN},
    "dash, no TIRT, copied start": {"objective": "dash", "init": "copied", **PLAIN},
    "matched-dropout 10%": {"objective": "matched-dropout", **DROPOUT, **PLAIN},
    "student-dropout 10%": {"objective": "student-dropout", **DROPOUT, **PLAIN},
    "cond+gap": {"objective": "cond+gap", **PLAIN},
    "composite w=2": {"objective": "composite", "composite_scales": (2.0,), **PLAIN},
    "multi-w": {"objective": "composite", "composite_scales": (1.0, 4.0), **PLAIN},
    "gap": {"objective": "gap", **PLAIN},
    "w-conditioned": {"objective": "w-conditioned", "guidance_scales": (1.0, 1.5, 2.0), **PLAIN},
    "fitnets": {"objective": "fitnets", **ONLINE},
    "bk-sdm": {"objective": "bk-sdm", **ONLINE},
    "ours": OURS,
    "ours, fresh start": {**OURS, "init": "fresh"},
    "ours, edm2": {**OURS, "curriculum": "edm2"},
    **{f"ours x {share:g}": {**OURS, "cost": share} for share in (0.25, 0.5, 1.6, 4.0)},
}  # fmt: skip
WORLDS: dict[str, tuple[str, ...]] = {
    "digits": tuple(ARMS),
    "shapes": ("conditional", "dash, no TIRT", "ours"),
}


@dataclass(frozen=True)
class ReproduceDistill:
    """Repeat the distillation claims on zoo:digits-unet and zoo:shapes-unet."""

    out: Path = Path("results/distill")
    """Where runs/, summary.json, plots and README.md go; finished runs are not repeated."""
    worlds: tuple[str, ...] = ("digits", "shapes")
    """Which worlds to run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds: of a fresh student's start, and of all draws."""
    steps: int = 600
    """Updates of a run of cost 1 on the digits."""
    shapes_steps: int = 1_200
    """The same on the shapes, whose larger images take longer to learn."""
    lr: float = 8e-3
    """Learning rate of every arm, from a sweep of DASH and ours on a seed that no result uses."""
    bank: Path = Path("runs/distill-bank")
    """Where the cached teacher's answers lie; all arms and seeds share them."""
    part: tuple[int, int] = (0, 1)
    """This process takes runs K, K + N, ... of the list: `--part 0 2` and `--part 1 2` share the work."""


@dataclass(frozen=True)
class Bench:
    """A teacher, its data, its judge, and what the teacher itself makes of them."""

    world: str
    teacher_name: str

    @cached_property
    def teacher(self) -> ClassDDPM:
        model = load(self.teacher_name)
        assert isinstance(model, ClassDDPM)
        return model

    @cached_property
    def data(self) -> Classes:
        return load_data(self.world, self.teacher.size[0], self.teacher.channels)

    @cached_property
    def source(self) -> Source:
        return Source(self.teacher.encode_images(self.data.images), self.data.labels, self.data.names)

    @cached_property
    def sweep(self) -> Sweep:
        return Sweep(self.data, self.teacher, IMAGES[self.world], STEPS)

    @cached_property
    def tuples(self) -> dict[str, Any]:
        """Held-out states, noised and along the teacher's own path, with what the teacher says there."""
        generator = torch.Generator().manual_seed(20_000)
        prompts = [self.data.names[i % len(self.data.names)] for i in range(TUPLES)]
        found = {
            "noised": noised_tuples(self.teacher, self.data.held_images, self.data.held_labels, TUPLES, generator),
            "path": path_tuples(self.teacher, prompts, STEPS, 1.5, generator, TUPLES),
        }
        return {name: (states, ask(self.teacher, states)) for name, states in found.items()}

    def fidelity(self, student: Model) -> dict[str, Guidance]:
        return {name: measure(ask(student, states), said, states.t) for name, (states, said) in self.tuples.items()}


def teacher_record(bench: Bench) -> dict[str, Any]:
    """The teacher's own curve."""
    parameters = sum(p.numel() for p in bench.teacher.network.parameters())
    curve = bench.sweep.curve(bench.teacher, FINE)
    order = torch.randperm(len(bench.sweep.real), generator=torch.Generator().manual_seed(0))
    floor = frechet_distance(bench.sweep.real[order[: IMAGES[bench.world]]], bench.sweep.real)
    sizes = {"parameters": parameters, "images": IMAGES[bench.world]}
    return {"arm": "teacher", "world": bench.world, **sizes, "curve": curve, "floor": floor}


def student_record(bench: Bench, config: ReproduceDistill, arm: str, seed: int) -> dict[str, Any]:
    """Train one student and measure it."""
    began = time.monotonic()
    steps = steps_of(config, bench.world, arm)
    own = {key: value for key, value in ARMS[arm].items() if key != "cost"}
    told = DistillConfig(
        teacher=bench.teacher_name, steps=steps, seed=seed, lr=config.lr,
        bank_folder=config.bank / bench.world, **own,
    )  # fmt: skip
    scales = told.guidance_scales if told.objective == "w-conditioned" else None
    student = shrink(bench.teacher, ratio=RATIO, init=told.init, guidance_scales=scales, seed=seed)
    # the bank is one for all seeds: only the student's start and its draws differ
    result = distill(bench.teacher, student, bench.source, told, data=bench.data.name, quiet=True)
    record: dict[str, Any] = {
        "world": bench.world, "arm": arm, "seed": seed, "settings": plain(ARMS[arm]), "steps": steps, "lr": config.lr,
        "parameters": sum(p.numel() for p in student.network.parameters()),
        "training seconds": result.seconds, "student forwards": result.student_forwards,
        "teacher forwards": result.teacher_forwards, "teacher cost": result.teacher_cost,
        "forward_equivalents": result.forward_equivalents, "price": price(arm, steps, told, result),
        "curve": bench.sweep.curve(student, scales_of(bench.world, arm)),
    }  # fmt: skip
    if scales is None:
        found = bench.fidelity(student)
        record |= {name: guidance.to_json() for name, guidance in found.items()}
        record["guided error"] = {
            name: {str(w): guidance.pooled.guided_error(w) for w in (0, 1, 1.5, 2, 3, 4)}
            for name, guidance in found.items()
        }
    record["seconds"] = time.monotonic() - began
    return record


def price(arm: str, steps: int, told: DistillConfig, result: Result) -> float:
    """What an arm costs: ours with its cache, the others with the teacher asked at every step, as published."""
    if arm.startswith("ours"):
        return result.forward_equivalents
    asked = {"scratch": 0, "w-conditioned": 2 * told.batch}.get(told.objective, told.batch)
    return result.student_forwards + result.teacher_cost * steps * asked


@dataclass(frozen=True)
class Job:
    """A run, the file that it makes, and what that file must say of its settings."""

    path: Path
    settings: Settings
    work: Callable[[], dict[str, Any]]


def jobs(config: ReproduceDistill) -> list[Job]:
    """Every run, a seed after the other."""
    found = []
    for world in config.worlds:
        bench = Bench(world, f"zoo:{world}-unet")
        folder = config.out / "runs"
        found.append(
            Job(
                folder / f"{world}_teacher.json",
                {"images": IMAGES[world], "scales": list(FINE)},
                partial(teacher_record, bench),
            )
        )
        for seed in config.seeds:
            for arm in WORLDS[world]:
                name = "-".join("".join(c if c.isalnum() or c == "." else " " for c in arm).split())
                settings = {"settings": plain(ARMS[arm]), "steps": steps_of(config, world, arm), "lr": config.lr}
                settings["scales"] = list(scales_of(world, arm))
                work = partial(student_record, bench, config, arm, seed)
                found.append(Job(folder / f"{world}_{name}_{seed}.json", settings, work))
    return found


def scales_of(world: str, arm: str) -> tuple[float, ...]:
    """At which guidance scales an arm draws."""
    return FINE if (arm in HELD and world == "digits") or arm == "ours" else SCALES


def steps_of(config: ReproduceDistill, world: str, arm: str) -> int:
    whole = config.steps if world == "digits" else config.shapes_steps
    return round(whole * float(ARMS[arm].get("cost", 1)))


def main(config: ReproduceDistill) -> None:
    """Run what is missing, then write the summary once all of it is there."""
    from experiments.distill_summary import summarise

    _check(config)
    torch.set_num_threads(1)
    listed = jobs(config)
    mine, parts = config.part
    for job in listed[mine::parts]:
        if not _there(job):
            write_atomically(job.path, json.dumps(job.work(), indent=1) + "\n")
            print(f"{job.path.stem}: done", flush=True)
    missing = [job for job in listed if not _there(job)]
    if missing:
        print(f"{len(missing)} runs are still missing; the summary is written when all are there")
        return
    summarise([job.path for job in listed], config.out, config.seeds, "fieldsmith reproduce distill")


def _check(config: ReproduceDistill) -> None:
    for name in ("steps", "shapes_steps"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)} must be at least 1")
    if len(set(config.seeds)) < 2:
        raise InputError(f"seeds={config.seeds}: intervals need at least 2 different seeds")
    unknown = [world for world in config.worlds if world not in WORLDS]
    if unknown or not config.worlds:
        raise InputError(f"worlds={config.worlds} should be some of {', '.join(WORLDS)}")
    mine, parts = config.part
    if not 0 <= mine < parts:
        raise InputError(f"part={mine} {parts} is no share of the runs; use 0 1 for all, or 0 2 and 1 2 for halves")


def _there(job: Job) -> bool:
    """Whether the run is on disk, made with the settings that are asked for now."""
    if not job.path.exists():
        return False
    record = json.loads(job.path.read_text())
    record["scales"] = [float(w) for w in record["curve"]]
    return all(record.get(key) == value for key, value in job.settings.items())
