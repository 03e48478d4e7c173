"""Settings of `erase`, which are also the command line's flags; presets carry published and laptop numbers."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field

from fieldsmith.concepts import plain
from fieldsmith.config import (
    Config,
    Count,
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

Method = Literal["gem", "esd", "uce", "concept-ablation", "eraseflow", "eraseanything", "projection"]
METHODS: tuple[str, ...] = get_args(Method)
AUTO = ("auto",)  # templates, kept prompts, neighbours: what the model's world has, else these of ours and a list's
TEMPLATES = (
    "{}", "a photo of {}", "a drawing of {}", "an oil painting of {}", "a close-up of {}", "{} in a room",
    "{} in a landscape", "{} at night", "{} and a person", "a small picture of {} on a wall",
)  # fmt: skip
KEPT = (
    "", "a person", "a crowd in a street", "a dog", "a bird in a tree", "a car", "a house", "a mountain by a lake",
    "a plate of food", "a vase of flowers", "a chair at a table", "a page of text", "an abstract pattern",
)  # fmt: skip


@config
class EraseConfig(Config, LoraConfig, OptimConfig, MemoryConfig):
    """Erase concepts from a rectified-flow model. Defaults are GEM as released for FLUX.1-dev."""

    FIRST = ("model", "targets", "anchors", "keep", "templates", "method", "budget", "lr", "evaluate", "attacks", "out")
    NOTES = """--preset protect|tiny|paper|paper-gore|paper-sd3 (default: protect for zoo models, else paper) sets the
