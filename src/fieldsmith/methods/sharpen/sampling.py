"""Against hallucination while sampling: fields made sharper, and paths given up for others.

In: a field (x_t, t) -> Prediction, or a way to draw with scores of suspicion. Out: another field, or chosen samples.
Laplacian sharpening (arXiv 2511.07496); steering away from a worse network (Karras et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fieldsmith.models.core import Condition, Model
from fieldsmith.models.jacobians import rademacher
from fieldsmith.paths import Prediction
from fieldsmith.samplers import Field, Variance, ancestral


def field_of(model: Model) -> Field:
    """The model's unconditional field."""
    return conditioned(model, model.encode([""]))


def conditioned(model: Model, condition: Condition) -> Field:
    """The model's field under a condition of one row, or of one a state."""
    return lambda x_t, t: model.predict(x_t, t, condition)


def _with_eps(pred: Prediction, eps: Tensor) -> Prediction:
    return replace(pred, kind="eps", value=eps)


def laplacian(field: Field, strength: float, generator: torch.Generator, probes: int = 1, reach: float = 0.5) -> Field:
    """s - strength sigma^2 Lap(s): each step asks 1 + 2 `probes` times.

    The Laplacian, by Hutchinson, is the mean over Rademacher v of the second difference at x +- reach sigma v.
    """

    def sharper(x_t: Tensor, t: Tensor) -> Prediction:
        output = field(x_t, t)
        away = reach * output.path.sigma(t).to(x_t)
        eps, bend = output.eps, torch.zeros_like(x_t)
        for _ in range(probes):
            step = away.reshape(-1, *(1,) * (x_t.ndim - 1)) * rademacher(x_t, generator)
            bend = bend + (field(x_t + step, t).eps - 2 * eps + field(x_t - step, t).eps) / probes
        return _with_eps(output, eps - strength / reach**2 * bend)

    return sharper


def steered(field: Field, worse: Field, scale: float, window: tuple[float, float] = (0.0, 1.0)) -> Field:
    """worse + scale (field - worse) at noise levels sigma in the window: what both get wrong, the worse one more."""

    def away(x_t: Tensor, t: Tensor) -> Prediction:
        output = field(x_t, t)
        sigma = float(output.path.sigma(t.flatten()[0]))
        if scale == 1.0 or not window[0] <= sigma <= window[1]:
            return output
        eps_worse = worse(x_t, t).eps
        return _with_eps(output, eps_worse + scale * (output.eps - eps_worse))

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


@dataclass(frozen=True)
class Scored:
    """Samples (n, ...) and how suspicious each one's path was, (n,): higher is worse."""

    states: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Kept:
    """What a filter let through, and how many samples were drawn for each that was kept."""

    states: Tensor
    cost: float


def kept_below(draw_scored: Callable[[int, int], Scored], n: int, threshold: float, seed: int, most: int = 50) -> Kept:
    """n samples whose score is at most the threshold: `draw_scored(n, seed)` is asked until there are enough.

    Raises ValueError where `most` rounds do not suffice, since nearly nothing passes.
    """
    found: list[Tensor] = []
    drawn = have = 0
    for round_ in range(most):
        scored = draw_scored(n, seed + round_)
        drawn += n
        good = scored.states[scored.scores <= threshold]
        found.append(good)
        have += len(good)
        if have >= n:
            return Kept(torch.cat(found)[:n], drawn / have)
    raise ValueError(f"threshold={threshold:g} lets {have} of {drawn} samples through; raise it")
