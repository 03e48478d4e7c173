"""What a generator's valid images cover, and how well a score finds the hallucinated ones (VSM notes, 5 and 8.5).

In: contents of valid images; scores (n,), high where suspicious, and labels (n,) bool, true where hallucinated. An
image that cannot be read counts as hallucinated.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

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


# how well a score finds hallucinations


def auroc(scores: Tensor, labels: Tensor) -> float:
    """The chance that a hallucinated image scores above a valid one, ties counting half."""
    scores, labels = _checked(scores, labels)
    return float(roc_auc_score(labels, scores))


def tpr_at(scores: Tensor, labels: Tensor, fpr: float = 0.05) -> float:
    """The largest share of hallucinated images that a threshold removes with at most `fpr` of the valid ones."""
    scores, labels = _checked(scores, labels)
    removed_valid, removed_hallucinated, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(removed_hallucinated[removed_valid <= fpr + 1e-12].max())


def _checked(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    scores, labels = scores.detach().cpu().double(), labels.cpu()
    if scores.shape != labels.shape or scores.ndim != 1 or labels.dtype != torch.bool:
        raise ValueError(f"scores {tuple(scores.shape)}, labels {tuple(labels.shape)} {labels.dtype}; need (n,), bool")
    if not bool(labels.any()) or bool(labels.all()):
        raise ValueError("all images have the same label; a detector needs hallucinated and valid ones to tell apart")
    if bool(scores.isnan().any()):
        raise ValueError("a score is NaN; look at the chain that gave it")
    return scores, labels
