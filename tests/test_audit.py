"""`fieldsmith diagnose audit`: estimators against closed forms (RSM notes, 8.3), break points by simulation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fieldsmith.cli import main
from fieldsmith.diagnoses.config import AuditConfig
from fieldsmith.errors import InputError
from fieldsmith.methods.align.advice import along_steps, breaks, decided, outlook, outlooks, outside, recommend
from fieldsmith.methods.align.audit import Moment, Row, Truths, compare, measure, ratio
from fieldsmith.methods.align.config import RECIPES, AlignConfig
from fieldsmith.methods.align.context import AlignContext
from fieldsmith.methods.align.probes import estimates, follow, pathwise, reference, zeroth
from fieldsmith.methods.policy import losses as L
from fieldsmith.methods.policy.schedule import schedule
from fieldsmith.models.exact import Exact
from fieldsmith.paths import RectifiedFlow
from fieldsmith.rewards import Reward
from fieldsmith.samplers import flow_grid
from fieldsmith.worlds.mixtures import Mixture, isotropic, triangle
from tests.drawn import seeded

FLOW = RectifiedFlow()
A = torch.tensor([0.6, -0.3, 0.2], dtype=torch.float64)  # a linear reward
C = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)  # the centre of a quadratic one
MEAN, S0 = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), 0.8
GAUSSIAN = isotropic(MEAN[None], S0)


def linear(x: Tensor, _: Any) -> Tensor:
    return x @ A.to(x)


def quadratic(x: Tensor, _: Any) -> Tensor:
    return -(x - C.to(x)).square().sum(1) / 2


def setting(
    function: Any, steps: int = 8, differentiable: bool = True, mixture: Mixture = GAUSSIAN, **more
) -> AlignContext:
    """Memoryless steps (DDIM at eta 1) on an exact world, the reference policy."""
    config = AlignConfig(prompts=("a point",), steps=steps, sde="ddim", strength="jacobian", **more)
    return AlignContext.of(Exact(mixture, FLOW, flow_grid(steps)), config, Reward("its own", differentiable, function))


def one(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.long)


def J(t: float) -> float:
    return (1 - t) * S0**2 / ((1 - t) ** 2 * S0**2 + t**2)


@cache
def fine() -> AlignContext:
    return setting(linear, steps=60)


# O1: a Gaussian and a linear reward


@pytest.mark.parametrize("k", [12, 30])
def test_every_estimator_is_unbiased_on_a_gaussian_with_a_linear_reward(k):
    s = fine()
    x = follow(s, s.model.noise(1, seeded()), 0, torch.zeros(1, dtype=torch.long), seeded(1))[k]
    truth = J(float(s.schedule.times[k])) * A
    found, _, _ = estimates(s, x, k, torch.zeros(1, dtype=torch.long), 3000, seeded(2))
    after = float(s.schedule.times[k + 1])
    certain = (
        float(s.schedule.omega[k]) * S0 / ((1 - after) ** 2 * S0**2 + after**2) ** 0.5 * A
    )  # what the ODE makes of it
    for name, estimate in found.items():
        if "identity" in name or "linear" in name or "terminal x omega" in name:
            continue  # other scales, the same direction
        mean = estimate.values.mean(0).flatten().double()
        n = len(estimate.values)
        error = (estimate.values.flatten(1).double().var(0).sum() / n) ** 0.5 if n > 1 else 0.0
        shrunk = 0.75 if "mean" in name else 1
        slack = 4 * float(error) + 0.1 * float(truth.norm())  # the chain has 60 steps
        assert (mean - shrunk * (certain if "ODE" in name else truth)).norm() < slack, name
    next_state = float(s.schedule.omega[k]) * J(after) * A
    assert torch.allclose(found["tweedie, next"].values.mean(0).flatten().double(), next_state, rtol=1e-4)
    for name in ("tweedie, identity", "terminal x linear, ODE", "terminal x omega"):
        assert torch.cosine_similarity(found[name].values.mean(0).flatten().double(), A, dim=0) > 0.9999
    assert torch.allclose(found["terminal x J"].values[0].double(), truth, rtol=0.25)  # J of a fitted variance


def test_the_two_references_agree_and_are_exact_on_an_affine_chain():
    s = setting(linear)
    x, who, k = s.model.noise(1, seeded()), torch.zeros(1, dtype=torch.long), 3
    path, _ = reference(s, x, k, who, 64, "pathwise", seeded(1))
    halves = reference(s, x, k, who, 40_000, "zeroth order", seeded(2))
    zero = sum(halves) / 2
    # d x_K / d x_{k+1} of the chain, by differences: it is affine
    base = torch.zeros(4, 3)
    base[1:] = torch.eye(3)
    ends = follow(s, base, k + 1, one(base), seeded(3), twins=False)
    quiet = [follow(s, base[i : i + 1], k + 1, one(base[:1]), seeded(3))[-1][0] for i in range(4)]
    slope = torch.stack([(quiet[i] - quiet[0]) @ A.float() for i in (1, 2, 3)])
    exact = float(s.schedule.omega[k]) * slope
    assert ends.shape == (len(s.schedule) - k, 4, 3)
    assert torch.allclose(path, exact, atol=1e-4)
    assert (zero - exact).norm() < 0.05 * exact.norm()


# O2: a quadratic reward, where the soft value bends


def test_tweedie_is_off_from_the_soft_value_by_the_posteriors_variance():
    s, k, lam = setting(quadratic, steps=20), 8, 1.0
    t = s.schedule.times[k]
    x = torch.randn(4, 3, generator=seeded(), dtype=torch.float64)
    plain = GAUSSIAN.tilted(lam * C, lam * torch.eye(3, dtype=torch.float64), strength=1e-5).mixture
    soft = GAUSSIAN.tilted(lam * C, lam * torch.eye(3, dtype=torch.float64)).mixture
    mean = (plain.score(x, t, FLOW) - GAUSSIAN.score(x, t, FLOW)) * 1e5
    V = soft.score(x, t, FLOW) - GAUSSIAN.score(x, t, FLOW)
    t = float(t)
    v = S0**2 * t**2 / ((1 - t) ** 2 * S0**2 + t**2)
    for i in range(4):
        found, _, _ = estimates(s, x[i : i + 1].float(), k, torch.zeros(1, dtype=torch.long), 32, seeded(i))
        tweedie = found["tweedie"].values[0].double()
        assert torch.allclose(tweedie, mean[i], rtol=1e-3, atol=1e-4)  # no bias in the limit of small reward
        assert torch.allclose(tweedie, V[i] * (1 + lam * v), rtol=1e-3, atol=1e-4)  # T2


def test_measure_gives_bias_variance_and_the_gap_to_the_soft_value():
    s = setting(quadratic, steps=20)

    def pulled(alpha: float) -> Any:
        tilt = GAUSSIAN.tilted(C, torch.eye(3, dtype=torch.float64), strength=1 / alpha).mixture
        return lambda x, t: (alpha * (tilt.score(x.double(), t.double(), FLOW)
                                      - GAUSSIAN.score(x.double(), t.double(), FLOW))).to(x)  # fmt: skip

    told: list[str] = []
    truths = Truths(pulled(1e5), pulled(1.0))
    moment, late = measure(s, [16, 8], 6, 32, "closed form", 64, truths, told.append)
    assert (moment.step, late.step, len(told)) == (8, 16, 2)
    tweedie = moment.rows["tweedie"]
    assert tweedie.bias < 0.01 and tweedie.cosine > 0.999 and tweedie.variance == 0 and tweedie.cost == 3
    t = moment.t
    v = S0**2 * t**2 / ((1 - t) ** 2 * S0**2 + t**2)
    assert moment.soft == pytest.approx(v / (1 + v), rel=1e-3)
    assert moment.noise == 0 and moment.kind == "closed form"
    assert moment.rows["16 siblings, SDE"].cost == 1 + 16 * 11
    assert moment.rows["terminal x J"].variance > 0


def test_zeroth_order_and_pathwise_references_give_the_same_audit():
    s = setting(linear, seed=3)
    by = {kind: measure(s, [3], 6, 4000, kind, 64)[0] for kind in ("pathwise", "zeroth order")}
    assert by["zeroth order"].certain and by["pathwise"].certain
    ratio_ = by["zeroth order"].truth2 / by["pathwise"].truth2
    assert ratio_ == pytest.approx(1, abs=0.1)
    for name in ("tweedie", "adjoint", "terminal x J"):
        assert by["zeroth order"].rows[name].along == pytest.approx(by["pathwise"].rows[name].along, abs=0.1)
    assert by["pathwise"].noise < by["zeroth order"].noise / 10


# statistics


def test_the_variance_of_siblings_falls_as_one_over_k_and_the_group_mean_shrinks():
    s = fine().schedule
    noise = torch.randn(60_000, 3, generator=seeded())
    rewards = noise @ A.float() + 0.5 * torch.randn(60_000, generator=seeded(1))
    truth = float(s.omega[20] / s.sigma[20]) * A
    variance = {}
    for n in (4, 16, 64):
        found = zeroth(rewards, noise, 20, s, n)
        assert len(found) == 60_000 // n
        assert (found.mean(0) - truth).norm() < 0.05 * truth.norm()  # T4: leave-one-out has no bias
        variance[n] = n * float(found.var(0).sum())
    assert variance[16] == pytest.approx(variance[64], rel=0.1)
    assert variance[4] == pytest.approx(variance[64], rel=0.4)


def test_the_references_noise_is_subtracted_without_bias():
    d, trials = 40, 4000
    truth, bias = torch.ones(d), torch.full((d,), 0.3)
    g = seeded()
    rows = torch.stack([
        compare(truth + bias + torch.randn(4, d, generator=g), truth + torch.randn(d, generator=g),
                truth + torch.randn(d, generator=g))
        for _ in range(trials)
    ])  # fmt: skip
    bias2, along, size, variance, norm2 = rows.mean(0).tolist()
    error = float(rows[:, 0].std()) / trials**0.5
    assert abs(bias2 - 0.09 * d) < 4 * error  # the plain square would be 3.6 + 10 + 20
    assert along == pytest.approx(1.3 * d, rel=0.02) and size == pytest.approx(1.69 * d, rel=0.02)
    assert variance == pytest.approx(d, rel=0.02) and norm2 == pytest.approx(d, rel=0.02)


def test_the_jackknifes_error_is_that_of_repeated_draws():
    g = seeded()
    lower = 1 + torch.rand(500, 20, generator=g, dtype=torch.float64)
    upper = 0.5 * lower + 0.3 * torch.randn(500, 20, generator=g, dtype=torch.float64)
    found = [ratio(u, w) for u, w in zip(upper, lower, strict=True)]
    seen = torch.tensor([value for value, _ in found]).std()
    output = torch.tensor([error for _, error in found]).mean()
    assert float(output / seen) == pytest.approx(1, abs=0.15)


def test_a_row_says_what_it_can_tell():
    row = Row(-0.1, 0.08, 0.9, 0.1, 1.0, 3.0, 9)
    assert row.bias == 0 and row.floor == pytest.approx(0.4)
    assert row.cosine == pytest.approx(0.9) and row.turned == pytest.approx(math.sqrt(0.19))
    assert math.isnan(replace(row, size=-0.1).cosine)


# strengths, trust regions


@pytest.mark.parametrize(
    ("trust", "clip"), [("clip", 0.1), ("hinge", 0.05), ("guard-hinge", 0.05), ("fair-hinge", 0.05)]
)
def test_break_points_hold_in_simulation(trust, clip):
    s = schedule(FLOW, flow_grid(6), "velocity", "flow-sde", 0.7)
    d = 12
    at = breaks(s, trust, clip)
    g = seeded()
    noise = torch.randn(40_000, d, generator=g, dtype=torch.float64)
    for k in (0, 3, 5):
        way = torch.randn(d, generator=g, dtype=torch.float64)
        move = (at[k] * way / way.norm()).expand(len(noise), d)
        w = s.w[k].expand(len(noise))
        log_rho = L.log_ratio(move, torch.zeros_like(move), noise, w)
        if trust == "guard-hinge":
            log_rho = w * L.dot(move, noise)
        sigma = s.sigma[k].expand(len(noise))
        sign = torch.randn(len(noise), generator=g, dtype=torch.float64).sign()  # knows nothing of the noise
        held = L.clipped(log_rho, sign, trust, clip, sigma).double().mean()
        assert float(held) == pytest.approx(0.25, abs=0.01)
    assert torch.allclose(outside(at, s, trust, clip), torch.full_like(at, 0.5), atol=1e-6)
    assert bool((outside(at * 1.1, s, trust, clip) > 0.5).all())


def test_the_fair_hinge_breaks_at_one_displacement_of_x_and_the_hinge_at_one_of_log_rho():
    s = schedule(FLOW, flow_grid(10, 3.0), "velocity", "flow-sde", 0.7)
    plain, fair = breaks(s, "hinge", 0.01), breaks(s, "fair-hinge", 0.01)
    assert torch.allclose(plain * s.w.abs(), (plain * s.w.abs())[:1].expand(10))
    assert float(plain.max() / plain.min()) > 10 * float(fair.max() / fair.min())
    assert bool(breaks(s, "none", 0.1).isinf().all())


def test_strengths_of_recipes():
    s = schedule(FLOW, flow_grid(10, 3.0), "velocity", "flow-sde", 0.7)
    h = {name: outlook(name, AlignConfig.preset_of(name, "laptop", {}), s, 1.0) for name in RECIPES}
    assert h["pcpo-diffusion"] is None
    assert torch.allclose(h["flow-grpo"].h, (s.w * s.sigma).abs() / 2)
    assert torch.allclose(h["tempflow-grpo"].h[:9], (2.25 * s.sigma * (s.w * s.sigma).abs() / 2)[:9])
    assert h["tempflow-grpo"].silenced == [9] and h["rsm-branch-sd35"].silenced == [4, 5, 6, 7, 8, 9]
    assert h["rsm-branch-sd15"].silenced == [1, 3, 5, 7, 9] and h["draft"].silenced == list(range(9))
    assert h["rsm-terminal-sd35"].silenced[0] == 0
    assert h["vgg-flow"].estimator == "tweedie, identity" and h["nft"].estimator is None
    assert all(bool(one.h.isfinite().all()) for one in h.values() if one)


def perfect(s: Any, truth2: float = 1.0, rows: Any = None) -> list[Moment]:
    same = Row(0.0, 0.01, 1.0, 0.01, 1.0, 0.0, 1)
    names = ("16 siblings, SDE", "16 siblings, ODE", "tweedie", "tweedie, identity", "tweedie, next", "lookahead",
             "adjoint", "terminal x omega", "terminal x J", "terminal x linear, ODE")  # fmt: skip
    return [
        Moment(k, float(s.t[k]), {n: (rows or {}).get(n, same) for n in names}, "pathwise", truth2, 0.0, 0.0, True, {},
               0.5 if k < 4 else 0.1, 0.5)
        for k in (0, 4, 9)
    ]  # fmt: skip


def test_a_perfect_estimator_loses_by_its_strengths_alone():
    s = schedule(FLOW, flow_grid(10, 3.0), "velocity", "flow-sde", 0.7)
    found = {
        one.name: one
        for one in outlooks({n: AlignConfig.preset_of(n, "laptop", {}) for n in RECIPES}, s, 1.0, perfect(s))
    }
    flow = found["flow-grpo"]
    assert flow.of_estimator == pytest.approx(1) and flow.hurts == "strength per step"
    a, b = s.w.abs() * flow.h / s.omega, s.sigma / s.omega
    assert flow.of_strength == pytest.approx(float(a @ b / a.norm() / b.norm()))
    assert flow.of_noise == pytest.approx(flow.of_strength)
    assert all(one.of_strength <= one.of_estimator + 1e-9 for one in found.values() if one.estimator)
    assert math.isnan(found["nft"].of_noise) and found["nft"].hurts == "not measured"


def test_the_recommendation_follows_the_numbers():
    s = schedule(FLOW, flow_grid(10, 3.0), "velocity", "flow-sde", 0.7)
    presets = {n: AlignConfig.preset_of(n, "laptop", {}) for n in RECIPES}
    noisy = Row(0.0, 0.1, 1.0, 0.1, 1.0, 500.0, 161)
    skewed = Row(0.8, 0.01, 0.3, 0.01, 1.0, 0.0, 1)
    off = ("tweedie", "tweedie, identity", "adjoint", "lookahead", "tweedie, next")
    rows = dict.fromkeys(("16 siblings, SDE", "16 siblings, ODE"), noisy) | dict.fromkeys(off, skewed)
    moments = perfect(s, rows=rows)
    words = recommend(outlooks(presets, s, 1.0, moments), s, moments, True, 512, 0.1)
    assert words.startswith(("Use rsm-terminal", "Use gaussian-terminal")) and "points 95% off" in words
    blind = [replace(m, rows={}, certain=False) for m in moments]
    words = recommend(outlooks(presets, s, 1.0, blind), s, blind, False, 512, 0.1)
    assert words.startswith("Use rsm-branch-sd35. The reward is a black box") and "fair-hinge" in words
    even = [replace(m, spread=0.3) for m in blind]
    assert recommend(outlooks(presets, s, 1.0, even), s, even, False, 512, 0.1).startswith("Use rsm-branch-sd15.")
    flat = [replace(m, spread=0.0) for m in blind]
    faint = [replace(m, spread_sde=0.005) for m in even]
    assert "little to gain" in recommend(outlooks(presets, s, 1.0, faint), s, faint, False, 512, 0.1)
    assert "never differ" in recommend(outlooks(presets, s, 1.0, flat), s, flat, False, 512, 0.1)
    assert float(decided(even, 10).sum()) == pytest.approx(1)


def test_numbers_between_measured_times():
    assert along_steps([2, 4], [1.0, 3.0], 7).tolist() == [1, 1, 1, 2, 3, 3, 3]
    assert along_steps([3], [2.0], 4).tolist() == [2, 2, 2, 2]


def test_pathwise_is_the_chains_own_gradient():
    s = setting(quadratic, mixture=triangle3())
    x = s.model.noise(5, seeded()).requires_grad_(True)
    who = one(x)
    states = follow(s, x.detach(), 4, who, seeded(1))
    ours = pathwise(s, states, 4, who)
    follow_ = follow.__wrapped__ if hasattr(follow, "__wrapped__") else follow
    ends = follow_(s, x, 4, who, seeded(1))[-1]
    (truth,) = torch.autograd.grad(quadratic(ends, None).sum(), x)
    assert torch.allclose(ours, truth, rtol=1e-3, atol=1e-5)


def triangle3() -> Mixture:
    """The triangle in three dimensions."""
    means = torch.cat((triangle().means, torch.zeros(3, 1, dtype=torch.float64)), 1)
    return isotropic(means, 1.0)


# the command

TINY = ["--model", "zoo:shapes-flux-small", "--times", "2", "--states", "3", "--samples", "16", "--steps", "4"]


def test_a_model_of_the_users_own_is_audited_at_published_thresholds_where_there_are_some(tmp_path, small_flux_folder):
    words = ["diagnose", "audit", "--model", str(small_flux_folder), "--reward", "brightness", "--prompts",
             "a red circle", "--steps", "4"]  # fmt: skip
    small = ["--times", "1", "--states", "2", "--samples", "16", "--chunk", "64"]
    assert main([*words, *small, "--out", str(tmp_path / "run")]) == 0
    recipes = json.loads((tmp_path / "run" / "metrics.json").read_text())["recipes"]
    assert {"flow-grpo", "draft", "gaussian-terminal"} <= recipes.keys()


def test_the_command_on_a_model_and_a_differentiable_reward(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["diagnose", "audit", *TINY, "--out", str(out)]) == 0
    assert {f.name for f in out.iterdir()} == {"config.toml", "metrics.json", "report.html"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["instrument"] == "audit" and metrics["reference"] == "pathwise"
    assert metrics["nfe"] > 0
    assert [m["step"] for m in metrics["times"]] == [0, 3]
    assert {"tweedie", "adjoint", "16 siblings, ODE"} <= set(metrics["times"][1]["variances"])
    assert metrics["recommendation"].split()[1].strip(".") in RECIPES
    page = (out / "report.html").read_text()
    assert metrics["recommendation"][:30] in page.replace("&#39;", "'") and "<svg" in page
    assert "Use " in " ".join(capsys.readouterr().err.split())
    assert main(["diagnose", "audit", *TINY, "--out", str(out)]) == 0 and "is complete" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_black_box_has_zeroth_order_rows_only(tmp_path):
    assert main(["diagnose", "audit", *TINY, "--reward", "right", "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["reference"] == "zeroth order"
    assert all("siblings" in name for m in metrics["times"] for name in m["variances"])
    assert "need a differentiable reward" in (tmp_path / "run" / "report.html").read_text()


def test_an_exact_world_is_held_against_its_closed_form(tmp_path):
    words = ["--model", "world:triangle", "--reward", "linear", "--steps", "12", "--states", "4", "--samples", "16"]
    assert main(["diagnose", "audit", *words, "--out", str(tmp_path / "a")]) == 0
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["reference"] == "closed form" and not metrics["times"][0]["certain"]  # t = 1 says nothing of x_0
    assert metrics["times"][2]["estimators"]["tweedie"]["bias"] < 0.01 and metrics["times"][2]["soft"] > 0
    few = ["--steps", "4", "--times", "1", "--states", "2", "--samples", "8", "--reference", "zeroth-order"]
    assert main(["diagnose", "audit", *words[:4], *few, "--out", str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["reference"] == "zeroth order"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--times", "11"], "times=11 is more than the sampler's 10 steps"),
        (["--sde", "ddim", "--steps", "4", "--times", "4"], "times=4 is more than the 3 steps that draw noise"),
        (["--reward", "clasifier"], "'clasifier'.*did you mean 'classifier'"),
        (["--samples", "4"], "samples=4 must be at least 8"),
        (["--states", "1"], "states=1 must be at least 2"),
        (["--temperature", "0"], "temperature=0.0 must be above 0"),
        (["--model", "world:circle"], "'world:circle'.*audit's exact worlds"),
        (["--model", "world:triangle"], "'classifier'.*rewards of world:triangle"),
        (["--sde", "ddim-uniform"], "sde 'ddim-uniform' does not fit"),
        (["--prompts", "a rde star"], "'rde'.*did you mean 'red'"),
        (["--state", "3"], "'--state'.*did you mean '--states'"),
        (["--reward", f"{__file__}:same", *TINY[2:]], "gave the same value .0.5. to all 192 images"),
    ],
    ids=lambda part: " ".join(part[:2]) if isinstance(part, list) else "",
)
def test_bad_input_is_one_sentence_and_nothing_is_written(capsys, tmp_path, monkeypatch, words, says):
    import re

    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    model = [] if "--model" in words else TINY[:2]
    assert main(["diagnose", "audit", *model, *words, "--out", str(tmp_path / "run")]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(says, sentence), sentence
    assert not (tmp_path / "run").exists()


def same(images: Tensor, prompts: Any) -> Tensor:
    return torch.full((len(images),), 0.5)


def test_no_out_and_small_chunks_are_refused(capsys):
    assert main(["diagnose", "audit"]) == 2
    assert "no out folder given; add --out" in capsys.readouterr().err
    with pytest.raises(InputError, match="chunk=2 must be at least 8"):
        AuditConfig(chunk=2).check()
