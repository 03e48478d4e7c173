"""Students of zoo:digits-unet and zoo:shapes-unet by every objective.

Every arm trains the same student, 5.9 times smaller than its teacher, on the same data, at equal student compute (64
evaluations a step) and from fresh weights, unless its name says otherwise; ours starts from the teacher's. Sampling:
DDIM without clipping, equal noise and labels for teacher and all students, so that drift is paired. Distances are
Frechet distances on the features of a classifier that was trained on the data alone, against all the data.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from experiments.distill.tables import FINE, SCALES, tables
from experiments.study import Record, Run, Stage, Study, StudyConfig, slug
from fieldsmith import verb
from fieldsmith.errors import check_word
from fieldsmith.measure.distances import frechet_distance
from fieldsmith.measure.guidance import Guidance, ask, measure, noised_tuples, path_tuples
from fieldsmith.measure.sweep import Sweep
from fieldsmith.methods.distill.bank import Source
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.distill.step import Inputs
from fieldsmith.methods.distill.verb import DISTILL
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.models.ddpm import ClassDDPM
from fieldsmith.models.shrink import shrink
from fieldsmith.pictures import encoded
from fieldsmith.run import plain
from fieldsmith.verb import Trained
from fieldsmith.worlds.classes import Classes
from fieldsmith.worlds.classes import load as load_data

Settings = dict[str, Any]
# arms that are sampled at the finer scales too, since the costs of ours are compared with theirs
FINE_ARMS = ("dash, no TIRT, equal steps", "ours", *(f"ours x {share}" for share in (0.25, 0.5, 1.6, 4)))
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
class DistillStudy(StudyConfig):
    """Repeat the distillation claims on zoo:digits-unet and zoo:shapes-unet."""

    out: Path = Path("results/distill")
    """Where runs/, summary.json, plots and README.md go; finished runs are not repeated."""
    worlds: tuple[str, ...] = ("digits", "shapes")
    """Which worlds to run."""
    steps: int = 600
    """Updates of a run of cost 1 on the digits."""
    shapes_steps: int = 1_200
    """The same on the shapes, whose larger images take longer to learn."""
    lr: float = 8e-3
    """Learning rate of every arm, from a sweep of DASH and ours on a seed that no result uses."""
    bank: Path = Path("runs/distill-bank")
    """Where the cached teacher's answers lie; all arms and seeds share them."""


def stages(config: DistillStudy) -> list[Stage]:
    """Every run, a seed after the other. Raises InputError at an unknown world."""
    runs, made = config.out / "runs", []
    for world in config.worlds:
        check_word(world, tuple(WORLDS), "the worlds of this study")
        bench = Bench(world)
        asked: Record = {"images": IMAGES[world], "curve": {str(w): {} for w in FINE}}
        made.append([Run("teacher", runs / f"{world}_teacher.json", partial(teacher_record, bench), asked)])
        for seed in config.seeds:
            for arm in WORLDS[world]:
                asked = {
                    "settings": plain(ARMS[arm]), "steps": steps_of(config, world, arm), "lr": config.lr,
                    "curve": {str(w): {} for w in scales_of(world, arm)},
                }  # fmt: skip
                work = partial(student_record, bench, config, arm, seed)
                made.append([Run(arm, runs / f"{world}_{slug(arm)}_{seed}.json", work, asked)])
    return [made]


def scales_of(world: str, arm: str) -> tuple[float, ...]:
    """At which guidance scales an arm is sampled."""
    return FINE if (arm in FINE_ARMS and world == "digits") or arm == "ours" else SCALES


def steps_of(config: DistillStudy, world: str, arm: str) -> int:
    steps = config.steps if world == "digits" else config.shapes_steps
    return round(steps * float(ARMS[arm].get("cost", 1)))


