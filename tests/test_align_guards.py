"""What a review of `align` found, each as a test: learned fields, windows, priors, thresholds, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fieldsmith import verb
from fieldsmith.errors import InputError, RunError
from fieldsmith.methods.align.collect import collect, log_ratio_slope
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.context import AlignContext
from fieldsmith.methods.align.step import Inputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.methods.policy import losses as L
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.models.exact import Exact
from fieldsmith.paths import VariancePreserving
from fieldsmith.read import read_prompts
from fieldsmith.rewards import Reward
from fieldsmith.samplers import ddim_grid, gaussian_step
from fieldsmith.training import Log
from fieldsmith.worlds.mixtures import isotropic

PATH = VariancePreserving((1 - torch.linspace(1e-4, 0.03, 500, dtype=torch.float64)).cumprod(0))
STEPS = 5
LINEAR = Reward("linear", True, lambda x, prompts: 3 - x[:, 0] / 2)


def preset(name: str, scale: str = "laptop") -> AlignConfig:
    return AlignConfig.preset_of(name, scale, {})


def align(model: Model, config: AlignConfig, reward: Reward) -> None:
    verb.train(ALIGN, model, config, Inputs(reward))


def toy(seed: int = 0) -> Exact:
    """One Gaussian, with a correction that is not 0."""
    one = isotropic(torch.tensor([[0.5, -1.0]], dtype=torch.float64), 0.8)
    model = Exact(one, PATH, ddim_grid(PATH, STEPS), seed=seed)
    model.unfreeze("all")
    with torch.no_grad():
        model.network.last.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    return model


def settings(name: str, **changes: object) -> AlignConfig:
    return replace(preset(name), prompts=("",), steps=STEPS, prompts_per_epoch=1, rollouts=6, **changes)


def test_the_reverse_slope_is_that_of_the_two_densities():
    """grad_x log pi / pi_ref at a fixed next state, against central differences: the means move with x too."""
    model = toy()
    setting = AlignContext.of(model, settings("residual-nabla-db-full"), LINEAR)
    rows = collect(setting, 0, Log()).rollout.transitions
    slope = log_ratio_slope(setting, rows)

    def log_ratio(x: torch.Tensor) -> torch.Tensor:
        found = torch.empty(len(x))
        for k in rows.step.unique().tolist():
            at = rows.step == k
            t, t_next = setting.schedule.times[k].float(), setting.schedule.times[k + 1].float()
            own = gaussian_step("ddim", setting.predict(x[at], t, rows.prompt[at]), t_next, 1.0, t)
            with model.reference():
                base = gaussian_step("ddim", setting.predict(x[at], t, rows.prompt[at]), t_next, 1.0, t)
            found[at] = own.log_prob(rows.x_next[at]) - base.log_prob(rows.x_next[at])
        return found

    with torch.no_grad():
        for axis in range(2):
            shift = torch.zeros(2)
            shift[axis] = 1e-2
            central = (log_ratio(rows.x + shift) - log_ratio(rows.x - shift)) / 2e-2
            torch.testing.assert_close(slope[:, axis], central, rtol=0.02, atol=0.02)


class Optimal(torch.nn.Module):
    """What the optimum of a linear reward adds to the eps of one Gaussian; off (0) in the reference."""

    def __init__(self, variance: float):
        super().__init__()
        self.on = torch.nn.Parameter(torch.zeros(()))
        self.variance = variance

    def guidance(self, t: torch.Tensor) -> torch.Tensor:
        a2 = PATH.alpha(t) ** 2
        J = PATH.alpha(t) * self.variance / (a2 * self.variance + 1 - a2)
        return J[:, None] * torch.tensor([-0.5, 0.0])

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -self.on * PATH.sigma(t)[:, None] * self.guidance(t)


def test_at_the_optimum_the_reverse_slope_is_minus_the_guidance():
    """Detailed balance's gradient: grad V(x) + grad_x log pi / pi_ref = 0, up to the discretisation, where pi = pi*."""
    model = toy()
    model.remove_training()
    model.network = Optimal(0.64)
    model.grid_times = ddim_grid(PATH, 50)
    model.unfreeze("all")
    with torch.no_grad():
        model.network.on.fill_(1.0)
    setting = AlignContext.of(model, replace(settings("residual-nabla-db-full"), steps=50), LINEAR)
    rows = collect(setting, 0, Log()).rollout.transitions
    truth = model.network.guidance(setting.schedule.times[rows.step].float())
    early = rows.step < 30  # a step later on changes the variance by as much as is left
    torch.testing.assert_close(log_ratio_slope(setting, rows)[early], -truth[early], rtol=0.15, atol=2e-3)


