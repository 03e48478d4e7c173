"""Distill and sharpen against their releases: DASH with TIRT and TAG, VSM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fieldsmith.methods.distill.curriculum import tirt
from fieldsmith.methods.distill.losses import pair_loss, weighted
from fieldsmith.methods.sharpen import losses as terms
from fieldsmith.methods.sharpen.step import Rows, Step
from fieldsmith.paths import VariancePreserving, noised, tag
from fieldsmith.samplers import range_log_variance
from tests.released import released, same, slope, tensor, tensors


def test_dashs_loss_under_tirt() -> None:
    """With its gradient for the curriculum, which the teacher's training has."""
    their = released("dash")
    s, s_null, t, t_null, noise = tensors(their, "student", "student_null", "teacher", "teacher_null", "noise")
    importance, abar = tensors(their, "lambda_at", "alphas_cumprod_at")
    for leaf in (s, s_null, importance):
        leaf.requires_grad_()
    weights = tirt(importance, (abar / (1 - abar)).clamp(max=5.0))
    same(weights / weights.mean(), their["weights"])

    def weighed(**terms: float) -> torch.Tensor:
        every = {"imitation": 0.0, "unconditional": 0.0, "anchor": 0.0, **terms}
        return weighted(pair_loss((s, s_null), (t, t_null), noise, **every), weights, weights)

    for name in ("imitation", "unconditional", "anchor"):
        same(weighed(**{name: 1.0}), their[name])
    loss = weighted(pair_loss((s, s_null), (t, t_null), noise), weights, weights)  # by its own defaults
    same(loss, their["loss"])
    same(slope(loss, s), their["slope"])
    same(slope(loss, s_null), their["null_slope"])
    fixed = weighted(pair_loss((s, s_null), (t, t_null), noise).detach(), weights, weights.detach())
    # `weighted` takes the sum that it divides by as given; the release's has its gradient too
    own = slope(fixed, importance) - loss.detach() * slope(weights, importance) / weights.detach().sum()
    same(own, their["lambda_slope"])


def test_dashs_guidance_schedule() -> None:
    their = released("dash")["tag"]
    same(tensor([tag(t / 1000) for t in their["t"]]), their["w"])


def test_vsms_loss_term_by_term() -> None:
    """Simple, L_vb with the decoder at the first time, the penalty with its weight; gradients of head and mean."""
    their = released("vsm")
    path = VariancePreserving((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
    x_0, noise, eps, value = tensors(their, "x_0", "noise", "eps", "fraction")
    eps.requires_grad_()
    value.requires_grad_()
    t = (torch.tensor(their["t"]) + 1).double() / path.length
    rows = Rows(x_0, noised(path, x_0, noise, t), t, noise)
    log_variance = range_log_variance(path, t, (value + 1) / 2)
    step: Any = SimpleNamespace(path=path, images=True)
    bound = Step._bound(step, rows, eps.detach(), log_variance)
    simple, smooth = terms.simple(eps, noise), terms.variance_penalty(log_variance)
    same(simple, their["mse"])
    same(bound[1:], their["vb"][1:])
    # at data the release approximates the normal distribution's integral by a tanh
    torch.testing.assert_close(bound[0], tensor(their["vb"][0]), rtol=2e-4, atol=0)
    same(smooth, their["smooth"])
    loss = simple + bound + terms.penalty_weight(their["rho"], path.sigma(t), "inverse-sigma") * smooth
    same(loss[1:], their["loss"][1:])
    found = torch.cat((slope(loss, eps), slope(loss, value)), 1)
    same(found[1:], their["slope"][1:])
    torch.testing.assert_close(found[0], tensor(their["slope"][0]), rtol=0, atol=1e-3)


def test_vsms_penalty() -> None:
    their = released("vsm")["penalty"]
    log_variance = tensor(their["log_variance"]).requires_grad_()
    found = terms.variance_penalty(log_variance)
    same(found, their["value"])
    same(slope(found, log_variance), their["slope"])
