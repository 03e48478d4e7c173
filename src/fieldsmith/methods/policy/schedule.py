"""The scalars of a step, from one object, and how hard each method pulls at each step (RSM notes, 1.2 and 1.5).

In: a path, a grid, a stochastic step. Out: sigma, Omega, kappa, omega by step id, in sampling order, in float64.
Everything here is indexed by step id alone: no batch, subset or shuffle of rows can change it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith.errors import InputError, check_word
from fieldsmith.paths import Kind, Path, Prediction, RectifiedFlow, expand
from fieldsmith.samplers import Sde, gaussian_step

ZETA = 4.3152  # PCPO on flows: the released constant, the sum of its weights over SD3.5's ten steps
UNIFORM = 0.5169  # PCPO on diffusion: the released constant in place of w


@dataclass(frozen=True)
class Schedule:
    """K steps x_{k+1} = mean(x_k) + sigma eps, with the mean affine in the network's output f; all (K,).

    times (K + 1,); push = d mean / d f, kappa = d score / d f and gain = d x_0 / d f are signed, f being the
    network's output (of `kind`).
    """

    path: Path
    kind: Kind
    times: Tensor
    sigma: Tensor
    push: Tensor
    kappa: Tensor
    gain: Tensor

    def __len__(self) -> int:
        return len(self.sigma)

    @property
    def t(self) -> Tensor:
        return self.times[:-1]

    @property
    def dt(self) -> Tensor:
        return self.times[:-1] - self.times[1:]

    @property
    def Omega(self) -> Tensor:
        """The mean's shift per unit of score."""
        return self.push / self.kappa

    @property
    def omega(self) -> Tensor:
        """sigma^2 / Omega: a next-state gradient times this is in score units."""
        return self.sigma**2 / self.Omega

    @property
    def w(self) -> Tensor:
        """push / sigma, signed: log rho = w <f - f_old, eps> - w^2 |f - f_old|^2 / 2; 0 at deterministic steps."""
        return torch.where(self.sigma > 0, self.push / self.sigma.clamp(min=1e-300), torch.zeros_like(self.push))

    @property
    def noisy(self) -> Tensor:
        """Steps with a density, bool."""
        return self.sigma > 0

    def target(self, x_0: Tensor, eps: Tensor, step: Tensor) -> Tensor:
        """Denoising's target in the network's own kind, (n, ...), of x_0 and eps (n, ...) at steps (n,)."""
        if self.kind == "velocity" and isinstance(self.path, RectifiedFlow):
            return eps - x_0
        if self.kind in ("eps", "x_0"):
            return eps if self.kind == "eps" else x_0
        t = expand(self.t[step].to(x_0), x_0)
        if self.kind == "v_prediction":
            return self.path.alpha(t) * eps - self.path.sigma(t) * x_0
        return self.path.d_alpha(t) * x_0 + self.path.d_sigma(t) * eps


def schedule(path: Path, grid: Tensor, kind: Kind, sde: Sde, noise_level: float) -> Schedule:
    """The scalars of a sampler's steps on `grid` (K + 1,), for a network whose output is of `kind`.

    Read off the sampler's own step at x = 0 with outputs 0 and 1, so that they cannot disagree with it. At t = 1 of a
    rectified flow, where velocity does not determine the score, 1 - t reads 1 - t_first, as in the Flow-SDE itself.
    """
    grid = grid.detach().cpu().double()
    sigma, push, kappa, gain = [], [], [], []
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        step = gaussian_step(sde, Prediction(kind, one, zero, t, path), t_next, noise_level, grid[1])
        push.append(step.mean.squeeze())
        sigma.append(torch.as_tensor(step.deviation, dtype=torch.float64).squeeze())
        # where the output does not determine the score, it is read a step later, with the SDE's own 1 - t
        at = grid[1] if isinstance(path, RectifiedFlow) and t >= 1 else t
        output = Prediction(kind, one, zero, at, path)
        if kind != "velocity":
            kappa.append(output.score.squeeze())
        elif at == 0:  # one step alone, where the second time is clean data: the limit
            kappa.append(-1 / t)
        else:
            kappa.append(output.score.squeeze() * at / t)
        gain.append(output.x_0.squeeze() if kind != "velocity" else Prediction(kind, one, zero, t, path).x_0.squeeze())
    return Schedule(path, kind, grid, *(torch.stack(parts) for parts in (sigma, push, kappa, gain)))


