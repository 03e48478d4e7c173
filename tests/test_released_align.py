"""Align's other recipes against their releases: RSM, TempFlow, BranchGRPO, VGG-Flow, nabla-DB, DAG, SQDF, adjoint
matching. What is not the same is said in docs/align.md, and is measured here."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fieldsmith.methods.align import guidance as G
from fieldsmith.methods.align.collect import carry, log_ratio_slope
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.losses import balance_loss, rsm_loss
from fieldsmith.methods.policy import losses as L
from fieldsmith.methods.policy.advantages import advantages
from fieldsmith.methods.policy.rollouts import Plan, roll
from fieldsmith.methods.policy.schedule import Schedule, multiplier, schedule, strength
from fieldsmith.paths import Prediction
from fieldsmith.samplers import dance_sde_step, ddim_step
from tests.released import FLOW, SD15, released, same, slope, tensor, tensors

DIM = 8
STEPS = SD15.time(torch.arange(981, -1, -20)).double()  # SD1.5's 50 steps, as the releases take them


def flow_steps(sigmas: list[float]) -> Schedule:
    return schedule(FLOW, tensor(sigmas), "velocity", "flow-sde", 0.7)


def ddim_steps(sde: Any = "ddim", level: float = 1.0) -> Schedule:
    return schedule(SD15, torch.cat((STEPS, torch.zeros(1))), "eps", sde, level)


def step_ids(their: dict[str, Any]) -> Tensor:
    return (981 - torch.tensor(their["t"])) // 20


def policy(their: dict[str, Any], s: Schedule, trust: Any, weight: str, f: Tensor, k: Tensor) -> Tensor:
    """The recipe's loss a row, over the numbers of a row as theirs are."""
    old, noise, A = tensors(their, "old", "noise", "advantage")
    clip = their["clip"] * DIM  # theirs bounds means, ours sums
    log_rho = L.trust_log_ratio(trust, f, old, noise, s.w[k])
    return L.policy_loss(log_rho, A, multiplier(weight, s)[k], trust, clip, s.sigma[k], DIM) / DIM


EXACT = [
    ("grpo_guard", None, "guard-hinge", "guard"),  # GRPO-Guard in RSM's form, and so grpo-guard
    ("fair_clip2", None, "fair-hinge", "guard"),  # rsm-branch-sd35
    ("base", None, "hinge", "ratio"),
    ("base", "ppo", "clip", "ratio"),
    ("tempflow_reweight", "ppo", "clip", "tempflow"),
]


@pytest.mark.parametrize(("name", "form", "trust", "weight"), EXACT)
def test_rsms_policy_losses_on_flows(name: str, form: str | None, trust: Any, weight: str) -> None:
    their = released("rsm")["flow"]
    row = their[name][form] if form else their[name]
    f, s, k = tensor(their["output"]).requires_grad_(), flow_steps(their["sigmas"]), torch.tensor(their["step"])
    loss = policy(their, s, trust, weight, f, k)
    same(loss, row["loss"])
    same(slope(loss, f), row["slope"])


@pytest.mark.parametrize(
    ("name", "form", "trust", "weight"),
    [
        ("pcpo_reweight", None, "hinge", "pcpo"),  # the weight stands outside of our hinge, inside of theirs
        ("pcpo_reweight", "ppo", "hinge", "pcpo"),
        ("grpo_guard", "ppo", "guard-hinge", "guard"),  # GRPO-Guard clips a ratio where RSM and we have a hinge
    ],
)
def test_pcpo_and_grpo_guard_pull_alike_where_nothing_is_clipped(
    name: str, form: str | None, trust: Any, weight: str
) -> None:
    their = released("rsm")["flow"]
    f, s, k = tensor(their["old"]).requires_grad_(), flow_steps(their["sigmas"]), torch.tensor(their["step"])
    theirs = their[name]["ppo_on_policy"]["slope"] if form else their[name]["on_policy"]
    same(slope(policy(their, s, trust, weight, f, k), f), theirs)


