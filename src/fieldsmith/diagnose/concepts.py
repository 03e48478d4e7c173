"""Is a concept still there, and is everything else? Judged on the shapes world at equal seeds (GEM notes, section 4.4).

In: samplers before and after, a concept. Out: shares with Wilson intervals, invalid images counted apart from erased.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith.metrics.distances import frechet_distance, pixel_features, total_variation
from fieldsmith.metrics.intervals import Interval, paired_difference, share
from fieldsmith.models.core import Condition, Model
from fieldsmith.paths import Prediction
from fieldsmith.samplers import Field, rollout
from fieldsmith.worlds.shapes import (
    COLOURS,
    HELD_OUT,
    PALETTE,
    SHAPES,
    Concept,
    ShapesWorld,
    Verdicts,
    caption,
    concepts,
    parse,
    silhouettes,
)

Sampler = Callable[[Sequence[str], int], Tensor]  # prompts, seed -> images (n, 3, h, w) in [0, 1]
Guidance = float | None | Callable[[Tensor], float]  # a scale, or a schedule of scales: the time of a step () -> scale


def sampler(model: Model, steps: int = 28, guidance: Guidance = None, batch: int = 128) -> Sampler:
    """Draw images with the model as it stands; equal seeds give equal noise. Not counted as training cost.

    Predicted x_0 is clipped where the model's own pipeline clips it.
    """

    @torch.no_grad()
    def draw(prompts: Sequence[str], seed: int) -> Tensor:
        images = []
        names = sorted(set(prompts))
        encoded = model.encode(names)
        noise = model.noise(len(prompts), torch.Generator().manual_seed(seed))
        rows = torch.tensor([names.index(prompt) for prompt in prompts])
        with model.uncounted():
            for part in torch.arange(len(prompts)).split(batch):
                field = guided_field(model, encoded[rows[part]], guidance)
                images.append(model.decode(rollout(field, noise[part], model.grid(steps), clip=model.clip).last))
        return torch.cat(images)

    return draw


def guided_field(model: Model, condition: Condition, guidance: Guidance) -> Field:
    """The model's field under one condition, at a scale that may change with time."""

    def field(x_t: Tensor, t: Tensor) -> Prediction:
        return model.predict(x_t, t, condition, guidance(t) if callable(guidance) else guidance)

    return field


def neighbours(target: Concept) -> list[Concept]:
    """The compositions nearest to the target: for a shape the two of largest overlap, for a colour the nearest in RGB,
    for a pair those that share one of its two attributes."""
    shown = [c for c in concepts() if (c.colour, c.shape) != HELD_OUT and not target.contains(c)]
    if target.shape and target.colour:
        return [c for c in shown if (c.shape == target.shape) != (c.colour == target.colour)]
    if target.shape:
        n = len(SHAPES)
        masks = silhouettes(torch.arange(n), torch.full((n, 2), 16.0), torch.full((n,), 10.0), 32).flatten(1)
        overlap = torch.minimum(masks[:, None], masks).sum(-1) / torch.maximum(masks[:, None], masks).sum(-1)
        order = overlap[SHAPES.index(target.shape)].argsort(descending=True).tolist()
        near = [SHAPES[i] for i in order[1:3]]
        return [c for c in shown if c.shape in near]
    inks = torch.tensor(list(PALETTE.values()))
    order = torch.cdist(inks, inks)[COLOURS.index(target.colour or COLOURS[0])].argsort().tolist()
    return [c for c in shown if c.colour == COLOURS[order[1]]]


def groups(target: Concept, others: Sequence[Concept] = ()) -> dict[str, list[Concept]]:
    """All trained compositions in three groups: target, neighbours, unrelated; `others` are erased too, so left out."""
    shown = [c for c in concepts() if (c.colour, c.shape) != HELD_OUT]
    erased = [c for c in shown if target.contains(c)] or [c for c in concepts() if target.contains(c)]  # the held out
    kept = [c for c in shown if not any(other.contains(c) for other in (target, *others))]
    near = [c for c in neighbours(target) if c in kept]
    return {"target": erased, "neighbours": near, "unrelated": [c for c in kept if c not in near]}


def erased_concepts(prompts: Sequence[str]) -> list[Concept]:
    """The concepts that target prompts name, without those that another of them contains."""
    named = list(dict.fromkeys(parse(prompt) for prompt in prompts))
    return [c for c in named if not any(other != c and other.contains(c) for other in named)]


