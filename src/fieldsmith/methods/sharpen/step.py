"""`sharpen` prepared: noised data -> what the network says -> loss, term by term (VSM notes, 2.1, 8.2).

In: a model, a world of its data, a SharpenConfig. Out: a Job for verb.py, whose model is the model itself, or the guide
that it is steered away from. What needs no learned variance runs on rectified flow, too, whose error is the velocity's.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fieldsmith import preflight, processes
from fieldsmith.errors import InputError
from fieldsmith.methods.sharpen import losses as terms
from fieldsmith.methods.sharpen.config import JACOBIAN, NEEDS_HEAD, SharpenConfig
from fieldsmith.methods.sharpen.sampling import Steered, judges
from fieldsmith.models.core import Condition, Model
from fieldsmith.models.families import NO_STEPS
from fieldsmith.models.jacobians import jvp, rademacher
from fieldsmith.models.prompted import Prompted
from fieldsmith.models.prompts import encoded_prompts
from fieldsmith.models.shrink import shrink
from fieldsmith.models.variance_head import LAST, with_variance_head
from fieldsmith.paths import RectifiedFlow, VariancePreserving, length_of, noised, snr, times_of
from fieldsmith.pictures import Encoded, Images, encoded
from fieldsmith.preflight import Check
from fieldsmith.samplers import range_log_variance, single_step
from fieldsmith.training import Fit, Log, optimisation_of, step_generator
from fieldsmith.verb import Job

POOL = 20_000  # images drawn from a world for training
DOMINATES = 1.0  # a term whose gradient is longer than the rest's


@dataclass(frozen=True)
class Inputs:
    """What a run is given beside its settings.

    `world` draws the data and judges images (worlds/judged.py), or is a function (channels, size, whether captions are
    of use) that gives such a world for the model's images. `states` are data that are encoded already, which train as
    well, but nothing can be measured on them. `features` make distances; None: of 8 x 8 pixels.
    """

    world: Any | Callable[[int, int, bool], Any] = None
    states: Tensor | None = None
    features: Callable[[Tensor], Tensor] | None = None


def prepare(model: Model, config: SharpenConfig, inputs: Inputs) -> Job:
    """Train the model, or a guide beside it, on the world's data.

    Raises InputError where model, method, data and judge do not go together, before anything is trained.
    """
    check_path(model, config)
    if inputs.states is None:
        preflight.check_sampled(model, config.sampler_steps)
    if config.method in NEEDS_HEAD and config.add_head and not getattr(model, "learns_variance", False):
        model = with_variance_head(model)
    world = None if inputs.states is not None else world_for(model, inputs.world)
    states: Tensor | Encoded | None = inputs.states
    captions: Sequence[str] = ()  # one a state, or none at all
    if states is None:
        assert world is not None
        images, captions = data_of(world, model, config.seed)
        states = encoded(images, model.encode_images)
        if config.samples and judges(world):
            world.judge(images[:1])  # a judge that fails does so before anything is trained or written
    check_model(model, states, config)
    guide = config.method == "guide"
    trained = shrink(model, config.guide_size, seed=config.seed) if guide else model
    trained.raise_precision()
    step = Step(trained, states, config.replace(method="plain") if guide else config, captions)
    unfreeze(trained, config.train)
    parameters = trained.trainable()
    shares: list[float] = []  # of the term's gradient, as it was measured now and then

    def losses(at: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        loss = step(step.draw(generator), generator, log)
        if loss.term is not None:
            log.count("term", loss.term.item())
            if at % config.share_every == 0:
                shares.append(gradient_share(loss, list(parameters.values())))
                if math.isfinite(shares[-1]):  # not where the term is all there is
                    log["gradient share"] = shares[-1]
        yield loss.total
        if config.l2:
            squares = sum((p.square().sum() for p in parameters.values()), torch.zeros(()))
            yield config.l2 / 2 / processes.count() * squares

    def checks(resumes: bool) -> list[Check]:
        """On one step's worth, thrown away: every trained layer is reached; the term's share of the gradient."""
        generator = step_generator(config.seed, 0, stream=14)
        loss = step(step.draw(generator), generator, Log())
        if loss.term is not None:
            shares.append(gradient_share(loss, list(parameters.values())))
        reached = [] if config.train == "head" else preflight.gradients(trained, loss.total)
        name = f"gradient share of the {config.method} term"
        share = [Check(name, one, "1e-4 to 1", True, "") for one in shares]
        return [*reached, preflight.memory(trained, config.batch), *share]

    def mean_share() -> float | None:
        finite = [share for share in shares if math.isfinite(share)]
        return sum(finite) / len(finite) if finite else None

    def facts() -> dict[str, Any]:
        """`gradient share` is the mean length of the term's gradient over that of the rest, None without one."""
        share = mean_share()
        return {"method": config.method, "gradient share": share, "warnings": warnings_of(share, config)}

    def advice(done: Fit) -> list[str]:
        return list(warnings_of(mean_share(), config))

    def ship(network: Model, folder: pathlib.Path) -> str:
        name = "guide" if guide else "model"
        network.save(folder / name)
        return name

    return Job(
        trained, losses, optimisation_of(config), parameters, checks, base=model if guide else None,
        trained=Steered(model, trained, config.guidance) if guide else None, ship=ship, facts=facts, advice=advice,
        inputs=replace(inputs, world=world), context=step.prompts,
    )  # fmt: skip


