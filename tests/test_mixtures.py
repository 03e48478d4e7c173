"""The mixture world against autograd, Monte Carlo, quadrature, and the exact-field table of the GEM notes."""

import math

import pytest
import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.paths import Prediction, RectifiedFlow, VariancePreserving, noised
from fieldsmith.samplers import ddim_grid, flow_grid, rollout
from fieldsmith.worlds.mixtures import NOWHERE, Mixture, isotropic, lattice, line, square, triangle
from tests.drawn import f64, normal

FLOW = RectifiedFlow()
DDPM = VariancePreserving((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
PATHS = pytest.mark.parametrize("path", [FLOW, DDPM], ids=["flow", "ddpm"])


@pytest.fixture
def crooked() -> Mixture:
    """Three modes in the plane, each with its own full covariance."""
    L = f64([[0.8, 0.0], [0.3, 0.5]], [[0.4, 0.0], [-0.5, 0.6]], [[1.0, 0.0], [0.2, 0.3]])
    return Mixture(f64([2.0, 0.0], [-1.5, 1.0], [0.0, -2.0]), L @ L.mT, f64(0.5, 0.3, 0.2))


# densities


def test_log_prob_is_torch_distributions(crooked):
    x = normal(50, 2) * 2
    modes = torch.distributions.MultivariateNormal(crooked.means, crooked.covariances)
    truth = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(crooked.weights), modes)
    torch.testing.assert_close(crooked.log_prob(x), truth.log_prob(x))
    torch.testing.assert_close(crooked.mean, truth.mean)
    torch.testing.assert_close(crooked.covariance.diagonal(), truth.variance)


def test_samples_have_the_mixtures_moments_and_repeat_with_the_seed(crooked):
    x = crooked.sample(40_000, torch.Generator().manual_seed(1))
    assert torch.equal(x, crooked.sample(40_000, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(x.mean(0), crooked.mean, atol=0.04, rtol=0)
    torch.testing.assert_close(x.T.cov(), crooked.covariance, atol=0.08, rtol=0)


@PATHS
def test_marginal_is_the_law_of_noised_samples(crooked, path):
    t = torch.tensor(0.4, dtype=torch.float64)
    x_t = noised(path, crooked.sample(40_000, torch.Generator().manual_seed(2)), normal(40_000, 2, seed=3), t)
    law = crooked.marginal(t, path)
    torch.testing.assert_close(x_t.mean(0), law.mean, atol=0.04, rtol=0)
    torch.testing.assert_close(x_t.T.cov(), law.covariance, atol=0.08, rtol=0)


@PATHS
def test_score_and_jacobian_are_autograd_of_log_prob(crooked, path):
    for t in f64(0.05, 0.5, 1.0):
        x = (normal(20, 2) * 2).requires_grad_()
        law = crooked.marginal(t, path)
        (score,) = torch.autograd.grad(law.log_prob(x).sum(), x)
        torch.testing.assert_close(crooked.score(x.detach(), t, path), score)
        hessian = torch.func.vmap(torch.func.hessian(lambda y, law=law: law.log_prob(y[None])[0]))(x.detach())
        torch.testing.assert_close(crooked.score_jacobian(x.detach(), t, path), hessian)


@PATHS
def test_one_time_a_sample_is_that_time_for_each(crooked, path):
    t, x = f64(0.1, 0.5, 0.9), normal(3, 2)
    for quantity in (
        crooked.score,
        crooked.x_0,
        crooked.eps,
        crooked.velocity,
        crooked.posterior,
        crooked.score_jacobian,
    ):
        apart = torch.cat([quantity(x[i : i + 1], t[i], path) for i in range(3)])
        torch.testing.assert_close(quantity(x, t, path), apart)


def test_the_noised_score_at_zero_noise_is_the_data_score(crooked):
    x = normal(5, 2).requires_grad_()
    (score,) = torch.autograd.grad(crooked.log_prob(x).sum(), x)
    torch.testing.assert_close(crooked.score(x.detach(), f64(0.0)[0], FLOW), score)


def test_score_and_jacobian_are_the_one_dimensional_oracle():
    """VSM notes, 3.4, written out."""
    world, x, t = line(), f64([1.2], [1.49], [2.6]), f64(0.02)[0]
    a, V = float(DDPM.alpha(t)), float(DDPM.alpha(t)) ** 2 * 0.05**2 + float(DDPM.sigma(t)) ** 2
    d = a * f64(1.0, 2.0, 3.0) - x
    w = (-(d**2) / (2 * V)).softmax(1)
    s = (w * d).sum(1, keepdim=True) / V
    J = ((w * d**2).sum(1) - (w * d).sum(1) ** 2) / V**2 - 1 / V
    torch.testing.assert_close(world.score(x, t, DDPM), s)
    torch.testing.assert_close(world.score_jacobian(x, t, DDPM)[:, 0, 0], J)


# what a perfect network says


def test_velocity_is_the_formula_of_the_notes():
    """v = sum_j g_j [ -mu_j + ((t - a s^2) / S) (x - a mu_j) ], GEM notes, 5.2."""
    world, s = square(16, 1.5).soft(1), 1.5
    for t in (0.0, 0.3, 0.744, 1.0):
        x, a = normal(30, 2) * 6, 1 - t
        S = a**2 * s**2 + t**2
        away = x[:, None] - a * world.means
        g = (world.weights.log() - away.square().sum(2) / (2 * S)).softmax(1)
        v = (g[..., None] * (-world.means + (t - a * s**2) / S * away)).sum(1)
        torch.testing.assert_close(world.velocity(x, f64(t)[0], FLOW), v)


def test_posteriors_are_conditional_expectations_of_samples(crooked):
    """E[. | x_t] by self-normalised importance over 400,000 draws of x_0."""
    x_0, t = crooked.sample(400_000, torch.Generator().manual_seed(4)), f64(0.5)[0]
    for path in (FLOW, DDPM):
        alpha, sigma = path.alpha(t), path.sigma(t)
        for x_t in f64([0.5, 0.2], [-1.0, 0.4], [0.1, -0.6]):
            eps = (x_t - alpha * x_0) / sigma
            w = (-eps.square().sum(1) / 2).softmax(0)
            velocity = w @ (path.d_alpha(t) * x_0 + path.d_sigma(t) * eps)
            near = {"atol": 0.02, "rtol": 0.01}
            torch.testing.assert_close(crooked.velocity(x_t[None], t, path)[0], velocity, **near)
            torch.testing.assert_close(crooked.x_0(x_t[None], t, path)[0], w @ x_0, **near)
            torch.testing.assert_close(crooked.eps(x_t[None], t, path)[0], w @ eps, **near)
            given = crooked.given(x_t, t, path)
            torch.testing.assert_close(given.mean, crooked.x_0(x_t[None], t, path)[0])
            torch.testing.assert_close(given.covariance, (w[:, None] * x_0).T @ x_0 - (w @ x_0).outer(w @ x_0), **near)


@PATHS
def test_posterior_sums_to_one_and_is_bayes(crooked, path):
    t, x = f64(0.3)[0], normal(40, 2)
    posterior = crooked.posterior(x, t, path)
    torch.testing.assert_close(posterior.sum(1), torch.ones(40).double())
    law = crooked.marginal(t, path)
    modes = [torch.distributions.MultivariateNormal(*parts) for parts in zip(law.means, law.covariances, strict=True)]
    joint = torch.stack([w * mode.log_prob(x).exp() for w, mode in zip(crooked.weights, modes, strict=True)], 1)
    torch.testing.assert_close(posterior, joint / joint.sum(1, keepdim=True))


@PATHS
def test_field_converts_into_every_form(crooked, path):
    for t in f64(0.01, 0.5, 1.0):
        x = normal(10, 2)
        output = crooked.field(path)(x, t)
        assert output.kind == "velocity"
        torch.testing.assert_close(output.x_0, crooked.x_0(x, t, path))
        torch.testing.assert_close(output.eps, crooked.eps(x, t, path))
        torch.testing.assert_close(output.score, crooked.score(x, t, path))


def test_velocity_is_refused_where_the_path_has_none(crooked):
    with pytest.raises(ValueError, match="t > 0"):
        crooked.velocity(normal(1, 2), f64(0.0)[0], DDPM)


@pytest.mark.parametrize("kind", ["flow", "ddim"])
def test_the_exact_field_transports_noise_to_data(crooked, kind):
    path, grid = (DDPM, ddim_grid(DDPM, 200, trailing=True)) if kind == "ddim" else (FLOW, flow_grid(200, 1.88))
    out = rollout(crooked.field(path), normal(4000, 2, seed=5), grid).last
    torch.testing.assert_close(out.mean(0), crooked.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(out.T.cov(), crooked.covariance, atol=0.2, rtol=0)
    share = crooked.posterior(out, f64(0.0)[0], FLOW).mean(0)
    torch.testing.assert_close(share, crooked.weights, atol=0.03, rtol=0)


# prompts


def test_soft_prompts_keep_the_modes_and_move_the_weights():
    world = square(16)
    prompt = world.soft(2)
    torch.testing.assert_close(prompt.weights, f64(0.02 / 3, 0.02 / 3, 0.98, 0.02 / 3))
    assert prompt.means is world.means and prompt.covariances is world.covariances
    torch.testing.assert_close(world.soft(1, 0.0).weights, f64(0.0, 1.0, 0.0, 0.0))
    assert torch.isfinite(world.soft(1, 0.0).velocity(normal(5, 2), f64(0.5)[0], FLOW)).all()
    assert isotropic(f64([0.0]), 1.0).soft(0).weights.item() == 1


def test_guidance_at_noise_moves_the_mean_of_the_prompt():
    """At t = 1 the state says nothing, so the velocity is x_t minus the prompt's mean."""
    prompt, x = square(16).soft(0), normal(5, 2)
    torch.testing.assert_close(prompt.velocity(x, f64(1.0)[0], FLOW), x - prompt.mean)


# rewards


def test_tilting_in_one_dimension_is_quadrature():
    world = Mixture(f64([-1.0], [2.0]), f64([[0.25]], [[1.0]]), f64(0.7, 0.3))
    x = torch.linspace(-15, 15, 30_001, dtype=torch.float64)[:, None]
    for b, A, strength in ((1.0, 0.0, 1.0), (-0.5, 0.8, 2.0), (0.3, -0.4, 1.5)):
        reward = strength * (b * x[:, 0] - A * x[:, 0] ** 2 / 2)
        density = (world.log_prob(x) + reward).exp()
        total = torch.trapezoid(density, x[:, 0])
        tilt = world.tilted(f64(b), f64([A]), strength)
        torch.testing.assert_close(tilt.log_normaliser, total.log())
        torch.testing.assert_close(tilt.mixture.log_prob(x).exp(), density / total)


def test_tilting_in_the_plane_is_importance_weighting(crooked):
    b, A = f64(0.6, -0.4), f64([0.5, 0.2], [0.2, 0.3])
    x = crooked.sample(200_000, torch.Generator().manual_seed(6))
    reward = x @ b - torch.einsum("na,ab,nb->n", x, A, x) / 2
    tilt, w = crooked.tilted(b, A), reward.softmax(0)
    torch.testing.assert_close(tilt.log_normaliser, reward.exp().mean().log(), atol=0.02, rtol=0)
    torch.testing.assert_close(tilt.mixture.mean, w @ x, atol=0.03, rtol=0)
    torch.testing.assert_close(tilt.mixture.covariance, x.T.cov(aweights=w), atol=0.05, rtol=0)


def test_the_tilted_triangle_is_the_notes():
    """RSM notes, section 5: every mean moves by (-0.5, 0), weights become (0.039, 0.786, 0.175)."""
    world = triangle()
    tilted = world.tilted(f64(-0.5, 0.0)).mixture
    torch.testing.assert_close(tilted.means, world.means + f64(-0.5, 0.0))
    torch.testing.assert_close(tilted.covariances, world.covariances)
    torch.testing.assert_close(tilted.weights, f64(0.039, 0.786, 0.175), atol=5e-4, rtol=0)


@PATHS
def test_value_guidance_three_ways(crooked, path):
    """RSM notes, T1: V_t from the conditional law; grad V_t as a score difference and from the two means (Tweedie)."""
    b, A, t, x = f64(0.6, -0.4), f64([0.5, 0.2], [0.2, 0.3]), f64(0.6)[0], normal(4, 2)
    tilt = crooked.tilted(b, A)
    value = tilt.mixture.marginal(t, path).log_prob(x) - crooked.marginal(t, path).log_prob(x) + tilt.log_normaliser
    direct = torch.stack([crooked.given(y, t, path).tilted(b, A).log_normaliser for y in x])
    torch.testing.assert_close(value, direct)
    pull = tilt.mixture.score(x, t, path) - crooked.score(x, t, path)
    tweedie = tilt.mixture.x_0(x, t, path) - crooked.x_0(x, t, path)
    torch.testing.assert_close(pull, path.alpha(t) / path.sigma(t) ** 2 * tweedie)


def test_a_tilt_without_a_normaliser_is_refused(crooked):
    with pytest.raises(InputError, match="keep the eigenvalues"):
        crooked.tilted(f64(0.0, 0.0), -10 * torch.eye(2).double())
    with pytest.raises(InputError, match="symmetric"):
        crooked.tilted(f64(0.0, 0.0), f64([1.0, 0.5], [0.0, 1.0]))


@pytest.mark.parametrize(
    "parts, fix",
    [
        ((f64([0.0], [1.0]), f64([[1.0]], [[1.0]]), f64(0.6, 0.6)), "weights.sum"),
        ((f64([0.0], [1.0]), f64([[1.0]], [[1.0]]), f64(1.0)), "2 modes need"),
        ((f64([0.0]), f64([[-1.0]]), f64(1.0)), "positive definite"),
        ((f64([0.0, 0.0]), f64([[1.0]]), f64(1.0)), "need"),
    ],
)
def test_what_is_no_mixture_is_refused(parts, fix):
    with pytest.raises(InputError, match=fix):
        Mixture(*parts)


def test_a_mode_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="0 to 3"):
        square(16).soft(4)


# reading samples, named worlds


def test_membership_is_in_each_modes_own_deviations():
    world = Mixture(
        f64([0.0, 0.0], [10.0, 0.0]), f64([[1.0, 0.0], [0.0, 0.01]], [[1.0, 0.0], [0.0, 1.0]]), f64(0.5, 0.5)
    )
    points = f64([3.9, 0.0], [0.0, 0.5], [10.0, 3.9], [4.1, 0.0], [7.0, 0.0])
    assert world.membership(points).tolist() == [0, NOWHERE, 1, NOWHERE, 1]
    torch.testing.assert_close(world.fractions(points), f64(0.2, 0.4, 0.4))


def test_named_worlds_have_the_notes_geometry():
    a, b, c, d = square(16).means
    assert (a - b).norm() == (a - c).norm() == 16 and math.isclose((a - d).norm(), 16 * math.sqrt(2))
    apart = torch.pdist(triangle().means)
    torch.testing.assert_close(apart, torch.full((3,), 6.0).double())
    assert lattice().means.shape == (25, 2)
    torch.testing.assert_close(lattice().covariance, torch.eye(2).double())
    torch.testing.assert_close(line((1.0, 2.0, 4.0, 5.0)).mean, f64(3.0))


# early-window erasure with exact fields (GEM notes, 5.2)

TARGET, ANCHOR = 0, 1


def erased(separation: float, steps_held: int, lam: float = 1.0, esd: bool = False, n: int = 2000) -> Tensor:
    """Mode fractions (A, B, C, D, none) of 28 Euler steps, the first `steps_held` with the erased target's field.

    GEM's fixed points: (1 - lam) n + lam p with target n and anchor p; ESD's: u - (n - u) with the null prompt u.
    """
    world = square(separation)
    target, anchor = world.soft(TARGET), world.soft(ANCHOR)
    grid = flow_grid(28, 1.88)
    window = grid[:steps_held]

    def student(x_t: Tensor, t: Tensor) -> Prediction:
        v = target.velocity(x_t, t, FLOW)
        if t in window:
            if esd:
                u = world.velocity(x_t, t, FLOW)
                v = u - (v - u)
            else:
                v = (1 - lam) * v + lam * anchor.velocity(x_t, t, FLOW)
        return Prediction("velocity", v, x_t, t, FLOW)

    return world.fractions(rollout(student, normal(n, 2, seed=7), grid).last)


def assert_fractions(ours: Tensor, theirs: dict[int, float], n: int = 2000, n_theirs: int = 600) -> None:
    """Within 3.5 binomial deviations of both samples together, and half a unit of their last digit."""
    for mode, p in theirs.items():
        spread = math.sqrt(max(p * (1 - p), 0.005) * (1 / n + 1 / n_theirs))
        assert abs(float(ours[mode]) - p) < 3.5 * spread + 0.005, (mode, p, ours.tolist())


@pytest.mark.parametrize(
    "separation, lam, steps_held, a, b, d, none",
    [
        (16, 0.0, 6, 0.98, 0.01, 0.00, 0.00),
        (16, 0.0, 11, 0.98, 0.01, 0.00, 0.00),
        (16, 0.0, 28, 0.98, 0.01, 0.00, 0.00),
        (16, 0.5, 6, 0.88, 0.09, 0.02, 0.00),
        (16, 0.5, 11, 0.72, 0.24, 0.02, 0.01),
        (16, 0.5, 28, 0.37, 0.37, 0.02, 0.23),
        (16, 0.67, 6, 0.83, 0.13, 0.04, 0.01),
        (16, 0.67, 11, 0.42, 0.53, 0.02, 0.02),
        (16, 0.67, 28, 0.12, 0.78, 0.02, 0.07),
        (16, 1.0, 6, 0.60, 0.34, 0.06, 0.00),
        (16, 1.0, 11, 0.04, 0.94, 0.01, 0.01),
        (16, 1.0, 28, 0.01, 0.97, 0.01, 0.00),
        (32, 0.5, 6, 0.76, 0.21, 0.02, 0.01),
        (32, 0.5, 11, 0.36, 0.37, 0.02, 0.24),
        (32, 0.5, 28, 0.36, 0.37, 0.02, 0.24),
        (32, 1.0, 6, 0.11, 0.86, 0.02, 0.01),
        (32, 1.0, 11, 0.01, 0.97, 0.01, 0.00),
        (32, 1.0, 28, 0.01, 0.97, 0.01, 0.00),
        (4, 1.0, 6, 0.94, 0.04, 0.02, 0.00),
        (4, 1.0, 11, 0.83, 0.12, 0.05, 0.00),
        (4, 1.0, 28, 0.01, 0.97, 0.01, 0.00),
    ],
)
def test_early_window_erasure_table(separation, lam, steps_held, a, b, d, none):
    assert_fractions(erased(separation, steps_held, lam), {0: a, 1: b, 3: d, 4: none})


def test_early_window_erasure_by_esd_reflects_into_the_opposite_mode():
    for steps_held in (11, 28):
        assert_fractions(erased(16, steps_held, esd=True), {0: 0.02, 1: 0.18, 2: 0.22, 3: 0.58, 4: 0.01})


def test_what_an_early_window_can_erase_grows_with_the_separation():
    near, middle, far = (float(erased(separation, 11)[ANCHOR]) for separation in (4, 16, 32))
    assert near < 0.2 < 0.9 < middle < far
