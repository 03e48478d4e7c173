"""Laplacian sharpening of a field while sampling (arXiv 2511.07496): an arm of the study."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fieldsmith.models.jacobians import rademacher
from fieldsmith.paths import Prediction, expand
from fieldsmith.samplers import Field


def laplacian(field: Field, strength: float, generator: torch.Generator, probes: int = 1, reach: float = 0.5) -> Field:
    """s - strength sigma^2 Lap(s): each step asks 1 + 2 `probes` times.

    The Laplacian, by Hutchinson, is the mean over Rademacher v of the second difference at x +- reach sigma v.
    """

    def sharper(x_t: Tensor, t: Tensor) -> Prediction:
        output = field(x_t, t)
        away = reach * output.path.sigma(t).to(x_t)
        eps, bend = output.eps, torch.zeros_like(x_t)
        for _ in range(probes):
            step = expand(away, x_t) * rademacher(x_t, generator)
            bend = bend + (field(x_t + step, t).eps - 2 * eps + field(x_t - step, t).eps) / probes
        return replace(output, kind="eps", value=eps - strength / reach**2 * bend)

    return sharper
