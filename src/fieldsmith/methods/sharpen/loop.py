"""Sharpening's loop: noised data -> what the network says -> loss, term by term -> fit (VSM notes, 2.1, 8.2).

In: a model on a variance-preserving path, states of its data, a SharpenConfig. Out: the model's weights, a `Result`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith import preflight, processes
from fieldsmith.errors import InputError, RunError
from fieldsmith.methods.sharpen import losses as terms
from fieldsmith.methods.sharpen.config import JACOBIAN, NEEDS_HEAD, SharpenConfig, check
from fieldsmith.models.core import Model
from fieldsmith.models.families import NO_STEPS
from fieldsmith.models.jacobians import jvp, rademacher
from fieldsmith.models.variance_head import LAST
from fieldsmith.paths import VariancePreserving, noised, snr
from fieldsmith.run import Run
from fieldsmith.samplers import range_log_variance, single_step
from fieldsmith.training import Fit, Optimisation, fit, step_generator

DOMINATES = 1.0  # a term whose gradient is longer than the rest's


@dataclass(frozen=True)
class Result:
    """What the run did; `share` is the mean length of the term's gradient over that of the rest, None without one."""

    steps: int
    seconds: float
    stopped: str
    forward_equivalents: int
    share: float | None
    warnings: tuple[str, ...]