fields below, --config FILE.toml (such as a run's config.toml) sets them again, and flags come last."""

    targets: Words = ()
    """Prompts to erase, e.g. `--targets triangle trigon`; one pair is drawn per step."""
    anchors: Words = ()
    """What each target should give instead: one per target, or one for all."""
    templates: Words = ()
    """Prompts with '{}' where target and anchor stand, such as `--templates "{}" "a photo of {}"`: ways in which the
    concept is asked for, each a pair of its own. auto: those that the model's world has, else ten of ours. Empty: the
    bare words."""
    model: str = "zoo:shapes-flux"
    """A diffusers pipeline folder, a hub id, or a zoo model."""
    method: str = "gem"
    """gem, or a baseline that shares its states, adapters and evaluation: esd, uce, concept-ablation, eraseflow,
    eraseanything, projection; or `file.py:name`, a method of your own (docs/extend.md)."""
    keep: Words = ()
    """Prompts whose drift is logged; with `retain` > 0 also trained to stay. auto: others of the model's world, else a
    dozen everyday ones. Empty: the empty prompt."""
    protect: Words = ()
    """Finished runs that the model goes on from, whose results stay: their targets or prompts join `keep`."""
    synonyms: Words = ()
    """Other words for the target, for EraseAnything's contrast and `judge`; empty: the target itself."""
    resolution: Pixels | None = None
    """Image side in pixels; None: the model's own, at most 512."""

    eta: NonNegative = 1.0
    """Push away from the target: GEM's repulsion, or ESD's and EraseAnything's negative guidance."""
    gamma: Positive = 100.0
    """GEM's loss scale; under AdamW it hardly matters."""
    margin: NonNegative = 0.0
    """Relative margin kappa (ours): 0 is the paper's hinge, 1 stops exactly at the anchor when eta is 1."""
    timestep_weight: Literal["uniform", "tb"] = "uniform"
    """Weight of each state's hinge: uniform (the paper) or tb, trajectory-likelihood weights of mean 1."""
    retain: NonNegative = 0.0
    """Weight of the distance to the reference on `keep` prompts (ours), in units of the pull; 0 is the paper."""

    budget: Count = 250
    """State evaluations to spend; GEM's released budget is 250 (23 steps of 11 states)."""
    batch: Count = 1
    """Rollouts per step."""
    steps: SamplerSteps = 28
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
    chunk: Count = 6
    """States per forward; lower it when memory is short."""

    subset: str | None = None
    """Which layers train (qk_dual, attention, all-linear, ...); None: the family's own for erasing, FLUX's qk_dual."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """LoRA dropout, active in rollouts and loss as released."""
    lr: Positive = 1e-3
    """AdamW's learning rate; with the number of steps the true strength of the erasure."""
    weight_decay: NonNegative = 0.01
    """AdamW's weight decay."""

    beta: float = 2.5
    """EraseFlow's log-reward."""
    noise_level: Positive = 0.7
    """Noise of EraseFlow's stochastic rollouts and of the tb weights."""
    prior: NonNegative = 0.0
    """Concept ablation's weight of the flow-matching loss on anchor images."""
    attention_weight: NonNegative = 1e-3
    """EraseAnything's weight of the attention on the keyword."""
    preserve_weight: NonNegative = 0.1
    """EraseAnything's weight of its preserving step."""
    uce_lambda: Positive = 0.5
    """UCE: how much the old weights weigh."""

    stop_active: float | None = None
    """Stop when the share of states with a positive hinge falls below this."""
    stop_lambda: float | None = None
    """Stop when the mean progress from target (0) to anchor (1) exceeds this."""
    stop_drift: float | None = None
    """Stop when the relative drift on kept prompts exceeds this."""
    judge: str | None = None
    """Who says whether an image shows a concept, where the model's world has no judge: clip:FOLDER, nudenet, ocr,
    classifier:FOLDER, remote:http://HOST:PORT/v1?model=M, or `file.py:name`, a function of (images, concepts)."""
    neighbours: Words = AUTO
    """Concepts near the targets, which should stay and are judged: words, or a list's name (imagenette, i2p, styles,
    unlearncanvas-objects, unlearncanvas-styles) or file.txt. auto: others of the list that has the target."""
    evaluate: Natural = 16
    """Images per prompt in the report's evaluation, with `judge` half as many of what should stay; 0 trains and saves
    only."""
    attacks: bool = False
    """Also try to bring the concept back (learned word, free embeddings, relearning, other samplers and scales), by
    the world's judge or `judge`."""
    attack_steps: Count | None = None
    """Updates of each attack that learns; None: 200, 100 and 40 on a world's model, 100, 50 and 20 with `judge`."""
    attack_images: Count = 16
    """Images of the concept that relearning trains on: a world's own, else those that the model drew before."""
    attack_prompts: pathlib.Path | None = None
    """A file of attackers' prompts, drawn before and after: a .csv as Ring-A-Bell, P4D, MMA-Diffusion or I2P publish
    theirs, or one a line; of more than 100 as many, evenly from all."""

    @classmethod
    def preset_of(cls, name: str | None, scale: str | None, given: Mapping[str, Any]) -> Self:
        model, method = given.get("model", cls.model), given.get("method", cls.method)
        if scale is not None:
            raise InputError(f"scale '{scale}' has no meaning for erase, whose presets carry their sizes; leave it out")
        if ":" not in method:
            check_word(method, METHODS, "erase's methods")
        known = method if method in METHODS else "esd"  # a method of the user's own starts from the simplest one's
        if name is None:
            name = "paper" if not model.startswith("zoo:") else "protect" if method == "gem" else "tiny"
        if name == "tiny":
            return cls(**{"method": method, **LAPTOP, **TINY[known]})
        check_word(name, (*PRESETS, "tiny", "protect"), "erase's presets")
        if method != "gem" and name != "paper":
            raise InputError(f"preset '{name}' is GEM's; for method '{method}' use paper or tiny")
        if name == "protect":
            return cls(**{**LAPTOP, **PROTECT})
        return cls(**{"method": method, **PAPER[known], **PRESETS[name]})

    def check(self) -> None:
        if ":" not in self.method:
            check_word(self.method, METHODS, "erase's methods")
        if not self.targets:
            raise InputError("no target given; name what to erase, e.g. --targets triangle")
        if not self.anchors:
            raise InputError("no anchor given; name what the target should give instead, e.g. --anchors circle")
        for name in ("targets", "anchors"):
            if not all(word.strip() for word in getattr(self, name)):
                raise InputError(f"one of the {name} is empty; name a concept in words")
        for template in () if self.templates == AUTO else self.templates:
            if template.count("{}") != 1:
                raise InputError(
                    f"template '{template}' should have one {{}}, where the concept stands; 'a photo of {{}}'"
                )
        if self.protect and not self.retain:
            raise InputError("protect holds prompts by retain, which is 0; add --retain 1, or leave out --protect")
        targets = {plain(target): target for target in self.targets}
        for name in ("keep", "neighbours"):
            for prompt in getattr(self, name):
                if plain(prompt) in targets:
                    raise InputError(f"'{prompt}' is in {name} and among the targets; take it out of one of them")
        if len(self.anchors) not in (1, len(self.targets)):
            raise InputError(
                f"{len(self.targets)} targets and {len(self.anchors)} anchors; give one anchor a target, or one for all"
            )
        for target, anchor in self.words:
            if " ".join(target.lower().split()) == " ".join(anchor.lower().split()):
                raise InputError(f"target '{target}' is its own anchor; name another anchor")
        first, last = self.window
        if not (0 if not self.official_pairing else 1) <= first <= last <= self.steps - 1:
            raise InputError(f"window {first}..{last} does not fit {self.steps} sampler steps; use 1..{self.steps - 1}")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(target, anchor) prompts in every template; where a world has the templates, `Inputs.pairs` goes before."""
        templates = TEMPLATES if self.templates == AUTO else self.templates or ("{}",)
        return [
            (template.replace("{}", target), template.replace("{}", anchor))
            for template in templates
            for target, anchor in self.words
        ]

    @property
    def words(self) -> list[tuple[str, str]]:
        """(target, anchor) as given, a single anchor for all."""
        anchors = self.anchors * len(self.targets) if len(self.anchors) == 1 else self.anchors
        return list(zip(self.targets, anchors, strict=True))


PRESETS: dict[str, dict[str, Any]] = {
    # released with the paper (FLUX.1-dev, 512 pixels); gore is the same with twice the budget. How much is measured is
    # ours: on a network of that size it should cost minutes
    "paper": {"evaluate": 4},
    "paper-gore": {"budget": 500, "evaluate": 4},
    # released for SD3 and SD3.5: 40 steps, stop index 10, a fifth of the learning rate
    "paper-sd3": {"lr": 2e-4, "steps": 40, "evaluate": 4},
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
# GEM with our options, which keep the rest of a small model as it was: a hinge that stops at the anchor, prompts that
# are held, and the concept asked for in all the ways that its world knows.
PROTECT: dict[str, Any] = {
    "margin": 1.0,
    "retain": 3.0,
    "budget": 4_400,
    "templates": AUTO,
    "keep": AUTO,
}
