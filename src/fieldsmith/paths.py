"""Probability paths and the conversions between what networks predict: the only place where they live.

t in [0, 1]: 0 is data, 1 is noise; x_t = alpha(t) x_0 + sigma(t) eps with eps ~ N(0, I).
In: a network's output at (x_t, t). Out: the same as velocity, eps, x_0 or score.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

Kind = Literal["velocity", "eps", "x_0", "v_prediction"]


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Times (batch,) or () with trailing dimensions added, to broadcast against `like`."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


class Path(Protocol):
    """alpha and sigma of t (`levels`: both) and their time derivatives, each of t's shape."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def d_alpha(self, t: Tensor) -> Tensor: ...
    def d_sigma(self, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class RectifiedFlow:
    """alpha = 1 - t, sigma = t, velocity eps - x_0; diffusers calls this t sigma."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class VariancePreserving:
    """A DDPM schedule: alphas_cumprod (T,); t = (index + 1) / T, so that t = 0 is clean data.

    Between indices log(alphas_cumprod) is linear in t, which makes alpha, sigma and their derivatives consistent.
    """

    alphas_cumprod: Tensor
    _log: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod.double()
        falling = bool((abar.diff() < 0).all()) and bool((abar > 0).all() and (abar < 1).all())
        _refuse(
            not falling,
            "alphas_cumprod must fall strictly inside (0, 1); take the product in float64, without zero terminal SNR",
        )
        table = torch.cat((torch.zeros(1, dtype=torch.float64), abar.log()))
        object.__setattr__(self, "_log", table)

    @property
    def length(self) -> int:
        return len(self.alphas_cumprod)

    def time(self, index: Tensor) -> Tensor:
        """t of a discrete index in 0 .. T-1 (index -1 is clean data, t = 0)."""
        return (index + 1) / self.length

    def index(self, t: Tensor) -> Tensor:
        """The discrete index of t, as the float that diffusers networks take."""
        return t * self.length - 1

    def beta(self, t: Tensor, t_next: Tensor) -> Tensor:
        """1 - abar(t) / abar(t_next): the noise that one forward step from t_next to t adds, as t is shaped."""
        return (-torch.expm1(self._log_and_slope(t)[0] - self._log_and_slope(t_next)[0])).to(t.dtype)

    def _log_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        place = t.double() * self.length
        left = place.floor().clamp(0, self.length - 1).long()
        table = self._log.to(t.device)
        slope = table[left + 1] - table[left]
        return (table[left] + (place - left) * slope), slope * self.length

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma."""
        place = t.double() * self.length
        left = place.floor().clamp(0, self.length - 1).long()
        table = self._log.to(t.device)
        log = torch.lerp(table[left], table[left + 1], place - left)
        return (log / 2).exp().to(t.dtype), (-torch.expm1(log)).sqrt().to(t.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        return self.levels(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.levels(t)[1]

    def d_alpha(self, t: Tensor) -> Tensor:
        log, slope = self._log_and_slope(t)
        return (slope / 2 * (log / 2).exp()).to(t.dtype)

    def d_sigma(self, t: Tensor) -> Tensor:
        _refuse(bool((t <= 0).any()), "the variance-preserving path has no velocity at t=0; use t > 0")
        log, slope = self._log_and_slope(t)
        return (-slope * log.exp() / (2 * (-torch.expm1(log)).sqrt())).to(t.dtype)


def snr(path: Path, t: Tensor) -> Tensor:
    """Signal-to-noise ratio alpha^2 / sigma^2; infinite at t = 0."""
    return path.alpha(t) ** 2 / path.sigma(t) ** 2


CELLS = 1_000  # of a path without indices


def length_of(path: Path) -> int:
    """How many training times a path has."""
    return path.length if isinstance(path, VariancePreserving) else CELLS


def times_of(path: Path) -> Tensor:
    """The time of each index, (T,) in float64: (i + 1) / T; the middle of each cell where the path is continuous."""
    n = length_of(path)
    index = torch.arange(n, dtype=torch.float64)
    return (index + 1) / n if isinstance(path, VariancePreserving) else (index + 0.5) / n


def _refuse(bad: bool, sentence: str) -> None:
    if bad:
        raise ValueError(sentence)


@dataclass(frozen=True)
class Prediction:
    """A network's output at (x_t, t) (x_t: (batch, ...), t: (batch,) or ()), in the network's own parametrisation.

    The network's own form comes back untouched. Forms that do not exist at an endpoint (eps from
    x_0 at t=0, x_0 from eps at t=1 of rectified flow, the score at t=0) raise ValueError instead of dividing by zero.
    `log_variance` is the network's own log-variance of the reverse step from t to t - 1/T, where it learns one;
    `fraction` is where that lies between the smallest (0) and the largest (1) sensible variance of any step.
    """

    kind: Kind
    value: Tensor
    x_t: Tensor
    t: Tensor
    path: Path
    log_variance: Tensor | None = None
    fraction: Tensor | None = None

    def _coefficients(self) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.path.levels(self.t)
        return expand(alpha, self.x_t), expand(sigma, self.x_t)

    def _slopes(self) -> tuple[Tensor, Tensor]:
        return expand(self.path.d_alpha(self.t), self.x_t), expand(self.path.d_sigma(self.t), self.x_t)

    @property
    def x_0(self) -> Tensor:
        if self.kind == "x_0":
            return self.value
        alpha, sigma = self._coefficients()
        if self.kind == "velocity":
            d_alpha, d_sigma = self._slopes()
            return (d_sigma * self.x_t - sigma * self.value) / (alpha * d_sigma - sigma * d_alpha)
        if self.kind == "v_prediction":
            return (alpha * self.x_t - sigma * self.value) / (alpha**2 + sigma**2)
        _refuse(bool((alpha == 0).any()), "x_0 is undetermined by eps where alpha=0 (t=1); ask for it at t < 1")
        return (self.x_t - sigma * self.value) / alpha

    @property
    def eps(self) -> Tensor:
        if self.kind == "eps":
            return self.value
        alpha, sigma = self._coefficients()
        if self.kind == "velocity":
            d_alpha, d_sigma = self._slopes()
            return (alpha * self.value - d_alpha * self.x_t) / (alpha * d_sigma - sigma * d_alpha)
        if self.kind == "v_prediction":
            return (sigma * self.x_t + alpha * self.value) / (alpha**2 + sigma**2)
        _refuse(bool((sigma == 0).any()), "eps is undetermined by x_0 where sigma=0 (t=0); ask for it at t > 0")
        return (self.x_t - alpha * self.value) / sigma

    @property
    def velocity(self) -> Tensor:
        """d x_t / d t along the path's probability flow: alpha' x_0 + sigma' eps."""
        if self.kind == "velocity":
            return self.value
        d_alpha, d_sigma = self._slopes()
        return d_alpha * self.x_0 + d_sigma * self.eps

    @property
    def score(self) -> Tensor:
        """grad log p_t(x_t) = -eps / sigma."""
        _, sigma = self._coefficients()
        _refuse(bool((sigma == 0).any()), "the score is unbounded where sigma=0 (t=0); ask for it at t > 0")
        return -self.eps / sigma


def noised(path: Path, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha(t) x_0 + sigma(t) eps."""
    alpha, sigma = path.levels(t)
    return expand(alpha, x_0) * x_0 + expand(sigma, x_0) * eps


def truth(kind: Kind, path: Path, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The output of a perfect network of this kind that knew x_0 and eps (batch, ...), at t (batch,)."""
    if kind == "eps":
        return eps
    if kind == "x_0":
        return x_0
    if kind == "v_prediction":
        return expand(path.alpha(t), eps) * eps - expand(path.sigma(t), eps) * x_0
    return expand(path.d_alpha(t), eps) * x_0 + expand(path.d_sigma(t), eps) * eps


def guide(conditional: Tensor, unconditional: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance u + w (c - u), in whatever form both are in; w = 1 is off."""
    return unconditional + guidance * (conditional - unconditional)


def tag(time: float, low: float = 1.0, high: float = 4.0, beta: float = 5.0) -> float:
    """TAG's guidance scale at time index / T in [0, 1] (DASH, Eq. 3): low + (high - low) sigmoid(beta (1/2 - time))."""
    return low + (high - low) / (1 + math.exp(-beta * (0.5 - time)))


def tag_schedule(path: Path) -> Callable[[Tensor], float]:
    """TAG as a schedule of a path: w at the time of a step, which counts in indices where the path has them."""

    def schedule(t: Tensor) -> float:
        time = t.flatten()[0]
        return tag(float(path.index(time)) / path.length if isinstance(path, VariancePreserving) else float(time))

    return schedule


def recalibrated(guidance: float, ends: Sequence[float], factors: Sequence[float]) -> Callable[[Tensor], float]:
    """A schedule w(t) = guidance * factor of t's bin: `ends` are the bins' upper ends, rising (DASH notes, 7.4)."""

    def schedule(t: Tensor) -> float:
        place = bisect.bisect_left(ends, float(t.flatten()[0]) - 1e-6)  # times are float32
        return guidance * factors[min(place, len(factors) - 1)]

    return schedule
