"""The settings of each diagnosis, with their bounds. Imports no torch."""

from __future__ import annotations

import pathlib
from typing import Annotated, Literal

from pydantic import Field

from fieldsmith.config import (
    Count,
    DataConfig,
    Natural,
    NonNegative,
    Pixels,
    Positive,
    SamplerSteps,
    Seed,
    Share,
    Words,
    config,
)
from fieldsmith.errors import InputError

KINDS = {
    "guidance": "a student's classifier-free guidance against its teacher's",
    "smoothness": "how sharp a score is along its sampling paths, and whether that tells bad samples",
    "exposure": "an editor's sessions on its own results against planned sources, and asked for nothing",
    "concepts": "whether a model draws what it is asked for, and no more what should be gone",
    "reward": "whether chasing a reward pays, seen beside a judge that you trust",
    "audit": "which estimator, strengths and trust region of `align` fit a model and a reward",
    "judge": "how far to trust a judge of edits, which way of asking, how many replies",
}


Eight = Annotated[Count, Field(ge=8)]


@config
class DiagnosisConfig:
    """What every diagnosis is told."""

    out: pathlib.Path | None = None
    """The run directory to write (new or empty)."""
    seed: Seed = 0
    """Everything random follows from it."""

    def check(self) -> None:
        """Refuse settings that do not go together. Raises InputError with the value and the fix."""


@config
class ModelConfig(DiagnosisConfig):
    """And what a diagnosis of a model is told."""

    model: str | None = None
    """A diffusers pipeline folder, a hub id or a zoo model."""
    adapter: Words = ()
    """Adapters (of any trainer) in the model: FILE, FILE:scale or a run's adapter/, --adapter again for each."""
    config_from: str = ""
    """Of a model in one file: a pipeline folder or hub id of the same layout, which has its config and tokenizers."""
    resolution: Pixels | None = None
    """Image side in pixels; None: the model's own, at most 512."""


@config
class GuidanceConfig(ModelConfig, DataConfig):
    """Measure a student's classifier-free guidance against its teacher's, at the same states."""

    teacher: str | None = None
    """What the model was distilled from, in the same states and with the same classes."""
    data: str | None = None
    """Models of classes: digits, shapes, fashion, or a folder of images with classes; held-out images are used."""
    prompts: Words = ()
    """Prompts or class names to follow, or one text file with one a line; empty: every class."""
    tuples: Count = 2000
    """States of each kind at which both are asked; below about 1000, bins are noisy."""
    bins: Count = 10
    """Equal bins of time."""
    steps: SamplerSteps = 25
    """Sampler steps of the teacher's path, and of the images for liveness."""
    scale: NonNegative = 2.0
    """Guidance scale of the teacher's path."""
    samples: Natural = 32
    """Images of each model at each of two scales for liveness; 0 leaves it out."""
    reference: Positive | None = None
    """E_c + E_u of another student, the yardstick of drift; None: the teacher's own mean squared gap."""
    chunk: Count = 256
    """States per forward; lower it when memory is short."""


@config
class SmoothnessConfig(ModelConfig, DataConfig):
    """Measure the score's Jacobian along a DDPM's sampling paths, and whether it tells bad samples from good ones."""

    data: str | None = None
    """columns, cards or a folder of images; None: what the model's card names."""
    judge: str | None = None
    """With a folder: file.py:name, package.module:name or http:// address that says what is valid."""
    steps: SamplerSteps = 25
    """Sampler steps of a path."""
    samples: Count = 32
    """Paths; detectors watch four times as many."""
    chunk: Count = 256
    """Paths at a time; lower it when memory is short."""

    def check(self) -> None:
        if self.steps < 4 or self.samples < 2:
            raise InputError(
                f"steps={self.steps}, samples={self.samples}: halves of paths are compared; use at least 4 and 2"
            )


@config
class ExposureConfig(ModelConfig):
    """Measure what an editor loses turn by turn because it edits its own results."""

    samples: Count = 32
    """Sessions; at least 100 for narrow intervals."""
    turns: Count = 5
    """Turns of a session."""
    steps: SamplerSteps = 25
    """Sampler steps of every turn."""
    dependency: Share = 0.7
    """How often a turn refers to what an earlier turn made."""
    still: Natural = 5
    """Turns that ask for nothing, for the drift of identity; 0 leaves it out."""
    contrast: Positive = 1.0
    """Between turns: factor on the distance from mid grey."""
    blur: Share = 0.0
    """Between turns: weight of each pixel's 3 x 3 mean."""
    noise: NonNegative = 0.0
    """Between turns: deviation of added noise, in [0, 1]."""

    def check(self) -> None:
        if self.turns < 2:
            raise InputError(f"turns={self.turns}: the first turn has no source of the editor's own; give at least 2")


