"""VSM's loss, term by term, and the other ways to make a score decide (VSM notes, sections 2, 6 and 8.2).

Pure functions of tensors, each (batch,): means over all but the first dimension. x_t = alpha x_0 + sigma eps; Jn is the
normalised Jacobian -sigma d eps_hat / d x, whose eigenvalues are at least -1 in the exact score.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Weight = Literal["inverse-sigma", "constant"]


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _wide(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def simple(eps_hat: Tensor, eps: Tensor) -> Tensor:
    """Denoising score matching, |eps - eps_hat|^2."""
    return _mean((eps - eps_hat).square())


def gaussian_bound(mean_true: Tensor, log_true: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean_true, e^log_true) || N(mean, e^log_variance)) in bits a dimension: L_vb at t > 0.

    `log_true` is (batch,) or shaped as the means. Pass the network's mean without gradient, so that the bound trains
    the variance alone (Nichol and Dhariwal 2021).
    """
    log_true = _wide(log_true, mean)
    gap = (mean_true - mean).square()
    kl = (log_variance - log_true - 1 + (log_true - log_variance).exp() + gap * (-log_variance).exp()) / 2
    return _mean(kl) / math.log(2)


def discretised_bound(x_0: Tensor, mean: Tensor, log_variance: Tensor, half_bin: float = 1 / 255) -> Tensor:
    """-log of a Gaussian's mass on the 8-bit level of x_0 in [-1, 1], bits per dimension: L_vb at the last step."""
    root_half = math.sqrt(0.5)
    inverse = (-log_variance / 2).exp()
    above, below = ((x_0 - mean + side) * inverse for side in (half_bin, -half_bin))
    upper = torch.where(x_0 > 0.999, torch.ones_like(x_0), (1 + torch.erf(above * root_half)) / 2)
    lower = torch.where(x_0 < -0.999, torch.zeros_like(x_0), (1 + torch.erf(below * root_half)) / 2)
    return _mean(-(upper - lower).clamp(min=1e-12).log()) / math.log(2)


def density_bound(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log N(x_0; mean, e^log_variance), bits per dimension: L_vb at the last step where data are not 8-bit images."""
    nll = ((x_0 - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi)) / 2
    return _mean(nll) / math.log(2)


def variance_penalty(log_variance: Tensor) -> Tensor:
    """VSM as published, Eq. 5: 1 / (1 + (1/sigma_p^2)^2) = sigmoid(2 log sigma_p^2), finite at any value.

    It shrinks the reverse variance and reaches the score only through shared layers: beside L_vb, whose optimum is S,
    it gives sigma_p^2 = S / (1 + 4 ln 2 w s^4 / (1 + s^4)^2), at w = 0.1 / sqrt(1 - abar) a shrink of at most 0.02% on
    linear schedules (7% at the last time of a cosine, where it moves nothing).
    """
    return _mean(torch.sigmoid(2 * log_variance))


def penalty_weight(rho: float, sigma: Tensor, weight: Weight) -> Tensor:
    """VSM's Eq. 6: rho / sqrt(1 - abar_t) in pixels ('inverse-sigma'), rho in its latent code ('constant')."""
    return rho / sigma.clamp(min=1e-6) if weight == "inverse-sigma" else torch.full_like(sigma, rho)


def jacobian_floor(along: Tensor) -> Tensor:
    """1 / (1 + |J v|^2 / d) for a probe v ~ N(0, I): small where the score is sharp.

    With J = Jn dimensionless, so that one strength serves all times; with the raw Jacobian of the score it collapses.
    Its optimum is not the data's score: watch modes grow narrow.
    """
    return 1 / (1 + _mean(along.square()))


def jacobian_match(along: Tensor, probe: Tensor, residual: Tensor) -> Tensor:
    """(v.(I + Jn) v - (v.(eps - eps_hat))^2)^2 for a unit probe v: second-order denoising score matching.

    Its optimum is the true Jacobian (Meng et al. 2021), but the target is heavy-tailed where the score should be sharp.
    `along` is Jn v, `residual` eps - eps_hat without gradient.
    """
    quadratic = (probe * (probe + along)).flatten(1).sum(1)
    return (quadratic - (probe * residual).flatten(1).sum(1).square()).square()


def covariance_match(curvature: Tensor, along: Tensor, probe: Tensor) -> Tensor:
    """(h - v * Jn v)^2 for a Rademacher probe v: OCM's diagonal (Ou et al. 2024), Jn v without gradient.

    h is the diagonal that a variance stands for, `implied_curvature`.
    """
    return _mean((curvature - probe * along).square())


def implied_curvature(log_variance: Tensor, low: Tensor, c: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """diag Jn that makes e^log_variance optimal: s^2 = betatilde + c^2 sigma^2 / alpha^2 (1 + diag Jn), solved for it.

    low = betatilde, c = beta alpha' / sigma^2, alpha and sigma are (batch,).
    """
    low, scale = _wide(low, log_variance), _wide((alpha / (c * sigma)) ** 2, log_variance)
    return (log_variance.exp() - low) * scale - 1


def neighbours(x_t: Tensor, alpha: Tensor, sigma: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """E[x_0 | x_t] and E[eps | x_t] if the data were `bank` (m, ...) alone: means over its rows under the weights
    softmax_i(-|x_t - alpha x_i|^2 / 2 sigma^2).

    A target of less variance than one draw of noise (stable targets, Xu et al. 2023), defined at any x_t, on a data
    path or not. Put each row's own x_0 into the bank where there is one.
    """
    flat, rows = x_t.flatten(1), bank.flatten(1)
    alpha, sigma = alpha[:, None], sigma[:, None]
    distance = flat.square().sum(1, keepdim=True) - 2 * alpha * (flat @ rows.T) + alpha**2 * rows.square().sum(1)
    x_0 = (-distance / (2 * sigma**2)).softmax(1) @ rows
    return x_0.reshape(x_t.shape), ((flat - alpha * x_0) / sigma).reshape(x_t.shape)
