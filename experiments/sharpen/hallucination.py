"""How often a generator hallucinates, and the threshold of a detector that filters (VSM notes, 5 and 8.5).

In: flags (n,) bool of images, true where hallucinated, a tensor for each training seed. Out: a rate with intervals. An
image that cannot be read is flagged, never dropped. A threshold comes from valid images held out, never from the batch
that it judges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from fieldsmith.measure.intervals import Interval, percentile_interval, share


@dataclass(frozen=True)
class Hallucination:
    """The rate of hallucination over several training seeds.

    pooled: over all images, by Wilson, as if seeds did not matter. clustered: by bootstrap over seeds, then images
    within; None for one seed. detectable: the smallest difference of two such rates, in shares, that a test at 5 %
    finds with 80 % power, from the wider of both. unreadable: share of images that could not be read.
    """

    pooled: Interval
    clustered: Interval | None
    by_seed: tuple[float, ...]
    images: tuple[int, ...]
    detectable: float
    unreadable: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def hallucination(
    flags_by_seed: Sequence[Tensor],
    generator: torch.Generator,
    unreadable_by_seed: Sequence[Tensor] | None = None,
    draws: int = 2000,
    level: float = 0.95,
) -> Hallucination:
    """Raises ValueError without images, or where an unreadable image is not flagged."""
    flags = _joined(flags_by_seed)
    pooled = share(flags, level)
    unreadable = None if unreadable_by_seed is None else _joined(unreadable_by_seed)
    if unreadable is not None and bool((unreadable & ~flags).any()):
        raise ValueError("an unreadable image is not flagged; count it as hallucinated")
    rates = torch.stack([of_seed.double().mean() for of_seed in flags_by_seed]).cpu()
    n, k = pooled.n, round(pooled.value * pooled.n)
    raised = (k + 2) / (n + 4)  # Agresti and Coull's share: at a rate of 0 a difference still needs images to show
    error = math.sqrt(raised * (1 - raised) / n)
    clustered = None
    if len(flags_by_seed) > 1:
        drawn = _redrawn(flags_by_seed, rates, generator, draws)
        clustered = replace(percentile_interval(pooled.value, drawn, len(rates), level), unit="%")
        error = max(error, float(drawn.std()))
    return Hallucination(
        pooled,
        clustered,
        tuple(rates.tolist()),
        tuple(len(of_seed) for of_seed in flags_by_seed),
        detectable_difference(error),
        None if unreadable is None else share(unreadable, level),
    )


def detectable_difference(error: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Between two rates that each have the standard error `error`; a two-sided test."""
    z = NormalDist().inv_cdf
    return (z(1 - alpha / 2) + z(power)) * math.sqrt(2) * error


def _redrawn(flags_by_seed: Sequence[Tensor], rates: Tensor, generator: torch.Generator, draws: int) -> Tensor:
    """Pooled rates of seeds drawn with replacement, and of images within each, (draws,)."""
    sizes = torch.tensor([len(flags) for flags in flags_by_seed], dtype=torch.float64)
    rows = torch.randint(len(rates), (draws, len(rates)), generator=generator)
    # n images drawn with replacement of which a share p is flagged: a binomial count
    counts = torch.binomial(sizes[rows], rates[rows], generator=generator)
    return counts.sum(1) / sizes[rows].sum(1)


def _joined(by_seed: Sequence[Tensor]) -> Tensor:
    if not by_seed or any(not len(flags) for flags in by_seed):
        raise ValueError(f"{len(by_seed)} seeds, some perhaps without images; a rate needs images of every seed")
    return torch.cat(list(by_seed))


def threshold(scores_of_valid: Tensor, level: float = 0.05) -> float:
    """The score above which an image is flagged, so that a new valid one is with a chance of at most `level`.

    The split-conformal quantile of held-out valid images, exact at any n. Raises ValueError at too few for the level.
    """
    n = len(scores_of_valid)
    rank = math.ceil((n + 1) * (1 - level) - 1e-9)
    if not 0 < level < 1 or rank > n:
        raise ValueError(
            f"{n} valid scores cannot hold false alarms to {level}; take {math.ceil(1 / level) - 1} or more"
        )
    return float(scores_of_valid.double().kthvalue(rank).values)
