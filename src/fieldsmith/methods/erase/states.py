"""Where the erasure losses are evaluated: windows of rollouts, single states, noised images, kept prompts.

In: a model, a condition, a generator. Out: states with their own times; no gradients. Of several processes each has the
states of its own rollouts, rows of the draws that all make alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.models.core import Condition, Model, predict_rows
from fieldsmith.paths import Prediction, RectifiedFlow, VariancePreserving
from fieldsmith.samplers import Trajectory, rollout


def field_of(pred: Prediction) -> Tensor:
    """What the losses compare: velocities on rectified flow, eps on a variance-preserving path, as ESD has it."""
    return pred.velocity if isinstance(pred.path, RectifiedFlow) else pred.eps


def uniform_times(model: Model, n: int, generator: torch.Generator) -> Tensor:
    """Times in (0, 1), (n,); those that the network was trained at where they are discrete."""
    t = torch.rand(n, generator=generator)
    if isinstance(model.path, VariancePreserving):
        t = model.path.time((t * model.path.length).floor())
    return t


@dataclass(frozen=True)
class States:
    """States x (n, ...) with their times t (n,) and, for weights, the times of the next sampler step (n,)."""

    x: Tensor
    t: Tensor
    t_next: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, rows: slice) -> States:
        return States(self.x[rows], self.t[rows], self.t_next[rows])


@dataclass(frozen=True)
class Kept:
    """States (n, ...) of the reference under kept prompts, with its field there (`field_of`), on the CPU.

    `prompt` (n,) are rows of `conditions`, one a kept prompt: a prompt's embedding is large, and stands once.
    """

    x: Tensor
    t: Tensor
    field: Tensor
    prompt: Tensor
    conditions: Condition

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, rows: Tensor) -> Kept:
        return Kept(self.x[rows], self.t[rows], self.field[rows], self.prompt[rows], self.conditions)

    def to(self, device: torch.device) -> Kept:
        """On a device, but for what indexes."""
        return Kept(self.x.to(device), self.t.to(device), self.field.to(device), self.prompt, self.conditions)

    @property
    def condition(self) -> Condition:
        """Of each state."""
        return self.conditions[self.prompt]


def share(config: EraseConfig) -> float:
    """This process's part of a batch's rollouts: what a mean over its own rows counts of a mean over all."""
    return len(processes.owned(config.batch)) / config.batch


@torch.no_grad()
def roll(
    model: Model, condition: Condition, config: EraseConfig, generator: torch.Generator, stop: int | None = None
) -> Trajectory:
    """This process's rollouts of a batch with the model as it stands; use it inside `reference()` for the teacher."""

    def field(x: Tensor, t: Tensor):  # type: ignore[no-untyped-def]
        return model.predict(x, t, condition, config.rollout_guidance)

    x = model.noise(config.batch, generator)[processes.owned(config.batch)]
    return rollout(field, x, model.grid(config.steps), stop=stop)


def window(model: Model, condition: Condition, config: EraseConfig, generator: torch.Generator) -> States:
    """GEM's states: x_k with its own time t_k for k in the window (with t_{k-1} under official pairing)."""
    first, last = config.window
    if config.rollouts == "teacher":
        with model.reference():
            path = roll(model, condition, config, generator, last)
    else:
        path = roll(model, condition, config, generator, last)
    grid = model.grid(config.steps)
    early = 1 if config.official_pairing else 0
    times, after = grid[first - early : last + 1 - early], grid[first + 1 - early : last + 2 - early]
    batch = path.states.shape[1]
    return States(
        path.states[first : last + 1].flatten(0, 1), times.repeat_interleave(batch), after.repeat_interleave(batch)
    )


def single(model: Model, condition: Condition, config: EraseConfig, generator: torch.Generator) -> States:
    """ESD's state: a teacher rollout stopped at a uniformly random step."""
    stop = int(torch.randint(config.steps, (1,), generator=generator))
    grid = model.grid(config.steps)
    with model.reference():
        x = roll(model, condition, config, generator, stop).last
    return States(x, grid[stop].expand(len(x)), grid[stop + 1].expand(len(x)))


@torch.no_grad()
def kept_states(model: Model, config: EraseConfig, generator: torch.Generator) -> Kept:
    """All states of reference rollouts under the kept prompts in turn, with what the reference says there."""
    prompts = config.keep or ("",)
    rollouts = max(16, len(prompts))
    own = processes.owned(rollouts)
    conditions = model.encode(prompts)
    rows = own % len(prompts)
    fields = []

    def field(x: Tensor, t: Tensor) -> Prediction:
        pred = predict_rows(model, x, t, conditions, rows, config.loss_guidance)
        fields.append(field_of(pred).cpu())
        return pred

    with model.reference():
        path = rollout(field, model.noise(rollouts, generator)[own], model.grid(config.steps))
    # every process needs all of them, since each step picks some
    x, fields_all = (
        processes.gather(part.transpose(0, 1)).transpose(0, 1).flatten(0, 1)  # (steps, rollouts, ...) in that order
        for part in (path.states[:-1].cpu(), torch.stack(fields))
    )
    times = path.times[:-1].cpu().repeat_interleave(rollouts)
    return Kept(x, times, fields_all, (torch.arange(rollouts) % len(prompts)).repeat(config.steps), conditions)
