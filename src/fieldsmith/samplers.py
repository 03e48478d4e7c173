"""Moving along a field: time grids, deterministic steps, Gaussian steps with exact log-probabilities, rollouts.

In: a field (x_t, t) -> Prediction, a decreasing grid of times from 1 to 0. Out: a Trajectory of (x_k, t_k) pairs.
Formulas: Flow-GRPO and CPS (MT-EditFlow notes, section 2), Dance-SDE (DanceGRPO), DDIM (RSM notes, section 1.2),
DDPM's ancestral step under any variance (VSM notes, sections 1 and 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fieldsmith.paths import Prediction, RectifiedFlow, VariancePreserving

Field = Callable[[Tensor, Tensor], Prediction]
Variance = Literal["small", "large", "learned", "optimal"]
Sde = Literal["flow-sde", "dance-sde", "cps", "ddim", "ddim-uniform"]


def flow_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Times of diffusers' flow pipelines, (steps + 1,): linspace(1, 1/steps), shifted once, then 0.

    Static shift s and dynamic shift mu are one formula, with s = exp(mu): t -> s t / (1 + (s - 1) t).
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: a sampler needs at least 1")
    t = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64)
    return torch.cat((shift * t / (1 + (shift - 1) * t), torch.zeros(1, dtype=torch.float64))).float()


def ddim_grid(path: VariancePreserving, steps: int, trailing: bool = False) -> Tensor:
    """Times for `steps` DDIM steps, (steps + 1,), ending at clean data; diffusers' leading or trailing spacing."""
    if not 1 <= steps <= path.length:
        raise ValueError(f"steps={steps}: DDIM on {path.length} training times takes 1 to {path.length}")
    if trailing:
        stride = (path.length - path.length / steps) - path.length  # as numpy's arange rounds it, which decides ties
        index = (path.length + stride * torch.arange(steps, dtype=torch.float64)).round().long() - 1
    else:
        index = (torch.arange(steps) * (path.length // steps)).flip(0)
    return torch.cat((path.time(index), torch.zeros(1)))


@dataclass(frozen=True)
class Gaussian:
    """One stochastic step: N(mean, deviation^2 I); deviation 0 is a deterministic step without a density."""

    mean: Tensor
    deviation: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        draw = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype).to(self.mean.device)
        return self.mean + self.deviation * draw

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log density summed over all but the batch dimension, (batch,). Raises ValueError at deviation 0."""
        if bool((self.deviation == 0).any()):
            raise ValueError("a deterministic step has no density; leave it out of the log-probability")
        z = (x - self.mean) / self.deviation
        return (-z.square() / 2 - self.deviation.log() - math.log(2 * math.pi) / 2).flatten(1).sum(1)


def euler(pred: Prediction, t_next: Tensor, clip: float | None = None) -> Tensor:
    """x + (t' - t) v on rectified flow; on a variance-preserving path the exact DDIM step (eta = 0).

    `clip` is the radius of `ddim_step`. Raises ValueError for it on rectified flow, whose step uses no x_0.
    """
    if isinstance(pred.path, RectifiedFlow):
        if clip is not None:
            raise ValueError(f"clip={clip}: steps on rectified flow have no x_0 to clip; leave it out")
        return pred.x_t + _dim(t_next - pred.t, pred.x_t) * pred.velocity
    return ddim_step(pred, t_next, 0.0, clip).mean


def ddim_step(pred: Prediction, t_next: Tensor, eta: float, clip: float | None = None) -> Gaussian:
    """DDIM from t to t': mean alpha' x_0 + sqrt(sigma'^2 - s^2) eps, deviation s = eta * the posterior's given x_0.

    On any path s = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2); eta = 1 is DDPM's step, which forgets its
    start by t = 1 (memoryless) on rectified flow too. With `clip`, x_0 is clipped to [-clip, clip] while eps stays
    the network's own, as diffusers' DDIMScheduler has it.
    """
    path, x = pred.path, pred.x_t
    alpha_next, sigma_next = (_dim(level, x) for level in path.levels(t_next))
    deviation = torch.zeros_like(sigma_next)
    if eta:
        alpha, sigma = (_dim(level, x) for level in path.levels(pred.t))
        kept = alpha * sigma_next / (alpha_next * sigma)
        deviation = eta * sigma_next * (1 - kept**2).clamp(min=0).sqrt()
    x_0 = pred.x_0 if clip is None else pred.x_0.clamp(-clip, clip)
    mean = alpha_next * x_0 + (sigma_next**2 - deviation**2).clamp(min=0).sqrt() * pred.eps
    return Gaussian(mean, deviation)


def ddim_uniform_step(pred: Prediction, t_next: Tensor, weight: float) -> Gaussian:
    """DDIM whose deviation s solves (c1 + c2) / s = weight at every step (RSM notes, 4.3: uwsigma, weight 4.5).

    c1 = sigma alpha' / alpha and c2 = sqrt(sigma'^2 - s^2) are what eps weighs in x_0's place and on its own.
    """
    path, x = pred.path, pred.x_t
    c1 = _dim(path.sigma(pred.t) * path.alpha(t_next) / path.alpha(pred.t), x)
    alpha_next, sigma2_next = _dim(path.alpha(t_next), x), _dim(path.sigma(t_next), x) ** 2
    room = (sigma2_next * (weight**2 + 1) - c1**2).clamp(min=0).sqrt()
    deviation = torch.minimum((weight * c1 + room) / (weight**2 + 1), sigma2_next.sqrt())
    mean = alpha_next * pred.x_0 + (sigma2_next - deviation**2).clamp(min=0).sqrt() * pred.eps
    return Gaussian(mean, deviation)


def flow_sde_step(pred: Prediction, t_next: Tensor, noise_level: float, t_first: Tensor | None = None) -> Gaussian:
    """Flow-GRPO's reverse SDE: q = a sqrt(t / (1 - t)), mean x + (v - q^2/2 score) dt, deviation q sqrt(|dt|).

    At t = 1, where q is unbounded, 1 - t is read as 1 - t_first, the grid's second time, as the released code does.
    """
    x, t, dt = pred.x_t, _dim(pred.t, pred.x_t), _dim(t_next - pred.t, pred.x_t)
    if t_first is None and bool((t >= 1).any()):
        raise ValueError("the Flow-SDE step is unbounded at t=1; pass t_first, the second time of the grid")
    room = 1 - t if t_first is None else torch.where(t >= 1, 1 - _dim(t_first, x), 1 - t)
    q2 = noise_level**2 * t / room
    mean = x * (1 + q2 * dt / (2 * t)) + pred.velocity * (1 + q2 * (1 - t) / (2 * t)) * dt
    return Gaussian(mean, (q2 * -dt).sqrt())


def dance_sde_step(pred: Prediction, t_next: Tensor, noise_level: float) -> Gaussian:
    """DanceGRPO's SDE: constant deviation a sqrt(|dt|), mean x + (v - a^2/2 score) dt."""
    dt = _dim(t_next - pred.t, pred.x_t)
    mean = pred.x_t + (pred.velocity - noise_level**2 / 2 * pred.score) * dt
    return Gaussian(mean, noise_level * (-dt).sqrt())


def cps_step(pred: Prediction, t_next: Tensor, noise_level: float) -> Gaussian:
    """Coefficients-preserving sampling: (1 - t') x_0 + sqrt(t'^2 - s^2) eps, s = t' sin(a pi / 2)."""
    after = _dim(t_next, pred.x_t)
    deviation = after * math.sin(noise_level * math.pi / 2)
    return Gaussian((1 - after) * pred.x_0 + (after**2 - deviation**2).sqrt() * pred.eps, deviation)


@dataclass(frozen=True)
class Bounds:
    """Of the reverse step's variance, as t is shaped: betatilde (data known exactly) and beta (data are N(0, I))."""

    low: Tensor
    high: Tensor


def variance_bounds(path: VariancePreserving, t: Tensor, t_next: Tensor) -> Bounds:
    """betatilde = beta sigma'^2 / sigma^2 and beta of the step from t to t', whatever training times lie between."""
    beta = path.beta(t, t_next)
    return Bounds(beta * path.sigma(t_next) ** 2 / path.sigma(t) ** 2, beta)


def single_step(path: VariancePreserving, t: Tensor) -> Bounds:
    """The bounds of the step from t to t - 1/T, t at least 1/T; the last step borrows betatilde from the one before."""
    before = t.clamp(min=2 / path.length)
    low = variance_bounds(path, before, before - 1 / path.length).low
    return Bounds(low, path.beta(t, (t - 1 / path.length).clamp(min=0)))


def range_log_variance(path: VariancePreserving, t: Tensor, fraction: Tensor) -> Tensor:
    """The log-variance of a single step that lies at `fraction` (batch, ...) of the range, unclamped (VSM, 2.1)."""
    bounds = single_step(path, t.double())
    low, high = (_dim(part.log().to(fraction), fraction) for part in (bounds.low, bounds.high))
    return fraction * high + (1 - fraction) * low


def ancestral_step(
    pred: Prediction,
    t_next: Tensor,
    variance: Variance = "small",
    clip: float | None = None,
    covariance: Tensor | None = None,
) -> Gaussian:
    """DDPM's step from t to t' on a variance-preserving path; without noise where t' = 0.

    Deviation^2: betatilde ('small'), beta ('large'), between the two as the network predicts ('learned', Nichol and
    Dhariwal 2021; unclamped in single steps, in longer ones clamped, where an overshoot would explode), or
    betatilde + c^2 Cov[x_0 | x_t] with the diagonal `covariance`, shaped as x_t ('optimal', Bao et al. 2022),
    c = beta alpha' / sigma^2. The mean never goes through x_0 / alpha, unless `clip` holds x_0 inside
    [-clip, clip]. Raises ValueError where what the variance needs is missing.
    """
    path, x = pred.path, pred.x_t
    assert isinstance(path, VariancePreserving)
    t_next = t_next.to(pred.t).expand(pred.t.shape)
    bounds = variance_bounds(path, pred.t, t_next)
    beta, low, sigma2 = _dim(bounds.high, x), _dim(bounds.low, x), _dim(path.sigma(pred.t) ** 2, x)
    c = beta * _dim(path.alpha(t_next), x) / sigma2
    if clip is None:
        mean = (x - beta / sigma2.sqrt() * pred.eps) / (1 - beta).sqrt()
    else:
        kept = (1 - beta).sqrt() * _dim(path.sigma(t_next) ** 2, x) / sigma2
        mean = c * pred.x_0.clamp(-clip, clip) + kept * x
    if variance == "small":
        squared = low
    elif variance == "large":
        squared = beta
    elif variance == "optimal":
        if covariance is None:
            raise ValueError("the optimal variance needs the posterior covariance of x_0; pass covariance")
        squared = low + c**2 * covariance
    else:
        squared = _learned(pred, t_next, beta, low)
    return Gaussian(mean, torch.where(_dim(t_next, x) > 0, squared.sqrt(), torch.zeros_like(squared)))


def _learned(pred: Prediction, t_next: Tensor, high: Tensor, low: Tensor) -> Tensor:
    assert isinstance(pred.path, VariancePreserving)
    if pred.fraction is not None:
        low = low.clamp(min=torch.finfo(low.dtype).tiny)
        # single steps have a narrow range, outside of which fractions are learned; longer ones, a wide one
        longer = _dim((pred.t - t_next) * pred.path.length, low) > 1.5
        fraction = torch.where(longer, pred.fraction.clamp(0, 1), pred.fraction)
        return (fraction * high.log() + (1 - fraction) * low.log()).exp()
    if pred.log_variance is None:
        raise ValueError("this network learns no variance; use 'small' or 'large'")
    if not torch.allclose((pred.t - t_next) * pred.path.length, torch.ones_like(t_next), atol=1e-2):
        raise ValueError("a variance learned for single steps is none for longer ones; use all training times")
    return pred.log_variance.exp()


Watch = Callable[[Prediction, Tensor], None]  # the prediction at a step, and the step's next time


def ancestral(
    field: Field,
    x: Tensor,
    grid: Tensor,
    generator: torch.Generator,
    variance: Variance = "small",
    clip: float | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Clean data from x at grid[0] by DDPM's steps along the grid, which ends at 0; `watch` sees each prediction.

    On rectified flow, which has no such steps, by Euler's, where nothing is drawn.
    """
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        output = field(x, t)
        if watch:
            watch(output, t_next)
        flows = isinstance(output.path, RectifiedFlow)
        x = euler(output, t_next) if flows else ancestral_step(output, t_next, variance, clip).sample(generator)
    return x


def _dim(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like).reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t.to(like)


@dataclass(frozen=True)
class Trajectory:
    """A rollout of K steps: states[k] lives at times[k]. states (K + 1, batch, ...), times (K + 1,)."""

    states: Tensor
    times: Tensor

    @property
    def last(self) -> Tensor:
        return self.states[-1]


def rollout(field: Field, x: Tensor, grid: Tensor, *, stop: int | None = None, clip: float | None = None) -> Trajectory:
    """Follow the field from x at grid[0] by `euler` for all of the grid's steps, or the first `stop`.

    `clip` as in `euler`. Gradients flow if they are enabled.
    """
    states = [x]
    times = grid[: len(grid) if stop is None else stop + 1]
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        states.append(euler(field(states[-1], t), t_next, clip))
    return Trajectory(torch.stack(states), times)


def gaussian_step(sde: Sde, pred: Prediction, t_next: Tensor, noise_level: float, t_first: Tensor) -> Gaussian:
    """The named stochastic step at this noise (eta for 'ddim'); `t_first` is the second time of the grid."""
    if sde == "flow-sde":
        return flow_sde_step(pred, t_next, noise_level, t_first)
    if sde == "dance-sde":
        return dance_sde_step(pred, t_next, noise_level)
    if sde == "cps":
        return cps_step(pred, t_next, noise_level)
    if sde == "ddim-uniform":
        return ddim_uniform_step(pred, t_next, noise_level)
    return ddim_step(pred, t_next, noise_level)
