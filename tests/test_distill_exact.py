"""Distillation against closed forms: what objectives leave open, weights over time, and errors through the sampler.

The numbers are those of the DASH notes, sections 2, 3 and 4. Networks are affine fields on a class-conditional mixture.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.methods.distill.config import DistillConfig, objective_of
from fieldsmith.methods.distill.curriculum import (
    Curriculum,
    base,
    index_of,
    learn_tirt,
    log_losses,
    tirt,
)  # fmt: skip
from fieldsmith.methods.distill.identifiability import (
    composite_form,
    composite_law,
    identifiability,
    quadratic_form,
    unseen_error,
)  # fmt: skip
from fieldsmith.methods.distill.losses import feature_loss, pair_loss, row_loss, square, weighted
from fieldsmith.methods.distill.objectives import OBJECTIVES, Objective
from fieldsmith.paths import (
    Prediction,
    RectifiedFlow,
    VariancePreserving,
    guide,
    length_of,
    noised,
    recalibrated,
    snr,
    tag,
    times_of,
    truth,
)  # fmt: skip
from fieldsmith.samplers import ddim_grid, rollout
from fieldsmith.worlds.mixtures import Mixture, isotropic
from tests.drawn import f64, normal, seeded

FLOW = RectifiedFlow()
COSINE = VariancePreserving(DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod)
PATHS = pytest.mark.parametrize("path", [FLOW, COSINE], ids=["flow", "vp"])
GAUSS = 1 / math.sqrt(3)  # two nodes that integrate every quadratic


def of(name: str, **settings) -> Objective:
    return objective_of(replace(DistillConfig(), objective=name, **settings))


# what an objective determines (2.1)


PICKED = (1.0, 1.0, 4.0, 4.0)  # w in {1, 4}; two numbers would be the ends of a uniform law


@pytest.mark.parametrize(
    ("objective", "form"),
    [
        (of("dash", anchor=0.0), [[1, 0], [0, 1]]),
        (of("dash"), [[1.1, 0], [0, 1]]),
        (of("conditional"), [[1, 0], [0, 0]]),
        (of("composite"), [[16, -12], [-12, 9]]),
        (of("gap"), [[1, -1], [-1, 1]]),
        (of("cond+gap"), [[2, -1], [-1, 1]]),
        (of("composite", composite_scales=(1.0, 4.0)), [[7, -4.5], [-4.5, 3]]),
        (of("composite", composite_scales=PICKED), [[8.5, -6], [-6, 4.5]]),
        (of("matched-dropout"), [[1, 0], [0, 1]]),
        (of("bk-sdm"), [[2, 0], [0, 0]]),
        (of("dash", gap=0.5), [[1.6, -0.5], [-0.5, 1.5]]),
    ],
)
def test_the_forms_of_the_notes_table(objective, form):
    np.testing.assert_allclose(quadratic_form(objective), form, atol=1e-12)


@pytest.mark.parametrize(
    ("objective", "condition", "digits"),
    [
        (of("dash", anchor=0.0), 1.0, 6),
        (of("dash"), 1.1, 6),
        (of("cond+gap"), 6.9, 1),
        (of("composite", composite_scales=(1.0, 4.0)), 131, 0),
        (of("composite", composite_scales=(0.0, 4.0)), 42, 0),
        (of("composite", composite_scales=PICKED), 73, 0),
        (of("tag"), 135, 0),
    ],
)
def test_condition_numbers_are_those_of_the_notes(objective, condition, digits):
    found = identifiability(objective)
    assert found.rank == 2 and found.null_direction is None
    assert round(found.condition, digits) == condition
    assert all(unseen_error(objective, w) == 0 for w in (0.0, 1.0, 3.0))


@pytest.mark.parametrize(
    ("objective", "direction"),
    [
        (of("conditional"), (0, 1)),
        (of("fitnets"), (0, 1)),
        (of("gap"), (1, 1)),
        (of("composite"), (1 - 1 / 4, 1)),
        (of("composite", composite_scales=(2.0,)), (1 - 1 / 2, 1)),
        (of("composite", composite_scales=(2.0, 2.0)), (1 - 1 / 2, 1)),
        (of("scratch", unconditional=0.0), (0, 1)),
    ],
)
def test_null_directions_cost_nothing_and_are_those_of_the_notes(objective, direction):
    found = identifiability(objective)
    assert found.rank == found.each_time == 1 and found.condition == math.inf
    lost = np.array(found.null_direction)
    np.testing.assert_allclose(lost, np.array(direction) / np.linalg.norm(direction), atol=1e-12)
    assert lost @ found.form @ lost < 1e-12
    assert "rank 1" in str(found)


def test_what_the_null_direction_does_to_guidance():
    """Composite: zero at its own scale alone, linear in w. Gap: the same drift at every w. Conditional: (w - 1) e_u."""
    composite, gap, conditional = of("composite"), of("gap"), of("conditional")
    e_u = identifiability(composite).null_direction[1]
    for w in (0.0, 1.0, 2.0, 4.0, 7.5):
        assert unseen_error(composite, w) == pytest.approx(e_u * (1 - w / 4), abs=1e-12)
        assert unseen_error(gap, w) == pytest.approx(math.sqrt(0.5))
        assert unseen_error(conditional, w) == pytest.approx(-(w - 1))


def test_tag_determines_both_branches_over_all_times_but_not_at_one():
    found = identifiability(of("tag"))
    assert (found.rank, found.each_time) == (2, 1) and "rank 1 at each time" in str(found)
    for t in (0.0, 0.3, 0.99):
        np.testing.assert_allclose(quadratic_form(of("tag"), t), composite_form(tag(t)))
    assert identifiability(of("composite", composite_scales=PICKED)).each_time == 2


def test_a_uniform_law_of_scales_is_its_quadrature():
    low, high = 0.5, 3.0
    nodes = [(low + high) / 2 + sign * (high - low) / 2 * GAUSS for sign in (-1, 1)]
    np.testing.assert_allclose(composite_law((low, high)), np.mean([composite_form(w) for w in nodes], axis=0))


def test_a_network_that_takes_the_scale_leaves_nothing_open():
    found = identifiability(of("w-conditioned"))
    assert found.null_direction is None and found.condition == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_form_and_says_so(name):
    objective = of(name)
    form = quadratic_form(objective)
    assert np.allclose(form, form.T) and np.linalg.eigvalsh(form)[0] > -1e-9
    assert str(identifiability(objective))


def test_objectives_without_a_weight_or_a_name_are_refused():
    with pytest.raises(InputError, match="every weight of the objective is 0"):
        of("conditional", imitation=0.0)
    with pytest.raises(InputError, match="did you mean 'dash'"):
        of("dahs")


# losses are those forms


def terms(objective: Objective) -> dict[str, float]:
    return {
        "imitation": objective.imitation, "unconditional": objective.unconditional, "anchor": objective.anchor,
        "gap": objective.gap, "composite": objective.composite,
    }  # fmt: skip


def scales_of(objective: Objective) -> Tensor:
    """Scales whose plain mean is the objective's law of w, exactly where what they weigh is quadratic."""
    if isinstance(objective.scales, str):
        return torch.tensor([tag(i / 1000) for i in range(1000)], dtype=torch.float64)
    if len(objective.scales) == 2:
        low, high = objective.scales
        return (low + high) / 2 + (high - low) / 2 * GAUSS * f64(-1, 1)
    return f64(*objective.scales)