def data_of(world: Any, model: Model, seed: int) -> tuple[Any, Sequence[str]]:
    """Images to train on and the caption of each; no captions where the data have none or the model reads no words."""
    own = getattr(world, "images", None)  # the user's, which are read batch by batch
    if isinstance(own, Images):
        return own, world.captions
    if isinstance(model, Prompted) and hasattr(world, "captioned"):
        return world.captioned(POOL, seed)  # type: ignore[no-any-return]
    return world.sample(POOL, seed), ()


def world_for(model: Model, world: Any) -> Any:
    """The world of the model's images. Raises InputError where its images are of another shape."""
    shape = tuple(model.decode(model.noise(1, torch.Generator().manual_seed(0))).shape[1:])
    world = world(shape[0], shape[-1], isinstance(model, Prompted)) if callable(world) else world
    if (world.channels, world.size, world.size) != shape:
        raise InputError(
            f"data '{world.name}' are {world.channels} x {world.size} x {world.size}; {model.name} draws "
            f"{' x '.join(map(str, shape))}, so give a model of that size"
        )
    return world


def unfreeze(model: Model, train: str) -> None:
    """Let all weights train, or the last layer alone where the variance's head does."""
    model.unfreeze("all")
    if train == "head":
        last = LAST.get(model.family, "last")
        for name, parameter in model.network.named_parameters():
            parameter.requires_grad_(name.startswith(f"{last}."))


def check_path(model: Model, config: SharpenConfig) -> None:
    """Raises InputError where the settings are those of DDPM's steps and the model is on rectified flow."""
    if isinstance(model.path, VariancePreserving):
        return
    if config.method in NEEDS_HEAD or config.add_head:
        raise InputError(f"{model.name} {NO_STEPS}")
    if config.min_snr:
        raise InputError(
            f"min_snr={config.min_snr:g} weighs errors of eps; {model.name} learns a velocity, so leave it out"
        )


def check_model(model: Model, data: Tensor | Encoded, config: SharpenConfig) -> None:
    """Raises InputError where the model and the method do not go together."""
    check_path(model, config)
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
    if isinstance(data, Tensor) and not bool(torch.isfinite(data).all()):
        raise InputError("the data hold NaN or infinity; look at the images")


@dataclass(frozen=True)
class Rows:
    """Clean states, noised ones (batch, ...), times (batch,) in float64, the target eps, the row of each one's prompt.

    x_0 and eps may be means over what both could have been (`neighbours`).
    """

    x_0: Tensor
    x_t: Tensor
    t: Tensor
    eps: Tensor
    prompt: Tensor | None = None  # (batch,); None: all have the first


@dataclass(frozen=True)
class Terms:
    """This process's part of what every method minimises, and of what this one adds (None: nothing)."""

    base: Tensor
    term: Tensor | None

    @property
    def total(self) -> Tensor:
        return self.base if self.term is None else self.base + self.term


