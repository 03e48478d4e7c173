"""Estimates of value guidance, the gradient of the soft value by state (RSM notes, 1.3, 2 and 8.1).

In: rows or states, endpoints' rewards, or a differentiable reward of clean states. Out: Psi_hat, detached, in units of
score, at the same places. Zeroth order: rewards times the noise that led to them. First order: gradients of the reward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fieldsmith.methods.policy.losses import over
from fieldsmith.methods.policy.schedule import Schedule
from fieldsmith.paths import Prediction
from fieldsmith.samplers import euler

Jacobian = Literal["full", "identity"]
Value = Callable[[Tensor], Tensor]  # clean states (n, ...) -> differentiable rewards (n,), in units of alpha
Place = Callable[[Tensor, Tensor], Prediction]  # x (n, ...), t (n,) or () -> what the network says, with gradients


def reverse_noise(advantage: Tensor, noise: Tensor, step: Tensor, s: Schedule) -> Tensor:
    """omega A eps / sigma: the zeroth-order estimate from the noise of one step, (n, ...)."""
    return over(s.omega[step] * advantage.double() / s.sigma[step], noise) * noise


def clean_gradient(value: Value, x_0: Tensor) -> Tensor:
    """grad r(x_0), (m, ...): what terminal estimators carry to every step."""
    x_0 = x_0.detach().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(value(x_0).sum(), x_0)
    return gradient.detach()


def tweedie(
    value: Value, place: Place, x: Tensor, t: Tensor, jacobian: Jacobian, lookahead: Tensor | None = None
) -> Tensor:
    """grad_x r(x_0_hat(x)), (n, ...), at states x (n, ...) and times t (n,) or ().

    full: through the network. identity: the network's output held constant (VGG-Flow), so that d x_0 / d x is 1 on a
    flow and 1 / alpha on a variance-preserving path. lookahead (j,): times t > t_1 > ... that ODE steps visit before
    x_0 is read off (SQDF); None reads it off at once. At t = 0 x is x_0.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        x_0 = denoised(place, x, t, jacobian, lookahead)
        (gradient,) = torch.autograd.grad(value(x_0).sum(), x)
    return gradient.detach()


def denoised(
    place: Place, x: Tensor, t: Tensor, jacobian: Jacobian = "full", lookahead: Tensor | None = None
) -> Tensor:
    """x_0_hat(x), after ODE steps through the times `lookahead` where given."""
    for t_next in lookahead if lookahead is not None else ():
        x = euler(place(x, t), t_next)
        t = t_next
    if t.ndim == 0 and float(t) == 0:
        return x
    if jacobian == "full":
        return place(x, t).x_0
    with torch.no_grad():  # no graph through the network: one forward, not three
        output = place(x.detach(), t)
    return Prediction(output.kind, output.value, x, output.t, output.path).x_0
