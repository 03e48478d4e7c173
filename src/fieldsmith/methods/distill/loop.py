"""Distillation's loop: states with the teacher's answers -> the student's -> loss -> fit (DASH notes, 3 and 10).

In: a teacher, a student of the same family, clean states, a DistillConfig. Out: the student's weights, and a `Result`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fieldsmith import preflight, processes
from fieldsmith.errors import InputError
from fieldsmith.methods.distill import curriculum as weights_of
from fieldsmith.methods.distill.bank import SHARD, Bank, Rows, Source, draw, place, states_at
from fieldsmith.methods.distill.config import FEATURES, DistillConfig, check
from fieldsmith.methods.distill.curriculum import Curriculum
from fieldsmith.methods.distill.features import Regressors, places, recorded
from fieldsmith.methods.distill.losses import feature_loss, pair_loss, row_loss, square, weighted
from fieldsmith.methods.distill.objectives import Objective, objective_of
from fieldsmith.models import pipeline_folder
from fieldsmith.models.branches import Branches, branches
from fieldsmith.models.core import Condition, Model
from fieldsmith.paths import tag
from fieldsmith.run import Run
from fieldsmith.training import Fit, Optimisation, fit, step_generator

PROFILE = 4_096  # states at which a frozen teacher's losses are measured


@dataclass(frozen=True)
class Result:
    """What the run did. A teacher's forward counts `teacher_cost` of the student's (their ratio of operations)."""

    steps: int
    seconds: float
    stopped: str
    student_forwards: int  # a forward of one state is 1, its backward 2
    teacher_forwards: int  # of one state; of the whole bank used, whoever asked
    teacher_cost: float

    @property
    def forward_equivalents(self) -> float:
        """The whole cost in forwards of the student."""
        return self.student_forwards + self.teacher_cost * self.teacher_forwards


def operations(model: Model, condition: Condition) -> float:
    """Floating-point operations of one state's forward."""
    x = model.noise(1, torch.Generator().manual_seed(0))
    scales = getattr(model, "scales", None)  # a network that takes the scale knows only these
    with FlopCounterMode(display=False) as counter, torch.no_grad(), model.uncounted():
        model.predict(x, torch.full((1,), 0.5, device=x.device), condition, scales[0] if scales else None)
    return float(counter.get_total_flops())


class Feed:
    """Rows for each step, from a bank or by asking the teacher."""

    def __init__(self, teacher: Model, source: Source, config: DistillConfig, objective: Objective, bank: Bank | None):
        self.teacher, self.source, self.config, self.objective, self.bank = teacher, source, config, objective, bank
        self.conditions = teacher.encode((*source.prompts, ""))
        self.paired = objective.coupled or (config.layout == "pairs" and objective.unconditional > 0)
        self.rows = max(1, config.batch // 2) if self.paired and not objective.guided_input else config.batch
        self.inside = config.objective in FEATURES  # then the step itself asks the teacher

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Rows, Tensor]:
        """The step's rows, and which of them serve the null branch, (rows,) bool; pairs serve both."""
        if self.bank:
            window = self.bank.window(*place(step, self.rows, self.config.bank, self.config.reuse))
            rows = window[draw(len(window), self.rows, self.config.times, self.config.stratify, generator)]
            return rows, self._null(len(rows), generator)
        times = weights_of.times_of(self.teacher.path)
        t = times[draw(len(times), self.rows, self.config.times, self.config.stratify, generator)].float()
        x_t, prompt, noise = states_at(self.teacher, self.source, t, generator)
        null = self._null(len(t), generator)
        return self._ask(x_t, t.to(x_t), prompt, noise, null), null

    def _null(self, n: int, generator: torch.Generator) -> Tensor:
        """An even share of rows, so that stratified times are shared out evenly too."""
        if self.paired or not self.objective.unconditional:
            return torch.zeros(n, dtype=torch.bool)
        ends = torch.arange(n + 1) * self.config.null_share + torch.rand((), generator=generator)
        return ends.floor().diff() > 0

    @torch.no_grad()
    def _ask(self, x_t: Tensor, t: Tensor, prompt: Tensor, noise: Tensor, null: Tensor) -> Rows:
        """The branches that the step needs and no others; where a row serves one branch, both fields hold it."""
        goal = self.objective
        if self.inside or not self.a_step():
            return Rows(x_t, t, prompt, noise, noise, torch.zeros_like(noise))
        if self.paired:
            output = branches(self.teacher, x_t, t, self.conditions[prompt])
            return Rows(x_t, t, prompt, noise, output.conditional, output.gap)
        away = null if goal.null_target == "unconditional" else torch.zeros_like(null)
        wanted = torch.where(away, len(self.source.prompts), prompt)
        said_once = self.teacher.predict(x_t, t, self.conditions[wanted]).value
        return Rows(x_t, t, prompt, noise, said_once, torch.zeros_like(noise))

    def a_step(self) -> int:
        """Teacher forwards in a step without a bank, one a state and branch."""
        goal = self.objective
        if not (goal.imitation or goal.coupled or (goal.unconditional and goal.null_target != "noise")):
            return 0  # from scratch: nobody to ask
        return self.rows * (2 if self.paired else 1)

    def spent(self, steps: int) -> int:
        """Teacher forwards behind `steps` steps: what they asked, or every row that was in a window of the bank."""
        if not self.bank:
            return steps * self.a_step()
        first, count = place(max(0, steps - 1), self.rows, self.config.bank, self.config.reuse)
        return 2 * SHARD * (first + count)


