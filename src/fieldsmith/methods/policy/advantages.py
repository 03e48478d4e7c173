"""Rewards -> advantages within groups, and the optimality that forward losses take: pure functions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Advantage = Literal["std", "global-std", "mean", "leave-one-out", "raw"]
NORMALISED = ("std", "global-std")  # blind to the reward's scale


def advantages(
    returns: Tensor, group: Tensor, kind: Advantage, floor: float = 1e-4, deviation: float | None = None
) -> Tensor:
    """Rewards (n,) centred within groups (n,) of integers; (n,).

    std: over (deviation + floor), the deviation of the group without Bessel's correction, as Flow-GRPO has it.
    global-std: over (`deviation` + floor), that of all rewards of the collection, or of these where None is given, so
    that a group whose rewards hardly differ is not blown up to unit variance. mean: the group's mean includes the row
    itself, so k siblings shrink the estimate by 1 - 1 / k. leave-one-out: the mean of the others,
    unbiased; a row alone in its group has advantage 0. raw: as they are.
    """
    if kind == "raw":
        return returns
    _, at = torch.unique(group, return_inverse=True)
    n = torch.bincount(at).to(returns)
    zero = torch.zeros_like(n)
    mean = zero.index_add(0, at, returns) / n
    centred = returns - mean[at]
    if kind == "mean":
        return centred
    if kind == "leave-one-out":
        return centred * (n / (n - 1).clamp(min=1))[at]
    if kind == "global-std":
        return centred / ((returns.std(correction=0) if deviation is None else deviation) + floor)
    within = (zero.index_add(0, at, centred.square()) / n).sqrt()
    return centred / (within[at] + floor)


def optimality(advantage: Tensor, clip: float) -> Tensor:
    """r = 1/2 + A / (2 clip) in [0, 1], (n,): the probability of being optimal that DiffusionNFT weighs by."""
    return 0.5 + 0.5 * (advantage / clip).clamp(-1, 1)
