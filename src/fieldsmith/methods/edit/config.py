"""Settings of `edit`, which are also the command line's flags, and the presets (MT-EditFlow notes, 2, 4)."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

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
    Share,
    Threads,
    config,
)
from fieldsmith.errors import InputError, check_word

AUTO, EXACT = "auto", "exact"  # sessions and judge by name

# what each recipe changes of the defaults, which are those of `mt-nft`
PRESETS: dict[str, dict[str, Any]] = {
    "fieldsmith": {"credit": "turn", "identity": 0.03, "steady": 0.03},
    "mt-nft": {},
    "mt-grpo": {"objective": "grpo"},
    "clean-nft": {"sources": "clean", "credit": "turn"},
    "turn-nft": {"credit": "turn"},
    "to-go-nft": {"credit": "to-go"},
    "last-nft": {"scoring": "last"},
    "edit-r1": {
        "sources": "clean", "credit": "turn", "fusion": "reward", "advantage": "global-std", "old": "ramp",
        # released 1e-4, beside a policy term with the factor adv_clip_max = 5, which this one has not
        "kl": 2e-5, "floor": 1e-4, "advantage_clip": 5.0, "min_spread": 0.05, "consistency": 1.0,
    },
    "supervised": {"objective": "supervised", "sources": "clean"},
    "self-supervised": {"objective": "supervised"},
    "identity": {"objective": "none", "identity": 1.0},
    "steady": {"objective": "none", "identity": 1.0, "steady": 1.0},
}  # fmt: skip
PAPER: dict[str, Any] = {  # the nearest public relatives: Flow-GRPO's Kontext row and Edit-R1's
    "groups": 24, "rollouts": 12, "epochs": 300, "rank": 64, "alpha": 128.0, "lr": 3e-4, "updates": 2,
    "evaluate_steps": 28, "guidance": 2.5, "identity_prompt": "keep the image exactly as it is",
}  # fmt: skip


@config
class EditConfig(Config, DataConfig, LoraConfig, OptimConfig, MemoryConfig):
    """Train an editor on its own multi-turn sessions, so that later turns survive what earlier ones left behind."""

    FIRST = ("model", "sessions", "judge", "turns", "epochs", "groups", "rollouts", "steps", "lr", "evaluate", "out")
    NOTES = f"""--preset NAME picks a recipe (default: fieldsmith): {", ".join(PRESETS)}.