class Step:
    """One update's loss: `base` is what every method minimises, `term` what the method adds."""

    def __init__(self, model: Model, data: Tensor, config: SharpenConfig):
        assert isinstance(model.path, VariancePreserving)
        self.model, self.data, self.config, self.path = model, data, config, model.path
        self.condition = model.encode([""])
        index = torch.arange(self.path.length)
        t = (index + 1).double() / self.path.length
        sigma = self.path.sigma(t)
        inside = (sigma >= config.times[0]) & (sigma <= config.times[1] + 1e-9)
        if not inside.any():
            raise InputError(f"times={config.times[0]:g} {config.times[1]:g} hold none of the model's noise levels")
        self.times = t[inside]
        self.images = data.ndim == 4 and model.family != "dit"  # whose states are latents, not 8-bit pixels

    def draw(self, generator: torch.Generator) -> Rows:
        n = self.config.batch
        rows = torch.randint(len(self.data), (n,), generator=generator)
        t = self.times[torch.randint(len(self.times), (n,), generator=generator)]
        x_0 = self.data[rows]
        eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)
        if self.config.perturbation:
            shaken = eps + self.config.perturbation * torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)
        else:
            shaken = eps
        device = self.model.device
        x_0, eps, shaken, t = x_0.to(device), eps.to(device), shaken.to(device), t.to(device)
        x_t = noised(self.path, x_0, shaken, t.to(x_0))
        if self.config.method == "neighbours":
            return self._among_neighbours(x_0, x_t, t, generator)
        return Rows(x_0, x_t, t, eps)

    def _among_neighbours(self, x_0: Tensor, x_t: Tensor, t: Tensor, generator: torch.Generator) -> Rows:
        """Targets that are posterior means over a bank, at data's states and at states between two of them."""
        n, off = len(x_0), round(self.config.off_path * len(x_0))
        picked = torch.randint(len(self.data), (self.config.bank,), generator=generator)
        bank = torch.cat((x_0, self.data[picked].to(x_0)))
        if off:
            other = x_0[torch.randperm(n, generator=generator)[:off].to(x_0.device)]
            mix = torch.rand(off, *(1,) * (x_0.ndim - 1), generator=generator).to(x_0)
            alpha = self.path.alpha(t[:off]).to(x_0).reshape(mix.shape)
            x_t = torch.cat((x_t[:off] + mix * alpha * (other - x_0[:off]), x_t[off:]))
        alpha, sigma = self.path.alpha(t).to(x_t), self.path.sigma(t).to(x_t)
        return Rows(x_0, x_t, t, terms.neighbours(x_t, alpha, sigma, bank))

    def __call__(self, rows: Rows, generator: torch.Generator, log: dict[str, float]) -> Terms:
        config = self.config
        pred = self.model.predict(rows.x_t, rows.t.to(rows.x_t), self.condition)
        eps_hat = pred.eps
        errors = terms.simple(eps_hat, rows.eps)
        log["eps error"] = errors.mean().item()
        if config.min_snr:
            errors = errors * (config.min_snr / snr(self.path, rows.t)).clamp(max=1).to(errors)
        base = errors.mean()
        term: Tensor | None = None
        if config.method in NEEDS_HEAD:
            log_variance = pred.log_variance if pred.fraction is None else None
            if log_variance is None:
                assert pred.fraction is not None
                log_variance = range_log_variance(self.path, rows.t, pred.fraction)
            if not bool(torch.isfinite(log_variance).all()):
                raise RunError("the learned log-variance is no longer finite; lower the learning rate or the strength")
            if pred.fraction is not None:
                log["fraction of the range"] = pred.fraction.mean().item()
            if config.method != "covariance":
                bound = self._bound(rows, eps_hat.detach(), log_variance)
                log["L_vb"] = bound.item()
                base = bound if config.train == "head" else base + bound * self.path.length / 1000
            if config.method == "variance-penalty":
                sigma = self.path.sigma(rows.t).to(rows.x_t)
                weight = terms.penalty_weight(config.strength, sigma, config.weight)
                term = (weight * terms.variance_penalty(log_variance)).mean()
            if config.method == "covariance":
                base = base * 0 if config.train == "head" else base
                term = config.strength * self._covariance(rows, log_variance, generator)
        elif config.method in JACOBIAN:
            term = config.strength * self._jacobian(rows, generator)
        return Terms(base, term)

    def _bound(self, rows: Rows, eps_hat: Tensor, log_variance: Tensor) -> Tensor:
        """L_vb of each row's single reverse step, bits per dimension."""
        t = rows.t
        t_next = (t - 1 / self.path.length).clamp(min=0)
        sigma2, beta = self.path.sigma(t) ** 2, self.path.beta(t, t_next)
        mean = self._wide(1 / (1 - beta).sqrt(), rows.x_t) * (
            rows.x_t - self._wide(beta / sigma2.sqrt(), rows.x_t) * eps_hat
        )
        c = self._wide(beta * self.path.alpha(t_next) / sigma2, rows.x_t)
        kept = self._wide((1 - beta).sqrt() * self.path.sigma(t_next) ** 2 / sigma2, rows.x_t)
        true = c * rows.x_0 + kept * rows.x_t
        low = single_step(self.path, t).low.log().to(rows.x_t)
        bound = terms.gaussian_bound(true, low, mean, log_variance)
        last = t_next <= 0
        if bool(last.any()):
            at_data = terms.discretised_bound if self.images else terms.density_bound
            bound = torch.where(last.to(bound.device), at_data(rows.x_0, mean, log_variance), bound)
        return bound.mean()

    def _wide(self, t: Tensor, like: Tensor) -> Tensor:
        return t.to(like).reshape(-1, *(1,) * (like.ndim - 1))

    def _probed(self, rows: Rows) -> slice:
        """The rows at which a Jacobian is asked: the first, since rows come in random order."""
        return slice(0, max(1, round(self.config.probes * len(rows.t))))

    def _jacobian(self, rows: Rows, generator: torch.Generator) -> Tensor:
        part = self._probed(rows)
        x_t, t = rows.x_t[part], rows.t[part].to(rows.x_t)
        callback = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype).to(x_t)
        if self.config.method == "jacobian-match":
            callback = callback / callback.flatten(1).norm(dim=1).reshape(-1, *(1,) * (x_t.ndim - 1))
        found = jvp(lambda x: self.model.predict(x, t, self.condition).eps, x_t, callback)
        sigma = self._wide(self.path.sigma(t), x_t)
        along = -sigma * found.along
        if self.config.method == "jacobian-match":
            residual = (rows.eps[part] - found.value).detach()
            return terms.jacobian_match(along, callback, residual).mean()
        return terms.jacobian_floor(along if self.config.kind == "normalised" else along / sigma**2).mean()

    def _covariance(self, rows: Rows, log_variance: Tensor, generator: torch.Generator) -> Tensor:
        part = self._probed(rows)
        x_t, t = rows.x_t[part], rows.t[part]
        callback = rademacher(x_t, generator)
        with torch.no_grad():
            along = jvp(lambda x: self.model.predict(x, t.to(x), self.condition).eps, x_t, callback).along
        along = -self._wide(self.path.sigma(t), x_t) * along
        t_next = (t - 1 / self.path.length).clamp(min=1 / self.path.length)  # the last step adds no noise anyway
        sigma, beta = self.path.sigma(t), single_step(self.path, t).high
        c = beta * self.path.alpha(t_next) / sigma**2
        low = single_step(self.path, t).low
        numbers = (part_.to(x_t) for part_ in (low, c, self.path.alpha(t), sigma))
        curvature = terms.implied_curvature(log_variance[part], *numbers)
        return terms.covariance_match(curvature, along, callback).mean()


@dataclass(frozen=True)
class Rows:
    """Clean states, noised ones (batch, ...), times (batch,) in float64, and the target eps."""

    x_0: Tensor
    x_t: Tensor
    t: Tensor
    eps: Tensor


@dataclass(frozen=True)
class Terms:
    """What every method minimises, and what this one adds (None: nothing)."""

    base: Tensor
    term: Tensor | None

    @property
    def total(self) -> Tensor:
        return self.base if self.term is None else self.base + self.term


