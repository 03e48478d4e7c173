"""Losses and steps are those of the releases: numbers that their own functions gave (tests/released), to 1e-5."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fieldsmith.methods.edit import credit
from fieldsmith.methods.policy import losses as L
from fieldsmith.methods.policy.advantages import advantages, optimality
from fieldsmith.methods.policy.old import kept
from fieldsmith.paths import Prediction
from fieldsmith.samplers import dance_sde_step, flow_sde_step
from tests.released import FLOW, released, same, slope, tensor


def test_flow_grpos_step_and_log_probability() -> None:
    their = released("flow_grpo")["step"]
    output, x, sigmas = tensor(their["output"]).requires_grad_(), tensor(their["sample"]), tensor(their["sigmas"])
    at = torch.tensor(their["step"])
    pred = Prediction("velocity", output, x, sigmas[at], FLOW)
    step = flow_sde_step(pred, sigmas[at + 1], 0.7, sigmas[1])
    log_prob = step.log_prob(tensor(their["after"])) / x[0].numel()  # theirs is a mean over a state's numbers
    same(step.mean, their["mean"])
    same(step.deviation.flatten() / (sigmas[at] - sigmas[at + 1]).sqrt(), their["std"])
    same(log_prob, their["log_prob"])
    same(slope(log_prob, output), their["slope"])


def test_flow_grpos_clipped_loss_and_kl() -> None:
    """Their ratio is of means over numbers, ours of sums; their KL is the exact one times the step's length."""
    their, dim, dt = released("flow_grpo")["loss"], 8, 0.1
    new, std = tensor(their["new"]).requires_grad_(), tensor(their["std"])
    advantage = tensor(their["advantage"]).clamp(-5, 5)
    log_rho = dim * (new - their["old"])
    loss = L.policy_loss(log_rho, advantage, torch.ones(4), "clip", 1e-4 * dim, torch.ones(4), dim).mean() / dim
    same(loss, their["policy_loss"])
    same(slope(loss, new), their["slope"])
    kl = L.gaussian_kl(tensor(their["mean"]), tensor(their["mean_ref"]), 1 / (std * dt**0.5)) / dim
    same((kl * dt).mean(), their["kl_loss"])


@pytest.mark.parametrize(("kind", "name"), [("global-std", "True"), ("std", "False")])
def test_flow_grpos_advantages(kind: Any, name: str) -> None:
    their = released("flow_grpo")["advantages"]
    group = torch.tensor([ord(prompt) for prompt in their["prompts"]])
    same(advantages(tensor(their["rewards"]), group, kind), their[name])


def test_dance_grpos_step_and_log_probability() -> None:
    their = released("dance_grpo")
    x, sigmas = tensor(their["sample"]), tensor(their["sigmas"])
    for row in their["steps"]:
        output, k = tensor(their["output"]).requires_grad_(), row["step"]
        pred = Prediction("velocity", output, x, sigmas[k], FLOW)
        log_prob = dance_sde_step(pred, sigmas[k + 1], their["eta"]).log_prob(tensor(their["after"])) / x[0].numel()
        same(pred.x_0, row["x_0"])
        same(log_prob, row["log_prob"])
        same(slope(log_prob, output), row["slope"])


@pytest.mark.parametrize("which", [0, 1])
def test_diffusion_nfts_loss(which: int) -> None:
    their = released("diffusion_nft")
    row, dim = their["losses"][which], 8
    f, x_0, noise = (tensor(their[name]) for name in ("forward_prediction", "x0", "noise"))
    f.requires_grad_()
    r = optimality(tensor(their["advantage"]), 5.0)
    loss = L.nft_loss(f, tensor(their["old_prediction"]), noise - x_0, r, row["beta"], tensor(their["t"]))
    kl = L.square(f - tensor(their["ref_forward_prediction"])) / dim
    loss = (5.0 / row["beta"] * loss + 1e-4 * kl).mean()
    same(loss, row["loss"])
    same(slope(loss, f), row["slope"])


@pytest.mark.parametrize("name", ["ramp", "late"])
def test_diffusion_nfts_old_policy(name: Any) -> None:
    their = released("diffusion_nft")["old"]
    assert [kept(name, n) for n in their["updates"]] == pytest.approx(their[name])


@pytest.mark.parametrize("which", [0, 1])
def test_awms_pseudo_likelihood(which: int) -> None:
    """At advantage 1 without a bound the loss is minus the ratio."""
    their = released("awm")
    row = their["found"][which]
    f, old, x_0, noise = (tensor(their[name]) for name in ("output", "old", "x0", "noise"))
    f.requires_grad_()
    t = None if row["weighting"] == "Uniform" else tensor(their["t"])
    log_rho = (-L.awm_loss(f, old, noise - x_0, torch.ones(3).double(), 1e6, t)).log()
    same(log_rho, (tensor(row["log_prob"]) - tensor(row["old"])).tolist())
    same(slope(log_rho, f), row["slope"])


def test_edit_r1s_filter_and_advantages() -> None:
    their = released("edit_r1")
    reward = tensor(their["rewards"]).reshape(3, 4, 1)
    apart = credit.spread((reward,), (1.0,), "reward")
    same(apart[:, 0], tensor(their["stds"]).reshape(3, 4)[:, 0].tolist())
    assert credit.keep(apart, reward, 0.05, 0.9)[:, 0].repeat_interleave(4).tolist() == their["taught"]
    ours = credit.fuse((reward,), (1.0,), "reward", 1e-4, over_all=True)
    # they add 1e-4 to the deviation, we take it for the least
    same(ours.flatten() * reward.std(correction=0) / (reward.std(correction=0) + 1e-4), their["advantages"])
