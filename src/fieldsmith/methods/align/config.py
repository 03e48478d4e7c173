"""Settings of `align`, which are also the command line's flags, and the recipes: each known method as a few of them.

A recipe says what a method is; PAPER holds the scale that it was published at, LAPTOP the one for our zoo.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from fieldsmith.config import (
    GIVEN,
    Config,
    Count,
    DataConfig,
    LoraConfig,
    MemoryConfig,
    Natural,
    NonNegative,
    OptimConfig,
    Pixels,
    Positive,
    SamplerSteps,
    Words,
    config,
)
from fieldsmith.errors import InputError, check_word
from fieldsmith.read import PAIR, read_prompts
from fieldsmith.rewards import parse

Estimator = Literal["reverse-noise", "nft", "awm", "tweedie", "terminal", "adjoint", "pathwise", "balance", "dpo"]
FIRST_ORDER = ("tweedie", "terminal", "adjoint", "pathwise")
REGRESSIONS = ("tweedie", "terminal", "adjoint")


@config
class AlignConfig(Config, LoraConfig, OptimConfig, DataConfig, MemoryConfig):
    """Raise a reward by reward score matching or by one of the methods that it unifies (`--preset`)."""

    FIRST = (
        "model", "reward", "prompts", "held_out_rewards", "epochs", "rollouts", "steps", "guidance", "lr", "evaluate",
        "out",
    )  # fmt: skip
    NOTES: ClassVar[str] = ""  # filled in below, where the recipes are

    model: str = "zoo:shapes-flux"
    """A diffusers pipeline folder, a hub id, or a zoo model."""
    reward: str = "right"
    """A reward, a weighted sum of rewards, or a function of yours: `classifier`, `right+0.1*brightness`,
    `mine.py:score`."""
    prompts: Words = ()
    """Prompts to train on, or one text file with a prompt a line; a zoo model's captions where empty."""
    pairs: str = ""
    """dpo: a file with a line {"prompt": ..., "chosen": "a.png", "rejected": "b.png"} a pair, or Pick-a-Pic rows."""
    held_out_rewards: Words = ()
    """Rewards that are only measured, before and after, to see reward hacking."""
    resolution: Pixels | None = None
    """Image side in pixels; None: the model's own, at most 512."""
    preset: str = ""
    """The recipe that these settings came from; a name for the record."""

    estimator: Estimator = "reverse-noise"
    """How the value's gradient is estimated: from drawn noise, re-noised endpoints, the reward's own, or from pairs."""
    state: Literal["current", "next"] = "next"
    """Where a first-order gradient is taken; next-state ones carry omega."""
    jacobian: Literal["full", "identity"] = "full"
    """Of the Tweedie estimate: through the network, or with its output held constant."""
    lookahead: Annotated[int, Field(ge=0, le=1_000)] = 0
    """ODE steps of the sampler before the Tweedie estimate is read off."""
    truncate: Count = 1
    """Pathwise: how many last steps the gradient passes (DRaFT-K)."""
    random_stop: bool = False
    """Pathwise: stop at a random late step and read x_0 off there (ReFL)."""
    soft: bool = False
    """Subtract the later steps' log-ratios to the reference from the reward (r_tilde: no bias)."""
    auxiliary: Literal["none", "baseline", "flow", "residual", "value"] = "none"
    """A learned helper: DPOK's baseline, DAG's flow, residual nabla-DB's g_phi, VGG-Flow's value gradient."""
    advantage: Literal["std", "global-std", "mean", "leave-one-out", "raw"] = "std"
    """How rewards are centred within a group; global-std divides by the deviation of the whole collection."""
    group_by: Literal["prompt", "root"] = "prompt"
    """Whose rewards are compared at a step: those of a prompt, or of the branches of one state."""
    advantage_clip: Positive = 5.0
    """Largest advantage of 'std' and 'global-std'."""
    temperature: Positive = 1.0
    """alpha (dpo's beta): the target is p_ref exp(r / alpha); normalised advantages see it through `kl` only."""

    rollout: Literal["sde", "ode", "branches", "tree"] = "sde"
    """Independent SDE, ODE, an ODE root with one-step branches, or a tree."""
    sde: Literal["auto", "flow-sde", "dance-sde", "cps", "ddim", "ddim-uniform"] = "auto"
    """The stochastic step; auto: flow-sde on flows, ddim elsewhere."""
    noise_level: Positive | None = None
    """Its noise; None: 0.7 for flow-sde, 0.3 for dance-sde, 0.8 for cps, 1 for ddim, 4.5 for ddim-uniform."""
    branches: tuple[Annotated[int, Field(ge=0, le=1_000)], ...] = (4,)
    """Children by step of branches and trees; one number: at every noisy step."""
    window: tuple[int, int] | None = None
    """First and last step that is drawn and trained; the ODE elsewhere. None: every step with a density."""
    shared_noise: bool = False
    """One initial noise for all rollouts of a prompt; of dpo: one noise for both images of a pair."""
    renoise: Count = 4
    """Times at which each endpoint (nft, awm) or pair (dpo) is noised."""
    train_steps: Count | None = None
    """Train the last step and one of each block, this many in all (where the last is not trained, any so many);
    None: all."""
    last_step: Literal["train", "draw", "ode"] = "train"
    """The sampler's last step: trained as the others, drawn but not trained (Flow-GRPO), or the ODE's (DanceGRPO)."""

    strength: Literal[
        "ratio", "tempflow", "pcpo", "guard", "discount", "squared", "base-snr", "quadratic", "linear", "jacobian"
    ] = "ratio"
    """How hard it pulls at each step (C1 and gamma, by a method's name)."""
    trust: Literal["none", "clip", "hinge", "guard-hinge", "fair-hinge"] = "none"
    """What keeps the policy near the one that made the rollouts."""
    clip: Positive = 0.1
    """The trust region's radius: nats of a step's log-ratio (times sigma^2 for fair-hinge, sigma for guard-hinge)."""
    proximal: NonNegative = 0.0
    """Weight of |f - f_old|^2 on the network's output (C2)."""
    kl: NonNegative = 0.0
    """Weight of the exact KL to the reference at every trained step."""
    kl_scale: Literal["exact", "dt"] = "exact"
    """dt: each step's KL is multiplied by its length in time, as Flow-GRPO has it."""
    anchor: NonNegative = 0.0
    """Weight of the same on the root's ODE states where nothing branches."""
    nft_beta: Positive = 0.1
    """NFT's distance of the two implied policies."""
    adaptive: bool = True
    """NFT: divide each branch by its own mean absolute error."""
    old: Literal["fresh", "ramp", "late"] = "fresh"
    """NFT's old policy after an epoch: the new one; or theta_old <- eta theta_old + (1 - eta) theta with eta rising by
    0.001 an update to 0.5, or by 0.0075 from update 75 on to 0.999."""
    awm_weight: Literal["uniform", "ghuber"] = "uniform"
    """AWM's pseudo-log-likelihood of an error e at time t: -e, or -4 t e^(1/4)."""
    dpo_weight: Literal["uniform", "posterior"] = "uniform"
    """DPO's weight of the network's squared error: the same at all times, or 1 / Var(x_0 | x_t) of x_0's."""

    steps: SamplerSteps = 10
    """Sampler steps in training."""
    guidance: float | None = None
    """Guidance scale in rollouts and loss (of dpo only in the pictures that are measured); None: off."""
    epochs: Count = 100
    """Collections of rollouts."""
    prompts_per_epoch: Count = 8
    """Prompts in a collection; of dpo: pairs in an update."""
    rollouts: Count = 8
    """Roots of each prompt in a collection."""
    updates: Count = 1
    """Optimiser steps on one collection."""
    chunk: Count = 256
    """States per forward; lower it when memory is short."""
    trajectories: Literal["device", "cpu"] = "device"
    """Where rollouts wait; cpu when the accelerator's memory is short."""

    lr: Positive = 3e-4
    """AdamW's learning rate."""
    weight_decay: NonNegative = 1e-4
    """AdamW's weight decay."""
    gradient_clip: Positive = 1.0
    """Largest gradient norm."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the averaged weights that are kept."""
    ema_every: Count = 1
    """Updates from one step of that average to the next."""
    evaluate: Natural = 8
    """Images per prompt in the report's evaluation, of up to 64 prompts; 0 trains and saves only."""

    @classmethod
    def preset_of(cls, name: str | None, scale: str | None, given: Mapping[str, Any]) -> Self:
        name = name or given.get("preset") or "flow-grpo"
        check_word(name, tuple(RECIPES), "align's presets")
        zoo = str(given.get("model", cls.model)).startswith(("zoo:", "world:"))
        scale = scale or ("paper" if name in PAPER and not zoo else "laptop")
        if scale not in ("laptop", "paper"):
            raise InputError(f"scale '{scale}' is unknown; use laptop or paper")
        if scale == "laptop":
            return cls(**{"preset": name, **LAPTOP, **RECIPES[name]})
        if name not in PAPER:
            raise InputError(f"no published sizes are known for preset '{name}'; use --scale laptop and set your own")
        return cls(**{"preset": name, **RECIPES[name], **PAPER[name]})

    def check(self) -> None:
        _check_pairs(self)
        for words in (*((self.reward,) if self.estimator != "dpo" else ()), *self.held_out_rewards):
            if not words.startswith("function:"):  # a function that was given from Python
                parse(words)
        read_prompts(self.prompts)
        _check_branches(self)
        if self.window and not 0 <= self.window[0] <= self.window[1] < self.steps:
            raise InputError(f"window {self.window} does not fit {self.steps} sampler steps; use 0 {self.steps - 1}")
        if self.estimator == "pathwise" and self.truncate > self.steps:
            raise InputError(f"truncate={self.truncate} is more than the sampler's {self.steps} steps")
        grouped = self.estimator in ("reverse-noise", "nft", "awm") and self.advantage != "raw"
        if grouped and _siblings(self) < 2:
            raise InputError(
                f"rollouts={self.rollouts} compares each reward with itself alone, so every advantage is 0; "
                "use at least 2, 8 is a good start"
            )
        if self.soft and self.rollout not in ("sde", "tree"):
            raise InputError(
                f"soft needs the density of every later step, which rollout '{self.rollout}' lacks; use sde"
            )
        if self.soft and self.window:
            raise InputError(
                f"soft needs the density of every later step, window {self.window} leaves some out; drop it"
            )
        pairs = {"flow": "balance", "baseline": "reverse-noise", "residual": "tweedie", "value": "tweedie"}
        needs = pairs.get(self.auxiliary, self.estimator)
        if needs != self.estimator or (self.estimator == "balance" and self.auxiliary != "flow"):
            raise InputError(
                f"auxiliary '{self.auxiliary}' does not go with estimator '{self.estimator}'; flow goes with balance, "
                "baseline with reverse-noise, residual and value with tweedie"
            )
        whole = self.estimator in ("adjoint", "balance") or self.auxiliary == "value"
        if whole and self.window and self.window[1] < self.steps - 1:
            raise InputError(f"window {self.window} hides the end from estimator '{self.estimator}'; drop it")
        if self.last_step != "train":
            if whole or self.rollout == "ode":
                raise InputError(
                    f"last_step '{self.last_step}' leaves out a step that estimator '{self.estimator}' on rollout "
                    f"'{self.rollout}' needs; use --last-step train"
                )
            if self.steps < 2:
                raise InputError(
                    f"last_step '{self.last_step}' leaves none of steps={self.steps} to train; use 2 or more"
                )
        if self.old != "fresh" and self.estimator != "nft":
            raise InputError(f"old '{self.old}' is NFT's; estimator '{self.estimator}' has no old policy to keep")
        if self.ema and self.ema_every > self.epochs * self.updates:
            raise InputError(
                f"ema_every={self.ema_every} is more than the {self.epochs * self.updates} updates of this run, so "
                "that the average would keep the weights from before it; use --ema-every 1"
            )
        policy = self.estimator in ("reverse-noise", "balance")
        if policy and self.strength not in ("ratio", "tempflow", "pcpo", "guard"):
            raise InputError(
                f"strength '{self.strength}' is a first-order recipe's; use ratio, tempflow, pcpo or guard"
            )
        if self.shared_noise and self.rollout == "branches" and self.rollouts > 1:
            raise InputError("with shared_noise all ODE roots of a prompt are one; use rollouts 1 and more branches")
        drawn = self.estimator in ("reverse-noise", "balance", "adjoint")
        if drawn and self.rollout == "ode":
            raise InputError(f"estimator '{self.estimator}' needs drawn steps; use rollout sde, branches or tree")
        if self.estimator in REGRESSIONS and self.rollout not in ("ode", "sde"):
            raise InputError(f"estimator '{self.estimator}' takes whole trajectories; use rollout ode or sde")


