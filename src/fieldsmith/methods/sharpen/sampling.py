"""Against hallucination while sampling: a field that is steered away from a worse one, and draws.

In: a field (x_t, t) -> Prediction. Out: another field: steering away from a worse network (Karras et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fieldsmith.models.core import Condition, Model
from fieldsmith.paths import Kind, Prediction, RectifiedFlow, guide
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
        # both forms are one another's up to what x_t says, but eps says nothing of a flow's x_0 at t = 1
        form: Kind = "velocity" if isinstance(output.path, RectifiedFlow) else "eps"
        bad = getattr(worse(x_t, t), form)
        return replace(output, kind=form, value=guide(getattr(output, form), bad, scale))

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


def judges(world: Any) -> bool:
    """Whether a world says which images are valid: a user's own images may have no judge."""
    return getattr(world, "judges", True)


def spread(prompts: Sequence[str], n: int) -> list[str]:
    """n prompts, evenly from all."""
    return [prompts[i * len(prompts) // n] for i in range(n)]


@torch.no_grad()
def draw(
    model: Model,
    n: int,
    steps: int,
    seed: int,
    field: Field | None = None,
    variance: Variance = "small",
    batch: int = 256,
    prompts: Sequence[str] = (),
) -> Tensor:
    """n states by ancestral steps, on rectified flow by Euler's; equal seeds give equal starts and equal noise.

    `prompts` (n,) are asked for where no field is given; without any, the empty one. Counts no training cost.
    """
    generator = torch.Generator().manual_seed(seed)
    states = []
    with model.uncounted():
        for part in torch.arange(n).split(batch):
            asked = [prompts[i] for i in part.tolist()] if prompts else [""]
            one = field or conditioned(model, model.encode(asked))
            noise = model.noise(len(part), generator)
            states.append(ancestral(one, noise, model.grid(steps), generator, variance, model.clip))
    return torch.cat(states)
