"""What is looked at of teacher and student after `distill`: images against the guidance scale, both branches at fixed
states (DASH notes, 7)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fieldsmith.measure.guidance import ask, noised_tuples, path_tuples
from fieldsmith.measure.sweep import Sweep
from fieldsmith.methods.distill.config import DistillConfig, objective_of
from fieldsmith.models.branches import Branches
from fieldsmith.previews import FEW, Preview
from fieldsmith.training import step_generator
from fieldsmith.verb import Job, Side

SCALES = (1.0, 1.5, 2.0, 3.0)
STATES = 20 / 3  # of each kind, at which the branches are compared, for an image a scale: 2,000 for 300


@dataclass(frozen=True)
class Measured:
    """What a network draws and says, at equal noise, classes and states for teacher and student."""

    images: dict[str, Tensor]  # by guidance scale, (evaluate, channels, height, width) in [0, 1]
    branches: dict[str, Branches]  # by kind of states
    times: dict[str, Tensor]  # of those states, (n,)


def measure(model: Any, config: DistillConfig, job: Job, side: Side) -> Measured:
    """The teacher is `job.base`, the data are `job.inputs.data`."""
    guided_input = objective_of(config).guided_input
    sweep = sweep_of(config, job)
    images = {str(w): sweep.draw(model, w) for w in (config.guidance_scales if guided_input else SCALES)}
    if guided_input:  # a student that takes w has no branches
        return Measured(images, {}, {})
    teacher, data = job.base, job.inputs.data
    generator = step_generator(config.seed, 0, stream=9)
    n = round(STATES * config.evaluate)
    shown = [data.names[i] for i in data.held_labels.tolist()]
    states = {
        "noised data": noised_tuples(teacher, data.held_images, shown, n, generator),
        "the teacher's guided path": path_tuples(teacher, list(data.names), config.sampler_steps, 2.0, generator, n),
    }
    return Measured(
        images, {kind: ask(model, at) for kind, at in states.items()}, {kind: at.t for kind, at in states.items()}
    )


def preview(config: DistillConfig, job: Job) -> Preview:
    """One picture of each of the first classes, guided."""
    sweep = replace(sweep_of(config, job), images=FEW)
    scale = config.guidance_scales[-1] if objective_of(config).guided_input else 2.0
    return Preview([sweep.data.names[i] for i in sweep.labels.tolist()], lambda model: sweep.draw(model, scale))


def sweep_of(config: DistillConfig, job: Job) -> Sweep:
    return Sweep(job.inputs.data, job.base, config.evaluate, config.sampler_steps, config.seed)