Settings = dict[str, Any]
PPO: Settings = {"trust": "clip"}
BRANCHES: Settings = {"rollout": "branches", "group_by": "root", "rollouts": 2}
PAIRS: Settings = {"estimator": "dpo", "reward": "", "rollout": "ode"}
TERMINAL: Settings = {"estimator": "terminal", "rollout": "ode", "rollouts": 2}

# What each method is (RSM notes, sections 2 and 4). A branch schedule belongs to the number of steps it was made for.
RECIPES: dict[str, Settings] = {
    "reinforce": {"advantage": "raw", "kl": 1.0, "soft": True},
    "ddpo": {**PPO},
    "dpok": {**PPO, "advantage": "raw", "auxiliary": "baseline", "kl": 0.01},
    "rlcm": {**PPO, "steps": 4, "sde": "cps", "noise_level": 1.0},
    "draft": {"estimator": "pathwise", "truncate": 1, "rollout": "ode"},
    "refl": {"estimator": "pathwise", "random_stop": True, "rollout": "ode"},
    "adjoint-matching": {"estimator": "adjoint", "sde": "ddim"},
    "dag": {"estimator": "balance", "auxiliary": "flow"},
    "residual-nabla-db-full": {"estimator": "tweedie", "strength": "squared", "auxiliary": "residual", "proximal": 1.0},
    "residual-nabla-db": {"estimator": "tweedie", "strength": "squared", "proximal": 1.0},
    "sqdf": {"estimator": "tweedie", "strength": "discount", "lookahead": 1},
    "vgg-flow-full": {
        "estimator": "tweedie", "state": "current", "jacobian": "identity", "rollout": "ode", "strength": "quadratic",
        "auxiliary": "value",
    },
    "vgg-flow": {
        "estimator": "tweedie", "state": "current", "jacobian": "identity", "rollout": "ode", "strength": "quadratic",
    },
    "flow-grpo": {**PPO, "advantage": "global-std", "last_step": "draw", "kl": 0.04, "kl_scale": "dt"},
    "dance-grpo": {**PPO, "sde": "dance-sde", "shared_noise": True, "last_step": "ode", "train_steps": 5},
    "branch-grpo": {
        **PPO, "sde": "dance-sde", "rollout": "tree", "branches": (2, 1, 2, 1, 1, 2, 1, 1, 1, 1), "rollouts": 1,
        "last_step": "ode",
    },
    "grpo-guard": {"trust": "guard-hinge", "strength": "guard", "last_step": "draw", "kl": 0.004},
    "pcpo-diffusion": {"trust": "hinge", "strength": "pcpo", "sde": "ddim-uniform"},
    "pcpo-flow": {"trust": "hinge", "strength": "pcpo", "last_step": "draw"},
    "tempflow-grpo": {
        **PPO, **BRANCHES, "branches": (6, 6, 6, 6, 6, 6, 6, 6, 6, 0), "group_by": "prompt", "strength": "tempflow",
        "kl": 0.004,
    },
    "nft": {
        "estimator": "nft", "rollout": "ode", "advantage": "global-std", "nft_beta": 1.0, "old": "ramp", "kl": 0.0001,
    },
    "awm": {
        "estimator": "awm", "rollout": "ode", "advantage": "global-std", "awm_weight": "ghuber", "clip": 1.0,
        "kl": 0.001,
    },
    "dpo": {**PAIRS, "shared_noise": True},
    "dpo-posterior": {**PAIRS, "dpo_weight": "posterior"},
    "rsm-terminal-sd15": {**TERMINAL, "rollout": "sde", "strength": "base-snr", "train_steps": 6, "proximal": 1.0},
    "rsm-terminal-sd35": {**TERMINAL, "state": "current", "strength": "linear"},
    "rsm-branch-sd15": {
        **BRANCHES, "branches": (4, 0, 4, 0, 4, 0, 4, 0, 4, 0), "group_by": "prompt", "strength": "pcpo",
        "trust": "hinge", "anchor": 8e-5,
    },
    "rsm-branch-sd35": {
        **BRANCHES, "branches": (6, 6, 8, 10, 0, 0, 0, 0, 0, 0), "strength": "guard", "trust": "fair-hinge",
        "kl": 0.004, "anchor": 0.004,
    },
    "gaussian-terminal": {
        **TERMINAL, "rollout": "sde", "sde": "ddim", "state": "current", "strength": "jacobian",
    },
}  # fmt: skip

