"""What an editing run is told: each field with its default and meaning, and the presets (MT-EditFlow notes, 2, 4)."""

from __future__ import annotations

import math
import pathlib
from dataclasses import dataclass, replace
from typing import Any, Literal

from fieldsmith.errors import InputError, check_word


@dataclass(frozen=True)
class EditConfig:
    """Train an editor on its own multi-turn sessions, so that later turns survive what earlier ones left behind."""

    model: str = "zoo:scenes-kontext"
    """A diffusers pipeline folder, a hub id, or a zoo model, that edits images."""
    sessions: str = "auto"
    """auto: the world that the model's card names; or a .jsonl file, a line {"image": ..., "instructions": [...]}."""
    judge: str = "exact"
    """exact (worlds only), or remote:http://HOST:PORT/v1?model=M&mode=expected&n=4, a server that sees images."""
    out: pathlib.Path | None = None
    """The run directory to write (new, empty, or this same run interrupted)."""
    resolution: int | None = None
    """Image side in pixels; None: the model's own, at most 512."""
    seed: int = 0
    """Everything random follows from it."""
    preset: str = ""
    """The recipe that these settings came from; a name for the record."""

    objective: Literal["nft", "grpo", "supervised", "none"] = "nft"
    """nft: contrast of two implied policies on re-noised results; grpo: PPO on drawn steps; supervised: flow matching
    to the planned result (worlds only); none: the identity and steady branches alone."""
    sources: Literal["own", "clean"] = "own"
    """What a turn after the first edits: what the model made, or the planned image (worlds only; the control)."""
    turns: int = 3
    """Turns of a training session."""
    dependency: float = 0.7
    """Worlds: how often a turn refers to what an earlier turn made."""
    contrast: float = 1.0
    """Between turns: factor on the distance from mid grey."""
    blur: float = 0.0
    """Between turns: weight of each pixel's 3 x 3 mean."""
    noise: float = 0.0
    """Between turns: deviation of added noise, in [0, 1]."""

    scoring: Literal["turns", "last"] = "turns"
    """Score every turn, or the last alone."""
    aggregate: Literal["mean", "product", "geometric", "min", "prefix"] = "mean"
    """How the turns' scores become one of the session; prefix: the mean over turns of the product up to there."""
    credit: Literal["broadcast", "turn", "to-go"] = "broadcast"
    """Who gets it: every turn the session's advantage (the paper), each turn its own, or what comes after it too."""
    discount: float = 1.0
    """to-go: what a turn later counts."""
    fusion: Literal["reward", "advantage", "gdpo"] = "advantage"
    """Following and consistency are summed as rewards, or as advantages normalised each on its own; gdpo: those
    normalised once more over the batch."""
    following: float = 1.0
    """Weight of instruction following."""
    consistency: float = 0.5
    """Weight of content consistency."""
    against: Literal["first", "previous"] = "first"
    """What consistency is measured against: the session's first image (EdiVal), or the turn's own source."""
    floor: float = 0.05
    """Least deviation by which a group's rewards are divided: near the judge's own noise."""
    advantage_clip: float = 2.0
    """A_max: advantages are held inside it; 5 as released leaves NFT's r near a half."""
    min_spread: float = 1e-6
    """Groups whose advantages spread less teach nothing and are left out."""
    max_mean: float = 0.9
    """Groups (turns of them, with credit 'turn') whose mean score reaches this are left out; 1: none."""
    identity: float = 0.0
    """Weight of the identity branch (MT-OPSD): an own result, as the next turn sees it, is the source; nothing is
    asked; the result as it was is the target."""
    steady: float = 0.0
    """Weight of the steady branch (after MT-OPSD's edit branch): on a source as it came through the channel, say what
    the same model says where the source came through whole; without effect where the channel only quantises."""
    identity_prompt: str = "change nothing"
    """How the model is asked for nothing."""

    nft_beta: float = 1.0
    """NFT's distance of the two implied policies."""
    adaptive: bool = True
    """NFT: divide each branch by its own mean absolute error."""
    renoise: int = 3
    """NFT and supervised: times at which each result is noised again."""
    old: Literal["fresh", "ramp", "late", "slow"] = "fresh"
    """NFT's old policy after an epoch: the new one; or theta_old <- eta theta_old + (1 - eta) theta with eta rising by
    0.001 a step to 0.5, by 0.0075 from step 75 on to 0.999, or 0.8."""
    sde: Literal["flow-sde", "dance-sde", "cps"] = "cps"
    """GRPO's stochastic step."""
    noise_level: float | None = None
    """Its noise; None: 0.7 for flow-sde, 0.3 for dance-sde, 0.7 for cps."""
    window: tuple[int, int] | None = None
    """GRPO: first and last step that is drawn and trained; None: every step with a density."""
    trust: Literal["none", "clip", "hinge", "guard-hinge", "fair-hinge"] = "clip"
    """GRPO: what keeps the policy near the one that made the rollouts; guard-hinge is GRPO-Guard's."""
    clip: float = 0.1
    """The trust region's radius: nats of a step's log-ratio (times sigma^2 for fair-hinge, sigma for guard-hinge)."""
    kl: float = 0.0
    """GRPO: weight of the exact KL to the reference; NFT: of |v - v_ref|^2."""

    steps: int = 6
    """Sampler steps in training."""
    guidance: float | None = None
    """Guidance scale in rollouts and loss; None: off, or the embedded scale 1."""
    epochs: int = 25
    """Collections of sessions."""
    groups: int = 24
    """Different sessions in a collection."""
    rollouts: int = 4
    """Times that each is run: a group."""
    updates: int = 4
    """Optimiser steps on one collection, each on its own share of the rows."""
    budget: int | None = None
    """Stop after this many forward-equivalents; None: after the epochs."""
    patience: int = 20
    """Stop, with advice, after this many collections in a row in which no group's scores differ."""
    chunk: int = 256
    """States per forward; lower it when memory is short."""

    subset: str = "attention"
    """Which layers train: a subset of the family (attention, all-linear, ...)."""
    full: bool = False
    """Train full weights of the subset ('all': every weight) instead of a LoRA."""
    rank: int = 16
    """LoRA rank."""
    alpha: float | None = None
    """LoRA alpha; None: equal to the rank."""
    lr: float = 1e-3
    """AdamW's learning rate."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    gradient_clip: float = 1.0
    """Largest gradient norm."""
    ema: float | None = None
    """Decay of the averaged weights that are kept."""

    evaluate: int = 200
    """Held-out sessions, before and after."""
    evaluate_turns: int = 3
    """Their turns."""
    evaluate_steps: int = 8
    """Sampler steps there."""
    still: int = 5
    """Turns that ask for nothing, for the drift of identity."""
    threads: int | None = None
    """Torch threads; None: as many as torch wants."""


_LAPTOP = EditConfig()
_GRPO = replace(_LAPTOP, objective="grpo")
PRESETS: dict[str, EditConfig] = {
    "fieldsmith": replace(_LAPTOP, credit="turn", identity=0.03, steady=0.03),
    "mt-nft": _LAPTOP,
    "mt-grpo": _GRPO,
    "clean-nft": replace(_LAPTOP, sources="clean", credit="turn"),
    "turn-nft": replace(_LAPTOP, credit="turn"),
    "to-go-nft": replace(_LAPTOP, credit="to-go"),
    "last-nft": replace(_LAPTOP, scoring="last"),
    "edit-r1": replace(
        _LAPTOP, sources="clean", credit="turn", fusion="reward", old="ramp", kl=1e-4, floor=1e-4, advantage_clip=5.0,
        min_spread=0.05, consistency=1.0,
    ),
    "supervised": replace(_LAPTOP, objective="supervised", sources="clean"),
    "self-supervised": replace(_LAPTOP, objective="supervised", sources="own"),
    "identity": replace(_LAPTOP, objective="none", identity=1.0),
    "steady": replace(_LAPTOP, objective="none", identity=1.0, steady=1.0),
}  # fmt: skip
PAPER: dict[str, Any] = {  # the nearest public relatives: Flow-GRPO's Kontext row and Edit-R1's
    "groups": 24, "rollouts": 12, "epochs": 300, "rank": 64, "alpha": 128.0, "lr": 3e-4, "updates": 2,
    "evaluate_steps": 28, "guidance": 2.5,
    "identity_prompt": "keep the image exactly as it is",
}  # fmt: skip


def preset(name: str, scale: str = "laptop") -> EditConfig:
    """A recipe at laptop or paper size. Raises InputError at an unknown name."""
    check_word(name, tuple(PRESETS), "edit's presets")
    found = replace(PRESETS[name], preset=name)
    return replace(found, **PAPER) if scale == "paper" else found


def check(config: EditConfig) -> None:
    """Raises InputError with the value and the fix; needs neither model nor data."""
    counts = ("turns", "renoise", "epochs", "groups", "updates", "patience", "chunk", "rank",
              "evaluate_turns", "evaluate_steps")  # fmt: skip
    for name in counts:
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)} must be at least 1")
    if config.steps < 2:
        raise InputError(f"steps={config.steps} goes from noise to the result at once; use at least 2")
    if config.objective in ("nft", "grpo") and config.rollouts < 2:
        raise InputError(
            f"rollouts={config.rollouts} gives every session advantage 0; use at least 2, 4 is a good start"
        )
    if config.rollouts < 1 or config.evaluate < 2 or config.still < 0:
        raise InputError(
            f"rollouts={config.rollouts}, evaluate={config.evaluate}, still={config.still}: give at least 1, 2 and 0"
        )
    for name in ("lr", "floor", "advantage_clip", "gradient_clip", "nft_beta", "clip", "contrast"):
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"{name}={getattr(config, name)} must be above 0")
    for name in ("following", "consistency", "identity", "steady", "kl", "noise", "weight_decay", "min_spread"):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"{name}={getattr(config, name)} must be 0 or above")
    for name in ("dependency", "discount", "blur"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"{name}={getattr(config, name)} is no share; give 0 to 1")
    if config.budget is not None and config.budget < 1:
        raise InputError(f"budget={config.budget} forward-equivalents must be at least 1")
    if config.ema is not None and not 0 <= config.ema < 1:
        raise InputError(f"ema={config.ema} must be at least 0 and below 1; 0.99 is a good start")
    if config.objective == "none" and not config.identity and not config.steady:
        raise InputError("objective 'none' with no branch trains nothing; add --identity 1, or choose nft or grpo")
    lossy = config.contrast != 1 or config.blur or config.noise
    if config.objective == "none" and not config.identity and not lossy:
        raise InputError(
            "the steady branch alone teaches nothing where images pass whole; add --noise, or --identity 1"
        )
    if config.steady and config.turns < 2:
        raise InputError(f"steady={config.steady} needs sources that a turn made; use turns=2 or more")
    if config.objective in ("nft", "grpo") and not config.following and not config.consistency:
        raise InputError("following=0 and consistency=0 leave nothing to reward; raise one of them")
    if config.old != "fresh" and config.objective != "nft":
        raise InputError(f"old '{config.old}' is NFT's; objective '{config.objective}' has no old policy to keep")
    if config.credit != "broadcast" and config.scoring == "last":
        raise InputError(f"credit '{config.credit}' needs every turn's score; use --scoring turns, or broadcast")
    if config.objective == "grpo" and config.window is not None:
        first, last = config.window
        if not 0 <= first <= last < config.steps:
            raise InputError(f"window={first} {last} must lie in steps 0 to {config.steps - 1}")