@dataclass(frozen=True)
class Bench:
    """A teacher, its data, its judge, and what the teacher itself makes of them."""

    world: str

    @cached_property
    def teacher(self) -> ClassDDPM:
        model = load(f"zoo:{self.world}-unet")
        assert isinstance(model, ClassDDPM)
        return model

    @cached_property
    def data(self) -> Classes:
        return load_data(self.world, self.teacher.size[0], self.teacher.channels)

    @cached_property
    def source(self) -> Source:
        states = encoded(self.data.images, self.teacher.encode_images)
        return Source(states, self.data.labels, self.data.names, self.data.name)

    @cached_property
    def sweep(self) -> Sweep:
        return Sweep(self.data, self.teacher, IMAGES[self.world], STEPS)

    @cached_property
    def tuples(self) -> dict[str, Any]:
        """Held-out states, noised and along the teacher's own path, with the teacher's output there."""
        generator = torch.Generator().manual_seed(20_000)
        prompts = [self.data.names[i % len(self.data.names)] for i in range(TUPLES)]
        by_name = {
            "noised": noised_tuples(self.teacher, self.data.held_images, self.data.held_labels, TUPLES, generator),
            "path": path_tuples(self.teacher, prompts, STEPS, 1.5, generator, TUPLES),
        }
        return {name: (states, ask(self.teacher, states)) for name, states in by_name.items()}

    def fidelity(self, student: Model) -> dict[str, Guidance]:
        return {name: measure(ask(student, states), output, states.t) for name, (states, output) in self.tuples.items()}


def teacher_record(bench: Bench) -> Record:
    """The teacher's own curve."""
    parameters = sum(p.numel() for p in bench.teacher.network.parameters())
    curve = bench.sweep.curve(bench.teacher, FINE)
    order = torch.randperm(len(bench.sweep.real), generator=torch.Generator().manual_seed(0))
    floor = frechet_distance(bench.sweep.real[order[: IMAGES[bench.world]]], bench.sweep.real)
    sizes = {"parameters": parameters, "images": IMAGES[bench.world]}
    return {"arm": "teacher", "world": bench.world, **sizes, "curve": curve, "floor": floor}


def train(bench: Bench, config: DistillStudy, arm: str, seed: int) -> tuple[Model, DistillConfig, Trained]:
    """A student of the arm; the cache is one for all seeds, only its start and its draws differ."""
    own = {key: value for key, value in ARMS[arm].items() if key != "cost"}
    settings = DistillConfig(
        teacher=bench.teacher.name, steps=steps_of(config, bench.world, arm), seed=seed, lr=config.lr,
        bank_folder=config.bank / bench.world, **own,
    )  # fmt: skip
    scales = settings.guidance_scales if settings.objective == "w-conditioned" else None
    student = shrink(bench.teacher, ratio=RATIO, init=settings.init, guidance_scales=scales, seed=seed)
    done = verb.train(DISTILL, bench.teacher, settings, Inputs(source=bench.source, student=student))[1]
    return student, settings, done


def student_record(bench: Bench, config: DistillStudy, arm: str, seed: int) -> Record:
    """Train one student and measure it."""
    began = time.monotonic()
    student, settings, done = train(bench, config, arm, seed)
    record: Record = {
        "world": bench.world, "arm": arm, "seed": seed, "settings": plain(ARMS[arm]), "steps": settings.steps,
        "lr": config.lr, "parameters": sum(p.numel() for p in student.network.parameters()),
        "training seconds": done.seconds,
        **{key: done.cost[key] for key in ("student forwards", "teacher forwards", "teacher cost")},
        "forward_equivalents": done.cost["nfe"], "price": price(arm, settings, done.cost),
        "curve": bench.sweep.curve(student, scales_of(bench.world, arm)),
    }  # fmt: skip
    if settings.objective != "w-conditioned":
        by_states = bench.fidelity(student)
        record |= {name: guidance.to_json() for name, guidance in by_states.items()}
        record["guided error"] = {
            name: {str(w): guidance.pooled.guided_error(w) for w in (0, 1, 1.5, 2, 3, 4)}
            for name, guidance in by_states.items()
        }
    record["seconds"] = time.monotonic() - began
    return record


def price(arm: str, settings: DistillConfig, cost: dict[str, Any]) -> float:
    """What an arm costs: ours with its cache, the others with the teacher asked at every step, as published."""
    if arm.startswith("ours"):
        return float(cost["nfe"])
    asked = {"scratch": 0, "w-conditioned": 2 * settings.batch}.get(settings.objective, settings.batch)
    return float(cost["student forwards"] + cost["teacher cost"] * settings.steps * asked)


STUDY = Study("distill", "DASH, arXiv 2606.00798", DistillStudy, stages, tables)