@pytest.mark.parametrize(
    "objective",
    [
        of("dash", anchor=0.0), of("conditional"), of("composite"), of("composite", composite_scales=(1.0, 4.0)),
        of("composite", composite_scales=PICKED), of("tag"), of("gap"), of("cond+gap"), of("dash", anchor=0, gap=0.7),
        of("matched-dropout", imitation=0.3, unconditional=2.0),
    ],
)  # fmt: skip
def test_the_pair_loss_is_its_quadratic_form(objective):
    e_c, e_u, t_c, t_u, noise = normal(5, 3, 2, 4, 4)
    w = scales_of(objective)
    found = torch.stack(
        [
            pair_loss((t_c + e_c, t_u + e_u), (t_c, t_u), noise, **terms(objective), scale=w[i].expand(3))
            for i in range(len(w))
        ]
    ).mean(0)
    Q = torch.from_numpy(quadratic_form(objective))
    e = torch.stack((e_c, e_u)).flatten(2)
    torch.testing.assert_close(found, torch.einsum("anp,ab,bnp->n", e, Q, e) / e.shape[2])
    assert found.shape == (3,) and float(found.min()) > 0


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
def test_rows_of_one_branch_have_the_pairs_expectation_whatever_their_share(share):
    s_c, s_u, t_c, t_u, noise = normal(5, 6, 3)
    weights = {"imitation": 0.8, "unconditional": 1.7, "anchor": 0.3}
    no, yes = torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    kept = row_loss(s_c, t_c, noise, no, **weights, share=share)
    alone = row_loss(s_u, t_u, noise, yes, **weights, share=share)
    pair = pair_loss((s_c, s_u), (t_c, t_u), noise, **weights)
    torch.testing.assert_close(share * alone + (1 - share) * kept, pair)
    torch.testing.assert_close(row_loss(s_u, t_u, noise, yes, **weights), 1.7 * square(s_u, t_u))  # as rows fall