def test_rsms_ddim_steps_and_log_ratios() -> None:
    their = released("rsm")["diffusion"]
    f, old, x, noise = tensors(their, "output", "old", "sample", "noise")
    f.requires_grad_()
    k = step_ids(their)
    for name, sde, level in (("ddim", "ddim", 1.0), ("ddim_uniform", "ddim-uniform", 4.5)):
        row, s = their[name], ddim_steps(sde, level)
        log_rho = L.log_ratio(f, old, noise, s.w[k]) / DIM
        same(log_rho, (tensor(row["log_prob"]) - tensor(row["old_log_prob"])).tolist())
        same(slope(log_rho, f), row["slope"])
    before = Prediction("eps", old, x, STEPS[k], SD15)
    after = ddim_step(before, STEPS[k + 1], 1.0)
    same(after.mean + after.deviation * noise, their["ddim"]["next"])
    same(ddim_steps().w[k].abs(), their["weights"])


def test_pcpos_weight_on_diffusion_and_its_advantages() -> None:
    their = released("rsm")["diffusion"]
    f, s, k = tensor(their["old"]).requires_grad_(), ddim_steps("ddim-uniform", 4.5), step_ids(their)
    same(slope(policy(their, s, "hinge", "pcpo", f, k), f), their["hinge_on_policy"]["slope"])
    given = their["advantages"]
    group = torch.tensor([ord(label) for label in given["labels"]])
    same(advantages(tensor(given["rewards"]), group, "std"), given["of"])


def first_order(s: Schedule, name: str, k: Tensor, f: Tensor, reference: Tensor, guidance: Tensor) -> Tensor:
    given, kappa = strength(name, s), L.over(s.kappa[k], f)
    return rsm_loss(kappa * f, kappa * reference, kappa * f, guidance, given.C1[k], given.gamma[k])


@pytest.mark.parametrize(
    ("name", "mode", "recipe", "half"),
    [("squared", "squared", "residual-nabla-db", 2), ("base-snr", "sigma", "rsm-terminal-sd15", 1)],
)
def test_rsms_first_order_losses_on_sd15(name: str, mode: str, recipe: str, half: int) -> None:
    """With the recipe's own weight of the proximal term; residual nabla-DB's loss is half of the release's."""
    their = released("rsm")["nabla"]
    f, reference, old, g = tensors(their, "output", "reference", "old", "reward_gradient")
    f.requires_grad_()
    s, k = ddim_steps(), step_ids(their)
    guidance = L.over(s.omega[k], g) * g * their["scale"]
    proximal = AlignConfig.preset_of(recipe, "paper", {}).proximal
    assert proximal * half == their["reg"]
    loss = (first_order(s, name, k, f, reference, guidance) + proximal * L.square(f - old) / DIM).mean() * half
    same(loss, their[mode]["loss"])
    same(slope(loss, f), their[mode]["slope"])


@pytest.mark.parametrize("fixture", ["rsm", "vgg_flow"])
@pytest.mark.parametrize("name", ["quadratic", "linear"])
def test_vgg_flows_target(fixture: str, name: str) -> None:
    """rsm: VGG-Flow by the estimate of x_0 and the redesign by the endpoint's gradient; vgg_flow: both by the first."""
    their = released(fixture)
    their = their["vgg"] if fixture == "rsm" else their
    row = their[name] if fixture == "rsm" else their["found"]["quad" if name == "quadratic" else name]
    f, reference, x, c = tensors(their, "output", "reference", "sample", "c")
    s, k = flow_steps(their["sigmas"]), torch.tensor(their["step"])

    def value(x_0: Tensor) -> Tensor:
        return (x_0 * c + x_0.square() / 2).flatten(1).sum(1)

    def place(x: Tensor, t: Tensor) -> Prediction:
        return Prediction("velocity", f, x, t, FLOW)

    gradient = G.tweedie(value, place, x, s.t[k], "identity")
    if fixture == "rsm" and name == "linear":
        gradient = c
    same(gradient, their["gradient"] if fixture == "vgg_flow" else row["gradient"])
    f = f.requires_grad_()
    loss = first_order(s, name, k, f, reference, gradient * their["scale"])
    same(loss.mean() if fixture == "vgg_flow" else loss, row["loss"])
    same(slope(loss.mean() if fixture == "vgg_flow" else loss, f), row["slope"])