def test_the_prior_of_the_gaussian_terminal_gradient_is_that_within_prompts():
    model = load("zoo:shapes-flux-small")
    far = ("a red circle", "a blue star", "a green cross", "a yellow ring")
    config = replace(preset("gaussian-terminal"), prompts=far)
    many = AlignContext.of(model, config, LINEAR).prior
    alone = [AlignContext.of(model, replace(config, prompts=(prompt,)), LINEAR).prior for prompt in far]
    assert many == pytest.approx(sum(alone) / 4, rel=0.25)


def test_clip_bounds_nats_of_the_whole_at_every_size():
    """With `dim` the released clip: rho of a mean, whose threshold is clip nats of the sum, weight one inside."""
    log_rho = torch.linspace(-9.0, 9.0, 13, requires_grad=True)
    for sign in (1.0, -1.0):
        advantage = torch.full((13,), sign)
        loss = L.policy_loss(log_rho, advantage, torch.ones(13), "clip", 6.6, torch.ones(13), dim=65_536)
        (slope,) = torch.autograd.grad(loss.sum(), log_rho)
        free = sign * log_rho.detach() < 6.6
        torch.testing.assert_close(slope, -sign * free.float(), rtol=1e-3, atol=1e-3)
        held = L.clipped(log_rho.detach(), advantage, "clip", 6.6, torch.ones(13), dim=65_536)
        assert torch.equal(held, ~free)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preset": "adjoint-matching", "window": (0, 3)}, "hides the end from estimator 'adjoint'"),
        ({"preset": "dag", "window": (0, 3)}, "hides the end"),
        ({"preset": "vgg-flow-full", "window": (1, 3)}, "hides the end"),
        ({"preset": "flow-grpo", "auxiliary": "value"}, "'value' does not go with estimator 'reverse-noise'"),
        ({"preset": "sqdf", "auxiliary": "baseline"}, "'baseline' does not go with estimator 'tweedie'"),
        ({"preset": "dag", "auxiliary": "none"}, "flow goes with balance"),
        ({"preset": "flow-grpo", "strength": "linear"}, "strength 'linear' is a first-order recipe's"),
        ({"preset": "reinforce", "window": (0, 9)}, "window .* leaves some out"),
        ({"preset": "rsm-branch-sd35", "shared_noise": True}, "all ODE roots of a prompt are one"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, says):
    base = preset(changes["preset"])
    with pytest.raises(InputError, match=says):
        replace(base, **changes).check()


def test_branches_without_a_drawn_step_are_refused_and_the_model_stays_free():
    model = load("zoo:shapes-flux-small")
    config = replace(preset("rsm-branch-sd35"), prompts=("a red circle",), window=(5, 9))
    bright = Reward("brightness", True, lambda images, prompts: images.mean((1, 2, 3)))
    for _ in range(2):  # the second time, too: a refusal leaves nothing attached
        with pytest.raises(InputError, match="leaves no branch"):
            align(model, config, bright)
    align(model, replace(preset("nft"), prompts=("a red circle",), epochs=1, rollouts=2), bright)


def test_scales_that_were_never_published_are_refused():
    with pytest.raises(InputError, match="no published sizes are known for preset 'draft'"):
        preset("draft", "paper")


def test_a_pathwise_reward_that_breaks_is_named():
    broken = Reward("broken", True, lambda images, prompts: images.mean((1, 2, 3)) * float("nan"))
    with pytest.raises(RunError, match="'broken' returned nan for image 1"):
        align(load("zoo:shapes-flux-small"), replace(preset("draft"), prompts=("a red circle",)), broken)


def test_prompt_files_and_long_prompts(tmp_path):
    long = "a very long prompt " * 40
    assert read_prompts((long,)) == (long,)
    file = tmp_path / "words.txt"
    file.write_text("\ufeff a red star \r\n\r\na blue ring\n", encoding="utf-8")
    assert read_prompts((str(file),)) == ("a red star", "a blue ring")
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts((str(tmp_path / "absent.txt"),))
    file.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(InputError, match="UTF-8"):
        read_prompts((str(file),))
