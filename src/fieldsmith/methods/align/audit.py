"""How good each estimate of value guidance is on a given model and reward, before training (RSM notes, 2 and 5).

In: an AlignContext whose policy is the reference, step ids, states. Out: a Moment a time: bias, variance, cost by
estimator.
What is estimated is grad E_ref[r(x_0) | x_t], in units of score: the limit of alpha grad V for a reward small beside
alpha. On a chain of steps it is omega E[grad E_ref[r | x_{k+1}] | x_k], which policy gradients follow (section 1.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.methods.align.context import AlignContext
from fieldsmith.methods.align.probes import Kind, estimates, follow, reference
from fieldsmith.training import step_generator


class Truths(NamedTuple):
    """Closed forms in units of score, x (n, ...), t () -> (n, ...): grad E_ref[r | x_t], and alpha grad V itself."""

    mean: Callable[[Tensor, Tensor], Tensor]
    soft: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Row:
    """One estimator at one time, over states; everything but cost is relative to the truth's mean square.

    bias2 is |E e - truth|^2 without what noise adds to it (it may come out negative), along <E e, truth>, each with its
    standard error; size is |E e|^2, variance the trace of one estimate's covariance.
    """

    bias2: float
    error: float
    along: float
    along_error: float
    size: float
    variance: float
    cost: float

    @property
    def bias(self) -> float:
        return max(self.bias2, 0.0) ** 0.5

    @property
    def floor(self) -> float:
        """The smallest bias that these draws could have shown (two standard errors)."""
        return (2 * self.error) ** 0.5

    @property
    def cosine(self) -> float:
        """Of the mean estimate with the truth: what no scalar in front can fix."""
        return max(-1.0, min(1.0, self.along / self.size**0.5)) if self.size > 0 else float("nan")

    @property
    def turned(self) -> float:
        """The bias that is left at the best scalar in front: the sine of the angle to the truth."""
        return (1 - self.cosine**2) ** 0.5


@dataclass(frozen=True)
class Moment:
    """One time: the estimators, the truth's mean square (without the reference's noise) and its standard error, what
    siblings' rewards do.

    `noise` is the variance of the reference, `certain` whether its halves agree beyond two standard errors and on more
    than one state, without which there are no rows; `variances` are those of single estimates, not relative. `spread`
    is the deviation of the reward among siblings of one state whose later steps follow the ODE, `spread_sde` the same
    with drawn steps; `soft` is |alpha grad V - grad E r| relative, where it is known.
    """

    step: int
    t: float
    rows: dict[str, Row]
    kind: Kind
    truth2: float
    truth2_error: float
    noise: float
    certain: bool
    variances: dict[str, float]
    spread: float
    spread_sde: float
    soft: float | None = None


# pure parts


def compare(values: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """bias2, along, size, variance, truth of estimates (g, ...) at one state; (5,), each without bias.

    The halves of the reference are independent of each other and of the estimates, so that products of one with the
    other hold no noise of their own: |m - truth|^2 = <m - first, m - second> - variance / g.
    """
    e, a, b = values.flatten(1).double(), first.flatten().double(), second.flatten().double()
    mean = e.mean(0)
    variance = e.var(0).sum() if len(e) > 1 else e.new_zeros(())
    excess = variance / len(e)
    bias2 = (mean - a) @ (mean - b) - excess
    return torch.stack((bias2, mean @ (a + b) / 2, mean @ mean - excess, variance, a @ b))


def ratio(upper: Tensor, lower: Tensor) -> tuple[float, float]:
    """sum(upper) / sum(lower) over states (n,) and its jackknife standard error."""
    n = len(upper)
    value = upper.sum() / lower.sum()
    without = (upper.sum() - upper) / (lower.sum() - lower)
    return float(value), float(((n - 1) / n * (without - without.mean()).square().sum()).sqrt())


def summarised(compared: Tensor, cost: float) -> Row:
    """States' comparisons (n, 5) as one row."""
    bias2, along, size, variance, truth = compared.T
    return Row(*ratio(bias2, truth), *ratio(along, truth), ratio(size, truth)[0], ratio(variance, truth)[0], cost)


