"""Methods of erase against their releases: GEM, ESD, UCE, EraseAnything, EraseFlow, concept ablation. What is not the
same is said in docs/erase.md, and is measured here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fieldsmith.methods.erase import losses as L
from fieldsmith.paths import Prediction
from fieldsmith.samplers import flow_sde_step
from tests.released import FLOW, released, same, slope, tensor, tensors


@pytest.mark.parametrize("which", [0, 2])
def test_gems_hinge(which: int) -> None:
    their = released("gem")
    row = their["rows"][which]
    v, p, n = tensors(their, "student", "anchor", "target")
    v.requires_grad_()
    loss = their["gamma"] * L.erase_loss(v, p, n, row["eta"]).sum() / 3
    same(loss, row["loss"])
    same(slope(loss, v), row["slope"])


@pytest.mark.parametrize("which", [1, 3])
def test_gems_first_update_is_pushed_along_1_1_by_the_releases_norm(which: int) -> None:
    """At v = n, where every run starts: torch's pairwise_distance adds 1e-6 to each number, which gives the push, whose
    direction is not determined there, that of (1, ..., 1) with full length. Ours has none."""
    their = released("gem")
    row = their["rows"][which]
    p, n = tensors(their, "anchor", "target")
    v = n.clone().requires_grad_()
    ours = slope(their["gamma"] * L.erase_loss(v, p, n, row["eta"]).sum() / 3, v)
    push = row["eta"] * their["gamma"] / 3 / 8**0.5
    same(ours - push, row["slope"])


@pytest.mark.parametrize("which", range(4))
def test_esds_target(which: int) -> None:
    their = released("esd")
    row = their["found"][which]
    v, n, u, other = tensors(their, "student", "target", "null", "other")
    v.requires_grad_()
    # erased from another concept, the target starts from that concept's field; ours erases from itself alone
    goal = L.esd_target(n, u, row["eta"]) + (other - n if row["from"] == "other" else 0)
    loss = L.square_loss(v, goal)
    same(loss, row["loss"])
    same(slope(loss, v), row["slope"])


def edited(their: dict[str, object]) -> Tensor:
    weight, erased, replacement, kept = tensors(their, "weight", "erased", "replacement", "kept")
    return L.closed_form_edit(weight, erased, replacement, kept, 0.5)


def test_uces_closed_form() -> None:
    their = released("uce")["sd"]
    same(edited(their), their["edited"])


def test_uce_on_flux_counts_a_bias_once_where_the_release_counts_it_twice() -> None:
    their = released("uce")["flux"]
    weight, bias, erased, kept = tensors(their, "weight", "bias", "erased", "kept")
    inputs = torch.cat((erased, kept))
    right = 0.5 * torch.eye(weight.shape[1]).double() + inputs.T @ inputs
    again = torch.outer(bias, inputs.sum(0)) @ right.inverse()  # the bias as a part of what inputs should give
    same(edited(their) + again, their["edited"])
    kept_where = (kept @ weight.T - kept @ edited(their).T).norm()
    assert (kept @ weight.T - kept @ tensor(their["edited"]).T).norm() > 2 * kept_where


def test_eraseanythings_three_terms() -> None:
    their = released("eraseanything")
    v, n, u, maps = tensors(their, "student", "target", "null", "maps")
    v.requires_grad_()
    maps.requires_grad_()
    guided = L.square_loss(v, u - 1.0 * (n - u))
    same(guided, their["guidance"]["loss"])
    same(slope(guided, v), their["guidance"]["slope"])
    attention = L.attention_loss(maps, their["words"])
    same(attention, their["attention"]["loss"])
    same(slope(attention, maps), their["attention"]["slope"])
    synonym, keyword, others = tensors(their, "synonym", "keyword", "others")
    synonym.requires_grad_()
    others.requires_grad_()
    contrast = L.contrast_loss(synonym, keyword, others)
    same(contrast, their["contrast"]["loss"])
    same(slope(contrast, synonym), their["contrast"]["slope"])
    same(slope(contrast, others), their["contrast"]["others_slope"])


def test_eraseflows_log_probabilities_and_balance() -> None:
    """On FLUX the release balances forward log-probabilities alone: ours with nothing to subtract."""
    their = released("eraseflow")
    outputs, states, sigmas = tensors(their, "outputs", "states", "sigmas")
    outputs.requires_grad_()
    log_z = tensor(their["log_z"]).requires_grad_()
    steps = [
        flow_sde_step(Prediction("velocity", outputs[k], states[k], sigmas[k], FLOW), sigmas[k + 1], 0.7, sigmas[1])
        for k in range(6)
    ]
    forward = torch.stack([step.log_prob(states[k + 1]) / 8 for k, step in enumerate(steps)])
    same(forward, their["forward"])
    loss = L.flow_balance(forward, torch.zeros_like(forward), log_z, their["beta"]).mean()
    same(loss, their["flux"]["loss"])
    torch.testing.assert_close(slope(loss, outputs), tensor(their["flux"]["slope"]), rtol=1e-5, atol=1e-3)  # to 800
    same(slope(loss, log_z), their["flux"]["log_z_slope"][0])


def test_concept_ablations_loss() -> None:
    their = released("concept_ablation")
    target, anchor, prior, noise = tensors(their, "target", "anchor", "prior", "noise")
    f = torch.cat((target, prior)).requires_grad_()
    loss = L.square_loss(f[:3], anchor) + L.square_loss(f[3:], noise)
    same(loss, their["loss"])
    same(slope(loss, f), their["slope"])