--scale laptop|paper picks its size (default: laptop for zoo models, else paper).
--config FILE.toml (such as a run's config.toml) sets fields again, and flags come last."""

    model: str = "zoo:scenes-kontext"
    """A diffusers pipeline folder, a hub id, or a zoo model, that edits images."""
    sessions: str = "auto"
    """auto: the world that the model's card names; or a .jsonl file, a line {"image": ..., "instructions": [...]}."""
    outside_images: bool = False
    """Let a sessions file name images outside of its own folder."""
    judge: str = "exact"
    """exact (worlds only); remote:http://HOST:PORT/v1?model=M&mode=expected&n=4, a server that sees images; or
    `file.py:name`, a function judge(before, after, instructions) that returns (following, consistency)."""
    resolution: Pixels | None = None
    """Image side in pixels; None: the model's own, at most 512."""
    preset: str = ""
    """The recipe that these settings came from; a name for the record."""

    objective: Literal["nft", "grpo", "supervised", "none"] = "nft"
    """nft: contrast of two implied policies on re-noised results; grpo: PPO on stochastic steps; supervised: flow
    matching to the planned result (worlds only); none: the identity and steady branches alone."""
    sources: Literal["own", "clean"] = "own"
    """What a turn after the first edits: what the model made, or the planned image (worlds only; the control)."""
    turns: Count = 3
    """Turns of a training session."""
    dependency: Share = 0.7
    """Worlds: how often a turn refers to what an earlier turn made."""
    contrast: Positive = 1.0
    """Between turns: factor on the distance from mid grey."""
    blur: Share = 0.0
    """Between turns: weight of each pixel's 3 x 3 mean."""
    noise: NonNegative = 0.0
    """Between turns: deviation of added noise, in [0, 1]."""

    scoring: Literal["turns", "last"] = "turns"
    """Score every turn, or the last alone."""
    aggregate: Literal["mean", "product", "geometric", "min", "prefix"] = "mean"
    """How the turns' scores become one of the session; prefix: the mean over turns of the product up to there."""
    credit: Literal["broadcast", "turn", "to-go"] = "broadcast"
    """Who gets it: every turn the session's advantage (the paper), each turn its own, or what comes after it too."""
    discount: Share = 1.0
    """to-go: what a turn later counts."""
    fusion: Literal["reward", "advantage", "gdpo"] = "advantage"
    """Following and consistency are summed as rewards, or as advantages normalised each on its own; gdpo: those
    normalised once more over the batch."""
    following: NonNegative = 1.0
    """Weight of instruction following."""
    consistency: NonNegative = 0.5
    """Weight of content consistency."""
    against: Literal["first", "previous"] = "first"
    """What consistency is measured against: the session's first image (EdiVal), or the turn's own source."""
    advantage: Literal["std", "global-std"] = "std"
    """What centred rewards are divided by: the deviation of their group, or of the whole collection."""
    floor: Positive = 0.05
    """Least deviation by which a group's rewards are divided: near the judge's own noise."""
    advantage_clip: Positive = 2.0
    """A_max: advantages are clipped to it; 5 as released leaves NFT's r near a half."""
    min_spread: NonNegative = 1e-6
    """Groups whose rewards have a standard deviation of no more teach nothing and are left out."""
    max_mean: float = 0.9
    """Groups (turns of them, with credit 'turn') whose mean score reaches this are left out; 1: none."""
    identity: NonNegative = 0.0
    """Weight of the identity branch (MT-OPSD): an own result, as the next turn sees it, is the source; nothing is
    asked; the result as it was is the target."""
    steady: NonNegative = 0.0
    """Weight of the steady branch (after MT-OPSD's edit branch): the output on a source that the channel changed is
    drawn to the same model's output on the source itself; without effect where the channel only quantises."""
    identity_prompt: str = "change nothing"
    """How the model is asked for nothing."""

    nft_beta: Positive = 1.0
    """NFT's distance of the two implied policies."""
    adaptive: bool = True
    """NFT: divide each branch by its own mean absolute error."""
    renoise: Count = 3
    """NFT and supervised: times at which each result is noised again."""
    old: Literal["fresh", "ramp", "late", "slow"] = "fresh"
    """NFT's old policy after an epoch: the new one; or theta_old <- eta theta_old + (1 - eta) theta with eta rising by
    0.001 a step to 0.5, by 0.0075 from step 75 on to 0.999, or 0.8."""
    sde: Literal["flow-sde", "dance-sde", "cps"] = "cps"
    """GRPO's stochastic step."""
    noise_level: NonNegative | None = None
    """Its noise; None: 0.7 for flow-sde, 0.3 for dance-sde, 0.7 for cps."""
    window: tuple[int, int] | None = None
    """GRPO: first and last step that is stochastic and trained; None: every step with a density."""
    trust: Literal["none", "clip", "hinge", "guard-hinge", "fair-hinge"] = "clip"
    """GRPO: what keeps the policy near the one that made the rollouts; guard-hinge is GRPO-Guard's."""
    clip: Positive = 0.1
    """The trust region's radius: nats of a step's log-ratio (times sigma^2 for fair-hinge, sigma for guard-hinge)."""
    kl: NonNegative = 0.0
    """GRPO: weight of the exact KL to the reference; NFT: of |v - v_ref|^2."""

    steps: Annotated[SamplerSteps, Field(ge=2)] = 6
    """Sampler steps in training."""
    guidance: float | None = None
    """Guidance scale in rollouts and loss; None: off, or the embedded scale 1."""
    epochs: Count = 25
    """Collections of sessions."""
    groups: Count = 24
    """Different sessions in a collection."""
    rollouts: Count = 4
    """Times that each is run: a group."""
    updates: Count = 4
    """Optimiser steps on one collection, each on its own share of the rows."""
    budget: Count | None = None
    """Stop after this many network evaluations (NFE); None: after the epochs."""
    patience: Count = 20
    """Stop, with advice, after this many collections in a row in which no group's scores differ."""
    chunk: Count = 256
    """States per forward; lower it when memory is short."""

    gradient_clip: Positive = 1.0
    """Largest gradient norm."""
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the averaged weights that are kept."""

    evaluate: Natural = 200
    """Held-out sessions, before and after; 0 trains and saves only."""
    evaluate_turns: Count = 3
    """Their turns; sessions of a file have as many as in training."""
    evaluate_steps: SamplerSteps = 8
    """Sampler steps there."""
    still: Natural = 5
    """Turns that ask for nothing, for the drift of identity."""
    threads: Threads | None = None
    """Torch threads; None: as many as torch wants."""

    @classmethod
    def preset_of(cls, name: str | None, scale: str | None, given: Mapping[str, Any]) -> Self:
        name = name or "fieldsmith"
        check_word(name, tuple(PRESETS), "edit's presets")
        scale = scale or ("laptop" if given.get("model", cls.model).startswith("zoo:") else "paper")
        if scale not in ("laptop", "paper"):
            raise InputError(f"scale '{scale}' is unknown; use laptop or paper")
        return cls(**{"preset": name, **PRESETS[name], **(PAPER if scale == "paper" else {})})

    def check(self) -> None:
        self._check_task()
        if self.objective in ("nft", "grpo") and self.rollouts < 2:
            raise InputError(
                f"rollouts={self.rollouts} gives every session advantage 0; use at least 2, 4 is a good start"
            )
        if self.objective == "none" and not self.identity and not self.steady:
            raise InputError("objective 'none' with no branch trains nothing; add --identity 1, or choose nft or grpo")
        if self.objective == "none" and not self.identity and not self.lossy:
            raise InputError(
                "the steady branch alone teaches nothing where images pass whole; add --noise, or --identity 1"
            )
        if self.steady and self.turns < 2:
            raise InputError(f"steady={self.steady} needs sources that a turn made; use turns=2 or more")
        if self.objective in ("nft", "grpo") and not self.following and not self.consistency:
            raise InputError("following=0 and consistency=0 leave nothing to reward; raise one of them")
        if self.old != "fresh" and self.objective != "nft":
            raise InputError(f"old '{self.old}' is NFT's; objective '{self.objective}' has no old policy to keep")
        if self.credit != "broadcast" and self.scoring == "last":
            raise InputError(f"credit '{self.credit}' needs every turn's score; use --scoring turns, or broadcast")
        if self.objective == "grpo" and self.window is not None:
            first, last = self.window
            if not 0 <= first <= last < self.steps:
                raise InputError(f"window={first} {last} must lie in steps 0 to {self.steps - 1}")

    def _check_task(self) -> None:
        """Raises InputError where sessions and their judge cannot go together, or the file is not there."""
        if self.judge != EXACT and ":" not in self.judge:
            raise InputError(
                f"judge '{self.judge}' is unknown; use exact, remote:http://HOST:PORT/v1?model=MODEL or file.py:name"
            )
        if self.sessions == AUTO:
            return
        if self.judge == EXACT:
            raise InputError(
                "judge 'exact' knows worlds alone; add --judge remote:http://HOST:PORT/v1?model=MODEL, or file.py:name"
            )
        if not self.sessions.startswith(GIVEN) and not pathlib.Path(self.sessions).is_file():
            raise InputError(f"sessions file '{self.sessions}' does not exist; fix its name")

    @property
    def rolls(self) -> bool:
        """Whether sessions are run on the model's own results at all."""
        return self.objective in ("nft", "grpo") or self.sources == "own" or bool(self.identity or self.steady)

    @property
    def lossy(self) -> bool:
        """Whether an image changes by more than 8-bit rounding between two turns."""
        return self.contrast != 1 or self.blur > 0 or self.noise > 0
