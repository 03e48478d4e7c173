"""What a multi-turn editor did, in EdiVal's terms and with its exposure bias (MT-EditFlow notes, 1.3 and 3.1).

In: verdicts done (n, T) bool and consistency (n, T) in [0, 1] of n sessions. Out: one `Interval` a turn, resampling
sessions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fieldsmith.measure.intervals import Interval, bootstrap, bootstraps

DRAWS = 1000
MEASURES = {
    "following": "instruction following (all turns up to there done)",
    "marginal": "turn done, whatever came before",
    "conditional": "turn done after all before it were",
    "teacher_forced": "turn done on the planned, clean source",
    "gap": "exposure gap: clean source less own source",
    "consistency": "consistency with the first image",
    "overall": "overall: root of following x consistency",
}


@dataclass(frozen=True)
class SessionVerdicts:
    """done (n, T): each turn's own verdict. consistency (n, T) against the first image. clean (n, T): verdicts of the
    same turns where each gets the planned image as its source, None where there is none."""

    done: Tensor
    consistency: Tensor
    clean: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {tuple(part.shape) for part in (self.done, self.consistency, self.clean) if part is not None}
        if len(shapes) != 1 or self.done.ndim != 2 or self.done.dtype != torch.bool:
            raise ValueError(f"shapes {sorted(shapes)} of {self.done.dtype}; give (n, T) bool and as many numbers")

    @property
    def prefix(self) -> Tensor:
        """Whether a turn and all before it were done, (n, T): EdiVal's image success."""
        return self.done.cumprod(1).bool()


def marginal(done: Tensor) -> Tensor:
    """m_t = P(S_t), (T,), equation (4)."""
    return done.float().mean(0)


def instruction_following(done: Tensor) -> Tensor:
    """F_t = P(S_1 ... S_t), (T,), equation (26)."""
    return done.float().cumprod(1).mean(0)


def conditional(done: Tensor) -> Tensor:
    """P(S_t | S_1 ... S_{t-1}), (T,), equation (7); NaN where no session got that far."""
    prefix = instruction_following(done)
    return prefix / torch.cat((torch.ones(1), prefix[:-1]))


def overall(done: Tensor, consistency: Tensor) -> Tensor:
    """O_t = sqrt(F_t x CC_t), (T,), equation (28)."""
    return (instruction_following(done) * consistency.mean(0)).sqrt()


def exposure_gap(done: Tensor, clean: Tensor) -> Tensor:
    """EB_t: how much more often a turn is done on the planned source than on the model's own, (T,), equation (6)."""
    return marginal(clean) - marginal(done)


@dataclass(frozen=True)
class Scores:
    """Everything by turn, each a tuple of T intervals in [0, 1] ('%')."""

    following: tuple[Interval, ...]
    marginal: tuple[Interval, ...]
    conditional: tuple[Interval, ...]
    consistency: tuple[Interval, ...]
    overall: tuple[Interval, ...]
    teacher_forced: tuple[Interval, ...]
    gap: tuple[Interval, ...]


def scores(verdicts: SessionVerdicts, seed: int = 0) -> Scores:
    """All of them with 95% intervals from resampled sessions; teacher_forced and gap are () without clean verdicts."""
    turns = verdicts.done.shape[1]
    table = torch.stack((verdicts.done.float(), verdicts.consistency.float()), 2)  # (n, T, 2)
    if verdicts.clean is not None:
        table = torch.cat((table, verdicts.clean.float()[:, :, None]), 2)

    def by_turn(rows: Tensor) -> Tensor:
        done, consistency = rows[..., 0], rows[..., 1]
        parts = [
            instruction_following(done), marginal(done), conditional(done).nan_to_num(0.0), consistency.mean(0),
            overall(done, consistency),
        ]  # fmt: skip
        if verdicts.clean is not None:
            parts += [marginal(rows[..., 2]), exposure_gap(done, rows[..., 2])]
        return torch.cat(parts)

    found = bootstraps(table, by_turn, torch.Generator().manual_seed(seed), DRAWS)
    shares = [replace(interval, unit="%") for interval in found]
    return Scores(*(tuple(shares[k * turns : (k + 1) * turns]) for k in range(len(fields(Scores)))))


def overall_change(before: SessionVerdicts, after: SessionVerdicts, seed: int = 0) -> Interval:
    """What O_T, overall at the last turn, gained, in percentage points: a 95% interval from resampled sessions, which
    are the same on both sides."""
    table = torch.stack([part.float() for one in (before, after) for part in (one.done, one.consistency)], 2)

    def gained(rows: Tensor) -> Tensor:
        was, now = (overall(rows[..., i], rows[..., i + 1])[-1] for i in (0, 2))
        return 100 * (now - was)

    return replace(bootstrap(table, gained, torch.Generator().manual_seed(seed), DRAWS), unit="points")
