"""How sharp a field is between modes, and whether its sharpness fits its own error (VSM notes, 1.3, 3.7 and 8.3).

In: a field (x_t, t) -> Prediction, no training and no oracle. Out: numbers a row, detectors that watch a chain of
`samplers.ancestral`, a profile by time. All rest on the normalised Jacobian Jn = -sigma d eps/dx = sigma^2 d score/dx,
which has no unit: Cov[x_0 | x_t] = sigma^2 / alpha^2 (I + Jn), so an exact field has no eigenvalue below -1 (x_0 is
known), and large ones where two explanations compete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fieldsmith.measure.intervals import Interval, mean_interval
from fieldsmith.measure.progress import progress
from fieldsmith.models.jacobians import Function, jvp, least_eigenvalue, rademacher, spectral_norm
from fieldsmith.paths import Path, Prediction, expand, noised
from fieldsmith.samplers import Field, Variance, ancestral

QUANTILES = (0.5, 0.9, 0.99, 1.0)


def normalised(field: Field, t: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> -sigma(t) eps(x, t), whose Jacobian is Jn; t (batch,) or ()."""

    def scaled(x: Tensor) -> Tensor:
        output = field(x, t)
        return -expand(output.path.sigma(t), x) * output.eps

    return scaled


def normalised_norm(
    field: Field, x_t: Tensor, t: Tensor, generator: torch.Generator, iterations: int = 20, starts: int = 2
) -> Tensor:
    """The largest singular value of Jn at each row, (batch,), from below."""
    return spectral_norm(normalised(field, t), x_t, generator, iterations, starts)