class Step:
    """One update's loss: `base` is what every method minimises, `term` what the method adds."""

    def __init__(self, model: Model, data: Tensor | Encoded, config: SharpenConfig, captions: Sequence[str] = ()):
        self.model, self.data, self.config, self.path = model, data, config, model.path
        self.flows = isinstance(model.path, RectifiedFlow)
        # not model.null: SDXL's is zeros, among which attention has nothing to choose, so that half of it cannot learn
        self.prompts = tuple(dict.fromkeys(captions)) or ("",)
        self.conditions = encoded_prompts(model, self.prompts)
        place = {prompt: row for row, prompt in enumerate(self.prompts)}
        self.captions = torch.tensor([place[caption] for caption in captions]) if captions else None
        t = times_of(self.path)
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
        own = processes.owned(n)
        prompt = None if self.captions is None else self.captions[rows][own]
        if self.config.method == "neighbours":
            return replace(self._among_neighbours(x_0, x_t, t, generator), prompt=prompt)
        return Rows(x_0[own], x_t[own], t[own], eps[own], prompt)

    def _asked(self, rows: Rows, part: slice = slice(None)) -> Condition:
        """The prompts of some rows, encoded."""
        return self.conditions[torch.zeros(1, dtype=torch.long) if rows.prompt is None else rows.prompt[part]]

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
        own = processes.owned(n)
        x_0, x_t, t = x_0[own], x_t[own], t[own]
        alpha, sigma = self.path.alpha(t).to(x_t), self.path.sigma(t).to(x_t)
        x_0, eps = terms.neighbours(x_t, alpha, sigma, bank)
        return Rows(x_0, x_t, t, eps)

    def _mean(self, values: Tensor, rows: int | None = None) -> Tensor:
        """This process's part of the mean over a batch (or its first `rows`), (n,) -> ()."""
        return values.sum() / (rows or self.config.batch)

    def __call__(self, rows: Rows, generator: torch.Generator, log: Log) -> Terms:
        config = self.config
        pred = self.model.predict(rows.x_t, rows.t.to(rows.x_t), self._asked(rows))
        eps_hat = pred.eps
        # a flow's eps says nothing of the network at t = 1
        pair = (pred.velocity, rows.eps - rows.x_0) if self.flows else (eps_hat, rows.eps)
        errors = terms.simple(*pair)
        log.mean("velocity error" if self.flows else "eps error", errors)
        if config.min_snr:
            errors = errors * (config.min_snr / snr(self.path, rows.t)).clamp(max=1).to(errors)
        base = self._mean(errors)
        term: Tensor | None = None
        if config.method in NEEDS_HEAD:
            log_variance = pred.log_variance if pred.fraction is None else None
            if log_variance is None:
                assert pred.fraction is not None and isinstance(self.path, VariancePreserving)
                log_variance = range_log_variance(self.path, rows.t, pred.fraction)
            if pred.fraction is not None:
                log.mean("fraction of the range", pred.fraction)
            if config.method != "covariance":
                bound = self._mean(self._bound(rows, eps_hat.detach(), log_variance))
                log.count("L_vb", bound.item())
                base = bound if config.train == "head" else base + bound * length_of(self.path) / 1000
            if config.method == "variance-penalty":
                sigma = self.path.sigma(rows.t).to(rows.x_t)
                weight = terms.penalty_weight(config.strength, sigma, config.weight)
                term = self._mean(weight * terms.variance_penalty(log_variance))
            if config.method == "covariance":
                base = base * 0 if config.train == "head" else base
                term = config.strength * self._covariance(rows, log_variance, generator)
        elif config.method in JACOBIAN:
            term = config.strength * self._jacobian(rows, generator)
        return Terms(base, term)

    def _bound(self, rows: Rows, eps_hat: Tensor, log_variance: Tensor) -> Tensor:
        """L_vb of each row's single reverse step, bits per dimension, (n,)."""
        t, path = rows.t, self.path
        assert isinstance(path, VariancePreserving)
        t_next = (t - 1 / path.length).clamp(min=0)
        sigma2, beta = path.sigma(t) ** 2, path.beta(t, t_next)
        mean = _wide(1 / (1 - beta).sqrt(), rows.x_t) * (rows.x_t - _wide(beta / sigma2.sqrt(), rows.x_t) * eps_hat)
        c = _wide(beta * path.alpha(t_next) / sigma2, rows.x_t)
        kept = _wide((1 - beta).sqrt() * path.sigma(t_next) ** 2 / sigma2, rows.x_t)
        true = c * rows.x_0 + kept * rows.x_t
        low = single_step(path, t).low.log().to(rows.x_t)
        bound = terms.gaussian_bound(true, low, mean, log_variance)
        last = t_next <= 0
        if bool(last.any()):
            at_data = terms.discretised_bound if self.images else terms.density_bound
            bound = torch.where(last.to(bound.device), at_data(rows.x_0, mean, log_variance), bound)
        return bound

    def _probed(self) -> tuple[int, Tensor]:
        """How many rows of a batch are asked for a Jacobian: the first, since rows come in random order; which of this
        process's rows are among them, as places in the batch."""
        n = max(1, round(self.config.probes * self.config.batch))
        own = processes.owned(self.config.batch)
        return n, own[own < n]

    def _jacobian(self, rows: Rows, generator: torch.Generator) -> Tensor:
        n, own = self._probed()
        part = slice(0, len(own))
        x_t, t = rows.x_t[part], rows.t[part].to(rows.x_t)
        probe = torch.randn(n, *x_t.shape[1:], generator=generator, dtype=x_t.dtype)[own].to(x_t)
        if not len(own):
            return x_t.sum()  # 0: another process has the rows
        if self.config.method == "jacobian-match":
            probe = probe / _wide(probe.flatten(1).norm(dim=1), x_t)
        asked = self._asked(rows, part)
        found = jvp(lambda x: self.model.predict(x, t, asked).eps, x_t, probe)
        sigma = _wide(self.path.sigma(t), x_t)
        along = -sigma * found.along
        if self.config.method == "jacobian-match":
            residual = (rows.eps[part] - found.value).detach()
            return self._mean(terms.jacobian_match(along, probe, residual), n)
        return self._mean(terms.jacobian_floor(along if self.config.kind == "normalised" else along / sigma**2), n)

    def _covariance(self, rows: Rows, log_variance: Tensor, generator: torch.Generator) -> Tensor:
        n, own = self._probed()
        part = slice(0, len(own))
        x_t, t = rows.x_t[part], rows.t[part]
        probe = rademacher(x_t.new_empty(n, *x_t.shape[1:]), generator)[own]
        if not len(own):
            return x_t.sum()  # 0: another process has the rows
        path, asked = self.path, self._asked(rows, part)
        assert isinstance(path, VariancePreserving)
        with torch.no_grad():
            along = jvp(lambda x: self.model.predict(x, t.to(x), asked).eps, x_t, probe).along
        along = -_wide(path.sigma(t), x_t) * along
        t_next = (t - 1 / path.length).clamp(min=1 / path.length)  # the last step adds no noise anyway
        sigma, beta = path.sigma(t), single_step(path, t).high
        c = beta * path.alpha(t_next) / sigma**2
        low = single_step(path, t).low
        levels = (level.to(x_t) for level in (low, c, path.alpha(t), sigma))
        curvature = terms.implied_curvature(log_variance[part], *levels)
        return self._mean(terms.covariance_match(curvature, along, probe), n)


def _wide(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like).reshape(-1, *(1,) * (like.ndim - 1))


def gradient_share(loss: Terms, parameters: list[Tensor]) -> float:
    """|grad of the term| / |grad of the rest|, which keeps the graph."""
    if loss.term is None:
        return 0.0
    norms = []
    for part in (loss.term, loss.base):
        here = part.requires_grad  # not where another process has the probed rows
        grads = (
            torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
            if here
            else [None] * len(parameters)
        )
        # a process without a probed row has no gradient of the term, but takes part in the sum
        whole = (
            processes.total(torch.zeros_like(p) if g is None else g) for p, g in zip(parameters, grads, strict=True)
        )
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in whole)))
    return norms[0] / norms[1] if norms[1] else math.inf


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
