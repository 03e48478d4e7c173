"""Feature likelihood divergence (FLD; Jiralerspong et al., 2023): how likely test data are under what was generated.

In: features (n, d) of training, test and generated images, from one extractor. Out: a `Likelihood`. Low is good; unlike
a Frechet distance it rises when a generator copies its training data: a narrow density at each copy explains training
images and no others. Widths are fitted, so images too close to the centre of their mode cost nothing. On valid images
alone it has a selection effect, since the images most unlike data are gone: print the kept share beside it, and compare
arms that were filtered alike.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

CENTRES = 10_000  # generated rows at most
BROAD = 0.9  # distances to the broad density's centre, as if rows were this much nearer to it


@dataclass(frozen=True)
class Likelihood:
    """value = 100 (nll - baseline), both a dimension and on the same test rows; counts of rows, of centres used."""

    value: float
    nll: float
    baseline: float
    train: int
    test: int
    centres: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def feature_likelihood(
    train: Tensor, test: Tensor, made: Tensor, generator: torch.Generator, epochs: int = 50
) -> Likelihood:
    """FLD of `made`: densities at made rows, widths fitted to train rows, judged on test rows.

    The baseline has half of the train rows as centres and is fitted to the others, so that 0 is as good as data. Raises
    ValueError below 2 rows of test or made, 4 of train, at unequal d or values that are not finite.
    """
    for name, rows, least in (("train", train, 4), ("test", test, 2), ("made", made, 2)):
        if rows.ndim != 2 or rows.shape[1] != test.shape[1] or len(rows) < least:
            raise ValueError(
                f"{name} features of shape {tuple(rows.shape)}; FLD needs ({least} or more, {test.shape[-1]})"
            )
        if not rows.isfinite().all():
            raise ValueError(f"{name} features hold NaN or infinity; look at the images and the extractor first")
    train, test, made = (rows.detach().double() for rows in (train, test, made))
    mean, deviation = test.mean(0), test.std(0)
    scale = torch.where(deviation > 0, deviation, 1)  # a feature that is constant says nothing
    train, test, made = ((rows - mean) / scale for rows in (train, test, made))
    made = made[torch.randperm(len(made), generator=generator)[:CENTRES]]
    train = train[torch.randperm(len(train), generator=generator)]
    half = min(len(made), len(train) // 2)
    nll = _nll(test, made, fitted_log_variances(train, made, epochs))
    baseline = _nll(test, train[:half], fitted_log_variances(train[half:], train[:half], epochs))
    return Likelihood(100 * (nll - baseline), nll, baseline, len(train), len(test), len(made))


def fitted_log_variances(x: Tensor, centres: Tensor, epochs: int = 50) -> Tensor:
    """Log-variances (m,) of isotropic densities at centres (m, d) under which x (n, d) are likeliest, by Adam.

    While fitting, one broad density around x's mean takes the rows that no centre is near to.
    """
    d = x.shape[1]
    squared = _squared_distances(x, centres)
    to_mean = BROAD**2 * (x - x.mean(0)).square().sum(1, keepdim=True)
    log_variances = ((squared.min(0).values + 1e-3) / d).log().requires_grad_()
    broad = torch.zeros((), dtype=torch.float64, device=x.device, requires_grad=True)
    adam = torch.optim.Adam([log_variances, broad], lr=0.5)
    with torch.enable_grad():
        for _ in range(epochs):
            each = _log_normal(squared, log_variances, d) - math.log(len(centres))
            loss = -torch.cat((each, _log_normal(to_mean, broad, d)), 1).logsumexp(1).mean() / d
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                log_variances.clamp_(-40, 20)  # where rows are equal to centres, the likeliest variance is 0
    return log_variances.detach()


def _nll(x: Tensor, centres: Tensor, log_variances: Tensor) -> float:
    """Mean negative log-likelihood of x a dimension, without the broad density."""
    d = x.shape[1]
    each = _log_normal(_squared_distances(x, centres), log_variances, d) - math.log(len(centres))
    return -float(each.logsumexp(1).mean()) / d


def _log_normal(squared: Tensor, log_variance: Tensor, d: int) -> Tensor:
    return -squared / (2 * log_variance.exp()) - d / 2 * (log_variance + math.log(2 * math.pi))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    # the matrix-product route rounds the distance of a row to its twin away from 0
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
