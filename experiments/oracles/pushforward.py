"""The law that a chain of ancestral steps ends in, without Monte Carlo, in 1 or 2 dimensions (VSM notes, 3.5 to 3.7).

In: a field, the grid of times that a sampler walks, one axis of points a dimension. Out: a `Mass`, atoms with weights,
and what it says of a mixture: the mass of each mode, between them, outside. All in float64.

A step moves the weight of each point to all points, by a normal density whose weights are made to sum to 1. In the
plane that is one product of two matrices, whatever the deviations depend on, since a diagonal normal density is a
product: about a second a step at 200 x 200 points. The last step has no noise: the points move and keep their weights.
The error of a step falls as exp(-2 pi^2 (deviation / spacing)^2): 3e-9 at spacing = deviation, 1e-4 at 1.5 deviations,
beyond which we refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.paths import Path, Prediction, VariancePreserving
from fieldsmith.samplers import Field, Variance, ancestral_step
from fieldsmith.worlds.mixtures import NOWHERE, Mixture

Covariance = Callable[[Tensor, Tensor], Tensor]  # x_t (n, d), t () -> diagonal of Cov[x_0 | x_t], (n, d)

NOTHING = 1e-22  # weights below take no part: all points of a plane over 300 steps lose less than 1e-14
COARSEST = 1.5  # spacing in deviations
FORGOTTEN = 1e-9  # mass that may stand where the deviation is too small for the spacing


def wide_linear() -> VariancePreserving:
    """Aithal et al.'s schedule of one dimension: T=1000, linear beta from 1e-3 to 0.2, ten times the usual one."""
    return VariancePreserving((1 - torch.linspace(1e-3, 0.2, 1000, dtype=torch.float64)).cumprod(0))


def last_steps(path: VariancePreserving, steps: int) -> Tensor:
    """Times of the last `steps` training times down to 0, (steps + 1,), in float64.

    300 of `wide_linear` do: by then alpha^2 is 1e-4, and a chain from N(0, I) ends as all 1000 would have it.
    """
    if not 1 <= steps <= path.length:
        raise ValueError(f"steps={steps}: this path has 1 to {path.length}")
    return torch.arange(steps, -1, -1, dtype=torch.float64) / path.length


@dataclass(frozen=True)
class Mass:
    """An atomic law: weights (n,) that sum to 1 at places (n, d)."""

    places: Tensor
    weights: Tensor

    def share(self, where: Tensor) -> float:
        """The mass of the places where (n,) bool is true."""
        return float(self.weights[where].sum())

    def mean(self, where: Tensor | None = None) -> Tensor:
        """Of all, or given that one is there, (d,)."""
        weights = self.weights if where is None else self.weights * where
        return weights @ self.places / weights.sum()

    def deviation(self, where: Tensor | None = None) -> Tensor:
        """Of each coordinate, of all or given that one is there, (d,)."""
        weights = self.weights if where is None else self.weights * where
        return (weights @ (self.places - self.mean(where)).square() / weights.sum()).sqrt()


def push_forward(
    field: Field,
    times: Tensor,
    axes: Sequence[Tensor],
    variance: Variance = "small",
    covariance: Covariance | None = None,
    start: Tensor | None = None,
) -> Mass:
    """The law of `samplers.ancestral`'s outcome along times, which end at 0, on the product of one or two axes.

    An axis is evenly spaced and rising. `start` are weights of the points, (n,) in the order of torch.cartesian_prod,
    N(0, I) by default; the 'optimal' variance needs a `covariance`. Raises ValueError where an axis is too coarse.
    """
    axes = [_checked_axis(axis) for axis in axes]
    if not 1 <= len(axes) <= 2:
        raise ValueError(f"{len(axes)} axes: laws are pushed forward in 1 or 2 dimensions; sample beyond")
    if times[-1] != 0 or len(times) < 2:
        raise ValueError(f"times end at {float(times[-1])}; the last step leads to data, t=0")
    points = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    weights = (-points.square().sum(1) / 2).exp() if start is None else start.double()
    weights = weights / weights.sum()
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        there = weights > NOTHING
        x, weights = points[there], weights[there]
        with torch.no_grad():
            output = _in_float64(field(x, t))
            step = ancestral_step(output, t_next, variance, None, covariance(x, t) if covariance else None)
        if t_next == 0:
            return Mass(step.mean, weights / weights.sum())
        deviation = step.deviation.expand(x.shape)
        _refuse_coarse(axes, deviation, weights, t)
        kernels = [_kernel(a, step.mean[:, i], deviation[:, i]) for i, a in enumerate(axes)]
        if len(kernels) == 1:
            weights = weights @ kernels[0]
        else:
            weights = ((weights[:, None] * kernels[0]).T @ kernels[1]).flatten()
    raise AssertionError("the last time is 0")