@pytest.mark.parametrize("name", ["no_flow", "full"])
def test_residual_nabla_dbs_losses(name: str) -> None:
    """Forward and reverse; each of ours is half of theirs but the reverse one, which trains g_phi alone."""
    their = released("nabla_gfn")
    f, reference, x, noise, g = tensors(their, "output", "reference", "sample", "noise", "reward_gradient")
    flow, flow_next = (part.requires_grad_() for part in tensors(their, "flow", "flow_next"))
    f.requires_grad_()
    s, k, row = ddim_steps(), step_ids(their), their[name]
    own, base = (output + 0.3 * torch.tanh(x) for output in (f, reference))
    gamma = L.over(strength("squared", s).gamma[k], g)
    guidance = L.over(s.omega[k], g) * (g * their["scale"] + (flow_next / gamma if name == "full" else 0))
    forward = 2 * first_order(s, "squared", k, own, base, guidance).mean()
    same(forward, row["forward"])
    same(slope(forward + 100 * (own - noise).square().mean(), f), row["slope"])
    if name == "no_flow":
        return
    networks = [tensor(their["reference"]), tensor(their["output"])]

    class Reference:
        def __enter__(self) -> None:
            networks.reverse()

        def __exit__(self, *_: object) -> None:
            networks.reverse()

    def predict(x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
        return Prediction("eps", networks[1][prompt] + 0.3 * torch.tanh(x), x, t, SD15)

    context: Any = SimpleNamespace(
        schedule=s, predict=predict, sde="ddim", noise_level=1.0, model=SimpleNamespace(reference=Reference)
    )
    rows: Any = SimpleNamespace(x=x, x_next=tensor(their["next_state"]), step=k, prompt=torch.arange(3))
    difference = tensor(their["own_reverse"]) - tensor(their["reference_reverse"])
    found = log_ratio_slope(context, rows)
    torch.testing.assert_close(found, difference, rtol=1e-4, atol=1e-4)  # of terms of some hundreds
    neighbour = L.over(SD15.alpha(s.t[k]) ** 2, g) * g * their["scale"]
    reverse = (flow + neighbour + difference).square().mean()
    same(reverse, row["backward"])
    same(slope(reverse, flow), row["flow_slope"])


def test_dags_detailed_balance() -> None:
    """The same square; theirs takes the noising kernel's log-probability where ours takes the reference's."""
    their = released("dag")
    f, x, after, log_pb, flow_next = tensors(their, "output", "sample", "next_state", "log_pb", "flow_next")
    flow = tensor(their["flow"]).requires_grad_()
    f.requires_grad_()
    k = step_ids(their)
    log_pf = ddim_step(Prediction("eps", f, x, STEPS[k], SD15), STEPS[k + 1], 1.0).log_prob(after) / DIM
    same(log_pf, their["log_pf"])
    loss = balance_loss(flow, flow_next, log_pf - log_pb)
    same(loss, their["loss"])
    same(slope(loss, f), their["slope"])
    same(slope(loss, flow), their["flow_slope"])


def test_sqdfs_pull() -> None:
    """Their KL is twice ours and a mean over a state's numbers: their alpha is `temperature` times half of these."""
    their = released("sqdf")
    f, reference, c = tensors(their, "output", "reference", "c")
    f.requires_grad_()
    s, k = ddim_steps(), step_ids(their)
    same(2 * L.gaussian_kl(f, reference, s.w[k]) / DIM, their["kl"])
    temperature = 2 * their["alpha"] / DIM
    guidance = L.over(s.omega[k], c) * c / temperature
    loss = 2 * their["alpha"] * first_order(s, "discount", k, f, reference, guidance)
    same(slope(loss, f), their["slope"])
    published = AlignConfig.preset_of("sqdf", "paper", {}).temperature  # of alpha 2 at SD1.5's 16,384 numbers
    assert published == pytest.approx(2 * their["alpha"] / 16_384, rel=0.02)


def test_tempflow_grpos_loss() -> None:
    their = released("tempflow_grpo")
    s = flow_steps(their["sigmas"])
    for row in their["rows"]:
        f, reference = tensors(row, "output", "reference")
        f.requires_grad_()
        k = torch.full((3,), row["step"])
        found = policy(row | {"advantage": their["advantage"], "clip": their["clip"]}, s, "clip", "tempflow", f, k)
        kl = L.gaussian_kl(f, reference, s.w[k]).mean() / DIM
        same(found.mean(), row["policy"])
        same(kl, row["kl"])
        same(slope(found.mean() + their["beta"] * kl, f), row["slope"])


def test_branch_grpos_steps_rewards_and_advantages() -> None:
    """A node's reward is the mean over its leaves, compared among nodes of a depth; Bessel's correction is theirs."""
    their = released("branch_grpo")
    output, x, after, sigmas = tensors(their, "output", "sample", "after", "sigmas")
    for row in their["steps"]:
        f, k = output.clone().requires_grad_(), row["step"]
        step = dance_sde_step(Prediction("velocity", f, x, sigmas[k], FLOW), sigmas[k + 1], their["eta"])
        same(step.log_prob(after) / DIM, row["log_prob"])
        same(slope(step.log_prob(after) / DIM, f), row["slope"])

    children = torch.tensor(their["children"])
    s = schedule(FLOW, torch.linspace(1, 0, 5), "velocity", "dance-sde", 0.3)
    plan = Plan("tree", children, torch.ones(4, dtype=torch.bool))
    draws = torch.Generator().manual_seed(0)
    tree = roll(
        lambda x, t, prompt: Prediction("velocity", 0.5 * x, x, t, FLOW),
        torch.randn(1, 2, generator=draws), torch.zeros(1, dtype=torch.long), s, plan, "dance-sde", 0.3, draws,
    )  # fmt: skip
    returns = tree.mean_over_endpoints(tensor(their["rewards"]))
    step = tree.transitions.step
    n = torch.bincount(step)[step]
    ours = advantages(returns, step, "std", floor=1e-8) * ((n - 1) / n).sqrt()
    for depth in range(1, 5):  # their depth counts the root, ours the step that led there
        same(returns[step == depth - 1], their["node_rewards"][depth])
        same(ours[step == depth - 1], their["advantages"][depth])


def test_adjoint_matchings_adjoints_and_loss() -> None:
    """Theirs pulls a step by the adjoint of the state before it, ours by that of the state after it."""
    their = released("adjoint_matching")
    states, c, adjoints, f = tensors(their, "states", "reward_gradient", "adjoints", "output")
    grid = torch.cat((SD15.time(torch.tensor(their["timesteps"])), SD15.time(torch.zeros(1)))).double()
    s = schedule(SD15, grid, "eps", "ddim", 1.0)

    def predict(x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
        return Prediction("eps", 0.5 * x + 0.3 * torch.tanh(x), x, t, SD15)

    context: Any = SimpleNamespace(
        schedule=s, predict=predict, sde="ddim", noise_level=1.0,
        model=SimpleNamespace(device="cpu", reference=nullcontext),
    )  # fmt: skip
    carried, prompt = their["multiplier"] * c, torch.zeros(2)
    for k in reversed(range(len(s))):
        carried = carry(context, states[:, k], k, prompt, carried)
        same(-carried, adjoints[:, k].tolist())

    k, f = torch.full((2,), their["step"]), f.requires_grad_()
    base = predict(states[:, k[0]], s.t[k], prompt).value
    a = -adjoints[:, k[0]]
    loss = 2 * DIM * first_order(s, "ratio", k, f, base, L.over(s.omega[k], a) * a)
    same(loss, their["loss"])
    same(slope(loss, f), their["slope"])
