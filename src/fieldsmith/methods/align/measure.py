"""What `align` looks at, before and after, at equal seeds: rewards, images of other prompts, and how far it went; of
preference pairs that were held out, how many it ranks as people did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.errors import InputError, RunError
from fieldsmith.measure import drawing
from fieldsmith.measure.drawing import sampler
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.dpo import margins
from fieldsmith.methods.policy.losses import gaussian_kl
from fieldsmith.methods.policy.schedule import Schedule, schedule
from fieldsmith.models.core import Model, predict_rows
from fieldsmith.paths import RectifiedFlow
from fieldsmith.previews import FEW, Preview
from fieldsmith.rewards.reward import Reward, score_batches
from fieldsmith.samplers import Sde, gaussian_step
from fieldsmith.training import step_generator
from fieldsmith.verb import Job, Side

MOST = 64  # prompts that are judged
TOGETHER = 256  # images that are judged at once


@dataclass(frozen=True)
class Measured:
    """What was seen of one model."""

    images: Tensor  # (n, 3, h, w) of the prompts that `asked` names
    rewards: Mapping[str, Tensor]  # (n,) by reward, the trained one first
    others: Tensor  # images of prompts that the run did not aim at
    kl: tuple[list[float], Schedule] | None = None  # nats by step, of the trained model
    margins: Tensor | None = None  # (n,) by how many nats it prefers the chosen images of pairs
    missing: Mapping[str, str] = field(default_factory=dict)  # why, by reward that failed


def measure(model: Any, config: AlignConfig, job: Job, side: Side) -> Measured:
    """Images of trained and of other prompts, judged by the reward and by those that were held out."""
    draw = sampler(model, max(drawing.STEPS, config.steps), config.guidance)
    prompts = asked(config)
    images = draw(prompts, config.seed + 7)
    rewards: dict[str, Tensor] = {}
    missing: dict[str, str] = {}
    for name, one in job.inputs.rewards.items():
        try:
            rewards[name] = _scores(one, images, prompts)
        except (InputError, RunError, OSError) as error:  # of one judge, which leaves what the others say
            missing[name] = str(error)
    others = draw(other_prompts(job), config.seed + 8)
    if side == "before":
        return Measured(images, rewards, others, missing=missing)
    preferred = margins(job.context) if job.context.pairs else None
    return Measured(images, rewards, others, path_kl(job.model, config), preferred, missing)


def preview(config: AlignConfig, job: Job) -> Preview:
    """Some of the run's prompts."""
    few = [config.prompts[i * len(config.prompts) // FEW] for i in range(FEW)]
    return Preview(
        few, lambda model: sampler(model, max(drawing.STEPS, config.steps), config.guidance)(few, config.seed + 7)
    )


def asked(config: AlignConfig) -> list[str]:
    """Up to MOST of the run's prompts, spread evenly, each as often as it is drawn."""
    few = min(MOST, len(config.prompts))
    some = [config.prompts[i * len(config.prompts) // few] for i in range(few)]
    return [prompt for prompt in some for _ in range(config.evaluate)]


def other_prompts(job: Job) -> list[str]:
    """Prompts that the run did not aim at, each as often as it is drawn: those given, else no prompt."""
    config: AlignConfig = job.context.config
    names = job.inputs.other_prompts
    if not names:
        try:
            job.model.encode([""])
            names = ("",)
        except InputError:  # a class-conditional model without a null class: the run's own
            names = config.prompts
    return [name for name in names for _ in range(max(4, config.evaluate))]


def _scores(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """Rewards (n,) of images; each process asks for its own part, and all hear all of them."""
    own = processes.owned(len(prompts))
    batches = ((images[at], [prompts[i] for i in at.tolist()]) for at in own.split(TOGETHER) if len(at))
    with processes.together():
        scores = score_batches(reward, batches) if len(own) else torch.zeros(0)
    return processes.gather(scores)


@torch.no_grad()
def path_kl(model: Model, config: AlignConfig, each: int = 4) -> tuple[list[float], Schedule]:
    """KL(pi || pi_ref) in nats at every step of flow-sde (0.7) or ddim (1), by `each` rollouts of up to 64 prompts.

    One yardstick for all recipes, whatever they sampled with in training. Not counted as cost.
    """
    flow = isinstance(model.path, RectifiedFlow)
    sde: Sde = "flow-sde" if flow else "ddim"
    level = 0.7 if flow else 1.0
    generator = step_generator(config.seed, 0, stream=12)
    prompts = config.prompts[:MOST]
    condition = model.encode(prompts)
    which = torch.arange(each * len(prompts)) % len(prompts)
    x, grid = model.noise(len(which), generator), model.grid(config.steps)
    s: Schedule | None = None
    kl = []
    with model.uncounted():
        for k in range(config.steps):
            pred = predict_rows(model, x, grid[k], condition, which, config.guidance)
            s = s or schedule(model.path, grid, pred.kind, sde, level)
            with model.reference():
                base = predict_rows(model, x, grid[k], condition, which, config.guidance)
            kl.append(float(gaussian_kl(pred.value, base.value, s.w[k].expand(len(x)).to(x.device)).mean()))
            x = gaussian_step(sde, pred, grid[k + 1], level, grid[1]).sample(generator)
    assert s is not None
    return kl, s
