"""What stays the same over a run of `align`: the model, prompts encoded once, the schedule, who branches where.

In: a model, a configuration, a reward. Out: a Setting, through which everything else speaks to model and reward.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.errors import InputError, RunError
from fieldsmith.methods.align.config import REGRESSIONS, AlignConfig
from fieldsmith.methods.align.guidance import Place, Value
from fieldsmith.methods.align.rollouts import Plan, Rollout, roll
from fieldsmith.methods.align.schedule import Schedule, schedule, strength
from fieldsmith.models.core import Condition, Model, stack
from fieldsmith.paths import Prediction, RectifiedFlow
from fieldsmith.rewards import Reward
from fieldsmith.rewards.combined import Asynchronous
from fieldsmith.samplers import Sde, euler
from fieldsmith.training import step_generator

NOISE = {"flow-sde": 0.7, "dance-sde": 0.3, "cps": 0.8, "ddim": 1.0, "ddim-uniform": 4.5}


@dataclass(frozen=True)
class Setting:
    """Everything that stays the same over a run: model, prompts encoded once, schedule, plan."""

    model: Model
    config: AlignConfig
    reward: Reward
    prompts: tuple[str, ...]
    condition: Condition
    s: Schedule
    plan: Plan
    sde: Sde
    noise_level: float
    prior: float  # the variance of what the model makes, for the strength 'jacobian'
    prepared: int  # forward-equivalents that preparation took

    @staticmethod
    def of(model: Model, config: AlignConfig, reward: Reward) -> Setting:
        if not config.prompts:
            raise InputError("no prompts given; add --prompts WORDS or a text file with a prompt a line")
        flow = isinstance(model.path, RectifiedFlow)
        sde: Sde = ("flow-sde" if flow else "ddim") if config.sde == "auto" else config.sde
        if (sde == "ddim-uniform") if flow else not sde.startswith("ddim"):
            fits = "flow-sde, dance-sde, cps or ddim" if flow else "ddim or ddim-uniform"
            raise InputError(f"sde '{sde}' does not fit the path of {model.name}; use {fits}")
        level = NOISE[sde] if config.noise_level is None else config.noise_level
        prompts = torch.arange(len(config.prompts)).split(64)
        condition = stack([model.encode([config.prompts[i] for i in part.tolist()]) for part in prompts])
        grid = model.grid(config.steps)
        with torch.no_grad(), model.uncounted():
            kind = model.predict(model.noise(1, step_generator(config.seed, 0, stream=1)), grid[0], condition[:1]).kind
        s = schedule(model.path, grid, kind, sde, level)
        first = Setting(model, config, reward, config.prompts, condition, s, _plan(config, s), sde, level, 1.0, 0)
        if config.strength != "jacobian":
            return first
        # J is of one prompt's images: the variance within prompts, fitted on 64 images, two or more of each
        each = max(2, 64 // len(config.prompts))
        chosen = torch.arange(min(len(config.prompts), 64 // each))
        x = model.noise(each * len(chosen), step_generator(config.seed, 0, stream=4))
        with model.count_nfe() as nfe:
            ends = first.ode(x, chosen.repeat_interleave(each))
        prior = ends.reshape(len(chosen), each, -1).var(1).mean().item()
        return replace(first, prior=prior, prepared=nfe.total)

    def predict(self, x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
        """The network, in chunks where nothing needs its gradient."""
        t = t.to(x).expand(len(x))
        if torch.is_grad_enabled() or len(x) <= self.config.chunk:
            return self.model.predict(x, t, self.condition[prompt], self.config.guidance)
        parts = [
            self.model.predict(x[at], t[at], self.condition[prompt[at]], self.config.guidance)
            for at in torch.arange(len(x)).split(self.config.chunk)
        ]
        return Prediction(parts[0].kind, torch.cat([p.value for p in parts]), x, t, parts[0].path)

    @property
    def eta(self) -> Tensor:
        """VGG-Flow's share of the reward's gradient by step, (K,): gamma over |kappa|."""
        return strength(self.config.strength, self.s).pull / self.s.kappa.abs()

    def place(self, prompt: Tensor) -> Place:
        """The field under prompts (n,)."""
        return lambda x, t: self.predict(x, t, prompt)

    def output(self, x: Tensor, step: Tensor, prompt: Tensor) -> Tensor:
        """The network's own output at rows (n, ...), on the model's device; gradients flow if they are enabled."""
        x = x.to(self.model.device)
        return self.predict(x, self.s.times[step].to(x), prompt).value

    def roll(self, x: Tensor, prompt: Tensor, generator: torch.Generator) -> Rollout:
        """The recipe's rollout from x under prompts (r,)."""
        store = "cpu" if self.config.trajectories == "cpu" else None
        return roll(self.predict, x, prompt, self.s, self.plan, self.sde, self.noise_level, generator, store)

    @torch.no_grad()
    def ode(self, x: Tensor, prompt: Tensor) -> Tensor:
        """Where the ODE takes x, (r, ...)."""
        grid = self.s.times.to(x)
        for t, t_next in zip(grid[:-1], grid[1:], strict=True):
            x = euler(self.predict(x, t, prompt), t_next)
        return x

    def value(self, prompt: Tensor) -> Value:
        """Differentiable rewards over alpha of clean states under prompts (n,)."""

        def value(x_0: Tensor) -> Tensor:
            images = self.model.decode(x_0, grad=True)
            given = self.reward(images, [self.prompts[i] for i in prompt.tolist()])
            _check_rewards(given, len(x_0), self.reward.name)
            return given / self.config.temperature

        return value

    @torch.no_grad()
    def judge(self, x_0: Tensor, prompt: Tensor) -> Tensor:
        """Rewards (m,), decoded and judged in chunks; a black box judges one chunk while the next is decoded."""
        parts: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            queue = None if self.reward.differentiable else stack.enter_context(Asynchronous(self.reward))
            for at in torch.arange(len(x_0)).split(self.config.chunk):
                images = self.model.decode(x_0[at].to(self.model.device))
                asked = [self.prompts[i] for i in prompt[at].tolist()]
                if queue and processes.is_main():  # the others hear what it was told
                    queue.submit(images, asked)
                elif not queue:
                    parts.append(self.reward(images, asked))
            found = processes.once(queue.results) if queue else parts
            rewards = torch.cat([part.float().cpu() for part in found])
        _check_rewards(rewards, len(x_0), self.reward.name)
        return rewards