# the loop


def measure(
    context: AlignContext,
    steps: Sequence[int],
    states: int,
    samples: int,
    kind: Kind,
    pool: int = 64,
    exact: Truths | None = None,
    tell: Callable[[str], None] = lambda output: None,
) -> list[Moment]:
    """Every estimator at `states` states of each step id, drawn by the sampler, beside the reference of that kind.

    `exact` gives the truth where the kind is 'closed form'. Raises InputError where
    the reward is the same for everything.
    """
    seed = context.config.seed
    with context.model.reference():
        generator = step_generator(seed, 0, stream=8)
        count = len(context.config.prompts)
        prompt = torch.randperm(max(states, count), generator=generator)[:states] % count
        along = follow(context, context.model.noise(states, generator), 0, prompt, generator)
        moments = []
        for k in sorted(steps):
            tell(f"step {k}, t = {float(context.schedule.times[k]):.3f}")
            generator = step_generator(seed, k + 1, stream=8)
            moments.append(_moment(context, along[k], k, prompt, samples, kind, pool, exact, generator))
    return moments


def _moment(
    context: AlignContext, x: Tensor, k: int, prompt: Tensor, samples: int, kind: Kind, pool: int,
    exact: Truths | None, generator: torch.Generator,
) -> Moment:  # fmt: skip
    t = context.schedule.times[k].to(x)
    parts: dict[str, list[Tensor]] = {}
    costs, truth, agreement, halves, ode, sde = {}, [], [], [], [], []
    for i in range(len(x)):
        at, who = x[i : i + 1], prompt[i : i + 1]
        if exact:
            first = second = exact.mean(at, t)[0]
        else:
            first, second = reference(context, at, k, who, samples, kind, generator)
        found, rewards, rewards_ode = estimates(context, at, k, who, pool, generator)
        for name, estimate in found.items():
            parts.setdefault(name, []).append(compare(estimate.values, first, second))
            costs[name] = float(estimate.cost)
        truth.append((first.double() * second.double()).sum())
        agreement.append(truth[-1] / (first.double().norm() * second.double().norm()).clamp(min=1e-30))
        halves.append((first - second).double().square().sum() / 4)
        sde.append(rewards)
        ode.append(rewards_ode)
    both = torch.cat((*sde, *ode))
    if k == 0 and bool((both == both[0]).all()):
        raise InputError(
            f"reward '{context.reward.name}' gave the same value ({both[0]:.4g}) to all {len(both)} images, so there "
            "is nothing to audit; choose another reward or other prompts"
        )
    products = torch.stack(truth).cpu()
    truth2, error = float(products.mean()), float(products.std() / len(x) ** 0.5)
    agree = torch.stack(agreement).cpu()  # cosines of the halves: 0 on average where both are noise
    certain = bool(agree.mean() > 2 * agree.std() / len(agree) ** 0.5) and truth2 > 1e-18
    if not exact:  # a mean square that is one state's alone is about one standard error
        certain = certain and truth2 > 1.2 * error
    rows = {name: summarised(torch.stack(of).cpu(), costs[name]) for name, of in parts.items()} if certain else {}
    soft = None
    if exact and exact.soft and certain:
        apart = exact.soft(x, t) - exact.mean(x, t)
        soft = float((apart.square().sum() / exact.mean(x, t).square().sum()).sqrt())
    spread, spread_sde = (float(torch.stack(of).var(1).mean().sqrt()) for of in (ode, sde))
    noise = float(torch.stack(halves).mean())
    variances = {name: float(torch.stack(of)[:, 3].mean()) for name, of in parts.items()}
    return Moment(k, float(t), rows, kind, truth2, error, noise, certain, variances, spread, spread_sde, soft)
