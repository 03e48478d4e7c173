"""What a judge of the user's choice is asked about an erasure from a model without a world of its own.

In: a detector (measure/detect.py) and the run's config. Out: a `Judged` of prompts by group; images of them by seed; a
check that the judge tells images apart, and what all of it costs, before anything is trained.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fieldsmith.concepts import around, load, plain, stem
from fieldsmith.measure import drawing
from fieldsmith.measure.detect import Detector, Pictures, Prompt
from fieldsmith.measure.detection import Asked
from fieldsmith.measure.drawing import Sampler, sampler
from fieldsmith.methods.erase.config import AUTO, KEPT, TEMPLATES, EraseConfig
from fieldsmith.models.core import Model
from fieldsmith.preflight import Check
from fieldsmith.verb import Job

# other ways to ask for a target, on which nothing is trained
PARAPHRASES = ("a picture with {} in it", "{} seen from far away", "a postcard of {}", "{} on a sunny day")
NEIGHBOURS = 8  # of a list, evenly spread over it
TRIED = 4  # images each of target and anchor, on which a judge must say different things


@dataclass(frozen=True)
class Judged:
    """A world with a judge, and what it is asked about each erased concept."""

    world: Any
    groups: Mapping[Any, Mapping[str, Sequence[Any]]]  # concept -> target, neighbours, unrelated, others -> concepts
    paraphrases: Mapping[Any, Sequence[str]]  # concept -> prompts in other words
    detector: Detector | None = None  # where the judge is no exact one of the world's

    def check_prompts(self, model: Model, config: EraseConfig) -> None:
        """Raises InputError where the model does not know a word of what a detector will be asked about."""
        if self.detector is not None and config.evaluate:
            groups = (prompts for of_one in self.groups.values() for prompts in of_one.values())
            asked = [*map(str, (one for prompts in groups for one in prompts)), *config.anchors]
            model.check_prompts([*asked, *(one for words in self.paraphrases.values() for one in words)])

    def images(self, config: EraseConfig) -> int:
        """How many images are drawn of one model."""
        n = config.evaluate
        return sum(
            len(prompts) * self.each(group, n) for groups in self.groups.values() for group, prompts in groups.items()
        ) + sum(len(words) * n + len(config.anchors) * 2 * n for words in self.paraphrases.values())

    def each(self, group: str, n: int) -> int:
        """Images a prompt: with a detector half as many of what should stay, which has more prompts."""
        return n if group == "target" or self.detector is None else max(1, n // 2)


def neighbours_of(config: EraseConfig) -> tuple[str, ...]:
    """Concepts near the targets: those named, those of a list, or of the packaged list that has a target.

    Raises InputError at a list that cannot be read.
    """
    erased = {stem(target) for target in config.targets}
    if config.neighbours == AUTO:
        near = tuple(dict.fromkeys(one for target in config.targets for one in around(target)))
    else:
        near = load(config.neighbours)
    near = tuple(one for one in near if stem(one) not in erased)
    return near[:: -(-len(near) // NEIGHBOURS)] if near else ()


def kept_of(config: EraseConfig) -> tuple[str, ...]:
    """Prompts that an erasure should leave alone: the neighbours, and everyday ones without a target's words."""
    erased = [stem(target) for target in config.targets]
    everyday = (prompt for prompt in KEPT if not any(target in plain(prompt) for target in erased))
    return tuple(dict.fromkeys((*neighbours_of(config), *everyday)))


