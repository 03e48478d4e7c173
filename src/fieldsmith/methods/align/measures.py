"""How far a policy went, exactly: the KL of its stochastic steps to the reference's."""

from __future__ import annotations

import torch

from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.losses import gaussian_kl
from fieldsmith.methods.align.schedule import Schedule, schedule
from fieldsmith.models.core import Model
from fieldsmith.paths import RectifiedFlow
from fieldsmith.samplers import Sde, gaussian_step
from fieldsmith.training import step_generator


@torch.no_grad()
def path_kl(model: Model, config: AlignConfig, each: int = 4) -> tuple[list[float], Schedule]:
    """KL(pi || pi_ref) in nats at every step of flow-sde (0.7) or ddim (1), by `each` rollouts of up to 64 prompts.

    One yardstick for all recipes, whatever they sampled with in training. Not counted as cost.
    """
    flow = isinstance(model.path, RectifiedFlow)
    sde: Sde = "flow-sde" if flow else "ddim"
    level = 0.7 if flow else 1.0
    generator = step_generator(config.seed, 0, stream=12)
    prompts = config.prompts[:64]
    condition = model.encode(prompts)
    which = torch.arange(each * len(prompts)) % len(prompts)
    x, grid = model.noise(len(which), generator), model.grid(config.steps)
    s: Schedule | None = None
    found = []
    with model.uncounted():
        for k in range(config.steps):
            pred = model.predict(x, grid[k], condition[which], config.guidance)
            s = s or schedule(model.path, grid, pred.kind, sde, level)
            with model.reference():
                base = model.predict(x, grid[k], condition[which], config.guidance)
            found.append(float(gaussian_kl(pred.value, base.value, s.w[k].expand(len(x)).to(x.device)).mean()))
            x = gaussian_step(sde, pred, grid[k + 1], level, grid[1]).sample(generator)
    assert s is not None
    return found, s