@dataclass(frozen=True)
class Strength:
    """The weight C1 and the guidance strength gamma of the RSM loss by step, (K,)."""

    C1: Tensor
    gamma: Tensor


STRENGTHS = (
    "ratio", "tempflow", "pcpo", "guard", "discount", "squared", "base-snr", "quadratic", "linear", "jacobian",
)  # fmt: skip


def strength(name: str, s: Schedule, prior: float = 1.0) -> Strength:
    """C1 and gamma under a method's name; `prior` is the variance of the data for 'jacobian'.

    ratio: the plain log-ratio or Gaussian KL (REINFORCE, DDPO, Flow-GRPO). tempflow, pcpo, guard: it times 2.25 sigma,
    zeta dt / w (or 0.5169 / w), sigma / dt. discount: times 0.9^i from the last step (SQDF). squared: residual
    nabla-DB. base-snr: the paper's redesign of it. quadratic, linear: VGG-Flow in units of velocity, and its redesign.
    jacobian: J(t) = d E[x_0 | x_t] / d x_t of a Gaussian of variance `prior` (section 8.2, ours).
    Raises InputError at another name.
    """
    check_word(name, STRENGTHS, "align's strengths")
    alpha, sigma_t = s.path.alpha(s.t), s.path.sigma(s.t)
    ones = torch.ones_like(s.t)
    if name in ("quadratic", "linear"):
        gamma = alpha ** (2 if name == "quadratic" else 1) * s.kappa.abs()  # alpha is 1 - t on a flow
        return Strength(1 / s.kappa**2, gamma)
    sigma = s.sigma.clamp(min=1e-300)
    base = torch.where(s.noisy, (s.Omega / sigma) ** 2 / 2, torch.zeros_like(s.t))
    if name == "squared":
        alpha2_next = s.path.alpha(s.times[1:]) ** 2
        return Strength(torch.where(s.noisy, (s.Omega / sigma**2) ** 2 / 2, torch.zeros_like(s.t)), alpha2_next)
    if name == "base-snr":
        return Strength(2 * base, ones)
    if name == "jacobian":
        signal = torch.where(alpha > 0, alpha, s.kappa.abs() * sigma_t)  # at a flow's t = 1 as kappa has it
        return Strength(base, signal * prior / (alpha**2 * prior + sigma_t**2))
    if name == "discount":
        return Strength(base, 0.9 ** torch.arange(len(s), dtype=torch.float64).flip(0))
    return Strength(base, multiplier(name, s))


def is_stochastic(s: Schedule, window: tuple[int, int] | None) -> Tensor:
    """Steps that are drawn, (K,) bool: those with a density, first to last of `window` where one is given."""
    drawn = s.noisy.clone()
    if window:
        drawn[: window[0]] = False
        drawn[window[1] + 1 :] = False
    return drawn


def multiplier(name: str, s: Schedule) -> Tensor:
    """m: what a policy gradient's log-ratio is multiplied by, (K,). Raises InputError where `name` has none."""
    if name == "ratio":
        return torch.ones_like(s.t)
    if name == "tempflow":
        return 2.25 * s.sigma
    if name == "pcpo":
        target = ZETA * s.dt if isinstance(s.path, RectifiedFlow) else torch.full_like(s.t, UNIFORM)
        return torch.where(s.noisy, target / s.w.abs().clamp(min=1e-300), torch.zeros_like(s.t))
    if name == "guard":
        return s.sigma / s.dt
    raise InputError(
        f"strength '{name}' is a first-order recipe's; a policy gradient takes ratio, tempflow, pcpo, guard"
    )


def effective_strength(given: Strength, s: Schedule, normaliser: Tensor | float) -> Tensor:
    """h: the push on the network's output per unit of the value's gradient, C1 gamma normaliser kappa, (K,).

    The normaliser is the estimator's: omega at the next state, 1 at the current one and for terminal gradients.
    """
    return given.C1 * given.gamma * normaliser * s.kappa.abs()
