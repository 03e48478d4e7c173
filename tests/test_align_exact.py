"""Reward score matching against closed forms: schedules, strengths, guidance, losses (RSM notes, sections 1 to 8.3).

Oracles: O1 a Gaussian under a linear reward, O2 under a quadratic one, O3 the triangle of section 5, O4 an anisotropic
Gaussian, O5 a one-dimensional double well by quadrature. T1 to T14 are the numbers of the notes' table.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.methods.align import guidance as G
from fieldsmith.methods.align.losses import balance_loss, rsm_loss
from fieldsmith.methods.policy import losses as L
from fieldsmith.methods.policy.advantages import advantages
from fieldsmith.methods.policy.rollouts import Plan, Rollout, roll, soft_returns
from fieldsmith.methods.policy.schedule import (
    STRENGTHS,
    UNIFORM,
    Schedule,
    effective_strength,
    multiplier,
    schedule,
    strength,
)
from fieldsmith.paths import Prediction, RectifiedFlow, VariancePreserving, noised
from fieldsmith.samplers import ddim_grid, flow_grid, gaussian_step, rollout
from fieldsmith.worlds.mixtures import Mixture, isotropic, triangle
from tests.drawn import f64, normal, seeded

FLOW = RectifiedFlow()
SD15 = VariancePreserving((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
TOY = VariancePreserving((1 - torch.linspace(1e-4, 0.03, 500, dtype=torch.float64)).cumprod(0))
PATHS = pytest.mark.parametrize("path", [FLOW, SD15], ids=["flow", "vp"])
TIMES = pytest.mark.parametrize("t", [0.05, 0.3, 0.8])
POLICIES = ("ratio", "tempflow", "pcpo", "guard")


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def gradient(loss, f: Tensor) -> Tensor:
    f = f.clone().requires_grad_(True)
    loss(f).sum().backward()
    return f.grad


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


# schedules of the notes


@cache
def sd15(kind="eps", sde="ddim", noise_level: float = 1.0) -> Schedule:
    """50 of 1000 steps, timesteps 981 to 1, the step after the last clamped at index 0, as released."""
    index = torch.cat((torch.arange(981, 0, -20), torch.tensor([0])))
    return schedule(SD15, SD15.time(index.double()), kind, sde, noise_level)


@cache
def sd35(sde="flow-sde", noise_level: float = 0.7) -> Schedule:
    """10 steps of SD3.5: the scheduler's range is shifted by 3 when it is made and again when the steps are set."""

    def shifted(t: Tensor) -> Tensor:
        return 3 * t / (1 + 2 * t)

    grid = torch.cat((shifted(torch.linspace(1, float(shifted(at(0.001))), 10, dtype=torch.float64)), f64(0.0)))
    return schedule(FLOW, grid, "velocity", sde, noise_level)


def any_schedule(path, steps: int = 12) -> Schedule:
    if path is FLOW:
        return schedule(FLOW, flow_grid(steps, 1.88).double(), "velocity", "flow-sde", 0.7)
    return schedule(path, ddim_grid(path, steps).double(), "eps", "ddim", 1.0)


def printed(value: Tensor | float, digits: str) -> bool:
    """Whether a number is what the notes print, to the last of their digits or 1e-4 of it."""
    mantissa, _, power = digits.partition("e")
    unit = 10.0 ** (-len(mantissa.partition(".")[2]) + int(power or 0))
    return abs(float(value) - float(digits)) <= 0.501 * unit + 1e-4 * abs(float(digits))


SD15_GOLDEN = """
  1 0.0206 0.00086 0.4986 0.01036 0.010357 0.00382 0.847 0.02071
 21 0.0395 0.01811 0.0861 0.06464 0.058179 0.00929 0.291 0.12929
101 0.1428 0.02669 0.7640 0.04080 0.024091 0.03377 124.9 0.08160
401 0.2590 0.07375 0.9098 0.04854 0.005901 0.08339 955.3 0.09708
801 0.3973 0.17338 0.9105 0.08832 0.001305 0.11185 1597 0.17664
981 0.4545 0.23226 0.8892 0.11647 0.000667 0.11545 1572 0.23294
"""
SD35_GOLDEN = """
 1 1.0000 0.0399 3.5057 0.7000 0.0570 0.01994 0.03140 0.06022 0.3500
 2 0.9601 0.0468 3.4351 0.7430 0.0784 0.02912 0.04868 0.07499 0.4625
 5 0.7904 0.0831 1.3592 0.3918 0.2640 0.05172 0.04560 0.07024 0.2439
 8 0.4649 0.1868 0.6524 0.2820 0.8248 0.11630 0.07379 0.11368 0.1756
 9 0.2780 0.2691 0.4344 0.2254 1.4867 0.16753 0.08495 0.13086 0.1403
10 0.0089 0.0089 0.0664 0.0063 1.7706 0.00556 0.00008 0.00012 0.0039
"""


@pytest.mark.parametrize("line", SD15_GOLDEN.strip().splitlines())
def test_t10_golden_strengths_of_sd15(line):
    s, uniform = sd15(), sd15(sde="ddim-uniform", noise_level=4.5)
    t, *row = line.split()
    k = (981 - int(t)) // 20
    squared = strength("squared", s)
    ours = (
        s.sigma, s.Omega, s.omega, effective_strength(strength("ratio", s), s, s.omega),
        effective_strength(strength("discount", s), s, s.omega),
        effective_strength(strength("pcpo", uniform), uniform, uniform.omega),
        1000 / (s.kappa**2 * squared.C1),  # C2: 1000 |f - f_old|^2 in units of C1 |s - s_old|^2
        effective_strength(strength("base-snr", s), s, s.omega),
    )  # fmt: skip
    assert [printed(column[k], digits) for column, digits in zip(ours, row, strict=True)] == [True] * 8


@pytest.mark.parametrize("line", SD35_GOLDEN.strip().splitlines())
def test_t10_golden_strengths_of_sd35(line):
    s = sd35()
    k, *row = line.split()
    ours = (
        s.t, s.dt, s.sigma / s.dt.sqrt(), s.sigma, s.w.abs(),
        *(effective_strength(strength(name, s), s, s.omega) for name in ("ratio", "tempflow", "pcpo", "guard")),
    )  # fmt: skip
    assert [printed(column[int(k) - 1], digits) for column, digits in zip(ours, row, strict=True)] == [True] * 9


def test_t10_the_golden_grid_is_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    torch.testing.assert_close(sd35().times.float(), scheduler.sigmas, atol=1e-6, rtol=0)


def test_t10_scalars_of_sd15_are_the_formulas():
    """Section 1.2, written out in plain floats, at all 50 steps."""
    s = sd15()
    for k, t in enumerate(range(981, 0, -20)):
        a, a_p = float(SD15.alphas_cumprod[t]), float(SD15.alphas_cumprod[max(t - 20, 0)])
        sigma = math.sqrt((1 - a_p) / (1 - a) * (1 - a / a_p))
        c1, c2 = math.sqrt((1 - a) * a_p / a), math.sqrt(1 - a_p - sigma**2)
        truth = (sigma, (c1 - c2) * math.sqrt(1 - a), -1 / math.sqrt(1 - a), -(c1 - c2) / sigma, -math.sqrt(1 / a - 1))
        ours = (s.sigma[k], s.Omega[k], s.kappa[k], s.w[k], s.gain[k])
        assert [float(o) for o in ours] == pytest.approx(truth, rel=1e-9)


