"""`distill` prepared: a student beside its frozen teacher, and each step's loss (DASH notes, 3 and 10).

In: a teacher, data with classes, a DistillConfig. Out: a Job for verb.py, whose model is the student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fieldsmith import preflight, processes
from fieldsmith.errors import InputError
from fieldsmith.methods.distill import curriculum as weights_of
from fieldsmith.methods.distill.bank import Bank, Rows, Source
from fieldsmith.methods.distill.config import DistillConfig, objective_of
from fieldsmith.methods.distill.curriculum import Curriculum
from fieldsmith.methods.distill.features import Regressors, places, recorded
from fieldsmith.methods.distill.identifiability import identifiability
from fieldsmith.methods.distill.losses import feature_loss, pair_loss, row_loss, square, weighted
from fieldsmith.methods.distill.objectives import FEATURES, Objective
from fieldsmith.methods.distill.teacher import PROFILE, Feed, curriculum_for, fitted, operations
from fieldsmith.models.branches import branches, dropped
from fieldsmith.models.core import Condition, Model
from fieldsmith.models.prompts import encoded_prompts
from fieldsmith.models.shrink import shrink
from fieldsmith.paths import length_of, tag
from fieldsmith.pictures import encoded
from fieldsmith.preflight import Check
from fieldsmith.training import Fit, Log, optimisation_of, step_generator
from fieldsmith.verb import Job


@dataclass(frozen=True)
class Inputs:
    """What a run is given beside its settings.

    `data` are images with classes (worlds/classes.py), or a function (size, channels) that gives them at the teacher's
    size. `source` are states that are encoded already, which train as well, but nothing can be measured on them.
    """

    data: Any | Callable[[int, int], Any] = None
    source: Source | None = None
    student: Model | None = None  # untrained, of the teacher's family; None: made as the settings say


def prepare(teacher: Model, config: DistillConfig, inputs: Inputs) -> Job:
    """Train a student on both of its teacher's branches.

    Raises InputError where teacher, student, data and objective do not go together, before anything is trained.
    """
    if inputs.source is None:
        preflight.check_sampled(teacher, config.sampler_steps)
    objective = objective_of(config)
    scales = config.guidance_scales if objective.guided_input else None
    student = inputs.student or student_for(teacher, config, scales)
    student.raise_precision()
    data, source = None, inputs.source
    if source is None:
        data = data_for(teacher, inputs.data)
        source = Source(encoded(data.images, teacher.encode_images), data.labels, data.names, data.name)
    check_pair(teacher, student, scales)
    relative = operations(teacher, teacher.encode(source.prompts[:1]))
    relative /= operations(student, student.encode(source.prompts[:1]))
    weights = curriculum_for(teacher, source, config).to(student.device)
    asking = feed = Feed(teacher, source, config, objective)
    step = Step(student, feed, config, objective, weights)
    if config.bank:
        folder = config.bank_folder or (config.out / "bank" if config.out else None)
        feed = replace(feed, bank=Bank(folder, teacher, source))
    student.unfreeze("all")

    def losses(at: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        yield step(*feed(at, generator), generator, log)

    def checks(resumes: bool) -> list[Check]:
        """On one step's worth, thrown away; the teacher is asked itself, so that no bank is written yet."""
        generator = step_generator(config.seed, 0, stream=14)
        with teacher.uncounted():
            rows, null, times = asking(0, generator)
            with torch.no_grad():
                output = branches(teacher, rows.x_t, rows.t, asking.conditions[rows.prompt])
            loss = step(rows, null, times, generator, Log())
        gap, size = (
            float(sum(processes.exchange(float(part.square().sum())))) for part in (output.gap, output.conditional)
        )
        share = gap / size
        fix = "the teacher's branches are one: train it with its labels dropped now and then"
        name = "teacher's gap over its prediction, mean squares"
        check = Check(name, share, "above 1e-6", share > 1e-6, fix)
        return [check, *preflight.gradients(student, loss), preflight.memory(student, config.batch)]

    def cost(done: Fit, nfe: int) -> dict[str, Any]:
        """All in forwards of the student; a teacher's counts as many as their ratio of operations."""
        asked = feed.spent(done.steps) + (PROFILE if fitted(config) else 0)
        return {
            "nfe": nfe + relative * asked, "student forwards": nfe, "teacher forwards": asked, "teacher cost": relative,
        }  # fmt: skip

    def facts() -> dict[str, Any]:
        return {
            "method": config.objective, "identifiability": str(identifiability(objective)),
            "parameters": {"teacher": size_of(teacher), "student": size_of(student)},
        }  # fmt: skip

    return Job(
        student, losses, optimisation_of(config), step.parameters(), checks, base=teacher, cost=cost, facts=facts,
        inputs=replace(inputs, data=data),
    )  # fmt: skip


