"""The mixture half of the study: estimators against exact guidance, recipes against the exact optimum.

In: three unit Gaussians, the reward 3 - x_1 / 2, alpha = 1 (RSM notes, section 5). Out: plain dictionaries of numbers.
Every score is exact, so nothing here is a network's error except what a recipe trains.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fieldsmith import verb
from fieldsmith.errors import RunError
from fieldsmith.methods.align import guidance as G
from fieldsmith.methods.align.config import RECIPES, AlignConfig
from fieldsmith.methods.align.step import Inputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.methods.policy.losses import gaussian_kl, log_ratio
from fieldsmith.methods.policy.rollouts import Plan, Rollout, roll, soft_returns
from fieldsmith.methods.policy.schedule import Schedule, schedule, strength
from fieldsmith.models.exact import Exact
from fieldsmith.paths import Prediction, VariancePreserving
from fieldsmith.rewards import Reward
from fieldsmith.samplers import ddim_step
from fieldsmith.samplers import rollout as sample_path
from fieldsmith.training import step_generator
from fieldsmith.worlds.mixtures import Mixture, isotropic, triangle

PULL = torch.tensor([-0.5, 0.0], dtype=torch.float64)  # grad r
COUNTS = (16, 64, 256, 1024, 4096)
POINTS = 20
CELL = 0.5  # side of the cells of the KL's histogram


def path() -> VariancePreserving:
    """DDPM with 500 steps, beta from 1e-4 to 0.03."""
    return VariancePreserving((1 - torch.linspace(1e-4, 0.03, 500, dtype=torch.float64)).cumprod(0))


def grid(first: int = 499, gap: int = 10) -> Tensor:
    """Times of every tenth index down from `first`, then clean data."""
    index = torch.arange(first, -1, -gap, dtype=torch.float64)
    return torch.cat((path().time(index), torch.zeros(1, dtype=torch.float64)))


def linear(points: Tensor, prompts: object = None) -> Tensor:
    """r(x) = 3 - x_1 / 2."""
    return 3 + points @ PULL.to(points)


def optimum() -> Mixture:
    """p* = p_ref exp(r) / Z: weights (0.039, 0.786, 0.175), every mean moved by (-1/2, 0)."""
    return triangle().tilted(PULL).mixture


def field(mixture: Mixture, x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
    return Prediction("eps", mixture.eps(x, t, path()), x, t, path())


def _output(mixture: Mixture, rows: Any, s: Schedule) -> Tensor:
    return mixture.eps(rows.x, s.times[rows.step], path())


# estimators


def estimators(seed: int, first: int) -> list[dict[str, Any]]:
    """RMSE of every estimator of Psi* at POINTS noised optimal samples at index `first`, by sample count.

    Each row: name, samples, forwards a point, RMSE over the points. Rollouts follow the exact optimum pi*.
    """
    p, times = path(), grid(first)
    s = schedule(p, times, "eps", "ddim", 1.0)
    generator = step_generator(seed, first, stream=9)
    star, base = optimum(), triangle()
    t = times[0]
    x_0 = star.sample(POINTS, generator)
    x = p.alpha(t) * x_0 + p.sigma(t) * torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    truth = star.score(x, t, p) - base.score(x, t, p)
    found: list[dict[str, Any]] = []

    def add(name: str, samples: int, forwards: float, estimate: Tensor) -> None:
        error = (estimate - truth).square().mean(1).sqrt().mean().item()
        found.append({"name": name, "samples": samples, "forwards": forwards, "rmse": error})

    for name, mixture in (("at the optimum", star), ("at the reference", base)):
        place = partial(_place, mixture)
        add(f"one step, full Jacobian, {name}", 0, 3, G.tweedie(linear, place, x, t, "full"))
        add(f"two steps, full Jacobian, {name}", 0, 6, G.tweedie(linear, place, x, t, "full", times[1:2]))
    add("one step, identity Jacobian, at the optimum", 0, 1, G.tweedie(linear, partial(_place, star), x, t, "identity"))
    pull = strength("jacobian", s, base.covariance.diagonal().mean().item()).gamma[0]
    add("terminal gradient times J of a Gaussian", 0, len(s), (pull * PULL).expand_as(x))

    for count in COUNTS:
        chain = [_sde(x[i], count, s, generator, star, base) for i in range(POINTS)]
        for name in chain[0]:
            add(name, count, count * len(s), torch.stack([estimate[name] for estimate in chain]))
    if len(s) < 8:  # near the data there is nothing to cut short or to split
        return found
    for keep in (0.9, 0.8, 0.5):
        for count in COUNTS:
            cut, steps = zip(*(_cut(x[i], count, s, generator, star, keep) for i in range(POINTS)), strict=True)
            add(f"zeroth order, lookahead to {keep} t", count, count * steps[0], torch.stack(cut))
    for splits, branches in ((2, 2), (3, 2), (4, 2), (2, 4)):
        for count in COUNTS[:4]:
            tree, cost = zip(
                *(_tree(x[i], count, s, generator, star, splits, branches) for i in range(POINTS)), strict=True
            )
            add(f"tree, {splits} splits of {branches}", count, cost[0], torch.stack(tree))
    for count in COUNTS:
        mixed = [_first_step(x[i], count, s, generator, star) for i in range(POINTS)]
        add("first step drawn, then ODE", count, count * len(s), torch.stack(mixed))
    return found


def _place(mixture: Mixture, x: Tensor, t: Tensor) -> Prediction:
    return field(mixture, x, t, torch.zeros(len(x)))


def _roll(x: Tensor, count: int, s: Schedule, generator: torch.Generator, mixture: Mixture, plan: Plan) -> Rollout:
    where = torch.zeros(count, dtype=torch.long)
    return roll(partial(field, mixture), x.expand(count, 2), where, s, plan, "ddim", 1.0, generator)


def _estimate(returns: Tensor, rollout: Rollout, s: Schedule, centred: bool = True) -> Tensor:
    first = rollout.rows.step == 0
    r = returns[first]
    advantage = r - r.mean() if centred else r
    return G.reverse_noise(advantage, rollout.rows.noise[first], rollout.rows.step[first], s).mean(0)


def _sde(
    x: Tensor, count: int, s: Schedule, generator: torch.Generator, star: Mixture, base: Mixture
) -> dict[str, Tensor]:
    """Independent rollouts of the optimum: the reward alone, less later KL or log-ratios, and under the reference."""
    plan = Plan("sde", torch.ones(len(s)).long(), s.noisy)
    run = _roll(x, count, s, generator, star, plan)
    rows, w = run.rows, s.w[run.rows.step]
    reference = _output(base, rows, s)
    rewards = linear(run.x_0)
    log_rho = -log_ratio(reference, rows.output_old, rows.noise, w)
    plain = run.mean_over_endpoints(rewards)
    with_kl = soft_returns(run, rewards, gaussian_kl(rows.output_old, reference, w))
    soft = soft_returns(run, rewards, log_rho)
    under = _roll(x, count, s, generator, base, plan)
    tilted = (linear(under.x_0) - linear(under.x_0).logsumexp(0) + math.log(count)).exp()
    return {
        "reward, no baseline": _estimate(plain, run, s, centred=False),
        "reward, mean baseline": _estimate(plain, run, s),
        "reward minus later KL": _estimate(with_kl, run, s),
        "reward minus later log-ratios": _estimate(soft, run, s),
        "exp(reward) under the reference": _estimate(under.mean_over_endpoints(tilted), under, s),
    }


def _cut(
    x: Tensor, count: int, s: Schedule, generator: torch.Generator, star: Mixture, keep: float
) -> tuple[Tensor, int]:
    """The rollout stops near keep * t and scores r(x_0_hat); the estimate and the steps taken."""
    stop = max(1, int((s.times >= keep * s.times[0] - 1e-9).sum()) - 1)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    output = field(star, x.expand(count, 2), s.times[0], noise)
    one = sample_path(
        partial(_place, star), x.expand(count, 2), s.times[:2], sde="ddim", noise_level=1.0, generator=generator
    )
    mean = one.states[1]
    noise = (mean - _mean(output, s)) / s.sigma[0]
    late = mean
    if stop > 1:
        late = sample_path(
            partial(_place, star), mean, s.times[1 : stop + 1], sde="ddim", noise_level=1.0, generator=generator
        ).last
    reward = linear(_place(star, late, s.times[stop]).x_0)
    advantage = reward - reward.mean()
    return G.reverse_noise(advantage, noise, torch.zeros(count).long(), s).mean(0), stop + 1


def _mean(output: Prediction, s: Schedule) -> Tensor:
    return ddim_step(output, s.times[1], 1.0).mean


def _tree(
    x: Tensor, count: int, s: Schedule, generator: torch.Generator, star: Mixture, splits: int, branches: int
) -> tuple[Tensor, int]:
    """`count` endpoints from count / branches^splits first steps that split at evenly spaced later steps."""
    roots = max(2, count // branches**splits)
    children = torch.ones(len(s)).long()
    children[torch.linspace(1, len(s) - 2, splits + 2)[1:-1].round().long()] = branches
    plan = Plan("tree", children, s.noisy)
    run = _roll(x, roots, s, generator, star, plan)
    return _estimate(run.mean_over_endpoints(linear(run.x_0)), run, s), roots * plan.forwards()


def _first_step(x: Tensor, count: int, s: Schedule, generator: torch.Generator, star: Mixture) -> Tensor:
    drawn = torch.zeros(len(s), dtype=torch.bool)
    drawn[0] = True
    run = _roll(x, count, s, generator, star, Plan("sde", torch.ones(len(s)).long(), drawn))
    return _estimate(run.mean_over_endpoints(linear(run.x_0)), run, s)


def gaussian_terminal_bias(seed: int, n: int = 200_000) -> dict[str, float]:
    """J E*[grad r | x_t] over Psi*, minus 1, along Psi*: on one Gaussian with a quadratic reward, and on the mixture.

    x_0 is drawn from the exact optimal posterior, so that only the estimator's bias is left; at t = index 389.
    """
    p, t = path(), grid(389)[0]
    generator = step_generator(seed, 0, stream=10)
    alone = isotropic(torch.tensor([[1.0, -0.5]], dtype=torch.float64), 1.3)
    target = torch.tensor([2.0, 1.0], dtype=torch.float64)
    tilt = alone.tilted(target, torch.eye(2, dtype=torch.float64)).mixture  # -|x - target|^2 / 2 up to a constant
    found = {}
    for name, base, star, gradient in (
        ("gaussian", alone, tilt, lambda x: target - x),
        ("mixture", triangle(), optimum(), lambda x: PULL.expand_as(x)),
    ):
        prior = base.covariance.diagonal().mean().item()  # of the whole law, as the recipe fits it
        s = schedule(p, grid(389), "eps", "ddim", 1.0)
        J = strength("jacobian", s, prior).gamma[0]
        x_t = torch.tensor([0.4, 0.9], dtype=torch.float64)
        truth = star.score(x_t[None], t, p)[0] - base.score(x_t[None], t, p)[0]
        mean = gradient(star.given(x_t, t, p).sample(n, generator)).mean(0)
        found[name] = float(J * (mean @ truth) / truth.square().sum() - 1)
    return found


# recipes, end to end

SKIPPED = (
    "rlcm", "dance-grpo", "pcpo-flow",  # their steps are of rectified flows
    "dpo",  # learns from pairs, not from a reward
    "ddpo",  # at a KL of weight 1 it is flow-grpo
    "residual-nabla-db-full", "vgg-flow-full",  # several times the work of the pruned ones
)  # fmt: skip


def recipes() -> list[str]:
    return [name for name in RECIPES if name not in SKIPPED]


def configured(name: str, seed: int) -> AlignConfig:
    """A recipe aimed at p_ref exp(r): unscaled advantages and a KL of weight 1 where its own are of another scale."""
    base = AlignConfig.preset_of(name, "laptop", {})
    steps = len(grid()) - 1
    aimed: dict[str, Any] = {"temperature": 1.0, "clip": 0.2}
    if base.estimator == "reverse-noise":
        aimed |= {"kl": 1.0}
        if base.auxiliary == "none":
            aimed |= {"advantage": "leave-one-out"}
    scale: dict[str, Any] = {"rollouts": 8}
    if base.rollout == "branches":
        every = tuple(4 if k % 4 == 0 and k < steps - 1 else 0 for k in range(steps))
        early = tuple(8 if k % 4 == 0 and k < steps // 2 else 0 for k in range(steps))
        scale = {"rollouts": 1, "branches": early if name == "rsm-branch-sd35" else every}
    if base.rollout == "tree":
        scale = {"rollouts": 4, "branches": tuple(2 if k in (5, 15) else 1 for k in range(steps))}
    return replace(
        base, **aimed, **scale, steps=steps, prompts=("",), prompts_per_epoch=1, full=True, subset="all", lr=1e-3,
        epochs=10**6, train_steps=None, seed=seed, weight_decay=0.0, chunk=8192, ema=0.995,
    )  # fmt: skip


def train(name: str, seed: int, cap: int, samples: int = 20_000) -> dict[str, Any]:
    """Train a recipe for `cap` forward-equivalents; its samplers against the exact optimum."""
    model = Exact(triangle(), path(), grid().float(), seed=seed)
    spent: list[float] = [0.0]

    def callback(step: int, log: dict[str, float]) -> str | None:
        spent[0] = log.get("nfe", 0.0)
        return "cap" if spent[0] >= cap else None

    broke = ""
    try:
        verb.train(ALIGN, model, configured(name, seed), Inputs(Reward("3 - x / 2", True, linear)), None, callback)
    except RunError as error:  # nothing holds a pathwise recipe near the reference
        broke = str(error)
    found = {kind: judged(model, kind, seed, samples) for kind in ("sde", "ode")}
    return {"recipe": name, "seed": seed, "forward_equivalents": spent[0], "broke": broke, **found}


@torch.no_grad()
def judged(model: Exact, kind: str, seed: int, n: int) -> dict[str, Any]:
    """Reward gain over the exact optimum's, KL to it in cells, mode weights, of n samples of the SDE or the ODE."""
    generator = step_generator(seed, 1, stream=11)
    parts = []
    for size in [20_000] * (n // 20_000):
        x = torch.randn(size, 2, generator=generator)
        step: dict[str, Any] = {"sde": "ddim", "noise_level": 1.0, "generator": generator} if kind == "sde" else {}
        parts.append(sample_path(partial(_trained, model), x, grid().float(), **step).last.double())
    points = torch.cat(parts)
    base, best = linear(triangle().mean[None])[0], linear(optimum().mean[None])[0]
    gain = (linear(points).mean() - base) / (best - base)
    nearest = optimum().posterior(points, torch.tensor(0.0, dtype=torch.float64), path()).mean(0)
    return {
        "reward": linear(points).mean().item(),
        "gain": gain.item(),
        "kl": cell_kl(points),
        "modes": nearest.tolist(),
    }


@torch.no_grad()
def ceiling(guidance: str, gap: int, seed: int, n: int = 20_000, draws_each: int = 8) -> dict[str, float]:
    """What the SDE sampler does with exact guidance, nothing trained: gain and KL.

    current: Psi*(x_k), the field of p*. next: omega E[Psi*(x_{k+1})], where next-state recipes and policy gradients
    come to rest, since their steps keep the reference's variance; the two agree as the gap shrinks.
    """
    p, times = path(), grid(gap=gap)
    s, star, base = schedule(p, times, "eps", "ddim", 1.0), optimum(), triangle()
    generator = step_generator(seed, gap, stream=13)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    for k in range(len(s)):
        t, t_next = times[k], times[k + 1]
        reference = base.score(x, t, p)
        psi = star.score(x, t, p) - reference
        if guidance == "next" and s.noisy[k]:
            mean = ddim_step(_scored(reference + psi, x, t), t_next, 1.0).mean
            ahead = torch.zeros_like(x)
            for _ in range(draws_each):
                y = mean + s.sigma[k] * torch.randn(x.shape, generator=generator, dtype=torch.float64)
                ahead += (star.score(y, t_next, p) - base.score(y, t_next, p)) / draws_each
            psi = s.omega[k] * ahead
        x = ddim_step(_scored(reference + psi, x, t), t_next, 1.0).sample(generator)
    low, best = linear(base.mean[None])[0], linear(star.mean[None])[0]
    return {"gain": float((linear(x).mean() - low) / (best - low)), "kl": cell_kl(x)}


def _scored(score: Tensor, x: Tensor, t: Tensor) -> Prediction:
    return Prediction("eps", -path().sigma(t) * score, x, t, path())


def _trained(model: Exact, x: Tensor, t: Tensor) -> Prediction:
    return model.predict(x, t, model.encode([""]).repeat(len(x)))


def cell_kl(points: Tensor) -> float:
    """KL of samples (n, 2) to the exact optimum over square cells of side CELL, less its bias (Miller and Madow)."""
    edges = torch.arange(-12.0, 12.0 + CELL / 2, CELL, dtype=torch.float64)
    star = optimum()
    deviation = star.covariances[:, 0, 0].sqrt()
    below = torch.special.ndtr((edges[:, None, None] - star.means) / deviation[:, None])  # (edges, modes, 2)
    mass = below.diff(dim=0)
    exact = torch.einsum("j,aj,bj->ab", star.weights, mass[:, :, 0], mass[:, :, 1])
    at = ((points + 12.0) / CELL).floor().long().clamp(0, len(exact) - 1)
    count = torch.zeros(len(exact) ** 2, dtype=torch.float64)
    count.index_add_(0, at[:, 0] * len(exact) + at[:, 1], torch.ones(len(points), dtype=torch.float64))
    share, seen = count / len(points), count > 0
    kl = (share[seen] * (share[seen] / exact.flatten()[seen].clamp(min=1e-300)).log()).sum()
    return float(kl - (int(seen.sum()) - 1) / (2 * len(points)))