def test_t10_scalars_of_sd35_are_the_formulas():
    s = sd35()
    for k, (t, t_next) in enumerate(zip(s.times[:-1].tolist(), s.times[1:].tolist(), strict=True)):
        dt, room = t - t_next, 1 - (t if t < 1 else float(s.times[1]))
        tilde = 0.7 * math.sqrt(t / room)
        push = dt * (1 + tilde**2 * (1 - t) / (2 * t))
        assert push == pytest.approx(dt * (1.245 if t < 1 else 1))
        truth = (tilde * math.sqrt(dt), -push, -room / t, push * t / room, -t)
        ours = (s.sigma[k], s.push[k], s.kappa[k], s.Omega[k], s.gain[k])
        assert [float(o) for o in ours] == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("s", [sd15(), sd35()], ids=["sd15", "sd35"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_influence_of_every_policy_gradient_is_half_m_w_sigma(s, name):
    torch.testing.assert_close(
        effective_strength(strength(name, s), s, s.omega),
        multiplier(name, s) * s.w.abs() * s.sigma / 2,
        rtol=1e-12,
        atol=0,
    )


def test_the_influence_of_vgg_flow_is_its_profile():
    s = sd35()
    torch.testing.assert_close(effective_strength(strength("quadratic", s), s, 1), (1 - s.t) ** 2)
    torch.testing.assert_close(effective_strength(strength("linear", s), s, 1), 1 - s.t)


def test_residual_nabla_db_is_the_released_loss():
    """C1 |s - s_ref - gamma omega g|^2 = |(mu - mu_ref) / sigma^2 - a_p g|^2 / 2 (section 4.1)."""
    s, k = sd15(), torch.tensor([0, 10, 40])
    f, reference, g = normal(3, 5, seed=1), normal(3, 5, seed=2), normal(3, 5, seed=3)
    given = strength("squared", s)
    kappa = L.over(s.kappa[k], f)
    ours = rsm_loss(kappa * f, kappa * reference, kappa * f, L.over(s.omega[k], g) * g, given.C1[k], given.gamma[k])
    residual = L.over(s.push[k] / s.sigma[k] ** 2, f) * (f - reference)
    a_p = SD15.alphas_cumprod[torch.tensor([961, 761, 161])]
    truth = (residual - L.over(a_p, g) * g).square().mean(1) / 2
    torch.testing.assert_close(ours, truth)


def test_uniform_weight_is_of_the_sum_and_not_of_the_log_ratio():
    """Section 4.3: (c1 + c2) / sigma = 4.5 at all 50 steps; the true weight (c1 - c2) / sigma is far from constant."""
    s = sd15(sde="ddim-uniform", noise_level=4.5)
    a, a_p = SD15.alpha(s.t) ** 2, SD15.alpha(s.times[1:]) ** 2
    c1, c2 = ((1 - a) * a_p / a).sqrt(), (1 - a_p - s.sigma**2).sqrt()
    torch.testing.assert_close((c1 + c2) / s.sigma, torch.full_like(c1, 4.5), rtol=1e-9, atol=0)
    torch.testing.assert_close(s.w.abs(), (c1 - c2) / s.sigma, rtol=1e-9, atol=0)
    seven = s.w.abs()[(981 - torch.tensor([1, 21, 41, 101, 201, 401, 981])) // 20]
    assert seven.tolist() == pytest.approx([1.09, 3.37, 1.11, 0.57, 0.44, 0.39, 0.51], abs=6e-3)
    torch.testing.assert_close(multiplier("pcpo", s) * s.w.abs(), torch.full_like(c1, UNIFORM))


@pytest.mark.parametrize("path, sde", [(SD15, "ddim"), (FLOW, "ddim"), (FLOW, "flow-sde"), (FLOW, "cps")])
def test_score_units_do_not_depend_on_what_the_network_says(path, sde):
    grid = (ddim_grid(path, 8) if path is SD15 else flow_grid(9)[1:]).double()  # eps says nothing at a flow's t = 1
    pred = {kind: schedule(path, grid, kind, sde, 0.7) for kind in ("velocity", "eps", "x_0", "v_prediction")}
    for s in pred.values():
        for name in ("sigma", "Omega", "omega"):
            torch.testing.assert_close(getattr(s, name), getattr(pred["eps"], name))


@PATHS
def test_scalars_are_derivatives_of_the_sampler_and_the_prediction(path):
    """Finite differences of an affine map are exact, at any state."""
    s = any_schedule(path)
    sde, level = ("flow-sde", 0.7) if path is FLOW else ("ddim", 1.0)
    x, f, by = normal(1, 3, seed=4), normal(1, 3, seed=5), normal(1, 3, seed=6)
    for k in range(len(s)):
        low, high = (Prediction(s.kind, v, x, s.times[k], path) for v in (f, f + by))
        steps = [gaussian_step(sde, output, s.times[k + 1], level, s.times[1]) for output in (low, high)]
        torch.testing.assert_close(steps[1].mean - steps[0].mean, s.push[k] * by)
        assert float(steps[0].deviation) == pytest.approx(float(s.sigma[k]))
        torch.testing.assert_close(high.x_0 - low.x_0, s.gain[k] * by)
        if s.times[k] < 1:
            torch.testing.assert_close(high.score - low.score, s.kappa[k] * by)


@PATHS
def test_denoising_targets_are_what_the_network_should_have_said(path):
    x_0, eps, step = normal(4, 3, seed=7), normal(4, 3, seed=8), torch.tensor([1, 3, 6, 9])
    for kind in ("velocity", "eps", "x_0", "v_prediction"):
        grid = (ddim_grid(path, 12) if path is SD15 else flow_grid(13)[1:]).double()
        s = schedule(path, grid, kind, "ddim", 1.0)
        t = s.times[step]
        target = s.target(x_0, eps, step)
        torch.testing.assert_close(Prediction(kind, target, noised(path, x_0, eps, t), t, path).x_0, x_0)


def test_a_certain_step_has_no_density_and_no_strength():
    s = any_schedule(SD15)  # DDIM's last step, to clean data
    assert s.noisy.tolist() == [True] * 11 + [False]
    assert s.w[-1] == 0 and multiplier("pcpo", s)[-1] == 0
    for name in ("ratio", "squared", "base-snr", "jacobian", "discount"):
        assert strength(name, s).C1[-1] == 0


def test_first_order_strengths_are_refused_to_policy_gradients():
    for name in set(STRENGTHS) - set(POLICIES):
        with pytest.raises(InputError, match="first-order"):
            multiplier(name, sd35())
    with pytest.raises(InputError, match="align's strengths"):
        strength("ration", sd35())


# oracles: p_ref, reward r = b.x - lam |x - c|^2 / 2 and what follows in closed form

PRIOR, LAM, CENTRE = 0.8**2, 1.7, f64(0.9, -0.6, 0.3)


def gaussian() -> Mixture:
    return isotropic(f64([0.7, -0.4, 0.2]), 0.8)


def quadratic(x: Tensor) -> Tensor:
    return -LAM / 2 * (x - CENTRE).square().sum(1)


def optimum() -> Mixture:
    """p* of O2: |x - c|^2 / 2 is a quadratic about 0 and a linear part, up to a constant."""
    return gaussian().tilted(LAM * CENTRE, LAM * torch.eye(3).double()).mixture


def jacobian(t: Tensor, path, prior: float = PRIOR) -> Tensor:
    """d E[x_0 | x_t] / d x_t of an isotropic Gaussian."""
    return path.alpha(t) * prior / (path.alpha(t) ** 2 * prior + path.sigma(t) ** 2)


def left(t: Tensor, path, prior: float = PRIOR) -> Tensor:
    """v, the variance of x_0 given x_t."""
    return prior * path.sigma(t) ** 2 / (path.alpha(t) ** 2 * prior + path.sigma(t) ** 2)


def psi(x: Tensor, t: Tensor, path, reference: Mixture, tilted: Mixture) -> Tensor:
    return tilted.score(x, t, path) - reference.score(x, t, path)


def oracles() -> dict[str, tuple[Mixture, Tensor, Tensor | None]]:
    anisotropic = Mixture(f64([0.5, -1.0]), f64([[2.0, 0.6], [0.6, 0.5]]), f64(1.0))
    return {
        "O1": (gaussian(), f64(0.6, -0.4, 1.0), None),
        "O2": (gaussian(), LAM * CENTRE, LAM * torch.eye(3).double()),
        "O3": (triangle(), f64(-0.5, 0.0), None),
        "O4": (anisotropic, f64(0.7, 0.3), f64([0.5, 0.1], [0.1, 0.3])),
    }


@PATHS
@TIMES
@pytest.mark.parametrize("name", ["O1", "O2", "O3", "O4"])
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_t1_the_optimal_guidance_three_ways(name, path, t):
    reference, b, A = oracles()[name]
    t, tilted = at(t), reference.tilted(b, A).mixture
    x = 1.5 * normal(5, len(b), seed=9)
    scores = psi(x, t, path, reference, tilted)
    means = path.alpha(t) / path.sigma(t) ** 2 * (tilted.x_0(x, t, path) - reference.x_0(x, t, path))
    values = []
    for y in x:  # V = log E_ref[exp r | x_t], from the law of x_0 given x_t
        y = y.clone().requires_grad_(True)
        values.append(torch.autograd.grad(reference.given(y, t, path).tilted(b, A).log_normaliser, y)[0])
    torch.testing.assert_close(means, scores, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack(values), scores, rtol=1e-6, atol=1e-6)


@PATHS
@TIMES
def test_o2_is_the_closed_form_of_the_notes(path, t):
    """Section 8.3: Psi* = -lam (mu - c) J / (1 + lam v), p* of precision 1 / s_0^2 + lam."""
    t, x = at(t), normal(6, 3, seed=10)
    mu = gaussian().x_0(x, t, path)
    truth = -LAM * (mu - CENTRE) * jacobian(t, path) / (1 + LAM * left(t, path))
    torch.testing.assert_close(psi(x, t, path, gaussian(), optimum()), truth)
    torch.testing.assert_close(optimum().covariance, torch.eye(3).double() / (1 / PRIOR + LAM))


@PATHS
@TIMES
def test_o1_is_a_constant_and_no_estimator_of_it_is_biased(path, t):
    world, b, t, x = gaussian(), f64(0.6, -0.4, 1.0), at(t), normal(6, 3, seed=11)
    tilted = world.tilted(b).mixture
    truth = (jacobian(t, path) * b).expand(6, 3)
    torch.testing.assert_close(psi(x, t, path, world, tilted), truth)
    for law in (world, tilted):
        torch.testing.assert_close(G.tweedie(lambda x: x @ b, law.field(path), x, t, "full"), truth)
    s = any_schedule(path)
    pull = strength("jacobian", s, PRIOR).gamma
    torch.testing.assert_close(pull[s.t < 1], jacobian(s.t[s.t < 1], path))
    # in units of x_0 it is v at every time, t = 1 of a flow too, where J and kappa vanish together
    torch.testing.assert_close(pull * s.gain / s.kappa, left(s.t, path))


# first order


@PATHS
@TIMES
def test_t2_one_step_guidance_overshoots_at_the_reference_and_falls_short_at_the_optimum(path, t):
    t, x = at(t), normal(6, 3, seed=12)
    truth, factor = psi(x, t, path, gaussian(), optimum()), 1 + LAM * left(t, path)
    torch.testing.assert_close(G.tweedie(quadratic, gaussian().field(path), x, t, "full"), truth * factor)
    torch.testing.assert_close(G.tweedie(quadratic, optimum().field(path), x, t, "full"), truth / factor)


@PATHS
@TIMES
def test_the_identity_jacobian_is_one_over_alpha_times_the_gradient_at_the_estimate(path, t):
    t, x = at(t), normal(6, 3, seed=13)

    def place(x: Tensor, t: Tensor) -> Prediction:
        kind = "velocity" if path is FLOW else "eps"
        return Prediction(kind, getattr(gaussian(), kind)(x, t, path), x, t, path)

    ours = G.tweedie(quadratic, place, x, t, "identity")
    by = 1.0 if path is FLOW else float(1 / path.alpha(t))  # on a flow x_0 = x - t v
    torch.testing.assert_close(ours, -LAM * (gaussian().x_0(x, t, path) - CENTRE) * by)


@PATHS
def test_lookahead_is_the_gradient_through_the_odes_own_steps(path):
    grid = any_schedule(path).times
    x = normal(4, 3, seed=14)
    for ahead in (1, 3, len(grid) - 6):  # the last one arrives at clean data
        ours = G.tweedie(quadratic, gaussian().field(path), x, grid[5], "full", grid[6 : 6 + ahead])
        y = x.clone().requires_grad_(True)
        end = rollout(gaussian().field(path), y, grid[5 : 6 + ahead]).last
        clean = gaussian().field(path)(end, grid[5 + ahead]).x_0 if grid[5 + ahead] > 0 else end
        (truth,) = torch.autograd.grad(quadratic(clean).sum(), y)
        torch.testing.assert_close(ours, truth)


def test_guidance_at_clean_data_is_the_rewards_own_gradient():
    x = normal(4, 3, seed=15)
    for kind in ("full", "identity"):
        torch.testing.assert_close(G.tweedie(quadratic, gaussian().field(FLOW), x, at(0.0), kind), -LAM * (x - CENTRE))
    torch.testing.assert_close(G.clean_gradient(quadratic, x), -LAM * (x - CENTRE))


@PATHS
@pytest.mark.parametrize("k", [2, 6, 9])
def test_t3_the_terminal_gradient_times_j_is_exact_at_the_optimum(path, k):
    """From p*(x_0 | x_t) it is Psi*, from p_ref(x_0 | x_t) too much by 1 + lam v (section 8.2)."""
    s = any_schedule(path)
    t, x = s.times[k], normal(1, 3, seed=16)
    truth, pull = psi(x, t, path, gaussian(), optimum())[0], strength("jacobian", s, PRIOR).gamma[k]
    for law, factor in ((optimum(), 1.0), (gaussian(), 1 + LAM * left(t, path))):
        drawn = G.clean_gradient(quadratic, law.given(x[0], t, path).sample(20_000, seeded(17))) * pull
        error = drawn.std(0) / math.sqrt(len(drawn))
        assert bool(((drawn.mean(0) - truth * factor).abs() < 4 * error).all())
        # the gradient of a quadratic is affine, so that its mean is known without draws
        exact = pull * G.clean_gradient(quadratic, law.x_0(x, t, path))[0]
        torch.testing.assert_close(exact, truth * factor)


@PATHS
@TIMES
def test_t3_with_an_anisotropic_prior_each_axis_is_off_by_its_own_factor(path, t):
    """O4: one scalar J cannot be right on two axes; the error is J(prior) / J(axis)."""
    variances, b, t = f64(3.0, 0.2), f64(0.7, -0.3), at(t)
    world = Mixture(f64([0.5, -1.0]), variances.diag()[None], f64(1.0))
    truth = psi(normal(4, 2, seed=18), t, path, world, world.tilted(b).mixture)
    factor = jacobian(t, path, float(variances.mean())) / jacobian(t, path, variances)
    torch.testing.assert_close((jacobian(t, path, float(variances.mean())) * b).expand(4, 2), truth * factor)
    assert float(factor[0]) < 1 < float(factor[1])


def well(t: Tensor, x: Tensor, path=FLOW) -> dict[str, Tensor]:
    """O5: p_ref ~ exp(-2 (x^2 - 1)^2), r = x, on a grid: E_ref and E* of x_0 given x_t, V, and p*(x_t)."""
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    log_p = -2 * (grid**2 - 1) ** 2
    seen = -((x[:, None] - path.alpha(t) * grid) ** 2) / (2 * path.sigma(t) ** 2)
    reference, tilted = (log_p + seen).softmax(1), (log_p + grid + seen).softmax(1)
    variance = (log_p.softmax(0) * grid**2).sum()  # its mean is 0
    value = (log_p + grid + seen).logsumexp(1) - (log_p + seen).logsumexp(1)
    law = (log_p + grid + seen).logsumexp(1).softmax(0)
    return {"ref": reference @ grid, "star": tilted @ grid, "value": value, "prior": variance, "law": law}


@pytest.mark.parametrize("t, error", [(0.9, 0.227), (0.7, 0.319), (0.5, 0.554), (0.3, 0.798), (0.05, 0.048)])
def test_t3_on_a_double_well_it_misses_the_move_between_the_wells(t, error):
    """O5, r = x, so that the terminal estimate is J whatever the draws: its relative RMSE under p*, by time."""
    x, t = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64).requires_grad_(True), at(t)
    found = well(t, x)
    (truth,) = torch.autograd.grad(found["value"].sum(), x)
    means = FLOW.alpha(t) / FLOW.sigma(t) ** 2 * (found["star"] - found["ref"])
    torch.testing.assert_close(truth, means.detach(), atol=1e-6, rtol=1e-6)  # T1 on O5
    estimate = strength("jacobian", schedule(FLOW, f64(1.0, t, 0.0), "velocity", "ddim", 1.0), found["prior"]).gamma[1]
    law = found["law"].detach()
    assert float(((law @ (truth - estimate) ** 2) / (law @ truth**2)).sqrt()) == pytest.approx(error, abs=2e-3)
    if t == 0.3:  # between the wells, where a small move decides, the pull should be more than twice as strong
        assert float(truth[250]) > 2 * float(estimate)


# zeroth order


def estimates(K: int, kind: str, offset: float = 0.0, groups: int = 40_000) -> Tensor:
    """Group means of the estimate for the reward offset + e_1 of noise e; the truth is (1, 0) times omega / sigma."""
    s = sd35()
    noise = normal(groups * K, 2, seed=K)
    group = torch.arange(groups).repeat_interleave(K)
    step = torch.full((groups * K,), 4)
    advantage = advantages(offset + noise[:, 0], group, kind)
    per_row = G.reverse_noise(advantage, noise, step, s) / (s.omega[4] / s.sigma[4])
    return per_row.reshape(groups, K, 2).mean(1)


@pytest.mark.parametrize("K", [2, 4, 16])
def test_t4_a_groups_own_mean_shrinks_the_estimate_and_leave_one_out_does_not(K):
    """It is the sample covariance of the noise with e_1, so that mean and variance are known exactly."""
    truth, variance = f64(1.0, 0.0), f64(2.0, 1.0)
    for kind, mean, spread in (
        ("leave-one-out", truth, variance / (K - 1)),
        ("mean", (1 - 1 / K) * truth, variance / (K - 1) * (1 - 1 / K) ** 2),
        ("raw", truth, variance / K),
    ):
        found = estimates(K, kind)
        error = (spread / len(found)).sqrt()
        assert bool(((found.mean(0) - mean).abs() < 4 * error).all()), kind
        torch.testing.assert_close(found.var(0), spread, rtol=0.08, atol=0)


def test_t4_without_a_baseline_the_rewards_level_is_noise():
    found = estimates(4, "raw", offset=3.0)
    torch.testing.assert_close(found.var(0), f64(2 + 9, 1 + 9) / 4, rtol=0.05, atol=0)
    torch.testing.assert_close(estimates(4, "leave-one-out", offset=3.0), estimates(4, "leave-one-out"))


@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=30),
    st.floats(-100, 100),
    st.sampled_from(["std", "mean", "leave-one-out"]),
)
def test_advantages_are_centred_by_group_and_blind_to_the_rewards_level(groups, level, kind):
    group = torch.tensor(groups)
    returns = normal(len(groups), seed=len(groups))
    found = advantages(returns, group, kind)
    torch.testing.assert_close(advantages(returns + level, group, kind), found, atol=1e-7, rtol=1e-7)
    for one in group.unique():
        torch.testing.assert_close(found[group == one].sum(), at(0.0), atol=1e-9, rtol=0)
        if (group == one).sum() == 1:
            assert float(found[group == one]) == 0


