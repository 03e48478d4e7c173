"""Where the erasure losses are evaluated: windows of rollouts, single states, noised images, kept prompts.

In: a model, a condition, a generator. Out: states with their own times; no gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.models.core import Condition, Model
from fieldsmith.samplers import Trajectory, rollout


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
    """States of the reference under kept prompts, with the reference's velocity there."""

    x: Tensor
    t: Tensor
    velocity: Tensor
    condition: Condition

    def __getitem__(self, rows: Tensor) -> Kept:
        return Kept(self.x[rows], self.t[rows], self.velocity[rows], self.condition[rows])


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
    """All states of reference rollouts under the kept prompts in turn; Euler's own differences are the velocities."""
    prompts = config.keep or ("",)
    rollouts = max(16, len(prompts))
    condition = model.encode([prompts[i % len(prompts)] for i in range(rollouts)])
    with model.reference():
        field = lambda x, t: model.predict(x, t, condition, config.loss_guidance)  # noqa: E731
        path = rollout(field, model.noise(rollouts, generator), model.grid(config.steps))
    steps = path.times.diff().reshape(-1, *[1] * (path.states.ndim - 1))
    velocity = path.states.diff(dim=0) / steps
    every = [condition] * config.steps
    parts = {name: torch.cat([c.parts[name] for c in every]) for name in condition.parts}
    return Kept(
        path.states[:-1].flatten(0, 1),
        path.times[:-1].repeat_interleave(rollouts),
        velocity.flatten(0, 1),
        Condition(parts),
    )
