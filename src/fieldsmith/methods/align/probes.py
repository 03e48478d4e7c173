"""Draws at one state: references and every estimator of value guidance, in units of score (RSM notes, 1.3, 2 and 8.1).

In: a AlignContext, a state x (1, ...) of a step id, a generator. Out: independent estimates, and what each costs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.methods.align import guidance as G
from fieldsmith.methods.align.collect import carry
from fieldsmith.methods.align.context import AlignContext
from fieldsmith.methods.policy.advantages import advantages
from fieldsmith.methods.policy.schedule import Schedule, strength
from fieldsmith.samplers import euler, gaussian_step

Kind = Literal["closed form", "pathwise", "zeroth order"]
SIBLINGS = (4, 16)
DRAWS = 8  # of the next state or the endpoint, for first-order estimates that depend on one


class Estimate(NamedTuple):
    """Independent estimates (g, ...) at one state, and the forward-equivalents that one of them takes."""

    values: Tensor
    cost: float


def zeroth(rewards: Tensor, noise: Tensor, k: int, s: Schedule, siblings: int) -> Tensor:
    """Leave-one-out estimates of n // siblings groups, (g, ...), from rewards (n,) and the noise (n, ...) of step k."""
    rows = len(rewards) // siblings * siblings
    group = torch.arange(rows) // siblings
    advantage = advantages(rewards[:rows].double(), group, "leave-one-out").to(noise)
    each = G.reverse_noise(advantage, noise[:rows], torch.full((rows,), k), s)
    return each.reshape(-1, siblings, *noise.shape[1:]).mean(1)