# The published scale (sections 4.1 to 4.4): SD3.5-medium and SD1.5, samples of a collection as on all of their GPUs.
# Released thresholds are of means over a latent's numbers (65,536 at 512 pixels of SD3.5, 16,384 of SD1.5); ours are of
# sums, so 1e-4 there is 6.6, 1.6 here. Other recipes have no published size here.
SD35: Settings = {
    "guidance": 4.5, "rank": 32, "alpha": 64, "lr": 3e-4, "prompts_per_epoch": 48, "epochs": 1081, "updates": 2,
    "clip": 6.6, "ema": 0.9, "ema_every": 8, "chunk": 12,
}  # fmt: skip
SD15: Settings = {
    "guidance": 5.0, "steps": 50, "rank": 16, "lr": 3e-4, "epochs": 300, "updates": 2, "clip": 1.6, "rollouts": 16,
    "chunk": 4,
}  # fmt: skip
SD15_FIRST: Settings = {
    **SD15, "rank": 8, "epochs": 100, "prompts_per_epoch": 32, "rollouts": 8, "train_steps": 11, "proximal": 100.0,
    "temperature": 2e-6, "chunk": 1,
}  # fmt: skip
SD35_FIRST: Settings = {
    "steps": 20, "guidance": 5.0, "rank": 8, "lr": 5e-4, "weight_decay": 1e-2, "epochs": 201, "prompts_per_epoch": 32,
    "rollouts": 1, "chunk": 4,
}  # fmt: skip
PAPER: dict[str, Settings] = {
    **{name: {**SD35, "rollouts": 24} for name in ("flow-grpo", "grpo-guard", "pcpo-flow")},
    **{name: {**SD35, "rollouts": 4} for name in ("tempflow-grpo", "rsm-branch-sd35")},
    "nft": {
        "rank": 32, "alpha": 64, "lr": 3e-4, "prompts_per_epoch": 48, "rollouts": 24, "epochs": 1081, "ema": 0.9,
        "renoise": 9, "chunk": 12,
    },
    # beta 5,000 of means over SD1.5's 16,384 numbers; its 500 updates of warm-up are left out
    "dpo": {
        "guidance": 7.5, "steps": 50, "full": True, "subset": "all", "lr": 2e-5, "weight_decay": 1e-2, "epochs": 2000,
        "prompts_per_epoch": 2048, "updates": 1, "renoise": 1, "temperature": 0.305, "chunk": 8,
    },
    **dict.fromkeys(("ddpo", "dpok", "pcpo-diffusion", "reinforce"), SD15),
    "sqdf": {**SD15, "temperature": 2.4e-4},  # alpha 2, of twice the KL as a mean over SD1.5's 16,384 numbers
    "dance-grpo": {**SD15, "train_steps": None},
    # the released anchor has 4.5 where the log-ratio's weight is 0.44 at most steps: 8e-5 there is 8.4e-3 here
    "rsm-branch-sd15": {
        **SD15, "rollouts": 5, "branches": tuple(4 if k % 10 == 0 else 0 for k in range(50)), "sde": "ddim-uniform",
        "anchor": 8.4e-3,
    },
    # whose loss is half of the release's, so that its 100 is 50 here
    **{name: {**SD15_FIRST, "lr": 1e-3, "proximal": 50.0} for name in ("residual-nabla-db", "residual-nabla-db-full")},
    "rsm-terminal-sd15": {**SD15_FIRST, "lr": 4e-3},
    **{name: {**SD35_FIRST, "temperature": 1 / 3e7} for name in ("vgg-flow", "vgg-flow-full")},
    "rsm-terminal-sd35": {**SD35_FIRST, "temperature": 1 / 1.5e7},
}  # fmt: skip
# One core, minutes. A latent of the zoo has 512 numbers, so the released threshold is about 0.05 nats.
LAPTOP: Settings = {
    "lr": 1e-3, "steps": 10, "prompts_per_epoch": 8, "epochs": 40, "updates": 2, "clip": 0.05, "temperature": 0.1,
}  # fmt: skip