def student_for(teacher: Model, config: DistillConfig, scales: tuple[float, ...] | None) -> Model:
    """An untrained student. Raises InputError at a ratio or a config that makes no smaller network."""
    fields = config.student_fields()
    ratio = config.shrink if fields is None else None
    return shrink(teacher, ratio, fields, init=config.init, guidance_scales=scales, seed=config.seed)


def data_for(teacher: Model, data: Any) -> Any:
    """The data at the teacher's size and with its classes. Raises InputError where it cannot be had so."""
    if callable(data):
        size = teacher.decode(teacher.noise(1, torch.Generator().manual_seed(0))).shape  # (1, channels, height, width)
        data = data(size[-1], size[1])
    classes = getattr(teacher, "classes", None)
    data = data if classes is None else data.in_order(tuple(classes))
    encoded_prompts(teacher, data.names)  # words that a text model does not know are refused here
    return data


def size_of(model: Model) -> int:
    """How many parameters the network has."""
    return sum(p.numel() for p in model.network.parameters())


def check_pair(teacher: Model, student: Model, scales: tuple[float, ...] | None) -> None:
    """Raises InputError where the two cannot be compared number by number, or the teacher has no null branch.

    `scales` are those that the student must take itself; None: it has two branches.
    """
    _ = teacher.null  # names the lack and the fix itself
    if teacher.family != student.family:
        raise InputError(f"the student is of family {student.family}, the teacher of {teacher.family}; use one family")
    generator = torch.Generator().manual_seed(0)
    shapes = [tuple(model.noise(1, generator).shape[1:]) for model in (teacher, student)]
    if shapes[0] != shapes[1]:
        raise InputError(f"the student's states are {shapes[1]}, the teacher's {shapes[0]}; use one size")
    if teacher.kind != student.kind:
        raise InputError(f"the student predicts {student.kind}, the teacher {teacher.kind}; use one kind of prediction")
    takes = getattr(student, "scales", None)
    if takes != scales:
        raise InputError(
            f"the student takes the guidance scales {takes}, the objective teaches {scales}; make the student for those"
        )
    known = [getattr(model, "classes", None) for model in (teacher, student)]
    if known[0] != known[1]:
        raise InputError(
            f"the student knows the classes {known[1]}, the teacher {known[0]}; give both the same, in order"
        )
    sizes = [size_of(model) for model in (teacher, student)]
    if sizes[1] >= sizes[0]:
        raise InputError(f"the student has {sizes[1]:,} parameters, the teacher {sizes[0]:,}; make the student smaller")


@dataclass(frozen=True)
class OutputAndFeatures:
    """A network's answer and what was inside it on the way."""

    output: Tensor
    features: list[Tensor]