@dataclass(frozen=True)
class OutputAndFeatures:
    """A network's answer and what was inside it on the way."""

    output_old: Tensor
    features: list[Tensor]


class Step:
    """The student's side of a step: answers, errors, the objective's loss."""

    def __init__(self, student: Model, feed: Feed, config: DistillConfig, objective: Objective, weights: Curriculum):
        self.student, self.feed, self.config, self.objective, self.weights = student, feed, config, objective, weights
        self.conditions = student.encode((*feed.source.prompts, *(() if objective.guided_input else ("",))))
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
        found = self.student.trainable()
        if self.weights.learned:
            found["curriculum"] = self.weights.numbers
        if self.regressors:
            found |= {f"regressors.{name}": p for name, p in self.regressors.named_parameters()}
        return found

    def __call__(self, rows: Rows, null: Tensor, generator: torch.Generator, log: dict[str, float]) -> Tensor:
        device = self.student.device
        rows = Rows(*(getattr(rows, name).to(device) for name in Rows.__dataclass_fields__))
        null = null.to(device)
        if self.objective.guided_input:
            losses, extra = self._guided(rows, generator), None
        elif self.feed.paired:
            losses, extra = self._pairs(rows, generator, log), None
        else:
            losses, extra = self._rows(rows, null, log)
        by_batch = self.config.normalise == "batch"
        total = weighted(losses, self.weights(rows.t, by_batch), by_batch)
        barrier = self.weights.barrier(rows.t)
        total = total if barrier is None else total + barrier.mean()
        return total if extra is None else total + extra

    def _pairs(self, rows: Rows, generator: torch.Generator, log: dict[str, float]) -> Tensor:
        output = branches(self.student, rows.x_t, rows.t, self.conditions[rows.prompt])
        log["conditional error"] = square(output.conditional, rows.conditional).mean().item()
        log["unconditional error"] = square(output.unconditional, rows.teacher.unconditional).mean().item()
        goal = self.objective
        return pair_loss(
            (output.conditional, output.unconditional), (rows.conditional, rows.teacher.unconditional), rows.noise,
            imitation=goal.imitation, unconditional=goal.unconditional, anchor=goal.anchor, gap=goal.gap,
            composite=goal.composite, scale=self._scales(rows, generator) if goal.composite else None,
        )  # fmt: skip

    def _scales(self, rows: Rows, generator: torch.Generator) -> Tensor:
        scales = self.objective.scales
        if isinstance(scales, str):
            times = weights_of.index_of(self.student.path, rows.t) / weights_of.length_of(self.student.path)
            return torch.tensor([tag(time) for time in times.tolist()], device=rows.t.device)
        if len(scales) == 2:
            low, high = scales
            return (low + (high - low) * torch.rand(len(rows), generator=generator)).to(rows.t.device)
        picked = torch.randint(len(scales), (len(rows),), generator=generator)
        return torch.tensor(scales)[picked].to(rows.t.device)

    def _rows(self, rows: Rows, null: Tensor, log: dict[str, float]) -> tuple[Tensor, Tensor | None]:
        goal, extra = self.objective, None
        asked = torch.where(null, len(self.feed.source.prompts), rows.prompt)
        shape = (-1, *(1,) * (rows.gap.ndim - 1))
        own = null & (goal.null_target == "unconditional")
        # an online feed holds the asked branch itself and a gap of 0, a bank both branches
        target = rows.conditional - own.reshape(shape) * rows.gap
        if self.regressors:
            ours, theirs = self._record(rows.x_t, rows.t, self.conditions[asked], self.feed.conditions[rows.prompt])
            pred, target = ours.output_old, theirs.output_old
            extra = feature_loss(self.regressors(ours.features), theirs.features)
            log["feature error"] = extra.item()
        else:
            pred = self.student.predict(rows.x_t, rows.t, self.conditions[asked]).value
        if goal.null_target == "noise":
            target = torch.where(null.reshape(shape), rows.noise, target)
        errors = square(pred, target).detach()
        for name, some in (("conditional error", ~null), ("unconditional error", null)):
            if some.any():
                log[name] = errors[some].mean().item()
        share = None if self.config.natural or not goal.unconditional else self.config.null_share
        losses = row_loss(
            pred, target, rows.noise, null,
            imitation=goal.imitation, unconditional=goal.unconditional, anchor=goal.anchor, share=share,
        )  # fmt: skip
        return losses, extra

    def _guided(self, rows: Rows, generator: torch.Generator) -> Tensor:
        scales = torch.tensor(self.config.guidance_scales)
        picked = torch.randint(len(scales), (len(rows),), generator=generator)
        w = scales[picked].reshape(-1, *(1,) * (rows.gap.ndim - 1)).to(rows.gap)
        label = self.conditions.parts["label"][rows.prompt] * len(scales) + picked.to(rows.prompt.device)
        output = self.student.forward(rows.x_t, rows.t, label)[0]
        return square(output, rows.teacher.guided(w))