AlignConfig.NOTES = f"""--preset NAME picks a recipe (default: flow-grpo): {", ".join(RECIPES)}.
--scale laptop|paper picks the numbers that it runs at (default: laptop for zoo models, else paper where
the recipe was published with code that says them).
--config FILE.toml (such as a run's config.toml) sets fields again, and flags come last."""


def _check_pairs(config: AlignConfig) -> None:
    if config.estimator != "dpo":
        if config.pairs:
            raise InputError(
                f"pairs are what dpo learns from, estimator '{config.estimator}' has no use; use --preset dpo"
            )
        return
    if config.reward:
        raise InputError(
            f"reward '{config.reward}' has no use with dpo, which learns from pairs; name it in --held-out-rewards to "
            "have it measured"
        )
    if not config.pairs:
        raise InputError(f"no pairs given; add --pairs FILE.jsonl with a line {PAIR} a pair")
    if not config.pairs.startswith(GIVEN) and not pathlib.Path(config.pairs).is_file():
        raise InputError(f"pairs file '{config.pairs}' does not exist; name a file of lines such as {PAIR}")


def _check_branches(config: AlignConfig) -> None:
    if config.rollout not in ("branches", "tree"):
        return
    if len(config.branches) > config.steps:
        raise InputError(
            f"the branch schedule has {len(config.branches)} entries, the sampler {config.steps} steps; shorten "
            "branches or raise steps"
        )
    if min(config.branches, default=0) < (1 if config.rollout == "tree" else 0) or max(config.branches, default=0) < 1:
        least = "1 everywhere" if config.rollout == "tree" else "0, and 1 somewhere"
        raise InputError(f"branches={config.branches} must be at least {least}")


def _siblings(config: AlignConfig) -> int:
    """How many rewards the smallest group compares."""
    if config.rollout == "branches":
        least = min((k for k in config.branches if k), default=1)
        return least if config.group_by == "root" else least * config.rollouts
    if config.rollout == "tree":
        return config.rollouts * math.prod(config.branches)
    return config.rollouts if config.group_by == "prompt" else 1
