"""Sharpening where it learns and draws: losses by their formulas, loops, heads, folds, fields, filters."""

from __future__ import annotations

import math
import pathlib
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from experiments.oracles.perceptron import Perceptron
from experiments.oracles.pushforward import (
    gap_mass,
    last_steps,
    posterior_covariance,
    push_forward,
    smoothed_score_field,
    wide_linear,
)
from experiments.sharpen.laplacian import laplacian
from experiments.tiny import dit_pipeline, unet_pipeline
from fieldsmith.errors import InputError, RunError
from fieldsmith.methods.sharpen import losses as terms
from fieldsmith.methods.sharpen import sampling
from fieldsmith.methods.sharpen.config import METHODS, NEEDS_HEAD, PRESETS, SharpenConfig
from fieldsmith.methods.sharpen.step import Rows, Step, check_model, warnings_of
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.models.dit import DiT
from fieldsmith.models.exact import Exact
from fieldsmith.models.shrink import shrink
from fieldsmith.models.unet import STATES_FILE, UNet
from fieldsmith.models.variance_head import with_variance_head
from fieldsmith.paths import Prediction, RectifiedFlow, VariancePreserving, noised
from fieldsmith.run import Run
from fieldsmith.samplers import ancestral_step, ddim_grid, flow_grid, variance_bounds
from fieldsmith.training import Log
from fieldsmith.worlds.mixtures import lattice, line
from tests.drawn import seeded
from tests.trained import sharpen