class Step:
    """The student's side of a step: answers, errors, the objective's loss."""

    def __init__(self, student: Model, feed: Feed, config: DistillConfig, objective: Objective, weights: Curriculum):
        self.student, self.feed, self.config, self.objective, self.weights = student, feed, config, objective, weights
        self.conditions = encoded_prompts(student, feed.source.prompts)
        self.taps: list[tuple[str, str]] = []
        self.regressors: Regressors | None = None
        if config.objective in FEATURES:
            self._tap()

    def _tap(self) -> None:
        teacher = self.feed.teacher
        self.taps = places(self.student.network, teacher.network, self.config.objective == "fitnets")
        x, t = self.student.noise(1, torch.Generator().manual_seed(0)), torch.full((1,), 0.5)
        with torch.no_grad(), teacher.uncounted(), self.student.uncounted():
            ours, theirs = self._record(x, t.to(x), self.conditions[[0]], self.feed.conditions[[0]])
        self.regressors = Regressors(ours.features, theirs.features, self.config.seed).to(x.device)

    def _record(
        self, x_t: Tensor, t: Tensor, ours: Condition, theirs: Condition
    ) -> tuple[OutputAndFeatures, OutputAndFeatures]:
        """What student and teacher say, and their features."""
        teacher = self.feed.teacher
        with recorded(teacher.network, [pair[1] for pair in self.taps]) as hints, torch.no_grad():
            target = teacher.predict(x_t, t, theirs).value
        with recorded(self.student.network, [pair[0] for pair in self.taps]) as inside:
            pred = self.student.predict(x_t, t, ours).value
        return OutputAndFeatures(pred, list(inside)), OutputAndFeatures(target, list(hints))

    def parameters(self) -> dict[str, Tensor]:
        """The student's, a learned curriculum's and the regressors'."""
        parameters = self.student.trainable()
        if self.weights.learned:
            parameters["curriculum"] = self.weights.numbers
        if self.regressors:
            parameters |= {f"regressors.{name}": p for name, p in self.regressors.named_parameters()}
        return parameters

    def __call__(self, rows: Rows, null: Tensor, times: Tensor, generator: torch.Generator, log: Log) -> Tensor:
        """This process's part of a step's loss, at its rows of a batch whose times are `times` (n,)."""
        device, n = self.student.device, len(times)
        rows = Rows(*(getattr(rows, name).to(device) for name in Rows.__dataclass_fields__))
        null = null.to(device)
        extra: Tensor | None = None
        if self.objective.guided_input:
            losses = self._guided(rows, generator)
        elif self.feed.paired:
            losses = self._pairs(rows, generator, log)
        else:
            losses, extra = self._rows(rows, null, log)
        by_batch = self.config.normalise == "batch"
        every = self.weights(times.to(device), by_batch) if by_batch else None
        total = weighted(losses, self.weights(rows.t, by_batch), every, n)
        barrier = self.weights.barrier(rows.t)
        total = total if barrier is None else total + barrier.sum() / n
        return total if extra is None else total + extra * (len(rows) / n)

    def _pairs(self, rows: Rows, generator: torch.Generator, log: Log) -> Tensor:
        output = branches(self.student, rows.x_t, rows.t, self.conditions[rows.prompt])
        log.mean("conditional error", square(output.conditional, rows.conditional))
        log.mean("unconditional error", square(output.unconditional, rows.teacher.unconditional))
        goal = self.objective
        return pair_loss(
            (output.conditional, output.unconditional), (rows.conditional, rows.teacher.unconditional), rows.noise,
            imitation=goal.imitation, unconditional=goal.unconditional, anchor=goal.anchor, gap=goal.gap,
            composite=goal.composite, scale=self._scales(rows, generator) if goal.composite else None,
        )  # fmt: skip

    def _scales(self, rows: Rows, generator: torch.Generator) -> Tensor:
        scales = self.objective.scales
        if isinstance(scales, str):
            times = weights_of.index_of(self.student.path, rows.t) / length_of(self.student.path)
            return torch.tensor([tag(time) for time in times.tolist()], device=rows.t.device)
        own = processes.owned(self.feed.rows)
        if len(scales) == 2:
            low, high = scales
            return (low + (high - low) * torch.rand(self.feed.rows, generator=generator))[own].to(rows.t.device)
        picked = torch.randint(len(scales), (self.feed.rows,), generator=generator)[own]
        return torch.tensor(scales)[picked].to(rows.t.device)

    def _rows(self, rows: Rows, null: Tensor, log: Log) -> tuple[Tensor, Tensor | None]:
        goal, extra = self.objective, None
        asked = dropped(self.student, self.conditions[rows.prompt], null)
        shape = (-1, *(1,) * (rows.gap.ndim - 1))
        own = null & (goal.null_target == "unconditional")
        # an online feed holds the asked branch itself and a gap of 0, a bank both branches
        target = rows.conditional - own.reshape(shape) * rows.gap
        if self.regressors:
            ours, theirs = self._record(rows.x_t, rows.t, asked, self.feed.conditions[rows.prompt])
            pred, target = ours.output, theirs.output
            extra = feature_loss(self.regressors(ours.features), theirs.features)
            log.mean("feature error", extra.expand(len(rows)))
        else:
            pred = self.student.predict(rows.x_t, rows.t, asked).value
        if goal.null_target == "noise":
            target = torch.where(null.reshape(shape), rows.noise, target)
        errors = square(pred, target).detach()
        for name, some in (("conditional error", ~null), ("unconditional error", null)):
            log.mean(name, errors[some])
        share = None if self.config.natural or not goal.unconditional else self.config.null_share
        losses = row_loss(
            pred, target, rows.noise, null,
            imitation=goal.imitation, unconditional=goal.unconditional, anchor=goal.anchor, share=share,
        )  # fmt: skip
        return losses, extra

    def _guided(self, rows: Rows, generator: torch.Generator) -> Tensor:
        scales = torch.tensor(self.config.guidance_scales)
        picked = torch.randint(len(scales), (self.feed.rows,), generator=generator)[processes.owned(self.feed.rows)]
        w = scales[picked].reshape(-1, *(1,) * (rows.gap.ndim - 1)).to(rows.gap)
        label = self.conditions[rows.prompt].parts["label"] * len(scales) + picked.to(rows.prompt.device)
        output = self.student.forward(rows.x_t, rows.t, label)[0]
        return square(output, rows.teacher.guided(w))
