"""Distillation losses on plain tensors (DASH notes, 3.1 and 8); they know no model, optimiser or accelerator.

A state serves a pair of branches, or one branch alone. Every loss is one number a row; `weighted` takes the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def square(a: Tensor, b: Tensor) -> Tensor:
    """Mean over a row's numbers of (a - b)^2, (batch,)."""
    return (a - b).square().flatten(1).mean(1)


def pair_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    noise: Tensor,
    *,
    imitation: float = 1.0,
    unconditional: float = 1.0,
    anchor: float = 0.1,
    gap: float = 0.0,
    composite: float = 0.0,
    scale: Tensor | None = None,
) -> Tensor:
    """The weighted terms of (conditional, unconditional) branches, each (batch, ...); (batch,).

    DASH Eq. 4-7 with its defaults: |e_c|^2 + |e_u|^2 + 0.1 |s_c - noise|^2; `noise` is the truth in the networks' own
    form of prediction. `gap` weighs |e_c - e_u|^2, `composite` |w e_c - (w - 1) e_u|^2 at w = scale (batch,).
    """
    (s_c, s_u), (t_c, t_u) = student, teacher
    total = imitation * square(s_c, t_c) + unconditional * square(s_u, t_u)
    if anchor:
        total = total + anchor * square(s_c, noise)
    if gap:
        total = total + gap * square(s_c - s_u, t_c - t_u)
    if composite and scale is not None:
        w = scale.reshape(-1, *(1,) * (s_c.ndim - 1)).to(s_c)
        total = total + composite * square(s_u + w * (s_c - s_u), t_u + w * (t_c - t_u))
    return total


def row_loss(
    student: Tensor,
    target: Tensor,
    noise: Tensor,
    null: Tensor,
    *,
    imitation: float = 1.0,
    unconditional: float = 1.0,
    anchor: float = 0.1,
    share: float | None = None,
) -> Tensor:
    """Rows of one branch each: `null` (batch,) says which are the unconditional one; (batch,).

    With the null `share` q, null rows count 1 / q and the others 1 / (1 - q), so that the expectation is that of
    `pair_loss` whatever q is; None counts rows as they fall, which is label dropout.
    """
    kept = imitation * square(student, target) + (anchor * square(student, noise) if anchor else 0.0)
    alone = unconditional * square(student, target)
    if share is not None:
        kept, alone = kept / (1 - share), alone / share
    return torch.where(null, alone, kept)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over places of the mean squared difference of features, already brought to one width; ()."""
    return torch.stack([(a - b).square().mean() for a, b in zip(student, teacher, strict=True)]).sum()


def weighted(losses: Tensor, weights: Tensor, every: Tensor | None = None, rows: int | None = None) -> Tensor:
    """Mean of weights * losses, both (n,), over the `rows` of a batch (n where all are here); ().

    `every` are the weights of all of a batch's rows, by whose mean it is divided, as DASH's code does.
    """
    if every is not None:
        return (weights / torch.linalg.vector_norm(every, 1).clamp(min=1e-12) * losses).sum()
    return (weights * losses).sum() / (rows or len(losses))
