"""What stays the same over a run of `align`: model, reward, prompts encoded once, schedule, who branches where.

In: a model, a configuration, a reward. Out: an AlignContext, through which everything else asks model and reward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.methods.align.auxiliary import Auxiliary
from fieldsmith.methods.align.config import REGRESSIONS, AlignConfig
from fieldsmith.methods.align.guidance import Place, Value
from fieldsmith.methods.align.pairs import Pairs
from fieldsmith.methods.policy.rollouts import Plan, Rollout, roll
from fieldsmith.methods.policy.schedule import (
    Schedule,
    Strength,
    effective_strength,
    is_stochastic,
    multiplier,
    schedule,
    strength,
)
from fieldsmith.models.core import Model, predict_rows
from fieldsmith.models.prompts import Prompts
from fieldsmith.paths import Path, Prediction, RectifiedFlow
from fieldsmith.preferences import Preferences
from fieldsmith.rewards.reward import Reward, score_batches
from fieldsmith.samplers import Sde, euler
from fieldsmith.training import step_generator

NOISE = {"flow-sde": 0.7, "dance-sde": 0.3, "cps": 0.8, "ddim": 1.0, "ddim-uniform": 4.5}


@dataclass(frozen=True)
class AlignContext:
    """Everything that stays the same over a run."""

    model: Model
    config: AlignConfig
    _reward: Reward | None  # None: it learns from pairs
    condition: Prompts  # of config.prompts, a row each
    schedule: Schedule
    plan: Plan
    sde: Sde
    noise_level: float
    prior: float = 1.0  # the variance of what the model makes, for the strength 'jacobian'
    helper: Auxiliary | None = None  # the learned helper, where the recipe has one
    pairs: Pairs | None = None  # what it learns from where there is no reward

    @staticmethod
    def of(model: Model, config: AlignConfig, reward: Reward | None, pairs: Preferences | None = None) -> AlignContext:
        """Raises InputError where settings or prompts do not fit the model; attaches nothing to it."""
        if not config.prompts:
            raise InputError("no prompts given; add --prompts WORDS or a text file with a prompt a line")
        sde, level = stochastic_step(config, model.path, model.name)
        condition = Prompts(model, config.prompts)
        grid = model.grid(config.steps)
        with torch.no_grad(), model.uncounted():
            x, first = model.noise(1, step_generator(config.seed, 0, stream=1)), condition[torch.tensor([0])]
            kind = model.predict(x, grid[0], first).kind
        s = schedule(model.path, grid, kind, sde, level)
        helper = None
        if config.auxiliary != "none":
            like = model.noise(1, torch.Generator().manual_seed(0))
            helper = Auxiliary(like, len(config.prompts), config.auxiliary in ("residual", "value"), config.seed)
        context = AlignContext(model, config, reward, condition, s, _plan(config, s), sde, level, helper=helper)
        context = replace(context, pairs=Pairs.of(model, config, pairs)) if pairs else context
        h = context.effective_strength
        if h and not any(h[k] for k in context.plan.is_stochastic.nonzero().flatten().tolist()):
            raise InputError(
                f"strength '{config.strength}' is 0 at every trained step of steps={config.steps}, so that nothing "
                "would be learned; use more steps"
            )
        return replace(context, prior=context.variance()) if config.strength == "jacobian" else context

    @property
    def reward(self) -> Reward:
        """What is raised. A recipe that learns from pairs has none, and asks for none."""
        assert self._reward is not None
        return self._reward

    @cached_property
    def strength(self) -> Strength:
        """C1 and gamma by step under the recipe's name."""
        return strength(self.config.strength, self.schedule, self.prior)

    @cached_property
    def multiplier(self) -> Tensor:
        """What a policy gradient's log-ratio is multiplied by, (K,)."""
        return multiplier(self.config.strength, self.schedule)

    @property
    def effective_strength(self) -> tuple[float, ...] | None:
        """h by step: the push on the network's output per unit of the value's gradient; None where nothing has it."""
        config, s = self.config, self.schedule
        if config.estimator not in ("reverse-noise", *REGRESSIONS):
            return None
        next_state = config.estimator == "reverse-noise" or config.state == "next"
        return tuple(effective_strength(self.strength, s, s.omega if next_state else 1.0).tolist())

    @property
    def eta(self) -> Tensor:
        """VGG-Flow's share of the reward's gradient by step, (K,): gamma over |kappa|."""
        return self.strength.gamma / self.schedule.kappa.abs()

    def predict(self, x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
        """The network's prediction under prompts (n,), in chunks where nothing needs its gradient."""
        return predict_rows(self.model, x, t, self.condition, prompt, self.config.guidance)

    def place(self, prompt: Tensor) -> Place:
        """The field under prompts (n,)."""
        return lambda x, t: self.predict(x, t, prompt)

    def output(self, x: Tensor, step: Tensor, prompt: Tensor) -> Tensor:
        """The network's own output at rows (n, ...), on the model's device; gradients flow if they are enabled."""
        x = x.to(self.model.device)
        return self.predict(x, self.schedule.times[step].to(x), prompt).value

    def roll(
        self, x: Tensor, prompt: Tensor, generator: torch.Generator, own: Tensor | None = None,
        everyone: int | None = None,
    ) -> Rollout:  # fmt: skip
        """The recipe's rollout from x under prompts (r,); the roots `own` of `everyone` of several processes."""
        store = "cpu" if self.config.trajectories == "cpu" else None
        s, plan = self.schedule, self.plan
        return roll(self.predict, x, prompt, s, plan, self.sde, self.noise_level, generator, store, own, everyone)

    @torch.no_grad()
    def ode(self, x: Tensor, prompt: Tensor) -> Tensor:
        """Where the ODE takes x, (r, ...)."""
        grid = self.schedule.times.to(x)
        for t, t_next in zip(grid[:-1], grid[1:], strict=True):
            x = euler(self.predict(x, t, prompt), t_next)
        return x

    def variance(self) -> float:
        """Of one prompt's images, the mean over prompts: fitted on 64 images, two or more of each."""
        prompts = len(self.config.prompts)
        each = max(2, 64 // prompts)
        chosen = torch.arange(min(prompts, 64 // each))
        x = self.model.noise(each * len(chosen), step_generator(self.config.seed, 0, stream=4))
        ends = self.ode(x, chosen.repeat_interleave(each))
        return ends.reshape(len(chosen), each, -1).var(1).mean().item()

    def names(self, prompt: Tensor) -> list[str]:
        """The words of prompts (n,)."""
        return [self.config.prompts[i] for i in prompt.tolist()]

    def value(self, prompt: Tensor) -> Value:
        """Differentiable rewards over alpha of clean states under prompts (n,)."""

        def value(x_0: Tensor) -> Tensor:
            return self.reward(self.model.decode(x_0, grad=True), self.names(prompt)) / self.config.temperature

        return value

    def judge(self, x_0: Tensor, prompt: Tensor) -> Tensor:
        """Rewards (m,) of clean states, decoded and judged in chunks: a black box judges while the next is decoded."""
        chunks = torch.arange(len(x_0)).split(self.config.chunk)
        images = ((self.model.decode(x_0[at].to(self.model.device)), self.names(prompt[at])) for at in chunks)
        return score_batches(self.reward, images).float()


def stochastic_step(config: AlignConfig, path: Path, name: str) -> tuple[Sde, float]:
    """The sampler's stochastic step and its noise. Raises InputError where the step does not fit the path."""
    flow = isinstance(path, RectifiedFlow)
    sde: Sde = ("flow-sde" if flow else "ddim") if config.sde == "auto" else config.sde
    if (sde == "ddim-uniform") if flow else not sde.startswith("ddim"):
        fits = "flow-sde, dance-sde, cps or ddim" if flow else "ddim or ddim-uniform"
        raise InputError(f"sde '{sde}' does not fit the path of {name}; use {fits}")
    return sde, NOISE[sde] if config.noise_level is None else config.noise_level


def _plan(config: AlignConfig, s: Schedule) -> Plan:
    """Raises InputError where no step is drawn or branched although the estimator learns from such steps."""
    K = len(s)
    drawn = is_stochastic(s, config.window)
    if config.rollout == "ode":
        drawn = torch.full((K,), config.estimator in REGRESSIONS)  # of an ODE: where states are kept
        if config.window:
            drawn[: config.window[0]] = False
            drawn[config.window[1] + 1 :] = False
    else:
        if config.last_step == "ode":
            drawn[-1] = False
        learns = drawn if config.last_step == "train" else drawn[:-1]
        if config.estimator not in ("nft", "awm", "pathwise") and not bool(learns.any()):
            raise InputError(
                f"steps={config.steps} and window={config.window} leave no step with a density, which estimator "
                f"'{config.estimator}' learns from; use more steps, or a window that is not the last step"
            )
    branches = torch.ones(K, dtype=torch.long)
    if config.rollout in ("branches", "tree"):
        given = list(config.branches) * (K if len(config.branches) == 1 else 1)
        branches = torch.zeros_like(branches) if config.rollout == "branches" else branches
        branches[: len(given)] = torch.tensor(given)[:K]
        branches[~drawn] = 0 if config.rollout == "branches" else 1
        if int(branches.max()) < 1:
            raise InputError(f"branches={config.branches} leaves no branch at a step that is drawn; widen the window")
    return Plan(config.rollout, branches, drawn)