def test_normalised_advantages_divide_by_the_deviation_of_the_group_itself():
    returns, group = f64(1.0, 2.0, 6.0, 5.0, 5.0), torch.tensor([7, 7, 7, 2, 2])
    deviation = math.sqrt((4 + 1 + 9) / 3)
    truth = f64(-2.0, -1.0, 3.0, 0.0, 0.0) / f64(*[deviation + 1e-4] * 3, 1.0, 1.0)
    torch.testing.assert_close(advantages(returns, group, "std"), truth)


def chain(points: Tensor, copies: int, gap: int, field: Mixture, index: int = 389, seed: int = 0) -> Rollout:
    """SDE rollouts of a mixture's exact field on the toy's grid, `copies` from each point."""
    s = toy(gap, index)

    def predict(x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
        return Prediction("eps", field.eps(x, t, TOY), x, t, TOY)

    plan = Plan("sde", torch.ones(len(s), dtype=torch.long), s.noisy)
    prompt = torch.arange(len(points)).repeat_interleave(copies)
    return roll(predict, points.repeat_interleave(copies, 0), prompt, s, plan, "ddim", 1.0, seeded(seed))


def toy(gap: int, index: int = 389) -> Schedule:
    times = torch.cat((TOY.time(torch.arange(index, -1, -gap).double()), f64(0.0)))
    return schedule(TOY, times, "eps", "ddim", 1.0)


def log_ratio_to_reference(found: Rollout, s: Schedule) -> Tensor:
    rows = found.transitions
    reference = torch.cat(
        [triangle().eps(rows.x[at], s.times[rows.step[at]], TOY) for at in torch.arange(len(rows)).split(50_000)]
    )
    return -L.log_ratio(reference, rows.output_old, rows.noise, s.w[rows.step])


def linear(x: Tensor) -> Tensor:
    return 3 - x[:, 0] / 2


def noised_points(n: int, index: int = 389, seed: int = 3) -> Tensor:
    """Noised draws of the tilted triangle."""
    x_0 = triangle().tilted(f64(-0.5, 0.0)).mixture.sample(n, seeded(seed))
    return noised(TOY, x_0, normal(n, 2, seed=seed + 1), TOY.time(torch.tensor(index).double()))


def test_t5_soft_returns_are_the_value_of_the_next_state_at_the_optimum():
    """V(x_{k+1}) up to a constant and the grid's error; with the row's own log-ratio the estimate collapses to 0."""
    tilted, points = triangle().tilted(f64(-0.5, 0.0)).mixture, noised_points(4)
    left_over = {}
    for gap in (10, 2):
        s, found = toy(gap), chain(points, 500, gap, tilted, seed=5)
        log_rho, first = log_ratio_to_reference(found, s), found.transitions.step == 0
        soft = soft_returns(found, linear(found.x_0), log_rho)[first]
        after, here, noise = (
            found.transitions.x_next[first],
            found.transitions.prompt[first],
            found.transitions.noise[first],
        )
        law, law_star = triangle().marginal(s.times[1], TOY), tilted.marginal(s.times[1], TOY)
        value = law_star.log_prob(after) - law.log_prob(after)
        left_over[gap] = float(advantages(soft - value, here, "mean").std())
        truth = psi(points, s.times[0], TOY, triangle(), tilted)

        def estimate(returns: Tensor, here=here, noise=noise, s=s) -> Tensor:
            advantage = advantages(returns, here, "leave-one-out")
            return G.reverse_noise(advantage, noise, torch.zeros_like(here), s).reshape(4, 500, 2).mean(1)

        assert relative(estimate(soft), truth) < 0.25
        assert float(estimate(soft - log_rho[first]).norm() / truth.norm()) < 0.2
    plain = float(advantages(linear(found.x_0), here, "mean").std())
    assert plain > 0.8 and left_over[10] < 0.3 and left_over[2] < 0.1


def gaussian_chain(b: Tensor) -> dict:
    """O1 on 8 coarse steps with its exact optimum: means move by sigma^2 g, g_k = (d mean / d x) g_{k+1} from b."""
    world, s = gaussian(), schedule(TOY, ddim_grid(TOY, 8).double(), "eps", "ddim", 1.0)
    g, offset = [b], [at(0.0)]
    for k in reversed(range(8)):
        x = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        output = Prediction("eps", world.eps(x, s.times[k], TOY), x, s.times[k], TOY)
        mean = gaussian_step("ddim", output, s.times[k + 1], 1.0, s.times[1]).mean
        (slope,) = torch.autograd.grad(mean[0, 0], x)
        offset.insert(0, offset[0] + mean[0].detach() @ g[0] + s.sigma[k] ** 2 * g[0] @ g[0] / 2)
        g.insert(0, slope[0, 0] * g[0])

    def predict(x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
        k = int((s.times == t).nonzero())
        return Prediction("eps", world.eps(x, t, TOY) + s.sigma[k] ** 2 / s.push[k] * g[k + 1], x, t, TOY)

    plan = Plan("sde", torch.ones(8, dtype=torch.long), s.noisy)
    found = roll(predict, normal(20, 3, seed=6), torch.zeros(20).long(), s, plan, "ddim", 1.0, seeded(7))
    rows = found.transitions
    reference = world.eps(rows.x, s.times[rows.step], TOY)
    log_rho = -L.log_ratio(reference, rows.output_old, rows.noise, s.w[rows.step])

    def value(x: Tensor, step: Tensor) -> Tensor:
        return (torch.stack(g)[step] * x).sum(1) + torch.stack(offset)[step]

    return {"found": found, "log_rho": log_rho, "value": value}


def test_t5_on_a_gaussian_the_soft_return_is_the_chains_own_value_exactly():
    """However coarse the grid: V_k(x) = g_k.x + a constant, and each transition is in detailed balance."""
    b = f64(0.6, -0.4, 1.0)
    chain_ = gaussian_chain(b)
    found, log_rho, value = chain_["found"], chain_["log_rho"], chain_["value"]
    rows = found.transitions
    here, ahead = value(rows.x, rows.step), value(rows.x_next, rows.step + 1)
    soft = soft_returns(found, found.x_0 @ b, log_rho)
    torch.testing.assert_close(soft, ahead)
    torch.testing.assert_close(soft - log_rho, here)
    balance = balance_loss(here, ahead, log_rho)
    torch.testing.assert_close(balance, torch.zeros_like(balance), atol=1e-18, rtol=0)


def test_t6_plain_rewards_keep_a_floor_that_soft_returns_do_not():
    """At abar = 0.01 from 39 steps of the exact optimum; the signal is 0.2."""
    tilted, s = triangle().tilted(f64(-0.5, 0.0)).mixture, toy(10)
    points, copies = noised_points(6), 4096
    truth = psi(points, s.times[0], TOY, triangle(), tilted)
    rmse = {"plain": [], "soft": []}
    for i in range(0, 6, 3):
        found = chain(points[i : i + 3], copies, 10, tilted, seed=i)
        first = found.transitions.step == 0
        here, noise = found.transitions.prompt[first], found.transitions.noise[first]
        soft = soft_returns(found, linear(found.x_0), log_ratio_to_reference(found, s))[first]
        for name, returns in (("plain", linear(found.x_0)), ("soft", soft)):
            advantage = advantages(returns, here, "leave-one-out")
            estimate = G.reverse_noise(advantage, noise, torch.zeros_like(here), s).reshape(3, copies, 2).mean(1)
            rmse[name].append((estimate - truth[i : i + 3]).square().mean(1).sqrt())
    plain, soft = (float(torch.cat(rmse[name]).mean()) for name in ("plain", "soft"))
    assert 0.05 < plain < 0.12 and soft < 0.02


# losses

ROWS = 7


def policy_rows(s: Schedule, seed: int = 20) -> dict[str, Tensor]:
    """Transitions drawn by an old policy at random steps: f, f_old, f_ref, noise, x and step."""
    names = ("f", "old", "reference", "noise", "x")
    rows = {name: normal(ROWS, 4, seed=seed + i) for i, name in enumerate(names)}
    steps = s.noisy.nonzero().squeeze(1)
    return {**rows, "step": steps[torch.randint(len(steps), (ROWS,), generator=seeded(seed))]}


def policy(s: Schedule, output: Tensor, x: Tensor, step: Tensor):
    """pi of a row as the sampler has it."""
    sde, level = ("flow-sde", 0.7) if s.path is FLOW else ("ddim", 1.0)
    output_ = Prediction(s.kind, output, x, s.times[step], s.path)
    return gaussian_step(sde, output_, s.times[step + 1], level, s.times[1])


@PATHS
@pytest.mark.parametrize("reward, alpha", [(1.3, 0.7), (-0.8, 0.7), (1.3, 2.0)])
def test_t7_a_policy_gradient_is_reward_score_matching_at_any_weights(path, reward, alpha):
    """-r log pi + alpha KL(pi | pi_ref) against section 1.4's C1, gamma, Psi and C2."""
    s = any_schedule(path)
    rows = policy_rows(s)
    x, step, r = rows["x"], rows["step"], torch.full((ROWS,), reward, dtype=torch.float64)
    old = policy(s, rows["old"], x, step)
    after, reference = old.mean + old.deviation * rows["noise"], policy(s, rows["reference"], x, step)

    def direct(f: Tensor) -> Tensor:
        pi = policy(s, f, x, step)
        normal = [torch.distributions.Normal(p.mean, p.deviation.expand_as(p.mean)) for p in (pi, reference)]
        return -r * pi.log_prob(after) + alpha * torch.distributions.kl_divergence(*normal).sum(1)

    def matching(f: Tensor) -> Tensor:
        kappa = L.over(s.kappa[step], f)
        psi_hat = G.reverse_noise(r, rows["noise"], step, s)
        weight = alpha * (s.Omega**2 / (2 * s.sigma**2))[step]
        torch.testing.assert_close(weight, alpha * strength("ratio", s).C1[step])
        outputs = [kappa * part for part in (f, rows["reference"], rows["old"])]
        return 4 * rsm_loss(*outputs, psi_hat, weight, torch.full_like(r, 1 / alpha), r / alpha)

    def pieces(f: Tensor) -> Tensor:
        w = s.w[step]
        return -r * L.log_ratio(f, rows["old"], rows["noise"], w) + alpha * L.gaussian_kl(f, rows["reference"], w)

    truth = gradient(direct, rows["f"])
    torch.testing.assert_close(gradient(matching, rows["f"]), truth)
    torch.testing.assert_close(gradient(pieces, rows["f"]), truth)


@PATHS
def test_log_ratio_and_kl_are_the_samplers_own(path):
    s = any_schedule(path)
    rows = policy_rows(s, seed=30)
    x, step, w = rows["x"], rows["step"], s.w[rows["step"]]
    new, old = policy(s, rows["f"], x, step), policy(s, rows["old"], x, step)
    after = old.mean + old.deviation * rows["noise"]
    truth = new.log_prob(after) - old.log_prob(after)
    torch.testing.assert_close(L.log_ratio(rows["f"], rows["old"], rows["noise"], w), truth)
    normal = [torch.distributions.Normal(p.mean, p.deviation.expand_as(p.mean)) for p in (new, old)]
    kl = torch.distributions.kl_divergence(*normal).sum(1)
    torch.testing.assert_close(L.gaussian_kl(rows["f"], rows["old"], w), kl)


def test_the_ratio_has_no_quadratic_term_on_average_and_its_logarithm_has():
    """Why C2 = 0 for PPO (section 1.4): E[rho] is 1 at any weights, while E[log rho] = -KL."""
    noise, difference = normal(200_000, 2, seed=40), 0.05 * f64(1.0, -2.0)
    log_rho = L.log_ratio(difference.expand_as(noise), torch.zeros_like(noise), noise, torch.ones(len(noise)))
    kl = float(difference.square().sum() / 2)
    error = float(log_rho.std()) / math.sqrt(len(noise))
    assert float(log_rho.mean()) == pytest.approx(-kl, abs=4 * error)
    assert float(log_rho.exp().mean()) == pytest.approx(1, abs=4 * error)


TRUSTS = ("none", "clip", "hinge", "guard-hinge", "fair-hinge")


@pytest.mark.parametrize("trust", TRUSTS)
def test_t8_on_policy_every_trust_region_has_the_log_likelihoods_gradient(trust):
    s = sd35()
    rows = policy_rows(s, seed=50)
    step, advantage = rows["step"], f64(1.3, -0.8, 0.2, -2.0, 0.0, 5.0, -5.0)
    m = multiplier("tempflow", s)[step]

    def loss(f: Tensor, trust=trust) -> Tensor:
        log_rho = L.log_ratio(f, rows["old"], rows["noise"], s.w[step])
        return L.policy_loss(log_rho, advantage, m, trust, 0.1, s.sigma[step])

    truth = -L.over(m * advantage * s.w[step], rows["noise"]) * rows["noise"]
    torch.testing.assert_close(gradient(loss, rows["old"]), truth)


@given(st.floats(-0.5, 0.5), st.floats(-3, 3), st.floats(0.01, 0.3), st.floats(0.05, 2), st.sampled_from(TRUSTS))
def test_t8_held_rows_are_those_without_a_gradient(log_rho, advantage, clip, deviation, trust):
    if abs(advantage) < 1e-3:
        advantage = 0.0
    rho, A, sigma = f64(log_rho), f64(advantage), f64(deviation)
    held = bool(L.clipped(rho, A, trust, clip, sigma))
    slope = float(gradient(lambda r: L.policy_loss(r, A, torch.ones(1), trust, clip, sigma), rho))
    assert held == (slope == 0) or advantage == 0
    if advantage == 0:
        assert not held and slope == 0
    elif not held:
        assert slope == pytest.approx(-advantage * (math.exp(log_rho) if trust == "clip" else 1))


@pytest.mark.parametrize("A", [1.5, -1.5])
def test_t8_inactive_regions_are_exact(A):
    """Zero once a row has moved by c in A's favour: c in rho, in nats, in sigma nats, in sigma^2 nats."""
    edge, sigma, c = 1e-9, f64(0.3), 0.1
    nats = {"hinge": c, "guard-hinge": c / 0.3, "fair-hinge": c / 0.09, "clip": math.log(1 + math.copysign(c, A))}
    for trust, most in nats.items():
        for beyond in (-edge, edge):
            moved = f64(math.copysign(abs(most) + beyond, A))
            slope = gradient(lambda r, trust=trust: L.policy_loss(r, f64(A), torch.ones(1), trust, c, sigma), moved)
            assert bool(slope == 0) == (beyond > 0), trust
        away = gradient(lambda r, trust=trust: L.policy_loss(r, f64(A), torch.ones(1), trust, c, sigma), f64(-3 * A))
        assert away != 0  # against its favour a row is never held


def test_hinges_are_zero_where_they_hold():
    for trust in ("hinge", "guard-hinge", "fair-hinge"):
        for A in (2.0, -2.0):
            assert float(L.policy_loss(f64(10 * A), f64(A), f64(1.7), trust, 0.1, f64(0.8))) == 0


def test_t13_the_fair_threshold_is_one_displacement_at_every_step():
    """sigma^2 log rho of a shift of the mean and a drawn displacement does not see sigma; log rho does."""
    shift, displacement = 0.3 * normal(500, 4, seed=60), normal(500, 4, seed=61)
    advantage = normal(500, seed=62)
    held = {trust: [] for trust in ("fair-hinge", "hinge")}
    for sigma in (0.05, 0.3, 1.4):
        each = torch.full((500,), sigma, dtype=torch.float64)
        log_rho = L.log_ratio(shift, torch.zeros_like(shift), displacement / sigma, 1 / each)  # f in units of the mean
        for trust, rows in held.items():
            rows.append(L.clipped(log_rho, advantage, trust, 0.1, each))
    fair, plain = held.values()
    assert fair[0].any() and torch.equal(fair[0], fair[1]) and torch.equal(fair[0], fair[2])
    assert plain[0].sum() > plain[1].sum() > plain[2].sum()


def test_thresholds_are_in_nats_and_doubling_the_resolution_doubles_the_log_ratio():
    """Defect 8 of section 7: a mean over dimensions would hide it."""
    f, old, noise = (normal(5, 4, 6, 6, seed=70 + i) for i in range(3))
    w = f64(0.3, 0.1, 0.7, 0.2, 1.0)
    small = L.log_ratio(f, old, noise, w)
    big = L.log_ratio(*(part.repeat(1, 1, 1, 2) for part in (f, old, noise)), w)
    torch.testing.assert_close(big, 2 * small)
    torch.testing.assert_close(
        L.gaussian_kl(f.repeat(1, 1, 2, 1), old.repeat(1, 1, 2, 1), w), 2 * L.gaussian_kl(f, old, w)
    )
    score, psi_hat = (part.repeat(1, 1, 1, 2) for part in (f, noise))  # the loss is over the numbers in a row
    wide = rsm_loss(score, score * 0, score, psi_hat, w, w)
    torch.testing.assert_close(wide, rsm_loss(f, f * 0, f, noise, w, w))


def test_rows_do_not_see_each_other():
    s = sd35()
    rows = policy_rows(s, seed=80)
    order = torch.tensor([3, 0, 6, 1, 5])
    A = f64(1.3, -0.8, 0.2, -2.0, 0.4, 5.0, -5.0)

    def every(at: Tensor) -> list[Tensor]:
        step, f, old, ref, noise = (rows[name][at] for name in ("step", "f", "old", "reference", "noise"))
        log_rho = L.log_ratio(f, old, noise, s.w[step])
        given_ = strength("ratio", s)
        losses = [L.policy_loss(log_rho, A[at], s.w[step], trust, 0.1, s.sigma[step]) for trust in TRUSTS]
        losses.append(rsm_loss(f, ref, old, noise, given_.C1[step], given_.gamma[step], 0.3))
        losses.append(L.nft_loss(f, old, ref, A[at].sigmoid(), 0.5, s.gain[step].abs()))
        return [*losses, L.awm_loss(f, old, ref, A[at], 0.1), L.gaussian_kl(f, ref, s.w[step])]

    for whole, some in zip(every(torch.arange(ROWS)), every(order), strict=True):
        torch.testing.assert_close(whole[order], some, rtol=1e-14, atol=1e-14)


@given(st.permutations(range(12)), st.integers(1, 12))
def test_t14_no_scalar_depends_on_the_batch_that_it_is_used_in(order, many):
    """Defect 1 of section 7: scalars follow the step's id, whatever rows are shuffled, repeated or left out."""
    s, chosen = sd15(), torch.tensor(order[:many])
    step = torch.tensor([0, 49, 3, 3, 17, 48, 25, 1, 0, 40, 9, 33])
    noise, advantage, x_0 = normal(12, 3, seed=90), normal(12, seed=91), normal(12, 3, seed=92)
    whole = G.reverse_noise(advantage, noise, step, s)
    assert torch.equal(G.reverse_noise(advantage[chosen], noise[chosen], step[chosen], s), whole[chosen])
    t = s.times[step]
    every = forward_noise(advantage, x_0, noise, t, -x_0, s)
    some = forward_noise(advantage[chosen], x_0[chosen], noise[chosen], t[chosen], -x_0[chosen], s)
    assert torch.equal(some, every[chosen])
    short = schedule(SD15, s.times[10:13], "eps", "ddim", 1.0)  # nor on which other steps are in the grid
    assert torch.equal(short.sigma, s.sigma[10:12]) and torch.equal(short.push, s.push[10:12])


# forward-process estimators (section 2.1)


def forward_noise(optimality: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, old_x_0: Tensor, s: Schedule) -> Tensor:
    """alpha / sigma^2 (2 r - 1) (x_0 - old x_0), (n, ...): one draw of grad E_old[2 r - 1 | x_t], re-noised.

    Its mean is alpha / sigma^2 Cov(2 r - 1, x_0 | x_t), which NFT (times 1 / beta) and AWM (A for 2 r - 1) follow.
    """
    weight = s.path.alpha(t) / s.path.sigma(t) ** 2 * (2 * optimality - 1)
    return L.over(weight, x_t) * (x_0 - old_x_0)


@PATHS
@pytest.mark.parametrize("kind", ["velocity", "eps"])
def test_t9_nft_follows_the_forward_noise_estimate(path, kind):
    """Its loss is beta^2 |D|^2 + 2 beta (2 r - 1) <D, f_old - f*>, so that D* is Psi / beta in units of score."""
    grid = (ddim_grid(path, 10) if path is SD15 else flow_grid(11)[1:]).double()
    s, beta = schedule(path, grid, kind, "ddim", 1.0), 0.4
    step, r = torch.tensor([0, 2, 5, 7, 9]), f64(0.0, 0.3, 0.5, 0.9, 1.0)
    x_0, eps, old, f = (normal(5, 3, seed=100 + i) for i in range(4))
    t = s.times[step]
    x_t = noised(path, x_0, eps, t)
    target = s.target(x_0, eps, step)
    loss = lambda f: 3 * L.nft_loss(f, old, target, r, beta, None)  # noqa: E731  (a mean over the row's 3 numbers)
    expansion = beta**2 * L.square(f - old) + 2 * beta * (2 * r - 1) * L.dot(f - old, old - target)
    torch.testing.assert_close(loss(f) - loss(old), expansion)
    best = old - gradient(loss, old) / (2 * beta**2)  # of a quadratic: one Newton step
    assert float(gradient(loss, best).abs().max()) < 1e-10
    psi_hat = forward_noise(r, x_0, x_t, t, Prediction(kind, old, x_t, t, path).x_0, s)
    torch.testing.assert_close(L.over(s.kappa[step], best) * (best - old), psi_hat / beta)


@PATHS
def test_t9_awm_follows_the_forward_noise_estimate_with_the_advantage(path):
    s = schedule(path, (ddim_grid(path, 10) if path is SD15 else flow_grid(11)[1:]).double(), "velocity", "ddim", 1.0)
    step, A = torch.tensor([0, 2, 5, 9]), f64(1.3, -0.8, 0.2, -2.0)
    x_0, eps, old = (normal(4, 3, seed=110 + i) for i in range(3))
    t = s.times[step]
    x_t = noised(path, x_0, eps, t)
    push = -gradient(lambda f: L.awm_loss(f, old, s.target(x_0, eps, step), A, 0.1), old)  # 2 A (v* - v_old), a mean
    psi_hat = forward_noise((A + 1) / 2, x_0, x_t, t, Prediction("velocity", old, x_t, t, path).x_0, s)
    torch.testing.assert_close(L.over(s.kappa[step], push) * push * 3 / 2, psi_hat)


def test_the_forward_estimate_is_the_gradient_of_the_expected_reward():
    """alpha / sigma^2 Cov(2 r - 1, x_0 | x_t) = grad E[2 r - 1 | x_t], on O1 with r linear in x_0."""
    s, x, t, b = sd35(), normal(1, 3, seed=120), at(0.6), f64(0.3, -0.2, 0.1)
    x_0 = gaussian().given(x[0], t, FLOW).sample(200_000, seeded(121))
    drawn = forward_noise((x_0 @ b + 1) / 2, x_0, x.expand_as(x_0), t.expand(len(x_0)), gaussian().x_0(x, t, FLOW), s)
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert bool(((drawn.mean(0) - jacobian(t, FLOW) * b).abs() < 4 * error).all())


def test_nfts_adaptive_weight_is_the_released_one_by_hand():
    """mean((x_0_hat - x_0)^2 / mean |x_0_hat - x_0|) of each branch on a flow, where x_0_hat = x_t - t v."""
    old, f, target, t, r, beta = f64([1.0, 0.0]), f64([2.0, 2.0]), f64([0.5, 0.5]), 0.4, 0.75, 0.5
    plus, minus = f64(1.5, 1.0), f64(0.5, -1.0)  # old +- beta (f - old)
    error = [0.4 * (branch - target[0]) for branch in (plus, minus)]  # (0.4, 0.2) and (0, -0.6)
    hand = [float((e**2 / e.abs().mean()).mean()) for e in error]
    assert hand == pytest.approx([0.1 / 0.3, 0.18 / 0.3])
    ours = L.nft_loss(f, old, target, f64(r), beta, f64(t))
    assert float(ours) == pytest.approx(0.75 * hand[0] + 0.25 * hand[1])
    # the weight is a constant to the gradient
    slope = gradient(lambda f: L.nft_loss(f, old, target, f64(r), beta, f64(t)), f)
    truth = 0.5 * (0.75 * 0.4 * error[0] / 0.3 - 0.25 * 0.4 * error[1] / 0.3)
    torch.testing.assert_close(slope[0], truth)


# marginals (T11): means and variances carried through the steps of an exact Gaussian field, without draws


def moments(path, grid: Tensor, sde: str, level: float, deviation: float = 0.5) -> list[tuple[float, float]]:
    """(mean, variance) after every step, from those of p_t at the first time."""
    world, n = isotropic(f64([1.0]), deviation), len(grid) - 1
    field, found = world.field(path), []
    law = world.marginal(grid[0], path)
    mean, variance = float(law.mean), float(law.covariance)
    t, t_next = (times.repeat(2) for times in (grid[:-1], grid[1:]))
    step = gaussian_step(sde, field(f64([0.0], [1.0]).repeat_interleave(n, 0), t), t_next, level, grid[1])
    of_0, of_1 = step.mean.reshape(2, n)
    added = step.deviation.expand_as(step.mean).reshape(2, n)[0] ** 2
    for base, slope, noise in zip(of_0.tolist(), (of_1 - of_0).tolist(), added.tolist(), strict=True):
        mean, variance = base + slope * mean, slope**2 * variance + noise
        found.append((mean, variance))
    return found


@pytest.mark.parametrize(
    "path, sde, level",
    [(FLOW, "ddim", eta) for eta in (0.0, 0.5, 1.0)] + [(SD15, "ddim", eta) for eta in (0.0, 0.5, 1.0)],
)
def test_t11_steps_keep_the_marginals_of_a_gaussian(path, sde, level):
    """To first order in the step at least: half the step, half the error."""
    worst = []
    for steps in (250, 500):
        grid = (flow_grid(steps) if path is FLOW else ddim_grid(path, steps, trailing=True)).double()
        mean, variance = torch.tensor(moments(path, grid, sde, level), dtype=torch.float64).T
        alpha, sigma = path.alpha(grid[1:]), path.sigma(grid[1:])
        off = (mean - alpha).abs(), (variance / (alpha**2 * 0.25 + sigma**2) - 1).abs()
        worst.append(float(torch.cat(off).max()))
    assert worst[1] < 0.04 and worst[1] < 0.6 * worst[0]


def test_t11_without_noise_ddim_on_a_flow_is_the_ode():
    grid = flow_grid(20, 3.0).double()
    for found, truth in zip(moments(FLOW, grid, "ddim", 0.0), moments(FLOW, grid, "flow-sde", 0.0), strict=True):
        assert found == pytest.approx(truth)


@pytest.mark.parametrize("path", [FLOW, TOY], ids=["flow", "vp"])
def test_ddim_with_full_noise_is_the_posterior_given_x_0(path):
    """q(x_s | x_t, x_0) by Bayes, from x_s given x_0 and x_t given x_s; on a flow from t = 1 it forgets x_t."""
    x_t, x_0 = f64([0.7]), f64([-0.4])
    for t, s_ in ((0.9, 0.5), (0.5, 0.1), (0.2, 0.19)):
        t, s_ = at(t), at(s_)
        a, b, sa, sb = path.alpha(t), path.alpha(s_), path.sigma(t), path.sigma(s_)
        between = sa**2 - (a / b * sb) ** 2
        variance = 1 / (1 / sb**2 + (a / b) ** 2 / between)
        mean = variance * (b * x_0 / sb**2 + a / b * x_t / between)
        step = gaussian_step("ddim", Prediction("x_0", x_0, x_t, t, path), s_, 1.0, t)
        torch.testing.assert_close(step.mean, mean)
        assert float(step.deviation**2) == pytest.approx(float(variance))
    start = [
        gaussian_step("ddim", Prediction("x_0", x_0, x, at(1.0), FLOW), at(0.9), 1.0, at(0.9)) for x in (x_t, 5 * x_t)
    ]
    assert torch.equal(start[0].mean, start[1].mean) and float(start[0].deviation) == pytest.approx(0.9)


def test_the_uniform_deviation_never_exceeds_what_there_is():
    s = sd15(sde="ddim-uniform", noise_level=4.5)
    assert bool((s.sigma <= SD15.sigma(s.times[1:])).all()) and bool(s.noisy.all())
    wild = schedule(SD15, s.times, "eps", "ddim-uniform", 0.1)
    assert bool(wild.sigma.isfinite().all()) and bool((wild.sigma <= SD15.sigma(s.times[1:]) + 1e-12).all())
