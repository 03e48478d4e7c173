"""Grids against diffusers, steps against the papers' formulas in plain floats, rollouts against exact worlds."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fieldsmith.paths import Prediction, RectifiedFlow, VariancePreserving
from fieldsmith.samplers import (
    Field,
    Gaussian,
    Sde,
    Trajectory,
    cps_step,
    dance_sde_step,
    ddim_grid,
    ddim_step,
    euler,
    flow_grid,
    flow_sde_step,
    gaussian_step,
    rollout,
)
from fieldsmith.worlds.mixtures import isotropic
from tests.drawn import seeded

FLOW = RectifiedFlow()
MEAN, DEVIATION = 1.0, 0.5  # of the one-dimensional Gaussian world below
SDES = ("flow-sde", "dance-sde", "cps", "ddim")


def f64(value) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def ddpm(start: float = 0.00085, end: float = 0.012) -> VariancePreserving:
    """Stable Diffusion 1.5's schedule, 'scaled_linear'."""
    betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    return VariancePreserving((1 - betas).cumprod(0))


def gaussian_field(path=FLOW):
    """The exact field of x_0 ~ N(1, 0.25)."""
    return isotropic(f64([[MEAN]]), DEVIATION).field(path)


def point_field(x_t: Tensor, t: Tensor) -> Prediction:
    """The exact field of data that is always 2."""
    return Prediction("x_0", torch.full_like(x_t, 2.0), x_t, t, FLOW)


def field_of(sde: str):
    return gaussian_field(ddpm() if sde == "ddim" else FLOW)


def grid_of(sde: str, steps: int) -> Tensor:
    return ddim_grid(ddpm(), steps, trailing=True) if sde == "ddim" else flow_grid(steps)


