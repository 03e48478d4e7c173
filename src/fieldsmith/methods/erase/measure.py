"""What `erase` looks at, before and after, at equal seeds: the target, its neighbours, unrelated prompts, attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from fieldsmith.measure import drawing
from fieldsmith.measure.attacks import REAL, Budget, battery, of_prompts
from fieldsmith.measure.detection import Asked, ask_groups, detected
from fieldsmith.measure.drawing import Sampler, sampler
from fieldsmith.measure.intervals import Interval
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.judged import Judged, ask_by_seed
from fieldsmith.previews import FEW, Preview
from fieldsmith.verb import Job, Side


@dataclass(frozen=True)
class Concept:
    """One erased concept, on a world whose judge is exact or by a judge of the user's choice."""

    groups: dict[str, Asked]  # target, neighbours, unrelated
    paraphrases: Interval  # share of images of other words for the target that show it
    anchor_leak: Interval  # share of the anchor's images that show the target
    attacks: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What was seen of one model."""

    concepts: dict[Any, Concept]  # where a world judges
    shown: dict[str, Tensor] = field(default_factory=dict)  # elsewhere: images (n, 3, h, w) of targets and kept prompts
    kept: Tensor | None = None  # images of kept prompts, for their statistics


def measure(model: Any, config: EraseConfig, job: Job, side: Side) -> Measured:
    """Judged on the model's world where it has one; elsewhere images of targets and kept prompts."""
    draw = sampler(
        model, max(drawing.STEPS, config.steps), config.rollout_guidance
    )  # every method is judged with one sampler
    judged: Judged | None = job.inputs.judged
    if judged is None:
        asked = [target for target, _ in config.pairs]
        names = list(dict.fromkeys((*asked[:4], *config.keep[:8])))
        shown = {prompt: draw([prompt] * min(4, config.evaluate), config.seed) for prompt in names}
        return Measured({}, shown, draw(kept_prompts(config), config.seed))
    seen = {target: _concept(draw, judged, target, config) for target in judged.groups}
    steps, guidance = max(drawing.STEPS, config.steps), config.rollout_guidance
    for target, one in seen.items():
        if attacks := job.inputs.attacks:
            found = of_prompts(model, judged.world, target, attacks, steps, guidance)
            one.attacks[f"{len(attacks)} prompts of {config.attack_prompts.name}"] = asdict(found)  # type: ignore[union-attr]
        if side == "after" and config.attacks and config.method != "projection":
            world, plain = judged.world, judged.groups[target]["target"]
            if judged.detector:
                world = replace(world, draw=_from_reference(job, draw))
            one.attacks.update(battery(model, world, target, plain, config.seed, budget_of(config, judged), guidance))
    return Measured(seen)


def budget_of(config: EraseConfig, judged: Judged) -> Budget:
    """What the attacks of this run may spend."""
    budget = replace(REAL if judged.detector else Budget(), relearned=config.attack_images)
    n = config.attack_steps
    return replace(budget, token=n, embedding=n, relearning=n) if n else budget


def _from_reference(job: Job, draw: Sampler) -> Sampler:
    """Images of the model as it was, which still shows what was erased."""

    def drawn(prompts: Sequence[str], seed: int | Sequence[int]) -> Tensor:
        with job.model.reference():
            return draw(prompts, seed)

    return drawn


def _concept(draw: Sampler, judged: Judged, target: Any, config: EraseConfig) -> Concept:
    world, n, seed = judged.world, config.evaluate, config.seed
    return Concept(
        ask_by_seed(draw, judged, target, config)
        if judged.detector
        else ask_groups(draw, world, judged.groups[target], n, seed),
        detected(draw, world, target, judged.paraphrases[target], n, seed + 9),
        detected(draw, world, target, list(config.anchors), 2 * n, seed + 8),
    )


def preview(config: EraseConfig, job: Job) -> Preview:
    """Targets and kept prompts."""
    asked = list(dict.fromkeys((*config.targets[: FEW // 2], *config.keep)))[:FEW]
    return Preview(
        asked,
        lambda model: sampler(model, max(drawing.STEPS, config.steps), config.rollout_guidance)(asked, config.seed),
    )


def kept_prompts(config: EraseConfig) -> list[str]:
    """Prompts that the run should leave alone, each as often as it is drawn: four images in all are the least."""
    kept = config.keep or ("",)
    each = max(config.evaluate // 2, -(-4 // len(kept)))
    return [prompt for prompt in kept for _ in range(each)]
