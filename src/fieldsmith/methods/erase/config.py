"""Settings of `erase`, which are also the command line's flags; presets carry published and laptop numbers."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from fieldsmith.errors import InputError

Method = Literal["gem", "esd", "uce", "concept-ablation", "eraseflow", "eraseanything", "projection"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class EraseConfig:
    """Erase concepts from a rectified-flow model. Defaults are GEM as released for FLUX.1-dev."""

    targets: tuple[str, ...] = ()
    """Prompts to erase, e.g. `--targets triangle trigon`; one pair is drawn per step."""
    anchors: tuple[str, ...] = ()
    """What each target should give instead: one per target, or one for all."""
    model: str = "zoo:shapes-flux"
    """A diffusers pipeline folder, a hub id, or a zoo model."""
    out: pathlib.Path | None = None
    """The run directory to write (new, empty, or this same run interrupted)."""
    method: Method = "gem"
    """GEM or one of the baselines, sharing states, adapters and evaluation."""
    keep: tuple[str, ...] = ()
    """Prompts whose drift is logged; with `retain` > 0 also trained to stay. Empty: the empty prompt."""
    synonyms: tuple[str, ...] = ()
    """Other words for the target (EraseAnything's contrast only); empty: the target itself."""
    resolution: int | None = None
    """Image side in pixels; None: the model's own, at most 512."""
    seed: int = 0
    """Everything random follows from it."""

    eta: float = 1.0
    """Push away from the target: GEM's repulsion, or ESD's and EraseAnything's negative guidance."""
    gamma: float = 100.0
    """GEM's loss scale; under AdamW it hardly matters."""
    margin: float = 0.0
    """Relative margin kappa (ours): 0 is the paper's hinge, 1 stops exactly at the anchor when eta is 1."""
    timestep_weight: Literal["uniform", "tb"] = "uniform"
    """Weight of each state's hinge: uniform (the paper) or tb, trajectory-likelihood weights of mean 1."""
    retain: float = 0.0
    """Weight of the distance to the reference on `keep` prompts (ours), in units of the pull; 0 is the paper."""

    budget: int = 250
    """State evaluations to spend; GEM's released budget is 250 (23 steps of 11 states)."""
    batch: int = 1
    """Rollouts per step."""
    steps: int = 28
    """Sampler steps of a whole rollout."""
    window: tuple[int, int] = (1, 11)
    """First and last supervised state of a GEM rollout; state k lives at the grid's time k."""
    rollouts: Literal["student", "teacher"] = "student"
    """Whose rollouts GEM supervises."""
    rollout_guidance: float = 3.0
    """Guidance during rollouts (embedded where the model was distilled with one)."""
    loss_guidance: float = 1.0
    """Guidance in the loss's forwards."""
    official_pairing: bool = False
    """Pair state k with time k-1, as the released code does."""
    chunk: int = 6
    """States per forward; lower it when memory is short."""

    subset: str = "qk_dual"
    """Which layers train: a subset of the family (qk_dual, attention, all-linear, ...)."""
    full: bool = False
    """Train full weights of the subset instead of a LoRA."""
    rank: int = 16
    """LoRA rank."""
    alpha: float | None = None
    """LoRA alpha; None: equal to the rank."""
    dropout: float = 0.1
    """LoRA dropout, active in rollouts and loss as released."""
    lr: float = 1e-3
    """AdamW's learning rate; with the number of steps the true strength of the erasure."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""

    beta: float = 2.5
    """EraseFlow's log-reward."""
    noise_level: float = 0.7
    """Noise of EraseFlow's stochastic rollouts and of the tb weights."""
    prior: float = 0.0
    """Concept ablation's weight of the flow-matching loss on anchor images."""
    attention_weight: float = 1e-3
    """EraseAnything's weight of the attention on the keyword."""
    preserve_weight: float = 0.1
    """EraseAnything's weight of its preserving step."""
    uce_lambda: float = 0.5
    """UCE: how much the old weights weigh."""

    stop_active: float | None = None
    """Stop when the share of states with a positive hinge falls below this."""
    stop_lambda: float | None = None
    """Stop when the mean progress from target (0) to anchor (1) exceeds this."""
    stop_drift: float | None = None
    """Stop when the relative drift on kept prompts exceeds this."""
    evaluate: int = 16
    """Images per prompt in the report's evaluation."""
    attacks: bool = False
    """Also try to bring the concept back (learned word, free embeddings, relearning, other samplers and scales)."""


PRESETS: dict[str, dict[str, Any]] = {
    # released with the paper (FLUX.1-dev, 512 pixels); gore is the same with twice the budget
    "paper": {},
    "paper-gore": {"budget": 500},
    # released for SD3 and SD3.5: 40 steps, stop index 10, a fifth of the learning rate
    "paper-sd3": {"lr": 2e-4, "steps": 40},
}
# The baselines' released settings; EraseFlow's EMA and the Gaussian initial draws of it and EraseAnything are left out.
PAPER: dict[str, dict[str, Any]] = {
    "gem": {},
    "esd": {"eta": 2.0, "lr": 1e-4, "subset": "attention-kv", "full": True, "budget": 200, "steps": 28},
    "uce": {"subset": "text-inputs", "full": True},
    "concept-ablation": {"lr": 8e-6, "batch": 4, "budget": 400, "subset": "attention-kv", "full": True},
    "eraseflow": {"rank": 32, "alpha": 64, "lr": 1e-5, "subset": "attention", "steps": 40, "budget": 800},
    "eraseanything": {"rank": 8, "lr": 1e-3, "weight_decay": 1e-5, "subset": "add_qk", "budget": 200},
    "projection": {},
}
# One core, minutes: the zoo's sizes, settled by the sweep in results/erase. On a model
# this small an adapter in the attention layers breaks unrelated prompts, one where text enters does not.
LAPTOP: dict[str, Any] = {
    "batch": 8,
    "chunk": 256,
    "dropout": 0.0,
    "rollout_guidance": 1.0,
    "subset": "text-inputs",
    "budget": 2_640,
    "lr": 3e-3,
}
TINY: dict[str, dict[str, Any]] = {
    "gem": {},
    "esd": {"eta": 2.0},
    "uce": {"full": True},
    "concept-ablation": {"batch": 32, "budget": 6_400},
    "eraseflow": {"steps": 14},
    "eraseanything": {"weight_decay": 1e-5, "budget": 1_600},
    "projection": {},
}
# What `make demo` runs: the laptop's GEM with our two options, which keep the rest of a small model.
DEMO: dict[str, Any] = {
    "margin": 1.0,
    "retain": 3.0,
    "budget": 4_400,
    "keep": (
        "a red shape", "a green shape", "a blue shape", "a yellow shape", "a colored circle", "a colored square",
        "a colored cross", "a colored ring", "a colored star", "",
    ),
}  # fmt: skip


def preset(name: str, method: str = "gem") -> EraseConfig:
    """The settings of a preset for a method. Raises InputError at an unknown name of either."""
    if method not in METHODS:
        raise InputError(f"method '{method}' is unknown; known: {', '.join(METHODS)}")
    base = EraseConfig(method=cast(Method, method))
    if name in ("tiny", "demo"):
        return replace(base, **{**LAPTOP, **TINY[method], **(DEMO if name == "demo" else {})})
    if name not in PRESETS:
        raise InputError(f"preset '{name}' is unknown; known: {', '.join((*PRESETS, 'tiny', 'demo'))}")
    if method != "gem" and name != "paper":
        raise InputError(f"preset '{name}' is GEM's; for method '{method}' use paper or tiny")
    return replace(base, **PAPER[method], **PRESETS[name])


def check(config: EraseConfig) -> None:
    """Refuse settings that cannot erase. Raises InputError with the value and the fix; needs no model."""
    if not config.targets:
        raise InputError("no target given; name what to erase, e.g. --targets triangle")
    if not config.anchors:
        raise InputError("no anchor given; name what the target should give instead, e.g. --anchors circle")
    if len(config.anchors) not in (1, len(config.targets)):
        raise InputError(
            f"{len(config.targets)} targets and {len(config.anchors)} anchors; give one anchor a target, or one for all"
        )
    for target, anchor in pairs(config):
        if " ".join(target.lower().split()) == " ".join(anchor.lower().split()):
            raise InputError(f"target '{target}' is its own anchor; name another anchor")
    positive = ("budget", "batch", "steps", "chunk", "rank", "evaluate")
    for name in positive:
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)} must be at least 1")
    first, last = config.window
    if not (0 if not config.official_pairing else 1) <= first <= last <= config.steps - 1:
        raise InputError(f"window {first}..{last} does not fit {config.steps} sampler steps; use 1..{config.steps - 1}")
    for name in ("lr", "gamma", "uce_lambda", "noise_level"):
        if not getattr(config, name) > 0:
            raise InputError(f"{name}={getattr(config, name)} must be above 0")
    if not 0 <= config.dropout < 1:
        raise InputError(f"dropout={config.dropout} must be in [0, 1)")
    for name in ("alpha", "resolution"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise InputError(f"{name}={getattr(config, name)} must be above 0")
    for name in ("eta", "margin", "retain", "weight_decay"):
        if not getattr(config, name) >= 0:
            raise InputError(f"{name}={getattr(config, name)} must not be negative")


def pairs(config: EraseConfig) -> list[tuple[str, str]]:
    """(target, anchor) pairs, a single anchor broadcast."""
    anchors = config.anchors * len(config.targets) if len(config.anchors) == 1 else config.anchors
    return list(zip(config.targets, anchors, strict=True))
