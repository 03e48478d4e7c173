"""The settings of each diagnosis, with their bounds. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fieldsmith.errors import InputError

KINDS = {
    "guidance": "a student's classifier-free guidance against its teacher's",
    "smoothness": "how sharp a score is along its sampling paths, and whether that tells bad samples",
    "exposure": "an editor's sessions on its own results against planned sources, and asked for nothing",
    "concepts": "whether a model draws what it is asked for, concept by concept",
    "audit": "which estimator, strengths and trust region of `align` fit a model and a reward",
    "judge": "how far to trust a judge of edits, which way of asking, how many replies",
}


def bounded(config: Any, least: float, *names: str) -> None:
    """Raises InputError where one of the fields is set and below `least`, or not a number."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (math.isnan(value) or value < least):
            raise InputError(f"{name}={value} must be at least {least}")


def above_zero(config: Any, *names: str) -> None:
    """Raises InputError where one of the fields is set and not a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name}={value} must be above 0")


@dataclass(frozen=True)
class GuidanceConfig:
    """Measure a student's classifier-free guidance against its teacher's, at the same states."""

    tuples: int = 2000
    """States of each kind at which both are asked; below about 1000, bins are noisy."""
    bins: int = 10
    """Equal bins of time."""
    steps: int = 25
    """Sampler steps of the teacher's path, and of the images for liveness."""
    scale: float = 2.0
    """Guidance scale of the teacher's path."""
    samples: int = 32
    """Images of each model at each of two scales for liveness; 0 leaves it out."""
    reference: float | None = None
    """E_c + E_u of another student, the yardstick of drift; None: the teacher's own mean squared gap."""
    chunk: int = 256
    """States per forward; lower it when memory is short."""
    seed: int = 0
    """Everything random follows from it."""

    def check(self) -> None:
        bounded(self, 1, "tuples", "bins", "steps", "chunk")
        bounded(self, 0, "samples", "scale")
        above_zero(self, "reference")


@dataclass(frozen=True)
class SmoothnessConfig:
    """Measure the score's Jacobian along a DDPM's sampling paths, and whether it tells bad samples from good ones."""

    steps: int = 25
    """Sampler steps of a path."""
    samples: int = 32
    """Paths; detectors watch four times as many."""
    chunk: int = 256
    """Paths at a time; lower it when memory is short."""
    seed: int = 0
    """Everything random follows from it."""

    def check(self) -> None:
        bounded(self, 1, "steps", "samples", "chunk")
        if self.steps < 4 or self.samples < 2:
            raise InputError(
                f"steps={self.steps}, samples={self.samples}: halves of paths are compared; use at least 4 and 2"
            )


@dataclass(frozen=True)
class ExposureConfig:
    """Measure what an editor loses turn by turn because it edits its own results."""

    samples: int = 32
    """Sessions; at least 100 for narrow intervals."""
    turns: int = 5
    """Turns of a session."""
    steps: int = 25
    """Sampler steps of every turn."""
    dependency: float = 0.7
    """How often a turn refers to what an earlier turn made."""
    still: int = 5
    """Turns that ask for nothing, for the drift of identity; 0 leaves it out."""
    contrast: float = 1.0
    """Between turns: factor on the distance from mid grey."""
    blur: float = 0.0
    """Between turns: weight of each pixel's 3 x 3 mean."""
    noise: float = 0.0
    """Between turns: deviation of added noise, in [0, 1]."""
    seed: int = 0
    """Everything random follows from it."""

    def check(self) -> None:
        if self.turns < 2:
            raise InputError(f"turns={self.turns}: the first turn has no source of the editor's own; give at least 2")
        bounded(self, 1, "steps", "samples")
        bounded(self, 0, "still", "noise")
        for name in ("dependency", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} is no share; give 0 to 1")
        above_zero(self, "contrast")


@dataclass(frozen=True)
class ConceptsConfig:
    """Judge what a model draws for every concept of its world."""

    each: int = 16
    """Images per prompt."""
    steps: int = 28
    """Sampler steps."""
    guidance: float | None = None
    """Guidance scale; None and 1 are off."""
    seed: int = 0
    """Equal seeds give equal noise."""

    def check(self) -> None:
        bounded(self, 1, "each", "steps")


@dataclass(frozen=True)
class AuditConfig:
    """Measure estimators, strengths and trust regions of `align`'s recipes on a model and a reward, before training."""

    steps: int = 10
    """Sampler steps."""
    times: int = 5
    """At how many of them to measure."""
    states: int = 16
    """States at each time."""
    samples: int = 128
    """Rollouts from each state for the reference; its noise is subtracted, what it hides falls as 1 / samples."""
    reference: Literal["auto", "zeroth-order"] = "auto"
    """auto: a closed form where there is one, gradients along drawn chains where the reward has one, else rewards."""
    sde: Literal["auto", "flow-sde", "dance-sde", "cps", "ddim", "ddim-uniform"] = "auto"
    """The stochastic step; auto: flow-sde on flows, ddim elsewhere and on exact worlds."""
    noise_level: float | None = None
    """Its noise; None: its usual one."""
    guidance: float | None = None
    """Guidance scale; None: off."""
    temperature: float = 0.1
    """alpha: what the spread of rewards is compared with, since the limit of small reward / alpha is measured."""
    displacement: float = 0.02
    """Root mean square change of the output, a number, at which the clip fractions are given."""
    chunk: int = 256
    """States per forward; lower it when memory is short."""
    seed: int = 0
    """Everything random follows from it."""

    def check(self) -> None:
        bounded(self, 1, "steps", "times")
        bounded(self, 8, "samples", "chunk")
        bounded(self, 2, "states")
        above_zero(self, "temperature", "displacement", "noise_level")
        if self.times > self.steps:
            raise InputError(f"times={self.times} is more than the sampler's {self.steps} steps; lower it")


@dataclass(frozen=True)
class JudgeConfig:
    """Measure a judge of edits against edits whose truth is known."""

    samples: int = 32
    """Instructions, each with 8 edits."""
    seed: int = 0
    """Everything random follows from it."""

    def check(self) -> None:
        if self.samples < 2:
            raise InputError(f"samples={self.samples} is too few for an interval; give at least 2")