def gradient_share(found: Terms, parameters: list[Tensor]) -> float:
    """|grad of the term| / |grad of the rest|, which keeps the graph."""
    if found.term is None:
        return 0.0
    norms = []
    for part in (found.term, found.base):
        grads = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
        norms.append(math.sqrt(sum(float(processes.mean(g).square().sum()) for g in grads if g is not None)))
    return norms[0] / norms[1] if norms[1] else math.inf


def check_path(model: Model) -> None:
    """Raises InputError where the model has no ancestral steps."""
    if not isinstance(model.path, VariancePreserving):
        raise InputError(f"{model.name} {NO_STEPS}")


def check_model(model: Model, data: Tensor, config: SharpenConfig) -> None:
    """Raises InputError where the model and the method do not go together."""
    check_path(model)
    if not len(data):
        raise InputError("there are no images to train on; name data with some")
    if config.method in NEEDS_HEAD and not getattr(model, "learns_variance", False):
        raise InputError(
            f"method '{config.method}' needs a variance head, which {model.name} lacks; add --add-head to give it one"
        )
    variance = getattr(model, "variance", "learned_range")
    if config.method in NEEDS_HEAD and variance not in ("learned", "learned_range"):
        raise InputError(
            f"{model.name} has a variance head but its scheduler's variance_type is '{variance}', so nobody knows how "
            "to read it; set it to 'learned_range' in scheduler_config.json"
        )
    shape = tuple(model.noise(1, torch.Generator().manual_seed(0)).shape[1:])
    if tuple(data.shape[1:]) != shape:
        raise InputError(f"data of shape {tuple(data.shape[1:])}; {model.name} takes {shape}")
    if not bool(torch.isfinite(data).all()):
        raise InputError("the data hold NaN or infinity; look at the images")


def sharpen(
    model: Model,
    data: Tensor,
    config: SharpenConfig,
    run: Run | None = None,
    quiet: bool = False,
    optimizer: str = "adamw",
) -> Result:
    """Train the model in place on states `data` (n, ...), resumably. Raises InputError before the first update."""
    check(config)
    processes.check_share(config.batch, "batch")
    check_model(model, data, config)
    model.unfreeze("all")
    if config.train == "head":
        last = LAST.get(model.family, "last")
        for name, parameter in model.network.named_parameters():
            parameter.requires_grad_(name.startswith(f"{last}."))
    try:
        step = Step(model, data, config)
        with model.uncounted():
            shares = _preflight(step, config, quiet)
    except (InputError, RunError):
        model.remove_training()
        raise
    parameters = model.trainable()
    if run:
        run.begin()

    def losses(at: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        found = step(step.draw(generator), generator, log)
        if found.term is not None:
            log["term"] = found.term.item()
            if at % config.share_every == 0:
                shares.append(gradient_share(found, list(parameters.values())))
                if math.isfinite(shares[-1]):  # not where the term is all there is
                    log["gradient share"] = shares[-1]
        yield found.total
        if config.l2:
            yield config.l2 / 2 * sum((p.square().sum() for p in parameters.values()), torch.zeros(()))

    optimisation = Optimisation(
        config.steps, config.lr, config.weight_decay, config.warmup, cosine=True, clip=config.clip,
        ema=config.ema or None, checkpoint_every=max(100, config.steps // 10), seed=config.seed,
        optimizer=optimizer,
    )  # fmt: skip
    with model.count_nfe() as nfe:
        done: Fit = fit(parameters, losses, optimisation, run)
    model.network.requires_grad_(False)
    finite = [share for share in shares if math.isfinite(share)]
    mean = sum(finite) / len(finite) if finite else None
    return Result(done.steps, done.seconds, done.stopped, nfe.total, mean, warnings_of(mean, config))


def warnings_of(share: float | None, config: SharpenConfig) -> tuple[str, ...]:
    """What a share of the gradient says of a strength."""
    if share is None or config.train == "head":
        return ()
    output = f"strength={config.strength:g}: the term's gradient is {share:.2g} times the rest's"
    if share > DOMINATES:
        return (f"{output}; it dominates, lower it",)
    if share < 1e-4:
        return (f"{output}; it does next to nothing",)
    return ()


def _preflight(step: Step, config: SharpenConfig, quiet: bool) -> list[float]:
    """One step's worth, thrown away: every trained layer is reached; the term's share of the gradient."""
    generator = step_generator(config.seed, 0, stream=14)
    found = step(step.draw(generator), generator, {})
    parameters = list(step.model.trainable().values())
    shares = [] if found.term is None else [gradient_share(found, parameters)]
    checks = [] if config.train == "head" else preflight.gradients(step.model, found.total)
    checks.append(preflight.memory(step.model, config.batch))
    if shares:
        word = f"gradient share of the {config.method} term"
        checks.append(preflight.Check(word, shares[0], "1e-4 to 1", True, ""))
    preflight.require(checks, quiet)
    return shares
