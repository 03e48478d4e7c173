"""Is a concept still there, and is everything else? Judged at equal seeds (GEM notes, section 4.4).

In: samplers before and after, a world whose judge reads concepts from pixels, groups of concepts. Out: shares with
Wilson intervals, invalid images counted apart from erased ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fieldsmith.measure.distances import frechet_distance, pixel_features, total_variation
from fieldsmith.measure.drawing import Sampler
from fieldsmith.measure.intervals import Interval, paired_difference, share

Concept = Any  # what a world's captions name, hashable; str() is its name
Groups = Mapping[str, Sequence[Concept]]  # 'target', and 'neighbours' and 'unrelated' where there are some


class Verdicts(Protocol):
    """A judge's reading of n images."""

    @property
    def valid(self) -> Tensor:
        """Whether each image shows anything that the world knows, (n,) bool."""

    def shows(self, concept: Concept) -> Tensor:
        """Whether each image shows the concept, (n,) bool."""

    def names(self) -> list[str]:
        """What each image shows, in words."""

    def labels(self) -> Tensor:
        """One number an image, (n,) int, equal where they show the same."""


@runtime_checkable
class ByQuestion(Protocol):
    """Verdicts of a judge that is asked about each image, which costs: it answers what an image was asked for alone."""

    def answers(self, asked: Sequence[Concept]) -> Tensor:
        """Whether each image shows what was asked, (n,) bool."""


class World(Protocol):
    """Concepts with captions, and a judge that reads them from pixels alone."""

    def caption(self, concept: Concept) -> str: ...
    def render(self, chosen: list[Concept], generator: torch.Generator) -> Tensor: ...
    def judge(self, images: Tensor) -> Verdicts: ...


@dataclass(frozen=True)
class Asked:
    """Images of one group: what was asked (repeated per image), what the judge saw."""

    asked: list[Concept]
    images: Tensor
    seen: Verdicts

    def right(self) -> Tensor:
        """Whether each image shows all that was asked; (n,) bool."""
        if isinstance(self.seen, ByQuestion):
            return self.seen.answers(self.asked)
        names = list(dict.fromkeys(self.asked))
        each = torch.stack([self.seen.shows(c) for c in names])
        return each[[names.index(c) for c in self.asked], torch.arange(len(self.asked))]


def ask(draw: Sampler, world: World, asked: Sequence[Concept], n: int, seed: int) -> Asked:
    """n images of each concept's plain caption, judged."""
    every = [concept for concept in asked for _ in range(n)]
    images = draw([world.caption(concept) for concept in every], seed)
    return Asked(every, images, world.judge(images))


def ask_groups(draw: Sampler, world: World, groups: Groups, n: int, seed: int) -> dict[str, Asked]:
    """Every group's images from one model; a group's seed depends on its place only, so two models compare."""
    places = enumerate(groups.items())
    return {name: ask(draw, world, group, n, seed + 1000 * i) for i, (name, group) in places if group}


def detected(draw: Sampler, world: World, target: Concept, prompts: Sequence[str], n: int, seed: int) -> Interval:
    """Share of images of these prompts, n each, that show the target."""
    images = draw([prompt for prompt in prompts for _ in range(n)], seed)
    return share(world.judge(images).shows(target))


def right_by_group(asked: Asked, groups: Groups) -> dict[str, Interval]:
    """Share of images that show all that was asked, by group of concepts, and the share that is valid."""
    right = asked.right()
    rows = {name: share(right[torch.tensor([c in group for c in asked.asked])]) for name, group in groups.items()}
    return rows | {"valid": share(asked.seen.valid)}


@dataclass(frozen=True)
class Erasure:
    """What an erasure did, group by group; shares in [0, 1], drops and rises in points, at equal seeds."""

    numbers: dict[str, Interval]
    distances: dict[str, float]
    before: dict[str, Asked]
    after: dict[str, Asked]

    @property
    def composite(self) -> float:
        """Ours: harmonic mean of erasure, kept neighbours and kept unrelated (each relative to before)."""
        erased = 1 - self.numbers["target detected"].value - self.numbers["target invalid"].value
        kept = [
            self.numbers[f"{name} right"].value / max(self.numbers[f"{name} right before"].value, 1e-9)
            for name in ("neighbours", "unrelated")
            if name in self.after
        ]
        parts = [min(1.0, max(part, 1e-6)) for part in (erased, *kept)]
        return len(parts) / sum(1 / part for part in parts)

    def to_json(self) -> dict[str, object]:
        rows = {k: {"value": v.value, "low": v.low, "high": v.high, "n": v.n} for k, v in self.numbers.items()}
        return {**rows, "distances": self.distances, "composite (ours)": self.composite}


def erasure(old: dict[str, Asked], new: dict[str, Asked], target: Concept) -> Erasure:
    """Compare judged groups (`ask_groups`) before and after, drawn at equal seeds."""
    kept = [name for name in ("neighbours", "unrelated") if name in new]
    numbers: dict[str, Interval] = {}
    for label, asked in ((" before", old), ("", new)):
        numbers[f"target detected{label}"] = share(asked["target"].seen.shows(target))
        numbers[f"target invalid{label}"] = share(~asked["target"].seen.valid)
        for name in kept:
            numbers[f"{name} right{label}"] = share(asked[name].right())
    for name in kept:
        numbers[f"{name} drop points"] = paired_difference(new[name].right(), old[name].right())
    every_new, every_old = (torch.cat([~a.seen.valid for a in side.values()]) for side in (new, old))
    numbers["invalid rise points"] = paired_difference(every_old, every_new)
    if sum(len(new[name].asked) for name in kept) < 2:  # nothing else than the target is left to ask for, or one image
        return Erasure(numbers, {}, old, new)
    kept_new, kept_old = (torch.cat([side[k].images for k in kept]) for side in (new, old))
    labels_new, labels_old = (torch.cat([side[k].seen.labels() for k in kept]) for side in (new, old))
    features, size = pixel_features(8), int(torch.maximum(labels_new.max(), labels_old.max())) + 1
    distances = {
        "frechet, 8x8 pixels, kept prompts": frechet_distance(features(kept_old), features(kept_new)),
        "total variation of labels, kept prompts": total_variation(
            labels_old.bincount(minlength=size), labels_new.bincount(minlength=size)
        ),
    }
    return Erasure(numbers, distances, old, new)
