"""What pipelines of discrete training times share: their schedule as a path, their steps' times, the network's index.

In: a diffusers scheduler with `alphas_cumprod`. Out: a VariancePreserving path, a grid of times for DDIM, indices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.paths import Kind, VariancePreserving
from fieldsmith.samplers import ddim_grid

KINDS: dict[str, Kind] = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v_prediction"}


def path_of(scheduler: Any, name: str) -> VariancePreserving:
    """The scheduler's path. Raises InputError where it ends without any signal."""
    if bool((scheduler.alphas_cumprod <= 0).any()):
        raise InputError(f"the schedule of {name} ends without any signal, where eps says nothing of x_0; "
                         "set rescale_betas_zero_snr=False in its scheduler")  # fmt: skip
    return VariancePreserving(scheduler.alphas_cumprod)


def scheduled_grid(path: VariancePreserving, config: Any, steps: int, name: str) -> Tensor:
    """Times for `steps` steps in the spacing of a scheduler's config, from noise to clean data at 0; (steps + 1,).

    Raises InputError at a spacing that steps cannot follow, ValueError at more steps than the path has times.
    """
    if config.timestep_spacing == "linspace":
        raise InputError(
            f"the scheduler of {name} spaces its steps as 'linspace', where diffusers' own steps miss their "
            "next time; set timestep_spacing to 'trailing' or 'leading'"
        )
    trailing = config.timestep_spacing == "trailing"
    grid = ddim_grid(path, steps, trailing)
    if not trailing:
        grid[:-1] += config.get("steps_offset", 0) / path.length
    return grid


def network_index(path: VariancePreserving, t: Tensor) -> Tensor:
    """The discrete index of t, in t's type; whole where t = (index + 1) / T only missed it by rounding."""
    index = path.index(t)
    whole = index.detach().round()
    return torch.where((index - whole).abs() < 1e-3, index + (whole - index).detach(), index)
