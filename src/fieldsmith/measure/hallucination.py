"""How often a generator hallucinates, whether a method changed that, and how well a score finds it (VSM notes, 5, 8.5).

In: flags (n,) bool of images, true where hallucinated, a tensor for each training seed; contents of valid images;
scores (n,), high where suspicious. Out: rates with intervals, curves. An image that cannot be read is flagged, never
dropped. A threshold comes from valid images held out, never from the batch that it judges.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
from sklearn.metrics import roc_auc_score, roc_curve
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


# what valid images show


@dataclass(frozen=True)
class Coverage:
    """How many of `support` contents n valid images show, and how many a uniform generator would in as many."""

    found: int
    support: int
    expected: float
    n: int

    @property
    def share(self) -> float:
        """Of all contents: for a support that n exhausts."""
        return self.found / self.support

    @property
    def relative(self) -> float:
        """To a uniform generator's: for a larger support; 1 in mean if uniform, small if images repeat."""
        return self.found / self.expected


def coverage(contents: Sequence[Hashable], support: int) -> Coverage:
    """Of valid images' contents. Raises ValueError without any, or at more kinds than the support has."""
    found, n = len(set(contents)), len(contents)
    if not 0 < found <= support:
        raise ValueError(f"{found} contents in {n} images of a support of {support}; pass valid images only")
    return Coverage(found, support, -support * math.expm1(n * math.log1p(-1 / support)) if support > 1 else 1.0, n)


# how well a score finds hallucinations: scores (n,), high where suspicious; labels (n,) bool, true where hallucinated


def auroc(scores: Tensor, labels: Tensor) -> float:
    """The chance that a hallucinated image scores above a valid one, ties counting half."""
    scores, labels = _checked(scores, labels)
    return float(roc_auc_score(labels, scores))


def tpr_at(scores: Tensor, labels: Tensor, fpr: float = 0.05) -> float:
    """The largest share of hallucinated images that a threshold removes with at most `fpr` of the valid ones."""
    scores, labels = _checked(scores, labels)
    removed_valid, removed_hallucinated, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(removed_hallucinated[removed_valid <= fpr + 1e-12].max())


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


def _joined(by_seed: Sequence[Tensor]) -> Tensor:
    if not by_seed or any(not len(flags) for flags in by_seed):
        raise ValueError(f"{len(by_seed)} seeds, some perhaps without images; a rate needs images of every seed")
    return torch.cat(list(by_seed))


def _checked(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    scores, labels = scores.detach().cpu().double(), labels.cpu()
    if scores.shape != labels.shape or scores.ndim != 1 or labels.dtype != torch.bool:
        raise ValueError(f"scores {tuple(scores.shape)}, labels {tuple(labels.shape)} {labels.dtype}; need (n,), bool")
    if not bool(labels.any()) or bool(labels.all()):
        raise ValueError("all images have the same label; a detector needs hallucinated and valid ones to tell apart")
    if bool(scores.isnan().any()):
        raise ValueError("a score is NaN; look at the chain that gave it")
    return scores, labels