def anchored_target(teacher: Tensor, noise: Tensor, imitation: float, anchor: float) -> Tensor:
    """The one target that imitation and anchor add up to: their weighted mean (3.1)."""
    return (imitation * teacher + anchor * noise) / (imitation + anchor)


def test_imitation_and_anchor_are_one_target():
    """im |s - tau|^2 + an |s - eps|^2 = (im + an) |s - target|^2 + what no network changes (3.1)."""
    tau, noise = normal(2, 4, 5)
    im, an = 1.0, 0.1
    target = anchored_target(tau, noise, im, an)
    torch.testing.assert_close(target, (tau + 0.1 * noise) / 1.1)
    slopes, gaps = [], []
    for seed in (1, 2):
        s = normal(4, 5, seed=seed).requires_grad_(True)
        both = pair_loss((s, s), (tau, tau), noise, imitation=im, unconditional=0, anchor=an)
        one = (im + an) * square(s, target)
        gaps.append((both - one).detach())
        slopes.append([torch.autograd.grad(loss.sum(), s, retain_graph=True)[0] for loss in (both, one)])
    torch.testing.assert_close(gaps[0], gaps[1])
    assert float(gaps[0].min()) > 0.01
    for two, alone in slopes:
        torch.testing.assert_close(two, alone)


def test_features_are_summed_over_places():
    a, b = (
        [normal(2, 3, 4, 4), normal(2, 5, 2, 2, seed=1)],
        [normal(2, 3, 4, 4, seed=2), normal(2, 5, 2, 2, seed=3)],
    )
    torch.testing.assert_close(feature_loss(a, b), (a[0] - b[0]).square().mean() + (a[1] - b[1]).square().mean())


# an affine student of a class-conditional mixture, at one time


T = f64(0.45)[0]
K = 3
ANGLES = torch.arange(2 * K).double() * math.pi / K
MEANS = 1.5 * torch.stack((ANGLES.cos(), ANGLES.sin()), 1) + f64(0.4, -0.2)  # not balanced about 0
SHARES = f64(0.1, 0.2, 0.25, 0.15, 0.05, 0.25)  # class k is modes 2k and 2k + 1
WORLD = isotropic(MEANS, 0.5, SHARES)


def one_class(k: int) -> Mixture:
    weights = torch.zeros(2 * K).double()
    weights[2 * k : 2 * k + 2] = SHARES[2 * k : 2 * k + 2] / SHARES[2 * k : 2 * k + 2].sum()
    return WORLD.reweighted(weights)


