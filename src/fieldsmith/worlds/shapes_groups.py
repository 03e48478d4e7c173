"""Which compositions of the shapes world a concept is judged on: itself, its neighbours, what is unrelated.

In: a concept, or prompts that name some. Out: groups of concepts and prompts, for erasures and attacks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fieldsmith.worlds.shapes import COLOURS, HELD_OUT, PALETTE, SHAPES, Concept, caption, concepts, parse, silhouettes


def trained() -> list[Concept]:
    """All compositions but the held-out one."""
    return [c for c in concepts() if (c.colour, c.shape) != HELD_OUT]


def neighbours(target: Concept) -> list[Concept]:
    """The compositions nearest to the target: for a shape the two of largest overlap, for a colour the nearest in RGB,
    for a pair those that share one of its two attributes."""
    shown = [c for c in trained() if not target.contains(c)]
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
    shown = trained()
    erased = [c for c in shown if target.contains(c)] or [c for c in concepts() if target.contains(c)]  # the held out
    kept = [c for c in shown if not any(other.contains(c) for other in (target, *others))]
    near = [c for c in neighbours(target) if c in kept]
    return {"target": erased, "neighbours": near, "unrelated": [c for c in kept if c not in near]}


def attributes() -> dict[str, list[Concept]]:
    """Compositions by what they have in common: all trained ones, the held-out one, each colour and shape."""
    rows = {"all trained": trained(), "held out: " + " ".join(HELD_OUT): [Concept(*HELD_OUT)]}
    return rows | {word: [c for c in trained() if word in (c.colour, c.shape)] for word in (*COLOURS, *SHAPES)}


def erased_concepts(prompts: Sequence[str]) -> list[Concept]:
    """The concepts that target prompts name, without those that another of them contains."""
    named = list(dict.fromkeys(parse(prompt) for prompt in prompts))
    return [c for c in named if not any(other != c and other.contains(c) for other in named)]


def paraphrases(target: Concept) -> list[str]:
    """Prompts for the target in other words than plain captions: synonyms, bare words, another order."""
    full = [caption(c, synonyms=True) for c in trained() if target.contains(c)]
    bare = caption(target, synonyms=True).removeprefix("a ")
    swapped = [" ".join(reversed(caption(c).removeprefix("a ").split())) for c in concepts() if target.contains(c)]
    return [*full, bare, caption(target), *swapped]


def phrasings(target: str, anchor: str) -> list[tuple[str, str]]:
    """The bare words: an erasure of 'triangle' holds for every colour, in this world."""
    return [(target, anchor)]


def anchor(target: Concept) -> str:
    """What the nearest composition has in the place of the target's words."""
    near = neighbours(target)[0]
    return str(Concept(near.colour if target.colour else None, near.shape if target.shape else None))


def kept_captions(targets: Sequence[str]) -> list[str]:
    """Every colour and every shape that no target names, and the empty prompt."""
    erased = [parse(prompt) for prompt in targets]
    open_ = [*(Concept(colour) for colour in COLOURS), *(Concept(shape=shape) for shape in SHAPES)]
    return [*(caption(c) for c in open_ if not any(e.contains(c) for e in erased)), ""]