def paraphrases(target: Concept) -> list[str]:
    """Prompts for the target in other words than plain captions: synonyms, bare words, another order."""
    full = [caption(c, synonyms=True) for c in concepts() if target.contains(c) and (c.colour, c.shape) != HELD_OUT]
    bare = caption(target, synonyms=True).removeprefix("a ")
    swapped = [" ".join(reversed(caption(c).removeprefix("a ").split())) for c in concepts() if target.contains(c)]
    return [*full, bare, caption(target), *swapped]


@dataclass(frozen=True)
class Asked:
    """Images of one group: what was asked (repeated per image), what the judge saw."""

    asked: list[Concept]
    images: Tensor
    seen: Verdicts

    def right(self) -> Tensor:
        """Whether each image shows all that was asked; (n,) bool."""
        each = [self.seen.shows(c) for c in dict.fromkeys(self.asked)]
        names = list(dict.fromkeys(self.asked))
        return torch.stack(each)[[names.index(c) for c in self.asked], torch.arange(len(self.asked))]

    def names(self) -> list[str]:
        """What the judge saw, in words."""
        pairs = zip(self.seen.shape.tolist(), self.seen.colour.tolist(), strict=True)
        return ["nothing" if shape < 0 else f"{COLOURS[colour]} {SHAPES[shape]}" for shape, colour in pairs]

    def labels(self) -> Tensor:
        """One label an image: its composition, or the last label where it is invalid."""
        return torch.where(
            self.seen.valid, self.seen.shape * len(COLOURS) + self.seen.colour, len(SHAPES) * len(COLOURS)
        )


def ask(draw: Sampler, world: ShapesWorld, asked: Sequence[Concept], n: int, seed: int) -> Asked:
    """n images of each concept's plain caption, judged."""
    every = [concept for concept in asked for _ in range(n)]
    images = draw([caption(concept) for concept in every], seed)
    return Asked(every, images, world.judge(images))


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


def erasure(
    before: Sampler | dict[str, Asked],
    after: Sampler,
    world: ShapesWorld,
    target: Concept,
    n: int,
    seed: int = 0,
    others: Sequence[Concept] = (),
) -> Erasure:
    """Judge n images per prompt of every group, before and after, at equal seeds."""
    sides = groups(target, others)
    old = before if isinstance(before, dict) else ask_groups(before, world, sides, n, seed)
    new = ask_groups(after, world, sides, n, seed)
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
    if not kept:  # nothing else than the target is left to ask for
        return Erasure(numbers, {}, old, new)
    kept_new, kept_old = (torch.cat([side[k].images for k in kept]) for side in (new, old))
    labels_new, labels_old = (torch.cat([side[k].labels() for k in kept]) for side in (new, old))
    features, size = pixel_features(8), len(SHAPES) * len(COLOURS) + 1
    distances = {
        "frechet, 8x8 pixels, kept prompts": frechet_distance(features(kept_old), features(kept_new)),
        "total variation of labels, kept prompts": total_variation(
            labels_old.bincount(minlength=size), labels_new.bincount(minlength=size)
        ),
    }
    return Erasure(numbers, distances, old, new)


def ask_groups(
    draw: Sampler, world: ShapesWorld, sides: dict[str, list[Concept]], n: int, seed: int
) -> dict[str, Asked]:
    """Every group's images from one model; a group's seed depends on its place only, so two models compare."""
    return {name: ask(draw, world, side, n, seed + 1000 * i) for i, (name, side) in enumerate(sides.items()) if side}


def by_attribute(asked: Asked) -> dict[str, Interval]:
    """Share of images that show all that was asked: in all, by colour, by shape, and for the held-out composition."""
    right = asked.right()
    held = torch.tensor([(c.colour, c.shape) == HELD_OUT for c in asked.asked])
    rows = {"all trained": share(right[~held]), "held out: " + " ".join(HELD_OUT): share(right[held])}
    for word in (*COLOURS, *SHAPES):
        rows[word] = share(right[torch.tensor([word in (c.colour, c.shape) for c in asked.asked]) & ~held])
    rows["valid"] = share(asked.seen.valid)
    return rows


def detected(draw: Sampler, world: ShapesWorld, target: Concept, prompts: Sequence[str], n: int, seed: int) -> Interval:
    """Share of images of these prompts, n each, that show the target."""
    images = draw([prompt for prompt in prompts for _ in range(n)], seed)
    return share(world.judge(images).shows(target))


def plain_prompts(target: Concept) -> list[str]:
    """The target's plain captions."""
    return [caption(c) for c in groups(target)["target"]]