@torch.no_grad()
def follow(
    context: AlignContext,
    x: Tensor,
    first: int,
    prompt: Tensor,
    generator: torch.Generator | None = None,
    twins: bool = False,
) -> Tensor:
    """States from x (n, ...) at step id `first` to clean data, (K - first + 1, n, ...): the sampler's drawn steps where
    `draws` is given, else the ODE. Of twins the second half of x has the first half's later noise."""
    s, states = context.schedule, [x]
    for k in range(first, len(s)):
        t, t_next = s.times[k].to(x), s.times[k + 1].to(x)
        pred = context.predict(states[-1], t, prompt)
        if generator is None or not s.noisy[k]:
            states.append(euler(pred, t_next))
            continue
        step = gaussian_step(context.sde, pred, t_next, context.noise_level, s.times[1].to(x))
        noise = torch.randn(x[: len(x) // 2 if twins else None].shape, generator=generator, dtype=x.dtype).to(x)
        states.append(step.mean + float(s.sigma[k]) * (noise.repeat(2, *[1] * (x.ndim - 1)) if twins else noise))
    return torch.stack(states)


def pathwise(context: AlignContext, states: Tensor, first: int, prompt: Tensor) -> Tensor:
    """grad r(x_0) carried back along drawn states (K - first + 1, n, ...) to the first, (n, ...): no bias on the chain,
    and far less noise than rewards times noise where the reward has a gradient (Adjoint Matching at the reference)."""
    parts = []
    for at in torch.arange(states.shape[1]).split(context.config.chunk):
        carried = G.clean_gradient(context.value(prompt[at]), states[-1][at])
        for k in reversed(range(first, len(context.schedule))):
            carried = carry(context, states[k - first][at], k, prompt[at], carried)
        parts.append(carried)
    return torch.cat(parts)


@torch.no_grad()
def _step(
    context: AlignContext, x: Tensor, k: int, prompt: Tensor, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The mean of the drawn step from one state x (1, ...), and n noises (n, ...)."""
    pred = context.predict(x, context.schedule.times[k].to(x), prompt)
    t_next, t_first = context.schedule.times[k + 1].to(x), context.schedule.times[1].to(x)
    mean = gaussian_step(context.sde, pred, t_next, context.noise_level, t_first).mean
    return mean, torch.randn(n, *x.shape[1:], generator=generator, dtype=x.dtype).to(x)


def reference(
    context: AlignContext, x: Tensor, k: int, prompt: Tensor, samples: int, kind: Kind, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two independent halves of a large estimate at one state x (1, ...), without bias on the sampler's chain.

    zeroth order: samples / 2 pairs of noises eps, -eps that share their later noise, whose common part cancels in
    r(eps) - r(-eps). pathwise: samples / 8 drawn chains, as each costs four times as much and says far more.
    """
    s = context.schedule
    n = samples // (8 if kind == "pathwise" else 2) // 2 * 2
    mean, noise = _step(context, x, k, prompt, max(n, 4), generator)
    if kind == "pathwise":
        who = prompt.expand(len(noise))
        states = follow(context, mean + float(s.sigma[k]) * noise, k + 1, who, generator)
        each = float(s.omega[k]) * pathwise(context, states, k + 1, who)
    else:
        after = mean + float(s.sigma[k]) * torch.cat((noise, -noise))
        who = prompt.expand(len(after))
        plus, minus = context.judge(follow(context, after, k + 1, who, generator, twins=True)[-1], who).chunk(2)
        each = G.reverse_noise(((plus - minus) / 2).to(noise), noise, torch.full((len(noise),), k), s)
    return each[::2].mean(0), each[1::2].mean(0)


def estimates(
    context: AlignContext, x: Tensor, k: int, prompt: Tensor, pool: int, generator: torch.Generator
) -> tuple[dict[str, Estimate], Tensor, Tensor]:
    """Every estimator at one state x (1, ...) of step k, and the rewards of `pool` siblings by drawn steps and ODE."""
    s, model = context.schedule, context.model
    with model.count_nfe() as nfe:
        mean, noise = _step(context, x, k, prompt, pool, generator)
    unit = nfe.total  # one forward, or two with guidance
    after, who = mean + float(s.sigma[k]) * noise, prompt.expand(pool)
    drawn, certain = follow(context, after, k + 1, who, generator), follow(context, after, k + 1, who)[-1]
    left = unit * (len(s) - k - 1)
    rewards, rewards_ode = context.judge(drawn[-1], who), context.judge(certain, who)
    found = {
        f"{n} siblings, {name}": Estimate(zeroth(given, noise, k, s, n), unit + n * left)
        for name, given in (("SDE", rewards), ("ODE", rewards_ode))
        for n in SIBLINGS
    }
    few = min(SIBLINGS[0], pool)
    shrunk = found[f"{few} siblings, SDE"]
    found[f"{few} siblings, SDE, group mean"] = Estimate((1 - 1 / few) * shrunk.values, shrunk.cost)
    if context.reward.differentiable:
        found |= _first_order(context, x, k, prompt, drawn[:, : min(DRAWS, pool)], unit, left)
    return found, rewards, rewards_ode


def _first_order(
    context: AlignContext, x: Tensor, k: int, prompt: Tensor, drawn: Tensor, unit: int, left: int
) -> dict[str, Estimate]:
    """Gradients of the reward: at Tweedie's x_0, at endpoints, and carried back; next-state ones carry omega."""
    s, after = context.schedule, drawn[0]
    who = prompt.expand(len(after))
    value, value_x = context.value(who), context.value(prompt)
    t, t_next, omega = s.times[k].to(x), s.times[k + 1].to(x), float(s.omega[k])
    place, ahead = context.place(who), s.times[k + 2 : k + 3].to(x)
    chunk = context.config.chunk

    def frozen(x_t: Tensor, at: Tensor):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return context.predict(x_t, at, prompt)

    if len(after) > chunk:
        raise InputError(f"chunk={chunk} must be at least {DRAWS} to measure first-order estimators")
    end = follow(context, x, k, prompt)[-1]
    clean = torch.cat([G.clean_gradient(value, drawn[-1])])
    pull = {name: float(strength(name, s, context.prior).gamma[k]) for name in ("linear", "jacobian")}
    last = k + 1 == len(s)  # the next state is clean data already
    return {
        "tweedie": Estimate(G.tweedie(value_x, context.place(prompt), x, t, "full"), 3 * unit),
        "tweedie, identity": Estimate(G.tweedie(value_x, frozen, x, t, "identity"), unit),
        "tweedie, next": Estimate(omega * G.tweedie(value, place, after, t_next, "full"), unit * (1 if last else 4)),
        "lookahead": Estimate(
            omega * G.tweedie(value, place, after, t_next, "full", ahead), unit * (1 + 3 * min(2, len(s) - k - 1))
        ),
        "adjoint": Estimate(omega * pathwise(context, drawn, k + 1, who), unit + 4 * left),
        "terminal x omega": Estimate(omega * clean, unit + left),
        "terminal x J": Estimate(pull["jacobian"] * clean, unit + left),
        "terminal x linear, ODE": Estimate(pull["linear"] * G.clean_gradient(value_x, end), unit + left),
    }
