"""What `erase` looks at, before and after, at equal seeds: the target, its neighbours, unrelated prompts, attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fieldsmith.diagnose.attacks import battery
from fieldsmith.diagnose.concepts import (
    Asked,
    Sampler,
    ask_groups,
    detected,
    erased_concepts,
    groups,
    paraphrases,
    sampler,
)
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.metrics.intervals import Interval
from fieldsmith.verb import Job, Side


@dataclass(frozen=True)
class Concept:
    """One erased concept on a world whose judge is exact."""

    groups: dict[str, Asked]  # target, neighbours, unrelated
    paraphrases: Interval  # share of images of other words for the target that show it
    anchor_leak: Interval  # share of the anchor's images that show the target
    attacks: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What was seen of one model."""

    concepts: dict[Any, Concept]  # where a world judges
    shown: dict[str, Tensor] = field(default_factory=dict)  # elsewhere: images (4, 3, h, w) of targets and kept prompts
    kept: Tensor | None = None  # images of kept prompts, for their statistics


def measure(model: Any, config: EraseConfig, job: Job, side: Side) -> Measured:
    """Judged on the model's world where it has one; elsewhere images of targets and kept prompts."""
    draw = sampler(model, max(28, config.steps), config.rollout_guidance)  # every method is judged with one sampler
    world = job.inputs.world
    if world is None:
        names = list(dict.fromkeys((*config.targets[:4], *config.keep[:8])))
        shown = {prompt: draw([prompt] * 4, config.seed) for prompt in names}
        return Measured({}, shown, draw(kept_prompts(config), config.seed))
    targets = erased_concepts(config.targets)
    seen = {target: _concept(draw, world, target, targets, config) for target in targets}
    if side == "after" and config.attacks and model.family == "flux" and config.method != "projection":
        for target, one in seen.items():
            one.attacks.update(battery(model, world, target, config.seed))
    return Measured(seen)


def _concept(draw: Sampler, world: Any, target: Any, others: Sequence[Any], config: EraseConfig) -> Concept:
    n, seed = config.evaluate, config.seed
    return Concept(
        ask_groups(draw, world, groups(target, others), n, seed),
        detected(draw, world, target, paraphrases(target), n, seed + 9),
        detected(draw, world, target, list(config.anchors), 2 * n, seed + 8),
    )


def kept_prompts(config: EraseConfig) -> list[str]:
    """Prompts that the run should leave alone, each as often as it is drawn."""
    return [prompt for prompt in (config.keep or ("",)) for _ in range(max(4, config.evaluate // 2))]
