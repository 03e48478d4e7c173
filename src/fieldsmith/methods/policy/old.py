"""The policy that makes DiffusionNFT's collections, where it is a slower average of the one that trains.

In: a model's trainable weights and a schedule's name. Out: their averages, which follow once an epoch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fieldsmith.models.core import Model

Old = Literal["fresh", "ramp", "late", "slow"]


def kept(old: Old, updates: int) -> float:
    """eta after so many updates of theta_old <- eta theta_old + (1 - eta) theta: 0, rising by 0.001 an update to 0.5,
    by 0.0075 from update 75 on to 0.999, or 0.8. ramp and late are DiffusionNFT's, as released."""
    if old == "ramp":
        return min(0.001 * updates, 0.5)
    if old == "late":
        return min(max(0.0075 * (updates - 75), 0.0), 0.999)
    return 0.8 if old == "slow" else 0.0


def copies(model: Model, old: Old) -> dict[str, Tensor]:
    """The old policy's weights, for checkpoints to hold as parameters without gradient; none where it is the new."""
    return {} if old == "fresh" else {f"old.{name}": p.detach().clone() for name, p in model.trainable().items()}


@torch.no_grad()
def follow(model: Model, weights: dict[str, Tensor], old: Old, updates: int) -> None:
    """The old policy after an epoch that ends with `updates` updates done, in place."""
    eta = kept(old, updates)
    for name, p in model.trainable().items() if weights else ():
        before = weights[f"old.{name}"]
        before.copy_(eta * before + (1 - eta) * p)


@contextlib.contextmanager
def in_place(model: Model, weights: dict[str, Tensor]) -> Iterator[None]:
    """The old policy in the present one's place, where there is one."""

    def swap() -> None:
        with torch.no_grad():
            for name, p in model.trainable().items() if weights else ():
                before = weights[f"old.{name}"]
                present = p.detach().clone()
                p.copy_(before)
                before.copy_(present)

    swap()
    try:
        yield
    finally:
        swap()