def fitted(config: DistillConfig) -> bool:
    """Whether the weights over time need the frozen teacher's losses."""
    return config.curriculum in ("tirt", "sigmoid", "edm2") and config.curriculum_from == "fit"


def curriculum_for(teacher: Model, source: Source, config: DistillConfig) -> Curriculum:
    """The weights over time that the settings name: the teacher's own, fit to its losses, or to be learned."""
    name, learned = config.curriculum, config.curriculum_from == "learned"
    if name not in ("tirt", "sigmoid", "edm2") or learned:
        return Curriculum(name, teacher.path, config.gamma, learned=learned and name in ("tirt", "sigmoid", "edm2"))
    if config.curriculum_from == "teacher":
        numbers = weights_of.read(pipeline_folder(config.teacher), teacher.name, teacher.path)
        return Curriculum(name, teacher.path, config.gamma, numbers)
    t, losses = teacher_losses(teacher, source, config.seed)
    u = weights_of.log_losses(t, losses, teacher.path)
    if name == "edm2":
        return Curriculum(name, teacher.path, config.gamma, u)
    shape = weights_of.base(name, teacher.path, config.gamma)
    numbers = weights_of.learn_tirt(u.exp(), shape, 6_000, generator=step_generator(config.seed, 0, stream=13))
    return Curriculum(name, teacher.path, config.gamma, numbers)


@torch.no_grad()
def teacher_losses(teacher: Model, source: Source, seed: int, n: int = PROFILE) -> tuple[Tensor, Tensor]:
    """The frozen teacher's conditional losses against the truth at n stratified times, (n,) each; counts no forward."""
    generator = step_generator(seed, 0, stream=12)
    times = weights_of.times_of(teacher.path)
    t = times[draw(len(times), n, (1.0, 1.0), True, generator)].float()
    x_t, prompt, noise = states_at(teacher, source, t, generator)
    conditions = teacher.encode(source.prompts)
    with teacher.uncounted():
        losses = [
            square(teacher.predict(x_t[rows], t[rows].to(x_t), conditions[prompt[rows]]).value, noise[rows])
            for rows in torch.arange(n).split(256)
        ]
    return t, torch.cat(losses).cpu()


