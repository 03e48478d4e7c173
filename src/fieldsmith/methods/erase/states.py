"""Where the erasure losses are evaluated: windows of rollouts, single states, noised images, kept prompts.

In: a model, a condition, a generator. Out: states with their own times; no gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.models.core import Condition, Model
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
    """States of the reference under kept prompts, with its field there (`field_of`)."""

    x: Tensor
    t: Tensor
    field: Tensor
    condition: Condition

    def __getitem__(self, rows: Tensor) -> Kept:
        return Kept(self.x[rows], self.t[rows], self.field[rows], self.condition[rows])


@torch.no_grad()
def roll(
    model: Model, condition: Condition, config: EraseConfig, generator: torch.Generator, stop: int | None = None
) -> Trajectory:
    """A batch of rollouts with the model as it stands; use it inside `reference()` for the teacher."""

    def field(x: Tensor, t: Tensor):  # type: ignore[no-untyped-def]
        return model.predict(x, t, condition, config.rollout_guidance)

    x = model.noise(config.batch, generator)
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
    batch = config.batch
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
    condition = model.encode([prompts[i % len(prompts)] for i in range(rollouts)])
    fields = []

    def field(x: Tensor, t: Tensor) -> Prediction:
        pred = model.predict(x, t, condition, config.loss_guidance)
        fields.append(field_of(pred))
        return pred

    with model.reference():
        path = rollout(field, model.noise(rollouts, generator), model.grid(config.steps))
    every = [condition] * config.steps
    parts = {name: torch.cat([c.parts[name] for c in every]) for name in condition.parts}
    return Kept(
        path.states[:-1].flatten(0, 1),
        path.times[:-1].repeat_interleave(rollouts),
        torch.cat(fields),
        Condition(parts),
    )
