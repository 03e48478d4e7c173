"""Converged training of `align`: closed-form affine fits on Gaussians (T12), and mixtures end to end (T15).

RSM notes, 8.2 and 8.3. Oracles O1 (a Gaussian under a linear reward), O2 (under a quadratic one), O3 (the triangle).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fieldsmith import verb
from fieldsmith.methods.align.collect import Batch, collect
from fieldsmith.methods.align.config import RECIPES, REGRESSIONS, AlignConfig
from fieldsmith.methods.align.context import AlignContext
from fieldsmith.methods.align.objectives import transition_losses
from fieldsmith.methods.align.step import Inputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.methods.policy import losses as L
from fieldsmith.models.exact import Exact
from fieldsmith.paths import RectifiedFlow, VariancePreserving
from fieldsmith.rewards import Reward
from fieldsmith.samplers import ddim_grid, flow_grid, gaussian_step
from fieldsmith.training import Log
from fieldsmith.worlds.mixtures import Mixture, isotropic, triangle
from tests.drawn import seeded

FLOW = RectifiedFlow()
TOY = VariancePreserving((1 - torch.linspace(1e-4, 0.03, 500, dtype=torch.float64)).cumprod(0))
PATHS = pytest.mark.parametrize("path", [FLOW, TOY], ids=["flow", "vp"])
K, PRIOR, LAM = 16, 0.8**2, 1.5
MEAN, CENTRE, SLOPE = torch.tensor([0.7, -0.4]).double(), torch.tensor([-0.3, 0.5]).double(), torch.tensor([0.8, -0.5])

O1 = Reward("linear", True, lambda x, prompts: x @ SLOPE.to(x))
O2 = Reward("quadratic", True, lambda x, prompts: -LAM / 2 * (x - CENTRE.to(x)).square().sum(1))
REWARDS = pytest.mark.parametrize("reward", [O1, O2], ids=["O1", "O2"])


# T12: an affine correction at each step, fitted by least squares to what a collection asks for


class Affine(nn.Module):
    """A_k x + c_k at step k of the grid."""

    def __init__(self, times: Tensor, d: int):
        super().__init__()
        self.times = times
        self.A, self.c = nn.Parameter(torch.zeros(len(times), d, d)), nn.Parameter(torch.zeros(len(times), d))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        k = (t[:, None] - self.times).abs().argmin(1)
        return torch.einsum("nab,nb->na", self.A[k], x) + self.c[k]


def preset(name: str) -> AlignConfig:
    return AlignConfig.preset_of(name, "laptop", {})


def gaussian() -> Mixture:
    return isotropic(MEAN[None], math.sqrt(PRIOR))


def optimum(reward: Reward) -> Mixture:
    linear, quadratic = (SLOPE, None) if reward is O1 else (LAM * CENTRE, LAM * torch.eye(2).double())
    return gaussian().tilted(linear, quadratic).mixture


def start(path, reward: Reward, name: str, **settings) -> AlignContext:
    """A context whose network is an untrained affine correction."""
    grid = flow_grid(K) if path is FLOW else ddim_grid(TOY, K)
    model = Exact(gaussian(), path, grid)
    model.network = Affine(grid[:-1], 2)
    config = replace(
        preset(name), prompts=("",), steps=K, prompts_per_epoch=1, temperature=1.0, chunk=1_000_000, full=True,
        subset="all", train_steps=None, proximal=0.0, **{"rollouts": 2000, **settings},
    )  # fmt: skip
    setting = replace(AlignContext.of(model, config, reward), prior=PRIOR)
    model.unfreeze("all")
    return setting


@torch.no_grad()
def fit(context: AlignContext, batch: Batch, wanted: Tensor, keep: float) -> None:
    """Least squares of the outputs' wished shifts (n, d) on (x, 1) at every step; `keep` of the old answer stays."""
    rows, network = batch.rollout.transitions, context.model.network
    for k in rows.step.unique().tolist():
        at = rows.step == k
        x = torch.cat((rows.x[at], torch.ones(int(at.sum()), 1)), 1).double()
        found = torch.linalg.lstsq(x, wanted[at].double()).solution.T.float()
        network.A[k] = keep * network.A[k] + (1 - keep) * found[:, :2]
        network.c[k] = keep * network.c[k] + (1 - keep) * found[:, 2]