def _check_rewards(rewards: Tensor, n: int, name: str) -> None:
    """Raises RunError where they are not one finite number an image."""
    if rewards.shape != (n,):
        raise RunError(f"reward '{name}' gave {tuple(rewards.shape)} for {n} images; it must give one number each")
    bad = int((~rewards.isfinite()).sum())
    if bad:
        raise RunError(f"reward '{name}' gave NaN or infinity for {bad} of {n} images")


def _plan(config: AlignConfig, s: Schedule) -> Plan:
    K = len(s)
    drawn = s.noisy.clone()
    if config.rollout == "ode":
        drawn = torch.full((K,), config.estimator in REGRESSIONS)  # of an ODE: where states are kept
    if config.window:
        drawn[: config.window[0]] = False
        drawn[config.window[1] + 1 :] = False
    children = torch.ones(K, dtype=torch.long)
    if config.rollout in ("branches", "tree"):
        given = list(config.branches) * (K if len(config.branches) == 1 else 1)
        children = torch.zeros_like(children) if config.rollout == "branches" else children
        children[: len(given)] = torch.tensor(given)[:K]
        children[~drawn] = 0 if config.rollout == "branches" else 1
        if int(children.max()) < 1 or (config.rollout == "tree" and not bool(drawn.any())):
            raise InputError(f"branches={config.branches} leaves no branch at a step that is drawn; widen the window")
    return Plan(config.rollout, children, drawn)


def named_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Prompts as they are, or the lines of the one text file named. Raises InputError where it cannot be read."""
    if len(prompts) != 1 or not (_is_file(prompts[0]) or prompts[0].endswith(".txt")):
        return tuple(prompts)
    try:
        lines = pathlib.Path(prompts[0]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompt file '{prompts[0]}' cannot be read as UTF-8 text ({error}); write a prompt a line"
        ) from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise InputError(f"prompt file '{prompts[0]}' has no line with words in it; write a prompt a line")
    return found


def _is_file(name: str) -> bool:
    try:
        return pathlib.Path(name).is_file()
    except OSError:  # a prompt longer than a file's name may be
        return False
