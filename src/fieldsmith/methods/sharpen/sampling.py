"""Against hallucination while sampling: a field that is steered away from a worse one, and ancestral draws.

In: a field (x_t, t) -> Prediction. Out: another field: steering away from a worse network (Karras et al. 2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fieldsmith.models.core import Condition, Model
from fieldsmith.paths import Prediction
from fieldsmith.samplers import Field, Variance, ancestral


def field_of(model: Model) -> Field:
    """The model's unconditional field."""
    return conditioned(model, model.encode([""]))


def conditioned(model: Model, condition: Condition) -> Field:
    """The model's field under a condition of one row, or of one a state."""
    return lambda x_t, t: model.predict(x_t, t, condition)


def steered(field: Field, worse: Field, scale: float, window: tuple[float, float] = (0.0, 1.0)) -> Field:
    """worse + scale (field - worse) at noise levels sigma in the window: what both get wrong, the worse one more."""

    def away(x_t: Tensor, t: Tensor) -> Prediction:
        output = field(x_t, t)
        sigma = float(output.path.sigma(t.flatten()[0]))
        if scale == 1.0 or not window[0] <= sigma <= window[1]:
            return output
        eps_worse = worse(x_t, t).eps
        return replace(output, kind="eps", value=eps_worse + scale * (output.eps - eps_worse))

    return away


class Steered:
    """A model whose field is steered away from a worse network's; everything else is the model's own."""

    def __init__(self, model: Model, worse: Model, scale: float):
        self.model, self.worse, self.scale = model, worse, scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | None = None) -> Prediction:
        field = steered(conditioned(self.model, condition), conditioned(self.worse, condition), self.scale)
        return field(x_t, t)


@torch.no_grad()
def draw(
    model: Model,
    n: int,
    steps: int,
    seed: int,
    field: Field | None = None,
    variance: Variance = "small",
    batch: int = 256,
) -> Tensor:
    """n states by ancestral steps; equal seeds give equal starts and equal noise. Counts no training cost."""
    generator = torch.Generator().manual_seed(seed)
    field = field or field_of(model)
    with model.uncounted():
        states = [
            ancestral(field, model.noise(len(part), generator), model.grid(steps), generator, variance, model.clip)
            for part in torch.arange(n).split(batch)
        ]
    return torch.cat(states)