def _in_float64(pred: Prediction) -> Prediction:
    fraction = None if pred.fraction is None else pred.fraction.double()
    return Prediction(pred.kind, pred.value.double(), pred.x_t.double(), pred.t.double(), pred.path, fraction=fraction)


def _checked_axis(axis: Tensor) -> Tensor:
    axis = axis.double()
    if axis.ndim != 1 or len(axis) < 2 or not torch.allclose(axis.diff(), axis[1] - axis[0]) or axis[1] <= axis[0]:
        raise ValueError(
            f"an axis of shape {tuple(axis.shape)}; pass evenly spaced, rising points, as linspace has them"
        )
    return axis


def _kernel(axis: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """How each source (n,) spreads over an axis (k,), rows that sum to 1, (n, k)."""
    z = (axis - mean[:, None]).div_(deviation[:, None])
    return z.square_().mul_(-0.5).softmax(1)  # in logarithms, for means that lie beyond the axis


def _refuse_coarse(axes: Sequence[Tensor], deviation: Tensor, weights: Tensor, t: Tensor) -> None:
    for i, axis in enumerate(axes):
        spacing = float(axis[1] - axis[0])
        narrow = deviation[:, i] < spacing / COARSEST
        if float(weights[narrow].sum()) > FORGOTTEN:
            least = float(deviation[narrow, i].min())
            raise ValueError(
                f"points {spacing:.3g} apart are too coarse for the step at t={float(t):.4g}, whose deviation is "
                f"{least:.3g}; put them at most {least:.3g} apart"
            )


@dataclass(frozen=True)
class Modes:
    """What a law has in each mode of a mixture, within k of the mode's deviations, and what it has beyond all.

    masses (m,) and deviations (m, d) of the modes. `between` lies beyond, inside the box of the modes' centres, and
    `outside` beyond, outside it.
    """

    masses: Tensor
    deviations: Tensor
    between: float
    outside: float

    @property
    def beyond(self) -> float:
        """The hallucinated mass: in no mode."""
        return self.between + self.outside

    def to_json(self) -> dict[str, Any]:
        return {
            "masses": self.masses.tolist(),
            "deviations": self.deviations.tolist(),
            "between": self.between,
            "outside": self.outside,
        }


def gap_mass(mass: Mass, mixture: Mixture, deviations: float = 6.0) -> Modes:
    """Where a law lies, as `Mixture.membership` reads places."""
    mode = mixture.membership(mass.places, deviations)
    low, high = mixture.means.min(0).values, mixture.means.max(0).values
    outside = ((mass.places < low) | (mass.places > high)).any(1)
    beyond = mode == NOWHERE
    inside = [mode == j for j in range(len(mixture.weights))]
    return Modes(
        torch.stack([mass.weights[where].sum() for where in inside]),
        torch.stack([mass.deviation(where) for where in inside]),
        mass.share(beyond & ~outside),
        mass.share(beyond & outside),
    )


def posterior_covariance(mixture: Mixture, path: Path) -> Covariance:
    """The diagonal of Cov[x_0 | x_t] = sigma^2 / alpha^2 (I + sigma^2 J), J the Jacobian of the score (Tweedie)."""

    def covariance(x_t: Tensor, t: Tensor) -> Tensor:
        J = mixture.score_jacobian(x_t, t, path).diagonal(dim1=1, dim2=2)
        alpha2, sigma2 = path.alpha(t) ** 2, path.sigma(t) ** 2
        return (sigma2 / alpha2 * (1 + sigma2 * J)).clamp(min=0)

    return covariance


def smoothed_score_field(mixture: Mixture, path: Path, h: float) -> Field:
    """The exact score of a one-dimensional mixture, convolved in x with N(0, h^2), as a field of kind 'eps'.

    What a network too smooth for its data says, without a network (VSM notes, 3.7); at h = 0 the exact field, in any
    dimension. Differentiable in x; times are (). The convolution is tabulated once a time and read by cubic pieces that
    meet in value and slope: right to 1e-5 of the largest score.
    """
    if h < 0:
        raise ValueError(f"h={h}: a width is not negative")
    if h > 0 and mixture.means.shape[1] != 1:
        raise InputError(f"a mixture of {mixture.means.shape[1]} dimensions; scores are smoothed in 1")
    tables: dict[float, _Table] = {}

    def predict(x_t: Tensor, t: Tensor) -> Prediction:
        if h == 0:
            return Prediction("eps", mixture.eps(x_t, t, path), x_t, t, path)
        if t.ndim:
            raise ValueError(f"times of shape {tuple(t.shape)}; the smoothed field takes one time")
        if float(t) not in tables:
            tables[float(t)] = _tabulate(mixture, path, t, h)
        return Prediction("eps", -path.sigma(t).to(x_t) * tables[float(t)](x_t), x_t, t, path)

    return predict


@dataclass(frozen=True)
class _Table:
    """A function by its values and slopes at points `spacing` apart from `low`, straight beyond both ends."""

    low: float
    spacing: float
    values: Tensor
    slopes: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        place = (x - self.low) / self.spacing
        left = place.detach().floor().clamp(0, len(self.values) - 2).long()
        u = (place - left).clamp(0, 1)
        f0, f1 = self.values[left], self.values[left + 1]
        d0, d1 = self.spacing * self.slopes[left], self.spacing * self.slopes[left + 1]
        inside = f0 + u * (d0 + u * (3 * (f1 - f0) - 2 * d0 - d1 + u * (2 * (f0 - f1) + d0 + d1)))
        return inside + (place - left - u) * torch.where(place < 0, d0, d1)


def _tabulate(mixture: Mixture, path: Path, t: Tensor, h: float, reach: float = 8.0) -> _Table:
    """Score and Jacobian at t, convolved with N(0, h^2) by the trapezoid rule, `reach` beyond the outermost modes."""
    t = t.double()
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    centres = alpha * mixture.means[:, 0].sort().values
    narrowest = alpha**2 * float(mixture.covariances.min()) + sigma**2
    widest_gap = float(centres.diff().max()) if len(centres) > 1 else 0.0
    # between modes the score turns within variance / distance; the rule is exact to exp(-2 pi^2) at half of that
    spacing = min(h / 8, narrowest / max(2 * widest_gap, 1e-9))
    pad = math.ceil(8 * h / spacing)
    low, high = float(centres[0]) - reach, float(centres[-1]) + reach
    count = math.ceil((high - low) / spacing)
    x = low + spacing * torch.arange(-pad, count + pad + 1, dtype=torch.float64)[:, None]
    kernel = (-(torch.arange(-pad, pad + 1, dtype=torch.float64) * spacing / h).square() / 2).softmax(0)
    score, slope = mixture.score(x, t, path)[:, 0], mixture.score_jacobian(x, t, path)[:, 0, 0]
    return _Table(low, spacing, _convolved(score, kernel), _convolved(slope, kernel))


def _convolved(values: Tensor, kernel: Tensor) -> Tensor:
    """Only where the kernel lies wholly inside the values."""
    n = len(values) + len(kernel) - 1
    full = torch.fft.irfft(torch.fft.rfft(values, n) * torch.fft.rfft(kernel, n), n)
    return full[len(kernel) - 1 : len(values)]