def check_pair(teacher: Model, student: Model, scales: tuple[float, ...] | None) -> None:
    """Raises InputError where the two cannot be compared number by number, or the teacher has no null branch.

    `scales` are those that the student must take itself; None: it has two branches.
    """
    teacher.encode([""])  # names the lack and the fix itself
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
    sizes = [sum(p.numel() for p in model.network.parameters()) for model in (teacher, student)]
    if sizes[1] >= sizes[0]:
        raise InputError(f"the student has {sizes[1]:,} parameters, the teacher {sizes[0]:,}; make the student smaller")


def distill(
    teacher: Model,
    student: Model,
    source: Source,
    config: DistillConfig,
    run: Run | None = None,
    data: str = "",
    quiet: bool = False,
    optimizer: str = "adamw",
) -> Result:
    """Train the student's network in place, resumably. Raises InputError before the first update."""
    check(config)
    processes.check_share(config.batch, "batch")
    objective = objective_of(config)
    check_pair(teacher, student, config.guidance_scales if objective.guided_input else None)
    conditions = teacher.encode(source.prompts)
    cost = operations(teacher, conditions[[0]]) / operations(student, student.encode(source.prompts[:1]))
    weights = curriculum_for(teacher, source, config).to(student.device)
    folder = config.bank_folder or (run.folder / "bank" if run else None)
    if config.bank and folder is None:
        raise InputError("a cached teacher needs a folder; add --bank-folder, or --bank 0 to ask it at every step")
    feed = Feed(teacher, source, config, objective, None)
    student.unfreeze("all")
    try:
        step = Step(student, feed, config, objective, weights)
        with teacher.uncounted(), student.uncounted():
            _preflight(
                step, feed, config, quiet
            )  # asks the teacher itself: nothing is written before all is known good
        if config.bank and folder:
            feed.bank = Bank(pathlib.Path(folder), teacher, source, data)
    except InputError:
        student.remove_training()
        raise
    if run:
        run.begin()

    def losses(at: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        rows, null = feed(at, generator)
        yield step(rows, null, generator, log)

    optimisation = Optimisation(
        config.steps, config.lr, config.weight_decay, config.warmup, cosine=True, clip=config.clip,
        ema=config.ema or None, checkpoint_every=max(100, config.steps // 10), seed=config.seed,
        optimizer=optimizer,
    )  # fmt: skip
    done: Fit = fit(step.parameters(), losses, optimisation, run)
    student.network.requires_grad_(False)
    evaluations = feed.rows * (2 if feed.paired and not objective.guided_input else 1)
    asked = feed.spent(done.steps) + (PROFILE if fitted(config) else 0)
    return Result(done.steps, done.seconds, done.stopped, 3 * done.steps * evaluations, asked, cost)


def _preflight(step: Step, feed: Feed, config: DistillConfig, quiet: bool) -> None:
    """One step's worth, thrown away: the teacher guides at all, and the loss reaches every layer of the student."""
    generator = step_generator(config.seed, 0, stream=14)
    rows, null = feed(0, generator)
    with torch.no_grad():
        output: Branches = branches(feed.teacher, rows.x_t, rows.t, feed.conditions[rows.prompt])
    share = float(output.gap.square().mean() / output.conditional.square().mean())
    fix = "the teacher's branches are one: train it with its labels dropped now and then"
    checks = [
        preflight.Check("teacher's gap over its prediction, mean squares", share, "above 1e-6", share > 1e-6, fix)
    ]
    checks += preflight.gradients(step.student, step(rows, null, generator, {}))
    checks.append(preflight.memory(step.student, config.batch))
    for part in (step.weights, step.regressors):
        if isinstance(part, nn.Module):
            part.zero_grad()
    preflight.require(checks, quiet)
