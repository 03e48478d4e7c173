"""The two branches of classifier-free guidance, as one network predicts them at the same states.

In: a model, states, conditions. Out: `Branches`, in the form in which the network predicts (eps, x_0, velocity).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith.models.core import Condition, Model, stack
from fieldsmith.paths import guide


@dataclass(frozen=True)
class Branches:
    """A network's predictions with its condition and without one, both (batch, ...)."""

    conditional: Tensor
    unconditional: Tensor

    @property
    def gap(self) -> Tensor:
        """The direction of guidance: conditional - unconditional."""
        return self.conditional - self.unconditional

    def guided(self, guidance: float | Tensor) -> Tensor:
        """unconditional + w gap."""
        return guide(self.conditional, self.unconditional, guidance)


def dropped(model: Model, condition: Condition, null: Tensor) -> Condition:
    """The condition (batch rows) with the model's null condition in the rows where `null` (batch,) is true."""
    if not null.any():
        return condition
    away = model.null.repeat(len(null)).parts
    return Condition(
        {name: torch.where(null.to(part.device).reshape(-1, *(1,) * (part.ndim - 1)), away[name], part)
         for name, part in condition.parts.items()},
        tuple("" if gone else word for word, gone in zip(condition.words, null.tolist(), strict=False)),
    )  # fmt: skip


def branches(model: Model, x_t: Tensor, t: Tensor, condition: Condition) -> Branches:
    """Both branches at x_t (batch, ...), t (batch,) in one forward of 2 x batch states.

    Raises InputError where the model has no null condition.
    """
    both = stack((condition.repeat(len(x_t)), model.null.repeat(len(x_t))))
    pred = model.predict(torch.cat((x_t, x_t)), torch.cat((t, t)), both)
    conditional, unconditional = pred.value.chunk(2)
    return Branches(conditional, unconditional)