class Sample:
    """Fixed states with the exact branches of a perfect teacher, and an affine student's features there."""

    def __init__(self, path, n: int = 240):
        generator = seeded(3)
        mode = torch.multinomial(SHARES, n, replacement=True, generator=generator)
        self.k = mode // 2
        x_0 = MEANS[mode] + 0.5 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
        self.noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        self.x_t = noised(path, x_0, self.noise, T.expand(n))
        self.c = torch.stack([one_class(k).eps(self.x_t, T, path) for k in range(K)])[self.k, torch.arange(n)]
        self.u = WORLD.eps(self.x_t, T, path)
        one = torch.ones(n, 1).double()
        alike = torch.cat((self.x_t, one), 1)  # A x + b, shared by all
        self.of_c = torch.cat((alike, torch.nn.functional.one_hot(self.k, K + 1).double()), 1)  # and an offset a class
        self.of_u = torch.cat((alike, torch.zeros(n, K).double(), one), 1)  # and one for null

    def outputs(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_c @ theta, self.of_u @ theta

    def optimum(self, objective: Objective) -> Tensor:
        """Least squares on the roots of Q: sqrt(value) (a s_c + b s_u) = sqrt(value) (a t_c + b t_u)."""
        target = self.c
        if objective.anchor:
            target = anchored_target(self.c, self.noise, objective.imitation, objective.anchor)
        values, vectors = np.linalg.eigh(quadratic_form(objective))
        seen = [(math.sqrt(v) * a, math.sqrt(v) * b) for v, (a, b) in zip(values, vectors.T, strict=True) if v > 1e-9]
        X = torch.cat([a * self.of_c + b * self.of_u for a, b in seen])
        Y = torch.cat([a * target + b * self.u for a, b in seen])
        return torch.linalg.pinv(X) @ Y

    def trained(self, objective: Objective, start: Tensor) -> Tensor:
        """Descent on the library's loss, each state at every scale of the objective's law."""
        theta = start.clone().requires_grad_(True)
        scales = scales_of(objective)
        optimiser = torch.optim.LBFGS(
            [theta], max_iter=400, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimiser.zero_grad()
            s_c, s_u = self.outputs(theta)
            total = torch.stack(
                [
                    pair_loss((s_c, s_u), (self.c, self.u), self.noise, **terms(objective), scale=w.expand(len(s_c)))
                    for w in scales
                ]
            ).mean()
            total.backward()
            return total

        optimiser.step(loss)
        return theta.detach()


START, OTHER = normal(K + 4, 2, seed=7), normal(K + 4, 2, seed=8)


@PATHS
@pytest.mark.parametrize(
    "objective",
    [
        of("dash"), of("dash", anchor=0.0), of("cond+gap"), of("composite", composite_scales=(1.0, 4.0)),
        of("composite", composite_scales=PICKED), of("scratch", imitation=1.0),
    ],
    ids=["dash", "dash without anchor", "cond+gap", "multi-w", "w in {1, 4}", "with noise"],
)  # fmt: skip
def test_full_rank_objectives_reach_one_optimum_from_anywhere(path, objective):
    sample = Sample(path)
    best = sample.outputs(sample.optimum(objective))
    for start in (START, OTHER):
        for found, wanted in zip(sample.outputs(sample.trained(objective, start)), best, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_full_rank_objectives_differ_where_the_student_cannot_fit_both():
    """One linear map serves both branches, so the weights of Q matter; dual supervision serves the sum of errors."""
    sample = Sample(FLOW)

    def errors(objective: Objective, w: float) -> float:
        s_c, s_u = sample.outputs(sample.optimum(objective))
        return float(square(guide(s_c, s_u, w), guide(sample.c, sample.u, w)).mean())

    dash, multi = of("dash", anchor=0.0), of("composite", composite_scales=PICKED)
    assert errors(dash, 1.0) + errors(dash, 0.0) < errors(multi, 1.0) + errors(multi, 0.0)
    assert errors(multi, 1.0) + errors(multi, 4.0) < errors(dash, 1.0) + errors(dash, 4.0)


@PATHS
def test_a_composite_leaves_the_null_branch_where_it_started(path):
    """The composite at w0 is one; what two starts keep is e_u = d, e_c = (1 - 1 / w0) d: seen at every other scale."""
    sample, objective, w0 = Sample(path), of("composite"), 4.0
    best = guide(*sample.outputs(sample.optimum(objective)), w0)
    (c1, u1), (c2, u2) = (sample.outputs(sample.trained(objective, start)) for start in (START, OTHER))
    for c, u in ((c1, u1), (c2, u2)):
        torch.testing.assert_close(guide(c, u, w0), best, atol=1e-4, rtol=0)
    drift = u2 - u1
    assert float(drift.norm(dim=1).min()) > 0.1
    torch.testing.assert_close(c2 - c1, (1 - 1 / w0) * drift, atol=1e-4, rtol=0)
    e_u = identifiability(objective).null_direction[1]
    for w in (0.0, 1.0, 2.0, 4.0, 8.0):
        apart = guide(c2, u2, w) - guide(c1, u1, w)
        torch.testing.assert_close(apart, unseen_error(objective, w) / e_u * drift, atol=5e-4, rtol=0)


@PATHS
def test_a_gap_alone_leaves_a_drift_that_both_branches_share(path):
    sample, objective = Sample(path), of("gap")
    c, u = sample.outputs(sample.optimum(objective))
    runs = [sample.outputs(sample.trained(objective, start)) for start in (START, OTHER)]
    for s_c, s_u in runs:
        torch.testing.assert_close(s_c - s_u, c - u, atol=1e-4, rtol=0)
        assert float(square(s_u, sample.u).mean()) > 0.5  # perfect gaps, useless branches
    drifts = [later - first for first, later in zip(*runs, strict=True)]
    assert float(drifts[0].norm(dim=1).mean()) > 0.5
    torch.testing.assert_close(drifts[0], drifts[1], atol=1e-4, rtol=0)


@PATHS
def test_conditional_alone_never_moves_the_null_offset(path):
    sample, objective = Sample(path), of("conditional")
    best = sample.outputs(sample.optimum(objective))[0]
    for start in (START, OTHER):
        theta = sample.trained(objective, start)
        torch.testing.assert_close(sample.outputs(theta)[0], best, atol=1e-4, rtol=0)
        assert torch.equal(theta[-1], start[-1])


# the tower property: dropping the student's label alone teaches the marginal


@PATHS
@pytest.mark.parametrize("t", [0.05, 0.45, 0.9])
def test_the_posterior_mean_of_conditional_branches_is_the_marginal_branch(path, t):
    t, x_t = f64(t)[0], 2 * normal(50, 2, seed=4)
    of_class = WORLD.posterior(x_t, t, path).reshape(50, K, 2).sum(2)
    conditional = torch.stack([one_class(k).eps(x_t, t, path) for k in range(K)], 1)
    mean = torch.einsum("nk,nkd->nd", of_class, conditional)
    torch.testing.assert_close(mean, WORLD.eps(x_t, t, path), atol=1e-10, rtol=0)
    # not so the plain mean of the classes, whose scores make the geometric mean of the densities
    assert float((conditional.mean(1) - WORLD.eps(x_t, t, path)).abs().max()) > 0.05


@PATHS
def test_dropping_the_students_label_alone_has_its_optimum_at_the_marginal(path):
    """Free values at some states, conditional targets of classes drawn from their posterior there."""
    x_t = 2 * normal(12, 2, seed=5)
    of_class = WORLD.posterior(x_t, T, path).reshape(12, K, 2).sum(2)
    target = torch.stack([one_class(k).eps(x_t, T, path) for k in range(K)], 1).flatten(0, 1)
    null, noise = torch.ones(12 * K, dtype=torch.bool), torch.zeros(12 * K, 2).double()
    goal = of("student-dropout")
    assert goal.null_target == "conditional"
    value = torch.zeros(12, 2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([value], max_iter=100, tolerance_grad=1e-12, tolerance_change=0)

    def loss() -> Tensor:
        optimiser.zero_grad()
        rows = row_loss(
            value.repeat_interleave(K, 0), target, noise, null,
            imitation=goal.imitation, unconditional=goal.unconditional, anchor=goal.anchor, share=0.1,
        )  # fmt: skip
        total = weighted(rows, of_class.flatten())
        total.backward()
        return total

    optimiser.step(loss)
    torch.testing.assert_close(value.detach(), WORLD.eps(x_t, T, path), atol=1e-8, rtol=0)


# weights over time (3.2, 4)


SHORT = VariancePreserving((1 - torch.linspace(1e-3, 0.25, 40, dtype=torch.float64)).cumprod(0))


def test_indices_and_times_are_each_others_inverse():
    for path in (COSINE, SHORT, FLOW):
        assert torch.equal(index_of(path, times_of(path)), torch.arange(length_of(path)))
        assert torch.equal(index_of(path, times_of(path).float()), torch.arange(length_of(path)))
    assert float(times_of(COSINE)[-1]) == 1 and float(times_of(FLOW)[0]) == 0.0005


def test_min_snr_is_the_x0_form_over_snr():
    abar = COSINE.alphas_cumprod.double()
    ratio = abar / (1 - abar)
    x0, eps, p2 = (base(name, COSINE)[:-1] for name in ("min-snr-x0", "min-snr", "p2"))
    torch.testing.assert_close(x0, ratio.clamp(max=5)[:-1], rtol=1e-5, atol=0)
    torch.testing.assert_close(eps * ratio[:-1], x0, rtol=1e-5, atol=0)
    torch.testing.assert_close(p2, 1 / (1 + ratio[:-1]), rtol=1e-5, atol=0)
    assert torch.equal(base("tirt", COSINE), base("min-snr-x0", COSINE))
    for name in ("uniform", "sigmoid", "edm2"):
        assert torch.equal(base(name, COSINE), torch.ones(1000).double())
    torch.testing.assert_close(base("min-snr", COSINE, gamma=1.0)[600:], torch.ones(400).double())
    assert all(bool(base(name, FLOW).isfinite().all()) for name in ("tirt", "min-snr", "p2"))
    with pytest.raises(InputError, match="'min-srn' is not in the vocabulary"):
        base("min-srn", COSINE)


def test_tirts_shape_starves_high_noise_by_the_notes_numbers():
    share = base("min-snr-x0", COSINE) / base("min-snr-x0", COSINE).sum()
    assert round(float(share[:250].sum()), 2) == 0.62
    assert round(float(share[:500].sum()), 2) == 0.93
    assert round(float(share[700:].sum()), 3) == 0.012
    assert round(float(share[800:].sum()), 4) == 0.0033
    ratio = snr(COSINE, times_of(COSINE)[:-1])
    assert int((ratio > 5).sum()) == pytest.approx(261, abs=1) and int((ratio > 1).sum()) == pytest.approx(495, abs=1)
    assert float(base("min-snr", COSINE)[300:].min()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["uniform", "tirt", "sigmoid", "min-snr", "min-snr-x0", "p2", "edm2"])
def test_weights_have_mean_one_over_all_times(name):
    numbers = normal(1000, seed=2) if name in ("tirt", "sigmoid", "edm2") else None
    weights = Curriculum(name, COSINE, numbers=numbers)
    t = times_of(COSINE).float()
    assert float(weights(t).mean()) == pytest.approx(1, abs=1e-5)
    if name == "edm2":
        torch.testing.assert_close(weights.all(), (-numbers).exp().float())
    if name == "sigmoid":
        torch.testing.assert_close(weights.all(), numbers.sigmoid().float())
    if name == "tirt":
        torch.testing.assert_close(weights.all(), (base("tirt", COSINE) * numbers.sigmoid()).float())
    assert weights.barrier(t) is None and not weights.numbers.requires_grad


def test_the_batch_normaliser_is_the_weighted_mean_of_losses():
    t, losses = times_of(COSINE)[[3, 100, 400, 400, 900]].float(), torch.tensor([3.0, 1.0, 2.0, 0.5, 4.0])
    weights = Curriculum("tirt", COSINE)
    w = base("tirt", COSINE)[[3, 100, 400, 400, 900]].float() / 2
    torch.testing.assert_close(weighted(losses, weights(t, True), weights(t, True)), (w * losses).sum() / w.sum())
    every = base("tirt", COSINE).float().mean() / 2
    torch.testing.assert_close(weighted(losses, weights(t)), (w * losses).mean() / every)


def test_tirts_own_gradient_raises_the_weight_of_easy_times():
    """d loss / d lambda_i = omega_i (1 - sigmoid(lambda_i)) (l_i - mean) / sum(omega): descent moves away from hard."""
    importance, losses = normal(40, seed=6), normal(40, seed=7).square().float()
    weights = Curriculum("tirt", SHORT, numbers=importance, learned=True)
    omega = weights(times_of(SHORT).float(), True)
    mean = weighted(losses, omega, omega)
    mean.backward()
    omega = tirt(importance, base("tirt", SHORT))
    torch.testing.assert_close(mean.detach().double(), (omega * losses).sum() / omega.sum(), rtol=1e-5, atol=0)
    expected = omega * (1 - importance.sigmoid()) * (losses - mean.detach()) / omega.sum()
    found = weights.numbers.grad
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-7)
    assert torch.equal(found < 0, losses < mean.detach())  # easier than the mean: descent raises it


def test_joint_minimisation_turns_to_the_easy_end_of_a_falling_profile():
    profile = 0.05 + (-times_of(COSINE) * 5).exp()
    shape = torch.ones(1000)
    found = learn_tirt(profile, shape, 800, lr=1e-2, generator=seeded())
    tenths = found.reshape(10, 100).mean(1)
    assert float(tenths[0]) < -0.5 < 0.5 < float(tenths[9])
    assert bool((tenths.diff() > -0.1).all())
    assert torch.equal(found, learn_tirt(profile, shape, 800, lr=1e-2, generator=seeded()))
    flat = learn_tirt(torch.ones(1000), shape, 100, generator=seeded())
    assert float(flat.abs().max()) < 0.02  # nothing is easier than the mean


def test_with_min_snrs_shape_the_weights_pile_up_in_the_middle():
    """The bump of the notes: lambda takes the low-noise end away, min-SNR the high-noise one."""
    profile = 0.02 + (-times_of(COSINE) * 6).exp()
    shape = base("tirt", COSINE)
    omega = tirt(learn_tirt(profile, shape, 1500, lr=3e-2, generator=seeded()), shape)
    bins = omega.reshape(20, 50).mean(1)
    assert 4 <= int(bins.argmax()) <= 10 and float(bins[[0, -1]].max()) < 0.2 * float(bins.max())


def test_at_edm2s_optimum_every_time_counts_alike():
    """loss / e^u + u is least at e^u = loss, so that weighted losses are 1 at every time."""
    losses = 0.1 + normal(40, seed=9).square().float()
    weights, t = Curriculum("edm2", SHORT, learned=True), times_of(SHORT).float()
    optimiser = torch.optim.LBFGS([weights.numbers], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=0)

    def loss() -> Tensor:
        optimiser.zero_grad()
        total = weighted(losses, weights(t)) + weights.barrier(t).mean()
        total.backward()
        return total

    optimiser.step(loss)
    torch.testing.assert_close(weights.numbers.detach().exp(), losses, rtol=1e-3, atol=0)
    torch.testing.assert_close(weights.all().detach() * losses, torch.ones(40), rtol=1e-3, atol=0)


@PATHS
def test_a_smooth_profile_is_recovered_from_noisy_losses(path):
    t = (torch.arange(20_000) + torch.rand(20_000, generator=seeded())) / 20_000

    def profile(t: Tensor) -> Tensor:
        return -3 + 2.5 * torch.sigmoid(8 * (0.4 - t)) + 0.3 * t

    noisy = profile(t.double()).exp() * normal(20_000, 6, seed=1).square().mean(1)
    found = log_losses(t, noisy, path)
    assert found.shape == (1000,)
    torch.testing.assert_close(found, profile(times_of(path)), atol=0.08, rtol=0)


# a branch's error through the sampler (2.3)


def test_branch_errors_reach_the_sample_by_the_notes_formula():
    """x / alpha moves by Euler in sigma / alpha, so that errors add up through the steps' linear maps."""
    w, e_c, e_u = 3.0, f64(0.02, -0.01), f64(-0.03, 0.015)
    grid = ddim_grid(SHORT, 10).double()
    S_c, S_u = f64(0.3, 0.1, 0.1, 0.4).reshape(1, 2, 2), f64(1.2, -0.2, -0.2, 0.8).reshape(1, 2, 2)
    conditional, marginal = Mixture(f64(1.0, -1.0)[None], S_c, f64(1.0)), Mixture(f64(0.0, 0.3)[None], S_u, f64(1.0))

    def field(error_c: Tensor, error_u: Tensor):
        def outputs(x_t: Tensor, t: Tensor) -> Prediction:
            both = conditional.eps(x_t, t, SHORT) + error_c, marginal.eps(x_t, t, SHORT) + error_u
            return Prediction("eps", guide(*both, w), x_t, t, SHORT)

        return outputs

    start, none = normal(3, 2), f64(0.0, 0.0)
    wrong, right = rollout(field(e_c, e_u), start, grid), rollout(field(none, none), start, grid)
    ratio = SHORT.sigma(grid) / SHORT.alpha(grid)
    steps = ratio.diff()
    amplify = []
    for k, t in enumerate(grid[:-1]):
        alpha, sigma = SHORT.alpha(t), SHORT.sigma(t)
        # eps = sigma (alpha^2 S + sigma^2 I)^-1 (x - alpha mu); one alpha more for d / d (x / alpha)
        J_c, J_u = (alpha * sigma * torch.linalg.inv(alpha**2 * S[0] + sigma**2 * torch.eye(2)) for S in (S_c, S_u))
        amplify.append(torch.eye(2).double() + steps[k] * (w * J_c + (1 - w) * J_u))
    total, later = torch.zeros(2).double(), torch.eye(2).double()
    for k in reversed(range(len(steps))):
        total = total + later @ (steps[k] * (w * e_c - (w - 1) * e_u))
        later = later @ amplify[k]
    torch.testing.assert_close(wrong.last - right.last, total.expand(3, 2), atol=1e-10, rtol=1e-8)
    assert float(total.norm()) > 0.01


def test_high_noise_steps_carry_nearly_all_of_ddims_length():
    ratio = (COSINE.sigma(ddim_grid(COSINE, 50)) / COSINE.alpha(ddim_grid(COSINE, 50))).double()
    length = -ratio.diff()
    assert float(length[:10].sum() / length.sum()) == pytest.approx(0.92, abs=0.006)  # indices 980 to 800


def test_the_error_of_guidance_is_a_parabola_of_three_moments():
    e_c, e_u = normal(2, 500, 3)
    e_c = e_c + 0.8 * e_u
    gap = e_c - e_u
    for w in (0.0, 1.0, 2.5, 4.0):
        curve = (e_u**2).mean() + 2 * w * (e_u * gap).mean() + w**2 * (gap**2).mean()
        torch.testing.assert_close(guide(e_c, e_u, w).square().mean(), curve)


# guidance schedules


def test_tag_is_what_the_notes_print():
    for index, w in ((980, 1.25), (750, 1.67), (500, 2.50), (250, 3.33), (0, 3.77)):
        assert round(tag(index / 1000), 2) == w
    assert round(float(np.mean([tag(i / 1000) for i in range(0, 1000, 20)])), 2) == 2.53
    assert tag(0.5, low=0.0, high=2.0) == 1.0 and tag(1.0, beta=100.0) == pytest.approx(1.0)


def test_recalibrated_guidance_takes_the_bin_of_the_time():
    schedule = recalibrated(3.0, (0.25, 0.5, 1.0), (1.0, 0.5, 0.25))
    for t, w in ((0.0, 3.0), (0.1, 3.0), (0.25, 3.0), (0.26, 1.5), (0.5, 1.5), (0.51, 0.75), (1.0, 0.75)):
        assert schedule(torch.tensor(t)) == w and schedule(torch.full((4,), t)) == w
    assert recalibrated(2.0, (0.5,), (0.5,))(torch.tensor(0.9)) == 1.0  # beyond the last bin: the last


# the truth in the networks' own form


@PATHS
@pytest.mark.parametrize("kind", ["eps", "x_0", "velocity", "v_prediction"])
def test_the_truth_converts_to_what_it_was_made_of(path, kind):
    x_0, eps = normal(2, 4, 3, 2)
    t = f64(0.1, 0.4, 0.7, 0.95)
    x_t = noised(path, x_0, eps, t)
    output = Prediction(kind, truth(kind, path, x_0, eps, t), x_t, t, path)
    for found, wanted in ((output.x_0, x_0), (output.eps, eps), (noised(path, output.x_0, output.eps, t), x_t)):
        torch.testing.assert_close(found, wanted, atol=1e-8, rtol=1e-8)
    slopes = path.d_alpha(t)[:, None, None] * x_0 + path.d_sigma(t)[:, None, None] * eps
    torch.testing.assert_close(output.velocity, slopes, atol=1e-6, rtol=1e-8)
