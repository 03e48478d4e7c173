"""A pipeline's scheduler as a path and a grid of times; what other schedulers than those that are integrated mean.

Flows are integrated by Euler's steps, variance-preserving paths by DDIM's and DDPM's. A pipeline that ships another
solver of the same parametrisation is read for its schedule alone, which a warning says; one whose scheduler means
another parametrisation is refused, since the network would be misread.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.paths import Kind, VariancePreserving
from fieldsmith.samplers import ddim_grid

KINDS: dict[str, Kind] = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v_prediction"}
LOG = logging.getLogger(__name__)


# flows


def check_flow(scheduler: Any, name: str) -> None:
    """Raises InputError at a scheduler of another parametrisation than a flow's velocity; warns of another solver."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return
    kind, config = type(scheduler).__name__, scheduler.config
    if not kind.startswith("FlowMatch") and config.get("prediction_type") != "flow_prediction":
        raise InputError(
            f"the scheduler of {name} is a {kind} for '{config.get('prediction_type', 'other')}' predictions, but its "
            "network predicts a flow's velocity; put back a FlowMatchEulerDiscreteScheduler"
        )
    LOG.warning("%s ships a %s; fieldsmith takes Euler's steps on its times instead.", name, kind)


def euler_of(scheduler: Any) -> Any:
    """diffusers' Euler scheduler with the shifts of any flow scheduler; that one stays as it was."""
    known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    fields = {key: value for key, value in scheduler.config.items() if key in known}
    if "flow_shift" in scheduler.config:  # as other solvers name it
        fields["shift"] = scheduler.config.flow_shift
    return FlowMatchEulerDiscreteScheduler(**fields)


def dynamic_shift(config: Any, tokens: int, max_shift: float = 1.15) -> float:
    """The shift mu of a flow scheduler's config at this number of image tokens; `max_shift` where it names none."""
    mu: float = calculate_shift(
        tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5), config.get("max_shift", max_shift),
    )  # fmt: skip
    return mu


def flow_times(scheduler: Any, steps: int, mu: float) -> Tensor:
    """The times at which diffusers' flow scheduler itself steps, whatever shift, stretch or spacing it is set to.

    (steps + 1,), from 1 down to 0; `mu` is the dynamic shift, which static ones ignore. Raises InputError at a single
    step where the times are stretched, which needs two.
    """
    if steps < 2 and scheduler.config.get("shift_terminal"):
        raise InputError(f"steps={steps}: this pipeline stretches its times to a last one above 0; use 2 steps or more")
    euler = euler_of(scheduler)
    euler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    times: Tensor = euler.sigmas
    return times


# discrete training times


def check_discrete(scheduler: Any, name: str) -> None:
    """Raises InputError at a scheduler that is not of alphas_cumprod and eps, x_0 or v; warns of another solver."""
    kind, predicts = type(scheduler).__name__, scheduler.config.get("prediction_type", "other")
    if not hasattr(scheduler, "alphas_cumprod") or predicts not in KINDS or scheduler.config.get("use_flow_sigmas"):
        raise InputError(
            f"the scheduler of {name} is a {kind} for '{predicts}' predictions, but its network is of a family that "
            f"predicts {', '.join(KINDS)} on a DDPM schedule; put back a DDIMScheduler with its betas"
        )
    if not isinstance(scheduler, (DDIMScheduler, DDPMScheduler)):
        LOG.warning("%s ships a %s; fieldsmith takes DDIM's steps on its betas instead.", name, kind)


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
