"""What a run asks of its teacher: each step's rows, its cost, and its losses where weights over time are fit to them.

In: a frozen teacher, clean states, a DistillConfig. Out: `Feed` for the steps, a `Curriculum`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fieldsmith import processes
from fieldsmith.methods.distill import curriculum as weights_of
from fieldsmith.methods.distill.bank import SHARD, Bank, Rows, Source, draw, place, states_at
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.distill.curriculum import Curriculum
from fieldsmith.methods.distill.losses import square
from fieldsmith.methods.distill.objectives import FEATURES, Objective
from fieldsmith.models import pipeline_folder
from fieldsmith.models.branches import branches, dropped
from fieldsmith.models.core import Condition, Model
from fieldsmith.models.prompts import Prompts, encoded_prompts
from fieldsmith.paths import times_of
from fieldsmith.training import step_generator

PROFILE = 4_096  # states at which a frozen teacher's losses are measured


@dataclass(frozen=True)
class Feed:
    """Rows for each step, from a bank or by asking the teacher; of several processes each has its part of them."""

    teacher: Model
    source: Source
    config: DistillConfig
    objective: Objective
    bank: Bank | None = None

    @cached_property
    def conditions(self) -> Condition | Prompts:
        """Every prompt."""
        return encoded_prompts(self.teacher, self.source.prompts)

    @property
    def paired(self) -> bool:
        """Whether a row serves both branches."""
        goal = self.objective
        return goal.coupled or (self.config.layout == "pairs" and goal.unconditional > 0)

    @property
    def rows(self) -> int:
        """Rows of a step."""
        halved = self.paired and not self.objective.guided_input
        return max(1, self.config.batch // 2) if halved else self.config.batch

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Rows, Tensor, Tensor]:
        """This process's rows of the step, which of them serve the null branch, (rows,) bool (pairs serve both), and
        the times of all processes' rows, (n,), over which a batch's weights are normalised."""
        config, own = self.config, processes.owned(self.rows)
        if self.bank:
            window = self.bank.window(*place(step, self.rows, config.bank, config.reuse))
            picked = draw(len(window), self.rows, config.times, config.stratify, generator)
            return window[picked[own]], self._null(self.rows, generator)[own], window.t[picked]
        times = times_of(self.teacher.path)
        t = times[draw(len(times), self.rows, config.times, config.stratify, generator)].float()
        x_t, prompt, noise = states_at(self.teacher, self.source, t, generator)
        null = self._null(len(t), generator)[own]
        return self._ask(x_t[own], t[own].to(x_t), prompt[own], noise[own], null), null, t

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
        if self.config.objective in FEATURES or not self.a_step():  # features: the step itself asks the teacher
            return Rows(x_t, t, prompt, noise, noise, torch.zeros_like(noise))
        if self.paired:
            output = branches(self.teacher, x_t, t, self.conditions[prompt])
            return Rows(x_t, t, prompt, noise, output.conditional, output.gap)
        away = null if goal.null_target == "unconditional" else torch.zeros_like(null)
        wanted = dropped(self.teacher, self.conditions[prompt], away)
        value = self.teacher.predict(x_t, t, wanted).value
        return Rows(x_t, t, prompt, noise, value, torch.zeros_like(noise))

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


def operations(model: Model, condition: Condition) -> float:
    """Floating-point operations of one state's forward."""
    x = model.noise(1, torch.Generator().manual_seed(0))
    scales = getattr(model, "scales", None)  # a network that takes the scale knows only these
    with FlopCounterMode(display=False) as counter, torch.no_grad(), model.uncounted():
        model.predict(x, torch.full((1,), 0.5, device=x.device), condition, scales[0] if scales else None)
    return float(counter.get_total_flops())


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
def teacher_losses(teacher: Model, source: Source, seed: int) -> tuple[Tensor, Tensor]:
    """The frozen teacher's conditional losses against the truth at PROFILE stratified times, (n,) each; not counted."""
    n = PROFILE
    generator = step_generator(seed, 0, stream=12)
    times = times_of(teacher.path)
    t = times[draw(len(times), n, (1.0, 1.0), True, generator)].float()
    x_t, prompt, noise = states_at(teacher, source, t, generator)
    conditions = encoded_prompts(teacher, source.prompts)
    with teacher.uncounted():
        losses = [
            square(teacher.predict(x_t[rows], t[rows].to(x_t), conditions[prompt[rows]]).value, noise[rows])
            for rows in processes.owned(n).split(teacher.chunk)
        ]
    return t, processes.gather(torch.cat(losses)).cpu()