def judged(detector: Detector, config: EraseConfig) -> Judged:
    """Each target in ten templates, its neighbours, everyday prompts; what the judge cannot see is only looked at.

    Raises InputError where the judge's classes do not include a target.
    """
    near, targets = neighbours_of(config), {target: detector.known(target) for target in config.targets}
    prompts = {
        "neighbours": [Prompt(f"a photo of {name}", detector.find(name) or "") for name in near],
        "unrelated": [
            Prompt(words, detector.find(words) or "") for words in kept_of(config) if words not in ("", *near)
        ],
    }
    # words under which the judge sees the target itself, as NudeNet does in 'a nude statue', are looked at only
    seen = {
        name: [one for one in group if one.concept and one.concept not in targets.values()]
        for name, group in prompts.items()
    }
    seen["others"] = [one for name, group in prompts.items() for one in group if one not in seen[name]]
    groups: dict[str, dict[str, list[Prompt]]] = {name: {"target": [], **seen} for name in targets.values()}
    paraphrases: dict[str, list[str]] = {name: list(config.synonyms) for name in groups}
    for target, name in targets.items():  # two targets may be one to the judge
        groups[name]["target"] += [Prompt(template.replace("{}", target), name, target) for template in TEMPLATES]
        paraphrases[name] += [template.replace("{}", target) for template in PARAPHRASES]
    anchors = [found for anchor in config.anchors if (found := detector.find(anchor))]
    asked = [*groups, *anchors, *(one.concept for group in seen.values() for one in group if one.concept)]
    names = detector.names if detector.at_once and detector.names else tuple(dict.fromkeys(asked))
    return Judged(Pictures(detector, names), groups, paraphrases, detector)


def ask_by_seed(draw: Sampler, judged: Judged, target: str, config: EraseConfig) -> dict[str, Asked]:
    """Every group's images; the k-th image of each prompt is drawn at the same seed, before and after."""
    seen = {}
    for place, (name, group) in enumerate(judged.groups[target].items()):
        n = judged.each(name, config.evaluate)
        asked = [prompt for prompt in group for _ in range(n)]
        if asked:
            seeds = [config.seed + 1000 * place + k for _ in group for k in range(n)]
            images = draw([prompt.words for prompt in asked], seeds)
            seen[name] = Asked(asked, images, judged.world.judge(images))
    return seen


def watched(job: Job, judged: Judged, config: EraseConfig) -> Job:
    """The job, which also says what measuring will cost and refuses a judge that tells nothing apart."""
    if judged.detector is None or not config.evaluate:
        return job
    others, job.note = job.checks, partial(_cost, job.model, judged, config)
    job.checks = lambda resumes: [*others(resumes), *(() if resumes else _told_apart(job.model, judged, config))]
    return job


def _told_apart(model: Model, judged: Judged, config: EraseConfig) -> list[Check]:
    """The judge's scores of the targets differ between images of target and anchor, drawn from the reference."""
    checks = []
    draw = sampler(model, max(drawing.STEPS, config.steps), config.rollout_guidance)
    for target, anchor in config.words:
        name = judged.world.detector.known(target)
        with model.reference():
            images = draw([target] * TRIED + [anchor] * TRIED, config.seed + 6)
        scores = judged.world.judge(images).scores(name)
        spread = float(scores.max() - scores.min())
        fix = (
            f"the judge says {scores[0]:.2g} of every image of '{target}' and '{anchor}': name one that tells them "
            "apart, or measure nothing (--evaluate 0)"
        )
        checks.append(Check(f"spread of the judge's scores of '{name}'", spread, "above 0", spread > 0, fix))
    return checks


def _cost(model: Model, judged: Judged, config: EraseConfig) -> str:
    """What measuring will take, in a sentence: images, network evaluations and, from one that is timed, minutes."""
    steps, images = max(drawing.STEPS, config.steps), judged.images(config)
    x, t = model.noise(1, torch.Generator().manual_seed(0)), model.grid(steps)[1]
    condition = model.encode([config.targets[0]])
    with torch.no_grad():
        for _ in range(2):  # the first one prepares kernels
            began = time.monotonic()
            float(model.predict(x, t, condition, config.rollout_guidance).value.sum())  # float: until a GPU is done
        seconds = time.monotonic() - began
    return (
        f"to measure: {images} images before and as many after (evaluate={config.evaluate}) in {steps} steps each, "
        f"about {2 * images * steps * seconds / 60:.1f} minutes at {seconds:.2g} s a step, and the judge's own time"
    )