def regress(context: AlignContext, rounds: int, keep: float = 0.5) -> Batch:
    """To the fixed point: collect under the current policy, fit, repeat."""
    s, gamma = context.schedule, context.strength.gamma
    for epoch in range(rounds):
        batch = collect(context, epoch, Log())
        step = batch.rollout.transitions.step
        fit(
            context,
            batch,
            L.over((gamma / s.kappa)[step], batch.guidance) * batch.guidance,
            keep * (epoch < rounds - 1),
        )
    return batch


def chain(model: Exact, setting: AlignContext) -> list[tuple[Tensor, Tensor, float]]:
    """The sampler of an affine field: x' = M x + o + sigma eps, (M, o, sigma) by step."""
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    condition, grid, steps = model.encode([""] * 3), model.grid_times, []
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        with torch.no_grad():
            pred = model.predict(x, t, condition)
            step = gaussian_step(setting.sde, pred, t_next, setting.noise_level, grid[1])
        mean = step.mean.double()
        steps.append(((mean[1:] - mean[0]).T, mean[0], float(step.deviation.flatten()[0])))
    return steps


def moments(steps: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Mean and covariance at clean data, from standard normal noise."""
    mean, covariance = torch.zeros(2).double(), torch.eye(2).double()
    for M, o, sigma in steps:
        mean, covariance = M @ mean + o, M @ covariance @ M.T + sigma**2 * torch.eye(2).double()
    return mean, covariance


def best(reference: list[tuple[Tensor, Tensor, float]], reward: Reward) -> tuple[Tensor, Tensor]:
    """Moments of the policy that maximises E[r] - KL(path) among those with the chain's own deviations, in closed form.

    V_K = r and V_k(x) = max_u E[V_{k+1}(m(x) + u + sigma eps)] - |u|^2 / (2 sigma^2): linear stays linear, and
    -h |x - c|^2 / 2 becomes -h |m(x) - c|^2 / (2 (1 + h sigma^2)), with m(x) = a x + o.
    """
    steps, g, h, c = [], SLOPE.double(), LAM, CENTRE
    for M, o, sigma in reversed(reference):
        a = float(M[0, 0])
        torch.testing.assert_close(M, a * torch.eye(2).double(), atol=1e-5, rtol=0)
        if reward is O1:
            steps.insert(0, (M, o + sigma**2 * g, sigma))
            g = a * g
        else:
            pull = h * sigma**2 / (1 + h * sigma**2)
            steps.insert(0, ((1 - pull) * M, (1 - pull) * o + pull * c, sigma))
            h, c = a**2 * h / (1 + h * sigma**2), (c - o) / a
    return moments(steps)


def reference(context: AlignContext) -> list[tuple[Tensor, Tensor, float]]:
    with context.model.reference():
        return chain(context.model, context)


def assert_moments(ours: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], tolerance: float) -> None:
    for found, wanted in zip(ours, truth, strict=True):
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def tilted_field(context: AlignContext, reward: Reward) -> tuple[Tensor, Tensor]:
    """Moments that the exact field of p* reaches on the same grid."""
    setting = context
    return moments(chain(Exact(optimum(reward), setting.model.path, setting.model.grid_times), setting))


@PATHS
@REWARDS
def test_t12_gaussian_terminal_converges_to_the_tilted_law(path, reward):
    """To what the field of p* makes on this grid, whose mean is p*'s; its variance is too small by the grid alone."""
    context = start(path, reward, "gaussian-terminal")
    assert context.sde == "ddim"
    regress(context, 2 if reward is O1 else 8)  # a linear reward's guidance is the same under every policy
    ours, before, law = moments(chain(context.model, context)), moments(reference(context)), optimum(reward)
    assert_moments(ours, tilted_field(context, reward), 0.015)
    assert float((ours[0] - law.mean).norm()) < 0.05 * float((before[0] - law.mean).norm())


def test_t12_gaussian_terminal_needs_the_memoryless_step():
    """Other noise keeps the marginals but not x_0 given x_t: a bias of a fifth of p*'s variance at any step size."""
    context = start(FLOW, O2, "gaussian-terminal", sde="flow-sde")
    regress(context, 8)
    ours, truth = moments(chain(context.model, context)), tilted_field(context, O2)
    assert float((ours[1] - truth[1]).diagonal().abs().min()) > 0.04


@PATHS
@REWARDS
@pytest.mark.parametrize("sde", ["auto", "ddim"])
def test_t12_adjoint_matching_converges_to_the_best_policy_of_the_chain(path, reward, sde):
    """However coarse the grid: at its fixed point the lean adjoint is the discrete value's own gradient."""
    context = start(path, reward, "adjoint-matching", sde=sde)
    regress(context, 2 if reward is O1 else 8)
    tolerance = 1e-4 if reward is O1 else 0.02  # a linear reward's adjoint does not vary
    assert_moments(moments(chain(context.model, context)), best(reference(context), reward), tolerance)


@PATHS
@REWARDS
def test_t12_reinforce_with_soft_returns_converges_to_the_best_policy_of_the_chain(path, reward):
    """At rest, the mean of the advantage times the noise is what the step's KL pulls back: f - f_ref = E[A eps] / w."""
    context = start(path, reward, "reinforce", advantage="leave-one-out", advantage_clip=1e9)
    s = context.schedule
    for epoch in range(12):
        batch = collect(context, epoch, Log())
        rows = batch.rollout.transitions
        fit(context, batch, L.over(batch.advantage / s.w[rows.step], rows.noise) * rows.noise, 0.7)
    assert_moments(moments(chain(context.model, context)), best(reference(context), reward), 0.04)


def test_t12_one_step_guidance_converges_to_its_own_weaker_fixed_point():
    """T2's bias when it feeds on itself: Psi = -k (mu - c) J with k = lam (1 - k v)^2, where k* = lam / (1 + lam v)."""
    context = start(TOY, O2, "sqdf", state="current", strength="ratio", lookahead=0, rollouts=200)
    regress(context, 14)
    s = context.schedule
    alpha, sigma = TOY.alpha(s.t), TOY.sigma(s.t)
    J = alpha * PRIOR / (alpha**2 * PRIOR + sigma**2)
    u = LAM * J * sigma**2 / alpha  # lam v
    k = LAM * ((1 + 2 * u - (1 + 4 * u).sqrt()) / (2 * u**2))
    torch.testing.assert_close(k, LAM * (1 - k * u / LAM) ** 2)
    drawn = s.noisy
    slope = (context.model.network.A.detach()[:, 0, 0] * s.kappa)[drawn]
    torch.testing.assert_close(slope, (-k * J**2)[drawn], rtol=2e-3, atol=1e-4)
    assert bool((k < LAM / (1 + u)).all())


REGRESSING = [
    name
    for name, settings in RECIPES.items()
    if settings.get("estimator") in REGRESSIONS and settings.get("auxiliary", "none") == "none"
]


@PATHS
@pytest.mark.parametrize("name", REGRESSING)
def test_the_loops_loss_is_at_rest_where_the_regression_is_solved(path, name):
    """Of every first-order recipe: a KL beside the regression, which holds it already, would count it twice."""
    context = start(path, O2, name, rollouts=500)
    context.model.network.c.data += 0.1  # away from the reference, so that it counts
    weights = list(context.model.trainable().values())

    def slope(batch: Batch) -> float:
        loss = transition_losses(context, batch, Log()) * batch.rollout.transitions.weight
        return float(sum(g.abs().sum() for g in torch.autograd.grad(loss.mean(), weights)))

    batch = collect(context, 0, Log())
    before = slope(batch)
    s, step = context.schedule, batch.rollout.transitions.step
    fit(context, batch, L.over((context.strength.gamma / s.kappa)[step], batch.guidance) * batch.guidance, 0.0)
    assert slope(batch) < 1e-3 * before


# T15: the mixture, end to end


def grid(stride: int) -> Tensor:
    """Every so many of the training times below 390, and 0."""
    return torch.cat((TOY.time(torch.arange(389, -1, -stride).double()), torch.zeros(1).double())).float()


GRID = grid(20)  # what is trained walks 20 steps; the notes' numbers are of 39
REWARD = Reward("linear", True, lambda x, prompts: 3 - x[:, 0] / 2)


def mixture(**settings):
    given_ = {"prompts": ("",), "steps": len(GRID) - 1, "chunk": 1_000_000, "prompts_per_epoch": 1, "updates": 1}
    return {**given_, "full": True, "subset": "all", "temperature": 1.0, "ema": 0.9, **settings}


def measured(model: Exact) -> dict[str, float | list[float]]:
    """Reward and mode fractions of 4,000 ancestral samples, and the KL of their paths to the triangle's own."""
    config = replace(preset("ddpo"), **mixture(steps=len(model.grid_times) - 1))
    setting = AlignContext.of(model, config, REWARD)
    found = setting.roll(model.noise(4000, seeded(9)), torch.zeros(4000).long(), seeded(10))
    rows, x = found.transitions, found.x_0.double()
    times = setting.schedule.times[rows.step]
    base = torch.cat(
        [triangle().eps(rows.x[at].double(), times[at], TOY) for at in torch.arange(len(times)).split(20_000)]
    )
    kl = L.gaussian_kl(rows.output_old.double(), base, setting.schedule.w[rows.step]).sum() / 4000
    return {"reward": float(REWARD.function(x, []).mean()), "modes": triangle().fractions(x).tolist(), "kl": float(kl)}


@pytest.fixture(scope="module")
def before() -> dict:
    return measured(Exact(triangle(), TOY, GRID))


TILTED = triangle().tilted(torch.tensor([-0.5, 0.0])).mixture


@pytest.fixture(scope="module")
def best_field() -> dict:
    return measured(Exact(TILTED, TOY, GRID))


def trained(name: str, **settings) -> dict:
    model = Exact(triangle(), TOY, GRID)
    verb.train(ALIGN, model, replace(preset(name), **mixture(**settings)), Inputs(REWARD))
    return measured(model)


def test_t15_the_exact_fields_of_the_mixture_and_its_optimum():
    before, best_field = (measured(Exact(law, TOY, grid(10))) for law in (triangle(), TILTED))
    assert before["modes"] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.03)
    assert before["reward"] == pytest.approx(3, abs=0.06) and before["kl"] < 1e-6
    assert best_field["modes"] == pytest.approx([0.039, 0.786, 0.175, 0], abs=0.03)
    assert best_field["reward"] == pytest.approx(4.37, abs=0.08) and best_field["kl"] == pytest.approx(0.674, abs=0.04)


