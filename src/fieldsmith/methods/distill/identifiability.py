"""Every output-level objective is a quadratic form in the branch errors (e_c, e_u) at one input (DASH notes, 2.1).

L = [e_c e_u] Q [e_c e_u]^T. Q has full rank exactly where both branches, and so every guidance scale, are identified;
its null direction is what training leaves open, its condition number how unevenly it holds the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fieldsmith.methods.distill.objectives import Objective
from fieldsmith.paths import tag

Matrix = NDArray[np.float64]
SMALL = 1e-9  # relative to the largest eigenvalue: what counts as zero


def composite_form(w: float) -> Matrix:
    """Q of |w e_c - (w - 1) e_u|^2, (2, 2)."""
    row = np.array([w, 1 - w])
    return np.outer(row, row)


def composite_law(scales: Sequence[float] | str, t: float | None = None) -> Matrix:
    """Q of the composite term over its law of w: one value, ends of a uniform law, or 'tag' at time t (t None: all).

    For t uniform in [0, 1] TAG's average is taken over 1,000 times.
    """
    if isinstance(scales, str):
        times = np.arange(1000) / 1000 if t is None else np.array([t])
        return np.asarray(np.mean([composite_form(float(tag(time))) for time in times], axis=0))
    if len(scales) == 1:
        return composite_form(scales[0])
    if len(scales) > 2:
        return np.asarray(np.mean([composite_form(w) for w in scales], axis=0))
    low, high = scales
    mean, square = (low + high) / 2, (low**2 + low * high + high**2) / 3
    return np.array([[square, mean - square], [mean - square, square - 2 * mean + 1]])


def quadratic_form(objective: Objective, t: float | None = None) -> Matrix:
    """Q, (2, 2), with the anchor's part: its curvature is the conditional's, its target the noise."""
    q = np.diag([objective.imitation + objective.anchor, objective.unconditional]).astype(float)
    if objective.null_share is not None:
        q *= np.diag([1 - objective.null_share, objective.null_share])
    q += objective.gap * np.array([[1.0, -1.0], [-1.0, 1.0]])
    if objective.composite:
        q += objective.composite * composite_law(objective.scales, t)
    return q


@dataclass(frozen=True)
class Identifiability:
    """What an objective determines at one input: Q, its rank, the error (e_c, e_u) that it cannot see, its condition.

    `each_time` is the rank at a single time, which is lower than `rank` where only times together determine both.
    """

    form: Matrix
    rank: int
    each_time: int
    null_direction: tuple[float, float] | None
    condition: float

    def __str__(self) -> str:
        if self.null_direction is None:
            output = f"both branches identified, condition number {self.condition:.3g}"
            return output if self.each_time == 2 else f"{output} over all times, but rank 1 at each time"
        e_c, e_u = self.null_direction
        return f"rank {self.rank}: an error ({e_c:.3g}, {e_u:.3g}) of (conditional, unconditional) costs nothing"


def identifiability(objective: Objective) -> Identifiability:
    """Rank, null direction (of unit length, its larger entry positive) and condition number of the objective's Q."""
    if objective.guided_input:  # one branch taught at every w: nothing is left open
        return Identifiability(np.eye(1), 1, 1, None, 1.0)
    form = quadratic_form(objective)
    values, vectors = np.linalg.eigh(form)
    rank = int((values > SMALL * values[-1]).sum())
    at_one = np.linalg.eigvalsh(quadratic_form(objective, 0.5))
    each = int((at_one > SMALL * at_one[-1]).sum())
    if rank == 2:
        return Identifiability(form, 2, each, None, float(values[-1] / values[0]))
    lost = vectors[:, 0] * np.sign(vectors[np.abs(vectors[:, 0]).argmax(), 0])
    return Identifiability(form, rank, each, (float(lost[0]), float(lost[1])), float("inf"))


def unseen_error(objective: Objective, w: float) -> float:
    """What a unit of the null direction does to the guided prediction at scale w: 0 where nothing is left open."""
    lost = identifiability(objective).null_direction
    return 0.0 if lost is None else w * lost[0] - (w - 1) * lost[1]
