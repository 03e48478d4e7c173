"""What hurts: estimator, strength per step or trust region, of every recipe, from an audit's numbers (RSM notes, 1.5).

In: a schedule and measured Moments. Out: strengths h(t), where trust regions break, losses by cause, one advice.
Pure functions of numbers; no model is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith.methods.align.audit import Moment
from fieldsmith.methods.align.config import RECIPES, AlignConfig
from fieldsmith.methods.align.context import NOISE
from fieldsmith.methods.policy.losses import HINGES, Trust
from fieldsmith.methods.policy.schedule import Schedule, effective_strength, schedule, strength
from fieldsmith.paths import RectifiedFlow

BUDGET = 100.0  # forward-equivalents at one state, at which estimators are compared


@dataclass(frozen=True)
class Outlook:
    """One recipe on one model's schedule: h by step (K,), the estimator that the audit measured for it (if any), and
    which share of the best reward gain per root of KL its push keeps: with the best strengths for its estimator, with
    its own, and with the noise of BUDGET forwards too."""

    name: str
    config: AlignConfig
    s: Schedule
    h: Tensor
    estimator: str | None
    of_estimator: float = math.nan
    of_strength: float = math.nan
    of_noise: float = math.nan

    @property
    def silenced(self) -> list[int]:
        """Steps with less than a fiftieth of the largest strength."""
        return (self.h < self.h.max() / 50).nonzero().flatten().tolist()

    @property
    def hurts(self) -> str:
        """The largest of the three losses."""
        losses = {
            "estimator": 1 - self.of_estimator,
            "strength per step": 1 - self.of_strength / max(self.of_estimator, 1e-9),
            "noise": 1 - self.of_noise / max(self.of_strength, 1e-9),
        }
        return max(losses, key=lambda name: losses[name]) if not math.isnan(self.of_noise) else "not measured"


# strengths


def outlook(name: str, config: AlignConfig, s: Schedule, prior: float) -> Outlook | None:
    """A recipe's strengths on the steps of s; None where its stochastic step does not fit, or it has no reward."""
    if config.estimator == "dpo":
        return None
    flow = isinstance(s.path, RectifiedFlow)
    sde = ("flow-sde" if flow else "ddim") if config.sde == "auto" else config.sde
    if (sde == "ddim-uniform") if flow else not sde.startswith("ddim"):
        return None
    level = NOISE[sde] if config.noise_level is None else config.noise_level
    own = schedule(s.path, s.times, s.kind, sde, level)
    live = torch.ones(len(s), dtype=torch.float64)
    if config.rollout == "branches":
        given = torch.tensor(config.branches * (len(s) if len(config.branches) == 1 else 1))[: len(s)]
        live[: len(given)], live[len(given) :] = (given > 0).double(), 0.0
    kappa, certain = own.kappa.abs(), schedule(s.path, s.times, s.kind, "ddim", 0.0)
    if config.estimator == "pathwise":  # through the ODE, from its last steps alone
        last = torch.arange(len(s)) >= (2 * len(s) // 3 if config.random_stop else len(s) - config.truncate)
        h = last * (certain.gain if config.random_stop else certain.push).abs() / 2
    elif config.estimator in ("nft", "awm"):  # Cov(A, x_0 | x_t) alpha / sigma^2 = grad E r, in units of the output
        h = 1 / kappa
    elif config.estimator == "balance":
        h = (own.w * own.sigma).abs()
    else:
        whose = strength(config.strength, own, prior)
        h = effective_strength(whose, own, _normaliser(config, own))
    return Outlook(name, config, own, torch.nan_to_num(h * live, posinf=0.0), estimator_of(config))


def _normaliser(config: AlignConfig, s: Schedule) -> Tensor:
    next_state = config.estimator in ("reverse-noise", "adjoint") or config.state == "next"
    return s.omega if next_state else torch.ones_like(s.omega)


def estimator_of(config: AlignConfig) -> str | None:
    """The audit's row that stands for a recipe's estimator, None where none does."""
    if config.estimator in ("reverse-noise", "balance"):
        return "16 siblings, ODE" if config.rollout == "branches" else "16 siblings, SDE"
    if config.estimator == "tweedie":
        if config.state == "current":
            return "tweedie" if config.jacobian == "full" else "tweedie, identity"
        return "lookahead" if config.lookahead else "tweedie, next"
    if config.estimator == "terminal":
        return {"base-snr": "terminal x omega", "linear": "terminal x linear, ODE"}.get(config.strength, "terminal x J")
    return "adjoint" if config.estimator == "adjoint" else None


def outlooks(presets: Mapping[str, AlignConfig], s: Schedule, prior: float, moments: Sequence[Moment]) -> list[Outlook]:
    """Every recipe that fits the path, with its losses where the audit measured its estimator."""
    found = [outlook(name, presets[name], s, prior) for name in RECIPES]
    return [judged(one, s, moments, prior) for one in found if one]


# losses


def judged(one: Outlook, s: Schedule, moments: Sequence[Moment], prior: float) -> Outlook:
    """The outlook with its shares of the best gain.

    At step k the best shift of the mean, in deviations, is b = sigma grad u(x_{k+1}) = sigma / omega times the truth;
    a push h on the output shifts it by a = w h e / omega. The reward gained per root of KL, over the best there is, is
    the cosine of a and b over all steps; numbers between measured times are interpolated.
    """
    known = [m for m in moments if m.rows]
    if one.estimator is None or not known or one.estimator not in known[0].rows:
        return one
    name: str = one.estimator
    rows = [m.rows[name] for m in known]
    at = [m.step for m in known]
    truth = along_steps(at, [m.truth2 for m in known], len(s))
    along, size, variance, cost = (
        along_steps(at, [getattr(row, part) for row in rows], len(s)) for part in ("along", "size", "variance", "cost")
    )
    if "siblings" in name:  # E e is the truth up to the suffix; a size below along^2 is noise
        variance = variance * int(name.split()[0])
        cost = (cost - 1) / int(name.split()[0])
        size = torch.maximum(size, along.square())
        if (
            name.endswith("SDE") and known[0].kind != "closed form"
        ):  # without bias on the chain, so what is seen is noise
            along = size = torch.ones_like(along)
    size = size.clamp(min=1e-12)
    noisy = s.noisy
    best = torch.where(noisy, s.sigma / s.omega.clamp(min=1e-300), torch.zeros_like(truth)).square() * truth
    push = torch.where(noisy, s.w.abs() * one.h / within(name, s, prior), torch.zeros_like(truth))
    gain = (push * best.sqrt() * truth.sqrt() * along).sum() / best.sum().sqrt()
    noise = variance / (BUDGET / cost.clamp(min=1)).clamp(min=1)
    of_estimator = (best * (along.square() / size).clamp(max=1)).sum() / best.sum()
    return Outlook(
        one.name, one.config, one.s, one.h, name, float(of_estimator.sqrt()),
        float(gain / (push.square() * size * truth).sum().clamp(min=1e-300).sqrt()),
        float(gain / (push.square() * (size + noise) * truth).sum().clamp(min=1e-300).sqrt()),
    )  # fmt: skip


def within(name: str, s: Schedule, prior: float) -> Tensor:
    """What of h the audit's row holds already, (K,): omega, or the pull of a terminal gradient."""
    for ending, pull in (("x J", "jacobian"), ("x linear, ODE", "linear")):
        if name.endswith(ending):
            return strength(pull, s, prior).gamma.clamp(min=1e-300)
    return torch.ones_like(s.omega) if name in ("tweedie", "tweedie, identity") else s.omega.clamp(min=1e-300)


def along_steps(at: Sequence[int], values: Sequence[float], steps: int) -> Tensor:
    """Values at some step ids as values at all, (K,): straight between them, level beyond the ends."""
    k = torch.arange(steps, dtype=torch.float64)
    x, y = torch.tensor(at, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    if len(x) == 1:
        return y.expand(steps).clone()
    right = torch.searchsorted(x, k).clamp(1, len(x) - 1)
    share = ((k - x[right - 1]) / (x[right] - x[right - 1])).clamp(0, 1)
    return y[right - 1] + share * (y[right] - y[right - 1])


# trust regions


def outside(displacement: Tensor, s: Schedule, trust: Trust, clip: float) -> Tensor:
    """P(a row is beyond its trust region) after the output moved by |d| = displacement (K,) at each step, (K,).

    The row's own noise is drawn before and apart from d, so log rho ~ N(-w^2 d^2 / 2, w^2 d^2). A row is held where it
    is beyond on its advantage's side: half of them.
    """
    spread = (s.w.abs() * displacement).clamp(min=1e-12)
    if trust == "none":
        return torch.zeros_like(spread)
    centre = torch.zeros_like(spread) if trust == "guard-hinge" else -spread.square() / 2
    if trust == "clip":
        up = torch.full_like(spread, math.log1p(clip))
        down = torch.full_like(spread, math.log1p(-clip) if clip < 1 else -math.inf)
    else:
        up = clip / s.sigma.clamp(min=1e-300) ** HINGES[trust]
        down = -up
    beyond = torch.special.ndtr((centre - up) / spread) + torch.special.ndtr((down - centre) / spread)
    return torch.where(s.noisy, beyond, torch.zeros_like(beyond))


def breaks(s: Schedule, trust: Trust, clip: float) -> Tensor:
    """The displacement |d| at which half of a step's rows are beyond the trust region, (K,); inf where none are."""
    low, high = torch.full_like(s.w, -20.0), torch.full_like(s.w, 20.0)  # powers of e
    for _ in range(60):
        middle = (low + high) / 2
        over = outside(middle.exp(), s, trust, clip) > 0.5
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return torch.where(s.noisy & (outside(high.exp(), s, trust, clip) > 0.5), high.exp(), torch.inf)


# one recommendation


def decided(moments: Sequence[Moment], steps: int) -> Tensor:
    """Each step's share of what siblings' rewards differ by, (K,)."""
    spread = along_steps([m.step for m in moments], [m.spread**2 for m in moments], steps)
    return spread / spread.sum().clamp(min=1e-300)


def recommend(
    found: Sequence[Outlook], s: Schedule, moments: Sequence[Moment], differentiable: bool, D: int, alpha: float
) -> str:
    """One recipe and why, in words, by rule from the numbers; D is how many numbers the output has."""
    name, why = (_ranked(found, moments) if differentiable else None) or _branches(found, s, moments, differentiable)
    best = next(one for one in found if one.name == name)
    words = f"Use {name}. {why}."
    at = torch.where(best.h > 0, breaks(best.s, best.config.trust, best.config.clip) / D**0.5, torch.inf)
    if bool(at.isfinite().any()):
        first = int(at.argmin())
        widest = float(at[at.isfinite()].max() / at[first])
        words += (
            f" Its trust region ({best.config.trust}, {best.config.clip:g}) breaks first at t = "
            f"{float(s.t[first]):.2f}, once the output moves by {float(at[first]):.2g} a number; its widest step "
            f"stands {widest:.1f} times that."
        )
    most = max(m.spread_sde for m in moments)
    if most < alpha / 10:
        words += (
            f" But there is little to gain: siblings' rewards differ by {most:.2g} beside alpha = {alpha:g}, so the "
            "model satisfies this reward already, or never does."
        )
    return words


def _ranked(found: Sequence[Outlook], moments: Sequence[Moment]) -> tuple[str, str] | None:
    """The recipe that keeps most of the gain, where estimators could be told from the reference's noise."""
    measured = [one for one in found if not math.isnan(one.of_noise)]
    plain = [one for one in measured if one.config.auxiliary == "none"]  # the paper finds the helpers negligible
    if not plain:
        return None
    best = max(plain, key=lambda one: one.of_noise)
    words = (
        f"At equal cost ({BUDGET:.0f} forwards a state) it keeps {best.of_noise:.0%} of the best reward gain per KL: "
        f"its estimator would keep {best.of_estimator:.0%}, its strengths leave {best.of_strength:.0%}, noise the "
        f"rest; {best.hurts} hurts it most"
    )
    other = max((one for one in plain if _order(one) != _order(best)), key=lambda one: one.of_noise, default=None)
    if other:
        words += f". The best of {_order(other)} order, {other.name}, keeps {other.of_noise:.0%}"
    worst = min((one for one in plain if _order(one) == "first"), key=lambda one: one.of_estimator, default=None)
    if worst and worst.estimator and worst.estimator != best.estimator:
        off = [(m.rows[worst.estimator].turned, m.t) for m in moments if m.rows and m.rows[worst.estimator].size > 0]
        if off:
            words += f". '{worst.estimator}' ({worst.name}) points {max(off)[0]:.0%} off at t = {max(off)[1]:.2f}"
    return best.name, words


def _order(one: Outlook) -> str:
    return "zeroth" if "siblings" in str(one.estimator) else "first"


def _branches(
    found: Sequence[Outlook], s: Schedule, moments: Sequence[Moment], differentiable: bool
) -> tuple[str, str]:
    """Where siblings' rewards differ, there the branches belong."""
    share = decided(moments, len(s))
    kind = "The reference is too noisy to rank first-order gradients" if differentiable else "The reward is a black box"
    if float(share.sum()) == 0:
        return "flow-grpo", f"{kind} and siblings of one state never differ in it, so only whole rollouts can tell"
    early = float(share[: math.ceil(0.4 * len(s))].sum())
    reach = int((share.cumsum(0) < 2 / 3).sum())
    where = f"{kind}, and two thirds of what siblings differ by is decided at t >= {float(s.t[reach]):.2f}"
    if early >= 0.5 and any(one.name == "rsm-branch-sd35" for one in found):
        return "rsm-branch-sd35", f"{where}, so the branches belong there"
    return "rsm-branch-sd15", f"{where}, so branches belong at few steps all along"