# grids


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grid_is_diffusers_static_shift(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    torch.testing.assert_close(flow_grid(steps, shift), scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flow_grid_is_diffusers_dynamic_shift(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=0.63)
    torch.testing.assert_close(flow_grid(steps, math.exp(0.63)), scheduler.sigmas, atol=1e-6, rtol=0)


def test_flow_grid_is_the_notes_28_steps():
    """GEM notes, 1.1: FLUX at 512 pixels, mu = 0.63."""
    grid = flow_grid(28, math.exp(0.63))
    printed = [
        1,
        0.981,
        0.961,
        0.940,
        0.918,
        0.896,
        0.873,
        0.849,
        0.824,
        0.799,
        0.772,
        0.744,
        0.715,
        0.684,
        0.652,
        0.619,
    ]
    torch.testing.assert_close(grid[:17], torch.tensor([*printed, 0.585]), atol=6e-4, rtol=0)
    assert len(grid) == 29 and grid[-1] == 0


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_grid_is_diffusers_for_every_number_of_steps(spacing):
    """diffusers' trailing list has one timestep too many, -1, for 61 steps and 61 other numbers; it is left out."""
    path, scheduler = ddpm(), DDIMScheduler(timestep_spacing=spacing, steps_offset=0)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        grid = ddim_grid(path, steps, trailing=spacing == "trailing")
        assert path.index(grid[:-1]).round().long().tolist() == scheduler.timesteps.tolist()[:steps]
        assert grid[-1] == 0


def test_grids_refuse_step_counts_they_cannot_have():
    with pytest.raises(ValueError, match="at least 1"):
        flow_grid(0)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="1 to 1000"):
            ddim_grid(ddpm(), steps)


# single steps, against the formulas written out in plain floats


def at(t: float, kind: str = "velocity", x: float = 0.3, value: float = -1.2, path=FLOW) -> Prediction:
    return Prediction(kind, f64([[value]]), f64([[x]]), f64(t), path)


@pytest.mark.parametrize("t, t_next", [(1.0, 0.9), (0.9, 0.8), (0.5, 0.4), (0.1, 0.0)])
def test_flow_sde_step_is_the_formula(t, t_next):
    """MT-EditFlow notes (8)-(10): with sigma~ = s_1 in the denominator at t = 1."""
    a, x, v, dt, t_1 = 0.7, 0.3, -1.2, t_next - t, 0.9
    q = a * math.sqrt(t / (1 - (t_1 if t == 1 else t)))
    mean = x * (1 + q**2 / (2 * t) * dt) + v * (1 + q**2 * (1 - t) / (2 * t)) * dt
    step = flow_sde_step(at(t), f64(t_next), a, f64(t_1))
    assert float(step.mean) == pytest.approx(mean) and float(step.deviation) == pytest.approx(q * math.sqrt(-dt))
    score = -(x + (1 - t) * v) / t
    assert mean == pytest.approx(x + (v - q**2 / 2 * score) * dt)  # the reverse SDE of the same marginals


@pytest.mark.parametrize("t, t_next", [(1.0, 0.9), (0.5, 0.4), (0.1, 0.0)])
def test_dance_sde_step_is_the_formula(t, t_next):
    eta, x, v, dt = 0.3, 0.3, -1.2, t_next - t
    score = -(x - (1 - t) * (x - t * v)) / t**2
    step = dance_sde_step(at(t), f64(t_next), eta)
    assert float(step.mean) == pytest.approx(x + v * dt - eta**2 / 2 * score * dt)
    assert float(step.deviation) == pytest.approx(eta * math.sqrt(-dt))


@pytest.mark.parametrize("t, t_next", [(1.0, 0.9), (0.5, 0.4), (0.1, 0.0)])
def test_cps_step_is_the_formula(t, t_next):
    a, x, v = 0.7, 0.3, -1.2
    deviation = t_next * math.sin(a * math.pi / 2)
    mean = (1 - t_next) * (x - t * v) + math.sqrt(t_next**2 - deviation**2) * (x + (1 - t) * v)
    step = cps_step(at(t), f64(t_next), a)
    assert float(step.mean) == pytest.approx(mean) and float(step.deviation) == pytest.approx(deviation)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_the_formula(eta):
    """RSM notes, 1.2, with eta on the deviation."""
    path, x, eps = ddpm(), 0.3, -1.2
    a_t, a_p = (float(path.alphas_cumprod[i]) for i in (501, 481))
    deviation = eta * math.sqrt((1 - a_p) / (1 - a_t) * (1 - a_t / a_p))
    x_0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    mean = math.sqrt(a_p) * x_0 + math.sqrt(1 - a_p - deviation**2) * eps
    step = ddim_step(at(502 / 1000, "eps", path=path), f64(482 / 1000), eta)
    assert float(step.mean) == pytest.approx(mean) and float(step.deviation) == pytest.approx(deviation)


@pytest.mark.parametrize("t", [1.0, 0.6, 0.2])
def test_steps_take_one_time_a_sample(t):
    """Training states come at mixed times: (batch,) times give each row the step that it would get alone."""
    x, v = noise(3, 2, 4), noise(3, 2, 4, seed=1)
    ts, nexts = f64([t, 0.5, 0.3]), f64([t - 0.1, 0.4, 0.2])
    together = Prediction("velocity", v, x, ts, FLOW)
    for step in (lambda output, n: flow_sde_step(output, n, 0.7, f64(0.9)), lambda s, n: dance_sde_step(s, n, 0.3),
                 lambda s, n: cps_step(s, n, 0.7)):  # fmt: skip
        batch = step(together, nexts)
        for i in range(3):
            alone = step(Prediction("velocity", v[i : i + 1], x[i : i + 1], ts[i], FLOW), nexts[i])
            torch.testing.assert_close(batch.mean[i : i + 1], alone.mean)
            torch.testing.assert_close(batch.log_prob(x)[i], alone.log_prob(x[i : i + 1])[0])
        torch.testing.assert_close(euler(together, nexts), x - 0.1 * v)


def test_the_first_flow_sde_step_is_finite():
    output = Prediction("velocity", noise(4, 3), noise(4, 3, seed=1), f64(1.0), FLOW)
    step = flow_sde_step(output, f64(0.98), 0.7, f64(0.98))
    assert torch.isfinite(step.mean).all() and torch.isfinite(step.deviation) and step.deviation > 0


def test_flow_sde_at_pure_noise_without_the_first_time_is_refused():
    with pytest.raises(ValueError, match="t_first"):
        flow_sde_step(at(1.0), f64(0.9), 0.7)


def test_flow_sde_golden_table_of_sd35():
    """RSM notes, 1.5: SD3.5's default grid (the scheduler shifts by 3 twice), 10 steps, noise level 0.7."""

    def shifted(t: Tensor) -> Tensor:
        return 3 * t / (1 + 2 * t)

    low = float(shifted(f64(0.001)))
    grid = torch.cat((shifted(torch.linspace(1, low, 10, dtype=torch.float64)), f64([0.0])))
    golden = {  # k: t, dt, sigma~, sigma, w = Omega / sigma
        1: (1.0000, 0.0399, 3.5057, 0.7000, 0.0570),
        2: (0.9601, 0.0468, 3.4351, 0.7430, 0.0784),
        5: (0.7904, 0.0831, 1.3592, 0.3918, 0.2640),
        8: (0.4649, 0.1868, 0.6524, 0.2820, 0.8248),
        9: (0.2780, 0.2691, 0.4344, 0.2254, 1.4867),
        10: (0.0089, 0.0089, 0.0664, 0.0063, 1.7706),
    }
    for k, (t, dt, tilde, sigma, w) in golden.items():
        ours, ahead = grid[k - 1], grid[k]
        step = flow_sde_step(at(float(ours), x=0.0, value=1.0), ahead, 0.7, grid[1])
        found = (
            ours,
            ours - ahead,
            step.deviation / (ours - ahead).sqrt(),
            step.deviation,
            -step.mean / step.deviation,
        )
        assert [float(number) for number in found] == pytest.approx([t, dt, tilde, sigma, w], rel=1e-4, abs=6e-5)


def test_ddim_golden_table_of_sd15():
    """RSM notes, 1.5: 50 steps of gap 20 from timestep 981 to 1, the step before clamped at 0; eta = 1."""
    path = ddpm()
    golden = {  # timestep: sigma, c1 - c2
        1: (0.0206, 0.02071), 21: (0.0395, 0.12929), 101: (0.1428, 0.08160),
        401: (0.2590, 0.09708), 801: (0.3973, 0.17664), 981: (0.4545, 0.23294),
    }  # fmt: skip
    for index, (sigma, push) in golden.items():
        t, before = path.time(f64(index)), path.time(f64(max(index - 20, 0)))
        step = ddim_step(at(float(t), "eps", x=0.0, value=1.0, path=path), before, 1.0)
        assert float(step.deviation) == pytest.approx(sigma, abs=6e-5)
        assert -float(step.mean) == pytest.approx(push, abs=2e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_step_is_diffusers_over_a_whole_grid(eta):
    path = ddpm()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=0,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    grid = ddim_grid(path, 20)
    x, eps, draw = (torch.randn(2, 3, 4, 4, generator=seeded(i)) for i in range(3))
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        index = int(path.index(t).round())
        theirs = scheduler.step(eps, index, x, eta=eta, variance_noise=draw).prev_sample
        step = ddim_step(Prediction("eps", eps, x, t, path), t_next, eta)
        torch.testing.assert_close(step.mean + step.deviation * draw, theirs, atol=1e-4, rtol=1e-4)
        if eta == 0:
            torch.testing.assert_close(euler(Prediction("eps", eps, x, t, path), t_next), theirs, atol=1e-4, rtol=1e-4)


# densities


def test_log_prob_is_torch_distributions():
    mean, x, deviation = noise(3, 2, 4), noise(3, 2, 4, seed=1), f64([0.5, 1.0, 2.0]).reshape(3, 1, 1)
    for s in (deviation, f64(0.7)):
        truth = torch.distributions.Normal(mean, s.expand_as(mean)).log_prob(x).flatten(1).sum(1)
        torch.testing.assert_close(Gaussian(mean, s).log_prob(x), truth)


def test_log_prob_integrates_to_one():
    x = torch.linspace(-8, 10, 4001, dtype=torch.float64)[:, None]
    step = flow_sde_step(at(0.6), f64(0.5), 0.7)
    density = Gaussian(step.mean.expand_as(x), step.deviation).log_prob(x).exp()
    assert float(torch.trapezoid(density, x[:, 0])) == pytest.approx(1, abs=1e-9)


def test_a_deterministic_step_has_no_density():
    with pytest.raises(ValueError, match="no density"):
        Gaussian(noise(2, 3), f64(0.0)).log_prob(noise(2, 3))


# rollouts


def walk(field: Field, x: Tensor, grid: Tensor, sde: Sde, noise_level: float, seed: int = 0) -> Trajectory:
    """A rollout of stochastic steps."""
    states, generator = [x], seeded(seed)
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        states.append(gaussian_step(sde, field(states[-1], t), t_next, noise_level, grid[1]).sample(generator))
    return Trajectory(torch.stack(states), grid)


@pytest.mark.parametrize("sde, noise_level", [("flow-sde", 0.7), ("dance-sde", 0.3), ("dance-sde", 0.7)])
def test_stochastic_steps_keep_the_marginals(sde, noise_level):
    """x_k ~ N(alpha m, alpha^2 s^2 + t^2) along 400 steps of the exact field, from 20,000 draws."""
    path = walk(gaussian_field(), noise(20_000, 1), flow_grid(400), sde, noise_level, seed=3)
    for k in (40, 100, 200, 300, 360, 390):
        x, t = path.states[k], float(path.times[k])
        assert float(x.mean()) == pytest.approx((1 - t) * MEAN, abs=0.03)
        assert float(x.var()) == pytest.approx((1 - t) ** 2 * DEVIATION**2 + t**2, rel=0.05)


def test_ddim_with_noise_keeps_the_marginals():
    path = ddpm()
    taken = walk(gaussian_field(path), noise(20_000, 1), ddim_grid(path, 500, trailing=True), "ddim", 1.0, seed=3)
    for k in (100, 250, 400, 500):
        x, alpha, sigma = taken.states[k], float(path.alpha(taken.times[k])), float(path.sigma(taken.times[k]))
        assert float(x.mean()) == pytest.approx(alpha * MEAN, abs=0.03)
        assert float(x.var()) == pytest.approx(alpha**2 * DEVIATION**2 + sigma**2, rel=0.05)


@pytest.mark.parametrize("steps", [3, 10])
def test_cps_is_exact_for_a_point_mass(steps):
    path = walk(point_field, noise(20_000, 1), flow_grid(steps), "cps", 0.7, seed=4)
    torch.testing.assert_close(path.last, torch.full_like(path.last, 2.0))
    for x, t in zip(path.states[:-1], path.times[:-1].tolist(), strict=True):
        assert float(x.mean()) == pytest.approx((1 - t) * 2, abs=0.03)
        assert float(x.var()) == pytest.approx(t**2, rel=0.05)


@pytest.mark.parametrize(
    "steps, sde, noise_level, printed",
    [
        (10, None, 0.0, 0.431), (10, "flow-sde", 0.7, 0.480), (10, "dance-sde", 0.3, 0.441), (10, "cps", 0.7, 0.370),
        (40, None, 0.0, 0.483), (40, "flow-sde", 0.7, 0.497), (40, "dance-sde", 0.3, 0.485), (40, "cps", 0.7, 0.407),
    ],
)  # fmt: skip
def test_final_deviations_are_the_notes(steps, sde, noise_level, printed):
    """MT-EditFlow notes, 2.2 (ii): standard deviation 0.5 as few steps of each sampler give it."""
    begun = gaussian_field(), noise(40_000, 1), flow_grid(steps)
    last = (walk(*begun, sde, noise_level, seed=5) if sde else rollout(*begun)).last
    assert float(last.std()) == pytest.approx(printed, abs=0.008)


def test_the_last_cps_step_is_deterministic():
    path = walk(gaussian_field(), noise(5, 1), flow_grid(6), "cps", 0.7)
    torch.testing.assert_close(path.last, gaussian_field()(path.states[-2], path.times[-2]).x_0)


@pytest.mark.parametrize("sde", SDES)
def test_a_name_leads_to_its_step(sde):
    grid = grid_of(sde, 8)
    output = field_of(sde)(noise(6, 1), grid[3])
    steps = {
        "flow-sde": lambda output, n: flow_sde_step(output, n, 0.6, grid[1]),
        "dance-sde": lambda output, n: dance_sde_step(output, n, 0.6),
        "cps": lambda output, n: cps_step(output, n, 0.6),
        "ddim": lambda output, n: ddim_step(output, n, 0.6),
    }
    found, step = gaussian_step(sde, output, grid[4], 0.6, grid[1]), steps[sde](output, grid[4])
    assert torch.equal(found.mean, step.mean) and torch.equal(found.deviation, step.deviation)


def test_states_live_at_their_times():
    """The pairing that the released erasure code misses by one step."""
    field, grid = gaussian_field(), flow_grid(14, 1.88)
    path = rollout(field, noise(20, 1), grid)
    assert torch.equal(path.times, grid) and path.states.shape == (15, 20, 1)
    for k in range(14):
        assert torch.equal(path.states[k + 1], euler(field(path.states[k], path.times[k]), path.times[k + 1]))


def exact_map(x_1: Tensor) -> Tensor:
    return MEAN + DEVIATION * x_1


def test_euler_is_of_first_order():
    x_1 = noise(200, 1)
    misses = [
        (rollout(gaussian_field(), x_1, flow_grid(steps)).last - exact_map(x_1)).abs().mean() for steps in (40, 80)
    ]
    assert float(misses[0] / misses[1]) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("sde", SDES)
def test_one_seed_one_rollout(sde):
    first, again, other = (walk(field_of(sde), noise(4, 1), grid_of(sde, 5), sde, 0.5, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.states, again.states)
    assert not torch.equal(first.last, other.last)


@pytest.mark.parametrize("sde", SDES[:3])
def test_without_noise_every_sde_is_the_ode(sde):
    still = walk(gaussian_field(), noise(4, 1), flow_grid(6), sde, 0.0)
    torch.testing.assert_close(still.states, rollout(gaussian_field(), noise(4, 1), flow_grid(6)).states)


def test_a_rollout_may_stop_early():
    whole = rollout(gaussian_field(), noise(4, 1), flow_grid(10))
    part = rollout(gaussian_field(), noise(4, 1), flow_grid(10), stop=3)
    assert torch.equal(part.states, whole.states[:4]) and torch.equal(part.times, whole.times[:4])


def test_every_stochastic_rollout_is_finite_from_pure_noise():
    for sde in SDES:
        assert torch.isfinite(walk(field_of(sde), noise(16, 1), grid_of(sde, 4), sde, 0.7).states).all()


def test_gradients_reach_the_field_through_a_rollout():
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def moved(x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction("velocity", gaussian_field()(x_t, t).velocity + shift, x_t, t, FLOW)

    rollout(moved, noise(3, 1), flow_grid(4)).last.sum().backward()
    assert shift.grad is not None and shift.grad < 0