@config
class ConceptsConfig(ModelConfig):
    """Judge what a model draws for every concept of its world."""

    targets: Words = ()
    """Concepts that should be gone: each is asked for plainly and in the world's other words."""
    each: Count = 16
    """Images per prompt."""
    steps: SamplerSteps = 28
    """Sampler steps."""
    guidance: float | None = None
    """Guidance scale; None and 1 are off."""


@config
class RewardConfig(ModelConfig):
    """Take the best of more and more images by a reward, and see what a judge beside it says of them."""

    reward: str | None = None
    """A reward, or a weighted sum of rewards, as `align` takes them; or `file.py:name`."""
    beside: str | None = None
    """The reward that you trust; None: right, where the model's world has a judge."""
    prompts: Words = ()
    """Prompts to look at, or one text file with a prompt a line; empty: two dozen of the world's own."""
    samples: Annotated[Count, Field(ge=2)] = 8
    """Images per prompt."""
    steps: SamplerSteps = 28
    """Sampler steps."""
    guidance: float | None = None
    """Guidance scale; None and 1 are off."""


@config
class OverviewConfig(ModelConfig, DataConfig):
    """Make every diagnosis that a model allows, and say what to run next."""

    teacher: str | None = None
    """What the model was distilled from, if it was: then its guidance is measured."""
    data: str | None = None
    """What it was trained on, where its card does not say: a folder of images, or digits, shapes, fashion, columns,
    cards."""
    judge: str | None = None
    """With a folder and no teacher: file.py:name, package.module:name or http:// address that says what is valid."""
    reward: str | None = None
    """A reward that you mean to train on, such as `classifier` or `file.py:name`."""
    beside: str | None = None
    """With a reward: the one that you trust; None: right, where the model's world has a judge."""
    prompts: Words = ()
    """Prompts to look at, or one text file with a prompt a line; empty: the world's own."""
    targets: Words = ()
    """Concepts that should be gone, such as those of an erasure."""
    samples: Annotated[Count, Field(ge=2)] = 16
    """How hard to look: images of each kind follow from it; four times as many halve the intervals."""
    steps: SamplerSteps = 25
    """Sampler steps."""
    guidance: float | None = None
    """Guidance scale; None: what the model's card says."""
    chunk: Count = 256
    """States at a time in guidance and smoothness; lower it when memory is short."""


@config
class AuditConfig(ModelConfig):
    """Measure estimators, strengths and trust regions of `align`'s recipes on a model and a reward, before training."""

    model: str | None = "zoo:shapes-flux"
    """A diffusers pipeline folder, a hub id, a zoo model, or world:triangle, whose truth is a closed form."""
    reward: str = "classifier"
    """A reward, or a weighted sum of rewards, e.g. `classifier` or `right+0.1*brightness`; world:triangle: `linear`."""
    prompts: Words = ()
    """Prompts to look at, or one text file with a prompt a line; empty: the world's own captions."""
    steps: SamplerSteps = 10
    """Sampler steps."""
    times: Count = 5
    """At how many of them to measure."""
    states: Annotated[Count, Field(ge=2)] = 16
    """States at each time."""
    samples: Eight = 128
    """Rollouts from each state for the reference; its noise is subtracted, what it hides falls as 1 / samples."""
    reference: Literal["auto", "zeroth-order"] = "auto"
    """auto: a closed form where there is one, gradients along drawn chains where the reward has one, else rewards."""
    sde: Literal["auto", "flow-sde", "dance-sde", "cps", "ddim", "ddim-uniform"] = "auto"
    """The stochastic step; auto: flow-sde on flows, ddim elsewhere and on exact worlds."""
    noise_level: Positive | None = None
    """Its noise; None: its usual one."""
    guidance: float | None = None
    """Guidance scale; None: off."""
    temperature: Positive = 0.1
    """alpha: what the spread of rewards is compared with, since the limit of small reward / alpha is measured."""
    displacement: Positive = 0.02
    """Root mean square change of the output, a number, at which the clip fractions are given."""
    chunk: Eight = 256
    """States per forward; lower it when memory is short."""

    def check(self) -> None:
        if self.times > self.steps:
            raise InputError(f"times={self.times} is more than the sampler's {self.steps} steps; lower it")


@config
class JudgeConfig(DiagnosisConfig):
    """Measure a judge of edits against edits whose truth is known, or a judge of images against a world's exact one."""

    judge: str | None = None
    """remote:http://HOST:PORT/v1?model=M&mode=direct&mode=expected&n=4&temperature=0.7, a server that sees images,
    asked n times in each mode that is named (none: all four); or a judge of `fieldsmith erase --judge`: clip:FOLDER,
    nudenet, ocr, classifier:FOLDER, file.py:name, and with `world` remote, too."""
    world: Literal["shapes", "emoji"] | None = None
    """Of a judge of images: whose pictures it is asked about; None: shapes."""
    samples: Count = 32
    """Instructions, each with 8 edits; or pictures, each asked about twice."""

    def check(self) -> None:
        if self.samples < 2:
            raise InputError(f"samples={self.samples} is too few for an interval; give at least 2")