def denoised(field: Field, t: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> x - sigma(t) eps(x, t) = alpha x_0, whose Jacobian is I + Jn = alpha^2 / sigma^2 Cov[x_0 | x_t]."""

    def kept(x: Tensor) -> Tensor:
        return x + normalised(field, t)(x)

    return kept


def frobenius(f: Function, x: Tensor, generator: torch.Generator, probes: int = 1) -> Tensor:
    """An estimate of the Frobenius norm of f's Jacobian at each row, (batch,), a product a probe; exact in 1-D."""
    squared = x.new_zeros(len(x))
    with torch.no_grad():
        for _ in range(probes):
            squared = squared + jvp(f, x, rademacher(x, generator)).along.flatten(1).square().sum(1) / probes
    return squared.sqrt()


def least(field: Field, x_t: Tensor, t: Tensor, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """The smallest eigenvalue of Jn's symmetric part at each row, (batch,), from above; below -1 no data explain it."""
    f = normalised(field, t)
    above = 1 + spectral_norm(f, x_t, generator, max(2, iterations // 4), starts=1)
    return least_eigenvalue(f, x_t, generator, above, iterations)


@dataclass(frozen=True)
class Sides:
    """Of the identity v^T (I + Jn) v = E[(v . (eps - eps_hat))^2 | x_t], by row; unit v. Equal in mean if exact."""

    implied: Tensor
    error: Tensor

    @property
    def gap(self) -> Tensor:
        """error - implied: of too smooth a field positive between modes, negative at them; they rule a mean."""
        return self.error - self.implied


def consistency_gap(field: Field, x_t: Tensor, t: Tensor, eps: Tensor, generator: torch.Generator) -> Sides:
    """Both sides at x_t = alpha x_0 + sigma eps of data, at a random unit v a row; one product with Jn."""
    v = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype).to(x_t.device)
    v = v / expand(v.flatten(1).norm(dim=1), v)
    with torch.no_grad():
        products = jvp(normalised(field, t), x_t, v)
        eps_hat = field(x_t, t).eps
    implied = 1 + (v * products.along).flatten(1).sum(1)
    return Sides(implied, (v * (eps - eps_hat)).flatten(1).sum(1).square())


# detectors: a Watch of samplers.ancestral; `.scores` (batch,), high is suspicious


def window(steps: int, first: float, last: float) -> range:
    """The steps whose middle lies in [first, last] of the way from noise (0) to data (1): 0.9 to 1 are 10 of 100."""
    inside = [k for k in range(steps) if first - 1e-9 <= (k + 0.5) / steps <= last + 1e-9]
    if not inside:
        raise ValueError(f"no step of {steps} lies between {first} and {last} of the way from noise (0) to data (1)")
    return range(inside[0], inside[-1] + 1)


@dataclass
class TrajectoryVariance:
    """Aithal et al.'s detector: the variance of predicted x_0 over a window of steps, its mean over pixels.

    Streaming (Welford), so that no prediction is kept. A new one for each batch.
    """

    steps: int
    first: float
    last: float

    def __post_init__(self) -> None:
        self._window = window(self.steps, self.first, self.last)
        if len(self._window) < 2:
            raise ValueError(f"a variance needs 2 steps or more between {self.first} and {self.last}; widen the window")
        self._step = self._seen = 0

    def __call__(self, pred: Prediction, t_next: Tensor) -> None:
        self._step = _counted(self._step, self.steps)
        if self._step - 1 not in self._window:
            return
        x_0 = pred.x_0.detach()
        if not self._seen:
            self._mean, self._squares = torch.zeros_like(x_0), torch.zeros_like(x_0)
        self._seen += 1
        away = x_0 - self._mean
        self._mean += away / self._seen
        self._squares += away * (x_0 - self._mean)

    @property
    def scores(self) -> Tensor:
        """(batch,)"""
        if self._seen < 2:
            raise ValueError(f"{self._step} of {self.steps} steps were watched; ask when the chain has ended")
        return self._squares.flatten(1).mean(1) / self._seen


@dataclass
class SharpestJacobian:
    """The largest norm of I + Jn that a chain meets in a window of steps: x_0 was open there, between modes.

    Not of Jn, which is about 1 wherever x_0 is known and so hides a ridge lower than that. 'power' is the spectral norm
    by a few iterations, each two passes of the field; 'frobenius' one product a step. A new one for each batch.
    """

    field: Field
    steps: int
    first: float
    last: float
    generator: torch.Generator
    iterations: int = 4
    norm: Literal["power", "frobenius"] = "power"

    def __post_init__(self) -> None:
        self._window = window(self.steps, self.first, self.last)
        self._step = 0
        self._largest: Tensor | None = None

    def __call__(self, pred: Prediction, t_next: Tensor) -> None:
        self._step = _counted(self._step, self.steps)
        if self._step - 1 not in self._window:
            return
        x_t, f = pred.x_t.detach(), denoised(self.field, pred.t)
        if self.norm == "power":
            norm = spectral_norm(f, x_t, self.generator, self.iterations, starts=1)
        else:
            norm = frobenius(f, x_t, self.generator)
        self._largest = norm if self._largest is None else torch.maximum(self._largest, norm)

    @property
    def scores(self) -> Tensor:
        """(batch,)"""
        if self._largest is None:
            raise ValueError(f"{self._step} of {self.steps} steps were watched; ask when the chain has ended")
        return self._largest


def _counted(step: int, steps: int) -> int:
    if step == steps:
        raise ValueError(f"this detector has watched its {steps} steps; make a new one for the next batch")
    return step + 1


# by time, along chains


@dataclass(frozen=True)
class Moment:
    """Of one time: quantiles of the normalised norm (as QUANTILES), the share of rows with an eigenvalue below -1.

    Where data were given, the mean over them of both sides of the identity, and of their gap with its t interval.
    """

    t: float
    norms: tuple[float, ...]
    unphysical: float
    implied: float | None = None
    error: float | None = None
    gap: Interval | None = None


@dataclass(frozen=True)
class Profile:
    """Moments from noise to data, of `n` chains."""

    moments: tuple[Moment, ...]
    n: int
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        return {"quantiles": list(QUANTILES), **asdict(self)}


def profile(
    field: Field,
    x: Tensor,
    grid: Tensor,
    generator: torch.Generator,
    *,
    variance: Variance = "small",
    clip: float | None = None,
    every: int = 1,
    iterations: int = 10,
    starts: int = 1,
    tolerance: float = 0.05,
    data: Tensor | None = None,
) -> Profile:
    """Sharpness along ancestral chains from x (batch, ...) at grid[0]: of each `every`-th step, counted from the last.

    With `data` (n, ...) also the consistency gap at the same times, on freshly noised data: a mean over data is nearly
    blind to a rare ridge, and of either sign where a field is too smooth, so look at its interval. Rows are not binned
    by their error, since those of large error were drawn so, and would show a gap for an exact field too.
    """
    moments: list[Moment] = []
    steps = len(grid) - 1
    step = 0

    def look(pred: Prediction, t_next: Tensor) -> None:
        nonlocal step
        step += 1
        advance()
        if (steps - step) % every:
            return
        x_t, t = pred.x_t.detach(), pred.t
        norms = normalised_norm(field, x_t, t, generator, iterations, starts)
        low = least(field, x_t, t, generator, iterations)
        quantiles = torch.quantile(norms.double().cpu(), torch.tensor(QUANTILES, dtype=torch.float64))
        sides = None if data is None else _on_data(field, data, pred.path, t, generator)
        moments.append(
            Moment(
                float(t.flatten()[0]),
                tuple(quantiles.tolist()),
                float((low < -1 - tolerance).double().mean()),
                None if sides is None else float(sides.implied.mean()),
                None if sides is None else float(sides.error.mean()),
                None if sides is None else mean_interval(sides.gap),
            )
        )

    with torch.no_grad(), progress("following paths", steps) as advance:
        ancestral(field, x, grid, generator, variance, clip, look)
    return Profile(tuple(moments), len(x), tolerance)


def _on_data(field: Field, data: Tensor, path: Path, t: Tensor, generator: torch.Generator) -> Sides:
    eps = torch.randn(data.shape, generator=generator, dtype=data.dtype).to(data.device)
    return consistency_gap(field, noised(path, data, eps, t.to(data)), t, eps, generator)
