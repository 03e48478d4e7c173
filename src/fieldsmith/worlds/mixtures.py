"""Gaussian mixtures, where every quantity of a diffusion or flow model is a closed form on any path.

Velocity, score, posterior and soft prompts (GEM notes, section 5.2); score and Jacobian (VSM notes, section 3.4); the
reward-tilted law (RSM notes, sections 1.3, 5 and 8.3). A prompt is the same modes under other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.paths import Path, Prediction

NOWHERE = -1  # the membership of a point that lies in no mode


@dataclass(frozen=True)
class Mixture:
    """p(x_0) = sum_j weights_j N(means_j, covariances_j): means (m, d), covariances (m, d, d), weights (m,).

    Points are (batch, d); times are (batch,) or (). Raises InputError where shapes disagree, weights are not a
    distribution, or a covariance is not symmetric and positive definite.
    """

    means: Tensor
    covariances: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        m, d = self.means.shape
        if self.covariances.shape != (m, d, d):
            raise InputError(f"covariances of shape {tuple(self.covariances.shape)}; these means need ({m}, {d}, {d})")
        _check_weights(self.weights, m)
        S = self.covariances
        if not torch.allclose(S, S.mT) or bool((self._axes[0] <= 0).any()):
            raise InputError("a covariance is not symmetric and positive definite; use e.g. deviation**2 * identity")

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor]:
        """S_j = U_j diag(D_j) U_j^T, so that alpha^2 S + sigma^2 I shares its axes at every time; (m, d), (m, d, d)."""
        D, U = torch.linalg.eigh(self.covariances)
        return D, U

    # the law of the data

    @property
    def mean(self) -> Tensor:
        """(d,)"""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Of the whole mixture, within and between modes, (d, d)."""
        apart = self.means - self.mean
        return torch.einsum("j,jab->ab", self.weights, self.covariances + apart[:, :, None] * apart[:, None, :])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n points, (n, d)."""
        mode = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        D, U = self._axes
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[mode] + torch.einsum("nab,nb->na", U[mode], D[mode].sqrt() * z)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x_0) at points (batch, d); (batch,)."""
        return self._log_joint(x, x.new_ones(()), x.new_zeros(())).logsumexp(1)

    # the law on a path

    def marginal(self, t: Tensor, path: Path) -> Mixture:
        """The law of x_t at one time (): means alpha mu, covariances alpha^2 S + sigma^2 I."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        noise = sigma**2 * torch.eye(self.means.shape[1]).to(self.means)
        return Mixture(alpha * self.means, alpha**2 * self.covariances + noise, self.weights)

    def score(self, x_t: Tensor, t: Tensor, path: Path) -> Tensor:
        """grad log p_t(x_t), (batch, d)."""
        alpha, sigma = _levels(path, t, x_t)
        return self._average(self._log_joint(x_t, alpha, sigma), self._mode_scores(x_t, alpha, sigma))

    def score_jacobian(self, x_t: Tensor, t: Tensor, path: Path) -> Tensor:
        """The Hessian of log p_t: Cov_w(s_j) - sum_j w_j V_j^-1 with w the posterior over modes; (batch, d, d)."""
        alpha, sigma = _levels(path, t, x_t)
        w = self._log_joint(x_t, alpha, sigma).softmax(1)
        s_j = self._mode_scores(x_t, alpha, sigma)
        s = torch.einsum("nj,nja->na", w, s_j)
        _, U = self._axes
        between = torch.einsum("nj,nja,njb->nab", w, s_j, s_j) - s[:, :, None] * s[:, None, :]
        within = torch.einsum("nj,jab,njb,jcb->nac", w, U, 1 / self._variances(alpha, sigma).expand_as(s_j), U)
        return between - within

    def posterior(self, x_t: Tensor, t: Tensor, path: Path) -> Tensor:
        """The probability of each mode given x_t, (batch, m)."""
        return self._log_joint(x_t, *_levels(path, t, x_t)).softmax(1)

    def x_0(self, x_t: Tensor, t: Tensor, path: Path) -> Tensor:
        """E[x_0 | x_t], (batch, d); in each mode mu_j - alpha S_j s_j."""
        return self._x_0_and_score(x_t, *_levels(path, t, x_t))[0]

    def eps(self, x_t: Tensor, t: Tensor, path: Path) -> Tensor:
        """E[eps | x_t] = -sigma score, (batch, d)."""
        _, sigma = _levels(path, t, x_t)
        return -sigma.reshape(-1, 1) * self.score(x_t, t, path)

    def velocity(self, x_t: Tensor, t: Tensor, path: Path) -> Tensor:
        """alpha' E[x_0 | x_t] + sigma' E[eps | x_t], (batch, d). Raises ValueError where the path has no velocity."""
        t = t.to(x_t)
        d_alpha, d_sigma = path.d_alpha(t).reshape(-1, 1), path.d_sigma(t).reshape(-1, 1)
        alpha, sigma = _levels(path, t, x_t)
        x_0, score = self._x_0_and_score(x_t, alpha, sigma)
        velocity: Tensor = d_alpha * x_0 - d_sigma * sigma.reshape(-1, 1) * score
        return velocity

    def field(self, path: Path) -> Callable[[Tensor, Tensor], Prediction]:
        """The perfectly trained network: (x_t, t) -> Prediction of kind 'velocity'."""

        def predict(x_t: Tensor, t: Tensor) -> Prediction:
            return Prediction("velocity", self.velocity(x_t, t, path), x_t, t, path)

        return predict

    def given(self, x_t: Tensor, t: Tensor, path: Path) -> Mixture:
        """The law of x_0 given one state x_t (d,) at t > 0, itself a mixture: what exact value functions need."""
        alpha, sigma = _levels(path, t, x_t)
        log_joint, s_j = self._log_joint(x_t[None], alpha, sigma)[0], self._mode_scores(x_t[None], alpha, sigma)[0]
        D, U = self._axes
        left = D * sigma**2 / self._variances(alpha, sigma)[0]  # (m, d)
        means = self.means - alpha * torch.einsum("jab,jb->ja", self.covariances, s_j)
        return Mixture(means, torch.einsum("jab,jb,jcb->jac", U, left, U), log_joint.softmax(0))

    # prompts

    def reweighted(self, weights: Tensor) -> Mixture:
        """The prompt with these weights (m,) over the same modes; the mixture as given is the null prompt."""
        return Mixture(self.means, self.covariances, weights.to(self.weights))

    def soft(self, mode: int, epsilon: float = 0.02) -> Mixture:
        """The soft prompt for one mode: 1 - epsilon on it and epsilon spread over the others.

        At epsilon = 0 an untouched late field drags every sample back to the mode, so early erasure could not work.
        """
        m = len(self.weights)
        if not 0 <= mode < m:
            raise InputError(f"mode={mode}: this mixture has modes 0 to {m - 1}")
        weights = torch.full_like(self.weights, epsilon / max(m - 1, 1))
        weights[mode] = 1 - epsilon if m > 1 else 1
        return self.reweighted(weights)

    # rewards

    def tilted(self, linear: Tensor, quadratic: Tensor | None = None, strength: float = 1.0) -> Tilt:
        """p*(x) = p(x) exp(strength r(x)) / E[exp(strength r)], r(x) = b.x - x^T A x / 2; b (d,), symmetric A (d, d).

        The soft value at any time is V_t = log p*_t - log p_t + log_normaliser, so the optimal guidance grad V_t is a
        difference of two scores. Raises InputError where a tilted mode would not be normalisable (S^-1 + A indefinite).
        """
        b = strength * linear.to(self.means)
        A = torch.zeros_like(self.covariances[0]) if quadratic is None else strength * quadratic.to(self.means)
        if not torch.allclose(A, A.mT):
            raise InputError("the quadratic part of a reward must be symmetric; pass (A + A.T) / 2")
        P = torch.linalg.inv(self.covariances)
        if bool((torch.linalg.eigvalsh(P + A) <= 0).any()):
            most = float(1 / torch.linalg.eigvalsh(self.covariances).max())
            raise InputError(
                f"strength={strength}: exp(reward) outgrows a mode and the tilted law has no normaliser; "
                f"keep the eigenvalues of strength * A above {-most:.4g}"
            )
        S = torch.linalg.inv(P + A)
        h = torch.einsum("jab,jb->ja", P, self.means) + b
        mu = torch.einsum("jab,jb->ja", S, h)
        log_z = (h * mu).sum(1) / 2 - torch.einsum("ja,jab,jb->j", self.means, P, self.means) / 2
        log_w = self.weights.log() + log_z + (torch.logdet(S) - torch.logdet(self.covariances)) / 2
        return Tilt(Mixture(mu, (S + S.mT) / 2, log_w.softmax(0)), log_w.logsumexp(0))

    # reading samples

    def membership(self, x: Tensor, deviations: float = 4.0) -> Tensor:
        """The mode nearest to each point in its own standard deviations, NOWHERE beyond `deviations`; (batch,) long."""
        D, U = self._axes
        z = torch.einsum("jba,njb->nja", U, x[:, None] - self.means) / D.sqrt()
        distance, mode = z.square().sum(2).sqrt().min(1)
        return torch.where(distance <= deviations, mode, NOWHERE)

    def fractions(self, x: Tensor, deviations: float = 4.0) -> Tensor:
        """The share of points (batch, d) in each mode and, last, in none; (m + 1,)."""
        m = len(self.weights)
        mode = self.membership(x, deviations)
        return torch.bincount(torch.where(mode == NOWHERE, m, mode), minlength=m + 1).to(x) / len(x)

    # alpha and sigma are (batch,) or (1,); V_j = alpha^2 S_j + sigma^2 I throughout

    def _variances(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Of x_t along each mode's axes, (batch or 1, m, d)."""
        return alpha.reshape(-1, 1, 1) ** 2 * self._axes[0] + sigma.reshape(-1, 1, 1) ** 2

    def _along_axes(self, x_t: Tensor, alpha: Tensor) -> Tensor:
        """U_j^T (x_t - alpha mu_j), (batch, m, d)."""
        return torch.einsum("jba,njb->nja", self._axes[1], x_t[:, None] - alpha.reshape(-1, 1, 1) * self.means)

    def _log_joint(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log weights_j + log N(x_t; alpha mu_j, V_j), (batch, m)."""
        V = self._variances(alpha, sigma)
        z2 = self._along_axes(x_t, alpha).square() / V
        return self.weights.log() - (z2 + V.log() + math.log(2 * math.pi)).sum(2) / 2

    def _mode_scores(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """s_j = -V_j^-1 (x_t - alpha mu_j), (batch, m, d)."""
        return -torch.einsum(
            "jab,njb->nja", self._axes[1], self._along_axes(x_t, alpha) / self._variances(alpha, sigma)
        )

    def _x_0_and_score(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Both from one posterior over modes, (batch, d) each."""
        log_joint, s_j = self._log_joint(x_t, alpha, sigma), self._mode_scores(x_t, alpha, sigma)
        x_0 = self.means - alpha.reshape(-1, 1, 1) * torch.einsum("jab,njb->nja", self.covariances, s_j)
        return self._average(log_joint, x_0), self._average(log_joint, s_j)

    def _average(self, log_joint: Tensor, of_modes: Tensor) -> Tensor:
        return torch.einsum("nj,nja->na", log_joint.softmax(1), of_modes)


@dataclass(frozen=True)
class Tilt:
    """A reward-tilted mixture and log E[exp(strength r(x_0))] under the mixture that it came from, ()."""

    mixture: Mixture
    log_normaliser: Tensor


def isotropic(means: Tensor, deviation: float, weights: Tensor | None = None) -> Mixture:
    """Modes of covariance deviation^2 I at means (m, d), of equal weight unless weights (m,) are given."""
    m, d = means.shape
    covariances = deviation**2 * torch.eye(d).to(means).expand(m, d, d)
    return Mixture(means, covariances, means.new_full((m,), 1 / m) if weights is None else weights)


# the mixtures of the notes, in float64


def square(separation: float, deviation: float = 0.5) -> Mixture:
    """Four modes on a square of side `separation` (GEM notes, 5.2): 0 target, 1 and 2 its neighbours, 3 opposite.

    The notes leave the deviation open; 0.5 fits their table of early-window erasure.
    """
    corners = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    return isotropic(separation * (torch.tensor(corners, dtype=torch.float64) - 0.5), deviation)


def line(places: tuple[float, ...] = (1.0, 2.0, 3.0), deviation: float = 0.05) -> Mixture:
    """The one-dimensional hallucination world (VSM notes, 3.2), not standardised; also at places 1, 2, 4, 5."""
    return isotropic(torch.tensor(places, dtype=torch.float64)[:, None], deviation)


def lattice(side: int = 5, spacing: float = 2.0, deviation: float = 0.05) -> Mixture:
    """side x side modes, coordinates divided by their standard deviation (VSM notes, 3.2: sqrt(0.05^2 + 8))."""
    ticks = spacing * (torch.arange(side, dtype=torch.float64) - (side - 1) / 2)
    scale = math.sqrt(deviation**2 + float(ticks.square().mean()))
    return isotropic(torch.cartesian_prod(ticks, ticks) / scale, deviation / scale)


def triangle() -> Mixture:
    """Three unit Gaussians at equal distances (RSM notes, section 5); its reward is tilted(linear=[-1/2, 0])."""
    corners = [[3.0, -math.sqrt(3)], [-3.0, -math.sqrt(3)], [0.0, 2 * math.sqrt(3)]]
    return isotropic(torch.tensor(corners, dtype=torch.float64), 1.0)


def _levels(path: Path, t: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.to(x_t).reshape(-1)
    return path.alpha(t), path.sigma(t)


def _check_weights(weights: Tensor, m: int) -> None:
    if weights.shape != (m,):
        raise InputError(f"weights of shape {tuple(weights.shape)}; {m} modes need ({m},)")
    total = float(weights.sum())
    if bool((weights < 0).any()) or abs(total - 1) > 1e-4:
        raise InputError(f"weights {weights.tolist()} sum to {total:.4g}; pass weights / weights.sum(), none negative")
