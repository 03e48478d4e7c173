"""The equations of GEM and its baselines against their algebra, Monte Carlo, and the mixture world's closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fieldsmith.methods.erase import losses as L
from fieldsmith.paths import Prediction, RectifiedFlow
from fieldsmith.samplers import flow_grid, flow_sde_step, rollout
from fieldsmith.worlds.mixtures import square
from tests.drawn import normal

FLOW = RectifiedFlow()
ETAS = pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])


def gradient(loss, v: Tensor) -> Tensor:
    v = v.clone().requires_grad_(True)
    loss(v).sum().backward()
    return v.grad


# where descent ends


def stopping_place(eta: float, margin: float = 0.0) -> float:
    """lambda of n + lambda (p - n) where descent from v = n comes to rest; asserts that it is on that line."""
    p, n = normal(1, 8, seed=1), normal(1, 8, seed=2)
    v, way = n.clone(), p - n
    step = 2e-3 * float(way.norm())
    for _ in range(800):
        v = v - step * gradient(lambda v: L.erase_loss(v, p, n, eta, margin), v)
    along = float(((v - n) * way).sum() / way.square().sum())
    assert float((v - n - along * way).norm() / way.norm()) < 1e-3
    return along


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_descent_from_the_target_stops_at_one_over_one_plus_eta(eta):
    assert stopping_place(eta) == pytest.approx(1 / (1 + eta), abs=0.02)


@pytest.mark.parametrize("margin", [0.5, 1.0])
@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
def test_a_margin_moves_the_stop_towards_the_anchor(eta, margin):
    assert stopping_place(eta, margin) == pytest.approx((1 + margin * eta) / (1 + eta), abs=0.02)


@ETAS
def test_the_loss_is_zero_exactly_in_the_apollonius_region(eta):
    p, n = normal(1, 3, seed=3), normal(1, 3, seed=4)
    D, v = float((p - n).norm()), n + 3 * normal(5000, 3, seed=5)
    if eta == 1:
        inside = ((v - (n + p) / 2) * (p - n)).sum(1) > 0  # the anchor's side of the perpendicular bisector
    else:
        centre, radius = n + (p - n) / (1 - eta**2), eta * D / abs(1 - eta**2)
        inside = (v - centre).norm(dim=1) < radius
        inside = inside if eta < 1 else ~inside  # a ball around the anchor's side, or all but a ball around n
    assert 0.02 < float(inside.double().mean()) < 0.98
    assert torch.equal(L.erase_loss(v, p, n, eta) == 0, inside)


# its gradient


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_the_active_gradient_is_a_unit_pull_and_eta_times_a_unit_push(eta):
    p, n, v = normal(1, 6, seed=6), normal(1, 6, seed=7), normal(500, 6, seed=8)
    g = gradient(lambda v: L.erase_loss(v, p, n, eta), v)
    active = L.erase_loss(v, p, n, eta) > 0
    unit = torch.nn.functional.normalize
    assert active.any()
    torch.testing.assert_close(-g[active], (unit(p - v) + eta * unit(v - n))[active], atol=1e-6, rtol=0)
    size = g[active].norm(dim=1)
    assert float(size.min()) >= abs(1 - eta) - 1e-6
    assert float(size.max()) <= 1 + eta + 1e-6


@ETAS
def test_on_the_way_from_target_to_anchor_the_speed_is_one_plus_eta(eta):
    p, n = normal(1, 6, seed=9), normal(1, 6, seed=10)
    v = n + 0.5 / (1 + eta) * (p - n)
    g = gradient(lambda v: L.erase_loss(v, p, n, eta), v)
    torch.testing.assert_close(g, (1 + eta) * (n - p) / (n - p).norm(), atol=1e-6, rtol=0)


def test_at_the_start_only_the_unit_pull_remains():
    p, n = normal(1, 6, seed=11), normal(1, 6, seed=12)
    g = gradient(lambda v: L.erase_loss(v, p, n, eta=1.0), n)  # v = n: the push has no direction
    torch.testing.assert_close(g, (n - p) / (n - p).norm(), atol=1e-6, rtol=0)


def test_the_norm_has_no_gradient_at_zero():
    assert torch.equal(gradient(L.norm, torch.zeros(2, 5)), torch.zeros(2, 5))


def test_each_state_counts_with_its_own_norm_over_all_dimensions():
    v, p, n = normal(3, 2, 4, seed=13), normal(3, 2, 4, seed=14), normal(3, 2, 4, seed=15)
    truth = [max(0.0, float((v[i] - p[i]).norm() - 0.5 * (v[i] - n[i]).norm())) for i in range(3)]
    torch.testing.assert_close(L.erase_loss(v, p, n, eta=0.5), torch.tensor(truth, dtype=torch.float64))


def test_without_a_push_the_direction_is_concept_ablations():
    p, n, v = normal(1, 6, seed=16), normal(1, 6, seed=17), normal(1, 6, seed=18)
    ours = gradient(lambda v: L.erase_loss(v, p, n, eta=0.0), v)
    theirs = gradient(lambda v: L.square_loss(v, p), v)
    torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm())


def test_square_loss_teaches_the_student_alone():
    goal = normal(2, 3).requires_grad_(True)
    L.square_loss(normal(2, 3, seed=1).requires_grad_(True), goal).backward()
    assert goal.grad is None


def test_progress_is_the_place_on_the_line_and_ignores_what_leaves_it():
    p, n = torch.tensor([[2.0, 0.0]]).expand(3, 2), torch.zeros(3, 2)
    v = torch.tensor([[0.0, 0.0], [1.0, 5.0], [3.0, -1.0]])
    torch.testing.assert_close(L.progress(v, p, n), torch.tensor([0.0, 0.5, 1.5]))


# the trajectory-likelihood bridge (notes, 1.4)


def test_expected_log_likelihood_ratio_is_the_weighted_velocity_distance():
    a, s, s_next = 0.7, torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.75, dtype=torch.float64)
    x, anchor = normal(1, 2, seed=19), normal(1, 2, seed=20)
    student = anchor + torch.tensor([[0.7, 0.9]])  # squared distance 1.3

    def policy(velocity: Tensor):
        many = Prediction("velocity", velocity.expand(100_000, 2), x.expand(100_000, 2), s, FLOW)
        return flow_sde_step(many, s_next, a)

    after = policy(anchor).sample(torch.Generator().manual_seed(21))
    ratio = policy(student).log_prob(after) - policy(anchor).log_prob(after)
    truth = -L.balance_weights(s, s_next, a) * (student - anchor).square().sum()
    assert abs(float(ratio.mean() - truth)) < 4 * float(ratio.std()) / math.sqrt(len(ratio))


def test_balance_weight_gives_the_notes_number():
    w = L.balance_weights(torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.75, dtype=torch.float64), 0.7)
    assert float(w) == pytest.approx((1 + 0.49 / 2) ** 2 * 0.05 * 0.2 / (2 * 0.49 * 0.8))
    assert -1.3 * float(w) == pytest.approx(-0.02570, abs=5e-6)


def test_flow_balance_vanishes_where_the_policies_agree_and_log_z_is_the_reward():
    log_p = normal(5, 3, seed=22)
    torch.testing.assert_close(
        L.flow_balance(log_p, log_p, torch.tensor(2.5), 2.5), torch.zeros(3, dtype=torch.float64)
    )


def test_flow_balance_is_the_square_of_the_whole_residual():
    forward, anchor = normal(5, 3, seed=23), normal(5, 3, seed=24)
    truth = torch.stack([(sum(forward[:, i]) - sum(anchor[:, i]) + 0.3 - 2.5) ** 2 for i in range(3)])
    torch.testing.assert_close(L.flow_balance(forward, anchor, torch.tensor(0.3), 2.5), truth)


# the other baselines


def test_esd_at_eta_two_is_the_classic_reflection():
    n, u = normal(4, 3, seed=25), normal(4, 3, seed=26)
    torch.testing.assert_close(L.esd_target(n, u, 2.0), u - (n - u))


def test_attention_loss_on_a_hand_made_map():
    maps = torch.zeros(1, 2, 2, 3)  # batch, heads, queries, words
    maps[0, :, 0, 1], maps[0, :, 1, 1] = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])
    maps[0, :, :, 2] = 9.0  # another word's column
    assert float(L.attention_loss(maps, [1])) == pytest.approx(5 + 1, abs=1e-4)


def test_attention_loss_is_finite_downhill_from_no_attention():
    assert torch.isfinite(gradient(lambda m: L.attention_loss(m, [0]), torch.zeros(1, 2, 2, 1))).all()


def test_contrast_is_small_when_the_synonym_is_like_the_irrelevant_words():
    right, up = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    close = float(L.contrast_loss(right, target=up, others=right[None], temperature=0.5))
    far = float(L.contrast_loss(right, target=right, others=up[None], temperature=0.5))
    assert close == pytest.approx(0 - math.log(math.exp(0) + math.exp(2)), abs=1e-5)
    assert far == pytest.approx(2 - math.log(math.exp(2) + math.exp(0)), abs=1e-5)


@pytest.fixture
def edit() -> dict[str, Tensor]:
    return {
        "weight": normal(5, 8, seed=27),
        "erased": normal(2, 8, seed=28),
        "replacement": normal(2, 8, seed=29),
        "kept": normal(3, 8, seed=30),
    }


def test_closed_form_edit_sends_erased_inputs_to_their_replacements(edit):
    new = L.closed_form_edit(**edit, keep_old=1e-9)
    torch.testing.assert_close(edit["erased"] @ new.T, edit["replacement"] @ edit["weight"].T, atol=1e-4, rtol=0)


def test_closed_form_edit_leaves_kept_inputs_where_they_went(edit):
    new = L.closed_form_edit(**edit, keep_old=1e-9)
    torch.testing.assert_close(edit["kept"] @ new.T, edit["kept"] @ edit["weight"].T, atol=1e-4, rtol=0)


def test_closed_form_edit_with_a_heavy_old_weight_changes_nothing(edit):
    torch.testing.assert_close(L.closed_form_edit(**edit, keep_old=1e9), edit["weight"], atol=1e-6, rtol=0)


def test_closed_form_edit_is_the_minimum_of_its_quadratic(edit):
    W, c, c_star, c_keep = edit.values()

    def cost(new: Tensor) -> Tensor:
        erased, kept = c @ new.T - c_star @ W.T, c_keep @ (new - W).T
        return erased.square().sum() + kept.square().sum() + 0.5 * (new - W).square().sum()

    slope = gradient(cost, L.closed_form_edit(**edit, keep_old=0.5))
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-9, rtol=0)


def test_projection_leaves_nothing_beyond_the_anchor_along_the_concept():
    v, p, n = normal(50, 6, seed=31), normal(50, 6, seed=32), normal(50, 6, seed=33)
    d = (n - p) / (n - p).norm(dim=1, keepdim=True)
    before, after = ((v - p) * d).sum(1), ((L.project(v, p, n) - p) * d).sum(1)
    assert (before > 0).any() and (before < 0).any()
    torch.testing.assert_close(after, before.clamp(max=0), atol=1e-12, rtol=0)


def test_projection_moves_along_the_concept_only():
    v, p, n = normal(50, 6, seed=34), normal(50, 6, seed=35), normal(50, 6, seed=36)
    d = (n - p) / (n - p).norm(dim=1, keepdim=True)
    moved = v - L.project(v, p, n)
    torch.testing.assert_close(moved, (moved * d).sum(1, keepdim=True) * d)


def test_projection_leaves_the_anchor_and_its_far_side_untouched():
    p, n = normal(5, 6, seed=37), normal(5, 6, seed=38)
    for v in (p, p - 0.5 * (n - p)):
        assert torch.equal(L.project(v, p, n), v)


# end to end on the mixture world, where the erased law is known (notes, 5.2)


def test_a_student_trained_with_the_hinge_reaches_the_erased_law_of_lambda_one_half():
    """The exact field plus one free lambda a time; early window 0..10, separation 16: table row .72/.24/.02/.01."""
    world, grid = square(16), flow_grid(28, 1.88).double()
    target, anchor = world.soft(0), world.soft(1)
    lambdas = torch.zeros(28, dtype=torch.float64, requires_grad=True)

    def student(x: Tensor, t: Tensor) -> Tensor:
        n = target.velocity(x, t, FLOW)
        return n + lambdas[torch.searchsorted(-grid, -t)] * (anchor.velocity(x, t, FLOW) - n)

    def draw(n: int, seed: int, stop: int | None) -> Tensor:
        with torch.no_grad():
            field = lambda x, t: Prediction("velocity", student(x, t), x, t, FLOW)  # noqa: E731
            return rollout(field, normal(n, 2, seed=seed), grid, stop=stop).states

    optimizer = torch.optim.Rprop([lambdas], lr=5e-3, step_sizes=(1e-6, 0.02))  # no momentum: it stops with the hinge
    for step in range(60):
        states = draw(64, 100 + step, stop=10)
        loss = torch.zeros((), dtype=torch.float64)
        for x, t in zip(states, grid, strict=False):
            p, n = anchor.velocity(x, t, FLOW), target.velocity(x, t, FLOW)
            loss = loss + L.erase_loss(student(x, t), p, n, eta=1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(lambdas[:11].detach(), torch.full((11,), 0.5, dtype=torch.float64), atol=0.02, rtol=0)
    assert not lambdas[11:].any()
    fractions = world.fractions(draw(2000, 7, stop=None)[-1]).tolist()
    assert fractions == pytest.approx([0.72, 0.24, 0.01, 0.02, 0.01], abs=0.07)