@pytest.mark.parametrize(
    "name, settings, objective",
    [
        ("reinforce", {"advantage": "leave-one-out", "rollouts": 256, "lr": 6e-3, "epochs": 30}, 0.9),
        ("adjoint-matching", {"rollouts": 128, "lr": 5e-3, "epochs": 35}, 0.9),
    ],
    ids=["reinforce", "adjoint-matching"],
)
def test_t15_training_moves_the_modes_to_the_tilted_weights(before, best_field, name, settings, objective):
    """(1/3, 1/3, 1/3) to (0.039, 0.786, 0.175); `objective` is the share of the best r - KL's gain that must be won."""
    after = trained(name, **settings)
    gain = (after["reward"] - before["reward"]) / (best_field["reward"] - before["reward"])
    assert 0.7 < gain < 1.1
    left_, right, top, none = after["modes"]
    assert left_ < 0.13 and 0.6 < right < 0.85 and 0.12 < top < 0.3 and none < 0.01
    assert after["kl"] < 1.3 * best_field["kl"]
    won = (after["reward"] - after["kl"] - before["reward"]) / (
        best_field["reward"] - best_field["kl"] - before["reward"]
    )
    assert won > objective


def test_t15_one_gaussians_jacobian_buys_the_reward_with_shifted_modes(before, best_field):
    """The honest failure of gaussian-terminal: the whole gain, at a higher KL, for less of the right mode."""
    after = trained("gaussian-terminal", rollouts=128, lr=2e-3, epochs=20)
    assert (after["reward"] - before["reward"]) / (best_field["reward"] - before["reward"]) > 0.9
    assert 0.6 < after["modes"][1] < best_field["modes"][1] - 0.05
    assert after["kl"] > 1.15 * best_field["kl"]
