"""Who gets which advantage in a group of sessions (MT-EditFlow notes, 2.4): pure functions of scores.

In: scores (P, G, T) of P sessions, each run G times, T turns, in [0, 1]. Out: advantages of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Aggregate = Literal["mean", "product", "geometric", "min", "prefix"]
Credit = Literal["broadcast", "turn", "to-go"]
Fusion = Literal["reward", "advantage", "gdpo"]


def aggregate(scores: Tensor, how: Aggregate) -> Tensor:
    """One score a session, (...), of its turns' (..., T).

    mean; product (session success where scores are 0 or 1); geometric, its T-th root: the same order, other distances;
    min; prefix: the mean over turns of the product up to there, the dense form of EdiVal's cumulative success.
    """
    if how == "mean":
        return scores.mean(-1)
    if how == "min":
        return scores.amin(-1)
    if how == "prefix":
        return scores.cumprod(-1).mean(-1)
    product = scores.prod(-1)
    return product if how == "product" else product.clamp(min=0) ** (1 / scores.shape[-1])


def returns(scores: Tensor, credit: Credit, how: Aggregate, discount: float = 1.0, last_only: bool = False) -> Tensor:
    """What each turn answers for, (P, G, T).

    broadcast: the whole session's aggregate at every turn, equation (23): with it the policy gradient of the aggregate
    has no bias, whatever the aggregate. turn: its own score, which forgets what a turn does to those after it. to-go:
    sum over t' >= t of discount^(t' - t) times the score, equation (25): no bias for sums. `last_only`: the last
    turn's score in place of the aggregate.
    """
    if credit == "turn":
        return scores
    if credit == "broadcast":
        whole = scores[..., -1] if last_only else aggregate(scores, how)
        return whole[..., None].expand_as(scores)
    to_go = torch.zeros_like(scores)
    ahead = torch.zeros_like(scores[..., 0])
    for t in reversed(range(scores.shape[-1])):
        ahead = scores[..., t] + discount * ahead
        to_go[..., t] = ahead
    return to_go


def normalise(values: Tensor, floor: float, over_all: bool = False) -> Tensor:
    """(value - mean) / max(deviation, floor) over the group, dimension 1; the deviation without Bessel's correction,
    of the group or of all groups.

    The floor keeps a reward that hardly differs, such as consistency among siblings that drift alike, from being blown
    up to unit variance.
    """
    spread = values.std((0, 1) if over_all else 1, correction=0, keepdim=True)
    return (values - values.mean(1, keepdim=True)) / spread.clamp(min=floor)


def fuse(
    rewards: Sequence[Tensor], weights: Sequence[float], fusion: Fusion, floor: float, over_all: bool = False
) -> Tensor:
    """Advantages (P, G, T) of several rewards' returns (P, G, T).

    reward: z(sum w R / sum w), equation (21), where whichever varies most owns the gradient. advantage: sum w z(R) over
    the root of sum w^2, equation (22). gdpo: that, normalised once more over the whole batch.
    """
    if fusion == "reward":
        return normalise(_mean(rewards, weights), floor, over_all)
    length = sum(w * w for w in weights) ** 0.5
    advantage = torch.stack(
        [w / length * normalise(r, floor, over_all) for w, r in zip(weights, rewards, strict=True)]
    ).sum(0)
    if fusion == "gdpo":
        advantage = (advantage - advantage.mean()) / advantage.std(correction=0).clamp(min=floor)
    return advantage


def spread(rewards: Sequence[Tensor], weights: Sequence[float], fusion: Fusion) -> Tensor:
    """How far apart a group's rewards are, (P, T): the deviation of their mean where they are fused as rewards, else
    the largest of their deviations. Of rewards as they are: normalised ones all have deviation 1."""
    apart = [_mean(rewards, weights)] if fusion == "reward" else rewards
    return torch.stack([r.std(1, correction=0) for r in apart]).amax(0)


def _mean(rewards: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * r for w, r in zip(weights, rewards, strict=True)]).sum(0) / sum(weights)


def keep(apart: Tensor, score: Tensor, min_spread: float, max_mean: float) -> Tensor:
    """Which turns of which groups teach anything, (P, T) bool: `apart` (P, T), the deviation of the group's rewards, is
    above `min_spread`, and their score (P, G, T) is below `max_mean` on average (1 or more: whatever it is)."""
    hard = (score.mean(1) < max_mean) | torch.tensor(max_mean >= 1)
    return (apart > min_spread) & hard
