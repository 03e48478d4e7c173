"""Policy losses, their trust regions and the exact quantities of one step (RSM notes, 2.1, 4.3, 4.4).

Pure functions of tensors. Rows are (n, ...); per-row scalars (n,). Log-ratios, KL and `policy_loss` are sums over a
row, which callers divide once by its dimension, so that a learning rate means the same at every resolution; `nft_loss`
and `awm_loss` are means over a row already.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Trust = Literal["none", "clip", "hinge", "guard-hinge", "fair-hinge"]
HINGES = {"hinge": 0, "guard-hinge": 1, "fair-hinge": 2}  # the power of the step's deviation in the threshold's unit


def over(scalar: Tensor, rows: Tensor) -> Tensor:
    """Per-row scalars (n,) shaped to broadcast against rows (n, ...)."""
    return scalar.to(rows).reshape(-1, *[1] * (rows.ndim - 1))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all but the first dimension, (n,)."""
    return (a * b).flatten(1).sum(1)


def square(a: Tensor) -> Tensor:
    return dot(a, a)


def log_ratio(output: Tensor, old: Tensor, noise: Tensor, w: Tensor) -> Tensor:
    """log pi / pi_old at mean_old + sigma eps, exactly: w <d, eps> - w^2 |d|^2 / 2 with d = f - f_old; (n,)."""
    difference = output - old
    w = w.to(output)
    return w * dot(difference, noise) - w**2 * square(difference) / 2


def trust_log_ratio(trust: Trust, output: Tensor, old: Tensor, noise: Tensor, w: Tensor) -> Tensor:
    """What `policy_loss` takes for log rho, (n,): log rho, and for guard-hinge its linear part w <d, eps>."""
    if trust == "guard-hinge":
        return w.to(output) * dot(output - old, noise)
    return log_ratio(output, old, noise, w)


def gaussian_kl(output: Tensor, reference: Tensor, w: Tensor) -> Tensor:
    """KL(pi || pi_ref) of one step of equal deviation, exactly: w^2 |f - f_ref|^2 / 2; (n,) in nats."""
    return w.to(output) ** 2 * square(output - reference) / 2


def policy_loss(
    log_rho: Tensor,
    advantage: Tensor,
    strength: Tensor,
    trust: Trust,
    clip: float,
    deviation: Tensor,
    dim: int = 1,
) -> Tensor:
    """-A m log rho under a trust region; all (n,). Not yet divided by the dimension of a row.

    none: the log-likelihood surrogate. clip: PPO on rho; with `dim` > 1 on its geometric mean over a row's dimensions,
    as released, where it is 1 + log rho / dim to first order and `clip` bounds nats of the whole. hinge:
    max(0, c |A| - A log rho), zero once rho has moved by c nats in A's favour (PCPO). fair-hinge: the same on
    sigma^2 log rho, a displacement of x, so that c means the same at every step (RSM, section 4.4). guard-hinge: on
    sigma times the linear part of log rho (GRPO-Guard as released; `trust_log_ratio`).
    """
    if trust == "clip":
        rho, most = (log_rho / dim).exp(), clip / dim
        return -strength * dim * torch.minimum(rho * advantage, rho.clamp(1 - most, 1 + most) * advantage)
    if trust == "none":
        return -strength * advantage * log_rho
    unit = deviation.to(log_rho) ** HINGES[trust]
    return strength / unit * (clip * advantage.abs() - advantage * unit * log_rho).clamp(min=0)


def clipped(log_rho: Tensor, advantage: Tensor, trust: Trust, clip: float, deviation: Tensor, dim: int = 1) -> Tensor:
    """Which rows are outside the trust region and so have no gradient; (n,) bool. The mean is the clip fraction."""
    if trust == "clip":
        rho, most = (log_rho / dim).exp(), clip / dim
        return ((rho > 1 + most) & (advantage > 0)) | ((rho < 1 - most) & (advantage < 0))
    if trust == "none":
        return torch.zeros_like(log_rho, dtype=torch.bool)
    return log_rho * deviation.to(log_rho) ** HINGES[trust] * advantage.sign() > clip


def nft_loss(
    output: Tensor, old: Tensor, target: Tensor, optimality: Tensor, beta: float, adaptive: Tensor | None
) -> Tensor:
    """DiffusionNFT: r |v_plus - v*|^2 + (1 - r) |v_minus - v*|^2, v_plus = (1 - beta) v_old + beta v; (n,).

    optimality r (n,) in [0, 1]; `adaptive` holds |d x_0 / d f| of the rows (n,), or is None for plain weights: with it
    the error is that of x_0, and each branch is divided by its own mean absolute error, which carries no gradient.
    """
    plus, minus = (1 - beta) * old + beta * output, (1 + beta) * old - beta * output
    dim = output[0].numel()

    def error(branch: Tensor) -> Tensor:
        apart = branch - target
        if adaptive is None:
            return square(apart) / dim
        apart = over(adaptive, apart) * apart
        return square(apart) / dim / apart.detach().abs().flatten(1).mean(1).clamp(min=1e-5)

    return optimality * error(plus) + (1 - optimality) * error(minus)


def awm_loss(
    output: Tensor, old: Tensor, target: Tensor, advantage: Tensor, clip: float, t: Tensor | None = None
) -> Tensor:
    """AWM: PPO on the pseudo-likelihood exp(-e), e = |v - v*|^2 the mean over a row's dimensions; (n,).

    With times t (n,) it is exp(-4 t e^(1/4)), the generalised Huber weighting that AWM is released with.
    """
    dim = output[0].numel()

    def penalty(of: Tensor) -> Tensor:
        e = square(of - target) / dim
        return e if t is None else 4 * t.to(e) * (e + 1e-10) ** 0.25  # whose slope at 0 is infinite

    rho = (penalty(old) - penalty(output)).exp()
    return -torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)