LINEAR = VariancePreserving((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
WIDE = wide_linear()
SHORT = SharpenConfig(method="plain", steps=3, batch=8, warmup=1, bank=16, ema=0.5, share_every=2)
LEARNABLE = tuple(method for method in METHODS if method != "guide")


def generator(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def unet(**options) -> UNet:
    return UNet(unet_pipeline(size=8, widths=(8, 8), **options), "tiny")


def dit(**options) -> DiT:
    return DiT(dit_pipeline(classes=3, layers=1, **options), "tiny")


def points(head: str | None = "range", d: int = 2, path: VariancePreserving = LINEAR) -> Perceptron:
    return Perceptron(d, path, head, width=16)


def images(n: int = 64) -> Tensor:
    """States of 8-bit images."""
    return torch.randint(256, (n, 3, 8, 8), generator=seeded(7)) * (2 / 255) - 1


def world(which: str, method: str) -> tuple[Model, Tensor]:
    """A model that the method can train, and its data."""
    head = method in NEEDS_HEAD
    if which == "unet":
        return unet(learned_variance=head), images()
    return points("range" if head else None), lattice().sample(200, seeded()).float()


def weights(model: Model) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def outputs(model: Model) -> Prediction:
    x = model.noise(4, seeded(3))
    return model.predict(x, torch.tensor([0.001, 0.01, 0.3, 1.0]), model.encode([""]))


# losses


def test_the_penalty_is_the_papers_finite_and_rising():
    wide = torch.linspace(-60, 20, 4001, dtype=torch.float64)[:, None]
    torch.testing.assert_close(terms.variance_penalty(wide), 1 / (1 + (-2 * wide[:, 0]).exp()), rtol=1e-12, atol=0)
    narrow = wide.float().requires_grad_()
    value = terms.variance_penalty(narrow)
    value.sum().backward()
    assert value.isfinite().all() and narrow.grad.isfinite().all()
    assert (value.diff() >= 0).all() and (terms.variance_penalty(wide)[:2000].diff() > 0).all()
    rows = torch.tensor([[-3.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.sigmoid(2 * rows).mean(1)  # a mean over all but the rows
    torch.testing.assert_close(terms.variance_penalty(rows), expected)


def doubled(v: tuple[float, float]) -> tuple[Perceptron, Tensor, list[Tensor]]:
    """A float64 network whose head says v, data, and where what its last layer says is kept."""
    model, kept = points(), []
    model.network.double()
    with torch.no_grad():
        model.network.last.bias[2:] = torch.tensor(v)
    model.network.requires_grad_(True)
    model.network.last.register_forward_hook(lambda layer, inputs, out: kept.append(out))
    return model, lattice().sample(200, seeded()), kept


def of_table(rows: Rows) -> dict[str, Tensor]:
    """abar, that of the time before, beta and betatilde of each row, (n, 1), read off the schedule's table."""
    index = (rows.t * 1000).round().long() - 1
    abar = torch.cat((torch.ones(1, dtype=torch.float64), LINEAR.alphas_cumprod))
    now, before = abar[index + 1][:, None], abar[index][:, None]
    assert (index > 0).all()
    beta = 1 - now / before
    return {"abar": now, "before": before, "beta": beta, "low": beta * (1 - before) / (1 - now)}


@pytest.mark.parametrize("weight", ["inverse-sigma", "constant"])
def test_the_penaltys_gradient_reaches_the_head_alone_and_is_the_closed_form(weight):
    v = torch.tensor([0.3, -0.4], dtype=torch.float64)
    model, data, kept = doubled((0.3, -0.4))
    config = replace(SHORT, method="variance-penalty", strength=0.1, weight=weight, batch=64)
    step = Step(model, data, config)
    rows = step.draw(seeded(1))
    (gradient,) = torch.autograd.grad(step(rows, seeded(), Log()).term, kept[0])
    assert (gradient[:, :2] == 0).all()
    at = of_table(rows)
    s4 = ((v + 1) / 2 * at["beta"].log() + (1 - v) / 2 * at["low"].log()).exp() ** 2
    rho = 0.1 / (1 - at["abar"]).sqrt() if weight == "inverse-sigma" else 0.1
    expected = rho * 0.5 * (at["beta"] / at["low"]).log() * 2 * s4 / (1 + s4) ** 2 / 2 / 64  # 2 pixels, 64 rows
    torch.testing.assert_close(gradient[:, 2:], expected, rtol=1e-6, atol=0)


def test_the_bounds_gradient_reaches_the_head_alone_and_is_the_closed_form():
    v = torch.tensor([0.3, -0.4], dtype=torch.float64)
    model, data, kept = doubled((0.3, -0.4))
    step = Step(model, data, replace(SHORT, method="variance-learning", train="head", batch=64))
    rows = step.draw(seeded(1))
    (gradient,) = torch.autograd.grad(step(rows, seeded(), Log()).base, kept[0])
    assert (gradient[:, :2] == 0).all()
    at = of_table(rows)
    c = at["before"].sqrt() * at["beta"] / (1 - at["abar"])
    true = c * rows.x_0 + (1 - at["beta"]).sqrt() * (1 - at["before"]) / (1 - at["abar"]) * rows.x_t
    mean = (rows.x_t - at["beta"] / (1 - at["abar"]).sqrt() * kept[0][:, :2]) / (1 - at["beta"]).sqrt()
    s2 = ((v + 1) / 2 * at["beta"].log() + (1 - v) / 2 * at["low"].log()).exp()
    S = at["low"] + (true - mean).square()
    expected = 0.5 * (at["beta"] / at["low"]).log() * (1 - S / s2) / 2 / math.log(2) / 2 / 64
    torch.testing.assert_close(gradient[:, 2:], expected.detach(), rtol=1e-6, atol=1e-15)


def test_in_images_too_bound_and_penalty_leave_the_mean_alone():
    kept: list[Tensor] = []
    model = unet(learned_variance=True)
    model.network.requires_grad_(True)
    model.network.conv_out.register_forward_hook(lambda layer, inputs, out: kept.append(out))
    step = Step(model, images(), replace(SHORT, method="variance-penalty", train="head"))
    found = step(step.draw(seeded(1)), seeded(), Log())
    for part in (found.base, found.term):
        (gradient,) = torch.autograd.grad(part, kept[0], retain_graph=True)
        assert (gradient[:, :3] == 0).all() and gradient[:, 3:].any()


@pytest.mark.parametrize("weight", [0.1, 10.0, 1e3])
@pytest.mark.parametrize("low, gap", [(1e-3, 0.03), (0.5, 0.2), (2.0, 0.0)])
def test_beside_the_bound_the_penalty_shrinks_the_variance_by_the_law(low, gap, weight):
    S = low + gap**2
    zero = torch.zeros(1, 1, dtype=torch.float64)
    log_low = torch.tensor([math.log(low)], dtype=torch.float64)

    def loss(at: Tensor) -> Tensor:
        wide = at.reshape(1, 1)
        bound = terms.gaussian_bound(zero + gap, log_low, zero, wide)
        return (bound + weight * terms.variance_penalty(wide)).sum()

    at = torch.tensor(math.log(S), dtype=torch.float64)
    slope = torch.func.grad(loss)
    bend = torch.func.grad(slope)
    for _ in range(200):
        at = at - (slope(at) / bend(at).abs().clamp(min=0.1)).clamp(-1, 1)
    assert float(slope(at).abs()) < 1e-10
    s2 = float(at.exp())
    assert s2 == pytest.approx(S / (1 + 4 * math.log(2) * weight * s2**2 / (1 + s2**2) ** 2), rel=1e-9)
    assert s2 < S * (1 - 1e-7)


def test_bounds_are_torchs_divergence_and_density():
    true, mean, data = generator(3, 4, seed=1), generator(3, 4, seed=2), generator(3, 4, seed=3)
    log_true, log_variance = generator(3, seed=4), generator(3, 4, seed=5)
    p, q = Normal(true, (log_true[:, None] / 2).exp()), Normal(mean, (log_variance / 2).exp())
    bits = terms.gaussian_bound(true, log_true, mean, log_variance) * math.log(2)
    torch.testing.assert_close(bits, kl_divergence(p, q).mean(1))
    nats = terms.density_bound(data, mean, log_variance) * math.log(2)
    torch.testing.assert_close(nats, -q.log_prob(data).mean(1))


@pytest.mark.parametrize("deviation", [0.002, 0.1, 3.0])
def test_an_8_bit_pixels_levels_share_one_mass(deviation):
    levels = (torch.arange(256, dtype=torch.float64) * 2 / 255 - 1)[:, None]
    for mean in (-1.3, 0.2, 0.99):
        at, log_variance = torch.full_like(levels, mean), torch.full_like(levels, 2 * math.log(deviation))
        mass = (-terms.discretised_bound(levels, at, log_variance)).exp2()
        assert float(mass.sum()) == pytest.approx(1, abs=1e-9)
    inside = Normal(0.99, deviation).cdf(levels[100] + 1 / 255) - Normal(0.99, deviation).cdf(levels[100] - 1 / 255)
    assert float(mass[100]) == pytest.approx(max(float(inside), 1e-12), rel=1e-6)


def test_the_last_steps_bound_is_of_pixels_or_of_densities():
    for model, data in (
        (unet(learned_variance=True), images()),
        (with_variance_head(dit()), generator(8, 4, 8, 8, dtype=torch.float32)),
        (points(), lattice().sample(8, seeded()).float()),
    ):
        step = Step(model, data, replace(SHORT, method="variance-learning", train="head"))
        t = torch.full((8,), 0.001, dtype=torch.float64)
        eps = generator(*data[:8].shape, dtype=torch.float32)
        rows = Rows(data[:8], noised(model.path, data[:8], eps, t.float()), t, eps)
        beta = 1 - model.path.alphas_cumprod[0]
        with torch.no_grad():
            bound = step(rows, seeded(), Log()).base
            eps_hat = model.predict(rows.x_t, t.float(), model.encode([""])).eps
        mean = (rows.x_t - beta.sqrt() * eps_hat) / (1 - beta).sqrt()
        table = torch.cat((torch.ones(1), model.path.alphas_cumprod.double()))
        low = (1 - table[2] / table[1]) * (1 - table[1]) / (1 - table[2])  # borrowed from the step before
        fraction = step.model.predict(rows.x_t, t.float(), model.encode([""])).fraction.detach()
        log_variance = fraction * beta.log() + (1 - fraction) * low.log()
        at_data = terms.discretised_bound if model.family == "unet" else terms.density_bound
        expected = at_data(rows.x_0, mean.float(), log_variance.float()).mean()
        torch.testing.assert_close(bound, expected, rtol=2e-3, atol=0)
        both = [float(f(rows.x_0, mean.float(), log_variance.float()).mean()) for f in
                (terms.discretised_bound, terms.density_bound)]  # fmt: skip
        assert abs(both[0] - both[1]) > 0.1  # so that the choice shows


def test_neighbours_are_the_posterior_mean_over_the_bank():
    bank, x_t = generator(7, 2, 3, seed=1), generator(5, 2, 3, seed=2)
    t = torch.tensor([0.01, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
    alpha, sigma = LINEAR.alpha(t), LINEAR.sigma(t)
    means, found = terms.neighbours(x_t, alpha, sigma, bank)
    for i in range(5):
        chance = torch.stack([(-(x_t[i] - alpha[i] * row).square().sum() / 2 / sigma[i] ** 2) for row in bank])
        chance = (chance - chance.max()).exp()
        x_0 = sum(p * row for p, row in zip(chance / chance.sum(), bank, strict=True))
        torch.testing.assert_close(means[i], x_0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[i], (x_t[i] - alpha[i] * x_0) / sigma[i], rtol=1e-9, atol=1e-9)


def test_near_data_a_neighbour_is_oneself():
    bank, eps, small = generator(7, 3, seed=1), generator(7, 3, seed=2), torch.full((7,), 1e-3, dtype=torch.float64)
    alpha = (1 - small**2).sqrt()
    _, found = terms.neighbours(alpha[:, None] * bank + small[:, None] * eps, alpha, small, bank)
    torch.testing.assert_close(found, eps, rtol=0, atol=1e-9)


@pytest.mark.parametrize("index", [20, 60, 150])
@pytest.mark.parametrize("mixture", [line(), lattice()], ids=["line", "lattice"])
def test_at_the_exact_score_second_order_matching_rests(mixture, index):
    n, t = 20_000, WIDE.time(torch.tensor(index, dtype=torch.float64))
    eps, probe = generator(n, mixture.means.shape[1], seed=1), generator(n, mixture.means.shape[1], seed=2)
    probe = probe / probe.norm(dim=1, keepdim=True)
    x_t = noised(WIDE, mixture.sample(n, seeded()), eps, t)
    along = WIDE.sigma(t) ** 2 * torch.einsum("nab,nb->na", mixture.score_jacobian(x_t, t, WIDE), probe)
    residual = eps - mixture.eps(x_t, t, WIDE)

    def pull(scale: float) -> float:
        """Mean slope of the loss as v.Jn v rises, in standard errors."""
        more = torch.zeros(n, 1, dtype=torch.float64, requires_grad=True)
        terms.jacobian_match(scale * along + more * probe, probe, residual).sum().backward()
        return float(more.grad.mean() / more.grad.std() * math.sqrt(n))

    assert abs(pull(1.0)) < 4
    assert abs(pull(0.5)) > 4


def test_the_optimal_variance_implies_its_own_curvature():
    mixture, x_t = lattice(), generator(50, 2)
    for index in (1, 30, 300):
        t = WIDE.time(torch.tensor(index, dtype=torch.float64)).expand(50)
        t_next = t - 1 / 1000
        covariance = posterior_covariance(mixture, WIDE)(x_t, t[0])
        exact = Prediction("eps", mixture.eps(x_t, t, WIDE), x_t, t, WIDE)
        log_variance = 2 * ancestral_step(exact, t_next, "optimal", covariance=covariance).deviation.log()
        bounds = variance_bounds(WIDE, t, t_next)
        c = bounds.high * WIDE.alpha(t_next) / WIDE.sigma(t) ** 2
        h = terms.implied_curvature(log_variance, bounds.low, c, WIDE.alpha(t), WIDE.sigma(t))
        J = mixture.score_jacobian(x_t, t, WIDE).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(h, WIDE.sigma(t)[:, None] ** 2 * J, rtol=1e-6, atol=1e-6)


def exact(mixture, dtype: torch.dtype = torch.float64) -> tuple[Exact, Tensor]:
    model = Exact(mixture, WIDE, torch.zeros(2), width=8)
    model.network.to(dtype)
    return model, mixture.sample(200, seeded()).to(dtype)


def test_the_loops_jacobian_terms_are_those_of_the_score():
    mixture = lattice()
    model, data = exact(mixture)
    settings = {"batch": 16, "probes": 0.5, "strength": 3.0}
    rows = Step(model, data, replace(SHORT, **settings)).draw(seeded(1))
    x_t, t = rows.x_t[:8], rows.t[:8]
    J, sigma2 = mixture.score_jacobian(x_t, t, WIDE), WIDE.sigma(t)[:, None] ** 2
    probe = generator(8, 2, seed=5)

    def term(**method) -> Tensor:
        return Step(model, data, replace(SHORT, **settings, **method))(rows, seeded(5), Log()).term / 3

    raw = torch.einsum("nab,nb->na", J, probe)
    torch.testing.assert_close(term(method="jacobian-floor"), terms.jacobian_floor(sigma2 * raw).mean())
    torch.testing.assert_close(term(method="jacobian-floor", kind="raw"), terms.jacobian_floor(raw).mean())
    unit = probe / probe.norm(dim=1, keepdim=True)
    along = sigma2 * torch.einsum("nab,nb->na", J, unit)
    expected = terms.jacobian_match(along, unit, rows.eps[:8] - mixture.eps(x_t, t, WIDE)).mean()
    torch.testing.assert_close(term(method="jacobian-match"), expected)


class Headed(Exact):
    """Says the optimal variance, times e^`off`."""

    learns_variance, off = True, 0.0

    def predict(self, x_t, t, condition, guidance=None):
        prediction = super().predict(x_t, t, condition)
        t = t.clamp(min=2 / 1000).double()
        bounds = variance_bounds(WIDE, t, t - 1 / 1000)
        c = bounds.high * WIDE.alpha(t - 1 / 1000) / WIDE.sigma(t) ** 2
        J = self.mixture.score_jacobian(x_t, t, WIDE).diagonal(dim1=1, dim2=2)
        covariance = (WIDE.sigma(t) / WIDE.alpha(t))[:, None] ** 2 * (1 + WIDE.sigma(t)[:, None] ** 2 * J)
        s2 = bounds.low[:, None] + c[:, None] ** 2 * covariance
        low, high = bounds.low.log()[:, None], bounds.high.log()[:, None]
        return replace(prediction, fraction=(s2.log() + self.off - low) / (high - low))


def test_the_covariance_term_vanishes_at_the_optimal_variance():
    mixture = line()
    model = Headed(mixture, WIDE, torch.zeros(2), width=8)
    model.network.double()
    config = replace(SHORT, method="covariance", strength=1.0, batch=64, probes=1.0, times=(0.1, 0.9))
    step = Step(model, mixture.sample(200, seeded()), config)
    rows = step.draw(seeded(1))
    assert float(step(rows, seeded(), Log()).term.detach()) < 1e-9
    model.off = 0.01
    assert float(step(rows, seeded(), Log()).term.detach()) > 1e-3


def test_the_error_may_be_weighed_by_the_signal():
    model, data = exact(lattice())
    step = Step(model, data, replace(SHORT, batch=64, min_snr=5.0))
    rows = step.draw(seeded(1))
    errors = (rows.eps - lattice().eps(rows.x_t, rows.t, WIDE)).square().mean(1)
    snr = WIDE.alpha(rows.t) ** 2 / WIDE.sigma(rows.t) ** 2
    assert 0 < int((snr > 5).sum()) < 64
    found = step(rows, seeded(), Log()).base.detach()
    torch.testing.assert_close(found, (errors * (5 / snr).clamp(max=1)).mean())
    whole = Step(model, data, replace(SHORT, batch=64))(rows, seeded(), Log()).base.detach()
    torch.testing.assert_close(whole, errors.mean())


# configs


def test_every_preset_passes_at_both_sizes():
    for name in PRESETS:
        for scale in ("laptop", "paper"):
            SharpenConfig.preset_of(name, scale, {}).check()
    assert SharpenConfig.preset_of("vsm", "paper", {}).steps == 30_000
    assert SharpenConfig.preset_of(None, None, {"method": "covariance"}).train == "head"  # the method's own recipe
    with pytest.raises(InputError, match="did you mean 'vsm'"):
        SharpenConfig.preset_of("vms", None, {})


@pytest.mark.parametrize(
    "settings, value, fix",
    [
        ({"method": "varience-penalty"}, "varience-penalty", "did you mean 'variance-penalty'"),
        ({"strength": -0.1}, "strength=-0.1", "at least 0"),
        ({"strength": math.nan}, "strength=nan", "a finite number"),
        ({"strength": math.inf}, "strength=inf", "a finite number"),
        ({"bank": 1}, "bank=1", "at least 2"),
        ({"threads": 0}, "threads=0", "at least 1"),
        ({"min_snr": 0.0}, "min_snr=0.0", "above 0"),
        ({"probes": 0.0}, "probes=0.0", "above 0"),
        ({"off_path": 1.5}, "off_path=1.5", "at most 1"),
        ({"samples": 3}, "samples=3", "use at least 4, or 0"),
        ({"data": "column"}, "'column'", "did you mean 'columns'"),
        ({"data": "columns", "judge": "a:b"}, "'columns' has a judge of its own", "leave out 'a:b'"),
        ({"method": "jacobian-floor", "checkpointing": True}, "'jacobian-floor'", "leave out --checkpointing"),
        ({"times": (0.8, 0.2)}, "times=0.8 0.2", "such as 0.2 0.8"),
        ({"times": (0.0, 1.5)}, "times=0 1.5", "such as 0.2 0.8"),
        ({"train": "head", "method": "jacobian-floor"}, "'jacobian-floor'", "use one of variance-learning"),
        ({"train": "head", "method": "covariance", "weight_decay": 0.1}, "weight_decay=0.1", "weight_decay=0"),
        ({"train": "head", "method": "covariance", "l2": 0.1}, "l2=0.1", "l2=0"),
        ({"method": "jacobian-floor", "kind": "raw", "strength": 0.1}, "strength=0.1", "--kind normalised"),
        ({"guide_size": 1.0}, "guide_size=1.0", "above 1"),
        ({"guidance": 0.5}, "guidance=0.5", "at least 1"),
    ],
    ids=lambda given: str(given) if isinstance(given, dict) else "",
)
def test_settings_that_cannot_be_are_refused_with_the_mend(settings, value, fix):
    with pytest.raises(InputError) as refused:
        SharpenConfig(**settings).check()
    assert value in str(refused.value) and fix in str(refused.value)


def test_a_raw_floor_is_allowed_where_it_is_weak():
    SharpenConfig(method="jacobian-floor", kind="raw", strength=0.09).check()


def test_models_and_data_that_do_not_fit_are_refused_with_the_mend():
    spoilt = images()
    spoilt[3, 0, 0, 0] = math.nan
    flow = Exact(lattice(), RectifiedFlow(), flow_grid(4))
    unread = DiT(dit_pipeline(classes=3, layers=1, learned_variance=True), "tiny")  # DDIM's schedulers name no variance
    vsm = replace(SHORT, method="variance-penalty")
    for model, data, config, sentence in (
        (flow, torch.zeros(4, 2), vsm, "rectified flow, whose steps have no variance to learn; use guide"),
        (flow, torch.zeros(4, 2), replace(SHORT, min_snr=5.0), "min_snr=5 weighs errors of eps.*leave it out"),
        (unet(), images(), vsm, "'variance-penalty' needs a variance head.*--add-head"),
        (unread, torch.zeros(4, 4, 8, 8), vsm, "variance_type is 'fixed_small'.*'learned_range'"),
        (unet(), torch.zeros(4, 3, 4, 4), SHORT, r"\(3, 4, 4\).*takes \(3, 8, 8\)"),
        (unet(), spoilt, SHORT, "NaN.*look at the images"),
    ):
        for call in (check_model, sharpen):
            with pytest.raises(InputError, match=sentence):
                call(model, data, config)
        assert not model.trainable()


# the loop


@pytest.mark.parametrize("method", LEARNABLE)
@pytest.mark.parametrize("which", ["points", "unet"])
def test_every_method_trains_and_its_seed_decides_the_weights(which, method, tmp_path):
    config = replace(SHORT, method=method, strength=0.01, off_path=0.5)
    model, data = world(which, method)
    before = weights(model)
    run = Run(tmp_path / "run", "sharpen", config)
    job, done = sharpen(model, data, config, run)
    assert done.steps == 3 and done.stopped == "steps" and done.nfe >= 3 * 8
    rows = run.history()
    assert len(rows) == 3 and all(math.isfinite(number) for row in rows for number in row.values())
    after = weights(model)
    assert all(w.isfinite().all() for w in after.values())
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(moved) > 0.9 * len(after)
    share = job.facts()["gradient share"]
    assert (share is not None and share > 0) == (method not in ("plain", "neighbours", "variance-learning"))
    if which == "points":
        for seed in (0, 1):
            again, data = world(which, method)
            sharpen(again, data, replace(config, seed=seed))
            assert same(weights(again), after) == (seed == 0)


@pytest.mark.parametrize("which, method", [("points", "variance-penalty"), ("unet", "neighbours")])
def test_an_interrupted_run_resumes_to_the_last_bit(which, method, tmp_path, monkeypatch):
    config = replace(SHORT, method=method, steps=6, off_path=0.5)
    whole, data = world(which, method)
    sharpen(whole, data, config, Run(tmp_path / "whole", "sharpen", config))
    says, calls = Step.__call__, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 5:  # the preflight's, and three steps before
            raise KeyboardInterrupt
        return says(self, *arguments)

    monkeypatch.setattr(Step, "__call__", interrupted)
    cut, data = world(which, method)
    with pytest.raises(KeyboardInterrupt):
        sharpen(cut, data, config, Run(tmp_path / "cut", "sharpen", config))
    monkeypatch.setattr(Step, "__call__", says)
    run = Run(tmp_path / "cut", "sharpen", config)
    assert len(run.history()) == 3
    resumed, data = world(which, method)
    assert sharpen(resumed, data, config, run)[1].steps == 6
    assert [row["step"] for row in run.history()] == list(range(6))
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("method", NEEDS_HEAD)
@pytest.mark.parametrize("which", ["points", "unet", "dit"])
def test_training_the_head_leaves_the_mean_as_it_is(which, method):
    if which == "dit":
        model, data = with_variance_head(dit()), generator(16, 4, 8, 8, dtype=torch.float32)
    else:
        model, data = world(which, method)
    before = outputs(model)
    sharpen(model, data, replace(SHORT, method=method, train="head"))
    after = outputs(model)
    assert torch.equal(after.value, before.value)
    assert not torch.equal(after.fraction, before.fraction)


def test_perturbed_inputs_keep_their_targets():
    data = lattice().sample(50, seeded()).float()
    plain, shaken = (
        Step(points(None), data, replace(SHORT, batch=4000, perturbation=gamma)).draw(seeded(1)) for gamma in (0.0, 0.5)
    )
    assert torch.equal(plain.eps, shaken.eps) and torch.equal(plain.x_0, shaken.x_0) and torch.equal(plain.t, shaken.t)
    torch.testing.assert_close(plain.x_t, noised(LINEAR, plain.x_0, plain.eps, plain.t.float()))
    xi = (shaken.x_t - plain.x_t) / LINEAR.sigma(plain.t).float()[:, None] / 0.5
    late = plain.t > 0.1
    assert float(xi[late].std()) == pytest.approx(1, rel=0.03)
    assert abs(float((xi * plain.eps)[late].mean())) < 0.05  # independent of the target


def test_times_are_drawn_inside_the_window():
    data = lattice().sample(50, seeded()).float()
    sigma = LINEAR.sigma(Step(points(None), data, replace(SHORT, batch=4000, times=(0.2, 0.8))).draw(seeded()).t)
    assert 0.2 <= float(sigma.min()) < 0.21 and 0.79 < float(sigma.max()) <= 0.8
    whole = Step(points(None), data, replace(SHORT, batch=20_000)).draw(seeded()).t
    assert float(whole.min()) < 0.003 and float(whole.max()) > 0.998
    model = points(None)
    with pytest.raises(InputError, match=r"times=0 0\.001 hold none"):
        sharpen(model, data, replace(SHORT, times=(0.0, 0.001)))
    assert not model.trainable()
    sharpen(model, data, SHORT)  # what was refused left the model ready


def test_neighbours_meet_data_on_and_off_its_paths():
    data = lattice().sample(10, seeded()).double()
    config = replace(SHORT, method="neighbours", batch=40, bank=4000, off_path=0.25)
    step = Step(points(None), data, config)
    rows, plain = step.draw(seeded(1)), Step(points(None), data, replace(config, method="plain")).draw(seeded(1))
    assert torch.equal(rows.x_t[10:], plain.x_t[10:])
    assert (rows.x_t[:10] != plain.x_t[:10]).any(1).sum() > 5
    alpha, sigma = LINEAR.alpha(rows.t), LINEAR.sigma(rows.t)
    for i in range(10):  # between two data: on the straight line from its own x_0 to another row's
        way, ways = (rows.x_t[i] - plain.x_t[i]) / alpha[i], plain.x_0 - plain.x_0[i]
        mix = (ways @ way) / ways.square().sum(1).clamp(min=1e-9)
        near = (way - mix[:, None] * ways).norm(dim=1) < 1e-6
        assert (near & (mix >= 0) & (mix <= 1)).any()
    _, whole = terms.neighbours(rows.x_t, alpha, sigma, data)  # a bank of 4000 out of 10 holds each about equally often
    assert float((rows.eps - whole).square().mean()) < 0.01 * float((plain.eps - whole).square().mean())


def test_the_share_of_the_gradient_is_judged():
    config = replace(SHORT, method="variance-penalty", strength=0.3)
    (high,), (low,) = warnings_of(2.0, config), warnings_of(1e-6, config)
    assert "strength=0.3" in high and "2 times" in high and "lower it" in high
    assert "1e-06 times" in low and "next to nothing" in low
    assert warnings_of(0.1, config) == warnings_of(None, config) == ()
    assert warnings_of(2.0, replace(config, train="head")) == ()
    model, data = world("points", "variance-penalty")
    assert any(
        "next to nothing" in output for output in sharpen(model, data, config)[0].facts()["warnings"]
    )  # VSM as published


def test_a_strong_term_warns():
    model, data = world("points", "jacobian-match")
    facts = sharpen(model, data, replace(SHORT, method="jacobian-match", strength=1e4))[0].facts()
    assert facts["gradient share"] > 1 and "dominates" in facts["warnings"][0]


def test_a_variance_that_is_no_number_stops_the_run():
    model = unet(learned_variance=True)
    with torch.no_grad():
        model.network.conv_out.bias[3:] = math.inf
    with pytest.raises(RunError, match=r"the network's output holds inf in .* rows, at t=.*before training; no update"):
        sharpen(model, images(), replace(SHORT, method="variance-learning"))
    assert not model.trainable()


# variance heads


def make(which: str) -> UNet | DiT:
    if which == "ddim":
        pipeline = unet_pipeline(size=8, widths=(8, 8))
        return UNet(DDIMPipeline(pipeline.unet, DDIMScheduler(clip_sample=False)), "tiny")
    if which == "folded":
        return UNet(unet_pipeline(size=8, channels=4, widths=(8, 8)), "tiny", fold=2)
    return unet() if which == "unet" else dit()


@pytest.mark.parametrize("which", ["unet", "ddim", "folded", "dit"])
def test_a_head_leaves_the_prediction_as_it_was_and_ships(which, tmp_path, capfd):
    model = make(which)
    capfd.readouterr()
    headed = with_variance_head(model)
    assert capfd.readouterr().err == ""
    assert headed.learns_variance and not model.learns_variance
    before, after = outputs(model), outputs(headed)
    assert torch.equal(after.value, before.value) and (after.fraction == 0.5).all()
    with pytest.raises(InputError, match="has a variance head already"):
        with_variance_head(headed)
    with torch.no_grad():
        for name, parameter in headed.network.named_parameters():
            if name.startswith(("conv_out", "proj_out_2")):
                parameter += 0.05 * generator(*parameter.shape, dtype=torch.float32)
    headed.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    there = outputs(loaded)
    assert torch.equal(there.value, outputs(headed).value) and torch.equal(there.fraction, outputs(headed).fraction)
    assert (there.fraction != 0.5).all() and there.log_variance.isfinite().all()
    assert getattr(loaded, "fold", 1) == getattr(model, "fold", 1)
    if which == "dit":
        plain = DiTPipeline.from_pretrained(tmp_path / "model")
        plain.set_progress_bar_config(disable=True)
        made = plain([0], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    else:
        plain = DDPMPipeline.from_pretrained(tmp_path / "model")
        plain.set_progress_bar_config(disable=True)
        assert isinstance(plain.scheduler, DDPMScheduler) and plain.scheduler.variance_type == "learned_range"
        made = plain(num_inference_steps=2, output_type="np").images
    assert torch.as_tensor(made).isfinite().all()


def test_a_head_keeps_the_models_resolution_and_its_schedule():
    model = UNet(unet_pipeline(size=8, widths=(8, 8), beta_schedule="squaredcos_cap_v2", clip=True), "tiny", 16)
    headed = with_variance_head(model)
    assert headed.size == (16, 16) and headed.clip == 1.0
    assert torch.equal(headed.path.alphas_cumprod, model.path.alphas_cumprod)


def test_a_head_is_refused_where_the_family_knows_none():
    with pytest.raises(InputError, match=r"family perceptron.*use a DDPM UNet or DiT"):
        with_variance_head(points(None))


# folded images


def test_folded_images_unfold_and_the_fold_is_kept(tmp_path):
    model = make("folded")
    shown = torch.randint(257, (3, 1, 16, 16), generator=seeded()) / 256
    states = model.encode_images(shown)
    assert states.shape == (3, 4, 8, 8) and torch.equal(model.decode(states), shown)
    assert torch.equal(states[0, :, 0, 0], shown[0, 0, :2, :2].flatten() * 2 - 1)  # a square of pixels is a place
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert isinstance(loaded, UNet) and loaded.fold == 2 and torch.equal(loaded.decode(states), shown)
    assert torch.equal(outputs(loaded).value, outputs(model).value)
    wide = UNet(unet_pipeline(size=8, channels=4, widths=(16, 16)), "tiny", fold=2)
    assert shrink(wide, 2.0).fold == 2
    unet().save(tmp_path / "plain")
    assert not (tmp_path / "plain" / STATES_FILE).exists()


def test_bad_folds_are_refused(tmp_path: pathlib.Path):
    make("folded").save(tmp_path)
    for text in ("[]", '{"fold": 0}', '{"fold": "2"}', '{"fold": true}', '{"fold": 2.0}', "{}", "fold: 2"):
        (tmp_path / STATES_FILE).write_text(text)
        with pytest.raises(InputError, match=r"states\.json.*a whole number from 1"):
            load(tmp_path)


# ancestral steps against diffusers


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", ["small", "learned"])
def test_an_ancestral_step_is_the_ddpm_schedulers(variance, clip, steps):
    scheduler = DDPMScheduler(
        variance_type="fixed_small" if variance == "small" else "learned_range", clip_sample=clip is not None
    )
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)  # its own 1 - a / b is good to 1e-3 at best
    path = VariancePreserving(scheduler.alphas_cumprod)
    scheduler.set_timesteps(steps)
    grid = torch.cat((path.time(scheduler.timesteps.double()), torch.zeros(1, dtype=torch.float64)))
    torch.testing.assert_close(ddim_grid(path, steps).double(), grid, rtol=1e-6, atol=1e-7)
    for place in (0, steps // 3, steps // 2, steps - 3, steps - 2, steps - 1):
        index, x, eps = int(scheduler.timesteps[place]), generator(4, 3, 2, 2, seed=1), generator(4, 3, 2, 2, seed=2)
        v = generator(4, 3, 2, 2, seed=3) if variance == "learned" else None
        if v is not None and steps < 1000:
            v = v.clamp(-1, 1)  # beyond, longer steps are ours alone
        output = eps if v is None else torch.cat((eps, v), 1)
        prediction = Prediction("eps", eps, x, grid[place], path, fraction=None if v is None else (v + 1) / 2)
        step = ancestral_step(prediction, grid[place + 1], variance, clip)
        theirs = [scheduler.step(output, index, x, generator=seeded(seed)).prev_sample for seed in (5, 6)]
        noise = [generator(4, 3, 2, 2, seed=seed) for seed in (5, 6)]
        if index == 0:  # no noise in the last step
            noise = [torch.zeros_like(x)] * 2
            assert (step.deviation == 0).all()
        for sample, z in zip(theirs, noise, strict=True):
            torch.testing.assert_close(step.mean + step.deviation * z, sample, rtol=1e-7, atol=1e-8)
        if clip:
            assert (prediction.x_0.abs() > 1).any()


def test_a_fraction_beyond_the_range_is_held_inside_in_longer_steps_alone():
    path = VariancePreserving((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
    x, eps = generator(4, 3, 2, 2, seed=1), generator(4, 3, 2, 2, seed=2)
    t = torch.tensor(0.04, dtype=torch.float64)
    outside, edge = (Prediction("eps", eps, x, t, path, fraction=torch.full_like(x, f)) for f in (4.0, 1.0))
    longer, single = t - 0.02, t - 0.001
    torch.testing.assert_close(
        ancestral_step(outside, longer, "learned").deviation, ancestral_step(edge, longer, "learned").deviation
    )
    assert (ancestral_step(outside, torch.zeros_like(t), "learned").deviation == 0).all()
    assert (
        ancestral_step(outside, single, "learned").deviation > ancestral_step(edge, single, "learned").deviation
    ).all()


@pytest.mark.parametrize("learned", [False, True])
def test_drawing_is_the_ddpm_pipelines(learned):
    model = unet(clip=True)
    if learned:
        model = with_variance_head(unet(clip=True))  # longer steps hold what lies beyond the range inside
    ours = model.decode(sampling.draw(model, 2, 10, seed=4, variance="learned" if learned else "small"))
    model.pipeline.set_progress_bar_config(disable=True)
    theirs = model.pipeline(batch_size=2, generator=seeded(4), num_inference_steps=10, output_type="np").images
    torch.testing.assert_close(ours, torch.as_tensor(theirs).permute(0, 3, 1, 2), rtol=0, atol=2e-3)


# sampling


def formula(eps):
    return lambda x, t: Prediction("eps", eps(x), x, t, LINEAR)


@pytest.mark.parametrize("t", [torch.tensor(0.4), torch.tensor([0.1, 0.4, 0.9])], ids=["one time", "a time a row"])
def test_the_laplacian_is_taken_off(t):
    x, t = generator(3, 4), t.double()
    sigma2 = LINEAR.sigma(t).reshape(-1, 1) ** 2
    square, norm = formula(lambda x: x**2), formula(lambda x: x.square().sum(1, keepdim=True).expand(x.shape))
    linear = formula(lambda x: 3 * x + 1)
    torch.testing.assert_close(laplacian(square, 0.0, seeded())(x, t).eps, x**2)
    torch.testing.assert_close(laplacian(linear, 0.7, seeded())(x, t).eps, 3 * x + 1)
    for probes, reach in ((1, 0.5), (3, 0.1)):
        for field, of_each in ((square, 2), (norm, 2 * 4)):  # the sum of second derivatives over 4 coordinates
            found = laplacian(field, 0.7, seeded(), probes, reach)(x, t)
            torch.testing.assert_close(found.eps, field(x, t).eps - 0.7 * sigma2 * of_each, rtol=1e-6, atol=1e-9)
            assert found.kind == "eps" and found.x_t is x


def test_steering_goes_beyond_the_better_field_inside_its_window():
    x, t = generator(3, 4), torch.tensor([0.3] * 3, dtype=torch.float64)
    better, worse = formula(lambda x: 2 * x), formula(lambda x: 3 * x)
    sigma = float(LINEAR.sigma(t[0]))

    def asked(x: Tensor, t: Tensor) -> Prediction:
        raise AssertionError("the worse field costs nothing where it is not wanted")

    assert torch.equal(sampling.steered(better, asked, 1.0)(x, t).eps, 2 * x)
    torch.testing.assert_close(sampling.steered(better, worse, 2.5)(x, t).eps, 0.5 * x)
    for low, high in ((sigma - 0.1, sigma + 0.1), (sigma - 1e-9, 1.0)):
        torch.testing.assert_close(sampling.steered(better, worse, 2.0, (low, high))(x, t).eps, x)
    for low, high in ((0.0, sigma - 0.01), (sigma + 0.01, 1.0)):
        assert torch.equal(sampling.steered(better, asked, 2.0, (low, high))(x, t).eps, 2 * x)


def test_steering_away_from_a_smoother_score_empties_the_gaps():
    axis, grid = [torch.linspace(-4, 5, 361, dtype=torch.float64)], last_steps(WIDE, 120)
    start = line().marginal(grid[0], WIDE).log_prob(axis[0][:, None]).exp()
    field, worse = (smoothed_score_field(line(), WIDE, h) for h in (0.04, 0.08))
    own, away = (
        gap_mass(push_forward(f, grid, axis, start=start), line()) for f in (field, sampling.steered(field, worse, 1.5))
    )
    assert own.between > 1e-6 and away.between < own.between / 2
    assert float(away.masses.min()) > 0.3  # no mode is lost


def test_equal_seeds_draw_equal_images_and_cost_no_training():
    model = unet()
    with model.count_nfe() as nfe:
        first, again, other = (sampling.draw(model, 5, 4, seed, batch=2) for seed in (1, 1, 2))
    assert first.shape == (5, 3, 8, 8) and torch.equal(first, again) and not torch.equal(first, other)
    assert len({float(state.sum()) for state in first}) == 5 and nfe.total == 0
    stuck = sampling.draw(model, 5, 4, 1, formula(lambda x: 0 * x))
    assert not torch.equal(stuck, first)
