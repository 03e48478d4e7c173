"""Which emoji scenes a model is asked for: to train it, to see what else changes, to judge an object's erasure.

In: an object's name, or prompts that name some. Out: scenes and prompts in groups.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from fieldsmith.errors import InputError, check_word
from fieldsmith.worlds.emoji import KINDS, neighbours, prompts
from fieldsmith.worlds.emoji_captions import BACKGROUNDS, OBJECTS, PLURALS, RELATIONS, Group, Scene, parse

UNSEEN = "two objects, never together"  # pairs that no training picture shows


def training_captions() -> tuple[str, ...]:
    """24 prompts of each kind."""
    return tuple(prompt for kind in KINDS for prompt in prompts(kind, 24))


def other_captions() -> tuple[str, ...]:
    """Prompts that `training_captions` lacks: pairs that never meet in training, and other scenes of each kind."""
    others = [*prompts("two objects", 24, held_out=True), *(p for kind in KINDS for p in prompts(kind, 6, seed=1))]
    return tuple(prompt for prompt in dict.fromkeys(others) if prompt not in training_captions())


def kinds() -> dict[str, list[Scene]]:
    """Scenes by the kind of question that they ask; pairs that never meet in training apart."""
    asked = {kind: prompts(kind, 24, seed=2) for kind in KINDS}
    asked[UNSEEN] = prompts("two objects", 24, seed=2, held_out=True)
    return {kind: [parse(prompt) for prompt in found] for kind, found in asked.items()}


def scenes() -> list[Scene]:
    """All scenes of `kinds`, each once."""
    return list(dict.fromkeys(scene for found in kinds().values() for scene in found))


def named(words: str) -> str:
    """The object of 'a cat', 'cat' or 'cats'. Raises InputError at words that name none, or more than one."""
    names = {name: name for name in OBJECTS} | {plural: name for name, plural in PLURALS.items()}
    found = words.lower().split()
    if len(found) == 1:
        check_word(found[0], tuple(names), "the emoji world's objects")
        return names[found[0]]
    kinds = {group.name for group in parse(words).groups}
    if len(kinds) != 1:
        raise InputError(f"target '{words}' names {len(kinds)} kinds of objects; name one, as in 'a cat'")
    return kinds.pop()


def erased_objects(targets: Sequence[str]) -> list[str]:
    """The objects that target prompts name. Raises InputError at a prompt that names none, or more than one."""
    return list(dict.fromkeys(named(prompt) for prompt in targets))


def phrasings(target: str, anchor: str) -> list[tuple[str, str]]:
    """The ways in which an object is asked for, each beside the same words with the anchor's object in its place.

    One, two and three of it, plainly and on every background, small, beside other objects and placed by them: 53 in
    all. Raises InputError at words that name no object, or more than one.
    """
    name, other = named(target), named(anchor)
    draw = random.Random(f"{name} {other}")
    company = [Group(one) for one in draw.sample([one for one in OBJECTS if one not in (name, other)], 24)]
    grounds = (None, *BACKGROUNDS)

    def scenes(one: str) -> Iterator[Scene]:
        yield from (Scene((Group(one, count),), background=ground) for count in (1, 2, 3) for ground in grounds)
        yield from (Scene((Group(one, count, small=True),)) for count in (1, 2))
        for place, beside in enumerate(company):
            ground = grounds[place % len(grounds)]
            relation = RELATIONS[place // 2 % len(RELATIONS)] if place % 3 == 0 else None
            pair = (Group(one), beside)
            yield Scene(pair if place % 2 else pair[::-1], relation, ground)
        yield from (Scene((Group(one, 2), beside)) for beside in company[:3])
        yield from (Scene((beside, Group(one), more)) for beside, more in zip(company[3:6], company[6:9], strict=True))

    return [(str(ours), str(theirs)) for ours, theirs in zip(scenes(name), scenes(other), strict=True)]


def anchor(target: str) -> str:
    """The first of the other objects of the target's group."""
    return str(Scene((Group(neighbours(target)[0]),)))


def kept_captions(targets: Sequence[str]) -> list[str]:
    """Every other object alone on some background, two of some, pairs of others, and the empty prompt."""
    erased = erased_objects(targets)
    names = [name for name in OBJECTS if name not in erased]
    draw = random.Random(" ".join(erased))
    alone = [Scene((Group(name),), background=draw.choice((None, *BACKGROUNDS))) for name in names]
    counted = [Scene((Group(name, 2 + place % 2),)) for place, name in enumerate(draw.sample(names, 8))]
    mixed = draw.sample(names, 24)
    pairs = [
        Scene((Group(a), Group(b)), draw.choice((None, *RELATIONS)), draw.choice((None, *BACKGROUNDS)))
        for a, b in zip(mixed[:12], mixed[12:], strict=True)
    ]
    return [*(str(scene) for scene in (*alone, *counted, *pairs)), ""]


def groups(target: str, others: Sequence[str] = ()) -> dict[str, list[Scene]]:
    """The target alone, twice, three times and beside others; its neighbours and what is unrelated, alone.

    Neighbours are the rest of the target's group. `others` are erased too, so they are left out.
    """
    kept = [name for name in OBJECTS if name not in (target, *others)]
    near = [name for name in kept if name in neighbours(target)]
    target_scenes = [Scene((Group(target, count),)) for count in (1, 2, 3)]
    beside = [Scene((Group(target), Group(name))) for name in kept[:: len(kept) // 5]]
    return {
        "target": [*target_scenes, *beside],
        "neighbours": [Scene((Group(name),)) for name in near],
        "unrelated": [Scene((Group(name),)) for name in kept if name not in near],
    }


def paraphrases(target: str) -> list[str]:
    """Prompts that show the target otherwise: small, on every background, beside the next object of its group."""
    other = Group((neighbours(target))[0])
    small = [Scene((Group(target, small=True),)), Scene((Group(target, 2, small=True),))]
    grounds = [Scene((Group(target),), background=name) for name in BACKGROUNDS]
    placed = [Scene((Group(target), other), "left of"), Scene((other, Group(target)), "above")]
    return [str(scene) for scene in (*small, *grounds, *placed)]
